"""Every tensor of a GGUF file: its name, shape and type there, and which rows of which of our tensors it holds. No
arrays except for a few constants."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from ...arch import Architecture, Tensor
from ...arch.rope import llama3_factors, rope_order
from ...base.errors import PareError
from .. import experts, quant_mixes, types as gguf_types, uneven_layers
from ..architectures import Target
from ..special_cases import LONG, rotary


@dataclass(frozen=True)
class Row:
    """One tensor of the file: rows ``take`` of ``source``, in that order (None: all), times ``factor``, or a
    ``constant``.

    ``constant`` is a float32 array. ``ideal``: its type if its rows were whole blocks of any type.
    """

    name: str
    shape: tuple[int, ...]
    type: str
    source: Tensor | None
    take: Sequence[int] | None = None
    constant: Any = None
    factor: float = 1.0
    ideal: str = ""

    @property
    def nbytes(self) -> int:
        return gguf_types.nbytes(self.type, self.shape)


def table(arch: Architecture, target: Target, kind: str, matrix: bool = False) -> list[Row]:
    """List every tensor of a file, in order.

    Args:
        arch: the model.
        target: how llama.cpp will run it.
        kind: the kind of the file, such as "q4_k_m".
        matrix: whether an importance matrix is used.
    Returns:
        The tensors.
    Raises:
        PareError: the architecture has no name for a tensor.
        UsageError: there is no such kind.
    """
    import gguf

    number = {name: key for key, name in gguf.MODEL_ARCH_NAMES.items()}[target.architecture]
    names = gguf.get_tensor_name_map(number, len(arch.layers))
    head_dim = arch.uniform("head_dim")
    types_of, ideals_of = (quant_mixes.types_of(arch, kind, matrix, wide) for wide in (False, True))
    rows = []
    for tensor in arch.tensors():
        parts = uneven_layers.parts(arch, target.architecture, tensor)
        if parts is None:
            name = experts.name(target.architecture, tensor) if arch.uses("expert") else None
            name = name or names.get_name(tensor.name.removeprefix(arch.prefix), try_suffixes=(".weight", ".bias"))
            if name is None:
                raise PareError(f"{tensor.name} has no name in llama.cpp's {target.architecture} architecture")
            parts = [(name, range(tensor.shape[0]))]
        for (name, take), type_, ideal in zip(parts, types_of(tensor), ideals_of(tensor), strict=True):
            order = _order(tensor, name, take, target, head_dim)
            shape = (len(take), *tensor.shape[1:]) if len(take) < tensor.shape[0] else experts.shape(tensor)
            factor = target.q_proj if tensor.spec.role == "q_proj" else 1.0
            rows.append(Row(name, shape, type_, tensor, order, factor=factor, ideal=ideal))
    if target.architecture == "deci":
        for name, values in uneven_layers.stand_ins(arch):
            rows.append(Row(name, values.shape, "F16" if values.ndim > 1 else "F32", None, constant=values))
    if arch.family.gguf in quant_mixes.UNTIED and arch.tied:
        rows.append(_head(next(row for row in rows if row.name == "token_embd.weight"), types_of, ideals_of))
    if target.scaling_type == "llama3":
        factors = rope_factors(target, head_dim)
        rows.insert(0, Row("rope_freqs.weight", factors.shape, "F32", None, constant=factors))
    if target.architecture == "phi3" and target.scaling_type in LONG:
        factors = long_factors(target, rotary(arch, target.architecture))
        rows[:0] = [Row(name, factors.shape, "F32", None, constant=factors) for name in LONG_NAMES]
    return rows


def _order(tensor: Tensor, name: str, take: range, target: Target, head_dim: int) -> list[int] | None:
    """The rows of a tensor that one in the file holds; None: all, as they are. Queries and keys follow the target's
    rope."""
    whole = len(take) == tensor.shape[0]
    turned = "rope" in tensor.spec.transforms if whole else name.split(".")[2] in uneven_layers.ROPE
    if target.permute and turned:
        return [take.start + i for i in rope_order(len(take) // head_dim, head_dim)]
    return None if whole else list(take)


def _head(embedding: Row, types_of: Callable, ideals_of: Callable) -> Row:
    """The embedding once more, as the separate head that some architectures need."""
    head = embedding.source._replace(spec=replace(embedding.source.spec, role="lm_head"))
    return replace(embedding, name="output.weight", type=types_of(head)[0], ideal=ideals_of(head)[0])


# llama.cpp uses the short ones while the context is no longer than the original length; mlx-lm never does
LONG_NAMES = ("rope_factors_long.weight", "rope_factors_short.weight")


def long_factors(target: Target, dims: int) -> Any:
    """Compute what longrope divides each rotary frequency by (mlx-lm's SuScaledRoPE).

    Args:
        target: how llama.cpp will run the model.
        dims: dimensions of a head that the rope turns.
    Returns:
        The divisors, float32 [dims / 2].
    """
    import numpy as np

    found = np.broadcast_to(np.asarray(target.scaling["long_factor"], np.float32), (dims // 2,))
    return np.ascontiguousarray(found)


def rope_factors(target: Target, head_dim: int) -> Any:
    """Compute what llama3 scaling divides each rotary frequency by.

    Args:
        target: how llama.cpp will run the model.
        head_dim: the width of a head.
    Returns:
        The divisors, float32 [head_dim / 2].
    """
    import numpy as np

    waves = [2 * math.pi * target.theta ** (i / head_dim) for i in range(0, head_dim, 2)]
    return np.array(llama3_factors(target.scaling, waves), np.float32)
