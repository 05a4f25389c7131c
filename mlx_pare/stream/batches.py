"""Micro-batches: which rows go through a block together, and their share of the arguments of the block."""

from __future__ import annotations

from typing import Any

import mlx.core as mx

from ..text.corpus import Extent, Rows

MICRO_BATCH_TOKENS = 1024


def micro_batch(rows: Rows | Extent) -> int:
    """Return how many rows go through a block at a time: as many as have MICRO_BATCH_TOKENS tokens, at least one.

    Args:
        rows: the rows, or how many and how long.

    Returns:
        The number of rows; never more than there are.
    """
    return min(rows.count, max(1, MICRO_BATCH_TOKENS // rows.length))


def micro_batches(rows: Rows, first: int = 0) -> list[slice]:
    """Divide rows into micro-batches.

    Args:
        rows: all rows.
        first: number of the row to begin with.

    Returns:
        Slices of all rows; the last may be shorter.
    """
    step = max(1, micro_batch(rows))
    return [slice(start, min(start + step, rows.count)) for start in range(first, rows.count, step)]


def per_row(value: Any, rows: Rows) -> bool:
    """Decide whether an argument of a block has a share for each row: an array whose first axis is the batch.

    A boolean matrix is an attention mask [length, length] that all rows share, even if there are as many rows. A column
    is a factor for every position (ministral3).

    Args:
        value: an argument of any type.
        rows: all rows.

    Returns:
        Whether it is an array [rows, ...] to be divided among the micro-batches.
    """
    if not isinstance(value, mx.array) or value.ndim < 2 or value.shape[0] != rows.count:
        return False
    return value.ndim > 2 or (value.dtype != mx.bool_ and value.shape[1] != 1)


def shares(rows: Rows, part: Any, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
    """Take the share that some of the rows have of the arguments of a block.

    Args:
        rows: all rows.
        part: which rows, a slice or indices.
        args: arguments by position, for all rows.
        kwargs: arguments by name, for all rows.

    Returns:
        Both for these rows; arguments that all rows share are unchanged.
    """

    def share(value: Any) -> Any:
        return value[part] if per_row(value, rows) else value

    return tuple(map(share, args)), {k: share(v) for k, v in kwargs.items()}
