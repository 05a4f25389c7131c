"""Which values an option takes: one table for the command line, Python's Settings and recipe.toml.

The table holds types, ranges and short lists. Names that belong to a subject (criteria, methods, GGUF types) are
checked by that subject. No arrays.
"""

from __future__ import annotations

import datetime
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any

from .errors import UsageError
from .packing import BITS, GROUP_SIZES

MOST = 10**9  # rows, tokens, steps: a larger number is a slip of the hand
LARGEST_RATE = 1e3  # a learning rate; nothing is left of a model long before
SHOWN = 40  # characters of a value in a message


@dataclass(frozen=True)
class Values:
    """The values of one option: ``said`` completes "give ...", ``fits`` tells whether a value is one of them."""

    said: str
    fits: Callable[[Any], bool]


def whole(least: int = 1, most: int = MOST) -> Values:
    """Whole numbers from ``least`` to ``most``."""
    return Values(f"a whole number from {least} to {most}", lambda v: _is_whole(v) and least <= v <= most)


def above(least: float, most: float) -> Values:
    """Numbers above ``least``, up to ``most``. NaN and infinity are in no range."""
    return Values(f"a number above {least:g}, up to {most:g}", lambda v: _is_number(v) and least < v <= most)


def between(least: float, most: float) -> Values:
    """Numbers from ``least`` to ``most``, both included."""
    return Values(f"a number from {least:g} to {most:g}", lambda v: _is_number(v) and least <= v <= most)


def one_of(known: Iterable[int]) -> Values:
    """A few whole numbers."""
    listed = sorted(known)
    return Values(f"one of {', '.join(map(str, listed))}", lambda v: _is_whole(v) and v in listed)


def several(each: Values) -> Values:
    """A list of values."""
    return Values(
        f"a list of values that are each {each.said}", lambda v: isinstance(v, list | tuple) and all(map(each.fits, v))
    )


def either(one: Values, other: Values) -> Values:
    """Values of two kinds."""
    return Values(f"{one.said}, or {other.said}", lambda v: one.fits(v) or other.fits(v))


TEXT = Values("text", lambda v: isinstance(v, str))
DATE = Values("a date such as 2026-11-01", lambda v: isinstance(v, str) and _is_date(v))
FLAG = Values("true or false", lambda v: isinstance(v, bool))
COUNT, FROM_NONE, SHARE = whole(), whole(0), between(0, 1)
NUMBER = Values("a number", lambda v: _is_number(v))
PACKED = one_of(BITS)

# Of steps.Settings, by the names there. A test holds that none is missing.
SETTINGS = {
    "data": either(TEXT, several(TEXT)), "test_data": TEXT, "field": TEXT, "date": DATE, "samples": COUNT,
    "length": whole(2), "criterion": TEXT, "reconstruct": FLAG, "axes": several(TEXT), "keep": above(0, 1),
    "stages": several(NUMBER),
    "target_params": TEXT, "target_size": TEXT, "mac": TEXT, "context": COUNT, "min_speed": between(0.01, MOST),
    "bits": PACKED, "group_size": one_of(GROUP_SIZES), "step": COUNT, "protect": FLAG, "widths": TEXT,
    "runtimes": several(TEXT), "layers_by": TEXT, "tries": COUNT, "choose_bits": several(PACKED),
    "recover_steps": FROM_NONE, "train_rows": COUNT, "method": TEXT, "learning_rate": above(0, LARGEST_RATE),
    "local_steps": FROM_NONE, "batch": COUNT, "accumulate": COUNT, "schedule": TEXT, "clip": between(0, MOST),
    "patience": FROM_NONE, "rank": COUNT, "kind": TEXT, "temperature": between(0.01, 100), "cross_entropy": SHARE,
    "match": TEXT, "top": COUNT, "grad_checkpoint": FLAG, "mix": FLAG, "on_policy": SHARE, "teacher": TEXT,
    "gguf": TEXT, "quick": FLAG, "trials": FROM_NONE, "min_quality": above(0, MOST), "memory_cap": whole(1, 1 << 62),
    "seed": whole(0, 2**32 - 1),
}  # fmt: skip
# Of single verbs
OTHERS = {
    "steps": FROM_NONE, "scale": above(0, MOST), "match_weight": between(0, MOST), "reports": COUNT,
    "prompt": whole(1, MOST // 2), "new": whole(2, MOST // 2), "rounds": COUNT, "draws": FROM_NONE,
    "prefill_step": COUNT, "model": TEXT,
}  # fmt: skip
EVERY = SETTINGS | OTHERS
FLAGS = {"stages": "schedule", "schedule": "rate-schedule", "mac": "for", "tries": "try", "top": "targets",
         "kind": "loss", "steps": "recover-steps", "rounds": "trials"}  # fmt: skip
OPTIONAL = {
    "data", "test_data", "field", "date", "keep", "stages", "target_params", "target_size", "mac", "min_speed", "bits",
    "step", "layers_by", "tries", "learning_rate", "kind", "top", "teacher", "gguf", "min_quality", "memory_cap",
}  # fmt: skip


def check(given: Mapping[str, Any]) -> None:
    """Raises UsageError for the first value that its option does not take. Names that the table lacks are skipped."""
    for name, value in given.items():
        if fault := wrong(name, value):
            raise UsageError(f"{flag(name)} {shown(value)} is not allowed", f"give {fault}")


def wrong(name: str, value: Any) -> str | None:
    """What the option ``name`` takes, where ``value`` is not of that; None where it is."""
    known = EVERY.get(name)
    if known is None or (value is None and name in OPTIONAL) or known.fits(value):
        return None
    return known.said


def flag(name: str) -> str:
    """How the command line calls an option."""
    return "--" + FLAGS.get(name, name).replace("_", "-")


def shown(value: Any) -> str:
    """A value for a message, shortened."""
    text = repr(value)
    return text if len(text) <= SHOWN else f"{text[:SHOWN]}..."


def _is_date(text: str) -> bool:
    try:
        datetime.datetime.fromisoformat(text)
    except ValueError:
        return False
    return True


def _is_whole(value: Any) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)
