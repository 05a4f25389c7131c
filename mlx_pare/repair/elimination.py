"""Removal of inputs from a least-squares problem, one after the other, in the order in which they cost least.

H = X^T X + lambda for inputs X [tokens, n] and a ridge lambda [n]. ``Inverse`` holds H^-1. ``Tokens`` holds H^-1 of
Z = X / sqrt(lambda) with a ridge of 1: the same removals at the same prices, with weights in the units of Z.
``greedy`` removes units for good (optimal brain surgeon). All arithmetic is float64.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from .factors import PANEL, TINY, WIDE, columns, factor, lower_solve, outer, panels, symmetric_outer

ROUNDS = 256  # the costs of the units are computed again after every 256th part of them is removed
LAZY = 64  # inputs whose removal waits: the inverse is updated once for all of them
SPARSE = 0.8  # share of the rows that still count: if fewer do, the others are dropped


@dataclass(frozen=True)
class Removal:
    """How units go. ``order``: the removed units. ``prices``: for each the increase of the sum that is minimised.
    ``weights``: the best weights of what is left, float64 [out, kept + fixed]. ``solved``: the best weights on the way,
    by number of units, float32 [out, kept + fixed]."""

    order: list[int]
    prices: list[float]
    weights: np.ndarray
    solved: dict[int, np.ndarray]


class Inverse:
    """H^-1 itself [n, n], of which only the upper half is kept up to date, and that late: the sum of v^T v over the
    rows v of ``waiting`` [removed, n] is still in it."""

    def __init__(self, inverse: np.ndarray):
        self.inverse, self.waiting = inverse, np.empty((0, len(inverse)))

    def rows(self, gone: np.ndarray) -> np.ndarray:
        """Compute rows of H^-1 of the inputs that are left.

        Args:
            gone: places of the inputs that are removed next, int [s].

        Returns:
            Their rows, float64 [s, n].
        """
        rows = np.empty((len(gone), len(self.inverse)))
        for row, one in zip(rows, gone, strict=True):
            row[:one], row[one:] = self.inverse[:one, one], self.inverse[one, one:]
        rows -= self.waiting[:, gone].T @ self.waiting
        return rows

    def remove(self, half: np.ndarray, low: np.ndarray) -> None:
        """Remove the inputs whose rows ``rows`` returned last.

        Args:
            half: low^-1 times these rows, float64 [s, n].
            low: lower Cholesky factor of the block of these inputs, float64 [s, s]; not used in this form.
        """
        self.waiting = np.concatenate([self.waiting, half])
        if len(self.waiting) >= LAZY:
            self._update()

    def _update(self) -> None:
        symmetric_outer(self.inverse, -1, self.waiting)
        self.waiting = self.waiting[:0]

    def keep(self, left: np.ndarray) -> None:
        """Drop all inputs but some, whose places change.

        Args:
            left: places of those that stay, ascending, int [left].
        """
        self._update()
        self.inverse, self.waiting = shrunk(self.inverse, left, left), np.empty((0, len(left)))

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
        upper = [np.triu(self.inverse[part, part]) for part in panels(width, size)]
        return np.stack([half + np.triu(half, 1).T for half in upper])


class Tokens:
    """H^-1 = 1 - Z^T A Z for Z = X / root, computed from A = (Z Z^T + 1)^-1 [tokens, tokens].

    ``inputs``: X [tokens, n], float32 or float64. ``within``: A, float64, changed in place. ``root``: float64 [n].
    """

    def __init__(self, inputs: np.ndarray, within: np.ndarray, root: np.ndarray):
        self.inputs, self.within, self.root = inputs, within, root
        self.left = np.arange(inputs.shape[1])  # numbers of the inputs that were not dropped
        self.seen = within[:0]  # Z_S^T A of the inputs S that ``block`` or ``rows`` was asked for last

    def block(self, some: slice) -> tuple[np.ndarray, np.ndarray]:
        """Return the columns of some inputs, which are removed next, and their block of H^-1.

        Args:
            some: which inputs, s of them.

        Returns:
            Z_S, float64 [tokens, s], and their block of H^-1, float64 [s, s].
        """
        z = self.inputs[:, some].astype(np.float64) / self.root[some]
        self.seen = z.T @ self.within
        return z, np.eye(z.shape[1]) - self.seen @ z

    def rows(self, gone: np.ndarray) -> np.ndarray:
        """Compute rows of H^-1 of the inputs that are left.

        Args:
            gone: places of the inputs that are removed next, int [s].

        Returns:
            Their rows, float64 [s, n].
        """
        own = self.left[gone]
        self.seen = (self.inputs[:, own].astype(np.float64) / self.root[own]).T @ self.within
        rows = np.empty((len(gone), len(self.left)))
        for part, z in columns(self.inputs, self.left, self.root):
            np.matmul(-self.seen, z, out=rows[:, part])
        rows[np.arange(len(gone)), gone] += 1
        return rows

    def remove(self, half: np.ndarray, low: np.ndarray) -> np.ndarray:
        """Remove the inputs that ``rows`` or ``block`` was asked for last: Z Z^T + 1 loses their part.

        The Woodbury formula updates A.

        Args:
            half: not used in this form; there because ``Inverse.remove`` needs it.
            low: lower Cholesky factor of the block of these inputs, float64 [s, s].

        Returns:
            low^-1 Z_S^T A, with A as it was before, float64 [s, tokens].
        """
        seen = lower_solve(low, self.seen)
        outer(self.within, 1, seen, seen)
        return seen

    def keep(self, left: np.ndarray) -> None:
        """Drop all inputs but some, whose places change.

        Args:
            left: places of those that stay, ascending, int [left].
        """
        self.left = self.left[left]

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
            z = self.inputs[:, part].T.astype(np.float64)
            z /= self.root[part, None]
            parts = (len(z) // size, size, -1)
            through = (z @ self.within).reshape(parts)
            blocks[part.start // size :][: len(through)] = through @ z.reshape(parts).transpose(0, 2, 1)
        return np.eye(size) - blocks


def greedy(
    state: Inverse | Tokens, weights: np.ndarray, width: int, size: int, count: int, at: Sequence[int] = ()
) -> Removal:
    """Remove the unit that costs least, again and again, until ``count`` units are left.

    ``Problem.path`` says what a unit costs. If there are at least 2 * ROUNDS units, several go at once.

    Args:
        state: H^-1 with all inputs; changed in place.
        weights: the best weights with all inputs, float64 [n, out]; changed in place.
        width: number of inputs that are candidates, the first ones of n.
        size: inputs of a unit; neighbours.
        count: units to keep.
        at: numbers of units, from ``count`` to one less than there are, at which the best weights are wanted.

    Returns:
        The removed units with their prices, and the weights at the end and at these numbers.

    Raises:
        LinAlgError: as ``factor``.
    """
    blocks, squares = state.own_blocks(width, size), np.einsum("no,no->n", weights, weights)
    units = alive = np.arange(len(blocks))  # units in memory by place; places of those that are left
    order, prices, solved = [], [], {}
    fixed, batch = len(weights) - width, max(1, len(blocks) // ROUNDS)
    while len(alive) > count:
        if len(alive) < SPARSE * len(units):
            kept = inputs_of(alive, size, len(units), fixed)
            state.keep(kept)
            weights, squares = shrunk(weights, kept), squares[kept]
            units, blocks, alive = units[alive], blocks[alive], np.arange(len(alive))
        costs = _costs(blocks, weights, squares, alive)
        least = np.argsort(costs, kind="stable")[: min(batch, len(alive) - count)]
        gone = inputs_of(alive[least], size)
        rows = state.rows(gone)
        low = factor(rows[:, gone])
        half, change = lower_solve(low, rows), lower_solve(low, weights[gone])
        for some in range(1, len(least) + 1):
            if len(alive) - some in at:
                left = inputs_of(np.delete(alive, least[:some]), size, len(units), fixed)
                mine = slice(0, some * size)
                best = weights[left] - half[mine, left].T @ change[mine]
                solved[len(alive) - some] = best.T.astype(np.float32)
        order.extend(units[alive[least]].tolist())
        prices.extend(np.square(change).reshape(len(least), -1).sum(axis=1).tolist())  # of each, given those before it
        _update(blocks, weights, squares, half, change)
        state.remove(half, low)
        alive = np.delete(alive, least)
    left = inputs_of(alive, size, len(units), fixed)
    return Removal(order, prices, weights[left].T, solved)


def _update(blocks: np.ndarray, weights: np.ndarray, squares: np.ndarray, half: np.ndarray, change: np.ndarray) -> None:
    """Take what was removed out of everything that the costs need. The weights go through the cache by parts."""
    for part in panels(len(weights), PANEL):
        outer(weights[part], -1, half[:, part], change)
        np.einsum("no,no->n", weights[part], weights[part], out=squares[part])
    units, size, _ = blocks.shape
    if size == 1:
        blocks[:, 0, 0] -= np.einsum("sn,sn->n", half[:, :units], half[:, :units])
        return
    for unit, part in enumerate(panels(units * size, size)):
        blocks[unit] -= half[:, part].T @ half[:, part]


def inputs_of(units: np.ndarray, size: int, fixed_from: int = 0, fixed: int = 0) -> np.ndarray:
    """Number the inputs of units, and behind them the fixed ones, which follow ``fixed_from`` units.

    Args:
        units: numbers of the units, int [units].
        size: inputs of a unit.
        fixed_from: how many units lie in front of the fixed inputs.
        fixed: number of fixed inputs.

    Returns:
        int [units * size + fixed].
    """
    own = (units[:, None] * size + np.arange(size)).reshape(-1)
    return np.concatenate([own, fixed_from * size + np.arange(fixed)])


def shrunk(matrix: np.ndarray, rows: np.ndarray, places: np.ndarray | None = None) -> np.ndarray:
    """Drop rows, and columns, of a matrix in its own memory.

    Args:
        matrix: float64 in C order; overwritten.
        rows: numbers of the rows that stay, ascending.
        places: numbers of the columns that stay, ascending; None: all.

    Returns:
        The rest, in the first part of the same memory.
    """
    width = matrix.shape[1] if places is None else len(places)
    small = matrix.reshape(-1)[: len(rows) * width].reshape(len(rows), width)
    for part in panels(len(rows), PANEL):  # a row never moves behind one that is still to be read
        small[part] = matrix[rows[part]] if places is None else matrix[np.ix_(rows[part], places)]
    return small


def _costs(blocks: np.ndarray, weights: np.ndarray, squares: np.ndarray, alive: np.ndarray) -> np.ndarray:
    """What the removal of each remaining unit alone would cost, float64 [alive]."""
    size = blocks.shape[1]
    if size == 1:
        return squares[alive] / np.maximum(blocks[alive, 0, 0], TINY)
    halves = (lower_solve(factor(blocks[unit].copy()), weights[unit * size :][:size]) for unit in alive)
    return np.array([np.vdot(half, half) for half in halves])
