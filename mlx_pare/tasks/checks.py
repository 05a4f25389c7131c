"""The checks that judge an answer: what a record may write behind "check", and whether an answer passes.

The answer of a model is untrusted text: it is compared, searched within limits (patterns.py) and parsed within bounds.
"""

from __future__ import annotations

import importlib
import os
import re
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from decimal import Decimal, InvalidOperation
from difflib import get_close_matches
from typing import Any

from ..base import untrusted
from ..base.errors import PareError, UsageError
from .patterns import Patterns, compiled
from .schemas import check_schema, fits

KINDS = ("exact", "contains", "regex", "number", "choice", "json_schema", "function")
BESIDES = {"number": "tolerance", "choice": "options"}  # the key that may stand next to a check, and in "choice" must
MOST_ANSWER = 1 << 20  # characters of an answer that are judged
MOST_DIGITS = 400  # characters of a number
# An answer's numbers, with groups of three digits or without; the search takes linear time
NUMBER = re.compile(
    r"(?<![0-9A-Za-z_])(?<!\d\.)[-+−]?(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?(?:[eE][-+]?\d{1,3}(?!\d))?"
)
FENCED = re.compile(r"```[\w-]*\n(.*?)```", re.DOTALL)
JSON_BYTES = 16 << 20  # memory that the JSON of an answer may take

Function = Callable[[str, Mapping[str, Any]], bool]


@dataclass(frozen=True)
class Check:
    """One check of a record.

    ``kind``: one of KINDS. ``accepted``: the alternatives, of which one suffices. ``tolerance``: the largest difference
    of a number. ``options``: what a choice is made from.
    """

    kind: str
    accepted: tuple[Any, ...]
    tolerance: Decimal = Decimal(0)
    options: tuple[str, ...] = ()


def parsed(raw: Any) -> tuple[Check, ...]:
    """Read the value of "check": one check, or a list of checks of which one must pass.

    Raises ValueError that says what is wrong.
    """
    checks = tuple(_one(each) for each in (raw if isinstance(raw, list) else [raw]))
    if not checks:
        raise ValueError("check is an empty list")
    if len(checks) > 1 and any(check.kind == "choice" for check in checks):
        raise ValueError("a choice cannot be one of several checks, because nothing is written for it")
    return checks


def _one(raw: Any) -> Check:
    if not isinstance(raw, dict):
        raise ValueError('check must be an object such as {"contains": "Paris"}')
    kinds = [key for key in raw if key in KINDS]
    for key in raw:
        if key not in KINDS and key not in BESIDES.values():
            near = get_close_matches(key, (*KINDS, *BESIDES.values()), 1)
            raise ValueError(f"unknown check {key!r}, {_hint(near, KINDS)}")
    if len(kinds) != 1:
        raise ValueError(f"a check needs exactly one of {', '.join(KINDS)}")
    kind = kinds[0]
    for key in raw:
        if key != kind and key != BESIDES.get(kind):
            raise ValueError(f"{key!r} has no meaning next to {kind!r}")
    values = raw[kind] if isinstance(raw[kind], list) else [raw[kind]]
    if not values:
        raise ValueError(f"{kind} is an empty list")
    return _OF[kind](kind, values, raw)


def _hint(near: list[str], known: Iterable[str]) -> str:
    return f"did you mean {near[0]!r}?" if near else f"known are {', '.join(known)}"


def _texts(kind: str, values: list[Any], raw: Mapping[str, Any]) -> Check:
    if any(not isinstance(value, str) or not value.strip() for value in values):
        raise ValueError(f"{kind} must be a text that is not empty, or a list of such texts")
    if kind == "regex":
        for value in values:
            compiled(value)
    if kind == "function":
        for value in values:
            if not re.fullmatch(r"[\w.]+:\w+", value):
                raise ValueError(f"function must be MODULE:FUNCTION, not {value[:60]!r}")
    return Check(kind, tuple(values))


def _numbers(kind: str, values: list[Any], raw: Mapping[str, Any]) -> Check:
    tolerance = raw.get("tolerance", 0)
    for value in (*values, tolerance):
        if (
            isinstance(value, bool)
            or not isinstance(value, int | float)
            or value != value
            or abs(value) == float("inf")
        ):
            raise ValueError("number and tolerance must be numbers")
    if tolerance < 0:
        raise ValueError("tolerance must not be negative")
    return Check(kind, tuple(Decimal(str(value)) for value in values), Decimal(str(tolerance)))


def _choice(kind: str, values: list[Any], raw: Mapping[str, Any]) -> Check:
    options = raw.get("options")
    if not isinstance(options, list) or len(options) < 2 or any(not isinstance(o, str) or not o for o in options):
        raise ValueError('choice needs "options", a list of at least two texts')
    if len(set(options)) < len(options):
        raise ValueError("options has the same text twice")
    for value in values:
        if value not in options:
            raise ValueError(f"choice {str(value)[:60]!r} is none of the options")
    if len(set(values)) == len(options):
        raise ValueError("every option is right, so the check accepts everything")
    return Check(kind, tuple(values), options=tuple(options))


def _schemas(kind: str, values: list[Any], raw: Mapping[str, Any]) -> Check:
    for value in values:
        check_schema(value)
    return Check(kind, tuple(values))


_OF = {"exact": _texts, "contains": _texts, "regex": _texts, "function": _texts, "number": _numbers,
       "choice": _choice, "json_schema": _schemas}  # fmt: skip


def loaded(names: Iterable[str]) -> dict[str, Function]:
    """Import the functions that the command line names, as MODULE:FUNCTION; modules are also found in this folder.

    Raises UsageError if there is no such function.
    """
    found: dict[str, Function] = {}
    for name in names:
        module, _, function = name.partition(":")
        sys.path.insert(0, os.getcwd())
        try:
            found[name] = getattr(importlib.import_module(module), function)
        except Exception as error:  # the code of the user, which may fail in any way
            cure = "name it as MODULE:FUNCTION, e.g. my_checks:is_polite in my_checks.py of this folder"
            raise UsageError(f"cannot import {name!r}: {type(error).__name__}: {error}", cure) from error
        finally:
            sys.path.remove(os.getcwd())
        if not callable(found[name]):
            raise UsageError(f"{name} is no function")
    return found


class Judge:
    """Tells whether answers pass. ``functions``: those of the user, by name."""

    def __init__(self, functions: Mapping[str, Function] | None = None):
        self.functions, self._patterns = dict(functions or {}), Patterns()

    def passes(self, checks: Iterable[Check], answer: str, record: Mapping[str, Any], where: str) -> bool:
        """Tell whether an answer passes one of the checks.

        Args:
            checks: of a record.
            answer: the text to judge; for a choice, the option that was chosen.
            record: the record itself, for the user's functions.
            where: file and line of the record, for errors.
        Raises:
            PareError: a function of the user fails, or returns neither True nor False.
        """
        answer = answer[:MOST_ANSWER]
        return any(self._passes(check, answer, record, where) for check in checks)

    def _passes(self, check: Check, answer: str, record: Mapping[str, Any], where: str) -> bool:
        kind, accepted = check.kind, check.accepted
        if kind in ("exact", "choice"):
            return answer.strip() in [value.strip() for value in accepted]
        if kind == "contains":
            return any(value in answer for value in accepted)
        if kind == "regex":
            return any(self._patterns.found(value, answer) for value in accepted)
        if kind == "number":
            number = last_number(answer)
            return number is not None and any(abs(number - value) <= check.tolerance for value in accepted)
        if kind == "function":
            return any(self._called(name, answer, record, where) for name in accepted)
        try:
            value = untrusted.loads(unfenced(answer), JSON_BYTES)
        except ValueError:
            return False
        return any(fits(value, schema, self._patterns.found) for schema in accepted)

    def _called(self, name: str, answer: str, record: Mapping[str, Any], where: str) -> bool:
        try:
            found = self.functions[name](answer, dict(record))
        except Exception as error:  # the code of the user, which may fail in any way
            raise PareError(
                f"{where}: {name} failed: {type(error).__name__}: {error}", "repair the function"
            ) from error
        if not isinstance(found, bool):
            raise PareError(f"{where}: {name} returned {str(found)[:60]!r}", "it must return True or False")
        return found


def last_number(answer: str) -> Decimal | None:
    """Return the last number of a text; None if it has none. Commas between groups of three digits are left out."""
    for found in reversed(list(NUMBER.finditer(answer))):
        text = found[0].replace(",", "").replace("−", "-")
        if len(text) <= MOST_DIGITS:
            try:
                return Decimal(text)
            except InvalidOperation:
                continue
    return None


def unfenced(answer: str) -> str:
    """Return the content of the first block of code in an answer, or the answer if it has none."""
    found = FENCED.search(answer)
    return (found[1] if found else answer).strip()
