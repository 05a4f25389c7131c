"""How much every part of every layer matters: the KL divergence to expect of each width, and of each number of bits.

The curve of a part, by how much of its output is missed at every width, comes from one greedy removal
(planning/try_candidates.py). It is proportional to the KL divergence, but with another factor for every part: so a few
widths of each are really tried, one at a time, and the factor is taken from them. That a local error stands for the
loss of the whole model is how Puzzle (Bercovich et al. 2024, arXiv 2411.19146) and EvoPress (Sieberling et al. 2024,
arXiv 2410.14649) rank single changes, too; how well it does so here is measured and said: the rank correlation of local
errors with measured KL.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import mlx.core as mx
import numpy as np

from ..arch import why_no_sublayer_drops
from ..model.checkpoint import Checkpoint
from ..store.arrays import Arrays
from ..text.corpus import Rows
from .candidate import PARTS, Candidate, Curve, Curves, Width, whole
from .try_candidates import try_out

SHARES = (0.5, 0.875)  # of a part's units: the widths that are really tried; between them the factor is interpolated
TINY = 1e-12

Single = tuple[int, str, int]  # layer; "attention", "ffn", "layer", or "attention bits", "ffn bits"; units or bits


def sensitivity(
    model: Path,
    calibration: Rows,
    held: Rows,
    out: Path,
    bits: Sequence[int] = (),
    group_size: int = 64,
    memory_cap: int | None = None,
) -> Path:
    """Write to ``out``: per layer i and part p (attention, ffn) ``i.p.order`` [units], first to go first, ``i.p.loss``
    and ``i.p.kl`` [units + 1], the share of its output that is missed and the KL to expect (nats per token) when so
    many units are kept, ``i.drop`` [], the KL without the layer, and ``i.p.bits`` [bits], the KL with the part packed.

    ``held``: rows on which KL is measured, of the length of the ``calibration`` rows. Raises Refused as ``try_out``.
    """
    checkpoint = Checkpoint(model)
    changes = singles(checkpoint, bits)
    found = try_out(model, [made for _, made in changes], calibration, held, None, group_size, memory_cap)
    measured = {single: kl for (single, _), kl in zip(changes, found.kl, strict=True)}
    arrays: dict[str, mx.array] = {}
    for (layer, part), curve in found.curves.items():
        points = {units: kl for (i, what, units), kl in measured.items() if (i, what) == (layer, part)}
        arrays[f"{layer}.{part}.order"] = mx.array(curve.order.astype(np.int32))
        arrays[f"{layer}.{part}.loss"] = mx.array(curve.loss.astype(np.float32))
        arrays[f"{layer}.{part}.kl"] = mx.array(expected(curve, points).astype(np.float32))
        if bits:
            arrays[f"{layer}.{part}.bits"] = mx.array([measured[layer, f"{part} bits", n] for n in bits])
    for (layer, what, _), kl in measured.items():
        if what == "layer":
            arrays[f"{layer}.drop"] = mx.array(kl)
    about = {"model": checkpoint.identity(), "tokens": calibration.total, "held_tokens": held.total, "bits": list(bits)}
    about |= {"calibration": calibration.digest(), "held": held.digest(), "group_size": group_size}
    Arrays(arrays, {**about, "rank_correlation": rank_correlations(found.curves, measured)}).save(out)
    return out


def singles(checkpoint: Checkpoint, bits: Sequence[int]) -> list[tuple[Single, Candidate]]:
    """The model with one change: what it is, and the candidate."""
    full, found = whole(checkpoint.arch), []

    def add(layer: int, what: str, number: int, width: Width | None) -> None:
        found.append(((layer, what, number), (*full[:layer], width, *full[layer + 1 :])))

    for layer, width in enumerate(full):
        add(layer, "layer", 0, None)
        for part, of in PARTS.items():
            units = width.units(part)
            counts = {max(1, round(share * units)) for share in SHARES} - {units}
            if why_no_sublayer_drops(checkpoint.arch, part) is None:
                counts.add(0)
            for count in sorted(counts):
                add(layer, part, count, replace(width, **{of.axis: count}))
            for number in bits:
                add(layer, f"{part} bits", number, replace(width, **{f"{part}_bits": number}))
    return found


def expected(curve: Curve, points: dict[int, float]) -> np.ndarray:
    """KL [units + 1] of every width, given the measured KL at some: the loss of the curve times a factor, whose
    logarithm is linear between the measured widths and constant beyond. A wider part is never worse. Infinite where it
    was given up; the loss alone where nothing was measured."""
    kl, lost = curve.loss.copy(), [count for count in points if np.isinf(points[count])]
    counts = [count for count in sorted(points) if curve.loss[count] > TINY and count not in lost]
    if counts:
        factors = [np.log(max(points[count], TINY) / curve.loss[count]) for count in counts]
        kl *= np.exp(np.interp(np.arange(len(kl)), counts, factors))
    kl[lost] = np.inf
    return np.maximum.accumulate(kl[::-1])[::-1]


def rank_correlations(curves: Curves, measured: dict[Single, float]) -> dict[str, float]:
    """Spearman's rank correlation of local losses with measured KL, by part and of all together, as far as there are
    three different ones or more."""
    from scipy.stats import spearmanr

    pairs = {part: [] for part in (*PARTS, "all")}
    for (layer, what, units), kl in measured.items():
        if what in PARTS and np.isfinite(kl):
            pairs[what].append((curves[layer, what].loss[units], kl))
            pairs["all"].append(pairs[what][-1])
    lists = {part: list(zip(*some, strict=True)) for part, some in pairs.items()}
    enough = {part: some for part, some in lists.items() if some and all(len(set(values)) > 2 for values in some)}
    return {part: float(spearmanr(*some)[0]) for part, some in enough.items()}
