"""Options in Python are of the types that their dataclass says: a wrong one is found here, and not by chance later."""

from __future__ import annotations

import functools
import os
import types
from collections.abc import Callable, Sequence
from dataclasses import fields
from numbers import Integral, Real
from typing import Any, Union, get_args, get_origin, get_type_hints

from .errors import UsageError


def check(options: Any) -> None:
    """Hold every field of a dataclass to its type; a path in place of text becomes text.

    NumPy's numbers are numbers, and an int is a float. Raises UsageError that names the field, its value and the type.
    """
    hints = _hints(type(options))
    for field in fields(options):
        value = getattr(options, field.name)
        if not _suits(value, hints[field.name]):
            raise UsageError(
                f"{type(options).__name__}({field.name}={value!r}): {field.name} must be {field.type}, not "
                f"{type(value).__name__}",
                f"write {field.name}={value} without quotes" if _is_number(value) else None,
            )
        if (text := _as_text(value)) is not value:
            object.__setattr__(options, field.name, text)  # dataclasses of options are frozen


@functools.cache
def _hints(cls: type) -> dict[str, Any]:
    return get_type_hints(cls)


def _suits(value: Any, hint: Any) -> bool:
    origin = get_origin(hint)
    if origin in (Union, types.UnionType):
        return any(_suits(value, each) for each in get_args(hint))
    if origin is Sequence:
        listed = isinstance(value, Sequence) and not isinstance(value, str | bytes)
        return listed and all(_suits(each, get_args(hint)[0]) for each in value)
    if hint in (int, float):
        return isinstance(value, Integral if hint is int else Real) and not isinstance(value, bool)
    if hint is str:
        return isinstance(value, str | os.PathLike)
    if hint in (Callable, Any):
        return hint is Any or callable(value)
    return isinstance(value, origin or hint)


def _as_text(value: Any) -> Any:
    """A path as text, also in a list; anything else as it is."""
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if isinstance(value, list | tuple) and any(isinstance(each, os.PathLike) for each in value):
        return tuple(map(_as_text, value))
    return value


def _is_number(value: Any) -> bool:
    try:
        return isinstance(value, str) and bool(float(value) or True)
    except ValueError:
        return False
