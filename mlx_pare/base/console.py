"""The only writer to a terminal. Names from outside cannot control the terminal (errors.plain).

With --json, messages go to stderr, and stdout holds exactly one document. With --quiet, messages go nowhere. An error
is always one line on stderr. Messages, warnings and progress also go to the log of the open run; store/rundir.py writes
the errors there.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from . import log
from .errors import plain
from .units import duration

_logged: list[Path] = []  # the open run directories; a stage is inside another one that is also open
_warned: set[str] = set()  # by warn_once, while a run directory is open
_state = {"json": False, "quiet": False, "stdout": sys.stdout, "lost": None}


def configure(as_json: bool = False, quiet: bool = False) -> None:
    """Set the mode of this process. From then on, whatever a library prints to stdout goes to stderr."""
    _state.update(json=as_json, quiet=quiet)
    if sys.stdout is not sys.stderr:
        _state["stdout"] = sys.stdout
    sys.stdout = sys.stderr


def speaks_json() -> bool:
    """Whether stdout must hold one JSON document."""
    return _state["json"]


def _stream():
    return sys.stderr if _state["json"] else _state["stdout"]


def _print(text: str, stream: Any, end: str = "\n") -> None:
    """Write to a stream at once. Characters that its encoding lacks become escapes.

    What cannot be written (a full disk, a terminal that is gone) does not stop the work; ``document`` reports what
    stdout lost.
    """
    try:
        try:
            print(text, file=stream, end=end, flush=True)
        except UnicodeEncodeError:
            known = stream.encoding
            print(text.encode(known, "backslashreplace").decode(known), file=stream, end=end, flush=True)
    except OSError as error:
        silence(stream)
        if isinstance(error, BrokenPipeError):  # `| head` has read enough
            raise
        if stream is not sys.stderr:
            _state["lost"] = error


def silence(stream: Any) -> None:
    """Discard what a stream still holds and all that follows. Otherwise Python would fail again when it exits."""
    with suppress(OSError, ValueError, AttributeError):  # a stream without a descriptor
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, stream.fileno())
        os.close(nowhere)


@contextmanager
def logged(directory: Path) -> Iterator[None]:
    """Write all messages of the block to the log of a run directory too."""
    _logged.append(directory)
    try:
        yield
    finally:
        _logged.remove(directory)
        if not _logged:
            _warned.clear()


def record(kind: str, text: str) -> None:
    """Write something to the log only."""
    for directory in _logged:
        log.write(directory, kind, text)


def say(text: str = "") -> None:
    """Print a message, as plain text."""
    record("said", text)
    if not _state["quiet"]:
        text = "\n".join(plain(line) for line in text.split("\n"))
        _print(text, _stream())


def warn(text: str) -> None:
    """Print a warning of one line on stderr, also with --quiet."""
    record("warning", text)
    _print(f"warning: {plain(text)}", sys.stderr)


def warn_once(text: str) -> None:
    """Print a warning as ``warn``, unless it was printed before while a run directory is open."""
    if text not in _warned:
        warn(text)
    if _logged:
        _warned.add(text)


def error(text: str) -> None:
    """Print an error as one line on stderr."""
    _print(f"mlx-pare: {plain(text)}", sys.stderr)


@contextmanager
def hushed() -> Iterator[None]:
    """Say nothing but errors and warnings during the block, as with --quiet."""
    before, _state["quiet"] = _state["quiet"], True
    try:
        yield
    finally:
        _state["quiet"] = before


def document(value: Any) -> None:
    """Print the result of a command with --json: the one JSON document on stdout. Without --json, print nothing.

    Raises OSError if something could not be written to stdout before.
    """
    if _state["json"]:
        _print(json.dumps(value, indent=1, default=str, allow_nan=False), _state["stdout"])
    if lost := _state["lost"]:
        _state["lost"] = None
        raise OSError(lost.errno, lost.strerror, "standard output")


def failure(line: str, code: int) -> None:
    """Print the end of a failed command: its one line, and with --json the document, if stdout still accepts it."""
    error(line)
    with suppress(OSError):
        document({"error": line, "exit_code": code})


def table(title: str, columns: Sequence[str], rows: Iterable[Sequence[Any]], caption: str | None = None) -> None:
    """Print a table in plain text. With --quiet or --json it prints nothing.

    Args:
        title: the line above the table.
        columns: names of the columns; "<" in front of a name aligns the column left, all others right.
        rows: cells of each row, as many as columns; None is printed as a dash.
        caption: the line below the table; None: no line.
    """
    if _state["quiet"] or _state["json"]:
        return
    names = [name.lstrip("<") for name in columns]
    cells = [["-" if cell is None else plain(str(cell)) for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(names, *cells, strict=True)]
    lefts = [name.startswith("<") for name in columns]

    def line(row: Sequence[str]) -> str:
        parts = (c.ljust(w) if left else c.rjust(w) for c, w, left in zip(row, widths, lefts, strict=True))
        return ("  " + "  ".join(parts)).rstrip()

    rule = "  " + _rule_mark() * (sum(widths) + 2 * len(widths) - 2)
    say("\n".join([title, line(names), rule, *map(line, cells), *([caption] if caption else []), ""]))


def _rule_mark() -> str:
    """The character that rules are drawn with on the stream of the messages."""
    try:
        "─".encode(getattr(_stream(), "encoding", None) or "utf-8")
    except UnicodeEncodeError:
        return "-"
    return "─"


class Progress:
    """Counts the work done and prints the time left: on a terminal a live line, elsewhere a line every ten seconds.

    The log gets a line every log.EVERY_S seconds.
    """

    INTERVAL, LIVE_INTERVAL = 10.0, 0.1  # seconds between two lines, and between two updates of a live line

    def __init__(self, what: str | None, total: int, shown: Callable[[float], str] = str):
        """``what`` None: print nothing. ``shown``: how an amount is written, e.g. ``gb`` for bytes."""
        self.what, self.total, self.done, self.shown = what, total, 0, shown
        self._ahead = 0.0  # seconds of other work that is still to come between the pieces
        self._start = self._last = self._noted = time.monotonic()
        self._fresh = 0  # pieces done in this process
        self._first = self._start, 0  # when the first pieces were done, and how many
        self._live = what is not None and sys.stderr.isatty() and not _state["quiet"]

    def skip(self, count: int) -> None:
        """Count work that was done earlier. It does not affect the estimate of the time left."""
        self.done += count

    def aside(self, spent: float, ahead: float) -> None:
        """Tell about other work between the pieces: the seconds it just took, which do not count for their pace, and
        the seconds it will still take."""
        self._start += spent
        self._first = self._first[0] + spent, self._first[1]
        self._ahead = ahead

    def left(self) -> float:
        """Estimate the seconds left by the pace since the first piece was done.

        The first piece also paid for what happens once (files that are read for the first time), and may differ (a
        block that is not cut). Its pace is used only while no other piece is done.
        """
        begun, before = self._first if self._fresh > self._first[1] else (self._start, 0)
        pace = (time.monotonic() - begun) / max(self._fresh - before, 1)
        return pace * (self.total - self.done) + self._ahead

    def advance(self, count: int = 1, note: str = "") -> None:
        """Count that many more pieces as done, and print a line if it is time."""
        self.done += count
        self._fresh += count
        now = time.monotonic()
        if count and self._fresh == count:
            self._first = now, count
        if self.what is None:
            return
        done, left = f"{self.shown(self.done)}/{self.shown(self.total)}", duration(self.left())
        line = plain(f"{self.what} {done}, {left} left{', ' + note if note else ''}")
        if now - self._noted >= log.EVERY_S:
            self._noted = now
            record("progress", line)
        pause = self.INTERVAL
        if self._live:
            pause = self.LIVE_INTERVAL if self.done < self.total else 0
        if _state["quiet"] or now - self._last < pause:
            return
        self._last = now
        end = "\n" if not self._live else ""
        _print(f"\r\033[K{line}" if self._live else line, sys.stderr, end)

    def close(self) -> None:
        """Clear the live line."""
        if self._live:
            _print("\r\033[K", sys.stderr, "")


@contextmanager
def progress(what: str | None, total: int, shown: Callable[[float], str] = str) -> Iterator[Progress]:
    """Show a Progress that is closed at the end of the block.

    Args:
        what: the name of the work; None: print nothing.
        total: the amount of work, in the unit of ``advance``.
        shown: how an amount is written, e.g. ``gb`` for bytes.
    Returns:
        The Progress.
    """
    bar = Progress(what, total, shown)
    try:
        yield bar
    finally:
        bar.close()
