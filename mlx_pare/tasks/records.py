"""Read a tasks file: one JSON record a line, each a prompt and the check that judges the answer.

An unknown key is an error with its line, because a typo would otherwise turn a check off.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from ..base import untrusted
from ..base.errors import PareError, UsageError
from .checks import BESIDES, KINDS, Check, parsed

MOST_BYTES = 64 << 20  # of a tasks file
MOST_RECORDS = 100_000
MOST_STOPS = 16  # stop strings of a record
MAX_TOKENS, MOST_TOKENS = 128, 1 << 16  # of an answer: the default, and the largest number
KEYS = ("prompt", "messages", "check", "category", "answer", "stop", "max_tokens", "right", "wrong")
ROLES = ("system", "user", "assistant", "tool", "developer")


@dataclass(frozen=True)
class Task:
    """One record.

    ``where``: file and line. ``messages``: a chat; or ``prompt``: a text. ``checks``: of which an answer passes one;
    none if only the surprisal of ``answer`` is measured. ``right`` and ``wrong``: examples for the self-test of the
    checks. ``raw``: the record as it was read, for functions of the user.
    """

    where: str
    category: str
    prompt: str = ""
    messages: tuple[dict[str, Any], ...] = ()
    checks: tuple[Check, ...] = ()
    answer: str = ""
    stop: tuple[str, ...] = ()
    max_tokens: int = MAX_TOKENS
    right: tuple[str, ...] = ()
    wrong: tuple[str, ...] = ()
    raw: Mapping[str, Any] = field(default_factory=dict, compare=False)

    @property
    def options(self) -> tuple[str, ...]:
        """What a choice is made from; empty if the model writes."""
        return self.checks[0].options if self.checks else ()

    @property
    def writes(self) -> bool:
        """Whether the model writes an answer."""
        return bool(self.checks) and not self.options


def read(file: Path) -> list[Task]:
    """Read a tasks file. Raises PareError, with the line, if it cannot be read as one; UsageError if it is empty."""
    try:
        text = untrusted.contents(file, MOST_BYTES, "tasks file").decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise PareError(f"{file} is not UTF-8 text (byte {error.start})") from error
    except OSError as error:
        raise PareError(f"cannot read tasks file {file}: {error.strerror}") from error
    lines = [(number, line) for number, line in enumerate(text.split("\n"), 1) if line.strip()]
    if not lines:
        raise UsageError(f"{file} holds no record", 'write {"prompt": "...", "check": {"contains": "..."}}, one a line')
    if len(lines) > MOST_RECORDS:
        raise PareError(f"{file} holds {len(lines)} records, at most {MOST_RECORDS} are allowed", "divide the file")
    return [_task(line, f"{file} line {number}", Path(file).stem) for number, line in lines]


def _task(line: str, where: str, category: str) -> Task:
    try:
        raw = untrusted.loads(line, unique=True)
    except ValueError as error:
        raise PareError(f"{where} is not JSON: {error}") from error
    if not isinstance(raw, dict):
        raise PareError(f"{where} is no record", 'write {"prompt": "...", "check": {"contains": "..."}}')
    try:
        return task(raw, where, category)
    except ValueError as error:
        raise PareError(f"{where}: {error}", "repair the line") from error


def task(raw: Mapping[str, Any], where: str, category: str) -> Task:
    """Check a record.

    Args:
        raw: the record.
        where: its place, for messages.
        category: if the record names none.
    Returns:
        The task.
    Raises:
        ValueError: a key is unknown, or its value of a wrong kind.
    """
    for key in raw:
        if key not in KEYS:
            near = get_close_matches(key, (*KEYS, *KINDS), 1)
            hint = f", did you mean {near[0]!r}?" if near else f", known are {', '.join(KEYS)}"
            inside = ' inside "check"' if key in KINDS or key in BESIDES.values() else ""
            raise ValueError(f"unknown key {key!r}{f', it belongs{inside}' if inside else hint}")
    if ("prompt" in raw) == ("messages" in raw):
        raise ValueError('a record needs either "prompt" or "messages"')
    if "check" not in raw and "answer" not in raw:
        raise ValueError('a record needs "check", or "answer" to measure its surprisal')
    most = raw.get("max_tokens", MAX_TOKENS)
    if isinstance(most, bool) or not isinstance(most, int) or not 1 <= most <= MOST_TOKENS:
        raise ValueError(f"max_tokens must be a whole number from 1 to {MOST_TOKENS}")
    return Task(
        where, _text(raw, "category", category), _text(raw, "prompt"), _messages(raw.get("messages")),
        parsed(raw["check"]) if "check" in raw else (), _text(raw, "answer"), _list(raw, "stop", MOST_STOPS), most,
        _list(raw, "right", empty=True), _list(raw, "wrong", empty=True), raw,
    )  # fmt: skip


def _text(raw: Mapping[str, Any], key: str, default: str = "") -> str:
    """The text of a key, which must not be empty if it is there."""
    value = raw.get(key, default)
    if not isinstance(value, str) or (key in raw and not value.strip()):
        raise ValueError(f"{key} must be a text that is not empty")
    return _whole(value, key)


def _whole(value: str, key: str) -> str:
    """Raise ValueError for half a character, which JSON can hold and no tokenizer reads."""
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"{key} holds half a character, {value[error.start]!r}, which is no text") from None
    return value


def _list(raw: Mapping[str, Any], key: str, most: int = 100, empty: bool = False) -> tuple[str, ...]:
    """A text or a list of texts as a tuple; ``empty``: they may be empty."""
    values = raw.get(key, [])
    values = [values] if isinstance(values, str) else values
    fine = isinstance(values, list) and len(values) <= most and all(isinstance(v, str) and (v or empty) for v in values)
    if not fine:
        raise ValueError(f"{key} must be a text, or a list of at most {most} texts")
    return tuple(_whole(value, key) for value in values)


def _messages(values: Any) -> tuple[dict[str, Any], ...]:
    if values is None:
        return ()
    if not isinstance(values, list) or not values:
        raise ValueError("messages must be a list that is not empty")
    for one in values:
        if not isinstance(one, dict) or set(one) != {"role", "content"} or not isinstance(one["content"], str):
            raise ValueError('a message must be {"role": "user", "content": "..."}')
        if one["role"] not in ROLES:
            raise ValueError(f"role must be one of {', '.join(ROLES)}, not {str(one['role'])[:40]!r}")
        _whole(one["content"], "content")
    return tuple(values)


def functions_of(tasks: Sequence[Task]) -> dict[str, str]:
    """Return the functions that checks name, each with the place that names it first."""
    found: dict[str, str] = {}
    for each in tasks:
        for check in each.checks:
            for name in check.accepted if check.kind == "function" else ():
                found.setdefault(name, each.where)
    return found
