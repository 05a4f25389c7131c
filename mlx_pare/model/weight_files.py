"""Which files of a directory hold its model: mlx-lm reads every model*.safetensors and ignores the index.

A repeated upload may leave two sets of shards in one folder. mlx-lm then takes a tensor from the file that it happens
to read last. mlx-pare takes the set that the index names, and shows mlx-lm only that set.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from ..base import console
from ..base.errors import PareError
from ..base.untrusted import check_links, read_json
from ..tensors.safetensors import Entry, read_header

PATTERN = "model*.safetensors"  # of mlx_lm/utils.py load_model
INDEX = "model.safetensors.index.json"
MAX_TENSORS = 1 << 18  # of all files together; the largest real model has 140,000
SHARD = re.compile(r"(.*)-\d+-of-(\d+)\.safetensors")

Headers = Mapping[str, Mapping[str, Entry]]  # by the name of the file, then by the name of the tensor


def read_headers(directory: Path) -> dict[str, Entry]:
    """Read the tensor tables of a model directory.

    Args:
        directory: the model directory.
    Returns:
        Name -> where the tensor lies. If files share tensors, only the files that a whole index names count.
    Raises:
        PareError: a link leads out of the directory, several files have a tensor that no whole index assigns, there are
            more than MAX_TENSORS tensors, or read_header fails.
    """
    check_links(directory)
    headers: dict[str, dict[str, Entry]] = {}
    for file in sorted(directory.glob(PATTERN)):
        headers[file.name] = read_header(file)
        if sum(map(len, headers.values())) > MAX_TENSORS:
            raise PareError(f"{directory} holds more than {MAX_TENSORS} tensors")
    twice = _twice(headers)
    files = indexed(headers, _weight_map(directory)) if twice else list(headers)
    if twice and not files:
        raise _two_models(directory, headers, *twice)
    return {name: entry for file in files for name, entry in headers[file].items()}


def leftovers(directory: Path, entries: Mapping[str, Entry]) -> list[str]:
    """The names of weight files that are not read, because other files hold their tensors."""
    used = {entry.file.name for entry in entries.values()}
    return sorted({file.name for file in directory.glob(PATTERN)} - used)


@contextmanager
def without_leftovers(directory: Path, entries: Mapping[str, Entry]) -> Iterator[Path]:
    """Give the directory as mlx-lm must see it: itself, or a folder of links that lacks the files that are not read.

    The links are removed at the end of the block. Files that mlx-lm opened stay open, so lazy arrays may be read later.
    """
    unread = leftovers(directory, entries)
    if not unread:
        yield directory
        return
    _tell(str(directory), tuple(unread))
    with TemporaryDirectory() as folder:
        for file in directory.absolute().iterdir():
            if file.name not in unread:
                (Path(folder) / file.name).symlink_to(file)
        yield Path(folder)


def told(unread: list[str]) -> str:
    """The sentence that tells people about files that are not read."""
    listed = ", ".join(unread[:3]) + (", ..." if len(unread) > 3 else "")
    return f"{len(unread)} weight files are left over and not read, because the index names others: {listed}"


@lru_cache
def _tell(directory: str, unread: tuple[str, ...]) -> None:
    """Warn once per process."""
    console.warn(f"{directory}: {told(list(unread))}. Move them away: mlx-lm itself may take their tensors")


def _twice(headers: Headers) -> tuple[str, str, str] | None:
    """A tensor that two files have, and those files; None if there is none."""
    owners: dict[str, str] = {}
    for file, header in headers.items():
        for name in header:
            if owners.setdefault(name, file) != file:
                return name, owners[name], file
    return None


def indexed(headers: Mapping[str, Iterable[str]], weight_map: Mapping[str, Any]) -> list[str]:
    """Find the files that an index names, if it names every tensor of each of them; else none.

    Args:
        headers: the names of the tensors in each weight file.
        weight_map: of the index: tensor -> file.
    Returns:
        The names of the files, sorted; empty if the index is not whole.
    """
    named: dict[str, set[str]] = {}
    for name, file in weight_map.items():
        named.setdefault(str(file), set()).add(name)
    whole = all(file in headers and set(headers[file]) == names for file, names in named.items())
    return sorted(named) if whole else []


def _weight_map(directory: Path) -> Mapping[str, Any]:
    if not (directory / INDEX).exists():
        return {}
    found = read_json(directory / INDEX, "weight index").get("weight_map")
    return found if isinstance(found, dict) else {}


def _two_models(directory: Path, headers: Headers, tensor: str, one: str, other: str) -> PareError:
    """The error for a tensor that two files hold, with the files to choose from."""
    sets: dict[str, list[str]] = {}
    for file in headers:
        shard = SHARD.fullmatch(file)
        sets.setdefault(f"{shard[1]}-*-of-{shard[2]}" if shard else file, []).append(file)
    listed = " or ".join(f"{name} ({len(files)} files)" if "*" in name else name for name, files in sets.items())
    index = "its index does not name every tensor once" if (directory / INDEX).exists() else "there is no index"
    return PareError(
        f"{directory} holds tensor {tensor} twice, in {one} and in {other}, and {index}",
        f"keep the files of one set, and move the others to another folder: {listed}",
    )
