"""Which experts stay: the set with which a block loses least on other text, judged again by the stock model."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest

from mlx_pare import lm
from mlx_pare.base.errors import Refused
from mlx_pare.routing.choose_experts import choose_experts
from mlx_pare.text.corpus import Rows
from tests.pruning.test_experts import plan_of
from tests.support import sparse

HELD = Rows.full(np.random.default_rng(4).integers(0, 500, (3, 40)).astype(np.int32))


def missed(model, family, layer, kept, rows) -> float:
    """The mean over tokens of the squared error of the block's experts over the square of their output, with stock
    modules and masked logits; everything in front of them is whole."""
    whole, seen = lm.load(model), {}
    block = whole.layers[layer]
    stock = block.mlp

    class Tap:
        def __call__(self, x):
            seen["x"] = x
            return stock(x)

    block.mlp = Tap()
    whole(mx.array(rows.tokens))
    y = np.array(stock(seen["x"])).astype(np.float64)
    other = lm.load(model)
    sparse.masked(other, family, {layer: kept})
    z = np.array(other.layers[layer].mlp(seen["x"])).astype(np.float64)
    mask = np.arange(rows.length) < rows.lengths[:, None]
    return float((((z - y) ** 2).sum(-1) / (y**2).sum(-1))[mask].mean())


def test_the_least_error_on_held_out_rows_wins(tmp_path):
    model = sparse.make(tmp_path / "m", "qwen3_moe")
    random = np.random.default_rng(5)
    scores = {name: random.random((4, 12)).astype(np.float32) for name in ("a", "b", "c")}
    padded = Rows(HELD.tokens, np.array([40, 25, 40], np.int32))
    chosen, choices = choose_experts(model, plan_of(model), scores, padded)
    assert [choice.layer for choice in choices] == [0, 1, 2, 3]
    for choice, layer in zip(choices, chosen.layers, strict=True):
        expected = {n: missed(model, "qwen3_moe", choice.layer, kept, padded) for n, kept in choice.proposed.items()}
        assert choice.errors == pytest.approx(expected, rel=1e-3)
        best = min(expected, key=expected.__getitem__)
        assert choice.best == best and layer.expert == list(choice.proposed[best]) and len(layer.expert) == 7
        assert set(layer.expert) == set(np.argsort(-scores[best][choice.layer])[:7].tolist())
    assert len({choice.best for choice in choices}) > 1, "one criterion won everywhere: nothing was compared"


def test_other_units_stay_and_dense_layers_are_left_alone(tmp_path):
    model = sparse.make(tmp_path / "m", "glm4_moe")
    plan = plan_of(model)
    scores = {"a": np.full((4, 12), np.nan, np.float32)}
    scores["a"][1:] = np.arange(12)
    chosen, choices = choose_experts(model, plan, scores, HELD)
    assert [layer.expert for layer in chosen.layers] == [[], *[list(range(5, 12))] * 3] and len(choices) == 3
    assert [layer.kv_head for layer in chosen.layers] == [layer.kv_head for layer in plan.layers]


def test_nothing_to_choose_and_too_little_memory(tmp_path):
    model = sparse.make(tmp_path / "m", "qwen3_moe")
    whole = plan_of(model, experts=12)
    assert choose_experts(model, whole, {"a": np.ones((4, 12))}, HELD) == (whole, [])
    with pytest.raises(Refused, match="memory-cap allows"):
        choose_experts(model, plan_of(model), {"a": np.ones((4, 12))}, HELD, memory_cap=1000)
