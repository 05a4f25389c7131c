"""One block of a model as something to train: dense float32 copies of its matrices, LoRA or all weights, AdamW.

A matrix that is stored packed is rounded on the way forward as it will be stored, to codes with the scales and biases
it has, and the gradient passes straight through the rounding (Bengio, Leonard, Courville 2013, arXiv:1308.3432): what
is learnt is what is kept, and nothing is lost before the first step. That is why the adapters are not mlx-lm's, which
add their product beside the packed matrix and are rounded only when they are merged.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_map

from .. import lm
from ..tensors.packed import Packed, dense_weight, is_packed, packed, repacked, rounded_on
from .trainer import ClippedAdamW, Course

METHODS = ("lora", "full")


@dataclass(frozen=True)
class Options:
    """``steps`` of ``batch`` rows per block; ``rank`` and ``scale`` are LoRA's; ``learning_rate`` None: by method."""

    method: str = "lora"
    steps: int = 200
    batch: int = 8
    learning_rate: float | None = None
    rank: int = 16
    scale: float = 2.0
    seed: int = 0

    @property
    def rate(self) -> float:
        return {"lora": 8e-3, "full": 4e-3}[self.method] if self.learning_rate is None else self.learning_rate


class Matrix(nn.Module):
    """A linear layer in float32, trained in full or by LoRA (Hu et al. 2021, arXiv:2106.09685): W + scale (A B)^T."""

    def __init__(self, layer: nn.Module, options: Options, draw: np.random.RandomState):
        super().__init__()
        self.weight = dense_weight(layer)
        if "bias" in layer:
            self.bias = layer.bias.astype(mx.float32)
        self.grid: Packed | None = packed(layer) if is_packed(layer) else None
        self.rounds, self.scale, (rows, columns) = is_packed(layer), options.scale, self.weight.shape
        if options.method == "lora":
            rank, bound = min(options.rank, rows, columns), columns**-0.5
            self.lora_a = mx.array(draw.uniform(-bound, bound, (columns, rank)).astype(np.float32))
            self.lora_b = mx.zeros((rank, rows))

    def dense(self) -> mx.array:
        """The weight [out, in] as it is by now."""
        return self.weight + self.scale * (self.lora_a @ self.lora_b).T if "lora_a" in self else self.weight

    def result(self) -> Packed | mx.array:
        """What is kept of it: packed, where it was."""
        return self.dense() if self.grid is None else repacked(self.grid, self.dense())

    def __call__(self, x: mx.array) -> mx.array:
        weight = self.dense()
        if self.rounds:
            weight = weight + mx.stop_gradient(rounded_on(self.grid, mx.stop_gradient(weight)) - weight)
        y = x @ weight.T
        return y + self.bias if "bias" in self else y


def trainable(block: nn.Module, options: Options, draw: np.random.RandomState) -> nn.Module:
    """The block, as mlx-lm loads it, with every linear layer a Matrix and all else in float32; frozen but for what the
    method trains: the adapters, or every weight."""

    def made(leaf: nn.Module) -> nn.Module:
        if isinstance(leaf, nn.Linear | nn.QuantizedLinear):
            return Matrix(leaf, options, draw)
        leaf.apply(lambda a: a.astype(mx.float32) if mx.issubdtype(a.dtype, mx.floating) else a)
        return leaf

    block.update_modules(tree_map(made, block.leaf_modules(), is_leaf=nn.Module.is_module))
    block.freeze()
    if options.method == "full":
        block.unfreeze()
    else:
        block.apply_to_modules(lambda _, m: isinstance(m, Matrix) and m.unfreeze(keys=["lora_a", "lora_b"]))
    mx.eval(block.parameters())
    return block


def batches(count: int, options: Options, draw: np.random.RandomState) -> Iterator[np.ndarray]:
    """Row numbers [batch], endless: every row once, in another order each time around."""
    batch = min(options.batch, count)
    while True:
        shuffled = draw.permutation(count)
        yield from (shuffled[start : start + batch] for start in range(0, count - batch + 1, batch))


def train(
    block: nn.Module,
    loss: Callable[[nn.Module, mx.array], mx.array],
    count: int,
    options: Options,
    draw: np.random.RandomState,
    report: Callable[[float], None],
    kept: int = 0,
) -> None:
    """``options.steps`` of AdamW on ``loss(block, row numbers)`` over ``count`` rows, at the rates and with the
    clipping of a Course. ``report`` gets the loss of every step; ``kept``: bytes, see backend.swift."""
    course = Course(options.steps, options.rate)
    optimizer, step = ClippedAdamW(course.learning_rate(), course.clip), nn.value_and_grad(block, loss)
    for rows in islice(batches(count, options, draw), options.steps):
        with lm.swift(kept):
            value, gradients = step(block, mx.array(rows))
            optimizer.update(block, gradients)
            mx.eval(block.parameters(), optimizer.state, value)
        report(value.item())
        if not math.isfinite(value.item()):
            return


def unrounded(block: nn.Module) -> nn.Module:
    """The block without the rounding of what is packed: what training would have reached in float32."""
    block.apply_to_modules(lambda _, m: setattr(m, "rounds", False) if isinstance(m, Matrix) else None)
    return block


def result_at(block: nn.Module, path: str) -> Packed | mx.array:
    """What training made of a parameter such as "mlp.up_proj.weight", packed if it was."""
    *parts, leaf = path.split(".")
    for part in parts:
        block = getattr(block, part)
    return block.result() if isinstance(block, Matrix) and leaf == "weight" else block[leaf]
