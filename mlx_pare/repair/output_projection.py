"""A matrix that writes to the residual stream (o_proj, down_proj): it is watched, solved again and replaced."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from ..arch import Architecture
from ..arch.axes import length
from ..base.errors import PareError
from ..model.checkpoint import Checkpoint
from ..stream import walk as stream
from ..stream.taps import replace_module
from ..tensors.packed import Packed, dense_weight
from .factors import mirror, panels
from .least_squares import DAMPING, Cost, Dual, Problem, cost

SUMMED = 8192  # tokens of one float32 product: more would round more than BLAS does by itself
STRIPS, NARROW = 8, 128  # of a Gram matrix: how many at most, and inputs of each at least


class Site:
    """Stands in for the matrix in its block: passes inputs on, remembers them, stops the block, or replaces it."""

    def __init__(self, module: Any):
        self.module = module
        self.remembering = False  # whether its inputs are remembered
        self.listening = False  # whether its inputs are remembered and the block stops there
        self.inputs: list[mx.array] = []  # remembered inputs [rows, length, in], one array per micro-batch
        self.norms: list[mx.array] = []  # sum of squares of its outputs, bias aside [rows, length], if it remembers
        self.outputs: list[mx.array] | None = None  # its outputs [rows, length, out]; None: they are not remembered
        self.new: tuple[mx.array, mx.array] | None = None  # weight [out, in], zero at what is cut; bias
        self.gone = False  # nothing feeds it any more: it returns zero, without its bias
        self.replay: Iterator[mx.array] | None = None  # inputs that are known already

    @classmethod
    def put(cls, block: Any, path: str) -> Site:
        """Put a site in the place of the module with this path in a block, and return the site."""
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
        y = self.module(x)
        if self.remembering:
            self.inputs.append(x)
            self.norms.append(mx.square(y.astype(mx.float32) - self.bias).sum(axis=-1))
        if self.outputs is not None:
            self.outputs.append(y)
        return mx.zeros_like(y) if self.gone else y

    def shorten(self, part: nn.Module) -> None:
        """Make a part of the block that ends in this matrix compute the matrix alone while its inputs are known."""
        part.ends_in = self  # not in the class, which outlives the block
        part.__class__ = _shortened(type(part))

    def _replaced(self, x: mx.array) -> mx.array:
        """The output of the new matrix. Multiplying by zeros is faster than gathering the kept inputs."""
        weight, bias = self.new
        return (x.astype(mx.float32) @ weight.T + bias).astype(x.dtype)

    @property
    def inner(self) -> Any:
        """The stock layer itself, without what is around it on the CPU backend."""
        return getattr(self.module, "inner", self.module)

    @property
    def biased(self) -> bool:
        """Whether the matrix has a bias."""
        return "bias" in self.inner

    @property
    def bias(self) -> mx.array:
        """Return the bias of the matrix.

        Returns:
            float32 [out]; a single zero [1] if it has none.
        """
        return self.inner.bias.astype(mx.float32) if self.biased else mx.zeros((1,))

    def own(self) -> mx.array:
        """Return the weight of the matrix in the original.

        Returns:
            float32 [out, in].
        """
        return dense_weight(self.inner)

    def weight(self) -> np.ndarray:
        """Return the same weight as a problem needs it: a bias adds a column of zeros, which stands for its change.

        Returns:
            float32 [out, in + 1] if there is a bias, else [out, in].
        """
        own = np.array(self.own())
        return np.pad(own, ((0, 0), (0, 1))) if self.biased else own

    def made_of(self, solved: np.ndarray, columns: np.ndarray) -> tuple[mx.array, mx.array]:
        """Turn solved columns into a whole matrix.

        Args:
            solved: what ``solve`` of a problem returned, float64 [out, kept + fixed].
            columns: numbers of the kept inputs, int [kept].

        Returns:
            Weight, float32 [out, in], zero outside of these columns, and bias, float32 [out] or a single zero [1].
        """
        weight, bias = np.zeros(self.own().shape, np.float32), self.bias
        weight[:, columns] = solved[:, : len(columns)]
        if self.biased:
            bias = bias + mx.array(solved[:, -1].astype(np.float32))
        return mx.array(weight), bias

    def problem(
        self, target: Iterable[mx.array] | None, mask: np.ndarray, damping: float | None = None
    ) -> tuple[Problem | Dual, float]:
        """Set up the least squares of the remembered inputs, in the form that ``cost`` prefers.

        Args:
            target: what the matrix should give, bias included, one array [rows, length, out] per micro-batch. None:
                what it gives itself for these inputs.
            mask: which tokens count, bool [all rows, length].
            damping: see least_squares; None: DAMPING.

        Returns:
            The problem, and the sum of squares of the target without the bias.

        Raises:
            PareError: inputs or targets are not finite.
        """
        weight, fixed = self.weight(), int(self.biased)
        tokens, width = int(mask.sum()), weight.shape[1] - fixed
        damping = DAMPING if damping is None else damping
        pieces = _text(self.inputs, target, parts(mask, self.inputs), self.bias, fixed)
        if cost(tokens, width, len(weight)).dual:
            inputs, targets = zip(*pieces, strict=True)
            inputs = np.concatenate(inputs)
            targets = inputs @ weight.T if target is None else np.concatenate(targets)
            energy = float(np.square(targets, dtype=np.float64).sum())
            _check_finite(energy + float(np.abs(inputs).max()))
            return Dual(inputs, targets, weight, damping, fixed), energy
        gram, cross, energy = _sums(pieces)
        mx.clear_cache()  # a GPU would keep the last product, while LAPACK needs several times as much outside of MLX
        if target is None:
            energy = sum(
                float(np.array(n)[m].sum(dtype=np.float64))
                for n, m in zip(self.norms, parts(mask, self.inputs), strict=True)
            )
        _check_finite(energy + gram.trace() + (0.0 if cross is None else cross.sum()))
        return Problem(gram, cross, weight, damping, fixed), energy


@dataclass
class Made:
    """A solved matrix [out, kept] and its errors: before, after, and packed if it is."""

    errors: list[float]
    weight: mx.array
    packed: Packed | None = None
    rounding: float = 0.0
    bias: mx.array | None = None

    def arrays(self, role: str) -> dict[str, mx.array]:
        """Name what the repair file holds of this matrix.

        Args:
            role: of the matrix, such as "down_proj".
        Returns:
            The weight, or words, scales and biases, and the bias if it has changed, float32 [out].
        """
        found = {role: self.weight}
        if self.packed:
            found = {f"{role}.{name}": array for name, array in self.packed.arrays.items()}
        return found if self.bias is None else {**found, f"{role}_bias": self.bias}

    def about(self) -> dict[str, Any]:
        """Describe how the matrix is packed, with the relative error of the packing as prune computes it."""
        return {**self.packed.packing.as_config(), "error": self.rounding}


@cache
def _shortened(cls: type) -> type:
    """Make the class of a part of a block that may compute its last matrix alone."""

    def call(part: nn.Module, *args: Any, **kwargs: Any) -> mx.array:
        site = part.ends_in
        if site.replay is None or site.new is None or site.listening:
            return cls.__call__(part, *args, **kwargs)
        return site._replaced(next(site.replay))

    return type(cls.__name__, (cls,), {"__call__": call})


def solve_costs(checkpoint: Checkpoint, tokens: int) -> list[Cost]:
    """Estimate what solving the two matrices of the widest layer takes for this number of tokens."""
    return [cost(tokens, width, checkpoint.arch.sizes["hidden"]) for width in inputs_of_writers(checkpoint.arch)]


def inputs_of_writers(arch: Architecture) -> tuple[int, int]:
    """The number of inputs of the two matrices that write to the stream, in the widest layer that has them."""
    widest = [1, 1]
    for layer in range(len(arch.layers)):
        for which, role in enumerate(arch.writers(layer)):
            if arch.has(layer, role):
                inputs = length(arch.row(layer, role)[0].dims[-1], arch.layer_sizes(layer))
                widest[which] = max(widest[which], inputs)
    return widest[0], widest[1]


def parts(joined: Any, like: Sequence[mx.array]) -> Iterator[Any]:
    """Split rows into micro-batches of the same sizes as others.

    Args:
        joined: anything with slices of rows, such as an array [all rows, ...] or a Spool.
        like: one array per micro-batch, [rows, ...].

    Returns:
        The rows of each micro-batch in turn.
    """
    for start, stop in pairwise(np.cumsum([0, *(x.shape[0] for x in like)]).tolist()):
        yield joined[start:stop]


def _text(
    inputs: Sequence[mx.array],
    target: Iterable[mx.array] | None,
    mask: Iterable[np.ndarray],
    bias: mx.array,
    fixed: int,
) -> Iterator[tuple[mx.array, mx.array | None]]:
    """Yield inputs [tokens, n + fixed] and targets without the bias [tokens, out] of every micro-batch, float32.

    Padding is left out. The fixed input, a column of ones, comes last.
    """
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
    """Return the Gram matrix [n, n], the cross terms [n, out] and the sum of squares of the target.

    Products are float32, over at most SUMMED tokens; their sums are float64. Without a target there are no cross terms
    (None).
    """
    sums, energy = None, 0.0
    for x, t in pieces:
        sums = sums or _Sums(x.shape[1], 0 if t is None else t.shape[1])
        squares = mx.square(t).sum(axis=-1) if t is not None else mx.zeros(())
        sums.add(x, t, squares)
        energy += float(np.asarray(squares).sum(dtype=np.float64))  # float32 sums of all numbers lose four digits
    return *sums.finish(), energy


class _Sums:
    """Gram matrix and cross terms while they grow. Of the Gram matrix only the rows up to the diagonal are computed, in
    STRIPS strips, which nearly halves the work."""

    def __init__(self, inputs: int, outputs: int):
        self.gram, self.cross = np.zeros((inputs, inputs)), np.zeros((inputs, outputs)) if outputs else None
        self.strips = list(panels(inputs, max(NARROW, -(-inputs // STRIPS))))
        self.made: list[mx.array] = []
        self.tokens = 0

    def add(self, x: mx.array, t: mx.array | None, other: mx.array) -> None:
        """Add tokens, x [tokens, n] and t [tokens, out]; evaluate another array with them."""
        if self.tokens + len(x) > SUMMED:
            self._flush()
        columns = mx.contiguous(x.T)
        pairs = [(columns[strip], columns[: strip.stop].T) for strip in self.strips]
        pairs += [] if t is None else [(columns, t)]
        if self.made:
            self.made = [mx.addmm(made, *pair) for made, pair in zip(self.made, pairs, strict=True)]
        else:
            self.made = [left @ right for left, right in pairs]
        mx.eval(self.made, other)
        self.tokens += len(x)

    def _flush(self) -> None:
        """Add what was made to the sums in float64."""
        with np.errstate(all="ignore"):  # ``_check_finite`` reports infinite numbers at the end
            for strip, made in zip(self.strips, self.made, strict=False):
                self.gram[strip, : strip.stop] += np.asarray(made)
            if self.cross is not None and self.made:
                self.cross += np.asarray(self.made[-1])
        self.made, self.tokens = [], 0

    def finish(self) -> tuple[np.ndarray, np.ndarray | None]:
        """Return the Gram matrix with both halves, and the cross terms."""
        self._flush()
        mirror(self.gram.T)
        return self.gram, self.cross


def _check_finite(total: float) -> None:
    """Raise PareError unless it is finite."""
    if not np.isfinite(total):
        raise PareError("the model computes infinite numbers on this text", "use other text, or --no-reconstruct")
