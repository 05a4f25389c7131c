"""plan: Scores + a target -> Plan, the kept indices of every axis."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..arch import Keep, LayerKeep, require_cuttable
from ..artifacts import Arrays, Plan, Size, Target
from ..checkpoint import Checkpoint
from ..console import count, gb
from ..errors import PareError, Refused, UsageError
from ..fit import footprint, reach
from ..fit.reach import DEFAULT_AXES, Level
from ..layout import size_of, smaller, total_bytes
from ..packing import BITS, GROUP_SIZES, Packing
from . import allocate


@dataclass(frozen=True)
class Options:
    """What `plan` was asked: exactly one of keep, params, size (bytes) or budget (--for: bytes of
    weights, given the architecture and the width of a cached value)."""

    keep: float | None = None
    params: float | None = None
    size: float | None = None
    budget: Callable | None = None
    budget_name: str = ""
    axes: Sequence[str] = DEFAULT_AXES
    bits: int | None = None
    group_size: int = 64
    step: int | None = None
    protect: bool = True


def packing_of(options: Options, checkpoint: Checkpoint) -> Packing | None:
    """The packing the result is asked to have; None: as the source."""
    if options.bits is None:
        return None
    if options.bits not in BITS or options.group_size not in GROUP_SIZES:
        raise UsageError(f"MLX packs {', '.join(map(str, BITS))} bits in groups of {', '.join(map(str, GROUP_SIZES))}")
    return Packing(options.bits, options.group_size)


@dataclass(frozen=True)
class Shape:
    """The sizes a target leads to, before any unit is chosen."""

    target: Target
    level: Level
    protected: Sequence[int]
    before: Size
    after: Size
    neighbours: list[str]


def shape(checkpoint: Checkpoint, options: Options) -> Shape:
    """The reachable sizes nearest to the target, with uniform widths; needs no scores.

    Raises Unsupported for a model that cannot be cut, UsageError for a target or axis that means nothing, Refused when
    the target cannot be reached.
    """
    arch, packing = checkpoint.arch, packing_of(options, checkpoint)
    require_cuttable(arch)
    protected = reach.protected_layers(arch) if options.protect else []
    space = reach.space(arch, options.axes, _step(checkpoint, packing, options), protected)

    def skeleton(level: Level) -> Keep:
        return reach.skeleton(arch, level, protected)

    def non_embedding(level: Level) -> float:
        return footprint.parameters(smaller(checkpoint, skeleton(level), packing))["non_embedding"]

    def parameters(level: Level) -> float:
        return footprint.parameters(smaller(checkpoint, skeleton(level), packing))["total"]

    def size(level: Level) -> float:
        return total_bytes(checkpoint, skeleton(level), packing)

    def over_budget(level: Level) -> float:
        return size(level) - options.budget(smaller(checkpoint, skeleton(level), packing), checkpoint.value_bytes)

    target, measure, goal, at_most, show = _goal(options, non_embedding, parameters, size, over_budget, space)
    if at_most:
        stored = packing or checkpoint.quantization
        group = stored.group_size if stored else None
        space, level = reach.largest_within(space, group, measure, goal, target.asked, show)
    else:
        level = reach.solve(space, measure, goal, False, target.asked, show)
    if level == space.at(1.0) and packing is None and target.kind != "keep":
        holds = "holds for the whole model" if measure(level) <= goal else "is met best by the whole model"
        raise Refused(f"nothing needs to be cut: {target.asked} {holds}", "do not prune it")
    after = size_of(checkpoint, skeleton(level), packing)
    return Shape(
        target,
        level,
        protected,
        size_of(checkpoint, None, None),
        after,
        reach.neighbours(space, level, measure, show),
    )


def plan(model: Path, scores: Path, options: Options) -> Plan:
    """The plan for a target: its shape, filled with the units of the highest scores. Raises as ``shape``."""
    checkpoint = Checkpoint(model)
    found = _scores_of(checkpoint, scores)
    made = shape(checkpoint, options)
    keep = allocate.choose_units(checkpoint.arch, made.level, found.arrays, made.protected)
    return Plan(
        source=checkpoint.identity(),
        criterion=found.about["criterion"],
        axes=list(options.axes),
        target=made.target,
        bits=options.bits,
        group_size=options.group_size if options.bits else None,
        before=made.before,
        after=made.after,
        neighbours=made.neighbours,
        **_units(checkpoint, keep),
    )


def redraw(model: Path, scores: Path, like: Plan) -> Plan:
    """A plan of exactly the same sizes as ``like``, layer by layer, with the units that other scores choose."""
    checkpoint = Checkpoint(model)
    arch, found = checkpoint.arch, _scores_of(checkpoint, scores)
    kept = {layer.source for layer in like.layers}
    protected = [i for i in reach.protected_layers(arch) if i in kept]  # --no-protect may have cut them
    sources = reach.best_layers(arch, found.arrays["layer"], len(like.layers), protected)
    layers = []
    for source, layer in zip(sources, like.layers, strict=True):
        units = allocate.units_of(arch, source, found.arrays, len(layer.ffn), len(layer.kv_head))
        layers.append({**layer.model_dump(), "source": source, **units})
    changes = {"criterion": found.about["criterion"], "layers": layers}
    if like.hidden:
        changes["hidden"] = allocate.hidden_of(found.arrays, len(like.hidden))
    return Plan.model_validate({**like.model_dump(), **changes})


def whole(model: Path, like: Plan, limit: int) -> Plan | None:
    """The uncut model in the widest packing of at most ``limit`` bytes, which pruning competes with; or None."""
    checkpoint = Checkpoint(model)
    everything = Keep(tuple(LayerKeep(i) for i in range(len(checkpoint.arch.layers))))
    source = checkpoint.quantization
    group = like.group_size or (source.group_size if source else 64)
    for bits in sorted(BITS, reverse=True):
        after = size_of(checkpoint, everything, Packing(bits, group))
        if after.bytes <= limit:
            changes = {
                "criterion": "none",
                "axes": [],
                "bits": bits,
                "group_size": group,
                "embedding_bits": None,
                "after": after.model_dump(),
                "neighbours": [],
            }
            return Plan.model_validate({**like.model_dump(), **changes, **_units(checkpoint, everything)})
    return None


def _scores_of(checkpoint: Checkpoint, scores: Path) -> Arrays:
    found = Arrays.load(scores, "scores")
    if found.about.get("model") != checkpoint.identity():
        raise PareError(f"{scores} was made from another model than {checkpoint.path}", "score this model first")
    return found


def _units(checkpoint: Checkpoint, keep: Keep) -> dict[str, Any]:
    """A cut as the fields of a Plan, every index written out."""
    layers = []
    for layer in keep.layers:
        sizes = checkpoint.arch.layers[layer.source].sizes
        kept = {axis: list(layer.keep.get(axis, range(sizes[axis]))) for axis in ("ffn", "kv_head")}
        layers.append({"source": layer.source, **kept})
    cut_hidden = keep.hidden is not None and len(keep.hidden) != checkpoint.arch.sizes["hidden"]
    return {"layers": layers, "hidden": list(keep.hidden) if cut_hidden else None}


def _goal(options: Options, non_embedding, parameters, size, over_budget, space):
    """(target, measure, goal, whether it is an upper bound, how a measure is written)."""
    given = [n for n in ("keep", "params", "size", "budget") if getattr(options, n) is not None]
    if len(given) != 1:
        raise UsageError(
            "give exactly one target", "--keep 0.75, --target-params 24B, --target-size 15GB or --for m4-24gb"
        )
    if options.keep is not None:
        if not 0 < options.keep <= 1:
            raise UsageError(
                f"--keep {options.keep} is not between 0 and 1",
                "0.75 keeps three quarters of the non-embedding parameters",
            )
        whole = non_embedding(space.at(1.0))
        target = Target(
            kind="keep", value=options.keep, asked=f"keeping {options.keep:g} of the non-embedding parameters"
        )
        return target, non_embedding, options.keep * whole, False, lambda v: f"keep {v / whole:.3f}"
    if options.params is not None:
        target = Target(kind="params", value=options.params, asked=f"{count(options.params)} parameters")
        return target, parameters, options.params, False, count
    if options.size is not None:
        target = Target(kind="size", value=options.size, asked=f"{gb(options.size)} of weights")
        return target, size, options.size, True, gb
    target = Target(kind="for", value=0, asked=f"fitting {options.budget_name}")
    return target, over_budget, 0.0, True, lambda v: f"{gb(-v)} of headroom"


def _step(checkpoint: Checkpoint, packing: Packing | None, options: Options) -> int:
    packing = packing or checkpoint.quantization
    return options.step or reach.unit(checkpoint.arch, packing.group_size if packing else None)
