"""The only writer to a terminal, which strangers' names cannot steer (errors.plain). Talk goes to stderr with --json
(stdout then holds exactly one document), and nowhere with --quiet; errors are always one line on stderr. All of it also
goes to the log of the run that is open.
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

_logged: list[Path] = []  # the run directories that are open; a stage lies in one that is open as well
_state = {"json": False, "quiet": False, "stdout": sys.stdout, "lost": None}


def configure(as_json: bool = False, quiet: bool = False) -> None:
    """Set the mode for this process. Whatever a library prints to stdout is sent to stderr from here on."""
    _state.update(json=as_json, quiet=quiet)
    if sys.stdout is not sys.stderr:
        _state["stdout"] = sys.stdout
    sys.stdout = sys.stderr


def speaks_json() -> bool:
    """Whether stdout is to hold one JSON document."""
    return _state["json"]


def _stream():
    return sys.stderr if _state["json"] else _state["stdout"]


def _print(text: str, stream: Any, end: str = "\n") -> None:
    """Write to a stream at once. Characters that its encoding lacks are written as escapes. What cannot be written (a
    full disk, a terminal that is gone) does not stop the work; ``document`` reports what stdout lost."""
    try:
        try:
            print(text, file=stream, end=end, flush=True)
        except UnicodeEncodeError:
            known = stream.encoding
            print(text.encode(known, "backslashreplace").decode(known), file=stream, end=end, flush=True)
    except OSError as error:
        silence(stream)
        if isinstance(error, BrokenPipeError):  # `| head` has seen enough
            raise
        if stream is not sys.stderr:
            _state["lost"] = error


def silence(stream: Any) -> None:
    """Send what a stream still holds, and all that follows, nowhere: Python would fail again when it ends."""
    with suppress(OSError, ValueError, AttributeError):  # a stream without a descriptor
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, stream.fileno())
        os.close(nowhere)


@contextmanager
def logged(directory: Path) -> Iterator[None]:
    """What is said meanwhile also goes to the log in a run directory."""
    _logged.append(directory)
    try:
        yield
    finally:
        _logged.remove(directory)


def record(kind: str, text: str) -> None:
    """Something for the log alone."""
    for directory in _logged:
        log.write(directory, kind, text)


def say(text: str = "") -> None:
    """One line of talk, plain text."""
    record("said", text)
    if not _state["quiet"]:
        text = "\n".join(plain(line) for line in text.split("\n"))
        _print(text, _stream())


def warn(text: str) -> None:
    """One line on stderr, also with --quiet."""
    record("warning", text)
    _print(f"warning: {plain(text)}", sys.stderr)


def error(text: str) -> None:
    """The one line an error becomes."""
    _print(f"mlx-pare: {plain(text)}", sys.stderr)


def document(value: Any) -> None:
    """The result of a command: the one JSON document on stdout with --json, otherwise nothing. Raises OSError when
    something that was for stdout could not be written."""
    if _state["json"]:
        _print(json.dumps(value, indent=1, default=str, allow_nan=False), _state["stdout"])
    if lost := _state["lost"]:
        _state["lost"] = None
        raise OSError(lost.errno, lost.strerror, "standard output")


def failure(line: str, code: int) -> None:
    """The end of a command that failed: its one line, and the document of --json where stdout takes it."""
    error(line)
    with suppress(OSError):
        document({"error": line, "exit_code": code})


def table(title: str, columns: Sequence[str], rows: Iterable[Sequence[Any]], caption: str | None = None) -> None:
    """A table in plain text; columns whose name starts with "<" are left-aligned, all others numbers on the right."""
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
    """What rules are drawn with on the stream of the talk."""
    try:
        "─".encode(getattr(_stream(), "encoding", None) or "utf-8")
    except UnicodeEncodeError:
        return "-"
    return "─"


class Progress:
    """Counts work done and says what is left. On a terminal a live line, elsewhere a line every ten seconds; in the log
    one every log.EVERY_S."""

    INTERVAL, LIVE_INTERVAL = 10.0, 0.1  # seconds between two lines; a live line is not written for every piece

    def __init__(self, what: str | None, total: int, shown: Callable[[float], str] = str):
        """``what`` None: nothing is shown. ``shown``: how an amount is written, e.g. ``gb`` for bytes."""
        self.what, self.total, self.done, self.shown = what, total, 0, shown
        self._ahead = 0.0  # seconds of other work to come between the pieces
        self._start = self._last = self._noted = time.monotonic()
        self._fresh = 0  # done in this process
        self._first = self._start, 0  # when its first piece was done, and how many that were
        self._live = what is not None and sys.stderr.isatty() and not _state["quiet"]

    def skip(self, count: int) -> None:
        """Work that was already done before: it does not count for the ETA."""
        self.done += count

    def aside(self, spent: float, ahead: float) -> None:
        """Other work between the pieces: the seconds it took just now, which are no part of their pace, and those that
        it will still take."""
        self._start += spent
        self._first = self._first[0] + spent, self._first[1]
        self._ahead = ahead

    def left(self) -> float:
        """Seconds to go, by the pace since the first piece was done: that one also paid for what is done once (files
        that are read for the first time), and may differ (a block that is not cut). Alone it is all that is known."""
        begun, before = self._first if self._fresh > self._first[1] else (self._start, 0)
        pace = (time.monotonic() - begun) / max(self._fresh - before, 1)
        return pace * (self.total - self.done) + self._ahead

    def advance(self, count: int = 1, note: str = "") -> None:
        """So many pieces more are done."""
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
        if self._live:
            _print("\r\033[K", sys.stderr, "")


@contextmanager
def progress(what: str | None, total: int, shown: Callable[[float], str] = str) -> Iterator[Progress]:
    """A Progress that is closed in the end."""
    bar = Progress(what, total, shown)
    try:
        yield bar
    finally:
        bar.close()
