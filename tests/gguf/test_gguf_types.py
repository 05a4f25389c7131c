"""The table of GGUF types against gguf-py's constants and, where it is installed, against ggml itself."""

from __future__ import annotations

import ctypes
import importlib.util
from math import prod
from pathlib import Path

import gguf
import numpy as np
import pytest

from mlx_pare.exporting import llama_cpp
from mlx_pare.gguf.types import NAMES, TYPES, fits, nbytes

WRITABLE = ["F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "TQ1_0", "TQ2_0", "MXFP4"]


def test_the_table_has_every_type_of_gguf_py():
    theirs = {kind.name: (int(kind), *size) for kind, size in gguf.GGML_QUANT_SIZES.items()}
    theirs["Q8_1"] = (9, 32, 36)  # gguf-py up to 0.19 says 40; corrected in llama.cpp #29036
    assert len(theirs) > 30
    assert {name: tuple(TYPES[name]) for name in theirs} == theirs
    assert {kind.name for kind in gguf.GGMLQuantizationType} <= set(TYPES)


@pytest.mark.llama
@pytest.mark.skipif(not llama_cpp.available(), reason="llama-cpp-python is not installed")
def test_the_table_is_that_of_ggml():
    folder = Path(importlib.util.find_spec("llama_cpp").origin).parent / "lib"
    library = ctypes.CDLL(str(next(f for f in folder.iterdir() if f.name.startswith("libggml-base."))))
    library.ggml_type_name.restype = ctypes.c_char_p
    library.ggml_blck_size.restype, library.ggml_type_size.restype = ctypes.c_int64, ctypes.c_size_t
    theirs = {}
    for number in range(max(NAMES) + 1):
        if library.ggml_type_size(number):  # 0: a type that was removed
            name = library.ggml_type_name(number).decode().upper()
            theirs[name] = (number, library.ggml_blck_size(number), library.ggml_type_size(number))
    assert len(theirs) > 30
    assert {name: tuple(TYPES[name]) for name in theirs} == theirs


def test_numbers_and_names_are_each_others_inverse():
    assert len(NAMES) == len(TYPES) and all(NAMES[TYPES[name].number] == name for name in TYPES)


@pytest.mark.parametrize("name", WRITABLE)
@pytest.mark.parametrize("shape", [(256,), (3, 512), (2, 3, 256)])
def test_bytes_are_those_gguf_py_writes(name, shape):
    values = np.zeros(shape, np.float32)
    assert nbytes(name, shape) == gguf.quants.quantize(values, gguf.GGMLQuantizationType[name]).nbytes


@pytest.mark.parametrize("name", TYPES)
def test_rows_are_whole_blocks(name):
    block = TYPES[name].values
    assert nbytes(name, (5, 2 * block)) == 10 * TYPES[name].size and fits(name, 2 * block)
    if block > 1:
        assert prod((block, block + 1)) % block == 0 and not fits(name, block + 1)
        with pytest.raises(ValueError, match=rf"rows of {block + 1} values are no whole number of {name} blocks"):
            nbytes(name, (block, block + 1))


def test_degenerate_shapes():
    assert nbytes("F32", ()) == 4 and nbytes("Q8_0", (0, 32)) == 0
    with pytest.raises(KeyError):
        nbytes("Q9_9", (1, 1))
