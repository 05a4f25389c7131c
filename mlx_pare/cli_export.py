"""The command export: a model directory as a GGUF file, or what that file would be."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from . import console, show
from .errors import Refused, UsageError
from .options import Context, Data, DryRun, Field, Gguf, Length, Model, Samples, command, settings_of

if TYPE_CHECKING:
    from .imatrix import Importance


@command(
    "export",
    "mlx-pare export MODEL --gguf q8_0 -o model.gguf | mlx-pare export RUN/recover/model --gguf q4_k_m --imatrix auto "
    "-o m.gguf --for m4-24gb | mlx-pare export MODEL --gguf q4_k_m --dry-run",
)
def export_command(
    model: Model,
    out: Annotated[Path | None, typer.Option("-o", "--out", help="The file to write.")] = None,
    gguf: Gguf = None,
    imatrix: Annotated[
        str | None,
        typer.Option(
            help="Importance matrix: none; auto, made by one pass over the text of --data; or a FILE that a run or "
            "llama-imatrix made. Default: none, auto for types that cannot be made without.",
            metavar="none|auto|FILE",
        ),
    ] = None,
    data: Data = None,
    field: Field = None,
    samples: Samples = 128,
    length: Length = 512,
    mac: Annotated[
        str | None, typer.Option("--for", help="Exit 3 when it does not fit this Mac.", metavar="MAC")
    ] = None,
    context: Context = 8192,
    no_verify: Annotated[
        bool, typer.Option("--no-verify", help="Do not compare with MLX in llama.cpp (llama extra).")
    ] = False,
    dry_run: DryRun = False,
) -> dict[str, Any]:
    """Write a GGUF file, re-read it, compare it in llama.cpp where that is installed, show on which Macs it fits."""
    from . import gguf_quantize
    from .checkpoint import Checkpoint
    from .export import export, preflight
    from .fit import macs
    from .fit.gguf_mix import NEEDS_MATRIX
    from .llama_cpp import judged

    checkpoint = Checkpoint(model)
    kind = gguf_quantize.known(gguf or ("q8_0" if checkpoint.quantized else "f16"))
    imatrix = imatrix or ("auto" if kind in NEEDS_MATRIX else "none")
    if dry_run:
        return _predicted(checkpoint, kind, imatrix)
    if out is None:
        raise UsageError("export writes a file", "name it: -o model.gguf")
    chosen = [macs.find(mac)] if mac else macs.every()
    preflight(out, kind, imatrix != "none")
    matrix = _matrix(model, imatrix, settings_of(data=data, field=field, samples=samples, length=length))
    done = export(model, out, kind, matrix, None if no_verify else judged)
    show.show_gguf(str(out), done)
    done["verify"] = {"checked": False, "reason": "not asked"} if no_verify else judged(model, out, done["kind"])
    done["fits"] = _fits(checkpoint, done, chosen, context)
    show.fit_table(str(out), done["fits"])
    checked = done["verify"]
    console.say(
        f"llama.cpp against MLX: largest logit difference {checked['max_abs_difference']:.2g}"
        if checked["checked"]
        else f"not compared in llama.cpp: {checked['reason']}"
    )
    if mac and not done["fits"][0]["fits"]:
        raise Refused(
            f"{out} does not fit {mac} at {context} tokens: {console.gb(-done['fits'][0]['headroom_bytes'])} too much",
            "the file is kept; cut more, or use a shorter context",
        )
    return done


def _fits(checkpoint: Any, done: dict[str, Any], chosen: list, context: int) -> list[dict[str, Any]]:
    from .fit import planner
    from .fit.memory import Needs, Use

    needs = Needs(checkpoint.arch, Use(context, runtime="llama.cpp"))
    return planner.fit(needs, planner.weights_of(checkpoint.arch, done["tensor_bytes"]), chosen)


def _predicted(checkpoint: Any, kind: str, asked: str) -> dict[str, Any]:
    """What the file would be; nothing is written."""
    from . import gguf_size, imatrix

    matrix = imatrix.load(Path(asked)) if asked not in ("none", "auto") else None
    found = gguf_size.measured(checkpoint, kind, matrix, asked == "auto")
    told = {"path": None, "bytes": found.nbytes, "header_bytes": found.header_bytes, **found.about()}
    show.show_gguf(f"{checkpoint.path} as {kind}", told)
    return told


def _matrix(model: Path, asked: str, settings: Any) -> Importance | None:
    """The importance matrix that was asked for: none, read, or made by a pass over text."""
    from . import imatrix
    from .texts import Texts

    if asked == "none":
        return None
    if asked != "auto":
        return imatrix.load(Path(asked))
    texts = Texts(model, settings)
    return imatrix.measure(model, texts.calibration, texts.label("calibration"))
