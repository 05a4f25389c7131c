"""Spearman's rank correlation; importing scipy.stats for it would take longer than most steps of a small model."""

from __future__ import annotations

import numpy as np


def rank_correlation(a: np.ndarray, b: np.ndarray) -> float:
    """Compute Spearman's rank correlation of two score vectors.

    Args:
        a, b: float [units].
    Returns:
        -1 to 1. It is 1 if both vectors are constant, and 0 if only one is.
    """
    ranks = [_ranks(x) - (len(x) + 1) / 2 for x in (a, b)]
    norms = [float(np.linalg.norm(r)) for r in ranks]
    if not all(norms):
        return float(norms[0] == norms[1])
    return float(ranks[0] @ ranks[1] / norms[0] / norms[1])


def _ranks(values: np.ndarray) -> np.ndarray:
    """The rank of every value, from 1; equal values have the mean of their ranks."""
    _, place, counts = np.unique(values, return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - (counts - 1) / 2)[place]
