"""Text into token rows: files and folders, windows, splits by hash. Overlap is an error."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from . import bounded, console
from .errors import PareError

SUFFIXES = (".txt", ".md", ".jsonl")
KINDS = {"text": str, "messages": list, "content": str}  # what a record holds its text in, when nobody says: the first
MANY_DOCUMENTS = 20  # from here on a document is the unit of a split, below that a paragraph
OVERLAP_CHARS = 60  # shorter paragraphs (headings, "Yes.") may stand in two texts by chance


@dataclass(frozen=True)
class Rows:
    """Token rows. ``tokens`` int32 [rows, length], padded on the right; ``lengths`` int32 [rows]: valid tokens."""

    tokens: np.ndarray
    lengths: np.ndarray

    @classmethod
    def full(cls, tokens: np.ndarray) -> Rows:
        """Rows without padding."""
        tokens = np.ascontiguousarray(tokens, dtype=np.int32)
        return cls(tokens, np.full(len(tokens), tokens.shape[1], dtype=np.int32))

    def joined(self, other: Rows) -> Rows:
        """These rows and then others of the same length. Raises PareError when they are not."""
        if self.length != other.length:
            raise PareError(f"rows of {self.length} and of {other.length} tokens cannot go through a model together")
        return Rows(*(np.concatenate(pair) for pair in ((self.tokens, other.tokens), (self.lengths, other.lengths))))

    def first(self, count: int) -> Rows:
        """So many of them, or all there are."""
        return self.take(slice(count))

    def take(self, chosen: np.ndarray | slice) -> Rows:
        """The rows of these numbers, in this order."""
        return Rows(self.tokens[chosen], self.lengths[chosen])

    @property
    def count(self) -> int:
        return len(self.tokens)

    @property
    def length(self) -> int:
        return self.tokens.shape[1]

    @property
    def total(self) -> int:
        return int(self.lengths.sum())

    def digest(self) -> str:
        data = self.tokens.tobytes() + self.lengths.tobytes() + str(self.tokens.shape).encode()
        return hashlib.sha256(data).hexdigest()

    def mask(self) -> np.ndarray:
        """bool [rows, length]: which positions hold text."""
        return np.arange(self.length)[None, :] < self.lengths[:, None]


def read(path: Path, tokenizer: Any = None, field: str | None = None) -> list[str]:
    """The documents of a file or folder: .txt and .md hold one each, .jsonl one a line.

    A record's text is its ``field`` (of several, separated by commas, the first it has): text, or a list of chat
    messages. Without one it is "text", "messages", "content", or "prompt" with "completion"; chats are written by the
    tokenizer's template. What is left out because it is empty or of another kind is counted in one line.
    Raises PareError when nothing can be read there, naming file and line of a record that cannot.
    """
    path = Path(path)
    if not path.exists():
        raise PareError(f"no text at {path}", "give a .txt, .md or .jsonl file, or a folder of them")
    there = [path] if path.is_file() else sorted(f for f in path.rglob("*") if f.is_file())
    files = there if path.is_file() else [f for f in there if f.suffix in SUFFIXES]
    found = [each for f in files for each in _documents(f, tokenizer, field)]
    documents = [text for _, text in found if text.strip()]
    if not documents:
        raise PareError(f"{path} holds no text", f"files read are {', '.join(SUFFIXES)}")
    empty = [where for where, text in found if not text.strip()]
    other = [str(f) for f in there if f.suffix not in SUFFIXES and not f.name.startswith(".") and f != path]
    left = [f"{len(of)} {what} (first {of[0]})" for what, of in (("empty", empty), ("of another kind", other)) if of]
    if left:
        console.say(f"{path}: {len(documents)} documents; left out: {', '.join(left)}")
    return documents


def _documents(file: Path, tokenizer: Any, field: str | None) -> list[tuple[str, str]]:
    """(where, text) of everything in a file, empty ones too."""
    try:
        text = file.read_text("utf-8-sig")
    except UnicodeDecodeError as error:
        raise PareError(f"{file} is not UTF-8 text (byte {error.start})") from error
    except OSError as error:
        raise PareError(f"cannot read {file}: {error.strerror}") from error
    if file.suffix != ".jsonl":
        return [(str(file), text)]
    lines = text.split("\n")  # not splitlines: JSON strings may hold other separators
    places = [(f"{file} line {n}", line) for n, line in enumerate(lines, 1) if line.strip()]
    found = [(where, _record(line, where, tokenizer, field)) for where, line in places]
    for where, text in found:
        try:
            text.encode()
        except UnicodeEncodeError as error:  # JSON can hold a lone surrogate
            raise PareError(f"{where} holds half a character, {text[error.start]!r}, which is no text") from error
    return found


def _record(line: str, where: str, tokenizer: Any, field: str | None) -> str:
    """The text of a record; "" where the field that should hold it is null or has no messages."""
    try:
        record = bounded.loads(line)
    except ValueError as error:
        raise PareError(f"{where} is not JSON: {error}") from error
    if not isinstance(record, dict):
        raise PareError(f"{where} is no record but {line.strip()[:20]!r}", 'write {"text": "..."}')
    kinds = KINDS if field is None else {name.strip(): (str, list) for name in field.split(",")}
    for name, kind in kinds.items():
        if isinstance(value := record.get(name), kind):
            return value if isinstance(value, str) else _chat(value, record, where, tokenizer)
    pair = record.get("prompt"), record.get("completion")
    if field is None and all(isinstance(side, str) for side in pair):  # as mlx-lm's CompletionsDataset reads them
        turns = [{"role": role, "content": side} for role, side in zip(("user", "assistant"), pair, strict=True)]
        return _chat(turns, record, where, tokenizer)
    if any(name in record and record[name] is None for name in kinds):
        return ""
    wanted = " or ".join(f'"{name}"' for name in kinds) + (' or "prompt" with "completion"' if field is None else "")
    has = ", ".join(f'"{name}"' for name in list(record)[:8]) or "nothing"
    raise PareError(f"{where} has no text in {wanted}", f"it has {has}: choose with --field")


def _chat(messages: list, record: dict[str, Any], where: str, tokenizer: Any) -> str:
    """Messages as the tokenizer's template writes them, with the record's tools, as mlx-lm's ChatDataset does."""
    if not messages:
        return ""
    if tokenizer is None:
        raise PareError(f"{where} is a chat, which only a tokenizer with a chat template can write")
    tools = {"tools": record["tools"]} if record.get("tools") else {}
    try:
        return tokenizer.apply_chat_template(messages, tokenize=False, **tools)
    except Exception as error:  # templates are programs of their own
        raise PareError(
            f"{where}: the tokenizer cannot write this chat: {error}", "choose a field that holds text with --field"
        ) from error


def _encoded(tokenizer: Any, text: str, **how: Any) -> list[int]:
    """Its tokens. Raises PareError where a pattern of the tokenizer gives up: that is a panic of Rust, no Exception."""
    try:
        return tokenizer.encode(text, **how)
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt | SystemExit):
            raise
        raise PareError(
            f"the tokenizer cannot read the text: {error}", "use a tokenizer.json of another copy"
        ) from error


def windows(
    tokenizer: Any, documents: Sequence[str], length: int, count: int | None = None, seed: int | None = None
) -> Rows:
    """Non-overlapping windows of ``length`` tokens from the documents laid end to end, each document after its BOS.

    Where the tokenizer itself begins every text with BOS (Llama 3, Gemma), every window begins with one, as the model
    expects. The first ``count`` windows, or with a ``seed`` a random choice in the order of the text; all there are
    when the text is shorter. Raises PareError when there is not one whole window.
    """
    bos = tokenizer.bos_token_id
    every_window = bos is not None and _encoded(tokenizer, "a")[:1] == [bos]
    ids: list[int] = []
    for document in documents:
        encoded = _encoded(tokenizer, document, add_special_tokens=False, verbose=False)
        ids += [] if bos is None or every_window or encoded[:1] == [bos] else [bos]
        ids += encoded
    text = length - 1 if every_window else length
    whole = len(ids) // text
    if whole == 0:
        raise PareError(f"the text has {len(ids)} tokens, one row needs {text}", "give more text or a smaller --length")
    rows = np.asarray(ids[: whole * text], dtype=np.int32).reshape(whole, text)
    if every_window:
        rows = np.concatenate([np.full((whole, 1), bos, dtype=np.int32), rows], axis=1)
    if count is not None and count < whole:
        chosen = range(count) if seed is None else np.sort(np.random.RandomState(seed).permutation(whole)[:count])
        rows = rows[list(chosen)]
    return Rows.full(rows)


def split(documents: Sequence[str], parts: dict[str, int]) -> dict[str, list[str]]:
    """Divide the units of the text by their hash, in the given shares: the same unit always falls on the same side.

    Units are documents when there are many (records of a .jsonl, files of a folder), else paragraphs.
    """
    bounds, total = {}, 0
    for name, share in parts.items():
        total += share
        bounds[name] = total
    divided: dict[str, list[str]] = {name: [] for name in parts}
    many = len(documents) >= MANY_DOCUMENTS
    for document in documents:
        separator, units = ("", [document]) if many else paragraphs(document)
        pieces: dict[str, list[str]] = {name: [] for name in parts}
        for unit in units:
            bucket = int.from_bytes(hashlib.sha256(unit.strip().encode()).digest()[:8]) % total
            pieces[next(n for n, bound in bounds.items() if bucket < bound)].append(unit)
        for name, chosen in pieces.items():
            if chosen:
                divided[name].append(separator.join(chosen) + "\n")
    return divided


def paragraphs(document: str) -> tuple[str, list[str]]:
    """(separator, units): paragraphs between blank lines; lines where the text has one paragraph a line."""
    separator = "\n\n" if "\n\n" in document.strip() else "\n"
    return separator, [unit for unit in document.split(separator) if unit.strip()]


def forbid_overlap(texts: dict[str, Sequence[str]], part: Callable[[str], str] = str) -> None:
    """Raises PareError when two named texts share a paragraph: a score on seen text flatters.

    ``part`` of a name: texts of the same part may share."""
    seen: dict[str, str] = {}
    for name, documents in texts.items():
        lines = (line.strip() for document in documents for line in document.split("\n"))
        own = dict.fromkeys(line for line in lines if len(line) >= OVERLAP_CHARS)  # in order: the first is named
        for paragraph in own:
            if paragraph in seen and part(seen[paragraph]) != part(name):
                raise PareError(
                    f"the {seen[paragraph]} text and the {name} text share the paragraph {paragraph[:50]!r}...",
                    "they must be disjoint: take it out of one of them",
                )
        seen.update(dict.fromkeys(own, name))
