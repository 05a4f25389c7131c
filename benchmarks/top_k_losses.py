"""What others make of a teacher's top-k, to be measured beside ours: losses that do not know of the other tokens.

``teacher`` renormalises the teacher over its k tokens and keeps the student's full softmax: the student is taught that
nothing else exists. ``both`` renormalises the student over them too: what it does elsewhere costs nothing. They have
the arguments of divergence.between_top and are forward KL per token [...]; where the k tokens are everything, they are
that of the full vocabulary.
"""

from __future__ import annotations

import mlx.core as mx

from mlx_pare.evaluation.divergence import LEAST, kl


def both(ids: mx.array, log_p: mx.array, log_tail: mx.array, student: mx.array, temperature: float = 1.0) -> mx.array:
    """KL of teacher and student, each renormalised over the k ids."""
    inside = mx.take_along_axis(student.astype(mx.float32), ids, axis=-1)
    return kl(mx.maximum(log_p, LEAST), inside / temperature)


def teacher(
    ids: mx.array, log_p: mx.array, log_tail: mx.array, student: mx.array, temperature: float = 1.0
) -> mx.array:
    """KL of the teacher renormalised over the k ids to the student's full softmax: ``both``, less the log of the
    student's mass on the ids."""
    logits = student.astype(mx.float32) / temperature
    inside = mx.logsumexp(mx.take_along_axis(logits, ids, axis=-1), axis=-1) - mx.logsumexp(logits, axis=-1)
    return both(ids, log_p, log_tail, student, temperature) - inside


LOSSES = {"both renormalised": both, "teacher renormalised": teacher}
