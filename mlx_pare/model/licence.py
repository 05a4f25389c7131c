"""The licence of a model directory: its name, and the file with its text."""

from __future__ import annotations

import re
from pathlib import Path

FILES = ("LICENSE", "LICENSE.txt", "LICENSE.md", "LICENCE")


def licence_name(directory: Path) -> str | None:
    """The licence in the front matter of a README.md; None if it names none."""
    file = directory / "README.md"
    if not file.is_file():
        return None
    with file.open(encoding="utf-8", errors="replace") as opened:
        front = re.match(r"---\n(.*?)\n---", opened.read(1 << 16), re.DOTALL)
    found = re.search(r"^license:\s*([\w.+-]+)\s*$", front[1], re.MULTILINE) if front else None
    return found[1] if found else None


def licence_file(*directories: Path) -> Path | None:
    """The first file with the text of a licence in these directories; None if there is none."""
    return next((d / name for d in directories for name in FILES if (d / name).is_file()), None)
