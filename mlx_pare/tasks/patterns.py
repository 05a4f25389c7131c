"""Search answers with the regular expressions of a tasks file, in a process with limits of time and memory.

Python's search may try exponentially many ways, as with (a+)+$ on "aaa...b", and nothing in the same thread can stop
it. The other process is ended after SECONDS, and the answer counts as not passed. Run as a module, this file is that
process.
"""

from __future__ import annotations

import json
import re
import resource
import sys
import threading
import weakref
from subprocess import DEVNULL, PIPE, Popen

from ..base import children, console
from ..model.tokenizer_files import limit

SECONDS = 2.0  # for one search
START_SECONDS = 60.0  # until the process is ready
MOST_PATTERN = 10_000  # characters
MOST_BYTES = 512 << 20  # memory of the process, if the system can limit it (Linux)


def compiled(pattern: str) -> re.Pattern[str]:
    """Compile a pattern. Raises ValueError if it is too long or no regular expression."""
    if len(pattern) > MOST_PATTERN:
        raise ValueError(f"a pattern of {len(pattern)} characters, at most {MOST_PATTERN} are allowed")
    try:
        return re.compile(pattern)
    except (re.error, RecursionError, OverflowError) as error:
        raise ValueError(f"{pattern[:60]!r} is no regular expression: {error}") from None


class Patterns:
    """Searches texts in another process. The first search starts it."""

    def __init__(self, seconds: float = SECONDS):
        """``seconds``: the time that one search may take."""
        self.seconds, self._process = seconds, None

    def found(self, pattern: str, text: str) -> bool:
        """Tell whether a pattern occurs in a text. A search that reaches a limit finds nothing, with a warning."""
        if self._process is None or self._process.poll() is not None:
            self._process = children.start(children.module("tasks.patterns"), stdin=PIPE, stdout=PIPE, stderr=DEVNULL)
            weakref.finalize(self, children.end, self._process)
            self._answer(self._process, START_SECONDS)
        answer = self._answer(self._process, self.seconds, json.dumps([pattern, text]).encode() + b"\n")
        if answer is None:
            console.warn(f"the pattern {pattern[:60]!r} takes more than {self.seconds:g} s on an answer: not passed")
        return bool(answer)

    @staticmethod
    def _answer(process: Popen, seconds: float, question: bytes = b"") -> bool | None:
        """The next answer of the process; None if it was ended because it took too long or too much memory."""
        timer = threading.Timer(seconds, children.kill, (process,))
        timer.start()
        try:
            process.stdin.write(question)
            process.stdin.flush()
            line = process.stdout.readline(16)
        except OSError:  # the process is gone
            line = b""
        finally:
            timer.cancel()
        if line in (b"true\n", b"false\n"):
            return line == b"true\n"
        children.end(process)
        return None


def serve() -> None:
    """Answer every line of stdin, a pattern and a text, with a line on stdout: whether the pattern occurs."""
    limit(resource.RLIMIT_DATA, MOST_BYTES)
    sys.stdout.write("true\n")
    sys.stdout.flush()
    for line in sys.stdin:
        pattern, text = json.loads(line)
        sys.stdout.write(json.dumps(re.search(pattern, text) is not None) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    serve()
