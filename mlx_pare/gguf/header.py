"""The header of a GGUF file: metadata and tensor table, without the vocabulary and without the data. No arrays.

gguf.GGUFReader takes seven seconds and 600 MB for a vocabulary of 150,000 tokens; this reader takes 0.02 s and 9 MB. A
file comes from outside: for any bytes, reading ends within a second and 100 MB, in a Header or a PareError.
Format: ggml docs/gguf.md; where it is stricter, what llama.cpp accepts (ggml/src/gguf.cpp).
"""

from __future__ import annotations

import mmap
import os
import re
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from ..base.errors import PareError
from .types import NAMES, nbytes

SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}  # value types
STRING, ARRAY = 8, 9
MAGIC = b"GGUF"
ALIGNMENT = 32  # of tensor data, unless general.alignment says otherwise
MAX_DIMS = 4  # GGML_MAX_DIMS
# Far above any real file, and low enough that a hostile one costs little
MAX_PARTS = 1000  # files of one model
MAX_NAME = 1024  # bytes of a key or the name of a tensor (llama.cpp takes 64 for tensors)
MAX_ENTRIES = 1 << 16  # tensors, or metadata keys
MAX_STRINGS = 1 << 21  # in all arrays together; the largest real vocabularies have 0.8 million with their merges
MAX_ARRAY = 4096  # values of an array that is kept
MAX_VOCABULARY = 1 << 20  # tokens, or merges, of a tokenizer that is read; the largest real ones have half of that
MAX_TOKENS = 32 << 20  # bytes of all of them together; gemma's take 3 million
MAX_TEXT = 1 << 17  # bytes of a text that is kept: chat templates take up to 20,000
ROOM = 1 << 22  # bytes of names, texts and values (40 each) kept in all


@dataclass(frozen=True)
class Skipped:
    """A value that was not kept: an array of strings, a long array (``count`` values), or a long text (bytes)."""

    count: int


class TensorInfo(NamedTuple):
    """One row of the table. ``shape``: as ours, rows first. ``type``: a name of types.TYPES, or "unknown type 99".

    ``offset``: from the beginning of the data. ``nbytes``: without padding; of unknown types up to the next tensor.
    """

    shape: tuple[int, ...]
    type: str
    offset: int
    nbytes: int


@dataclass(frozen=True)
class Header:
    """What a file says about itself; of several parts (read_all): the metadata of the first, the tensors of all."""

    version: int
    metadata: Mapping[str, Any]
    tensors: Mapping[str, TensorInfo]
    data_start: int  # where the data begins (in the first part)
    file_bytes: int

    @property
    def tensor_bytes(self) -> int:
        """Bytes of all tensors, without padding."""
        return sum(tensor.nbytes for tensor in self.tensors.values())


def is_gguf(path: Path) -> bool:
    """Whether a file is GGUF by its first four bytes or its ending (Ollama's blobs have no ending)."""
    if path.suffix.lower() == ".gguf":
        return True
    try:
        if not os.path.isfile(path):  # opening a pipe would wait
            return False
        with path.open("rb") as file:
            return file.read(len(MAGIC)) == MAGIC
    except OSError:
        return False


def read(path: Path) -> Header:
    """The header of one file. Raises PareError, one line, for anything that is no sound little-endian GGUF 2 or 3."""
    return _read(Path(path), lambda path, data: _Cursor(path, data).header())


def read_start(name: str, start: bytes, size: int) -> Header | None:
    """Read a header from the first bytes of a file; None if it goes on behind them. Raises as read.

    Args:
        name: of the file, for messages.
        start: its first bytes.
        size: bytes of the whole file.
    """
    try:
        return _Cursor(name, start, size).header()
    except _GoesOn:
        return None


def vocabulary(path: Path) -> dict[str, Any]:
    """The metadata of one file that begin with "tokenizer.", with arrays in full: within 150 MB. Raises as read."""
    return _read(Path(path), lambda path, data: _Vocabulary(path, data).tokenizer())


def _read(path: Path, reader: Callable[[Path, Any], Any]) -> Any:
    try:
        if not path.is_file():
            what = "a directory" if path.is_dir() else "no regular file" if path.exists() else "not there"
            raise PareError(f"{path} is {what}, expected a GGUF file")
        with path.open("rb") as file:
            if not path.stat().st_size:
                raise PareError(f"{path} is empty, expected a GGUF file")
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
                return reader(path, data)
    except OSError as error:
        raise PareError(f"{path} cannot be read: {error.strerror or error}") from error


def read_all(path: Path) -> Header:
    """The header of a model in one file, or in all its parts ("-00001-of-00003.gguf") given any of them. Raises
    PareError if a part is missing or damaged, or belongs to something else."""
    return union(path, read_parts(path))


def read_parts(path: Path) -> dict[Path, Header]:
    """The headers of the files that a model consists of, in order; given any of them. Raises as read_all."""
    path = Path(path)
    header = read(path)
    count = header.metadata.get("split.count", 0)
    if type(count) is not int or count < 2:
        return {path: header}
    named = re.fullmatch(r"(.*)-(\d{5})-of-(\d{5})\.gguf", path.name, re.DOTALL)
    if not named or int(named[3]) != count:
        raise PareError(f"{path} is one of {count} parts, but is not named as such", "give the parts their names back")
    if count > MAX_PARTS:
        raise PareError(f"{path} says that it is one of {count} parts, more than {MAX_PARTS}")
    parts: dict[Path, Header] = {}
    for number in range(1, count + 1):
        part = path.with_name(f"{named[1]}-{number:05}-of-{count:05}.gguf")
        if not part.is_file():
            raise PareError(f"{part} is missing", f"all {count} parts must be in one directory")
        parts[part] = header if part == path else read(part)
        check_part(part, parts[part], number, count)
    return parts


def check_part(path: Path, header: Header, number: int, count: int) -> None:
    """Raise PareError if a header does not say that its file is this part of ``count``.

    Args:
        path: the file, for the message.
        header: its header.
        number: of the part, from 1.
        count: of all parts.
    """
    found = tuple(header.metadata.get(key) for key in ("split.no", "split.count"))
    if found != (number - 1, count) and not (count == 1 and found[1] in (None, 0, 1)):
        raise PareError(f"{path} says it is part {_shown(found[0])} of {_shown(found[1])}, counting from 0")


def union(path: Path, files: Mapping[Path, Header]) -> Header:
    """The headers of all parts as one: the metadata of the first, the tensors of all. Raises as read_all."""
    parts = list(files.values())
    if len(parts) == 1:
        return parts[0]
    tensors: dict[str, TensorInfo] = {}
    for number, part in enumerate(parts, 1):
        if twice := tensors.keys() & part.tensors.keys():
            raise PareError(f"{path}: part {number} repeats the tensor {_shown(min(twice))}")
        tensors |= part.tensors
    first = parts[0]
    expected = first.metadata.get("split.tensors.count", len(tensors))
    if expected != len(tensors):
        raise PareError(f"{path} and the other parts hold {len(tensors)} tensors, expected {_shown(expected)}")
    size = sum(part.file_bytes for part in parts)
    return Header(first.version, first.metadata, tensors, first.data_start, size)


def _shown(value: Any) -> str:
    """A name or value for a message of one line."""
    return repr(value)[:80]


class _GoesOn(Exception):
    """The wanted bytes lie behind the available ones."""


class _Cursor:
    """A position in the bytes of one file, and how many bytes may still be kept."""

    def __init__(self, path: Path | str, data: Any, size: int | None = None):
        """``size``: bytes of the whole file, if ``data`` is only its beginning."""
        self.path, self.data, self.at = path, data, 0
        self.size = len(data) if size is None else size
        self.room, self.strings = ROOM, MAX_STRINGS

    def fail(self, problem: str) -> PareError:
        return PareError(f"{self.path} is no sound GGUF file: {problem}", "download or export it again")

    def number(self, code: str) -> Any:
        return self.numbers(code, 1)[0]

    def numbers(self, code: str, count: int) -> tuple[Any, ...]:
        start = self.skip(count * struct.calcsize(f"<{code}"))
        return struct.unpack_from(f"<{count}{code}", self.data, start)

    def skip(self, size: int) -> int:
        """Move on by ``size`` bytes, and return where they begin."""
        start = self.at
        if size > self.size - start:
            raise self.fail(f"it ends at byte {self.size}, within something that begins at byte {start}")
        if size > len(self.data) - start:
            raise _GoesOn
        self.at = start + size
        return start

    def keep(self, size: int) -> None:
        self.room -= size
        if self.room < 0:
            raise self.fail(f"more than {ROOM} bytes of names and settings")

    def name(self, what: str) -> str:
        size, begin = self.number("Q"), self.at
        if size > MAX_NAME:
            raise self.fail(f"{what} of {size} bytes at byte {begin}")
        self.keep(size)
        start = self.skip(size)
        try:
            return bytes(self.data[start : self.at]).decode("utf-8")
        except UnicodeDecodeError:
            raise self.fail(f"{what} at byte {begin} is not UTF-8") from None

    def count(self, what: str) -> int:
        found = self.number("Q")
        if found > MAX_ENTRIES:
            raise self.fail(f"{found} {what}")
        return found

    # ---- metadata ----

    def value(self, key: str) -> Any:
        kind = self.number("I")
        if kind in SCALARS:
            return self.number(SCALARS[kind])
        if kind == STRING:
            return self.text()
        if kind == ARRAY:
            return self.array(key)
        raise self.fail(f"{_shown(key)} has a value of the unknown type {kind}")

    def text(self) -> str | Skipped:
        size = self.number("Q")
        start = self.skip(size)
        if size > min(MAX_TEXT, self.room):
            return Skipped(size)
        self.keep(size)
        return bytes(self.data[start : self.at]).decode("utf-8", errors="replace")

    def array(self, key: str) -> tuple[Any, ...] | Skipped:
        kind, count = self.number("I"), self.number("Q")
        if kind == STRING:
            self.skip_strings(key, count)
            return Skipped(count)
        if kind not in SCALARS:
            what = "arrays" if kind == ARRAY else f"values of the unknown type {kind}"
            raise self.fail(f"{_shown(key)} is an array of {what}")
        if count <= MAX_ARRAY and 40 * count <= self.room:
            self.keep(40 * count)
            return self.numbers(SCALARS[kind], count)
        self.skip(count * struct.calcsize(f"<{SCALARS[kind]}"))
        return Skipped(count)

    def skip_strings(self, key: str, count: int) -> None:
        self.strings -= count
        if self.strings < 0:
            raise self.fail(f"{_shown(key)} makes it more than {MAX_STRINGS} strings")
        data, at, length = self.data, self.at, struct.Struct("<Q").unpack_from
        try:
            for _ in range(count):
                at += 8 + length(data, at)[0]
        except (struct.error, OverflowError):  # beyond the end, and far beyond
            if at <= self.size - 8:
                raise _GoesOn from None
            at = self.size + 1
        self.skip(at - self.at)

    # ---- the whole ----

    def metadata(self, keys: int) -> dict[str, Any]:
        metadata: dict[str, Any] = {}
        for _ in range(keys):
            key = self.name("a key")
            if key in metadata:
                raise self.fail(f"the key {_shown(key)} is there twice")
            metadata[key] = self.value(key)
        return metadata

    def header(self) -> Header:
        version = self.preamble()
        tensors, keys = self.count("tensors"), self.count("metadata keys")
        metadata = self.metadata(keys)
        alignment = metadata.get("general.alignment", ALIGNMENT)
        if type(alignment) is not int or alignment < 1 or alignment & (alignment - 1):
            raise self.fail(f"general.alignment is {_shown(alignment)}, expected a power of two")
        rows: dict[str, tuple[tuple[int, ...], int, int]] = {}
        for _ in range(tensors):
            name = self.name("a tensor name")
            if name in rows:
                raise self.fail(f"the tensor {_shown(name)} is there twice")
            rows[name] = self.row(name, alignment)
        start = -(-self.at // alignment) * alignment
        return Header(version, metadata, self.placed(rows, start), start, self.size)

    def preamble(self) -> int:
        if self.data[:4] != MAGIC[: len(self.data)]:
            raise PareError(f"{self.path} does not begin with GGUF", "this is another kind of file")
        self.skip(4)
        version = self.number("I")
        if version & 0xFFFF == 0 and version:
            raise PareError(f"{self.path} is a big-endian GGUF file", "llama.cpp's gguf_convert_endian.py turns it")
        if version not in (2, 3):
            raise PareError(f"{self.path} is GGUF version {version}", "versions 2 and 3 are known here")
        return version

    def row(self, name: str, alignment: int) -> tuple[tuple[int, ...], int, int]:
        """Shape, type number and offset of a tensor; each is checked alone."""
        dims = self.number("I")
        if not 0 < dims <= MAX_DIMS:
            raise self.fail(f"{_shown(name)} has {dims} dimensions, expected 1 to {MAX_DIMS}")
        shape, kind, offset = self.numbers("Q", dims)[::-1], self.number("I"), self.number("Q")
        size = 1
        for length in shape:
            size *= length
        if not 0 < size < 2**63:
            raise self.fail(f"{_shown(name)} has the shape {list(shape)}")
        if offset % alignment:
            raise self.fail(f"{_shown(name)} is at offset {offset}, which {alignment} does not divide")
        return shape, kind, offset

    def placed(self, rows: Mapping[str, tuple[tuple[int, ...], int, int]], start: int) -> dict[str, TensorInfo]:
        """The table in the order of the file, checked: no tensor reaches into the next one or beyond the end."""
        offsets = sorted({offset for _, _, offset in rows.values()})
        follows = dict(zip(offsets, [*offsets[1:], max(self.size - start, 0)], strict=True)) if rows else {}
        if len(offsets) < len(rows):
            raise self.fail("two tensors are at the same offset")
        placed = {}
        for name, (shape, kind, offset) in rows.items():
            known = NAMES.get(kind)
            try:
                size = follows[offset] - offset if known is None else nbytes(known, shape)
            except ValueError:
                raise self.fail(f"{_shown(name)} is {known}, but its rows of {shape[-1]} values are not") from None
            if size < 0 or offset + size > follows[offset]:
                raise self.fail(f"{_shown(name)} reaches beyond {self.limit(follows[offset], offsets)}")
            placed[name] = TensorInfo(shape, known or f"unknown type {kind}", offset, size)
        return placed

    def limit(self, follows: int, offsets: list[int]) -> str:
        return f"the next tensor, at offset {follows}" if follows in offsets else f"the end, at byte {self.size}"


class _Vocabulary(_Cursor):
    """Keeps the arrays of the tokenizer. A header only keeps their lengths."""

    def tokenizer(self) -> dict[str, Any]:
        self.preamble()
        _, keys = self.count("tensors"), self.count("metadata keys")
        self.letters = MAX_TOKENS
        return {key: value for key, value in self.metadata(keys).items() if key.startswith("tokenizer.")}

    def array(self, key: str) -> tuple[Any, ...] | Skipped:
        begin = self.at
        kind, count = self.number("I"), self.number("Q")
        if not key.startswith("tokenizer.") or kind not in (STRING, *SCALARS):
            self.at = begin
            return super().array(key)
        self.strings -= count
        if count > MAX_VOCABULARY or self.strings < 0:
            raise self.fail(f"{_shown(key)} has {count} entries, more than any tokenizer")
        return self.texts(key, count) if kind == STRING else self.numbers(SCALARS[kind], count)

    def texts(self, key: str, count: int) -> tuple[str, ...]:
        found, length = [], struct.Struct("<Q").unpack_from
        for _ in range(count):
            size = length(self.data, self.skip(8))[0]
            self.letters -= size
            if self.letters < 0:
                raise self.fail(f"{_shown(key)} makes it more than {MAX_TOKENS} bytes of tokens")
            found.append(self.data[self.skip(size) : self.at])
        try:
            return tuple(raw.decode("utf-8") for raw in found)
        except UnicodeDecodeError:
            raise self.fail(f"a text of {_shown(key)} is not UTF-8") from None
