"""This computer: chip, memory, what the GPU may use, versions. What cannot be known is None."""

from __future__ import annotations

import fcntl
import os
import platform
import re
import resource
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from . import console

Computed = Mapping[str, str | None]  # what computes_on returns


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
    limit = sysctl("iogpu.wired_limit_mb")
    return Machine(
        system=f"{platform.system()} {platform.release()} {platform.machine()}",
        chip=sysctl("machdep.cpu.brand_string"),
        memory_bytes=memory_bytes(),
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


def memory_bytes() -> int:
    """Bytes of memory in this computer."""
    import psutil

    return psutil.virtual_memory().total


def available_bytes() -> int:
    """Bytes that can be taken without pushing anything out of memory; on a Mac at most what its GPU may keep."""
    import psutil

    free, most = psutil.virtual_memory().available, _working_set()
    if sys.platform == "darwin":
        done = subprocess.run(["/usr/bin/vm_stat"], capture_output=True, text=True, check=False)
        free = max(free, _droppable(done.stdout))
    return free if most is None else min(free, most)


def _droppable(vm_stat: str) -> int:
    """Bytes that macOS can give away at once, from the output of vm_stat: free pages and those that it can read again.

    psutil leaves out most of the cache of files: after reading a large checkpoint, a Mac would look full.
    """
    size = re.search(r"page size of (\d+) bytes", vm_stat)
    kinds = r"^(?:Pages free|Pages speculative|Pages purgeable|File-backed pages):\s+(\d+)\."
    return int(size[1]) * sum(map(int, re.findall(kinds, vm_stat, re.MULTILINE))) if size else 0


def reset_peaks() -> None:
    """Count peaks from now on: MLX's peak, and that of the process (Documentation/filesystems/proc.rst on Linux)."""
    if mlx := sys.modules.get("mlx.core"):
        mlx.reset_peak_memory()
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")
    with suppress(OSError, AttributeError):
        _libproc().proc_reset_footprint_interval(os.getpid())


def _libproc() -> Any:
    """The library of macOS that knows processes. Raises OSError elsewhere."""
    import ctypes

    return ctypes.CDLL("/usr/lib/libproc.dylib")


def _usage() -> Any:
    """An empty struct rusage_info_v4 of macOS (bsd/sys/resource.h): a UUID and 35 numbers, of which two are read."""
    import ctypes

    class Usage(ctypes.Structure):
        _fields_ = (
            ("uuid", ctypes.c_uint8 * 16),
            ("first", ctypes.c_uint64 * 7),
            ("footprint", ctypes.c_uint64),  # ri_phys_footprint
            ("middle", ctypes.c_uint64 * 25),
            ("peak_footprint", ctypes.c_uint64),  # ri_interval_max_phys_footprint
            ("last", ctypes.c_uint64),
        )

    return Usage()


def _peak_footprint() -> int:
    """The largest footprint since ``reset_peaks``: what Activity Monitor shows, with the buffers of the GPU and with
    compressed pages. Raises OSError or AttributeError if this system does not tell. It has never run on a Mac."""
    import ctypes

    found = _usage()
    if _libproc().proc_pid_rusage(os.getpid(), 4, ctypes.byref(found)):  # 4: RUSAGE_INFO_V4
        raise OSError("proc_pid_rusage")
    return max(found.footprint, found.peak_footprint)


def peak_rss_bytes() -> int:
    """The most memory of this process in bytes since ``reset_peaks``: resident on Linux, the footprint on a Mac."""
    with suppress(OSError, AttributeError):
        return _peak_footprint()
    with suppress(OSError, StopIteration):
        lines = Path("/proc/self/status").read_text().splitlines()
        return int(next(line for line in lines if line.startswith("VmHWM:")).split()[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def peak_gpu_bytes() -> int | None:
    """The most bytes that MLX has allocated since ``reset_peaks``; None before MLX is used.

    On a Mac they are part of the footprint.
    """
    mlx = sys.modules.get("mlx.core")
    return mlx.get_peak_memory() if mlx else None


def swap_bytes() -> int:
    """Bytes of swap in use on this computer, by all processes."""
    import psutil

    return psutil.swap_memory().used


def allow_files() -> None:
    """Let this process open many files, as far as it may: macOS begins with 256, and large models have more shards."""
    now, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    enough = 4096 if most == resource.RLIM_INFINITY else min(4096, most)
    if now != resource.RLIM_INFINITY and now < enough:
        with suppress(OSError, ValueError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (enough, most))


def to_disk(handle: int) -> None:
    """Have the drive write what was written to an open file. On macOS fsync(2) leaves it in the drive's own cache."""
    if (full := getattr(fcntl, "F_FULLFSYNC", None)) is not None:
        with suppress(OSError):  # a network file system may not know it
            fcntl.fcntl(handle, full)
            return
    os.fsync(handle)


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
    from importlib.metadata import PackageNotFoundError, version

    found = {"python": platform.python_version()}
    for package in ("mlx-pare", "mlx", "mlx-lm", "numpy", "gguf", "transformers", "llama-cpp-python"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    return found


def computes_on() -> dict[str, str | None]:
    """What the bytes of a result depend on besides its inputs: the version of MLX, its device (cpu or gpu), and on a
    Mac the chip and the version of macOS. It imports MLX."""
    import mlx.core as mx

    return {
        "mlx": mx.__version__,
        "device": mx.default_device().type.name,
        "chip": sysctl("machdep.cpu.brand_string"),
        "macos": sysctl("kern.osproductversion"),
    }


def went_on(known: Sequence[Computed]) -> list[Computed]:
    """Return on what work was computed that goes on here. If it was begun on something else, one warning says so.

    ``known``: what this returned before, first what it was begun on. It is empty and stays so if an earlier version
    began the work, which did not note it."""
    if not known:
        return []
    now, first = computes_on(), known[0]
    changed = [
        f"{name} was {first[name] or 'unknown'}, now it is {value or 'unknown'}"
        for name, value in now.items()
        if name in first and first[name] != value
    ]
    if changed:
        console.warn_once(
            f"it goes on elsewhere than it was begun ({'; '.join(changed)}): results agree to rounding only"
        )
    return [*known] if now in known else [*known, now]
