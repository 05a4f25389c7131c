"""The walk over models with experts, and what their routers choose."""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx_lm.models.switch_layers import SwitchLinear

from mlx_pare import lm
from mlx_pare.model.checkpoint import Checkpoint
from mlx_pare.stream import walk as stream
from mlx_pare.stream.experts import Routed
from mlx_pare.tensors.float32_layers import Float32Stack, to_float32
from mlx_pare.text.corpus import Rows
from tests.support import pico, sparse

ROWS = Rows.full(np.random.default_rng(0).integers(0, 500, (3, 40)).astype(np.int32))


class Watching(stream.Observer):
    """Puts the output of every block with experts together again from what its router chose."""

    def __init__(self, arch):
        self.arch, self.wrong, self.blocks = arch, [], 0

    def enter(self, index, block, mask):
        if "expert" not in self.arch.units(index):
            return
        routed, self.blocks = Routed.put(block, self.arch, index), self.blocks + 1

        def watch(x, y):
            chosen = routed.chosen(x)
            assert chosen.experts.shape == chosen.weights.shape == (*x.shape[:-1], chosen.outputs.shape[-2])
            made = (chosen.weights[..., None] * chosen.outputs).sum(axis=-2)
            if routed.shared:
                made = made + routed._answered(x, mx.zeros((*y.shape[:-1], chosen.experts.shape[-1], y.shape[-1])))
            self.wrong.append(float(mx.abs(made - y).max() / mx.abs(y).max()))
            with routed.only(range(self.arch.units(index)["expert"])):
                assert mx.array_equal(routed.module(x), y)

        routed.watch = watch


@pytest.mark.parametrize("family", sparse.CONFIGS)
def test_a_walk_is_the_whole_model_and_shows_what_is_chosen(tmp_path, family):
    """In bfloat16, packed: arrays that lie directly on a module with children are cast as well."""
    model = pico.quantize(sparse.make(tmp_path / "m", family, dtype=mx.bfloat16), tmp_path / "q")
    watching = Watching(Checkpoint(model).arch)
    streamed = stream.walk(model, ROWS, watching)
    whole = lm.load(model)
    whole.set_dtype(mx.float32)
    expected = lm.body(whole)(mx.array(ROWS.tokens))
    assert float(mx.abs(streamed.hidden - expected).max()) < 2e-5
    assert watching.blocks >= 2 and max(watching.wrong) < 1e-6


AFFINE, MXFP4 = {"bits": 4, "group_size": 32}, {"mode": "mxfp4", "group_size": 32, "bits": 4}


@pytest.mark.parametrize("packing", [None, AFFINE, MXFP4])
@pytest.mark.parametrize("bias", [False, True])
def test_a_stack_computes_what_each_of_its_matrices_does(packing, bias):
    """Against float64, expert by expert, in both orders in which mlx-lm calls it."""
    random = np.random.default_rng(1)
    stack = SwitchLinear(64, 48, 6, bias=bias)
    if bias:
        stack.bias = mx.array(random.standard_normal((6, 48)).astype(np.float32))
    if packing:
        stack = stack.to_quantized(**packing)
    dense = np.array(stack.weight) if packing is None else np.array(
        mx.dequantize(stack.weight, stack.scales, stack.get("biases"), **packing).astype(mx.float32)
    )  # fmt: skip
    x, chosen = random.standard_normal((5, 7, 1, 1, 64)), random.integers(0, 5, (5, 7, 2))  # the last one never
    made = np.array(Float32Stack(stack)(mx.array(x.astype(np.float32)), mx.array(chosen)))
    expected = np.einsum("abi,abkoi->abko", x[:, :, 0, 0], dense.astype(np.float64)[chosen])
    expected = expected + (np.array(stack.bias)[chosen] if bias else 0)
    assert made.shape == (5, 7, 2, 1, 48) and np.abs(made[:, :, :, 0] - expected).max() < 1e-5
    order = np.argsort(chosen.reshape(-1), kind="stable")
    rows = np.repeat(x.reshape(35, 1, 64), 2, axis=0)[order].astype(np.float32)
    sorted_ = Float32Stack(stack)(mx.array(rows), mx.array(chosen.reshape(-1)[order]), sorted_indices=True)
    assert np.abs(np.array(sorted_)[:, 0] - expected.reshape(70, 48)[order]).max() < 1e-5


def test_arrays_beside_modules_are_cast():
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner, self.scale = nn.RMSNorm(4), mx.ones(4, mx.bfloat16)
            self.count = mx.array([1, 2])

    odd = to_float32(Odd())
    assert odd.scale.dtype == mx.float32 and odd.count.dtype == mx.int32


def test_only_some_experts_is_the_cut_block(tmp_path):
    """A block whose router may choose among some experts, against masked logits of the stock block."""
    model = sparse.make(tmp_path / "m", "qwen2_moe")
    arch, kept = Checkpoint(model).arch, [0, 3, 4, 7, 11]
    stock, ours = lm.load(model), lm.load(model)
    sparse.masked(stock, "qwen2_moe", {1: kept})
    routed = Routed.put(ours.layers[1], arch, 1)
    x = mx.array(np.random.default_rng(2).standard_normal((2, 9, 64)).astype(np.float32))
    before = routed(x)
    with routed.only(kept):
        cut = routed(x)
    assert float(mx.abs(cut * 0 + before - routed(x)).max()) == 0, "the router is whole again"
    # masked logits keep the softmax over the kept experts alone, as the cut does
    assert float(mx.abs(cut - stock.layers[1].mlp(x)).max()) < 1e-5 < float(mx.abs(cut - before).max())
