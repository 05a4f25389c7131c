"""The end of a walk: hidden states, and the head, which is applied to them in chunks of the vocabulary."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import mlx.core as mx

from ..lm import LogitShape
from ..tensors.packed import dense_weight
from .spool import Spool

CHUNK_BYTES = 64 << 20


@dataclass
class Streamed:
    """The end of a walk: the hidden states and the head that makes logits of them.

    ``hidden`` [rows, length, hidden]: states after the final norm. ``head``: the layer whose weight [vocab, hidden]
    makes logits. ``vocab``: number of token ids. ``norm``: the final norm. ``shape``: what follows the product.
    """

    hidden: mx.array | Spool
    head: Any
    vocab: int
    norm: Callable[[mx.array], mx.array]
    shape: LogitShape = field(default_factory=LogitShape)

    def of(self, hidden: mx.array) -> Streamed:
        """Return the same head for other hidden states.

        Args:
            hidden: states after the final norm [rows, length, hidden].

        Returns:
            The end of a walk with these states.
        """
        return replace(self, hidden=hidden)

    def ended(self, hidden: mx.array) -> Streamed:
        """Return the same head for hidden states of the last block.

        Args:
            hidden: states before the final norm [rows, length, hidden].

        Returns:
            The end of a walk with these states after the final norm.
        """
        return self.of(self.norm(hidden))

    def chunks(self, hidden: mx.array) -> Iterator[tuple[int, mx.array]]:
        """Yield the head in chunks of the vocabulary.

        Neither the weight of a chunk nor the logits of these hidden states in it take more than CHUNK_BYTES, unless a
        single token takes more.

        Args:
            hidden: the states whose logits are wanted [..., hidden].

        Returns:
            Pairs: first token id of the chunk, and its weight, float32 [chunk, hidden].
        """
        width = max(1, CHUNK_BYTES // (4 * max(hidden.shape[-1], hidden.size // hidden.shape[-1])))
        for start in range(0, self.vocab, width):
            yield start, dense_weight(self.head, start, min(start + width, self.vocab))

    def logits(self, hidden: mx.array) -> Iterator[tuple[int, mx.array]]:
        """Yield the logits of some hidden states in chunks of the vocabulary.

        Args:
            hidden: states after the final norm [..., hidden].

        Returns:
            Pairs: first token id of the chunk, and the logits, float32 [..., chunk].
        """
        x = hidden.astype(mx.float32)
        for start, weight in self.chunks(hidden):
            yield start, self.shape(x @ weight.T)

    def all_logits(self, rows: Any) -> mx.array:
        """Compute all logits of a few rows.

        Args:
            rows: which rows of ``hidden``, indices or a slice.

        Returns:
            float32 [rows, length, vocab].
        """
        return mx.concatenate([logits for _, logits in self.logits(self.hidden[rows])], axis=-1)
