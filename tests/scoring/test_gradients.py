"""Streamed gradients equal finite differences in float64 and the gradient of the whole resident model, unit by unit."""

from __future__ import annotations

from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pico
import pytest
import reference
import reference_criteria

from mlx_pare import lm
from mlx_pare.base.errors import PareError, Refused
from mlx_pare.model.checkpoint import Checkpoint
from mlx_pare.scoring import gradients
from mlx_pare.stream import batches, head
from mlx_pare.text.corpus import Rows

DATA = Rows(
    np.random.default_rng(0).integers(0, 500, (5, 16)).astype(np.int32), np.array([16, 3, 1, 9, 12], dtype=np.int32)
)


def close(found: np.ndarray, expected: np.ndarray, largest: float, what: str) -> None:
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5 * largest, err_msg=what)


def numpy(arrays: dict[str, mx.array]) -> dict[str, np.ndarray]:
    return {name: np.array(a) for name, a in arrays.items()}


# ---- against derivatives ----


@pytest.mark.parametrize("packed", [None, (4, 32)], ids=["dense", "4 bits"])
@pytest.mark.parametrize("family", [*pico.FAMILIES, "phi3", "gemma2", "granite"])
def test_finite_differences(pico_models, family, packed):
    """A few channels, every kv head and the block itself, in the first and the last layer."""
    model = pico_models(family, packed)
    found = numpy(gradients.measure(model, DATA))
    config, weights = reference.load(model)
    for layer in (0, config["num_hidden_layers"] - 1):
        for site, units in (("ffn", (0, 5, 127)), ("attention", range(config["num_key_value_heads"])), ("block", (0,))):
            for unit in units:
                row = reference_criteria.slopes(config, weights, DATA.tokens, DATA.lengths, layer, site, unit)
                for name, expected in (("gradient_abs", np.abs(row).mean()), ("gradient_sq", (row**2).mean())):
                    values = np.atleast_1d(found[f"{layer}.{site}.{name}"])
                    close(values[unit], expected, values.max(), f"{layer}.{site}.{name}[{unit}]")


class Watched:
    """A stock block with a factor on what it adds and something added to what it gives."""

    def __init__(self, block, index: int, given: dict):
        self.block, self.index, self.given = block, index, given

    def __getattr__(self, name):
        return getattr(self.block, name)

    def __call__(self, x, *args, **kwargs):
        added = self.block(x, *args, **kwargs) - x
        return x + added * self.given[f"{self.index}.block"][:, None, None] + self.given[f"{self.index}.after"]


class Factor:
    """A stock matrix with factors on its inputs."""

    def __init__(self, matrix, name: str, given: dict):
        self.matrix, self.name, self.given = matrix, name, given

    def __call__(self, x):
        factor = self.given[self.name]
        return self.matrix(x * mx.repeat(factor, x.shape[-1] // factor.shape[-1], axis=-1)[:, None])


def whole_gradient(path: Path, data: Rows) -> dict[str, np.ndarray]:
    """mx.grad of the loss of the resident stock model, w.r.t. all factors at once, float32."""
    model, count = lm.load_stock(path), data.count
    config = reference.load(path)[0]
    given: dict[str, mx.array] = {}
    asked: dict[str, mx.array] = {}
    for i, block in enumerate(model.model.layers):
        asked[f"{i}.block"] = mx.ones((count,))
        asked[f"{i}.after"] = mx.zeros((count, data.length, config["hidden_size"]))
        asked[f"{i}.ffn"] = mx.ones((count, config["intermediate_size"]))
        asked[f"{i}.attention"] = mx.ones((count, config["num_key_value_heads"]))
        block.mlp.down_proj = Factor(block.mlp.down_proj, f"{i}.ffn", given)
        block.self_attn.o_proj = Factor(block.self_attn.o_proj, f"{i}.attention", given)
        model.model.layers[i] = Watched(block, i, given)

    def loss(values: dict) -> mx.array:
        given.update(values)
        nll = nn.losses.cross_entropy(model(mx.array(data.tokens))[:, :-1], mx.array(data.tokens[:, 1:]))
        return (nll * mx.array(data.mask()[:, 1:])).sum()

    return numpy(mx.grad(loss)(asked))


@pytest.mark.parametrize("micro_batch", [1024, 1, 32])
@pytest.mark.parametrize("family", ["llama", "llama-untied", "qwen2", "gemma3_text"])
def test_whole_model(pico_models, monkeypatch, family, micro_batch):
    """Every unit of every layer, and the cotangents between the blocks."""
    monkeypatch.setattr(batches, "MICRO_BATCH_TOKENS", micro_batch)
    model = pico_models(family)
    found, expected = numpy(gradients.measure(model, DATA)), {}
    for name, slope in whole_gradient(model, DATA).items():
        layer, site = name.split(".")
        if site == "after":
            expected[f"{layer}.block.cotangent_sq"] = (slope**2).sum() / DATA.lengths.sum()
        else:
            expected[f"{name}.gradient_abs"] = np.abs(slope).mean(axis=0)
            expected[f"{name}.gradient_sq"] = (slope**2).mean(axis=0)
    assert set(found) == set(expected)
    for name, values in expected.items():
        assert found[name].shape == values.shape and values.max() > 0
        close(found[name], values, values.max(), name)


def test_head_in_many_chunks(pico_models, monkeypatch):
    whole = numpy(gradients.measure(pico_models("llama"), DATA))
    monkeypatch.setattr(head, "CHUNK_BYTES", 20_000)  # 65 tokens of the vocabulary
    for name, values in gradients.measure(pico_models("llama"), DATA).items():
        close(np.array(values), whole[name], whole[name].max(), name)


@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16], ids=str)
def test_half_precision_checkpoints(pico_models, dtype):
    found = gradients.measure(pico_models("llama", dtype=dtype), DATA)
    assert all(a.dtype == mx.float32 and mx.isfinite(a).all().item() for a in found.values())


# ---- which rows and tokens count ----


def test_padding_does_not_count(pico_models):
    other = Rows(np.where(DATA.mask(), DATA.tokens, 7).astype(np.int32), DATA.lengths)
    a, b = (numpy(gradients.measure(pico_models("llama"), d)) for d in (DATA, other))
    for name, values in a.items():
        close(b[name], values, values.max(), name)


def test_a_longer_row_is_another_loss(pico_models):
    """The test above could not fail if lengths were ignored altogether."""
    longer = Rows(DATA.tokens, np.array([16, 16, 1, 9, 12], dtype=np.int32))
    a, b = (numpy(gradients.measure(pico_models("llama"), d)) for d in (DATA, longer))
    assert (a["0.ffn.gradient_abs"] != b["0.ffn.gradient_abs"]).all()


def test_at_most_so_many_rows(pico_models, monkeypatch):
    model = pico_models("llama")
    monkeypatch.setattr(gradients, "MOST_ROWS", 2)
    few = Rows(DATA.tokens[:2], DATA.lengths[:2])
    a, b = (numpy(gradients.measure(model, d)) for d in (DATA, few))
    assert all(np.array_equal(a[name], b[name]) for name in a)


def test_nothing_to_predict(pico_models):
    single = Rows(DATA.tokens, np.ones(5, dtype=np.int32))
    with pytest.raises(PareError, match="at least two tokens"):
        gradients.measure(pico_models("llama"), single)


# ---- memory ----


def test_memory_is_bounded_and_said_beforehand(pico_models):
    """The hidden states of every block are most of it: more layers need more, and the estimate holds."""
    rows = Rows.full(np.random.default_rng(0).integers(0, 500, (32, 128)))
    needed = []
    for layers in (4, 12):
        checkpoint = Checkpoint(pico_models("llama", num_hidden_layers=layers))
        needed.append(gradients.check_memory(checkpoint, rows, None))
        mx.reset_peak_memory()
        gradients.measure(checkpoint.path, rows)
        assert mx.get_peak_memory() < needed[-1]
    assert needed[1] - needed[0] == 8 * 32 * 128 * 64 * 4
    with pytest.raises(Refused, match="memory-cap"):
        gradients.check_memory(checkpoint, rows, needed[1] - 1)


def test_rows_beyond_the_most_need_no_memory(pico_models):
    checkpoint = Checkpoint(pico_models("llama"))
    estimates = [gradients.check_memory(checkpoint, Rows.full(np.zeros((n, 16))), None) for n in (32, 3200)]
    assert estimates[0] == estimates[1]


def test_blocks_that_hand_on_more_are_refused():
    kept = gradients._Kept(DATA)
    with pytest.raises(PareError, match="more than hidden states"):
        kept.called(1, mx.zeros((5, 16, 8)), (None,), {"shared": mx.zeros((5, 16, 8))})
    kept.called(1, mx.zeros((5, 16, 8)), (None, "causal", mx.ones((16, 16), dtype=mx.bool_)), {"cache": None})
    assert len(kept.states) == 1
