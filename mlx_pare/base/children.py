"""The one place that starts other processes, so that none outlives the process that started it.

``start`` puts this file, run as a program, before the command:

    python -I -S base/children.py WAY PARENT COMMAND ...

"exec" (Linux): the process asks the kernel to kill it when its parent ends (PR_SET_PDEATHSIG, prctl(2)). Then it
becomes the command. "watch" (elsewhere): it starts the command, and kills it when its own parent is gone. In both cases
the process gets a new session: Ctrl-C in the terminal reaches only mlx-pare, which ends its children.
For the kernel, the parent is the thread that called ``start``.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

WAY = "exec" if sys.platform == "linux" else "watch"
PR_SET_PDEATHSIG = 1  # linux/prctl.h
POLL_S = 0.2  # how often "watch" looks for its parent
MEMORY_POLL_S = 0.1  # how often ``bound`` looks
FAMILY_LOOKS = 10  # after that many looks it asks only at every tenth which processes were started


def module(name: str, *words: str) -> list[str]:
    """The command that runs a module of this package in another process, whose environment is ``environment()``."""
    return [sys.executable, "-m", f"mlx_pare.{name}", *words]


def environment() -> dict[str, str]:
    """The environment for a child process: it finds the same package, and its libraries print as little as they can."""
    package = str(Path(__file__).resolve().parents[2])
    path = os.pathsep.join(p for p in (package, os.environ.get("PYTHONPATH")) if p)
    quiet = {"RUST_BACKTRACE": "0", "TOKENIZERS_PARALLELISM": "false", "GGML_NO_BACKTRACE": "1"}
    return {**os.environ, "PYTHONPATH": path, **quiet}


def start(command: Sequence[str], **how: Any) -> subprocess.Popen:
    """Start a command that ends with this process; ``how`` is passed to Popen.

    Raises FileNotFoundError if there is no such program.
    """
    program = shutil.which(command[0])
    if program is None:
        raise FileNotFoundError(2, "no such program", command[0])
    own = [sys.executable, "-I", "-S", str(Path(__file__).resolve()), WAY, str(os.getpid())]
    return subprocess.Popen([*own, program, *command[1:]], **{"env": environment(), **how}, start_new_session=True)


def bound(process: subprocess.Popen, most: int) -> None:
    """Kill a process, with everything that it started, as soon as these together take more than ``most`` bytes.

    macOS limits no memory, and Linux only the addresses of each process.
    """

    def watch() -> None:
        import psutil

        looks, family = 0, []
        with suppress(psutil.Error):
            own = psutil.Process(process.pid)
            while process.poll() is None:
                if looks < FAMILY_LOOKS or looks % FAMILY_LOOKS == 0:  # this reads about all processes of the computer
                    family = own.children(recursive=True)
                if sum(map(_resident, (own, *family))) > most:
                    kill(process)
                    return
                looks += 1
                time.sleep(MEMORY_POLL_S)

    threading.Thread(target=watch, daemon=True).start()


def _resident(process: Any) -> int:
    """Bytes of a psutil.Process in memory; 0 if it is gone."""
    import psutil

    with suppress(psutil.Error):
        return process.memory_info().rss
    return 0


def run(
    command: Sequence[str], given: str = "", timeout: float | None = None, most: int | None = None, **how: Any
) -> subprocess.CompletedProcess:
    """Run a command to its end and collect its output as text.

    Args:
        command: the program and its arguments.
        given: text for its stdin.
        timeout: seconds after which the command is ended; None: never.
        most: bytes of memory above which it is killed; None: any.
        how: further arguments of Popen, such as ``cwd``.
    Returns:
        The command, its exit status, stdout and stderr.
    Raises:
        FileNotFoundError: there is no such program.
        TimeoutExpired: the command took longer than ``timeout``; it has been ended.
    """
    pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    process = start(command, encoding="utf-8", errors="replace", **pipes, **how)
    if most is not None:
        bound(process, most)
    try:
        out, err = process.communicate(given, timeout)
    except BaseException:
        end(process)
        raise
    return subprocess.CompletedProcess(command, process.returncode, out, err)


def end(process: subprocess.Popen, patience: float = 0.0) -> None:
    """End a process and everything that it started. With ``patience``, it first gets SIGTERM and that many seconds."""
    if patience:
        _send(process, signal.SIGTERM)
        with suppress(subprocess.TimeoutExpired):
            process.wait(patience)
    kill(process)
    process.wait()
    for pipe in (process.stdin, process.stdout, process.stderr):
        with suppress(OSError):  # what is still in the pipe is lost
            if pipe:
                pipe.close()


def kill(process: subprocess.Popen) -> None:
    """Kill a process and everything that it started, without waiting. Its pipes stay open."""
    _send(process, signal.SIGKILL)


def _send(process: subprocess.Popen, number: int) -> None:
    if process.poll() is None:  # else another process may have its number by now
        with suppress(ProcessLookupError, PermissionError):  # PermissionError: macOS raises it for a group of zombies
            os.killpg(process.pid, number)


# ---- in the new process ----


def _become(parent: int, command: Sequence[str]) -> None:
    """Become the command. The kernel kills it when the parent ends."""
    import ctypes

    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() == parent:  # else the parent ended before the request to the kernel
        os.execv(command[0], command)


def _watch(parent: int, command: Sequence[str]) -> int:
    """Run the command, kill it if the parent is gone, and return its exit code."""
    signal.signal(signal.SIGTERM, lambda *_: None)  # the command is in the same group and gets it too
    process = subprocess.Popen(command)

    def look() -> None:
        while os.getppid() == parent:
            time.sleep(POLL_S)
        os.killpg(0, signal.SIGKILL)

    threading.Thread(target=look, daemon=True).start()
    code = process.wait()
    if code < 0:  # the command ended by a signal: this process ends by the same
        signal.signal(-code, signal.SIG_DFL) if -code not in (signal.SIGKILL, signal.SIGSTOP) else None
        os.kill(os.getpid(), -code)
    return code


if __name__ == "__main__":
    sys.exit({"exec": _become, "watch": _watch}[sys.argv[1]](int(sys.argv[2]), sys.argv[3:]))
