"""Intervals and tests of pass rates, against what they are solutions of and against scipy."""

from __future__ import annotations

import pytest
from scipy import stats

from mlx_pare.tasks.statistics import Z_95, mcnemar, wilson


@pytest.mark.parametrize(("passed", "total"), [(0, 1), (1, 1), (0, 20), (20, 20), (7, 20), (1, 1000), (512, 1024)])
def test_wilson_solves_its_equation(passed, total):
    """Both ends are the rates r from which the observed p is Z errors away: |p - r| = Z sqrt(r (1 - r) / n)."""
    low, high = wilson(passed, total)
    rate = passed / total
    for end in (low, high):
        if 0 < end < 1:
            assert abs(rate - end) == pytest.approx(Z_95 * (end * (1 - end) / total) ** 0.5, abs=1e-12)
    ours = stats.binomtest(passed, total).proportion_ci(0.95, "wilson")
    assert (low, high) == pytest.approx((ours.low, ours.high), abs=1e-9) and low <= rate <= high


def test_no_items_say_nothing():
    assert wilson(0, 0) == (0.0, 1.0) and mcnemar(0, 0) == 1.0


@pytest.mark.parametrize(("one", "other"), [(0, 1), (5, 5), (0, 6), (3, 12), (12, 3), (40, 20), (0, 2000)])
def test_mcnemar_is_the_exact_binomial_test(one, other):
    assert mcnemar(one, other) == pytest.approx(stats.binomtest(one, one + other, 0.5).pvalue, rel=1e-9)
    assert mcnemar(one, other) == mcnemar(other, one)
