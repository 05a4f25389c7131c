"""A model directory written again with some tensors replaced: shapes, packing, dtypes and the other files stay."""

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
    """Write a checkpoint with trained tensors, packed the same way. Other tensors stay byte for byte.

    Args:
        checkpoint: the model that was trained.
        trained: name of a weight -> a function that returns its new values, packed or float, logical shape as in the
            checkpoint. It is called when it is the tensor's turn, so that one tensor at a time is in memory.
        directory: the directory to write to; it exists.
        same_scales: whether float values of a packed matrix keep its scales and biases, and unmoved ones their codes.
    Raises:
        PareError: a file of the checkpoint ends too early, because it was changed since it was opened.
    """

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
    """Convert new values of a tensor to its entries in the checkpoint's format.

    Args:
        checkpoint: the model that the tensor is part of.
        tensor: the tensor; its packing and dtype are those of the checkpoint.
        new: the values, float of the logical shape, or already packed; packed ones are not cast.
    Returns:
        Name of an entry -> its array: the tensor alone, or words, scales and biases.
    """
    dtype = MX_DTYPE[checkpoint.dtype(tensor)]
    packing = checkpoint.packing(tensor.module) if tensor.matrix else None
    if packing is None:
        return {tensor.name: new.astype(dtype)}
    new = new if isinstance(new, Packed) else pack(new, packing, dtype)
    return dict(zip(names(checkpoint, tensor), new.arrays.values(), strict=True))


def write_stored(
    checkpoint: Checkpoint, new: Callable[[Tensor], Mapping[str, mx.array] | None], directory: Path
) -> None:
    """Write a checkpoint again, one tensor in memory at a time, with some entries replaced.

    Args:
        checkpoint: the model to copy.
        new: returns the entries of a tensor, name -> array of the stored shape and dtype; None: it stays byte for byte.
        directory: the directory to write to; it exists.
    Raises:
        PareError: a file of the checkpoint ends too early, because it was changed since it was opened.
    """
    tensors = list(checkpoint.arch.tensors())
    entries = [(name, checkpoint.entries[name]) for tensor in tensors for name in names(checkpoint, tensor)]
    beside = checkpoint.beside()
    entries += beside.items()
    writer = ShardWriter(directory, [Planned(name, entry.dtype, entry.shape) for name, entry in entries])
    for tensor in tensors:
        found = new(tensor)
        for name in names(checkpoint, tensor):
            writer.stream(name, sliced(checkpoint.entries[name]) if found is None else [raw_bytes(found[name])])
    for name, entry in beside.items():
        writer.stream(name, sliced(entry))
    writer.close()
    for name in BESIDE:
        if (checkpoint.path / name).exists():
            shutil.copyfile(checkpoint.path / name, directory / name)
    copy_tokenizer(checkpoint, directory)
