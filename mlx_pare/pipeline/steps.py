"""The steps of a run: each wraps one verb in a record of the run directory (parameters, input hashes, outputs)."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable
from dataclasses import asdict, fields, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from ..base import console
from ..base.errors import Refused, UsageError, shell
from ..base.plain_path import require_text
from ..base.units import parse_amount
from ..capacity import macs, planner
from ..capacity.memory import Needs, Use
from ..evaluation.sanity import check
from ..lm import distributed
from ..model.checkpoint import Checkpoint
from ..options.settings import RecoveryOptions, Settings, TrainingOptions
from ..planning.goal import Options as PlanOptions
from ..pruning.plan_file import Plan
from ..pruning.prune import Lineage, prune
from ..recovery.options import Options as RecoverOptions, as_begun, flags
from ..recovery.recover import fitted, recover
from ..recovery.trainer import Diverged
from ..repair.least_squares import DAMPING
from ..repair.reconstruct import reconstruct
from ..scoring.calibrate import calibrate
from ..scoring.score import criterion, described, score
from ..sources import resolve
from ..sources.open_model import require
from ..store.atomic import replace_file
from ..store.manifest import begun, read_manifest
from ..store.rundir import Run, fingerprint
from ..store.schema import dump_json
from ..text import provenance
from ..text.splits import Texts

RECONSTRUCTION = {"damping": DAMPING}  # what the result depends on, besides model, plan and text


def recover_options(s: RecoveryOptions, seed: int = 0) -> RecoverOptions:
    """Return what recovery is asked for, by the same names."""
    named = {f.name: getattr(s, f.name) for f in fields(TrainingOptions)}
    return RecoverOptions(steps=s.recover_steps, seed=seed, **named)


def plan_options(s: Settings) -> PlanOptions:
    """Return what the planner is asked for. Raises UsageError for a speed without a Mac."""
    options = PlanOptions(
        keep=s.stages[-1] if s.stages else s.keep,
        params=parse_amount(s.target_params, "parameters") if s.target_params else None,
        size=parse_amount(s.target_size, "bytes") if s.target_size else None,
        axes=tuple(s.axes),
        bits=s.bits,
        group_size=s.group_size,
        step=s.step,
        protect=s.protect,
    )
    if s.mac is None:
        if s.min_speed is not None:
            raise UsageError("a speed can only be asked of a Mac", "name it: --for m4-24gb --min-speed 10")
        return options
    mac, use = macs.find(s.mac), Use(s.context)
    return replace(
        options,
        budget=lambda arch, value_bytes: planner.max_weight_bytes(
            Needs(arch, use, value_bytes), mac, tokens_per_s=s.min_speed
        ),
        budget_name=f"{mac.name} with {s.context} tokens of context"
        + (f" at {s.min_speed:g} tokens/s" if s.min_speed else ""),
    )


def open_run(model: Path, out: Path) -> Run:
    """Open the run directory for a model, new or to be continued. Raises PareError for a name that MLX cannot open."""
    require_text(out)
    origin = resolve.origin(model)
    return Run(out, model, Checkpoint(model).identity(), origin=asdict(origin) if origin else None)


def continue_run(out: Path, locked: bool = True) -> Run:
    """Open a run directory that was begun before. Raises PareError if its model is gone, Refused if it changed
    since."""
    run = Run(out, locked=locked)
    try:
        require(run.model, out)
        if Checkpoint(run.model).identity() != run.manifest.source:
            raise Refused(f"{run.model} changed since {out} was begun", "start a new run with another --out")
        if begun := provenance.known(run):
            begun.check_tokenizer()
    except BaseException:
        run.close()
        raise
    return run


def original_of_stage(run: Run) -> Path | None:
    """Return the original, for a stage that cuts what another stage of the same run left (see pipeline/stages.py); else
    None."""
    parent = run.path.resolve().parent
    if not run.model.is_relative_to(parent) or not (parent / "manifest.json").is_file():
        return None
    return Path(read_manifest(parent).model)


# ---- the steps, each a verb wrapped in a record ----


def calibrate_step(run: Run, texts: Texts, s: Settings) -> Path:
    """Measure the statistics of every unit on the calibration rows, including those that the criterion needs.

    Args:
        run: the run directory.
        texts: of the run.
        s: settings of the run.
    Returns:
        RUN/calibrate/stats.safetensors.
    Raises:
        UsageError: the criterion is unknown.
        Unsupported: the model cannot be cut.
        Refused: the text or what was asked changed since, or the memory does not suffice.
    """
    rows, asked = texts.calibration, {"rows": texts.calibration.count, "length": texts.calibration.length}
    before = run.manifest.steps.get("calibrate")
    extra = {*criterion(s.criterion).extra, *(before.parameters.get("extra", ()) if before else ())}
    if extra:  # statistics with more than is needed now are not measured again
        asked["extra"] = sorted(extra)

    def work(directory: Path) -> None:
        kept = _for_recovery(run, texts, s)
        calibrate(run.model, rows, directory, s.memory_cap, extra=sorted(extra), kept=kept)
        provenance.write(directory, run.model, texts)

    inputs = {"model": run.manifest.source, "data": rows.digest()}
    if not run.step("calibrate", {**asked, "seed": s.seed}, inputs, work, resumes=True):
        provenance.check(run, texts)
    return run.output("calibrate", "stats.safetensors")


def _for_recovery(run: Run, texts: Texts, s: Settings) -> Path | None:
    """Return where the hidden states at the end of calibration are kept, if recovery learns from the same model on the
    same rows."""
    own = s.teacher is None or Path(s.teacher) == run.model
    same = own and s.recovers and texts.training_domains.rows.digest() == texts.calibration.digest()
    return run.kept if same else None


def score_step(run: Run, s: Settings) -> Path:
    """Score the importance of every unit by the criterion that was asked for."""
    stats = run.output("calibrate", "stats.safetensors")
    described(stats, s.criterion)
    run.step(
        "score",
        {"criterion": s.criterion, "seed": s.seed},
        {"model": run.manifest.source, "stats": fingerprint(stats)},
        lambda directory: score(run.model, stats, directory / "scores.safetensors", s.criterion, s.seed),
    )
    return run.output("score", "scores.safetensors")


def plan_of(run: Run) -> Plan:
    """Read the plan of a run. People edit it: raises PareError with everything that is wrong with it for the run's
    model."""
    made = Plan.load(run.output("plan", "plan.json"))
    made.check(Checkpoint(run.model))
    return made


def reconstruct_step(run: Run, texts: Texts, s: Settings) -> Path | None:
    """Solve the matrices that make up for the cut.

    Args:
        run: the run directory, with a plan.
        texts: of the run.
        s: settings of the run.
    Returns:
        The directory of the matrices; None, with a warning, if the plan cuts the hidden size. The step also writes the
        plan that belongs to them.
    Raises:
        Refused: the text or the plan changed since, or the memory does not suffice.
        PareError: the plan does not suit the model.
    """
    path = run.output("plan", "plan.json")
    if plan_of(run).cuts_hidden(Checkpoint(run.model).arch):
        console.warn("a cut of the hidden size cannot be reconstructed: the matrices are cut as they are")
        return None
    provenance.check(run, texts)

    def work(directory: Path) -> None:
        rows, out = texts.calibration, directory / "repair"
        made = reconstruct(run.model, Plan.load(path), rows, out, memory_cap=s.memory_cap)
        (directory / "plan.json").write_bytes(made.dump())

    inputs = {"model": run.manifest.source, "plan": fingerprint(path), "data": texts.calibration.digest()}
    run.step("reconstruct", RECONSTRUCTION, inputs, work)
    return run.output("reconstruct", "repair")


def prune_step(run: Run, repaired: bool = True, original: Path | None = None, memory_cap: int | None = None) -> Path:
    """Cut the model and check the result.

    Args:
        run: the run directory, with a plan.
        repaired: use the matrices of reconstruct for the same plan, if that step was done.
        original: the original, if the model was cut before and lies in a run directory next to this one: units are
            named after it. None: the model itself.
        memory_cap: bytes that the check may use; None: the memory that is free.
    Returns:
        RUN/prune/model.
    Raises:
        Refused: the plan changed since it was reconstructed, or the step was done with other inputs.
        PareError: the plan does not suit the model, or the result is broken.
    """
    plan_of(run)
    path = run.output("plan", "plan.json")
    inputs = {"model": run.manifest.source, "plan": fingerprint(path)}
    record = run.manifest.steps.get("reconstruct")
    repair = None
    if repaired and record:
        chosen, repair = run.output("reconstruct", "plan.json"), run.output("reconstruct", "repair")
        if record.inputs["plan"] != inputs["plan"]:
            raise Refused(
                f"{path} changed since it was reconstructed",
                f"delete {shell(run.directory('reconstruct'))} and reconstruct again, or use --no-reconstruct",
            )
        path, inputs["repair"] = chosen, hashlib.sha256(dump_json(record.outputs)).hexdigest()

    lineage = None
    if original is not None:
        lineage = Lineage(original, str(run.model.relative_to(run.path.resolve().parent)))
        inputs["original"] = Checkpoint(original).identity()

    def work(directory: Path) -> None:
        shutil.rmtree(directory / "model", ignore_errors=True)
        done = prune(run.model, Plan.load(path), directory / "model", repair=repair, lineage=lineage)
        (directory / "done.json").write_bytes(dump_json(done))
        _gate(directory / "model", run.model, directory, memory_cap)

    run.step("prune", {}, inputs, work)
    return run.output("prune", "model")


def recover_step(run: Run, texts: Texts, s: Settings) -> Path:
    """Heal the cut model and check the result.

    If the training does not fit in memory, options that only say how memory is used are chosen (recover.fitted).
    If there are several processes (mlx.launch), the first keeps the run directory and tells the others whether there is
    anything to do, and with which options. The others help it train and discard their results.

    Args:
        run: the run directory, with a pruned model.
        texts: of the run; their calibration part trains, their validation part chooses the best state.
        s: settings of the run.
    Returns:
        RUN/recover/model.
    Raises:
        UsageError: an option means nothing.
        Refused: the inputs changed since, the tokenizers differ, or the training does not fit in memory.
        PareError: the loss is not a number any more (Diverged), or the result is broken.
    """
    pruned, options = run.output("prune", "model"), recover_options(s, s.seed)
    # first, or an unknown name would be reported as a change of what was done before
    options.check(Checkpoint(pruned).arch.sizes["vocab"])
    teacher = Path(s.teacher) if s.teacher else run.model
    rows = texts.training_domains, texts.validation_domains

    def heal(directory: Path) -> dict[str, Any]:
        place = directory / "work"
        return recover(pruned, teacher, *rows, directory / "model", options, s.memory_cap, place, run.kept)

    def work(directory: Path) -> None:
        note = directory / "recovery.json"
        distributed.from_first({"train": not note.exists(), "options": asdict(options)})
        if not note.exists():  # else it was healed before, and a later check failed
            shutil.rmtree(directory / "model", ignore_errors=True)
            try:
                done = heal(directory)
            except Diverged:  # other options may be tried at once
                (directory / "step.json").unlink()
                raise
            replace_file(note, dump_json(done))
        _gate(directory / "model", run.model, directory, s.memory_cap)

    inputs = {
        "model": run.manifest.source,
        "teacher": Checkpoint(teacher).identity(),
        "pruned": Checkpoint(pruned).identity(),
        "data": rows[0].digest(),
        "validation": rows[1].digest(),
    }
    if distributed.this()[0] == 0:
        options = _that_fit(run, options, lambda: fitted(pruned, teacher, *rows, options, s.memory_cap))
        if not run.step("recover", asdict(options), inputs, work, resumes=True):
            distributed.from_first({"train": False})
    elif (first := distributed.from_first({})[0])["train"]:
        options = RecoverOptions(**first["options"])  # memory may differ between the machines
        with TemporaryDirectory() as scratch:
            heal(Path(scratch))
    return run.path / "recover" / "model"


def _that_fit(run: Run, options: RecoverOptions, choose: Callable[[], RecoverOptions]) -> RecoverOptions:
    """Return the options that recovery was begun with, whatever memory is free now; those of ``choose`` if it begins
    now."""
    before = begun(run.path, "recover")
    if before is None:
        return choose()
    found = as_begun(options, before)
    if found != options and not run.directory("recover").exists():  # else it is finished
        console.say(f"recover: goes on with {flags(found)}, as it began")
    return found


def _gate(model: Path, original: Path, directory: Path, memory_cap: int | None) -> None:
    """Stop the run at a broken model, and keep everything. A suspicious model is a warning on the console and in the
    report."""
    warnings = check(model, original, memory_cap)
    for warning in warnings:
        console.warn(warning)
    (directory / "check.json").write_bytes(dump_json({"warnings": warnings}))
