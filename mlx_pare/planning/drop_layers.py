"""Which whole layers go: one after the other, each time the one without which predictions change least.

All layers that are left are tried beside each other in one walk (planning/try_candidates.py), the one with the least KL
divergence to the original on held-out text goes, and the rest are tried again with it gone. Scores of single layers
(block influence) or of blocks of neighbours (angular distance) do not know what is gone already: the best single layers
are often a bad set. Leave-one-out KL as IST-DASLab/EvoPress drop_scoring.py has it, which scores once.
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
    """A layer that goes, and the KL divergence (nats per token) once it and all before it are gone."""

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
    """The layers that go until ``count`` are left, in their order. ``held``: rows on which the KL divergence is
    measured; ``tried``: what measures candidates in their place. Where the kind of a layer hangs on its place (Gemma 3)
    only those go whose loss still leads to ``count`` layers that keep their kinds.

    Each round costs a walk of the held rows for every layer that is left, less what they share: the layers before the
    first that went. Raises Refused when ``count`` layers cannot be kept so, or memory does not suffice.
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
    """Measures candidates that drop layers, and narrow none: nothing is repaired, and none is given up."""
    return lambda candidates: (
        try_out(model, candidates, held.first(0), held, {}, memory_cap=memory_cap, lost=math.inf).kl
    )


def _leads(arch: Architecture, gone: set[int], count: int, protected: Sequence[int]) -> bool:
    """Whether more layers can go until ``count`` are left that keep their kinds."""
    left = [i for i in range(len(arch.layers)) if i not in gone]
    if not any(positions(arch, count)):
        return can_keep(arch, left)
    chosen = best_layers(arch, [-1.0 if i in gone else 0.0 for i in range(len(arch.layers))], count, protected)
    return chosen is not None and gone.isdisjoint(chosen)
