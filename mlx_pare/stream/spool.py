"""Hidden states on disk, for walks whose states do not fit in memory. They are written and read by micro-batch.

Between blocks the stock forward gets a placeholder, an array of the right shape that holds one zero. A spool is a
safetensors file with one tensor, ``hidden`` [rows, length, hidden]. It is read and written with plain system calls,
because pages of a mapped file would count as memory of this process.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from ..base.errors import PareError
from ..tensors.packed import MX_DTYPE, raw_bytes
from ..tensors.safetensors import read_header
from ..tensors.shards import packed_header

NAME = "hidden"
_NAMES = {dtype: name for name, dtype in MX_DTYPE.items()}


class Spool:
    """Hidden states [rows, length, hidden] in a file.

    ``spool[rows]`` and ``spool[rows, ...]`` read rows (a slice or an index) and apply ``norm`` to them if there is one.
    """

    def __init__(self, path: Path, norm: Callable[[mx.array], mx.array] | None = None):
        """Open a spool. Raises PareError if ``path`` is no safetensors file, or is cut off."""
        entry = read_header(path)[NAME]
        self.path, self.norm, self.shape, self.dtype = path, norm, entry.shape, MX_DTYPE[entry.dtype]
        self._start, self._row = entry.start, entry.nbytes // max(1, entry.shape[0])
        self._file = path.open("rb+")

    @classmethod
    def create(cls, path: Path, shape: tuple[int, int, int], dtype: mx.Dtype) -> Spool:
        """Create a spool of zeros. A file that is already there is replaced.

        Args:
            path: where to write it.
            shape: rows, length and hidden size.
            dtype: float32, float16 or bfloat16.

        Returns:
            The open spool.
        """
        nbytes = int(np.prod(shape)) * dtype.size
        header = packed_header({NAME: {"dtype": _NAMES[dtype], "shape": shape, "data_offsets": [0, nbytes]}})
        with path.open("wb") as file:
            file.write(header)
            file.truncate(len(header) + nbytes)
        return cls(path)

    def normed(self, norm: Callable[[mx.array], mx.array]) -> Spool:
        """Open the same file again, for reading through a norm.

        Args:
            norm: a function of hidden states [rows, length, hidden] that keeps their shape.

        Returns:
            The spool whose rows come out normed.
        """
        return Spool(self.path, norm)

    def write(self, rows: slice, hidden: mx.array) -> None:
        """Write the states of some rows.

        Args:
            rows: which rows, without a step.
            hidden: their states [rows, length, hidden], in any float dtype; converted to that of the spool.
        """
        self._file.seek(self._start + rows.start * self._row)
        self._file.write(raw_bytes(hidden.astype(self.dtype)))

    def finish(self) -> None:
        """Flush what was written to the disk."""
        self._file.flush()
        os.fsync(self._file.fileno())

    def __getitem__(self, key: Any) -> mx.array:
        rows, rest = (key[0], key[1:]) if isinstance(key, tuple) else (key, ())
        if isinstance(rows, int):
            return self[slice(rows, rows + 1)][(0, *rest)]
        start, stop, step = rows.indices(self.shape[0])
        self._file.flush()
        raw = os.pread(self._file.fileno(), max(0, stop - start) * self._row, self._start + start * self._row)
        found = np.frombuffer(raw, np.uint8).reshape(-1, *self.shape[1:-1], self.shape[-1] * self.dtype.size)
        hidden = mx.array(found).view(self.dtype)[::step]
        return (self.norm(hidden) if self.norm else hidden)[(slice(None), *rest)]


def placeholder(shape: tuple[int, ...], dtype: mx.Dtype) -> mx.array:
    """Create an array that stands for hidden states and takes no memory.

    Args:
        shape: the shape of the states.
        dtype: their dtype.

    Returns:
        Zeros of this shape, broadcast from a single one.
    """
    return mx.broadcast_to(mx.zeros((1,), dtype), shape)


class InMemory:
    """Hidden states of all rows as one array, which the stock forward gets as it is."""

    def entering(self, index: int, x: mx.array) -> mx.array:
        """Return the states that go into a block, as they are.

        Args:
            index: number of the block.
            x: what the stock forward gives to the block, or the states where a walk goes on, [rows, length, hidden].

        Returns:
            ``x``.
        """
        return x

    def collect(self, index: int, parts: Iterable[tuple[slice, Any]]) -> Any:
        """Join what the micro-batches gave; None if they were not computed to their end."""
        pieces = [after for _, after in parts]
        joined = None if pieces[0] is None else join(pieces)
        mx.eval(joined)
        return joined

    def leaving(self, joined: Any) -> Any:
        return joined


class Spooled:
    """Hidden states of a walk on disk: those behind block i - 1 lie in ``directory``/hidden-i.safetensors, i with four
    digits. Earlier ones are deleted when the observer has left the block. A model that changes hidden states between
    blocks would compute with the placeholder, and is refused.
    """

    def __init__(self, directory: Path, rows: int):
        self.directory, self.rows, self.handed = directory, rows, None

    def begin(self, parts: Iterable[tuple[slice, mx.array]]) -> None:
        """Write what goes into the first block to the disk.

        Args:
            parts: every micro-batch: which rows, and their hidden states [rows, length, hidden].
        """
        self.states = self.collect(-1, parts)

    def entering(self, index: int, x: mx.array | Spool) -> Spool:
        """Return the states that go into a block.

        Args:
            index: number of the block.
            x: what the stock forward gives to the block, [rows, length, hidden], or the spool where a walk goes on.

        Returns:
            The spool of the states.

        Raises:
            PareError: the model changed the placeholder between two blocks.
        """
        if isinstance(x, Spool):
            self.states = x
        elif self.handed is not None and x is not self.handed:
            raise PareError(
                f"before block {index} the model changes hidden states, which lie on disk",
                "use so few rows that they fit in memory (--samples)",
            )
        return self.states

    def collect(self, index: int, parts: Iterable[tuple[slice, Any]]) -> Spool:
        """Write the states behind a block as the micro-batches come. The file has its name when all are on the disk.

        Raises PareError if a block returns more than hidden states.
        """
        path, written = self.directory / f"hidden-{index + 1:04d}.safetensors", None
        for rows, hidden in parts:
            if isinstance(hidden, tuple):
                raise PareError("blocks of this model answer more than hidden states, which cannot be spooled")
            if written is None:
                written = Spool.create(path.with_suffix(".tmp"), (self.rows, *hidden.shape[1:]), hidden.dtype)
            written.write(rows, hidden)
        written.finish()
        os.replace(written.path, path)
        return Spool(path)

    def leaving(self, states: Spool) -> mx.array:
        """Delete all states but those that were collected last, and return a placeholder.

        Args:
            states: the spool that ``collect`` returned last.

        Returns:
            Array of the same shape [rows, length, hidden] and dtype, for the stock forward.
        """
        self.states = states
        for file in self.directory.glob("hidden-*"):
            if file != states.path:
                file.unlink()
        self.handed = placeholder(states.shape, states.dtype)
        return self.handed


def join(pieces: list) -> Any:
    """Join what micro-batches gave, arrays or tuples of them, along the rows. The first value that is no array counts
    for all."""
    if len(pieces) == 1:
        return pieces[0]
    if isinstance(pieces[0], tuple):
        return tuple(
            join(list(part)) if isinstance(part[0], mx.array) else part[0] for part in zip(*pieces, strict=True)
        )
    return mx.concatenate(pieces)
