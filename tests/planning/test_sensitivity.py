"""How much every part of every layer matters: measured where it is said to be, and in the right order."""

from __future__ import annotations

from pathlib import Path

import mlx.core as mx
import numpy as np
import pico
import pytest

from mlx_pare.model.checkpoint import Checkpoint
from mlx_pare.planning.candidate import Curve, Width, whole
from mlx_pare.planning.sensitivity import expected, rank_correlations, sensitivity
from mlx_pare.planning.try_candidates import try_out
from mlx_pare.repair import output_projection
from mlx_pare.store.arrays import Arrays
from mlx_pare.text.corpus import Rows

RANDOM = np.random.default_rng(0)
DATA, HELD = (Rows.full(RANDOM.integers(0, 500, (count, 24))) for count in (24, 6))


@pytest.fixture(scope="module", autouse=True)
def little_damping():
    """What damping adds to the loss of a width would hide what these tests look at."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(output_projection, "DAMPING", 1e-4)
        yield


@pytest.fixture(scope="module")
def found(pico_models, tmp_path_factory) -> tuple[Path, Arrays]:
    """A model of 4 layers, 4 kv heads, 128 channels, and its sensitivities, those to bits among them."""
    path, out = pico_models("llama", num_key_value_heads=4), tmp_path_factory.mktemp("s") / "s.safetensors"
    assert sensitivity(path, DATA, HELD, out, bits=(3, 8), group_size=32) == out
    return path, Arrays.load(out, "sensitivities")


def test_arrays(found):
    path, made = found
    names = {
        f"{i}.{part}.{what}"
        for i in range(4)
        for part in ("attention", "ffn")
        for what in ("order", "loss", "kl", "bits")
    }
    assert set(made.arrays) == names | {f"{i}.drop" for i in range(4)}
    for i in range(4):
        for part, units in (("attention", 4), ("ffn", 128)):
            order, loss, kl, bits = (made.arrays[f"{i}.{part}.{what}"] for what in ("order", "loss", "kl", "bits"))
            assert sorted(order.tolist()) == list(range(units))
            assert loss.shape == kl.shape == (units + 1,) and bits.shape == (2,)
            assert loss[-1] == kl[-1] == 0 and loss[0] == pytest.approx(1, abs=1e-2)
            assert (np.diff(loss) <= 0).all() and (np.diff(kl) <= 0).all()
            assert bits[0] > bits[1] > 0
        assert made.arrays[f"{i}.drop"].shape == ()
    assert made.about["bits"] == [3, 8] and made.about["group_size"] == 32
    assert made.about["model"] == Checkpoint(path).identity()
    assert (made.about["calibration"], made.about["held"]) == (DATA.digest(), HELD.digest())
    assert (made.about["tokens"], made.about["held_tokens"]) == (24 * 24, 6 * 24)


SINGLES = [
    (0, "ffn", dict(ffn=64)),
    (3, "ffn", dict(ffn=112)),
    (1, "attention", dict(kv_head=2)),
    (2, "ffn", dict(ffn=0)),
    (2, "attention", dict(kv_head=0)),
]


@pytest.mark.parametrize(("layer", "part", "change"), SINGLES)
def test_expected_where_it_was_measured(found, layer, part, change):
    path, made = found
    full = whole(Checkpoint(path).arch)
    tried = (*full[:layer], Width(**{"kv_head": 4, "ffn": 128} | change), *full[layer + 1 :])
    kl = try_out(path, [tried], DATA, HELD).kl[0]
    assert made.arrays[f"{layer}.{part}.kl"][next(iter(change.values()))] == pytest.approx(kl, rel=1e-3)


def test_drops_and_bits_are_measured(found):
    path, made = found
    full = whole(Checkpoint(path).arch)
    singles = [(*full[:2], None, full[3]), (Width(4, 128, 3), *full[1:]), (Width(4, 128, None, 8), *full[1:])]
    arrays = made.arrays
    expected = [float(arrays["2.drop"]), arrays["0.attention.bits"][0], arrays["0.ffn.bits"][1]]
    assert try_out(path, singles, DATA, HELD, group_size=32).kl == pytest.approx(expected, rel=1e-3)


def test_parts_that_cannot_go_are_not_tried_without(pico_models, tmp_path, monkeypatch):
    """No class of stock mlx-lm holds a Gemma that lost a feed-forward."""
    tried = []

    def count(model, candidates, *rest):
        tried.extend(candidates)
        return try_out(model, candidates, *rest)

    monkeypatch.setattr("mlx_pare.planning.sensitivity.try_out", count)
    sensitivity(pico_models("gemma3_text"), DATA, HELD, tmp_path / "s.safetensors")
    assert all(width.ffn and width.kv_head for made in tried for width in made if width is not None)
    assert len(tried) == len(set(tried)) == 6 * 4  # without the layer, one head, two widths


# ---- what is between ----


def curve(*loss: float) -> Curve:
    return Curve(np.arange(len(loss) - 1), np.array(loss))


def test_expected_goes_through_what_was_measured():
    loss = curve(1, 0.6, 0.3, 0.1, 0.02, 0)
    made = expected(loss, {1: 3.0, 3: 0.2})
    assert made[[1, 3]] == pytest.approx([3.0, 0.2])
    assert made[2] == pytest.approx(0.3 * np.sqrt(3.0 / 0.6 * 0.2 / 0.1))  # the factor is interpolated as a logarithm
    assert made[[0, 4, 5]] == pytest.approx([5.0, 0.04, 0])  # and beyond it stays


def test_wider_is_never_worse():
    made = expected(curve(1, 0.6, 0.3, 0.1, 0.02, 0), {1: 0.1, 3: 0.3})
    assert made[3] == pytest.approx(0.3) and (np.diff(made) <= 0).all()
    assert made[1] == made[3]


@pytest.mark.parametrize("points", [{}, {3: 0.1}])
def test_expected_where_nothing_can_be_measured(points):
    """Only the loss is known then; the whole part loses nothing, so no factor comes from there."""
    assert expected(curve(1, 0.5, 0.2, 0), points).tolist() == [1, 0.5, 0.2, 0]


def test_expected_of_less_than_nothing():
    """A KL divergence that rounding made negative is none."""
    assert (expected(curve(1, 0.5, 0.2, 0), {1: -1e-9}) >= 0).all()


def test_a_width_that_was_given_up_is_worth_nothing():
    made = expected(curve(1, 0.5, 0.2, 0), {0: np.inf, 2: 0.4})
    assert made.tolist() == [np.inf, 1.0, 0.4, 0]


# ---- ranks ----


def test_rank_correlations_by_hand():
    """Spearman: 1 - 6 sum d^2 / (n (n^2 - 1)) for ranks that differ by d."""
    curves = {
        (i, part): curve(1, loss, 0) for i, loss in enumerate([0.1, 0.2, 0.3, 0.4]) for part in ("attention", "ffn")
    }
    kl = {"ffn": [1.0, 2.0, 3.0, 4.0], "attention": [0.2, 0.1, 0.4, 0.3]}
    measured = {(i, part, 1): value for part, values in kl.items() for i, value in enumerate(values)}
    measured |= {(0, "layer", 0): 9.0, (0, "ffn bits", 3): 9.0}
    found = rank_correlations(curves, measured)
    assert found["ffn"] == pytest.approx(1) and found["attention"] == pytest.approx(1 - 6 * 4 / (4 * 15))
    losses, all_kl = (
        np.array([0, 2, 4, 6, 0, 2, 4, 6]) + 0.5,
        np.array([5, 6, 7, 8, 2, 1, 4, 3]) - 1,
    )  # ranks, ties shared
    wanted = np.corrcoef(losses, all_kl)[0, 1]
    assert found["all"] == pytest.approx(wanted)
    assert set(found) == {"ffn", "attention", "all"}


@pytest.mark.parametrize("values", [[1.0, 2.0], [1.0, 1.0, 1.0], [np.inf, np.inf, 1.0, 2.0]])
def test_no_rank_correlation_of_what_says_nothing(values):
    curves = {(i, "ffn"): curve(1, 0.1 * i + 0.1, 0) for i in range(4)}
    assert rank_correlations(curves, {(i, "ffn", 1): value for i, value in enumerate(values)}) == {}


# ---- planted ----


@pytest.fixture(scope="module")
def planted(tmp_path_factory) -> Arrays:
    """Layer 1 writes next to nothing with its feed-forward, layer 2 with its attention; channels 5, 50 and 100 of layer
    0 are dead, and head 3 of layer 3."""
    root = tmp_path_factory.mktemp("planted")
    path = pico.make(root / "model", "llama", num_key_value_heads=4)
    weights = dict(mx.load(str(path / "model.safetensors")))
    weights["model.layers.1.mlp.down_proj.weight"] *= 1e-4
    weights["model.layers.2.self_attn.o_proj.weight"] *= 1e-4
    weights["model.layers.0.mlp.up_proj.weight"][mx.array([5, 50, 100])] = 0
    weights["model.layers.3.self_attn.o_proj.weight"][:, 48:64] = 0
    mx.save_safetensors(str(path / "model.safetensors"), weights, metadata={"format": "mlx"})
    return Arrays.load(sensitivity(path, DATA, HELD, root / "s.safetensors"), "sensitivities")


def test_what_writes_next_to_nothing_may_go(planted):
    kl = {name: array[0] for name, array in planted.arrays.items() if name.endswith(".kl")}
    least = {"1.ffn.kl", "2.attention.kl"}
    assert max(kl[name] for name in least) < 1e-4 * min(kl[name] for name in set(kl) - least)


def test_dead_units_go_first(planted):
    assert set(planted.arrays["0.ffn.order"][:3].tolist()) == {5, 50, 100}
    assert planted.arrays["3.attention.order"][0] == 3
    assert planted.arrays["0.ffn.loss"][125] < 1e-5 and planted.arrays["3.attention.loss"][3] < 1e-5
