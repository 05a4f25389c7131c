"""How much every part of every layer matters: the expected KL divergence of each width, and of each number of bits.

One greedy removal (planning/try_candidates.py) gives the curve of a part: how much of its output is missed at every
width. The curve is proportional to the KL divergence, but with another factor for every part. So a few widths of each
part are really tried, one at a time, and give the factor. Puzzle (Bercovich et al. 2024, arXiv 2411.19146) and EvoPress
(Sieberling et al. 2024, arXiv 2410.14649) also rank single changes by a local error in place of the loss of the whole
model. How well that works here is measured and reported: the rank correlation of local errors with measured KL.
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
from .ranks import rank_correlation
from .try_candidates import try_out

SHARES = (0.5, 0.875)  # of a part's units: the widths that are tried; between them the factor is interpolated
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
    """Measure how the KL divergence depends on the width and the bits of every part, and write the results to ``out``.

    The arrays, per layer i and part p (attention, ffn): ``i.p.order`` int32 [units], the units in the order of removal;
    ``i.p.loss`` and ``i.p.kl`` float32 [units + 1], by the number of kept units, the share of the output that is missed
    and the expected KL (nats per token); ``i.drop`` [], the KL without the layer; ``i.p.bits`` [bits], the KL with the
    part packed.

    Args:
        model: model directory.
        calibration: rows that repair the cuts, int32 [rows, tokens].
        held: rows on which KL is measured, as long as the ``calibration`` rows.
        out: file to write.
        bits: bits to try for every part; empty: none.
        group_size: of packed parts.
        memory_cap: bytes that may be used; None: the memory that is free.
    Returns:
        ``out``.
    Raises:
        Refused: the estimate of memory exceeds the cap even for a single candidate.
        PareError: the rows differ in length, or ``out`` cannot be written.
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
    """List the candidates with a single change: what the change is, and the candidate."""
    full, found = whole(checkpoint.arch), []

    def add(layer: int, what: str, number: int, width: Width | None) -> None:
        found.append(((layer, what, number), (*full[:layer], width, *full[layer + 1 :])))

    for layer, width in enumerate(full):
        add(layer, "layer", 0, None)
        for part, axis in PARTS.items():
            units = width.units(part)
            counts = {max(1, round(share * units)) for share in SHARES} - {units}
            if why_no_sublayer_drops(checkpoint.arch, part) is None:
                counts.add(0)
            for count in sorted(counts):
                add(layer, part, count, replace(width, **{axis: count}))
            for number in bits:
                add(layer, f"{part} bits", number, replace(width, **{f"{part}_bits": number}))
    return found


def expected(curve: Curve, points: dict[int, float]) -> np.ndarray:
    """Estimate the KL divergence of every width from a curve and a few measurements.

    It is the loss of the curve times a factor. The logarithm of the factor is linear between the measured widths and
    constant beyond. A wider part is never worse. The KL is infinite if a measurement was given up, and the plain loss
    if nothing was measured.

    Args:
        curve: of the part.
        points: number of kept units -> measured KL in nats per token.
    Returns:
        float [units + 1]: KL in nats per token, by the number of kept units.
    """
    kl, lost = curve.loss.copy(), [count for count in points if np.isinf(points[count])]
    counts = [count for count in sorted(points) if curve.loss[count] > TINY and count not in lost]
    if counts:
        factors = [np.log(max(points[count], TINY) / curve.loss[count]) for count in counts]
        kl *= np.exp(np.interp(np.arange(len(kl)), counts, factors))
    kl[lost] = np.inf
    return np.maximum.accumulate(kl[::-1])[::-1]


def rank_correlations(curves: Curves, measured: dict[Single, float]) -> dict[str, float]:
    """Return Spearman's rank correlation of local losses with measured KL, for each part and for all together. A part
    is left out unless both have at least three different values."""
    pairs = {part: [] for part in (*PARTS, "all")}
    for (layer, what, units), kl in measured.items():
        if what in PARTS and np.isfinite(kl):
            pairs[what].append((curves[layer, what].loss[units], kl))
            pairs["all"].append(pairs[what][-1])
    lists = {part: list(zip(*some, strict=True)) for part, some in pairs.items()}
    enough = {part: some for part, some in lists.items() if some and all(len(set(values)) > 2 for values in some)}
    return {part: rank_correlation(*map(np.array, some)) for part, some in enough.items()}
