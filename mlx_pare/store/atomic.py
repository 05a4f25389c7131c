"""Files and directories that get their name only when they are whole. mlx-pare writes everything this way.

``created`` writes a new file or directory in a private directory next to its place and renames it at the end. The
rename never replaces anything, even if two calls race for one name.
``replaced`` writes a file of ours again, such as manifest.json: its name holds the old bytes or the new ones.

Temporary names hold random digits, so nobody can put a link or a file there in advance, and end in a mark. Whatever
fails is cleaned up, Ctrl-C included. The mark and the lock, which ends with its process, show what a killed process
left: the next call for the same name removes it.
"""

from __future__ import annotations

import errno
import hashlib
import os
import re
import secrets
import shutil
import signal
import stat
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from ..base import console, machine
from ..base.errors import PareError, Refused
from ..base.plain_path import is_litter
from ..base.units import gb
from . import locks

PART, TEMPORARY = ".mlx-pare.part", ".mlx-pare.tmp"  # a private directory; a file, which may have a suffix after it
OURS = re.compile(r"\..*\.[0-9a-f]{16,24}\.mlx-pare\.(part|tmp(\.\w+)?)", re.DOTALL)
SHOWN = 50  # characters of the final name in a temporary one: names have at most 255 bytes
PATIENCE_S = 2.0  # for the lock on a directory, which others hold for milliseconds
HAS_NO_SUCH_RENAME = {errno.EINVAL, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EPERM}


def refuse_existing(out: Path) -> None:
    """Raises Refused if something has this name, a link that leads nowhere included."""
    if os.path.lexists(out):
        raise Refused(f"{out} exists already", "choose another name, or move it away")


def require_room(out: Path, size: int, besides: str = "") -> None:
    """Check that there is room for a file or directory.

    Args:
        out: its path, of which the last parts may not exist yet.
        size: bytes that it needs.
        besides: what else needs some of these bytes, for the message.
    Raises:
        PareError: the disk that is to hold ``out`` has fewer bytes free.
    """
    free = shutil.disk_usage(next(place for place in out.absolute().parents if place.exists())).free
    if size > free:
        raise PareError(
            f"{out}{besides} needs {gb(size)}, {out.parent} has {gb(free)} free",
            "make room on the disk",
        )


@contextmanager
def created(out: Path) -> Iterator[Path]:
    """Make a new file or directory. The block writes to the path that it gets, which does not exist yet.

    That path ends in the same name. When the block is done, everything is flushed to the disk and becomes ``out``.
    Errors that name the temporary path name ``out`` instead. Raises Refused if ``out`` exists, before the block or
    after it, or if another process is writing it.
    """
    refuse_existing(out)
    with _directory(out.parent), _private(out) as place:
        new = place / out.name
        try:
            yield new
            _flush(new)
            with undisturbed():
                _rename_to_new(new, out)
        except (PareError, OSError) as error:
            _name(error, new, out)
            _name(error, place, out.parent)
            raise


def create_file(path: Path, data: bytes) -> Path:
    """Write a new file with these bytes and return ``path``. Raises as ``created``."""
    with created(path) as new:
        new.write_bytes(data)
    return path


@contextmanager
def replaced(path: Path, suffix: str = "") -> Iterator[Path]:
    """Write a file again. The block writes to the path that it gets, an empty file that ends in ``suffix``.

    ``path`` holds the old bytes or the new ones, never half of them. A failure leaves nothing behind, because a full
    disk needs the room.
    """
    place = path.with_name(f".{path.name[:SHOWN]}.{secrets.token_hex(8)}{TEMPORARY}{suffix}")
    try:
        os.close(os.open(place, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666))
        yield place
        _flush(place)
        os.replace(place, path)
    except BaseException as error:
        with undisturbed(), suppress(OSError):
            place.unlink(missing_ok=True)
        if isinstance(error, OSError):
            error.filename = error.filename or str(place)  # a write that fails does not name its file
        if isinstance(error, PareError | OSError):
            _name(error, place, path)
        raise


def replace_file(path: Path, data: bytes) -> None:
    """Write all bytes of a file again: it holds the new ones or the old ones."""
    with replaced(path) as place:
        place.write_bytes(data)


def remove(directory: Path) -> None:
    """Delete a directory that a later call would continue from. A kill halfway leaves nothing under its name."""
    if directory.exists():
        with _private(directory) as place:
            os.rename(directory, place / directory.name)


@contextmanager
def scratch(directory: Path, name: str) -> Iterator[Path]:
    """Make a private directory in ``directory`` while the block runs; ``name`` says what it is for."""
    with _private(directory / name) as place:
        yield place


@contextmanager
def working(directory: Path) -> Iterator[Path]:
    """Work in a directory that a later call continues from after a kill: a new one, or one with our note in it.

    It is removed at the end if only the note is in it. Raises Refused for any other directory that is not empty."""
    note = directory / ".mlx-pare"
    if directory.exists() and not note.exists() and any(not is_litter(file) for file in directory.iterdir()):
        raise Refused(f"{directory} exists already, and mlx-pare did not make it", "move it away")
    directory.mkdir(parents=True, exist_ok=True)
    note.touch()
    try:
        yield directory
    finally:
        if directory.exists() and all(file == note or is_litter(file) for file in directory.iterdir()):
            for file in directory.iterdir():
                file.unlink()
            directory.rmdir()


def is_ours(name: str) -> bool:
    """Whether a file name is one of our temporary ones."""
    return bool(OURS.fullmatch(name))


def sweep(directory: Path, deep: bool = False) -> None:
    """Remove what killed processes left in ``directory``, and with ``deep`` also below it.

    Only for a directory that no other process writes to: a temporary file has no lock."""
    for place in list(directory.rglob("*") if deep else directory.iterdir()):
        if is_ours(place.name):
            _remove_dead(place)


@contextmanager
def undisturbed() -> Iterator[None]:
    """Delay signals that would interrupt the block until it ends. Only the main thread gets signals."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    arrived: list[int] = []
    stopping = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    before = {number: handler for number in stopping if (handler := signal.getsignal(number)) is not None}
    try:
        for number in before:
            signal.signal(number, lambda sent, _: arrived.append(sent))
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        for number in dict.fromkeys(arrived):
            os.kill(os.getpid(), number)


# ---- the private directory ----

_held: set[Path] = set()  # private directories of this process, which it has locked


@contextmanager
def _private(out: Path) -> Iterator[Path]:
    """A new directory next to ``out`` that only this user can enter; it is locked, and removed at the end."""
    place = lock = None
    try:
        with undisturbed(), _alone(out.parent):
            _remove_dead_of(out)
            place = out.with_name(f"{_beginning(out)}{secrets.token_hex(8)}{PART}")
            _make(place, out)
            lock = os.open(place, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
            locks.acquire(lock)
            _held.add(place)
        yield place
    finally:
        with undisturbed():
            _held.discard(place)
            try:
                if place is not None:
                    shutil.rmtree(place, ignore_errors=True)
            finally:  # if the removal is interrupted, the rest has no lock, and the next call removes it
                if lock is not None:
                    os.close(lock)


def _make(place: Path, out: Path) -> None:
    try:
        place.mkdir(mode=0o700)
    except OSError as error:  # users know ``out``
        error.filename = str(out)
        raise


@contextmanager
def _directory(path: Path) -> Iterator[None]:
    """Make a directory and those above it. If the block fails, the new ones are removed again."""
    new = [place for place in (path, *path.parents) if not place.exists()]
    path.mkdir(parents=True, exist_ok=True)
    try:
        yield
    except BaseException:
        with suppress(OSError):  # something else may be there by now
            for place in new:
                place.rmdir()
        raise


def _beginning(out: Path) -> str:
    """How the private directories for this name begin: the name as far as it fits, and a hash of all of it."""
    return f".{out.name[:SHOWN]}.{hashlib.sha256(os.fsencode(out.name)).hexdigest()[:8]}"


@contextmanager
def _alone(parent: Path) -> Iterator[None]:
    """Keep other mlx-pare processes from making or removing a private directory in ``parent``, if there are locks.

    This is needed because a new directory is not locked at once. After PATIENCE_S the block runs without the lock. In a
    private directory of this process there are no others."""
    if parent in _held:
        yield
        return
    try:
        handle = os.open(parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError:  # a directory that may be written to but not read
        yield
        return
    try:
        given_up = time.monotonic() + PATIENCE_S
        while locks.acquire(handle) is False and time.monotonic() < given_up:
            time.sleep(0.01)
        yield
    finally:
        os.close(handle)


def _remove_dead_of(out: Path) -> None:
    """Remove what killed calls for this name left. Raises Refused if one of them is alive."""
    with suppress(OSError):
        for place in [Path(entry.path) for entry in os.scandir(out.parent) if entry.name.startswith(_beginning(out))]:
            if is_ours(place.name) and _remove_dead(place) is False:
                raise Refused(f"another mlx-pare is writing {out}", "wait for it, or choose another name")


def _remove_dead(place: Path) -> bool | None:
    """Remove a leftover. False: its process is alive. None: nobody can tell, or it belongs to somebody else."""
    with suppress(OSError):
        found = place.lstat()
        if found.st_uid != os.geteuid():
            return None
        if stat.S_ISREG(found.st_mode) and not place.name.endswith(PART):
            place.unlink()
            return True
        if not (stat.S_ISDIR(found.st_mode) and place.name.endswith(PART)):
            return None
        handle = os.open(place, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
        try:
            if dead := locks.acquire(handle):
                shutil.rmtree(place, ignore_errors=True)
            elif dead is None:
                console.warn(f"{place} may be left by a call that was killed: delete it if no mlx-pare works there")
            return dead
        finally:
            os.close(handle)
    return None


# ---- the end ----


def _flush(path: Path) -> None:
    """Flush a file, or everything in a directory, to the disk."""
    for file in path.rglob("*") if path.is_dir() else [path]:
        if file.is_symlink() or not file.is_file():
            continue
        handle = os.open(file, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
        try:
            machine.to_disk(handle)
        finally:
            os.close(handle)


def _rename_to_new(source: Path, target: Path) -> None:
    """Rename. Raises Refused if ``target`` exists."""
    sys.audit("os.rename", str(source), str(target), -1, -1)  # as os.rename does for audit hooks
    try:
        if not _exclusive_rename(source, target):
            _rename_over_own(source, target)
    except OSError as error:
        if error.errno in (errno.EEXIST, errno.ENOTEMPTY):
            raise Refused(f"{target} exists already: it was made while this was written", "move it away") from error
        raise


def _rename_over_own(source: Path, target: Path) -> None:
    """Rename in two steps: making the target fails if it exists; the rename then replaces our own, empty one."""
    directory = source.is_dir()
    if directory:
        target.mkdir()
    else:
        os.close(os.open(target, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666))
    try:
        os.rename(source, target)
    except OSError:
        with suppress(OSError):
            target.rmdir() if directory else target.unlink()
        raise


def _exclusive_rename(source: Path, target: Path) -> bool:
    """Rename in one step that fails with FileExistsError. False: the system or the file system has no such rename."""
    import ctypes

    library = ctypes.CDLL(None, use_errno=True)
    paths = os.fsencode(source), os.fsencode(target)
    if hasattr(library, "renamex_np"):  # macOS: RENAME_EXCL
        failed = library.renamex_np(*paths, 4)
    elif hasattr(library, "renameat2"):  # Linux: AT_FDCWD, RENAME_NOREPLACE
        failed = library.renameat2(-100, paths[0], -100, paths[1], 1)
    else:
        return False
    number = ctypes.get_errno()
    if failed and number not in HAS_NO_SUCH_RENAME:
        raise OSError(number, os.strerror(number), str(source), None, str(target))
    return not failed


def _name(error: PareError | OSError, place: Path, out: Path) -> None:
    """Replace the temporary name in an error by the name that users know."""
    if isinstance(error, OSError):
        for attribute in ("filename", "filename2"):
            if isinstance(found := getattr(error, attribute), str | os.PathLike):
                setattr(error, attribute, os.fspath(found).replace(str(place), str(out)))
        return
    error.problem = error.problem.replace(str(place), str(out))
    error.cure = error.cure and error.cure.replace(str(place), str(out))
    error.args = (error.problem,)
