"""A Modelfile for Ollama next to a GGUF file: template, stops, context, sampling, licence. Ollama was never run on it.

The syntax is that of parser/parser.go of Ollama. A value in three quotes ends at the first three quotes, and characters
that cannot be printed are dropped. So values that cannot be written are left out, and a note says so.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

from ..base.errors import PareError, plain
from ..base.untrusted import check_links, contents, read_json
from ..gguf.write.tokenizer import first_token
from ..model.licence import licence_file
from ..model.tokenizer_files import MAX_TOKENIZER, TOKENIZER_BUDGET, Chats, has_chat_template
from .go_template import SYSTEM, USER, Texts, go_template, read, trims

QUOTES = '"""'
# generation_config.json -> PARAMETER (api/types.go of Ollama)
SAMPLING = {"temperature": "temperature", "top_p": "top_p", "top_k": "top_k", "min_p": "min_p",
            "repetition_penalty": "repeat_penalty"}  # fmt: skip
MAX_LICENCE = 1 << 20
DAYS = (datetime(2001, 2, 3, 4, 5, 6), datetime(2038, 11, 22, 13, 44, 55))  # they share no part of a date
WHERE = {"type": "object", "properties": {"at": {"type": "string", "description": "Where."}}, "required": ["at"]}
TOOL = {"type": "function", "function": {"name": "look", "description": "Look.", "parameters": WHERE}}


@dataclass
class Modelfile:
    """The content of the file: ``stops`` as text, ``template`` in Go."""

    source: str
    template: str | None
    stops: list[str]
    parameters: dict[str, float | int]
    licence: str | None
    notes: list[str] = field(default_factory=list)

    def text(self) -> str:
        """Return the text of the file. No value goes into it unchecked: see the docstring of this module."""
        lines = [f"FROM ./{self.source}"]
        if self.template is not None:
            lines.append(f"TEMPLATE {QUOTES}{self.template}{QUOTES}")
        lines += [f"PARAMETER stop {quoted(stop)}" for stop in self.stops]
        lines += [f"PARAMETER {name} {value}" for name, value in self.parameters.items()]
        if self.licence:
            printed = (plain(line, 10 * len(line) + 1) for line in self.licence.strip().split("\n"))
            lines.append("\n".join([f"LICENSE {QUOTES}", *printed, QUOTES]))
        return "\n".join(lines) + "\n"


def modelfile(model: Path, source: str, context: int) -> Modelfile:
    """Make the Modelfile of a model directory. Without a chat template the prompt is used unchanged.

    Args:
        model: model directory.
        source: name of its GGUF file.
        context: tokens.
    Returns:
        The Modelfile, with notes on what could not be written.
    Raises:
        PareError: a tokenizer file is damaged.
    """
    check_links(model)
    raw = read_json(model / "tokenizer.json", "tokenizer", MAX_TOKENIZER, TOKENIZER_BUDGET)
    files = ("tokenizer_config.json", "generation_config.json", "config.json")
    settings, generation, config = (_object(model / name) for name in files)
    there = licence_file(model)
    licence = contents(there, MAX_LICENCE, "licence").decode("utf-8", "replace") if there else None
    found = Modelfile(source, "{{ .Prompt }}", [], {"num_ctx": context}, licence)
    texts = None
    if has_chat_template(model):
        texts = _texts(model, found.notes)
        bos = first_token(raw, settings)  # the GGUF file adds it anyway: it would be there twice
        found.template = go_template(texts.without(bos) if bos else texts) if texts else None
    for stop in _stops(texts, raw, settings, generation, config):
        if sayable(stop):
            found.stops.append(stop)
        else:
            found.notes.append(f"the stop {stop!r} cannot be written in a Modelfile")
    found.parameters |= _sampling(generation)
    if found.licence and QUOTES in found.licence:
        found.notes.append("the licence holds three quotes, which a Modelfile cannot: it is left out there")
        found.licence = None
    return found


def _sampling(generation: Mapping[str, Any]) -> dict[str, float | int]:
    """Return how tokens are drawn, by generation_config.json. Greedy decoding is a temperature of 0, which needs
    nothing else."""
    greedy, found = generation.get("do_sample") is False, {}
    for key, name in SAMPLING.items():
        value = generation.get(key)
        if isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value < 1e6:
            found[name] = int(value) if name == "top_k" else value
    if not greedy:
        return found
    return {"temperature": 0, **{name: value for name, value in found.items() if name == "repeat_penalty"}}


def quoted(text: str) -> str:
    """Put a value in as many quotes as it needs. Raises ValueError for a text that no quotes hold."""
    if not sayable(text):
        raise ValueError(f"{text!r} cannot be written in a Modelfile")
    return f"{QUOTES}{text}{QUOTES}" if '"' in text else f'"{text}"'


def sayable(text: str) -> bool:
    """Tell whether a Modelfile can hold a text: printable characters and line ends, no three quotes, no quote at its
    ends."""
    printed = all(character.isprintable() or character == "\n" for character in text)
    return bool(text) and printed and QUOTES not in text and '"' not in (text[0], text[-1])


def _object(path: Path) -> Mapping[str, Any]:
    return read_json(path, path.name) if path.is_file() else {}


def _texts(model: Path, notes: list[str]) -> Texts | None:
    """Return the texts that the chat template puts around messages; None, with a note, if it cannot be translated."""
    chats, today = Chats(model), datetime.now()

    def write(messages: Sequence[tuple[str, str]], day: datetime = today, tools: Any = None) -> str:
        asked = [{"role": role, "content": content} for role, content in messages]
        return chats(asked, answer=True, today=day, tools=tools)

    try:
        found = read(write)
    except PareError as error:
        notes.append(f"no TEMPLATE is written: {error.problem}. Ollama then looks for one that is like the GGUF file's")
        return None
    if (SYSTEM, USER) not in found.before:
        notes.append("the chat template has no place for a system message: in Ollama it is left out")
    notes += _beyond(found, write)
    return found


def _beyond(found: Texts, write: Callable[..., str]) -> list[str]:
    """Return notes on what a chat template does and its translation does not."""
    notes, short = [], [[(USER, "Q")], [(SYSTEM, "s"), (USER, "Q")]]

    def changes(chat: Sequence[tuple[str, str]], **given: Any) -> bool:
        with suppress(ValueError):
            return write(chat, **given) != write(chat)
        return False

    if any(changes(chat, day=day) for chat in short for day in DAYS):
        notes.append("the chat template writes the date: TEMPLATE keeps the day of the export for ever")
    if trims(found, write):
        notes.append("the chat template takes white space from both ends of messages: TEMPLATE keeps it")
    if any(changes(chat, tools=[TOOL]) for chat in short):
        notes.append("the chat template describes tools to the model: TEMPLATE does not, so Ollama offers none")
    return notes


def _stops(texts: Texts | None, raw: Mapping, settings: Mapping, generation: Mapping, config: Mapping) -> list[str]:
    """Return the special tokens that end an answer: those that the model's files name, and the one that the chat
    template writes after an answer."""
    tokens = [t for t in raw.get("added_tokens") or () if isinstance(t, Mapping) and isinstance(t.get("content"), str)]
    added = {t["id"]: t["content"] for t in tokens if type(t.get("id")) is int}
    ids = generation.get("eos_token_id", config.get("eos_token_id"))
    found = [added.get(i) for i in (ids if isinstance(ids, list) else [ids]) if type(i) is int]
    eos = settings.get("eos_token")
    found.append(eos.get("content") if isinstance(eos, Mapping) else eos)
    if texts:
        behind = texts.before["assistant", "user"]
        found.append(max((text for text in added.values() if text and behind.startswith(text)), key=len, default=None))
    return list(dict.fromkeys(text for text in found if isinstance(text, str) and text))
