"""The integer programme finds what trying every combination finds."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest

from mlx_pare.base.errors import Refused
from mlx_pare.planning.knapsack import Choice, Menu, Variant, cost_of, loss_of, solve


def menus(random: np.random.Generator, layers: int, tied: bool = False) -> list[Menu]:
    """Two parts with two to four variants each; some layers may be dropped. Costs are whole numbers, wider ones higher;
    ``tied``: the parts of all layers have as many variants."""
    found, widths = [], random.integers(2, 5, 2)
    for _ in range(layers):
        parts = []
        for count in widths if tied else random.integers(2, 5, 2):
            costs = np.cumsum(random.integers(1, 9, count))
            losses = np.sort(random.exponential(1, count))[::-1] * (np.arange(count) < count - 1)
            parts.append(
                tuple(Variant(i, None, float(x), float(c)) for i, (x, c) in enumerate(zip(losses, costs, strict=True)))
            )
        drop = float(random.exponential(2)) if random.random() < 0.6 else None
        found.append(Menu(tuple(parts), float(random.integers(0, 3)), drop))
    return found


def choices(menu: Menu) -> list[Choice]:
    every = list(itertools.product(*(range(len(part)) for part in menu.parts)))
    return every + [None] * (menu.drop is not None)


def loss(given: list[Menu], chosen: tuple) -> float:
    return sum(
        menu.drop if choice is None else sum(part[i].loss for part, i in zip(menu.parts, choice, strict=True))
        for menu, choice in zip(given, chosen, strict=True)
    )


def cost(given: list[Menu], chosen: tuple) -> float:
    kept = [(menu, choice) for menu, choice in zip(given, chosen, strict=True) if choice is not None]
    return sum(
        menu.cost + sum(part[i].cost for part, i in zip(menu.parts, choice, strict=True)) for menu, choice in kept
    )


def every(given: list[Menu], tied: bool) -> list[tuple]:
    """All combinations; not all layers may go. Tied: all that stay alike, the cheapest layers to lose go first."""
    if not tied:
        return [c for c in itertools.product(*map(choices, given)) if any(x is not None for x in c)]
    order = sorted((i for i, menu in enumerate(given) if menu.drop is not None), key=lambda i: given[i].drop)
    gone = [set(order[:n]) for n in range(min(len(order), len(given) - 1) + 1)]
    alike = [choice for choice in choices(given[0]) if choice is not None]
    return [tuple(None if i in some else one for i in range(len(given))) for some in gone for one in alike]


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("seed", range(12))
def test_best_of_every_combination(seed, tied):
    """Budgets from what nothing but the cheapest meets to what everything does."""
    random = np.random.default_rng(seed)
    given = menus(random, int(random.integers(1, 4)), tied)
    combinations = every(given, tied)
    costs = sorted({cost(given, c) for c in combinations})
    for budget in {costs[0], costs[-1], *random.choice(costs, 4)}:
        chosen = solve(given, budget, tied)
        assert tuple(chosen) in combinations
        assert cost(given, chosen) <= budget + 1e-9
        wanted = min(loss(given, c) for c in combinations if cost(given, c) <= budget)
        assert loss(given, chosen) == pytest.approx(wanted, abs=1e-6)
        assert loss_of(given, chosen) == pytest.approx(loss(given, chosen))
        assert cost_of(given, chosen) == pytest.approx(cost(given, chosen))


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("seed", range(6))
def test_less_than_the_cheapest_is_refused(seed, tied):
    given = menus(np.random.default_rng(seed), 3, tied)
    least = min(cost(given, c) for c in every(given, tied))
    assert solve(given, least, tied)
    with pytest.raises(Refused, match=r"cannot be reached.*budget"):
        solve(given, least - 1, tied)


def test_refusal_says_what_would_do():
    menu = Menu(((Variant(1, None, 1.0, 3.0), Variant(2, None, 0.0, 9.0)),), 2.0)
    with pytest.raises(Refused, match=r"smallest choice costs 10, the budget is 9.*more --axes"):
        solve([menu, menu], 9.0)
    dropped = Menu(menu.parts, 2.0, 1.0)
    assert sorted(solve([dropped, dropped], 11.0), key=str) == [(1,), None]
    with pytest.raises(Refused, match="smallest choice costs 5, the budget is 4"):
        solve([dropped, dropped], 4.0)


@pytest.mark.parametrize("seed", range(6))
def test_dominated_variants_are_never_chosen(seed):
    """Planted beside each: the same loss for more, and more loss for as much."""
    random = np.random.default_rng(seed)
    plain = menus(random, 3)
    worse = [
        Menu(
            tuple(
                tuple(
                    w
                    for v in part
                    for w in (v, Variant(v.units, 2, v.loss + 0.1, v.cost), Variant(v.units, 3, v.loss, v.cost + 1))
                )
                for part in menu.parts
            ),
            menu.cost,
            menu.drop,
        )
        for menu in plain
    ]
    costs = [cost(plain, c) for c in every(plain, False)]
    for budget in random.choice(costs, 5):
        chosen = solve(worse, budget)
        taken = [
            menu.parts[p][i] for menu, choice in zip(worse, chosen, strict=True) if choice for p, i in enumerate(choice)
        ]
        assert {v.bits for v in taken} <= {None, 3}  # a budget may leave room for the same at a higher cost
        assert loss(worse, chosen) == pytest.approx(loss(plain, solve(plain, budget)), abs=1e-6)


@pytest.mark.parametrize("tied", [False, True])
def test_infinite_losses_are_never_chosen(tied):
    lost = Variant(0, None, math.inf, 0.0)
    menu = Menu(
        ((lost, Variant(1, None, 0.5, 1.0), Variant(2, None, 0.0, 5.0)), (Variant(1, None, 0.0, 1.0),)), 0.0, math.inf
    )
    assert solve([menu, menu], 4.0, tied) == [(1, 0), (1, 0)]
    with pytest.raises(Refused, match="smallest choice costs 4"):
        solve([menu, menu], 3.0, tied)


def test_tied_is_never_better_than_free():
    for seed in range(6):
        random = np.random.default_rng(seed)
        given = menus(random, 3, tied=True)
        for budget in random.choice([cost(given, c) for c in every(given, True)], 4):
            assert loss_of(given, solve(given, budget)) <= loss_of(given, solve(given, budget, True)) + 1e-6


def test_losses_of_very_different_sizes():
    """As kl divergences are: the small ones decide as long as they are all there is to choose."""
    parts = [tuple(Variant(n, None, x * (2 - n), float(n)) for n in range(3)) for x in (1e-4, 2e-4, 1e1)]
    given = [Menu((part,)) for part in parts]
    assert solve(given, 4.0) == [(0,), (2,), (2,)]
