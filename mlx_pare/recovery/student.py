"""The student in memory: what is trained of it, and what came of that as tensors of its checkpoint."""

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
    """A model to train, in memory. float32 where all weights move (half precision would lose Adam's small steps) and on
    the CPU backend; under adapters elsewhere as stored. Packed matrices stay packed when their scales are trained.

    Of several processes (mlx.launch) all have the weights of the first, which may have healed them before.
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
    """Freeze everything but what the method trains; adapters have this rank and scale."""
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
    """How many numbers a method trains, at most."""
    blocks = [t for t in student.arch.tensors() if t.layer is not None]
    if method == "full":
        return sum(t.size for t in blocks)
    matrices = [t for t in blocks if t.matrix]
    if method == "norms":
        packed = [(t, p) for t in matrices if (p := student.packing(t.module)) and p.affine]
        return sum(t.size for t in blocks if not t.matrix) + sum(2 * t.size // p.group_size for t, p in packed)
    return sum(rank * sum(t.shape) + t.shape[0] for t in matrices)


def gains(module: nn.Module) -> bool:
    """Whether a module is a norm, or a packed matrix with gains."""
    return isinstance(module, Rescaled) or "Norm" in type(module).__name__


def train_gains(module: nn.Module) -> None:
    """Train a norm, or the gains of a packed matrix, in float32: a step of Adam on a number near 1 is less than half
    precision can tell. A norm still computes in the dtype of what goes through it."""
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
    """What makes the trained tensors of a model in its best state, by name: adapters are folded into dense weights; a
    matrix whose scales were trained is packed. One at a time: dense, a packed model may be larger than the memory."""
    adapted = ((name, m) for name, m in model.named_modules() if hasattr(m, "fuse"))
    found: dict[str, Callable] = {f"{name}.weight": partial(lm.fused, module) for name, module in adapted}
    found |= {f"{name}.weight": m.stored for name, m in model.named_modules() if isinstance(m, Rescaled)}
    plain = [name for name in best if not name.endswith((".lora_a", ".lora_b", ".m", "_gain"))]
    return found | {name: partial(best.__getitem__, name) for name in plain}
