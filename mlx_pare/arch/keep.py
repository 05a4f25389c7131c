"""What survives a cut: which layers, which units of each, and the packing of parts that differs from the model's."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from ..tensors.packing import Packing


@dataclass(frozen=True)
class LayerKeep:
    """A surviving layer: its index in the original, and the kept indices per axis (an absent axis keeps all).

    An empty list for ``ffn`` or ``kv_head`` means that the layer loses its feed-forward or its attention. ``packings``:
    how the matrices of a part ("attention", "ffn") will be stored, if that differs from the rest of the model.
    """

    source: int
    keep: Mapping[str, Sequence[int]] = field(default_factory=dict)
    packings: Mapping[str, Packing] = field(default_factory=dict)


@dataclass(frozen=True)
class Keep:
    """What survives a cut, in indices of the original. ``packings``: of the part "embedding", as in LayerKeep."""

    layers: tuple[LayerKeep, ...]
    hidden: Sequence[int] | None = None
    packings: Mapping[str, Packing] = field(default_factory=dict)

    def of(self, layer: int | None) -> dict[str, Sequence[int]]:
        """Kept indices per axis for the tensors of one *new* layer, or (None) of the model outside the layers."""
        shared = {} if self.hidden is None else {"hidden": self.hidden}
        return shared if layer is None else {**shared, **self.layers[layer].keep}

    def packing(self, layer: int | None, part: str) -> Packing | None:
        """The packing of a part of one *new* layer, or (None) of the model outside the layers; None: as everything
        else."""
        return (self.packings if layer is None else self.layers[layer].packings).get(part)
