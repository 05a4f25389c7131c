"""What the result is compared with: other plans of the same model. They are reconstructed like the result, measured,
and removed."""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..model.checkpoint import Checkpoint
from ..options.settings import Settings
from ..planning.plan import redraw
from ..pruning.plan_file import Plan
from ..pruning.prune import prune
from ..repair.reconstruct import reconstruct_all
from ..scoring.score import score
from ..store.places import name_of
from ..store.rundir import Run
from ..store.schema import dump_json
from ..text.splits import Texts
from .measure_steps import measured
from .steps import RECONSTRUCTION, plan_of


def contender_step(run: Run, name: str, plans: Mapping[str, Plan], texts: Texts, s: Settings) -> None:
    """Measure another plan of the same model, reconstructed if the result is.

    Otherwise the gain of the result from error feedback would be credited to its cut. The original is streamed once for
    all plans that are not measured yet.

    Args:
        run: the run directory of the result.
        name: of the plan to measure.
        plans: all plans that the result is compared with, by name.
        texts: of the run.
        s: settings of the run.
    Raises:
        Refused: the plan or a text changed since it was measured, or the memory does not suffice.
        PareError: a plan does not suit the model.
    """
    plan, repaired = plans[name], s.reconstruct and not plan_of(run).cuts_hidden(Checkpoint(run.model).arch)
    asked: dict[str, Any] = {"length": texts.test.length}
    inputs = {
        "original": run.manifest.source,
        "data": texts.test.digest(),
        "plan": hashlib.sha256(plan.dump()).hexdigest(),
    }
    if repaired:
        asked["reconstructed"], inputs["calibration"] = RECONSTRUCTION, texts.calibration.digest()

    def work(directory: Path) -> None:
        model, made, repair = directory / "model", plan, None
        if repaired:
            left = {n: p for n, p in plans.items() if n == name or f"evaluate-{n}" not in run.manifest.steps}
            repair = _repairs(run, left, texts, s, run.kept or directory)[name]
            made = Plan.load(repair / "plan.json")
        prune(run.model, made, model, repair=repair)
        if repair:
            shutil.rmtree(repair)
        measured(directory, model, texts, run.model, s, run.kept)
        shutil.rmtree(model)
        (directory / "plan.json").write_bytes(plan.dump())

    run.step(f"evaluate-{name}", asked, inputs, work)


def _repairs(run: Run, plans: Mapping[str, Plan], texts: Texts, s: Settings, kept: Path) -> dict[str, Path]:
    """Return a directory for each plan, with what reconstruct makes of it and the plan that belongs to that.
    Directories that ``kept`` already holds are not made again."""
    rows = texts.calibration
    about = {"model": run.manifest.source, "data": rows.digest(), **RECONSTRUCTION}
    places = {
        name: kept / f"repair-{hashlib.sha256(dump_json({**about, 'plan': plan.model_dump()})).hexdigest()[:32]}"
        for name, plan in plans.items()
    }
    new = [name for name in plans if not places[name].exists()]
    partials = [places[name].with_suffix(".partial") for name in new]
    for partial in partials:
        shutil.rmtree(partial, ignore_errors=True)
    made = reconstruct_all(run.model, [plans[n] for n in new], rows, partials, memory_cap=s.memory_cap) if new else []
    for name, partial, plan in zip(new, partials, made, strict=True):
        (partial / "plan.json").write_bytes(plan.dump())
        os.rename(partial, places[name])
    return places


def random_plan(run: Run, s: Settings) -> Plan:
    """Make a plan of the same sizes, with units drawn at random."""
    scratch = run.path / "random.tmp.safetensors"
    stats = run.path / name_of(1) / "calibrate" / "stats.safetensors"  # where the original was calibrated
    score(run.model, stats if s.stages else run.output("calibrate", stats.name), scratch, "random", s.seed)
    made = redraw(run.model, scratch, plan_of(run))
    scratch.unlink()
    return made
