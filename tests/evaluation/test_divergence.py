"""Divergences of full logits and of top-k targets: numbers and gradients against float64, and where masses vanish."""

from __future__ import annotations

import sys
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
import reference_targets as reference

from mlx_pare.base.errors import UsageError
from mlx_pare.evaluation import divergence
from mlx_pare.evaluation.divergence import KINDS, between, between_top
from mlx_pare.stream import head
from mlx_pare.text.corpus import Rows

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))
import top_k_losses

VOCAB = 12


def logits(scale: float = 2.0, seed: int = 0, shape: tuple = (2, 3, VOCAB)) -> tuple[np.ndarray, np.ndarray]:
    """Of a teacher and of a student, exact in float32."""
    rng = np.random.default_rng(seed)
    return tuple((scale * rng.normal(size=shape)).astype(np.float32).astype(np.float64) for _ in range(2))


def targets(teacher: np.ndarray, k: int, temperature: float = 1.0) -> tuple[mx.array, mx.array, mx.array]:
    ids, log_p, log_tail = reference.top(teacher / temperature, k)
    return mx.array(ids.astype(np.int32)), mx.array(log_p.astype(np.float32)), mx.array(log_tail.astype(np.float32))


def value_and_slope(function, student: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    x = mx.array(student.astype(np.float32))
    return np.array(function(x)), np.array(mx.grad(lambda s: function(s).sum())(x))


def expected(kind: str, teacher: np.ndarray, temperature: float, k: int | None):
    """The same of the reference: a function of the student's logits."""
    p = reference.softmax(teacher / temperature)
    if k is None:
        return lambda s: reference.divergence(kind, p, reference.softmax(s / temperature))
    ids = reference.top(teacher / temperature, k)[0]
    p = reference.classes(p, ids)
    return lambda s: reference.divergence(kind, p, reference.classes(reference.softmax(s / temperature), ids))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize("k", [None, 1, 4, VOCAB - 1, VOCAB])
def test_values_and_gradients(kind, temperature, k):
    teacher, student = logits()
    if k is None:
        found = value_and_slope(lambda s: between(kind, mx.array(teacher), s, temperature), student)
    else:
        top = targets(teacher, k, temperature)
        found = value_and_slope(lambda s: between_top(kind, *top, s, temperature), student)
    wanted = expected(kind, teacher, temperature, k)
    np.testing.assert_allclose(found[0], wanted(student), rtol=1e-5, atol=2e-6)
    np.testing.assert_allclose(found[1], reference.slope(wanted, student), rtol=1e-4, atol=2e-6)


def test_metric_and_loss_are_one():
    teacher, student = map(mx.array, logits())
    assert np.array_equal(divergence.kl(teacher, student), between("forward", teacher, student))
    assert tuple(KINDS) == ("forward", "reverse", "js")


@pytest.mark.parametrize("kind", KINDS)
def test_half_precision_is_computed_in_full(kind):
    teacher, student = (mx.array(x).astype(mx.bfloat16) for x in logits())
    full = between(kind, teacher.astype(mx.float32), student.astype(mx.float32))
    assert np.array_equal(between(kind, teacher, student), full)
    top = targets(np.array(teacher.astype(mx.float32)), VOCAB - 1)
    np.testing.assert_allclose(between_top(kind, *top, student), full, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_rest_of_one_ratio_loses_nothing(kind):
    """With all but one token, and with a rest in which both are constant, all is known; otherwise it is less."""
    teacher, student = logits()
    full = np.array(between(kind, mx.array(teacher), mx.array(student)))
    one, some = (np.array(between_top(kind, *targets(teacher, k), mx.array(student))) for k in (VOCAB - 1, 5))
    np.testing.assert_allclose(one, full, rtol=1e-5, atol=1e-6)
    assert (some < full - 1e-3).all() and (some > 0).all()
    rest = reference.top(teacher, VOCAB)[0][..., 5:]
    for of, value in ((teacher, -6.0), (student, 1.0)):
        np.put_along_axis(of, rest, value, axis=-1)
    flat = np.array(between(kind, mx.array(teacher), mx.array(student)))
    np.testing.assert_allclose(between_top(kind, *targets(teacher, 5), mx.array(student)), flat, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_to_learn_from_oneself(kind):
    teacher, _ = logits()
    for k in (3, VOCAB):
        found, slope = value_and_slope(lambda s, k=k: between_top(kind, *targets(teacher, k), s), teacher)
        assert np.abs(found).max() < 1e-6 and np.abs(slope).max() < 1e-6


# ---- where masses vanish ----


def peaked(height: float) -> np.ndarray:
    """The first three tokens so much above the others that these have no share in float32."""
    x = logits(1.0)[0]
    x[..., :3] += height
    return x


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("of_teacher", "of_student"), [(0, 40), (0, 80), (40, 0), (80, 0), (40, 60), (80, 80)])
def test_tails_without_digits(kind, of_teacher, of_student):
    """1 - sum(p) would be 0 or noise here, and its logarithm -inf."""
    teacher, student = peaked(of_teacher), np.roll(peaked(of_student), 1, axis=0)
    student[..., :3] = student[..., 2::-1]
    found, slope = value_and_slope(lambda s: between_top(kind, *targets(teacher, 3), s), student)
    wanted = expected(kind, teacher, 1.0, 3)
    np.testing.assert_allclose(found, wanted(student), rtol=2e-5, atol=2e-6)
    np.testing.assert_allclose(slope, reference.slope(wanted, student), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("heights", [(300, 0), (0, 300), (300, 300)])
def test_no_nan_where_even_float64_has_nothing_left(kind, heights):
    teacher, student = peaked(heights[0]), peaked(heights[1])[::-1]
    found, slope = value_and_slope(lambda s: between_top(kind, *targets(teacher, 3), s), student)
    assert np.isfinite(found).all() and np.isfinite(slope).all()
    full, slope = value_and_slope(lambda s: between(kind, mx.array(teacher), s), student)
    assert np.isfinite(full).all() and np.isfinite(slope).all()


@pytest.mark.parametrize("kind", KINDS)
def test_teacher_who_knows_no_rest(kind):
    """log_tail of -inf though there are more tokens: the student's mass there still costs, a finite amount."""
    teacher, student = logits()
    ids, log_p, log_tail = targets(teacher, 5)
    none = mx.full(log_tail.shape, -mx.inf)
    found, slope = value_and_slope(lambda s: between_top(kind, ids, log_p, none, s), student)
    assert np.isfinite(found).all() and np.isfinite(slope).all() and (found > 0).all()
    outside = np.ones(student.shape, bool)
    np.put_along_axis(outside, np.array(ids), False, axis=-1)
    assert (slope[outside] > 0).all()


def test_unknown_kind():
    teacher, student = map(mx.array, logits())
    with pytest.raises(UsageError, match=r"unknown divergence 'hellinger'. Choose one of forward, reverse, js"):
        between("hellinger", teacher, student)


# ---- what others do, which the benchmark measures ----


def test_renormalised_losses():
    teacher, student = logits()
    ids, log_p, _ = reference.top(teacher, 4)
    p = np.exp(log_p) / np.exp(log_p).sum(-1, keepdims=True)
    q = np.take_along_axis(reference.softmax(student), ids, -1)
    of = (*targets(teacher, 4), mx.array(student))
    np.testing.assert_allclose(top_k_losses.teacher(*of), reference.kl(p, q), rtol=1e-5)
    np.testing.assert_allclose(top_k_losses.both(*of), reference.kl(p, q / q.sum(-1, keepdims=True)), rtol=1e-5)
    everything = (*targets(teacher, VOCAB), mx.array(student))
    for loss in top_k_losses.LOSSES.values():
        np.testing.assert_allclose(loss(*everything), between("forward", *map(mx.array, (teacher, student))), rtol=1e-5)


def test_only_ours_punishes_mass_elsewhere():
    """A student that differs in the rest alone: renormalising both does not see it. Renormalising the teacher asks it
    to have no rest at all, even where the teacher has."""
    teacher, _ = logits(0.5)
    top = targets(teacher, 4)
    elsewhere = np.ones(teacher.shape, bool)
    np.put_along_axis(elsewhere, np.array(top[0]), False, axis=-1)
    student = mx.array(teacher + 3.0 * elsewhere)
    assert np.array(between_top("forward", *top, student)).min() > 0.1
    assert np.abs(np.array(top_k_losses.both(*top, student))).max() < 1e-6
    slope = np.array(mx.grad(lambda s: top_k_losses.teacher(*top, s).sum())(mx.array(teacher)))
    assert (slope[elsewhere] > 0.01).all()


@pytest.mark.parametrize("students", [0, 1, 3])
@pytest.mark.parametrize("chunk", [1 << 26, 4 * 16 * 7])
def test_mean_kl_of_several_students(monkeypatch, students, chunk):
    """The vocabulary in one chunk or in many, rows of different lengths: the mean of float64 over predicted tokens."""
    monkeypatch.setattr(head, "CHUNK_BYTES", chunk)
    monkeypatch.setattr(divergence, "TOKENS_AT_ONCE", 20)
    rng = np.random.default_rng(0)
    rows = Rows(np.zeros((5, 9), np.int32), np.array([9, 2, 5, 9, 7], np.int32))
    table = rng.normal(size=(50, 16)).astype(np.float32)
    states = [rng.normal(size=(5, 9, 16)).astype(np.float32) for _ in range(1 + students)]
    layer = nn.Linear(16, 50, bias=False)
    layer.weight = mx.array(table)
    teacher = head.Streamed(mx.array(states[0]), layer, 50, lambda x: x)
    found = divergence.mean_kl(rows, [mx.array(state) for state in states[1:]], teacher)
    counted = rows.mask()[:, 1:]
    p, *others = (reference.softmax((state @ table.T.astype(np.float64))[:, :-1][counted]) for state in states)
    np.testing.assert_allclose(found, [reference.divergence("forward", p, q).mean() for q in others], rtol=1e-5)
