"""Which inputs of a linear layer to keep, and the weights with which those do best: least squares in float64.

A layer y = W x is judged on calibration data alone: G = sum of x x^T (inputs), C = sum of x t^T (inputs with targets).
Both functions minimise sum |W x - t|^2 + lambda |W - W0|^2, with lambda a small share of the mean diagonal of G.

Sources: optimal brain surgeon, Hassibi & Stork 1993, for layers as in Frantar et al. 2022 (Optimal Brain Compression,
arXiv 2208.11580), here with removed units of several inputs; the ridge towards the old weights is ours.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

DAMPING = 1e-4  # share of the mean diagonal; 1e-2 was worse on both reference models (benchmarks/LOG.md)
ROUNDS = 256  # a unit's cost is looked at again after every 256th part of them has gone
PANEL = 64  # rows that are down-dated at a time: few enough to stay in the cache
TINY = 1e-30


@dataclass(frozen=True)
class Problem:
    """``gram`` [n, n], ``cross`` [n, out], ``weight`` [out, n] (what the layer has now): float64."""

    gram: np.ndarray
    cross: np.ndarray
    weight: np.ndarray
    damping: float = DAMPING

    @property
    def ridge(self) -> float:
        return self.damping * max(float(np.diag(self.gram).mean()), TINY)

    def solve(self, kept: Sequence[int] | np.ndarray) -> np.ndarray:
        """The best weights [out, len(kept)] when only these inputs are left."""
        kept = np.asarray(kept)
        left = self.gram[np.ix_(kept, kept)]
        np.fill_diagonal(left, left.diagonal() + self.ridge)
        return np.linalg.solve(left, self.cross[kept] + self.ridge * self.weight[:, kept].T).T

    def error(self, weight: np.ndarray, kept: Sequence[int] | np.ndarray, energy: float) -> float:
        """sum |W x - t|^2 / sum |t|^2 of weights [out, len(kept)], without the ridge; ``energy`` is sum |t|^2."""
        kept = np.asarray(kept)
        square = np.vdot(weight @ self.gram[np.ix_(kept, kept)], weight) - 2 * np.vdot(weight.T, self.cross[kept])
        return max(0.0, float((square + energy) / max(energy, TINY)))  # rounding may leave a little less than nothing

    def choose(self, size: int, count: int) -> list[int]:
        """The ``count`` units, of ``size`` neighbouring inputs each, whose removal costs most; ascending.

        Greedy: always the unit that costs least goes, given that the weights of all others are solved again, which its
        removal changes: cost = tr(B_u^T (H^-1_uu)^-1 B_u) for weights B and H = G + lambda. Where there are more than
        ROUNDS units, several go before costs are looked at again.
        """
        inverse = self.gram.copy()
        np.fill_diagonal(inverse, inverse.diagonal() + self.ridge)
        inverse = np.linalg.inv(inverse)
        weights = inverse @ (self.cross + self.ridge * self.weight.T)
        alive = np.arange(len(self.gram) // size)
        batch = max(1, len(alive) // ROUNDS)
        while len(alive) > count:
            costs = _costs(inverse, weights, alive, size)
            least = np.argsort(costs, kind="stable")[: min(batch, len(alive) - count)]
            _remove(inverse, weights, _inputs(alive[least], size))
            alive = np.delete(alive, least)
        return alive.tolist()


def _inputs(units: np.ndarray, size: int) -> np.ndarray:
    return (units[:, None] * size + np.arange(size)).reshape(-1)


def _costs(inverse: np.ndarray, weights: np.ndarray, alive: np.ndarray, size: int) -> np.ndarray:
    """What the removal of each living unit alone would cost."""
    if size == 1:
        return np.square(weights[alive]).sum(axis=1) / np.maximum(np.diag(inverse)[alive], TINY)
    costs = []
    for unit in alive:
        own = slice(unit * size, (unit + 1) * size)
        costs.append(np.vdot(weights[own], np.linalg.solve(inverse[own, own], weights[own])))
    return np.array(costs)


def _remove(inverse: np.ndarray, weights: np.ndarray, gone: np.ndarray) -> None:
    """Down-date both in place to what they are without these inputs, whose own rows become zero."""
    gain = np.linalg.solve(inverse[np.ix_(gone, gone)], inverse[gone]).T  # [n, gone]
    own = inverse[gone]
    weights -= gain @ weights[gone]
    for start in range(0, len(inverse), PANEL):  # one product of all rows would be another matrix as large
        rows = slice(start, start + PANEL)
        inverse[rows] -= gain[rows] @ own
    weights[gone] = 0
    inverse[gone], inverse[:, gone] = 0, 0
