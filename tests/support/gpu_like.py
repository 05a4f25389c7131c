"""A pytest plugin: the code takes the way that it takes on a GPU, computed by the CPU's kernels.

    python -m pytest -p gpu_like FILES

Blocks are the stock ones, packed matrices stay packed, students train in their own dtype, estimates are those of a GPU.
And what Metal refuses is refused: decompositions that are not asked of the CPU, float64 arrays, other threads.
"""

from __future__ import annotations

import os
import threading

os.environ["MLX_DISABLE_COMPILE"] = "1"

import mlx.core as mx

import mlx_pare.lm as lm
from mlx_pare.lm import backend, loading

for module in (lm, backend, loading):
    module.cpu_backend = lambda: False


class Refused(AssertionError):
    """Metal would not do this."""


def _on_the_cpu(name: str, real):
    def call(*given, stream=None, **named):
        if stream != mx.cpu:
            raise Refused(f"mx.linalg.{name} without stream=mx.cpu")
        return real(*given, stream=stream, **named)

    return call


for name in (
    "cholesky",
    "eigh",
    "eigvalsh",
    "inv",
    "lu",
    "lu_factor",
    "pinv",
    "qr",
    "solve",
    "solve_triangular",
    "svd",
):
    if hasattr(mx.linalg, name):
        setattr(mx.linalg, name, _on_the_cpu(name, getattr(mx.linalg, name)))


def _evaluated(real):
    def call(*arrays, **named):
        if threading.current_thread() is not threading.main_thread():
            raise Refused("mx.eval in another thread: its streams do not exist there")
        for array in _arrays(arrays):
            if array.dtype in (mx.float64,):
                raise Refused("a float64 array")
        return real(*arrays, **named)

    return call


def _arrays(value):
    if isinstance(value, mx.array):
        yield value
    elif isinstance(value, dict):
        for inner in value.values():
            yield from _arrays(inner)
    elif isinstance(value, list | tuple):
        for inner in value:
            yield from _arrays(inner)


mx.eval = _evaluated(mx.eval)
