"""The types a GGUF tensor can have: number, values per block, bytes per block. The only table of them; no arrays.

Source: enum ggml_type in ggml.h and the block structs of ggml-common.h, as the installed llama.cpp reports them
(ggml_blck_size, ggml_type_size; tests/gguf/test_gguf_types.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import NamedTuple


class Type(NamedTuple):
    """``number``: in the file. ``values``: of a row that are quantized together. ``size``: of such a block in bytes."""

    number: int
    values: int
    size: int


TYPES = {
    "F32": Type(0, 1, 4),
    "F16": Type(1, 1, 2),
    "Q4_0": Type(2, 32, 18),
    "Q4_1": Type(3, 32, 20),
    "Q5_0": Type(6, 32, 22),
    "Q5_1": Type(7, 32, 24),
    "Q8_0": Type(8, 32, 34),
    "Q8_1": Type(9, 32, 36),
    "Q2_K": Type(10, 256, 84),
    "Q3_K": Type(11, 256, 110),
    "Q4_K": Type(12, 256, 144),
    "Q5_K": Type(13, 256, 176),
    "Q6_K": Type(14, 256, 210),
    "Q8_K": Type(15, 256, 292),
    "IQ2_XXS": Type(16, 256, 66),
    "IQ2_XS": Type(17, 256, 74),
    "IQ3_XXS": Type(18, 256, 98),
    "IQ1_S": Type(19, 256, 50),
    "IQ4_NL": Type(20, 32, 18),
    "IQ3_S": Type(21, 256, 110),
    "IQ2_S": Type(22, 256, 82),
    "IQ4_XS": Type(23, 256, 136),
    "I8": Type(24, 1, 1),
    "I16": Type(25, 1, 2),
    "I32": Type(26, 1, 4),
    "I64": Type(27, 1, 8),
    "F64": Type(28, 1, 8),
    "IQ1_M": Type(29, 256, 56),
    "BF16": Type(30, 1, 2),
    "TQ1_0": Type(34, 256, 54),
    "TQ2_0": Type(35, 256, 66),
    "MXFP4": Type(39, 32, 17),
    "NVFP4": Type(40, 64, 36),
    "Q1_0": Type(41, 128, 18),
    "Q2_0": Type(42, 64, 18),
}

# Byte range of the float16 numbers that scale a whole block (ggml-common.h); other types of blocks have none
SCALES = {
    **dict.fromkeys(("Q4_0", "Q5_0", "Q8_0", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S", "IQ1_S"), (0, 2)),
    **dict.fromkeys(("IQ4_NL", "IQ4_XS"), (0, 2)),
    **dict.fromkeys(("Q4_1", "Q5_1", "Q4_K", "Q5_K"), (0, 4)),
    "Q2_K": (80, 84),
    "Q3_K": (108, 110),
    "Q6_K": (208, 210),
}

NAMES = {kind.number: name for name, kind in TYPES.items()}


def fits(name: str, columns: int) -> bool:
    """Whether rows of ``columns`` values are whole blocks of the type."""
    return columns % TYPES[name].values == 0


def nbytes(name: str, shape: Sequence[int]) -> int:
    """Bytes of a tensor of type ``name`` and logical ``shape`` (columns last), without padding.

    Raises ValueError if its rows are no whole number of blocks, KeyError for a type that is not in the table.
    """
    kind, columns = TYPES[name], shape[-1] if shape else 1
    if columns % kind.values:
        raise ValueError(f"rows of {columns} values are no whole number of {name} blocks ({kind.values} values)")
    return prod(shape) // kind.values * kind.size
