"""MODEL as people give it: a model directory is itself, a GGUF file is rebuilt once, into a cache, and reused.

The cache is MLX_PARE_CACHE, or the system's place for such things. What lies there may be deleted at any time, all of
it or single files: the same GGUF file is rebuilt to the same bytes, so that a run goes on.

A GGUF file is told by its first four bytes and known again by all of its bytes. Hashing takes about half a second per
gigabyte, so the hash is remembered beside what shows cheaply that nothing changed since: size, dates and inode of the
file, its header, and some bytes of every tensor.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import re
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

from ..base import console, untrusted
from ..base.errors import PareError, UsageError
from ..gguf.header import Header, is_gguf, read_parts
from ..model.hub_name import of_snapshot
from . import resolve

VARIABLE = "MLX_PARE_CACHE"
VERSION = 2  # of what is rebuilt: another one is rebuilt again
LIST = "rebuilt.json"  # the files of a rebuilt model, written last
PIECE = 1 << 12  # bytes at the beginning, in the middle and at the end of every tensor
AT_REST_S = 3  # a file that changed less than this ago may change again without another date
NO_FILE = {errno.ELOOP, errno.EMLINK, errno.EISDIR, errno.ENXIO}  # of a link, a directory, a socket
NO_LOCKS = {errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOLCK, errno.ENOSYS}  # of a network disk

StrPath = str | os.PathLike[str]  # what the Python API takes for a path


def cache() -> Path:
    """The directory of rebuilt models."""
    if named := os.environ.get(VARIABLE):
        return Path(named).expanduser()
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches" / "mlx-pare"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "mlx-pare"


def opened(model: StrPath, run: Path | None = None) -> Path:
    """The model directory of MODEL: itself, or that of a GGUF file, which is rebuilt unless the cache has it whole. A
    model on the hub, or of the catalogue, is downloaded before (sources/resolve.py, also for ``run``).

    Raises PareError for a file that cannot be rebuilt or a model that cannot be downloaded, UsageError for a folder of
    several and for an unknown name.
    """
    model = resolve.local(model, run)
    file = gguf_of(model)
    if file is None:
        return model
    parts = read_parts(file)
    seen = glimpse(parts)
    content = remembered(parts, seen)
    out = cache() / f"{_slug(next(iter(parts)))}-{identity(parts, content)[:16]}"
    out.parent.mkdir(parents=True, exist_ok=True)
    with _locked(out.with_name(f"{out.name}.lock")):  # another process may be at it
        if not whole(out):
            _rebuild(file, out, content)
            if glimpse(parts) != seen:
                _remove(out)
                raise PareError(f"{file} changed while it was read", "wait until it is written, and try again")
            _list_files(out)
    console.say(f"{model} as an MLX model: {out}")
    resolve.rebuilt(model, out)
    return out


def gguf_of(model: Path) -> Path | None:
    """The GGUF file that MODEL is, or that a folder without another model holds; None if there is none.

    Raises UsageError for a folder of several.
    """
    if os.path.isfile(model):  # pathlib raises for a name that is too long
        return model if is_gguf(model) else None
    found = ggufs_in(model)
    if len(found) > 1:
        names = ", ".join(file.name for file in found[:3]) + (", ..." if len(found) > 3 else "")
        raise UsageError(f"{model} holds {len(found)} GGUF files ({names})", "give the path of one of them")
    return found[0] if found else None


def ggufs_in(directory: Path) -> list[Path]:
    """The GGUF models of a folder that is no model directory of MLX: of the parts of one model the first, projectors of
    images only if there is nothing else. By their names, or by their first bytes if no name tells."""
    if not os.path.isdir(directory) or any(directory.glob("*.safetensors*")):
        return []
    files = [file for file in sorted(directory.iterdir()) if file.is_file() and not file.name.startswith(".")]
    found = [file for file in files if file.suffix.lower() == ".gguf"] or [file for file in files if is_gguf(file)]
    found = [file for file in found if not file.name.startswith("mmproj")] or found
    return [file for file in found if not re.search(r"-(?!00001)\d{5}-of-\d{5}\.gguf$", file.name)] or found


def _slug(file: Path) -> str:
    """The name of a file as one that every program takes: it only helps people to find their way in the cache."""
    return re.sub(r"[^\w.]+", "-", file.stem, flags=re.ASCII).strip("-.")[:50] or "model"


# ---- known again ----


def content_of(parts: Mapping[Path, Header]) -> str:
    """sha256 of all bytes of a model, in hexadecimal, whatever its files are called."""
    digest, size = hashlib.sha256(), sum(header.file_bytes for header in parts.values())
    with console.progress("hash the GGUF file: MiB", size >> 20) as bar:
        for path, header in parts.items():
            digest.update(f"{header.file_bytes} ".encode())
            with path.open("rb") as file:
                while piece := file.read(8 << 20):
                    digest.update(piece)
                    bar.advance(len(piece) >> 20)
    return digest.hexdigest()


def identity(parts: Mapping[Path, Header], content: str | None = None) -> str:
    """What tells the files of a model apart, in hexadecimal: their names, and all of their bytes (``content``)."""
    names = b"\0".join(os.fsencode(path.name) for path in parts)
    return hashlib.sha256(f"{VERSION} {content or content_of(parts)} ".encode() + names).hexdigest()


def glimpse(parts: Mapping[Path, Header]) -> str:
    """What cannot stay the same when somebody writes to the files, at the price of some reads: size, inode and dates
    (that of the last change of the inode cannot be set), the headers, and pieces of every tensor."""
    digest = hashlib.sha256(f"{VERSION}".encode())
    for path, header in parts.items():
        found = path.stat()
        digest.update(f"\0{found.st_size} {found.st_ino} {found.st_mtime_ns} {found.st_ctime_ns}\0".encode())
        with path.open("rb") as file:
            handle, left = file.fileno(), header.data_start
            while left and (piece := file.read(min(left, 1 << 20))):
                digest.update(piece)
                left -= len(piece)
            for tensor in header.tensors.values():
                start, rest = header.data_start + tensor.offset, max(0, tensor.nbytes - PIECE)
                for place in (0, rest // 2, rest):
                    digest.update(os.pread(handle, min(PIECE, tensor.nbytes), start + place))
    return digest.hexdigest()


def remembered(parts: Mapping[Path, Header], seen: str) -> str:
    """``content_of`` the files; if they look as they did when it was computed (``seen``: a glimpse), without reading
    them again."""
    first = next(iter(parts)).resolve()
    note = cache() / f"{_slug(first)}-{hashlib.sha256(os.fsencode(first)).hexdigest()[:16]}.hash"
    with suppress(PareError, OSError, ValueError, AttributeError):
        known = json.loads(untrusted.contents(note))
        if known.get("glimpse") == seen and re.fullmatch("[0-9a-f]{64}", str(known.get("content"))):
            return known["content"]
    content = content_of(parts)
    changed = max(max(found.st_mtime_ns, found.st_ctime_ns) for found in (path.stat() for path in parts))
    if time.time_ns() - changed > AT_REST_S * 10**9 and glimpse(parts) == seen:
        from ..store.atomic import replace_file

        with suppress(OSError):  # it is only slower without
            note.parent.mkdir(parents=True, exist_ok=True)
            replace_file(note, json.dumps({"glimpse": seen, "content": content}).encode())
    return content


# ---- in the cache ----


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Alone with a file of the cache. Nothing is written to it, and a link at its name is not followed."""
    handle = _lock(path)
    try:
        yield
    finally:
        os.close(handle)


def _lock(path: Path) -> int:
    while True:
        try:
            handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, 0o644)
        except OSError as error:
            if error.errno in NO_FILE:
                raise PareError(f"{path} is no file of mlx-pare", "remove it: the cache needs the name") from error
            raise
        try:
            fcntl.flock(handle, fcntl.LOCK_EX)
        except OSError as error:
            if error.errno not in NO_LOCKS:
                os.close(handle)
                raise
        with suppress(OSError):
            if os.path.samestat(os.fstat(handle), os.lstat(path)):
                return handle
        os.close(handle)  # a cleaner removed the file meanwhile: others lock a new one


def whole(directory: Path) -> bool:
    """Whether a rebuilt model has every file as it was written: the list is there, and what it says is true."""
    from ..store.rundir import fingerprint

    try:
        files = json.loads(untrusted.contents(directory / LIST))["files"]
        return bool(files) and all(fingerprint(directory / name) == known for name, known in files.items())
    except (PareError, OSError, ValueError, LookupError, TypeError, AttributeError):
        return False


def _list_files(directory: Path) -> None:
    from ..store.atomic import replace_file
    from ..store.rundir import fingerprint
    from ..store.schema import dump_json

    files = {file.name: fingerprint(file) for file in sorted(directory.iterdir()) if file.is_file()}
    replace_file(directory / LIST, dump_json({"files": files}))


def _rebuild(file: Path, out: Path, content: str) -> None:
    from ..gguf.read.rebuild import rebuild

    why = "its files in the cache are not whole: it" if out.exists() else f"{file}"
    _remove(out)
    console.say(f"{why} is rebuilt as an MLX model, once; it stays in {out.parent} ({VARIABLE} names another place)")
    told(rebuild(file, out, origin=content))


def _remove(out: Path) -> None:
    from ..store.atomic import remove

    if out.is_symlink() or out.is_file():
        out.unlink()
    remove(out)


def require(model: Path, run: Path) -> None:
    """Raises PareError if the model of a run is gone, or lies in the cache and is not whole, with the command that
    brings it back."""
    again = (
        f"`mlx-pare run FILE.gguf --out {run}` or `mlx-pare calibrate FILE.gguf --out {run}`, with the options of "
        "before, rebuilds it"
    )
    if not model.is_dir() and (found := of_snapshot(model)):
        name = f"{found.repo}@{found.revision}"
        again = f"`mlx-pare run {name} --out {run}` or `mlx-pare calibrate {name} --out {run}`"
        raise PareError(
            f"the model of {run} is gone: {model} is not in the cache any more",
            f"{again}, with the options of before, downloads it again",
        )
    if not model.is_dir():
        raise PareError(
            f"the model of {run} is gone: there is no model directory at {model}",
            f"if it was rebuilt from a GGUF file, {again}; if it was moved, give its new path in place of FILE.gguf",
        )
    rebuilt = (model / LIST).exists() or (
        model.parent.resolve() == cache().resolve() and re.search("-[0-9a-f]{16}$", model.name)
    )
    if rebuilt and not whole(model):
        raise PareError(f"{model}, which was rebuilt from a GGUF file, lacks files or has others", again)


def told(found: dict) -> None:
    """What rebuilding a file rounded, and what is to be known of it, on the console."""
    for kind, error in found["rounded"].items():
        console.say(
            f"{kind}: {error['tensors']} tensors as {error['stored']}, relative error {error['relative_error']:.2g} "
            f"(at most {error['worst']:.2g})"
        )
    for note in found["notes"]:
        console.say(f"note: {note}")
