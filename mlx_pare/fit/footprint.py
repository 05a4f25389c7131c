"""The one counter of parameters and bytes: of weights, however they are stored, and of the KV cache.

Everything is summed over the tensor table of the architecture, so what is predicted is what is written. No arrays.
"""

from __future__ import annotations

from collections.abc import Callable

from ..arch import Architecture, Tensor
from ..checkpoint import DTYPE_BYTES, Checkpoint
from ..packing import Packing

Storage = Callable[[Tensor], int]  # bytes one tensor takes

KV_STEP = 256  # positions; KVCache.step in mlx_lm/models/cache.py: full-attention caches grow in these steps
GGUF_BLOCKS = {"F32": (1, 4), "F16": (1, 2), "Q8_0": (32, 34)}  # values and bytes per block, ggml-common.h


def parameters(arch: Architecture) -> dict[str, int]:
    """How many parameters a model has, by part. A tied head is the embedding and counts once.

    Keys: total, embedding (the input embedding and an untied head), attention, ffn, norm, and
    non_embedding = total - embedding. Biases belong to the part of their matrix, q_norm and k_norm to norm.
    """
    counted = {"embedding": 0, "attention": 0, "ffn": 0, "norm": 0}
    for tensor in arch.tensors():
        counted[tensor.spec.part] += tensor.size
    total = sum(counted.values())
    return {"total": total, **counted, "non_embedding": total - counted["embedding"]}


# ---- weights: how a tensor may be stored ----


def dense(bytes_per_value: int) -> Storage:
    """Every value as a float of this many bytes: 2 for bf16 and f16, 4 for f32."""
    return lambda tensor: tensor.size * bytes_per_value


def packed(packing: Packing, float_bytes: int = 2) -> Storage:
    """As MLX quantizes a model: every matrix, embeddings and head too; norms and biases stay floats.

    A matrix whose columns the group size does not divide takes the next smaller group that does, or stays dense with
    ``float_bytes`` per value (Packing.fitted). mlx_lm.convert leaves both cases dense.
    """

    def stored(tensor: Tensor) -> int:
        fitted = packing.fitted(tensor.shape[-1]) if tensor.matrix else None
        return fitted.nbytes(*tensor.shape) if fitted else tensor.size * float_bytes

    return stored


def like(checkpoint: Checkpoint) -> Storage:
    """As an existing checkpoint stores the tensors of these names, each with its own packing and dtype."""

    def stored(tensor: Tensor) -> int:
        packing = checkpoint.packing(tensor.module) if tensor.matrix else None
        return packing.nbytes(*tensor.shape) if packing else tensor.size * DTYPE_BYTES[checkpoint.dtype(tensor)]

    return stored


def gguf(kind: str) -> Storage:
    """As our export writes a GGUF of ``kind``: "f32", "f16" or "q8_0". Tensor data only: no header, no padding."""
    from ..export import tensor_type  # here, because export is a verb and brings more along than a counter needs

    def stored(tensor: Tensor) -> int:
        values, size = GGUF_BLOCKS[tensor_type(tensor, kind)]
        return tensor.size // values * size

    return stored


def weight_bytes(arch: Architecture, storage: Storage) -> int:
    """Bytes of all tensors of a model."""
    return sum(storage(tensor) for tensor in arch.tensors())


def lookup_bytes(arch: Architecture, storage: Storage) -> int:
    """Bytes of the input embedding when it is untied: resident, but of it a decoding step reads one row only."""
    return sum(storage(t) for t in arch.tensors() if t.spec.role == "embed_tokens") if not arch.tied else 0


# ---- KV cache ----


def kv_rates(arch: Architecture, value_bytes: int = 2) -> tuple[int, int]:
    """Bytes of K and V for one position of one sequence: (all full-attention layers, all sliding-window layers)."""
    full = sliding = 0
    for layer in arch.layers:
        size = 2 * layer.sizes["kv_head"] * layer.sizes["head_dim"] * value_bytes
        if layer.kind == "sliding_attention":
            sliding += size
        else:
            full += size
    return full, sliding


def kv_bytes_per_token(arch: Architecture, value_bytes: int = 2) -> int:
    """The part that grows with every token for ever: that of the full-attention layers."""
    return kv_rates(arch, value_bytes)[0]


def kv_positions(context: int, window: int | None = None) -> int:
    """Positions a layer's cache holds after ``context`` tokens; ``window`` of a sliding layer, None for full attention.

    Full attention allocates whole steps (KVCache); a sliding layer holds its window, once decoding has begun: while a
    prompt is read it is larger (RotatingKVCache), which the planner counts among the activations. A window that is not
    full yet may own up to 255 spare positions more, which are not counted.
    """
    return -(-context // KV_STEP) * KV_STEP if window is None else min(context, window)


def window_of(arch: Architecture, context: int) -> int:
    """Positions a sliding layer looks back; ``context`` when the config sets no window."""
    return arch.config.get("sliding_window") or context


def kv_bytes(arch: Architecture, context: int, batch: int = 1, value_bytes: int = 2) -> int:
    """Bytes of mlx-lm's KV cache after ``context`` tokens of each of ``batch`` sequences.

    ``value_bytes`` is the width of the model's compute dtype: 2 for bf16 and f16. Source: mlx_lm/models/cache.py,
    checked against real caches in tests/test_fit.py.
    """
    full, sliding = kv_rates(arch, value_bytes)
    return batch * (full * kv_positions(context) + sliding * kv_positions(context, window_of(arch, context)))
