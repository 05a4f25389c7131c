"""MLX packed weights as arrays: the only place that knows how words, scales and biases lie, in every mode.

Rows and whole groups of columns are sliced without touching a code. Columns cut inside a group must be dequantized,
sliced and quantized again, which is lossy: the error is returned and ends up in the report.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_map

from . import minifloat
from .packing import Packing

EXPANDED_BYTES = 64 << 20  # of a matrix that are float32 at a time
MX_DTYPE = {"F32": mx.float32, "F16": mx.float16, "BF16": mx.bfloat16}
VANISHED = 2.0**-100  # mx.quantize makes infinities of groups of smaller numbers in mxfp4 and mxfp8 (MLX 0.32.4)


def raw_bytes(array: mx.array) -> memoryview:
    """The little-endian bytes of an array; numpy has no bfloat16, so that goes through uint16."""
    array = mx.contiguous(array)
    if array.dtype == mx.bfloat16:
        array = array.view(mx.uint16)
    return memoryview(np.array(array, copy=False)).cast("B")


@dataclass
class Packed:
    """A matrix of logical shape (rows, columns): words (rows, columns*bits/32); scales, biases (rows, groups), the
    latter None in the float modes, where scales are uint8."""

    words: mx.array
    scales: mx.array
    biases: mx.array | None
    packing: Packing

    @classmethod
    def of(cls, arrays: Iterable[mx.array], packing: Packing) -> Packed:
        """From the arrays of ``packing.parts``."""
        words, scales, *biases = arrays
        return cls(words, scales, biases[0] if biases else None, packing)

    @property
    def arrays(self) -> dict[str, mx.array]:
        """What it is stored as, by the names of ``packing.parts``."""
        return dict(zip(self.packing.parts, (self.words, self.scales, self.biases), strict=False))

    def each(self, change: Callable[[mx.array], mx.array]) -> Packed:
        """The same done to all its arrays."""
        return Packed.of(map(change, self.arrays.values()), self.packing)

    def dense(self, dtype: mx.Dtype = mx.float32) -> mx.array:
        """Dequantized with arithmetic in float32: bfloat16 scales would round every weight to three digits."""
        scales, biases = self.scales, self.biases
        if self.packing.affine:
            scales, biases = scales.astype(mx.float32), biases.astype(mx.float32)
        values = mx.dequantize(self.words, scales, biases, **self.packing.as_config(), dtype=mx.float32)
        return values.astype(dtype)

    def grid(self) -> tuple[mx.array, mx.array]:
        """Scale and bias of every group, float32 [rows, groups]: a weight is scale * (what its code is) + bias."""
        scales = minifloat.scales(self.scales, self.packing, mx)
        return scales, self.biases.astype(mx.float32) if self.packing.affine else mx.zeros_like(scales)

    def rows(self, keep: slice | mx.array) -> Packed:
        """Exact: the codes of some rows."""
        return self.each(lambda array: array[keep])


def pack(dense: mx.array, packing: Packing, dtype: mx.Dtype) -> Packed:
    """Quantize a matrix as mlx-lm would in this dtype, which affine scales and biases have too.

    Choosing codes for float32 scales and rounding those to bfloat16 afterwards would cost a tenth more error. In nvfp4
    a group whose largest weight is below 0.006 becomes zero: its scale is an E4M3, and MLX has none of all groups.
    """
    dense = dense.astype(dtype)
    if not packing.affine:
        dense = mx.where(mx.abs(dense) < VANISHED, mx.zeros_like(dense), dense)
    return Packed.of(mx.quantize(dense, **packing.as_config()), packing)


def pack_codes(codes: np.ndarray, bits: int) -> np.ndarray:
    """The words [rows, columns*bits/32] of codes [rows, columns]: a row is one stream of bits, lowest first.

    Eight codes at a time are so many bytes: ten times as fast as bit by bit.
    """
    eights = np.ascontiguousarray(codes, np.uint8).reshape(-1, 8)
    stream = np.zeros(len(eights), "<u8")
    for place in range(8):
        stream |= eights[:, place].astype("<u8") << np.uint64(bits * place)
    used = stream.view(np.uint8).reshape(-1, 8)[:, :bits]
    return np.ascontiguousarray(used).reshape(len(codes), -1).view("<u4")


def codes_on(grid: Packed, dense: mx.array) -> mx.array:
    """The codes [rows, columns], float32, of the matrix nearest to ``dense`` with the scales and biases of another."""
    scales, biases = _per_column(grid)
    steps = mx.where(scales == 0, 0, (dense.astype(mx.float32) - biases) / mx.where(scales == 0, 1, scales))
    return minifloat.nearest(steps, grid.packing, mx)


def rounded_on(grid: Packed, dense: mx.array) -> mx.array:
    """The matrix nearest to ``dense``, float32, with the scales and biases of another."""
    scales, biases = _per_column(grid)
    return scales * minifloat.values(codes_on(grid, dense), grid.packing, mx) + biases


def _per_column(grid: Packed) -> tuple[mx.array, ...]:
    """Scale and bias of every weight, float32 [rows, columns]."""
    return tuple(mx.repeat(part, grid.packing.group_size, axis=1) for part in grid.grid())


def repacked(grid: Packed, dense: mx.array) -> Packed:
    """A matrix that moved a little, packed with the scales and biases it had: what did not move keeps its code (but
    for the sign of a zero, which the float modes have), which quantizing it again would not promise."""
    words = mx.array(pack_codes(np.array(codes_on(grid, dense)), grid.packing.bits))
    return Packed(words, grid.scales, grid.biases, grid.packing)


def whole_groups(columns: Sequence[int], group_size: int) -> list[int] | None:
    """The groups that ``columns`` consists of, or None when some group is cut."""
    if len(columns) % group_size:
        return None
    groups = []
    for start in range(0, len(columns), group_size):
        first = columns[start]
        if first % group_size or list(columns[start : start + group_size]) != list(range(first, first + group_size)):
            return None
        groups.append(first // group_size)
    return groups


def energies(reference: mx.array, packed: Packed) -> np.ndarray:
    """||Q(W) - W||_F^2 and ||W||_F^2, float64 [2]: what adds up over the rows of a matrix. In float32 within a row
    only: a sum of 38 million squares was 7 % too small."""
    reference = reference.astype(mx.float32)
    rows = mx.stack([mx.square(x).sum(axis=-1) for x in (packed.dense() - reference, reference)])
    return np.array(rows).astype(np.float64).sum(axis=-1)


def relative_error(reference: mx.array, packed: Packed) -> float:
    """||Q(W) - W||_F / ||W||_F."""
    lost, whole = energies(reference, packed)
    return float(np.sqrt(lost / whole)) if whole > 0 else 0.0


class Float32Linear(nn.Module):
    """A linear layer that computes in float32 from weights in any format, expanded for the length of one call.

    For the CPU backend: MLX's bfloat16 quantized matmul there accumulates in bfloat16 (mlx backend/cpu/quantized.cpp,
    3-7 % wrong) and runs at a hundredth of the speed of a float32 matmul. A matrix of more than EXPANDED_BYTES is
    expanded in parts: MLX plans ahead, and would have those of several layers in memory at once.
    """

    def __init__(self, inner: nn.Module):
        super().__init__()
        self.inner = inner

    def __call__(self, x: mx.array) -> mx.array:
        x, rows = x.astype(mx.float32), self.inner.weight.shape[0]
        step = min(rows, max(1, EXPANDED_BYTES // (4 * x.shape[-1])))
        parts = []
        for start in range(0, rows, step):
            parts.append(x @ dense_weight(self.inner, start, start + step).T)
            if step < rows:
                mx.eval(parts[-1])
        y = mx.concatenate(parts, axis=-1) if len(parts) > 1 else parts[0]
        return y + self.inner.bias.astype(mx.float32) if "bias" in self.inner else y


class Float32Embedding(nn.Module):
    """An embedding whose rows come out in float32, expanded row by row."""

    def __init__(self, inner: nn.Module):
        super().__init__()
        self.inner = inner

    def __call__(self, tokens: mx.array) -> mx.array:
        return dense_rows(self.inner, tokens)

    @property
    def weight(self) -> mx.array:
        """For classes that multiply by it themselves (mlx_lm/models/seed_oss.py)."""
        return dense_weight(self.inner)

    def as_linear(self, x: mx.array) -> mx.array:
        return x.astype(mx.float32) @ self.weight.T


def is_packed(module: nn.Module) -> bool:
    """Whether a layer holds quantized weights."""
    return isinstance(module, nn.QuantizedLinear | nn.QuantizedEmbedding)


def packed(module: nn.Module) -> Packed:
    """A quantized layer's weight as a Packed matrix."""
    packing = Packing(module.bits, module.group_size, mode=module.mode)
    return Packed(module.weight, module.scales, module.get("biases"), packing)


def dense_weight(module: nn.Module, start: int = 0, stop: int | None = None) -> mx.array:
    """Rows [start, stop) of a module's weight in float32."""
    if not is_packed(module):
        return module.weight[start:stop].astype(mx.float32)
    return packed(module).rows(slice(start, stop)).dense()


def matrix(module: nn.Module) -> mx.array:
    """The weight [out, in] of a linear layer in float32, whether a Float32Linear is around it or not."""
    return dense_weight(getattr(module, "inner", module))


def stored_dtype(layer: nn.Module) -> mx.Dtype:
    """Of the weight of a layer, or of its scales and biases; in the float modes what MLX makes of it unless asked."""
    if not is_packed(layer):
        return layer.weight.dtype
    return layer.scales.dtype if packed(layer).packing.affine else mx.bfloat16


def packed_so(layer: nn.Module, packing: Packing) -> bool:
    """Whether a layer is packed with these bits in these groups."""
    return is_packed(layer) and packed(layer).packing.as_config() == packing.as_config()


def packed_layer(layer: nn.Module, packing: Packing, dtype: mx.Dtype | None = None) -> nn.Module:
    """A linear layer with its matrix packed, in groups that divide it; the layer itself where none does, or where it is
    packed so already: to quantize it again would change it. ``dtype`` it is packed in; None: that of the layer."""
    weight = matrix(layer)
    fitted = packing.fitted(weight.shape[-1])
    if fitted is None or packed_so(layer, fitted):
        return layer
    made = nn.QuantizedLinear(weight.shape[-1], weight.shape[0], bias="bias" in layer, **fitted.as_config())
    parts = pack(weight, fitted, dtype or stored_dtype(layer))
    made.weight, made.scales, made.biases = parts.words, parts.scales, parts.biases
    if "bias" in layer:
        made.bias = layer.bias
    return made


def dense_rows(module: nn.Module, index: mx.array) -> mx.array:
    """Chosen rows of a module's weight in float32: an embedding lookup that expands nothing else."""
    if not is_packed(module):
        return module.weight[index].astype(mx.float32)
    return packed(module).rows(index).dense()


def to_float32(module: nn.Module) -> nn.Module:
    """Put Float32Linear and Float32Embedding around every matrix in ``module``, or around itself where it is one; small
    parameters become float32."""

    def wrap(leaf: nn.Module) -> nn.Module:
        if isinstance(leaf, nn.Linear | nn.QuantizedLinear):
            return Float32Linear(leaf)
        if isinstance(leaf, nn.Embedding | nn.QuantizedEmbedding):
            return Float32Embedding(leaf)
        leaf.apply(lambda a: a.astype(mx.float32) if mx.issubdtype(a.dtype, mx.floating) else a)
        return leaf

    if not module.children():
        return wrap(module)
    leaves = tree_map(wrap, module.leaf_modules(), is_leaf=nn.Module.is_module)
    module.update_modules(leaves)
    return module
