"""measure_tasks: models on tasks -> TaskResults. One model is in memory at a time."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..base.errors import Refused, UsageError
from ..evaluation import resident
from ..sources.open_model import StrPath, opened
from ..store.atomic import replace_file
from ..store.schema import dump_json
from .ask import Asked, Reader, Way, ask, chosen, pending, work
from .check_the_checkers import check_the_checkers
from .checks import Judge
from .kept_answers import FILE as ANSWERS, KeptAnswers
from .records import Task
from .results import FILE, Answer, Given, Item, Paired, Rate, Surprisal, TaskResults
from .shipped import collect, functions
from .statistics import mcnemar, wilson

LONGEST_TEXT = 8192  # tokens of the longest text of the probe `needle`, unless the user says otherwise
ALL = "all"


@dataclass(frozen=True)
class Prepared:
    """Tasks that are read and whose checks passed their self-test. ``asked``: by model, the teacher last."""

    tasks: list[Task]
    judge: Judge
    readers: list[Reader]
    asked: list[list[Asked]]
    examples: int


def prepare(
    models: Sequence[StrPath], tasks: Sequence[str], way: Way, named: Sequence[str] = (), context: int | None = None
) -> Prepared:
    """Read tasks for models, and test their checks. No model is loaded.

    Args:
        models: the model, and the teacher if there is one.
        tasks: files, "probes", or "probe:NAME".
        way: how models are asked.
        named: functions of the user that checks may call, as MODULE:FUNCTION.
        context: tokens of the longest text of the probe `needle`; None: 8192, or what the models were made for.
    Returns:
        The tasks as each model reads them.
    Raises:
        UsageError: nothing can be asked, a function is not named, or a task is too long for a model.
        PareError: a file or a tokenizer is damaged, or a check fails its self-test.
    """
    if way.temperature < 0 or not math.isfinite(way.temperature):
        raise UsageError(f"the temperature {way.temperature} is not allowed", "give a number from 0 on")
    readers = [Reader(opened(model), way) for model in models]
    longest = min([context or LONGEST_TEXT, *(reader.longest for reader in readers)])
    found = collect(tasks, longest, lambda prompt: max(reader.count(prompt) for reader in readers))
    judge = Judge(functions(found, named))
    examples = check_the_checkers(found, judge)
    return Prepared(found, judge, readers, [[reader.asked(task) for task in found] for reader in readers], examples)


def planned(prepared: Prepared, out_dir: Path | None) -> dict[str, Any]:
    """What ``measure_tasks`` would do: for each model the tasks, those not answered yet, and the tokens of these."""
    rows = []
    for reader, asked in zip(prepared.readers, prepared.asked, strict=True):
        kept = KeptAnswers(None)
        if out_dir is not None and (out_dir / ANSWERS).exists():
            with KeptAnswers(out_dir) as there:
                kept.known = there.known
        left = pending(asked, kept)
        rows.append({
            "model": str(reader.model), "tasks": len(asked), "left": len(left), "tokens": sum(map(work, left)),
            "longest": max(len(one.prompt) for one in asked),
        })  # fmt: skip
    return {"models": rows, "examples": prepared.examples}


def measure_tasks(
    model: StrPath,
    tasks: Sequence[str],
    out_dir: Path | None = None,
    *,
    teacher: StrPath | None = None,
    way: Way | None = None,
    named: Sequence[str] = (),
    context: int | None = None,
    memory_cap: int | None = None,
) -> TaskResults:
    """Ask a model tasks and judge its answers; with a teacher, compare both on the same tasks.

    Args:
        model: the model, as people give it: a directory, a GGUF file, or a name on the hub.
        tasks: files, "probes", or "probe:NAME".
        out_dir: where tasks.json is written, and answers.jsonl, from which a killed call goes on; None: nowhere.
        teacher: the model to compare with, of any tokenizer; None: no comparison.
        way: how models are asked; None: greedily, and prompts as chats if there is a template.
        named: functions of the user that checks may call, as MODULE:FUNCTION.
        context: tokens of the longest text of the probe `needle`; None: 8192, or what the models were made for.
        memory_cap: bytes that one model may take; None: the memory that is free.
    Returns:
        Pass rates, surprisals and items; with a teacher also its own and the paired comparison.
    Raises:
        UsageError: nothing can be asked, a function is not named, or a task is too long for a model.
        Refused: a model does not fit in memory, or ``out_dir`` holds results that this function did not write.
        PareError: a file or a model is damaged, or a check fails its self-test.
    """
    way = way or Way()
    if out_dir is not None and (out_dir / FILE).exists() and not (out_dir / ANSWERS).exists():
        raise Refused(f"{out_dir / FILE} exists already, without the answers it was made of", "choose another --out")
    prepared = prepare([model, *([teacher] if teacher is not None else [])], tasks, way, named, context)
    resident.require([reader.model for reader in prepared.readers], memory_cap, answers=True)
    with KeptAnswers(out_dir) as kept:
        judged = []
        for reader, asked in zip(prepared.readers, prepared.asked, strict=True):
            ask(reader, asked, kept)
            judged.append([_answer(one, reader, kept, prepared.judge) for one in asked])
    found = _results(prepared, judged, way)
    if out_dir is not None:
        replace_file(out_dir / FILE, dump_json(found))
    return found


def _answer(one: Asked, reader: Reader, kept: KeptAnswers, judge: Judge) -> Answer:
    """What a model answered to one task, judged."""
    task, text, finished = one.task, None, None
    if task.options:
        text = chosen(one, kept)
    elif one.written:
        text, finished = kept.known[one.written]["text"], kept.known[one.written]["finished"]
    passed = None if text is None else judge.passes(task.checks, text, task.raw, task.where)
    given = None
    if task.answer:
        nats = kept.known[one.measured]["nats"][-1]
        worst = max(range(len(nats)), key=nats.__getitem__)
        token = reader.tok.decode([one.endings[-1][worst]])
        given = Given(tokens=len(nats), mean=math.fsum(nats) / len(nats), worst=nats[worst], worst_token=token)
    return Answer(text=text, finished=finished, passed=passed, surprisal=given)


def _results(prepared: Prepared, judged: list[list[Answer]], way: Way) -> TaskResults:
    """Count what passed, by category in the order of the tasks."""
    tasks, ours = prepared.tasks, judged[0]
    theirs = judged[1] if len(judged) > 1 else [None] * len(tasks)
    items = [
        Item(where=task.where, category=task.category, answer=answer, teacher=teacher)
        for task, answer, teacher in zip(tasks, ours, theirs, strict=True)
    ]
    groups = {
        name: [item for item in items if item.category == name] for name in dict.fromkeys(t.category for t in tasks)
    }
    checked = {
        name: some for name, part in groups.items() if (some := [i for i in part if i.answer.passed is not None])
    }
    judged_items = [item for item in items if item.answer.passed is not None]
    more: dict[str, Any] = {}
    if len(judged) > 1:
        more = {
            "teacher": str(prepared.readers[1].model),
            "overall_teacher": _rate(ALL, judged_items, "teacher"),
            "teacher_tasks": [_rate(name, some, "teacher") for name, some in checked.items()],
            "overall_paired": _paired(ALL, judged_items),
            "paired": [_paired(name, some) for name, some in checked.items()],
            "teacher_surprisal": _surprisals(groups, "teacher"),
        }
    return TaskResults(
        model=str(prepared.readers[0].model), raw=way.raw, temperature=way.temperature, seed=way.seed,
        overall=_rate(ALL, judged_items), tasks=[_rate(name, some) for name, some in checked.items()],
        surprisal=_surprisals(groups), items=items, **more,
    )  # fmt: skip


def _rate(category: str, items: Sequence[Item], who: str = "answer") -> Rate:
    passed = sum(bool(getattr(item, who).passed) for item in items)
    low, high = wilson(passed, len(items))
    silent = None
    if items and items[0].teacher is not None:
        silent = not any(item.teacher.passed for item in items)
    return Rate(category=category, passed=passed, total=len(items), low=low, high=high, says_nothing=silent)


def _paired(category: str, items: Sequence[Item]) -> Paired:
    pairs = [(bool(item.answer.passed), bool(item.teacher.passed)) for item in items]
    one, other = pairs.count((True, False)), pairs.count((False, True))
    return Paired(
        category=category, both=pairs.count((True, True)), only_model=one, only_teacher=other,
        neither=pairs.count((False, False)), p=mcnemar(one, other),
    )  # fmt: skip


def _surprisals(groups: dict[str, list[Item]], who: str = "answer") -> list[Surprisal]:
    """The surprisal of the given answers of each category, the mean over their tokens."""
    found = []
    for name, items in groups.items():
        given = [one for item in items if (one := getattr(item, who).surprisal) is not None]
        if given:
            tokens, worst = sum(one.tokens for one in given), max(given, key=lambda one: one.worst)
            mean = math.fsum(one.mean * one.tokens for one in given) / tokens
            found.append(
                Surprisal(category=name, tokens=tokens, mean=mean, worst=worst.worst, worst_token=worst.worst_token)
            )
    return found
