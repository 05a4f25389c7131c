"""Which whole layers are removed: one after the other, each time the one without which the predictions change least.

One walk tries to remove each of the remaining layers (planning/try_candidates.py). The layer whose removal leaves the
least KL divergence to the original on held-out text is removed. Then the rest are tried again without it. Scores of
single layers (block influence) or of blocks of neighbours (angular distance) do not know which layers are already
removed. So the best single layers are often a bad set. IST-DASLab/EvoPress drop_scoring.py uses the same leave-one-out
KL, but scores once.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from ..arch import Architecture, can_keep, positions
from ..base.errors import Refused
from ..model.checkpoint import Checkpoint
from ..pruning.reach import best_layers
from ..text.corpus import Rows
from .candidate import Candidate, whole
from .try_candidates import try_out

Trials = Callable[[Sequence[Candidate]], Sequence[float]]


@dataclass(frozen=True)
class Drop:
    """A layer that is removed, and the KL divergence (nats per token) once it and all before it are removed."""

    layer: int
    kl: float


def layers_by_kl(
    model: Path,
    count: int,
    held: Rows,
    protected: Sequence[int] = (),
    memory_cap: int | None = None,
    tried: Trials | None = None,
) -> list[Drop]:
    """Choose the layers to remove, one after the other, until ``count`` are left.

    If the kind of a layer depends on its place (Gemma 3), a layer is removed only if ``count`` layers that keep their
    kinds can still be reached. Each round costs a walk of the held-out rows for every layer that is left. The layers
    before the first removed one are shared and cost nothing extra.

    Args:
        model: model directory.
        count: number of layers to keep.
        held: rows on which the KL divergence is measured, int32 [rows, tokens].
        protected: layers that stay.
        memory_cap: bytes that may be used; None: the memory that is free. Unused with ``tried``.
        tried: measures candidates instead of ``trials``.
    Returns:
        The removed layers in their order, each with the KL divergence in nats per token.
    Raises:
        Refused: ``count`` layers cannot be kept in this way, or the memory does not suffice.
    """
    arch = Checkpoint(model).arch
    tried = tried or trials(model, held, memory_cap)
    full, gone = whole(arch), []
    while len(full) - len(gone) > count:
        before = {drop.layer for drop in gone}
        free = [
            i
            for i in range(len(full))
            if i not in {*before, *protected} and _leads(arch, {*before, i}, count, protected)
        ]
        if not free:
            raise Refused(f"{count} of {len(full)} layers cannot be kept", "ask for another number, or --no-protect")
        kl = tried([tuple(None if n in {*before, i} else w for n, w in enumerate(full)) for i in free])
        least = min(range(len(free)), key=kl.__getitem__)
        gone.append(Drop(free[least], kl[least]))
    return gone


def trials(model: Path, held: Rows, memory_cap: int | None) -> Trials:
    """Make a function that measures candidates which drop layers and narrow none. It repairs nothing and gives none up.

    Args:
        model: model directory.
        held: rows on which the KL divergence is measured, int32 [rows, tokens].
        memory_cap: bytes that may be used; None: the memory that is free.
    Returns:
        A function from candidates to their KL divergences, in nats per token.
    """
    return lambda candidates: (
        try_out(model, candidates, held.first(0), held, {}, memory_cap=memory_cap, lost=math.inf).kl
    )


def _leads(arch: Architecture, gone: set[int], count: int, protected: Sequence[int]) -> bool:
    """Tell whether more layers can be removed until ``count`` layers that keep their kinds are left."""
    left = [i for i in range(len(arch.layers)) if i not in gone]
    if not any(positions(arch, count)):
        return can_keep(arch, left)
    chosen = best_layers(arch, [-1.0 if i in gone else 0.0 for i in range(len(arch.layers))], count, protected)
    return chosen is not None and gone.isdisjoint(chosen)
