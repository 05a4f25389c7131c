"""How many threads OpenBLAS uses on Linux: one for a small model.

A thread of OpenBLAS that has nothing to do spins for a while before it sleeps. Products of a small model are over
sooner, so that the second thread of two spends more processor time on waiting than on work: `make demo` took 323
seconds of processor time with two threads and 188 with one, in the same time by the clock.
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
    """One thread for a model of this hidden size, if it is small. Whoever set OPENBLAS_NUM_THREADS has decided."""
    if sys.platform != "linux" or VARIABLE in os.environ or not isinstance(hidden, int) or hidden >= LARGE:
        return
    os.environ[VARIABLE] = "1"  # for a library that is loaded later
    for path in loaded():
        library = ctypes.CDLL(path)
        for name in SETTERS:
            if hasattr(library, name):
                getattr(library, name)(1)


def loaded() -> list[str]:
    """The OpenBLAS libraries in this process."""
    files = {line.partition("/")[2] for line in Path("/proc/self/maps").read_text().splitlines()}
    return sorted(f"/{file}" for file in files if "openblas" in file.rpartition("/")[2])
