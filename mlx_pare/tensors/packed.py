"""MLX packed weights as arrays: only this file knows how words, scales and biases are laid out, in every mode.

tensors/panels.py slices rows and whole groups of columns: their codes stay. If a cut goes through a group of columns,
the group must be dequantized, sliced and quantized again. That is lossy: the error is returned and ends up in the
report.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from . import minifloat
from .packing import Packing

MX_DTYPE = {"F32": mx.float32, "F16": mx.float16, "BF16": mx.bfloat16}
VANISHED = 2.0**-100  # mx.quantize turns groups of smaller numbers into infinities in mxfp4 and mxfp8 (MLX 0.32.4)


def raw_bytes(array: mx.array) -> memoryview:
    """View the bytes of an array; bfloat16 goes through uint16, because numpy has no bfloat16.

    Args:
        array: any shape and dtype.
    Returns:
        The little-endian bytes in row-major order.
    """
    array = mx.contiguous(array)
    if array.dtype == mx.bfloat16:
        array = array.view(mx.uint16)
    return memoryview(np.array(array, copy=False)).cast("B")


@dataclass
class Packed:
    """A packed matrix of logical shape [rows, columns].

    ``words``: uint32 [rows, columns * bits / 32]. ``scales``: [rows, groups], uint8 in the float modes. ``biases``:
    [rows, groups]; None in the float modes.
    """

    words: mx.array
    scales: mx.array
    biases: mx.array | None
    packing: Packing

    @classmethod
    def of(cls, arrays: Iterable[mx.array], packing: Packing) -> Packed:
        """Build a packed matrix from its arrays.

        Args:
            arrays: words, scales and, if the packing is affine, biases, in the order of ``packing.parts``.
            packing: how the matrix is packed.
        """
        words, scales, *biases = arrays
        return cls(words, scales, biases[0] if biases else None, packing)

    @property
    def arrays(self) -> dict[str, mx.array]:
        """The stored arrays by the names of ``packing.parts``.

        Returns:
            "weight", uint32 [rows, words], "scales" and, if affine, "biases", [rows, groups] each.
        """
        return dict(zip(self.packing.parts, (self.words, self.scales, self.biases), strict=False))

    def each(self, change: Callable[[mx.array], mx.array]) -> Packed:
        """Apply one function to all arrays of the matrix.

        Args:
            change: takes an array [rows, words or groups] and returns the new one; it must treat all of them alike.
        """
        return Packed.of(map(change, self.arrays.values()), self.packing)

    def dense(self, dtype: mx.Dtype = mx.float32) -> mx.array:
        """Dequantize the matrix, with arithmetic in float32: bfloat16 scales would round every weight to three digits.

        Args:
            dtype: of the result.
        Returns:
            The weights, ``dtype`` [rows, columns].
        """
        scales, biases = self.scales, self.biases
        if self.packing.affine:
            scales, biases = scales.astype(mx.float32), biases.astype(mx.float32)
        values = mx.dequantize(self.words, scales, biases, **self.packing.as_config(), dtype=mx.float32)
        return values.astype(dtype)

    def grid(self) -> tuple[mx.array, mx.array]:
        """Read the scale and the bias of every group: a weight is scale * (the number that its code means) + bias.

        Returns:
            Scales and biases, float32 [rows, groups] each; the biases are 0 in the float modes.
        """
        scales = minifloat.scales(self.scales, self.packing, mx)
        return scales, self.biases.astype(mx.float32) if self.packing.affine else mx.zeros_like(scales)

    def rows(self, keep: slice | mx.array) -> Packed:
        """Take some rows, exactly: their codes stay.

        Args:
            keep: a slice, or row numbers as integers of any shape.
        """
        return self.each(lambda array: array[keep])


def pack(dense: mx.array, packing: Packing, dtype: mx.Dtype) -> Packed:
    """Quantize a matrix as mlx-lm would in this dtype.

    If codes were chosen for float32 scales and the scales rounded to bfloat16 afterwards, the error would be a tenth
    larger. In nvfp4 a group whose largest weight is below 0.006 becomes zero: its scale is an E4M3, and MLX has no
    second scale for all groups together.

    Args:
        dense: the weights, float [rows, columns]; the group size divides ``columns``.
        packing: how to pack it.
        dtype: of the weights while they are quantized; affine scales and biases have this dtype too.
    Returns:
        The packed matrix.
    """
    dense = dense.astype(dtype)
    if not packing.affine:
        dense = mx.where(mx.abs(dense) < VANISHED, mx.zeros_like(dense), dense)
    return Packed.of(mx.quantize(dense, **packing.as_config()), packing)


def pack_codes(codes: np.ndarray, bits: int) -> np.ndarray:
    """Pack codes into words: a row is one stream of bits, lowest bit first.

    Args:
        codes: whole numbers from 0 to 2^bits - 1, [rows, columns]; 32 divides columns * bits, and 8 divides columns.
        bits: per code, 1 to 8.
    Returns:
        The words, uint32 [rows, columns * bits / 32].
    """
    eights = np.ascontiguousarray(codes, np.uint8).reshape(-1, 8)
    stream = np.zeros(len(eights), "<u8")
    for place in range(8):  # eight codes fill whole bytes: ten times as fast as bit by bit
        stream |= eights[:, place].astype("<u8") << np.uint64(bits * place)
    used = stream.view(np.uint8).reshape(-1, 8)[:, :bits]
    return np.ascontiguousarray(used).reshape(len(codes), -1).view("<u4")


def codes_on(grid: Packed, dense: mx.array) -> mx.array:
    """Find the codes of the matrix nearest to ``dense`` that has the scales and biases of ``grid``.

    Args:
        grid: a packed matrix [rows, columns], of which only scales and biases are read.
        dense: the weights, float [rows, columns].
    Returns:
        The codes, float32 [rows, columns].
    """
    scales, biases = _per_column(grid)
    steps = mx.where(scales == 0, 0, (dense.astype(mx.float32) - biases) / mx.where(scales == 0, 1, scales))
    return minifloat.nearest(steps, grid.packing, mx)


def rounded_on(grid: Packed, dense: mx.array) -> mx.array:
    """Round weights to the nearest values that the scales and biases of ``grid`` can represent.

    Args:
        grid: a packed matrix [rows, columns], of which only scales and biases are read.
        dense: the weights, float [rows, columns].
    Returns:
        The rounded weights, float32 [rows, columns].
    """
    scales, biases = _per_column(grid)
    return scales * minifloat.values(codes_on(grid, dense), grid.packing, mx) + biases


def _per_column(grid: Packed) -> tuple[mx.array, ...]:
    """Scale and bias of every weight, float32 [rows, columns]."""
    return tuple(mx.repeat(part, grid.packing.group_size, axis=1) for part in grid.grid())


def repacked(grid: Packed, dense: mx.array) -> Packed:
    """Pack a matrix that moved a little with its old scales and biases.

    A weight that did not move keeps its code, except for the sign of a zero, which exists in the float modes.
    Quantizing again would not promise that.

    Args:
        grid: the old packed matrix [rows, columns].
        dense: the new weights, float [rows, columns].
    Returns:
        The new codes with the scales, biases and packing of ``grid``.
    """
    words = mx.array(pack_codes(np.array(codes_on(grid, dense)), grid.packing.bits))
    return Packed(words, grid.scales, grid.biases, grid.packing)


def whole_groups(columns: Sequence[int], group_size: int) -> list[int] | None:
    """Find the groups that ``columns`` consists of; None if the columns cut through a group."""
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
    """Compute ||Q(W) - W||_F^2 and ||W||_F^2: both add up over the rows of a matrix.

    Each row is summed in float32, and the rows in float64: a float32 sum of 38 million squares was 7 % too small.

    Args:
        reference: the weights W, float [rows, columns].
        packed: Q(W), the same matrix packed.
    Returns:
        The energies of the error and of the weights, float64 [2].
    """
    reference = reference.astype(mx.float32)
    rows = mx.stack([mx.square(x).sum(axis=-1) for x in (packed.dense() - reference, reference)])
    return np.array(rows).astype(np.float64).sum(axis=-1)


def relative_error(reference: mx.array, packed: Packed) -> float:
    """Compute ||Q(W) - W||_F / ||W||_F.

    Args:
        reference: the weights W, float [rows, columns].
        packed: Q(W), the same matrix packed.
    Returns:
        The relative error; 0 if all weights are 0.
    """
    lost, whole = energies(reference, packed)
    return float(np.sqrt(lost / whole)) if whole > 0 else 0.0


def is_packed(module: nn.Module) -> bool:
    """Whether a layer holds quantized weights."""
    return isinstance(module, nn.QuantizedLinear | nn.QuantizedEmbedding)


def packed(module: nn.Module) -> Packed:
    """The weight of a quantized layer as a Packed matrix."""
    packing = Packing(module.bits, module.group_size, mode=module.mode)
    return Packed(module.weight, module.scales, module.get("biases"), packing)


def dense_weight(module: nn.Module, start: int = 0, stop: int | None = None) -> mx.array:
    """Read rows of a module's weight in float32, packed or not.

    Args:
        module: a linear layer or an embedding.
        start: the first row.
        stop: the row behind the last one; None reads to the end.
    Returns:
        The rows [start, stop), float32 [rows, columns].
    """
    if not is_packed(module):
        return module.weight[start:stop].astype(mx.float32)
    return packed(module).rows(slice(start, stop)).dense()


def dense_matrix(module: nn.Module, index: int) -> mx.array:
    """Read one matrix of a stack of matrices in float32, packed or not.

    Args:
        module: mlx-lm's SwitchLinear or QuantizedSwitchLinear.
        index: number of the matrix.
    Returns:
        The matrix, float32 [out, in].
    """
    if "scales" not in module:
        return module.weight[index].astype(mx.float32)
    return packed(module).rows(index).dense()


def matrix(module: nn.Module) -> mx.array:
    """Read the weight of a linear layer in float32, inside a Float32Linear or not.

    Args:
        module: the layer.
    Returns:
        The weight, float32 [out, in].
    """
    return dense_weight(getattr(module, "inner", module))


def stored_dtype(layer: nn.Module) -> mx.Dtype:
    """The dtype of a layer's weight, or of its scales and biases if it is packed affinely; bfloat16 in the float modes.

    The float modes store no float. bfloat16 is what MLX dequantizes them to unless it is told otherwise.
    """
    if not is_packed(layer):
        return layer.weight.dtype
    return layer.scales.dtype if packed(layer).packing.affine else mx.bfloat16


def packed_so(layer: nn.Module, packing: Packing) -> bool:
    """Whether a layer is packed with these bits in these groups."""
    return is_packed(layer) and packed(layer).packing.as_config() == packing.as_config()


def packed_layer(layer: nn.Module, packing: Packing, dtype: mx.Dtype | None = None) -> nn.Module:
    """Pack the matrix of a linear layer, in groups that divide its columns.

    Args:
        layer: the layer, dense or packed.
        packing: the packing that is wanted; the group size may become smaller (Packing.fitted).
        dtype: the dtype it is packed in; None: the stored dtype of the layer.
    Returns:
        A quantized layer. ``layer`` itself if no group size divides its columns, or if it is already packed like that:
        quantizing it again would change it.
    """
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
    """Look up rows of a module's weight in float32; no other rows are expanded.

    Args:
        module: an embedding or a linear layer.
        index: row numbers, integers of any shape.
    Returns:
        The rows, float32 [*index.shape, columns].
    """
    if not is_packed(module):
        return module.weight[index].astype(mx.float32)
    return packed(module).rows(index).dense()
