"""Markdown made of names, numbers and tables from outside, in which they have no other meaning."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from .errors import plain


def escaped(text: str) -> str:
    """A name from outside as one line of Markdown in which no character is markup."""
    line = plain(" ".join(text.split())).replace("&", "&amp;").replace("<", "&lt;")
    marks = r"[\\`*~\[\]|#]|(?<![^\W_])_|_(?![^\W_])|(?<=:)/"  # http:\/ is no link, and kv_head no emphasis
    return re.sub(f"({marks})", r"\\\1", line)


def code(text: str) -> str:
    """A name from outside as a code span; no character in it can end the span."""
    return f"`{plain(text).replace('`', chr(39))}`"


def row(*cells: Any) -> str:
    """A row of a table; None is a dash."""
    return "| " + " | ".join("-" if c is None else escaped(str(c)) for c in cells) + " |"


def table(columns: Sequence[str], rows: Sequence[str]) -> str:
    """A table made of rows from ``row``."""
    return "\n".join([row(*columns), "|" + "---|" * len(columns), *rows])
