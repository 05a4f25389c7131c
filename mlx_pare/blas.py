"""OpenBLAS on Linux: MLX's CPU backend gets the one of the system, and a small model gets one thread of it.

MLX for Linux brings a BLAS of its own that is 15 times slower. Its symbols are looked up first among the libraries that
are global in the process. So an OpenBLAS that is global before MLX is imported takes their place, as with LD_PRELOAD.

A thread of OpenBLAS that has nothing to do spins for a while before it sleeps. Products of a small model are over
sooner, so that the second thread of two spends more processor time on waiting than on work: `make demo` took 323
seconds of processor time with two threads and 188 with one, in the same time by the clock.
"""

from __future__ import annotations

import os
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

LARGE = 1024  # hidden size from which products are shared among threads
VARIABLE = "OPENBLAS_NUM_THREADS"
# numpy and scipy bring builds whose names have a prefix and a suffix
SETTERS = [f"{prefix}openblas_set_num_threads{suffix}" for prefix in ("", "scipy_") for suffix in ("", "64_")]


LIBRARY = "libopenblas.so.0"


class _BeforeMlx:
    """Among the finders of modules: the first import of MLX loads OpenBLAS before. It finds nothing itself."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> None:
        if name == "mlx.core":
            sys.meta_path.remove(self)
            import ctypes

            with suppress(OSError):  # there is none
                ctypes.CDLL(LIBRARY, mode=ctypes.RTLD_GLOBAL)


def before_mlx() -> None:
    """From here on the first import of MLX loads the OpenBLAS of the system, if there is one."""
    if sys.platform == "linux" and "mlx.core" not in sys.modules:
        sys.meta_path.insert(0, _BeforeMlx())


def fit(hidden: object) -> None:
    """One thread for a model of this hidden size, if it is small. Whoever set OPENBLAS_NUM_THREADS has decided."""
    if sys.platform != "linux" or VARIABLE in os.environ or not isinstance(hidden, int) or hidden >= LARGE:
        return
    import ctypes

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
