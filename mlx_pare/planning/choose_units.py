"""Which units survive: those with the highest scores, for sizes that are already decided."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from ..arch import Architecture, Keep, LayerKeep, can_keep, positions
from ..pruning.reach import Level, best_layers


def choose_units(arch: Architecture, level: Level, scores: Mapping[str, np.ndarray], protected: Sequence[int]) -> Keep:
    """Choose the units with the highest scores for a level.

    The scores of query heads are summed over the group of a kv head.

    Args:
        arch: the model.
        level: how many units of each axis are kept.
        scores: arrays of ``score``: mlp [layers, ffn], attention [layers, q_head], attn_ln and ffn_ln [hidden], and
            what ``layers_of`` reads.
        protected: layers that stay.
    Returns:
        The cut.
    """
    chosen = layers_of(arch, scores, level.layer, protected)
    layers = tuple(LayerKeep(i, units_of(arch, i, scores, level.ffn, level.kv_head)) for i in chosen)
    return Keep(layers, hidden_of(scores, level.hidden))


def layers_of(
    arch: Architecture, scores: Mapping[str, np.ndarray], count: int, protected: Sequence[int]
) -> list[int] | None:
    """Choose the layers to keep.

    If trials have found the layers for this count, these are taken (``kept``; its row is empty for any other count).
    Else, with ``angles``, those around the block that turns the stream least. Else those with the highest scores.

    Args:
        arch: the model.
        scores: layer [layers]; optional: kept [layers + 1, layers], 1 in row ``count`` for a layer that stays; angles
            [layers + 1, layers + 1].
        count: number of layers to keep.
        protected: layers that stay, unless trials decided.
    Returns:
        The layers, ascending; None if no set of ``count`` layers keeps their kinds and contains the protected ones.
    """
    if "kept" in scores and scores["kept"][count].any():
        return np.flatnonzero(scores["kept"][count]).tolist()
    if "angles" in scores:
        return around_blocks(arch, scores["angles"], count, protected)
    return best_layers(arch, scores["layer"], count, protected)


def around_blocks(arch: Architecture, angles: np.ndarray, count: int, protected: Sequence[int]) -> list[int] | None:
    """Choose the ``count`` layers that are left when one block of neighbouring layers is removed.

    The block is the one with the smallest angle between its input and its output (Gromov et al. 2024, arXiv
    2403.17887). If protected layers or kinds leave no room for a single block, the fewest blocks with the smallest sum
    of angles are removed. It is a dynamic programme over (layers seen, layers kept), like ``best_layers``.

    Args:
        arch: the model.
        angles: float [layers + 1, layers + 1]: the angle between the inputs of two layers, the last index being the
            output of the last layer.
        count: number of layers to keep.
        protected: layers that stay, ascending.
    Returns:
        The layers, ascending; None if there is no such set.
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
    """Choose the units of one layer with the highest scores.

    Args:
        arch: the model.
        layer: index of the layer.
        scores: mlp [layers, ffn], attention [layers, q_head].
        ffn: number of channels to keep.
        kv_head: number of kv heads to keep.
    Returns:
        "ffn" and "kv_head": the kept indices, ascending.
    """
    sizes = arch.layers[layer].sizes
    heads = scores["attention"][layer].reshape(sizes["kv_head"], sizes["group"]).sum(axis=1)
    return {"ffn": top(scores["mlp"][layer], ffn), "kv_head": top(heads, kv_head)}


def hidden_of(scores: Mapping[str, np.ndarray], count: int) -> list[int]:
    """Choose the hidden channels with the highest scores, summed over both norms of all layers.

    Args:
        scores: attn_ln and ffn_ln [hidden], each summed over layers.
        count: number of channels to keep.
    Returns:
        The kept indices, ascending.
    """
    return top(scores["attn_ln"] + scores["ffn_ln"], count)


def top(scores: np.ndarray, count: int) -> list[int]:
    """Return the indices of the highest scores; ties go to the lower index.

    Args:
        scores: float [units].
        count: number of indices.
    Returns:
        The indices, ascending.
    """
    return sorted(np.argsort(-scores, kind="stable")[:count].tolist())
