"""Which units survive: the ones with the highest scores, for sizes that are already decided."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from ..arch import Architecture, Keep, LayerKeep
from ..fit.reach import Level, best_layers


def choose_units(arch: Architecture, level: Level, scores: Mapping[str, np.ndarray], protected: Sequence[int]) -> Keep:
    """The units with the highest scores for a level. Query-head scores are summed over the group of a kv head."""
    chosen = best_layers(arch, scores["layer"], level.layer, protected)
    layers = tuple(LayerKeep(i, units_of(arch, i, scores, level.ffn, level.kv_head)) for i in chosen)
    return Keep(layers, hidden_of(scores, level.hidden))


def units_of(
    arch: Architecture, layer: int, scores: Mapping[str, np.ndarray], ffn: int, kv_head: int
) -> dict[str, list[int]]:
    """As many units of one layer as are asked for, those with the highest scores."""
    sizes = arch.layers[layer].sizes
    heads = scores["attention"][layer].reshape(sizes["kv_head"], sizes["group"]).sum(axis=1)
    return {"ffn": top(scores["mlp"][layer], ffn), "kv_head": top(heads, kv_head)}


def hidden_of(scores: Mapping[str, np.ndarray], count: int) -> list[int]:
    """The hidden channels with the highest scores, both norms of all layers together."""
    return top(scores["attn_ln"] + scores["ffn_ln"], count)


def top(scores: np.ndarray, count: int) -> list[int]:
    """Ascending indices of the ``count`` highest scores; ties go to the lower index."""
    return sorted(np.argsort(-scores, kind="stable")[:count].tolist())
