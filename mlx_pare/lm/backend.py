"""Device differences. On Metal (and CUDA) models compute in their own dtype with the stock layers.

On the CPU backend every matrix is expanded to float32 for the length of one call (see tensors/packed.py), and
mx.compile, which shells out to a C++ compiler there, is off. Products of float32 matrices are really computed in
float32: by default MLX rounds their factors to ten bits on CUDA and on Macs from the M5 on, which would end up in every
Gram matrix. The Metal side has never been run so far.
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
    """Whether MLX computes on the CPU here, as on Linux without CUDA."""
    return mx.default_device().type == mx.DeviceType.cpu


if cpu_backend():
    mx.disable_compile()


def swift(kept: int = 0) -> AbstractContextManager[None]:
    """For walks, measurements and training: on the CPU backend numpy computes exponentials and attention, unless that
    would keep too much. ``kept``: bytes, as ``swift_kept`` says, where gradients are taken."""
    return cpu_math.swift(kept <= cpu_math.MOST_KEPT) if cpu_backend() else nullcontext()


def swift_kept(arch: Architecture, tokens: int, blocks: int = 1) -> int:
    """Bytes that gradients through so many blocks keep of ``tokens`` under ``swift``."""
    return blocks * cpu_math.kept_bytes(arch.largest("ffn"), arch.sizes["hidden"], tokens)


def for_backend(module: nn.Module) -> nn.Module:
    """The module as it should compute on this device."""
    if not cpu_backend():
        return module
    from ..tensors.packed import to_float32

    return to_float32(module)


def packed(module: nn.Module, packing: Packing, dtype: mx.Dtype | None = None) -> nn.Module:
    """A linear layer of a streamed block with its matrix packed anew, in this dtype (None: that of the layer), as it
    should compute on this device."""
    from ..tensors.packed import packed_layer

    return for_backend(packed_layer(getattr(module, "inner", module), packing, dtype))


def dequantized(model: nn.Module, dtype: mx.Dtype = mx.float32) -> nn.Module:
    """A resident dense copy of a model, for training in full or on the CPU backend."""
    from mlx_lm.utils import dequantize_model

    def widen(m: nn.Module) -> None:
        if "biases" in m:  # in the other modes bfloat16, which mlx-lm asks for, holds the very values
            m.scales, m.biases = m.scales.astype(mx.float32), m.biases.astype(mx.float32)

    model.apply_to_modules(lambda _, m: widen(m))
    model = dequantize_model(model)
    model.apply(lambda a: a.astype(dtype) if mx.issubdtype(a.dtype, mx.floating) else a)
    return model
