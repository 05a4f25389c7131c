"""Text of several domains with weights: parsing --data, mixing the rows, and the order in which training draws them."""

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

SHARES = {"calibration": 80, "validation": 10, "test": 10}  # shares of a text that the user gives, by paragraph
HELD = {"calibration": 88, "validation": 12}  # shares if there is a separate test text
FLOOR = 1e-4  # share of the weights spread evenly at each reweighting: no domain dies out (as in LLM-Shearing)
LEAST, EXTREME = 1e-300, 1e300  # float64: the least share of a weight above 0; the largest loss difference


# ---- what was asked ----


@dataclass(frozen=True)
class Spec:
    """One domain as asked with --data: ``name``, ``path`` and ``weight`` (greater than zero)."""

    name: str
    path: Path
    weight: float = 1.0


def parse(text: str) -> Spec:
    """Parse ``[NAME=]PATH[:WEIGHT]``. Defaults: the name of the file without its suffix, or of the folder; weight 1.

    A text that exists as a path is one, even with ":" or "=" in it. Raises UsageError for a wrong name or weight,
    PareError if nothing exists there.
    """
    name, path, weight = _reading(text)
    return Spec(name or _name(Path(path)), Path(path), 1.0 if weight is None else float(weight))


def absolute(data: str | Sequence[str]) -> str | list[str]:
    """Make the paths in --data, one text or several, absolute. Raises as ``parse``."""
    if not isinstance(data, str | Path):
        return [absolute(one) for one in data]
    name, path, weight = _reading(str(data))
    if os.path.isabs(path):
        return str(data)
    named, weighted = "" if name is None else f"{name}=", "" if weight is None else f":{weight}"
    return f"{named}{Path(path).absolute()}{weighted}"


def _reading(text: str) -> tuple[str | None, str, str | None]:
    """Return (name, path, weight) as written."""
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
    """Return the default name of a domain."""
    path = path.resolve()
    return (path.name if path.is_dir() else path.stem) or "data"


def parse_all(texts: str | Path | Sequence[str]) -> list[Spec]:
    """Parse the domains of a run. Raises as ``parse``, and UsageError if two have the same name or path."""
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
    """Read domain -> documents. Args: the domains; the others, and PareError, as for ``corpus.read``."""
    return {spec.name: corpus.read(spec.path, tokenizer, field, framing) for spec in specs}


def read_parts(
    specs: Sequence[Spec], test: Path | None, tokenizer: Any = None, field: str | None = None,
    length: int | None = None, framing: set[str] | None = None,
) -> dict[str, dict[str, list[str]]]:  # fmt: skip
    """Read domains and divide each by itself, so that it is in each part. No two parts share text.

    Args:
        specs: the domains.
        test: text of the test part; None: a share of every domain.
        tokenizer, field, framing: as for ``corpus.read``.
        length: tokens of a row; each part of a domain gets a row if its text allows it. None: divide by hash alone.
    Returns:
        Part ("calibration", "validation", "test") -> domain -> documents.
    Raises:
        PareError: a text cannot be read, or two parts overlap.
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
    """Raises PareError if two parts overlap, even in different domains. Domains of one part may overlap."""
    labels = {
        (part if len(of) == 1 else f"{part} ({name})"): (part, of[name]) for part, of in parts.items() for name in of
    }
    overlap.forbid({label: of for label, (_, of) in labels.items()}, lambda label: labels[label][0], framing)


# ---- rows of all domains ----


@dataclass(frozen=True)
class Domains:
    """Rows of several domains, mixed by weight: for any n the first n are a fair sample.

    ``weights``: by name, in the order of the domain numbers. ``of``: int64 [rows], domain number of each row.
    """

    rows: Rows
    weights: dict[str, float]
    of: np.ndarray

    @classmethod
    def of_one(cls, rows: Rows | Domains) -> Domains:
        """Make rows [rows, length] one domain. Args: the rows; Domains are returned as they are."""
        return rows if isinstance(rows, Domains) else cls(rows, {"text": 1.0}, np.zeros(rows.count, dtype=np.int64))

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self.weights)

    def part(self, name: str) -> Rows:
        """Take the rows of one domain. Args: its name. Returns: int32 [rows of it, length]."""
        return self.rows.take(self.of == self.names.index(name))

    def lot(self, seed: int) -> np.ndarray:
        """Order the row numbers by lot within each domain; the first n are those that ``mix`` chooses with this seed.

        Args:
            seed: seed of the lot.
        Returns:
            int64 [rows].
        """
        order = np.empty(len(self.of), dtype=np.int64)
        for number in range(len(self.names)):
            places = np.flatnonzero(self.of == number)
            order[places] = places[np.random.RandomState(seed).permutation(len(places))]
        return order

    def digest(self) -> str:
        """Hash the rows; if there are several domains, also the domain of each row and the weights."""
        if len(self.names) == 1:
            return self.rows.digest()
        about = json.dumps([self.rows.digest(), self.weights, self.of.tolist()])
        return hashlib.sha256(about.encode()).hexdigest()


def windows(
    tokenizer: Any, part: str, documents: Mapping[str, Sequence[str]], weights: Mapping[str, float], length: int,
    count: int | None = None, seed: int | None = None,
) -> Domains:  # fmt: skip
    """Cut the documents of a part into rows, mixed as by ``mix``.

    Args:
        tokenizer, length: as for ``corpus.windows``.
        part: its name, for errors.
        documents: domain -> documents.
        weights: domain -> weight; 1 for a domain that has none.
        count, seed: as for ``mix``.
    Raises:
        PareError: as ``mix``, or a domain has not one row; the message names it and the part.
    """
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
    """Mix rows of all domains by weight. Each domain gives at least one row; others replace what a short one lacks.

    Args:
        parts: domain -> all its rows; all of one length.
        weights: domain -> weight, a float > 0.
        count: rows of the result; None: all.
        seed: of a choice by lot within a domain, in the order of the text as in ``corpus.windows``; None: its first.
    Raises:
        PareError: there are more domains than ``count``, or the weights are no weights.
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
    """Return int64 [min(count, all)], the domain of each row: each once, then by turns until a domain has no more."""
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
    """Return float64 [domains] with sum 1. Raises PareError if a weight is negative or not finite, or all are 0."""
    given = np.array(list(weights.values()), dtype=np.float64)
    if not len(given) or not np.isfinite(given).all() or (given < 0).any() or not given.any():
        raise PareError(f"{dict(weights)} are no weights", "give numbers that are not negative, one above zero")
    shares = np.where(given > 0, np.maximum(given / given.max(), LEAST), 0.0)  # their own sum may overflow
    return shares / shares.sum()


def _turn(credits: np.ndarray, shares: np.ndarray, among: np.ndarray) -> int:
    """Return the domain furthest behind its share (smooth weighted round robin, as in nginx).

    ``credits`` (rows due, changed in place) and ``shares``: float64 [domains]; ``among``: bool [domains], the choice.
    If all may be chosen, no domain is ever ahead by a whole row.
    """
    credits += shares
    number = int(np.argmax(np.where(among, credits, -np.inf)))
    credits[number] -= 1.0
    return number


# ---- drawing ----


def reweighted(
    weights: Mapping[str, float], losses: Mapping[str, float], reference: Mapping[str, float]
) -> dict[str, float]:
    """Reweight by dynamic batch loading: w * exp(loss - reference), scaled to sum 1; FLOOR of it is shared evenly.

    Algorithm 1 of Sheared LLaMA (Xia et al. 2023). The difference may be negative, as in LLM-Shearing's
    callbacks/dynamic_loading_callback.py (the paper cuts it at 0).

    Args:
        weights: domain -> weight; a weight of 0 stays 0.
        losses, reference: domain -> loss in nats per token, of any size.
    Raises:
        PareError: a loss is missing or not finite.
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
    """Draws batches of row numbers, endlessly: domains by weight, each row of a domain once per epoch.

    ``of``: int [rows], domain number of each row, in the order of ``weights`` (by name). Domains take turns and are not
    drawn by chance, so any batch has the mix. The order within a domain depends on (seed, domain, epoch) alone. A batch
    has at most as many rows as the domains with weight. Raises PareError if a domain has weight but no rows.
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
        self._drawn = [0] * len(self.names)  # rows of each domain so far: gives epoch and place
        self._orders: dict[int, tuple[int, np.ndarray]] = {}

    @property
    def weights(self) -> dict[str, float]:
        """Weights by name, with sum 1."""
        return dict(zip(self.names, self._shares.tolist(), strict=True))

    def draw(self) -> np.ndarray:
        """Draw the next batch. Returns: int64 [batch], row numbers."""
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
        """From now on draw more from domains with more left to learn; returns the new weights, see ``reweighted``."""
        new = reweighted(self.weights, losses, reference)
        self._shares = np.array(list(new.values()))
        return new

    def state(self) -> dict[str, Any]:
        """Return everything that the next draws depend on, for JSON."""
        drawn, due = (dict(zip(self.names, of, strict=True)) for of in (self._drawn, self._credits.tolist()))
        return {**self._about, "weights": self.weights, "drawn": drawn, "due": due}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Continue from ``state()``. Raises PareError if it is damaged, or of other rows, another batch or seed."""
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
