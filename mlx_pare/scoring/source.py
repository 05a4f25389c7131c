"""What a criterion may look at: the statistics of a layer, and sums over its weights."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import mlx.core as mx

from ..arch import Tensor
from ..arch.axes import select
from ..base.errors import PareError
from ..model.checkpoint import Checkpoint
from ..model.weights import read_panels
from ..tensors.packed import Packed

OLD_SITES = {"attn_ln.": "attn_norm.", "ffn_ln.": "ffn_norm."}  # an earlier version's name: today's


def read_stats(file: Path) -> dict[str, mx.array]:
    """Read the arrays of stats.safetensors, or of one block of it.

    A file of an earlier version is read too: calibrations and runs that were begun with it go on.

    Args:
        file: what calibrate wrote.
    Returns:
        The arrays by the names that calibrate.calibrate gives them today.
    """
    arrays = mx.load(str(file))
    for old, new in OLD_SITES.items():
        arrays = {name.replace(old, new): array for name, array in arrays.items()}
    return arrays


class Source:
    """Statistics of one model, and sums over its weights by role. Weights are read on request."""

    def __init__(self, checkpoint: Checkpoint, stats: Mapping[str, mx.array], seed: int, about: Mapping[str, Any]):
        """Keep what scores are computed from.

        Args:
            checkpoint: the model.
            stats: arrays as calibrate.calibrate writes them, by name.
            seed: seed of the criterion random.
            about: description of the statistics; "tokens" is the number of valid tokens.
        """
        self.checkpoint, self.arch = checkpoint, checkpoint.arch
        self.stats, self.seed = stats, seed
        self.tokens = about["tokens"]

    @cached_property
    def _tensors(self) -> dict[tuple[int | None, str], Tensor]:
        return {(t.layer, t.spec.role): t for t in self.arch.tensors()}

    def stat(self, layer: int, site: str, name: str) -> mx.array:
        """Return one array of the statistics.

        Args:
            layer: number of the layer.
            site: "ffn", "attention", "attn_norm", "ffn_norm" or "block".
            name: name of the sum, e.g. "sq_sum".
        Returns:
            float32 [units] of the site, for "block" [].
        """
        return self.stats[f"{layer}.{site}.{name}"]

    def angles(self) -> mx.array:
        """Return the angles between the inputs of all blocks, with the output of the last block at the end.

        Returns:
            float32 [layers + 1, layers + 1], from 0 to 1 (accumulators.angles).
        Raises:
            PareError: an earlier version wrote the statistics, without angles.
        """
        if "angles" not in self.stats:
            raise PareError("the statistics hold no angles between layers", "calibrate again, into another --out")
        return self.stats["angles"]

    def sums(self, layer: int, role: str, of: Callable[[mx.array], mx.array], axis: int) -> mx.array:
        """Sum a function of a layer's matrix [out, in] along one axis.

        The matrix is expanded to float32 a part of its rows at a time. If it is stored as one with others, only its own
        rows are read.

        Args:
            layer: number of the layer.
            role: role of the matrix, e.g. "down_proj".
            of: applied to the float32 weights, element by element.
            axis: 0 to sum over outputs, 1 to sum over inputs.
        Returns:
            float32 [in] for axis 0, [out] for axis 1.
        Raises:
            KeyError: the layer has no such role.
        """
        found, (spec, segment) = [], self.arch.row(layer, role)
        rows = None if segment is None else select(spec.dims[0], self.arch.layer_sizes(layer), {}, segment)
        for panel in read_panels(self.checkpoint, self._tensors[layer, spec.role], rows):
            found.append(of(panel.dense() if isinstance(panel, Packed) else panel.astype(mx.float32)).sum(axis=axis))
            mx.eval(found[-1])
        return sum(found[1:], found[0]) if axis == 0 else mx.concatenate(found)

    def key(self, layer: int, axis: str) -> mx.array:
        """Return a random key that depends on seed, layer and axis alone.

        Args:
            layer: number of the layer.
            axis: name of what is drawn, e.g. "ffn".
        Returns:
            Key for mx.random, uint32 [2].
        """
        return mx.random.key(self.seed * 1_000_003 + layer * 101 + sum(map(ord, axis)))

    def per_head(self, layer: int, channels: mx.array) -> mx.array:
        """Divide the channels at the input of o_proj among the kv heads and the query heads of each.

        Args:
            layer: number of the layer.
            channels: values of the channels [q_head*head_dim].
        Returns:
            The same values [kv_head, group, head_dim].
        """
        sizes = self.arch.layer_sizes(layer)
        return channels.reshape(sizes["kv_head"], sizes["group"], sizes["head_dim"])
