"""llama.cpp's own quantizer: for the GGUF types that we do not write, and for all with an importance matrix.

mlx-pare uses ``llama-quantize`` if it is on PATH, else llama_model_quantize of llama-cpp-python (the extra "llama").
Both run in a child process, because llama.cpp aborts on some bad files. Run as a module, this file is that child.
"""

from __future__ import annotations

import ctypes
import importlib.util
import json
import os
import re
import shutil
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from subprocess import PIPE, STDOUT
from typing import Any

from ...base import children, console
from ...base.errors import PareError, UsageError
from ...model.checkpoint import Checkpoint
from .. import quant_mixes
from ..architectures import FILE_TYPES

DIRECT = ("f32", "f16", "bf16", "q8_0", "q4_0", "q4_1", "q5_0", "q5_1", "q6_k")  # encode.convert writes these
PLAIN = ("f32", "f16", "bf16", "q8_0")  # an importance matrix would change nothing
ROWS_BYTES = 1 << 30  # of float32 rows that llama.cpp has in memory at once
# The requirement of the extra "llama" in pyproject.toml. It names no mlx-pare: that is installed from its source.
INSTALL = "pip install 'llama-cpp-python[server]>=0.3.30'"
STEP = re.compile(r"^\[ *\d+/ *\d+\] +(\S+)")  # its line about a tensor

REASONS = {
    "mxfp4_moe": "is for mixtures of experts, a dense model becomes Q8_0 by it",
    **dict.fromkeys(("tq1_0", "tq2_0"), "is for models that were trained with ternary weights"),
}


def known(kind: str) -> str:
    """The kind in lower case, if it can be written. Raises UsageError otherwise."""
    kind = quant_mixes.known(kind)
    if kind not in FILE_TYPES:
        raise UsageError(f"{kind} {REASONS[kind]}", "choose another type, e.g. q4_k_m")
    return kind


def direct(kind: str, matrix: bool) -> bool:
    """Whether our own writer makes a file of this kind."""
    return kind in DIRECT and not matrix


def between(checkpoint: Checkpoint) -> str:
    """The kind of the float file to quantize from, as exact as the checkpoint; packed values count as float16."""
    matrices = [tensor for tensor in checkpoint.arch.tensors() if tensor.matrix]
    dtypes = {"F16" if checkpoint.packing(t.module) else checkpoint.dtype(t) for t in matrices}
    return "f32" if "F32" in dtypes else "bf16" if dtypes == {"BF16"} else "f16"


def program() -> str | None:
    """The path of llama-quantize; None if it is not on PATH."""
    return shutil.which("llama-quantize")


def require(kind: str) -> None:
    """Raise PareError if nothing on this computer makes files of this kind."""
    if program() is None and importlib.util.find_spec("llama_cpp") is None:
        raise PareError(
            f"{kind} takes llama.cpp's quantizer, and neither llama-cpp-python nor llama-quantize is here",
            f"{INSTALL}, put llama-quantize on PATH, or choose one of {', '.join(DIRECT)}",
        )


def quantize(source: Path, out: Path, kind: str, tensors: int, matrix: Path | None = None) -> None:
    """Quantize a GGUF file of floats with llama.cpp.

    Args:
        source: the GGUF file of floats.
        out: the file to write; it may be there in part after an error.
        kind: the kind of the new file, such as "q4_k_m".
        tensors: of ``source``, for the progress.
        matrix: the file of an importance matrix; None: without.
    Raises:
        PareError: there is no quantizer, or llama.cpp fails, with its message.
    """
    require(kind)
    threads = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    found = program()
    if found:
        chosen = ["--imatrix", matrix.name] if matrix else []  # by name alone: the file records it
        command = [found, *chosen, *map(str, (source.resolve(), out.resolve())), kind.upper(), str(threads)]
        request = ""
    else:
        asked = {"source": str(source.resolve()), "out": str(out.resolve()), "kind": kind, "threads": threads}
        command = children.module("gguf.write.quantizer")
        request = json.dumps({**asked, "matrix": str(matrix.resolve()) if matrix else None})
    code, lines = _watched(command, request, tensors, matrix.resolve().parent if matrix else None)
    if code or not out.exists():
        telling = [line for line in lines if re.search(r"error|fail|GGML_ASSERT|requires", line, re.I)]
        raise PareError(f"llama.cpp cannot write {kind}: {(telling or lines or [f'exit status {code}'])[-1]}")


def _watched(command: Sequence[str], request: str, tensors: int, where: Path | None) -> tuple[int, list[str]]:
    """Run a quantizer and show its progress. Returns its exit status and last lines. It ends with this process."""
    child = children.start(
        command, stdin=PIPE, stdout=PIPE, stderr=STDOUT, encoding="utf-8", errors="replace", cwd=where
    )
    lines: list[str] = []
    try:
        with suppress(BrokenPipeError):  # it ended before it read; its output says why
            child.stdin.write(request)
            child.stdin.close()
        with console.progress("quantize", tensors) as bar:
            for line in child.stdout:
                lines = [*lines[-50:], line.strip()] if line.strip() else lines
                if step := STEP.match(line):
                    bar.advance(note=step[1])
        return child.wait(), lines
    finally:
        children.end(child)


# ---- the child ----


def _entries(library: Any, matrix: Path) -> tuple[Any, list[Any]]:
    """The matrix as llama.cpp takes it, an array that ends with an empty entry; and what must stay alive for it."""
    from . import imatrix_file

    means = imatrix_file.load(matrix).means()
    entries, kept = (library.llama_model_imatrix_data * (len(means) + 1))(), []
    for entry, (name, values) in zip(entries, means.items(), strict=False):
        kept.append(values)
        entry.name, entry.size = name.encode(), len(values)
        entry.data = values.ctypes.data_as(ctypes.POINTER(ctypes.c_float))
    return ctypes.cast(entries, ctypes.POINTER(library.llama_model_imatrix_data)), [entries, *kept]


def _answer(request: dict[str, Any]) -> int:
    from llama_cpp import llama_cpp as library

    params = library.llama_model_quantize_default_params()
    params.ftype, params.nthread = FILE_TYPES[request["kind"]], request["threads"]
    params.max_buf_size = ROWS_BYTES
    if request["matrix"]:
        params.imatrix, _kept = _entries(library, Path(request["matrix"]))
    return library.llama_model_quantize(request["source"].encode(), request["out"].encode(), ctypes.byref(params))


if __name__ == "__main__":
    sys.exit(_answer(json.load(sys.stdin)))
