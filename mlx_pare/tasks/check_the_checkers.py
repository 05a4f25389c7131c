"""The self-test of checks, before a model is asked: each must accept its right examples and reject its wrong ones.

A check that accepts everything would call every model perfect. If a record gives no wrong example, its check must
reject one of NONSENSE at least.
"""

from __future__ import annotations

from collections.abc import Iterable

from ..base.errors import PareError
from .checks import Judge
from .records import Task

NONSENSE = ("", "zqx vrk.", "{}", "-98765.4321", "[]\nwub wub wub wub wub wub wub wub wub wub wub wub wub wub wub wub")


def check_the_checkers(tasks: Iterable[Task], judge: Judge) -> int:
    """Run every check on its examples.

    Args:
        tasks: records with checks.
        judge: tells whether an example passes.
    Returns:
        How many examples were judged, without the nonsense.
    Raises:
        PareError: a check rejects a right example, accepts a wrong one, or accepts everything; the record is named.
    """
    count = 0
    for task in tasks:
        if not task.checks:
            continue
        for examples, expected in ((task.right, True), (task.wrong, False)):
            for text in examples:
                count += 1
                if judge.passes(task.checks, text, task.raw, task.where) is not expected:
                    kind, does = ("wrong", "accepts") if not expected else ("right", "rejects")
                    raise PareError(
                        f"{task.where}: the check {does} the {kind} example {text[:60]!r}", "repair the check"
                    )
        if not task.wrong and all(judge.passes(task.checks, text, task.raw, task.where) for text in NONSENSE):
            raise PareError(
                f"{task.where}: the check accepts everything, also an empty answer",
                'repair it, or give an answer that it rejects as "wrong"',
            )
    return count
