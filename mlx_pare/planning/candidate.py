"""Candidate cuts as numbers: how wide every part of every layer is. This module holds no arrays of the model."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ..arch import Architecture

# A part of a block whose units can be removed: the axis they lie on. In the order of Architecture.writers.
PARTS = {"attention": "kv_head", "ffn": "ffn"}


@dataclass(frozen=True)
class Width:
    """What one layer keeps: the number of units of each part (0: the part is removed), and the bits of its matrices
    (None: unchanged)."""

    kv_head: int
    ffn: int
    attention_bits: int | None = None
    ffn_bits: int | None = None

    def units(self, part: str) -> int:
        """Return how many units of a part are kept."""
        return getattr(self, PARTS[part])

    def bits(self, part: str) -> int | None:
        """Return with how many bits a part is packed; None: unchanged."""
        return getattr(self, f"{part}_bits")


Candidate = tuple[Width | None, ...]  # one per layer of the source; None: the layer is dropped


@dataclass(frozen=True)
class Curve:
    """How much of its output a part of a layer loses as units are removed.

    ``order`` is int [removed]: units in the order in which greedy OBS removes them, all or only the first ones.
    ``loss`` is float [units + 1]: the share of the squared output that is missed, by the number of units that are kept;
    infinite for numbers that the order does not reach.
    """

    order: np.ndarray
    loss: np.ndarray

    def kept(self, count: int) -> list[int]:
        """Return the ``count`` units that are removed last, ascending."""
        units = len(self.loss) - 1
        return sorted(set(range(units)) - set(self.order[: units - count].tolist()))


Curves = dict[tuple[int, str], Curve]


def whole(arch: Architecture) -> Candidate:
    """Return the candidate that keeps everything."""
    return tuple(Width(layer.sizes["kv_head"], layer.sizes["ffn"]) for layer in arch.layers)
