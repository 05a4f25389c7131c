"""Read config.json and the headers of the weight files of a model on the Hugging Face hub, without downloading it.

sources/download.py downloads models. Headers are kilobytes before gigabytes, so they are read by byte ranges.
huggingface_hub gives the connection (proxies, redirects, HF_ENDPOINT, HF_HUB_OFFLINE), the login and the place of the
cache. It is imported (0.1 s) only if a hub id is given. Its own get_safetensors_metadata is not used: it takes whole
files from a server that ignores ranges, and does not check headers. Remote headers are read and checked as local ones.
"""

from __future__ import annotations

import contextlib
import os
import stat
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cached_property
from types import SimpleNamespace
from typing import Any
from urllib.parse import quote, urlsplit

from ..base import untrusted
from ..base.errors import PareError, UsageError
from ..base.untrusted import read_json
from ..model.hub_name import HubName, on_hub
from ..model.weight_files import INDEX, indexed, told
from ..tensors.safetensors import read_header
from . import catalogue, hub_cache
from .hub_cache import COMMIT, Remote, RemoteTensor
from .hub_files import weight_files

TIMEOUT = 5.0  # seconds without a byte from the network
PATIENCE = 8.0  # seconds in all for the first answer: looking up a host name has no timeout
GUESS = 100_000  # bytes of a weight file in the first request: nearly always the whole header
WORKERS = 8
MAX_LISTING = untrusted.MAX_JSON
MAX_RECEIVED = 256 << 20  # bytes in all; 1 TB of weights has about 20 MB of headers
OTHERWISE = "give a name of the catalogue or a model directory"


class HubError(PareError):
    """The hub does not give what was asked for: it does not exist, is private or gated, or requests are too many."""


class Unreachable(HubError):
    """The hub gives no usable answer: offline, no network, a timeout, a broken connection, a failing server."""


def looks_like_repo(text: str | os.PathLike[str]) -> bool:
    """Tell whether a text names a model on the hub, "org/name" or "org/name@revision", and no existing path."""
    name = on_hub(text)
    return name is not None and not (name.file or name.tag)


def remote(repo: str, say: Callable[[str], None] | None = None) -> Remote:
    """Read config and tensor table of "org/name" or "org/name@revision" (branch, tag or commit; default: main).

    The result is kept in huggingface_hub's cache of assets: a second call costs one request, or none with a commit
    hash. If the hub cannot be reached, a kept result or a downloaded model is used. ``say`` receives lines about the
    progress. Raises UsageError if the text is no such name, Unreachable, HubError if the hub refuses, and PareError if
    files are not what they should be.
    """
    name, say = HubName.parse(repo), say or (lambda line: None)
    if not name or name.file or name.tag:
        raise UsageError(f"{repo} is not the name of a model on the hub", "write org/name or org/name@revision")
    hub = Hub(name.repo, name.revision or "main")
    kept = hub_cache.kept(hub.repo, hub.asked)
    if kept and kept.revision == hub.asked:  # a commit never changes
        return kept
    try:
        commit, sizes = in_time(hub.listing)
    except Unreachable as error:
        found = kept or hub_cache.downloaded(hub.repo, hub.asked)
        if not found:
            raise
        say(f"{error.problem}: taken from the cache, {hub.repo} as of commit {found.revision[:8]}")
        return found
    if kept and kept.revision == commit:
        return replace(kept, downloaded_bytes=hub.received)
    found = _read(hub, commit, sizes, say)
    hub_cache.keep(hub.asked, found)
    return found


# ---- the connection ----


def in_time(function: Callable[[], Any], otherwise: str = OTHERWISE) -> Any:
    """Return the function's result, or raise Unreachable after PATIENCE seconds. Its thread does not block an exit."""
    future: Future = Future()

    def work() -> None:
        try:
            future.set_result(function())
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=work, daemon=True).start()
    try:
        return future.result(PATIENCE)
    except TimeoutError:
        raise Unreachable(f"the hub did not answer within {PATIENCE:g} seconds", otherwise) from None


class Hub:
    """A connection for one model, which counts received bytes. ``otherwise``: what the user may do instead."""

    def __init__(self, repo: str, asked: str, otherwise: str = OTHERWISE):
        from huggingface_hub import constants

        self.repo, self.asked, self.constants, self.otherwise = repo, asked, constants, otherwise
        self.received = 0
        self._lock = threading.Lock()

    @property
    def host(self) -> str:
        """Host name for messages: HF_ENDPOINT itself may hold a password."""
        return urlsplit(self.constants.ENDPOINT).hostname or "HF_ENDPOINT"

    @cached_property
    def client(self) -> Any:
        """The HTTP client of huggingface_hub."""
        from huggingface_hub import get_session

        return get_session()

    @cached_property
    def _headers(self) -> dict[str, str]:
        """Headers with the login. huggingface_hub's build_hf_headers would first fetch a list of agents (telemetry)."""
        from huggingface_hub import get_token

        token = None if self.constants.HF_HUB_DISABLE_IMPLICIT_TOKEN else get_token()
        login = {"Authorization": f"Bearer {token}"} if token else {}
        # a range of compressed bytes would not be the bytes asked for
        return {"User-Agent": "mlx-pare", "Accept-Encoding": "identity", **login}

    def listing(self) -> tuple[str, dict[str, Any]]:
        """Ask which commit ``asked`` means now, and for the bytes of each of its files (None: unknown)."""
        raw = self._get(f"/api/models/{self.repo}/revision/{quote(self.asked, safe='')}?blobs=true", 0, MAX_LISTING)
        try:
            found = untrusted.loads(raw)
            names = {str(f["rfilename"]): f.get("size") for f in found["siblings"]}
            if not COMMIT.fullmatch(found["sha"]):
                raise ValueError
        except (ValueError, KeyError, TypeError, AttributeError) as error:  # for example a hotel's login page
            raise Unreachable(f"what {self.host} answers is not a list of files", "check the network") from error
        for name in names:
            if name.startswith("/") or any(part in ("", ".", "..") for part in name.split("/")):
                raise HubError(f"{self.host} lists {name!r} in {self.repo}, which is no name of a file", self.otherwise)
        return found["sha"], {name: size for name, size in names.items() if name.isprintable()}

    def path(self, commit: str, name: str) -> str:
        """Return the path of a file on the hub."""
        return f"/{self.repo}/resolve/{commit}/{quote(name)}"

    def read(self, commit: str, name: str, first: int, count: int) -> bytes:
        """Read a part of a file; tries again once if the connection fails.

        Args:
            commit: hash of the commit.
            name: path of the file in the repository.
            first: first byte.
            count: bytes to read; fewer are returned if the file ends.
        Raises:
            HubError, Unreachable: the hub does not give it.
            PareError: this connection has received more than MAX_RECEIVED bytes.
        """
        try:
            return self._get(self.path(commit, name), first, count, ranged=True)
        except Unreachable:  # try again: one broken connection of many must not end it
            return self._get(self.path(commit, name), first, count, ranged=True)

    def head(self, commit: str, name: str) -> tuple[str, int | None]:
        """Ask for the ETag of a file, its name in huggingface_hub's cache, and for its bytes (None: unknown)."""
        from huggingface_hub import get_hf_file_metadata
        from huggingface_hub.errors import HfHubHTTPError

        url = self.constants.ENDPOINT + self.path(commit, name)
        with self._asking(url):
            try:
                found = get_hf_file_metadata(url, timeout=TIMEOUT, library_name="mlx-pare")
            except HfHubHTTPError as error:
                self._check(error.response, 0)
                raise
        return found.etag or "", found.size

    def pieces(
        self, path: str, first: int = 0, last: int | None = None, timeout: float | None = None
    ) -> Iterator[tuple[int, bytes]]:
        """Receive a range of a file piece by piece.

        Args:
            path: as ``path`` returns it.
            first: first byte.
            last: last byte, included; None: to the end.
            timeout: seconds without a byte; None: TIMEOUT.
        Returns:
            (byte of the file where the piece begins, piece); a server without ranges begins with byte 0.
        Raises:
            HubError, Unreachable: the hub does not give it.
        """
        ranged = {"Range": f"bytes={first}-{'' if last is None else last}"} if first or last is not None else {}
        url = self.constants.ENDPOINT + path
        with (
            self._asking(url),
            self.client.stream("GET", url, headers=self._headers | ranged, timeout=timeout or TIMEOUT) as answer,
        ):
            self._check(answer, first)
            at = 0 if answer.status_code == 200 else first
            try:
                for piece in answer.iter_bytes():
                    yield at, piece
                    at += len(piece)
            finally:
                with self._lock:
                    self.received += answer.num_bytes_downloaded

    def _get(self, path: str, first: int, count: int, ranged: bool = False) -> bytes:
        """Get ``count`` bytes from ``first``. Bytes before are dropped; bytes after them are not read to the end."""
        if self.received > MAX_RECEIVED:
            raise PareError(f"the headers of {self.repo} are larger than {MAX_RECEIVED >> 20} MiB")
        body = bytearray()
        with contextlib.closing(self.pieces(path, first, first + count - 1 if ranged else None)) as pieces:
            for at, piece in pieces:
                body += piece[max(0, first - at) :]
                if len(body) > count:
                    break
        return bytes(body[:count])

    @contextlib.contextmanager
    def _asking(self, url: str) -> Iterator[None]:
        """Turn errors of the connection into Unreachable."""
        if self.constants.HF_HUB_OFFLINE:
            offline = "offline mode is set (HF_HUB_OFFLINE)"
            raise Unreachable(f"{offline}, the hub is not asked", f"unset it, or {self.otherwise}")
        try:
            yield
        except PareError:
            raise
        except Exception as error:  # of httpx or httpx2, depending on huggingface_hub; they share no base class
            reason = " ".join(str(error).split()) or type(error).__name__
            raise Unreachable(f"the connection to {self.host} failed ({reason})", self.otherwise) from error

    def _check(self, answer: Any, first: int) -> None:
        """Raises HubError unless the answer has the bytes that were asked for."""
        status, code = answer.status_code, answer.headers.get("X-Error-Code", "")
        host, login = self.host, "log in with `hf auth login` (or set HF_TOKEN)"
        if answer.url.host != host and status not in (200, 206):  # host of the hub's large files
            raise Unreachable(f"{answer.url.host} answers {status} when {host} sends us there", self.otherwise)
        if status == 206 and not answer.headers.get("Content-Range", "").startswith(f"bytes {first}-"):
            raise Unreachable(f"{host} sends other bytes than it was asked for", self.otherwise)
        if status in (200, 206):
            return
        if code == "RevisionNotFound":
            raise HubError(f"{self.repo} has no revision {self.asked}", "name a branch, a tag or a commit of it")
        if status == 403 or code == "GatedRepo":
            page = f"{self.constants.HUGGINGFACE_CO_URL_HOME}{self.repo}"
            raise HubError(
                f"{host} does not let you read {self.repo} ({status}: gated or private)",
                f"accept its licence on the page {page} and {login}",
            )
        if status == 401 and "credentials" in answer.headers.get("X-Error-Message", ""):
            raise HubError(f"{host} does not accept your token (401)", f"{login} again")
        # without a login the hub also answers 401 for what does not exist
        if status in (401, 404) and code != "EntryNotFound":
            meant = catalogue.repositories_near(self.repo)
            raise HubError(
                f"{host} has no model {self.repo}, or it is private ({status})",
                (f"did you mean {' or '.join(meant)}? " if meant else "")
                + f"Check the name, or {self.otherwise}; if it is private, {login}",
            )
        if status == 429:
            raise HubError(f"{host} says that these are too many requests (429)", f"try again later, or {login}")
        kind = Unreachable if status >= 500 else HubError
        raise kind(f"{host} answers {status} when asked for {self.repo}", self.otherwise)


@dataclass(frozen=True)
class File:
    """A file on the hub with the methods of pathlib.Path that are needed to read its header or its JSON."""

    hub: Hub
    commit: str
    name: str
    size: int  # bytes

    def __str__(self) -> str:
        return f"{self.hub.repo}/{self.name}"

    def stat(self) -> SimpleNamespace:
        return SimpleNamespace(st_size=self.size, st_mode=stat.S_IFREG)

    def read(self, first: int, count: int) -> bytes:
        count = min(count, self.size - first)
        return self.hub.read(self.commit, self.name, first, count) if count > 0 else b""

    @contextlib.contextmanager
    def open(self, mode: str):
        yield _Start(self)


class _Start:
    """Reads a remote file from its start: GUESS bytes first, then exactly the missing bytes."""

    def __init__(self, file: File):
        self.file, self.raw, self.at = file, file.read(0, GUESS), 0

    def read(self, count: int) -> bytes:
        missing = self.at + count - len(self.raw)
        if missing > 0:
            self.raw += self.file.read(len(self.raw), missing)
        self.at += count
        return self.raw[self.at - count : self.at]


# ---- one model ----


def _read(hub: Hub, commit: str, sizes: dict[str, Any], say: Callable[[str], None]) -> Remote:
    def file(name: str) -> File:
        if type(sizes[name]) is not int or sizes[name] < 0:
            raise PareError(f"{hub.host} does not say how large {hub.repo}/{name} is", OTHERWISE)
        return File(hub, commit, name, sizes[name])

    weights = [file(name) for name in weight_files(hub.repo, sizes)]
    gguf = tuple((name, file(name).size) for name in sizes if name.endswith(".gguf"))
    if not weights and not gguf:
        raise PareError(f"{hub.repo} has neither model*.safetensors nor *.gguf", "look for a conversion of the model")
    if weights and "config.json" not in sizes:
        raise PareError(f"{hub.repo} has no config.json", "look for another copy of the model")
    config = read_json(file("config.json"), "model config") if "config.json" in sizes else {}
    tables = _tables(weights, say)
    if twice := _twice(tables):
        index = read_json(file(INDEX), "weight index").get("weight_map") if INDEX in sizes else None
        chosen = indexed(tables, index if isinstance(index, dict) else {})
        if not chosen:
            problem = f"tensor {twice[:80]} is in two weight files of {hub.repo}, and no index chooses one"
            raise PareError(problem, "look for another copy of the model")
        say(told(sorted(tables.keys() - set(chosen))))
        tables = {name: tables[name] for name in chosen}
    tensors = {name: tensor for table in tables.values() for name, tensor in table.items()}
    return Remote(hub.repo, commit, config, tensors, tuple(sizes), gguf, hub.received)


def _twice(tables: Mapping[str, Mapping[str, RemoteTensor]]) -> str | None:
    """Return a tensor that is in two weight files; None if there is none."""
    seen: set[str] = set()
    for table in tables.values():
        if both := seen & table.keys():
            return min(both)
        seen |= table.keys()
    return None


def _tables(files: list[File], say: Callable[[str], None]) -> dict[str, dict[str, RemoteTensor]]:
    """Return name of a weight file -> its tensors."""
    tables: dict[str, dict[str, RemoteTensor]] = {}
    told = time.monotonic()
    with ThreadPoolExecutor(WORKERS) as pool:  # if one fails, map cancels those that have not begun
        for done, (file, table) in enumerate(zip(files, pool.map(_header, files), strict=True), 1):
            tables[file.name] = table
            if done == len(files) or time.monotonic() - told >= 1:
                told = time.monotonic()
                say(f"reading headers {done} of {len(files)}")
    return tables


def _header(file: File) -> dict[str, RemoteTensor]:
    try:
        return {name: RemoteTensor(e.dtype, e.shape, e.nbytes) for name, e in read_header(file).items()}
    except HubError:
        raise
    except PareError as error:  # the cure for a local file, downloading it again, would not help
        raise PareError(error.problem[:300], "look for another copy or conversion of the model") from error
