"""Text into token rows: files and folders, windows, splits by hash. Overlap is an error."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from .errors import PareError

SUFFIXES = (".txt", ".md", ".jsonl")
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
        return Rows(self.tokens[:count], self.lengths[:count])

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


def read(path: Path, tokenizer: Any = None) -> list[str]:
    """The documents of a file or folder (.txt and .md: one each; .jsonl: one a line, "text" or chat "messages").

    Raises PareError when nothing can be read there.
    """
    path = Path(path)
    if not path.exists():
        raise PareError(f"no text at {path}", "give a .txt, .md or .jsonl file, or a folder of them")
    files = [path] if path.is_file() else sorted(f for f in path.rglob("*") if f.suffix in SUFFIXES and f.is_file())
    documents = [d for f in files for d in _documents(f, tokenizer) if d.strip()]
    if not documents:
        raise PareError(f"{path} holds no text", f"files read are {', '.join(SUFFIXES)}")
    return documents


def _documents(file: Path, tokenizer: Any) -> list[str]:
    try:
        text = file.read_text("utf-8-sig")
    except UnicodeDecodeError as error:
        raise PareError(f"{file} is not UTF-8 text (byte {error.start})") from error
    except OSError as error:
        raise PareError(f"cannot read {file}: {error.strerror}") from error
    if file.suffix != ".jsonl":
        return [text]
    lines = text.split("\n")  # not splitlines: JSON strings may hold other separators
    return [_record(line, file, n, tokenizer) for n, line in enumerate(lines, 1) if line.strip()]


def _record(line: str, file: Path, number: int, tokenizer: Any) -> str:
    try:
        record = json.loads(line)
    except ValueError as error:
        raise PareError(f"{file} line {number} is not JSON: {error}") from error
    if isinstance(record, dict) and isinstance(record.get("text"), str):
        return record["text"]
    if isinstance(record, dict) and isinstance(record.get("messages"), list) and tokenizer is not None:
        try:
            return tokenizer.apply_chat_template(record["messages"], tokenize=False)
        except Exception as error:  # templates are programs of their own
            raise PareError(f"{file} line {number}: the tokenizer cannot write this chat: {error}") from error
    raise PareError(f'{file} line {number} has neither "text" nor "messages"')


def windows(
    tokenizer: Any, documents: Sequence[str], length: int, count: int | None = None, seed: int | None = None
) -> Rows:
    """Non-overlapping windows of ``length`` tokens from the documents laid end to end, each document after its BOS.

    Where the tokenizer itself begins every text with BOS (Llama 3, Gemma), every window begins with one, as the model
    expects. The first ``count`` windows, or with a ``seed`` a random choice in the order of the text; all there are
    when the text is shorter. Raises PareError when there is not one whole window.
    """
    bos = tokenizer.bos_token_id
    every_window = bos is not None and tokenizer.encode("a")[:1] == [bos]
    ids: list[int] = []
    for document in documents:
        encoded = tokenizer.encode(document, add_special_tokens=False, verbose=False)
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


def forbid_overlap(texts: dict[str, Sequence[str]]) -> None:
    """Raises PareError when two named texts share a paragraph: a score on seen text flatters."""
    seen: dict[str, str] = {}
    for name, documents in texts.items():
        own = {p.strip() for d in documents for p in d.split("\n") if len(p.strip()) >= OVERLAP_CHARS}
        for paragraph in own:
            if paragraph in seen:
                raise PareError(
                    f"the {seen[paragraph]} text and the {name} text share the paragraph {paragraph[:50]!r}...",
                    "they must be disjoint: take it out of one of them",
                )
        seen.update(dict.fromkeys(own, name))
