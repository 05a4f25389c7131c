"""A plain name for a file or directory, for programs of others that interpret characters of a path.

mlx-lm takes `[ ] * ?` in a path for a pattern (glob.glob in mlx_lm/utils.py load_model), so `v[12]` loads the weights
of `v1`. Servers take a leading dash for an option. mlx-pare gives them a link with a plain name instead.
"""

from __future__ import annotations

import os
import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from .errors import PareError

PLAIN = re.compile(r"(?!-)[\w./+,=@ -]+")  # without patterns, options and shell syntax
PATTERN = re.compile(r"[\[\]*?]")
PREFIX = "mlx-pare-path-"
PLACES = ("/tmp", "/var/tmp")  # used if the user's folder for temporary files has no plain name


def is_litter(file: Path) -> bool:
    """Whether macOS writes this file by itself: the Finder's notes on a folder, or what other disks cannot hold of a
    file. Such a file comes, changes and goes at any time. A folder of such a name is somebody's."""
    return (file.name == ".DS_Store" or file.name.startswith("._")) and not file.is_dir()


def files_below(directory: Path) -> list[Path]:
    """All files in a directory and below it, without those that macOS writes by itself."""
    return [f for f in sorted(directory.rglob("*")) if f.is_file() and not is_litter(f)]


@contextmanager
def plain(path: Path) -> Iterator[Path]:
    """Give the path itself if its name is plain, else a link to it, which is removed at the end of the block.

    Files that were opened through the link stay open: lazy arrays of MLX may be read later. Raises PareError if no link
    can be made.
    """
    if PLAIN.fullmatch(str(path)):
        yield path
        return
    with _folder(path) as folder:
        link = folder / f"model{path.suffix if PLAIN.fullmatch(path.suffix) else ''}"
        try:
            link.symlink_to(path.absolute())
        except OSError as error:
            raise _no_link(path, error.strerror) from error
        yield link


@contextmanager
def _folder(path: Path) -> Iterator[Path]:
    """A new folder with a plain name that only this user can write to."""
    places = [
        place for place in (tempfile.gettempdir(), *PLACES) if PLAIN.fullmatch(place) and os.access(place, os.W_OK)
    ]
    if not places:
        raise _no_link(path, "no folder for temporary files has a plain name")
    with tempfile.TemporaryDirectory(prefix=PREFIX, dir=places[0]) as folder:
        yield Path(folder)


def _no_link(path: Path, why: str | None) -> PareError:
    return PareError(
        f"{path} has characters that mlx-lm takes for a pattern, and mlx-pare cannot make a link to it: {why}",
        "rename it, or set TMPDIR to a folder with a plain name",
    )


def require_text(path: Path) -> None:
    """Raise PareError for a path whose bytes are not UTF-8: neither MLX nor the tokenizers library can open it."""
    try:
        str(path.absolute()).encode()
    except UnicodeEncodeError:
        raise PareError(f"the path {path} is not UTF-8, and MLX cannot open it", "rename it") from None


def warning(path: Path) -> str | None:
    """The warning about a model directory that stock mlx-lm cannot open at its path; None if it can."""
    if not PATTERN.search(str(path.absolute())):
        return None
    return (
        f"mlx-lm takes [ ] * ? in a path for a pattern: move {path.name} to a path without these characters before "
        "you load it there"
    )
