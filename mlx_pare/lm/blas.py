"""Limit OpenBLAS on Linux to one thread for a small model.

An idle thread of OpenBLAS spins for a while before it sleeps. Products of a small model end sooner than that, so the
second of two threads spends more processor time on waiting than on work. `make demo` took 323 seconds of processor time
with two threads and 188 with one, at the same wall-clock time.
"""

from __future__ import annotations

import ctypes
import os
import sys
from pathlib import Path

LARGE = 1024  # hidden size from which products are shared among threads
VARIABLE = "OPENBLAS_NUM_THREADS"
# numpy and scipy bring builds whose names have a prefix and a suffix
SETTERS = [f"{prefix}openblas_set_num_threads{suffix}" for prefix in ("", "scipy_") for suffix in ("", "64_")]


def fit(hidden: object) -> None:
    """Use one thread if the hidden size is small. If OPENBLAS_NUM_THREADS is set, nothing changes."""
    if sys.platform != "linux" or VARIABLE in os.environ or not isinstance(hidden, int) or hidden >= LARGE:
        return
    os.environ[VARIABLE] = "1"  # for a library that is loaded later
    for path in loaded():
        library = ctypes.CDLL(path)
        for name in SETTERS:
            if hasattr(library, name):
                getattr(library, name)(1)


def loaded() -> list[str]:
    """List the OpenBLAS libraries in this process."""
    files = {line.partition("/")[2] for line in Path("/proc/self/maps").read_text().splitlines()}
    return sorted(f"/{file}" for file in files if "openblas" in file.rpartition("/")[2])
