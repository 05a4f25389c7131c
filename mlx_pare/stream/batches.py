"""Micro-batches: which rows go through a block together, and their share of its arguments."""

from __future__ import annotations

from typing import Any

import mlx.core as mx

from ..text.corpus import Extent, Rows

MICRO_BATCH_TOKENS = 1024


def micro_batch(rows: Rows | Extent) -> int:
    """How many rows go through a block at a time."""
    return min(rows.count, max(1, MICRO_BATCH_TOKENS // rows.length))


def micro_batches(rows: Rows, first: int = 0) -> list[slice]:
    """The rows, from ``first`` on, that go through a block at a time."""
    step = max(1, micro_batch(rows))
    return [slice(start, min(start + step, rows.count)) for start in range(first, rows.count, step)]


def per_row(value: Any, rows: Rows) -> bool:
    """Whether an argument of a block has a share for each row: an array whose first axis is the batch.

    A boolean matrix is an attention mask [length, length] shared by all rows, also when there are as many rows; a
    column is a factor for every position (ministral3).
    """
    if not isinstance(value, mx.array) or value.ndim < 2 or value.shape[0] != rows.count:
        return False
    return value.ndim > 2 or (value.dtype != mx.bool_ and value.shape[1] != 1)


def shares(rows: Rows, part: Any, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
    """The arguments of a block for some of the rows (a slice or indices)."""

    def share(value: Any) -> Any:
        return value[part] if per_row(value, rows) else value

    return tuple(map(share, args)), {k: share(v) for k, v in kwargs.items()}
