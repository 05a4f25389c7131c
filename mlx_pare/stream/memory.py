"""How much memory a walk (stream/walk.py) needs, and when its hidden states have to lie on disk."""

from __future__ import annotations

from .. import lm
from ..arch import Tensor
from ..base import machine
from ..base.errors import Refused
from ..base.units import gb
from ..model.checkpoint import Checkpoint
from ..tensors.float32_layers import EXPANDED_BYTES
from ..tensors.safetensors import DTYPE_BYTES
from ..text.corpus import Extent, Rows
from . import head
from .batches import micro_batch

BASE_BYTES = 250 << 20  # Python, MLX, the tokenizer and everything else that is loaded
STATE_BYTES = 4  # of a value of the hidden states, and of what a block computes from them: float32


def required_bytes(checkpoint: Checkpoint, rows: Rows | Extent, spooled: bool = False) -> int:
    """Estimate the peak of memory of a walk, the interpreter included (see the docstring of stream/walk.py).

    Args:
        checkpoint: the model.
        rows: the rows, or how many and how long.
        spooled: whether hidden states lie on disk, so that those of a micro-batch alone are in memory.

    Returns:
        Bytes.
    """
    arch = checkpoint.arch
    there = micro_batch(rows) if spooled else rows.count
    states = 3 * there * rows.length * arch.sizes["hidden"] * STATE_BYTES
    block, expanded = [0] * len(arch.layers), [0] * len(arch.layers)
    wide = 0
    for tensor in arch.tensors():
        if tensor.layer is not None:
            block[tensor.layer] += _stored_bytes(checkpoint, tensor)
            if not lm.cpu_backend():  # its kernels read packed matrices; others of 16 bits are expanded as a whole
                narrow = not checkpoint.packing(tensor.module) and DTYPE_BYTES[checkpoint.dtype(tensor)] < 4
                expanded[tensor.layer] += 4 * tensor.size * (narrow and not tensor.spec.stack)
            elif tensor.spec.stack:  # one matrix at a time
                wide = max(wide, 2 * 4 * tensor.size // tensor.shape[0])
            elif 4 * tensor.size <= EXPANDED_BYTES:  # MLX may expand these together, and larger ones a part at a time
                expanded[tensor.layer] += 4 * tensor.size
            else:
                wide = max(wide, 2 * EXPANDED_BYTES)
    running = max(block) + max(expanded) + wide + activation_bytes(checkpoint, rows)
    base = BASE_BYTES + lm.cache_bytes()
    return base + states + max(running, head_bytes(checkpoint) + 4 * head.CHUNK_BYTES)


def resident_width(checkpoint: Checkpoint) -> int:
    """Bytes per value of a model that is in memory as a whole: its own dtype, or float32 on the CPU backend."""
    return 4 if lm.cpu_backend() else checkpoint.value_bytes


def head_bytes(checkpoint: Checkpoint) -> int:
    """Bytes of a model that are in memory once the walk is over: those of its head, as it is stored."""
    outside = (t for t in checkpoint.arch.tensors() if t.layer is None)
    role = "embed_tokens" if checkpoint.arch.tied else "lm_head"
    return sum(_stored_bytes(checkpoint, tensor) for tensor in outside if tensor.spec.role == role)


def _stored_bytes(checkpoint: Checkpoint, tensor: Tensor) -> int:
    packing = checkpoint.packing(tensor.module) if tensor.matrix else None
    return packing.stored_bytes(tensor.shape) if packing else tensor.size * DTYPE_BYTES[checkpoint.dtype(tensor)]


def activation_bytes(checkpoint: Checkpoint, rows: Rows | Extent) -> int:
    """Estimate what a block computes for a micro-batch.

    Args:
        checkpoint: the model.
        rows: the rows, or how many and how long.

    Returns:
        Bytes.
    """
    arch, hidden = checkpoint.arch, checkpoint.arch.sizes["hidden"]
    heads = arch.largest("kv_head", "group")
    head_dim = max(arch.largest("head_dim"), arch.largest("nope_dim") + arch.largest("rope_dim"))
    tokens = micro_batch(rows) * rows.length
    units = 3 * arch.largest("ffn") + 4 * heads * head_dim + 4 * hidden + heads * rows.length
    units += 3 * arch.largest("shared_ffn") + 6 * arch.largest("linear_v_head", "linear_v_dim")
    if arch.uses("expert"):  # inputs, two inner widths and their product, and two outputs of every expert of a token
        units += arch.layers[0].sizes["active"] * (3 * arch.largest("expert_ffn") + 3 * hidden)
    return tokens * units * STATE_BYTES


def check_memory(
    checkpoint: Checkpoint,
    rows: Rows | Extent,
    cap: int | None,
    held: int = 0,
    instead: str = "",
    spooled: bool = False,
) -> int:
    """Check that a walk fits in memory.

    Args:
        checkpoint: the model.
        rows: the rows, or how many and how long.
        cap: bytes that may be used; None: the memory that is free now.
        held: bytes that are in memory in addition to the walk.
        instead: what else a user can do, for the message.
        spooled: whether hidden states lie on disk.

    Returns:
        The estimate with ``held``, bytes.

    Raises:
        Refused: the estimate exceeds ``cap``.
    """
    needed, limit = required_bytes(checkpoint, rows, spooled) + held, cap or machine.available_bytes()
    if needed > limit:
        states = 3 * rows.count * rows.length * checkpoint.arch.sizes["hidden"] * STATE_BYTES
        aside = "lie on disk already" if spooled else f"take {gb(states)}"
        raise Refused(
            f"streaming {rows.count} x {rows.length} tokens through {checkpoint.path} needs about {gb(needed)}, "
            f"{'--memory-cap allows' if cap else 'free are'} {gb(limit)}",
            f"use fewer rows (--samples, in recovery --train-rows) or a shorter --length (hidden states {aside})"
            f"{instead}",
        )
    return needed


def must_spool(checkpoint: Checkpoint, rows: Rows | Extent, cap: int | None, held: int = 0, beside: int = 0) -> bool:
    """Decide whether hidden states have to lie on disk for a walk to fit in memory.

    Args:
        checkpoint: the model.
        rows: the rows, or how many and how long.
        cap: bytes that may be used; None: the memory that is free now.
        held: bytes that are in memory in addition to the walk, in any case.
        beside: bytes in addition to these that would be spooled as well.

    Returns:
        Whether they have to.

    Raises:
        Refused: the walk does not fit even then.
    """
    if required_bytes(checkpoint, rows) + held + beside <= (cap or machine.available_bytes()):
        return False
    check_memory(checkpoint, rows, cap, held, spooled=True)
    return True
