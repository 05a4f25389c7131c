"""Codes with error feedback are those of a float64 reference; stock MLX reads them; they are better where inputs are
alike and plain rounding where they are not."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest
import reference_packing as reference

from mlx_pare.repair import gptq
from mlx_pare.repair.least_squares import Dual, Problem
from mlx_pare.tensors.packed import pack, pack_codes
from mlx_pare.tensors.packing import BITS, Packing

OUT, N = 12, 96


def alike(tokens: int = 300, fixed: int = 0, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Inputs [tokens, N + fixed] that say much of each other, weights [OUT, N + fixed]."""
    random = np.random.default_rng(seed)
    x = random.standard_normal((tokens, 20)) @ random.standard_normal((20, N)) + random.standard_normal((tokens, N))
    weight = random.standard_normal((OUT, N)) / 8
    ones, zeros = np.ones((tokens, fixed)), np.zeros((OUT, fixed))
    return np.hstack([x, ones]), np.hstack([weight, zeros])


FORMS = {
    "gram": lambda x, weight, fixed=0: Problem(x.T @ x, x.T @ (x @ weight.T), weight, fixed=fixed),
    "tokens": lambda x, weight, fixed=0: Dual(x, x @ weight.T, weight, fixed=fixed),
}


def stored_scale(group: int, bits: int, dtype: mx.Dtype):
    def scale_of(weight: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        _, *parts = mx.quantize(mx.array(weight.astype(np.float32)).astype(dtype), group_size=group, bits=bits)
        return tuple(np.array(a.astype(mx.float32)).astype(np.float64)[:, 0] for a in parts)

    return scale_of


def opened(packed) -> np.ndarray:
    """By stock MLX."""
    parts = (packed.scales.astype(mx.float32), packed.biases.astype(mx.float32))
    p = packed.packing
    return np.array(mx.dequantize(packed.words, *parts, group_size=p.group_size, bits=p.bits)).astype(np.float64)


@pytest.mark.parametrize("bits", BITS)
def test_words(bits):
    """As MLX itself packs them."""
    words, *_ = mx.quantize(mx.random.normal((5, 96), key=mx.random.key(0)), group_size=32, bits=bits)
    codes = reference.codes(np.array(words), bits)
    assert np.array_equal(pack_codes(codes, bits), np.array(words)) and codes.max() == 2**bits - 1
    everything = np.arange(96)[None] % 2**bits
    assert np.array_equal(reference.codes(pack_codes(everything, bits), bits), everything)


@pytest.mark.parametrize("dtype", [mx.float32, mx.float16, mx.bfloat16], ids=str)
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("form", FORMS)
def test_codes(form, bits, dtype):
    """Also of columns that are few of many, and of a bias behind them."""
    x, weight = alike(fixed=1)
    problem, chosen = FORMS[form](x, weight, 1), np.r_[0:20, 30:74]
    kept = problem.with_fixed(chosen)
    own = np.random.default_rng(1).standard_normal((OUT, len(kept))) / 8
    packed, rest = gptq.quantize(own, Packing(bits, 32), dtype, problem.feedback(chosen))
    hessian = x[:, kept].T @ x[:, kept] + np.diag(problem.ridge[kept])
    codes, left = reference.feedback(own, hessian, 32, bits, stored_scale(32, bits, dtype))
    assert np.array_equal(reference.codes(np.array(packed.words), bits), codes)
    assert rest.shape == (OUT, 1) and np.allclose(rest, left, rtol=0, atol=1e-7)
    assert packed.scales.dtype == packed.biases.dtype == dtype and packed.scales.shape == (OUT, 2)
    scales, biases = (np.array(a.astype(mx.float32)) for a in (packed.scales, packed.biases))
    assert np.allclose(opened(packed), reference.dense(np.array(packed.words), scales, biases, bits), atol=1e-6)


@pytest.mark.parametrize("tokens", [300, 60])
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("form", FORMS)
def test_better_than_rounding_where_inputs_are_alike(form, bits, tokens):
    x, weight = alike(tokens)
    problem, packing = FORMS[form](x, weight), Packing(bits, 32)
    energy = float(((x @ weight.T) ** 2).sum())
    packed, _ = gptq.quantize(weight, packing, mx.float32, problem.feedback(range(N)))
    plain = pack(mx.array(weight.astype(np.float32)), packing, mx.float32)
    with_feedback, without = (problem.error(opened(p), range(N), energy) for p in (packed, plain))
    assert with_feedback < 0.8 * without


def test_feedback_of_another_layer_is_worse():
    """A planted fault: errors handed to columns that say nothing of them."""
    x, weight = alike()
    right, wrong = FORMS["gram"](x, weight), FORMS["gram"](x[:, ::-1], weight)
    energy = float(((x @ weight.T) ** 2).sum())
    found = [gptq.quantize(weight, Packing(3, 32), mx.float32, p.feedback(range(N)))[0] for p in (right, wrong)]
    assert right.error(opened(found[0]), range(N), energy) < 0.5 * right.error(opened(found[1]), range(N), energy)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("form", FORMS)
def test_plain_rounding_where_inputs_say_nothing_of_each_other(form, bits):
    x, (_, weight) = np.eye(N) * np.arange(1, N + 1), alike()
    packed, rest = gptq.quantize(weight, Packing(bits, 32), mx.float32, FORMS[form](x, weight).feedback(range(N)))
    plain = pack(mx.array(weight.astype(np.float32)), Packing(bits, 32), mx.float32)
    assert np.abs(opened(packed) - opened(plain)).max() < 1e-6 and rest.shape == (OUT, 0)


def test_groups_of_one_value_and_of_zeros():
    """Their scale is next to nothing, or nothing."""
    _, weight = alike()
    weight[:, :32], weight[:4, 32:64] = 0, 0.5
    for dtype in (mx.float32, mx.float16):
        feedback = FORMS["gram"](np.eye(N), weight).feedback(range(N))
        packed, _ = gptq.quantize(weight, Packing(4, 32), dtype, feedback)
        assert np.isfinite(opened(packed)).all() and np.abs(opened(packed)[:, :32]).max() < 1e-5
        assert np.allclose(opened(packed)[:4, 32:64], 0.5, atol=1e-3)


def test_what_is_given_is_not_changed():
    x, weight = alike()
    before = weight.copy()
    gptq.quantize(weight, Packing(4, 32), mx.float32, FORMS["tokens"](x, weight).feedback(range(N)))
    assert np.array_equal(weight, before) and np.array_equal(x, alike()[0])
