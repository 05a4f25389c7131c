"""A matrix that writes to the residual stream (o_proj, down_proj): seen at work, solved anew, replaced."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from functools import cache
from itertools import pairwise
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from ..base.errors import PareError
from ..model.checkpoint import Checkpoint
from ..stream import walk as stream
from ..stream.taps import replace_module
from ..tensors.packed import dense_weight
from .least_squares import Cost, Dual, Problem, cost, damping_for


class Site:
    """Stands in for the matrix in its block: passes through, remembers, stops the block there, or is replaced."""

    def __init__(self, module: Any):
        self.module = module
        self.remembering = False  # its inputs are remembered,
        self.listening = False  # ... and nothing behind it is computed
        self.inputs: list[mx.array] = []  # what was remembered, one array per micro-batch
        self.outputs: list[mx.array] | None = None  # what it gave, where somebody wants to know
        self.new: tuple[mx.array, mx.array] | None = None  # weight [out, in], zero at what is cut; bias
        self.gone = False  # nothing feeds it any more: it gives zero, without its bias
        self.replay: Iterator[mx.array] | None = None  # inputs that are known already

    @classmethod
    def put(cls, block: Any, path: str) -> Site:
        """A site in the place of the module with this path in a block."""
        return replace_module(block, path, cls)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.module, name)

    def __call__(self, x: mx.array) -> mx.array:
        if self.listening:
            mx.eval(x)
            self.inputs.append(x)
            raise stream.Enough
        if self.new is not None:
            return self._replaced(x)
        if self.remembering:
            self.inputs.append(x)
        y = self.module(x)
        if self.outputs is not None:
            self.outputs.append(y)
        return mx.zeros_like(y) if self.gone else y

    def shorten(self, part: nn.Module) -> None:
        """While the inputs of this matrix are known, nothing else of the part of the block that ends in it is
        computed."""
        part.ends_in = self  # not in the class, which is garbage only when somebody collects it
        part.__class__ = _shortened(type(part))

    def _replaced(self, x: mx.array) -> mx.array:
        """What the new matrix gives for its inputs: multiplying by zeros is faster than gathering the kept ones."""
        weight, bias = self.new
        return (x.astype(mx.float32) @ weight.T + bias).astype(x.dtype)

    @property
    def inner(self) -> Any:
        """The stock layer itself."""
        return getattr(self.module, "inner", self.module)

    @property
    def biased(self) -> bool:
        """Whether it has a bias."""
        return "bias" in self.inner

    @property
    def bias(self) -> mx.array:
        """Its bias, zero where it has none, float32."""
        return self.inner.bias.astype(mx.float32) if self.biased else mx.zeros((1,))

    def own(self) -> mx.array:
        """Its own weight [out, in], float32."""
        return dense_weight(self.inner)

    def weight(self) -> np.ndarray:
        """The same for a problem: with a bias a column of zeros behind it, for how much that changes."""
        own = np.array(self.own())
        return np.pad(own, ((0, 0), (0, 1))) if self.biased else own

    def made_of(self, solved: np.ndarray, columns: np.ndarray) -> tuple[mx.array, mx.array]:
        """Weight [out, in], zero but for these columns, and bias, of what a problem's ``solve`` gave for them."""
        weight, bias = np.zeros(self.own().shape, np.float32), self.bias
        weight[:, columns] = solved[:, : len(columns)]
        if self.biased:
            bias = bias + mx.array(solved[:, -1].astype(np.float32))
        return mx.array(weight), bias

    def problem(
        self, target: Iterable[mx.array] | None, mask: np.ndarray, damping: float | None = None
    ) -> tuple[Problem | Dual, float]:
        """The least squares of the remembered inputs with ``target`` (one array per micro-batch; None: what the matrix
        gives for them), in the form that takes less, and the sum of squares of the target. ``mask`` [rows, length]:
        what counts; ``damping`` None: by how many tokens there are. Raises PareError for inputs that are not finite."""
        weight, fixed = self.weight(), int(self.biased)
        tokens, width = int(mask.sum()), weight.shape[1] - fixed
        damping = damping_for(tokens, width) if damping is None else damping
        pieces = _text(self.inputs, target, parts(mask, self.inputs), self.bias, fixed)
        if cost(tokens, width, len(weight)).dual:
            inputs, targets = zip(*pieces, strict=True)
            inputs = np.concatenate(inputs)
            targets = inputs @ weight.T if target is None else np.concatenate(targets)
            energy = float(np.square(targets, dtype=np.float64).sum())
            _check_finite(energy + float(np.abs(inputs).max()))
            return Dual(inputs, targets, weight, damping, fixed), energy
        gram, cross, energy = _sums(pieces)
        if target is None:
            cross = gram @ weight.T.astype(np.float64)
            energy = float(np.vdot(weight.T, cross))
        _check_finite(energy + gram.trace() + cross.sum())
        return Problem(gram, cross, weight, damping, fixed), energy


@cache
def _shortened(cls: type) -> type:
    """The class of a part of a block that may leave out all but its last matrix."""

    def call(part: nn.Module, *args: Any, **kwargs: Any) -> mx.array:
        site = part.ends_in
        if site.replay is None or site.new is None or site.listening:
            return cls.__call__(part, *args, **kwargs)
        return site._replaced(next(site.replay))

    return type(cls.__name__, (cls,), {"__call__": call})


def solve_costs(checkpoint: Checkpoint, tokens: int) -> list[Cost]:
    """What solving o_proj and down_proj of the first layer takes, for so many tokens."""
    sizes = checkpoint.arch.layer_sizes(0)
    widths = sizes["kv_head"] * sizes["group"] * sizes["head_dim"], sizes["ffn"]
    return [cost(tokens, width, sizes["hidden"]) for width in widths]


def parts(joined: Any, like: Sequence[mx.array]) -> Iterator[Any]:
    """The rows of each micro-batch of ``like``."""
    for start, stop in pairwise(np.cumsum([0, *(x.shape[0] for x in like)]).tolist()):
        yield joined[start:stop]


def _text(
    inputs: Sequence[mx.array],
    target: Iterable[mx.array] | None,
    mask: Iterable[np.ndarray],
    bias: mx.array,
    fixed: int,
) -> Iterator[tuple[mx.array, mx.array | None]]:
    """Inputs [tokens, n + fixed], ones behind the others, and targets without the bias [tokens, out] of a micro-batch:
    the text alone, float32."""
    targets = [None] * len(inputs) if target is None else target
    for x, t, m in zip(inputs, targets, mask, strict=True):
        if not m.any():
            continue
        text = None if m.all() else mx.array(np.flatnonzero(m))
        x, t = (None if a is None else _chosen(a, text) for a in (x, t if t is None else t - bias))
        yield (mx.concatenate([x, mx.ones((len(x), fixed))], axis=1) if fixed else x), t


def _chosen(array: mx.array, text: mx.array | None) -> mx.array:
    flat = array.astype(mx.float32).reshape(-1, array.shape[-1])
    return flat if text is None else flat[text]


def _sums(pieces: Iterable[tuple[mx.array, mx.array | None]]) -> tuple[np.ndarray, np.ndarray | None, float]:
    """Gram matrix [n, n], cross terms [n, out] and sum of squares of the target; products of a micro-batch in float32,
    their sums in float64."""
    totals: list[np.ndarray] = []
    energy = 0.0
    for x, t in pieces:
        products = [x.T @ x] if t is None else [x.T @ x, x.T @ t]
        square = mx.square(t).sum() if t is not None else mx.zeros(())
        mx.eval(products, square)
        totals = totals or [np.zeros(product.shape) for product in products]
        with np.errstate(all="ignore"):  # what is not finite is told at the end
            for total, product in zip(totals, products, strict=True):
                total += np.asarray(product)
        energy += square.item()
    return totals[0], totals[1] if len(totals) > 1 else None, energy


def _check_finite(total: float) -> None:
    """Raises PareError unless it is a number."""
    if not np.isfinite(total):
        raise PareError("the model computes infinite numbers on this text", "use other text, or --no-reconstruct")
