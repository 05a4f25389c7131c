"""What a cut model will store: each new tensor, where it comes from, and how it is packed. Arithmetic only.

plan counts bytes with it, and prune writes by it. So predicted bytes and bytes on disk are the same.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache

from ..arch import Architecture, Keep, Tensor, cut
from ..arch.spec import FUSED
from ..model.checkpoint import Checkpoint
from ..model.footprint import parameters
from ..tensors.packing import Packing
from ..tensors.safetensors import DTYPE_BYTES
from ..tensors.shards import Planned
from .plan_file import Size

ROUTERS = ("router", "shared_router")  # they stay as they are stored: with fewer bits they choose wrong experts
Role = tuple[int | None, str]  # the layer, or None for the model; the role of a tensor


@dataclass(frozen=True)
class Piece:
    """One tensor of the cut model.

    ``origins``: the tensors it is cut from, joined along their rows; none: it is zero. ``packing``: None if it is
    dense. ``dtype``: of its values, or, if it is packed, the one it is packed in, which affine scales and biases have
    too. ``segment``: which segment of the rows of its one origin it is, if that origin holds other tensors as well.
    """

    tensor: Tensor
    origins: tuple[Tensor, ...]
    packing: Packing | None
    dtype: str
    segment: int | None = None

    def stored(self) -> list[Planned]:
        """The one to three safetensors entries that the tensor becomes, in the order in which they are written."""
        if self.packing is None:
            return [Planned(self.tensor.name, self.dtype, self.tensor.shape)]
        *rows, columns = self.tensor.shape
        _, *others = self.packing.parts
        dtype, groups = self.packing.scale_dtype(self.dtype), (*rows, self.packing.groups(columns))
        words = Planned(self.tensor.name, "U32", (*rows, self.packing.words(columns)))
        return [words, *(Planned(f"{self.tensor.module}.{part}", dtype, groups) for part in others)]

    @property
    def nbytes(self) -> int:
        """The bytes of these entries together."""
        if self.packing is None:
            return self.tensor.size * DTYPE_BYTES[self.dtype]
        return self.packing.stored_bytes(self.tensor.shape)


def embedding_packed(checkpoint: Checkpoint, keep: Keep, packing: Packing | None) -> bool:
    """Decide whether the result's embedding will be quantized: this limits the model types some families may become.

    Args:
        checkpoint: the source.
        keep: the cut.
        packing: packing of the result; None: as in the source.

    Returns:
        Whether it will be.
    """
    asked = keep.packing(None, "embedding") or packing
    return asked is not None or checkpoint.packing(next(checkpoint.arch.tensors()).module) is not None


def smaller(checkpoint: Checkpoint, keep: Keep, packing: Packing | None = None) -> Architecture:
    """Return the architecture that a cut of a checkpoint leaves.

    Args:
        checkpoint: the source.
        keep: the cut.
        packing: packing of the result; None: as in the source.

    Returns:
        The architecture of the result.

    Raises:
        PareError: no class of stock mlx-lm can hold the result, or a layer would change its kind.
    """
    return cut(checkpoint.arch, keep, embedding_packed(checkpoint, keep, packing))


def layout(
    checkpoint: Checkpoint, keep: Keep, packing: Packing | None = None, new: Architecture | None = None
) -> Iterator[Piece]:
    """Yield the pieces of the cut model in the order of the new model.

    A matrix whose columns no group size divides stays dense: its piece has no packing, so the caller sees it.

    Args:
        checkpoint: the source.
        keep: the cut; its packings of single parts come first.
        packing: how to quantize the rest of the result; None: each tensor as it is in the source.
        new: what ``smaller`` returned for them; None: it is asked.

    Returns:
        One piece for each tensor.

    Raises:
        PareError: as ``smaller``.
    """
    new = new or smaller(checkpoint, keep, packing)
    old = checkpoint.by_role
    for tensor in new.tensors():
        layer = None if tensor.layer is None else keep.layers[tensor.layer].source
        origins, segment = _origins(tensor, layer, old, checkpoint.arch.tied)
        dtype = checkpoint.dtype(origins[0]) if origins else checkpoint.dtype(old[None, "embed_tokens"])
        wanted = None
        if tensor.matrix:
            own = [checkpoint.packing(origin.module) for origin in origins]
            asked = None if tensor.spec.role in ROUTERS else keep.packing(tensor.layer, tensor.spec.part) or packing
            wanted = asked or _common(own)
        if wanted is not None:
            wanted = _fitted(wanted, DTYPE_BYTES[dtype], tensor.shape[-1])
        if _emptied(tensor, keep):
            origins = ()
        yield Piece(tensor, origins, wanted, dtype, segment)


@cache
def _fitted(packing: Packing, scale_bytes: int, columns: int) -> Packing | None:
    return replace(packing, scale_bytes=scale_bytes).fitted(columns)


def _origins(
    tensor: Tensor, layer: int | None, old: Mapping[Role, Tensor], tied: bool
) -> tuple[tuple[Tensor, ...], int | None]:
    """The tensors of the source that a new one is made of, and which segment of the rows of its one origin it is (None:
    all). There are no tensors for a bias that the new family has and the source lacks."""
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
    """Whether the tensor lies on an axis of which its layer keeps nothing: the family needs something in its place."""
    gone = [axis for axis, index in keep.of(tensor.layer).items() if not len(index)]
    return bool(gone) and any(axis in gone for dim in tensor.spec.dims for segment in dim for axis in segment)


def _common(packings: Sequence[Packing | None]) -> Packing | None:
    """The packing of joined matrices: dense if one is dense, else that of the one with the most bits."""
    if not packings or None in packings:
        return None
    return max(packings, key=lambda p: (p.bits, -p.group_size))


def total_bytes(
    checkpoint: Checkpoint, keep: Keep, packing: Packing | None = None, new: Architecture | None = None
) -> int:
    """Count the bytes of a cut model, as its tensors will be written.

    Args:
        checkpoint: the source.
        keep: the cut.
        packing: packing of the result; None: as in the source.
        new: what ``smaller`` returned for them; None: it is asked.

    Returns:
        Bytes of all tensors.

    Raises:
        PareError: as ``smaller``.
    """
    return sum(piece.nbytes for piece in layout(checkpoint, keep, packing, new))


def size_of(checkpoint: Checkpoint, keep: Keep | None, packing: Packing | None) -> Size:
    """Measure the source or a cut of it.

    Args:
        checkpoint: the source.
        keep: the cut; None: the source itself.
        packing: packing of the result; None: as in the source.

    Returns:
        Shape, parameters and bytes.

    Raises:
        PareError: as ``smaller``.
    """
    arch = checkpoint.arch if keep is None else smaller(checkpoint, keep, packing)
    counted = parameters(arch)
    return Size(
        layers=len(arch.layers),
        ffn=arch.each("ffn"),
        kv_heads=arch.each("kv_head"),
        q_heads=arch.each("kv_head", "group"),
        experts=arch.uniform("expert") if arch.uses("expert") else 0,
        hidden=arch.sizes["hidden"],
        parameters=counted["total"],
        non_embedding=counted["non_embedding"],
        bytes=checkpoint.nbytes() if keep is None else total_bytes(checkpoint, keep, packing, arch),
    )
