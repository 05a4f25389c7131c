"""How sure pass rates are: Wilson's interval of one rate, McNemar's exact test of two models on the same items."""

from __future__ import annotations

import math

Z_95 = 1.959963984540054  # the 97.5 % point of the normal distribution


def wilson(passed: int, total: int, z: float = Z_95) -> tuple[float, float]:
    """Compute Wilson's score interval of a rate (Wilson 1927, J. Am. Stat. Assoc. 22, 209).

    It is right for few items and for rates near 0 and 1, where the rate plus or minus its standard error is not.

    Args:
        passed: items that passed.
        total: all items.
        z: the point of the normal distribution; the default gives 95 %.
    Returns:
        The lower and the upper end, in [0, 1]; (0, 1) if there are no items.
    """
    if not total:
        return 0.0, 1.0
    rate, square = passed / total, z * z / total
    middle = (rate + square / 2) / (1 + square)
    half = z * math.sqrt(rate * (1 - rate) / total + square / (4 * total)) / (1 + square)
    return (0.0 if passed == 0 else middle - half), (1.0 if passed == total else middle + half)


def mcnemar(only_one: int, only_other: int) -> float:
    """Compute the exact two-sided p-value of McNemar's test (McNemar 1947, Psychometrika 12, 153).

    If both models are equally good, each item that only one of them passes is a toss of a coin. Items that both pass,
    or both fail, say nothing.

    Args:
        only_one: items that only one model passes.
        only_other: items that only the other one passes.
    Returns:
        The probability of a split at least as uneven: min(1, 2 P(X <= smaller)), X binomial of all such items and 1/2.
    """
    count, below, ways = only_one + only_other, 0, 1
    for k in range(min(only_one, only_other) + 1):
        below += ways
        ways = ways * (count - k) // (k + 1)
    return min(1.0, 2 * below / 2**count)  # whole numbers of any size: the quotient is rounded once
