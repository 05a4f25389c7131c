"""Targets as sizes that all layers share, before any unit is chosen."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache

from ..arch import Architecture, require_cuttable
from ..base.errors import Refused
from ..model.checkpoint import Checkpoint
from ..pruning import reach
from ..pruning.layout import size_of
from ..pruning.plan_file import Size, Target
from ..pruning.reach import Level
from .goal import Goal, Options, goal, packing_of

SAME = 0.01  # of the whole: levels that differ by less meet a target equally well


@dataclass(frozen=True)
class Shape:
    """The sizes that a target leads to, before any unit is chosen."""

    target: Target
    level: Level
    protected: Sequence[int]
    before: Size
    after: Size
    neighbours: list[str]


def shape(checkpoint: Checkpoint, options: Options, level: Level | None = None) -> Shape:
    """Find the reachable sizes nearest to the target, with uniform widths. This needs no scores.

    Args:
        checkpoint: the model.
        options: the target and its limits.
        level: sizes to describe instead; None: those that meet the target best.
    Returns:
        The sizes before and after, and their neighbours.
    Raises:
        Unsupported: the model cannot be cut.
        UsageError: a target or an axis means nothing.
        Refused: the target cannot be reached, or nothing needs to be cut.
    """
    arch, packing = checkpoint.arch, packing_of(options)
    require_cuttable(arch)
    protected = reach.protected_layers(arch) if options.protect else []
    space = reach.space(arch, options.axes, step_of(checkpoint, options), protected)
    wanted = goal(checkpoint, options)
    measure = _measure(arch, wanted, protected)
    level = level or _nearest(checkpoint, options, wanted, space, measure)
    return Shape(
        wanted.target,
        level,
        protected,
        size_of(checkpoint, None, None),
        size_of(checkpoint, reach.skeleton(arch, level, protected), packing),
        reach.neighbours(space, level, measure, wanted.show),
    )


def splits(checkpoint: Checkpoint, options: Options, most: int) -> list[Level]:
    """Find levels that meet the target, each with another division of the cut between the axes.

    For every number of kv heads, and of layers, the ffn that is left is found. A level counts if it meets the target as
    nearly as the even split does, or to a hundredth of the whole.

    Args:
        checkpoint: the model.
        options: the target and its limits.
        most: number of levels at most.
    Returns:
        The levels, the even split first, then those nearest to it.
    Raises:
        UsageError: a target or an axis means nothing.
        Refused: the target cannot be reached, or nothing needs to be cut.
    """
    arch, wanted = checkpoint.arch, goal(checkpoint, options)
    protected = reach.protected_layers(arch) if options.protect else []
    space = reach.space(arch, options.axes, step_of(checkpoint, options), protected)
    measure = _measure(arch, wanted, protected)
    even = _nearest(checkpoint, options, wanted, space, measure)
    whole = size_of(checkpoint, None, None)
    tolerance = SAME * (whole.bytes if wanted.counts == "bytes" else whole.parameters)
    tolerance = max(tolerance, abs(measure(even) - wanted.value))
    found = [even]
    pairs = [(n, k) for n in space.choices["layer"] for k in space.choices["kv_head"]]
    for layers, heads in sorted(pairs, key=lambda pair: abs(pair[0] - even.layer) + abs(pair[1] - even.kv_head)):
        narrowed = reach.Space({**space.choices, "layer": [layers], "kv_head": [heads]})
        try:
            level = _nearest(checkpoint, options, wanted, narrowed, measure)
        except Refused:
            continue
        if level not in found and abs(measure(level) - wanted.value) <= tolerance:
            found.append(level)
    return found[:most]


def _nearest(
    checkpoint: Checkpoint, options: Options, wanted: Goal, space: reach.Space, measure: Callable[[Level], float]
) -> Level:
    """Return the reachable level that meets a goal best. Raises Refused if there is none, or if nothing needs to be
    cut."""
    packing = packing_of(options)
    if wanted.at_most:
        stored = packing or checkpoint.quantization
        group, asked = stored.group_size if stored else None, wanted.target.asked
        space, level = reach.largest_within(space, group, measure, wanted.value, asked, wanted.show)
    else:
        level = reach.solve(space, measure, wanted.value, False, wanted.target.asked, wanted.show)
    if level == space.at(1.0) and packing is None and wanted.target.kind != "keep":
        holds = "holds for the whole model" if measure(level) <= wanted.value else "is met best by the whole model"
        raise Refused(f"nothing needs to be cut: {wanted.target.asked} {holds}", "do not prune it")
    return level


def _measure(arch: Architecture, wanted: Goal, protected: Sequence[int]) -> Callable[[Level], float]:
    """What a goal measures of a level. A search asks for the same levels again and again: each is measured once."""
    return cache(lambda level: wanted.measure(reach.skeleton(arch, level, protected)))


def step_of(checkpoint: Checkpoint, options: Options) -> int:
    """Return the unit of ffn and hidden."""
    packing = packing_of(options) or checkpoint.quantization
    return options.step or reach.unit(checkpoint.arch, packing.group_size if packing else None)
