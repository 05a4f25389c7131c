"""The story of a run. Read this file first: the steps are a few lines each in pipeline/steps.py, each verb has its own
file.

calibrate -> score -> plan -> reconstruct -> prune -> recover -> evaluate (original, pruned, recovered, random, fewer
bits) -> export -> bench -> report

With a schedule, every stage does the steps up to recover once, each stage in its own run directory
(pipeline/stages.py).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from .. import lm
from ..base import console
from ..base.errors import PareError, Refused, UsageError
from ..base.units import gb, readable
from ..capacity import macs
from ..evaluation.metrics import Metrics
from ..exporting.export import why_not
from ..gguf.architectures import RUNTIMES
from ..gguf.write import quantizer
from ..model.checkpoint import Checkpoint
from ..options.settings import Settings
from ..planning.plan import whole
from ..planning.uniform import shape
from ..pruning.plan_file import Plan
from ..recovery.blockwise import check_memory as check_local
from ..recovery.options import METHODS, check_memory as check_recovery
from ..repair.reconstruct import check_memory as check_reconstruction, costs as reconstruction_costs
from ..reporting import stage_table
from ..reporting.report import report
from ..reporting.verdict import LEFT_OUT, first_result, metrics, reconstructed, verdict
from ..scoring.calibrate import check_memory as check_calibration
from ..scoring.score import criterion
from ..sources.open_model import StrPath, opened as model_of
from ..store import step_files
from ..store.arrays import MOST_NATS
from ..store.places import CONTENDERS, name_of
from ..store.rundir import Run
from ..stream import kept
from ..text import corpus
from ..text.splits import VALIDATION_ROWS, Texts
from . import choose_sizes, contenders, measure_steps, recipes, stages, steps
from .choose_layers import layers_by_of
from .export_step import export_step, required

# Operations to choose and solve one matrix: an ffn of 16384 that is solved by its Gram matrix, minutes on two cores.
AFFORDABLE = 1.5e13


def run(model: StrPath, out: StrPath, settings: Settings) -> dict[str, Any]:
    """Do everything for one model. A run that stopped at any point is continued.

    Args:
        model: model directory, GGUF file or name.
        out: run directory, new or to be continued.
        settings: what is asked.
    Returns:
        Paths ("model", "gguf", "report"), the verdict, metrics "before", "after" and of all "contenders", and what was
        found of Macs, stages and speed.
    Raises:
        UsageError: a name or number means nothing, or a target, an axis or the text does not suit.
        Refused: the directory belongs to something else, the target is out of reach, the memory does not suffice, or
            the result does not fit the Mac that was named.
        PareError: a check finds the result broken or worse than --min-quality allows, or a required GGUF file failed.
    """
    out, settings = Path(out), _with_teacher(settings)
    model = model_of(model, out)
    s = affordable(model, choose_sizes.with_possible_axes(model, recipes.dated(out, hurried(settings))))
    preflight(model, s)
    s = choose_sizes.settled(model, s, choose_sizes.begun(out / name_of(1) if s.stages else out))
    texts = Texts(model, s)
    _ = texts.test, texts.validation, texts.calibration  # a text that is too short fails before anything is written
    asked = recipes.recipe_of(model, s)
    with steps.open_run(model, out) as opened:
        stages.agree(opened, s)
        opened.write_recipe(asked, replace=False)
        opened.kept = opened.path / "kept"
        if s.quick:
            console.say(f"--quick: {LEFT_OUT}; the same command without --quick goes on from what this one has done")
        result = (_in_stages if s.stages else _at_once)(opened, texts, s)
        others = {} if s.quick else _others(opened, result, s)
        contenders.contender_steps(opened, others, texts, s)
        kept.clear(opened.kept)
        gguf = export_step(opened, result, texts, s)
        if s.trials > 0:
            measure_steps.bench_step(opened, result, s)
        named = {"original", "pruned", *others, *(["recovered"] if s.recovers else [])}
        measured = [n for n, _ in CONTENDERS if n in named or n.startswith("stage-")]
        written = report(opened.path, measured)
        summary = _summary(opened, result, gguf, written, measured)
        opened.write_recipe(asked)  # only now: a refused request leaves the recipe of what was done
        _quality_gate(summary, s)
        _fit_gate(summary, s)
        required(opened, s)
    return summary


def _with_teacher(s: Settings) -> Settings:
    """Return the settings with a model directory as the teacher."""
    return replace(s, teacher=str(model_of(s.teacher))) if s.teacher else s


def hurried(s: Settings) -> Settings:
    """With --quick, return the settings without recovery and measurements of speed.

    Raises UsageError with a schedule, because its stages are recovered.
    """
    if not s.quick:
        return s
    if s.stages:
        raise UsageError("--quick leaves recovery out, and every stage of --schedule needs it", "leave out one of them")
    return replace(s, recover_steps=0, local_steps=0, trials=0)


def _others(run: Run, result: Path, s: Settings) -> dict[str, Plan]:
    """List what the result is compared with: a random cut, and the original with fewer bits if that can be as small.
    With a schedule, also the units of the last stage, cut out of the original at once."""
    plans = {"pruned": stages.plan_step(run, s)} if s.stages else {}
    plans["random"] = contenders.random_plan(run, s)
    narrow = whole(run.model, steps.plan_of(run), Checkpoint(result).nbytes())
    return plans if narrow is None else {**plans, "fewer-bits": narrow}


def _cut(run: Run, texts: Texts, s: Settings, original: Path | None = None) -> Path:
    """Cut the model of a run once, without recovery. ``original`` is the original of a model that was cut before."""
    steps.calibrate_step(run, texts, s)
    steps.score_step(run, s)
    choose_sizes.plan_step(run, texts, s)
    if s.reconstruct:
        steps.reconstruct_step(run, texts, s)
    return steps.prune_step(run, s.reconstruct, original, s.memory_cap)


def _at_once(run: Run, texts: Texts, s: Settings) -> Path:
    """Cut once and recover once. Measure both results and the original."""
    result = _cut(run, texts, s)
    measure_steps.evaluate_step(run, "original", run.model, texts, s)
    measure_steps.evaluate_step(run, "pruned", result, texts, s)
    console.say(first_result(metrics(run.path, ["original", "pruned"])))
    if s.recovers:
        result = steps.recover_step(run, texts, s)
        measure_steps.evaluate_step(run, "recovered", result, texts, s)
    return result


def _in_stages(run: Run, texts: Texts, s: Settings) -> Path:
    """Let every stage cut what the stage before left, with the original as the teacher; all are measured against the
    original.

    "pruned" is then measured among the other contenders.
    """
    measure_steps.evaluate_step(run, "original", run.model, texts, s)
    result = run.model
    for stage in stages.stages(s):
        place = run.path / stage.name
        console.say(f"{stage.name} of {len(s.stages)}: to {stage.share:g} of the original, {stage.steps} steps")
        asked = choose_sizes.settled(result, stage.settings(s, run.model, result), choose_sizes.begun(place))
        with steps.open_run(result, place) as opened:
            opened.kept = run.kept
            opened.write_recipe(recipes.recipe_of(result, asked), replace=False)
            pruned = _cut(opened, texts, asked, None if result == run.model else run.model)
            measure_steps.evaluate_step(run, f"{stage.name}-pruned", pruned, texts, s)
            drawn = (s.seed + stage.number - 1) % 2**32  # else every stage would train on the same rows
            result = steps.recover_step(opened, texts, replace(asked, seed=drawn))
        measure_steps.evaluate_step(run, stage.recovered, result, texts, s)
    return result


def dry_run(model: StrPath, s: Settings) -> dict[str, Any]:
    """Return what a run would make: sizes before and after, and the memory it would need. It writes nothing."""
    model, s = model_of(model), _with_teacher(s)
    s = affordable(model, choose_sizes.with_possible_axes(model, s))
    preflight(model, s)
    choose_sizes.settled(model, s)
    rows = corpus.Extent(s.samples, s.length)
    needed = check_calibration(Checkpoint(model), rows, s.memory_cap, criterion(s.criterion).extra)
    return shape_of(model, s) | {"calibration_bytes": needed}


def shape_of(model: Path, s: Settings) -> dict[str, Any]:
    """Return the sizes that a target leads to, including those of every stage. This needs no scores."""
    options = steps.plan_options(s)
    made = shape(Checkpoint(model), options)
    sizes = {"before": made.before.model_dump(), "after": made.after.model_dump()}
    found = {"asked": made.target.asked, **sizes, "neighbours": made.neighbours}
    if s.stages:
        after = [shape(Checkpoint(model), replace(options, keep=share)).after for share in s.stages]
        found["stages"] = [
            {"stage": stage.name, "share": stage.share, "steps": stage.steps, **size.model_dump()}
            for stage, size in zip(stages.stages(s), after, strict=True)
        ]
    return found


def preflight(model: Path, s: Settings) -> None:
    """Find what cannot work before any work: wrong names, a target out of reach, a recovery that does not fit in memory
    (the uncut model bounds the cut one)."""
    stages.check(s)
    criterion(s.criterion)
    one_of("recovery method", s.method, METHODS)
    layers_by_of(s, s.criterion)
    for name in s.runtimes:
        one_of("runtime", name, RUNTIMES)
    if choose_sizes.wants_gguf(s) and (why := why_not(Checkpoint(model))):
        raise Refused(f"no GGUF file can be made of it: {why.problem}", "leave out --gguf and --runtimes")
    if s.gguf and not quantizer.direct(kind := quantizer.known(s.gguf), False):
        quantizer.require(kind)
    options = steps.plan_options(s)
    shape(Checkpoint(model), replace(options, bits=min(s.choose_bits)) if s.choose_bits else options)
    if s.reconstruct:
        check_reconstruction(Checkpoint(model), corpus.Extent(s.samples, s.length), s.memory_cap)
    options = steps.recover_options(s, s.seed)
    options.check(Checkpoint(model).arch.sizes["vocab"])
    if s.teacher:
        lm.require_same_tokens(model, Path(s.teacher))
    if s.recovers:
        _recoverable(Checkpoint(model), Checkpoint(s.teacher or model), s)


def _recoverable(model: Checkpoint, teacher: Checkpoint, s: Settings) -> None:
    """Raises UsageError if blocks cannot be healed one by one, Refused if the recovery does not fit in memory."""
    train, validation = (corpus.Extent(count, s.length) for count in (s.train_rows, VALIDATION_ROWS))
    options = steps.recover_options(s, s.seed)
    if s.local_steps:
        if "hidden" in s.axes or model.arch.sizes["hidden"] != teacher.arch.sizes["hidden"]:
            raise UsageError(
                "--local-steps recovers block by block, which needs original and result to have the same hidden size",
                "use --local-steps 0" + (", or leave hidden out of --axes" if "hidden" in s.axes else ""),
            )
        check_local(model, teacher, train.joined(validation), options.blocks, s.memory_cap)
    if s.recover_steps > 0:
        check_recovery(model, teacher, train, validation, options, s.memory_cap)


def affordable(model: Path, s: Settings) -> Settings:
    """Switch reconstruction off, with a warning, if it would take hours or if the free memory does not suffice (a wide
    model on a small Mac). Under a --memory-cap, which the user chose, ``preflight`` refuses instead."""
    rows = corpus.Extent(s.samples, s.length)
    if s.reconstruct and max(each.flops for each in reconstruction_costs(Checkpoint(model), rows)) > AFFORDABLE:
        console.warn(
            f"going on without reconstruction: with {rows.total} tokens it would take hours (fewer than the ffn is "
            "wide take less); the commands calibrate, score, plan, reconstruct, prune do it all the same"
        )
        return replace(s, reconstruct=False)
    if s.reconstruct and s.memory_cap is None:
        try:
            check_reconstruction(Checkpoint(model), rows, None)
        except Refused as error:
            console.warn(f"going on without reconstruction: {error.problem}")
            return replace(s, reconstruct=False)
    return s


def one_of(what: str, name: str | None, known: Sequence[str | None]) -> None:
    """Check a name against those that are known.

    Args:
        what: the kind of name, for the message.
        name: what was given.
        known: what is allowed; may contain None.
    Raises:
        UsageError: the name is unknown.
    """
    if name not in known:
        raise UsageError(f"unknown {what} {name!r}", f"choose one of {', '.join(filter(None, known))}")


def _summary(run: Run, model: Path, gguf: Path | None, written: Path, measured: Sequence[str]) -> dict[str, Any]:
    def of(name: str) -> dict[str, Any]:
        step = run.directory(f"evaluate-{name}")
        measured = Metrics.load(step / "metrics.json")
        return measured.model_dump() | {"nll": measured.mean_nll} | step_files.read(step / "size.json")

    found = metrics(run.path, measured)
    return {
        "model": str(model),
        "gguf": None if gguf is None else str(gguf),
        "report": str(written),
        "verdict": verdict(found, reconstructed(run.manifest)),
        "before": of("original"),
        "after": of("recovered" if "recovered" in found else "pruned"),
        "contenders": {name: of(name) for name in found},
        "fits": step_files.read(run.directory("export") / "fits.json"),
        **({"stages": told} if (told := stage_table.story(run.path)) else {}),
        "bench": step_files.find(run.directory("bench") / "bench.json"),
    }


def _fit_gate(summary: dict[str, Any], s: Settings) -> None:
    """Raises Refused if the model or the GGUF file does not fit the Mac that was named."""
    if s.mac is None:
        return
    name = macs.find(s.mac).name
    for what, key in (("the model", "rows"), ("the GGUF file", "gguf_rows")):
        row = next((r for r in summary["fits"][key] if r["mac"] == name), None)
        if row and not row["fits"]:
            raise Refused(
                f"{what} does not fit {name} at {s.context} tokens: {gb(-row['headroom_bytes'])} too much",
                f"everything is kept, see {summary['report']}; ask for a smaller --gguf type, or cut more",
            )


def _quality_gate(summary: dict[str, Any], s: Settings) -> None:
    worse = summary["after"]["nll"] - summary["before"]["nll"]  # perplexity itself is capped
    if s.min_quality is not None and worse > math.log(s.min_quality):
        ratio = readable(math.exp(min(worse, MOST_NATS)), 3)
        raise PareError(
            f"the result's perplexity is {ratio} x the original's, --min-quality allows {s.min_quality:g}",
            f"everything is kept for inspection, see {summary['report']}; keep more or recover longer",
        )
