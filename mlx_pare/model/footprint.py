"""The one counter of parameters and bytes: of weights, however they are stored, and of caches.

Everything is summed over the tensor table of the architecture, so what is predicted is what is written. No arrays.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from ..arch import Architecture, Tensor
from ..arch.axes import dim, length
from ..arch.mixers import MIXERS
from ..arch.spec import Layer
from ..tensors.packing import Packing
from ..tensors.safetensors import DTYPE_BYTES
from .checkpoint import Checkpoint

Storage = Callable[[Tensor], int]  # bytes of one tensor

KV_STEP = 256  # positions; KVCache.step in mlx_lm/models/cache.py: full-attention caches grow in these steps
EXPERTS = (dim("expert"),)  # the first dimension of a stack; a token visits a few of its entries
LOOKUPS = {"embed_tokens", "embed_per_layer"}  # tables of which a token needs one row


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
    """Storage of every value as a float of this many bytes: 2 for bf16 and f16, 4 for f32."""
    return lambda tensor: _floats(tensor, bytes_per_value)


def _floats(tensor: Tensor, width: int) -> int:
    return tensor.size * (4 if tensor.spec.stored == "float32" else width)


def packed(packing: Packing, float_bytes: int = 2) -> Storage:
    """Storage as MLX quantizes a model: all matrices, embeddings and head are packed; norms and biases stay floats.

    Matrices that the family stores in 8 bits (TensorSpec.stored, most routers) get 8 bits in groups of 64. If the group
    size does not divide the columns of a matrix, it gets the next smaller group that does, or stays dense with
    ``float_bytes`` per value (Packing.fitted). mlx_lm.convert leaves both cases dense.
    """
    router = Packing(8, 64, float_bytes)

    def count(tensor: Tensor) -> int:
        wanted = router if tensor.spec.stored == "8bit" else packing
        fitted = wanted.fitted(tensor.shape[-1]) if tensor.matrix else None
        return fitted.nbytes(tensor.rows, tensor.shape[-1]) if fitted else _floats(tensor, float_bytes)

    known: dict[tuple, int] = {}  # thousands of tensors share a dozen shapes, and a search asks for all tensors

    def stored(tensor: Tensor) -> int:
        alike = (tensor.spec.stored, tensor.shape)
        if alike not in known:
            known[alike] = count(tensor)
        return known[alike]

    return stored


def like(checkpoint: Checkpoint) -> Storage:
    """Storage as in an existing checkpoint with tensors of the same names, each with its own packing and dtype."""

    def stored(tensor: Tensor) -> int:
        packing = checkpoint.packing(tensor.module) if tensor.matrix else None
        return packing.stored_bytes(tensor.shape) if packing else tensor.size * DTYPE_BYTES[checkpoint.dtype(tensor)]

    return stored


def weight_bytes(arch: Architecture, storage: Storage) -> int:
    """Bytes of all tensors of a model."""
    return sum(storage(tensor) for tensor in arch.tensors())


def read_bytes(arch: Architecture, storage: Storage) -> int:
    """Bytes of weights that one decoding step reads. Of the experts the active ones count; tables of which a token
    needs one row (LOOKUPS) do not count, unless the embedding is also the head."""
    return round(sum(storage(tensor) * _share_read(arch, tensor) for tensor in arch.tensors()))


def active_parameters(arch: Architecture) -> int:
    """Parameters that a token is multiplied with in the blocks: without embeddings, head and idle experts."""
    tensors = (t for t in arch.tensors() if t.spec.part != "embedding")
    return round(sum(tensor.size * _share_read(arch, tensor) for tensor in tensors))


def _share_read(arch: Architecture, tensor: Tensor) -> float:
    if tensor.spec.role in LOOKUPS:
        return 1.0 if tensor.spec.role == "embed_tokens" and arch.tied else 0.0
    if tensor.layer is not None and tensor.spec.dims[:1] == EXPERTS and tensor.spec.role != "router":
        sizes = arch.layers[tensor.layer].sizes
        return min(sizes.get("active", sizes["expert"]) / sizes["expert"], 1.0)
    return 1.0


# ---- KV cache and state ----


@dataclass(frozen=True)
class Cache:
    """Values that one sequence keeps in memory.

    ``growing``: per position, in full attention. ``windowed``: per position of a window. ``state``: once, in the
    model's dtype; ``state_f32``: once, in float32.
    """

    growing: int = 0
    windowed: int = 0
    state: int = 0
    state_f32: int = 0


def cache_values(arch: Architecture, latent: bool = False) -> Cache:
    """What all layers together keep. ``latent``: latent attention caches latents in every family, as in llama.cpp."""
    growing = windowed = state = state_f32 = 0
    for index, layer in enumerate(arch.layers):
        mixer, sizes = layer.mixer, arch.layer_sizes(index)
        values = length(MIXERS["mla"].cache if latent and "kv_latent" in sizes else mixer.cache, sizes)
        windowed += values if mixer.windowed else 0
        growing += 0 if mixer.windowed else values
        state += length(mixer.state, sizes)
        state_f32 += length(mixer.state_f32, sizes)
    return Cache(growing, windowed, state, state_f32)


def kv_positions(context: int, window: int | None = None) -> int:
    """Positions that a layer's cache holds after ``context`` tokens.

    ``window``: of a sliding layer; None for full attention. Full attention allocates whole steps (KVCache). A sliding
    layer holds its window once decoding has begun. While it reads a prompt its cache is larger (RotatingKVCache); the
    planner counts that among the activations. A window that is not full yet may own up to 255 spare positions, which
    are not counted.
    """
    return -(-context // KV_STEP) * KV_STEP if window is None else min(context, window)


def window_of(arch: Architecture, context: int) -> int:
    """Positions that a sliding layer looks back; ``context`` if the config sets no window."""
    window = arch.config.get("sliding_window")
    return window if isinstance(window, int) and window > 0 else context


def query_heads(layer: Layer) -> int:
    """Query heads of one layer."""
    return layer.sizes["kv_head"] * layer.sizes["group"]
