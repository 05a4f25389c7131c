"""Kinds of values that an option takes: ranges of numbers, short lists, dates. No arrays."""

from __future__ import annotations

import datetime
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any

from ..base.errors import UsageError
from ..tensors.packing import BITS, GROUP_SIZES

MOST = 10**9  # rows, tokens, steps: a larger number is a typing error
MOST_BYTES = 1 << 62
LARGEST_RATE = 1e3  # a learning rate; far smaller ones already destroy a model
SHOWN = 40  # characters of a value in a message


@dataclass(frozen=True)
class Values:
    """The values of one option: ``said`` completes "give ...", ``fits`` tells whether a value is one of them.

    ``least`` and ``most`` are the bounds that the command line shows and checks itself.
    """

    said: str
    fits: Callable[[Any], bool]
    least: float | None = None
    most: float | None = None


def whole(least: int = 1, most: int = MOST) -> Values:
    """Whole numbers from ``least`` to ``most``."""
    shown = None if most in (MOST, MOST_BYTES) else most
    said = f"a whole number from {least} to {most}"
    return Values(said, lambda v: is_whole(v) and least <= v <= most, least, shown)


def above(least: float, most: float) -> Values:
    """Numbers above ``least``, up to ``most``. NaN and infinity are in no range."""
    return Values(f"a number above {least:g}, up to {most:g}", lambda v: is_number(v) and least < v <= most)


def between(least: float, most: float) -> Values:
    """Numbers from ``least`` to ``most``, both included."""
    return Values(f"a number from {least:g} to {most:g}", lambda v: is_number(v) and least <= v <= most)


def one_of(known: Iterable[int]) -> Values:
    """A few whole numbers."""
    listed = sorted(known)
    return Values(f"one of {', '.join(map(str, listed))}", lambda v: is_whole(v) and v in listed)


def several(each: Values) -> Values:
    """A list of values."""
    said = f"a list of values that are each {each.said}"
    return Values(said, lambda v: isinstance(v, list | tuple) and all(map(each.fits, v)))


COUNT, FROM_NONE, SHARE = whole(), whole(0), between(0, 1)
NUMBER = Values("a number", lambda v: is_number(v))
DATE = Values("a date such as 2026-11-01", lambda v: isinstance(v, str) and _is_date(v))
PACKED_BITS, GROUPS = one_of(BITS), one_of(GROUP_SIZES)
SEED = whole(0, 2**32 - 1)
TEMPERATURE = between(0.01, 100)
WEIGHT = between(0, MOST)


def require(flag: str, value: Any, values: Values) -> None:
    """Raise UsageError if an option does not take a value.

    Args:
        flag: the option as people write it.
        value: the value that was given.
        values: the values that the option takes.
    Raises:
        UsageError: ``value`` is not one of ``values``.
    """
    if not values.fits(value):
        raise UsageError(f"{flag} {shown(value)} is not allowed", f"give {values.said}")


def shown(value: Any) -> str:
    """A value for a message, shortened."""
    text = repr(value)
    return text if len(text) <= SHOWN else f"{text[:SHOWN]}..."


def is_whole(value: Any) -> bool:
    """Whether a value is a whole number; NumPy's whole numbers count."""
    return isinstance(value, Integral) and not isinstance(value, bool)


def is_number(value: Any) -> bool:
    """Whether a value is a finite number; NumPy's numbers count."""
    return isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)


def _is_date(text: str) -> bool:
    try:
        datetime.datetime.fromisoformat(text)
    except ValueError:
        return False
    return True
