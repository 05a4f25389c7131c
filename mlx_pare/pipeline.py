"""The story of a run. Read this file first: every step below is a few lines in steps.py, every verb a file of its own name.

calibrate -> score -> plan -> prune -> recover -> evaluate (original, pruned, recovered, random, fewer bits)
          -> export -> bench -> report
"""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from . import corpus, steps
from .artifacts import Plan
from .checkpoint import Checkpoint
from .errors import PareError
from .plan import shape, whole
from .recover import Options as RecoverOptions
from .recover import check_memory as check_recovery
from .report import metrics, report, verdict
from .rundir import Run
from .steps import Settings, Texts
from .stream import check_memory as check_stream


def run(model: Path, out: Path, settings: Settings) -> dict[str, Any]:
    """Do everything for one model, resumable at any point; returns paths and the metrics before and after.

    Raises Refused for a run directory of something else, PareError when a gate finds the result broken.
    """
    s = settings
    with steps.open_run(model, out) as opened:
        opened.write_recipe({"model": str(model), **{k: v for k, v in asdict(s).items()}})
        texts = Texts(opened.model, s)
        shape(Checkpoint(opened.model), s.plan_options())  # an impossible target is found before any work
        preflight_recovery(opened.model, s)
        _ = texts.test, texts.validation  # so is a text that is too short
        steps.calibrate_step(opened, texts, s)
        steps.score_step(opened, s)
        steps.plan_step(opened, s)
        result = steps.prune_step(opened)
        steps.evaluate_step(opened, "original", opened.model, texts, s)
        steps.evaluate_step(opened, "pruned", result, texts, s)
        if s.recover_steps > 0:
            result = steps.recover_step(opened, texts, s)
            steps.evaluate_step(opened, "recovered", result, texts, s)
        steps.contender_step(opened, "random", steps.random_plan(opened, s), texts, s)
        narrow = whole(opened.model, Plan.load(opened.output("plan", "plan.json")), Checkpoint(result).nbytes())
        if narrow is not None:
            steps.contender_step(opened, "fewer-bits", narrow, texts, s)
        gguf = steps.export_step(opened, result, s)
        if s.trials > 0:
            steps.bench_step(opened, result, s)
        written = report(opened.path)
        summary = _summary(opened, result, gguf, written)
    _quality_gate(summary, s)
    return summary


def dry_run(model: Path, s: Settings) -> dict[str, Any]:
    """What a run would make: sizes before and after, memory it would need. Writes nothing."""
    preflight_recovery(model, s)
    rows = corpus.Rows.full(np.zeros((s.samples, s.length)))
    return shape_of(model, s) | {"calibration_bytes": check_stream(Checkpoint(model), rows, s.memory_cap)}


def shape_of(model: Path, s: Settings) -> dict[str, Any]:
    """The sizes a target leads to; needs no scores."""
    made = shape(Checkpoint(model), s.plan_options())
    sizes = {"before": made.before.model_dump(), "after": made.after.model_dump()}
    return {"asked": made.target.asked, **sizes, "neighbours": made.neighbours}


def preflight_recovery(model: Path, s: Settings) -> None:
    """Refuse before any work when the recovery that was asked for cannot fit (the uncut model bounds the cut one)."""
    if s.recover_steps > 0:
        rows = corpus.Rows.full(np.zeros((s.samples, s.length)))
        check_recovery(Checkpoint(model), [rows], RecoverOptions(method=s.method, steps=s.recover_steps), s.memory_cap)


def _summary(run: Run, model: Path, gguf: Path, written: Path) -> dict[str, Any]:
    last = "recovered" if "evaluate-recovered" in run.manifest.steps else "pruned"

    def of(name: str) -> dict[str, Any]:
        step = run.directory(f"evaluate-{name}")
        return json.loads((step / "metrics.json").read_text()) | json.loads((step / "size.json").read_text())

    names = [n.removeprefix("evaluate-") for n in run.manifest.steps if n.startswith("evaluate-")]
    return {
        "model": str(model),
        "gguf": str(gguf),
        "report": str(written),
        "verdict": verdict(metrics(run.path)),
        "before": of("original"),
        "after": of(last),
        "contenders": {name: of(name) for name in names},
        "fits": json.loads((run.directory("export") / "fits.json").read_text()),
        "bench": json.loads(p.read_text()) if (p := run.directory("bench") / "bench.json").exists() else None,
    }


def _quality_gate(summary: dict[str, Any], s: Settings) -> None:
    ratio = summary["after"]["perplexity"] / summary["before"]["perplexity"]
    if s.min_quality is not None and ratio > s.min_quality:
        raise PareError(
            f"the result's perplexity is {ratio:.3f} x the original's, --min-quality allows {s.min_quality:g}",
            f"everything is kept for inspection, see {summary['report']}; keep more or recover longer",
        )
