"""The table at the beginning of a safetensors file: names, types, shapes and places of its tensors.

Headers are read within bounds and without an array library, so that looking at a model costs milliseconds. Sizes are
checked before anything is allocated.
"""

from __future__ import annotations

import stat
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..base import untrusted
from ..base.errors import PareError

MAX_DIMENSIONS = 16
MAX_HEADER = untrusted.MAX_JSON  # the safetensors library accepts 100 MB, which would be 2 GB in memory
DTYPE_BYTES = {
    "F64": 8,
    "F32": 4,
    "F16": 2,
    "BF16": 2,
    "I64": 8,
    "I32": 4,
    "U64": 8,  # of random states
    "U32": 4,
    "I16": 2,
    "U16": 2,
    "I8": 1,
    "U8": 1,
    "BOOL": 1,
    "F8_E4M3": 1,  # counted, not read: mlx-lm unpacks them
    "F8_E5M2": 1,
    "F8_E8M0": 1,
}
FLOATS = {"F32", "F16", "BF16"}


@dataclass(frozen=True, slots=True)
class Entry:
    """Where one tensor lies: ``start`` and ``end`` are byte offsets in ``file``."""

    file: Path
    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int

    @property
    def nbytes(self) -> int:
        return self.end - self.start


def read_header(path: Path) -> dict[str, Entry]:
    """Read the tensor table of one safetensors file.

    Raises PareError if the file cannot be read or is cut off, if its header is damaged, or for an unknown tensor type.
    """
    try:
        found = path.stat()
        if not stat.S_ISREG(found.st_mode):
            raise PareError(f"{path} is not a safetensors file but a directory or a device")
        size = found.st_size
        with path.open("rb") as file:
            prefix = file.read(8)
            length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else 0
            if not 2 <= length <= min(MAX_HEADER, size - 8):
                raise PareError(
                    f"{path} is not a safetensors file or is cut off ({size} bytes)", "download or copy it again"
                )
            raw = file.read(length)
    except OSError as error:
        raise PareError(f"cannot read {path}: {error.strerror}") from error
    try:
        table = untrusted.loads(raw, unique=True)
        table.pop("__metadata__", None)
        entries = {name: _entry(path, 8 + length, info) for name, info in table.items()}
        _check_contiguous(entries, 8 + length)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise PareError(f"the header of {path} is damaged: {error}", "download or copy it again") from error
    end = max((e.end for e in entries.values()), default=8 + length)
    if end != size:
        raise PareError(
            f"{path} has {size} bytes, its header describes {end}",
            "it is cut off or damaged: download or copy it again",
        )
    return entries


def _check_contiguous(entries: Mapping[str, Entry], base: int) -> None:
    """Raise ValueError unless every byte belongs to exactly one tensor, as the safetensors library demands."""
    end = base
    for name, entry in sorted(entries.items(), key=lambda item: (item[1].start, item[1].end)):
        if entry.start != end:
            raise ValueError(f"{name} starts at byte {entry.start - base}, expected {end - base}")
        end = entry.end


def _entry(path: Path, base: int, info: Mapping[str, Any]) -> Entry:
    start, end = info["data_offsets"]
    shape = tuple(info["shape"])
    if any(type(n) is not int or not 0 <= n < 2**63 for n in (start, end, *shape)):
        raise ValueError(f"{info['data_offsets']} and {info['shape']} are not whole numbers of a possible size")
    if info["dtype"] not in DTYPE_BYTES:
        raise PareError(
            f"{path} holds tensors of type {info['dtype']}, which is not supported",
            "take the float original of the model",
        )
    if len(shape) > MAX_DIMENSIONS:  # multiplying a hundred thousand numbers takes hours
        raise ValueError(f"{len(shape)} dimensions")
    size = DTYPE_BYTES[info["dtype"]]
    for n in shape:
        size *= n
    if end - start != size:
        raise ValueError(f"{end - start} bytes for {info['dtype']} {list(shape)}")
    return Entry(path, info["dtype"], shape, base + start, base + end)
