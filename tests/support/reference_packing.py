"""How MLX packs a quantized matrix, written again in float64 numpy; imports nothing of the package.

The codes of a row are one little-endian stream of bits: code i is bits [i*b, (i+1)*b) of the row's bytes, whether b
divides 32 or not. A weight is scale * code + bias, with one scale and one bias for each group of columns. In the
float modes a weight is scale * float, both read from their bits (OCP Microscaling Formats 1.0, tables 1 to 7).
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


E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])
GROUP = {"mxfp4": 32, "nvfp4": 16, "mxfp8": 32}


def e4m3(byte: int) -> float:
    """Sign, four bits of exponent with bias 7, three of mantissa; no infinities, all ones is not a number."""
    sign, exponent, mantissa = byte >> 7, byte >> 3 & 15, byte & 7
    if exponent == 15 and mantissa == 7:
        return float("nan")
    size = mantissa / 8 * 2**-6 if exponent == 0 else (1 + mantissa / 8) * 2.0 ** (exponent - 7)
    return -size if sign else size


E4M3 = np.array([e4m3(byte) for byte in range(256)])
E8M0 = np.array([*(2.0 ** (byte - 127) for byte in range(255)), np.nan])
VALUES = {"mxfp4": E2M1, "nvfp4": E2M1, "mxfp8": E4M3}
SCALES = {"mxfp4": E8M0, "nvfp4": E4M3, "mxfp8": E8M0}


def float_dense(words: np.ndarray, scales: np.ndarray, mode: str) -> np.ndarray:
    """The matrix of a float mode in float64."""
    found = VALUES[mode][codes(words, 8 if mode == "mxfp8" else 4)]
    return found * np.repeat(SCALES[mode][scales], GROUP[mode], axis=1)


def nearest(x: np.ndarray, mode: str) -> np.ndarray:
    """The value of a mode that is nearest to each number, by looking at all of them."""
    finite = VALUES[mode][np.isfinite(VALUES[mode])]
    return finite[np.abs(x[..., None] - finite).argmin(-1)]


def relative_error(reference: np.ndarray, other: np.ndarray) -> float:
    """||other - reference||_F / ||reference||_F."""
    difference = other.astype(np.float64) - reference.astype(np.float64)
    return float(np.sqrt((difference**2).sum() / (reference.astype(np.float64) ** 2).sum()))


def float_feedback(
    weight: np.ndarray, hessian: np.ndarray, mode: str, scale_of: Callable[[np.ndarray], np.ndarray]
) -> np.ndarray:
    """Values [out, n] with error feedback, as ``feedback``, in a float mode. ``scale_of``: weights -> scale [out]."""
    left, found = weight.astype(np.float64).copy(), np.zeros(weight.shape)
    for i in range(weight.shape[1]):
        if i % GROUP[mode] == 0:
            scale = scale_of(left[:, i : i + GROUP[mode]])
        found[:, i] = scale * nearest(left[:, i] / np.where(scale == 0, 1, scale), mode)
        if rest := range(i + 1, weight.shape[1]):
            missed = found[:, i] - left[:, i]
            left[:, rest] -= np.outer(missed, np.linalg.solve(hessian[np.ix_(rest, rest)], hessian[rest, i]))
    return found


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
