"""Sensitivities + a goal -> candidates: the integer programme chooses how many units every part of every layer keeps.

Losses of single changes add up only for small cuts. With larger cuts, damage in many places at once weighs more than
its sum. So the programme is solved for several powers of the losses: a higher power spreads a cut over more places. It
is also solved for widths that all layers share and for widths per layer, and for randomly disturbed losses.
planning/try_candidates.py finds out which candidate is best.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from itertools import islice
from math import inf, prod

import numpy as np

from ..arch import Architecture, Keep, LayerKeep, Tensor, why_no_sublayer_drops, why_uniform
from ..arch.axes import length
from ..arch.uneven import width_multiple
from ..base.errors import PareError, Refused
from ..model.checkpoint import Checkpoint
from ..pruning import reach
from ..tensors.packing import Packing
from ..tensors.safetensors import DTYPE_BYTES
from . import knapsack
from .candidate import PARTS, Candidate, Width
from .goal import Goal, Options, packing_of
from .knapsack import Menu, Variant
from .uniform import step_of

POWERS = (1.0, 1.25, 1.5, 2.0, 0.75)  # of the losses
NOISE = 0.2  # standard deviation of the logarithm of disturbed losses
LEVELS = 32  # widths of an ffn that are considered at most
REPAIRS = 12  # attempts to find a solution that meets the goal,
NEAR = 0.005  # ... or until the budget is known to this share of the whole


@dataclass(frozen=True)
class Space:
    """Which widths can be chosen.

    ``ffn`` and ``kv_head`` are counts, the uncut one last. ``drops`` are the layers that may be dropped. ``protected``
    are layers that lose no part. ``bits`` are the packings of a part (None: unchanged). With ``tied`` all layers share
    their widths.
    """

    ffn: Sequence[int]
    kv_head: Sequence[int]
    drops: frozenset[int]
    protected: frozenset[int]
    bits: Sequence[int | None]
    tied: bool

    def counts(self, layer: int) -> tuple[list[int], list[int]]:
        """Return how many kv heads and how many channels a layer may keep. A layer that must stay keeps one of its
        parts."""
        whole = layer in self.protected
        heads = [n for n in self.kv_head if n or not whole]
        stays = whole or (0 in heads and layer not in self.drops)
        return heads, [n for n in self.ffn if n or not stays]


def spaces(checkpoint: Checkpoint, options: Options, per_layer: bool, bits: Sequence[int] = ()) -> list[Space]:
    """List the spaces to search: widths that all layers share, and widths per layer if stock mlx-lm has classes that
    hold them.

    Args:
        checkpoint: the model.
        options: what was asked of the plan.
        per_layer: whether widths per layer are searched too.
        bits: bits with which a part may be packed; empty: the parts keep their packing.
    Returns:
        One to three spaces, the shared one first.
    Raises:
        UsageError: an axis is unknown, or the model cannot be cut along it.
    """
    arch = checkpoint.arch
    step = step_of(checkpoint, replace(options, bits=max(bits)) if bits else options)  # whole groups of what is packed
    protected = frozenset(reach.protected_layers(arch) if options.protect else ())
    counts = reach.space(arch, options.axes, step, protected).choices
    moves = arch.period is not None  # dropping any layer would change the kind of others
    drops = frozenset(range(len(arch.layers)) if "layer" in options.axes and not moves else ()) - protected
    shared = Space(_thinned(counts["ffn"]), counts["kv_head"], drops, protected, tuple(bits) or (None,), True)
    found = [shared]
    if per_layer and why_uniform(arch) is None:
        found.append(replace(shared, ffn=_with_none(arch, options, shared.ffn), tied=False))
    if per_layer and (multiple := width_multiple(arch)):
        unit = [n for n in counts["ffn"] if n % multiple == 0]
        heads = [0, counts["kv_head"][-1]] if len(counts["kv_head"]) > 1 else counts["kv_head"]
        if unit and unit[-1] == counts["ffn"][-1] and why_no_sublayer_drops(arch) is None:
            found.append(replace(shared, ffn=_with_none(arch, options, unit), kv_head=heads, tied=False))
    return found


def _with_none(arch: Architecture, options: Options, counts: Sequence[int]) -> Sequence[int]:
    """Return these widths of an ffn, with 0 in front if a layer can lose its ffn."""
    free = "ffn" in options.axes and why_no_sublayer_drops(arch, "ffn") is None
    return [0, *counts] if free and len(counts) > 1 else counts


def _thinned(counts: Sequence[int]) -> list[int]:
    """Return at most LEVELS of the counts, evenly spread, with the last among them."""
    if len(counts) <= LEVELS:
        return list(counts)
    places = np.linspace(0, len(counts) - 1, LEVELS).round().astype(int)
    return [counts[i] for i in sorted(set(places.tolist()))]


class Losses:
    """What ``sensitivity`` found: the expected KL divergence of single changes, in nats per token.

    ``arrays`` are those that ``sensitivity`` writes. ``bits`` names the entries of ``i.p.bits``.
    """

    def __init__(self, arrays: Mapping[str, np.ndarray], bits: Sequence[int]):
        self.arrays, self.bits = arrays, list(bits)

    def units(self, layer: int, part: str, count: int) -> float:
        """Return the expected KL divergence if a part keeps ``count`` units.

        Args:
            layer: index of the layer.
            part: "attention" or "ffn".
            count: number of kept units.
        """
        return float(self.arrays[f"{layer}.{part}.kl"][count])

    def packed(self, layer: int, part: str, bits: int | None) -> float:
        """Return the expected KL divergence if a part is packed.

        Args:
            layer: index of the layer.
            part: "attention" or "ffn".
            bits: one of ``self.bits``; None: unchanged, which costs 0.
        """
        return 0.0 if bits is None else float(self.arrays[f"{layer}.{part}.bits"][self.bits.index(bits)])

    def drop(self, layer: int) -> float:
        """Return the KL divergence without the layer."""
        return float(self.arrays[f"{layer}.drop"])

    def count(self, layer: int, part: str) -> int:
        """Return how many units a part has."""
        return len(self.arrays[f"{layer}.{part}.order"])

    def kept(self, layer: int, part: str, count: int) -> list[int]:
        """Return the units that greedy OBS keeps.

        Args:
            layer: index of the layer.
            part: "attention" or "ffn".
            count: number of kept units.
        Returns:
            The indices, ascending.
        """
        order = self.arrays[f"{layer}.{part}.order"].astype(int)
        return sorted(order[len(order) - count :].tolist())


def propose(
    checkpoint: Checkpoint, losses: Losses, goal: Goal, options: Options, spaces: Sequence[Space], count: int, seed: int
) -> list[Candidate]:
    """Propose up to ``count`` different candidates that meet the goal, the least sum of losses first.

    Args:
        checkpoint: the model.
        losses: what ``sensitivity`` found.
        goal: what the cut must reach.
        options: what was asked of the plan.
        spaces: where to search; see ``spaces``.
        count: number of candidates.
        seed: of the random disturbance of the losses.
    Returns:
        The candidates.
    Raises:
        PareError: no choice meets the goal (Refused), or what is left would load nowhere.
    """
    found: dict[Candidate, float] = {}
    refused: PareError | None = None
    attempts = islice(_attempts(range(len(spaces)), seed), 4 * count + len(spaces) * len(POWERS))
    search = cache(lambda place: _searched(checkpoint, losses, goal, options, spaces[place]))
    for number, (place, power, noise) in enumerate(attempts):
        if number >= len(spaces) and len(found) >= count:
            break
        try:
            made, loss = _solve(search(place), losses, goal, options, power, noise)
            found.setdefault(made, loss)
        except PareError as error:  # out of reach with these widths, or what is left would load nowhere
            refused = refused or error
    if refused and not found:
        raise refused
    return sorted(found, key=found.__getitem__)[:count]


def _attempts(places: Sequence[int], seed: int) -> Iterator[tuple[int, float, np.random.Generator | None]]:
    """Yield the number of a space, a power of the losses, and what disturbs them."""
    for power in POWERS:
        for place in places:
            yield place, power, None
    random = np.random.default_rng(seed)
    while True:
        for power in POWERS[:-1]:
            for place in places[::-1]:
                yield place, power, random


@dataclass(frozen=True)
class _Search:
    """A space to search: what can become of its layers, the first budget, and how exactly a budget must be known."""

    menus: list[Menu]
    tied: bool
    budget: float
    near: float


def _searched(checkpoint: Checkpoint, losses: Losses, goal: Goal, options: Options, space: Space) -> _Search:
    """Set up the search of a space. Raises PareError if its largest choice would load nowhere."""
    arch = checkpoint.arch
    price = _Price(checkpoint, goal, options)
    menus = [_menu(arch, losses, space, price, layer) for layer in range(len(arch.layers))]
    largest = [tuple(len(part) - 1 for part in menu.parts) for menu in menus]
    cost = knapsack.cost_of(menus, largest)
    largest_size = goal.measure(keep_of(_candidate(menus, largest), losses, options))
    return _Search(menus, space.tied, goal.value - largest_size + cost, NEAR * cost)


def _solve(
    search: _Search, losses: Losses, goal: Goal, options: Options, power: float, random: np.random.Generator | None
) -> tuple[Candidate, float]:
    """Find the best candidate of a space that really meets the goal, and its sum of losses (not raised to the power).

    The cost of a variant is counted tensor by tensor. This misses that a cut may change the family, and that the KV
    cache grows in whole steps. So the budget is lowered by what the exact measure is over the goal, until the goal
    holds. Then the budget is raised again as far as the goal holds. Raises Refused if the goal never holds.
    """
    menus, budget = search.menus, search.budget
    judged = _disturbed(menus, power, random, search.tied)
    met: tuple[Candidate, float] | None = None
    low, high = -inf, inf  # budgets that do, and that do not
    for _ in range(REPAIRS):
        chosen = knapsack.solve(judged, budget, search.tied)
        made = _candidate(menus, chosen)
        missed = goal.measure(keep_of(made, losses, options)) - goal.value
        if missed <= 0:
            met, low = (made, knapsack.loss_of(menus, chosen)), budget
        else:
            high = budget
        if met and (high == inf or high - low < search.near):
            return met
        budget = (low + high) / 2 if met else budget - missed
    if met:
        return met
    raise Refused(f"{goal.target.asked} cannot be met", "ask for less")


def _menu(arch: Architecture, losses: Losses, space: Space, price: _Price, layer: int) -> Menu:
    """Return what can become of one layer."""
    parts = []
    for part, counts in zip(PARTS, space.counts(layer), strict=True):
        variants = [
            Variant(
                units,
                bits if units else None,
                losses.units(layer, part, units) + (losses.packed(layer, part, bits) if units else 0.0),
                price.part(layer, part, units, bits),
            )
            for bits in space.bits
            for units in counts
        ]
        parts.append(tuple(variants))
    return Menu(tuple(parts), price.rest(layer), losses.drop(layer) if layer in space.drops else None)


def _disturbed(menus: Sequence[Menu], power: float, random: np.random.Generator | None, tied: bool) -> list[Menu]:
    """Return the menus with losses raised to a power and multiplied by random factors. There is a factor for each part
    of each layer, or, with ``tied``, for each part."""

    def factors(count: int) -> np.ndarray:
        return np.exp(random.normal(0, NOISE, count)) if random is not None else np.ones(count)

    shared, found = factors(len(menus[0].parts)), []
    for menu in menus:
        own = shared if tied else factors(len(menu.parts))
        parts = (
            tuple(Variant(v.units, v.bits, float(factor) * max(v.loss, 0.0) ** power, v.cost) for v in part)
            for factor, part in zip(own, menu.parts, strict=True)
        )
        drop = None if menu.drop is None else float(factors(1)[0]) * max(menu.drop, 0.0) ** power
        found.append(Menu(tuple(parts), menu.cost, drop))
    return found


def _candidate(menus: Sequence[Menu], chosen: Sequence[knapsack.Choice]) -> Candidate:
    found: list[Width | None] = []
    for menu, choice in zip(menus, chosen, strict=True):
        if choice is None:
            found.append(None)
            continue
        attention, ffn = (part[i] for part, i in zip(menu.parts, choice, strict=True))
        gone = not attention.units and not ffn.units
        found.append(None if gone else Width(attention.units, ffn.units, attention.bits, ffn.bits))
    return tuple(found)


def keep_of(candidate: Candidate, losses: Losses, options: Options) -> Keep:
    """Turn a candidate into a cut, with the units that greedy OBS keeps.

    Args:
        candidate: the width of every layer of the source.
        losses: what ``sensitivity`` found.
        options: their ``group_size`` is that of packed parts.
    Returns:
        The cut.
    """
    layers = []
    for source, width in enumerate(candidate):
        if width is None:
            continue
        kept, packings = {}, {}
        for part, axis in PARTS.items():
            units = losses.kept(source, part, width.units(part))
            if len(units) < losses.count(source, part):
                kept[axis] = units
            if width.bits(part) is not None:
                packings[part] = Packing(width.bits(part), options.group_size)
        layers.append(LayerKeep(source, kept, packings))
    return Keep(tuple(layers))


class _Price:
    """The cost of the tensors of a layer: in parameters, or in bytes as they will be stored and cached."""

    def __init__(self, checkpoint: Checkpoint, goal: Goal, options: Options):
        self.checkpoint, self.arch, self.goal = checkpoint, checkpoint.arch, goal
        self.packing, self.options = packing_of(options), options
        self.tensors = checkpoint.by_role
        self.cached = self._cached() if options.budget else 0.0

    def part(self, layer: int, part: str, units: int, bits: int | None) -> float:
        """Return the cost of a part with this many units."""
        sizes = {**self.arch.layer_sizes(layer), PARTS[part]: units}
        cached = units * self.cached if part == "attention" else 0.0
        return cached + (self._sum(layer, part, sizes, bits) if units else 0.0)

    def rest(self, layer: int) -> float:
        """Return the cost of the norms of a layer."""
        return self._sum(layer, "norm", self.arch.layer_sizes(layer), None)

    def _sum(self, layer: int, part: str, sizes: Mapping[str, int], bits: int | None) -> float:
        specs = self.arch.family.blocks[self.arch.layers[layer].kind]
        there = (spec for spec in specs if spec.part == part and spec.present(self.arch.config))
        return sum(self._tensor(self.tensors[layer, spec.role], sizes, bits) for spec in there)

    def _tensor(self, tensor: Tensor, sizes: Mapping[str, int], bits: int | None) -> float:
        shape = [length(dim, sizes) for dim in tensor.spec.dims]
        if self.goal.counts == "parameters":
            return prod(shape)
        width, packing = DTYPE_BYTES[self.checkpoint.dtype(tensor)], None
        if tensor.matrix:
            packing = self.packing or self.checkpoint.packing(tensor.module)
            packing = Packing(bits, self.options.group_size) if bits else packing
        fitted = packing and replace(packing, scale_bytes=width).fitted(shape[-1])
        return fitted.nbytes(*shape) if fitted else prod(shape) * width

    def _cached(self) -> float:
        """Return the bytes that the cache of one kv head of one layer takes from the budget for weights."""
        fewer = [replace(layer, sizes={**layer.sizes, "kv_head": 1}) for layer in self.arch.layers]
        more = [replace(layer, sizes={**layer.sizes, "kv_head": 2}) for layer in self.arch.layers]
        left = [
            self.options.budget(replace(self.arch, layers=tuple(layers)), self.checkpoint.value_bytes)
            for layers in (fewer, more)
        ]
        return (left[0] - left[1]) / len(self.arch.layers)
