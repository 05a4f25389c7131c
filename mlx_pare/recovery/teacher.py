"""teacher: what the original says of some rows, so that it need not be in memory while the student trains.

It is streamed once. Either its final hidden states and its head stay (``Whole``: the logits made of them are exact,
over the whole vocabulary, at hidden x 2 to 4 bytes a token), or its likeliest tokens go to disk
(recovery/topk_targets.py, less than 300 bytes a token). Hidden states behind some layers, where they are to be matched,
stay in memory beside either.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import mlx.core as mx
import numpy as np

from ..base.errors import PareError
from ..model.checkpoint import Checkpoint
from ..stream import memory, walk as stream
from ..text.corpus import Extent, Rows


class Guide(Protocol):
    """Gives a loss what it compares with, for row numbers [b]."""

    def batch(self, rows: np.ndarray) -> tuple[mx.array, ...]: ...


@dataclass(frozen=True)
class Whole:
    """Full logits [b, length, vocab], float32, made of hidden states when they are asked for."""

    streamed: stream.Streamed

    def batch(self, rows: np.ndarray) -> tuple[mx.array]:
        return (self.streamed.all_logits(mx.array(rows)),)


class Watched(stream.Observer):
    """An observer that keeps the residual stream behind some layers [rows, length, hidden], or some of its
    coordinates."""

    def __init__(self, layers: Sequence[int], kept: Sequence[int] | None = None):
        self.layers, self.kept = set(layers), None if kept is None else mx.array(kept)
        self.states: dict[int, mx.array] = {}

    def leave(self, index: int, hidden: mx.array) -> None:
        if index in self.layers:
            self.states[index] = hidden if self.kept is None else hidden[..., self.kept]
            mx.eval(self.states[index])


@dataclass(frozen=True)
class Places:
    """Where states are compared: behind layers of the student, and of the teacher; which coordinates of the latter."""

    own: tuple[int, ...]
    teacher: tuple[int, ...]
    kept: tuple[int, ...] | None


def places(survivors: dict[str, Any], teacher: Checkpoint) -> Places:
    """Behind every kept layer that is followed by layers that were cut, and behind the last: there the student should
    be where the teacher's next kept layer begins. ``survivors``: survivors.json of the student."""
    sources = [layer["source"] for layer in survivors["layers"]]
    if sources[-1] >= len(teacher.arch.layers) or survivors["hidden"][-1] >= teacher.arch.sizes["hidden"]:
        raise PareError(f"survivors.json names units that {teacher.path} does not have", "give the original")
    ends = [*(source - 1 for source in sources[1:]), len(teacher.arch.layers) - 1]
    found = [(own, end) for own, (source, end) in enumerate(zip(sources, ends, strict=True)) if end != source]
    if not found or found[-1][0] != len(sources) - 1:
        found.append((len(sources) - 1, ends[-1]))
    kept = tuple(survivors["hidden"])
    whole = len(kept) == teacher.arch.sizes["hidden"]
    return Places(*(tuple(side) for side in zip(*found, strict=True)), None if whole else kept)


def held_bytes(teacher: Checkpoint, rows: Rows | Extent, matched: int, whole: bool = True) -> int:
    """What stays in memory of the teacher for ``rows``: hidden states at ``matched`` places and, where the ``whole``
    vocabulary is asked for, the final ones and its head."""
    states = rows.count * rows.length * teacher.arch.sizes["hidden"] * memory.state_width(teacher) * (whole + matched)
    return states + whole * memory.head_bytes(teacher)
