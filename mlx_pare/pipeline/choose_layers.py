"""How the plan step of a run chooses the layers to remove: by trials one after the other (planning/drop_layers.py), or
by the scores of a criterion. In both cases the scores choose the units of the layers that are left."""

from __future__ import annotations

import math
from dataclasses import asdict
from pathlib import Path

import mlx.core as mx
import numpy as np

from ..base import console
from ..base.errors import UsageError
from ..base.untrusted import read_json
from ..model.checkpoint import Checkpoint
from ..options.settings import Settings
from ..planning.choose_units import read_scores
from ..planning.drop_layers import layers_by_kl, trials
from ..planning.plan import plan
from ..planning.trial_cache import Known, finite, held_rows, once, plan_kl
from ..planning.uniform import shape, splits
from ..pruning.plan_file import Plan
from ..pruning.reach import Level, protected_layers
from ..scoring.score import criterion, score
from ..store.arrays import Arrays
from ..store.rundir import Run
from ..store.schema import dump_json
from ..text.splits import Texts
from .steps import plan_options

LAYERS_BY = ("block-influence", "angular", "kl")


def layers_by_of(s: Settings, by_units: str) -> str | None:
    """Decide how the layers to remove are chosen; None: by the scores of the criterion ``by_units``.

    By default they are chosen by KL. The scores choose them if nothing else is tried either, or if the criterion has
    its own formula for layers. Raises UsageError for an unknown way, or if no layers can be removed.
    """
    if s.layers_by not in (None, *LAYERS_BY):
        raise UsageError(f"unknown way to choose layers {s.layers_by!r}", f"choose one of {', '.join(LAYERS_BY)}")
    if s.widths == "per-layer":  # what each layer is worth is measured, and weighed against everything else
        if s.layers_by is not None:
            raise UsageError(
                "widths per layer choose the layers with all the rest", "leave out --layers-by, or --widths per-layer"
            )
        return None
    if s.layers_by is None:
        return "kl" if "layer" in s.axes and s.widths != "even" and "layer" not in criterion(by_units).own else None
    if "layer" not in s.axes:
        raise UsageError(f"--layers-by {s.layers_by} chooses layers, but none may go", "add layer to --axes")
    return s.layers_by


def with_layers(run: Run, texts: Texts, s: Settings, most: int, by: str, scores: Path, directory: Path) -> Path:
    """Write the scores next to the plan, with other arrays in place of those that choose layers.

    Args:
        run: the run directory.
        texts: of the run; their validation text is used if ``by`` is "kl".
        s: settings of the run.
        most: with "kl", how many divisions of the cut between the axes are considered; 0: only the even one.
        by: one of LAYERS_BY.
        scores: file that ``score`` wrote.
        directory: of the plan step.
    Returns:
        The file that was written.
    Raises:
        Refused: with "kl", the layers cannot be kept, or the memory does not suffice.
        PareError: a file cannot be read or is of another model, or the statistics hold no angles.
    """
    found, out = read_scores(scores, Checkpoint(run.model)), directory / f"{by}.safetensors"
    if by == "kl":
        deep = {"kept": _kept_by_kl(run, texts, s, most, directory)}
    else:
        stats = run.output("calibrate", "stats.safetensors")
        deep = read_scores(score(run.model, stats, out, by, s.seed)).arrays
        deep = {name: deep[name] for name in ("layer", "angles") if name in deep}
    arrays = {name: array for name, array in found.arrays.items() if name != "angles"} | deep
    Arrays({name: mx.array(array) for name, array in arrays.items()}, {**found.about, "layers_by": by}).save(out)
    return out


def best_repaired(run: Run, texts: Texts, s: Settings, made: Plan, scores: Path, directory: Path) -> Plan:
    """Reconstruct the plan with several sets of layers, and take the set that leaves the least KL divergence.

    The sets are those of the trials, of block influence and of angular distance. Reconstruction makes up for removed
    neighbours more easily than the trials, which do not reconstruct, can know (benchmarks/LOG.md). Equal sets are
    reconstructed once. If all are equal, nothing is reconstructed. The results are added to layers.json.

    Args:
        run: the run directory.
        texts: of the run.
        s: settings of the run.
        made: the plan with the layers of the trials.
        scores: file that ``score`` wrote.
        directory: of the plan step, with layers.json.
    Returns:
        The best plan.
    """
    arch = Checkpoint(run.model).arch
    heads = max(len(layer.kv_head) for layer in made.layers) or arch.uniform("kv_head")  # hybrids: not in all layers
    level = Level(max(len(layer.ffn) for layer in made.layers), heads, len(made.layers), arch.sizes["hidden"])
    found = {"kl": made}
    for by in (by for by in LAYERS_BY if by != "kl"):
        other = plan(run.model, with_layers(run, texts, s, 0, by, scores, directory), plan_options(s), level)
        if all([x.source for x in other.layers] != [x.source for x in each.layers] for each in found.values()):
            found[by] = other
    if len(found) == 1:
        return made
    kl = {by: plan_kl(run, texts, s, each) for by, each in found.items()}
    noted = read_json(directory / "layers.json", "layers")
    noted["reconstructed_kl"] = {by: kl[by] if math.isfinite(kl[by]) else None for by in kl}
    (directory / "layers.json").write_bytes(dump_json(noted))
    best = min(kl, key=kl.__getitem__)
    console.say(
        "layers, reconstructed: KL " + ", ".join(f"{by} {one:.4f}" for by, one in kl.items()) + f"; taken: {best}"
    )
    return found[best]


def _kept_by_kl(run: Run, texts: Texts, s: Settings, most: int, directory: Path) -> np.ndarray:
    """Return int32 [layers + 1, layers]: row n marks the layers that are kept if n are, for every n that a level can
    ask for.

    layers.json gets the removed layers, and the KL divergence after each.
    """
    checkpoint, options, held = Checkpoint(run.model), plan_options(s), held_rows(texts)
    total, known = len(checkpoint.arch.layers), Known(run, held.digest(), "layers")
    levels = splits(checkpoint, options, most) if most else [shape(checkpoint, options).level]
    protected = protected_layers(checkpoint.arch) if s.protect else []
    kept, drops = np.zeros((total + 1, total), np.int32), {}
    for count in sorted({level.layer for level in levels}):
        gone = layers_by_kl(run.model, count, held, protected, tried=once(known, trials(run.model, held, s.memory_cap)))
        kept[count] = [i not in {drop.layer for drop in gone} for i in range(total)]
        drops[count] = [{**asdict(drop), **finite(drop.kl)} for drop in gone]
    (directory / "layers.json").write_bytes(dump_json({"by": "kl", "held_tokens": held.total, "drops": drops}))
    told = ", ".join(f"{drop['layer']} (KL {drop['kl']:.4f})" for drop in drops[min(drops)])
    console.say(f"layers that go, one after the other: {told or 'none'}")
    return kept
