"""What a cut model will store: each new tensor, where it comes from, and how it is packed. Arithmetic only.

plan counts bytes with it, prune writes by it, so predicted bytes and bytes on disk are one thing.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from ..arch import Architecture, Keep, Tensor, cut
from ..arch.spec import FUSED
from ..model.checkpoint import Checkpoint
from ..model.footprint import parameters
from ..tensors.packing import Packing
from ..tensors.safetensors import DTYPE_BYTES
from ..tensors.shards import Planned
from .plan_file import Size

Role = tuple[int | None, str]  # of a layer, or (None) of the model


@dataclass(frozen=True)
class Piece:
    """One tensor of the cut model. ``origins``: the tensors it is cut from, joined along their rows; none: it is zero.

    ``dtype``: of its values, or of what it is packed in, which affine scales and biases have too. ``segment``: which
    segment of the rows of its one origin it is, where that holds others too.
    """

    tensor: Tensor
    origins: tuple[Tensor, ...]
    packing: Packing | None
    dtype: str
    segment: int | None = None

    def stored(self) -> list[Planned]:
        """The one to three safetensors entries it becomes, in the order they are written."""
        if self.packing is None:
            return [Planned(self.tensor.name, self.dtype, self.tensor.shape)]
        rows, columns = self.tensor.shape
        _, *others = self.packing.parts
        dtype, groups = self.packing.scale_dtype(self.dtype), (rows, self.packing.groups(columns))
        words = Planned(self.tensor.name, "U32", (rows, self.packing.words(columns)))
        return [words, *(Planned(f"{self.tensor.module}.{part}", dtype, groups) for part in others)]

    @property
    def nbytes(self) -> int:
        return sum(planned.nbytes for planned in self.stored())


def embedding_packed(checkpoint: Checkpoint, keep: Keep, packing: Packing | None) -> bool:
    """Whether the result's embedding will be quantized, which decides how some families may leave."""
    asked = keep.packing(None, "embedding") or packing
    return asked is not None or checkpoint.packing("model.embed_tokens") is not None


def smaller(checkpoint: Checkpoint, keep: Keep, packing: Packing | None = None) -> Architecture:
    """The architecture that a cut of this checkpoint leaves."""
    return cut(checkpoint.arch, keep, embedding_packed(checkpoint, keep, packing))


def layout(checkpoint: Checkpoint, keep: Keep, packing: Packing | None = None) -> Iterator[Piece]:
    """The pieces of the cut model in the order of the new model.

    ``packing``: quantize the result so (None: each tensor as it is in the source), but for the parts for which ``keep``
    asks otherwise. A matrix whose columns no group size divides stays dense: the caller can see it, nothing happens
    silently.
    """
    new = smaller(checkpoint, keep, packing)
    old = {(t.layer, t.spec.role): t for t in checkpoint.arch.tensors()}
    for tensor in new.tensors():
        layer = None if tensor.layer is None else keep.layers[tensor.layer].source
        origins, segment = _origins(tensor, layer, old, checkpoint.arch.tied)
        dtype = checkpoint.dtype(origins[0]) if origins else checkpoint.dtype(old[None, "embed_tokens"])
        wanted = None
        if tensor.matrix:
            own = [checkpoint.packing(origin.module) for origin in origins]
            wanted = keep.packing(tensor.layer, tensor.spec.part) or packing or _common(own)
        if wanted is not None:
            wanted = replace(wanted, scale_bytes=DTYPE_BYTES[dtype]).fitted(tensor.shape[-1])
        if _emptied(tensor, keep):
            origins = ()
        yield Piece(tensor, origins, wanted, dtype, segment)


def _origins(
    tensor: Tensor, layer: int | None, old: Mapping[Role, Tensor], tied: bool
) -> tuple[tuple[Tensor, ...], int | None]:
    """The tensors of the source that a new one is made of, and which segment of the rows of one that is, if it is not
    all of it. No tensors for a bias that its family wants and ours has not."""
    role = tensor.spec.role
    if role == "lm_head" and tied:
        role = "embed_tokens"  # a head that is untied by the cut starts as the embedding
    if (layer, role) not in old and role.endswith("_bias"):
        return (), None
    if (layer, role) in old:
        return (old[layer, role],), None
    if role in FUSED:
        return tuple(old[layer, part] for part in FUSED[role]), None
    fused = next(name for name, parts in FUSED.items() if role in parts and (layer, name) in old)
    return (old[layer, fused],), FUSED[fused].index(role)


def _emptied(tensor: Tensor, keep: Keep) -> bool:
    """Whether it lies on an axis of which its layer keeps nothing: the family had to leave something in its place."""
    kept = keep.of(tensor.layer)
    axes = {axis for dim in tensor.spec.dims for segment in dim for axis in segment}
    return any(axis in axes and not len(index) for axis, index in kept.items())


def _common(packings: Sequence[Packing | None]) -> Packing | None:
    """What matrices become that are joined: dense when one is dense, else packed as the one with most bits."""
    if not packings or None in packings:
        return None
    return max(packings, key=lambda p: (p.bits, -p.group_size))


def total_bytes(checkpoint: Checkpoint, keep: Keep, packing: Packing | None = None) -> int:
    """Bytes of all tensors of a cut of this checkpoint, as they will be written."""
    return sum(piece.nbytes for piece in layout(checkpoint, keep, packing))


def size_of(checkpoint: Checkpoint, keep: Keep | None, packing: Packing | None) -> Size:
    """Shape, parameters and bytes of the source (``keep`` None) or of a cut of it."""
    arch = checkpoint.arch if keep is None else smaller(checkpoint, keep, packing)
    counted = parameters(arch)
    return Size(
        layers=len(arch.layers),
        ffn=arch.each("ffn"),
        kv_heads=arch.each("kv_head"),
        q_heads=arch.each("kv_head", "group"),
        hidden=arch.sizes["hidden"],
        parameters=counted["total"],
        non_embedding=counted["non_embedding"],
        bytes=checkpoint.nbytes() if keep is None else total_bytes(checkpoint, keep, packing),
    )
