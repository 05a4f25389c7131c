"""Candidate cuts as numbers: how wide every part of every layer is. No arrays of the model."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ..arch import Architecture


@dataclass(frozen=True)
class Part:
    """A part of a block whose units can go: the axis they lie on, and the role of the matrix that writes to the
    residual stream."""

    axis: str
    writer: str


PARTS = {
    "attention": Part("kv_head", "o_proj"),
    "ffn": Part("ffn", "down_proj"),
}


@dataclass(frozen=True)
class Width:
    """What one layer keeps: how many units of each part (0: the part goes), and the bits of its matrices (None: as they
    are)."""

    kv_head: int
    ffn: int
    attention_bits: int | None = None
    ffn_bits: int | None = None

    def units(self, part: str) -> int:
        """How many of a part's units are kept."""
        return getattr(self, PARTS[part].axis)

    def bits(self, part: str) -> int | None:
        """With how many bits a part is packed."""
        return getattr(self, f"{part}_bits")


Candidate = tuple[Width | None, ...]  # one per layer of the source; None: the layer is dropped


@dataclass(frozen=True)
class Curve:
    """How a part of a layer gives way. ``order`` int [units]: the units as greedy OBS removes them, first gone first.
    ``loss`` [units + 1]: by how much of its own square the part's output is missed when so many units are kept."""

    order: np.ndarray
    loss: np.ndarray

    def kept(self, count: int) -> list[int]:
        """The last ``count`` units to go, ascending."""
        return sorted(self.order[len(self.order) - count :].tolist())


Curves = dict[tuple[int, str], Curve]


def whole(arch: Architecture) -> Candidate:
    """The candidate that keeps everything."""
    return tuple(Width(layer.sizes["kv_head"], layer.sizes["ffn"]) for layer in arch.layers)
