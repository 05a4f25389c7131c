"""Recipe files: TOML with any option of `run` by its name, as a run writes them to RUN/recipe.toml.

    model = "models/qwen3-8b"
    for = "m4-24gb"
    recover_steps = 300

A name may contain "-" or "_". Recipes of earlier versions use the names of the fields of settings.Settings; they can
still be read.
"""

from __future__ import annotations

import json
import tomllib
from collections.abc import Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from ..base.errors import PareError, UsageError
from ..base.untrusted import contents
from .option import Option
from .settings import RATES, TABLE

MAX_RECIPE = 1 << 20  # bytes
# Options of the command line of `run` that are no settings of a run.
COMMAND = {
    option.field: option
    for option in (
        Option("model", "", ""),
        Option("out", "", ""),
        Option("dry_run", "", "", bool),
        Option("as_json", "", "", bool, called="json"),
        Option("quiet", "", "", bool),
        Option("debug", "", "", bool),
    )
}
NAMES = {field: option.name for field, option in {**COMMAND, **TABLE}.items()}
NAMED = {option.name: option for option in (*COMMAND.values(), *TABLE.values())}
NEGATED = {f"no_{name}": option for name, option in NAMED.items() if option.kind is bool and option.field in TABLE}
# Fields of settings.Settings that recipes once named as they are; "schedule" was the rate's schedule, see _option.
EARLIER = {field: option for field, option in TABLE.items() if field != option.name and field != "schedule"}


def read(path: Path) -> dict[str, Any]:
    """Read the options of a recipe file, by field, each as the command line would give it.

    Raises UsageError if the file is no recipe: an unknown key, a key given twice, a value of another type.
    """
    return checked(parsed(path), path)


def parsed(path: Path) -> dict[str, Any]:
    """Read what stands in a recipe file, by the names there. Raises UsageError if it is no TOML, or cannot be read."""
    try:
        return _parsed(path)
    except FileNotFoundError:
        raise UsageError(f"there is no recipe at {path}") from None
    except OSError as error:
        raise UsageError(f"cannot read the recipe {path}: {error.strerror}", "give another file") from error


def of_run(path: Path) -> dict[str, Any]:
    """Read the recipe of a run directory: the values of Settings by field. Raises PareError if it is damaged."""
    try:
        given = checked(_parsed(path), path)
        return {field: _value(field, value) for field, value in given.items()}
    except UsageError as error:
        problem = error.problem if str(path) in error.problem else f"{path}: {error.problem}"
        raise PareError(problem, error.cure or "mend it, or start a new run with another --out") from error


def _value(field: str, value: Any) -> Any:
    return TABLE[field].read(value) if field in TABLE else value


def checked(raw: Mapping[str, Any], path: Path) -> dict[str, Any]:
    """The values of a parsed recipe by field, as the command line would give them. Raises UsageError as ``read``."""
    found: dict[str, Any] = {}
    for key, value in raw.items():
        option, negated = _option(key, value, path)
        if option.field in found:
            raise UsageError(f"{path} gives {option.name} twice", f"leave out {key}, or the other one")
        try:
            given = option.checked(value)
        except ValueError as error:
            raise UsageError(f"{path}: {key} = {_shown(value)} is not right", f"it must be {error}") from None
        found[option.field] = not given if negated else given
    return found


def by_name(values: Mapping[str, Any]) -> dict[str, Any]:
    """Rename values from the fields of settings.Settings, and "model", to the names in a recipe file."""
    return {NAMES[field]: value for field, value in values.items() if field in NAMES}


def toml(values: Mapping[str, Any]) -> str:
    """The text of a recipe file; values that are None are left out."""
    return "".join(f"{key} = {_toml(value)}\n" for key, value in values.items() if value is not None)


def _toml(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int | float):
        return repr(value)
    if isinstance(value, list | tuple):
        return "[" + ", ".join(_toml(v) for v in value) + "]"
    return _quoted(str(value))


def _quoted(text: str) -> str:
    """A string of TOML. Characters that would control a terminal, or reverse the writing direction, are escaped."""
    quoted = json.dumps(text, ensure_ascii=False)  # TOML has no surrogate pairs, which JSON would escape with
    return "".join(c if c.isprintable() else _escaped(ord(c)) for c in quoted)


def _escaped(code: int) -> str:
    if 0xD800 <= code < 0xE000:  # half of a pair: from a file name that is not UTF-8
        return "?"
    return f"\\u{code:04x}" if code < 1 << 16 else f"\\U{code:08x}"


def _parsed(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(contents(path, MAX_RECIPE, "recipe").decode("utf-8"))
    except UnicodeDecodeError:
        raise UsageError(f"{path} is not UTF-8 text", "save it as UTF-8") from None
    except (ValueError, RecursionError) as error:  # also for a number with more digits than Python reads
        raise UsageError(f"{path} is not valid TOML: {error}") from None


def _option(key: str, value: Any, path: Path) -> tuple[Option, bool]:
    """The option that a key names, and whether the key negates it. Raises UsageError for an unknown key."""
    name = key.replace("-", "_")
    if name == "schedule" and value in RATES:
        return TABLE["schedule"], False
    for known in (NAMED, EARLIER):
        if name in known:
            return known[name], False
    if name in NEGATED:
        return NEGATED[name], True
    near = get_close_matches(name, [*NAMED, *NEGATED], 1)
    cure = f"did you mean {near[0]!r}?" if near else "`mlx-pare run --help` lists the options"
    raise UsageError(f"{path} has an unknown key {key!r}", cure)


def _shown(value: Any) -> str:
    return json.dumps(value, default=str, ensure_ascii=False)[:80]
