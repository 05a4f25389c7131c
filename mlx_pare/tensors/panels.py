"""Kept rows and columns of stored tensors, a few rows at a time. An exact cut moves bytes, whatever they mean.

A tensor is read in the order of the file into one small buffer, which stays in the processor's cache until what is kept
of it goes out again: memory that is new to the process costs more than the copy (benchmarks/LOG.md).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from ..base.errors import PareError
from .safetensors import Entry

PANEL_BYTES = 1 << 20  # of a tensor, read at a time
PANEL_VALUES = 1 << 19  # of its weights, expanded at a time


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
