"""The student in memory: what is trained of it, and the trained tensors of its checkpoint."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_unflatten

from .. import lm
from ..lm import distributed
from ..model.checkpoint import Checkpoint
from ..tensors.packed import Packed
from .scale_tuning import Rescaled, rescale


def resident(path: Path, method: str) -> nn.Module:
    """Load a model into memory to train it.

    It is float32 if all weights move (half precision would lose Adam's small steps), and on the CPU backend. Otherwise
    it is as stored. Packed matrices stay packed if their scales are trained. Under mlx.launch all processes get the
    weights of the first, which may have healed them before.
    """
    model = lm.load(path)
    _, weights = distributed.from_first({}, dict(tree_flatten(model.parameters())))
    model.update(tree_unflatten(list(weights.items())))
    if method == "norms":
        rescale(model)
    if lm.cpu_backend() or method == "full":
        model = lm.dequantized(model, mx.float32)
    mx.eval(model.parameters())
    return model


def prepare(model: nn.Module, method: str, rank: int, scale: float, grad_checkpoint: bool = False) -> None:
    """Freeze everything in a model except what the method trains.

    Args:
        model: a model of ``resident``; it is changed in place.
        method: "lora", "dora", "full" or "norms".
        rank: of the adapters.
        scale: of the adapters.
        grad_checkpoint: whether blocks compute their activations twice instead of keeping them.
    """
    model.freeze()
    if method in ("lora", "dora"):
        lm.add_lora(model, rank, scale, method == "dora")
    for block in lm.blocks(model):
        if method == "full":
            block.unfreeze()
        if method == "norms":
            block.apply_to_modules(lambda _, m: train_gains(m) if gains(m) else None)
    if grad_checkpoint:
        lm.each_block(model, lm.checkpointed)


def trained_values(student: Checkpoint, method: str, rank: int) -> int:
    """Count the numbers that a method trains, at most.

    Args:
        student: the model to train.
        method: "lora", "dora", "full" or "norms".
        rank: of the adapters.
    Returns:
        How many numbers.
    """
    blocks = [t for t in student.arch.tensors() if t.layer is not None]
    if method == "full":
        return sum(t.size for t in blocks)
    matrices = [t for t in blocks if t.matrix]
    if method == "norms":
        packed = [(t, p) for t in matrices if (p := student.packing(t.module)) and p.affine]
        return sum(t.size for t in blocks if not t.matrix) + sum(2 * t.size // p.group_size for t, p in packed)
    return sum(rank * sum(t.shape) + t.shape[0] for t in matrices if len(t.shape) == 2)


def gains(module: nn.Module) -> bool:
    """Whether a module is a norm, or a packed matrix with gains."""
    return isinstance(module, Rescaled) or "Norm" in type(module).__name__


def train_gains(module: nn.Module) -> None:
    """Train a norm, or the gains of a packed matrix, in float32.

    Half precision cannot hold a step of Adam on a number near 1. A norm still computes in the dtype of its input."""
    module.unfreeze(recurse=False)
    half = {n: a for n, a in module.items() if isinstance(a, mx.array) and a.dtype in (mx.float16, mx.bfloat16)}
    if not half or isinstance(module, Rescaled):
        return
    module.update({name: array.astype(mx.float32) for name, array in half.items()})
    cls = type(module)

    def call(norm: nn.Module, x: mx.array) -> mx.array:
        held = {name: norm[name] for name in half}
        norm.update({name: array.astype(x.dtype) for name, array in held.items()})
        try:
            return cls.__call__(norm, x)
        finally:
            norm.update(held)

    module.__class__ = type(cls.__name__, (cls,), {"__call__": call})


def merged(model: nn.Module, best: dict[str, mx.array]) -> dict[str, Callable[[], Packed | mx.array]]:
    """Give the trained tensors of a model in its best state, each made when it is asked for.

    They are made one at a time because a packed model that becomes dense may be larger than the memory.

    Args:
        model: the trained model, in its best state.
        best: the trained parameters by name.
    Returns:
        By tensor name, a function that makes it: a dense array with the adapter folded in, a Packed matrix if its
        scales were trained, else the array in ``best``.
    """
    adapted = ((name, m) for name, m in model.named_modules() if hasattr(m, "fuse"))
    found: dict[str, Callable] = {f"{name}.weight": partial(lm.fused, module) for name, module in adapted}
    found |= {f"{name}.weight": m.stored for name, m in model.named_modules() if isinstance(m, Rescaled)}
    plain = [name for name in best if not name.endswith((".lora_a", ".lora_b", ".m", "_gain"))]
    return found | {name: partial(best.__getitem__, name) for name in plain}
