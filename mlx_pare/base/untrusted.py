"""Files from outside, read within bounds: regular files inside their directory, and JSON that fits into memory.

A model comes from somebody else. Reading any part of it may not take more than BUDGET bytes (a tokenizer more, see
model/tokenizer_files.py), wait for a device or a pipe, or lead to a file outside the model's directory. No arrays.
"""

from __future__ import annotations

import errno
import json
import os
import stat
from contextlib import suppress
from itertools import chain
from pathlib import Path
from typing import Any, BinaryIO

from .errors import PareError

MAX_JSON = 16 << 20  # bytes; the largest real index and the largest header have about 9 million each
SHARED = ".huggingface-shared-blobs"  # marks blobs that all models of Hugging Face's cache share (since 2.x)
BUDGET = 160 << 20  # bytes that parsed JSON may take
MORE_TEMPLATES = "additional_chat_templates"  # a folder of NAME.jinja: transformers 4.52 and later
MAX_DEPTH = 64  # of nested lists and objects; beyond some hundreds even printing fails
# Bytes that parsing costs per mark: measured on the worst inputs of CPython 3.11 (tests/base/test_untrusted.py)
COSTS = {"{": 130, "[": 72, '"': 32, ",": 32, ":": 40}


def contents(path: Any, most: int = MAX_JSON, what: str = "file") -> bytes:
    """Read a regular file of bounded size.

    Args:
        path: a Path, or the remote file of sources/hub_reader.py.
        most: the largest number of bytes.
        what: the sort of file, for messages.
    Returns:
        The bytes of the file.
    Raises:
        PareError: the file is larger, a directory, a device or a pipe.
        OSError: the file cannot be read.
    """
    found = path.stat()
    if not stat.S_ISREG(found.st_mode):
        kind = "a directory" if stat.S_ISDIR(found.st_mode) else "no regular file"
        raise PareError(f"cannot read {what} {path}: it is {kind}")
    if found.st_size <= most:
        with path.open("rb") as file:
            raw = file.read(most + 1)  # it may have grown, and files of /proc report a size of 0
        if len(raw) <= most:
            return raw
    raise PareError(f"{what} {path} is larger than {most >> 20} MiB")


def regular(path: Path, flags: int = os.O_RDONLY) -> BinaryIO:
    """Open a regular file, unbuffered. It never waits for a pipe.

    Args:
        path: the file.
        flags: of os.open; a file that ``os.O_CREAT`` creates has the usual rights.
    Returns:
        The open file.
    Raises:
        PareError: for a pipe, a device or a directory; with ``os.O_NOFOLLOW`` for a link.
        OSError: it cannot be opened.
    """
    with suppress(FileNotFoundError):  # check before opening: opening some devices has effects
        _require_regular(path, os.stat(path).st_mode)
    try:
        handle = os.open(path, flags | os.O_NONBLOCK | os.O_CLOEXEC, 0o666)
    except OSError as error:
        if error.errno == errno.ELOOP and flags & os.O_NOFOLLOW:
            raise PareError(f"{path} is a link, and writing to it would change another file", "remove it") from error
        raise
    try:
        _require_regular(path, os.fstat(handle).st_mode)
    except PareError:
        os.close(handle)
        raise
    mode = {os.O_RDONLY: "rb", os.O_WRONLY: "wb", os.O_RDWR: "rb+"}[flags & os.O_ACCMODE]
    return os.fdopen(handle, mode, buffering=0)


def _require_regular(path: Path, mode: int) -> None:
    if not stat.S_ISREG(mode):
        kind = "a directory" if stat.S_ISDIR(mode) else "a pipe or a device"
        raise PareError(f"{path} is {kind}, expected a file", "move it away, or put the file itself there")


def loads(raw: bytes | str, budget: int = BUDGET, unique: bool = False) -> Any:
    """Parse JSON within bounds.

    Args:
        raw: the text, or its UTF-8 bytes.
        budget: bytes of memory that the parsed value may take.
        unique: whether an object with the same key twice is an error.
    Returns:
        The value.
    Raises:
        ValueError: it is no JSON, may take more than ``budget`` bytes, or is nested too deeply.
    """
    text = raw.decode("utf-8") if isinstance(raw, bytes) else raw
    check_cost(text, budget)
    try:
        found = json.loads(text, object_pairs_hook=_unique if unique else None)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    level, depth = [found], 0
    while level := [value for value in level if type(value) in (dict, list)]:
        if (depth := depth + 1) > MAX_DEPTH:
            raise ValueError("it is nested too deeply")
        level = list(chain.from_iterable(v.values() if type(v) is dict else v for v in level))
    return found


def read_json(path: Path, what: str, most: int = MAX_JSON, budget: int = BUDGET) -> dict[str, Any]:
    """Read a JSON object from a file of bounded size.

    Args:
        path: the file.
        what: the sort of file, for messages.
        most: the largest number of bytes of the file.
        budget: bytes of memory that the parsed object may take.
    Returns:
        The object.
    Raises:
        PareError: the file cannot be read, is too large, or holds no JSON object within the bounds.
    """
    try:
        found = loads(contents(path, most, what), budget)
    except OSError as error:
        raise PareError(f"cannot read {what} {path}: {error.strerror}") from error
    except ValueError as error:
        raise PareError(f"{what} {path} is not valid JSON: {error}") from error
    if not isinstance(found, dict):
        raise PareError(f"{what} {path} holds a {type(found).__name__}, expected an object")
    return found


def check_cost(text: str, budget: int = BUDGET) -> None:
    """Raise ValueError for JSON that may take more than ``budget`` bytes once it is parsed."""
    wide = 1 if text.isascii() and "\\u" not in text else 4  # bytes a character may take
    cost = (1 + wide) * len(text) + sum(size * text.count(mark) for mark, size in COSTS.items())
    if cost > budget:
        raise ValueError(f"it would take up to {cost >> 20} MiB of memory, more than {budget >> 20}")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a name is there twice")
    return found


def check_links(directory: Path) -> None:
    """Raise PareError for a symbolic link in a model directory that leads out of it.

    If mlx-pare copied such a link along with a tokenizer, it would give away a file of the user. Links into the
    ``blobs`` next to a snapshot are allowed: this is how Hugging Face's cache stores a model. So are links into the
    blobs that all models of the cache share, which have a marker. The directory itself may be a link: the user has
    named it.
    """
    try:
        home = directory.resolve()
        folders = [place for place in (directory, directory / MORE_TEMPLATES) if place.is_dir()]
        links = [Path(entry.path) for place in folders for entry in os.scandir(place) if entry.is_symlink()]
        homes = [home]
        for place in (home, *home.parents):
            if _snapshot(place):
                homes.append(place.parent.parent / "blobs")
                shared = place.parents[2] / "blobs"
                homes += [shared] if (shared / SHARED).is_file() else []
        for link in links:
            target = link.resolve()
            if not any(target.is_relative_to(place) for place in homes):
                raise PareError(
                    f"{link} is a link to {target}, which is outside of the model's directory",
                    "put the file itself there, if it is meant to be read",
                )
    except (OSError, RuntimeError) as error:  # RuntimeError: links in a circle
        raise PareError(f"cannot read {directory}: {getattr(error, 'strerror', None) or error}") from error


def _snapshot(place: Path) -> bool:
    """Whether this is models--org--name/snapshots/<commit> of Hugging Face's cache."""
    return place.parent.name == "snapshots" and place.parent.parent.name.startswith(("models--", "datasets--"))


def shown(value: Any) -> str:
    """A value of the config for a message. A list of a million is not written out only to be cut off."""
    if isinstance(value, list | dict) and len(value) > 20:
        return f"a {type(value).__name__} of {len(value)}"
    return repr(value)[:80]
