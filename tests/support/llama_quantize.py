"""llama-quantize in a child process: which type llama.cpp itself gives every tensor. ``types`` asks; run as a script it
answers, because llama.cpp logs to the terminal and may abort.

``write`` makes files of tensors with few rows: quantizing looks at names, columns and metadata, not at whether a
model of these tensors could run. Imports nothing of ours.
"""

from __future__ import annotations

import ctypes
import json
import os
import re
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import gguf
import numpy as np

NEEDS_MATRIX = ("iq1_s", "iq1_m", "iq2_xxs", "iq2_xs", "iq2_s", "iq2_m", "iq3_xxs", "iq3_xs", "q2_k_s")


def types(jobs: Sequence[Mapping], scratch: Path) -> list[dict]:
    """For every job the type of each tensor by name, or {"refused": why}.

    A job: gguf (path), kind, imatrix (columns of each tensor by name, or None), out (path, or None for a dry run).
    """
    answer = scratch / "types.json"
    request = json.dumps({"jobs": list(jobs), "answer": str(answer)})
    quiet = {**os.environ, "GGML_NO_BACKTRACE": "1"}
    done = subprocess.run(
        [sys.executable, __file__], input=request, text=True, timeout=300, capture_output=True, env=quiet
    )
    assert done.returncode == 0, done.stderr
    return json.loads(answer.read_text())


def write(path: Path, architecture: str, tensors: Mapping[str, Sequence[int]], layers: int, settings: Mapping) -> Path:
    """A GGUF file of float32 zeros; ``settings`` are keys of the architecture, integers, booleans or lists."""
    writer = gguf.GGUFWriter(path, architecture)
    for key, value in {"block_count": layers, **settings}.items():
        name = f"{architecture}.{key}"
        if isinstance(value, list):
            writer.add_array(name, value)
        elif isinstance(value, float):
            writer.add_float32(name, value)
        else:
            writer.add_uint32(name, value)
    for name, shape in tensors.items():
        writer.add_tensor(name, np.zeros(shape, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


# ---- the child ----

LINE = re.compile(
    r"\[ *\d+/ *\d+\] (\S+) +- \[.*?\], type = +(\S+), "
    r"(?:converting to (\S+) .. )?size = +[\d.]+ MiB(?: -> +[\d.]+ MiB(?: \((\S+)\))?)?"
)


def _quantize(library, job: dict, lines: list[bytes]) -> dict:
    params = library.llama_model_quantize_default_params()
    name = f"LLAMA_FTYPE_MOSTLY_{job['kind'].upper()}"
    params.ftype = library.LLAMA_FTYPE_ALL_F32 if job["kind"] == "f32" else getattr(library, name)
    params.nthread, params.dry_run, params.allow_requantize = 2, job["out"] is None, True
    keep = []
    if job["imatrix"]:
        entries = (library.llama_model_imatrix_data * (len(job["imatrix"]) + 1))()
        for entry, (tensor, size) in zip(entries, job["imatrix"].items(), strict=False):
            keep.append((ctypes.c_float * size)(*[1.0] * size))
            entry.name, entry.size = tensor.encode(), size
            entry.data = ctypes.cast(keep[-1], ctypes.POINTER(ctypes.c_float))
        params.imatrix = ctypes.cast(entries, ctypes.POINTER(library.llama_model_imatrix_data))
    lines.clear()
    out = (job["out"] or job["gguf"] + ".none").encode()
    failed = library.llama_model_quantize(job["gguf"].encode(), out, ctypes.byref(params))
    text = b"".join(lines).decode(errors="replace")
    if failed:
        return {"refused": text.strip().splitlines()[-1]}
    return {m[1]: (m[3] or m[4] or m[2]).upper() for m in LINE.finditer(text)}


def _answer(request: dict) -> None:
    from llama_cpp import llama_cpp as library

    lines: list[bytes] = []

    @library.llama_log_callback
    def log(level, text, data):
        lines.append(text)  # there are thousands for a model

    library.llama_log_set(log, None)
    found = [_quantize(library, job, lines) for job in request["jobs"]]
    Path(request["answer"]).write_text(json.dumps(found))


if __name__ == "__main__":
    _answer(json.load(sys.stdin))
