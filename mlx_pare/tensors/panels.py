"""Kept rows and columns of stored tensors, a few rows at a time. An exact cut moves bytes, whatever they mean.

A tensor is read in the order of the file into one small buffer. The buffer stays in the processor's cache until the
kept part is written out: memory that is new to the process costs more than the copy (benchmarks/LOG.md).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from math import prod

import numpy as np

from ..base.errors import PareError
from .safetensors import Entry

PANEL_BYTES = 1 << 20  # of a tensor that are read at a time
PANEL_VALUES = 1 << 19  # weights that are expanded at a time


def row_count(entry: Entry) -> int:
    """The number of rows of a stored tensor, of all its matrices together; of its numbers if it has one dimension."""
    return prod(entry.shape[:-1]) if len(entry.shape) > 1 else entry.shape[0]


def row_panels(entry: Entry, rows: Sequence[int] | None, step: int) -> Iterator[np.ndarray]:
    """Read chosen rows of a stored tensor in panels; a panel is valid only until the next one is read.

    For each panel, only the part of the file between its first and its last row is read.

    Args:
        entry: where the tensor lies. Its rows are those of all its matrices, one after the other; if it has a single
            dimension, each number is a row.
        rows: the rows to read, in this order; None: all.
        step: rows per panel, at most.
    Returns:
        Panels, uint8 [at most ``step``, bytes of a row].
    Raises:
        PareError: the file ends too early, because it was changed since it was opened.
    """
    count = row_count(entry)
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
    """Read the bytes of the kept rows and columns of a stored tensor, in pieces that are valid only until the next one.

    Args:
        entry: where the tensor lies.
        rows: the rows to keep, in this order; None: all.
        columns: the columns to keep, in this order; None: all.
        width: columns per row, all of the same number of bytes: single values, or whole groups of a packed matrix.
    Returns:
        The bytes in row-major order.
    Raises:
        PareError: the file ends too early, because it was changed since it was opened.
    """
    row_bytes = entry.nbytes // row_count(entry)
    for panel in row_panels(entry, rows, max(1, PANEL_BYTES // row_bytes)):
        if columns is not None:
            panel = panel.view(f"V{row_bytes // width}").take(columns, axis=1)
        yield panel.reshape(-1).view(np.uint8).data
