"""A text divided into parts, each of which has enough for one row if the text allows it.

Every unit falls on a side by its own hash, so that it stays there whatever else the text holds (corpus.split). That may
leave a part of a short text empty. Only then the same units are dealt out by size, and if that does not suffice, long
paragraphs in pieces of a few rows each, cut between sentences, words or characters.
"""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from itertools import groupby

from ..base.errors import PareError
from . import corpus

Parts = dict[str, list[str]]
Enough = Callable[[Sequence[str]], bool]  # whether documents make one row

# Where a paragraph is best cut: at the first kind of place that there is near by
ENDS = (re.compile(r"\n"), re.compile(r"[.!?]['\")\]]*\s|[。！？]"), re.compile(r"\s"))
LARGER = (1, 2, 4)  # pieces are tried in these multiples of a row


def divide(documents: Sequence[str], shares: dict[str, int], enough: Enough | None = None, row: int = 0) -> Parts:
    """Divide documents into parts that share no unit.

    Args:
        documents: The text.
        shares: Part -> its share of the text, in any unit.
        enough: Tells whether documents make one row. Without it the text is divided by hash alone.
        row: Characters that certainly make one row.

    Returns:
        Part -> documents. If no division gives every part a row, it is the one by hash.

    Raises:
        PareError: The text is one paragraph again and again, so that its parts would be the same.
    """
    parts = corpus.split(documents, shares)
    if enough is None or all(map(enough, parts.values())):
        return parts
    _forbid_repetition(documents)
    for found in (_dealt(documents, shares, row), *(_cut(documents, shares, row * times) for times in LARGER)):
        if all(map(enough, found.values())):
            return found
    return parts


def _forbid_repetition(documents: Sequence[str]) -> None:
    units = [unit.strip() for document in documents for unit in corpus.paragraphs(document)[1]]
    if len(units) > 1 and len(set(units)) == 1:
        raise PareError(
            f"the text is one paragraph {len(units)} times, {units[0][:50]!r}...: no part can be kept to measure on",
            "give text that says more than one thing",
        )


def _dealt(documents: Sequence[str], shares: dict[str, int], row: int) -> Parts:
    """The units of ``corpus.split``, dealt out by size."""
    divided = [corpus.units(document, len(documents)) for document in documents]
    side = _deal([unit.strip() for _, units in divided for unit in units], shares, row)
    parts: Parts = {name: [] for name in shares}
    for separator, units in divided:
        for name in parts:
            if chosen := [unit for unit in units if side[unit.strip()] == name]:
                parts[name].append(separator.join(chosen) + "\n")
    return parts


def _cut(documents: Sequence[str], shares: dict[str, int], size: int) -> Parts:
    """Paragraphs, long ones in pieces of about ``size`` characters, dealt out by size. A paragraph that is there twice
    is cut twice in the same way, so that no part holds what another one does. Neighbours of one part stay together."""
    divided = [list(_pieces_of(document, size)) for document in documents]
    side = _deal([piece.strip() for pieces in divided for piece, _ in pieces], shares, size)
    parts: Parts = {name: [] for name in shares}
    for pieces in divided:
        for name, neighbours in groupby(pieces, lambda piece: side[piece[0].strip()]):
            parts[name].append("".join(piece + end for piece, end in neighbours).strip() + "\n")
    return parts


def _pieces_of(document: str, size: int) -> Iterator[tuple[str, str]]:
    """(piece, what stands between it and the next one)."""
    separator, paragraphs = corpus.paragraphs(document)
    for paragraph in paragraphs:
        *pieces, last = _pieces(paragraph, size)
        yield from ((piece, "") for piece in pieces)
        yield last, separator


def _deal(units: Sequence[str], shares: dict[str, int], least: int) -> dict[str, str]:
    """Unit -> its part. Every part but the largest takes units in the order of their hashes until it has its share of
    the characters, or the ``least`` if that is more. It takes none that is much larger than that if it has a choice."""
    times, (*small, large) = Counter(units), sorted(shares, key=shares.__getitem__)
    size = {unit: len(unit) * count for unit, count in times.items()}
    left = sorted(times, key=lambda unit: hashlib.sha256(unit.encode()).digest())
    side: dict[str, str] = {}
    for name in small:
        due, had = max(sum(size.values()) * shares[name] / sum(shares.values()), least), 0
        for unit in [unit for unit in left if size[unit] <= 2 * due] or sorted(left, key=size.__getitem__)[:1]:
            if had < due:
                side[unit] = name
                had += size[unit]
        left = [unit for unit in left if unit not in side]
    return side | dict.fromkeys(left, large)


def _pieces(paragraph: str, size: int) -> Iterator[str]:
    """A paragraph in pieces of about ``size`` characters, each cut at the best place near that."""
    start = 0
    while len(paragraph) - start > size * 1.5:
        begin, middle, end = (start + size * halves // 2 for halves in (1, 2, 3))
        places = ([found.end() for found in kind.finditer(paragraph, begin, end)] for kind in ENDS)
        cut = next((min(found, key=lambda place: abs(place - middle)) for found in places if found), middle)
        yield paragraph[start:cut]
        start = cut
    yield paragraph[start:]
