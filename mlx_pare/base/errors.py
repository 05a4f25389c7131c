"""Errors that a user can act on: what was found, where, what was expected, and what to do about it.

Every error becomes one line on the terminal and an exit code: 1 failed, 2 usage, 3 refused.
"""

from __future__ import annotations

import errno
import os
import shlex
from os import PathLike

FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
FORBIDDEN = {errno.EACCES, errno.EPERM, errno.EROFS}
MAX_SHOWN = 4000  # characters of a message


def plain(text: str, most: int = MAX_SHOWN) -> str:
    """Make text from outside safe for a terminal and for one line.

    Control characters, the escape sequences they begin and marks that reverse the writing direction are written out.
    Line ends become spaces. Text of more than ``most`` characters loses its middle.
    """
    text = _ends(text, most)
    if text.isprintable():
        return text
    line = "".join(" " if c.isspace() else c for c in text)
    return _ends("".join(c if c.isprintable() else ascii(c)[1:-1] for c in line), most)


def _ends(text: str, most: int) -> str:
    return text if len(text) <= most else f"{text[: most // 2]} ... {text[-most // 2 :]}"


def shell(path: str | PathLike[str]) -> str:
    """Write a path as one word of a shell command: whoever copies the command must not lose other files by it.

    Characters that cannot be printed are written as bash and zsh read them: $'a\\x0ab'.
    """
    text = str(path)
    if text.isprintable():
        return shlex.quote(text)
    return (
        "$'" + "".join(chr(b) if 32 <= b < 127 and b not in b"'\\" else f"\\x{b:02x}" for b in os.fsencode(text)) + "'"
    )


class PareError(Exception):
    """Something failed. ``problem`` says what and where, ``cure`` says what to do."""

    exit_code = 1

    def __init__(self, problem: str, cure: str | None = None):
        self.problem = plain(problem)
        self.cure = cure and plain(cure)
        super().__init__(self.problem)

    def __str__(self) -> str:
        if not self.cure:
            return f"{self.problem}."
        return f"{self.problem}. {self.cure[0].upper()}{self.cure[1:]}{'' if self.cure.endswith('?') else '.'}"


class Unsupported(PareError):
    """The input is sound, but of a kind that mlx-pare cannot cut. Some of these can be planned for."""


class UsageError(PareError):
    """The command got arguments that make no sense."""

    exit_code = 2


class Refused(PareError):
    """The work would overwrite something, mix different inputs, or not fit. Nothing was changed."""

    exit_code = 3


def _of_gpu(message: str) -> str | None:
    """Return what an error of Metal means (mlx/backend/metal/device.cpp and allocator.cpp); None for any other."""
    if "[METAL]" not in message and "[metal::malloc]" not in message:
        return None
    if "Insufficient Memory" in message or "[metal::malloc]" in message:
        return "the GPU ran out of memory. Close other programs, or use fewer --samples or a smaller --memory-cap"
    if "Timeout" in message or "Impacting Interactivity" in message:
        return "macOS stopped work on the GPU that took too long. Close other programs, or use a shorter --length"
    return f"the GPU failed ({plain(message, 200)})"


def told(error: BaseException, continues: bool = True) -> tuple[str, int]:
    """Turn an error into a line for the user and an exit code.

    Args:
        error: the error that ended a command.
        continues: whether the command works in a run directory, where a second call continues. Any other command
            removes what it did not finish.
    Returns:
        The one line that the user sees, and the exit code.
    """
    after = "what is finished is kept, the same command continues" if continues else "nothing unfinished is left"
    if isinstance(error, PareError):
        line, code = str(error), error.exit_code
    elif isinstance(error, KeyboardInterrupt):
        again = "" if continues else ", the same command starts again"
        line, code = f"interrupted: {error.args[0] if error.args else after + again}", 1
    elif isinstance(error, OSError):
        where = f": {error.filename2 or error.filename}" if error.filename else ""
        line, code = f"{error.strerror or error}{where}", 1
        if error.errno in FULL:
            line += f". Make room on the disk: {after}."
        elif error.errno in FORBIDDEN:
            line += ". Give yourself the right to it, or use another place."
    elif isinstance(error, RuntimeError) and (cause := _of_gpu(str(error))):
        line, code = f"{cause}: {after}", 1
    else:  # a defect of mlx-pare: still one line, and where to look
        line, code = f"internal error, {type(error).__name__}: {error} (--debug shows where)", 1
    return " ".join(line.split()), code
