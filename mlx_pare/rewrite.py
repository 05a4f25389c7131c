"""A model directory written again with some of its tensors trained: same names, shapes, dtypes and packing."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path

import mlx.core as mx

from .checkpoint import Checkpoint
from .quantized import MX_DTYPE, pack, raw_bytes
from .shards import Planned, ShardWriter, copy_tokenizer

COPIED = ("config.json", "survivors.json", "plan.json", "README.md")


def rewrite(checkpoint: Checkpoint, trained: Mapping[str, mx.array], directory: Path) -> None:
    """Write ``checkpoint`` to ``directory`` with the ``trained`` tensors in place: dense weights by name, which are
    packed as the old ones were, or scales and biases of a packed matrix, whose codes stay. All others byte for byte."""
    lazy = checkpoint.lazy()
    planned, sources = [], []
    for tensor in checkpoint.arch.tensors():
        packing = checkpoint.packing(tensor.module) if tensor.matrix else None
        names = [tensor.name] + ([f"{tensor.module}.scales", f"{tensor.module}.biases"] if packing else [])
        planned += [Planned(n, checkpoint.entries[n].dtype, checkpoint.entries[n].shape) for n in names]
        sources.append((tensor, packing, names))
    writer = ShardWriter(directory, planned)
    for tensor, packing, names in sources:
        dtype = MX_DTYPE[checkpoint.dtype(tensor)]
        if packing and tensor.name in trained:
            new = pack(trained[tensor.name], packing, dtype)
            arrays = [new.words, new.scales, new.biases]
        else:
            arrays = [
                trained[n].astype(MX_DTYPE[checkpoint.entries[n].dtype]) if n in trained else lazy[n] for n in names
            ]
        for name, array in zip(names, arrays, strict=True):
            writer.write(name, raw_bytes(array))
    writer.close()
    for name in COPIED:
        if (checkpoint.path / name).exists():
            shutil.copyfile(checkpoint.path / name, directory / name)
    copy_tokenizer(checkpoint, directory)
