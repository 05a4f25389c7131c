"""What a cut model will store: each new tensor, where it comes from, and how it is packed. Arithmetic only.

plan counts bytes with it, prune writes by it, so predicted bytes and bytes on disk are one thing.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from .arch import Architecture, Keep, Tensor, cut
from .artifacts import Size
from .checkpoint import DTYPE_BYTES, Checkpoint
from .fit.footprint import parameters
from .packing import Packing
from .shards import Planned


@dataclass(frozen=True)
class Piece:
    """One tensor of the cut model. ``dtype``: of its values, or of its scales and biases when it is packed."""

    tensor: Tensor
    origin: Tensor
    packing: Packing | None
    dtype: str

    def stored(self) -> list[Planned]:
        """The one or three safetensors entries it becomes, in the order they are written."""
        if self.packing is None:
            return [Planned(self.tensor.name, self.dtype, self.tensor.shape)]
        rows, columns = self.tensor.shape
        groups = (rows, self.packing.groups(columns))
        return [
            Planned(self.tensor.name, "U32", (rows, self.packing.words(columns))),
            Planned(f"{self.tensor.module}.scales", self.dtype, groups),
            Planned(f"{self.tensor.module}.biases", self.dtype, groups),
        ]

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
    asks otherwise. A matrix whose columns no group size
    divides stays dense: the caller can see it, nothing happens silently.
    """
    new = smaller(checkpoint, keep, packing)
    old = {(t.layer, t.spec.role): t for t in checkpoint.arch.tensors()}
    for tensor in new.tensors():
        layer = None if tensor.layer is None else keep.layers[tensor.layer].source
        role = tensor.spec.role
        if role == "lm_head" and checkpoint.arch.tied:
            role = "embed_tokens"  # a head that is untied by the cut starts as the embedding
        origin = old[layer, role]
        dtype = checkpoint.dtype(origin)
        wanted = keep.packing(tensor.layer, tensor.spec.part) or packing or checkpoint.packing(origin.module)
        if not tensor.matrix:
            wanted = None
        elif wanted is not None:
            wanted = Packing(wanted.bits, wanted.group_size, DTYPE_BYTES[dtype]).fitted(tensor.shape[-1])
        yield Piece(tensor, origin, wanted, dtype)


def total_bytes(checkpoint: Checkpoint, keep: Keep, packing: Packing | None = None) -> int:
    """Bytes of all tensors of a cut of this checkpoint, as they will be written."""
    return sum(piece.nbytes for piece in layout(checkpoint, keep, packing))


def size_of(checkpoint: Checkpoint, keep: Keep | None, packing: Packing | None) -> Size:
    """Shape, parameters and bytes of the source (``keep`` None) or of a cut of it."""
    arch = checkpoint.arch if keep is None else smaller(checkpoint, keep, packing)
    counted = parameters(arch)
    return Size(
        layers=len(arch.layers),
        ffn=arch.uniform("ffn"),
        kv_heads=arch.uniform("kv_head"),
        q_heads=arch.uniform("kv_head") * arch.uniform("group"),
        hidden=arch.sizes["hidden"],
        parameters=counted["total"],
        non_embedding=counted["non_embedding"],
        bytes=checkpoint.nbytes() if keep is None else total_bytes(checkpoint, keep, packing),
    )
