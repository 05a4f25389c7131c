"""A model on the Hugging Face hub, looked at without downloading it: config.json and the headers of its weight files.

The headers are kilobytes in front of gigabytes and are asked for by byte range. huggingface_hub brings the connection
(proxies, redirects, HF_ENDPOINT, HF_HUB_OFFLINE), the login and the place of the cache; it is imported (0.1 s) when a
hub id is given, not before. Its own get_safetensors_metadata is not used: from a server that ignores ranges it takes
whole files, and it believes what a header says. Here a remote file is read by checkpoint.py, as a local one is.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import stat
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from urllib.parse import quote, urlsplit

from . import bounded
from .checkpoint import Checkpoint, read_header, read_json
from .errors import PareError, UsageError

TIMEOUT = 5.0  # seconds without a byte from the network
PATIENCE = 8.0  # seconds for the first answer in all: looking up a host name knows no timeout
GUESS = 100_000  # bytes of a weight file asked for at first: nearly always the whole header, and so one request
WORKERS = 8
MAX_FILES = 1000  # weight files of one model; the largest models have about 200
MAX_LISTING = bounded.MAX_JSON
MAX_RECEIVED = 256 << 20  # bytes of everything; 1 TB of weights has about 20 MB of headers
FORMAT = 1  # of what is kept in the cache
OTHERWISE = "give a name of the catalogue or a model directory"

_PART = r"\w(?:[\w.-]*\w)?"
_REPO = re.compile(rf"(?!.*\.\.)(?![^@]*--)({_PART}/{_PART})(?:@(\w[\w./+-]*))?", re.ASCII)
_COMMIT = re.compile("[0-9a-f]{40}")


class HubError(PareError):
    """The hub does not give what was asked for: not there, private, gated, too many requests."""


class Unreachable(HubError):
    """No usable answer: offline, no network, a timeout, a broken connection, a server in trouble."""


@dataclass(frozen=True)
class RemoteTensor:
    """A tensor as the header of its file describes it; ``dtype`` in the words of safetensors, ``nbytes`` as stored."""

    dtype: str
    shape: tuple[int, ...]
    nbytes: int


@dataclass(frozen=True)
class Remote:
    """What is known of a model on the hub without its weights.

    ``revision`` is the commit hash, ``files`` all names in it, ``gguf`` (name, bytes) of the .gguf files among them.
    A repository of GGUF files alone has no ``tensors``, and an empty ``config`` where it holds no config.json.
    ``downloaded_bytes`` counts the bodies that this call received; 0 when all came from the cache.
    """

    repo: str
    revision: str
    config: dict[str, Any]
    tensors: dict[str, RemoteTensor]
    files: tuple[str, ...]
    gguf: tuple[tuple[str, int], ...]
    downloaded_bytes: int = field(default=0, compare=False)


def looks_like_repo(text: str | os.PathLike[str]) -> bool:
    """Whether this names a model on the hub, "org/name" or "org/name@revision", and not an existing path."""
    return bool(_REPO.fullmatch(os.fspath(text))) and not os.path.exists(text)


def remote(repo: str, say: Callable[[str], None] | None = None) -> Remote:
    """Config and tensor table of "org/name" or "org/name@revision" (branch, tag or commit; default: main).

    What was read is kept in huggingface_hub's cache of assets: a second call costs one request, with a commit hash
    none. Where the hub cannot be reached, what was kept serves, or a model that was downloaded. ``say`` hears of the
    progress. Raises UsageError for a text that is no such name, Unreachable, HubError when the hub refuses, and
    PareError for files that cannot be what they should be.
    """
    match, say = _REPO.fullmatch(repo), say or (lambda line: None)
    if not match:
        raise UsageError(f"{repo} is not the name of a model on the hub", "write org/name or org/name@revision")
    hub = _Hub(match[1], match[2] or "main")
    kept = _kept(hub)
    if kept and kept.revision == hub.asked:  # a commit never changes
        return kept
    try:
        commit, sizes = _in_time(hub.listing)
    except Unreachable as error:
        found = kept or _downloaded(hub)
        if not found:
            raise
        say(f"{error.problem}: taken from the cache, {hub.repo} as of commit {found.revision[:8]}")
        return found
    if kept and kept.revision == commit:
        return replace(kept, downloaded_bytes=hub.received)
    found = _read(hub, commit, sizes, say)
    _keep(hub, found)
    return found


# ---- the connection ----


def _in_time(function: Callable[[], Any]) -> Any:
    """Its result, or Unreachable after PATIENCE seconds; the thread left behind does not keep the process alive."""
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
        raise Unreachable(f"the hub did not answer within {PATIENCE:g} seconds", OTHERWISE) from None


class _Hub:
    """One conversation about one model, of which it counts the bytes."""

    def __init__(self, repo: str, asked: str):
        from huggingface_hub import constants

        self.repo, self.asked, self.constants = repo, asked, constants
        self.received = 0
        self._lock = threading.Lock()

    @property
    def host(self) -> str:
        """For messages: HF_ENDPOINT itself may hold a password."""
        return urlsplit(self.constants.ENDPOINT).hostname or "HF_ENDPOINT"

    @cached_property
    def _client(self) -> Any:
        from huggingface_hub import get_session

        return get_session()

    @cached_property
    def _headers(self) -> dict[str, str]:
        """Who asks. huggingface_hub's build_hf_headers would first ask the hub for a list of agents (telemetry)."""
        from huggingface_hub import get_token

        token = None if self.constants.HF_HUB_DISABLE_IMPLICIT_TOKEN else get_token()
        login = {"Authorization": f"Bearer {token}"} if token else {}
        # compressed, a range would not be the bytes asked for
        return {"User-Agent": "mlx-pare", "Accept-Encoding": "identity", **login}

    def listing(self) -> tuple[str, dict[str, Any]]:
        """The commit that ``asked`` means now, and the size in bytes of every file in it (None: not said)."""
        raw = self._get(f"/api/models/{self.repo}/revision/{quote(self.asked, safe='')}?blobs=true", 0, MAX_LISTING)
        try:
            found = bounded.loads(raw)
            names = {str(f["rfilename"]): f.get("size") for f in found["siblings"]}
            if not _COMMIT.fullmatch(found["sha"]):
                raise ValueError
        except (ValueError, KeyError, TypeError, AttributeError) as error:  # also a hotel's login page
            raise Unreachable(f"what {self.host} answers is not a list of files", "check the network") from error
        return found["sha"], {name: size for name, size in names.items() if name.isprintable()}

    def read(self, commit: str, name: str, first: int, count: int) -> bytes:
        """``count`` bytes of a file from byte ``first`` on, or fewer where it ends."""
        path = f"/{self.repo}/resolve/{commit}/{quote(name)}"
        try:
            return self._get(path, first, count, ranged=True)
        except Unreachable:  # once more: one broken connection of many must not spoil it all
            return self._get(path, first, count, ranged=True)

    def _get(self, path: str, first: int, count: int, ranged: bool = False) -> bytes:
        if self.constants.HF_HUB_OFFLINE:
            raise Unreachable("offline mode is set (HF_HUB_OFFLINE), the hub is not asked", f"unset it, or {OTHERWISE}")
        if self.received > MAX_RECEIVED:
            raise PareError(f"the headers of {self.repo} are larger than {MAX_RECEIVED >> 20} MiB")
        headers = self._headers | ({"Range": f"bytes={first}-{first + count - 1}"} if ranged else {})
        try:
            with self._client.stream("GET", self.constants.ENDPOINT + path, headers=headers, timeout=TIMEOUT) as answer:
                self._check(answer, first)
                return self._body(answer, first if answer.status_code == 200 else 0, count)
        except PareError:
            raise
        except Exception as error:  # of httpx or httpx2, as huggingface_hub's version has it, and of no common root
            reason = " ".join(str(error).split()) or type(error).__name__
            raise Unreachable(f"the connection to {self.host} failed ({reason})", OTHERWISE) from error

    def _body(self, answer: Any, skip: int, count: int) -> bytes:
        """A server that knows no ranges sends all of it: what comes before is skipped, what comes after not read."""
        body = bytearray()
        try:
            for chunk in answer.iter_bytes():
                body += chunk
                if len(body) > skip + count:
                    break
        finally:
            with self._lock:
                self.received += answer.num_bytes_downloaded
        return bytes(body[skip : skip + count])

    def _check(self, answer: Any, first: int) -> None:
        """Raises HubError for everything but the bytes that were asked for."""
        status, code = answer.status_code, answer.headers.get("X-Error-Code", "")
        host, login = self.host, "log in with `hf auth login` (or set HF_TOKEN)"
        if answer.url.host != host and status not in (200, 206):  # where the hub has its large files
            raise Unreachable(f"{answer.url.host} answers {status} when {host} sends us there", OTHERWISE)
        if status == 206 and not answer.headers.get("Content-Range", "").startswith(f"bytes {first}-"):
            raise Unreachable(f"{host} sends other bytes than it was asked for", OTHERWISE)
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
        # to those it does not know the hub says 401 for what is not there as well
        if status in (401, 404) and code != "EntryNotFound":
            raise HubError(
                f"{host} has no model {self.repo}, or it is private ({status})",
                f"check the name, or {OTHERWISE}; if it is private, {login}",
            )
        if status == 429:
            raise HubError(f"{host} says that these are too many requests (429)", f"try again later, or {login}")
        kind = Unreachable if status >= 500 else HubError
        raise kind(f"{host} answers {status} when asked for {self.repo}", OTHERWISE)


@dataclass(frozen=True)
class _File:
    """A file on the hub with as much of pathlib.Path as checkpoint.py needs to read its header, or its JSON."""

    hub: _Hub
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
    """Reads a remote file from its start: GUESS bytes at first, after that exactly what is missing."""

    def __init__(self, file: _File):
        self.file, self.raw, self.at = file, file.read(0, GUESS), 0

    def read(self, count: int) -> bytes:
        missing = self.at + count - len(self.raw)
        if missing > 0:
            self.raw += self.file.read(len(self.raw), missing)
        self.at += count
        return self.raw[self.at - count : self.at]


# ---- one model ----


def _read(hub: _Hub, commit: str, sizes: dict[str, Any], say: Callable[[str], None]) -> Remote:
    def file(name: str) -> _File:
        if type(sizes[name]) is not int or sizes[name] < 0:
            raise PareError(f"{hub.host} does not say how large {hub.repo}/{name} is", OTHERWISE)
        return _File(hub, commit, name, sizes[name])

    weights = [file(name) for name in _weight_files(hub.repo, sizes)]
    gguf = tuple((name, file(name).size) for name in sizes if name.endswith(".gguf"))
    if not weights and not gguf:
        raise PareError(f"{hub.repo} has neither model*.safetensors nor *.gguf", "look for a conversion of the model")
    if weights and "config.json" not in sizes:
        raise PareError(f"{hub.repo} has no config.json", "look for another copy of the model")
    config = read_json(file("config.json"), "model config") if "config.json" in sizes else {}
    tensors = _tensors(weights, say)
    return Remote(hub.repo, commit, config, tensors, tuple(sizes), gguf, hub.received)


def _weight_files(repo: str, sizes: dict[str, Any]) -> list[str]:
    """As Checkpoint and mlx-lm: every model*.safetensors beside the config. The names tell when one is missing."""
    names = sorted(name for name in sizes if re.fullmatch(r"model[^/]*\.safetensors", name))
    if len(names) > MAX_FILES:
        raise PareError(f"{repo} has {len(names)} weight files, more than {MAX_FILES}")
    totals = [match[1] for name in names if (match := re.fullmatch(r"model-\d+-of-(\d{1,9})\.safetensors", name))]
    for total in sorted(set(totals)):
        if totals.count(total) != int(total):
            raise PareError(
                f"{repo} has {totals.count(total)} of {int(total)} weight files", "look for another copy of the model"
            )
    return names


def _tensors(files: list[_File], say: Callable[[str], None]) -> dict[str, RemoteTensor]:
    tensors: dict[str, RemoteTensor] = {}
    told = time.monotonic()
    with ThreadPoolExecutor(WORKERS) as pool:  # map cancels what has not begun when one fails
        for done, (file, table) in enumerate(zip(files, pool.map(_header, files), strict=True), 1):
            if twice := tensors.keys() & table.keys():
                raise PareError(f"tensor {min(twice)[:80]} is in {file} and in another weight file")
            tensors |= table
            if done == len(files) or time.monotonic() - told >= 1:
                told = time.monotonic()
                say(f"reading headers {done} of {len(files)}")
    return tensors


def _header(file: _File) -> dict[str, RemoteTensor]:
    try:
        return {name: RemoteTensor(e.dtype, e.shape, e.nbytes) for name, e in read_header(file).items()}
    except HubError:
        raise
    except PareError as error:  # to download it again, which is the cure for a local file, would not help
        raise PareError(error.problem[:300], "look for another copy or conversion of the model") from error


# ---- the cache ----


def _place(hub: _Hub) -> Path:
    from huggingface_hub import cached_assets_path

    folder = cached_assets_path("mlx-pare", "hub", "headers", assets_dir=hub.constants.HF_ASSETS_CACHE)
    return folder / f"{hub.repo.replace('/', '--')}@{quote(hub.asked, safe='')}.json"


def _keep(hub: _Hub, found: Remote) -> None:
    with contextlib.suppress(OSError, ValueError):  # without a cache it works as well
        place = _place(hub)
        beside = place.with_suffix(f".{os.getpid()}.tmp")
        beside.write_text(json.dumps({"format": FORMAT, **asdict(found)}), "utf-8")
        os.replace(beside, place)


def _kept(hub: _Hub) -> Remote | None:
    """What an earlier call read for the same revision; None when there is nothing that can be used."""
    try:
        found = read_json(_place(hub), "cache")
        if found.pop("format") != FORMAT:
            return None
        tensors = {n: RemoteTensor(t["dtype"], tuple(t["shape"]), t["nbytes"]) for n, t in found["tensors"].items()}
        gguf = tuple((name, size) for name, size in found["gguf"])
        changed = {"tensors": tensors, "files": tuple(found["files"]), "gguf": gguf, "downloaded_bytes": 0}
        return Remote(**(found | changed))
    except (PareError, OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def _downloaded(hub: _Hub) -> Remote | None:
    """The model itself where it lies in the cache, downloaded by mlx-lm or transformers; None when it does not."""
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(hub.repo, "config.json", hub.constants.HF_HUB_CACHE, hub.asked)
    try:
        checkpoint = Checkpoint(Path(found).parent) if isinstance(found, str) else None
    except PareError:  # a part of it
        return None
    if not checkpoint:
        return None
    tensors = {name: RemoteTensor(e.dtype, e.shape, e.nbytes) for name, e in checkpoint.entries.items()}
    here = {f.relative_to(checkpoint.path).as_posix(): f.stat().st_size for f in checkpoint.path.rglob("*")}
    gguf = tuple((name, size) for name, size in sorted(here.items()) if name.endswith(".gguf"))
    return Remote(hub.repo, checkpoint.path.name, checkpoint.config, tensors, tuple(sorted(here)), gguf)
