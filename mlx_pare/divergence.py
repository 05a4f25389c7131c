"""KL divergence and its neighbours: one definition for the metric and for the training loss.

KL(teacher || student) = sum_v p_v (log p_v - log q_v) in nats per token, over the full vocabulary. (A loss that only
renormalises the teacher's top-k would not punish student mass elsewhere; torchtune's kd_losses.py leaves out the
teacher's entropy, so its number is a cross-entropy.)
"""

from __future__ import annotations

from collections.abc import Iterable

import mlx.core as mx
import numpy as np

from .corpus import Rows
from .stream import Streamed

TOKENS_AT_ONCE = 1024


def kl(teacher: mx.array, student: mx.array) -> mx.array:
    """KL per token [...] from logits [..., vocab] of both."""
    log_p = teacher.astype(mx.float32) - mx.logsumexp(teacher.astype(mx.float32), axis=-1, keepdims=True)
    log_q = student.astype(mx.float32) - mx.logsumexp(student.astype(mx.float32), axis=-1, keepdims=True)
    return (mx.exp(log_p) * (log_p - log_q)).sum(axis=-1)


class Running:
    """Log-sum-exp, target logit and argmax of logits that come in chunks of the vocabulary; ``targets`` [tokens]."""

    def __init__(self, targets: mx.array):
        self.targets = targets
        self.peak = mx.full(targets.shape, -mx.inf)
        self.mass = mx.zeros(targets.shape)
        self.target = mx.zeros(targets.shape)
        self.top = mx.zeros(targets.shape, dtype=mx.int32)

    def update(self, start: int, logits: mx.array) -> mx.array:
        """Add logits [tokens, chunk] of the ids from ``start``; returns exp(logits - peak), [tokens, chunk]."""
        best = logits.max(axis=-1)
        self.top = mx.where(best > self.peak, logits.argmax(axis=-1).astype(mx.int32) + start, self.top)
        peak = mx.maximum(self.peak, best)
        weights = mx.exp(logits - peak[:, None])
        self.shrink = mx.exp(self.peak - peak)
        self.mass = self.mass * self.shrink + weights.sum(axis=-1)
        self.peak = peak
        inside = (self.targets >= start) & (self.targets < start + logits.shape[-1])
        index = mx.where(inside, self.targets - start, 0)[:, None]
        self.target = mx.where(inside, mx.take_along_axis(logits, index, axis=-1)[:, 0], self.target)
        return weights

    @property
    def lse(self) -> mx.array:
        return self.peak + mx.log(self.mass)

    @property
    def nll(self) -> mx.array:
        """-log p(target), nats [tokens]."""
        return self.lse - self.target


def compare(targets: mx.array, student: Iterable, teacher: Iterable | None = None) -> dict[str, mx.array]:
    """Per-token numbers [tokens] from chunked logits of a student, and of a teacher in the same chunks.

    nll always; with a teacher also kl (as ``kl`` above, in one pass: sum p (t - s) - lse_t + lse_s) and agree
    (same argmax).
    """
    q = Running(targets)
    if teacher is None:
        for start, logits in student:
            q.update(start, logits)
            mx.eval(q.mass, q.peak, q.target, q.top)
        return {"nll": q.nll}
    p, difference = Running(targets), mx.zeros(targets.shape)
    for (start, s), (_, t) in zip(student, teacher, strict=True):
        q.update(start, s)
        weights = p.update(start, t)
        difference = difference * p.shrink + (weights * (t - s)).sum(axis=-1)
        mx.eval(difference, *(a for r in (p, q) for a in (r.mass, r.peak, r.target, r.top)))
    return {"nll": q.nll, "kl": difference / p.mass - p.lse + q.lse, "agree": p.top == q.top}


def measure(rows: Rows, student: Streamed, teacher: Streamed | None = None) -> dict[str, np.ndarray]:
    """What ``compare`` says of every predicted token, in the order of the rows, float64 [predicted]."""
    step = max(1, TOKENS_AT_ONCE // rows.length)
    found: dict[str, list[np.ndarray]] = {}
    for start in range(0, rows.count, step):
        part = slice(start, start + step)
        valid = rows.mask()[part, 1:].reshape(-1)
        targets = mx.array(rows.tokens[part, 1:].reshape(-1))

        def chunks(streamed: Streamed | None, part: slice = part):
            if streamed is None:
                return None
            hidden = streamed.hidden[part, :-1]
            return streamed.logits(hidden.reshape(-1, hidden.shape[-1]))

        for name, values in compare(targets, chunks(student), chunks(teacher)).items():
            found.setdefault(name, []).append(np.array(values).astype(np.float64)[valid])
    return {name: np.concatenate(parts) for name, parts in found.items()}
