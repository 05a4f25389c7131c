"""Open MODEL as the user gives it: a model directory stays as it is, a GGUF file is rebuilt once into a cache.

The cache is MLX_PARE_CACHE, or the system's usual place. Everything in it may be deleted at any time, also single
files: the same GGUF file is rebuilt to the same bytes on the same device, so a run can continue.

The first four bytes identify a GGUF file as such, and the hash of all its bytes tells it from others. Hashing takes
about half a second per gigabyte. So the hash is kept with a cheap check for changes: size, dates and inode of the file,
its header, and some bytes of every tensor.
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
from ..base.plain_path import is_litter
from ..gguf.header import Header, is_gguf, read_parts
from ..model.hub_name import of_snapshot
from . import resolve

VARIABLE = "MLX_PARE_CACHE"
VERSION = 2  # of rebuilt models: if it changes, they are rebuilt
LIST = "rebuilt.json"  # the files of a rebuilt model, written last
PIECE = 1 << 12  # bytes read at the beginning, in the middle and at the end of every tensor
AT_REST_S = 3  # seconds; a file that changed more recently may change again without a new date
NO_FILE = {errno.ELOOP, errno.EMLINK, errno.EISDIR, errno.ENXIO}  # errors of a link, a directory, a socket
NO_LOCKS = {errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOLCK, errno.ENOSYS}  # errors of a network disk

StrPath = str | os.PathLike[str]  # what the Python API takes for a path


def cache() -> Path:
    """Return the directory of rebuilt models."""
    if named := os.environ.get(VARIABLE):
        return Path(named).expanduser()
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches" / "mlx-pare"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "mlx-pare"


def opened(model: StrPath, run: Path | None = None) -> Path:
    """Return the model directory of MODEL.

    A GGUF file is rebuilt unless the cache has it whole. A model on the hub or of the catalogue is downloaded first
    (sources/resolve.py, which also explains ``run``). Raises PareError if a file cannot be rebuilt or a model cannot be
    downloaded, UsageError if a folder holds several GGUF models or a name is unknown.
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
    with _locked(out.with_name(f"{out.name}.lock")):  # another process may be rebuilding it
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
    """Return the GGUF file that MODEL is, or that a folder without another model holds; None if there is none.

    Raises UsageError if a folder holds several.
    """
    if os.path.isfile(model):  # pathlib raises for a name that is too long
        return model if is_gguf(model) else None
    found = ggufs_in(model)
    if len(found) > 1:
        names = ", ".join(file.name for file in found[:3]) + (", ..." if len(found) > 3 else "")
        raise UsageError(f"{model} holds {len(found)} GGUF files ({names})", "give the path of one of them")
    return found[0] if found else None


def ggufs_in(directory: Path) -> list[Path]:
    """List the GGUF models of a folder that is no model directory of MLX, by the first part of each.

    Image projectors are listed only if there is nothing else. Files are found by suffix; if none has it, by their first
    bytes.
    """
    if not os.path.isdir(directory) or any(directory.glob("*.safetensors*")):
        return []
    files = [file for file in sorted(directory.iterdir()) if file.is_file() and not file.name.startswith(".")]
    found = [file for file in files if file.suffix.lower() == ".gguf"] or [file for file in files if is_gguf(file)]
    found = [file for file in found if not file.name.startswith("mmproj")] or found
    return [file for file in found if not re.search(r"-(?!00001)\d{5}-of-\d{5}\.gguf$", file.name)] or found


def _slug(file: Path) -> str:
    """Return a file's name as one that every program accepts. It only helps people to find it in the cache."""
    return re.sub(r"[^\w.]+", "-", file.stem, flags=re.ASCII).strip("-.")[:50] or "model"


# ---- known again ----


def content_of(parts: Mapping[Path, Header]) -> str:
    """Return the sha256 of all bytes of a model, in hexadecimal; names of files do not count."""
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
    """Return a hash, in hexadecimal, of the names of a model's files and of all their bytes (``content``)."""
    names = b"\0".join(os.fsencode(path.name) for path in parts)
    return hashlib.sha256(f"{VERSION} {content or content_of(parts)} ".encode() + names).hexdigest()


def glimpse(parts: Mapping[Path, Header]) -> str:
    """Return a hash, in hexadecimal, that changes if somebody writes to the files, with few reads.

    It covers size, inode and dates (the date of the inode's last change cannot be set), headers, and pieces of every
    tensor.
    """
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
    """Return ``content_of`` the files, from the cache if they have not changed since (``seen``: their glimpse)."""
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

        with suppress(OSError):  # without it the next call is only slower
            note.parent.mkdir(parents=True, exist_ok=True)
            replace_file(note, json.dumps({"glimpse": seen, "content": content}).encode())
    return content


# ---- in the cache ----


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold the lock on a file of the cache. Nothing is written to it, and a link at its name is not followed."""
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
        os.close(handle)  # the file was removed meanwhile: others lock a new one


def whole(directory: Path) -> bool:
    """Tell whether a rebuilt model has its list, and every file in it as it was written."""
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

    found = [file for file in sorted(directory.iterdir()) if file.is_file() and not is_litter(file)]
    files = {file.name: fingerprint(file) for file in found}
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
    """Raises PareError if the model of a run is gone, or is in the cache but not whole.

    The message has the command that brings it back.
    """
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
    """Print what rebuilding a file rounded, and its notes."""
    for kind, error in found["rounded"].items():
        console.say(
            f"{kind}: {error['tensors']} tensors as {error['stored']}, relative error {error['relative_error']:.2g} "
            f"(at most {error['worst']:.2g})"
        )
    for note in found["notes"]:
        console.say(f"note: {note}")
