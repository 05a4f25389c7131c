"""Quantization with error feedback: codes are chosen for the output of a layer instead of for its weights.

Columns are rounded in their order. Columns that are not reached yet compensate each error as far as the inputs allow:
GPTQ, Frantar et al. 2022 (arXiv 2210.17323). MLX chooses scale and bias of a group for the weights that the group has
when it is reached, in the dtype in which both are stored. The codes are then chosen for this scale and bias. The float
modes differ only in the values that a weight can take (tensors/minifloat.py).
"""

from __future__ import annotations

from dataclasses import replace

import mlx.core as mx
import numpy as np

from ..tensors import minifloat
from ..tensors.packed import Packed, pack, pack_codes
from ..tensors.packing import Packing
from .feedback import Feedback


def quantize(weight: np.ndarray, packing: Packing, dtype: mx.Dtype, feedback: Feedback) -> tuple[Packed, np.ndarray]:
    """Quantize a matrix with error feedback; all rows are worked on at once.

    Args:
        weight: float64 [out, n + fixed]; not changed. The first n columns, all that form whole groups, are packed. The
            columns after them (of fixed inputs, such as a bias) only compensate errors.
        packing: bits, group size and mode.
        dtype: dtype of affine scales and biases.
        feedback: from the inputs of all these columns, in their order.

    Returns:
        The packed matrix [out, n], and the columns after it with what they compensate, float64 [out, fixed].
    """
    groups: list[Packed] = []
    whole = weight.shape[1] // packing.group_size * packing.group_size
    for start in range(0, whole, packing.group_size):
        stop = start + packing.group_size
        upper, owed = feedback.group(start, stop)
        own = weight[:, start:stop] + owed
        group = pack(mx.array(own.astype(np.float32)), packing, dtype)
        scale, bias = (np.array(part).astype(np.float64)[:, 0] for part in group.grid())
        codes, errors = _round(np.ascontiguousarray(own.T), scale, bias, upper, packing)
        feedback.missed(errors.T)
        groups.append(replace(group, words=mx.array(pack_codes(codes.T, packing.bits))))
    arrays = zip(*(group.arrays.values() for group in groups), strict=True)
    packed = Packed.of((mx.concatenate(same, axis=1) for same in arrays), packing)
    mx.eval(packed.arrays)
    rest = weight[:, whole:].copy()  # a view would keep the whole matrix in memory
    return packed, rest + feedback.group(whole, weight.shape[1])[1] if rest.size else rest


def _round(
    own: np.ndarray, scale: np.ndarray, bias: np.ndarray, upper: np.ndarray, packing: Packing
) -> tuple[np.ndarray, np.ndarray]:
    """Return the codes [n, out] of the columns of a group, and their errors [n, out] over the diagonal of ``upper``.

    ``own`` [n, out] is changed in place; ``scale`` and ``bias`` [out]; ``upper`` [n, n].
    """
    codes, errors = np.empty(own.shape, np.uint8), np.empty(own.shape)
    step = np.where(scale == 0, 1, scale)
    for i, column in enumerate(own):
        code = minifloat.nearest((column - bias) / step, packing, np)
        errors[i] = (column - (scale * minifloat.values(code, packing, np) + bias)) / upper[i, i]
        own[i + 1 :] -= upper[i, i + 1 :, None] * errors[i]
        codes[i] = code
    return codes, errors
