"""What this disk holds of models on the hub: files in huggingface_hub's cache, and listings and headers in its assets.

Nothing here asks the hub. The layout is documented ("Understand caching" in huggingface_hub's guides): the files of a
commit lie in ``snapshots/<commit>`` as links into ``blobs``, and ``refs`` has the commit of every branch.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import quote

from ..base.errors import PareError
from ..base.untrusted import read_json
from ..model.checkpoint import Checkpoint
from ..model.hub_name import HubName
from .hub_files import needed

FORMAT = 1  # version of the headers that are kept
COMMIT = re.compile("[0-9a-f]{40}")


@dataclass(frozen=True)
class RemoteTensor:
    """A tensor as the header of its file describes it. ``dtype``: as safetensors names it. ``nbytes``: as stored."""

    dtype: str
    shape: tuple[int, ...]
    nbytes: int


@dataclass(frozen=True)
class Remote:
    """What is known of a model on the hub without its weights.

    ``revision`` is the commit hash, ``files`` all names in it, ``gguf`` (name, bytes) of the .gguf files among them.
    A repository of GGUF files alone has no ``tensors``, and an empty ``config`` if it holds no config.json.
    ``downloaded_bytes`` counts the bodies that this call received; 0 if all came from the cache.
    """

    repo: str
    revision: str
    config: dict[str, Any]
    tensors: dict[str, RemoteTensor]
    files: tuple[str, ...]
    gguf: tuple[tuple[str, int], ...]
    downloaded_bytes: int = field(default=0, compare=False)


# ---- models that were downloaded ----


def root() -> Path:
    """Return huggingface_hub's cache of models (HF_HUB_CACHE, HF_HOME)."""
    from huggingface_hub import constants

    return Path(constants.HF_HUB_CACHE).expanduser().absolute()


def storage(repo: str) -> Path:
    """Return the directory of a repository in the cache."""
    return root() / "--".join(["models", *repo.split("/")])


def snapshot(repo: str, commit: str) -> Path:
    """Return the directory of a commit's files in the cache."""
    return storage(repo) / "snapshots" / commit


def commit_of(repo: str, revision: str) -> str | None:
    """Return the commit that a revision meant when it was last asked for; None if it never was."""
    if COMMIT.fullmatch(revision):
        return revision
    with contextlib.suppress(OSError, UnicodeDecodeError):
        found = (storage(repo) / "refs" / revision).read_text("utf-8").strip()
        return found if COMMIT.fullmatch(found) else None
    return None


def remember(repo: str, revision: str, commit: str) -> None:
    """Note which commit a revision means, as huggingface_hub does. Errors of the disk are ignored.

    Args:
        repo: "org/name".
        revision: branch, tag or commit; nothing is noted for a commit.
        commit: hash of the commit.
    """
    if COMMIT.fullmatch(revision) or commit_of(repo, revision) == commit:
        return
    place = storage(repo) / "refs" / revision
    with contextlib.suppress(OSError):  # a read-only cache works too
        place.parent.mkdir(parents=True, exist_ok=True)
        _replace(place, commit)


def missing(directory: Path, sizes: Mapping[str, int | None]) -> list[str]:
    """List the files that a directory lacks, or has with another number of bytes; None: any size."""

    def there(name: str, size: int | None) -> bool:
        file = directory / name
        return file.is_file() and size in (None, file.stat().st_size)

    return [name for name, size in sizes.items() if not there(name, size)]


def found(name: HubName, revision: str, gguf: bool = False) -> tuple[str, list[str]] | None:
    """Find a model that was downloaded whole, by mlx-pare or by another program.

    An earlier answer of the hub says which files belong to it. Without one, the files that are there decide.

    Args:
        name: the model.
        revision: branch, tag or commit.
        gguf: as in hub_files.needed.
    Returns:
        The commit and the names of the files; None if the model is not there, is not whole, or is one of several GGUF
        models of which the name chooses none.
    """
    commit = commit_of(name.repo, revision)
    if commit is None:
        return None
    place, listed = snapshot(name.repo, commit), listing(name.repo, commit)
    try:
        if listed is not None:
            files = needed(name, listed, gguf)
            return None if missing(place, {file: listed[file] for file in files}) else (commit, files)
        names = [file.relative_to(place).as_posix() for file in place.rglob("*") if file.is_file()]
        files = needed(name, names, gguf)
        if "config.json" in files:
            Checkpoint(place)  # the weights are those that their index lists
            if not any(file.startswith(("tokenizer", "vocab")) for file in files):
                return None
        return commit, files
    except PareError:  # only a part is there
        return None


# ---- what the hub said ----


def _place(kind: str, repo: str, revision: str) -> Path:
    from huggingface_hub import cached_assets_path, constants

    folder = cached_assets_path("mlx-pare", "hub", kind, assets_dir=constants.HF_ASSETS_CACHE)
    return folder / f"{repo.replace('/', '--')}@{quote(revision, safe='')}.json"


def _replace(place: Path, text: str) -> None:
    beside = place.with_name(f"{place.name}.{os.getpid()}.tmp")
    with beside.open("x", encoding="utf-8") as file:
        file.write(text)
    os.replace(beside, place)


def listing(repo: str, commit: str) -> dict[str, int | None] | None:
    """Return name -> bytes of all files of a commit, which never change; None if the hub was not asked yet."""
    with contextlib.suppress(PareError, OSError, ValueError):
        return read_json(_place("listings", repo, commit), "cache")
    return None


def keep_listing(repo: str, commit: str, sizes: Mapping[str, Any]) -> None:
    """Keep the hub's list of the files of a commit. Errors of the disk are ignored.

    Args:
        repo: "org/name".
        commit: hash of the commit.
        sizes: name of a file -> bytes; None: unknown.
    """
    with contextlib.suppress(OSError, ValueError):  # without a cache it works as well
        _replace(_place("listings", repo, commit), json.dumps(sizes))


def keep(asked: str, model: Remote) -> None:
    """Keep what was read of a model. ``asked``: the revision that was asked for."""
    with contextlib.suppress(OSError, ValueError):  # without a cache it works as well
        _replace(_place("headers", model.repo, asked), json.dumps({"format": FORMAT, **asdict(model)}))


def kept(repo: str, asked: str) -> Remote | None:
    """Return what an earlier call read for the same revision; None if nothing usable is there."""
    try:
        found = read_json(_place("headers", repo, asked), "cache")
        if found.pop("format") != FORMAT:
            return None
        tensors = {n: RemoteTensor(t["dtype"], tuple(t["shape"]), t["nbytes"]) for n, t in found["tensors"].items()}
        gguf = tuple((name, size) for name, size in found["gguf"])
        changed = {"tensors": tensors, "files": tuple(found["files"]), "gguf": gguf, "downloaded_bytes": 0}
        return Remote(**(found | changed))
    except (PareError, OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def downloaded(repo: str, asked: str) -> Remote | None:
    """Return a model that lies in the cache, for example downloaded by mlx-lm; None if it is not there or not whole."""
    commit = commit_of(repo, asked)
    try:
        checkpoint = Checkpoint(snapshot(repo, commit)) if commit else None
    except PareError:  # a part of it
        return None
    if not checkpoint:
        return None
    tensors = {name: RemoteTensor(e.dtype, e.shape, e.nbytes) for name, e in checkpoint.entries.items()}
    here = {f.relative_to(checkpoint.path).as_posix(): f.stat().st_size for f in checkpoint.path.rglob("*")}
    gguf = tuple((name, size) for name, size in sorted(here.items()) if name.endswith(".gguf"))
    return Remote(repo, checkpoint.path.name, checkpoint.config, tensors, tuple(sorted(here)), gguf)
