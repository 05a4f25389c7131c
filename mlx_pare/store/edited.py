"""Files for people that mlx-pare writes again, such as RUN/report.md. A file that somebody changed is kept.

The last line of such a file is a comment with the hash of everything above it. If the hash is wrong or missing,
somebody changed the file, or it was never ours.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
from itertools import count
from pathlib import Path

from ..base import console, untrusted
from ..base.errors import PareError
from .atomic import replace_file

MOST = 64 << 20  # bytes: a larger file counts as changed
SAID = "mlx-pare wrote this; sha256 of all above: {}. If you change it, it is kept."
COMMENTS = {".toml": f"# {SAID}\n"}
COMMENT = f"<!-- {SAID} -->\n"  # in Markdown and SVG


def write(path: Path, data: bytes) -> Path:
    """Write a file again, unless somebody changed it since we wrote it.

    A changed file is kept. Then the bytes go to the first name next to it that is free or ours (report-2.md), and
    mlx-pare warns.

    Args:
        path: the file.
        data: its new content, which ends with a line end.
    Returns:
        The file that was written.
    """
    others = (path.with_name(f"{path.stem}-{number}{path.suffix}") for number in count(2))
    place = path
    while os.path.lexists(place) and not _unchanged(place):
        place = next(others)
    if place != path:
        console.warn(f"{path} was changed since mlx-pare wrote it, and is kept: the new one is {place}")
    replace_file(place, _sealed(path, data))
    return place


def replace(path: Path, data: bytes) -> None:
    """Write a file again that must keep its name. Arguments as ``write``.

    If somebody changed it since we wrote it, it is renamed first (recipe.yours-1.toml), and mlx-pare warns."""
    if os.path.lexists(path) and not _unchanged(path):
        kept = next(name for n in count(1) if not os.path.lexists(name := path.with_stem(f"{path.stem}.yours-{n}")))
        shutil.copy2(path, kept, follow_symlinks=False)  # not renamed: a kill would leave nothing under its name
        console.warn(f"{path} was changed since mlx-pare wrote it: your version is kept as {kept}")
    replace_file(path, _sealed(path, data))


def _sealed(path: Path, data: bytes) -> bytes:
    comment = COMMENTS.get(path.suffix, COMMENT)
    return data + comment.format(hashlib.sha256(data).hexdigest()).encode()


def _unchanged(path: Path) -> bool:
    """Whether a file is as we wrote it."""
    comment = re.escape(COMMENTS.get(path.suffix, COMMENT)).replace(re.escape("{}"), "([0-9a-f]{64})")
    try:
        found = re.fullmatch(b"(.*)" + comment.encode(), untrusted.contents(path, MOST), re.DOTALL)
    except (PareError, OSError):
        return False
    return bool(found) and hashlib.sha256(found[1]).hexdigest().encode() == found[2]
