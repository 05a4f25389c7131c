"""Importance of the experts of a layer [expert]. Higher: keep.

g: weight of an expert's output f(x) for a token x. X: the tokens that visit the expert. A mean over fewer visits than
FEW is noise: one loud visit would make an expert the best of its layer. So means are drawn towards that of the layer,
as if the expert had FEW more visits of average size.
"""

from __future__ import annotations

from collections.abc import Callable

import mlx.core as mx
import numpy as np

from .source import Source

FEW = 30  # visits
# Super experts, by CerebrasResearch/reap model_util.py: the largest activation is above this percentile of all, and
# above this share of the largest; among this share of the layers, the first ones.
PERCENTILE, SHARE, FIRST = 99.5, 0.1, 0.75


def _sum(name: str) -> Callable[[Source, int], mx.array]:
    return lambda source, layer: source.stat(layer, "expert", name)


def _mean(name: str) -> Callable[[Source, int], mx.array]:
    def score(source: Source, layer: int) -> mx.array:
        total, visits = source.stat(layer, "expert", name), source.stat(layer, "expert", "visits")
        usual = total.sum() / mx.maximum(visits.sum(), 1)
        return (total + FEW * usual) / (visits + FEW)

    return score


def magnitude(source: Source, layer: int) -> mx.array:
    """Score experts by the L2 norm of their weights.

    Args:
        source: weights of the model.
        layer: number of the layer.
    Returns:
        float32 [expert].
    """
    stacks = [t.spec.role for t in source.arch.tensors() if t.layer == layer and t.spec.stack]
    count = source.arch.units(layer)["expert"]
    return mx.sqrt(sum(source.sums(layer, role, mx.square, 1).reshape(count, -1).sum(axis=1) for role in stacks))


def random(source: Source, layer: int) -> mx.array:
    """Draw the scores of experts by lot, uniform in [0, 1).

    Args:
        source: gives the seed and the sizes.
        layer: number of the layer.
    Returns:
        float32 [expert].
    """
    return mx.random.uniform(shape=(source.arch.units(layer)["expert"],), key=source.key(layer, "expert"))


def super_experts(source: Source) -> dict[int, mx.array]:
    """Find experts whose outputs have a channel as large as hardly any other. Without them models break.

    Args:
        source: statistics of the model.
    Returns:
        By the number of every layer with experts, whether each is one: bool [expert].
    """
    layers = [i for i in range(len(source.arch.layers)) if "expert" in source.arch.units(i)]
    largest = {layer: np.array(source.stat(layer, "expert", "max")) for layer in layers}
    every = np.concatenate([*largest.values()])
    bound = max(np.percentile(every, PERCENTILE), SHARE * every.max())
    early = FIRST * len(source.arch.layers)
    return {layer: mx.array((values > bound) & (layer < early)) for layer, values in largest.items()}


FORMULAS: dict[str, Callable[[Source, int], mx.array]] = {
    "frequency": _sum("visits"),  # |X|
    "seer": _sum("weight"),  # sum of g over X: Muzio et al. 2024, arXiv 2404.05089
    "ean": _sum("norm"),  # sum of ||f||: expert activation norm, the baseline of arXiv 2510.13999
    "man": _mean("norm"),  # mean of ||f||: arXiv 2606.15716
    "reap": _mean("given"),  # mean of g ||f||: Lasby et al. 2025, arXiv 2510.13999
    "energy": _sum("given_sq"),  # sum of g^2 ||f||^2: what the sum of the experts would lose, were they orthogonal
    "magnitude": magnitude,
    "random": random,
}
CANDIDATES = ("frequency", "seer", "ean", "man", "reap", "energy")  # the held-out error chooses among them
