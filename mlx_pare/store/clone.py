"""Clones of files: copies that share their disk blocks with the original until either of them is changed."""

from __future__ import annotations

import ctypes
import fcntl
import os
import sys
from contextlib import suppress
from pathlib import Path

FICLONE = 0x40049409  # linux/fs.h: btrfs, XFS, bcachefs and some others


def clone(file: Path, to: Path) -> bool:
    """Make the new file ``to`` a clone of ``file``. False: the file system has no clones, and ``to`` does not exist."""
    if sys.platform == "darwin":
        return _clone_on_macos(file, to)
    with file.open("rb") as source, to.open("xb") as target, suppress(OSError):
        fcntl.ioctl(target.fileno(), FICLONE, source.fileno())
        return True
    to.unlink()
    return False


def _clone_on_macos(file: Path, to: Path) -> bool:
    """Call clonefile(2) of APFS. It copies the permissions as well, so the owner is allowed to write to the clone."""
    library = ctypes.CDLL(None, use_errno=True)
    if library.clonefile(os.fsencode(file.resolve()), os.fsencode(to), 0):
        return False
    to.chmod(to.stat().st_mode | 0o600)
    return True
