"""Kept rows and columns of stored tensors, a few rows at a time. An exact cut moves bytes, whatever they mean.

A tensor is read in the order of the file into one small buffer, which stays in the processor's cache until what is kept
of it goes out again: memory that is new to the process costs more than the copy (benchmarks/LOG.md).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import mlx.core as mx
import numpy as np

from ..arch import Tensor
from ..base.errors import PareError
from ..checkpoint import Checkpoint
from .packed import Packed
from .safetensors import Entry

PANEL_BYTES = 1 << 20  # of a tensor, read at a time
PANEL_VALUES = 1 << 19  # of its weights, expanded at a time

_VIEWS = {"U8": np.uint8, "U32": np.uint32, "F32": np.float32, "F16": np.float16, "BF16": np.uint16}


def row_panels(entry: Entry, rows: Sequence[int] | None, step: int) -> Iterator[np.ndarray]:
    """Chosen rows (None: all) of a stored tensor in their order, uint8 [at most ``step``, bytes of a row].

    Of the file only what lies between the first and the last row of a panel is read. A panel lives until the next one.
    Raises PareError when the file ends too early.
    """
    count = entry.shape[0]
    width = entry.nbytes // count
    index = np.arange(count) if rows is None else np.asarray(rows)
    buffer = np.empty(0, np.uint8)
    with entry.file.open("rb", buffering=0) as file:
        for start in range(0, len(index), step):
            part = index[start : start + step]
            low, high = int(part.min()), int(part.max()) + 1
            if len(buffer) < (high - low) * width:
                buffer = np.empty((high - low) * width, np.uint8)
            raw = buffer[: (high - low) * width]
            file.seek(entry.start + low * width)
            if file.readinto(raw) != len(raw):
                raise PareError(f"{entry.file} ended while it was read", "it was changed: start again")
            panel = raw.reshape(-1, width)
            yield panel if np.array_equal(part, np.arange(low, high)) else panel.take(part - low, axis=0)


def sliced(
    entry: Entry, rows: Sequence[int] | None = None, columns: Sequence[int] | None = None, width: int = 1
) -> Iterator[memoryview]:
    """The bytes of the kept rows and columns (None: all) of a stored tensor, in pieces that live until the next one.

    ``width``: how many columns a row has, each as many bytes as the others: values, or whole groups of packed ones.
    """
    row_bytes = entry.nbytes // entry.shape[0]
    for panel in row_panels(entry, rows, max(1, PANEL_BYTES // row_bytes)):
        if columns is not None:
            panel = panel.view(f"V{row_bytes // width}").take(columns, axis=1)
        yield panel.reshape(-1).view(np.uint8).data


def read_panels(
    checkpoint: Checkpoint, tensor: Tensor, rows: Sequence[int] | None = None
) -> Iterator[Packed | mx.array]:
    """Chosen rows (None: all) of a tensor as arrays [some of them, columns], packed where it is packed."""
    packing = checkpoint.packing(tensor.module) if tensor.matrix else None
    names = [f"{tensor.module}.{part}" for part in packing.parts] if packing else [tensor.name]
    entries = [checkpoint.entries[name] for name in names]
    step = max(1, PANEL_VALUES * tensor.shape[0] // tensor.size)
    for panels in zip(*(row_panels(entry, rows, step) for entry in entries), strict=True):
        arrays = [_array(panel, entry) for panel, entry in zip(panels, entries, strict=True)]
        yield Packed.of(arrays, packing) if packing else arrays[0]


def _array(panel: np.ndarray, entry: Entry) -> mx.array:
    array = mx.array(panel.view(_VIEWS[entry.dtype]).reshape(len(panel), *entry.shape[1:]))
    return array.view(mx.bfloat16) if entry.dtype == "BF16" else array
