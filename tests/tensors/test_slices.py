"""Slices of stored tensors: the very bytes of the kept rows and columns, whatever panels they are read in."""

from __future__ import annotations

from pathlib import Path

import mlx.core as mx
import numpy as np
import pico
import pytest
import reference_packing as reference

from mlx_pare.base.errors import PareError
from mlx_pare.model.checkpoint import Checkpoint
from mlx_pare.model.weights import read_panels
from mlx_pare.tensors import panels as slices
from mlx_pare.tensors.packed import Packed
from mlx_pare.tensors.panels import row_panels, sliced
from mlx_pare.tensors.safetensors import read_header

SHAPE = (37, 12)
ROWS = {"all": None, "apart": [0, 3, 4, 36], "a run": list(range(5, 20)), "out of order": [30, 2, 7, 6, 5], "one": [36]}
COLUMNS = {"all": None, "apart": [0, 5, 11], "out of order": [9, 1], "one": [3]}
DTYPES = {mx.float32: "<u4", mx.float16: "<u2", mx.bfloat16: "<u2", mx.uint32: "<u4"}
MODULE = "model.layers.1.mlp.down_proj"


@pytest.fixture(params=[1, 100, 1 << 20], ids=lambda size: f"panels of {size} bytes")
def panel_bytes(request, monkeypatch):
    monkeypatch.setattr(slices, "PANEL_BYTES", request.param)
    monkeypatch.setattr(slices, "PANEL_VALUES", request.param)


def joined(parts) -> bytes:
    """Each is copied before the next one is asked for: they lie in one buffer."""
    return b"".join([bytes(part) for part in parts])


def stored(directory: Path, array: mx.array) -> tuple:
    """The entry of an array between two others, and its values as unsigned numbers of the same width."""
    mx.save_safetensors(str(directory / "x.safetensors"), {"a": mx.ones((3,)), "b": array, "c": mx.ones((5,))})
    entry = read_header(directory / "x.safetensors")["b"]
    raw = (directory / "x.safetensors").read_bytes()[entry.start : entry.end]
    return entry, np.frombuffer(raw, DTYPES[array.dtype]).reshape(array.shape)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows", ROWS.values(), ids=ROWS)
@pytest.mark.parametrize("columns", COLUMNS.values(), ids=COLUMNS)
@pytest.mark.parametrize("unit", [1, 2])
def test_bytes_of_rows_and_columns(tmp_path, panel_bytes, dtype, rows, columns, unit):
    if columns and unit == 2:
        columns = [c // 2 for c in columns]
    entry, expected = stored(tmp_path, (mx.random.uniform(shape=SHAPE) * 1000).astype(dtype))
    expected = expected.reshape(SHAPE[0], -1, unit)
    expected = expected if rows is None else expected[rows]
    expected = expected if columns is None else expected[:, columns]
    assert joined(sliced(entry, rows, columns, SHAPE[1] // unit)) == expected.tobytes()


def test_vectors(tmp_path, panel_bytes):
    entry, expected = stored(tmp_path, mx.random.uniform(shape=(50,)).astype(mx.bfloat16))
    assert joined(sliced(entry, [4, 5, 40])) == expected[[4, 5, 40]].tobytes()
    assert joined(sliced(entry)) == expected.tobytes()


def test_nothing_is_read_beyond_the_kept_rows(tmp_path):
    """Damage outside of the first and last kept row of a panel is not seen: it was not read."""
    entry, expected = stored(tmp_path, mx.random.uniform(shape=SHAPE))
    size = entry.file.stat().st_size
    width = entry.nbytes // SHAPE[0]
    with entry.file.open("r+b") as file:
        file.truncate(entry.start + 20 * width)
    assert joined(sliced(entry, [3, 19])) == expected[[3, 19]].tobytes()
    with pytest.raises(PareError, match="ended while it was read"):
        list(sliced(entry, [3, 20]))
    assert entry.file.stat().st_size < size


def test_panels_have_the_rows_that_were_asked(tmp_path):
    entry, _ = stored(tmp_path, mx.random.uniform(shape=SHAPE))
    assert [panel.shape for panel in row_panels(entry, range(1, 11), 4)] == [(4, 48), (4, 48), (2, 48)]


@pytest.mark.parametrize("packed", [None, (4, 32), (3, 64), (8, 32)], ids=str)
@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16, mx.float16], ids=str)
@pytest.mark.parametrize("rows", [None, [0, 5, 6, 63], [9, 8]], ids=str)
def test_arrays_of_chosen_rows(pico_models, panel_bytes, packed, dtype, rows):
    checkpoint = Checkpoint(pico_models("llama", packed, dtype=dtype))
    tensors = {t.name: t for t in checkpoint.arch.tensors()}
    arrays, kept = checkpoint.lazy(), slice(None) if rows is None else mx.array(rows)
    for name in (f"{MODULE}.weight", "model.norm.weight"):
        panels = list(read_panels(checkpoint, tensors[name], rows))
        assert isinstance(panels[0], Packed) == (packed is not None and name != "model.norm.weight")
        parts = {name: [p.words if isinstance(p, Packed) else p for p in panels]}
        if isinstance(panels[0], Packed):
            parts |= {f"{MODULE}.{part}": [getattr(p, part) for p in panels] for part in ("scales", "biases")}
        for part, found in parts.items():
            assert found[0].dtype == arrays[part].dtype
            assert mx.array_equal(mx.concatenate(found), arrays[part][kept])


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8])
@pytest.mark.parametrize("group", [32, 64])
def test_whole_groups_keep_their_codes(tmp_path, bits, group):
    """Slices of words, scales and biases are those of the matrix with the columns of the other groups left out."""
    matrix = mx.random.normal((6, 4 * group))
    parts = dict(zip(("words", "scales", "biases"), mx.quantize(matrix, group_size=group, bits=bits), strict=True))
    mx.save_safetensors(str(tmp_path / "x.safetensors"), parts)
    entries, rows, groups = read_header(tmp_path / "x.safetensors"), [0, 2, 5], [0, 2, 3]
    cut = [
        np.frombuffer(joined(sliced(entries[n], rows, groups, 4)), "<u4" if n == "words" else "<f4").reshape(3, -1)
        for n in parts
    ]
    columns = [g * group + i for g in groups for i in range(group)]
    whole = reference.dense(*(np.array(p) for p in parts.values()), bits)
    assert np.array_equal(reference.dense(*cut, bits), whole[rows][:, columns])


def test_pico_models_are_what_these_tests_take_them_for(pico_models):
    assert pico.BASE["hidden_size"] == 64
    assert Checkpoint(pico_models("llama", (4, 32))).packing(MODULE).bits == 4
