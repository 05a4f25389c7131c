"""What is stored of a teacher's prediction for one token: its k most likely tokens and the mass of the rest.

A record holds, with no space between: the low 16 bits of k ids; if the vocabulary has more than 65536 tokens also
their high 4 bits, two to a byte; k log-probabilities as float16; the log of the mass of all other tokens as float32.
At k = 64 that is 260 bytes, or 292. The most likely token comes first.

float16 rounds a probability above 1e-7 by up to 0.4 %, a likely one less. So reading divides all k + 1 classes by their
sum, which makes them a distribution: the divergence of a student that equals it is 0 and never below. The exact rest
is known to seven digits and moves by less than the k were rounded by.
"""

from __future__ import annotations

import math

import mlx.core as mx
import numpy as np

from ..base.errors import UsageError

LOW, HIGH = 1 << 16, 1 << 20
LEAST = float(np.finfo(np.float16).min)


def check(k: int, vocab: int) -> None:
    """Raises UsageError if ``k`` targets of a vocabulary cannot be stored."""
    if not 1 <= k <= vocab:
        raise UsageError(
            f"--targets {k} is not possible: the vocabulary has {vocab} tokens", f"give 1 to {vocab}, or full"
        )
    if vocab > HIGH:
        raise UsageError(
            f"a vocabulary of {vocab} tokens is too large for targets, {HIGH} is the most", "use --targets full"
        )


def record(k: int, vocab: int) -> np.dtype:
    """The dtype of what is stored for a token. Raises UsageError as ``check``."""
    check(k, vocab)
    high = [("high", "u1", ((k + 1) // 2,))] if vocab > LOW else []
    return np.dtype([("low", "<u2", (k,)), *high, ("log_p", "<f2", (k,)), ("log_tail", "<f4")])


def pack(ids: np.ndarray, log_p: np.ndarray, log_tail: np.ndarray, vocab: int) -> np.ndarray:
    """Pack what is stored of a teacher's predictions into records.

    Args:
        ids: most likely tokens, int [tokens, k].
        log_p: their log-probabilities, float [tokens, k].
        log_tail: the log of the mass of all other tokens, float [tokens].
        vocab: number of tokens of the teacher.

    Returns:
        Records [tokens] of the dtype that ``record`` gives.

    Raises:
        UsageError: as ``check``.
    """
    packed = np.zeros(len(ids), record(ids.shape[1], vocab))
    packed["low"] = ids & (LOW - 1)
    if vocab > LOW:
        high = np.zeros((len(ids), packed["high"].shape[1] * 2), np.uint8)
        high[:, : ids.shape[1]] = ids >> 16
        packed["high"] = high[:, 0::2] | high[:, 1::2] << 4
    packed["log_p"] = np.maximum(log_p, LEAST)
    packed["log_tail"] = log_tail
    return packed


def unpack(records: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Unpack records to a distribution over k + 1 classes.

    Args:
        records: what ``pack`` gave, of any shape [...].

    Returns:
        ids int32 [..., k], log_p float32 [..., k], log_tail float32 [...]; the masses have the sum one.
    """
    ids = records["low"].astype(np.int32)
    if "high" in records.dtype.names:
        high = np.stack([records["high"] & 15, records["high"] >> 4], axis=-1)
        ids |= high.reshape(*ids.shape[:-1], -1)[..., : ids.shape[-1]].astype(np.int32) << 16
    log_p, log_tail = records["log_p"].astype(np.float32), records["log_tail"].astype(np.float32)
    total = np.log(np.exp(log_p).sum(axis=-1) + np.exp(log_tail))
    return ids, log_p - total[..., None], log_tail - total


def largest(logits: mx.array, k: int) -> mx.array:
    """Find the k largest logits of every token.

    There are two rounds, because partitioning everything costs more than making the logits. The k largest lie in the k
    groups with the largest maxima, which are cheap. Groups of sqrt(many / k) make both rounds equally long.

    Args:
        logits: [tokens, many].
        k: at most ``many``.

    Returns:
        Indices uint32 [tokens, k], in no order.
    """
    tokens, many = logits.shape
    size = math.isqrt(many // k)
    if size < 2:
        return mx.argpartition(logits, many - k, axis=-1)[:, many - k :] if k < many else _all(tokens, many)
    groups = many // size
    maxima = logits[:, : size * groups].reshape(tokens, size, groups).max(axis=1)
    best = mx.argpartition(maxima, groups - k, axis=-1)[:, groups - k :]
    inside = (best[:, None, :] + (mx.arange(size, dtype=mx.uint32) * groups)[:, None]).reshape(tokens, -1)
    left = mx.arange(size * groups, many, dtype=mx.uint32)  # fewer than a group: all of them take part
    inside = mx.concatenate([inside, mx.broadcast_to(left, (tokens, left.size))], axis=-1)
    among = mx.take_along_axis(logits, inside, axis=-1)
    order = mx.argpartition(among, inside.shape[1] - k, axis=-1)[:, inside.shape[1] - k :]
    return mx.take_along_axis(inside, order, axis=-1)


def _all(tokens: int, many: int) -> mx.array:
    return mx.broadcast_to(mx.arange(many, dtype=mx.uint32), (tokens, many))


class Top:
    """The k largest of logits that come in chunks of the vocabulary, and the log of the mass of all others. That is
    summed up from the others themselves: as the difference to the whole a small one would be noise."""

    def __init__(self, k: int):
        self.k = k
        self.values = self.ids = self.rest = None

    def update(self, start: int, logits: mx.array) -> None:
        """Add a chunk of the vocabulary.

        Args:
            start: token id of its first column.
            logits: float32 [tokens, chunk].
        """
        index = largest(logits, min(self.k, logits.shape[1]))
        values, ids = mx.take_along_axis(logits, index, axis=-1), index.astype(mx.int32) + start
        others = mx.logsumexp(mx.put_along_axis(logits, index, mx.array(-mx.inf), axis=-1), axis=-1)
        if self.values is None:
            self.values, self.ids, self.rest = values, ids, others
            return
        values = mx.concatenate([self.values, values], axis=-1)
        ids = mx.concatenate([self.ids, ids], axis=-1)
        self.rest = mx.logaddexp(self.rest, others)
        if (out := values.shape[1] - self.k) > 0:
            order = mx.argpartition(values, out, axis=-1)
            values, ids = (mx.take_along_axis(a, order, axis=-1) for a in (values, ids))
            self.rest = mx.logaddexp(self.rest, mx.logsumexp(values[:, :out], axis=-1))
        self.values, self.ids = values[:, -self.k :], ids[:, -self.k :]

    def arrays(self) -> list[mx.array]:
        """Return the arrays to evaluate after a chunk.

        Returns:
            Values and ids [tokens, k], and the log of the mass of the others [tokens].
        """
        return [self.values, self.ids, self.rest]

    def found(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return what was found, the most likely token first.

        Returns:
            ids int32 [tokens, k], log_p float32 [tokens, k], log_tail float32 [tokens].
        """
        order = mx.argsort(-self.values, axis=-1)
        ids, values = (mx.take_along_axis(a, order, axis=-1) for a in (self.ids, self.values))
        total = mx.logaddexp(mx.logsumexp(values, axis=-1), self.rest)
        return np.array(ids), np.array(values - total[:, None]), np.array(self.rest - total)
