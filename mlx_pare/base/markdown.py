"""Markdown of what came from outside: names, numbers and tables that mean nothing but themselves."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from .errors import plain


def escaped(text: str) -> str:
    """A name from outside as one line of Markdown that means nothing but itself."""
    line = plain(" ".join(text.split())).replace("&", "&amp;").replace("<", "&lt;")
    marks = r"[\\`*~\[\]|#]|(?<![^\W_])_|_(?![^\W_])|(?<=:)/"  # http:\/ is no link, and kv_head no emphasis
    return re.sub(f"({marks})", r"\\\1", line)


def code(text: str) -> str:
    """A name from outside as a span of code, which it cannot end."""
    return f"`{plain(text).replace('`', chr(39))}`"


def row(*cells: Any) -> str:
    """A line of a table; None is a dash."""
    return "| " + " | ".join("-" if c is None else escaped(str(c)) for c in cells) + " |"


def table(columns: Sequence[str], rows: Sequence[str]) -> str:
    """A table of lines that ``row`` made."""
    return "\n".join([row(*columns), "|" + "---|" * len(columns), *rows])
