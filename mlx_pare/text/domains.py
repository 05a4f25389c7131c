"""Text of several domains with weights: what was asked, the rows of all, the order in which training draws them."""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from pathlib import Path
from typing import Any

import numpy as np

from ..base.errors import PareError, UsageError
from . import corpus, overlap
from .corpus import Rows
from .dividing import divide

SHARES = {"calibration": 80, "validation": 10, "test": 10}  # of a text that the user gives, by paragraph
HELD = {"calibration": 88, "validation": 12}  # where there is a test text beside it
FLOOR = 1e-4  # of the weights, shared evenly at every reweighting: no domain dies out (as in LLM-Shearing's callback)
LEAST, EXTREME = 1e-300, 1e300  # the least share of a weight above 0, and the largest difference of losses, of float64


# ---- what was asked ----


@dataclass(frozen=True)
class Spec:
    """One domain as asked with --data: ``name``, ``path`` and ``weight`` (greater than zero)."""

    name: str
    path: Path
    weight: float = 1.0


def parse(text: str) -> Spec:
    """``[NAME=]PATH[:WEIGHT]`` -> Spec; the name is the file's own without its ending, or the folder's, the weight 1.

    What exists as it was given is a path, whatever it holds of ":" and "=". Raises UsageError for a wrong name or
    weight, PareError when there is nothing.
    """
    name, path, weight = _reading(text)
    return Spec(name or _name(Path(path)), Path(path), 1.0 if weight is None else float(weight))


def absolute(data: str | Sequence[str]) -> str | list[str]:
    """What --data says, one text or several, with absolute paths. Raises as ``parse``."""
    if not isinstance(data, str | Path):
        return [absolute(one) for one in data]
    name, path, weight = _reading(str(data))
    if os.path.isabs(path):
        return str(data)
    named, weighted = "" if name is None else f"{name}=", "" if weight is None else f":{weight}"
    return f"{named}{Path(path).absolute()}{weighted}"


def _reading(text: str) -> tuple[str | None, str, str | None]:
    """(name, path, weight) as they were written."""
    head, _, weight = text.rpartition(":")
    name, _, rest = text.partition("=")
    readings = [(None, text, None), (None, head, weight), (name, rest, None)]
    readings.append((name, head.partition("=")[2], weight))
    there = [reading for reading in readings if reading[1] and os.path.exists(reading[1])]
    wrong = {reading: _wrong(reading, text) for reading in there}
    for reading in there:
        if wrong[reading] is None:
            return reading
    if there:
        raise wrong[there[0]]
    plain = [reading[1] for reading in readings if reading[1] and not _wrong(reading, text)]
    raise PareError(f"no text at {plain[-1] if plain else repr(text)}", corpus.WHAT_TO_GIVE)


def _wrong(reading: tuple[str | None, str, str | None], text: str) -> UsageError | None:
    name, _, weight = reading
    if name is not None and not re.fullmatch(r"[\w.-]+", name):
        return UsageError(f"{name!r} in --data {text} is no name", "use letters, digits, dots, - and _")
    if weight is None:
        return None
    number = float(weight) if re.fullmatch(r"[+-]?(\d+\.?\d*|\.\d+)(e[+-]?\d+)?", weight, re.I | re.A) else math.nan
    if not 0 < number < math.inf:
        return UsageError(f"{weight!r} in --data {text} is no weight", "give a number greater than zero")
    return None


def _name(path: Path) -> str:
    """The name of a domain that nobody named."""
    path = path.resolve()
    return (path.name if path.is_dir() else path.stem) or "data"


def parse_all(texts: str | Path | Sequence[str]) -> list[Spec]:
    """The domains of a run; one, or several of different names and paths. Raises as ``parse``, UsageError otherwise."""
    specs = [parse(str(text)) for text in ([texts] if isinstance(texts, str | Path) else texts)]
    for n, spec in enumerate(specs):
        for other in specs[:n]:
            if spec.path.resolve() == other.path.resolve():
                raise UsageError(f"--data names {spec.path} twice", "give it once, with a weight: PATH:2")
            if spec.name == other.name:
                raise UsageError(
                    f"{other.path} and {spec.path} are both the domain {spec.name!r}",
                    "name them: --data one=PATH --data other=PATH",
                )
    return specs


def read_domains(
    specs: Sequence[Spec], tokenizer: Any = None, field: str | None = None, framing: set[str] | None = None
) -> dict[str, list[str]]:
    """Domain -> its documents. Raises PareError as ``corpus.read``."""
    return {spec.name: corpus.read(spec.path, tokenizer, field, framing) for spec in specs}


def read_parts(
    specs: Sequence[Spec], test: Path | None, tokenizer: Any = None, field: str | None = None,
    length: int | None = None, framing: set[str] | None = None,
) -> dict[str, dict[str, list[str]]]:  # fmt: skip
    """Read domains and divide each by itself, so that it is in each part. No two parts share text.

    Args:
        specs: The domains.
        test: The text of the test part; None: a share of every domain.
        tokenizer: Writes chats, and tells how long texts are.
        field: As ``corpus.read`` takes it.
        length: Tokens of a row. Every part of a domain gets one row if its text allows it.
        framing: Takes the lines of chats that no speaker wrote.

    Returns:
        Part ("calibration", "validation", "test") -> domain -> documents.

    Raises:
        PareError: A text cannot be read, or two parts overlap.
    """
    shares, framing = SHARES if test is None else HELD, set() if framing is None else framing
    divided = {
        name: _divided(of, shares, tokenizer, length)
        for name, of in read_domains(specs, tokenizer, field, framing).items()
    }
    parts = {part: {name: of[part] for name, of in divided.items()} for part in shares}
    if test is not None:
        parts["test"] = {_name(test): corpus.read(test, tokenizer, field, framing)}
    forbid_overlap(parts, framing)
    return parts


def _divided(documents: list[str], shares: dict[str, int], tokenizer: Any, length: int | None) -> dict[str, list[str]]:
    if length is None:
        return divide(documents, shares)
    row = corpus.row_chars(tokenizer, documents, length)
    return divide(documents, shares, lambda part: corpus.enough(tokenizer, part, length), row)


def forbid_overlap(parts: Mapping[str, Mapping[str, Sequence[str]]], framing: Collection[str] = frozenset()) -> None:
    """Raises PareError when two parts overlap, be it in different domains; within a part they may."""
    labels = {
        (part if len(of) == 1 else f"{part} ({name})"): (part, of[name]) for part, of in parts.items() for name in of
    }
    overlap.forbid({label: of for label, (_, of) in labels.items()}, lambda label: labels[label][0], framing)


# ---- rows of all domains ----


@dataclass(frozen=True)
class Domains:
    """Rows of several domains, mixed by weight so that the first n of them are a fair sample for any n.

    ``weights`` by name, in the order of the numbers; ``of`` int [rows]: the domain of each row.
    """

    rows: Rows
    weights: dict[str, float]
    of: np.ndarray

    @classmethod
    def of_one(cls, rows: Rows | Domains) -> Domains:
        """Rows as one domain."""
        return rows if isinstance(rows, Domains) else cls(rows, {"text": 1.0}, np.zeros(rows.count, dtype=np.int64))

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self.weights)

    def part(self, name: str) -> Rows:
        """The rows of one domain."""
        return self.rows.take(self.of == self.names.index(name))

    def lot(self, seed: int) -> np.ndarray:
        """The numbers of the rows in an order drawn by lot within every domain: the first n are those that ``mix``
        chooses with this seed from the same text."""
        order = np.empty(len(self.of), dtype=np.int64)
        for number in range(len(self.names)):
            places = np.flatnonzero(self.of == number)
            order[places] = places[np.random.RandomState(seed).permutation(len(places))]
        return order

    def digest(self) -> str:
        """Of the rows alone where there is one domain, else also of what domain each is, and the weights."""
        if len(self.names) == 1:
            return self.rows.digest()
        about = json.dumps([self.rows.digest(), self.weights, self.of.tolist()])
        return hashlib.sha256(about.encode()).hexdigest()


def windows(
    tokenizer: Any, part: str, documents: Mapping[str, Sequence[str]], weights: Mapping[str, float], length: int,
    count: int | None = None, seed: int | None = None,
) -> Domains:  # fmt: skip
    """Domain -> documents of a part as rows of ``length`` tokens, mixed as ``mix`` says; a domain that has no weight
    has 1. Raises PareError where a domain has not one row, naming it and the part."""
    found: dict[str, Rows] = {}
    for name, of in documents.items():
        try:
            found[name] = corpus.windows(tokenizer, of, length)
        except PareError as error:
            where = part if len(documents) == 1 else f"{part} of {name}"
            raise PareError(
                f"{where}: {error.problem}", f"{error.cure}: calibration, validation and test take a row each"
            ) from error
    try:
        return mix(found, {name: weights.get(name, 1.0) for name in found}, count, seed)
    except PareError as error:
        raise PareError(f"{part}: {error.problem}", error.cure) from error


def mix(
    parts: Mapping[str, Rows], weights: Mapping[str, float], count: int | None = None, seed: int | None = None
) -> Domains:
    """All rows of every domain -> Domains of ``count`` rows, or all there are, shared by weight (float > 0).

    Each domain has one at least; what a short one lacks, the others give. The rows of a domain are its first, or with a
    ``seed`` a choice by lot in the order of the text: with one domain those of ``corpus.windows``. Raises PareError
    when there are more domains than rows asked for.
    """
    if count is not None and count < len(parts):
        raise PareError(f"{count} rows are too few for {len(parts)} domains", "ask for more, e.g. with --samples")
    sizes = [rows.count for rows in parts.values()]
    of = _shared(sizes, _shares({name: weights[name] for name in parts}), sum(sizes) if count is None else count)
    chosen, start = np.empty(len(of), dtype=np.int64), 0
    for number, size in enumerate(sizes):
        places = np.flatnonzero(of == number)
        lot = np.arange(size) if seed is None else np.random.RandomState(seed).permutation(size)
        chosen[places] = start + np.sort(lot[: len(places)])
        start += size
    rows = reduce(Rows.joined, parts.values()).take(chosen)
    return Domains(rows, {name: float(weights[name]) for name in parts}, of)


def _shared(sizes: Sequence[int], shares: np.ndarray, count: int) -> np.ndarray:
    """int [min(count, all)]: the domain of each row: first each once, then whose turn it is, until it has no more."""
    if len(sizes) == 1:
        return np.zeros(min(count, sizes[0]), dtype=np.int64)
    left, credits, order = np.array(sizes), np.zeros(len(sizes)), []
    for n in range(min(count, sum(sizes))):
        among = left > 0 if n >= len(sizes) else left == sizes
        having = np.where(left > 0, shares, 0.0)
        order.append(_turn(credits, having / having.sum(), among))
        left[order[-1]] -= 1
    return np.array(order, dtype=np.int64)


def _shares(weights: Mapping[str, float]) -> np.ndarray:
    """float64 [domains], of sum 1. Raises PareError for weights that are no shares."""
    given = np.array(list(weights.values()), dtype=np.float64)
    if not len(given) or not np.isfinite(given).all() or (given < 0).any() or not given.any():
        raise PareError(f"{dict(weights)} are no weights", "give numbers that are not negative, one above zero")
    shares = np.where(given > 0, np.maximum(given / given.max(), LEAST), 0.0)  # the sum of those given may overflow
    return shares / shares.sum()


def _turn(credits: np.ndarray, shares: np.ndarray, among: np.ndarray) -> int:
    """Whose turn it is: always who is furthest behind its share (smooth weighted round robin, as in nginx). Both
    float64 [domains]; ``credits``, rows that are due, change in place. Where all are ``among`` those to choose from,
    nobody is ever ahead by a whole row."""
    credits += shares
    number = int(np.argmax(np.where(among, credits, -np.inf)))
    credits[number] -= 1.0
    return number


# ---- drawing ----


def reweighted(
    weights: Mapping[str, float], losses: Mapping[str, float], reference: Mapping[str, float]
) -> dict[str, float]:
    """Weights after dynamic batch loading: w * exp(loss - reference), of sum 1, of which FLOOR is shared evenly.

    Sheared LLaMA (Xia et al. 2023), algorithm 1 with the difference as it is, as in LLM-Shearing's
    callbacks/dynamic_loading_callback.py (the paper cuts it at 0). Losses in nats per token, of any size; a weight of 0
    stays 0. Raises PareError for a loss that is missing or not finite.
    """
    names = [name for name, weight in weights.items() if weight > 0]
    for name in names:
        for what, of in (("loss", losses), ("reference loss", reference)):
            if not math.isfinite(of.get(name, math.nan)):
                raise PareError(f"the {what} of the domain {name!r} is {of.get(name, 'missing')}")
    shares = _shares({name: weights[name] for name in names})
    with np.errstate(over="ignore"):
        gain = np.array([losses[n] for n in names], np.float64) - np.array([reference[n] for n in names], np.float64)
    logs = np.log(shares) + np.clip(gain, -EXTREME, EXTREME)
    new = np.exp(logs - logs.max())
    new = (1 - FLOOR) * (new / new.sum()) + FLOOR / len(names)
    return {name: 0.0 for name in weights} | dict(zip(names, (new / new.sum()).tolist(), strict=True))


class Sampler:
    """Draws batches of row numbers, endlessly: the domain by weight, no row of it twice before each was drawn once.

    ``of`` int [rows]: the domain of each row, by its number among ``weights`` (by name). Which domain is next is not
    left to chance but to whose turn it is, so any batch has the mix. The order within a domain is drawn anew for every
    epoch from (seed, domain, epoch) alone. A batch larger than the rows is cut to them. Raises PareError for a domain
    that has weight but no rows.
    """

    def __init__(self, of: np.ndarray, weights: Mapping[str, float], batch: int, seed: int = 0):
        of = np.asarray(of)
        self.names, self._shares = tuple(weights), _shares(weights)
        self._rows = [np.flatnonzero(of == number) for number in range(len(self.names))]
        sizes = {name: len(rows) for name, rows in zip(self.names, self._rows, strict=True)}
        if sum(sizes.values()) != len(of):
            raise PareError(f"rows of {len(set(of.tolist()))} domains and weights of {len(self.names)}")
        for name, share in zip(self.names, self._shares, strict=True):
            if share > 0 and not sizes[name]:
                raise PareError(f"the domain {name!r} has no rows to draw from", "give it more text, or leave it out")
        open_rows = sum(len(rows) for rows, share in zip(self._rows, self._shares, strict=True) if share > 0)
        self.batch = min(batch, open_rows)
        self._about = {"seed": seed, "batch": self.batch, "rows": sizes}
        self._credits = np.zeros(len(self.names))
        self._drawn = [0] * len(self.names)  # rows of each domain so far: says epoch and place
        self._orders: dict[int, tuple[int, np.ndarray]] = {}

    @property
    def weights(self) -> dict[str, float]:
        """By name, of sum 1."""
        return dict(zip(self.names, self._shares.tolist(), strict=True))

    def draw(self) -> np.ndarray:
        """int64 [batch]: the numbers of the next rows."""
        return np.array([self._next() for _ in range(self.batch)], dtype=np.int64)

    def _next(self) -> int:
        number = _turn(self._credits, self._shares, self._shares > 0)
        epoch, place = divmod(self._drawn[number], len(self._rows[number]))
        if self._orders.get(number, (None,))[0] != epoch:
            lot = np.random.RandomState([self._about["seed"], number, epoch])
            self._orders[number] = epoch, lot.permutation(len(self._rows[number]))
        self._drawn[number] += 1
        return int(self._rows[number][self._orders[number][1][place]])

    def reweight(self, losses: Mapping[str, float], reference: Mapping[str, float]) -> dict[str, float]:
        """Draw more where more is left to learn, from here on: the new weights, see ``reweighted``."""
        new = reweighted(self.weights, losses, reference)
        self._shares = np.array(list(new.values()))
        return new

    def state(self) -> dict[str, Any]:
        """Everything that the next draws depend on, for JSON."""
        drawn, due = (dict(zip(self.names, of, strict=True)) for of in (self._drawn, self._credits.tolist()))
        return {**self._about, "weights": self.weights, "drawn": drawn, "due": due}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on as from ``state()``. Raises PareError for the state of other rows, another batch or seed, or a damaged
        one."""
        for key, own in self._about.items():
            if state.get(key) != own:
                raise PareError(f"the place in the data belongs to other data: {key} was {state.get(key)}, now {own}")
        try:
            weights, drawn, due = ([state[key][name] for name in self.names] for key in ("weights", "drawn", "due"))
            sound = all(type(n) is int and n >= 0 for n in drawn) and np.isfinite([*weights, *due]).all()
        except (KeyError, TypeError) as error:
            raise PareError(f"the place in the data is damaged: {error}") from error
        if not sound or min(weights) < 0 or not any(weights):
            raise PareError("the place in the data is damaged: its numbers cannot be")
        self._shares, self._drawn, self._credits = np.array(weights), drawn, np.array(due, dtype=np.float64)
