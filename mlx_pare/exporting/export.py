"""A model directory as one GGUF file for llama.cpp, LM Studio and Ollama.

Names come from gguf-py, everything else (architecture, row order, norms) from the family's table. Tensors are written
one at a time. The file gets its name only after it was read back. llama.cpp quantizes the types that only it writes,
and all types with an importance matrix. For that, mlx-pare first writes a temporary file of floats next to the output.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..base import console, machine
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
    """Write a model as a GGUF file.

    Vectors stay F32. A matrix whose rows are not whole blocks of its type gets another type ("fallbacks"). This takes
    the memory of a few rows.

    Args:
        model: model directory, GGUF file or name.
        out: the file to write; it must not exist.
        kind: one of architectures.FILE_TYPES, such as f16, q8_0 or q4_k_m.
        matrix: importance matrix of this model (importance_matrix.measure, imatrix_file.load); None: without.
        judge: called with the model, the file of floats that llama.cpp is to quantize, and its kind (llama_cpp.judged);
            None: the floats are not judged.
    Returns:
        path, bytes, what size.Prediction.about says, imatrix (what is known of the matrix, or None), and notes on what
        llama.cpp does differently.
    Raises:
        UsageError: the kind is unknown or does not suit the matrix, or the matrix is of another model.
        Refused: ``out`` exists.
        PareError: llama.cpp could not compute what the model does, nothing here writes the kind, or the disk has no
            room. No file is left.
    """
    from ..lm import tokenizer_class
    from . import llama_cpp

    out, kind = Path(out), quantizer.known(kind)
    direct = quantizer.direct(kind, matrix is not None)
    preflight(out, kind, matrix is not None)
    model = opened(model)  # only now, because this may rebuild or download it
    checkpoint = Checkpoint(model)
    predicted = gguf_size.predict(checkpoint, kind, matrix is not None)
    floats = None if direct else gguf_size.predict(checkpoint, quantizer.between(checkpoint))
    if floats:
        _refuse_substitutes(model, predicted)
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


def _refuse_substitutes(model: Path, predicted: Prediction) -> None:
    """Raise PareError if the file holds matrices that the model does not have: llama.cpp's quantizer may choose any
    type for them."""
    if any(row.source is None and len(row.shape) > 1 for row in predicted.rows):
        raise PareError(
            f"{model} has layers without attention or feed-forward, for which something else stands in the file, and "
            "llama.cpp's quantizer may choose any type for that",
            "export it as q8_0, f16 or another type that is written directly",
        )


def preflight(out: Path, kind: str, matrix: bool) -> None:
    """Check what can be known before the model is read, or an importance matrix is measured.

    Args:
        out: the file to write.
        kind: its type.
        matrix: whether an importance matrix is used.
    Raises:
        UsageError: the kind needs an importance matrix, or takes none.
        Refused: ``out`` exists.
        PareError: nothing here writes the kind.
    """
    refuse_existing(out)
    if kind in NEEDS_MATRIX and not matrix:
        raise UsageError(f"{kind} cannot be made without an importance matrix", "use --imatrix auto")
    if kind in quantizer.PLAIN and matrix:
        raise UsageError(f"{kind} is written without an importance matrix", "leave --imatrix out")
    if not quantizer.direct(kind, matrix):
        quantizer.require(kind)


def _check_room(out: Path, predicted: Prediction, floats: Prediction | None) -> None:
    """Raises PareError if the disk cannot hold the file, and the temporary file of floats next to it."""
    size = sum(padded(row.nbytes) for of in (predicted, floats) if of for row in of.rows)
    require_room(out, size, f", with {floats.kind} next to it to quantize from," if floats else "")


# ---- what is written ----


def why_not(checkpoint: Checkpoint) -> PareError | None:
    """Return why llama.cpp cannot run a checkpoint, or cannot read its tokenizer; None if it can do both. Raises
    PareError for a tokenizer file that cannot be read."""
    try:
        target_of(checkpoint)
        gguf_tokenizer.check(checkpoint.path, checkpoint.arch.sizes["vocab"], checkpoint.all_config)
    except PareError as error:
        if isinstance(error.__cause__, OSError):  # a file that cannot be read says nothing about GGUF
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
    """Write floats into a temporary file next to ``out``, and let llama.cpp quantize it. That file and the matrix are
    then removed."""
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
        machine.to_disk(file.fileno())
    finally:
        writer.close()
    return notes
