"""The probes that come with mlx-pare: enough items, checks that are right about them, texts that stay the same."""

from __future__ import annotations

import hashlib

import pytest

from mlx_pare.base.errors import PareError, UsageError
from mlx_pare.tasks import haystack
from mlx_pare.tasks.check_the_checkers import check_the_checkers
from mlx_pare.tasks.checks import Judge
from mlx_pare.tasks.shipped import collect, probes


def words(prompt: str) -> int:
    return len(prompt.split())


@pytest.fixture(scope="module")
def judge():
    return Judge()


@pytest.mark.parametrize("name", probes())
def test_a_probe_is_large_enough_and_its_checks_are_right(judge, name):
    tasks = collect([f"probe:{name}"], 2048, words)
    assert len(tasks) >= 20 and len({task.prompt for task in tasks}) == len(tasks)
    assert all(task.right and task.wrong for task in tasks)
    assert check_the_checkers(tasks, judge) == sum(len(task.right) + len(task.wrong) for task in tasks)


@pytest.mark.parametrize("name", probes())
def test_a_judge_that_accepts_everything_is_found(name):
    class Lenient(Judge):
        def passes(self, checks, answer, record, where):
            return True

    with pytest.raises(PareError, match="accepts the wrong example"):
        check_the_checkers(collect([f"probe:{name}"], 2048, words), Lenient())


def test_all_probes_by_one_name():
    every = collect(["probes"], 2048, words)
    assert len(every) == sum(len(collect([f"probe:{name}"], 2048, words)) for name in probes())
    assert {"arithmetic", "needle", "extraction", "instructions", "languages", "refusal", "repetition"} == set(probes())
    assert len({task.category for task in every if "languages" in task.where}) >= 3


def test_needles_lie_where_they_should():
    tasks = list(haystack.tasks(1024, words))
    sizes = sorted({int(task.category.split()[1]) for task in tasks})
    assert sizes == [128, 256, 512, 1024]
    for task in tasks:
        size, code = int(task.category.split()[1]), task.checks[0].accepted[0]
        room = size - haystack.MAX_TOKENS
        assert room - 40 < words(task.prompt) <= room and task.prompt.count(code) == 1
        depth = int(task.where.split(", ")[-1].split("%")[0]) / 100
        assert abs(task.prompt.index(code) / len(task.prompt) - depth) < 0.35
    digest = hashlib.sha256("".join(task.prompt for task in tasks).encode()).hexdigest()
    again = hashlib.sha256("".join(task.prompt for task in haystack.tasks(1024, words)).encode()).hexdigest()
    assert digest == again
    assert [*haystack.tasks(40, words)] == [], "no length has room"


def test_names_that_mean_nothing(tmp_path):
    for name, told in (
        ("probe:arithmetik", "Did you mean arithmetic"),
        ("absent.jsonl", "there is no tasks file absent"),
    ):
        with pytest.raises(UsageError, match=told):
            collect([name], 512, words)
    with pytest.raises(UsageError, match="given twice"):
        collect(["probes", "probes"], 512, words)
