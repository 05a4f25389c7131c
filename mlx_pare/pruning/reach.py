"""Which sizes a cut can reach, and which of them meets a target: arithmetic on counts, before any unit is chosen.

All axes are cut by the same fraction as far as their steps allow, and the finest axis makes up the difference. Another
allocator gives layers different widths (planning/per_layer.py); the Plan holds indices per layer in any case. plan
fills these sizes with units, and the fit planner uses them to say what would fit.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from ..arch import Architecture, Keep, LayerKeep, can_keep, positions
from ..arch.axes import UNITS
from ..base.errors import Refused, UsageError

AXES = ("ffn", "kv_head", "layer", "hidden", "expert")
WIDE_FFN = 4096  # from here on the step is 256, for MLX's fast kernels and llama.cpp's K-quants


@dataclass(frozen=True)
class Level:
    """How much of each axis is kept, as counts."""

    ffn: int
    kv_head: int
    layer: int
    hidden: int
    expert: int = 0

    def counts(self) -> dict[str, int]:
        """The counts by axis; experts only if there are any."""
        return {axis: count for axis, count in self.__dict__.items() if count or axis != "expert"}

    def __str__(self) -> str:
        ffn, experts = (f", ffn {self.ffn}" if self.ffn else ""), f", {self.expert} experts" if self.expert else ""
        return f"{self.layer} layers{ffn}, {self.kv_head} kv heads{experts}, hidden {self.hidden}"


@dataclass(frozen=True)
class Space:
    """The reachable counts of each axis in ascending order. An axis that is not cut has a single one."""

    choices: Mapping[str, Sequence[int]]

    def at(self, fraction: float) -> Level:
        """Return the level at which every axis has the reachable count nearest to ``fraction`` of the whole."""
        return Level(**{a: _nearest(c, fraction * c[-1]) for a, c in self.choices.items()})

    def smallest(self) -> Level:
        return Level(**{a: c[0] for a, c in self.choices.items()})

    @property
    def finest(self) -> str:
        return max(self.choices, key=lambda a: len(self.choices[a]))


def _nearest(counts: Sequence[int], wanted: float) -> int:
    """The count nearest to a number; the smaller one of two that are as near."""
    above = bisect_left(counts, wanted)
    return min(counts[max(0, above - 1) : above + 1], key=lambda n: (abs(n - wanted), n))


def space(arch: Architecture, axes: Sequence[str], step: int, protected: Sequence[int]) -> Space:
    """Find the counts that can be reached with some axes.

    Args:
        arch: the model.
        axes: the axes to cut, of AXES.
        step: unit of ffn and hidden.
        protected: layers that a cut must keep.

    Returns:
        The reachable counts of every axis.

    Raises:
        UsageError: an axis is unknown, or the model cannot be cut along it.
        PareError: layers differ in ffn or kv_head.
    """
    for axis in axes:
        if axis not in AXES:
            raise UsageError(f"unknown axis {axis!r}", f"choose from {', '.join(AXES)}")
        if why := arch.why_fixed(axis):
            raise UsageError(
                f"{arch.family.name} cannot be cut along {axis}: {why}",
                f"choose from {', '.join(a for a in AXES if a in arch.cut_axes)}" if arch.cut_axes else None,
            )
    full = {axis: arch.uniform(axis) if arch.uses(axis) else 0 for axis in UNITS}
    full |= {"layer": len(arch.layers), "hidden": arch.sizes["hidden"]}
    choices: dict[str, list[int]] = {axis: [size] for axis, size in full.items()}
    for axis in axes:
        if axis == "layer":
            depths = range(max(1, len(protected)), full["layer"] + 1)
            choices[axis] = [n for n in depths if _realisable(arch, n, protected)]
        else:
            unit = step if axis in ("ffn", "hidden") else 1
            least = arch.uniform("active") if axis == "expert" else unit
            choices[axis] = sorted({*range(least, full[axis] + 1, unit), full[axis]})
            if axis == "kv_head":
                choices[axis] = [n for n in choices[axis] if arch.holds_heads(n)]
    return Space(choices)


def unit(arch: Architecture, group_size: int | None) -> int:
    """Return the unit of ffn (and hidden): 1 for dense results, a group for quantized ones, 256 for wide models."""
    return 256 if arch.largest("ffn") >= WIDE_FFN else group_size or 1


def growing(reach: Space, group_size: int, measure: Callable[[Level], float]) -> Space:
    """Leave out counts that take no fewer bytes than a larger count of the same axis.

    A width that no group divides is stored dense. Another number of heads may untie the embedding (see Exit).

    Args:
        reach: the reachable counts.
        group_size: columns of a quantization group.
        measure: the measure of a level, such as its bytes.

    Returns:
        The counts along which the measure grows. Layers, experts (rows of stacks, never columns), and an ffn of whole
        groups only, are taken as they are.
    """
    whole, choices = reach.at(1.0), dict(reach.choices)
    for axis, counts in reach.choices.items():
        if axis in ("layer", "expert") or (axis == "ffn" and all(n % group_size == 0 for n in counts)):
            continue
        kept, above = [], float("inf")
        for count in reversed(counts):
            taken = measure(Level(**{**whole.__dict__, axis: count}))
            if taken < above:
                kept.append(count)
                above = taken
        choices[axis] = kept[::-1]
    return Space(choices)


def _realisable(arch: Architecture, count: int, protected: Sequence[int]) -> bool:
    if not any(positions(arch, count)) and arch.family.needed <= {arch.layers[i].mixing for i in protected}:
        return count >= len(protected)  # the other layers may be any
    return best_layers(arch, [0.0] * len(arch.layers), count, protected) is not None


def protected_layers(arch: Architecture) -> list[int]:
    """The first layer, the last, and the last of every kind that mlx-lm needs, such as full attention. Cutting them
    costs most (every depth paper keeps the ends)."""
    last = {layer.mixing: i for i, layer in enumerate(arch.layers)}
    return sorted({0, len(arch.layers) - 1, *(last[kind] for kind in arch.family.needed if kind in last)})


def best_layers(arch: Architecture, scores: Sequence[float], count: int, protected: Sequence[int]) -> list[int] | None:
    """Choose the layers with the largest sum of scores that keep their kinds and include the protected ones.

    Dynamic programme over (layers seen, layers kept): layer i may become layer j only if position j has i's kind.

    Args:
        arch: the model.
        scores: one for each layer.
        count: number of layers to keep.
        protected: layers that must be kept.

    Returns:
        Their indices in ascending order; None if no set of that many layers does this.
    """
    total = len(arch.layers)
    if count == total:
        return list(range(total)) if can_keep(arch, range(total)) else None
    kinds = positions(arch, count)
    best: list[tuple[float, list[int]] | None] = [(0.0, [])] + [None] * count
    for i in range(total):
        new = [None if i in protected else entry for entry in best]
        for j in range(count):
            fits = kinds[j] is None or kinds[j] == arch.layers[i].kind
            if best[j] is not None and fits:
                value, kept = best[j]
                candidate = (value + float(scores[i]), [*kept, i])
                if new[j + 1] is None or candidate[0] > new[j + 1][0]:
                    new[j + 1] = candidate
        best = new
    if best[count] is None or can_keep(arch, best[count][1]):
        return best[count] and best[count][1]
    lacking = sorted(arch.family.needed - {arch.layers[i].mixing for i in best[count][1]})
    among = [i for i, layer in enumerate(arch.layers) if lacking and layer.mixing == lacking[0]]
    if not among or len(protected) >= count:
        return None
    return best_layers(arch, scores, count, [*protected, max(among, key=lambda i: float(scores[i]))])


def skeleton(arch: Architecture, level: Level, protected: Sequence[int]) -> Keep:
    """Return any cut of a shape: enough to count parameters and bytes.

    Args:
        arch: the model.
        level: the shape, which must be reachable.
        protected: layers that must be kept.

    Returns:
        A cut that keeps the first units of every axis.
    """
    layers = best_layers(arch, [0.0] * len(arch.layers), level.layer, protected)
    counts = {axis: getattr(level, axis) for axis in UNITS}

    def units(layer: int) -> dict[str, range]:
        return {axis: range(counts[axis]) for axis, size in arch.units(layer).items() if counts[axis] != size}

    hidden = range(level.hidden) if level.hidden != arch.sizes["hidden"] else None
    return Keep(tuple(LayerKeep(i, units(i)) for i in layers), hidden)


def solve(
    reach: Space,
    measure: Callable[[Level], float],
    goal: float,
    at_most: bool,
    asked: str,
    show: Callable[[float], str],
) -> Level:
    """Find the reachable level whose measure is nearest to a goal.

    First one fraction for all axes is bisected, then the finest axis is moved to the nearest step.

    Args:
        reach: the reachable counts.
        measure: the measure of a level; it grows with every axis.
        goal: the wanted measure.
        at_most: whether the measure must not exceed the goal.
        asked: the goal in words, for the message.
        show: writes a measure in words.

    Returns:
        The level.

    Raises:
        Refused: even the smallest level is above the goal, or, without ``at_most``, above it by more than 0.01 of the
            measure of the whole model.
    """
    smallest, largest = reach.smallest(), reach.at(1.0)
    tolerance = 0.01 * measure(largest)
    if measure(smallest) > goal + (0 if at_most else tolerance):
        raise Refused(
            f"{asked} cannot be reached: the smallest possible is {show(measure(smallest))} ({smallest})",
            "allow more --axes, or ask for less",
        )
    low, high = 0.0, 1.0
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (middle, high) if measure(reach.at(middle)) <= goal else (low, middle)
    return _refine(reach, reach.at(low), measure, goal, at_most)


def largest_within(
    reach: Space,
    group_size: int | None,
    measure: Callable[[Level], float],
    goal: float,
    asked: str,
    show: Callable[[float], str],
) -> tuple[Space, Level]:
    """Find the smallest cut: the largest reachable level whose measure is not above a goal.

    Args:
        reach: the reachable counts.
        group_size: of the packing of the result; None if it is dense.
        measure: the measure of a level.
        goal: the largest measure allowed.
        asked: the goal in words, for the message.
        show: writes a measure in words.

    Returns:
        The counts that were searched (see ``growing``), and the level.

    Raises:
        Refused: even the smallest level is above the goal.
    """
    if group_size:
        reach = growing(reach, group_size, measure)
    return reach, solve(reach, measure, goal, True, asked, show)


def _refine(reach: Space, start: Level, measure: Callable[[Level], float], goal: float, at_most: bool) -> Level:
    """Move the finest axis so that the goal is met best. The other axes stay as they are."""
    axis = reach.finest
    counts = reach.choices[axis]

    def at(count: int) -> Level:
        return Level(**{**start.__dict__, axis: count})

    low, high = 0, len(counts) - 1  # the last count whose measure is not above the goal
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if measure(at(counts[middle])) <= goal else (low, middle - 1)
    candidates = [c for c in counts[low : low + 2] if not at_most or measure(at(c)) <= goal]
    return at(min(candidates or [getattr(start, axis)], key=lambda c: abs(measure(at(c)) - goal)))


def neighbours(
    reach: Space, level: Level, measure: Callable[[Level], float], describe: Callable[[float], str]
) -> list[str]:
    """Describe one step down and one step up on each axis that is cut.

    Args:
        reach: the reachable counts.
        level: where to start.
        measure: the measure of a level.
        describe: writes a measure in words.

    Returns:
        A line for each step.
    """
    found = []
    for axis, counts in reach.choices.items():
        at = list(counts).index(getattr(level, axis))
        for other in counts[max(0, at - 1) : at] + counts[at + 1 : at + 2]:
            moved = Level(**{**level.__dict__, axis: other})
            found.append(f"{axis} {other}: {describe(measure(moved))}")
    return found
