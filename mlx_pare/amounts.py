"""Amounts as people write them: "24B" parameters, "15GB" of memory."""

from __future__ import annotations

import re
from math import inf

from .errors import UsageError


def parse_amount(text: str, what: str) -> float:
    """ "24B" parameters, "15GB" bytes (decimal), "900M", "1.5e9". Raises UsageError."""
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
