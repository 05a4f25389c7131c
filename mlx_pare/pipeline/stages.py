"""schedule: gradual pruning in stages. Each stage cuts what the stage before left, and heals it with the original as
the teacher.

    RUN/stage-1, RUN/stage-2, ...   ordinary run directories, up to recover; the model of one is what the next one cuts
    RUN/plan/plan.json              what is left in the end, as one cut of the original: units and sizes

Iterative pruning with distillation in between is from Muralidharan et al. 2024, arXiv 2407.14679 (Minitron), section 4.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path

from ..base.errors import Refused, UsageError
from ..model.checkpoint import Checkpoint
from ..model.footprint import parameters
from ..options.settings import STAGES, Settings
from ..pruning.plan_file import Plan, Target
from ..pruning.survivors import survivors
from ..store.places import name_of
from ..store.rundir import Run


@dataclass(frozen=True)
class Stage:
    """One stage, counted from 1: the share of the original's non-embedding parameters that is left after it, and its
    part of the steps of recovery. ``last`` marks the stage whose model is the result."""

    number: int
    share: float
    steps: int
    last: bool

    @property
    def name(self) -> str:
        return name_of(self.number)

    def settings(self, s: Settings, original: Path, parent: Path) -> Settings:
        """Return what is asked of this stage alone, with the original as the teacher.

        Only the result is packed with the bits that were asked for. Until then the widths suit that packing.

        Args:
            s: settings of the whole run.
            original: model directory of the original.
            parent: model directory that this stage cuts.
        Returns:
            The settings, with the share of ``parent`` that this stage keeps.
        """
        now, whole = (parameters(Checkpoint(path).arch)["non_embedding"] for path in (parent, original))
        return replace(
            s,
            stages=None,
            keep=min(self.share / (now / whole), 1.0),  # a stage may have cut a little more than its share
            recover_steps=self.steps,
            teacher=s.teacher or str(original),
            bits=s.bits if self.last else None,
            step=s.step or (s.group_size if s.bits and not self.last else None),
        )


def check(s: Settings) -> None:
    """Raises UsageError for settings with a schedule that means nothing, or cannot be carried out."""
    if s.stages is None:
        return
    asked = f"--schedule {','.join(f'{share:g}' for share in s.stages)}"
    if any(given is not None for given in (s.keep, s.target_params, s.target_size, s.mac)):
        raise UsageError(f"{asked} is itself a target", "leave out --keep, --target-params, --target-size and --for")
    if len(s.stages) < 2:
        raise UsageError(f"{asked} has one stage", f"give two or more, e.g. {STAGES}, or use --keep")
    if not all(0 < share < 1 for share in s.stages):  # NaN fails here too
        raise UsageError(f"{asked} has a share that is not between 0 and 1", f"e.g. {STAGES}")
    if any(one <= other for one, other in pairwise(s.stages)):
        raise UsageError(f"{asked} does not fall", f"every stage keeps less than the one before, e.g. {STAGES}")
    if s.widths == "per-layer":
        raise UsageError(
            "a model whose layers differ is not cut again, as --schedule would", "use --widths uniform, or --keep"
        )
    if s.recover_steps < len(s.stages):
        raise UsageError(
            f"{s.recover_steps} steps of recovery are too few for {len(s.stages)} stages, each of which is recovered",
            "give more --recover-steps, or use --keep",
        )


def stages(s: Settings) -> Iterator[Stage]:
    """Yield the stages of settings with a schedule. The steps of recovery are divided evenly; the first stages get
    those left over."""
    every, over = divmod(s.recover_steps, len(s.stages))
    for index, share in enumerate(s.stages):
        yield Stage(index + 1, share, every + (index < over), index + 1 == len(s.stages))


def named(s: Settings, name: str) -> Stage:
    """Return one of the stages by its name."""
    return next(stage for stage in stages(s) if stage.name == name)


def agree(run: Run, s: Settings) -> None:
    """Raises Refused for a run directory that was begun in one shot and would continue in stages, or the other way
    round. Otherwise that would be found only at the end."""
    staged = (run.path / name_of(1)).exists()
    if s.stages and "calibrate" in run.manifest.steps:
        raise Refused(f"{run.path} was begun without --schedule", "use another --out")
    if staged and not s.stages:
        raise Refused(f"{run.path} was begun with --schedule", "use another --out, or say --schedule again")


# ---- all stages as one cut ----


def composed(run: Path, asked: Sequence[float]) -> Plan:
    """Return what the stages left, as one cut of the original. Its units are those of the original, so no criterion may
    choose them again."""
    first, last = (run / name_of(number) / "prune" / "model" for number in (1, len(asked)))
    begun, done = Plan.load(first / "plan.json"), Plan.load(last / "plan.json")
    left = survivors(last / "survivors.json")
    layers = [
        layer.model_copy(update={key: said[key] for key in ("source", "ffn", "kv_head")})
        for layer, said in zip(done.layers, left["layers"], strict=True)
    ]
    hidden = None if len(left["hidden"]) == begun.before.hidden else left["hidden"]
    listed = ", ".join(f"{share:g}" for share in asked)
    target = Target(kind="keep", value=asked[-1], asked=f"keeping {listed} of the non-embedding parameters, in stages")
    changes = {"source": begun.source, "criterion": f"{done.criterion}, in stages", "target": target, "neighbours": []}
    return done.model_copy(update={**changes, "before": begun.before, "hidden": hidden, "layers": layers})


def plan_step(run: Run, s: Settings) -> None:
    """Record the cut of all stages together as the plan of the run."""
    made = composed(run.path, s.stages)
    run.step(
        "plan",
        {"stages": list(s.stages), "widths": s.widths},
        {"model": run.manifest.source, "composed": hashlib.sha256(made.dump()).hexdigest()},
        lambda directory: (directory / "plan.json").write_bytes(made.dump()),
    )
