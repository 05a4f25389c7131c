"""plan: Scores + a target -> Plan, the kept indices of every axis."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..arch import Keep, LayerKeep
from ..model.checkpoint import Checkpoint
from ..pruning import reach
from ..pruning.layout import size_of
from ..pruning.plan_file import Plan, Size
from ..pruning.reach import Level
from ..sources.open_model import StrPath, opened
from ..tensors.packing import BITS, Packing
from . import choose_units
from .candidate import PARTS, Candidate
from .goal import Options, goal
from .per_layer import Losses, propose, spaces
from .uniform import Shape, shape, splits

__all__ = [
    "Losses",
    "Options",
    "Shape",
    "plan",
    "plan_widths",
    "propose",
    "redraw",
    "shape",
    "spaces",
    "splits",
    "whole",
]


def plan(model: StrPath, scores: StrPath, options: Options, level: Level | None = None) -> Plan:
    """Make the plan for a target: choose the sizes, then fill them with the units of the highest scores.

    Args:
        model: model directory, GGUF file or name.
        scores: file that ``score`` wrote.
        options: the target and its limits.
        level: the sizes, if they are already chosen; None: the even split that meets the target best.
    Returns:
        The plan.
    Raises:
        Unsupported: the model cannot be cut.
        UsageError: a target or an axis means nothing.
        Refused: the target cannot be reached, or nothing needs to be cut.
        PareError: the scores cannot be read, or were made from another model.
    """
    checkpoint = Checkpoint(opened(model))
    found = choose_units.read_scores(Path(scores), checkpoint)
    made = shape(checkpoint, options, level)
    keep = choose_units.choose_units(checkpoint.arch, made.level, found.arrays, made.protected)
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


def plan_widths(model: Path, scores: Path, candidate: Candidate, losses: Losses, options: Options) -> Plan:
    """Make the plan of a candidate, in which every layer can have its own widths.

    With the criterion obs the units are those that greedy OBS keeps, else those of the highest scores.

    Args:
        model: model directory.
        scores: file that ``score`` wrote.
        candidate: the width of every layer of the source.
        losses: what ``sensitivity`` found.
        options: the target, bits and group size.
    Returns:
        The plan.
    Raises:
        UsageError: there is not exactly one target, or it means nothing.
        PareError: the scores were made from another model, or what is left would load nowhere.
    """
    checkpoint = Checkpoint(model)
    arch, found = checkpoint.arch, choose_units.read_scores(scores, checkpoint)
    layers = []
    for source, width in enumerate(candidate):
        if width is None:
            continue
        units = {axis: losses.kept(source, part, width.units(part)) for part, axis in PARTS.items()}
        if found.about["criterion"] != "obs":
            units = choose_units.units_of(source, found.arrays, {"ffn": width.ffn, "kv_head": width.kv_head})
        bits = {f"{part}_bits": width.bits(part) for part in PARTS}
        layers.append({"source": source, **units, **bits})
    grouped = options.bits or any(layer["attention_bits"] or layer["ffn_bits"] for layer in layers)
    nothing = Size(**dict.fromkeys(Size.model_fields, 0))
    made = Plan(
        source=checkpoint.identity(),
        criterion=found.about["criterion"],
        axes=list(options.axes),
        target=goal(checkpoint, options).target,
        bits=options.bits,
        group_size=options.group_size if grouped else None,
        before=size_of(checkpoint, None, None),
        after=nothing,
        layers=layers,
    )
    return made.model_copy(update={"after": size_of(checkpoint, made.keep(arch), made.packing)})


def redraw(model: Path, scores: Path, like: Plan) -> Plan:
    """Make a plan of exactly the same sizes as ``like``, layer by layer, with the units that other scores choose.

    Args:
        model: model directory.
        scores: file that ``score`` wrote.
        like: the plan whose sizes are taken.
    Returns:
        The plan.
    Raises:
        PareError: the scores cannot be read, or were made from another model.
    """
    checkpoint = Checkpoint(model)
    arch, found = checkpoint.arch, choose_units.read_scores(scores, checkpoint)
    kept = {layer.source for layer in like.layers}
    protected = [i for i in reach.protected_layers(arch) if i in kept]  # --no-protect may have cut them
    sources = choose_units.layers_of(arch, found.arrays, len(like.layers), protected)
    layers = []
    for source, layer in zip(sources, like.layers, strict=True):
        units = choose_units.units_of(source, found.arrays, {axis: len(kept) for axis, kept in layer.units().items()})
        layers.append({**layer.model_dump(), "source": source, **units})
    changes = {"criterion": found.about["criterion"], "layers": layers}
    if like.hidden:
        changes["hidden"] = choose_units.hidden_of(found.arrays, len(like.hidden))
    return Plan.model_validate({**like.model_dump(), **changes})


def whole(model: Path, like: Plan, limit: int) -> Plan | None:
    """Plan the uncut model in the widest packing that fits a size: pruning competes with it.

    Args:
        model: model directory.
        like: the plan of the pruned model; its group size is used if it has one.
        limit: bytes that the weights may take.
    Returns:
        The plan; None if even the narrowest packing is larger.
    """
    checkpoint = Checkpoint(model)
    everything = Keep(tuple(LayerKeep(i) for i in range(len(checkpoint.arch.layers))))
    source = checkpoint.quantization
    group = like.group_size or (source.group_size if source and source.affine else 64)
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


def _units(checkpoint: Checkpoint, keep: Keep) -> dict[str, Any]:
    """Return a cut as the fields of a Plan, with every index written out."""
    layers = []
    for layer in keep.layers:
        units = checkpoint.arch.units(layer.source)
        kept = {axis: list(layer.keep.get(axis, range(count))) for axis, count in units.items()}
        layers.append({"source": layer.source, "ffn": [], "kv_head": [], **kept})
    cut_hidden = keep.hidden is not None and len(keep.hidden) != checkpoint.arch.sizes["hidden"]
    return {"layers": layers, "hidden": list(keep.hidden) if cut_hidden else None}
