"""KL divergence and its neighbours: one definition for the metric and for the training loss.

KL(teacher || student) = sum_v p_v (log p_v - log q_v) in nats per token, over the full vocabulary. (A loss that only
renormalises the teacher's top-k does not punish student mass elsewhere. torchtune's kd_losses.py leaves out the
teacher's entropy, so its number is a cross-entropy.)
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import mlx.core as mx
import numpy as np

from .. import lm
from ..base.errors import UsageError
from ..stream.head import Streamed
from ..text.corpus import Rows

TOKENS_AT_ONCE = 1024
BETA = 0.5  # share of the teacher in the mixture of "js"
NOTHING = -1e30  # the logit of what is left out: -inf would make NaN of 0 * log 0, and of its gradient
LEAST = -100.0  # smaller log-probabilities of the teacher count as this, or one empty class makes reverse KL infinite


def _forward(log_p: mx.array, log_q: mx.array) -> mx.array:
    return (mx.exp(log_p) * (log_p - log_q)).sum(axis=-1)


def _reverse(log_p: mx.array, log_q: mx.array) -> mx.array:
    return _forward(log_q, log_p)


def _jensen_shannon(log_p: mx.array, log_q: mx.array) -> mx.array:
    middle = mx.logaddexp(log_p + math.log(BETA), log_q + math.log(1 - BETA))
    return BETA * _forward(log_p, middle) + (1 - BETA) * _forward(log_q, middle)


# kind -> divergence [...] of log-probabilities [..., classes] of the teacher and of the student
KINDS = {
    "forward": _forward,  # KL(teacher || student): the student covers all that the teacher does
    "reverse": _reverse,  # KL(student || teacher): the student stays where the teacher is (MiniLLM, arXiv:2306.08543)
    "js": _jensen_shannon,  # beta KL(p || m) + (1 - beta) KL(q || m), m = beta p + (1 - beta) q (GKD, arXiv:2306.13649)
}


def kl(teacher: mx.array, student: mx.array) -> mx.array:
    """Compute KL(teacher || student) of every token.

    Args:
        teacher: finite logits [..., vocab].
        student: finite logits [..., vocab].
    Returns:
        float32 [...], nats.
    """
    return between("forward", teacher, student)


def between(kind: str, teacher: mx.array, student: mx.array, temperature: float = 1.0) -> mx.array:
    """Compute a divergence of every token from full logits.

    The result is not multiplied by temperature^2, which would make gradients of all temperatures about as large
    (Hinton et al., arXiv:1503.02531).

    Args:
        kind: a name in KINDS.
        teacher: finite logits [..., vocab].
        student: finite logits [..., vocab].
        temperature: divides the logits of both.
    Returns:
        float32 [...], nats.
    Raises:
        UsageError: the kind is unknown.
    """
    return _kind(kind)(_log_softmax(teacher, temperature), _log_softmax(student, temperature))


def between_top(
    kind: str, ids: mx.array, log_p: mx.array, log_tail: mx.array, student: mx.array, temperature: float = 1.0
) -> mx.array:
    """Compute a divergence of every token if only the teacher's most likely tokens are known.

    All other tokens are one class for both models, so that no mass of the student is unpenalised. By the log-sum
    inequality the result is at most ``between`` of full logits. Both are equal if the ratio of the two models is the
    same all over the rest, or if the rest is one token.

    Args:
        kind: a name in KINDS.
        ids: int [..., k], the teacher's most likely tokens, all different.
        log_p: [..., k], the teacher's log-probabilities of ``ids`` at this temperature.
        log_tail: [...], the log of the teacher's mass on all other tokens; -inf: there are none.
        student: finite logits [..., vocab].
        temperature: divides the student's logits.
    Returns:
        float32 [...], nats.
    Raises:
        UsageError: the kind is unknown.
    """
    log_p = mx.concatenate([log_p, log_tail[..., None]], axis=-1).astype(mx.float32)
    log_p = _log_softmax(mx.maximum(log_p, LEAST))
    return _kind(kind)(log_p, _log_softmax(classes(student.astype(mx.float32) / temperature, ids)))


def classes(logits: mx.array, ids: mx.array) -> mx.array:
    """Merge all tokens but some into one class; the softmax of the classes is that of the whole vocabulary.

    The rest is summed up by itself: 1 - sum(p) would have no digits left if it is small.

    Args:
        logits: [..., vocab].
        ids: int [..., k], the tokens that stay apart, all different.
    Returns:
        Logits [..., k + 1] in the dtype of ``logits``: those of ``ids``, then that of all other tokens together.
    """
    rest = mx.put_along_axis(logits, ids, mx.array(NOTHING, logits.dtype), axis=-1)
    return mx.concatenate(
        [mx.take_along_axis(logits, ids, axis=-1), mx.logsumexp(rest, axis=-1, keepdims=True)], axis=-1
    )


def _kind(kind: str):
    if kind not in KINDS:
        raise UsageError(f"unknown divergence {kind!r}", f"choose one of {', '.join(KINDS)}")
    return KINDS[kind]


def _log_softmax(logits: mx.array, temperature: float = 1.0) -> mx.array:
    logits = logits.astype(mx.float32)
    if temperature != 1.0:
        logits = logits / temperature
    return logits - mx.logsumexp(logits, axis=-1, keepdims=True)


class Mass:
    """Log-sum-exp of logits that come in chunks of the vocabulary. ``tokens``: how many there are."""

    def __init__(self, tokens: int):
        self.peak = mx.full((tokens,), -mx.inf)
        self.mass = mx.zeros((tokens,))
        self.shrink = mx.zeros((tokens,))  # exp(peak before - peak now): what earlier sums are multiplied by

    def update(self, logits: mx.array) -> mx.array:
        """Add the logits of one chunk of the vocabulary.

        Args:
            logits: float32 [tokens, chunk].
        Returns:
            exp(logits - peak), float32 [tokens, chunk]; the peak is each token's largest logit so far.
        """
        peak = mx.maximum(self.peak, logits.max(axis=-1))
        weights = mx.exp(logits - peak[:, None])
        self.shrink = mx.exp(self.peak - peak)
        self.mass = self.mass * self.shrink + weights.sum(axis=-1)
        self.peak = peak
        return weights

    @property
    def lse(self) -> mx.array:
        """The log of the sum of exp(logits) over the chunks so far.

        Returns:
            float32 [tokens].
        """
        return self.peak + mx.log(self.mass)


class Running(Mass):
    """Log-sum-exp, target logit and argmax of logits that come in chunks of the vocabulary.

    ``targets`` int [tokens]: the ids whose logits are wanted.
    """

    def __init__(self, targets: mx.array):
        super().__init__(len(targets))
        self.targets = targets
        self.target = mx.zeros(targets.shape)
        self.top = mx.zeros(targets.shape, dtype=mx.int32)

    def see(self, start: int, logits: mx.array) -> mx.array:
        """Add the logits of one chunk of the vocabulary.

        Args:
            start: first token id of the chunk.
            logits: float32 [tokens, chunk].
        Returns:
            As ``update``.
        """
        higher = logits.max(axis=-1) > self.peak
        self.top = mx.where(higher, logits.argmax(axis=-1).astype(mx.int32) + start, self.top)
        inside = (self.targets >= start) & (self.targets < start + logits.shape[-1])
        index = mx.where(inside, self.targets - start, 0)[:, None]
        self.target = mx.where(inside, mx.take_along_axis(logits, index, axis=-1)[:, 0], self.target)
        return self.update(logits)

    @property
    def nll(self) -> mx.array:
        """-log p(target).

        Returns:
            float32 [tokens], nats.
        """
        return self.lse - self.target


def compare(targets: mx.array, student: Iterable, teacher: Iterable | None = None) -> dict[str, mx.array]:
    """Compare a student with the text, and with a teacher, from logits in chunks of the vocabulary.

    The KL divergence is that of ``kl`` above, in one pass: sum p (t - s) - lse_t + lse_s.

    Args:
        targets: int [tokens], the ids to predict.
        student: (first token id, float32 logits [tokens, chunk]) for every chunk.
        teacher: the same of the teacher, in the same chunks; None: there is no teacher.
    Returns:
        "nll" float32 [tokens], nats. With a teacher also "kl" float32 [tokens], nats, and "agree" bool [tokens]: both
        have the same argmax.
    """
    q = Running(targets)
    if teacher is None:
        for start, logits in student:
            q.see(start, logits)
            mx.eval(q.mass, q.peak, q.target, q.top)
        return {"nll": q.nll}
    p, difference = Running(targets), mx.zeros(targets.shape)
    for (start, s), (_, t) in zip(student, teacher, strict=True):
        q.see(start, s)
        weights = p.see(start, t)
        difference = difference * p.shrink + (weights * (t - s)).sum(axis=-1)
        mx.eval(difference, *(a for r in (p, q) for a in (r.mass, r.peak, r.target, r.top)))
    return {"nll": q.nll, "kl": difference / p.mass - p.lse + q.lse, "agree": p.top == q.top}


def mean_kl(rows: Rows, students: Sequence[mx.array], teacher: Streamed) -> list[float]:
    """Compute the mean KL divergence of several students that share the teacher's head, whose logits are made once.

    Args:
        rows: the token rows.
        students: states of each student after the final norm [rows, length, hidden].
        teacher: the end of the teacher's walk over ``rows``.
    Returns:
        Nats per predicted token, of each student.
    """
    if not students:
        return []
    step = max(1, TOKENS_AT_ONCE // rows.length)
    sums, valid = np.zeros(len(students)), rows.mask()[:, 1:]
    for start in range(0, rows.count, step):
        part = slice(start, start + step)
        states = [hidden[part, :-1].reshape(-1, hidden.shape[-1]) for hidden in (teacher.hidden, *students)]
        with lm.swift():
            found = _kl_of_each(teacher, *states)
        sums += [np.array(kl).astype(np.float64)[valid[part].reshape(-1)].sum() for kl in found]
    return (sums / valid.sum()).tolist()


def _kl_of_each(teacher: Streamed, own: mx.array, *states: mx.array) -> list[mx.array]:
    """KL(teacher || student) of every token [tokens], of each student, from their states [tokens, hidden]."""
    p, each = Mass(len(own)), [Mass(len(own)) for _ in states]
    differences = [mx.zeros((len(own),)) for _ in states]
    for _, weight in teacher.chunks(own):
        t = teacher.shape(own.astype(mx.float32) @ weight.T)
        weights = p.update(t)
        for i, (q, state) in enumerate(zip(each, states, strict=True)):
            s = teacher.shape(state.astype(mx.float32) @ weight.T)
            q.update(s)
            differences[i] = differences[i] * p.shrink + (weights * (t - s)).sum(axis=-1)
            mx.eval(differences[i], q.mass, q.peak, p.mass, p.peak, weights)
    return [d / p.mass - p.lse + q.lse for d, q in zip(differences, each, strict=True)]


def measure(rows: Rows, student: Streamed, teacher: Streamed | None = None) -> dict[str, np.ndarray]:
    """Compare a student with the text, and with a teacher, on every predicted token of some rows.

    Args:
        rows: the token rows.
        student: the end of the student's walk over ``rows``.
        teacher: the end of the teacher's walk over ``rows``; None: there is no teacher.
    Returns:
        The numbers of ``compare`` by name, float64 [predicted], in the order of the rows; "agree" is 0 or 1.
    """
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

        with lm.swift():
            compared = compare(targets, chunks(student), chunks(teacher))
        for name, values in compared.items():
            found.setdefault(name, []).append(np.array(values).astype(np.float64)[valid])
    return {name: np.concatenate(parts) for name, parts in found.items()}
