"""Device differences. On Metal (and CUDA) models compute in their own dtype with the stock layers.

On the CPU backend every matrix is expanded to float32 during one call (see tensors/packed.py). There mx.compile is off,
because it calls a C++ compiler. Products of float32 matrices are computed in full float32: by default MLX rounds their
factors to ten bits on CUDA and on Macs from the M5 on, and every Gram matrix would contain that error. The Metal side
has not been run yet.
"""

from __future__ import annotations

import os
from contextlib import AbstractContextManager, nullcontext

os.environ.setdefault("MLX_ENABLE_TF32", "0")  # read by MLX at its first product

import mlx.core as mx
import mlx.nn as nn

from ..arch import Architecture
from ..tensors.packing import Packing
from . import cpu_math


def cpu_backend() -> bool:
    """Tell whether MLX computes on the CPU here, as on Linux without CUDA."""
    return mx.default_device().type == mx.DeviceType.cpu


if cpu_backend():
    mx.disable_compile()


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
    """Return the module as it should compute on this device."""
    if not cpu_backend():
        return module
    from ..tensors.packed import to_float32

    return to_float32(module)


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
