"""The integer programme: it chooses one variant for every part of every layer, with the least expected loss within a
budget.

    minimise    the sum of the losses of what is chosen
    subject to  one variant of each part of a layer, or the whole layer dropped (not all); sum of costs <= budget;
                nothing whose loss is infinite

It is a multiple-choice knapsack, solved by HiGHS (scipy.optimize.milp); if all layers share their widths, all choices
are tried. The losses of single changes are added up, which is an approximation (as in Puzzle, Bercovich et al. 2024,
arXiv 2411.19146). It gets worse the more is cut. So the caller solves the programme for several sets of losses and
tries the results (planning/try_candidates.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import inf, isfinite

from ..base.errors import Refused

ROUNDING = 1e-9  # share of the largest cost by which the rounding of sums may exceed a budget
SECONDS = 20.0  # HiGHS then stops with the best choice it has; models of 100 layers take a second


@dataclass(frozen=True)
class Variant:
    """One way to keep a part of a layer: the number of units, their bits (None: as stored), the expected loss, and the
    cost.

    The loss is a KL divergence in nats per token. The cost is what the variant takes of the budget, in bytes or
    parameters.
    """

    units: int
    bits: int | None
    loss: float
    cost: float


@dataclass(frozen=True)
class Menu:
    """What can become of one layer: the variants of each of its parts, a fixed cost, and the loss of dropping it.

    The fixed cost is due if the layer stays, whatever its parts become. The loss is None if the layer must stay.
    """

    parts: tuple[tuple[Variant, ...], ...]
    cost: float = 0.0
    drop: float | None = None


Choice = tuple[int, ...] | None  # the position of the variant of each part; None: the layer is dropped


def solve(menus: Sequence[Menu], budget: float, tied: bool = False) -> list[Choice]:
    """Find the best choice for every layer, to about a millionth of the largest loss.

    Args:
        menus: what can become of each layer.
        budget: what all layers may cost together, in bytes or parameters.
        tied: all layers that stay take the variants at the same positions, and layers are dropped in the order of their
            losses.
    Returns:
        For each layer the position of the variant of each part; None: the layer is dropped.
    Raises:
        Refused: even the cheapest choice is above the budget.
    """
    found = _tied(menus, budget) if tied else _solve(menus, budget)
    if found is None:
        least = _cheapest(menus, tied)
        raise Refused(
            f"the target cannot be reached: the smallest choice costs {least:,.0f}, the budget is {budget:,.0f}",
            "allow more --axes, or ask for less",
        )
    return found


def loss_of(menus: Sequence[Menu], chosen: Sequence[Choice]) -> float:
    """Return the sum that ``solve`` minimises."""
    return sum(_value(menu, choice, "loss") for menu, choice in zip(menus, chosen, strict=True))


def cost_of(menus: Sequence[Menu], chosen: Sequence[Choice]) -> float:
    """Return the cost that ``solve`` keeps within the budget."""
    fixed = sum(menu.cost for menu, choice in zip(menus, chosen, strict=True) if choice is not None)
    return fixed + sum(_value(menu, choice, "cost") for menu, choice in zip(menus, chosen, strict=True))


def _value(menu: Menu, choice: Choice, field: str) -> float:
    if choice is None:
        return menu.drop if field == "loss" else 0.0
    return sum(getattr(part[position], field) for part, position in zip(menu.parts, choice, strict=True))


def _cheapest(menus: Sequence[Menu], tied: bool) -> float:
    """Return the least that a choice costs."""
    if tied:
        return min(
            _cheapest([_sum([m for i, m in enumerate(menus) if i not in gone])], False) for gone in _drops(menus)
        )
    least = [
        m.cost + sum(min((v.cost for v in part if isfinite(v.loss)), default=inf) for part in m.parts) for m in menus
    ]
    left = [cost for cost, menu in zip(least, menus, strict=True) if not _may_go(menu)]
    return sum(left) if left else min(least)


def _may_go(menu: Menu) -> bool:
    return menu.drop is not None and isfinite(menu.drop)


def _drops(menus: Sequence[Menu]) -> list[set[int]]:
    """Return the set of layers to drop, for each number of dropped layers from 0 on."""
    order = sorted((i for i, menu in enumerate(menus) if _may_go(menu)), key=lambda i: menus[i].drop)
    return [set(order[:count]) for count in range(min(len(order), len(menus) - 1) + 1)]


def _tied(menus: Sequence[Menu], budget: float) -> list[Choice] | None:
    """Find the best variants for every number of dropped layers, and return the best of these choices."""
    best: tuple[float, list[Choice]] | None = None
    for gone in _drops(menus):
        one = _alone(_sum([menu for i, menu in enumerate(menus) if i not in gone]), budget)
        if one is not None:
            chosen = [None if i in gone else one for i in range(len(menus))]
            best = min(filter(None, (best, (loss_of(menus, chosen), chosen))), key=lambda found: found[0])
    return best and best[1]


def _sum(menus: Sequence[Menu]) -> Menu:
    """Add up layers that share one choice into one menu."""
    parts = []
    for alike in zip(*(menu.parts for menu in menus), strict=True):
        variants = zip(*alike, strict=True)
        summed = ((v[0], sum(x.loss for x in v), sum(x.cost for x in v)) for v in variants)
        parts.append(tuple(Variant(v.units, v.bits, loss, cost) for v, loss, cost in summed))
    return Menu(tuple(parts), sum(menu.cost for menu in menus))


def _alone(menu: Menu, budget: float) -> Choice:
    """Find the best variants of a layer that stays, by trying all of them together. Return None if nothing is within
    the budget."""
    import numpy as np

    loss, cost = np.zeros(()), np.asarray(menu.cost)
    for part in menu.parts:
        loss = np.add.outer(loss, [variant.loss for variant in part])
        cost = np.add.outer(cost, [variant.cost for variant in part])
    loss = np.where(cost <= budget + ROUNDING * np.abs(cost).max(), loss, inf)
    best = np.unravel_index(loss.argmin(), loss.shape)
    return tuple(int(i) for i in best) if isfinite(loss[best]) else None


def _solve(menus: Sequence[Menu], budget: float) -> list[Choice] | None:
    """Solve with a binary variable per variant, and one per layer that may be dropped. Return None if nothing is within
    the budget."""
    import numpy as np
    from scipy.optimize import Bounds, LinearConstraint, milp
    from scipy.sparse import csr_array

    columns: list[tuple[int, int, int]] = []  # layer, part (-1: drop), position
    for layer, menu in enumerate(menus):
        columns += [(layer, part, i) for part, variants in enumerate(menu.parts) for i in range(len(variants))]
        columns += [(layer, -1, 0)] if menu.drop is not None else []
    losses, costs = np.zeros(len(columns)), np.zeros(len(columns))
    rows: dict[tuple[int, int], int] = {}
    entries = []
    for column, (layer, part, i) in enumerate(columns):
        menu = menus[layer]
        if part < 0:
            losses[column], costs[column] = menu.drop, -menu.cost
            entries += [(rows.setdefault((layer, other), len(rows)), column) for other in range(len(menu.parts))]
        else:
            losses[column], costs[column] = menu.parts[part][i].loss, menu.parts[part][i].cost
            entries.append((rows.setdefault((layer, part), len(rows)), column))
    once = csr_array((np.ones(len(entries)), tuple(zip(*entries, strict=True))), shape=(len(rows), len(columns)))
    left, scale = budget - sum(menu.cost for menu in menus), max(float(np.abs(costs).max()), 1.0)
    possible = np.isfinite(losses)
    losses[~possible] = 0
    dropped = np.array([[part < 0 for _, part, _ in columns]], float)
    found = milp(
        losses / max(float(losses.max()), 1e-30),
        constraints=[
            LinearConstraint(once, 1, 1),
            LinearConstraint(costs[None] / scale, -inf, left / scale),
            LinearConstraint(dropped, -inf, len(menus) - 1),
        ],
        integrality=np.ones(len(columns)),
        bounds=Bounds(0, possible.astype(float)),
        options={"time_limit": SECONDS, "mip_rel_gap": 1e-6},
    )
    if found.x is None:
        return None
    taken = [columns[i] for i in np.flatnonzero(found.x > 0.5)]
    chosen: list[Choice] = [None if (layer, -1, 0) in taken else () for layer in range(len(menus))]
    for layer, part, i in sorted(taken):
        if part >= 0:
            chosen[layer] = (*chosen[layer], i)
    return chosen
