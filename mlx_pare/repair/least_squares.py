"""Which inputs of a linear layer to keep, and the best weights for the kept inputs: least squares in float64.

A layer y = W x is judged on calibration data alone: inputs x, targets t. Everything here minimises
sum |W x - t|^2 + sum_i lambda_i |W_i - W0_i|^2. The ridge lambda_i of input i is a share of its own sum of squares, so
that an input of a thousand times the size of others, as language models have them, does not hold the others fast.
There are two forms. ``Problem`` holds the sums G = sum of x x^T and C = sum of x t^T, and works on H = G + lambda
[inputs, inputs]. ``Dual`` holds the tokens themselves, X [tokens, inputs], and works on K = Z Z^T + 1 [tokens, tokens]
for Z = X / sqrt(lambda). For a wide layer and few tokens K is much smaller. With A = K^-1 and R = t - X W0^T, the
weights are W0^T + Z^T A R / sqrt(lambda), and H^-1 = (1 - Z^T A Z) between two factors 1 / sqrt(lambda)
(Sherman-Morrison-Woodbury).

The last ``fixed`` inputs are no candidates. Such an input is constantly one, and its weight is the change of a bias. So
the bias compensates the mean of what is cut (FLAP, An et al. 2024, arXiv 2312.11983, by least squares).

Sources: optimal brain surgeon, Hassibi & Stork 1993; for layers, Frantar et al. 2022 (Optimal Brain Compression, arXiv
2208.11580). Units of several inputs and the ridge towards the old weights are additions of mlx-pare.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from . import elimination as by, feedback
from .factors import PANEL, TINY, WIDE, columns, factor, inverse, panels

DAMPING = 0.2  # lambda as a share of the sum of squares (benchmarks/LOG.md, "The ridge of an input")
SILENT = 1e-9  # share of the mean sum of squares: the ridge of an input that is always zero is a share of that

Indices = Sequence[int] | np.ndarray


class _Layer:
    """What both forms share."""

    weight: np.ndarray
    fixed: int

    @property
    def width(self) -> int:
        """How many inputs are candidates."""
        return self.weight.shape[1] - self.fixed

    def with_fixed(self, chosen: Indices) -> np.ndarray:
        """The numbers of the inputs that are left if these candidates are kept: they and the fixed ones."""
        return np.concatenate([np.asarray(chosen, int), np.arange(self.width, self.width + self.fixed)])

    def choose(self, size: int, count: int) -> tuple[list[int], np.ndarray]:
        """Choose units, and solve for them: the removal of a unit leaves the best weights of the others.

        Args:
            size: inputs of a unit.
            count: units to keep.

        Returns:
            The units that are left at the end of ``path``, ascending, and what ``solve`` finds for their inputs.
        """
        path = self.path(size, count)
        gone = set(path.order)
        return [unit for unit in range(self.width // size) if unit not in gone], path.weights

    def old(self, chosen: Indices) -> np.ndarray:
        """The weights [out, chosen + fixed] as they were, in their dtype."""
        return self.weight[:, self.with_fixed(chosen)]


@dataclass(frozen=True)
class Problem(_Layer):
    """Least squares from sums over tokens: H is [n, n]. n counts the fixed inputs.

    ``gram``: float64 [n, n]. ``cross``: float64 [n, out]; None: the target is what the layer gives now. ``weight``:
    what the layer has now, [out, n], float32 will do. ``damping``: lambda as a share of the diagonal of ``gram``.
    """

    gram: np.ndarray
    cross: np.ndarray | None
    weight: np.ndarray
    damping: float = DAMPING
    fixed: int = 0

    @cached_property
    def ridge(self) -> np.ndarray:
        """lambda of every input.

        Returns:
            float64 [n].
        """
        return _ridge(self.damping, self.gram.diagonal(), self.width)

    @cached_property
    def _cross(self) -> np.ndarray:
        return self.gram @ self.weight.T.astype(np.float64) if self.cross is None else self.cross

    def solve(self, chosen: Indices) -> np.ndarray:
        """Compute the best weights if only some inputs are left.

        Args:
            chosen: numbers of the candidates that are left, int [chosen].

        Returns:
            Weights of these and of the fixed inputs, float64 [out, chosen + fixed].

        Raises:
            LinAlgError: as ``factors.factor``.
        """
        from scipy.linalg import lapack

        kept = self.with_fixed(chosen)
        right = self._cross[kept] + self.ridge[kept, None] * self.weight[:, kept].T
        return lapack.dpotrs(factor(self._damped(kept)), right, lower=1)[0].T

    def error(self, weight: np.ndarray, chosen: Indices, energy: float) -> float:
        """Compute the share of the target that weights miss: sum |W x - t|^2 / sum |t|^2, without the ridge.

        Args:
            weight: weights as ``solve`` returns them, [out, chosen + fixed].
            chosen: numbers of the candidates that are left, int [chosen].
            energy: sum |t|^2.

        Returns:
            The share, at least 0.
        """
        kept, square = self.with_fixed(chosen), energy
        for part in panels(len(kept), PANEL):
            some = kept[part]
            square += np.vdot(weight @ self.gram[np.ix_(kept, some)] - 2 * self._cross[some].T, weight[:, part])
        return max(0.0, float(square / max(energy, TINY)))  # rounding may leave a little less than nothing

    def best_error(self, weight: np.ndarray, chosen: Indices, energy: float) -> float:
        """Compute what ``error`` does for weights that ``solve`` returned, without a product of matrices.

        From (G + lambda) W^T = C + lambda W0^T follows sum |W x - t|^2 = energy - tr(W C) + tr(W lambda (W0 - W)^T).

        Args:
            weight: weights as ``solve`` returns them, [out, chosen + fixed].
            chosen: numbers of the candidates that are left, int [chosen].
            energy: sum |t|^2.

        Returns:
            The share, at least 0.
        """
        kept, square = self.with_fixed(chosen), energy
        for part in panels(len(kept), PANEL):
            some, own = kept[part], weight[:, part]
            square += np.vdot((self.weight[:, some] - own) * self.ridge[some] - self._cross[some].T, own)
        return max(0.0, float(square / max(energy, TINY)))

    def path(self, size: int, count: int = 0, at: Sequence[int] = ()) -> by.Removal:
        """Remove units of ``size`` neighbouring inputs until ``count`` are left.

        Greedy: the unit that costs least goes, given that the weights of all others are solved again after its removal:
        cost = tr(B_u^T (H^-1_uu)^-1 B_u) for weights B and H = G + lambda. If there are at least 2 * by.ROUNDS units,
        several go before the costs are computed again.

        Args:
            size: inputs of a unit.
            count: units to keep.
            at: numbers of units at which the best weights are wanted; see ``elimination.greedy``.

        Returns:
            The removed units in their order with the increases of the sum that is minimised, and the weights.
        """
        from scipy.linalg import lapack

        whole = self._damped(np.arange(len(self.gram)))
        low = factor(whole)
        if self.cross is None:  # with all inputs there is nothing better than the weights themselves
            weights = np.array(self.weight.T, np.float64, order="C")
        else:
            weights = np.asfortranarray(self.cross + self.ridge[:, None] * self.weight.T)
            weights = np.ascontiguousarray(lapack.dpotrs(low, weights, lower=1, overwrite_b=1)[0])
        lapack.dpotri(low, lower=1, overwrite_c=1)
        return by.greedy(by.Inverse(whole), weights, self.width, size, count, at)

    def feedback(self, chosen: Indices) -> feedback.Feedback:
        """The feedback for the columns of ``solve(chosen)`` in their order."""
        from scipy.linalg import lapack

        kept = self.with_fixed(chosen)[::-1]  # H = R R^T with an upper R is the usual factor of H backwards
        lower = lapack.dtrtri(factor(self._damped(kept)), lower=1, overwrite_c=1)[0]
        return feedback.Backlog(lower[::-1, ::-1], len(self.weight))

    def _damped(self, kept: np.ndarray) -> np.ndarray:
        left = self.gram[np.ix_(kept, kept)]
        np.fill_diagonal(left, left.diagonal() + self.ridge[kept])
        return left


@dataclass(frozen=True)
class Dual(_Layer):
    """Least squares from the tokens, for more inputs than tokens: nothing here is [n, n]. n counts the fixed inputs.

    It has the functions of a Problem. ``inputs`` [tokens, n], ``target`` [tokens, out] and ``weight`` [out, n] may be
    float32. ``damping``: lambda as a share of the sum of squares of an input.
    """

    inputs: np.ndarray
    target: np.ndarray
    weight: np.ndarray
    damping: float = DAMPING
    fixed: int = 0

    @cached_property
    def ridge(self) -> np.ndarray:
        """lambda of every input.

        Returns:
            float64 [n].
        """
        squares = np.concatenate([np.square(part).sum(axis=0) for _, part in columns(self.inputs)])
        return _ridge(self.damping, squares, self.width)

    @cached_property
    def _root(self) -> np.ndarray:
        """What inputs are divided by, float64 [n]."""
        return np.sqrt(self.ridge)

    def solve(self, chosen: Indices) -> np.ndarray:
        """Compute the best weights if only some inputs are left.

        Args:
            chosen: numbers of the candidates that are left, int [chosen].

        Returns:
            Weights of these and of the fixed inputs, float64 [out, chosen + fixed].

        Raises:
            LinAlgError: as ``factors.factor``.
        """
        from scipy.linalg import lapack

        kept = self.with_fixed(chosen)
        short = lapack.dpotrs(factor(self._gram(kept)), self._residual(self.weight, kept), lower=1)[0].T
        solved = np.empty((len(short), len(kept)))
        for part, x in columns(self.inputs, kept):
            np.matmul(short, x, out=solved[:, part])
            solved[:, part] /= self.ridge[kept[part]]
            solved[:, part] += self.weight[:, kept[part]]
        return solved

    def choose(self, size: int, count: int) -> tuple[list[int], np.ndarray]:
        """Choose units as a Problem does. They are solved anew: this form loses digits on its way.

        Args:
            size: inputs of a unit.
            count: units to keep.

        Returns:
            The units that are left at the end of ``path``, ascending, and what ``solve`` finds for their inputs.
        """
        units, _ = super().choose(size, count)
        return units, self.solve(by.inputs_of(np.array(units, int), size))

    def error(self, weight: np.ndarray, chosen: Indices, energy: float) -> float:
        """Compute the share of the target that weights miss: sum |W x - t|^2 / sum |t|^2, without the ridge.

        Args:
            weight: weights as ``solve`` returns them, [out, chosen + fixed].
            chosen: numbers of the candidates that are left, int [chosen].
            energy: sum |t|^2.

        Returns:
            The share.
        """
        kept = self.with_fixed(chosen)
        left = self._residual(weight, kept, np.arange(len(kept)))
        return float(np.vdot(left, left) / max(energy, TINY))

    best_error = error

    def path(self, size: int, count: int = 0, at: Sequence[int] = ()) -> by.Removal:
        """Remove units as ``Problem.path`` does.

        Args:
            size: inputs of a unit.
            count: units to keep.
            at: numbers of units at which the best weights are wanted.

        Returns:
            As ``Problem.path``.
        """
        every = np.arange(self.inputs.shape[1])
        within = inverse(self._gram(every))
        short = within @ self._residual(self.weight, every)
        weights = np.empty((len(every), len(self.weight)))
        for part, z in columns(self.inputs, every, self._root):
            np.multiply(self.weight[:, part].T, self._root[part, None], out=weights[part])
            weights[part] += z.T @ short
        del short
        path = by.greedy(by.Tokens(self.inputs, within, self._root), weights, self.width, size, count, at)
        units = self.width // size
        for left, solved in [(count, path.weights), *path.solved.items()]:
            kept = sorted(set(range(units)) - set(path.order[: units - left]))
            solved /= self._root[self.with_fixed(by.inputs_of(np.array(kept, int), size))]
        return path

    def feedback(self, chosen: Indices) -> feedback.Feedback:
        """The feedback for the columns of ``solve(chosen)`` in their order."""
        kept = self.with_fixed(chosen)
        inputs = self.inputs if len(kept) == self.inputs.shape[1] else self.inputs[:, kept]  # no copy if all are kept
        return feedback.Ahead(by.Tokens(inputs, inverse(self._gram(kept)), self._root[kept]), len(self.weight))

    def _gram(self, kept: np.ndarray) -> np.ndarray:
        """K [tokens, tokens] of these inputs, float64."""
        gram = np.zeros((len(self.inputs), len(self.inputs)))
        for _, z in columns(self.inputs, kept, self._root):
            gram += z @ z.T
        np.fill_diagonal(gram, gram.diagonal() + 1)
        return gram

    def _residual(self, weight: np.ndarray, kept: np.ndarray, own: np.ndarray | None = None) -> np.ndarray:
        """target - X W^T over these inputs, float64 [tokens, out].

        ``own``: which columns of ``weight`` belong to these inputs; None: those of the same numbers.
        """
        left = self.target.astype(np.float64)
        own = kept if own is None else own
        for part, x in columns(self.inputs, kept):
            left -= x @ weight[:, own[part]].T
        return left


def _ridge(damping: float, squares: np.ndarray, width: int) -> np.ndarray:
    """lambda of inputs from their sums of squares [n], of which the first ``width`` are candidates."""
    return damping * np.maximum(squares, max(SILENT * float(squares[:width].mean()), TINY))


# ---- what it takes ----


@dataclass(frozen=True)
class Cost:
    """What it takes to choose the inputs of one matrix and solve it if half of the inputs are removed.

    ``dual``: whether in the form Dual. ``nbytes``: bytes of memory. ``flops``: operations.
    """

    dual: bool
    nbytes: int
    flops: float


def cost(tokens: int, inputs: int, outputs: int) -> Cost:
    """Estimate what a matrix takes, in the form that is used: Dual if there are fewer tokens than inputs, else Problem.

    Args:
        tokens: number of tokens.
        inputs: number of inputs, without the fixed ones.
        outputs: number of outputs.

    Returns:
        Which form, bytes and operations.
    """
    through = inputs * outputs
    if tokens >= inputs:  # Gram matrix and inverse; cross terms, weights and new ones
        nbytes = 16 * inputs**2 + 28 * through + 24 * by.LAZY * inputs
        return Cost(False, nbytes, 2.0 * inputs**3 + 3.0 * inputs * through)
    batch = max(1, inputs // by.ROUNDS)
    nbytes = (  # tokens, targets and residuals; weights and new ones; two K; a round of removals
        4 * tokens * inputs + 20 * tokens * outputs + 12 * through + 16 * tokens**2
        + 32 * batch * inputs + 8 * WIDE * (tokens + outputs)
    )  # fmt: skip
    flops = 1.0 * tokens**3 + 4.0 * tokens**2 * inputs + 4.0 * tokens * through + 1.0 * inputs**2 * (tokens + outputs)
    return Cost(True, nbytes, flops)
