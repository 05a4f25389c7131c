"""A process in which mlx-pare runs with a fault planted: started for one job, or kept warm to fork one child per job.

A job is JSON: ``argv`` of mlx-pare, ``stderr`` a file, ``out`` the run directory, and one fault:

    snapshots  a folder: copy the run directory at every moment at which a kill would leave something else
    full       from the n-th change of the run directory on, the disk is full (OSError ENOSPC)
    file_size  no file may become larger (bytes): what the system itself does then, also to MLX's own writing
    powerless  root loses the right to read and write what its mode bits forbid
    interrupt  Ctrl-C at the n-th change of the run directory, and a second one at the next
"""

from __future__ import annotations

import ctypes
import errno
import importlib
import json
import os
import resource
import shutil
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

CHANGES = {"os.rename", "os.remove", "os.mkdir", "os.rmdir"}
WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT
WARM = (
    "gguf", "matplotlib.backends.backend_svg", "matplotlib.pyplot", "mlx_lm.models.llama", "mlx_lm.tuner.trainer",
    "mlx_pare.cli.main", "mlx_pare.pipeline.run", "psutil", "safetensors", "scipy.optimize", "transformers",
    "transformers.models.llama.configuration_llama",
)  # fmt: skip
TICK = 20_000_000  # nanoseconds: more than the resolution of file times


def on_change(out: str, act: Callable[[str, tuple], None]) -> None:
    """Call ``act(event, arguments)`` before every change that Python makes in the directory ``out``."""
    busy = False

    def hook(event: str, arguments: tuple) -> None:
        nonlocal busy
        if busy or not (event in CHANGES or (event == "open" and (arguments[2] or 0) & WRITES)):
            return
        place = os.fsdecode(arguments[0]) if isinstance(arguments[0], str | bytes | os.PathLike) else ""
        below_a_handle = event in ("os.remove", "os.rmdir") and arguments[1] != -1  # shutil.rmtree
        if not (place.startswith(out) or below_a_handle) or place.endswith(("log.txt", ".lock")):
            return
        busy = True
        try:
            act(event, arguments)
        finally:
            busy = False

    sys.addaudithook(hook)


def snapshots(out: str, folder: Path) -> None:
    """Copies of ``out``, 0000, 0001, ...; before a file gets its name also one, NNNN-torn, where it is half written.

    A file that did not change since an earlier copy is a hard link to the file there, so it must not be written to.
    One that was written in this tick of the clock may change again and have the same times.
    """
    made, copies = 0, {}

    def copy_file(source: str, target: str) -> None:
        now = os.lstat(source)
        state = now.st_ino, now.st_size, now.st_mtime_ns, now.st_ctime_ns
        if state in copies:
            os.link(copies[state], target)
        else:
            shutil.copy2(source, target)
            if time.time_ns() - now.st_ctime_ns > TICK:
                copies[state] = target

    def copy(name: str) -> Path:
        ignored = shutil.ignore_patterns(".lock")
        return Path(shutil.copytree(out, folder / name, ignore=ignored, copy_function=copy_file))

    def act(event: str, arguments: tuple) -> None:
        nonlocal made
        if not os.path.isdir(out):
            return
        copy(f"{made:04}")
        source = Path(os.fsdecode(arguments[0]))
        if event == "os.rename" and source.is_file():
            torn = copy(f"{made:04}-torn") / source.relative_to(out)
            torn.unlink()
            shutil.copy2(source, torn)
            os.truncate(torn, torn.stat().st_size // 2)
        made += 1

    on_change(out, act)


def plant(job: dict) -> None:
    """Prepare the fault of a job in this process."""
    out, seen = job["out"], 0
    if "snapshots" in job:
        snapshots(out, Path(job["snapshots"]))
    if "file_size" in job:
        resource.setrlimit(resource.RLIMIT_FSIZE, (job["file_size"], resource.RLIM_INFINITY))
    if "powerless" in job and os.geteuid() == 0:
        drop_capabilities()

    def full(event: str, arguments: tuple) -> None:
        nonlocal seen
        seen += 1
        if seen >= job["full"] and event not in ("os.remove", "os.rmdir"):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), os.fsdecode(arguments[0]))

    def interrupt(event: str, arguments: tuple) -> None:
        nonlocal seen
        seen += 1
        if seen in (job["interrupt"], job["interrupt"] + 1):
            os.kill(os.getpid(), getattr(signal, job.get("signal", "SIGINT")))

    if "full" in job:
        on_change(out, full)
    if "interrupt" in job:
        on_change(out, interrupt)


def drop_capabilities() -> None:
    """Linux: CAP_DAC_OVERRIDE and CAP_DAC_READ_SEARCH leave the effective set (capset, version 3)."""
    libc = ctypes.CDLL(None, use_errno=True)
    header = (ctypes.c_uint32 * 2)(0x20080522, 0)
    data = (ctypes.c_uint32 * 6)()
    if libc.capget(header, data) or (data.__setitem__(0, data[0] & ~0b110), libc.capset(header, data))[1]:
        raise OSError(ctypes.get_errno(), "cannot drop capabilities")


def run(job: dict) -> None:
    """Be mlx-pare, with the fault; does not return."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    log = os.open(job["stderr"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(log, 2)
    os.dup2(os.open(os.devnull, os.O_RDWR), 1)
    from mlx_pare.cli import main as cli
    from mlx_pare.exporting import llama_cpp

    # its threads wait for each other by spinning: beside other work a pico model takes it minutes; test_cli has it
    llama_cpp.available = lambda: False
    plant(job)
    sys.argv = ["mlx-pare", *job["argv"]]
    cli.main()


def serve() -> None:
    """A job per line: fork, say the child's process, wait, say its exit status. MLX computes in children only."""
    for name in WARM:
        importlib.import_module(name)
    os.fsync = lambda handle: None  # no child survives a power cut, only kills
    for line in sys.stdin:
        child = os.fork()
        if child == 0:
            try:
                run(json.loads(line))
            except SystemExit as left:
                sys.stderr.flush()
                os._exit(left.code or 0)
            except BaseException:
                sys.excepthook(*sys.exc_info())
                os._exit(70)
        answer(child)
        answer(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))


def answer(value: int) -> None:
    """A line to whoever sends the jobs."""
    os.write(1, f"{value}\n".encode())


if __name__ == "__main__":
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    serve() if len(sys.argv) == 1 else run(json.loads(sys.argv[1]))
