"""This computer: chip, memory, what the GPU may use, versions. What cannot be known is None."""

from __future__ import annotations

import os
import platform
import re
import resource
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path


@dataclass(frozen=True)
class Machine:
    """The known facts about a computer. Sizes are in bytes."""

    system: str
    chip: str | None  # "Apple M4 Pro" on a Mac
    memory_bytes: int
    gpu_cores: int | None
    wired_limit_bytes: int | None  # iogpu.wired_limit_mb if the user has set it
    rosetta: bool
    working_set_bytes: int | None = None  # Metal's recommendedMaxWorkingSetSize

    def as_dict(self) -> dict:
        return asdict(self)


def sysctl(name: str) -> str | None:
    """A value of macOS by its name; None on other systems, and if macOS has no such name."""
    if sys.platform != "darwin":
        return None
    done = subprocess.run(["/usr/sbin/sysctl", "-n", name], capture_output=True, text=True, check=False)
    return done.stdout.strip() or None


def this_machine() -> Machine:
    """The computer that this process runs on."""
    import psutil

    limit = sysctl("iogpu.wired_limit_mb")
    return Machine(
        system=f"{platform.system()} {platform.release()} {platform.machine()}",
        chip=sysctl("machdep.cpu.brand_string"),
        memory_bytes=psutil.virtual_memory().total,
        gpu_cores=_gpu_cores(),
        wired_limit_bytes=int(limit) << 20 if limit and int(limit) > 0 else None,
        rosetta=sysctl("sysctl.proc_translated") == "1",
        working_set_bytes=_working_set(),
    )


def _working_set() -> int | None:
    """The GPU's working set in bytes, as MLX reads it from Metal; None on other systems, which do not import MLX for
    it."""
    if sys.platform != "darwin":
        return None
    import mlx.core as mx

    return mx.device_info().get("max_recommended_working_set_size")


def _gpu_cores() -> int | None:
    if sys.platform != "darwin":
        return None
    done = subprocess.run(
        ["/usr/sbin/ioreg", "-rc", "AGXAccelerator", "-d1"], capture_output=True, text=True, check=False
    )
    found = re.search(r'"gpu-core-count"\s*=\s*(\d+)', done.stdout)
    return int(found[1]) if found else None


def available_bytes() -> int:
    """Bytes that can be taken without pushing anything out of memory; on a Mac at most what its GPU may keep."""
    import psutil

    free, most = psutil.virtual_memory().available, _working_set()
    return free if most is None else min(free, most)


def reset_peaks() -> None:
    """Count peaks from now on: MLX's peak, and on Linux the resident one (Documentation/filesystems/proc.rst)."""
    if mlx := sys.modules.get("mlx.core"):
        mlx.reset_peak_memory()
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def peak_rss_bytes() -> int:
    """The largest resident size of this process in bytes since ``reset_peaks``; on a Mac since its start."""
    with suppress(OSError, StopIteration):
        lines = Path("/proc/self/status").read_text().splitlines()
        return int(next(line for line in lines if line.startswith("VmHWM:")).split()[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def peak_gpu_bytes() -> int | None:
    """The most bytes that MLX has allocated since ``reset_peaks``; None before MLX is used.

    On a Mac these bytes are not part of the resident size.
    """
    mlx = sys.modules.get("mlx.core")
    return mlx.get_peak_memory() if mlx else None


def swap_bytes() -> int:
    """Bytes of swap in use on this computer, by all processes."""
    import psutil

    return psutil.swap_memory().used


@contextmanager
def awake() -> Iterator[None]:
    """Keep an idle Mac from falling asleep during the block (`caffeinate -i`, which ends with this process in any
    case).

    Other systems are left alone. This has never run on a Mac.
    """
    caffeinate = shutil.which("caffeinate") if sys.platform == "darwin" else None
    if caffeinate is None:
        yield
        return
    quiet = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.DEVNULL)
    # a new session: Ctrl-C reaches only this process, which then ends caffeinate
    holder = subprocess.Popen([caffeinate, "-i", "-w", str(os.getpid())], **quiet, start_new_session=True)
    try:
        yield
    finally:
        holder.terminate()
        holder.wait()


def versions() -> dict[str, str]:
    """The versions of Python and of the packages that a result depends on."""
    found = {"python": platform.python_version()}
    for package in ("mlx-pare", "mlx", "mlx-lm", "numpy", "gguf", "transformers", "llama-cpp-python"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    return found
