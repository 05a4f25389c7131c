"""quantized, packing: words, scales and biases against a second reading of the format in float64 numpy."""

from __future__ import annotations

import itertools

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
import reference_packing as reference

from mlx_pare.tensors import float32_layers, packed as quantized
from mlx_pare.tensors.float32_layers import to_float32
from mlx_pare.tensors.packed import Packed, pack, raw_bytes, relative_error, whole_groups
from mlx_pare.tensors.packing import BITS, GROUP_SIZES, Packing

ROWS, COLUMNS = 6, 384
ALL = list(itertools.product(BITS, GROUP_SIZES))


def as_numpy(array: mx.array) -> np.ndarray:
    return np.array(array.astype(mx.float32)) if array.dtype == mx.bfloat16 else np.array(array)


def matrix(rows=ROWS, columns=COLUMNS, seed=0) -> mx.array:
    return mx.array(np.random.RandomState(seed).randn(rows, columns).astype(np.float32))


def packed(bits: int, group: int, dtype=mx.float32) -> Packed:
    """Packed by MLX itself from random numbers."""
    return Packed(*mx.quantize(matrix().astype(dtype), group_size=group, bits=bits), Packing(bits, group, dtype.size))


def codes(p: Packed) -> np.ndarray:
    return reference.codes(np.array(p.words), p.packing.bits)


def unpacked(p: Packed) -> np.ndarray:
    return reference.dense(np.array(p.words), as_numpy(p.scales), as_numpy(p.biases), p.packing.bits)


@pytest.mark.parametrize("dtype", [mx.float32, mx.float16, mx.bfloat16], ids=str)
@pytest.mark.parametrize(("bits", "group"), ALL)
def test_dense_is_the_reference(bits, group, dtype):
    p = packed(bits, group, dtype)
    assert codes(p).min() == 0 and codes(p).max() == 2**bits - 1
    assert np.abs(np.array(p.dense()) - unpacked(p)).max() < 1e-6 * np.abs(unpacked(p)).max()


@pytest.mark.parametrize(("bits", "group"), ALL)
def test_arithmetic_is_in_float32_for_bfloat16_scales(bits, group):
    """MLX alone would round every weight to bfloat16."""
    p = packed(bits, group, mx.bfloat16)
    rounded = mx.dequantize(p.words, p.scales, p.biases, group_size=group, bits=bits).astype(mx.float32)
    assert np.abs(np.array(rounded) - unpacked(p)).max() > 100 * np.abs(np.array(p.dense()) - unpacked(p)).max()


def one_whole_group_at_a_time(columns, group):
    """The definition: the columns, in their order, are the columns of a list of groups."""
    starts = columns[::group]
    expected = [c for s in starts for c in range(s, s + group)]
    return [s // group for s in starts] if list(columns) == expected and all(s % group == 0 for s in starts) else None


GROUPS_OF_4 = {
    "all": range(12),
    "first": range(4),
    "last": range(8, 12),
    "two apart": [*range(4), *range(8, 12)],
    "out of order": [*range(8, 12), *range(4)],
    "one missing": [0, 1, 2],
    "one too many": range(5),
    "shifted": range(1, 5),
    "a hole": [0, 1, 2, 4],
    "swapped inside": [1, 0, 2, 3],
    "two halves": [2, 3, 4, 5],
    "none": [],
}


@pytest.mark.parametrize("name", GROUPS_OF_4)
def test_whole_groups(name):
    columns = list(GROUPS_OF_4[name])
    assert whole_groups(columns, 4) == one_whole_group_at_a_time(columns, 4)


def test_whole_groups_of_every_choice():
    for count in range(9):
        for columns in itertools.combinations(range(8), count):
            assert whole_groups(columns, 4) == one_whole_group_at_a_time(list(columns), 4)


@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16], ids=str)
@pytest.mark.parametrize(("bits", "group"), ALL)
def test_nbytes_are_those_of_the_arrays(bits, group, dtype):
    p = packed(bits, group, dtype)
    assert p.packing.nbytes(ROWS, COLUMNS) == p.words.nbytes + p.scales.nbytes + p.biases.nbytes
    assert (p.packing.words(COLUMNS), p.packing.groups(COLUMNS)) == (p.words.shape[1], p.scales.shape[1])


FITTED = {(384, 128): 128, (320, 128): 64, (96, 128): 32, (96, 64): 32, (96, 32): 32, (48, 64): None, (256, 32): 32}


@pytest.mark.parametrize(("asked", "expected"), FITTED.items(), ids=str)
def test_fitted_takes_the_largest_group_that_divides(asked, expected):
    columns, group = asked
    found = Packing(4, group, 4).fitted(columns)
    assert found == (expected and Packing(4, expected, 4))


@pytest.mark.parametrize("columns", range(16, 400, 16))
def test_fitted_is_what_mlx_accepts(columns):
    found = Packing(4, 128).fitted(columns)
    if found is None:
        with pytest.raises(ValueError, match="divisible"):
            mx.quantize(mx.zeros((1, columns)), group_size=32, bits=4)
    else:
        mx.quantize(mx.zeros((1, columns)), group_size=found.group_size, bits=4)


@pytest.mark.parametrize(("bits", "group"), ALL)
def test_relative_error_against_numpy(bits, group):
    w, p = matrix(seed=3), packed(bits, group)
    expected = reference.relative_error(np.array(w), unpacked(p))
    assert expected > 0 and relative_error(w, p) == pytest.approx(expected, rel=1e-4)


def test_the_error_of_many_weights():
    """Added up in float32 at once, 17 million squares give 0.3 % more (and 38 million 3 % less)."""
    w = matrix(4096, 4096)
    p = pack(w, Packing(4, 64), mx.float32)
    assert relative_error(w, p) == pytest.approx(reference.relative_error(np.array(w), np.array(p.dense())), rel=1e-4)


@pytest.mark.parametrize("group", GROUP_SIZES)
def test_more_bits_are_nearer(group):
    errors = [relative_error(matrix(), packed(bits, group)) for bits in BITS]
    assert errors == sorted(errors, reverse=True) and errors[-1] < 0.01 < errors[0]


@pytest.mark.parametrize("dtype", [mx.float32, mx.float16, mx.bfloat16], ids=str)
@pytest.mark.parametrize("bits", BITS)
def test_pack_is_mlx_s_and_in_the_asked_dtype(bits, dtype):
    p = pack(matrix().astype(mx.bfloat16), Packing(bits, 64, dtype.size), dtype)
    words, scales, biases = mx.quantize(matrix().astype(mx.bfloat16).astype(mx.float32), group_size=64, bits=bits)
    assert np.array_equal(np.array(p.words), np.array(words))
    assert p.scales.dtype == p.biases.dtype == dtype
    assert np.array_equal(as_numpy(p.scales), as_numpy(scales.astype(dtype)))
    assert np.array_equal(as_numpy(p.biases), as_numpy(biases.astype(dtype)))


def test_an_all_zero_matrix_stays_zero():
    p = pack(mx.zeros((2, 64)), Packing(4, 32), mx.float16)
    assert not np.array(p.dense()).any()


@pytest.mark.parametrize("dtype", [mx.float32, mx.float16, mx.bfloat16, mx.uint32], ids=str)
def test_raw_bytes_are_little_endian_and_row_major(dtype):
    array = mx.arange(6, dtype=dtype).reshape(2, 3).T  # not contiguous
    values = [0, 3, 1, 4, 2, 5]
    expected = np.array(values, dtype={mx.float16: "<f2", mx.uint32: "<u4"}.get(dtype, "<f4"))
    if dtype == mx.bfloat16:
        expected = (expected.view("<u4") >> 16).astype("<u2")
    assert bytes(raw_bytes(array)) == expected.tobytes()


# ---- modules ----


@pytest.mark.parametrize("bits", [None, *BITS])
@pytest.mark.parametrize("bias", [False, True])
def test_float32_linear(bits, bias):
    """In float64 numpy, whatever the weights are stored as."""
    inner = nn.Linear(128, 16, bias=bias)
    inner.set_dtype(mx.bfloat16)
    weight = as_numpy(inner.weight)
    offset = as_numpy(inner.bias) if bias else 0
    if bits:
        inner = inner.to_quantized(group_size=64, bits=bits)
        weight = reference.dense(np.array(inner.weight), as_numpy(inner.scales), as_numpy(inner.biases), bits)
    x = matrix(3, 128)
    expected = np.array(x, dtype=np.float64) @ weight.astype(np.float64).T + offset
    assert np.abs(np.array(float32_layers.Float32Linear(inner)(x)) - expected).max() < 1e-5


@pytest.mark.parametrize("bits", [None, *BITS])
def test_float32_embedding(bits):
    inner = nn.Embedding(16, 128)
    weight = np.array(inner.weight)
    if bits:
        inner = inner.to_quantized(group_size=64, bits=bits)
        weight = reference.dense(np.array(inner.weight), as_numpy(inner.scales), as_numpy(inner.biases), bits)
    found, x = float32_layers.Float32Embedding(inner), matrix(3, 128)
    tokens = mx.array([[3, 0, 15]])
    assert np.abs(np.array(found(tokens))[0] - weight[[3, 0, 15]]).max() < 1e-6
    assert np.abs(np.array(found.as_linear(x)) - np.array(x, dtype=np.float64) @ weight.T).max() < 1e-4


@pytest.mark.parametrize("bits", [None, 3, 4])
def test_dense_weight_takes_rows(bits):
    module = nn.Linear(64, 10, bias=False)
    module = module.to_quantized(group_size=32, bits=bits) if bits else module
    whole = np.array(quantized.dense_weight(module))
    assert np.array_equal(np.array(quantized.dense_weight(module, 2, 5)), whole[2:5])
    assert np.array_equal(np.array(quantized.dense_weight(module, 7)), whole[7:])
    assert np.array_equal(np.array(quantized.dense_rows(module, mx.array([9, 0]))), whole[[9, 0]])


@pytest.mark.parametrize(
    "layer", [nn.Linear(64, 8), nn.QuantizedLinear(64, 8), nn.Embedding(8, 64)], ids=lambda x: type(x).__name__
)
def test_a_single_matrix_computes_in_float32_too(layer):
    made = to_float32(layer)
    assert type(made).__name__ == ("Float32Embedding" if isinstance(layer, nn.Embedding) else "Float32Linear")
    assert made.inner is layer and to_float32(nn.Sequential(layer)).layers[0].inner is layer
