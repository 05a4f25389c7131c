"""Blocks of GGUF tensors as MLX packings: the same codes, in MLX's order.

What each type is: the block structs of ggml-common.h, as gguf.quants reads them; every row of the table is tested
against gguf.quants. If the groups of a type have one scale, and perhaps a minimum, it is affine as MLX's own packing
is. Its codes stay, and so do its scales and minima if float16 holds them. Other types are packed again.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from ...tensors.packing import Packing
from ..types import TYPES

Raw = np.ndarray  # uint8 [blocks, bytes of a block]
# codes uint8 [blocks, values]; scales and biases float32 [blocks, groups] (of a float mode: uint8, and None)
Parts = tuple[np.ndarray, np.ndarray, np.ndarray | None]

ANEW = Packing(8, 32)  # the packing for types that no MLX packing matches


@dataclass(frozen=True)
class Form:
    """How MLX stores blocks of a type. ``exact``: float16 holds their scales and minima without rounding."""

    packing: Packing
    parts: Callable[[Raw], Parts]
    exact: bool = True


def _half(raw: Raw, at: int = 0) -> np.ndarray:
    """float32 [blocks, 1] of the float16 at byte ``at``."""
    return np.ascontiguousarray(raw[:, at : at + 2]).view("<f2").astype(np.float32)


def _nibbles(raw: np.ndarray, run: int) -> np.ndarray:
    """Codes of four bits [blocks, 2 * bytes]: of every ``run`` bytes first all lower halves, then all upper ones."""
    runs = raw.reshape(len(raw), -1, 1, run)
    return np.concatenate([runs & 15, runs >> 4], axis=2).reshape(len(raw), -1)


def _fifth(raw: np.ndarray) -> np.ndarray:
    """The fifth bits of 32 codes, which 4 bytes hold one after the other, shifted to their place."""
    return np.unpackbits(raw, axis=1, bitorder="little") << 4


def _q8_0(raw: Raw) -> Parts:
    scale = _half(raw)
    return raw[:, 2:] ^ 0x80, scale, -128 * scale


def _q4_0(raw: Raw) -> Parts:
    scale = _half(raw)
    return _nibbles(raw[:, 2:], 16), scale, -8 * scale


def _q4_1(raw: Raw) -> Parts:
    return _nibbles(raw[:, 4:], 16), _half(raw), _half(raw, 2)


def _q5_0(raw: Raw) -> Parts:
    scale = _half(raw)
    return _nibbles(raw[:, 6:], 16) | _fifth(raw[:, 2:6]), scale, -16 * scale


def _q5_1(raw: Raw) -> Parts:
    return _nibbles(raw[:, 8:], 16) | _fifth(raw[:, 4:8]), _half(raw), _half(raw, 2)


def _sixths(raw: Raw) -> tuple[np.ndarray, np.ndarray]:
    """Scale and bias of the 8 groups of a Q4_K or Q5_K block: two float16 times numbers of 6 bits.

    Bytes 4 to 11 hold the lower ends of the first four scales and minima, and in their upper two bits what the others
    lack.
    """
    low, high, both = (raw[:, start : start + 4] for start in (4, 8, 12))
    scales = np.concatenate([low & 63, both & 15 | low >> 2 & 48], axis=1)
    minima = np.concatenate([high & 63, both >> 4 | high >> 2 & 48], axis=1)
    return _half(raw) * scales, -(_half(raw, 2) * minima)


def _q4_k(raw: Raw) -> Parts:
    return _nibbles(raw[:, 16:], 32), *_sixths(raw)


def _q5_k(raw: Raw) -> Parts:
    fifth = (raw[:, None, 16:48] >> np.arange(8, dtype=np.uint8)[:, None] & 1) << 4
    return _nibbles(raw[:, 48:], 32) | fifth.reshape(len(raw), -1), *_sixths(raw)


def _tq2_0(raw: Raw) -> Parts:
    """-1, 0, 1 times one scale. MLX's largest group is half a block."""
    quarters = raw[:, :64].reshape(len(raw), 2, 1, 32) >> np.array([0, 2, 4, 6], np.uint8)[:, None] & 3
    scale = np.repeat(_half(raw, 64), 2, axis=1)
    return quarters.reshape(len(raw), -1), scale, -scale


def _tq1_0(raw: Raw) -> Parts:
    """The same numbers, five to a byte."""
    scale = np.repeat(_half(raw, 52), 2, axis=1)
    return (np.sign(dense(raw, "TQ1_0")) * np.sign(scale[:, :1]) + 1).astype(np.uint8), scale, -scale


def _mxfp4(raw: Raw) -> Parts:
    return _nibbles(raw[:, 1:], 16), raw[:, :1], None


FORMS = {
    "Q8_0": Form(Packing(8, 32), _q8_0),
    "Q4_0": Form(Packing(4, 32), _q4_0),
    "Q4_1": Form(Packing(4, 32), _q4_1),
    "Q5_0": Form(Packing(5, 32), _q5_0),
    "Q5_1": Form(Packing(5, 32), _q5_1),
    "Q4_K": Form(Packing(4, 32), _q4_k, exact=False),
    "Q5_K": Form(Packing(5, 32), _q5_k, exact=False),
    "TQ2_0": Form(Packing(2, 128), _tq2_0),
    "TQ1_0": Form(Packing(2, 128), _tq1_0),
    "MXFP4": Form(Packing.named("mxfp4"), _mxfp4),
}


def parts(rows: np.ndarray, kind: str) -> Parts:
    """Convert stored rows to codes, scales and biases of the type's MLX packing.

    Args:
        rows: uint8 [rows, bytes of a row].
        kind: the GGUF type, one of FORMS.
    Returns:
        Codes uint8 [rows, columns], scales and biases float32 [rows, groups]; for MXFP4 scales uint8, and None.
    """
    with np.errstate(all="ignore"):  # the caller looks for numbers that are not finite
        found = FORMS[kind].parts(rows.reshape(-1, TYPES[kind].size))
    return tuple(None if part is None else part.reshape(len(rows), -1) for part in found)


def readable(kind: str) -> bool:
    """Whether gguf-py can read a type."""
    try:
        dense(np.zeros((1, TYPES[kind].size), np.uint8), kind)
    except (KeyError, NotImplementedError):
        return False
    return True


def dense(rows: np.ndarray, kind: str) -> np.ndarray:
    """Convert stored rows to floats.

    Args:
        rows: uint8 [rows, bytes of a row].
        kind: the GGUF type.
    Returns:
        The values, float32 [rows, columns].
    Raises:
        KeyError: gguf-py does not know the type.
        NotImplementedError: gguf-py cannot read the type.
    """
    import gguf

    with np.errstate(all="ignore"):
        found = gguf.quants.dequantize(np.ascontiguousarray(rows), gguf.GGMLQuantizationType[kind])
    return found.reshape(len(rows), -1)
