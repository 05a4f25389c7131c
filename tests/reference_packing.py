"""How MLX packs an affine-quantized matrix, written again in float64 numpy; imports nothing of the package.

The codes of a row are one little-endian stream of bits: code i is bits [i*b, (i+1)*b) of the row's bytes, whether b
divides 32 or not. A weight is scale * code + bias, with one scale and one bias for each group of columns.
"""

from __future__ import annotations

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
