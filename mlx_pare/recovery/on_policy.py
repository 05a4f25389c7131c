"""on_policy: rows that the student writes itself, and the teacher's judgement (student samples, teacher scores).

A student that trains on given text alone never sees the mistakes that it makes when it writes. GKD (Agarwal et al.,
arXiv:2306.13649, algorithm 1) trains it on its own samples, of which the teacher judges every token, and mixes them
with text by a share. Here this happens in rounds, so that the teacher need not be in memory: before a round the student
continues the beginnings of its rows, then the teacher is streamed once over what it wrote.
Samples are at most a round old (ROUND steps). No gradient goes through the sampling. The beginning of a row, real text,
counts in the loss like the rest: the teacher has judged it anyway, and it keeps the student near real text.
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

ROUND = 25  # steps at most that train on samples of the same student
PROMPT = 4  # the beginning that the student is given is the row's length divided by this
ROWS_AT_ONCE = 4  # times the batch: rows that are sampled together, because they need no gradient


def check(share: float, top: int | None, cross_entropy: float) -> None:
    """Check that the student may write a share of the rows.

    Args:
        share: of the rows that the student writes, 0 to 1.
        top: tokens kept of the teacher's predictions on disk; None: full logits.
        cross_entropy: its share of the loss, 0 to 1.
    Raises:
        UsageError: the share is out of its range, or it is above 0 and another option needs given text.
    """
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
    """How many of the ``rows`` of a round the student writes."""
    return math.ceil(share * rows)


@dataclass(frozen=True)
class Lesson:
    """Rows and the teacher's judgement.

    ``tokens`` int [n, length]; ``streamed``: the end of the teacher's walk over them; ``states``: the teacher's hidden
    states [n, length, hidden] at each place where they are matched.
    """

    tokens: np.ndarray
    streamed: stream.Streamed
    states: Sequence[mx.array] = ()


class Writer:
    """The rows of a training of which the student writes a share.

    Row numbers from ``rows.count`` on are the rows that it wrote for this round. ``text``: the teacher's judgement of
    the given rows; None if the student writes all rows. ``judge(rows)``: the teacher's judgement of other rows.
    ``batch`` * ROWS_AT_ONCE rows are sampled at a time.
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
        """Let the student write its share of the rows of a round, and the teacher judge them.

        The result depends only on the student, ``drawn``, the seed and ``step``. The first process samples and sends
        the rows. Each process lets the teacher judge the rows that it will train on, and replaces only their numbers.

        Args:
            drawn: int [batches, b], numbers of the given rows that the round would train on.
            step: the step that the round begins with.
        Returns:
            int [batches, b]: ``drawn``, with numbers of written rows in some places.
        """
        self.written = None  # free the last round's rows before this one's are made
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
        """The beginnings of these rows, continued by the current student, int32 [n, length]."""
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
        """Give what the loss takes for some rows.

        Args:
            numbers: int [b], numbers of given or written rows.
        Returns:
            Tokens int32 [b, length]; the teacher's logits float32 [b, length, vocab]; then its hidden states
            [b, length, hidden] for each place where they are matched.
        """
        places = [
            (self.text, int(n)) if n < self.rows.count else (self.written, int(n) - self.rows.count) for n in numbers
        ]
        tokens = mx.array(np.stack([lesson.tokens[n] for lesson, n in places]))
        hidden = mx.stack([lesson.streamed.hidden[n] for lesson, n in places])
        states = zip(*([state[n] for state in lesson.states] for lesson, n in places), strict=True)
        return tokens, self.reader.of(hidden).all_logits(slice(None)), *map(mx.stack, map(list, states))


def judge_of(path: Path, places: teacher.Places | None) -> Callable[[Rows], Lesson]:
    """Make a function that streams a teacher over rows.

    Args:
        path: directory of the teacher.
        places: where hidden states are matched; None: nowhere.
    Returns:
        A function from Rows to the Lesson of these rows.
    """

    def judge(rows: Rows) -> Lesson:
        watched = teacher.Watched(places.teacher, places.kept) if places else None
        streamed = stream.walk(path, rows, watched, what=None)
        return Lesson(rows.tokens, streamed, [watched.states[layer] for layer in places.teacher] if watched else ())

    return judge


# ---- memory ----


def work_bytes(student: Checkpoint, original: Checkpoint, rows: Rows | Extent, at_once: int) -> int:
    """Estimate the memory for sampling rows and judging them, besides that of the student and its training.

    The larger of the two counts, because one comes after the other.

    Args:
        student: the model that writes.
        original: the teacher.
        rows: the rows of a round, or their number and length.
        at_once: rows that are sampled together.
    Returns:
        Bytes.
    """
    arch, value = student.arch, memory.resident_width(student)
    count, prompt = min(at_once, rows.count), prompt_length(rows.length)
    cached = 2 * arch.largest("kv_head") * arch.largest("head_dim") * len(arch.layers) * rows.length
    units = 3 * arch.largest("ffn") + 8 * arch.sizes["hidden"] + arch.largest("kv_head", "group") * prompt
    sampling = count * (2 * cached * value + prompt * units * value + 4 * arch.sizes["vocab"] * 4)
    return max(sampling, memory.required_bytes(original, rows))
