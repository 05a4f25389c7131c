"""How other processes are started: in one place, so that none outlives the process that started it.

``start`` puts this file, run as a program, before the command:

    python -I -S base/children.py WAY PARENT COMMAND ...

"exec" (Linux): the kernel is asked to kill this process when its parent ends (PR_SET_PDEATHSIG, prctl(2)); then it
becomes the command. "watch" (elsewhere): it starts the command, and kills it when its own parent is gone. Either way
the process has a session of its own: Ctrl-C in the terminal is for mlx-pare, which ends its children.
The kernel takes the thread that called ``start`` for the parent.
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


def module(name: str, *words: str) -> list[str]:
    """The command that runs a module of this package in another process, whose environment is ``environment()``."""
    return [sys.executable, "-m", f"mlx_pare.{name}", *words]


def environment() -> dict[str, str]:
    """That of this process, in which another one finds the same package, and libraries say no more than they must."""
    package = str(Path(__file__).resolve().parents[2])
    path = os.pathsep.join(p for p in (package, os.environ.get("PYTHONPATH")) if p)
    quiet = {"RUST_BACKTRACE": "0", "TOKENIZERS_PARALLELISM": "false", "GGML_NO_BACKTRACE": "1"}
    return {**os.environ, "PYTHONPATH": path, **quiet}


def start(command: Sequence[str], **how: Any) -> subprocess.Popen:
    """Start a command that ends with this process; ``how`` is given to Popen. Raises FileNotFoundError when there is no
    such program."""
    program = shutil.which(command[0])
    if program is None:
        raise FileNotFoundError(2, "no such program", command[0])
    own = [sys.executable, "-I", "-S", str(Path(__file__).resolve()), WAY, str(os.getpid())]
    return subprocess.Popen([*own, program, *command[1:]], **{"env": environment(), **how}, start_new_session=True)


def run(
    command: Sequence[str], given: str = "", timeout: float | None = None, **how: Any
) -> subprocess.CompletedProcess:
    """Run a command to its end, with ``given`` on its stdin; what it wrote to stdout and stderr comes back as text.
    Raises TimeoutExpired, once it has been ended, when it takes longer than ``timeout`` seconds."""
    pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    process = start(command, encoding="utf-8", errors="replace", **pipes, **how)
    try:
        out, err = process.communicate(given, timeout)
    except BaseException:
        end(process)
        raise
    return subprocess.CompletedProcess(command, process.returncode, out, err)


def end(process: subprocess.Popen, patience: float = 0.0) -> None:
    """End a process and all that it started. With ``patience`` it is asked first, and has so many seconds to comply."""
    if patience:
        _send(process, signal.SIGTERM)
        with suppress(subprocess.TimeoutExpired):
            process.wait(patience)
    kill(process)
    process.wait()
    for pipe in (process.stdin, process.stdout, process.stderr):
        with suppress(OSError):  # what was not sent is not sent any more
            if pipe:
                pipe.close()


def kill(process: subprocess.Popen) -> None:
    """Kill a process and all that it started; its pipes stay open, and nobody waits for it."""
    _send(process, signal.SIGKILL)


def _send(process: subprocess.Popen, number: int) -> None:
    if process.poll() is None:  # else its number may be another process's by now
        with suppress(ProcessLookupError, PermissionError):  # PermissionError: macOS says so of a group of zombies
            os.killpg(process.pid, number)


# ---- in the new process ----


def _become(parent: int, command: Sequence[str]) -> None:
    """Turn into the command, which the kernel kills when the parent ends."""
    import ctypes

    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() == parent:  # else it ended before the kernel was asked
        os.execv(command[0], command)


def _watch(parent: int, command: Sequence[str]) -> int:
    """Run the command, and kill it when the parent is gone; its exit code."""
    signal.signal(signal.SIGTERM, lambda *_: None)  # the command, in the same group, has it as well
    process = subprocess.Popen(command)

    def look() -> None:
        while os.getppid() == parent:
            time.sleep(POLL_S)
        os.killpg(0, signal.SIGKILL)

    threading.Thread(target=look, daemon=True).start()
    code = process.wait()
    if code < 0:  # ended by a signal: so does this
        signal.signal(-code, signal.SIG_DFL) if -code not in (signal.SIGKILL, signal.SIGSTOP) else None
        os.kill(os.getpid(), -code)
    return code


if __name__ == "__main__":
    sys.exit({"exec": _become, "watch": _watch}[sys.argv[1]](int(sys.argv[2]), sys.argv[3:]))
