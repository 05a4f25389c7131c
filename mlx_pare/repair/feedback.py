"""How the columns of a weight matrix that follow make up for the errors of those that are fixed (GPTQ).

Frantar et al. 2022, arXiv 2210.17323. Its update is the removal of repair/elimination.py. All arithmetic is float64.
"""

from __future__ import annotations

from typing import Protocol

import numpy as np

from .elimination import Tokens
from .factors import factor


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
        z, block = self.state.block(slice(start, stop))
        self.low, root = factor(block), self.state.root[start:stop]
        return np.triu(self.low.T) / root, self.due @ z / root

    def missed(self, errors: np.ndarray) -> None:
        """Remove the columns of the group that was asked for last, and note their errors.

        Args:
            errors: see ``Feedback.missed``, float64 [out, n].
        """
        self.due += errors @ self.state.remove(errors, self.low)
