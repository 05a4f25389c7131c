"""Every criterion equals its float64 reference on every axis, points the right way, and random knows the seed alone.

Taylor's slopes themselves are held to derivatives in test_gradients.py.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from pathlib import Path

import mlx.core as mx
import numpy as np
import pico
import pytest
import reference
import reference_criteria

from mlx_pare.base.errors import PareError, UsageError
from mlx_pare.model.checkpoint import Checkpoint
from mlx_pare.options.settings import TABLE
from mlx_pare.scoring import depth, width
from mlx_pare.scoring.accumulators import sparsity
from mlx_pare.scoring.calibrate import EXTRA, calibrate
from mlx_pare.scoring.score import AXES, CRITERIA, criterion, score
from mlx_pare.store.arrays import Arrays
from mlx_pare.stream import batches as stream_batches
from mlx_pare.tensors import panels
from mlx_pare.text.corpus import Rows

DATA = Rows(
    np.random.default_rng(0).integers(0, 500, (5, 16)).astype(np.int32), np.array([16, 3, 1, 9, 12], dtype=np.int32)
)
MEASURED = [name for name in CRITERIA if name != "random"]
OF_ACTIVATIONS = [name for name in MEASURED if name not in ("magnitude", "composite")]
OF_BOTH = ["obs", "wanda", "flap", "taylor", "taylor2", "iterative"]  # see a matrix that does not read a unit
SUMS = [
    "obs",
    "minitron",
    "magnitude",
    "wanda",
    "flap",
    "block-influence",
]  # have all of their axes in reference.scores


@pytest.fixture(scope="session")
def scored(tmp_path_factory) -> Callable[..., Arrays]:
    """``scored(model, criterion, seed=0)``; a model is calibrated once."""
    stats: dict[Path, Path] = {}

    def scores(model: Path, name: str, seed: int = 0) -> Arrays:
        directory = tmp_path_factory.mktemp("scores")
        if model not in stats:
            stats[model] = calibrate(model, DATA, directory / "stats", extra=EXTRA)
        return Arrays.load(score(model, stats[model], directory / "scores.safetensors", name, seed), "scores")

    return scores


def changed(model: Path, directory: Path, change: Callable[[int, dict], None]) -> Path:
    """A copy of a dense model in which ``change(layer, matrices by short name)`` has replaced some weights."""
    shutil.copytree(model, directory)
    weights = mx.load(str(model / "model.safetensors"))
    layers = {int(found[1]) for name in weights if (found := re.search(r"layers\.(\d+)\.", name))}
    for layer in layers:
        prefix = f"model.layers.{layer}."
        short = {n.removeprefix(prefix): np.array(w) for n, w in weights.items() if n.startswith(prefix)}
        change(layer, short)
        weights |= {prefix + n: mx.array(w) for n, w in short.items()}
    mx.save_safetensors(str(directory / "model.safetensors"), weights, metadata={"format": "mlx"})
    return directory


GATE, UP, DOWN = (f"mlp.{n}_proj.weight" for n in ("gate", "up", "down"))
Q, K, V, O = (f"self_attn.{n}_proj.weight" for n in "qkvo")  # noqa: E741 what the projection is called

# ---- the table ----


def test_the_table_says_what_stands_in():
    """A criterion's functions exist; where it has none of its own, the formula is another row's."""
    for c in CRITERIA.values():
        assert set(c.own) <= set(AXES) and set(c.extra) <= set(EXTRA) and c.needs and c.source
        functions = [f"{c.ffn}_ffn", f"{c.kv_head}_heads", f"{c.hidden}_hidden"]
        assert all(hasattr(width, f) for f in functions) and hasattr(depth, c.layer)
        for axis in set(AXES) - set(c.own):
            stand_in = getattr(c, axis).replace("_", "-")
            assert stand_in in CRITERIA and axis in CRITERIA[stand_in].own and stand_in != c.name


def test_names_come_from_the_table():
    """The option's help, and the page about criteria."""
    told = TABLE["criterion"].help
    page = (Path(__file__).resolve().parents[2] / "docs" / "choosing.md").read_text("utf-8")
    for name in CRITERIA:
        assert name in told.replace(".", "").replace(",", "").split() and f"| {name}" in page


@pytest.mark.parametrize("name", [c.name for c in CRITERIA.values() if set(c.own) != set(AXES)])
def test_what_stands_in_is_what_the_table_says(pico_models, scored, name):
    found = scored(pico_models("qwen3"), name).arrays
    for axis in set(AXES) - set(CRITERIA[name].own):
        stand_in = scored(pico_models("qwen3"), getattr(CRITERIA[name], axis).replace("_", "-")).arrays
        assert np.array_equal(found[axis], stand_in[axis])


# ---- against the reference ----


@pytest.mark.parametrize("name", SUMS)
@pytest.mark.parametrize("packed", [None, (4, 32)], ids=["dense", "4 bits"])
@pytest.mark.parametrize("family", [*pico.FAMILIES, "phi3", "olmo2"])
def test_scores(pico_models, scored, family, packed, name):
    model = pico_models(family, packed)
    found = scored(model, name)
    config, weights = reference.load(model)
    expected = reference.scores("wanda" if name == "obs" else name, config, weights, DATA.tokens, DATA.lengths)
    assert set(found.arrays) == set(expected)
    for axis, values in expected.items():
        atol = 1e-6 if axis in ("layer", "sparsity") else 0  # these are differences of numbers near 1
        if name == "flap":  # a variance is a difference too
            atol = max(atol, 1e-5 * values.max())
        np.testing.assert_allclose(found.arrays[axis], values, rtol=1e-4, atol=atol, err_msg=axis)
    layers, ffn, hidden = (config[k] for k in ("num_hidden_layers", "intermediate_size", "hidden_size"))
    shapes = {"ffn": (layers, ffn), "kv_head": (layers, config["num_key_value_heads"]), "hidden": (hidden,)}
    shapes |= {"layer": (layers,), "sparsity": (layers, ffn)}
    assert {axis: a.shape for axis, a in found.arrays.items()} == shapes
    assert found.about["criterion"] == name and found.about["model"] == Checkpoint(model).identity()


@pytest.mark.parametrize("packed", [None, (4, 32)], ids=["dense", "4 bits"])
@pytest.mark.parametrize("family", pico.FAMILIES)
def test_composite(pico_models, scored, family, packed):
    """Ranks within a layer, weighted; values too near to tell in float32 may have changed places."""
    model = pico_models(family, packed)
    found = scored(model, "composite").arrays
    config, weights = reference.load(model)
    _, layers = reference.forward(config, weights, DATA.tokens)
    bounds = [reference_criteria.composite(config, weights, i, a, DATA.lengths) for i, a in enumerate(layers)]
    loose = total = 0
    for axis in ("ffn", "kv_head", "hidden"):
        low, high = np.stack([b[axis] for b in bounds], axis=1)
        if axis == "hidden":
            low, high = low.sum(0), high.sum(0)
        assert (found[axis] >= low - 1e-5).all() and (found[axis] <= high + 1e-5).all(), axis
        loose, total = loose + (high - low > 1e-5).sum(), total + low.size
    assert loose < total / 5  # most of the bounds are one number


def test_composite_weights_its_views(pico_models, scored, monkeypatch):
    """With one view alone the order is that view's; the weights are read from the literal."""
    config, weights = reference.load(pico_models("llama"))
    monkeypatch.setattr(width, "COMPOSITE", {"magnitude": 2.0})
    found = scored(pico_models("llama"), "composite").arrays["ffn"]
    for i, values in enumerate(found):
        assert np.array_equal(values.argsort(), reference.magnitude(config, weights, i)["ffn"].argsort())
        assert values.min() == 0 and values.max() == 2


def test_ranks():
    found = np.array(width.rank(mx.array([5.0, 1.0, 3.0, 3.0, 1e9])))
    np.testing.assert_allclose(found, [0.75, 0, 0.375, 0.375, 1])
    assert np.array(width.rank(mx.array([7.0]))) == 0


@pytest.mark.parametrize("packed", [None, (4, 32)], ids=["dense", "4 bits"])
@pytest.mark.parametrize("family", pico.FAMILIES)
@pytest.mark.parametrize("name, sums", [("taylor", "gradient_abs"), ("taylor2", "gradient_sq")])
def test_taylor(pico_models, scored, tmp_path, family, packed, name, sums):
    """The scores are the statistics."""
    model = pico_models(family, packed)
    found = scored(model, name).arrays
    stats = Arrays.load(calibrate(model, DATA, tmp_path / "s", extra=["gradients"]), "statistics").arrays
    for i in range(len(found["ffn"])):
        assert np.array_equal(found["ffn"][i], stats[f"{i}.ffn.{sums}"])
        assert found["layer"][i] == stats[f"{i}.block.{sums}"]
        assert np.array_equal(found["kv_head"][i], stats[f"{i}.attention.{sums}"])


@pytest.mark.parametrize("micro_batch", [1, 32, 1024])
@pytest.mark.parametrize("packed", [None, (4, 32)], ids=["dense", "4 bits"])
@pytest.mark.parametrize("family", pico.FAMILIES)
def test_iterative(pico_models, tmp_path, monkeypatch, family, packed, micro_batch):
    """After each micro-batch those channels went that were missed least, beside those that were gone already."""
    monkeypatch.setattr(stream_batches, "MICRO_BATCH_TOKENS", micro_batch)
    model = pico_models(family, packed)
    stats = calibrate(model, DATA, tmp_path / "s", extra=["contributions"])
    found = Arrays.load(score(model, stats, tmp_path / "scores.safetensors", "iterative"), "scores").arrays
    config, weights = reference.load(model)
    _, layers = reference.forward(config, weights, DATA.tokens)
    per_batch = max(1, micro_batch // 16)
    batches = [slice(start, start + per_batch) for start in range(0, 5, per_batch)]
    for i, a in enumerate(layers):
        down, order = weights[f"model.layers.{i}.mlp.down_proj.weight"], found["ffn"][i].argsort()
        assert sorted(found["ffn"][i]) == list(range(128))
        gone = 0
        for part, count in zip(batches, reference_criteria.schedule(128, len(batches)), strict=True):
            lacks = reference_criteria.missing(a["ffn"][part], DATA.lengths[part], down, order[:gone].tolist())
            left = lacks[order[gone:]]
            slack = 1e-5 * left.max()
            assert (np.diff(left[:count]) >= -slack).all() and left[:count].max() <= left[count:].min(
                initial=1e9
            ) + slack
            gone += count
        out = weights[f"model.layers.{i}.self_attn.o_proj.weight"]
        kv_heads = config["num_key_value_heads"]
        expected = reference_criteria.head_contribution(a["attention"], DATA.lengths, out, kv_heads)
        np.testing.assert_allclose(found["kv_head"][i], expected, rtol=1e-5)


def test_iterative_sees_what_is_gone(pico_models, tmp_path, monkeypatch):
    """Not the order of each channel on its own: one that only repeats a removed one is missed all the more."""
    model = pico_models("llama")
    orders = []
    for micro_batch in (1, 1024):
        monkeypatch.setattr(stream_batches, "MICRO_BATCH_TOKENS", micro_batch)
        stats = calibrate(model, DATA, tmp_path / str(micro_batch), extra=["contributions"])
        orders.append(Arrays.load(stats, "statistics").arrays["0.ffn.removal"])
    assert not np.array_equal(*orders)


# ---- planted dead units get the lowest score ----


def lowest(values: np.ndarray) -> set[int]:
    """The index of the lowest score in every layer."""
    return set(values.argmin(axis=-1).tolist())


def dead_channel(layer: int, w: dict) -> None:
    w[GATE][5], w[UP][5], w[DOWN][:, 5] = 0, 0, 0


def unfed_channel(layer: int, w: dict) -> None:
    w[GATE][5], w[UP][5] = 0, 0


def unread_channel(layer: int, w: dict) -> None:
    w[DOWN][:, 5] = 0


@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
@pytest.mark.parametrize(
    ("change", "criteria"),
    [(dead_channel, MEASURED), (unfed_channel, OF_ACTIVATIONS), (unread_channel, OF_BOTH)],
    ids=lambda v: getattr(v, "__name__", ""),
)
def test_dead_channel(pico_models, scored, tmp_path, family, change, criteria):
    model = changed(pico_models(family), tmp_path / "m", change)
    for name in criteria:
        found = scored(model, name).arrays["ffn"]
        assert lowest(found) == {5} and found[:, 5].max() == 0, name


def test_unfed_channel_counts_as_sparse(pico_models, scored, tmp_path):
    model = changed(pico_models("llama"), tmp_path / "m", unfed_channel)
    found = scored(model, "minitron").arrays["sparsity"]
    assert (found[:, 5] == 1).all() and found[:, :5].max() < 1


def dead_heads(layer: int, w: dict) -> None:
    """The second of two kv heads with its two query heads: no values come out, and nobody reads them."""
    w[V][16:], w[O][:, 32:] = 0, 0


def silent_heads(layer: int, w: dict) -> None:
    w[V][16:] = 0


def unread_head(layer: int, w: dict) -> None:
    w[O][:, 48:] = 0


@pytest.mark.parametrize("name", MEASURED)
def test_dead_heads(pico_models, scored, tmp_path, name):
    found = scored(changed(pico_models("llama"), tmp_path / "m", dead_heads), name).arrays["kv_head"]
    assert found[:, 1].max() < found[:, 0].min()


@pytest.mark.parametrize("name", OF_ACTIVATIONS)
def test_silent_heads(pico_models, scored, tmp_path, name):
    found = scored(changed(pico_models("llama"), tmp_path / "m", silent_heads), name).arrays["kv_head"]
    assert found[:, 1].max() == 0 < found[:, 0].min()


@pytest.mark.parametrize("name", ["wanda", "flap", "magnitude"])
def test_unread_head(pico_models, scored, tmp_path, name):
    """Criteria that look at o_proj and at query heads one by one must see it, in the kv head that it belongs to."""
    found = scored(changed(pico_models("llama"), tmp_path / "m", unread_head), name).arrays["kv_head"]
    assert lowest(found) == {1}


def identity_layer(layer: int, w: dict) -> None:
    if layer == 2:
        w[O][:], w[DOWN][:] = 0, 0


@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
@pytest.mark.parametrize("name", MEASURED)
def test_layer_that_does_nothing(pico_models, scored, tmp_path, family, name):
    found = scored(changed(pico_models(family), tmp_path / "m", identity_layer), name).arrays["layer"]
    assert found.argmin() == 2
    assert name == "magnitude" or abs(found[2]) < 1e-5


def test_layer_that_turns_everything_around(pico_models, scored, tmp_path):
    """The other end of block influence: a block after which nothing of its input is left."""

    def loud(layer: int, w: dict) -> None:
        if layer == 1:
            w[DOWN] *= 1000

    found = scored(changed(pico_models("llama"), tmp_path / "m", loud), "block-influence").arrays["layer"]
    assert found.argmax() == 1 and found[1] > 0.5


@pytest.mark.parametrize("name", MEASURED)
def test_dead_hidden_channel(pico_models, scored, tmp_path, name):
    def dead(layer: int, w: dict) -> None:
        for norm, readers, writer in (("input", (Q, K, V), O), ("post_attention", (GATE, UP), DOWN)):
            w[f"{norm}_layernorm.weight"][7], w[writer][7] = 0, 0
            for reader in readers:
                w[reader][:, 7] = 0

    found = scored(changed(pico_models("llama"), tmp_path / "m", dead), name).arrays
    assert found["hidden"].argmin() == 7 and found["hidden"][7] == 0


# ---- direction: a unit that does more ----


def loud_units(layer: int, w: dict) -> None:
    """A channel, and a kv head with its query heads, that give a hundred times as much."""
    w[DOWN][:, 9] *= 100
    w[O][:, :32] *= 100


@pytest.mark.parametrize("name", ["wanda", "flap", "iterative", "magnitude", "taylor", "taylor2"])
def test_loud_units(pico_models, scored, tmp_path, name):
    found = scored(changed(pico_models("llama"), tmp_path / "m", loud_units), name).arrays
    assert set(found["ffn"].argmax(axis=1)) == {9}
    assert (found["kv_head"][:, 0] > found["kv_head"][:, 1]).all()


# ---- permuting units permutes scores ----


@pytest.mark.parametrize("name", MEASURED)
def test_permuted_channels(pico_models, scored, tmp_path, name):
    order = np.random.default_rng(1).permutation(128)

    def permute(layer: int, w: dict) -> None:
        w[GATE], w[UP], w[DOWN] = w[GATE][order], w[UP][order], w[DOWN][:, order]

    before = scored(pico_models("llama"), name).arrays
    after = scored(changed(pico_models("llama"), tmp_path / "m", permute), name).arrays
    np.testing.assert_allclose(after["ffn"], before["ffn"][:, order], rtol=1e-4, atol=1e-5 * before["ffn"].max())
    np.testing.assert_allclose(after["sparsity"], before["sparsity"][:, order], atol=1e-5)
    for axis in ("kv_head", "layer", "hidden"):
        np.testing.assert_allclose(after[axis], before[axis], rtol=1e-4, atol=max(1e-6, 1e-5 * before[axis].max()))


@pytest.mark.parametrize("name", MEASURED)
def test_permuted_heads(pico_models, scored, tmp_path, name):
    """The two groups of a kv head and its two query heads change places."""
    rows = np.r_[32:64, 0:32]

    def permute(layer: int, w: dict) -> None:
        w[Q], w[O] = w[Q][rows], w[O][:, rows]
        w[K], w[V] = (np.roll(w[n], 16, axis=0) for n in (K, V))

    before = scored(pico_models("llama"), name).arrays["kv_head"]
    after = scored(changed(pico_models("llama"), tmp_path / "m", permute), name).arrays["kv_head"]
    np.testing.assert_allclose(after, before[:, [1, 0]], rtol=1e-4, atol=1e-5 * before.max())


# ---- random ----


def test_random_depends_on_the_seed_alone(pico_models, scored, tmp_path):
    plain, dead = pico_models("llama"), changed(pico_models("llama"), tmp_path / "m", dead_channel)
    first, again, other = scored(plain, "random", 3), scored(dead, "random", 3), scored(plain, "random", 4)
    for axis in AXES:
        assert np.array_equal(first.arrays[axis], again.arrays[axis]), axis
        assert not np.isin(first.arrays[axis], other.arrays[axis]).any(), axis
    assert first.about["seed"] == 3


def test_random_is_drawn_anew_for_every_unit(pico_models, scored):
    found = scored(pico_models("llama"), "random").arrays
    every = np.concatenate([found[axis].ravel() for axis in AXES])
    assert len(np.unique(every)) == len(every)
    assert abs(found["ffn"].mean() - 0.5) < 0.1


@pytest.mark.parametrize("name", CRITERIA)
def test_same_bytes(pico_models, tmp_path, name):
    model = pico_models("llama")
    stats = calibrate(model, DATA, tmp_path / "stats", extra=CRITERIA[name].extra)
    files = [score(model, stats, tmp_path / f"{i}.safetensors", name, 1).read_bytes() for i in range(2)]
    assert files[0] == files[1]


# ---- what cannot be scored ----


def test_unknown_criterion(pico_models, tmp_path):
    with pytest.raises(UsageError, match="unknown criterion 'tarot'") as found:
        criterion("tarot")
    assert all(name in found.value.cure for name in CRITERIA)
    with pytest.raises(UsageError):
        score(pico_models("llama"), tmp_path / "none", tmp_path / "out", "tarot")


@pytest.mark.parametrize("other", [{"family": "qwen3"}, {"num_hidden_layers": 6}, {"seed": 1}])
def test_statistics_of_another_model(pico_models, tmp_path, other):
    """Of another family, of another depth, and of one that differs in its weights alone."""
    stats = calibrate(pico_models(**other), DATA, tmp_path / "stats")
    with pytest.raises(PareError, match="another model"):
        score(pico_models("llama"), stats, tmp_path / "out.safetensors")
    assert not (tmp_path / "out.safetensors").exists()


@pytest.mark.parametrize("name", [c.name for c in CRITERIA.values() if c.extra])
def test_statistics_that_hold_too_little(pico_models, tmp_path, name):
    """Nothing, and everything but what is needed: one line, with what to do."""
    extra = CRITERIA[name].extra
    for kept in ((), sorted(set(EXTRA) - set(extra))):
        stats = calibrate(pico_models("llama"), DATA, tmp_path / f"{len(kept)}", extra=kept)
        with pytest.raises(PareError, match=f"holds no {extra[0]}, which the criterion {name} needs") as found:
            score(pico_models("llama"), stats, tmp_path / "out.safetensors", name)
        assert f"--criterion {name}" in found.value.cure and "\n" not in str(found.value)
    assert not (tmp_path / "out.safetensors").exists()


def test_missing_and_damaged_statistics(pico_models, tmp_path):
    with pytest.raises(PareError, match="cannot read statistics"):
        score(pico_models("llama"), tmp_path / "none.safetensors", tmp_path / "out.safetensors")
    (tmp_path / "cut.safetensors").write_bytes(b"\x10")
    with pytest.raises(PareError, match="cannot read statistics"):
        score(pico_models("llama"), tmp_path / "cut.safetensors", tmp_path / "out.safetensors")


# ---- sparsity ----


def of(x: np.ndarray) -> np.ndarray:
    x = x.astype(np.float32)
    return np.array(sparsity(mx.array(np.abs(x).sum(0)), mx.array((x**2).sum(0)), len(x)))


def test_sparsity_of_known_units():
    x = np.zeros((100, 5))
    x[:, 0], x[3, 1], x[:, 3], x[::2, 4] = 2, 5, np.tile([1, -1], 50), 1
    assert of(x) == pytest.approx([0, 1, 1, 0, (10 - 50**0.5) / 9], abs=1e-5)  # constant, one-hot, dead, signs, half


def test_sparsity_against_the_reference():
    x = np.random.default_rng(0).standard_normal((64, 20)) ** np.arange(1, 21)
    np.testing.assert_allclose(of(x), reference.hoyer(x), atol=1e-5)


@pytest.mark.parametrize("scale", [1e-6, 1e-3, 1e6])
def test_sparsity_ignores_the_scale(scale):
    x = np.random.default_rng(0).standard_normal((64, 20))
    np.testing.assert_allclose(of(x * scale), of(x), atol=1e-5)


@pytest.mark.parametrize("packed", [None, (4, 32)])
def test_matrices_that_are_expanded_in_parts(pico_models, tmp_path, monkeypatch, packed):
    """Five rows of 64 columns at a time, with a rest: the same scores."""
    model = pico_models("qwen3", packed=packed)
    stats = calibrate(model, Rows.full(np.random.default_rng(0).integers(0, 500, (3, 16))), tmp_path / "stats")
    for name in ("magnitude", "wanda", "flap"):
        whole = Arrays.load(score(model, stats, tmp_path / "whole.safetensors", name), "scores").arrays
        with monkeypatch.context() as patch:
            patch.setattr(panels, "PANEL_VALUES", 64 * 5)
            parts = Arrays.load(score(model, stats, tmp_path / "parts.safetensors", name), "scores").arrays
        assert whole.keys() == parts.keys()
        for unit, values in whole.items():
            np.testing.assert_allclose(np.array(parts[unit]), np.array(values), rtol=1e-5, err_msg=unit)
