"""Statistics and scores of experts, against sums over tokens in float64 numpy and against planted experts."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest

from mlx_pare.base.errors import UsageError
from mlx_pare.model.checkpoint import Checkpoint
from mlx_pare.scoring.accumulators import RoutedSums
from mlx_pare.scoring.calibrate import calibrate
from mlx_pare.scoring.expert import CANDIDATES, FEW, FORMULAS, super_experts
from mlx_pare.scoring.score import CRITERIA, EXPERT_CRITERIA, score
from mlx_pare.scoring.source import Source, read_stats
from mlx_pare.store.arrays import Arrays
from mlx_pare.text.corpus import Rows
from tests.support import sparse

TOKENS = np.random.default_rng(0).integers(0, 500, (8, 48)).astype(np.int32)


def summed(experts, weights, outputs, mask, count):
    """The sums of RoutedSums, token by token."""
    found = {name: np.zeros(count) for name in RoutedSums.NAMES}
    for place in np.ndindex(experts.shape):
        if mask[place[:2]]:
            e, g, f = experts[place], abs(float(weights[place])), outputs[place].astype(np.float64)
            norm = np.sqrt((f * f).sum())
            for name, value in zip(RoutedSums.NAMES, (1, g, norm, norm**2, g * norm, (g * norm) ** 2), strict=False):
                found[name][e] += value
            found["max"][e] = max(found["max"][e], np.abs(f).max())
    return found


def test_sums_are_those_of_single_tokens():
    random = np.random.default_rng(3)
    shape = (4, 6, 3)
    experts, weights = random.integers(0, 7, shape), random.random(shape).astype(np.float32)
    outputs = random.standard_normal((*shape, 16)).astype(np.float32)
    mask = random.random((4, 6)) < 0.7
    whole, halves = RoutedSums(7), RoutedSums(7)
    whole.update(*map(mx.array, (experts, weights, outputs)), mx.array(mask))
    for part in (slice(0, 1), slice(1, 4)):
        halves.update(*(mx.array(a[part]) for a in (experts, weights, outputs, mask)))
    expected = summed(experts, weights, outputs, mask, 7)
    for name in RoutedSums.NAMES:
        assert np.allclose(whole.arrays()[name], expected[name], rtol=1e-5), name
        assert np.allclose(halves.arrays()[name], expected[name], rtol=1e-5), name


@pytest.fixture(scope="module")
def planted(tmp_path_factory):
    """A model in which every layer has two dead experts (0, 1), a rare loud one (2) and a frequent quiet one (3), and
    its statistics. Channel 0 of the stream is constant, and the router listens to it."""
    place = tmp_path_factory.mktemp("planted")
    model = sparse.make(place / "m", "qwen3_moe", intermediate_size=64)
    weights = dict(mx.load(str(model / "model.safetensors")))
    for name, array in weights.items():
        if name.endswith("embed_tokens.weight"):
            array[:, 0] = 3.0
        if name.endswith("o_proj.weight"):
            array[0] = 0
        if name.endswith("switch_mlp.down_proj.weight"):
            array[:, 0] = 0
            array[2] *= 30
            array[3] *= 1e-3
        if "norm.weight" in name and "q_norm" not in name and "k_norm" not in name:
            array = mx.ones_like(array)
        if name.endswith("mlp.gate.weight"):
            array[:, 0] = 0
            array[0, 0] = array[1, 0] = -300
            array[2, 0] = -0.3
            array[3, 0] = 1.0
        weights[name] = array
    mx.save_safetensors(str(model / "model.safetensors"), weights, {"format": "mlx"})
    return model, calibrate(model, Rows.full(TOKENS), place / "stats")


def scores(planted, out, name):
    model, stats = planted
    return Arrays.load(score(model, stats, out / f"{name}.safetensors", name), "scores").arrays


def test_planted_experts(planted):
    """The dead go first; the norm of outputs tells the quiet one, its visits do not; the rare loud one has the largest
    mean and never the most visits."""
    model, stats = planted
    source = Source(Checkpoint(model), read_stats(stats), 0, Arrays.described(stats, "statistics"))
    for layer in range(4):
        order = {name: np.argsort(np.array(FORMULAS[name](source, layer))).tolist() for name in CANDIDATES}
        visits = np.array(source.stat(layer, "expert", "visits"))
        assert visits[0] == visits[1] == 0 < visits[2] < visits.mean() < visits[3], visits
        for name in ("frequency", "seer", "ean", "energy"):
            assert {*order[name][:2]} == {0, 1}, name
        assert order["ean"][2] == order["energy"][2] == 3 and order["man"][0] == order["reap"][0] == 3
        assert order["frequency"].index(3) > 6 and order["frequency"][-1] != 2
        assert order["man"][-1] == order["reap"][-1] == 2
    largest = np.array([source.stat(layer, "expert", "max") for layer in range(4)]).astype(np.float64)
    above = largest > max(np.percentile(largest, 99.5), largest.max() / 10)
    above[3] = False  # the last quarter of the layers
    found = super_experts(source)
    assert np.array_equal(np.array([found[layer] for layer in range(4)]), above)
    assert largest.argmax(axis=1).tolist() == [2] * 4


def test_means_of_few_visits_are_drawn_to_the_layer(planted, tmp_path):
    stats = mx.load(str(planted[1]))
    visits, given = (np.array(stats[f"1.expert.{name}"]).astype(np.float64) for name in ("visits", "given"))
    assert visits.sum() == TOKENS.size * 3 and visits[0] == 0
    usual = given.sum() / visits.sum()
    expected = (given + FEW * usual) / (visits + FEW)
    found = scores(planted, tmp_path, "reap")["expert"][1]
    loud = found.argmax()  # a super expert is raised above all others
    assert np.allclose(np.delete(found, loud), np.delete(expected, loud), rtol=1e-5) and loud == expected.argmax()


def test_obs_proposes_the_experts_of_every_candidate(planted, tmp_path):
    found = scores(planted, tmp_path, "obs")
    assert {*found} == {"expert", "layer", *(f"expert.{name}" for name in CANDIDATES)}
    for name in CANDIDATES:
        assert np.array_equal(found[f"expert.{name}"], scores(planted, tmp_path, name)["expert"])


def test_layers_without_experts_have_no_scores(tmp_path):
    model = sparse.make(tmp_path / "m", "glm4_moe")
    stats = calibrate(model, Rows.full(TOKENS[:2]), tmp_path / "stats")
    found = Arrays.load(score(model, stats, tmp_path / "s.safetensors", "magnitude"), "scores").arrays
    assert np.isnan(found["expert"][0]).all() and np.isfinite(found["expert"][1:]).all()
    weights = mx.load(str(model / "model.safetensors"))
    parts = [np.array(weights[f"model.layers.2.mlp.switch_mlp.{n}_proj.weight"]) for n in ("gate", "up", "down")]
    expected = np.sqrt(sum((p.astype(np.float64) ** 2).sum(axis=(1, 2)) for p in parts))
    order = np.argsort(expected)[:-1]  # the largest activation of all may be raised
    assert np.allclose(np.sort(found["expert"][2])[:-1], np.sort(expected)[:-1], rtol=1e-5) or order.size


def test_criteria_that_do_not_suit(planted, tmp_path, pico_models):
    model, stats = planted
    for name in ("taylor", "taylor2", "iterative"):
        with pytest.raises(UsageError, match=f"{name} cannot score experts"):
            score(model, stats, tmp_path / "s", name)
    dense = pico_models("llama")
    with pytest.raises(UsageError, match="reap scores experts, and llama has none"):
        score(dense, stats, tmp_path / "s", "reap")
    assert not {*CRITERIA} & {*EXPERT_CRITERIA}
