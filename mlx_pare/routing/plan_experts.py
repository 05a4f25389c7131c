"""The part of the plan step that models with experts need: which experts stay, and what is not done for such models."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path

from ..arch import Architecture
from ..base import console
from ..model.checkpoint import Checkpoint
from ..options.settings import Settings
from ..planning.trial_cache import held_rows
from ..pruning.plan_file import Plan
from ..store.arrays import Arrays
from ..store.rundir import Run
from ..store.schema import dump_json
from ..text.splits import Texts
from .choose_experts import choose_experts

PREFIX = "expert."  # of arrays with the scores of one more criterion


def settled(arch: Architecture, s: Settings) -> Settings:
    """Leave out what is not done for models with experts: trials of widths, and reconstruction."""
    if not arch.uses("expert"):
        return s
    return replace(s, reconstruct=False, widths="even", choose_bits=())


def chooses(run: Run, s: Settings, scores: Path) -> str | None:
    """Tell by what the experts of a plan are chosen once their number is known.

    Args:
        run: the run directory.
        s: settings of the run.
        scores: file of ``score``.
    Returns:
        A word for the record of the step; None: the scores have chosen them, or the plan removes none.
    """
    arch = Checkpoint(run.model).arch
    several = any(name.startswith(PREFIX) for name in Arrays.load(scores, "scores").arrays)
    return "held-out error" if arch.uses("expert") and "expert" in s.axes and several else None


def with_experts(run: Run, texts: Texts, s: Settings, made: Plan, scores: Path, directory: Path) -> Plan:
    """Choose the experts of a plan by what the blocks lose on held-out text.

    Args:
        run: the run directory.
        texts: of the run.
        s: settings of the run.
        made: the plan.
        scores: file of ``score`` with several criteria.
        directory: of the step; experts.json is written there.
    Returns:
        The plan with its experts.
    Raises:
        Refused: the memory does not suffice.
    """
    arrays = Arrays.load(scores, "scores").arrays
    proposals = {name.removeprefix(PREFIX): found for name, found in arrays.items() if name.startswith(PREFIX)}
    chosen, choices = choose_experts(run.model, made, proposals, held_rows(texts), s.memory_cap)
    (directory / "experts.json").write_bytes(dump_json([{**asdict(c), "best": c.best} for c in choices]))
    wins = {name: sum(choice.best == name for choice in choices) for name in proposals}
    told = ", ".join(f"{name} {count}" for name, count in sorted(wins.items(), key=lambda w: -w[1]) if count)
    if choices:
        console.say(f"experts chosen by the held-out error of their blocks, layers by criterion: {told}")
    return chosen
