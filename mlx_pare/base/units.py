"""Amounts as people write them: "24B" parameters, "15GB" of memory."""

from __future__ import annotations

import re
from collections.abc import Sequence
from math import inf

from .errors import UsageError


def parse_amount(text: str, what: str) -> float:
    """Parse an amount such as "24B" parameters, "15GB" (decimal) or "14GiB" bytes, "900M" or "1.5e9".

    ``what``: "parameters" or "bytes", which decides the meaning of "B". Raises UsageError if the text is no such
    amount.
    """
    found = re.fullmatch(r"\s*([0-9.]+(?:e[0-9]+)?)\s*((?:[kKMGT]i?)?B?)\s*", text)
    units = {"": 1.0, "k": 1e3, "K": 1e3, "M": 1e6, "G": 1e9, "T": 1e12, "B": 1e9 if what == "parameters" else 1.0}
    if found:
        unit = found[2] if what == "parameters" else found[2].removesuffix("B") if found[2] != "B" else "B"
        binary = {"Ki": 2**10, "Mi": 2**20, "Gi": 2**30, "Ti": 2**40}
        scale = binary.get(unit) if what == "bytes" else None
        scale = scale or units.get(unit)
        try:
            if scale and 0 < (value := float(found[1]) * scale) < inf:
                return value
        except ValueError:
            pass
    raise UsageError(
        f"cannot read {text!r} as {what}", 'write "24B" or "900M" for parameters, "15GB" or "14GiB" for bytes'
    )


def gb(count: float) -> str:
    """Bytes as decimal gigabytes (1e9); smaller amounts as MB, kB or B."""
    sign, size = ("-" if count < 0 else ""), abs(count)
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if size >= scale:
            return f"{sign}{size / scale:.2f} {unit}"
    return f"{sign}{size:.0f} B"


def readable(number: float, decimals: int, error: float | None = None) -> str:
    """Format a number, as a power of ten if it is large: the perplexity of a broken model.

    Args:
        number: the number.
        decimals: digits after the point, for numbers below 1e6.
        error: its standard error, which is added as in 61.90 ± 0.42; None: no error.
    Returns:
        The text.
    """
    if error is not None:
        return f"{readable(number, decimals)} ± {readable(error, decimals)}"
    return f"{number:.{decimals}f}" if abs(number) < 1e6 else f"{number:.3g}"


def span(sizes: int | Sequence[int]) -> str:
    """One size, or the sizes of all layers as the smallest and the largest: 96 to 128."""
    return str(sizes) if isinstance(sizes, int) else f"{min(sizes)} to {max(sizes)}"


def count(number: float) -> str:
    """A number of parameters: 32.76B, 8.92M."""
    for unit, scale in (("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if abs(number) >= scale:
            return f"{number / scale:.2f}{unit}"
    return f"{number:.0f}"


def duration(seconds: float) -> str:
    """Seconds in words: 59 s, 3 min 20 s, 2 h 5 min."""
    seconds = int(seconds)
    if seconds < 60:
        return f"{seconds} s"
    if seconds < 3600:
        return f"{seconds // 60} min {seconds % 60} s"
    return f"{seconds // 3600} h {seconds % 3600 // 60} min"
