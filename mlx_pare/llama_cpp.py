"""Judges of a GGUF file: its own header, read back, and llama.cpp through llama-cpp-python (the extra "llama").

llama.cpp runs in a child process, because it aborts the whole process on some bad files.
"""

from __future__ import annotations

import importlib.util
import json
import mmap
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from . import console, gguf_header, machine
from .checkpoint import Checkpoint
from .errors import PareError
from .export import verify
from .gguf_header import ALIGNMENT
from .gguf_rows import Row
from .gguf_types import TYPES
from .gguf_values import finite


def available() -> bool:
    """Whether llama-cpp-python (the extra ``llama``) is installed."""
    return importlib.util.find_spec("llama_cpp") is not None


def logits(gguf: Path, tokens: Sequence[int]) -> np.ndarray:
    """float32 logits (len(tokens), vocab) after each token, on the CPU with a float32 KV cache.

    With llama.cpp's default float16 cache they would be off by a thousandth. Raises PareError when it cannot load the
    file.
    """
    with tempfile.TemporaryDirectory() as scratch:
        answer = Path(scratch) / "logits.npy"
        _ask({"task": "logits", "gguf": str(gguf), "tokens": [int(t) for t in tokens], "answer": str(answer)})
        return np.load(answer)


def tokenize(gguf: Path, strings: Sequence[str]) -> list[list[int]]:
    """Token ids of each string; nothing is added, and names of special tokens in the text are ordinary text."""
    with tempfile.TemporaryDirectory() as scratch:
        answer = Path(scratch) / "tokens.json"
        _ask({"task": "tokenize", "gguf": str(gguf), "strings": list(strings), "answer": str(answer)})
        return json.loads(answer.read_text())


def _ask(request: dict[str, Any]) -> None:
    if not available():
        raise PareError("llama-cpp-python is not installed", "pip install 'mlx-pare[llama]'")
    package = str(Path(__file__).resolve().parents[1])
    path = os.pathsep.join(p for p in (package, os.environ.get("PYTHONPATH")) if p)
    done = subprocess.run(
        [sys.executable, "-m", "mlx_pare.llama_cpp"],
        input=json.dumps(request),
        capture_output=True,
        encoding="utf-8",
        errors="replace",
        env={**os.environ, "PYTHONPATH": path, "GGML_NO_BACKTRACE": "1"},
    )
    if done.returncode or not Path(request["answer"]).exists():
        raise PareError(f"llama.cpp cannot use {request['gguf']}: {_reason(done)}")


def _reason(done: subprocess.CompletedProcess) -> str:
    """The last line in which llama.cpp says what is wrong; Python's own last line only repeats the file name."""
    lines = [line.strip() for line in done.stderr.splitlines() if line.strip()]
    telling = [line for line in lines if "error loading model" in line or "GGML_ASSERT" in line or "GGML_ABORT" in line]
    return (telling or lines or [f"exit status {done.returncode}"])[-1]


# ---- against MLX ----

PROBES = (
    "The quick brown fox jumps over the lazy dog, and nobody was surprised.",
    "In 1984 there were 1234567 of them; 3.14159 is not 22/7.",
    "  two spaces, a tab\tand\n\na blank line",
    "def f(x):\n    return {'a': x ** 2, \"b\": [1, 2]}\n",
    "naïve café, Straße, Ελλάδα, привет, 你好世界, こんにちは, 안녕하세요",
    "🙂🚀👩‍👩‍👧 it's we'll I'D they'Ve",
)


def compare(model: Path, gguf: Path) -> dict:
    """The numbers of export.verify."""
    from . import lm

    encode = lm.tokenizer(model).encode
    ours = [encode(text, add_special_tokens=False) for text in PROBES]
    theirs = tokenize(gguf, PROBES)
    tokens = [t for ids in ours for t in ids]
    tokens = (tokens * (64 // max(len(tokens), 1) + 1))[:64]
    here, there = mlx_logits(model, tokens), logits(gguf, tokens)
    return {
        "tokens": len(tokens),
        "max_abs_difference": float(np.abs(here - there).max()),
        "relative_difference": float(np.abs(here - there).mean() / here.std()),
        "same_argmax": float((here.argmax(-1) == there.argmax(-1)).mean()),
        "strings": len(PROBES),
        "different": [text for text, a, b in zip(PROBES, ours, theirs, strict=True) if a != b],
    }


def mlx_logits(model: Path, tokens: Sequence[int]) -> Any:
    """float32 logits (len(tokens), vocab) of the stock mlx-lm model, computed in float32 on the CPU."""
    import mlx.core as mx

    from . import lm

    device = mx.default_device()
    mx.set_default_device(mx.cpu)
    mx.disable_compile()  # on the CPU it needs a C++ compiler
    try:
        return np.array(lm.for_backend(lm.load(model))(mx.array(tokens)[None])[0].astype(mx.float32))
    finally:
        mx.set_default_device(device)
        if not lm.cpu_backend():
            mx.enable_compile()


# mean logit difference over the logits' spread above which a file is rejected; measured: f32 1e-6, f16 1e-3, q8_0 0.03,
# gemma3 2e-3 in f32 (llama.cpp tabulates GELU in float16)
LARGEST_DIFFERENCE = {"f32": 0.02, "f16": 0.05, "q8_0": 0.25}


def judged(model: Path, gguf: Path, kind: str) -> dict:
    """export.verify, with consequences: a file that llama.cpp refuses, tokenizes or computes differently is set aside
    as ``*.rejected`` and a PareError says why. Without room for both models the check is left out, and said so.
    """
    size = 4 * sum(t.size for t in Checkpoint(model).arch.tensors()) + gguf.stat().st_size
    if size > machine.available_bytes():
        return {"checked": False, "reason": f"it would need {console.gb(size)} of memory"}
    rejected = gguf.with_name(gguf.name + ".rejected")
    try:
        found = verify(model, gguf)
    except PareError as error:
        gguf.rename(rejected)
        raise PareError(f"llama.cpp refuses the file: {error.problem}", f"it was set aside as {rejected}") from error
    if found["checked"] and (found["different"] or found["relative_difference"] > LARGEST_DIFFERENCE[kind]):
        gguf.rename(rejected)
        what = f"tokenizes {found['different'][0]!r} differently" if found["different"] else "computes something else"
        raise PareError(
            f"llama.cpp {what} (logits differ by {found['relative_difference']:.2g} of their spread)",
            f"the file was set aside as {rejected}",
        )
    return found


# ---- the file itself ----


def check(path: Path, rows: Sequence[Row]) -> None:
    """Read a file back: every tensor there with its shape and type, a sample of it finite, and nothing else.

    Raises PareError; ``rows`` from gguf_rows.table.
    """
    try:
        header = gguf_header.read(path)
        offset = 0
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            for row in rows:
                if header.tensors.get(row.name) != (row.shape, row.type, offset, row.nbytes):
                    raise ValueError(f"{row.name} is not where and what it should be")
                unit = TYPES[row.type].size if row.type == "Q8_0" else 4
                size = min(row.nbytes, 1024 * unit) // unit * unit or row.nbytes
                for start in (header.data_start + offset, header.data_start + offset + row.nbytes - size):
                    if not finite(np.frombuffer(data[start : start + size], np.uint8), row.type):
                        raise ValueError(f"{row.name} holds NaN or infinity")
                offset += -(-row.nbytes // ALIGNMENT) * ALIGNMENT
        too_many = len(header.tensors) - len(rows)
        if too_many or header.data_start + offset != header.file_bytes:
            expected = header.data_start + offset
            raise ValueError(f"{header.file_bytes} bytes and {too_many} tensors too many, expected {expected} and 0")
    except (PareError, ValueError) as error:
        problem = error.problem if isinstance(error, PareError) else error
        raise PareError(f"{path} reads back wrong: {problem}", "the disk may be full or damaged") from error


# ---- the child ----


def _answer(request: dict[str, Any]) -> None:
    from llama_cpp import Llama

    answer = Path(request["answer"])
    if request["task"] == "tokenize":
        model = Llama(request["gguf"], vocab_only=True)
        found = [model.tokenize(s.encode(), add_bos=False, special=False) for s in request["strings"]]
        answer.write_text(json.dumps(found))
        return
    tokens = request["tokens"]
    size = max(len(tokens), 32)
    model = Llama(
        request["gguf"],
        n_ctx=size,
        n_batch=size,
        n_ubatch=size,
        n_gpu_layers=0,
        offload_kqv=False,
        op_offload=False,
        logits_all=True,
        flash_attn=False,
        type_k=0,  # GGML_TYPE_F32
        type_v=0,
    )
    model.eval(tokens)
    np.save(answer, model._scores[: len(tokens)].astype(np.float32))


if __name__ == "__main__":
    _answer(json.load(sys.stdin))
