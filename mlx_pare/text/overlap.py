"""Refuse texts that overlap: a score on text that was trained on is too good.

Long lines are compared, because a leak is seldom a whole document. A line that occurs in many documents is boilerplate
(a licence, a system message, a footer) and is no leak. Neither is a line that a chat template writes by itself.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence

from ..base.errors import PareError
from .records import LONG_LINE

FEW, MOST = 5, 50  # a line in fewer than FEW documents is never boilerplate, one in MOST documents always is
SHARE = 0.05  # between the two: the share of the documents of those texts that hold the line


def forbid(
    texts: Mapping[str, Sequence[str]], part: Callable[[str], str] = str, framing: Collection[str] = frozenset()
) -> None:
    """Refuse texts that overlap.

    Args:
        texts: name -> its documents.
        part: gives the part that a name belongs to; texts of the same part may overlap.
        framing: lines that count as boilerplate however rare they are (records.Reader.framing).
    Raises:
        PareError: two parts share a rare line, or a document that differs in boilerplate only.
    """
    shared = _shared(texts, part)
    if not shared:
        return
    boilerplate = _frequent(texts, shared) | (framing & shared.keys())
    for line, (one, other) in shared.items():
        if line not in boilerplate:
            raise _overlap(one, other, "paragraph", line)
    _forbid_copies(texts, part, boilerplate)


def _overlap(one: str, other: str, what: str, text: str) -> PareError:
    return PareError(
        f"the {one} text and the {other} text share the {what} {text[:50]!r}...",
        "they must be disjoint: take it out of one of them",
    )


def _lines(document: str) -> Iterator[str]:
    return (stripped for line in document.split("\n") if (stripped := line.strip()))


def _shared(texts: Mapping[str, Sequence[str]], part: Callable[[str], str]) -> dict[str, tuple[str, str]]:
    """Return each long line that two parts share -> the names of two texts that hold it, in the order of the text."""
    seen: dict[str, str] = {}
    shared: dict[str, tuple[str, str]] = {}
    for name, documents in texts.items():
        own = dict.fromkeys(line for document in documents for line in _lines(document) if len(line) >= LONG_LINE)
        for line in own:
            if line in seen and part(seen[line]) != part(name):
                shared.setdefault(line, (seen[line], name))
        seen.update(dict.fromkeys(own, name))
    return shared


def _frequent(texts: Mapping[str, Sequence[str]], lines: Collection[str]) -> set[str]:
    """Return the lines that occur in many documents, or in many paragraphs between blank lines. Copies count once."""
    found: set[str] = set()
    for units in (lambda document: [document], lambda document: document.split("\n\n")):
        within: Counter[str] = Counter()  # line -> number of units that hold it
        beside: Counter[str] = Counter()  # line -> number of units in the texts that hold it
        known: set[str] = set()
        for documents in texts.values():
            every = {unit.strip() for document in documents for unit in units(document)}
            own = {line for unit in every for line in _lines(unit) if line in lines}
            beside.update(dict.fromkeys(own, len(every)))
            within.update(line for unit in every - known for line in {*_lines(unit)} & own)
            known |= every
        found |= {line for line, count in within.items() if count >= min(max(FEW, SHARE * beside[line]), MOST)}
    return found


def _forbid_copies(
    texts: Mapping[str, Sequence[str]], part: Callable[[str], str], boilerplate: Collection[str]
) -> None:
    """Raises PareError if two parts share a document.

    Only documents with boilerplate are compared. Any other shared document was found by its long lines, or has none.
    """
    chosen = {
        name: [document for document in documents if any(line in boilerplate for line in _lines(document))]
        for name, documents in texts.items()
    }
    usual = _frequent(chosen, {line for of in chosen.values() for document in of for line in _lines(document)})
    seen: dict[str, str] = {}
    for name, documents in chosen.items():
        for document in documents:
            rest = "\n".join(line for line in _lines(document) if line not in boilerplate and line not in usual)
            if len(rest) < LONG_LINE:
                continue
            if part(seen.setdefault(rest, name)) != part(name):
                raise _overlap(seen[rest], name, "document", rest)
