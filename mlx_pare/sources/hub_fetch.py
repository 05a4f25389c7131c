"""Receive files of a model on the hub by byte ranges, so that an interrupted file continues with the missing bytes."""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import Any

from ..base import console
from ..base.errors import FULL, PareError
from ..base.units import gb
from ..model.hub_name import HubName
from . import hub_cache
from .hub_reader import Hub, HubError, Unreachable

WORKERS = 8
RETRIES = 5  # broken connections in a row without new bytes
PAUSE = 0.5  # seconds before the first retry; twice as long before each further one
SEGMENT = 4 << 30  # bytes of a file per request: the hub refuses more than 50 GB
AGAIN = "check the network and give the same command again, which goes on from there"
OTHERWISE = "give a model directory"
INCOMPLETE = ".mlx-pare.incomplete"  # huggingface_hub knows *.incomplete, and can remove such files
_SHA256 = re.compile("[0-9a-f]{64}")


@dataclass(frozen=True)
class Blob:
    """A file to be fetched: its name in the repository, its bytes, and its place in the cache."""

    file: str
    size: int
    place: Path

    @property
    def partial(self) -> Path:
        return self.place.with_name(self.place.name + INCOMPLETE)

    @property
    def there(self) -> int:
        """Bytes left by an earlier call."""
        with contextlib.suppress(OSError):
            return min(self.partial.stat().st_size, self.size)
        return 0


class _Stopped(Exception):
    """Another file failed, or the user pressed Ctrl-C."""


def fetch_all(name: HubName, hub: Hub, commit: str, blobs: list[Blob]) -> None:
    """Fetch files in parallel. Received bytes stay, also after an error.

    Threads are not joined: Ctrl-C must not wait for a stalled connection.

    Args:
        name: the model, for messages.
        hub: connection to its repository.
        commit: hash of the commit.
        blobs: the files.
    Raises:
        HubError, Unreachable: the first file that fails.
        PareError: the disk is full.
    """
    stop, todo, done = threading.Event(), SimpleQueue(), SimpleQueue()
    for blob in blobs:
        todo.put(blob)
    with console.progress(f"download {name}", sum(blob.size for blob in blobs), gb) as bar:
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
        here = lambda: f"{gb(bar.done)} of {gb(bar.total)} of {name} are here"  # noqa: E731
        try:
            for _ in blobs:
                if (error := done.get()) is not None:
                    raise error
        except KeyboardInterrupt:
            raise KeyboardInterrupt(f"{here()}, the same command goes on from there") from None
        except OSError as error:
            if error.errno not in FULL:
                raise
            cure = "make room on it, the same command goes on from there"
            raise PareError(f"the disk of {hub_cache.root()} is full: {here()}", cure) from error
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

    def blob(self, blob: Blob) -> None:
        """Fetch one file under huggingface_hub's lock, unless another process has fetched it."""
        from filelock import Timeout
        from huggingface_hub.utils import WeakFileLock

        locks = hub_cache.root() / ".locks" / hub_cache.storage(self.hub.repo).name
        locks.mkdir(parents=True, exist_ok=True)
        told = False
        while not self.stop.is_set():
            with contextlib.suppress(Timeout), WeakFileLock(locks / f"{blob.place.name}.lock", timeout=1):
                if hub_cache.missing(blob.place.parent, {blob.place.name: blob.size}):
                    self._receive(blob)
                else:
                    self.advance(blob.size - blob.there)
                return
            if not told:
                console.say(f"waiting for another process that fetches {self.hub.repo}/{blob.file}")
                told = True

    def _receive(self, blob: Blob) -> None:
        """Receive one file. Raises HubError if it does not match its checksum."""
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
            self.advance(-blob.size)  # the bytes of an earlier call were damaged: fetch all again
        raise HubError(f"{self.hub.repo}/{blob.file} has other bytes than its checksum says", "download it again")

    def _complete(self, blob: Blob, file: Any) -> str:
        """Append the missing bytes, with as many connections as needed. Returns the sha256 of the file."""
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
                    part = f"{gb(written.size)} of {gb(blob.size)} of {blob.file}"
                    raise Unreachable(f"{error.problem}; {part} are here", AGAIN) from error
                self.stop.wait(PAUSE * 2 ** (failed - 1))
        return written.digest.hexdigest()

    def _append(self, blob: Blob, written: _Written) -> None:
        """Append the bytes of one connection."""
        for at, piece in self._pieces(blob, written.size):
            if self.stop.is_set():
                raise _Stopped
            if at == 0 and written.size:  # a server without ranges starts again
                self.advance(-written.size)
                written.clear()
            if written.size + len(piece) > blob.size:
                more = f"{self.hub.host} sends more of {self.hub.repo}/{blob.file} than the {blob.size} bytes it said"
                raise HubError(more, OTHERWISE)
            written.add(piece)
            self.advance(len(piece))

    def _pieces(self, blob: Blob, have: int) -> Iterator[tuple[int, bytes]]:
        last = None if blob.size <= SEGMENT else min(have + SEGMENT, blob.size) - 1
        timeout = float(self.hub.constants.HF_HUB_DOWNLOAD_TIMEOUT)
        return self.hub.pieces(self.hub.path(self.commit, blob.file), have, last, timeout)


class _Written:
    """An unbuffered file that grows, with its size and sha256."""

    def __init__(self, file: Any):
        self.file, self.size, self.digest = file, 0, hashlib.sha256()
        while piece := file.read(1 << 20):
            self.digest.update(piece)
            self.size += len(piece)

    def add(self, piece: bytes) -> None:
        view = memoryview(piece)
        while view:  # an unbuffered file may take a part of it
            view = view[self.file.write(view) :]
        self.digest.update(piece)
        self.size += len(piece)

    def clear(self) -> None:
        self.file.seek(0)
        self.file.truncate(0)
        self.size, self.digest = 0, hashlib.sha256()
