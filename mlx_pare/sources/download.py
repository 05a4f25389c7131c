"""Download a model of the hub into huggingface_hub's cache.

sources/hub_fetch.py receives files into the cache's ``blobs``, because huggingface_hub 2.4 starts a file again after a
kill. Its snapshot_download then makes the snapshot: it finds all blobs, and receives no bytes.
"""

from __future__ import annotations

import contextlib
import glob
import re
import shutil
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..base import console
from ..base.errors import PareError, Refused
from ..base.units import gb
from ..base.untrusted import read_json
from ..model.checkpoint import cuttable, refuse_foreign
from ..model.hub_name import HubName
from . import hub_cache
from .hub_fetch import AGAIN, OTHERWISE, WORKERS, Blob, fetch_all
from .hub_files import MAX_SMALL, needed
from .hub_reader import File, Hub, HubError, Unreachable, in_time

ETAG = re.compile(r"[\w-][\w.-]{0,127}", re.ASCII)  # becomes the name of a file


@dataclass(frozen=True)
class Downloaded:
    """A model on this disk. ``path``: its directory, or its (first) GGUF file. ``name``: its name with the commit."""

    path: Path
    name: HubName


def download(name: HubName, gguf: bool = False) -> Downloaded:
    """Fetch what the cache lacks of a model on the hub.

    If the hub does not answer, or refuses, a model that is whole in the cache is taken.

    Args:
        name: the model.
        gguf: take the GGUF model, also from a repository that has other weights.
    Raises:
        HubError, Unreachable: the hub does not give it: it does not exist, is gated, or cannot be reached.
        Refused: it does not fit on the disk.
        PareError: it is no model, or cannot be cut.
        UsageError: it has several GGUF models, and the name does not choose one.
    """
    hub = Hub(name.repo, name.revision or "main", OTHERWISE)
    try:
        commit, sizes = _listing(hub)
    except HubError as error:
        return _in_cache(name, hub, error, gguf)
    files = needed(name, sizes, gguf)
    wanted = {file: sizes[file] for file in files}
    lacking = hub_cache.missing(hub_cache.snapshot(hub.repo, commit), wanted)
    if lacking:
        received = _bring(name, hub, commit, wanted, lacking)
        console.say(f"{name}: {gb(received)} downloaded, commit {commit[:8]}")
    else:
        console.say(f"{name}: in the cache, commit {commit[:8]}")
    hub_cache.remember(hub.repo, hub.asked, commit)
    return _found(name, commit, files)


def _found(name: HubName, commit: str, files: list[str]) -> Downloaded:
    place, file = hub_cache.snapshot(name.repo, commit), None
    if files[0].lower().endswith(".gguf"):
        file = files[0]
    return Downloaded(place / file if file else place, HubName(name.repo, commit, file))


def _listing(hub: Hub) -> tuple[str, Mapping[str, Any]]:
    """Return the commit and its files with their bytes. The hub is not asked about a commit that is known."""
    if hub_cache.COMMIT.fullmatch(hub.asked) and (kept := hub_cache.listing(hub.repo, hub.asked)) is not None:
        return hub.asked, kept
    commit, sizes = in_time(hub.listing, OTHERWISE)
    hub_cache.keep_listing(hub.repo, commit, sizes)
    return commit, sizes


def _in_cache(name: HubName, hub: Hub, error: HubError, gguf: bool) -> Downloaded:
    """Return the model from the cache; otherwise raise the error. If the hub is unreachable, it names the cache."""
    found = hub_cache.found(name, hub.asked, gguf)
    if found:
        console.say(f"{error.problem}: {name} is taken from the cache, commit {found[0][:8]}")
        return _found(name, *found)
    if isinstance(error, Unreachable):
        whole = f"{name} is not in the cache {hub_cache.root()}, or not all of it"
        cure = error.cure if hub.constants.HF_HUB_OFFLINE else f"{AGAIN}; or {OTHERWISE}"
        raise Unreachable(f"{error.problem}, and {whole}", cure) from error
    raise error


# ---- what is missing ----


def _bring(name: HubName, hub: Hub, commit: str, wanted: Mapping[str, Any], lacking: list[str]) -> int:
    """Fetch the missing files and make the snapshot. Returns the bytes of files that were received."""
    if "config.json" in wanted:
        _check_config(hub, commit, wanted["config.json"])
    with _watched(hub, commit), ThreadPoolExecutor(WORKERS) as pool:
        blobs = list(pool.map(lambda file: _blob(hub, commit, file, wanted[file]), lacking))
    todo = {blob.place: blob for blob in blobs if hub_cache.missing(blob.place.parent, {blob.place.name: blob.size})}
    received = sum(blob.size - blob.there for blob in todo.values())
    _check_room(name, received)
    if todo:
        next(iter(todo)).parent.mkdir(parents=True, exist_ok=True)
        fetch_all(name, hub, commit, list(todo.values()))
    _make_snapshot(hub, commit, list(wanted))
    place = hub_cache.snapshot(hub.repo, commit)
    for blob in blobs:  # on a disk without links the snapshot holds the file itself: one copy is enough
        if blob.place.exists() and not (place / blob.file).is_symlink():
            blob.place.unlink()
    if left := hub_cache.missing(place, {blob.file: blob.size for blob in blobs}):
        raise PareError(f"{place} lacks {left[0]} after the download", "give the same command again")
    return received


def _check_config(hub: Hub, commit: str, size: Any) -> None:
    """Raises Unsupported before gigabytes are fetched in vain, HubError if the hub does not give the file."""
    if type(size) is not int:
        return
    config = read_json(File(hub, commit, "config.json", size), "model config")
    refuse_foreign(config, hub.repo)
    cuttable(config, hub.repo)


def _blob(hub: Hub, commit: str, file: str, listed: Any) -> Blob:
    """Ask the hub for size and ETag of a file, and check them. Raises HubError."""
    try:
        etag, size = hub.head(commit, file)
    except Unreachable:  # try again: one broken connection of many must not end the download
        etag, size = hub.head(commit, file)
    known = listed if type(listed) is int and listed >= 0 else size
    if known is None:
        raise HubError(f"{hub.host} does not say how large {hub.repo}/{file} is", OTHERWISE)
    if size is not None and size != known:
        raise HubError(f"{hub.host} says that {hub.repo}/{file} has {known} bytes, and that it has {size}", OTHERWISE)
    if known > MAX_SMALL and not file.lower().endswith((".safetensors", ".gguf")):
        raise HubError(f"{hub.repo}/{file} has {gb(known)}, more than any such file", OTHERWISE)
    if not ETAG.fullmatch(etag):
        raise HubError(f"{hub.host} gives {hub.repo}/{file} the ETag {etag[:80]!r}, which is no name", OTHERWISE)
    return Blob(file, known, hub_cache.storage(hub.repo) / "blobs" / etag)


def _check_room(name: HubName, needed: int) -> None:
    place = next(
        place for place in (hub_cache.root().absolute(), *hub_cache.root().absolute().parents) if place.exists()
    )
    free = shutil.disk_usage(place).free
    if needed > free:
        there = f"the disk of {hub_cache.root()} has {gb(free)} free"
        raise Refused(
            f"{name} takes {gb(needed)} more, and {there}",
            "make room, or set HF_HOME to a directory on a larger disk",
        )


# ---- the snapshot ----


def _make_snapshot(hub: Hub, commit: str, files: list[str]) -> None:
    """Let huggingface_hub make the links of a commit whose blobs are all there."""
    from huggingface_hub import snapshot_download

    with _watched(hub, commit):
        try:
            snapshot_download(
                hub.repo,
                revision=commit,
                allow_patterns=[glob.escape(file) for file in files],
                library_name="mlx-pare",
                tqdm_class=_no_bytes(hub),
            )
        except PareError:
            raise
        except Exception as error:  # whatever huggingface_hub and its HTTP client raise
            if getattr(error, "errno", None):  # for example a full disk
                raise
            cause = error.__cause__ or error
            reason = (str(cause).strip() or type(cause).__name__).split("\n")[0]
            raise Unreachable(f"the snapshot of {hub.repo} cannot be made ({reason})", AGAIN) from error


@contextlib.contextmanager
def _watched(hub: Hub, commit: str) -> Iterator[None]:
    """Let huggingface_hub work quietly, without telemetry.

    Commits and ETags become names of files, so they are checked first.
    """
    from huggingface_hub.utils import logging

    def check(answer: Any) -> None:
        if answer.headers.get("X-Repo-Commit", commit) != commit:
            raise HubError(f"{hub.host} gives a file of another commit of {hub.repo} than {commit}", AGAIN)
        for key in ("ETag", "X-Linked-ETag"):
            etag = answer.headers.get(key, "").removeprefix("W/").strip('"')
            if answer.url.host == hub.host and etag and not ETAG.fullmatch(etag):
                raise HubError(f"{hub.host} gives a file of {hub.repo} the ETag {etag[:80]!r}, which is no name")

    hooks, level = hub.client.event_hooks, logging.get_verbosity()
    telemetry = hub.constants.HF_HUB_DISABLE_TELEMETRY
    hub.client.event_hooks = {**hooks, "response": [*hooks.get("response", []), check]}
    logging.set_verbosity_error()
    hub.constants.HF_HUB_DISABLE_TELEMETRY = True
    try:
        yield
    finally:
        hub.client.event_hooks = hooks
        logging.set_verbosity(level)
        hub.constants.HF_HUB_DISABLE_TELEMETRY = telemetry


def _no_bytes(hub: Hub) -> type:
    """Make a progress bar for huggingface_hub that shows nothing, and raises HubError if bytes are downloaded."""
    from tqdm import tqdm

    class Guard(tqdm):
        def __init__(self, *args: Any, **kwargs: Any):
            self.counts_bytes = kwargs.get("unit") == "B"
            super().__init__(*args, **{**kwargs, "disable": True})

        def update(self, n: float | None = 1) -> bool | None:
            if self.counts_bytes and n:
                raise HubError(f"{hub.host} now says other things of {hub.repo} than a moment ago", AGAIN)
            return super().update(n)

    return Guard
