"""Which units survive: the ones with the highest scores, for sizes that are already decided."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from ..arch import Architecture, Keep, LayerKeep
from ..fit.reach import Level, best_layers


def choose_units(arch: Architecture, level: Level, scores: Mapping[str, np.ndarray], protected: Sequence[int]) -> Keep:
    """The units with the highest scores for a level. Query-head scores are summed over the group of a kv head."""
    layers = []
    for i in best_layers(arch, scores["layer"], level.layer, protected):
        sizes = arch.layers[i].sizes
        heads = scores["attention"][i].reshape(sizes["kv_head"], sizes["group"]).sum(axis=1)
        keep = {"ffn": top(scores["mlp"][i], level.ffn), "kv_head": top(heads, level.kv_head)}
        layers.append(LayerKeep(i, keep))
    hidden = top(scores["attn_ln"] + scores["ffn_ln"], level.hidden)
    return Keep(tuple(layers), hidden)


def top(scores: np.ndarray, count: int) -> list[int]:
    """Ascending indices of the ``count`` highest scores; ties go to the lower index."""
    return sorted(np.argsort(-scores, kind="stable")[:count].tolist())
