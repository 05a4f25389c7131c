"""Processes that train one model together; mlx.launch starts them on one Mac or several (mx.distributed)."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import mlx.core as mx
import numpy as np

from ..base.errors import PareError


def this() -> tuple[int, int]:
    """Return (number of this process, number of processes); (0, 1) without mlx.launch."""
    world = mx.distributed.init()
    return world.rank(), world.size()


def from_first(
    about: dict[str, Any], arrays: dict[str, mx.array] | None = None
) -> tuple[dict[str, Any], dict[str, mx.array]]:
    """Send a JSON value and arrays of the first process to all processes.

    Args:
        about: JSON value; only that of the first process counts.
        arrays: name -> array of any shape and dtype, also only of the first process; None: none.
    Returns:
        Value and arrays of the first process; with one process the arguments themselves.
    Raises:
        PareError: another process ended.
    """
    (rank, size), arrays = this(), arrays or {}
    if size == 1:
        return about, arrays
    shapes = [[name, list(a.shape), str(a.dtype).split(".")[-1]] for name, a in arrays.items()]
    note = np.frombuffer(json.dumps([about, shapes]).encode(), np.uint8) if rank == 0 else np.zeros(0, np.uint8)
    length = int(_sum(mx.array([len(note)], mx.int32)).item())
    note = _sum(mx.array(note if rank == 0 else np.zeros(length, np.uint8)))
    about, shapes = json.loads(bytes(np.array(note)))
    found = {}
    for name, shape, dtype in shapes:
        mine = arrays[name] if rank == 0 else mx.zeros(shape, dtype=getattr(mx, dtype))
        found[name] = _sum(mine.reshape(-1).view(mx.uint8)).view(getattr(mx, dtype)).reshape(shape)
    return about, found


@contextmanager
def together() -> Iterator[None]:
    """Wrap what the processes compute together. Raises PareError if another one ended (mlx.launch then ends all)."""
    try:
        yield
    except RuntimeError as error:
        if this()[1] == 1 or "peer" not in str(error):
            raise
        raise PareError(
            f"another process ended: {error}", "what it said is the cause; the same command goes on"
        ) from error


def _sum(array: mx.array) -> mx.array:
    with together():
        total = mx.distributed.all_sum(array, stream=mx.cpu)
        mx.eval(total)
        return total
