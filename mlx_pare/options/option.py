"""An option: its name, type, default, help, check and panel are written once, at a field of a dataclass.

    class TextOptions:
        PANEL = "Text"
        samples: int = setting(128, "Number of calibration rows.", COUNT)

The command line, recipe files, Python's Settings and docs/cli.md read them there. An option has two names: ``name`` is
what people write, in a recipe and after ``--`` on the command line; ``field`` is the name in Python.
"""

from __future__ import annotations

import dataclasses
import functools
import os
import types
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import date
from numbers import Integral, Real
from pathlib import Path
from typing import Any, Union, get_args, get_origin, get_type_hints

from ..base.errors import UsageError
from .values import Values, is_number, require


def _same(value: Any) -> Any:
    return value


@dataclass(frozen=True)
class Option:
    """One option of the command line.

    ``kind``: int, float, str, bool or Path. ``default``: as the command line would give it. ``values``: the allowed
    values. ``listed``: several values, a list in a recipe, separated by commas on the command line. ``repeats``: the
    command line repeats the option instead. ``amount``: a number or a date is read as text. ``choices``: what shell
    completion offers; ``offers`` returns them if they must be looked up. ``read`` turns what the command line gives
    into the value of the field.
    """

    field: str
    panel: str
    help: str
    kind: type = str
    default: Any = None
    called: str = ""
    metavar: str | None = None
    values: Values | None = None
    listed: bool = False
    repeats: bool = False
    amount: bool = False
    choices: tuple[str, ...] = ()
    offers: Callable[[], list[str]] | None = None
    read: Callable[[Any], Any] = _same

    @property
    def name(self) -> str:
        return self.called or self.field

    @property
    def flag(self) -> str:
        """The option as the command line spells it, e.g. --target-size."""
        return "--" + self.name.replace("_", "-")

    @property
    def least(self) -> float | None:
        return self.values.least if self.values else None

    @property
    def most(self) -> float | None:
        return self.values.most if self.values else None

    def checked(self, value: Any) -> Any:
        """Convert a value of a recipe file to what the command line would give. Raises ValueError that says what was
        expected."""
        values = value if isinstance(value, list) and (self.listed or self.repeats) else [value]
        found = [self._one(each) for each in values]
        if self.repeats:
            return found
        return ",".join(map(str, found)) if self.listed else found[0]

    def _one(self, value: Any) -> Any:
        sort, number = type(value), type(value) in (int, float)
        if self.kind is bool and sort is not bool:
            raise ValueError("true or false")
        if self.kind is int and sort is not int:
            raise ValueError("a whole number")
        if self.kind is float and not (number and is_number(value)):
            raise ValueError("a number")
        if self.kind in (str, Path) and sort is not str:
            if not ((number or sort is date) and (self.amount or self.listed)):
                raise ValueError("a text, or a list of texts" if self.repeats else "a text")
            return str(value)
        if self.kind in (int, float):
            self._in_range(value)
        if sort is str and "\0" in value:
            raise ValueError("a text without the character NUL")
        return value

    def _in_range(self, value: float) -> None:
        if self.least is not None and value < self.least:
            raise ValueError(f"at least {self.least:g}")
        if self.most is not None and value > self.most:
            raise ValueError(f"at most {self.most:.0f}")


# ---- options as fields of a dataclass ----


def setting(default: Any, help: str = "", values: Values | None = None, **more: Any) -> Any:
    """Make a dataclass field that is an option.

    Args:
        default: the default in Python. ``typed`` is the same as the command line would give it, if that differs.
        help: for the command line; an option of the Python API alone has none.
        values: the allowed values, besides the type.
        more: other fields of Option, and ``typed``.
    Returns:
        The field.
    """
    return dataclasses.field(default=default, metadata={"help": help, "values": values, **more})


def options_of(part: type) -> Iterator[Option]:
    """The options of the command line in a dataclass, in the order of its fields. Its PANEL is their panel."""
    hints = _hints(part)
    for field in dataclasses.fields(part):
        about = dict(field.metadata)
        if about.get("help"):
            default = about.pop("typed", _typed(field.default))
            kind = about.pop("kind", None) or _kind(hints[field.name], about)
            yield Option(field.name, part.PANEL, kind=kind, default=default, **about)


def check(options: Any) -> None:
    """Check type and value of every field of a dataclass, and turn paths that stand for text into text.

    NumPy's numbers count as numbers, and an int as a float. Raises UsageError that names the field, its value and the
    type.
    """
    hints = _hints(type(options))
    for field in dataclasses.fields(options):
        value = getattr(options, field.name)
        if not _suits(value, hints[field.name]):
            raise UsageError(
                f"{type(options).__name__}({field.name}={value!r}): {field.name} must be {field.type}, not "
                f"{type(value).__name__}",
                f"write {field.name}={value} without quotes" if _is_number(value) else None,
            )
        if value is not None and (values := field.metadata.get("values")):
            require("--" + (field.metadata.get("called") or field.name).replace("_", "-"), value, values)
        if (text := _as_text(value)) is not value:
            object.__setattr__(options, field.name, text)  # dataclasses of options are frozen


# ---- types ----


def _typed(default: Any) -> Any:
    """A default as the command line would give it."""
    return (",".join(map(str, default)) or None) if isinstance(default, tuple) else default


def _kind(hint: Any, about: dict[str, Any]) -> type:
    """The type that the command line reads: text for lists and amounts."""
    if about.get("amount") or about.get("listed"):
        return str
    named = [each for each in get_args(hint) or (hint,) if each is not type(None)]
    return named[0] if len(named) == 1 and named[0] in (int, float, bool) else str


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
    """A path as text, also in a list; any other value as it is."""
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
