"""How MLX packs an affine-quantized matrix, written again in float64 numpy; imports nothing of the package.

The codes of a row are one little-endian stream of bits: code i is bits [i*b, (i+1)*b) of the row's bytes, whether b
divides 32 or not. A weight is scale * code + bias, with one scale and one bias for each group of columns.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np


def codes(words: np.ndarray, bits: int) -> np.ndarray:
    """uint32 words (rows, columns*bits/32) -> integer codes (rows, columns)."""
    rows = words.shape[0]
    stream = np.unpackbits(np.ascontiguousarray(words).astype("<u4").view(np.uint8), axis=1, bitorder="little")
    return stream.reshape(rows, -1, bits).astype(np.int64) @ (1 << np.arange(bits))


def dense(words: np.ndarray, scales: np.ndarray, biases: np.ndarray, bits: int) -> np.ndarray:
    """The matrix in float64."""
    found = codes(words, bits).astype(np.float64)
    group = found.shape[1] // scales.shape[1]
    return found * np.repeat(scales.astype(np.float64), group, axis=1) + np.repeat(
        biases.astype(np.float64), group, axis=1
    )


def relative_error(reference: np.ndarray, other: np.ndarray) -> float:
    """||other - reference||_F / ||reference||_F."""
    difference = other.astype(np.float64) - reference.astype(np.float64)
    return float(np.sqrt((difference**2).sum() / (reference.astype(np.float64) ** 2).sum()))


def feedback(
    weight: np.ndarray, hessian: np.ndarray, group: int, bits: int, scale_of: Callable[[np.ndarray], tuple]
) -> tuple[np.ndarray, np.ndarray]:
    """Codes [out, n] with error feedback, and what becomes of the columns behind the last whole group.

    Column by column; all columns that are left are solved again for each error e: H_FF d = -H_Fi e. ``scale_of``: a
    group's weights -> scale [out] and bias [out].
    """
    left, n = weight.astype(np.float64).copy(), weight.shape[1] // group * group
    found = np.zeros((len(left), n), np.int64)
    for i in range(n):
        if i % group == 0:
            scale, bias = scale_of(left[:, i : i + group])
        found[:, i] = np.clip(np.rint((left[:, i] - bias) / scale), 0, 2**bits - 1)
        missed = scale * found[:, i] + bias - left[:, i]
        rest = slice(i + 1, None)
        if i + 1 < left.shape[1]:
            left[:, rest] -= np.outer(missed, np.linalg.solve(hessian[rest, rest], hessian[rest, i]))
    return found, left[:, n:]
