"""Divide a text into parts, each with enough text for one row if possible.

The hash of a unit chooses its part, so a unit stays there whatever else the text holds (corpus.split). That may leave
a part of a short text empty. Only then are the same units dealt out by size. If that does not suffice, long paragraphs
are cut between sentences, words or characters, and the pieces of a few rows each are dealt out.
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
Enough = Callable[[Sequence[str]], bool]  # tells whether documents make one row

# Where to cut a paragraph: at the first of these kinds of places that exists nearby
ENDS = (re.compile(r"\n"), re.compile(r"[.!?]['\")\]]*\s|[。！？]"), re.compile(r"\s"))
LARGER = (1, 2, 4)  # pieces are tried in these multiples of a row


def divide(documents: Sequence[str], shares: dict[str, int], enough: Enough | None = None, row: int = 0) -> Parts:
    """Divide documents into parts that share no unit.

    Args:
        documents: the text.
        shares: part -> its share of the text, in any unit.
        enough: tells whether documents make one row; None: the text is divided by hash alone.
        row: characters that make one row (corpus.row_chars).
    Returns:
        Part -> documents. If no division gives every part a row, this is the division by hash.
    Raises:
        PareError: the division by hash leaves a part without a row, and the text repeats one paragraph.
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
    """Deal out the units of ``corpus.split`` by size."""
    divided = [corpus.units(document, len(documents)) for document in documents]
    side = _deal([unit.strip() for _, units in divided for unit in units], shares, row)
    parts: Parts = {name: [] for name in shares}
    for separator, units in divided:
        for name in parts:
            if chosen := [unit for unit in units if side[unit.strip()] == name]:
                parts[name].append(separator.join(chosen) + "\n")
    return parts


def _cut(documents: Sequence[str], shares: dict[str, int], size: int) -> Parts:
    """Deal out paragraphs by size, long ones in pieces of about ``size`` characters.

    Equal paragraphs are cut in the same way, so no two parts hold the same piece. Neighbours of one part stay together.
    """
    divided = [list(_pieces_of(document, size)) for document in documents]
    side = _deal([piece.strip() for pieces in divided for piece, _ in pieces], shares, size)
    parts: Parts = {name: [] for name in shares}
    for pieces in divided:
        for name, neighbours in groupby(pieces, lambda piece: side[piece[0].strip()]):
            parts[name].append("".join(piece + end for piece, end in neighbours).strip() + "\n")
    return parts


def _pieces_of(document: str, size: int) -> Iterator[tuple[str, str]]:
    """Yield (piece, separator between it and the next one)."""
    separator, paragraphs = corpus.paragraphs(document)
    for paragraph in paragraphs:
        *pieces, last = _pieces(paragraph, size)
        yield from ((piece, "") for piece in pieces)
        yield last, separator


def _deal(units: Sequence[str], shares: dict[str, int], least: int) -> dict[str, str]:
    """Return unit -> its part.

    Every part except the largest takes units in the order of their hashes. It stops at its share of the characters, or
    at ``least`` if that is more. It takes no unit of more than twice that amount if it has a choice.
    """
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
    """Yield a paragraph in pieces of about ``size`` characters, each cut at the best place nearby."""
    start = 0
    while len(paragraph) - start > size * 1.5:
        begin, middle, end = (start + size * halves // 2 for halves in (1, 2, 3))
        places = ([found.end() for found in kind.finditer(paragraph, begin, end)] for kind in ENDS)
        cut = next((min(found, key=lambda place: abs(place - middle)) for found in places if found), middle)
        yield paragraph[start:cut]
        start = cut
    yield paragraph[start:]
