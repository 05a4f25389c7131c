"""The end of a walk: hidden states, and the head that reads them, in chunks of the vocabulary."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import mlx.core as mx

from ..tensors.packed import dense_weight
from .spool import Spool

CHUNK_BYTES = 64 << 20


@dataclass(frozen=True)
class Shape:
    """What some models do with the product of hidden states and head before it counts as logits: it is multiplied by
    ``factor`` (granite), and held within ``cap`` by cap * tanh(x / cap) (gemma2); None: it is not held."""

    factor: float = 1.0
    cap: float | None = None

    @property
    def plain(self) -> bool:
        """Whether nothing is done with it."""
        return self.factor == 1.0 and self.cap is None

    def __call__(self, product: mx.array) -> mx.array:
        """Logits."""
        scaled = product if self.factor == 1.0 else product * self.factor
        return scaled if self.cap is None else self.cap * mx.tanh(scaled / self.cap)

    def slope(self, logits: mx.array) -> mx.array:
        """The derivative of logits by the product."""
        steep = mx.ones_like(logits) if self.cap is None else 1 - mx.square(logits / self.cap)
        return self.factor * steep


@dataclass
class Streamed:
    """The end of a walk: ``hidden`` [rows, length, hidden] after the final norm, and the head to read it with."""

    hidden: mx.array | Spool
    head: Any
    vocab: int
    norm: Callable[[mx.array], mx.array]
    shape: Shape = Shape()

    def of(self, hidden: mx.array) -> Streamed:
        """The same head for other hidden states, after the final norm."""
        return replace(self, hidden=hidden)

    def ended(self, hidden: mx.array) -> Streamed:
        """The same head for hidden states as the last block gives them."""
        return self.of(self.norm(hidden))

    def chunks(self, hidden: mx.array) -> Iterator[tuple[int, mx.array]]:
        """(first token id, float32 weight [chunk, hidden]) over the vocabulary; the logits of some hidden states in a
        chunk take no more memory than it does, or CHUNK_BYTES."""
        width = max(1, CHUNK_BYTES // (4 * max(hidden.shape[-1], hidden.size // hidden.shape[-1])))
        for start in range(0, self.vocab, width):
            yield start, dense_weight(self.head, start, min(start + width, self.vocab))

    def logits(self, hidden: mx.array) -> Iterator[tuple[int, mx.array]]:
        """(first token id, float32 logits [..., chunk]) over the vocabulary, for some of the hidden states."""
        x = hidden.astype(mx.float32)
        for start, weight in self.chunks(hidden):
            yield start, self.shape(x @ weight.T)

    def all_logits(self, rows: Any) -> mx.array:
        """Float32 logits [rows, length, vocab] of a few rows (indices or a slice)."""
        return mx.concatenate([logits for _, logits in self.logits(self.hidden[rows])], axis=-1)
