"""`evaluate`: a model on text, on tasks, or on both; with tables of what was measured."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..base import console
from ..base.errors import UsageError, plain
from ..model.hub_name import shown
from ..options.option import Option
from ..options.settings import OUTPUT, memory
from ..options.values import COUNT, SEED, between
from . import tables
from .app import DryRun, Model, command

if TYPE_CHECKING:
    from ..tasks.results import TaskResults

TASKS = "Tasks"
OPTIONS = (
    "length",
    "field",
    "memory_cap",
    Option("tasks", TASKS, 'Tasks file (JSON Lines), "probes" for all tests that come with mlx-pare, or "probe:NAME". '
           "May be repeated.", metavar="FILE", repeats=True),
    Option("task_function", TASKS, "Function of yours that checks of the tasks file may call. May be repeated.",
           metavar="MODULE:FUNCTION", repeats=True),
    Option("raw", TASKS, "Give prompts to the model as they are, also if its tokenizer has a chat template.", bool,
           False),
    Option("temperature", TASKS, "Temperature of sampling; 0 takes the most likely token.", float, 0.0,
           values=between(0, 100), metavar="NUMBER"),
    Option("seed", TASKS, "Seed of sampling.", int, 0, values=SEED),
    Option("context", TASKS, "Tokens of the longest text of the probe needle. Default: 8192, or what the model was "
           "made for.", int, values=COUNT),
    Option("out", OUTPUT, "Directory for the results (tasks.json) and the answers, from which the same command "
           "continues.", Path, metavar="DIR"),
)  # fmt: skip


@command(
    "evaluate",
    "mlx-pare evaluate MODEL --data book.txt --length 256 | mlx-pare evaluate PRUNED --data book.txt --teacher MODEL | "
    "mlx-pare evaluate MODEL --tasks tasks.jsonl --out answers | "
    "mlx-pare evaluate PRUNED --tasks probes --teacher MODEL",
    options=OPTIONS,
    first=("data", "teacher", "tasks", "out", "samples", "length"),
)
def evaluate_command(
    model: Model,
    data: Annotated[
        str | None, typer.Option(help="Text to measure on: a .txt, .md or .jsonl file, or a folder.", metavar="PATH")
    ] = None,
    teacher: Annotated[
        Path | None,
        typer.Option(help="Model to compare with, by KL divergence and agreement, and by tasks.", metavar="MODEL"),
    ] = None,
    samples: Annotated[int | None, typer.Option(min=1, help="Number of windows. Default: all.")] = None,
    dry_run: DryRun = False,
    **asked: Any,
) -> dict[str, Any]:
    """Measure the perplexity of a model, or the tasks it passes.

    With --teacher it also measures the KL divergence, how often the most likely tokens agree, and whether one of both
    models passes more tasks. Either --data or --tasks is needed.
    """
    if data is None and not asked["tasks"]:
        raise UsageError("there is nothing to measure", "give --data PATH, --tasks FILE, or both")
    found = _text(model, data, teacher, samples, dry_run, asked) if data is not None else {}
    return found | (_tasks(model, teacher, dry_run, asked) if asked["tasks"] else {})


def _text(
    model: Path, data: str, teacher: Path | None, samples: int | None, dry_run: bool, asked: dict[str, Any]
) -> dict[str, Any]:
    """Measure a model on a text."""
    from .. import lm
    from ..evaluation.evaluate import evaluate
    from ..model.hub_name import called
    from ..text import corpus

    tokenizer = lm.tokenizer(model)
    rows = corpus.windows(tokenizer, corpus.read(Path(data), tokenizer, asked["field"]), asked["length"], samples)
    if dry_run:
        found = {"data": data, "windows": rows.count, "length": rows.length, "tokens": rows.total}
        console.say(f"{data}: {rows.count} windows of at most {rows.length} tokens, {rows.total:,} in all")
        return found
    found = evaluate(model, rows, tokenizer, teacher, data, memory(asked["memory_cap"])).model_dump()
    tables.show_metrics(found | {"model": called(model)})
    return found


def _tasks(model: Path, teacher: Path | None, dry_run: bool, asked: dict[str, Any]) -> dict[str, Any]:
    """Measure a model on tasks."""
    from ..tasks.ask import Way
    from ..tasks.measure import measure_tasks, planned, prepare

    way = Way(asked["raw"], asked["temperature"], asked["seed"])
    named, context, out = asked["task_function"] or [], asked["context"], asked["out"]
    if dry_run:
        models = [model] if teacher is None else [model, teacher]
        plan = planned(prepare(models, asked["tasks"], way, named, context), out)
        for row in plan["models"]:
            console.say(
                f"{shown(row['model'])}: {row['tasks']} tasks, {row['left']} of them not answered yet; reads and "
                f"writes at most {row['tokens']:,} tokens, the longest prompt has {row['longest']:,}"
            )
        console.say(f"The checks are right about all of the {plan['examples']} examples.")
        return {"plan": plan}
    found = measure_tasks(
        model, asked["tasks"], out, teacher=teacher, way=way, named=named, context=context,
        memory_cap=memory(asked["memory_cap"]),
    )  # fmt: skip
    show_tasks(found)
    return found.model_dump()


def show_tasks(found: TaskResults) -> None:
    """Print pass rates with their intervals, the comparison with the teacher, and surprisals."""
    rates = [*found.tasks, *([found.overall] if len(found.tasks) > 1 else [])]
    if rates and found.teacher is None:
        rows = [_rate(rate) for rate in rates]
        console.table(shown(found.model), ["<tasks", "passed", "rate", "95 % interval"], rows)
    elif rates:
        console.table(
            f"{shown(found.model)} against {shown(found.teacher)}",
            ["<tasks", "passed", "rate", "95 % interval", "teacher", "only model", "only teacher", "p", "<"],
            [_against(rate, found) for rate in rates],
            "p: chance of a split at least as uneven between models that are equally good (McNemar).",
        )
    if found.surprisal:
        theirs = {row.category: row for row in found.teacher_surprisal}
        rows = []
        for row in found.surprisal:
            other = theirs.get(row.category)
            cells = [f"{other.mean:.3f}", f"{other.worst:.2f}"] if other else []
            rows.append(
                [row.category, row.tokens, f"{row.mean:.3f}", f"{row.worst:.2f}", plain(repr(row.worst_token)), *cells]
            )
        columns = ["<given answers", "tokens", "mean nats", "worst", "<worst token"]
        console.table(shown(found.model), columns + (["teacher: mean", "worst"] if theirs else []), rows)


def _rate(rate: Any) -> list[str]:
    return [rate.category, f"{rate.passed}/{rate.total}", f"{rate.rate:.0%}", f"{rate.low:.0%} to {rate.high:.0%}"]


def _against(rate: Any, found: TaskResults) -> list[Any]:
    """The cells of a category beside those of the teacher."""
    every = [(found.overall, found.overall_teacher, found.overall_paired)]
    every += zip(found.tasks, found.teacher_tasks, found.paired, strict=True)
    other, pair = next((t, p) for r, t, p in every if r is rate)
    note = "says nothing here: the teacher passes none" if rate.says_nothing else ""
    return [*_rate(rate), f"{other.passed}/{other.total}", pair.only_model, pair.only_teacher, f"{pair.p:.2g}", note]
