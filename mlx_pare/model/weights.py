"""Tensors of a checkpoint as arrays: whole, in panels of rows, or a row at a time."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from ..arch import Tensor
from ..tensors.packed import MX_DTYPE, Packed
from ..tensors.panels import PANEL_VALUES, row_panels
from ..tensors.safetensors import Entry
from .checkpoint import Checkpoint


def read(checkpoint: Checkpoint, name: str) -> Packed | mx.array:
    """Read a weight of a checkpoint as it is stored, lazily.

    Each call makes new arrays, so that dropping the result frees the memory.

    Args:
        checkpoint: the model.
        name: the name of the weight, such as "model.norm.weight".
    Returns:
        The packed matrix [rows, columns], or an array of the stored shape and dtype.
    """

    def lazy(tensor: str) -> mx.array:
        return mx.load(str(checkpoint.entries[tensor].file))[tensor]

    module, _, leaf = name.rpartition(".")
    packing = checkpoint.packing(module) if leaf == "weight" else None
    if packing is None:
        return lazy(name)
    return Packed.of((lazy(f"{module}.{part}") for part in packing.parts), packing)


class StoredEmbedding(nn.Module):
    """An embedding that looks its rows up in the checkpoint, so that its table is never in memory.

    ``name``: the weight of the table. ``dtype``: of the rows that come out.
    """

    def __init__(self, checkpoint: Checkpoint, name: str, dtype: mx.Dtype):
        super().__init__()
        self._checkpoint, self._name, self._dtype = checkpoint, name, dtype

    def __call__(self, tokens: mx.array) -> mx.array:
        module, packing = self._name.rpartition(".")[0], self._checkpoint.packing(self._name.rpartition(".")[0])
        index = np.array(tokens)
        if packing is None:
            return self._rows(self._name, index).astype(self._dtype)
        parts = (self._rows(f"{module}.{part}", index.reshape(-1)) for part in packing.parts)
        return Packed.of(parts, packing).dense(self._dtype).reshape(*index.shape, -1)

    def _rows(self, tensor: str, index: np.ndarray) -> mx.array:
        entry = self._checkpoint.entries[tensor]
        table = np.memmap(entry.file, np.uint8, "r", entry.start, (entry.shape[0], entry.nbytes // entry.shape[0]))
        return mx.array(table[index]).view({**MX_DTYPE, "U32": mx.uint32, "U8": mx.uint8}[entry.dtype])


_VIEWS = {"U8": np.uint8, "U32": np.uint32, "F32": np.float32, "F16": np.float16, "BF16": np.uint16}


def read_panels(
    checkpoint: Checkpoint, tensor: Tensor, rows: Sequence[int] | None = None
) -> Iterator[Packed | mx.array]:
    """Read chosen rows of a tensor, a few at a time.

    Args:
        checkpoint: the model.
        tensor: the tensor.
        rows: the rows to read, of all its matrices (tensors/panels.py), in this order; None: all.
    Returns:
        Panels [some of the rows, columns] of the stored dtype, packed if the tensor is packed.
    Raises:
        PareError: the file ends too early, because it was changed since it was opened.
    """
    packing = checkpoint.packing(tensor.module) if tensor.matrix else None
    names = [f"{tensor.module}.{part}" for part in packing.parts] if packing else [tensor.name]
    entries = [checkpoint.entries[name] for name in names]
    rows_of_all = tensor.rows if len(tensor.shape) > 1 else tensor.size
    step = max(1, PANEL_VALUES * rows_of_all // tensor.size)
    for panels in zip(*(row_panels(entry, rows, step) for entry in entries), strict=True):
        arrays = [_array(panel, entry) for panel, entry in zip(panels, entries, strict=True)]
        yield Packed.of(arrays, packing) if packing else arrays[0]


def _array(panel: np.ndarray, entry: Entry) -> mx.array:
    array = mx.array(panel.view(_VIEWS[entry.dtype]).reshape(len(panel), *entry.shape[1:][-1:]))
    return array.view(mx.bfloat16) if entry.dtype == "BF16" else array
