"""The story of a run. Read this file first: pipeline/order.py has the order of the steps, pipeline/steps.py a few lines
for each, and each verb has its own file.

calibrate -> score -> plan -> reconstruct -> prune -> evaluate (original, pruned) -> recover -> evaluate (recovered,
random, fewer bits) -> export -> bench -> report

With a schedule, every stage does the steps up to recover once, each stage in its own run directory
(pipeline/stages.py).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

from .. import lm
from ..base import console
from ..base.errors import Refused, UsageError
from ..base.units import gb
from ..capacity import macs
from ..evaluation.metrics import Metrics
from ..exporting.export import why_not
from ..gates import check as gates
from ..gates.rules import rules_of
from ..gguf.architectures import RUNTIMES
from ..gguf.write import quantizer
from ..model.checkpoint import Checkpoint
from ..options.settings import Settings
from ..planning.plan import whole
from ..planning.uniform import shape
from ..pruning.plan_file import Plan
from ..recovery.blockwise import check_memory as check_local
from ..recovery.options import METHODS, fitting
from ..repair.reconstruct import check_memory as check_reconstruction, costs as reconstruction_costs
from ..reporting import stage_table
from ..reporting.report import report
from ..reporting.verdict import LEFT_OUT, first_result, metrics, reconstructed, verdict, worth_it
from ..routing import plan_experts
from ..scoring.calibrate import check_memory as check_calibration
from ..scoring.score import criterion, suits
from ..sources.open_model import StrPath, opened as model_of
from ..store import step_files
from ..store.manifest import begun
from ..store.places import CONTENDERS, name_of
from ..store.rundir import Run
from ..stream import kept
from ..text import corpus
from ..text.splits import VALIDATION_ROWS, Texts
from . import choose_sizes, contenders, measure_steps, order, recipes, stages, steps
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
        PareError: a check finds the result broken, a gate fails, or a required GGUF file failed.
    """
    out, settings = Path(out), _with_teacher(settings)
    model = model_of(model, out)
    s = affordable(model, choose_sizes.with_possible_axes(model, recipes.dated(out, hurried(settings))))
    preflight(model, s, begun(out, "recover") is not None)
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
        under_way = UnderWay(opened, texts, s)
        for stage, names in order.groups(vars(s)):
            with under_way.stage(stage):
                for name in names:
                    under_way.do(name)
        summary = under_way.summary()
        opened.write_recipe(asked)  # only now: a refused request leaves the recipe of what was done
        _fit_gate(summary, s)
        _worth_gate(under_way, summary)
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


class UnderWay:
    """A run under way: it does the steps one by one, and knows the model that they have left so far."""

    def __init__(self, run: Run, texts: Texts, s: Settings):
        """Begin with the original.

        Args:
            run: the run directory, open.
            texts: of the run.
            s: what is asked of the run.
        """
        self.whole, self.asked, self.texts = run, s, texts
        self.run, self.s, self.seed = run, s, s.seed  # of the stage that works; outside of stages, of the whole run
        self.result: Path = run.model
        self.gguf: Path | None = None
        self.measured: set[str] = set()
        self.rules = rules_of(s)
        gates.only(run.path, self.rules)

    @contextmanager
    def stage(self, name: str | None) -> Iterator[None]:
        """Let steps cut what the stage before left, in a directory of their own. The original teaches, and all are
        measured against it. Without a name, steps belong to the whole run."""
        if name is None:
            yield
            return
        stage, place = stages.named(self.asked, name), self.whole.path / name
        console.say(f"{name} of {len(self.asked.stages)}: to {stage.share:g} of the original, {stage.steps} steps")
        asked = stage.settings(self.asked, self.whole.model, self.result)
        asked = choose_sizes.settled(self.result, asked, choose_sizes.begun(place))
        with steps.open_run(self.result, place) as opened:
            opened.kept = self.whole.kept
            opened.write_recipe(recipes.recipe_of(self.result, asked), replace=False)
            drawn = (self.asked.seed + stage.number - 1) % 2**32  # else every stage would train on the same rows
            self.run, self.s, self.seed = opened, asked, drawn
            yield
        self.run, self.s, self.seed = self.whole, self.asked, self.asked.seed

    def do(self, step: str) -> None:
        """Do a step of pipeline/order.py, without the name of its stage. Raises PareError as the verb does."""
        run, texts, s = self.run, self.texts, self.s
        match step.partition("-"):
            case "calibrate", _, _:
                steps.calibrate_step(run, texts, s)
            case "score", _, _:
                steps.score_step(run, s)
            case "sensitivity", _, _:
                pass  # plan does it, also as a verb of its own
            case "plan", _, _:
                stages.plan_step(run, s) if s.stages else choose_sizes.plan_step(run, texts, s)
            case "reconstruct", _, _:
                steps.reconstruct_step(run, texts, s)
            case "prune", _, _:
                original = None if run.model == self.whole.model else self.whole.model
                self.result = steps.prune_step(run, s.reconstruct, original, s.memory_cap)
            case "recover", _, _:
                self.result = steps.recover_step(run, texts, replace(s, seed=self.seed))
            case "evaluate", _, model:
                self._measure(model)
                if model in ("pruned", "recovered") and not (model == "pruned" and self.asked.stages):
                    self._gates(model)
            case "export", _, _:
                self._gates("compared")
                kept.clear(run.kept)
                self.gguf = export_step(run, self.result, texts, s)
            case "bench", _, _:
                measure_steps.bench_step(run, self.result, s)
                self._gates("bench")
            case _:
                raise ValueError(step)

    def _measure(self, name: str) -> None:
        """Measure the original, what the steps have left, or a plan that it is compared with. "pruned" after stages is
        such a plan."""
        run, s, staged = self.whole, self.asked, self.asked.stages is not None
        if name in ("random", "fewer-bits") or (name == "pruned" and staged):
            if name not in self.compared:
                return
            contenders.contender_step(run, name, self.compared, self.texts, s)
        else:
            measure_steps.evaluate_step(run, name, run.model if name == "original" else self.result, self.texts, s)
        self.measured.add(name)
        if name == "pruned" and not staged:
            console.say(first_result(metrics(run.path, ["original", "pruned"])))

    def _gates(self, stage: str) -> None:
        """Check the gates that are decided now. Raises GateFailed, with a report written, if the result fails one."""
        names = [name for name, _ in CONTENDERS if name in self.measured]
        path = self.whole.path
        gates.settle(path, self.rules, stage, self.asked.recovers, lambda: report(path, names))

    @cached_property
    def compared(self) -> dict[str, Plan]:
        """What the result is compared with: a random cut, and the original with fewer bits if that can be as small.
        With a schedule, also the units of the last stage, cut out of the original at once."""
        run, s = self.whole, self.asked
        plans = {"pruned": steps.plan_of(run)} if s.stages else {}
        plans["random"] = contenders.random_plan(run, s)
        narrow = whole(run.model, steps.plan_of(run), Checkpoint(self.result).nbytes())
        return plans if narrow is None else {**plans, "fewer-bits": narrow}

    def summary(self) -> dict[str, Any]:
        """Write the report, and return what ``run`` returns."""
        path, names = self.whole.path, [name for name, _ in CONTENDERS if name in self.measured]
        found, written = metrics(path, names), report(path, names)
        told = stage_table.story(path)
        return {
            "model": str(self.result),
            "gguf": None if self.gguf is None else str(self.gguf),
            "report": str(written),
            "verdict": verdict(found, reconstructed(self.whole.manifest)),
            "before": _measured(path, "original"),
            "after": _measured(path, "recovered" if "recovered" in found else "pruned"),
            "contenders": {name: _measured(path, name) for name in found},
            "fits": step_files.read(path / "export" / "fits.json"),
            **({"stages": told} if told else {}),
            "bench": step_files.find(path / "bench" / "bench.json"),
            **({"gates": gates.rows_of(path)} if self.rules else {}),
        }


def _measured(run: Path, name: str) -> dict[str, Any]:
    """Return what was measured of a model, as JSON keys."""
    step = run / f"evaluate-{name}"
    measured = Metrics.load(step / "metrics.json")
    return measured.model_dump() | {"nll": measured.mean_nll} | step_files.read(step / "size.json")


def dry_run(model: StrPath, s: Settings) -> dict[str, Any]:
    """Return what a run would make: sizes before and after, and the memory it would need. It writes nothing."""
    model, s = model_of(model), _with_teacher(s)
    s = affordable(model, choose_sizes.with_possible_axes(model, s))
    if line := preflight(model, s):
        console.warn(line)
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


def preflight(model: Path, s: Settings, recovering: bool = False) -> str:
    """Find what cannot work before any work: wrong names, a target out of reach, a recovery that does not fit in
    memory. The uncut model bounds the cut one.

    Args:
        model: model directory.
        s: what is asked.
        recovering: whether recovery was begun before. It goes on as it began, and checks the memory for that itself.
    Returns:
        A line that says what the uncut model would need in recovery, if it does not fit as it was asked; or nothing.
    Raises:
        UsageError, Refused: as ``run``.
    """
    stages.check(s)
    rules_of(s)
    suits(s.criterion, Checkpoint(model).arch)
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
    return _recoverable(Checkpoint(model), Checkpoint(s.teacher or model), s, recovering) if s.recovers else ""


def _recoverable(model: Checkpoint, teacher: Checkpoint, s: Settings, recovering: bool) -> str:
    """Return what would be chosen so that the recovery fits in memory, as a line; or nothing.

    Raises UsageError if blocks cannot be healed one by one, Refused if the recovery does not fit."""
    train, validation = (corpus.Extent(count, s.length) for count in (s.train_rows, VALIDATION_ROWS))
    options = steps.recover_options(s, s.seed)
    if s.local_steps:
        if model.arch.uses("expert"):
            raise UsageError("block by block, experts are not recovered yet", "use --local-steps 0")
        if "hidden" in s.axes or model.arch.sizes["hidden"] != teacher.arch.sizes["hidden"]:
            raise UsageError(
                "--local-steps recovers block by block, which needs original and result to have the same hidden size",
                "use --local-steps 0" + (", or leave hidden out of --axes" if "hidden" in s.axes else ""),
            )
        check_local(model, teacher, train.joined(validation), options.blocks, s.memory_cap)
    if recovering or not s.recover_steps:
        return ""
    return fitting(model, teacher, train, validation, options, s.memory_cap)[1]


def affordable(model: Path, s: Settings) -> Settings:
    """Switch reconstruction off, with a warning, if it would take hours or if the free memory does not suffice (a wide
    model on a small Mac). Under a --memory-cap, which the user chose, ``preflight`` refuses instead."""
    s, rows = plan_experts.settled(Checkpoint(model).arch, s), corpus.Extent(s.samples, s.length)
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


def _worth_gate(done: UnderWay, summary: dict[str, Any]) -> None:
    """Raises GateFailed if --fail-if-not-worth-it was given and the verdict says so."""
    if done.asked.fail_if_not_worth_it and worth_it(metrics(done.whole.path, list(summary["contenders"]))) is False:
        raise gates.GateFailed(
            "pruning was not worth it: the whole model with fewer bits is as good", f"see {summary['report']}"
        )


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
