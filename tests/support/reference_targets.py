"""Divergences and a teacher's most likely tokens in float64 numpy, as in the papers; no code of the package."""

from __future__ import annotations

import numpy as np


def softmax(logits: np.ndarray) -> np.ndarray:
    weights = np.exp(logits - logits.max(axis=-1, keepdims=True))
    return weights / weights.sum(axis=-1, keepdims=True)


def kl(p: np.ndarray, q: np.ndarray) -> np.ndarray:
    """Sum of p log(p / q) where there is any p."""
    ratio = np.where(p > 0, p, 1.0) / np.where(p > 0, q, 1.0)
    return (p * np.log(ratio)).sum(axis=-1)


def divergence(kind: str, p: np.ndarray, q: np.ndarray) -> np.ndarray:
    middle = (p + q) / 2
    return {
        "forward": lambda: kl(p, q),
        "reverse": lambda: kl(q, p),
        "js": lambda: (kl(p, middle) + kl(q, middle)) / 2,
    }[kind]()


def classes(p: np.ndarray, ids: np.ndarray) -> np.ndarray:
    """Probabilities of some tokens and, last, the sum of all others, added up one by one."""
    others = np.ones(p.shape, bool)
    np.put_along_axis(others, ids, False, axis=-1)
    return np.concatenate([np.take_along_axis(p, ids, -1), (p * others).sum(-1, keepdims=True)], axis=-1)


def top(logits: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(ids, log-probabilities, log of the rest): the k most likely, by sorting everything."""
    order = np.argsort(-logits, axis=-1, kind="stable")
    ids, rest = order[..., :k], np.take_along_axis(logits, order[..., k:], -1)
    peak = logits.max(-1)
    total = peak + np.log(np.exp(logits - peak[..., None]).sum(-1))
    high = rest.max(-1) if rest.shape[-1] else peak
    tail = high + np.log(np.exp(rest - high[..., None]).sum(-1)) if rest.shape[-1] else np.full(peak.shape, -np.inf)
    return ids, np.take_along_axis(logits, ids, -1) - total[..., None], tail - total


def slope(function, x: np.ndarray, step: float = 1e-5) -> np.ndarray:
    """The gradient of a sum of a function's values, by central differences."""
    found = np.zeros_like(x)
    for index in np.ndindex(x.shape):
        more, less = x.copy(), x.copy()
        more[index] += step
        less[index] -= step
        found[index] = (function(more) - function(less)).sum() / (2 * step)
    return found
