"""Judges of a GGUF file: its own header, read back, and llama.cpp through llama-cpp-python (the extra "llama").

llama.cpp runs in a child process, because some bad files make it abort the whole process.
"""

from __future__ import annotations

import importlib.util
import json
import mmap
import tempfile
from collections.abc import Sequence
from pathlib import Path
from subprocess import CompletedProcess
from typing import Any

import numpy as np

from ..base import children, machine
from ..base.errors import PareError
from ..base.units import gb
from ..gguf import header as gguf_header
from ..gguf.types import TYPES
from ..gguf.write import quantizer, tokenizer as gguf_tokenizer
from ..gguf.write.encode import finite
from ..gguf.write.quantizer import INSTALL
from ..gguf.write.size import padded
from ..gguf.write.tensors import Row
from ..model.checkpoint import Checkpoint

TOKENS = 64  # on which logits are compared
SMALL = 64 << 20  # bytes of a file for which one thread is enough


def available() -> bool:
    """Tell whether llama-cpp-python (the extra ``llama``) is installed."""
    return importlib.util.find_spec("llama_cpp") is not None


def logits(gguf: Path, tokens: Sequence[int]) -> np.ndarray:
    """Compute logits with llama.cpp, on the CPU with a float32 KV cache.

    With llama.cpp's default float16 cache they would be off by a thousandth.

    Args:
        gguf: the file.
        tokens: ids, one after the other.
    Returns:
        Logits after each token, float32 [tokens, vocab].
    Raises:
        PareError: llama-cpp-python is not installed, or llama.cpp cannot use the file.
    """
    return _ask(gguf, tokens=tokens)["logits"]


def tokenize(gguf: Path, strings: Sequence[str]) -> list[list[int]]:
    """Return the token ids of each string. Nothing is added, and names of special tokens in the text are ordinary
    text."""
    return _ask(gguf, strings=strings)["ids"]


def greedy(gguf: Path, tokens: Sequence[int], count: int) -> list[int]:
    """Compute the likeliest next token several times, as ``logits`` does.

    Args:
        gguf: the file.
        tokens: ids to begin with.
        count: number of tokens to generate.
    Returns:
        The ids of the generated tokens.
    Raises:
        PareError: as ``logits``.
    """
    return _ask(gguf, tokens=tokens, count=count)["greedy"]


def _ask(gguf: Path, **asked: Any) -> dict[str, Any]:
    """Ask llama.cpp about a file, all at once, because each child loads the file anew (see exporting/llama_child.py).

    Args:
        gguf: the file.
        asked: "strings" to tokenize; "tokens" to compute the logits of; "count" of tokens to generate after them.
    Returns:
        "ids" of the strings; "logits", float32 [tokens, vocab]; "greedy", ids.
    Raises:
        PareError: llama-cpp-python is not installed, or llama.cpp cannot use the file.
    """
    if not available():
        raise PareError("llama-cpp-python is not installed", INSTALL)
    with tempfile.TemporaryDirectory() as scratch:
        answer, logits = Path(scratch) / "answer.json", Path(scratch) / "logits.npy"
        asked = {name: list(map(int, value)) if name == "tokens" else value for name, value in asked.items()}
        # its threads spin while they wait: next to other work, two take longer than one for a small model
        threads = 1 if gguf.exists() and gguf.stat().st_size < SMALL else None
        request = {"gguf": str(gguf), "threads": threads, "answer": str(answer), "logits": str(logits), **asked}
        done = children.run(children.module("exporting.llama_child"), json.dumps(request))
        if done.returncode or not answer.exists():
            raise PareError(f"llama.cpp cannot use {gguf}: {_reason(done)}")
        found = json.loads(answer.read_text())
        return found | ({"logits": np.load(logits)} if logits.exists() else {})


def _reason(done: CompletedProcess) -> str:
    """Return the last line in which llama.cpp says what is wrong. Python's own last line only repeats the file name."""
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
    """Return the numbers of ``verify``. The tokens are those of tokenizer.json, from which the file was made."""
    from ..lm.tokenizer_class import by_file

    arch, config = Checkpoint(model).arch, Checkpoint(model).all_config
    known = gguf_tokenizer.check(model, arch.sizes["vocab"], config)
    ours = by_file(model, PROBES)  # not by mlx-lm, whose transformers may leave tokenizer.json
    tokens = [t for ids in ours for t in ids]
    tokens = (tokens * (TOKENS // max(len(tokens), 1) + 1))[:TOKENS]
    answer = _ask(gguf, strings=PROBES, tokens=tokens)
    theirs, here, there = answer["ids"], mlx_logits(model, tokens), answer["logits"]
    return {
        "tokens": len(tokens),
        "max_abs_difference": float(np.abs(here - there).max()),
        "relative_difference": float(np.abs(here - there).mean() / here.std()),
        "same_argmax": float((here.argmax(-1) == there.argmax(-1)).mean()),
        "strings": len(PROBES),
        "different": [t for t, a, b in zip(PROBES, ours, theirs, strict=True) if a != b and not known.foreseen(t)],
    }


def mlx_logits(model: Path, tokens: Sequence[int]) -> np.ndarray:
    """Compute logits with the stock blocks of mlx-lm in float32, with one block in memory at a time.

    Args:
        model: model directory.
        tokens: ids, one after the other.
    Returns:
        Logits after each token, float32 [tokens, vocab].
    Raises:
        PareError: as ``stream.walk``.
    """
    from ..stream.walk import walk
    from ..text.corpus import Rows

    return np.array(walk(model, Rows.full([[int(t) for t in tokens]]), what=None).all_logits(slice(0, 1))[0])


# A file is rejected if its mean logit difference over the spread of the logits is larger. That is 1.13 for logits with
# nothing in common, and 0.27 after a forgotten rope permutation (stories260K). Measured: f32 1e-6, f16 1e-3, q8_0 0.03,
# gemma3 2e-3 in f32 (llama.cpp tabulates GELU in float16). By bits, at most: for random models (llama, gemma3 of hidden
# size 256) 1: 0.60, 2: 0.57, 3: 0.39, 4: 0.24, 5: 0.12, 6: 0.06; for trained ones (novelist-9m, stories260K) 2: 0.14,
# 3 and 4: 0.09, 5: 0.04, 6: 0.02. So the floats are judged before they are quantized: there a wrong order shows.
LARGEST_DIFFERENCE = {"f32": 0.02, "f16": 0.05, "bf16": 0.1, "q8_0": 0.25}
OF_BITS = {"1": 1.0, "2": 0.9, "3": 0.7, "4": 0.5, "5": 0.3, "6": 0.25}


def largest_difference(kind: str) -> float:
    """Return the relative difference up to which a file of this kind passes."""
    return LARGEST_DIFFERENCE.get(kind) or OF_BITS[kind.removeprefix("i")[1]]


def judged(model: Path, gguf: Path, kind: str, keep: bool = True) -> dict:
    """Compare a file in llama.cpp with the model by ``verify``, and reject a file that differs.

    Without room for both models the check is left out.

    Args:
        model: model directory.
        gguf: the file.
        kind: its type, which sets how much it may differ.
        keep: set a rejected file aside as ``*.rejected``; False: it stays where it is.
    Returns:
        The answer of ``verify``, or "checked" False and the "reason".
    Raises:
        PareError: llama.cpp refuses the file, or tokenizes or computes differently; the message says which.
    """
    from ..stream.memory import required_bytes
    from ..text.corpus import Extent

    size = required_bytes(Checkpoint(model), Extent(1, TOKENS)) + gguf.stat().st_size
    if size > machine.available_bytes():
        return {"checked": False, "reason": f"it would need {gb(size)} of memory"}
    try:
        found = verify(model, gguf)
    except PareError as error:
        raise _rejected(gguf, keep, f"llama.cpp refuses the file: {error.problem}") from error
    if found["checked"] and (found["different"] or found["relative_difference"] > largest_difference(kind)):
        what = f"tokenizes {found['different'][0]!r} differently" if found["different"] else "computes something else"
        spread = f"{found['relative_difference']:.2g}"
        raise _rejected(gguf, keep, f"llama.cpp {what} (logits differ by {spread} of their spread)")
    return found


def _rejected(gguf: Path, keep: bool, problem: str) -> PareError:
    if not keep:
        return PareError(problem, "nothing was written")
    gguf.rename(rejected := gguf.with_name(gguf.name + ".rejected"))
    return PareError(problem, f"the file was set aside as {rejected}")


# ---- the file itself ----


def check(path: Path, rows: Sequence[Row], every: bool = False) -> None:
    """Read a file back: it must hold every tensor with its shape and type, finite values, and nothing else.

    Args:
        path: the file.
        rows: its tensors, from tensors.table, in any order.
        every: look at all values; False: at both ends of each tensor.
    Raises:
        PareError: the file is not as expected.
    """
    try:
        header = gguf_header.read(path)
        for row in rows:
            if (found := header.tensors.get(row.name)) is None or found[:2] != (row.shape, row.type):
                raise ValueError(f"{row.name} is {found and found.type}, expected {row.type}")
        end = 0
        for name, found in sorted(header.tensors.items(), key=lambda item: item[1].offset):
            if found.offset != end:
                raise ValueError(f"{name} is not where it should be")
            end += padded(found.nbytes)
        too_many = len(header.tensors) - len(rows)
        if too_many or header.data_start + end != header.file_bytes:
            expected = header.data_start + end
            raise ValueError(f"{header.file_bytes} bytes and {too_many} tensors too many, expected {expected} and 0")
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            for row in rows:
                start = header.data_start + header.tensors[row.name].offset
                for part in _parts(row, every):
                    if not finite(np.frombuffer(data[start + part.start : start + part.stop], np.uint8), row.type):
                        raise ValueError(f"{row.name} holds NaN or infinity")
    except (PareError, ValueError) as error:
        problem = error.problem if isinstance(error, PareError) else error
        other = ", or this llama.cpp goes by other rules than the one that is known here" if every else ""
        raise PareError(f"{path} reads back wrong: {problem}", f"the disk may be full or damaged{other}") from error


def _parts(row: Row, every: bool) -> list[slice]:
    """Return the bytes of a tensor to look at, in whole blocks: all of them, or its two ends."""
    unit = TYPES[row.type].size if TYPES[row.type].values > 1 else 4
    step = 1024 * unit if not every else (8 << 20) // unit * unit
    if every:
        return [slice(at, min(at + step, row.nbytes)) for at in range(0, row.nbytes, step)]
    size = min(row.nbytes, step) // unit * unit or row.nbytes
    return [slice(0, size), slice(row.nbytes - size, row.nbytes)]


def verify(model: Path, gguf: Path) -> dict:
    """Ask llama.cpp itself: compare its logits on 64 tokens with MLX's, and its tokens of a few strings.

    Both compute in float32 on the CPU from the weights as stored, so an F32 file differs by rounding only (gemma3 by up
    to about 0.01: llama.cpp tabulates GELU in float16). It returns checked, tokens, max_abs_difference, same_argmax (a
    fraction), strings, different (strings tokenized differently, unless that is foreseen), and relative_difference (the
    mean absolute difference over the standard deviation of the logits); or checked False and the reason.
    """

    if not available():
        return {"checked": False, "reason": f"llama-cpp-python is not installed ({quantizer.INSTALL})"}
    return {"checked": True, **compare(Path(model), Path(gguf))}
