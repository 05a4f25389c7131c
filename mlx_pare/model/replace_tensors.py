"""A model directory again, some of its tensors trained: shapes, packing, dtypes and the files beside them stay."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from pathlib import Path

import mlx.core as mx

from ..arch import Tensor
from ..tensors.packed import MX_DTYPE, Packed, pack, raw_bytes, repacked
from ..tensors.panels import sliced
from ..tensors.shards import Planned, ShardWriter
from .checkpoint import Checkpoint
from .directory import copy_tokenizer
from .weights import read

BESIDE = ("config.json", "survivors.json", "plan.json", "README.md")


def write(
    checkpoint: Checkpoint,
    trained: Mapping[str, Callable[[], Packed | mx.array]],
    directory: Path,
    same_scales: bool = False,
) -> None:
    """The checkpoint with trained tensors (made when it is their turn, by name) in place, packed the same way; the
    others byte for byte. ``same_scales``: packed matrices keep their scales and biases, and the codes of what did not
    move."""

    def new(tensor: Tensor) -> Mapping[str, mx.array] | None:
        if tensor.name not in trained:
            return None
        made = trained[tensor.name]()
        if same_scales and isinstance(grid := read(checkpoint, tensor.name), Packed) and not isinstance(made, Packed):
            made = repacked(grid, made)
        return stored(checkpoint, tensor, made)

    write_stored(checkpoint, new, directory)


def names(checkpoint: Checkpoint, tensor: Tensor) -> list[str]:
    """The entries that a tensor consists of: itself, or words, scales and biases."""
    packing = checkpoint.packing(tensor.module) if tensor.matrix else None
    return [f"{tensor.module}.{part}" for part in packing.parts] if packing else [tensor.name]


def stored(checkpoint: Checkpoint, tensor: Tensor, new: Packed | mx.array) -> dict[str, mx.array]:
    """The entries of a tensor for new values: packed, if they are not yet, and of the dtype as in the checkpoint."""
    dtype = MX_DTYPE[checkpoint.dtype(tensor)]
    packing = checkpoint.packing(tensor.module) if tensor.matrix else None
    if packing is None:
        return {tensor.name: new.astype(dtype)}
    new = new if isinstance(new, Packed) else pack(new, packing, dtype)
    return dict(zip(names(checkpoint, tensor), new.arrays.values(), strict=True))


def write_stored(
    checkpoint: Checkpoint, new: Callable[[Tensor], Mapping[str, mx.array] | None], directory: Path
) -> None:
    """The checkpoint, one tensor in memory at a time, with the entries that ``new`` has for a tensor in place of its
    own; None: it stays byte for byte."""
    tensors = list(checkpoint.arch.tensors())
    entries = [(name, checkpoint.entries[name]) for tensor in tensors for name in names(checkpoint, tensor)]
    writer = ShardWriter(directory, [Planned(name, entry.dtype, entry.shape) for name, entry in entries])
    for tensor in tensors:
        found = new(tensor)
        for name in names(checkpoint, tensor):
            writer.stream(name, sliced(checkpoint.entries[name]) if found is None else [raw_bytes(found[name])])
    writer.close()
    for name in BESIDE:
        if (checkpoint.path / name).exists():
            shutil.copyfile(checkpoint.path / name, directory / name)
    copy_tokenizer(checkpoint, directory)
