"""A part of JSON Schema (draft 2020-12) that judges answers. A keyword that is not known here is an error."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from difflib import get_close_matches
from typing import Any

from .patterns import compiled

TYPES: Mapping[str, Callable[[Any], bool]] = {
    "object": lambda v: isinstance(v, dict),
    "array": lambda v: isinstance(v, list),
    "string": lambda v: isinstance(v, str),
    "number": lambda v: _is_number(v),
    "integer": lambda v: type(v) is int or (type(v) is float and v.is_integer()),
    "boolean": lambda v: isinstance(v, bool),
    "null": lambda v: v is None,
}
NOTES = ("$schema", "$id", "$comment", "title", "description", "default", "examples")  # they judge nothing
SIZES = {"minItems": list, "maxItems": list, "minLength": str, "maxLength": str, "minProperties": dict,
         "maxProperties": dict}  # fmt: skip
BOUNDS: Mapping[str, Callable[[float, float], bool]] = {
    "minimum": lambda v, bound: v >= bound,
    "maximum": lambda v, bound: v <= bound,
    "exclusiveMinimum": lambda v, bound: v > bound,
    "exclusiveMaximum": lambda v, bound: v < bound,
}
SEVERAL, ONE = ("anyOf", "allOf"), ("not", "items")
KEYWORDS = ("type", "enum", "const", "properties", "required", "additionalProperties", "pattern", *SEVERAL, *ONE,
            *SIZES, *BOUNDS)  # fmt: skip
Search = Callable[[str, str], bool]  # pattern, text -> whether it occurs


def _is_number(value: Any) -> bool:
    return type(value) is int or (type(value) is float and math.isfinite(value))


def check_schema(schema: Any, place: str = "json_schema") -> None:
    """Raise ValueError for a schema that this file cannot judge by; ``place`` is its path for the message."""
    if isinstance(schema, bool):
        return
    if not isinstance(schema, dict):
        raise ValueError(f"{place} must be an object")
    for key, value in schema.items():
        if key not in KEYWORDS and key not in NOTES:
            near = get_close_matches(key, KEYWORDS, 1)
            hint = f", did you mean {near[0]!r}?" if near else f": known are {', '.join(KEYWORDS)}"
            raise ValueError(f"{place} has the unknown keyword {key!r}{hint}")
        _check(key, value, f"{place}.{key}")


def _check(key: str, value: Any, place: str) -> None:
    """Raise ValueError if a keyword has a value of a wrong kind."""
    if key == "type":
        kinds = value if isinstance(value, list) else [value]
        if not kinds or any(not isinstance(kind, str) or kind not in TYPES for kind in kinds):
            raise ValueError(f"{place} must be one of {', '.join(TYPES)}, or a list of them")
    elif key == "required":
        if not isinstance(value, list) or not all(isinstance(name, str) for name in value):
            raise ValueError(f"{place} must be a list of names")
    elif key == "enum" or key in SEVERAL:
        if not isinstance(value, list) or not value:
            raise ValueError(f"{place} must be a list")
        for number, part in enumerate(value if key in SEVERAL else (), 1):
            check_schema(part, f"{place}[{number}]")
    elif key == "properties":
        if not isinstance(value, dict):
            raise ValueError(f"{place} must be an object")
        for name, part in value.items():
            check_schema(part, f"{place}.{name}")
    elif key in (*ONE, "additionalProperties"):
        check_schema(value, place)
    elif key == "pattern":
        if not isinstance(value, str):
            raise ValueError(f"{place} must be a text")
        compiled(value)
    elif key in SIZES:
        if not _is_number(value) or value < 0:
            raise ValueError(f"{place} must be a number that is not negative")
    elif key in BOUNDS and not _is_number(value):
        raise ValueError(f"{place} must be a number")


def fits(value: Any, schema: Any, search: Search) -> bool:
    """Tell whether a JSON value suits a schema.

    Args:
        value: the value, as parsed.
        schema: a schema that ``check_schema`` accepts.
        search: tells whether a pattern occurs in a text.
    Returns:
        Whether it does. As in JSON Schema, a keyword says nothing of values of another type.
    """
    if isinstance(schema, bool):
        return schema
    return all(_fits(key, wanted, value, schema, search) for key, wanted in schema.items() if key not in NOTES)


def _fits(key: str, wanted: Any, value: Any, schema: Mapping[str, Any], search: Search) -> bool:
    if key == "type":
        return any(TYPES[kind](value) for kind in (wanted if isinstance(wanted, list) else [wanted]))
    if key in ("enum", "const"):
        return any(same(value, one) for one in (wanted if key == "enum" else [wanted]))
    if key == "anyOf":
        return any(fits(value, part, search) for part in wanted)
    if key == "allOf":
        return all(fits(value, part, search) for part in wanted)
    if key == "not":
        return not fits(value, wanted, search)
    if key == "pattern":
        return not isinstance(value, str) or search(wanted, value)
    if key == "items":
        return not isinstance(value, list) or all(fits(one, wanted, search) for one in value)
    if key in SIZES:
        size = len(value) if isinstance(value, SIZES[key]) else wanted
        return size >= wanted if key.startswith("min") else size <= wanted
    if key in BOUNDS:
        return not _is_number(value) or BOUNDS[key](value, wanted)
    if not isinstance(value, dict):
        return True
    if key == "required":
        return all(name in value for name in wanted)
    if key == "properties":
        return all(fits(value[name], part, search) for name, part in wanted.items() if name in value)
    others = [one for name, one in value.items() if name not in schema.get("properties", {})]
    return all(fits(one, wanted, search) for one in others)  # additionalProperties


def same(one: Any, other: Any) -> bool:
    """Tell whether two JSON values are equal. In Python true is 1; in JSON it is not."""
    if isinstance(one, bool) or isinstance(other, bool):
        return one is other
    if isinstance(one, list) and isinstance(other, list):
        return len(one) == len(other) and all(map(same, one, other))
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(same(value, other[name]) for name, value in one.items())
    if _is_number(one) and _is_number(other):
        return one == other  # 1 and 1.0 are the same number
    return type(one) is type(other) and one == other
