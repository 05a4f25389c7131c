"""Read documents from files of text and of records.

A record is one line of a .jsonl file, one item of a .json list or one row of a .csv table. The tokenizer's template
writes chats.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from ..base import console, untrusted
from ..base.errors import PareError

PLAIN = (".txt", ".md")  # one document each
LINES = (".jsonl", ".ndjson", ".jsonlines")  # one record a line
WHOLE = (".json",)  # a list of records
TABLES = (".csv", ".tsv")  # one record a row, after a row of names
KINDS = {"text": str, "messages": list, "content": str}  # fields that may hold a record's text: the first that fits
SPEAKERS = {"human": "user", "gpt": "assistant", "observation": "tool", "function_response": "tool"}  # of ShareGPT
KNOWN = (
    '"text" or "messages" or "content" or "prompt" with "completion" or "conversations" or "instruction" with "output"'
)
JSON_BYTES = 2 << 30  # limit for a parsed .json file of the user
LONG_LINE = 60  # characters; shorter lines (headings, "Yes.") may occur in two texts by chance
WORDS = 8  # characters; a line of a speaker that is at least this long is recognised

Placed = list[tuple[str, str]]  # (where, text) of every document, empty ones too


class Reader:
    """Reads files for one tokenizer. ``field``: names that may hold a record's text, separated by commas.

    ``framing`` collects the lines of chats that no speaker wrote: lines of the template, system messages and tool
    definitions. They occur in every chat, so they do not show that two chats are the same.
    """

    def __init__(self, tokenizer: Any = None, field: str | None = None):
        self.tokenizer, self.field = tokenizer, field
        self.framing: set[str] = set()
        self._warned = False

    def documents(self, file: Path) -> Placed:
        """Read the documents of one file. Raises PareError, with file and place, if it cannot be read as text."""
        text, kind = _text(file), file.suffix.lower()
        if kind in LINES:
            return self._lines(file, text)
        if kind in WHOLE:
            return self._whole(file, text)
        if kind in TABLES:
            return self._read(_rows(file, text))
        if _holds_records(text):
            if kind not in PLAIN:
                raise PareError(f"{file} holds JSON records", "name it .jsonl (one record a line) or .json (a list)")
            if not self._warned:
                console.warn(f"{file} holds JSON records and is read as plain text; name it .jsonl to read the records")
            self._warned = True
        return [(str(file), text)]

    def _lines(self, file: Path, text: str) -> Placed:
        lines = text.split("\n")  # not splitlines: JSON strings may hold other separators
        places = ((f"{file} line {n}", line) for n, line in enumerate(lines, 1) if line.strip())
        return self._read((where, _parsed(line, where)) for where, line in places)

    def _whole(self, file: Path, text: str) -> Placed:
        """Read a list of records. Many data sets also use .json for one record per line."""
        try:
            found = untrusted.loads(text, JSON_BYTES)
        except ValueError as error:
            if _is_record(text.lstrip().partition("\n")[0]):
                return self._lines(file, text)
            raise PareError(f"{file} is not JSON: {error}") from error
        if isinstance(found, dict):
            return self._read([(str(file), found)])
        if not isinstance(found, list):
            raise PareError(f"{file} is no list of records", 'write [{"text": "..."}, ...]')
        return self._read((f"{file} item {n}", record) for n, record in enumerate(found, 1))

    def _read(self, records: Iterator[tuple[str, Any]] | Sequence[tuple[str, Any]]) -> Placed:
        found = [(where, self._record(record, where)) for where, record in records]
        for where, text in found:
            try:
                text.encode()
            except UnicodeEncodeError as error:  # JSON can hold a lone surrogate
                raise PareError(f"{where} holds half a character, {text[error.start]!r}, which is no text") from error
        return found

    def _record(self, record: Any, where: str) -> str:
        """Return the text of a record; "" if the field that should hold it is null or has no messages."""
        if not isinstance(record, dict):
            shown = json.dumps(record, ensure_ascii=False)[:20]
            raise PareError(f"{where} is no record but {shown!r}", 'write {"text": "..."}')
        kinds = KINDS if self.field is None else {name.strip(): (str, list) for name in self.field.split(",")}
        for name, kind in kinds.items():
            if isinstance(value := record.get(name), kind):
                return value if isinstance(value, str) else self._chat(value, record, where)
        if self.field is None and (turns := _turns(record)) is not None:
            return self._chat(turns, record, where)
        if any(name in record and record[name] is None for name in kinds):
            return ""
        wanted = KNOWN if self.field is None else " or ".join(f'"{name}"' for name in kinds)
        has = ", ".join(f'"{name}"' for name in list(record)[:8]) or "nothing"
        raise PareError(f"{where} has no text in {wanted}", f"it has {has}: choose with --field")

    def _chat(self, messages: list, record: dict[str, Any], where: str) -> str:
        """Write messages by the tokenizer's template, with the record's tools, as mlx-lm's ChatDataset does."""
        if not messages:
            return ""
        if self.tokenizer is None:
            raise PareError(f"{where} is a chat, which only a tokenizer with a chat template can write")
        messages = [_message(one) for one in messages]
        tools = {"tools": record["tools"]} if record.get("tools") else {}
        try:
            text = self.tokenizer.apply_chat_template(messages, tokenize=False, **tools)
        except Exception as error:  # templates are programs and may raise anything
            raise PareError(
                f"{where}: the tokenizer cannot write this chat: {error}", "choose a field that holds text with --field"
            ) from error
        self.framing |= _framing(text, messages)
        return text


def _text(file: Path) -> str:
    try:
        return file.read_text("utf-8-sig")
    except UnicodeDecodeError as error:
        raise PareError(f"{file} is not UTF-8 text (byte {error.start})") from error
    except OSError as error:
        raise PareError(f"cannot read {file}: {error.strerror}") from error


def _parsed(line: str, where: str) -> Any:
    try:
        return untrusted.loads(line)
    except ValueError as error:
        raise PareError(f"{where} is not JSON: {error}") from error


def _is_record(line: str) -> bool:
    """Tell whether a line is a JSON object."""
    try:
        return line.lstrip().startswith("{") and isinstance(untrusted.loads(line), dict)
    except ValueError:
        return False


def _holds_records(text: str) -> bool:
    """Tell whether plain text is really JSON: its first line is a record, or all of it is one or a list of them."""
    start = text[:4096].lstrip()
    if not start.startswith(("{", "[")):
        return False
    if _is_record(text.lstrip().partition("\n")[0]):
        return True
    try:
        found = untrusted.loads(text, JSON_BYTES)
    except ValueError:
        return False
    return isinstance(found, dict) or (isinstance(found, list) and any(isinstance(one, dict) for one in found))


def _rows(file: Path, text: str) -> Iterator[tuple[str, dict[str, str]]]:
    """Yield the rows of a table by the names in its first row. Raises PareError if, say, a row has another length."""
    head = text.partition("\n")[0]
    csv.field_size_limit(1 << 30)
    delimiter = max("\t,;" if file.suffix.lower() == ".tsv" else ",;\t", key=head.count)  # the first of equals
    table = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    try:
        names = [name.strip() for name in next(table, [])]
        if twice := next((name for name in names if names.count(name) > 1), None):
            raise PareError(f"{file} names the column {twice!r} twice", "give every column a different name")
        for row in table:
            where = f"{file} line {table.line_num}"
            if row and len(row) != len(names):
                raise PareError(f"{where} has {len(row)} fields, the first line names {len(names)}")
            if row:
                yield where, dict(zip(names, row, strict=True))
    except csv.Error as error:
        raise PareError(f"{file} line {table.line_num} is no row of a table: {error}") from error


def _turns(record: dict[str, Any]) -> list | None:
    """Return the chat of a record that has neither text nor messages; None if it is no chat.

    In this order: ShareGPT's conversations, prompt with completion (as mlx-lm's CompletionsDataset reads them), and
    Alpaca's instruction, input and output.
    """
    if isinstance(turns := record.get("conversations"), list):
        system = record.get("system")
        return ([{"role": "system", "content": system}] if system and isinstance(system, str) else []) + turns
    for asked, answered in (("prompt", "completion"), ("instruction", "output")):
        if isinstance(record.get(asked), str) and isinstance(record.get(answered), str):
            more = record.get("input") if asked == "instruction" else None
            question = record[asked] + (f"\n\n{more}" if more and isinstance(more, str) else "")
            return [{"role": "user", "content": question}, {"role": "assistant", "content": record[answered]}]
    return None


def _message(one: Any) -> Any:
    """Return a message in the form that templates expect; ShareGPT writes "from" and "value"."""
    if not (isinstance(one, dict) and "role" not in one and isinstance(one.get("from"), str) and "value" in one):
        return one
    return {"role": SPEAKERS.get(one["from"], one["from"]), "content": one["value"]}


def _framing(text: str, messages: list) -> set[str]:
    """Return the long lines of a written chat that contain no line of a speaker.

    If the template changed what speakers said, nothing is returned: a changed line could pass for one of the template.
    """
    said = [one for one in messages if not (isinstance(one, dict) and one.get("role") in ("system", "developer"))]
    spoken = {line for one in said for line in _strings(one) if len(line) >= WORDS}
    if not all(line in text for line in spoken):
        return set()
    lines = {line for part in text.split("\n") if len(line := part.strip()) >= LONG_LINE}
    return {line for line in lines - spoken if not any(part in line for part in spoken)}


def _strings(value: Any) -> Iterator[str]:
    """Yield the lines of every text in a message, at any depth, except its role."""
    if isinstance(value, str):
        yield from (line for part in value.split("\n") if (line := part.strip()))
    elif isinstance(value, dict):
        for key, one in value.items():
            if key != "role":
                yield from _strings(one)
    elif isinstance(value, list):
        for one in value:
            yield from _strings(one)
