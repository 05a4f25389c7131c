"""The step that exports: the result as a GGUF file, and the Macs that take it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from . import console, imatrix
from .artifacts import dump_json
from .checkpoint import Checkpoint
from .export import export, why_not
from .fit import macs, planner
from .fit.memory import Needs, Use
from .gguf_quantize import direct, known
from .llama_cpp import judged
from .rundir import Run
from .steps import Settings
from .texts import Texts


def export_step(run: Run, model: Path, texts: Texts, s: Settings) -> Path | None:
    """The result as GGUF, compared in llama.cpp, with the Macs it fits. None, which is said, where there can be no such
    file and no type of it was asked for. What llama.cpp quantizes it does by an importance matrix of the calibration
    text, which is kept beside the file."""
    why = None if s.gguf else why_not(Checkpoint(model))
    kind = None if why else known(s.gguf or ("q8_0" if Checkpoint(model).quantized else "f16"))
    weighed = kind is not None and not direct(kind, False)
    inputs = {"model": Checkpoint(model).identity()}
    if weighed:
        inputs["data"] = texts.calibration.digest()

    def work(directory: Path) -> None:
        if why:
            console.warn(f"going on without a GGUF file: {why.problem}")
            (directory / "export.json").write_bytes(dump_json({"path": None, "why": why.problem}))
            (directory / "fits.json").write_bytes(dump_json(fits_of(model, None, run.model, s)))
            return
        file = directory / f"model-{kind}.gguf"
        matrix = None
        if weighed:
            matrix = imatrix.measure(model, texts.calibration, texts.label("calibration"), s.memory_cap, directory)
            matrix.save(directory / matrix.name)
        done = export(model, file, kind, matrix, judged)
        done["verify"] = judged(model, file, kind)
        done["path"] = str((run.directory("export") / file.name).relative_to(run.path))
        (directory / "export.json").write_bytes(dump_json(done))
        (directory / "fits.json").write_bytes(dump_json(fits_of(model, done["tensor_bytes"], run.model, s)))

    asked = {"kind": kind, "context": s.context, **({"quick": True} if s.quick else {})}
    before = run.manifest.steps.get("export")
    if before and before.parameters.get("quick") and not s.quick:  # of a model that was not recovered
        run.forget("export")
    run.step("export", asked, inputs, work)
    return None if why else run.output("export", f"model-{kind}.gguf")


def fits_of(model: Path, gguf_bytes: int | None, original: Path, s: Settings) -> dict[str, Any]:
    """How every Mac takes the result in mlx-lm (``rows``), its GGUF file in llama.cpp (no rows where there is none) and
    the original, and how result and original grow with the context."""
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
