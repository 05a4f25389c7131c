"""teacher: what the original predicts for some rows, so that it need not be in memory while the student trains.

It is streamed once. Either its final hidden states and its head stay (``Whole``: the logits made of them are exact,
over the whole vocabulary, at hidden x 2 to 4 bytes a token). Or its likeliest tokens go to disk
(recovery/topk_targets.py, less than 300 bytes a token). In both cases the hidden states after some layers stay in
memory if they are matched.
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
    """Gives a loss what it compares with."""

    def batch(self, rows: np.ndarray) -> tuple[mx.array, ...]:
        """Give the targets of some rows.

        Args:
            rows: row numbers int [b].
        Returns:
            (logits [b, length, vocab],), or ids, log_p [b, length, k] and log_tail [b, length] of topk_targets.Targets.
        """
        ...


@dataclass(frozen=True)
class Whole:
    """Full logits, made of hidden states when they are asked for."""

    streamed: stream.Streamed

    def batch(self, rows: np.ndarray) -> tuple[mx.array]:
        """Make the logits of some rows.

        Args:
            rows: row numbers int [b].
        Returns:
            (logits float32 [b, length, vocab],).
        """
        return (self.streamed.all_logits(mx.array(rows)),)


class Watched(stream.Observer):
    """An observer that keeps the residual stream after some layers, or some of its coordinates.

    ``states``: by layer, [rows, length, hidden or kept coordinates].
    """

    def __init__(self, layers: Sequence[int], kept: Sequence[int] | None = None):
        self.layers, self.kept = set(layers), None if kept is None else mx.array(kept)
        self.states: dict[int, mx.array] = {}

    def leave(self, index: int, hidden: mx.array) -> None:
        """Keep the hidden states after a layer, if it is one of those.

        Args:
            index: number of the layer.
            hidden: [rows, length, hidden].
        """
        if index in self.layers:
            self.states[index] = hidden if self.kept is None else hidden[..., self.kept]
            mx.eval(self.states[index])


@dataclass(frozen=True)
class Places:
    """Where states are compared: after which layers of student and teacher, and in which coordinates of the teacher.

    ``kept`` None: in all coordinates.
    """

    own: tuple[int, ...]
    teacher: tuple[int, ...]
    kept: tuple[int, ...] | None


def places(survivors: dict[str, Any], teacher: Checkpoint) -> Places:
    """Choose the places: after every kept layer that was followed by removed layers, and after the last layer.

    There the student should be where the teacher's next kept layer begins. ``survivors``: survivors.json of the
    student. Raises PareError if it names units that the teacher does not have."""
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
    """Estimate what stays in memory of the teacher.

    Args:
        teacher: the original.
        rows: the rows it was streamed over, or their number and length.
        matched: places whose hidden states stay.
        whole: whether the final hidden states and the head stay too, for logits of the whole vocabulary.
    Returns:
        Bytes.
    """
    states = rows.count * rows.length * teacher.arch.sizes["hidden"] * memory.STATE_BYTES * (whole + matched)
    return states + whole * memory.head_bytes(teacher)
