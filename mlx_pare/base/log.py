"""RUN/log.txt: the messages of a run with their times, progress twice a minute, errors with their traceback.

A line is ``2026-11-26 12:48:22 4711 kind     text`` (local time, process). `status` reads the end of the file; no step
reads it. What cannot be written (a full disk, a link or a pipe of that name) is lost: a log must not stop the work that
it describes.
"""

from __future__ import annotations

import os
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from . import untrusted
from .errors import PareError

NAME = "log.txt"
EVERY_S = 30.0  # seconds between two lines of progress
TAIL = 1 << 16  # bytes at the end of a log that `status` reads


@dataclass(frozen=True)
class Line:
    """A line of a log.

    ``kind``: started and ended (a process), begun and done (a step), progress, said, warning, error, trace.
    """

    time: str
    pid: int
    kind: str
    text: str


def write(directory: Path, kind: str, text: str) -> None:
    """Append every line of ``text`` to the log of a run; never fail.

    Args:
        directory: the run directory.
        kind: the kind of the lines (see Line).
        text: any text; empty lines are left out.
    """
    head = f"{time.strftime('%Y-%m-%d %H:%M:%S')} {os.getpid()} {kind:8} "
    lines = "".join(f"{head}{line}\n" for line in text.splitlines() if line.strip())
    flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW
    with suppress(OSError, PareError), untrusted.regular(directory / NAME, flags) as file:
        file.write(lines.encode("utf-8", "replace"))


def last_session(directory: Path) -> list[Line]:
    """Read what the last process wrote, as far as it is in the last TAIL bytes; empty if there is no log."""
    try:
        with untrusted.regular(directory / NAME) as file:
            file.seek(max(0, os.fstat(file.fileno()).st_size - TAIL))
            text = file.read().decode("utf-8", "replace")
    except (OSError, PareError):
        return []
    found = [line for line in map(_parse, text.splitlines()) if line]
    starts = [number for number, line in enumerate(found) if line.kind == "started"]
    return found[starts[-1] :] if starts else found


def _parse(text: str) -> Line | None:
    """The parts of a line; None for half a line: of a process that was killed, or at the start of the tail."""
    parts = text.split(maxsplit=4)
    if len(parts) < 5 or not parts[2].isdecimal():
        return None
    return Line(f"{parts[0]} {parts[1]}", int(parts[2]), parts[3], parts[4])
