"""Every tensor of a GGUF file: its name, shape and type there, and which rows of which of ours it is. No arrays but
those of a few constants."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from . import gguf_types
from .arch import Architecture, Tensor
from .errors import PareError
from .gguf_further import LONG, rotary
from .gguf_target import Target


def tensor_type(tensor: Tensor, kind: str) -> str:
    """The GGUF type of a tensor in a file of ``kind`` (f32, f16, q8_0): "F32", "F16" or "Q8_0". Arithmetic only."""
    if kind == "f32" or not tensor.matrix:
        return "F32"
    return "Q8_0" if kind == "q8_0" and gguf_types.fits("Q8_0", tensor.shape[-1]) else "F16"


@dataclass(frozen=True)
class Row:
    """One tensor of the file: rows ``take`` of ``source``, in that order (None: all), times a ``factor``, or a float32
    ``constant``."""

    name: str
    shape: tuple[int, ...]
    type: str
    source: Tensor | None
    take: Sequence[int] | None = None
    constant: Any = None
    factor: float = 1.0

    @property
    def nbytes(self) -> int:
        return gguf_types.nbytes(self.type, self.shape)


def table(arch: Architecture, target: Target, kind: str) -> list[Row]:
    """Every tensor of the file, in order."""
    import gguf

    number = {name: key for key, name in gguf.MODEL_ARCH_NAMES.items()}[target.architecture]
    names = gguf.get_tensor_name_map(number, len(arch.layers))
    head_dim = arch.uniform("head_dim")
    rows = []
    for tensor in arch.tensors():
        name = names.get_name(tensor.name, try_suffixes=(".weight", ".bias"))
        if name is None:
            raise PareError(f"{tensor.name} has no name in llama.cpp's {target.architecture} architecture")
        take = None
        if target.permute and "rope" in tensor.spec.transforms:
            take = rope_order(tensor.shape[0] // head_dim, head_dim)
        factor = target.q_proj if tensor.spec.role == "q_proj" else 1.0
        rows.append(Row(name, tensor.shape, tensor_type(tensor, kind), tensor, take, factor=factor))
    if target.architecture in UNTIED and arch.tied:
        embedding = next(row for row in rows if row.name == "token_embd.weight")
        rows.append(replace(embedding, name="output.weight"))
    if target.scaling_type == "llama3":
        factors = rope_factors(target, head_dim)
        rows.insert(0, Row("rope_freqs.weight", factors.shape, "F32", None, constant=factors))
    if target.architecture == "phi3" and target.scaling_type in LONG:
        factors = long_factors(target, rotary(arch, target.architecture))
        rows[:0] = [Row(name, factors.shape, "F32", None, constant=factors) for name in LONG_NAMES]
    return rows


UNTIED = ("olmo2",)  # architectures that want a head of their own
# llama.cpp takes the short ones while the context is no longer than the original length; mlx-lm never does
LONG_NAMES = ("rope_factors_long.weight", "rope_factors_short.weight")


def long_factors(target: Target, dims: int) -> Any:
    """float32 (dims / 2,): what longrope divides each rotary frequency by (mlx-lm's SuScaledRoPE)."""
    import numpy as np

    found = np.broadcast_to(np.asarray(target.scaling["long_factor"], np.float32), (dims // 2,))
    return np.ascontiguousarray(found)


def rope_order(heads: int, head_dim: int) -> list[int]:
    """Where each row of q or k comes from when rotary pairs must be neighbours: (i, i + head_dim/2) of every head."""
    half = head_dim // 2
    return [head * head_dim + i + part * half for head in range(heads) for i in range(half) for part in (0, 1)]


def rope_factors(target: Target, head_dim: int) -> Any:
    """float32 (head_dim / 2,): what llama3 scaling divides each rotary frequency by (mlx-lm's Llama3RoPE)."""
    import numpy as np

    s = target.scaling
    factor, low, high = float(s["factor"]), s.get("low_freq_factor", 1.0), s.get("high_freq_factor", 4.0)
    length = s.get("original_max_position_embeddings", 8192)
    waves = 2 * math.pi * target.theta ** (np.arange(0, head_dim, 2) / head_dim)
    smooth = np.clip((length / waves - low) / (high - low), 0, 1)  # 0: long waves, fully scaled; 1: short, untouched
    return (1 / ((1 - smooth) / factor + smooth)).astype(np.float32)
