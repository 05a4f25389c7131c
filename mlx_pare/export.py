"""A model directory as one GGUF file for llama.cpp, LM Studio and Ollama.

Names come from gguf-py, everything else (architecture, row order, norms) from the family's table. Tensors are written
one at a time, to a temporary name that becomes the real one only after the file was read back.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from pathlib import Path

from . import console
from .checkpoint import Checkpoint
from .errors import PareError, Refused, UsageError
from .gguf_rows import Row, table
from .gguf_target import FILE_TYPES, Target, metadata, target_of


def export(model: Path, out: Path, kind: str) -> dict:
    """Write ``model`` (a directory) as the GGUF file ``out``; ``kind`` is f32, f16 or q8_0. Memory is a few rows.

    Vectors stay F32; in q8_0, matrices whose rows are no multiple of 32 stay F16 ("fallbacks"). Returns path, kind,
    architecture, bytes, tensor_bytes, tensors, fallbacks, and notes on what llama.cpp does differently.
    Raises Refused when ``out`` exists, PareError when llama.cpp could not compute what the model does; no file is left.
    """
    from . import llama_cpp

    model, out = Path(model), Path(out)
    if kind not in FILE_TYPES:
        raise UsageError(f"there is no GGUF type {kind!r} here", f"choose one of {', '.join(FILE_TYPES)}")
    _refuse_existing(out)
    checkpoint = Checkpoint(model)
    target = target_of(checkpoint)
    rows = table(checkpoint.arch, target, kind)
    size = sum(row.nbytes for row in rows)
    out.parent.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(out.parent).free
    if size > free:
        raise PareError(f"{out} needs {console.gb(size)}, {out.parent} has {console.gb(free)} free")
    partial = out.with_name(f".{out.name}.part")
    try:
        notes = _write(checkpoint, target, kind, rows, partial)
        llama_cpp.check(partial, rows)
        _refuse_existing(out)
        partial.rename(out)
    finally:
        partial.unlink(missing_ok=True)
    return {
        "path": str(out),
        "kind": kind,
        "architecture": target.architecture,
        "bytes": out.stat().st_size,
        "tensor_bytes": size,
        "tensors": len(rows),
        "fallbacks": [row.name for row in rows if kind == "q8_0" and row.type == "F16"],
        "notes": [*target.notes, *notes],
    }


def _refuse_existing(out: Path) -> None:
    if out.exists():
        raise Refused(f"{out} exists already", "choose another name, or move it away")


# ---- what is written ----


def why_not(checkpoint: Checkpoint) -> PareError | None:
    """Why there can be no GGUF file of a checkpoint; None when there can."""
    try:
        target_of(checkpoint)
    except PareError as error:
        return error
    return None


def _write(checkpoint: Checkpoint, target: Target, kind: str, rows: Sequence[Row], path: Path) -> list[str]:
    import gguf
    import numpy as np

    from . import gguf_tokenizer
    from .gguf_values import encoded

    writer = gguf.GGUFWriter(path, target.architecture)
    try:
        metadata(writer, checkpoint, target, kind)
        notes = gguf_tokenizer.write(writer, checkpoint.path, checkpoint.arch.sizes["vocab"], checkpoint.config).notes
        for row in rows:
            number = gguf.GGMLQuantizationType[row.type]
            writer.add_tensor_info(row.name, row.shape, np.dtype(np.float32), row.nbytes, raw_dtype=number)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        (file,) = writer.fout
        writer.write_padding(file, file.tell())
        with console.progress("export", len(rows)) as bar:
            for row in rows:
                written = sum(file.write(part) for part in encoded(checkpoint, row, target.q_norm))
                if written != row.nbytes:
                    raise AssertionError(f"{row.name} has {written} bytes, announced {row.nbytes}")
                writer.write_padding(file, written)
                bar.advance(note=row.name)
        file.flush()
        os.fsync(file.fileno())
    finally:
        writer.close()
    return notes


def verify(model: Path, gguf: Path) -> dict:
    """Ask llama.cpp itself: its logits on 64 tokens against stock MLX's, and its tokens of a few strings.

    Both compute in float32 on the CPU from the weights as stored, so an F32 file differs by rounding only (gemma3 by up
    to about 0.01: llama.cpp tabulates GELU in float16). Returns checked, tokens, max_abs_difference, same_argmax
    (a fraction), strings, different (those tokenized differently); or checked False and the reason.
    ``relative_difference``: mean difference over the standard deviation of the logits.
    """
    from . import llama_cpp

    if not llama_cpp.available():
        return {"checked": False, "reason": "llama-cpp-python is not installed (pip install 'mlx-pare[llama]')"}
    return {"checked": True, **llama_cpp.compare(Path(model), Path(gguf))}
