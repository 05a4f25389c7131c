"""Locks that end with the process. Some file systems (SMB, some NFS) have none, which is not somebody else's lock."""

from __future__ import annotations

import fcntl


def acquire(handle: int, shared: bool = False) -> bool | None:
    """Lock an open file or directory without waiting.

    Args:
        handle: file descriptor. The lock ends when it is closed, or when the process ends in any way.
        shared: several processes may have such a lock at once.
    Returns:
        True: locked. False: another process has a lock. None: the file system has no locks, so nobody can tell.
    """
    try:
        fcntl.flock(handle, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
    except BlockingIOError:  # EWOULDBLOCK
        return False
    except OSError:  # ENOTSUP, ENOLCK; EBADF for a directory on NFS
        return None
    return True
