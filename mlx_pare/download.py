"""A model of the hub, downloaded into huggingface_hub's cache.

Every file is fetched by byte ranges into the cache's ``blobs``. It is called incomplete until it is whole, so a
download that was killed goes on with the bytes that are missing. huggingface_hub from 2.0 on begins such a file anew.
Its snapshot_download then makes the snapshot: it finds all blobs, and receives no bytes.
"""

from __future__ import annotations

import contextlib
import glob
import hashlib
import os
import re
import shutil
import threading
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import Any

from . import console, hub_cache
from .checkpoint import check_packing, cuttable, read_json
from .errors import PareError, Refused
from .hub import File, Hub, HubError, Unreachable, in_time
from .hub_files import MAX_SMALL, needed
from .hub_name import HubName

WORKERS = 8
RETRIES = 5  # broken connections in a row that bring nothing new
PAUSE = 0.5  # seconds before the first of them is tried again; twice as long before every further one
SEGMENT = 4 << 30  # bytes of a file asked for at once: the hub refuses more than 50 GB
OTHERWISE = "give a model directory"
AGAIN = "check the network and give the same command again, which goes on from there"
INCOMPLETE = ".mlx-pare.incomplete"  # huggingface_hub counts *.incomplete as such, and can remove them
_ETAG = re.compile(r"[\w-][\w.-]{0,127}", re.ASCII)  # becomes the name of a file
_SHA256 = re.compile("[0-9a-f]{64}")


@dataclass(frozen=True)
class Downloaded:
    """A model on this disk. ``path``: its directory, or its (first) GGUF file; ``name``: the same with its commit."""

    path: Path
    name: HubName


def download(name: HubName, gguf: bool = False) -> Downloaded:
    """A model of the hub on this disk; what the cache lacks of it is fetched.

    If the hub does not answer, or does not give it, a model that was downloaded whole before serves. ``gguf``: of a
    repository that also has other weights, take the GGUF model.

    Raises:
        HubError, Unreachable: the hub does not give it: not there, gated, offline, no connection.
        Refused: it does not fit on the disk.
        PareError: it is no model, or cannot be cut; UsageError: it has several GGUF models, and none is named.
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
        console.say(f"{name}: {console.gb(received)} downloaded, commit {commit[:8]}")
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
    """The commit and its files. Of a commit that is known nobody is asked."""
    if hub_cache.COMMIT.fullmatch(hub.asked) and (kept := hub_cache.listing(hub.repo, hub.asked)) is not None:
        return hub.asked, kept
    commit, sizes = in_time(hub.listing, OTHERWISE)
    hub_cache.keep_listing(hub.repo, commit, sizes)
    return commit, sizes


def _in_cache(name: HubName, hub: Hub, error: HubError, gguf: bool) -> Downloaded:
    """The model as it was downloaded before; otherwise the error, which says that it was not."""
    found = hub_cache.found(name, hub.asked, gguf)
    if found:
        console.say(f"{error.problem}: {name} is taken from the cache, commit {found[0][:8]}")
        return _found(name, *found)
    if isinstance(error, Unreachable):
        whole = f"{name} is not in the cache {hub_cache.root()}, or not all of it"
        raise Unreachable(f"{error.problem}, and {whole}", error.cure) from error
    raise error


# ---- what is missing ----


@dataclass(frozen=True)
class _Blob:
    """A file to be fetched: its name in the repository, its bytes, and its place in the cache."""

    file: str
    size: int
    place: Path

    @property
    def partial(self) -> Path:
        return self.place.with_name(self.place.name + INCOMPLETE)

    @property
    def there(self) -> int:
        """Bytes that an earlier call left."""
        with contextlib.suppress(OSError):
            return min(self.partial.stat().st_size, self.size)
        return 0


def _bring(name: HubName, hub: Hub, commit: str, wanted: Mapping[str, Any], lacking: list[str]) -> int:
    """Fetch what is lacking and make the snapshot; returns how many bytes of files were received."""
    if "config.json" in wanted:
        _check_config(hub, commit, wanted["config.json"])
    with ThreadPoolExecutor(WORKERS) as pool:
        blobs = list(pool.map(lambda file: _blob(hub, commit, file, wanted[file]), lacking))
    todo = {blob.place: blob for blob in blobs if hub_cache.missing(blob.place.parent, {blob.place.name: blob.size})}
    received = sum(blob.size - blob.there for blob in todo.values())
    _check_room(name, received)
    if todo:
        next(iter(todo)).parent.mkdir(parents=True, exist_ok=True)
        _fetch_all(name, hub, commit, list(todo.values()))
    _make_snapshot(hub, commit, list(wanted))
    place = hub_cache.snapshot(hub.repo, commit)
    for blob in blobs:  # a disk without links has the file itself in the snapshot: one is enough
        if blob.place.exists() and not (place / blob.file).is_symlink():
            blob.place.unlink()
    if left := hub_cache.missing(place, {blob.file: blob.size for blob in blobs}):
        raise PareError(f"{place} lacks {left[0]} after the download", "give the same command again")
    return received


def _check_config(hub: Hub, commit: str, size: Any) -> None:
    """Raises Unsupported before gigabytes are fetched for nothing, HubError where the hub does not give its files."""
    if type(size) is not int:
        return
    config = read_json(File(hub, commit, "config.json", size), "model config")
    check_packing(config, hub.repo)
    cuttable(config, hub.repo)


def _blob(hub: Hub, commit: str, file: str, listed: Any) -> _Blob:
    """What the hub says of a file, checked. Raises HubError."""
    try:
        etag, size = hub.head(commit, file)
    except Unreachable:  # once more: one broken connection of many must not spoil it all
        etag, size = hub.head(commit, file)
    known = listed if type(listed) is int and listed >= 0 else size
    if known is None:
        raise HubError(f"{hub.host} does not say how large {hub.repo}/{file} is", OTHERWISE)
    if size is not None and size != known:
        raise HubError(f"{hub.host} says that {hub.repo}/{file} has {known} bytes, and that it has {size}", OTHERWISE)
    if known > MAX_SMALL and not file.lower().endswith((".safetensors", ".gguf")):
        raise HubError(f"{hub.repo}/{file} has {console.gb(known)}, more than any such file", OTHERWISE)
    if not _ETAG.fullmatch(etag):
        raise HubError(f"{hub.host} gives {hub.repo}/{file} the ETag {etag[:80]!r}, which is no name", OTHERWISE)
    return _Blob(file, known, hub_cache.storage(hub.repo) / "blobs" / etag)


def _check_room(name: HubName, needed: int) -> None:
    place = next(
        place for place in (hub_cache.root().absolute(), *hub_cache.root().absolute().parents) if place.exists()
    )
    free = shutil.disk_usage(place).free
    if needed > free:
        there = f"the disk of {hub_cache.root()} has {console.gb(free)} free"
        raise Refused(
            f"{name} takes {console.gb(needed)} more, and {there}",
            "make room, or set HF_HOME to a directory on a larger disk",
        )


# ---- bytes ----


class _Stopped(Exception):
    """Another file failed, or somebody pressed Ctrl-C."""


def _fetch_all(name: HubName, hub: Hub, commit: str, blobs: list[_Blob]) -> None:
    """All files side by side. Raises what the first of them raises; what was received stays.

    The threads are not waited for: Ctrl-C must not wait for a connection that has stalled.
    """
    stop, todo, done = threading.Event(), SimpleQueue(), SimpleQueue()
    for blob in blobs:
        todo.put(blob)
    with console.progress(f"download {name}", sum(blob.size for blob in blobs), console.gb) as bar:
        bar.skip(sum(blob.there for blob in blobs))
        fetch = _Fetch(hub, commit, bar, stop)

        def work() -> None:
            with contextlib.suppress(Empty):
                while not stop.is_set():
                    blob = todo.get_nowait()
                    try:
                        done.put(fetch.blob(blob))
                    except BaseException as error:
                        done.put(error)

        for _ in range(min(WORKERS, len(blobs))):
            threading.Thread(target=work, daemon=True).start()
        try:
            for _ in blobs:
                if (error := done.get()) is not None:
                    raise error
        finally:
            stop.set()


class _Fetch:
    """Receives files of one commit."""

    def __init__(self, hub: Hub, commit: str, bar: console.Progress, stop: threading.Event):
        self.hub, self.commit, self.bar, self.stop = hub, commit, bar, stop
        self._lock = threading.Lock()

    def advance(self, count: int) -> None:
        with self._lock:
            if not self.stop.is_set():
                self.bar.advance(count)

    def blob(self, blob: _Blob) -> None:
        """One file, unless another process fetches it meanwhile: huggingface_hub's lock is ours."""
        from filelock import Timeout
        from huggingface_hub.utils import WeakFileLock

        locks = hub_cache.root() / ".locks" / hub_cache.storage(self.hub.repo).name
        locks.mkdir(parents=True, exist_ok=True)
        while not self.stop.is_set():
            with contextlib.suppress(Timeout), WeakFileLock(locks / f"{blob.place.name}.lock", timeout=1):
                if hub_cache.missing(blob.place.parent, {blob.place.name: blob.size}):
                    self._receive(blob)
                else:
                    self.advance(blob.size - blob.there)
                return

    def _receive(self, blob: _Blob) -> None:
        """Raises HubError for a server that sends other bytes than it announced."""
        for attempt in (1, 2):
            handle = os.open(blob.partial, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
            with open(handle, "r+b", buffering=0) as file:
                resumed = blob.there
                digest = self._complete(blob, file)
            if not _SHA256.fullmatch(blob.place.name) or digest == blob.place.name:
                os.replace(blob.partial, blob.place)
                return
            blob.partial.unlink()
            if attempt == 2 or not resumed:
                break
            self.advance(-blob.size)  # what an earlier call left was damaged: all of it once more
        raise HubError(f"{self.hub.repo}/{blob.file} has other bytes than its checksum says", "download it again")

    def _complete(self, blob: _Blob, file: Any) -> str:
        """Append what is missing, over as many connections as it takes; returns the sha256 of all of it."""
        if os.fstat(file.fileno()).st_size > blob.size:
            file.truncate(0)
        written = _Written(file)
        failed = 0
        while written.size < blob.size:
            before = written.size
            try:
                self._append(blob, written)
                if written.size == before:
                    raise Unreachable(f"{self.hub.host} sends no more of {self.hub.repo}/{blob.file}", AGAIN)
                failed = 0
            except Unreachable as error:
                failed = failed + 1 if written.size == before else 1
                if failed > RETRIES:
                    part = f"{console.gb(written.size)} of {console.gb(blob.size)} of {blob.file}"
                    raise Unreachable(f"{error.problem}; {part} are here", AGAIN) from error
                self.stop.wait(PAUSE * 2 ** (failed - 1))
        return written.digest.hexdigest()

    def _append(self, blob: _Blob, written: _Written) -> None:
        """What one connection brings."""
        for at, piece in self._pieces(blob, written.size):
            if self.stop.is_set():
                raise _Stopped
            if at == 0 and written.size:  # a server that knows no ranges begins anew
                self.advance(-written.size)
                written.clear()
            if written.size + len(piece) > blob.size:
                more = f"{self.hub.host} sends more of {self.hub.repo}/{blob.file} than the {blob.size} bytes it said"
                raise HubError(more, OTHERWISE)
            written.add(piece)
            self.advance(len(piece))

    def _pieces(self, blob: _Blob, have: int) -> Iterator[tuple[int, bytes]]:
        last = None if blob.size <= SEGMENT else min(have + SEGMENT, blob.size) - 1
        timeout = float(self.hub.constants.HF_HUB_DOWNLOAD_TIMEOUT)
        return self.hub.pieces(self.hub.path(self.commit, blob.file), have, last, timeout)


class _Written:
    """An unbuffered file that grows, its size, and the sha256 of all of its bytes."""

    def __init__(self, file: Any):
        self.file, self.size, self.digest = file, 0, hashlib.sha256()
        while piece := file.read(1 << 20):
            self.digest.update(piece)
            self.size += len(piece)

    def add(self, piece: bytes) -> None:
        view = memoryview(piece)
        while view:  # such a file may take a part of it
            view = view[self.file.write(view) :]
        self.digest.update(piece)
        self.size += len(piece)

    def clear(self) -> None:
        self.file.seek(0)
        self.file.truncate(0)
        self.size, self.digest = 0, hashlib.sha256()


# ---- the snapshot ----


def _make_snapshot(hub: Hub, commit: str, files: list[str]) -> None:
    """Let huggingface_hub make the links of a commit, whose blobs are all there."""
    from huggingface_hub import snapshot_download

    with _watched(hub):
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
            if getattr(error, "errno", None):  # a full disk, say
                raise
            cause = error.__cause__ or error
            reason = (str(cause).strip() or type(cause).__name__).split("\n")[0]
            raise Unreachable(f"the snapshot of {hub.repo} cannot be made ({reason})", AGAIN) from error


@contextlib.contextmanager
def _watched(hub: Hub) -> Iterator[None]:
    """huggingface_hub at work, quietly: ETags become names of files, and are held to that first; nothing is asked of
    the hub but the model."""
    from huggingface_hub.utils import logging

    def check(answer: Any) -> None:
        for key in ("ETag", "X-Linked-ETag"):
            etag = answer.headers.get(key, "").removeprefix("W/").strip('"')
            if answer.url.host == hub.host and etag and not _ETAG.fullmatch(etag):
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
    """A progress bar for huggingface_hub that shows nothing, and ends a download: there should be none."""
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
