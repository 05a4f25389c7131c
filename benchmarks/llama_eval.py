"""llama.cpp in a child process, asked for what llama-cpp-python has no function for: the perplexity of rows of tokens,
and an importance matrix collected as tools/imatrix does: the squares of src1 of every MUL_MAT on a block's weight.

``perplexity`` and ``importance`` ask; run as a script it answers. Imports nothing of ours.
"""

from __future__ import annotations

import ctypes
import json
import os
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np


def perplexity(gguf: Path, rows: np.ndarray) -> np.ndarray:
    """float64 [rows]: mean loss in nats of tokens 1.. of each row of int32 [rows, length], with a float32 KV cache."""
    return _asked("perplexity", gguf, rows)["loss"]


def importance(gguf: Path, rows: np.ndarray) -> dict[str, np.ndarray]:
    """float32 sums of squares by the name of the matrix, over all tokens of int32 [rows, length]."""
    return _asked("importance", gguf, rows)


def _asked(task: str, gguf: Path, rows: np.ndarray) -> dict[str, np.ndarray]:
    with TemporaryDirectory() as scratch:
        given, answer = Path(scratch) / "rows.npy", Path(scratch) / "answer.npz"
        np.save(given, rows)
        request = json.dumps({"task": task, "gguf": str(gguf), "rows": str(given), "answer": str(answer)})
        done = subprocess.run(
            [sys.executable, __file__], input=request, text=True, capture_output=True,
            env={**os.environ, "GGML_NO_BACKTRACE": "1"},
        )  # fmt: skip
        assert done.returncode == 0, done.stderr[-2000:]
        return dict(np.load(answer))


# ---- the child ----

MUL_MAT, F32 = b"MUL_MAT", 0


class Tensor(ctypes.Structure):
    """struct ggml_tensor of ggml.h, up to its name."""


Tensor._fields_ = [
    ("type", ctypes.c_int),
    ("buffer", ctypes.c_void_p),
    ("ne", ctypes.c_int64 * 4),
    ("nb", ctypes.c_size_t * 4),
    ("op", ctypes.c_int),
    ("op_params", ctypes.c_int32 * 16),
    ("flags", ctypes.c_int32),
    ("src", ctypes.POINTER(Tensor) * 10),
    ("view_src", ctypes.POINTER(Tensor)),
    ("view_offs", ctypes.c_size_t),
    ("data", ctypes.c_void_p),
    ("name", ctypes.c_char * 64),
]


def _model(gguf: str, length: int, callback=None):
    """A Llama that answers for whole rows at once. Its context can be given a callback only while it is made."""
    from llama_cpp import Llama, llama_cpp

    defaults = llama_cpp.llama_context_default_params

    def params():
        found = defaults()
        found.cb_eval = callback
        return found

    if callback:
        llama_cpp.llama_context_default_params = params
    try:
        return Llama(
            gguf, n_ctx=max(length, 32), n_batch=max(length, 32), n_ubatch=max(length, 32), n_gpu_layers=0, n_threads=1,
            n_threads_batch=1, logits_all=True, flash_attn=False, type_k=0, type_v=0, verbose=False,
        )  # fmt: skip
    finally:
        llama_cpp.llama_context_default_params = defaults


def _losses(gguf: str, rows: np.ndarray) -> dict[str, np.ndarray]:
    model, found = _model(gguf, rows.shape[1]), []
    for row in rows:
        model.reset()
        model.eval(row.tolist())
        logits = model._scores[: len(row) - 1].astype(np.float64)
        top = logits.max(axis=1)
        rest = np.log(np.exp(logits - top[:, None]).sum(axis=1)) + top
        found.append((rest - logits[np.arange(len(row) - 1), row[1:]]).mean())
    return {"loss": np.array(found)}


def _collected(gguf: str, rows: np.ndarray) -> dict[str, np.ndarray]:
    from llama_cpp import llama_cpp

    library = ctypes.CDLL(str(Path(llama_cpp.__file__).parent / "lib" / "libggml-base.so"))
    library.ggml_op_name.restype = ctypes.c_char_p
    sums: dict[str, np.ndarray] = {}

    @llama_cpp.ggml_backend_sched_eval_callback
    def watch(address, ask, _):
        tensor = ctypes.cast(address, ctypes.POINTER(Tensor)).contents
        if library.ggml_op_name(tensor.op) != MUL_MAT:
            return not ask
        weight, x = tensor.src[0].contents, tensor.src[1].contents
        name = weight.name.decode()
        if x.ne[1] < 16 or x.type != F32 or not name.startswith("blk."):
            return not ask
        if not ask:
            shape, strides = tuple(x.ne)[::-1], tuple(x.nb)[::-1]
            size = sum((n - 1) * s for n, s in zip(shape, strides, strict=True)) + 4
            raw = np.frombuffer((ctypes.c_char * size).from_address(x.data), np.uint8)
            values = np.lib.stride_tricks.as_strided(raw.view(np.float32), shape, strides)
            sums[name] = sums.get(name, 0) + np.square(values, dtype=np.float64).sum(axis=(0, 1, 2))
        return True

    model = _model(gguf, rows.shape[1], watch)
    for row in rows:
        model.reset()
        model.eval(row.tolist())
    return {name: total.astype(np.float32) for name, total in sums.items()}


if __name__ == "__main__":
    asked = json.load(sys.stdin)
    work = {"perplexity": _losses, "importance": _collected}[asked["task"]]
    np.savez(asked["answer"], **work(asked["gguf"], np.load(asked["rows"])))
