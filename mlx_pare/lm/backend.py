"""Device differences. On Metal (and CUDA) models compute with the stock layers.

A walk gives them hidden states in float32, and they compute in float32 by MLX's rules of promotion. Training uses the
model's own dtype. On the CPU backend every matrix is expanded to float32 during one call (tensors/float32_layers.py).
There mx.compile is off, because it calls a C++ compiler. Products of float32 matrices are computed in full float32: by
default MLX rounds their factors to ten bits on CUDA and on Macs from the M5 on, and every Gram matrix would contain
that error. The Metal side has not been run yet.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import cache

os.environ.setdefault("MLX_ENABLE_TF32", "0")  # read by MLX at its first product

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from ..arch import Architecture
from ..base import machine
from ..base.errors import Refused
from ..tensors.packing import Packing
from . import cpu_math


def cpu_backend() -> bool:
    """Tell whether MLX computes on the CPU here, as on Linux without CUDA."""
    return mx.default_device().type == mx.DeviceType.cpu


def cache_bytes() -> int:
    """Bytes of freed buffers that MLX keeps for later; the CPU backend keeps none.

    Without a limit Metal keeps most of the memory: buffers are used again only for requests of nearly the same size
    (mlx/backend/common/buffer_cache.h), and the sizes of candidates differ.
    """
    return 0 if cpu_backend() else min(1 << 30, machine.memory_bytes() // 16)


def prepare() -> None:
    """Set MLX up for this device, before anything is computed."""
    if cpu_backend():
        mx.disable_compile()
    else:
        mx.set_cache_limit(cache_bytes())


prepare()


def limit_memory(cap: int | None) -> None:
    """Let MLX on a GPU wait for work under way before it allocates more bytes than ``cap``; None: its own limit."""
    if cap is not None and not cpu_backend():
        mx.set_memory_limit(cap)


@contextmanager
def own_wired_limit() -> Iterator[None]:
    """Give the wired limit back after the block.

    mlx-lm's trainer sets it to all that the GPU may use, and leaves it there. Whatever runs later in the process is
    wired too, which has led to kernel panics (mlx issues 3186 and 3346).
    """
    working_set = mx.device_info().get("max_recommended_working_set_size")
    before = None if working_set is None else mx.set_wired_limit(0)
    if before is not None:
        mx.set_wired_limit(before)
    try:
        yield
    finally:
        if before is not None:
            mx.set_wired_limit(before)


EXACT = 1e-5  # largest relative error of a float32 product; with factors of ten bits it is 3e-4 and more


def product_error() -> float:
    """Return the relative error of a product of two float32 matrices on this device, against float64."""
    random = np.random.default_rng(0)
    a, b = (random.standard_normal((64, 64)).astype(np.float32) for _ in range(2))
    exact = a.astype(np.float64) @ b.astype(np.float64)
    return float(np.linalg.norm(np.array(mx.array(a) @ mx.array(b)) - exact) / np.linalg.norm(exact))


@cache
def require_exact_products() -> None:
    """Raises Refused if float32 products are rounded on this device: every Gram matrix would contain that error."""
    if (error := product_error()) > EXACT:
        raise Refused(
            f"float32 products are {error:.0e} wrong on this device: MLX computes them in TF32",
            "set MLX_ENABLE_TF32=0 before Python starts",
        )


def swift(kept: int = 0) -> AbstractContextManager[None]:
    """Let numpy compute exponentials and attention on the CPU backend, for walks, measurements and training.

    ``kept``: bytes from ``swift_kept`` if gradients are taken; above cpu_math.MOST_KEPT MLX computes them.
    """
    return cpu_math.swift(kept <= cpu_math.MOST_KEPT) if cpu_backend() else nullcontext()


def swift_kept(arch: Architecture, tokens: int, blocks: int = 1) -> int:
    """Estimate the bytes that gradients keep under ``swift``.

    Args:
        arch: the architecture, for its largest ffn and its hidden size.
        tokens: tokens of a batch, all rows together.
        blocks: transformer blocks that gradients go through.
    Returns:
        Bytes, at most.
    """
    return blocks * cpu_math.kept_bytes(arch.largest("ffn"), arch.sizes["hidden"], tokens)


def for_backend(module: nn.Module) -> nn.Module:
    """Return the module as it should compute in a walk on this device: in float32, with matrices as they are stored if
    the kernels take them."""
    from ..tensors.float32_layers import others_to_float32, to_float32

    return to_float32(module) if cpu_backend() else others_to_float32(module)


def packed(module: nn.Module, packing: Packing, dtype: mx.Dtype | None = None) -> nn.Module:
    """Pack the matrix of a linear layer of a streamed block again.

    Args:
        module: the layer, also one that ``for_backend`` wrapped.
        packing: bits, group size and mode of the result.
        dtype: dtype in which the matrix is packed; None: that of the layer.
    Returns:
        A layer as it should compute on this device; not packed again if no group size fits or it is packed so already.
    """
    from ..tensors.packed import packed_layer

    return for_backend(packed_layer(getattr(module, "inner", module), packing, dtype))


def dequantized(model: nn.Module, dtype: mx.Dtype = mx.float32) -> nn.Module:
    """Make a resident model dense, with floats of ``dtype``, for training in full or on the CPU backend."""
    from mlx_lm.utils import dequantize_model

    def widen(m: nn.Module) -> None:
        if "biases" in m:  # in the other modes bfloat16, which mlx-lm asks for, holds the very values
            m.scales, m.biases = m.scales.astype(mx.float32), m.biases.astype(mx.float32)

    model.apply_to_modules(lambda _, m: widen(m))
    model = dequantize_model(model)
    model.apply(lambda a: a.astype(dtype) if mx.issubdtype(a.dtype, mx.floating) else a)
    return model
