"""Which units survive: those with the highest scores, for sizes that are already decided."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from ..arch import Architecture, Keep, LayerKeep, can_keep, positions
from ..arch.axes import UNITS
from ..base.errors import PareError
from ..model.checkpoint import Checkpoint
from ..pruning.reach import Level, best_layers
from ..store.arrays import Arrays


def read_scores(path: Path, checkpoint: Checkpoint | None = None) -> Arrays:
    """Read a file that ``score`` wrote.

    A file of an earlier version is read too: runs that were begun with it go on.

    Args:
        path: the file.
        checkpoint: the model that was scored; None: any model.
    Returns:
        The arrays by the names that ``score`` gives them today. Without ``checkpoint``, a file of an earlier version
        gives no kv_head.
    Raises:
        PareError: the file cannot be read, or was made from another model.
    """
    found = Arrays.load(path, "scores")
    if checkpoint is not None and found.about.get("model") != checkpoint.identity():
        raise PareError(f"{path} was made from another model than {checkpoint.path}", "score this model first")
    arrays = found.arrays
    if "mlp" in arrays:  # the earlier names: query heads were apart, and so were the norms
        arrays["ffn"], arrays["hidden"] = arrays.pop("mlp"), arrays.pop("attn_ln") + arrays.pop("ffn_ln")
        heads = arrays.pop("attention")
        if checkpoint is not None:
            arrays["kv_head"] = heads.reshape(len(heads), checkpoint.arch.uniform("kv_head"), -1).sum(axis=2)
    return found


def choose_units(arch: Architecture, level: Level, scores: Mapping[str, np.ndarray], protected: Sequence[int]) -> Keep:
    """Choose the units with the highest scores for a level.

    Args:
        arch: the model.
        level: how many units of each axis are kept.
        scores: arrays of ``score``: ffn [layers, ffn], kv_head [layers, kv_head], expert [layers, expert], as far as
            the model has such units; hidden [hidden]; and what ``layers_of`` reads.
        protected: layers that stay.
    Returns:
        The cut.
    """
    chosen = layers_of(arch, scores, level.layer, protected)
    counts = {axis: getattr(level, axis) for axis in UNITS}
    layers = tuple(LayerKeep(i, units_of(i, scores, counts)) for i in chosen)
    whole = level.hidden == arch.sizes["hidden"]
    return Keep(layers, None if whole else hidden_of(scores, level.hidden))


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


def units_of(layer: int, scores: Mapping[str, np.ndarray], counts: Mapping[str, int]) -> dict[str, list[int]]:
    """Choose the units of one layer with the highest scores.

    Args:
        layer: index of the layer.
        scores: axis -> float [layers, units]. A row of NaN: the layer has no such units.
        counts: axis -> number of units to keep.
    Returns:
        axis -> the kept indices, ascending.
    """
    there = [axis for axis in counts if axis in scores and not np.isnan(scores[axis][layer]).any()]
    return {axis: top(scores[axis][layer], counts[axis]) for axis in there}


def hidden_of(scores: Mapping[str, np.ndarray], count: int) -> list[int]:
    """Choose the hidden channels with the highest scores.

    Args:
        scores: hidden [hidden].
        count: number of channels to keep.
    Returns:
        The kept indices, ascending.
    """
    return top(scores["hidden"], count)


def top(scores: np.ndarray, count: int) -> list[int]:
    """Return the indices of the highest scores; ties go to the lower index.

    Args:
        scores: float [units].
        count: number of indices.
    Returns:
        The indices, ascending.
    """
    return sorted(np.argsort(-scores, kind="stable")[:count].tolist())
