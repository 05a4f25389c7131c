"""Which units survive: the ones with the highest scores, for sizes that are already decided."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from ..arch import Architecture, Keep, LayerKeep, can_keep, positions
from ..pruning.reach import Level, best_layers


def choose_units(arch: Architecture, level: Level, scores: Mapping[str, np.ndarray], protected: Sequence[int]) -> Keep:
    """The units with the highest scores for a level. Query-head scores are summed over the group of a kv head."""
    chosen = layers_of(arch, scores, level.layer, protected)
    layers = tuple(LayerKeep(i, units_of(arch, i, scores, level.ffn, level.kv_head)) for i in chosen)
    return Keep(layers, hidden_of(scores, level.hidden))


def layers_of(
    arch: Architecture, scores: Mapping[str, np.ndarray], count: int, protected: Sequence[int]
) -> list[int] | None:
    """The layers to keep, ascending: those that trials have found for this count (``kept`` [layers + 1, layers], the
    row of a count they were not made for empty), those around the block that turns the stream least (``angles``), or
    those of the highest scores (``layer``). None where no so many keep their kinds and contain the protected."""
    if "kept" in scores and scores["kept"][count].any():
        return np.flatnonzero(scores["kept"][count]).tolist()
    if "angles" in scores:
        return around_blocks(arch, scores["angles"], count, protected)
    return best_layers(arch, scores["layer"], count, protected)


def around_blocks(arch: Architecture, angles: np.ndarray, count: int, protected: Sequence[int]) -> list[int] | None:
    """The ``count`` layers that are left when one block of neighbours goes, that with the smallest angle between its
    input and its output (Gromov et al. 2024, arXiv 2403.17887); where protected layers or kinds leave no room for a
    single block, the fewest blocks with the smallest sum of angles. None where there are none.

    Dynamic programme over (layers seen, layers kept), as ``best_layers``.
    """
    total, kinds = len(arch.layers), positions(arch, count)
    best: dict[tuple[int, int], tuple[int, float, list[int]]] = {(0, 0): (0, 0.0, [])}
    for seen in range(total):
        may_go = next((i for i in protected if i >= seen), total)  # a block from here ends there at the latest
        for kept in range(min(seen, count) + 1):
            if (seen, kept) not in best:
                continue
            blocks, turned, layers = best[seen, kept]
            steps = [((end, kept), (blocks + 1, turned + float(angles[seen, end]), layers))
                     for end in range(seen + 1, may_go + 1)]  # fmt: skip
            if kept < count and kinds[kept] in (None, arch.layers[seen].kind):
                steps.append(((seen + 1, kept + 1), (blocks, turned, [*layers, seen])))
            for place, found in steps:
                if place not in best or found < best[place]:
                    best[place] = found
    found = best.get((total, count))
    return found[2] if found is not None and can_keep(arch, found[2]) else None


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
