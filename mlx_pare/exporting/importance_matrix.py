"""Measures an importance matrix: the mean square of every input of every linear layer."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import mlx.core as mx
import numpy as np

from ..arch import Architecture
from ..base.errors import PareError
from ..gguf.architectures import target_of
from ..gguf.write.imatrix_file import Importance
from ..gguf.write.tensors import table
from ..model.checkpoint import Checkpoint
from ..stream import memory, walk as stream
from ..stream.taps import Tap, replace_module
from ..text.corpus import Rows


class _Sum:
    """The sum over tokens of the square of every input, float32 [columns]."""

    def __init__(self) -> None:
        self.sum = mx.array(0.0)

    def update(self, x: mx.array, mask: mx.array) -> None:
        """Add activations [rows, tokens, columns]; ``mask`` [rows, tokens] is 1 where there is text."""
        self.sum = self.sum + mx.square(x.astype(mx.float32) * mask[..., None]).sum(axis=(0, 1))


class Squares(stream.Observer):
    """Sums the squares of the inputs of every matrix of every block. ``found`` holds them by the name of our tensor."""

    def __init__(self, arch: Architecture):
        self.arch, self.found, self.sums = arch, {}, {}

    def enter(self, index: int, block: Any, mask: Callable[[], mx.array]) -> None:
        """Put taps on the matrices of the block.

        Args:
            index: index of the block.
            block: its module.
            mask: returns bool [rows, tokens], true at text, of the micro-batch.
        """
        self.sums = {t.name: _Sum() for t in self.arch.tensors() if t.layer == index and t.matrix}
        roles = {t.name: t.spec.role for t in self.arch.tensors() if t.name in self.sums}
        for name, total in self.sums.items():
            path = self.arch.path(index, roles[name])
            replace_module(block, path, lambda module, total=total: Tap(module, total, mask, "input"))

    def pending(self) -> list[mx.array]:
        """Return the sums so far.

        Returns:
            One float32 [columns] per matrix of the block.
        """
        return [total.sum for total in self.sums.values()]

    def leave(self, index: int, hidden: Any) -> None:
        """Keep the sums, and release the block."""
        self.found |= {name: np.array(total.sum) for name, total in self.sums.items()}
        self.sums = {}


def measure(
    model: Path, rows: Rows, dataset: str = "text", memory_cap: int | None = None, scratch: Path | None = None
) -> Importance:
    """Stream rows through a model and sum up the squares of the inputs of its matrices.

    Args:
        model: model directory.
        rows: the text, int32 [rows, tokens].
        dataset: the name of the text.
        memory_cap: bytes that may be used; None: the memory that is free.
        scratch: directory for hidden states that do not fit in memory; None: that of the system.
    Returns:
        The sums, float32 [columns] by the name of a matrix in GGUF, and the number of tokens.
    Raises:
        Refused: the walk needs more memory than it may use.
        PareError: the model cannot be GGUF, or the inputs of a matrix are not finite.
    """
    checkpoint = Checkpoint(model)
    stored = table(checkpoint.arch, target_of(checkpoint), "f16")  # raises before anything is computed
    observer = Squares(checkpoint.arch)
    spooled = memory.must_spool(checkpoint, rows, memory_cap)
    with TemporaryDirectory(dir=scratch) as directory:
        stream.walk(model, rows, observer, what="imatrix: block", spool=Path(directory) if spooled else None)
    sums = {r.name: observer.found[r.source.name] for r in stored if r.source and r.source.name in observer.found}
    for name, total in sums.items():
        if not np.isfinite(total).all():
            raise PareError(f"what goes into {name} is not finite", "the model is broken, or overflows on this text")
    return Importance(sums, dict.fromkeys(sums, float(rows.total)), (dataset,), rows.count, rows.length)
