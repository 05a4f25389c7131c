"""Units and weights of a linear layer equal what brute force and lstsq say, also where inputs repeat or are dead."""

from __future__ import annotations

import tracemalloc

import mlx.core as mx
import numpy as np
import pytest
import reference

from mlx_pare.repair import elimination, factors, gptq
from mlx_pare.repair.least_squares import DAMPING, Dual, Problem, cost
from mlx_pare.tensors.packing import Packing


def data(inputs: int, outputs: int = 5, tokens: int = 60, seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Inputs [tokens, n] of different sizes and somewhat alike, weights [out, n], targets near what these give."""
    random = np.random.default_rng(seed)
    x = random.standard_normal((tokens, inputs)) @ (np.eye(inputs) + 0.3 * random.standard_normal((inputs, inputs)))
    x *= random.uniform(0.5, 2, inputs)
    weight = random.standard_normal((outputs, inputs))
    return x, weight, x @ weight.T + 0.5 * random.standard_normal((tokens, outputs))


def gram(x: np.ndarray, weight: np.ndarray, target: np.ndarray, damping: float = DAMPING, fixed: int = 0) -> Problem:
    return Problem(x.T @ x, x.T @ target, weight, damping, fixed)


def dual(x: np.ndarray, weight: np.ndarray, target: np.ndarray, damping: float = DAMPING, fixed: int = 0) -> Dual:
    return Dual(x, target, weight, damping, fixed)


@pytest.fixture(params=[gram, dual], ids=["gram", "tokens"])
def problem(request):
    """Everything holds for both forms, whatever there is more of."""
    return request.param


def far(found: np.ndarray, expected: np.ndarray) -> float:
    return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))


# ---- weights ----


@pytest.mark.parametrize("damping", [1e-6, DAMPING, 1e-1])
@pytest.mark.parametrize("kept", [range(20), range(0, 20, 3), [7]], ids=["all", "some", "one"])
def test_solve(problem, kept, damping):
    x, weight, target = data(20)
    expected = reference.ridge(x, target, weight, reference.ridge_of(x, damping), list(kept))
    assert far(problem(x, weight, target, damping).solve(list(kept)), expected) < 1e-8


def test_a_layer_that_is_asked_for_its_own_output_stays_as_it_is(problem):
    x, weight, _ = data(20)
    for damping in (DAMPING, 1.0):
        assert far(problem(x, weight, x @ weight.T, damping).solve(range(20)), weight) < 1e-10


SINGULAR = {
    "copies": lambda x: x[:, np.r_[0:10, 0:10]],
    "dead": lambda x: x * (np.arange(20) % 3 > 0),
    "all dead": lambda x: x * 0,
    "fewer tokens than inputs": lambda x: x[:7],
    "one token": lambda x: x[:1],
}


@pytest.mark.parametrize("how", SINGULAR)
def test_singular_inputs(problem, how):
    x, weight, _ = data(20)
    x = SINGULAR[how](x)
    target = x @ weight.T
    made = problem(x, weight, target)
    assert far(made.solve(range(20)), weight) < 1e-6  # nothing is known that speaks against the old weights
    for size, count in ((1, 1), (1, 9), (4, 2)):
        chosen = made.choose(size, count)[0]
        assert len(set(chosen)) == count and chosen == sorted(chosen)
        kept = reference.inputs_of(chosen, size)
        found = made.solve(kept)
        assert np.isfinite(found).all()
        if how != "all dead":
            expected = reference.ridge(x, target, weight, reference.ridge_of(x, DAMPING), kept)
            assert far(found, expected) < 1e-8


@pytest.mark.parametrize("kept", [range(20), range(4, 16)])
def test_error_is_the_residual(problem, kept):
    x, weight, target = data(20)
    other = weight[:, list(kept)] * 1.1
    expected = ((x[:, list(kept)] @ other.T - target) ** 2).sum() / (target**2).sum()
    found = problem(x, weight, target).error(other, list(kept), float((target**2).sum()))
    assert found == pytest.approx(expected, rel=1e-10)
    assert problem(x, weight, x @ weight.T).error(weight, range(20), float(((x @ weight.T) ** 2).sum())) < 1e-12


@pytest.mark.parametrize("kept", [range(20), range(4, 16), [7]])
@pytest.mark.parametrize("damping", [DAMPING, 0.1])
def test_error_of_the_best_weights(problem, kept, damping):
    x, weight, target = data(20)
    made, energy = problem(x, weight, target, damping), float((target**2).sum())
    best = made.solve(kept)
    expected = ((x[:, list(kept)] @ best.T - target) ** 2).sum() / energy
    assert made.best_error(best, kept, energy) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("count", [1, 5, 19, 20])
def test_solving_never_makes_it_worse(problem, count):
    x, weight, target = data(20)
    made, energy = problem(x, weight, target), float((target**2).sum())
    kept = made.choose(1, count)[0]
    assert made.error(made.solve(kept), kept, energy) <= made.error(weight[:, kept], kept, energy)


@pytest.mark.parametrize("damping", [1e-3, 0.3])
def test_the_size_of_an_input_says_nothing(problem, damping):
    """An input a thousand times as large, with weights as much smaller, is the same input: also for the choice, and its
    neighbours do not notice."""
    x, weight, target = data(20)
    factor = np.where(np.arange(20) % 7 == 3, 1e3, 1.0)
    plain, wild = problem(x, weight, target, damping), problem(x * factor, weight / factor, target, damping)
    (units, expected), (found, weights) = (made.choose(1, 12) for made in (plain, wild))
    assert found == units and far(weights * factor[units], expected) < 1e-8


# ---- units ----


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize(("inputs", "size", "count"), [(14, 1, 5), (14, 1, 1), (15, 3, 2), (16, 4, 1), (12, 6, 1)])
def test_choose_is_greedy(problem, inputs, size, count, seed):
    x, weight, target = data(inputs, seed=seed)
    for damping in (DAMPING, 1e-2):
        made = problem(x, weight, target, damping)
        strong = reference.ridge_of(x, damping)
        kept, weights = made.choose(size, count)
        assert kept == reference.greedy(x, target, weight, strong, size, count)
        assert far(weights, made.solve(reference.inputs_of(kept, size))) < 1e-8


@pytest.mark.parametrize(("inputs", "rounds", "batch"), [(16, 8, 2), (16, 4, 4), (17, 4, 4), (9, 256, 1)])
def test_choose_in_batches(problem, monkeypatch, inputs, rounds, batch):
    """Several units go at once by the costs of one moment; the last batch is smaller."""
    monkeypatch.setattr(elimination, "ROUNDS", rounds)
    x, weight, target = data(inputs)
    expected = reference.greedy(x, target, weight, reference.ridge_of(x, DAMPING), 1, 5, batch)
    assert problem(x, weight, target).choose(1, 5)[0] == expected


@pytest.mark.parametrize("lazy", [1, 5, 1000])
def test_waiting_changes_nothing(monkeypatch, lazy):
    made = gram(*data(30))
    expected = made.choose(2, 6)[0]
    monkeypatch.setattr(elimination, "LAZY", lazy)
    assert made.choose(2, 6)[0] == expected


def test_all_and_again(problem):
    given = data(20)
    made = problem(*given)
    assert made.choose(1, 20)[0] == list(range(20)) and made.choose(5, 4)[0] == [0, 1, 2, 3]
    assert made.choose(1, 7)[0] == made.choose(1, 7)[0]
    again = problem(*data(20))  # what is given is not worked on in place
    for mine, other in zip(vars(made).values(), vars(again).values(), strict=False):
        assert np.array_equal(mine, other)
    assert set(made.choose(1, 5)[0]) < set(made.choose(1, 9)[0])  # greedy: what is kept of less was kept of more


@pytest.mark.parametrize(("size", "units"), [(1, 12), (3, 8)])
def test_planted_units_go_first(problem, size, units):
    """Copies, sums of others and dead units cost nothing; the layer says the same without them."""
    x, weight, _ = data(units * size)
    random = np.random.default_rng(1)
    copies, dead = x[:, : 2 * size], np.zeros((len(x), size))
    mixed = x @ random.standard_normal((units * size, size))
    x = np.concatenate([x, copies, dead, mixed], axis=1)
    weight = np.concatenate([weight, random.standard_normal((5, 4 * size))], axis=1)
    order = random.permutation(units + 4)
    places = reference.inputs_of(order.tolist(), size)
    x, weight = x[:, places], weight[:, places]
    target = x @ weight.T
    made = problem(x, weight, target, 1e-8)
    kept = made.choose(size, units)[0]
    assert units + 2 not in order[kept]  # the dead one; of the others it may be any of those that say the same
    columns = reference.inputs_of(kept, size)
    assert far(x[:, columns] @ made.solve(columns).T, target) < 1e-4
    one_less = reference.inputs_of(made.choose(size, units - 1)[0], size)
    assert far(x[:, one_less] @ made.solve(one_less).T, target) > 1e-3  # and no more than those was free


def test_equal_units_go_in_their_order(problem):
    x, weight, _ = data(4)
    x, weight = np.repeat(x[:, :1], 6, axis=1), np.repeat(weight[:, :1], 6, axis=1)
    made = problem(x, weight, x @ weight.T)
    assert made.choose(1, 3)[0] == made.choose(1, 3)[0] and len(made.choose(1, 3)[0]) == 3


# ---- the order in which they go, and what that costs ----


@pytest.mark.parametrize("rounds", [256, 4])
@pytest.mark.parametrize("fixed", [0, 1])
@pytest.mark.parametrize(("inputs", "size"), [(14, 1), (15, 3), (16, 4)])
def test_path(problem, monkeypatch, inputs, size, fixed, rounds):
    """Choosing is what a path leaves; its prices add up to what brute force says is lost, also of units that go at
    once. With nothing left everything is lost but what a constant gives."""
    monkeypatch.setattr(elimination, "ROUNDS", rounds)
    x, weight, target = data(inputs)
    x = np.hstack([x + np.arange(inputs), np.ones((len(x), fixed))])
    weight, target = np.hstack([weight, np.zeros((5, fixed))]), target + 2.0
    made, stay = problem(x, weight, target, fixed=fixed), list(range(inputs, inputs + fixed))
    path = made.path(size)
    order, prices = path.order, path.prices
    units = inputs // size
    assert sorted(order) == list(range(units)) and len(prices) == units and min(prices) > 0

    def lost(kept: list[int]) -> float:
        strong = reference.ridge_of(x, DAMPING, fixed)
        return reference.loss(x, target, weight, strong, reference.inputs_of(kept, size) + stay)

    for gone in range(units + 1):
        kept = sorted(order[gone:])
        assert made.choose(size, units - gone)[0] == kept
        assert made.path(size, units - gone).order == order[:gone]
        assert sum(prices[:gone]) == pytest.approx(lost(kept) - lost(list(range(units))), rel=1e-6)


@pytest.mark.parametrize("fixed", [0, 1])
@pytest.mark.parametrize(("inputs", "size"), [(40, 1), (42, 3)])
def test_a_path_solves_on_its_way(problem, monkeypatch, inputs, size, fixed):
    """The weights at a number of units are those that a solve finds, also in the middle of units that go at once."""
    monkeypatch.setattr(elimination, "ROUNDS", 8)
    x, weight, target = data(inputs)
    x, weight = np.hstack([x, np.ones((len(x), fixed))]), np.hstack([weight, np.zeros((5, fixed))])
    made, units = problem(x, weight, target, 1e-2, fixed=fixed), inputs // size
    counts = [units - 1, units - 4, units // 2, 2, 1]
    path = made.path(size, 1, counts)
    assert sorted(path.solved, reverse=True) == counts
    for count in counts:
        kept = reference.inputs_of(sorted(path.order[units - count :] + _left(path.order, units)), size)
        assert far(path.solved[count], made.solve(kept)) < 1e-6


def _left(order: list[int], units: int) -> list[int]:
    return sorted(set(range(units)) - set(order))


@pytest.mark.parametrize("size", [1, 3])
def test_what_a_layer_gives_itself_needs_no_target(size):
    """With all inputs its weights are the best, so that nothing is solved before something is removed."""
    x, weight, _ = data(42)
    told, own = gram(x, weight, x @ weight.T, 1e-2), Problem(x.T @ x, None, weight, 1e-2)
    (units, expected), (found, weights) = (made.choose(size, 9) for made in (told, own))
    kept = reference.inputs_of(units, size)
    assert found == units and far(weights, expected) < 1e-8
    assert far(own.solve(kept), expected) < 1e-8
    energy = float(((x @ weight.T) ** 2).sum())
    assert own.error(weights, kept, energy) == pytest.approx(told.error(expected, kept, energy), rel=1e-8)


@pytest.mark.parametrize("size", [1, 3])
def test_dropping_what_is_gone_changes_nothing(problem, monkeypatch, size):
    """The rows of removed inputs leave the memory from time to time, or never."""
    found = []
    for share in (0.0, 0.8, 1.0):
        monkeypatch.setattr(elimination, "SPARSE", share)
        found.append(problem(*data(60)).path(size, 2, [5]))
    for other in found[1:]:
        assert other.order == found[0].order
        assert other.prices == pytest.approx(found[0].prices, rel=1e-6)
        assert far(other.solved[5], found[0].solved[5]) < 1e-6


# ---- both forms ----


@pytest.mark.parametrize("fixed", [0, 1])
@pytest.mark.parametrize(("size", "count"), [(1, 450), (1, 300), (12, 30), (100, 2)])
def test_tokens_say_what_the_gram_matrix_says(size, count, fixed):
    """Wide layers of few tokens, several units at a time; the same units, and weights to 1e-8."""
    x, weight, target = data(600, outputs=7, tokens=90)
    x = np.concatenate([x, np.ones((90, fixed))], axis=1)
    weight = np.concatenate([weight, np.zeros((7, fixed))], axis=1)
    a, b = (make(x, weight, target, fixed=fixed) for make in (gram, dual))
    assert a.ridge == pytest.approx(b.ridge, rel=1e-12)
    chosen = a.choose(size, count)[0]
    assert b.choose(size, count)[0] == chosen and len(chosen) == count
    kept = reference.inputs_of(chosen, size)
    assert far(b.solve(kept), a.solve(kept)) < 1e-8
    assert far(b.solve(kept), reference.ridge(x, target, weight, a.ridge, [*kept, *range(600, 600 + fixed)])) < 1e-8
    energy = float((target**2).sum())
    for weights in (a.old(kept), 0.99 * a.solve(kept)):
        assert b.error(weights, kept, energy) == pytest.approx(a.error(weights, kept, energy), rel=1e-6)


def test_tokens_in_float32(monkeypatch):
    """As they come from the model; all arithmetic is float64, and what is too wide goes in parts."""
    monkeypatch.setattr(factors, "WIDE", 64)
    x, weight, target = (a.astype(np.float32) for a in data(300, outputs=7, tokens=90))
    exact = dual(*(a.astype(np.float64) for a in (x, weight, target)))
    made = dual(x, weight, target)
    chosen = made.choose(4, 50)[0]
    assert chosen == exact.choose(4, 50)[0]
    kept = reference.inputs_of(chosen, 4)
    assert far(made.solve(kept), exact.solve(kept)) < 1e-10


# ---- a constant input: the bias ----


@pytest.mark.parametrize(("size", "count"), [(1, 6), (3, 3)])
def test_a_fixed_input_is_solved_and_never_goes(problem, size, count):
    """Means of the inputs that go are made up for by it, and the choice knows that."""
    x, weight, target = data(15)
    x = x + 3 * np.arange(15)
    target = target + 2.0
    ones, nothing = np.ones((len(x), 1)), np.zeros((5, 1))
    made = problem(np.hstack([x, ones]), np.hstack([weight, nothing]), target, fixed=1)
    ridge = reference.ridge_of(np.hstack([x, ones]), DAMPING, 1)
    assert made.ridge == pytest.approx(ridge, rel=1e-10)
    chosen = made.choose(size, count)[0]
    assert chosen == reference.greedy(
        np.hstack([x, ones]), target, np.hstack([weight, nothing]), ridge, size, count, fixed=1
    )
    kept = reference.inputs_of(chosen, size)
    found = made.solve(kept)
    expected = reference.ridge(np.hstack([x, ones]), target, np.hstack([weight, nothing]), ridge, [*kept, 15])
    assert found.shape == (5, len(kept) + 1) and far(found, expected) < 1e-8
    energy = float((target**2).sum())
    without = problem(x, weight, target)
    assert made.error(found, kept, energy) < without.error(without.solve(kept), kept, energy)


# ---- what it takes ----


@pytest.mark.parametrize(("tokens", "inputs", "outputs"), [(3000, 1000, 250), (300, 2000, 400), (900, 1200, 1500)])
def test_stated_memory(tokens, inputs, outputs):
    """No less than numpy really has at once, no more than twice as much; also for error feedback."""
    stated = cost(tokens, inputs, outputs)
    assert stated.dual == (tokens < inputs)
    x, weight = np.zeros((tokens, inputs), np.float32), np.zeros((outputs, inputs), np.float32)
    x[:] = np.random.default_rng(0).standard_normal(x.shape)
    gram(*data(8)).choose(1, 4)  # scipy is imported before anything is measured
    tracemalloc.start()
    if stated.dual:
        made = Dual(x.copy(), np.zeros((tokens, outputs), np.float32), weight.copy())
    else:
        square = (x.T @ x).astype(np.float64)
        made = Problem(square, np.zeros((inputs, outputs)), weight.copy())
        del square
    chosen = made.choose(1, inputs * 3 // 4)[0]
    new = made.solve(chosen)
    made.error(new, chosen, 1.0)
    feedback = made.feedback(chosen)
    feedback.group(0, 64)
    feedback.missed(np.zeros((outputs, 64)))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak <= stated.nbytes <= 2 * peak


@pytest.mark.parametrize(("tokens", "inputs", "outputs"), [(2500, 1024, 256), (300, 2048, 448)])
def test_stated_memory_suffices_where_nothing_is_cut(monkeypatch, tokens, inputs, outputs):
    """Solved, packed and judged with all inputs, as a whole model with fewer bits is; beside the new weights in
    float32, which reconstruct counts itself. The tokens go by narrow parts, as those of real layers do."""
    monkeypatch.setattr(factors, "WIDE", 256)
    stated = cost(tokens, inputs, outputs).nbytes + 4 * inputs * outputs
    x, weight = np.zeros((tokens, inputs), np.float32), np.zeros((outputs, inputs), np.float32)
    x[:] = np.random.default_rng(0).standard_normal(x.shape)
    gram(*data(8)).choose(1, 4)  # scipy is imported before anything is measured
    tracemalloc.start()
    if tokens < inputs:
        made = Dual(x.copy(), np.zeros((tokens, outputs), np.float32), weight.copy())
    else:
        made = Problem((x.T @ x).astype(np.float64), np.zeros((inputs, outputs)), weight.copy())
        tracemalloc.reset_peak()
    every = range(inputs)
    new = made.solve(every)
    for judged in (made.old(every), new):
        made.error(judged, every, 1.0)
    del judged
    single = new.astype(np.float32)
    packed, _ = gptq.quantize(new, Packing(4, 64), mx.float16, made.feedback(every))
    del new
    made.error(np.array(packed.dense()), every, 1.0)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert single.nbytes < peak <= stated <= 2 * peak


# ---- how much ----


def test_damping_keeps_weights_near_to_what_they_were():
    x, weight, target = data(20)
    free, held = (gram(x, weight, target, damping).solve(range(20)) for damping in (1e-4, DAMPING))
    assert np.linalg.norm(held - weight) < np.linalg.norm(free - weight)
