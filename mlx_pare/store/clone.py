"""Clones of files: copies that share their blocks on the disk with the original until one of both is changed."""

from __future__ import annotations

import ctypes
import fcntl
import os
import sys
from contextlib import suppress
from pathlib import Path

FICLONE = 0x40049409  # linux/fs.h: btrfs, XFS, bcachefs and some others


def clone(file: Path, to: Path) -> bool:
    """Make the new file ``to`` a clone of ``file``. False if the file system has no clones: then nothing is there."""
    if sys.platform == "darwin":
        return _clone_on_macos(file, to)
    with file.open("rb") as source, to.open("xb") as target, suppress(OSError):
        fcntl.ioctl(target.fileno(), FICLONE, source.fileno())
        return True
    to.unlink()
    return False


def _clone_on_macos(file: Path, to: Path) -> bool:
    """clonefile(2) of APFS. It takes over the rights as well: the clone is to be written to by its owner."""
    library = ctypes.CDLL(None, use_errno=True)
    if library.clonefile(os.fsencode(file.resolve()), os.fsencode(to), 0):
        return False
    to.chmod(to.stat().st_mode | 0o600)
    return True
