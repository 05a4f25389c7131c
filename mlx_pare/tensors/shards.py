"""Writing the weights of a model directory: safetensors shards, one tensor at a time, and their index."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..base import machine
from .safetensors import DTYPE_BYTES

SHARD_BYTES = 4 << 30
OUR_KEY = "pare"  # in config.json; transformers and mlx-lm ignore it


@dataclass(frozen=True)
class Planned:
    """A tensor that is about to be written."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        size = DTYPE_BYTES[self.dtype]
        for n in self.shape:
            size *= n
        return size


def packed_header(table: Mapping[str, Any]) -> bytes:
    """The first bytes of a safetensors file, up to the first tensor."""
    raw = json.dumps(table, separators=(",", ":")).encode()
    raw += b" " * (-len(raw) % 8)
    return struct.pack("<Q", len(raw)) + raw


class ShardWriter:
    """Writes safetensors shards one tensor at a time: headers first (all shapes are known), then each tensor's bytes.

    At most one tensor is in memory. Nothing looks finished before ``close``: it writes the index of several shards
    last, and the caller renames the directory. Source of the format: huggingface/safetensors README.
    """

    def __init__(self, directory: Path, planned: Iterable[Planned], shard_bytes: int = SHARD_BYTES):
        self.directory = directory
        self.shards: list[list[Planned]] = [[]]
        filled = 0
        for tensor in planned:
            if self.shards[-1] and filled + tensor.nbytes > shard_bytes:
                self.shards.append([])
                filled = 0
            self.shards[-1].append(tensor)
            filled += tensor.nbytes
        self._names = self._file_names(len(self.shards))
        self._queue = [(name, t) for name, shard in zip(self._names, self.shards, strict=True) for t in shard]
        self._next = 0
        self._file = None

    @staticmethod
    def _file_names(count: int) -> list[str]:
        if count == 1:
            return ["model.safetensors"]
        return [f"model-{i + 1:05d}-of-{count:05d}.safetensors" for i in range(count)]

    def write(self, name: str, data: memoryview | bytes) -> None:
        """Append the next planned tensor. Raises AssertionError if name or size differ from the plan."""
        self.stream(name, [data])

    def stream(self, name: str, parts: Iterable[memoryview | bytes]) -> None:
        """Append the next planned tensor, its bytes in parts. Raises as ``write``."""
        if self._next == len(self._queue):
            raise AssertionError(f"wrote {name}, which was not announced")
        file_name, planned = self._queue[self._next]
        if planned.name != name:
            raise AssertionError(f"wrote {name}, announced {planned}")
        if self._file is None or self._file.name != str(self.directory / file_name):
            self._open(file_name)
        written = sum(self._file.write(part) for part in parts)
        if written != planned.nbytes:
            raise AssertionError(f"wrote {name} ({written} bytes), announced {planned}")
        self._next += 1

    def _open(self, file_name: str) -> None:
        self._flush()
        shard = self.shards[self._names.index(file_name)]
        header, offset = {"__metadata__": {"format": "mlx"}}, 0
        for t in shard:
            header[t.name] = {"dtype": t.dtype, "shape": list(t.shape), "data_offsets": [offset, offset + t.nbytes]}
            offset += t.nbytes
        self._file = (self.directory / file_name).open("wb")
        self._file.write(packed_header(header))

    def _flush(self) -> None:
        if self._file is not None:
            self._file.flush()
            machine.to_disk(self._file.fileno())
            self._file.close()
            self._file = None

    def close(self) -> None:
        """Finish the last shard, and write the index of several. Raises AssertionError if a tensor is missing."""
        if self._next != len(self._queue):
            raise AssertionError(f"{len(self._queue) - self._next} announced tensors were not written")
        self._flush()
        if len(self.shards) > 1:
            weight_map = {t.name: f for f, t in self._queue}
            index = {"metadata": {"total_size": sum(t.nbytes for _, t in self._queue)}, "weight_map": weight_map}
            (self.directory / "model.safetensors.index.json").write_text(
                json.dumps(index, indent=1, sort_keys=True) + "\n"
            )
