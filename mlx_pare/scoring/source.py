"""What a criterion may look at: the statistics of a layer, and sums over its weights."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cached_property
from typing import Any

import mlx.core as mx

from ..arch import Tensor
from ..arch.axes import select
from ..base.errors import PareError
from ..model.checkpoint import Checkpoint
from ..model.weights import read_panels
from ..tensors.packed import Packed


class Source:
    """Statistics [units], and sums over weights by role, of one model. Weights are read when asked for."""

    def __init__(self, checkpoint: Checkpoint, stats: Mapping[str, mx.array], seed: int, about: Mapping[str, Any]):
        self.checkpoint, self.arch = checkpoint, checkpoint.arch
        self.stats, self.seed = stats, seed
        self.tokens = about["tokens"]

    @cached_property
    def _tensors(self) -> dict[tuple[int | None, str], Tensor]:
        return {(t.layer, t.spec.role): t for t in self.arch.tensors()}

    def stat(self, layer: int, site: str, name: str) -> mx.array:
        return self.stats[f"{layer}.{site}.{name}"]

    def angles(self) -> mx.array:
        """[layers + 1, layers + 1] between the inputs of all blocks, the output of the last one behind them. Raises
        PareError for statistics of an earlier version."""
        if "angles" not in self.stats:
            raise PareError("the statistics hold no angles between layers", "calibrate again, into another --out")
        return self.stats["angles"]

    def sums(self, layer: int, role: str, of: Callable[[mx.array], mx.array], axis: int) -> mx.array:
        """Sums along an axis of a matrix [out, in] in float32 of which ``of`` was taken, element by element: [in] for
        axis 0, [out] for axis 1. The matrix is expanded a part of its rows at a time; where it is stored as one with
        others, its own rows alone are read."""
        found, (spec, segment) = [], self.arch.row(layer, role)
        rows = None if segment is None else select(spec.dims[0], self.arch.layer_sizes(layer), {}, segment)
        for panel in read_panels(self.checkpoint, self._tensors[layer, spec.role], rows):
            found.append(of(panel.dense() if isinstance(panel, Packed) else panel.astype(mx.float32)).sum(axis=axis))
            mx.eval(found[-1])
        return sum(found[1:], found[0]) if axis == 0 else mx.concatenate(found)

    def key(self, layer: int, axis: str) -> mx.array:
        """A random key that depends on seed, layer and axis alone."""
        return mx.random.key(self.seed * 1_000_003 + layer * 101 + sum(map(ord, axis)))

    def heads(self, layer: int) -> tuple[int, int, int]:
        """(q heads, kv heads, head_dim)."""
        sizes = self.arch.layer_sizes(layer)
        return sizes["kv_head"] * sizes["group"], sizes["kv_head"], sizes["head_dim"]

    def per_head(self, layer: int, channels: mx.array) -> mx.array:
        """Channels of the input of o_proj as [q_head, head_dim]."""
        q_heads, _, head_dim = self.heads(layer)
        return channels.reshape(q_heads, head_dim)

    def shared(self, layer: int, kv_heads: mx.array) -> mx.array:
        """Scores of kv heads [kv_head] in equal parts for their query heads [q_head]: plan adds them up again."""
        q_heads, count, _ = self.heads(layer)
        return mx.repeat(kv_heads / (q_heads // count), q_heads // count)
