"""What ends a command from outside: Ctrl-C, a polite kill, a closed terminal. All of them clean up in the same way."""

from __future__ import annotations

import signal
from types import FrameType

ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Interrupted(KeyboardInterrupt):
    """Ctrl-C, or a signal that means the same.

    It is not a bare KeyboardInterrupt. Once one of those has passed through exec() of a text (dataclasses, named
    tuples), CPython ends by SIGINT, whatever the exit code.
    """


def listen() -> None:
    """Raise Interrupted for each of the signals, except for those that the caller ignores (nohup)."""
    for number in ENDING:
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, _interrupt)


def _interrupt(number: int, frame: FrameType | None) -> None:
    if number == signal.SIGHUP:  # the shell and the kernel both send it: the second must not stop the clean-up
        signal.signal(number, signal.SIG_IGN)
    raise Interrupted
