"""Removal of inputs from a least-squares problem, one after the other: H^-1 in two forms, greedy choice, feedback.

H = X^T X + lambda for inputs X [tokens, n]. ``Inverse`` holds H^-1. ``Tokens`` holds X and A = (X X^T + lambda)^-1.
``greedy`` removes units for good (optimal brain surgeon). ``Backlog`` and ``Ahead`` carry the errors of the columns of
a weight matrix that are fixed to those that follow (GPTQ, Frantar et al. 2022, arXiv 2210.17323). Its update is the
same removal. All arithmetic is float64. Symmetric matrices are factored, inverted and updated in their own memory.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

import numpy as np

ROUNDS = 256  # the costs of the units are computed again after every 256th part of them is removed
WIDE = 2048  # columns of the tokens that are float64 at a time
PANEL = 256  # rows of a square matrix that are copied at a time
LAZY = 64  # inputs whose removal waits: the inverse is updated once for all of them
TINY = 1e-30
ROUNDING = 1e-7  # relative error of a Gram matrix whose products were computed in float32


class Feedback(Protocol):
    """How columns that are not reached yet compensate the errors of columns that are fixed. Groups come in order."""

    def group(self, start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
        """Return what the next group of columns needs to know.

        Args:
            start: first column of the group.
            stop: the column after its last.

        Returns:
            Upper factor U, float64 [n, n] for n columns: U^T U is their block of H^-1 of the columns that are left.
            And what earlier errors add to the weights of these columns, float64 [out, n].
        """

    def missed(self, errors: np.ndarray) -> None:
        """Note the errors of the group that was asked for last.

        Args:
            errors: wanted minus chosen weights, divided by the diagonal of U, float64 [out, n].
        """


# ---- removing units ----


class Inverse:
    """H^-1 itself [n, n], updated late: the sum of v^T v over the rows v of ``waiting`` [removed, n] is still in it."""

    def __init__(self, inverse: np.ndarray):
        self.inverse, self.waiting = inverse, np.empty((0, len(inverse)))

    def rows(self, gone: np.ndarray) -> np.ndarray:
        """Compute rows of H^-1 of the inputs that are left.

        Args:
            gone: numbers of the inputs that are removed next, int [s].

        Returns:
            Their rows, float64 [s, n].
        """
        return self.inverse[gone] - self.waiting[:, gone].T @ self.waiting

    def remove(self, half: np.ndarray, low: np.ndarray) -> None:
        """Remove the inputs whose rows ``rows`` returned last.

        Args:
            half: low^-1 times these rows, float64 [s, n].
            low: lower Cholesky factor of the block of these inputs, float64 [s, s]; not used in this form.
        """
        self.waiting = np.concatenate([self.waiting, half])
        if len(self.waiting) >= LAZY:
            _add(self.inverse, -1, self.waiting, self.waiting)
            self.waiting = self.waiting[:0]

    def own_blocks(self, width: int, size: int) -> np.ndarray:
        """Copy the diagonal blocks of H^-1, one for each unit. Call it before anything is removed.

        Args:
            width: number of inputs that are candidates, the first ones.
            size: inputs of a unit.

        Returns:
            float64 [units, size, size].
        """
        if size == 1:
            return self.inverse.diagonal()[:width].reshape(-1, 1, 1).copy()
        return np.stack([self.inverse[part, part] for part in panels(width, size)])


class Tokens:
    """H^-1 = (1 - X^T A X) / lambda, computed from A [tokens, tokens].

    ``inputs``: X [tokens, n], float32 or float64. ``within``: A, float64, changed in place. ``ridge``: lambda.
    """

    def __init__(self, inputs: np.ndarray, within: np.ndarray, ridge: float):
        self.inputs, self.within, self.ridge = inputs, within, ridge
        self.seen = within[:0]  # X_S^T A of the inputs S that ``block`` or ``rows`` was asked for last

    def block(self, columns: slice) -> tuple[np.ndarray, np.ndarray]:
        """Return the columns of some inputs, which are removed next, and their block of H^-1.

        Args:
            columns: which inputs, s of them.

        Returns:
            X_S, float64 [tokens, s], and their block of H^-1, float64 [s, s].
        """
        x = self.inputs[:, columns].astype(np.float64)
        self.seen = x.T @ self.within
        return x, (np.eye(x.shape[1]) - self.seen @ x) / self.ridge

    def rows(self, gone: np.ndarray) -> np.ndarray:
        """Compute rows of H^-1 of the inputs that are left.

        Args:
            gone: numbers of the inputs that are removed next, int [s].

        Returns:
            Their rows, float64 [s, n].
        """
        self.seen = self.inputs[:, gone].T.astype(np.float64) @ self.within
        rows = np.empty((len(gone), self.inputs.shape[1]))
        for part, x in columns(self.inputs):
            rows[:, part] = self.seen @ x
        rows /= -self.ridge
        rows[np.arange(len(gone)), gone] += 1 / self.ridge
        return rows

    def remove(self, half: np.ndarray, low: np.ndarray) -> np.ndarray:
        """Remove the inputs that ``rows`` or ``block`` was asked for last: K = X X^T + lambda loses their part.

        The Woodbury formula updates A.

        Args:
            half: not used in this form; there because ``Inverse.remove`` needs it.
            low: lower Cholesky factor of the block of these inputs, float64 [s, s].

        Returns:
            low^-1 X_S^T A / lambda, with A as it was before, float64 [s, tokens].
        """
        seen = _lower_solve(low, self.seen) / self.ridge
        _add(self.within, self.ridge, seen, seen)
        return seen

    def own_blocks(self, width: int, size: int) -> np.ndarray:
        """Compute the diagonal blocks of H^-1, one for each unit.

        Args:
            width: number of inputs that are candidates, the first ones.
            size: inputs of a unit.

        Returns:
            float64 [units, size, size].
        """
        blocks = np.empty((width // size, size, size))
        for part in panels(width, max(1, WIDE // size) * size):
            x = self.inputs[:, part].T.astype(np.float64)
            parts = (len(x) // size, size, -1)
            through = (x @ self.within).reshape(parts)
            blocks[part.start // size :][: len(through)] = through @ x.reshape(parts).transpose(0, 2, 1)
        return (np.eye(size) - blocks) / self.ridge


def greedy(
    state: Inverse | Tokens, weights: np.ndarray, width: int, size: int, count: int
) -> tuple[list[int], list[float]]:
    """Remove the unit that costs least, again and again, until ``count`` units are left.

    ``Problem.path`` says what a unit costs. If there are at least 2 * ROUNDS units, several go at once.

    Args:
        state: H^-1 with all inputs; changed in place.
        weights: the best weights with all inputs, float64 [n, out]; changed in place.
        width: number of inputs that are candidates, the first ones of n.
        size: inputs of a unit; neighbours.
        count: units to keep.

    Returns:
        The removed units in their order, and for each the increase of the sum that is minimised.

    Raises:
        LinAlgError: as ``factor``.
    """
    blocks, squares = state.own_blocks(width, size), np.einsum("no,no->n", weights, weights)
    alive = np.arange(len(blocks))
    order: list[int] = []
    prices: list[float] = []
    batch = max(1, len(alive) // ROUNDS)
    while len(alive) > count:
        costs = _costs(blocks, weights, squares, alive)
        least = np.argsort(costs, kind="stable")[: min(batch, len(alive) - count)]
        order += alive[least].tolist()
        gone = (alive[least][:, None] * size + np.arange(size)).reshape(-1)
        rows = state.rows(gone)
        low = factor(rows[:, gone])
        half = _lower_solve(low, rows)
        change = _lower_solve(low, weights[gone])
        prices += np.square(change).reshape(len(least), -1).sum(axis=1).tolist()  # of each, given those before it
        _add(weights, -1, half, change)
        np.einsum("no,no->n", weights, weights, out=squares)
        if size == 1:
            blocks[:, 0, 0] -= np.einsum("sn,sn->n", half[:, :width], half[:, :width])
        else:
            for unit, part in enumerate(panels(width, size)):
                blocks[unit] -= half[:, part].T @ half[:, part]
        state.remove(half, low)
        alive = np.delete(alive, least)
    return order, prices


def _costs(blocks: np.ndarray, weights: np.ndarray, squares: np.ndarray, alive: np.ndarray) -> np.ndarray:
    """What the removal of each remaining unit alone would cost, float64 [alive]."""
    size = blocks.shape[1]
    if size == 1:
        return squares[alive] / np.maximum(blocks[alive, 0, 0], TINY)
    halves = (_lower_solve(factor(blocks[unit].copy()), weights[unit * size :][:size]) for unit in alive)
    return np.array([np.vdot(half, half) for half in halves])


# ---- error feedback ----


class Backlog:
    """The feedback of a Problem: the upper factor of the whole inverse [n, n], and all errors so far [out, n]."""

    def __init__(self, upper: np.ndarray, outputs: int):
        self.upper, self.errors, self.part = upper, np.empty((outputs, len(upper))), slice(0, 0)

    def group(self, start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
        """Return what the next group of columns needs to know; see ``Feedback.group``.

        Args:
            start: first column of the group.
            stop: the column after its last.

        Returns:
            U, float64 [n, n], and what earlier errors add to the weights, float64 [out, n].
        """
        self.part = slice(start, stop)
        return np.triu(self.upper[self.part, self.part]), -(self.errors[:, :start] @ self.upper[:start, self.part])

    def missed(self, errors: np.ndarray) -> None:
        """Note the errors of the group that was asked for last.

        Args:
            errors: see ``Feedback.missed``, float64 [out, n].
        """
        self.errors[:, self.part] = errors


class Ahead:
    """The feedback of a Dual: fixed columns are removed from K, and their errors are summed per token [out, tokens]."""

    def __init__(self, state: Tokens, outputs: int):
        self.state, self.due, self.low = state, np.zeros((outputs, len(state.within))), np.empty((0, 0))

    def group(self, start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
        """Return what the next group of columns needs to know; see ``Feedback.group``.

        Args:
            start: first column of the group.
            stop: the column after its last.

        Returns:
            U, float64 [n, n], and what earlier errors add to the weights, float64 [out, n].
        """
        x, block = self.state.block(slice(start, stop))
        self.low = factor(block)
        return np.triu(self.low.T), self.due @ x

    def missed(self, errors: np.ndarray) -> None:
        """Remove the columns of the group that was asked for last, and note their errors.

        Args:
            errors: see ``Feedback.missed``, float64 [out, n].
        """
        self.due += errors @ self.state.remove(errors, self.low)


# ---- linear algebra in place ----


def panels(length: int, step: int) -> Iterator[slice]:
    """Yield slices of ``step`` over a length; the last may be shorter."""
    for start in range(0, length, step):
        yield slice(start, min(start + step, length))


def columns(inputs: np.ndarray, kept: np.ndarray | None = None) -> Iterator[tuple[slice, np.ndarray]]:
    """Yield columns of the tokens, at most WIDE at a time.

    Args:
        inputs: X, float32 or float64 [tokens, n].
        kept: numbers of the columns to yield, int [kept]; None: all.

    Returns:
        Pairs: which of the kept columns these are (a slice), and their values, float64 [tokens, at most WIDE].
    """
    for part in panels(inputs.shape[1] if kept is None else len(kept), WIDE):
        yield part, inputs[:, part if kept is None else kept[part]].astype(np.float64)


def factor(matrix: np.ndarray) -> np.ndarray:
    """Compute the lower Cholesky factor of a symmetric matrix in the memory of that matrix.

    If rounding left the matrix indefinite, its diagonal grows by the share ROUNDING, then by ten times as much, and so
    on, until the factorization works.

    Args:
        matrix: float64 [n, n] in C order; overwritten.

    Returns:
        The factor, float64 [n, n]. What lies above its diagonal has no meaning.

    Raises:
        LinAlgError: the matrix is not positive definite, even with a tenth more on its diagonal.
    """
    from scipy.linalg import lapack

    diagonal, more = matrix.diagonal().copy(), 0.0
    while more < 1:
        low, failed = lapack.dpotrf(matrix.T, lower=1, clean=0, overwrite_a=1)
        if not failed:
            return low
        more = max(ROUNDING, 10 * more)
        _mirror(matrix.T)
        np.fill_diagonal(matrix, diagonal * (1 + more))
    raise np.linalg.LinAlgError("a Gram matrix is not positive definite")


def inverse(matrix: np.ndarray) -> np.ndarray:
    """Invert a positive definite matrix in its own memory.

    Args:
        matrix: float64 [n, n] in C order; overwritten.

    Returns:
        The inverse, float64 [n, n]: the same array.

    Raises:
        LinAlgError: as ``factor``.
    """
    from scipy.linalg import lapack

    lapack.dpotri(factor(matrix), lower=1, overwrite_c=1)
    _mirror(matrix)
    return matrix


def _mirror(matrix: np.ndarray) -> None:
    """Copy what is above the diagonal to the places below it."""
    for rows in panels(len(matrix), PANEL):
        matrix[rows, : rows.start] = matrix[: rows.start, rows].T
        own = np.triu(matrix[rows, rows], 1)
        matrix[rows, rows] = own + own.T + np.diag(matrix[rows, rows].diagonal())


def _lower_solve(low: np.ndarray, right: np.ndarray) -> np.ndarray:
    """low^-1 right, in C order."""
    from scipy.linalg import solve_triangular

    return np.ascontiguousarray(solve_triangular(low, right, lower=True, check_finite=False))


def _add(into: np.ndarray, scale: float, left: np.ndarray, right: np.ndarray) -> None:
    """into += scale left^T right, all in C order. In place, because the product alone would be as large as ``into``."""
    from scipy.linalg import blas

    blas.dgemm(scale, right.T, left.T, beta=1.0, c=into.T, trans_b=1, overwrite_c=1)
