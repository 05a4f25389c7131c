"""The command export: a model as a GGUF file, for Ollama, packed by mlx-lm, or for the hub."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..base import console
from ..base.errors import PareError, Refused, UsageError, shell
from ..base.units import gb
from ..options.option import Option
from ..options.settings import OUTPUT, REACH, settings_of
from ..store.atomic import created
from . import tables
from .app import DryRun, Model, command, mac_names

if TYPE_CHECKING:
    from ..gguf.write.imatrix_file import Importance
    from ..model.checkpoint import Checkpoint

PACKED = "Packed by mlx-lm"  # a panel of the help
TEXTS = ("data", "field", "samples", "length")
OPTIONS = (
    "gguf",
    Option("imatrix", OUTPUT,
           "Importance matrix for the quantizer: none; auto, measured on the text of --data; or a FILE that a run or "
           "llama-imatrix made. Default: none, or auto for types that need one.", metavar="none|auto|FILE"),
    Option("mac", REACH, "End with exit code 3 if the file does not fit this Mac.", called="for", metavar="MAC",
           offers=mac_names),
    "context",
    *TEXTS,
    Option("bits", PACKED, "With --mlx: 2, 3, 4, 5, 6 or 8 bits.", int, 4),
    Option("group_size", PACKED, "With --mlx: 32, 64 or 128.", int, 64),
    Option("mixed", PACKED, "With --mlx: more bits for the head, and in some layers for values and down_proj.", bool,
           False),
)  # fmt: skip
NoVerify = Annotated[
    bool,
    typer.Option(
        "--no-verify", rich_help_panel=OUTPUT,
        help="Do not compare the GGUF file with MLX in llama.cpp, and do not ask stock servers.",
    ),
]  # fmt: skip


@command(
    "export",
    "mlx-pare export MODEL --gguf q8_0 -o model.gguf | mlx-pare export RUN/recover/model --gguf q4_k_m --imatrix auto "
    "-o m.gguf --for m4-24gb | mlx-pare export MODEL --gguf q4_k_m --dry-run | mlx-pare export RUN/recover/model "
    "--ollama DIR --gguf q4_k_m | mlx-pare export RUN/recover/model --mlx DIR --bits 4 --mixed | mlx-pare export "
    "RUN/recover/model --hub-ready DIR",
    options=OPTIONS,
    first=("out", "ollama", "mlx", "hub_ready", "gguf", "imatrix", "dry_run"),
)
def export_command(
    model: Model,
    out: Annotated[Path | None, typer.Option("-o", "--out", help="GGUF file to write.", metavar="FILE")] = None,
    ollama: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Write a directory with a GGUF file and a Modelfile for Ollama.")
    ] = None,
    mlx: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Write a float model packed by mlx-lm, with --bits.")
    ] = None,
    hub_ready: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Write a directory to upload: weights, card, licence.")
    ] = None,
    no_verify: NoVerify = False,
    dry_run: DryRun = False,
    **asked: Any,
) -> dict[str, Any]:
    """Write a GGUF file, or a directory for Ollama, MLX or the hub.

    The result is opened again: compared with MLX in llama.cpp if that is installed, asked a question through a stock
    server, and compared with the memory of every Mac.
    """
    if sum(given is not None for given in (out, ollama, mlx, hub_ready)) + dry_run != 1:
        raise UsageError("export writes one thing", "name it: -o FILE, --ollama DIR, --mlx DIR or --hub-ready DIR")
    if mlx or hub_ready:
        return _directory(model, mlx, hub_ready, (asked["bits"], asked["group_size"], asked["mixed"]), no_verify)
    from ..capacity import macs

    mac, context = asked["mac"], asked["context"]
    checkpoint, kind, imatrix = _settled(model, asked["gguf"], asked["imatrix"])
    if dry_run:
        return _predicted(checkpoint, kind, imatrix)
    chosen = [macs.find(mac)] if mac else macs.every()
    matrix = imatrix, settings_of(**{field: asked[field] for field in TEXTS}, context=context)
    if ollama:
        return _for_ollama(checkpoint, ollama, kind, matrix, (chosen, mac, context), no_verify)
    with created(out) as place, _set_aside(place, out):
        done = _gguf(checkpoint, place, kind, matrix, (chosen, context), no_verify)
    done["path"] = str(out)
    _require_fit(done, mac, context)
    return done


@contextmanager
def _set_aside(made: Path, out: Path) -> Iterator[None]:
    """Keep what was written, but fails a check, next to ``out`` so that the user can look at it."""
    try:
        yield
    except PareError as error:
        aside = out.with_name(f"{out.name}.rejected")
        if not any(file.is_file() for file in (made, *made.rglob("*"))) or os.path.lexists(aside):
            raise
        with created(aside) as place:
            os.rename(made, place)
        error.cure = f"what was written is kept as {aside}"
        raise


def _settled(model: Path, gguf: str | None, imatrix: str | None) -> tuple[Checkpoint, str, str]:
    """Return the model, the type and the matrix, with defaults for those that were left out."""
    from ..gguf.quant_mixes import NEEDS_MATRIX
    from ..gguf.write.quantizer import known
    from ..model.checkpoint import Checkpoint

    checkpoint = Checkpoint(model)
    kind = known(gguf or ("q8_0" if checkpoint.quantized else "f16"))
    return checkpoint, kind, imatrix or ("auto" if kind in NEEDS_MATRIX else "none")


def _gguf(
    checkpoint: Checkpoint, out: Path, kind: str, matrix: tuple[str, Any], fit: tuple[list, int], no_verify: bool
) -> dict[str, Any]:
    """Write the file, have it judged, and show what it is.

    ``matrix`` is which matrix, and the settings of the texts that it may be made from. ``fit`` is Macs, and tokens of
    context.
    """
    from ..exporting import server_check
    from ..exporting.export import export, preflight
    from ..exporting.llama_cpp import judged

    preflight(out, kind, matrix[0] != "none")
    made = _matrix(checkpoint.path, *matrix)
    done = export(checkpoint.path, out, kind, made, None if no_verify else judged)
    tables.show_gguf(out.name, done)
    unasked = {"checked": False, "reason": "not asked"}
    done["verify"] = unasked if no_verify else judged(checkpoint.path, out, done["kind"], keep=False)
    done["served"] = {"served": False, "reason": "not asked"}
    if not no_verify:
        done["served"] = _asked(checkpoint, lambda chat: server_check.llama_cpp(out, chat))
    done["fits"] = _fits(checkpoint, done, *fit)
    tables.fit_table(out.name, done["fits"])
    checked = done["verify"]
    console.say(
        f"llama.cpp against MLX: largest logit difference {checked['max_abs_difference']:.2g}"
        if checked["checked"]
        else f"not compared in llama.cpp: {checked['reason']}"
    )
    console.say(tables.answered(done["served"]))
    return done


def _require_fit(done: dict[str, Any], mac: str | None, context: int) -> None:
    if mac and not done["fits"][0]["fits"]:
        over = gb(-done["fits"][0]["headroom_bytes"])
        raise Refused(
            f"{done['path']} does not fit {mac} at {context} tokens: {over} too much",
            "the file is kept; cut more, or use a shorter context",
        )


def _asked(checkpoint: Checkpoint, ask: Any) -> dict[str, Any]:
    """Return what a stock server answers, if the memory holds the model."""
    from ..evaluation.resident import not_resident
    from ..model.tokenizer_files import has_chat_template

    if too_large := not_resident(checkpoint.path, None):
        return {"served": False, "reason": too_large}
    return ask(has_chat_template(checkpoint.path))


def _for_ollama(
    checkpoint: Checkpoint,
    out: Path,
    kind: str,
    matrix: tuple[str, Any],
    fit: tuple[list, str | None, int],
    no_verify: bool,
) -> dict[str, Any]:
    """Write a directory with a GGUF file and its Modelfile, whose context fits the Mac that was named."""
    from ..exporting.ollama import modelfile

    (macs, mac, context), name = fit, f"model-{kind}.gguf"
    with created(out) as place, _set_aside(place, out):
        done = _gguf(checkpoint, place / name, kind, matrix, (macs, context), no_verify)
        longest = [checkpoint.arch.config.get("max_position_embeddings") or context, context]
        if mac:
            longest.append(done["fits"][0]["max_context"] or context)
        found = modelfile(checkpoint.path, name, min(longest))
        (place / "Modelfile").write_text(found.text(), "utf-8")
    done |= {"path": str(out / name), "modelfile": str(out / "Modelfile"), "num_ctx": min(longest)}
    done["notes"] = [*done["notes"], *found.notes]
    for note in found.notes:
        console.say(f"note: {note}")
    console.say(f"ollama create NAME -f {shell(out / 'Modelfile')}    (Ollama itself was not run)")
    _require_fit(done, mac, context)
    return done


def _directory(
    model: Path, mlx: Path | None, hub: Path | None, packing: tuple[int, int, bool], no_verify: bool
) -> dict[str, Any]:
    """Write a model directory, packed or for the hub, and ask mlx-lm's server about it."""
    from ..base import plain_path
    from ..exporting import mlx_directory, server_check
    from ..model.checkpoint import Checkpoint

    out = mlx or hub
    with created(out) as place, _set_aside(place, out):
        done = mlx_directory.packed(model, place, *packing) if mlx else mlx_directory.hub_ready(model, place)
        checkpoint = Checkpoint(place)
        done["served"] = {"served": False, "reason": "not asked"}
        if not no_verify:
            done["served"] = _asked(checkpoint, lambda chat: server_check.mlx_lm(checkpoint.path, chat))
    done["out"] = str(out)
    console.say(f"{done['out']}: {gb(done['bytes'])}")
    console.say(tables.answered(done["served"]))
    if told := plain_path.warning(checkpoint.path):
        console.warn(told)
    return done


def _fits(checkpoint: Checkpoint, done: dict[str, Any], chosen: list, context: int) -> list[dict[str, Any]]:
    from ..capacity import planner
    from ..capacity.memory import Needs, Use

    needs = Needs(checkpoint.arch, Use(context, runtime="llama.cpp"))
    return planner.fit(needs, planner.weights_of(checkpoint.arch, done["tensor_bytes"]), chosen)


def _predicted(checkpoint: Checkpoint, kind: str, asked: str) -> dict[str, Any]:
    """Return what the file would be; nothing is written."""
    from ..gguf.write import imatrix_file, size as gguf_size

    matrix = imatrix_file.load(Path(asked)) if asked not in ("none", "auto") else None
    found = gguf_size.measured(checkpoint, kind, matrix, asked == "auto")
    told = {"path": None, "bytes": found.nbytes, "header_bytes": found.header_bytes, **found.about()}
    tables.show_gguf(f"{checkpoint.path} as {kind}", told)
    return told


def _matrix(model: Path, asked: str, settings: Any) -> Importance | None:
    """Return the importance matrix that was asked for: none, read from a file, or measured on text."""
    from ..exporting import importance_matrix
    from ..gguf.write import imatrix_file
    from ..text.splits import Texts

    if asked == "none":
        return None
    if asked != "auto":
        return imatrix_file.load(Path(asked))
    texts = Texts(model, settings)
    return importance_matrix.measure(model, texts.calibration, texts.label("calibration"))
