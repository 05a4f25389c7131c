"""Taking inputs out of a least-squares problem one after the other: H^-1 in two forms, greedy choice, error feedback.

H = X^T X + lambda for inputs X [tokens, n]. ``Inverse`` holds H^-1, ``Tokens`` the tokens and A = (X X^T + lambda)^-1.
``greedy`` drops units for good (optimal brain surgeon); ``Backlog`` and ``Ahead`` fix the columns of a weight matrix in
order and tell those that follow (GPTQ, Frantar et al. 2022, arXiv 2210.17323, whose update is the same removal).
Everything float64; symmetric matrices are worked on in their own memory.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

import numpy as np

ROUNDS = 256  # a unit's cost is looked at again after every 256th part of them has gone
WIDE = 2048  # columns of the tokens that are float64 at a time
PANEL = 256  # rows of a square matrix that are copied at a time
LAZY = 64  # inputs whose removal waits: the inverse is touched once for all of them
TINY = 1e-30
ROUNDING = 1e-7  # of a Gram matrix whose products were made in float32


class Feedback(Protocol):
    """How columns that are not reached yet make up for the errors of those that are fixed; groups come in order."""

    def group(self, start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
        """For these columns: the upper factor U [n, n] of their block of the inverse of what is left, U^T U, and what
        earlier errors add to their weights, [out, n]."""

    def missed(self, errors: np.ndarray) -> None:
        """Errors [out, n] of the group asked for last, what was wanted minus what was taken, over U's diagonal."""


# ---- removing units ----


class Inverse:
    """H^-1 itself, down-dated late: ``waiting`` [removed, n] are rows v of what H^-1 is less by, sum of v^T v."""

    def __init__(self, inverse: np.ndarray):
        self.inverse, self.waiting = inverse, np.empty((0, len(inverse)))

    def rows(self, gone: np.ndarray) -> np.ndarray:
        """Rows of H^-1 as it is now."""
        return self.inverse[gone] - self.waiting[:, gone].T @ self.waiting

    def remove(self, half: np.ndarray, low: np.ndarray) -> None:
        """What ``rows`` gave last is removed; ``low``: lower factor of its own block, ``half`` = low^-1 rows."""
        self.waiting = np.concatenate([self.waiting, half])
        if len(self.waiting) >= LAZY:
            _add(self.inverse, -1, self.waiting, self.waiting)
            self.waiting = self.waiting[:0]

    def own_blocks(self, width: int, size: int) -> np.ndarray:
        """The blocks of H^-1 on its diagonal, [units, size, size]."""
        if size == 1:
            return self.inverse.diagonal()[:width].reshape(-1, 1, 1).copy()
        return np.stack([self.inverse[part, part] for part in panels(width, size)])


class Tokens:
    """H^-1 = (1 - X^T A X) / lambda, by way of A [tokens, tokens]."""

    def __init__(self, inputs: np.ndarray, within: np.ndarray, ridge: float):
        self.inputs, self.within, self.ridge = inputs, within, ridge
        self.seen = within[:0]  # X_S^T A of the inputs that were looked at last

    def block(self, columns: slice) -> tuple[np.ndarray, np.ndarray]:
        """X_S [tokens, s] of some inputs and their own block of H^-1, to be removed next."""
        x = self.inputs[:, columns].astype(np.float64)
        self.seen = x.T @ self.within
        return x, (np.eye(x.shape[1]) - self.seen @ x) / self.ridge

    def rows(self, gone: np.ndarray) -> np.ndarray:
        """Rows of H^-1 as it is now."""
        self.seen = self.inputs[:, gone].T.astype(np.float64) @ self.within
        rows = np.empty((len(gone), self.inputs.shape[1]))
        for part, x in columns(self.inputs):
            rows[:, part] = self.seen @ x
        rows /= -self.ridge
        rows[np.arange(len(gone)), gone] += 1 / self.ridge
        return rows

    def remove(self, half: np.ndarray, low: np.ndarray) -> np.ndarray:
        """As ``Inverse.remove``, by Woodbury: K is less by what these inputs gave. Returns low^-1 X_S^T A / lambda."""
        seen = _lower_solve(low, self.seen) / self.ridge
        _add(self.within, self.ridge, seen, seen)
        return seen

    def own_blocks(self, width: int, size: int) -> np.ndarray:
        """The blocks of H^-1 on its diagonal, [units, size, size]."""
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
    """``Problem.path`` on H^-1 and the weights [n, out] that are best with all inputs, which is spoilt."""
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
        prices += np.square(change).reshape(len(least), -1).sum(axis=1).tolist()  # of each after those before it
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
    """What the removal of each living unit alone would cost."""
    size = blocks.shape[1]
    if size == 1:
        return squares[alive] / np.maximum(blocks[alive, 0, 0], TINY)
    halves = (_lower_solve(factor(blocks[unit].copy()), weights[unit * size :][:size]) for unit in alive)
    return np.array([np.vdot(half, half) for half in halves])


# ---- error feedback ----


class Backlog:
    """Of a Problem: the upper factor of the whole inverse [n, n], and all errors so far."""

    def __init__(self, upper: np.ndarray, outputs: int):
        self.upper, self.errors, self.part = upper, np.empty((outputs, len(upper))), slice(0, 0)

    def group(self, start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
        self.part = slice(start, stop)
        return np.triu(self.upper[self.part, self.part]), -(self.errors[:, :start] @ self.upper[:start, self.part])

    def missed(self, errors: np.ndarray) -> None:
        self.errors[:, self.part] = errors


class Ahead:
    """Of a Dual: columns that are fixed are removed from K, and their errors are summed up per token [out, tokens]."""

    def __init__(self, state: Tokens, outputs: int):
        self.state, self.due, self.low = state, np.zeros((outputs, len(state.within))), np.empty((0, 0))

    def group(self, start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
        x, block = self.state.block(slice(start, stop))
        self.low = factor(block)
        return np.triu(self.low.T), self.due @ x

    def missed(self, errors: np.ndarray) -> None:
        self.due += errors @ self.state.remove(errors, self.low)


# ---- linear algebra in place ----


def panels(length: int, step: int) -> Iterator[slice]:
    """Slices of ``step`` over a length; the last may be shorter."""
    for start in range(0, length, step):
        yield slice(start, min(start + step, length))


def columns(inputs: np.ndarray, kept: np.ndarray | None = None) -> Iterator[tuple[slice, np.ndarray]]:
    """Some columns of the tokens at a time, float64, and their places among those kept."""
    for part in panels(inputs.shape[1] if kept is None else len(kept), WIDE):
        yield part, inputs[:, part if kept is None else kept[part]].astype(np.float64)


def factor(matrix: np.ndarray) -> np.ndarray:
    """The lower Cholesky factor (above it is rubbish) of a symmetric matrix in C order, in its memory.

    Where rounding left it indefinite its diagonal grows by as little as helps. Raises LinAlgError when nothing does.
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
    """The inverse of a positive definite matrix in C order, in its memory."""
    from scipy.linalg import lapack

    lapack.dpotri(factor(matrix), lower=1, overwrite_c=1)
    _mirror(matrix)
    return matrix


def _mirror(matrix: np.ndarray) -> None:
    """Copy what is above the diagonal below it."""
    for rows in panels(len(matrix), PANEL):
        matrix[rows, : rows.start] = matrix[: rows.start, rows].T
        own = np.triu(matrix[rows, rows], 1)
        matrix[rows, rows] = own + own.T + np.diag(matrix[rows, rows].diagonal())


def _lower_solve(low: np.ndarray, right: np.ndarray) -> np.ndarray:
    """low^-1 right, in C order."""
    from scipy.linalg import solve_triangular

    return np.ascontiguousarray(solve_triangular(low, right, lower=True, check_finite=False))


def _add(into: np.ndarray, scale: float, left: np.ndarray, right: np.ndarray) -> None:
    """into += scale left^T right, all in C order. In place: the product alone would be another matrix as large."""
    from scipy.linalg import blas

    blas.dgemm(scale, right.T, left.T, beta=1.0, c=into.T, trans_b=1, overwrite_c=1)
