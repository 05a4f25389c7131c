"""Turn text into token rows: files and folders, windows, splits by hash."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..base import console
from ..base.errors import PareError, UsageError
from ..store.manifest import is_pruned, is_run
from .records import LINES, PLAIN, Reader

SUFFIXES = (*PLAIN, *LINES)  # suffixes of the files that are read in a folder
WHAT_TO_GIVE = "give a .txt, .md or .jsonl file, or a folder of them"
MANY_DOCUMENTS = 20  # from this number on a document is the unit of a split, below it a paragraph


@dataclass(frozen=True)
class Extent:
    """Number of rows and tokens per row. An estimate of memory needs nothing else of Rows."""

    count: int
    length: int

    def joined(self, other: Extent) -> Extent:
        """Append rows of the same length."""
        return Extent(self.count + other.count, self.length)

    def first(self, count: int) -> Extent:
        """Take the first ``count`` rows, or all if there are fewer."""
        return Extent(min(self.count, count), self.length)

    @property
    def total(self) -> int:
        return self.count * self.length


@dataclass(frozen=True)
class Rows:
    """Token rows. ``tokens``: int32 [rows, length], padded on the right. ``lengths``: int32 [rows], valid tokens."""

    tokens: np.ndarray
    lengths: np.ndarray

    def __post_init__(self) -> None:
        """Raises UsageError if the arrays cannot be token rows."""
        tokens, lengths = (_whole(of, what) for of, what in ((self.tokens, "token ids"), (self.lengths, "lengths")))
        if tokens.ndim != 2 or lengths.shape != tokens.shape[:1]:
            raise UsageError(
                f"token rows of shape {list(tokens.shape)} have lengths of shape {list(lengths.shape)}",
                "tokens are [rows, length], lengths [rows]",
            )
        if lengths.size and (most := _stored(lengths).max()) > tokens.shape[1]:
            raise UsageError(f"a row of {tokens.shape[1]} tokens has the length {most}")
        object.__setattr__(self, "tokens", tokens)
        object.__setattr__(self, "lengths", lengths)

    @classmethod
    def full(cls, tokens: np.ndarray) -> Rows:
        """Make rows without padding.

        Args:
            tokens: whole numbers [rows, length], not negative.
        Returns:
            Rows in which every length is ``length``.
        Raises:
            UsageError: the array has another number of axes, or values that int32 cannot hold.
        """
        tokens = np.ascontiguousarray(tokens)
        if tokens.ndim != 2:
            raise UsageError(f"token rows have the shape {list(tokens.shape)}", "tokens are [rows, length]")
        return cls(tokens, np.full(len(tokens), tokens.shape[1], dtype=np.int32))

    def joined(self, other: Rows) -> Rows:
        """Append other rows.

        Args:
            other: int32 [rows, length] of the same length.
        Returns:
            These rows, then the others.
        Raises:
            PareError: the lengths differ.
        """
        if self.length != other.length:
            raise PareError(f"rows of {self.length} and of {other.length} tokens cannot go through a model together")
        return Rows(*(np.concatenate(pair) for pair in ((self.tokens, other.tokens), (self.lengths, other.lengths))))

    def first(self, count: int) -> Rows:
        """Take the first rows.

        Args:
            count: number of rows; all are taken if there are fewer.
        Returns:
            int32 [at most count, length].
        """
        return self.take(slice(count))

    def take(self, chosen: np.ndarray | slice) -> Rows:
        """Take rows by their numbers.

        Args:
            chosen: int [chosen] row numbers, bool [rows], or a slice.
        Returns:
            int32 [chosen, length], in the order of ``chosen``.
        """
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
        """Tell which positions hold text.

        Returns:
            bool [rows, length]; False for padding.
        """
        return np.arange(self.length)[None, :] < self.lengths[:, None]

    def require_known(self, vocabulary: int) -> None:
        """Raises UsageError if an id is not below ``vocabulary``, the number of rows of the model's embedding."""
        if self.tokens.size and (most := _stored(self.tokens).max()) >= vocabulary:
            raise UsageError(
                f"the data holds token {most}, the model knows {vocabulary}",
                "use the tokenizer that belongs to the model",
            )


def _whole(values: np.ndarray, what: str) -> np.ndarray:
    """Convert an array to int32. Raises UsageError if it holds negative numbers or numbers that are not whole."""
    values = np.asarray(values)
    if values.dtype == np.int32:
        found = values
    elif values.dtype.kind in "iuf" and np.isfinite(values).all() and (abs(values) < 1 << 31).all():
        found = values.astype(np.int32)
        if (found != values).any():
            raise UsageError(f"{what} are not whole numbers", "give integers")
    else:
        raise UsageError(f"{what} are {values.dtype} that int32 cannot hold", "give integers")
    if found.size and (least := _stored(found).min()) < 0:
        raise UsageError(f"{what} hold {least}", "give numbers that are not negative")
    return found


def _stored(values: np.ndarray) -> np.ndarray:
    """Return each stored value of a broadcast array once: rows that are only counted share their memory."""
    return values[tuple(slice(None) if step else slice(1) for step in values.strides)]


def read(path: Path, tokenizer: Any = None, field: str | None = None, framing: set[str] | None = None) -> list[str]:
    """Read the documents of a file or folder: one per .txt or .md file, one per record of a .jsonl or .ndjson file.

    A file given by name may also be a list of records (.json), a table (.csv, .tsv), or plain text with any suffix. A
    folder is read without these, and without hidden files, run directories and pruned models.

    Args:
        path: file or folder.
        tokenizer: writes chats by its template; None: a chat is an error.
        field: names that may hold a record's text, separated by commas; the first that fits is taken. None: "text",
            "messages", "content", "conversations", "prompt" with "completion", "instruction" with "output".
        framing: receives the lines of chats that no speaker wrote (see records.Reader).
    Returns:
        Documents with text. One line on the console counts what was left out as empty or of another kind.
    Raises:
        PareError: no text can be read there, or a record cannot be read; the message names file and line.
    """
    path, reader = Path(path), Reader(tokenizer, field)
    if not path.exists():
        raise PareError(f"no text at {path}", WHAT_TO_GIVE)
    for is_ours, what in ((is_run, "run directory"), (is_pruned, "pruned model")):
        if is_ours(path):
            raise PareError(f"{path} is a {what}, which mlx-pare wrote itself", "name the text it was made with")
    ours: list[Path] = []
    there = [path] if path.is_file() else list(_files(path, ours, {path.resolve()}))
    files = there if path.is_file() else [f for f in there if f.suffix.lower() in SUFFIXES]
    found = [each for f in files for each in reader.documents(f)]
    documents = [text for _, text in found if text.strip()]
    other = [str(f) for f in there if f.suffix.lower() not in SUFFIXES and f != path]
    if not documents:
        named = f" ({len(other)} of another kind, first {other[0]})" if other else ""
        raise PareError(f"{path} holds no text{named}", f"{WHAT_TO_GIVE}; a .json or .csv file must be named itself")
    empty = [where for where, text in found if not text.strip()]
    kinds = (("empty", empty), ("of another kind", other), ("made by mlx-pare", ours))
    left = [f"{len(of)} {what} (first {of[0]})" for what, of in kinds if of]
    if left:
        console.say(f"{path}: {len(documents)} documents; left out: {', '.join(left)}")
    if framing is not None:
        framing |= reader.framing
    return documents


def _files(folder: Path, ours: list[Path], seen: set[Path]) -> Iterator[Path]:
    """Yield the files of a folder and its subfolders, in order. Linked folders count too, each once.

    Hidden files (macOS writes ._NAME next to NAME on other disks) and the __MACOSX folders of macOS archives are left
    out. So are run directories and pruned models, which are added to ``ours``. ``seen``: resolved folders so far.
    """
    for place in sorted(folder.iterdir()):
        if place.name.startswith(".") or place.name == "__MACOSX":
            continue
        if place.is_file():
            yield place
        elif place.is_dir() and (real := place.resolve()) not in seen:
            seen.add(real)
            if is_run(place) or is_pruned(place):
                ours.append(place)
            else:
                yield from _files(place, ours, seen)


def _encoded(tokenizer: Any, text: str, **how: Any) -> list[int]:
    """Encode a text. Raises PareError if the tokenizer's pattern gives up: a Rust panic, which is no Exception."""
    try:
        return tokenizer.encode(text, **how)
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt | SystemExit):
            raise
        raise PareError(
            f"the tokenizer cannot read the text: {error}", "use a tokenizer.json of another copy"
        ) from error


def _begins(tokenizer: Any) -> bool:
    """Tell whether the tokenizer itself begins every text with BOS."""
    return (bos := tokenizer.bos_token_id) is not None and _encoded(tokenizer, "a")[:1] == [bos]


def _text_tokens(tokenizer: Any, length: int) -> int:
    """Count the tokens of a row of ``length`` that are text."""
    return length - 1 if _begins(tokenizer) else length


def token_ids(tokenizer: Any, documents: Sequence[str]) -> Iterator[list[int]]:
    """Yield the ids of each document. BOS comes first, unless every row begins with one."""
    bos, every_row = tokenizer.bos_token_id, _begins(tokenizer)
    for document in documents:
        encoded = _encoded(tokenizer, document, add_special_tokens=False, verbose=False)
        yield encoded if bos is None or every_row or encoded[:1] == [bos] else [bos, *encoded]


def enough(tokenizer: Any, documents: Sequence[str], length: int) -> bool:
    """Tell whether the documents make one row; reading stops once they do.

    Args:
        tokenizer: encodes the documents.
        documents: the text.
        length: tokens of the row.
    Raises:
        PareError: the tokenizer cannot encode a document.
    """
    found, needed = 0, _text_tokens(tokenizer, length)
    return any((found := found + len(ids)) >= needed for ids in token_ids(tokenizer, documents))


def row_chars(tokenizer: Any, documents: Sequence[str], length: int) -> int:
    """Estimate how many characters make one row, from a sample of the documents and with a margin of 25 percent.

    Args:
        tokenizer: encodes the sample: two pieces of 1000 characters from each of at most 16 documents.
        documents: the text.
        length: tokens of the row.
    Returns:
        Characters, at least 1.
    Raises:
        PareError: the tokenizer cannot encode the sample.
    """
    some = [text[at : at + 1000] for text in documents[:: len(documents) // 16 + 1] for at in (0, len(text) // 2)]
    ids = sum(map(len, token_ids(tokenizer, some)))
    return max(1, math.ceil(1.25 * length * sum(map(len, some)) / max(1, ids)))


def windows(
    tokenizer: Any, documents: Sequence[str], length: int, count: int | None = None, seed: int | None = None
) -> Rows:
    """Cut the documents, laid end to end and each after its BOS, into windows that do not overlap.

    If the tokenizer itself begins every text with BOS (Llama 3, Gemma), every window begins with one instead, as the
    model expects.

    Args:
        tokenizer: encodes the documents.
        documents: the text.
        length: tokens of a window, BOS included.
        count: number of windows; None, or more than the text holds: all.
        seed: of a random choice of ``count`` windows, kept in the order of the text; None: the first ones.
    Returns:
        int32 [windows, length] without padding.
    Raises:
        PareError: the text makes no whole window, or the tokenizer cannot encode it.
    """
    bos, text = tokenizer.bos_token_id, _text_tokens(tokenizer, length)
    ids = [token for document in token_ids(tokenizer, documents) for token in document]
    whole = len(ids) // text
    if whole == 0:
        raise PareError(f"the text has {len(ids)} tokens, one row needs {text}", "give more text or a smaller --length")
    rows = np.asarray(ids[: whole * text], dtype=np.int32).reshape(whole, text)
    if text < length:
        rows = np.concatenate([np.full((whole, 1), bos, dtype=np.int32), rows], axis=1)
    if count is not None and count < whole:
        chosen = range(count) if seed is None else np.sort(np.random.RandomState(seed).permutation(whole)[:count])
        rows = rows[list(chosen)]
    return Rows.full(rows)


def split(documents: Sequence[str], parts: dict[str, int]) -> dict[str, list[str]]:
    """Divide the units of the text by their hash, in the given shares: the same unit always falls into the same part.

    If there are many documents (records of a .jsonl, files of a folder), they are the units, otherwise paragraphs are.
    ``parts``: name -> share, in any unit. Returns name -> documents, which may be none.
    """
    bounds, total = {}, 0
    for name, share in parts.items():
        total += share
        bounds[name] = total
    divided: dict[str, list[str]] = {name: [] for name in parts}
    for document in documents:
        separator, of_document = units(document, len(documents))
        pieces: dict[str, list[str]] = {name: [] for name in parts}
        for unit in of_document:
            bucket = int.from_bytes(hashlib.sha256(unit.strip().encode()).digest()[:8]) % total
            pieces[next(n for n, bound in bounds.items() if bucket < bound)].append(unit)
        for name, chosen in pieces.items():
            if chosen:
                divided[name].append(separator.join(chosen) + "\n")
    return divided


def units(document: str, documents: int) -> tuple[str, list[str]]:
    """Return (separator, units) of one of ``documents`` documents: itself if there are many, else its paragraphs."""
    return ("", [document]) if documents >= MANY_DOCUMENTS else paragraphs(document)


def paragraphs(document: str) -> tuple[str, list[str]]:
    """Return (separator, units): paragraphs between blank lines, or lines if the text has no blank lines."""
    separator = "\n\n" if "\n\n" in document.strip() else "\n"
    return separator, [unit for unit in document.split(separator) if unit.strip()]
