"""A model directory as one GGUF file for llama.cpp, LM Studio and Ollama.

Names come from gguf-py, everything else (architecture, row order, norms) from the family's table. Tensors are written
one at a time, and the file gets its name only after it was read back. Types that only
llama.cpp writes, and all that are made with an importance matrix, are quantized by it from a file of floats of ours
that lies beside for so long.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..base import console
from ..base.errors import PareError, UsageError
from ..gguf.architectures import target_of
from ..gguf.quant_mixes import NEEDS_MATRIX
from ..gguf.write import quantizer, size as gguf_size, tokenizer as gguf_tokenizer
from ..gguf.write.size import Prediction, padded
from ..model.checkpoint import Checkpoint
from ..sources.open_model import StrPath, opened
from ..store.atomic import created, refuse_existing, require_room, scratch

if TYPE_CHECKING:
    from ..gguf.write.imatrix_file import Importance


def export(
    model: StrPath,
    out: StrPath,
    kind: str,
    matrix: Importance | None = None,
    judge: Callable[..., Any] | None = None,
) -> dict:
    """Write ``model`` (a directory) as the GGUF file ``out``; ``kind`` is one of architectures.FILE_TYPES, such as f16,
    q8_0 or q4_k_m. ``matrix``: an importance matrix of this model (importance_matrix.measure, imatrix_file.load).
    ``judge`` is called with the model, a file of floats that llama.cpp is to quantize, and its kind (llama_cpp.judged).
    Memory: a few rows.

    Vectors stay F32; matrices whose rows are no whole blocks of their type get another ("fallbacks"). Returns path,
    bytes, what size.Prediction.about says, what is known of the matrix (imatrix), and notes on what llama.cpp does
    differently.
    Raises Refused when ``out`` exists, PareError when llama.cpp could not compute what the model does, or when there is
    no quantizer for the kind, UsageError for a kind that is not known or a matrix of another model; no file is left.
    """
    from ..lm import tokenizer_class
    from . import llama_cpp

    out, kind = Path(out), quantizer.known(kind)
    direct = quantizer.direct(kind, matrix is not None)
    preflight(out, kind, matrix is not None)
    model = opened(model)  # only now: it may be rebuilt or downloaded
    checkpoint = Checkpoint(model)
    predicted = gguf_size.predict(checkpoint, kind, matrix is not None)
    floats = None if direct else gguf_size.predict(checkpoint, quantizer.between(checkpoint))
    if floats and any(row.source is None and len(row.shape) > 1 for row in predicted.rows):
        raise PareError(
            f"{model} has layers without attention or feed-forward, for which something else stands in the file, and "
            "llama.cpp's quantizer may choose any type for that",
            "export it as q8_0, f16 or another type that is written directly",
        )
    if matrix:
        from ..gguf.write import imatrix_file

        imatrix_file.check(matrix, checkpoint)
    _check_room(out, predicted, floats)
    with created(out) as place:
        if floats is None:
            notes = _write(checkpoint, predicted, place)
        else:
            notes = _quantize(checkpoint, floats, place, kind, matrix, judge)
        llama_cpp.check(place, predicted.rows, every=floats is not None)
    told = {"entries": len(matrix.sums), "dataset": matrix.datasets[0]} if matrix else None
    return {
        "path": str(out),
        "bytes": out.stat().st_size,
        **predicted.about(),
        "imatrix": told,
        "notes": [*predicted.target.notes, *notes, *tokenizer_class.differing(model)],
    }


def preflight(out: Path, kind: str, matrix: bool) -> None:
    """What can be known before the model is looked at, or an importance matrix made. Raises as ``export``."""
    refuse_existing(out)
    if kind in NEEDS_MATRIX and not matrix:
        raise UsageError(f"{kind} cannot be made without an importance matrix", "use --imatrix auto")
    if kind in quantizer.PLAIN and matrix:
        raise UsageError(f"{kind} is written without an importance matrix", "leave --imatrix out")
    if not quantizer.direct(kind, matrix):
        quantizer.require(kind)


def _check_room(out: Path, predicted: Prediction, floats: Prediction | None) -> None:
    """Raises PareError when the disk cannot hold what will be written, a file of floats beside it for a while."""
    size = sum(padded(row.nbytes) for of in (predicted, floats) if of for row in of.rows)
    require_room(out, size, f", with {floats.kind} next to it to quantize from," if floats else "")


# ---- what is written ----


def why_not(checkpoint: Checkpoint) -> PareError | None:
    """Why llama.cpp cannot run a checkpoint, or cannot read its tokenizer; None if it can do both. Raises PareError for
    a file of the tokenizer that cannot be read."""
    try:
        target_of(checkpoint)
        gguf_tokenizer.check(checkpoint.path, checkpoint.arch.sizes["vocab"], checkpoint.config)
    except PareError as error:
        if isinstance(error.__cause__, OSError):  # a file that cannot be read says nothing of GGUF
            raise
        return error
    return None


def _quantize(
    checkpoint: Checkpoint,
    floats: Prediction,
    out: Path,
    kind: str,
    matrix: Importance | None,
    judge: Callable[..., Any] | None,
) -> list[str]:
    """Floats into a file beside ``out``, from there by llama.cpp; that file and the matrix are removed again."""
    with scratch(out.parent, "floats") as beside:
        chosen = beside / matrix.name if matrix else None
        between = beside / f"{chosen.name if chosen else ''}.floats"
        if matrix:
            matrix.save(chosen)
        notes = _write(checkpoint, floats, between, matrix)
        if judge:
            judge(checkpoint.path, between, floats.kind, keep=False)
        quantizer.quantize(between, out, kind, len(floats.rows), chosen)
    return notes


def _write(checkpoint: Checkpoint, of: Prediction, path: Path, matrix: Importance | None = None) -> list[str]:
    from ..gguf.write.encode import encoded

    writer, notes = gguf_size.begun(path, checkpoint, of, matrix)
    try:
        (file,) = writer.fout
        with console.progress("export", len(of.rows)) as bar:
            for row in of.rows:
                written = sum(file.write(part) for part in encoded(checkpoint, row, of.target.q_norm))
                if written != row.nbytes:
                    raise AssertionError(f"{row.name} has {written} bytes, announced {row.nbytes}")
                writer.write_padding(file, written)
                bar.advance(note=row.name)
        file.flush()
        os.fsync(file.fileno())
    finally:
        writer.close()
    return notes
