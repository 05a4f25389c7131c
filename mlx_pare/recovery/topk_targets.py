"""A teacher's targets on disk: its most likely tokens and the mass of the rest, so that no teacher is in memory later.

    DIR/targets.json     their model, data, k and temperature: written first
    DIR/part-00000.bin   a record for every valid token of some rows (no padding), then a sha256 of it and targets.json

The records are those of target_records.py.
"""

from __future__ import annotations

import hashlib
import json
import math
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from ..base import machine
from ..base.console import progress
from ..base.errors import PareError, Refused, UsageError, shell
from ..base.units import gb
from ..evaluation.divergence import TOKENS_AT_ONCE
from ..model.checkpoint import Checkpoint
from ..store import step_files
from ..store.atomic import replace_file, sweep
from ..stream import batches, head, memory, walk as stream
from ..text.corpus import Extent, Rows
from .target_records import Top, pack, record, unpack

SCHEMA = 1
PART_TOKENS = 16384  # a kill of the head loses these at most; small enough for any memory, large enough for few files
PARTS_AT_ONCE = 8  # walked together if memory suffices: a kill of the walk loses these at most
SEAL = 32  # bytes of the sha256 after the records of a part


@dataclass(frozen=True)
class Targets:
    """Finished targets of ``rows`` in ``directory``; ``about`` is the content of targets.json."""

    directory: Path
    rows: Rows
    about: dict[str, Any]

    @classmethod
    def open(cls, directory: Path, rows: Rows) -> Targets:
        """Open finished targets, without the teacher.

        Args:
            directory: what ``collect`` wrote.
            rows: the rows that it was made of.

        Returns:
            The targets.

        Raises:
            PareError: they are missing, unfinished or damaged.
            Refused: they are of other rows.
        """
        about = _about(directory)
        if about is None:
            raise PareError(f"no targets at {directory}", "collect them first")
        if about["data"] != rows.digest():
            raise Refused(f"{directory} holds targets of other rows", "collect them of these into another directory")
        targets = cls(directory, rows, about)
        if missing := targets.missing():
            raise PareError(f"{directory} lacks {len(missing)} of {targets.parts} parts", "collect again: it goes on")
        return targets

    @property
    def record(self) -> np.dtype:
        return record(self.about["k"], self.about["vocab"])

    @property
    def bytes_per_token(self) -> int:
        return self.record.itemsize

    @property
    def nbytes(self) -> int:
        """Bytes of all parts on disk."""
        return self.rows.total * self.bytes_per_token + self.parts * SEAL

    @property
    def parts(self) -> int:
        return -(-self.rows.count // self.about["rows_per_part"])

    def file(self, part: int) -> Path:
        return self.directory / f"part-{part:05d}.bin"

    def rows_of(self, part: int) -> slice:
        each = self.about["rows_per_part"]
        return slice(part * each, min((part + 1) * each, self.rows.count))

    def tokens_of(self, part: int) -> int:
        return int(self.rows.lengths[self.rows_of(part)].sum())

    def batch(self, numbers: Sequence[int] | np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Read the targets of some rows alone. Numbers at padding are finite and mean nothing: leave them out.

        Args:
            numbers: row numbers int [b]. A number that does not exist raises UsageError.
        Returns:
            (ids int32 [b, length, k], log_p float32 [b, length, k], log_tail float32 [b, length]).
        """
        numbers = np.asarray(numbers, dtype=np.int64)
        if numbers.size and not 0 <= numbers.min() <= numbers.max() < self.rows.count:
            raise UsageError(f"there are targets of {self.rows.count} rows, not of row {numbers.max()}")
        starts = np.cumsum(self.rows.lengths, dtype=np.int64) - self.rows.lengths
        place = np.arange(self.rows.length)
        valid = place < self.rows.lengths[numbers, None]
        found = np.zeros((len(numbers), self.rows.length, self.bytes_per_token), np.uint8)
        part_of = numbers // self.about["rows_per_part"]
        for part in np.unique(part_of):
            mine = valid & (part_of == part)[:, None]
            if mine.any():
                at = (starts[numbers, None] + place - starts[self.rows_of(part).start])[mine]
                shape = (self.tokens_of(part), self.bytes_per_token)
                found[mine] = np.memmap(self.file(part), np.uint8, "r", shape=shape)[at]
        return unpack(found.view(self.record)[..., 0])

    def write(self, part: int, records: np.ndarray) -> None:
        """Store the records of a part, whole or not at all.

        Args:
            part: its number.
            records: [valid tokens], as ``pack`` gives them.
        """
        data = records.tobytes()
        replace_file(self.file(part), data + self._seal(part, data))

    def missing(self) -> list[int]:
        """The parts that are not there yet. Raises PareError if one is damaged, or belongs to other targets."""
        return [part for part in range(self.parts) if not self._whole(part)]

    def _whole(self, part: int) -> bool:
        file = self.file(part)
        if not file.exists():
            return False
        size, wanted = file.stat().st_size, self.tokens_of(part) * self.bytes_per_token + SEAL
        problem = f"has {size} bytes instead of {wanted}" if size != wanted else None
        if problem is None:
            data = np.memmap(file, np.uint8, "r")
            problem = "is damaged" if self._seal(part, data[:-SEAL]) != data[-SEAL:].tobytes() else None
        if problem:
            raise PareError(f"{file} {problem}", "delete it and collect again: only this part is made again")
        return True

    def _seal(self, part: int, data: bytes | np.ndarray) -> bytes:
        """Hash a part with targets.json and its number, so that no part of other targets is taken for it."""
        digest = hashlib.sha256(f"{json.dumps(self.about, sort_keys=True)} {part}".encode())
        digest.update(data)
        return digest.digest()


def _about(directory: Path) -> dict[str, Any] | None:
    note = directory / "targets.json"
    if not note.exists():
        return None
    about = step_files.note(note)
    try:
        if about["schema"] != SCHEMA:
            raise PareError(f"{note} has schema {about['schema']}, this version reads {SCHEMA}", "collect them again")
        record(about["k"], about["vocab"])
        return about | {"rows_per_part": int(about["rows_per_part"]), "data": str(about["data"])}
    except (ValueError, KeyError, TypeError, UsageError) as error:
        raise PareError(f"{note} is damaged", f"delete {shell(directory)} and collect again") from error


def collect(
    teacher: Path,
    rows: Rows,
    out: Path,
    k: int = 64,
    temperature: float = 1.0,
    disk_budget: int | None = None,
    memory_cap: int | None = None,
) -> Targets:
    """Run the teacher once over ``rows`` and write its targets into ``out``, part by part; a killed pass is continued.

    The bytes do not depend on the memory: parts always have the same rows in the same micro-batches.

    Args:
        teacher: directory of the model.
        rows: token rows.
        out: directory of the targets.
        k: how many of the most likely tokens are stored.
        temperature: divides the logits.
        disk_budget: bytes that all targets may take; None: only the free disk limits them.
        memory_cap: bytes; the rows go through the model in as many turns as it takes; None: the memory that is free.
    Returns:
        The finished targets.
    Raises:
        UsageError: k, the temperature or the tokens are out of range.
        Refused: ``out`` holds other targets, or disk or memory do not suffice.
        PareError: a part is damaged, or the teacher answers NaN or infinity.
    """
    checkpoint = Checkpoint(teacher)
    targets = _begin(checkpoint, rows, out, k, temperature)
    missing = targets.missing()
    left = sum(targets.tokens_of(part) * targets.bytes_per_token + SEAL for part in missing)
    _check_disk(targets, left, disk_budget)
    if missing:
        _check_memory(targets, checkpoint, missing[:1], memory_cap)
    out.mkdir(parents=True, exist_ok=True)
    sweep(out)
    replace_file(out / "targets.json", (json.dumps(targets.about, indent=1, sort_keys=True) + "\n").encode())
    while missing:
        some = _at_once(targets, checkpoint, missing, memory_cap)
        _collect(targets, teacher, some)
        missing = missing[len(some) :]
    return targets


def _begin(checkpoint: Checkpoint, rows: Rows, out: Path, k: int, temperature: float) -> Targets:
    """Prepare targets without writing anything. Raises UsageError and Refused as ``collect``."""
    vocab = checkpoint.arch.sizes["vocab"]
    record(k, vocab)
    if not 0 < temperature < math.inf:
        raise UsageError(f"a temperature of {temperature} cannot be", "choose one above 0, like 1")
    if rows.total == 0 or rows.tokens.max() >= vocab:
        raise UsageError(
            f"the data holds {rows.total} tokens up to {rows.tokens.max(initial=0)}, the model knows {vocab}"
        )
    about = {"schema": SCHEMA, "model": checkpoint.identity(), "data": rows.digest(), "vocab": vocab, "k": k}
    about |= {"temperature": float(temperature), "rows_per_part": _rows_per_part(rows)}
    if out.exists() and not out.is_dir():
        raise Refused(f"{out} exists and is not a directory", "choose another place")
    before = _about(out)
    if before is not None and before != about:
        differs = ", ".join(name for name in about if before.get(name) != about[name])
        raise Refused(f"{out} holds targets made differently ({differs})", "choose another place, or delete it")
    return Targets(out, rows, about)


def _rows_per_part(rows: Rows | Extent) -> int:
    step = batches.micro_batch(rows)
    return step * max(1, PART_TOKENS // (step * rows.length))


def least_bytes(checkpoint: Checkpoint, rows: Rows | Extent) -> int:
    """Estimate the least memory that ``collect`` takes, a part at a time.

    Args:
        checkpoint: the teacher.
        rows: token rows, or their number and length.
    Returns:
        Bytes.
    """
    part = Extent(min(rows.count, _rows_per_part(rows)), rows.length)
    return memory.required_bytes(checkpoint, part) + 2 * head.CHUNK_BYTES


def _check_disk(targets: Targets, left: int, budget: int | None) -> None:
    """Raises Refused if all parts exceed the budget, or if the missing ones do not fit on the disk."""
    home = next(p for p in (targets.directory, *targets.directory.absolute().parents) if p.exists())
    free = shutil.disk_usage(home).free
    limit = min(free + targets.nbytes - left, math.inf if budget is None else budget)
    if targets.nbytes <= limit:
        return
    vocab, tokens = targets.about["vocab"], targets.rows.total
    per_token = (limit - targets.parts * SEAL) / tokens
    fitting = [k for k in range(1, targets.about["k"]) if record(k, vocab).itemsize <= per_token]
    raise Refused(
        f"targets of {tokens} tokens at k={targets.about['k']} take {gb(targets.nbytes)}, "
        f"{'the disk budget is' if limit == budget else 'free are'} {gb(limit)}",
        f"the largest k that fits is {fitting[-1]}" if fitting else "use fewer rows: not even k=1 fits",
    )


def _check_memory(targets: Targets, checkpoint: Checkpoint, parts: list[int], cap: int | None) -> int:
    """Estimate the memory for some parts in one turn: a walk, then logits and the search for the most likely."""
    return memory.check_memory(checkpoint, _rows(targets, parts), cap, 2 * head.CHUNK_BYTES)


def _at_once(targets: Targets, checkpoint: Checkpoint, missing: list[int], cap: int | None) -> list[int]:
    """As many missing parts as fit through the model in one turn. Raises Refused if not even one fits."""
    limit = cap or machine.available_bytes()
    for count in range(min(PARTS_AT_ONCE, len(missing)), 1, -1):
        rows = _rows(targets, missing[:count])
        if memory.required_bytes(checkpoint, rows) + 2 * head.CHUNK_BYTES <= limit:
            return missing[:count]
    _check_memory(targets, checkpoint, missing[:1], cap)
    return missing[:1]


def _rows(targets: Targets, parts: list[int]) -> Rows:
    chosen = np.concatenate([np.arange(targets.rows.count)[targets.rows_of(part)] for part in parts])
    return Rows(targets.rows.tokens[chosen], targets.rows.lengths[chosen])


def _collect(targets: Targets, teacher: Path, parts: list[int]) -> None:
    """Send the rows of some parts through the model, then through its head; write each part as soon as it is known."""
    rows = _rows(targets, parts)
    streamed = stream.walk(teacher, rows, what=f"targets, part {parts[0] + 1} of {targets.parts}: block")
    flat, start = streamed.hidden.reshape(-1, streamed.hidden.shape[-1]), 0
    with progress("targets: token", rows.total) as bar:
        for part in parts:
            lengths = targets.rows.lengths[targets.rows_of(part)]
            valid = start + np.flatnonzero(np.arange(rows.length) < lengths[:, None])
            start += len(lengths) * rows.length
            records = [np.zeros(0, targets.record)]
            for first in range(0, len(valid), TOKENS_AT_ONCE):
                some = valid[first : first + TOKENS_AT_ONCE]
                records.append(_of(targets, teacher, streamed.logits(flat[mx.array(some)])))
                bar.advance(len(some))
            targets.write(part, np.concatenate(records))


def _of(targets: Targets, teacher: Path, chunks: Any) -> np.ndarray:
    """Make the records of some tokens from their logits, which come in chunks of the vocabulary."""
    top, temperature = Top(targets.about["k"]), targets.about["temperature"]
    for start, logits in chunks:
        top.update(start, logits if temperature == 1.0 else logits / temperature)
        mx.eval(top.arrays())
    ids, log_p, log_tail = top.found()
    if np.isnan(log_p).any() or np.isnan(log_tail).any():
        raise PareError(f"{teacher} answers NaN or infinity", "the model is broken: do not use it")
    return pack(ids, log_p, log_tail, targets.about["vocab"])
