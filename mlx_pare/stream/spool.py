"""Hidden states on disk, for walks whose states do not fit in memory: written and read a micro-batch at a time.

Between blocks the stock forward is handed a placeholder, an array of the right shape that holds one zero. A spool is a
safetensors file with one tensor, ``hidden`` [rows, length, hidden]. It is read and written with plain
system calls: pages of a mapped file would count as this process's memory.
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
    """Hidden states [rows, length, hidden] in a file. ``spool[rows]`` and ``spool[rows, ...]`` (a slice or an index of
    rows first) read those rows, after ``norm`` where there is one."""

    def __init__(self, path: Path, norm: Callable[[mx.array], mx.array] | None = None):
        """Raises PareError when there is no whole spool at ``path``."""
        entry = read_header(path)[NAME]
        self.path, self.norm, self.shape, self.dtype = path, norm, entry.shape, MX_DTYPE[entry.dtype]
        self._start, self._row = entry.start, entry.nbytes // max(1, entry.shape[0])
        self._file = path.open("rb+")

    @classmethod
    def create(cls, path: Path, shape: tuple[int, int, int], dtype: mx.Dtype) -> Spool:
        """A spool of zeros at ``path``: what is there already is lost."""
        nbytes = int(np.prod(shape)) * dtype.size
        header = packed_header({NAME: {"dtype": _NAMES[dtype], "shape": shape, "data_offsets": [0, nbytes]}})
        with path.open("wb") as file:
            file.write(header)
            file.truncate(len(header) + nbytes)
        return cls(path)

    def normed(self, norm: Callable[[mx.array], mx.array]) -> Spool:
        """The same states, read through ``norm``."""
        return Spool(self.path, norm)

    def write(self, rows: slice, hidden: mx.array) -> None:
        """Put the states of some rows in their place."""
        self._file.seek(self._start + rows.start * self._row)
        self._file.write(raw_bytes(hidden.astype(self.dtype)))

    def finish(self) -> None:
        """What was written is on the disk."""
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
    """What takes no memory in the place of hidden states."""
    return mx.broadcast_to(mx.zeros((1,), dtype), shape)


class InMemory:
    """Hidden states of all rows as one array, handed to the stock forward as they are."""

    def entering(self, index: int, x: mx.array) -> mx.array:
        return x

    def collect(self, index: int, parts: Iterable[tuple[slice, Any]]) -> Any:
        """All micro-batches, put together again; None when they were not computed to their end."""
        pieces = [after for _, after in parts]
        joined = None if pieces[0] is None else join(pieces)
        mx.eval(joined)
        return joined

    def leaving(self, joined: Any) -> Any:
        return joined


class Spooled:
    """The hidden states of a walk: those behind block i - 1 lie in ``directory``/hidden-i.safetensors; the ones before
    are deleted when the observer has left the block. Code between blocks that touches the values would compute with the
    placeholder: that is refused."""

    def __init__(self, directory: Path, rows: int):
        self.directory, self.rows, self.handed = directory, rows, None

    def begin(self, parts: Iterable[tuple[slice, mx.array]]) -> None:
        """Put what goes into the first block on disk."""
        self.states = self.collect(-1, parts)

    def entering(self, index: int, x: mx.array | Spool) -> Spool:
        """The states that go into a block, given what the stock forward hands to it or where a walk goes on."""
        if isinstance(x, Spool):
            self.states = x
        elif self.handed is not None and x is not self.handed:
            raise PareError(
                f"before block {index} the model changes hidden states, which lie on disk",
                "use so few rows that they fit in memory (--samples)",
            )
        return self.states

    def collect(self, index: int, parts: Iterable[tuple[slice, Any]]) -> Spool:
        """The states behind a block, as the micro-batches come; under their name when all are on the disk."""
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
        """The placeholder for the states that were collected last; older ones are not needed any more."""
        self.states = states
        for file in self.directory.glob("hidden-*"):
            if file != states.path:
                file.unlink()
        self.handed = placeholder(states.shape, states.dtype)
        return self.handed


def join(pieces: list) -> Any:
    """What micro-batches gave, arrays or tuples of them, as one; what is no array is the same for all of them."""
    if len(pieces) == 1:
        return pieces[0]
    if isinstance(pieces[0], tuple):
        return tuple(
            join(list(part)) if isinstance(part[0], mx.array) else part[0] for part in zip(*pieces, strict=True)
        )
    return mx.concatenate(pieces)
