"""Models whose layers differ, as llama.cpp runs them: its deci and openelm architectures, and their traps.

Only a few of llama.cpp's loaders take a size for every layer. deci (src/models/deci.cpp) takes heads, kv heads and ffn
of every layer, biases and rope factors. It has no norms of queries and keys, and turns its rope as llama does. openelm
(src/models/openelm.cpp) always has those norms, and its embedding is always the head as well.

deci computes two things wrongly, so other tensors are written. A layer without feed-forward loses its residual (or
aborts, as the last one), so it gets a feed-forward of ABSENT_FFN channels that are zero. A first layer without
attention leaves the head dimension unknown, so it gets one head that is zero.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..arch import Architecture, Tensor
from ..arch.axes import length
from ..base.errors import PareError

ABSENT_FFN = 32  # one block of a quantized row
QKV = {"qkv_proj": ("attn_q", "attn_k", "attn_v")}
GATE_UP = {"gate_up_proj": ("ffn_gate", "ffn_up")}
SPLIT: Mapping[str, Mapping[str, Sequence[str]]] = {"deci": QKV | GATE_UP, "openelm": GATE_UP}
ROPE = {"attn_q", "attn_k"}


@dataclass(frozen=True)
class Sizes:
    """The sizes of one layer in the file."""

    heads: int
    kv_heads: int
    ffn: int


def why_not(arch: Architecture) -> str | None:
    """Why llama.cpp has nothing for a model of this sort whose layers differ; None if it has."""
    if _normed(arch) and not arch.tied:
        return "no architecture with a size for every layer has norms of queries and keys and an untied head"
    return None


def architecture(arch: Architecture) -> str:
    """The architecture, deci or openelm, that computes what this model does. Raises PareError if neither does."""
    if why := why_not(arch):
        raise PareError(f"llama.cpp cannot run layers that differ of such a model: {why}", "cut all layers alike")
    return "openelm" if _normed(arch) else "deci"


def _normed(arch: Architecture) -> bool:
    return any(tensor.spec.role == "q_norm" for tensor in arch.tensors())


def sizes(arch: Architecture) -> list[Sizes]:
    """The sizes of every layer in the file, including those of parts that stand in for missing ones."""
    found = []
    for index, layer in enumerate(arch.layers):
        kv_heads, ffn = layer.sizes["kv_head"], layer.sizes["ffn"] or ABSENT_FFN
        if not (kv_heads or index):
            found.append(Sizes(1, 1, ffn))
        else:
            found.append(Sizes(kv_heads * layer.sizes["group"], kv_heads, ffn))
    return found


def parts(arch: Architecture, name: str, tensor: Tensor) -> list[tuple[str, range]] | None:
    """Find the tensors of the file that one of ours becomes.

    Args:
        arch: the model.
        name: llama.cpp's architecture.
        tensor: our tensor.
    Returns:
        Name in the file and our rows of each; None if the tensor stays one.
    """
    stems = SPLIT.get(name, {}).get(tensor.spec.role)
    if stems is None:
        return None
    found, start = [], 0
    for stem, segment in zip(stems, tensor.spec.dims[0], strict=True):
        end = start + length((segment,), arch.layer_sizes(tensor.layer))
        found.append((f"blk.{tensor.layer}.{stem}.weight", range(start, end)))
        start = end
    return found


def stand_ins(arch: Architecture) -> Iterator[tuple[str, Any]]:
    """Make what is written for the parts that a deci layer does not have.

    Args:
        arch: the model.
    Returns:
        Name in the file and float32 array, ones for norms and zeros for matrices, of each tensor.
    """
    import numpy as np

    hidden, head_dim = arch.sizes["hidden"], arch.uniform("head_dim")
    for index, layer in enumerate(arch.layers):
        shapes: dict[str, tuple[int, ...]] = {}
        if not (layer.sizes["kv_head"] or index):
            shapes |= {"attn_norm": (hidden,), "attn_output": (hidden, head_dim)}
            shapes |= dict.fromkeys(("attn_q", "attn_k", "attn_v"), (head_dim, hidden))
        if not layer.sizes["ffn"]:
            shapes |= {"ffn_norm": (hidden,), "ffn_down": (hidden, ABSENT_FFN)}
            shapes |= dict.fromkeys(("ffn_gate", "ffn_up"), (ABSENT_FFN, hidden))
        for stem, shape in shapes.items():
            fill = np.ones if stem.endswith("norm") else np.zeros
            yield f"blk.{index}.{stem}.weight", fill(shape, np.float32)
