"""The step that exports: the result as a GGUF file, and the Macs that it fits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..base import console
from ..base.errors import PareError
from ..base.optional import attempt
from ..capacity import macs, planner
from ..capacity.memory import Needs, Use
from ..exporting import importance_matrix
from ..exporting.export import export, why_not
from ..exporting.llama_cpp import judged
from ..gguf.write.quantizer import direct, known
from ..model.checkpoint import Checkpoint
from ..options.settings import Settings
from ..store import step_files
from ..store.rundir import Run
from ..store.schema import dump_json
from ..text.splits import Texts
from .choose_sizes import wants_gguf


def export_step(run: Run, model: Path, texts: Texts, s: Settings) -> Path | None:
    """Write the result as a GGUF file, have llama.cpp judge it, and list the Macs that it fits.

    llama.cpp quantizes some types by an importance matrix of the calibration text, which is kept next to the file.

    Args:
        run: the run directory.
        model: model directory of the result.
        texts: of the run.
        s: settings of the run.
    Returns:
        The file; None if it cannot be made, or if it failed. The console and export.json tell why. If a GGUF file is
        required, ``required`` ends the run after its report.
    Raises:
        UsageError: the type is unknown.
        Refused: the model or what was asked changed since the step was done.
    """
    asked = wants_gguf(s)
    if asked and failure(run):  # the same command tries the export again
        run.forget("export")
    why = None if asked else why_not(Checkpoint(model))
    kind = None if why else known(s.gguf or ("q8_0" if Checkpoint(model).quantized else "f16"))
    weighed = kind is not None and not direct(kind, False)
    inputs = {"model": Checkpoint(model).identity()}
    if weighed:
        inputs["data"] = texts.calibration.digest()

    def work(directory: Path) -> None:
        done, failed = None, why
        if kind:
            done, failed = attempt(lambda: _written(run, model, directory, kind, texts if weighed else None, s))
        if failed:
            done = {"path": None, "why": _reason(failed, run, directory)}
            console.warn(f"going on without a GGUF file: {done['why']}")
        for note in done.get("notes", ()):
            console.say(f"note: {note}")
        (directory / "export.json").write_bytes(dump_json(done))
        (directory / "fits.json").write_bytes(dump_json(fits_of(model, done.get("tensor_bytes"), run.model, s)))

    asked = {"kind": kind, "context": s.context, **({"quick": True} if s.quick else {})}
    before = run.manifest.steps.get("export")
    if before and before.parameters.get("quick") and not s.quick:  # of a model that was not recovered
        run.forget("export")
    run.step("export", asked, inputs, work)
    return None if failure(run) else run.output("export", f"model-{kind}.gguf")


def required(run: Run, s: Settings) -> None:
    """Raises PareError if a GGUF file was asked for and could not be made."""
    if wants_gguf(s) and (why := failure(run)):
        raise PareError(
            f"no GGUF file was made: {why}",
            f"everything else is kept, see {run.path / 'report.md'}; the same command tries the export again",
        )


def failure(run: Run) -> str | None:
    """Return why the export of a run has no GGUF file; None if it has one, or was not done."""
    file = run.directory("export") / "export.json"
    return (step_files.find(file) or {}).get("why")


def _written(run: Run, model: Path, directory: Path, kind: str, texts: Texts | None, s: Settings) -> dict[str, Any]:
    """Write and judge the file; return what export.json says of it. ``texts`` are those of an importance matrix, if it
    needs one."""
    file, matrix = directory / f"model-{kind}.gguf", None
    if texts:
        matrix = importance_matrix.measure(
            model, texts.calibration, texts.label("calibration"), s.memory_cap, directory
        )
        matrix.save(directory / matrix.name)
    done = export(model, file, kind, matrix, judged)
    done["verify"] = judged(model, file, kind)
    done["path"] = str((run.directory("export") / file.name).relative_to(run.path))
    return done


def _reason(failed: PareError, run: Run, directory: Path) -> str:
    """Return why there is no file, and where a rejected one is. It moves there when the step is done."""
    found = sorted(directory.glob("*.rejected"))
    more = f". The file is kept as {run.directory('export') / found[0].name}" if found else ""
    return failed.problem + more


def fits_of(model: Path, gguf_bytes: int | None, original: Path, s: Settings) -> dict[str, Any]:
    """Describe how every Mac holds the result, its GGUF file and the original.

    Args:
        model: model directory of the result.
        gguf_bytes: bytes of the tensors of the GGUF file; None: there is no such file.
        original: model directory of the original.
        s: their ``context`` is used.
    Returns:
        A row per Mac (see capacity.planner.assess) for the result in mlx-lm ("rows"), its GGUF file in llama.cpp
        ("gguf_rows", empty without a file) and the original ("original_rows"); "curve" and "original_curve", memory by
        context; "context"; "original_fits", the number of Macs.
    """
    every = macs.every()

    def of(path: Path, gguf: int | None = None) -> tuple[list[dict[str, Any]], list[dict[str, int]]]:
        checkpoint = Checkpoint(path)
        use = Use(s.context, runtime="llama.cpp" if gguf else "mlx")
        weights = planner.weights_of(checkpoint.arch, gguf or checkpoint.nbytes())
        needs = Needs(checkpoint.arch, use, 2 if gguf else checkpoint.value_bytes)
        return planner.fit(needs, weights, every), planner.curve(needs, weights, every[0])

    (rows, curve), (original_rows, original_curve) = of(model), of(original)
    gguf_rows = of(model, gguf_bytes)[0] if gguf_bytes else []
    found = {"context": s.context, "rows": rows, "gguf_rows": gguf_rows, "original_rows": original_rows}
    found |= {"curve": curve, "original_curve": original_curve}
    return found | {"original_fits": sum(r["fits"] for r in original_rows)}
