"""on_policy: rows that the student writes itself, with what the teacher says of them (student samples, teacher scores).

Trained on given text alone, a student never sees the mistakes that it makes when it writes; GKD (Agarwal et al.,
arXiv:2306.13649, algorithm 1) trains it on its own samples, of which the teacher judges every token, and mixes them
with text by a share. Here this happens a round at a time, so that the teacher need not be in memory: before a round the
student continues the beginnings of the rows that are its turn, then the teacher is streamed once over what it wrote.
Samples are at most a round old (ROUND steps). No gradient goes through the sampling. The beginning of a row, real text,
counts in the loss like the rest: the teacher has judged it anyway, and it keeps the student where text is.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from .. import lm
from ..base.errors import UsageError
from ..lm import distributed
from ..model.checkpoint import Checkpoint
from ..options.values import SHARE, require
from ..stream import memory, walk as stream
from ..text.corpus import Extent, Rows
from . import teacher

ROUND = 25  # steps at most that are trained on samples of the same student
PROMPT = 4  # a row's part that is given: one of so many
ROWS_AT_ONCE = 4  # times the batch: rows that are sampled together, which need no gradient


def check(share: float, top: int | None, cross_entropy: float) -> None:
    """Raises UsageError for a share that cannot be, or beside what needs given text."""
    require("--on-policy", share, SHARE)
    if share and top is not None:
        raise UsageError("targets on disk are of given text: the student's own rows have none", "use --targets full")
    if share and cross_entropy:
        raise UsageError(
            "cross-entropy with text that the student wrote would only teach it what it does", "use --cross-entropy 0"
        )


def prompt_length(length: int) -> int:
    """Tokens of a row that the student is given."""
    return max(1, length // PROMPT)


def written_rows(share: float, rows: int) -> int:
    """How many of the rows of a round the student writes."""
    return math.ceil(share * rows)


@dataclass(frozen=True)
class Lesson:
    """``tokens`` int [n, length], what the teacher says of them, and its hidden states [n, length, hidden] at the
    places where they are matched."""

    tokens: np.ndarray
    streamed: stream.Streamed
    states: Sequence[mx.array] = ()


class Writer:
    """The rows of a training of which the student writes a share. Row numbers from ``rows.count`` on are those that it
    wrote for this round.

    ``text``: the teacher's word on the given rows; None when all are written. ``judge(rows)``: that on others.
    ``batch``: how many rows are sampled at a time.
    """

    def __init__(
        self,
        model: nn.Module,
        rows: Rows,
        text: Lesson | None,
        judge: Callable[[Rows], Lesson],
        share: float,
        batch: int,
        seed: int,
    ):
        self.model, self.rows, self.text, self.judge = model, rows, text, judge
        self.share, self.at_once, self.seed = share, batch * ROWS_AT_ONCE, seed
        self.written: Lesson | None = None
        self.reader = text and text.streamed  # one head for all rounds

    def write(self, drawn: np.ndarray, step: int) -> np.ndarray:
        """Before the round that begins at ``step``: the row numbers [batches, b] that it draws, of which a share,
        chosen by lot, is replaced by the numbers of written rows. Follows from the student and (seed, step) alone.

        The first process samples and sends; each has the teacher judge those rows that it will train on.
        """
        self.written = None  # the last round's need not be held beside this one's
        lot = np.random.RandomState([self.seed, step]).permutation(drawn.size)
        spots = np.sort(lot[: written_rows(self.share, drawn.size)])
        rank, size = distributed.this()
        sampled = {"tokens": self._sampled(drawn.reshape(-1)[spots], step)} if rank == 0 else {}
        tokens = distributed.from_first({}, sampled)[1]["tokens"]
        mine = np.flatnonzero(spots % drawn.shape[1] % size == rank)  # Trainer: row i of a batch is process i's
        numbers = drawn.copy()
        numbers.reshape(-1)[spots[mine]] = self.rows.count + np.arange(len(mine))
        if len(mine):
            self.written = self.judge(Rows.full(np.array(tokens)[mine]))
            self.reader = self.reader or self.written.streamed.of(self.written.streamed.hidden[:0])
        return numbers

    def _sampled(self, numbers: np.ndarray, step: int) -> mx.array:
        """The beginnings of these rows, continued by the student as it is now: int32 [n, length]."""
        length, pieces = self.rows.length, []
        keys = mx.random.split(mx.random.key(1_000_003 * self.seed + step), max(1, len(numbers)))
        self.model.eval()
        for start in range(0, len(numbers), self.at_once):
            given = self.rows.tokens[numbers[start : start + self.at_once], : prompt_length(length)]
            pieces.append(lm.continued(self.model, mx.array(given), length, keys[start]))
            mx.eval(pieces[-1])
            mx.clear_cache()
        self.model.train()
        return mx.concatenate(pieces) if pieces else mx.zeros((0, length), mx.int32)

    def batch(self, numbers: np.ndarray) -> tuple[mx.array, ...]:
        """Tokens [b, length], the teacher's logits [b, length, vocab] and its states for row numbers, given or
        written."""
        places = [
            (self.text, int(n)) if n < self.rows.count else (self.written, int(n) - self.rows.count) for n in numbers
        ]
        tokens = mx.array(np.stack([lesson.tokens[n] for lesson, n in places]))
        hidden = mx.stack([lesson.streamed.hidden[n] for lesson, n in places])
        states = zip(*([state[n] for state in lesson.states] for lesson, n in places), strict=True)
        return tokens, self.reader.of(hidden).all_logits(slice(None)), *map(mx.stack, map(list, states))


def judge_of(path: Path, places: teacher.Places | None) -> Callable[[Rows], Lesson]:
    """The teacher in ``path``, streamed over rows whenever it is asked."""

    def judge(rows: Rows) -> Lesson:
        watched = teacher.Watched(places.teacher, places.kept) if places else None
        streamed = stream.walk(path, rows, watched, what=None)
        return Lesson(rows.tokens, streamed, [watched.states[layer] for layer in places.teacher] if watched else ())

    return judge


# ---- memory ----


def work_bytes(student: Checkpoint, original: Checkpoint, rows: Rows | Extent, at_once: int) -> int:
    """The most that sampling ``rows``, or the teacher's walk over them, takes beside the student and what is held of
    its training: one comes after the other. An estimate."""
    arch, value = student.arch, memory.state_width(student)
    count, prompt = min(at_once, rows.count), prompt_length(rows.length)
    cached = 2 * arch.largest("kv_head") * arch.largest("head_dim") * len(arch.layers) * rows.length
    units = 3 * arch.largest("ffn") + 8 * arch.sizes["hidden"] + arch.largest("kv_head", "group") * prompt
    sampling = count * (2 * cached * value + prompt * units * value + 4 * arch.sizes["vocab"] * 4)
    return max(sampling, memory.required_bytes(original, rows))
