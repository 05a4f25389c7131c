"""Training of one block of a model: dense float32 copies of its matrices, LoRA or all weights, AdamW.

A packed matrix is rounded in the forward pass as it will be stored: to codes with the scales and biases that it has.
The gradient passes straight through the rounding (Bengio, Leonard, Courville 2013, arXiv:1308.3432). So what is learnt
is what is kept, and nothing is lost before the first step. For this reason the adapters are not mlx-lm's: those add
their product to that of the packed matrix, and are rounded only when they are merged.
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
    """Each block trains for ``steps`` steps of ``batch`` rows. ``rank`` and ``scale`` are LoRA's.

    ``learning_rate`` None: the method decides.
    """

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
        """Compute the current weight, adapters included.

        Returns:
            float32 [out, in].
        """
        return self.weight + self.scale * (self.lora_a @ self.lora_b).T if "lora_a" in self else self.weight

    def result(self) -> Packed | mx.array:
        """Give the weight as it will be kept.

        Returns:
            Packed with the scales and biases of before if it was packed, else float32 [out, in].
        """
        return self.dense() if self.grid is None else repacked(self.grid, self.dense())

    def __call__(self, x: mx.array) -> mx.array:
        weight = self.dense()
        if self.rounds:
            weight = weight + mx.stop_gradient(rounded_on(self.grid, mx.stop_gradient(weight)) - weight)
        y = x @ weight.T
        return y + self.bias if "bias" in self else y


def trainable(block: nn.Module, options: Options, draw: np.random.RandomState) -> nn.Module:
    """Turn a block into one that can be trained: every linear layer becomes a Matrix, all else float32.

    Everything is frozen except what the method trains: the adapters, or every weight.

    Args:
        block: a block as mlx-lm loads it; it is changed in place.
        options: the method, and the rank and scale of adapters.
        draw: source of the adapters' first values.
    Returns:
        The same block.
    """

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
    """Draw row numbers without end, in another order for every pass over the rows.

    A pass leaves out the last rows of its order that do not fill a batch.

    Args:
        count: how many rows there are.
        options: ``batch`` is how many rows are drawn at a time.
        draw: source of the orders.
    Returns:
        Iterator of int arrays [min(batch, count)].
    """
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
    """Train a block with AdamW, at the rates and with the clipping of a Course. A loss that is not finite ends it.

    Args:
        block: a block of ``trainable``; it is changed in place.
        loss: called as ``loss(block, row numbers int [b])``; gives a scalar.
        count: how many rows there are to draw from.
        options: steps, batch and rate.
        draw: source of the order of rows.
        report: gets the loss of every step.
        kept: bytes that gradients keep, see backend.swift.
    """
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
    """Switch off the rounding of packed matrices in a block: what training would have reached in float32."""
    block.apply_to_modules(lambda _, m: setattr(m, "rounds", False) if isinstance(m, Matrix) else None)
    return block


def result_at(block: nn.Module, path: str) -> Packed | mx.array:
    """Give a trained parameter of a block.

    Args:
        block: a block of ``trainable``.
        path: name of the parameter in the block, such as "mlp.up_proj.weight".
    Returns:
        Packed for a matrix that was packed, else a float32 array of the parameter's shape.
    """
    *parts, leaf = path.split(".")
    for part in parts:
        block = getattr(block, part)
    return block.result() if isinstance(block, Matrix) and leaf == "weight" else block[leaf]
