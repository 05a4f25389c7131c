"""evaluate: a model on held-out rows -> Metrics; against a teacher also KL and agreement. Streamed."""

from __future__ import annotations

import math
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from . import finite, lm, stream
from .artifacts import Metrics
from .checkpoint import Checkpoint
from .corpus import Rows
from .divergence import measure
from .errors import PareError, UsageError
from .opened import StrPath, opened


def evaluate(
    model: StrPath,
    rows: Rows,
    tokenizer: Any = None,
    teacher: StrPath | None = None,
    data: str = "",
    memory_cap: int | None = None,
) -> Metrics:
    """Score the predictions of tokens 1.. of every row (the first has nothing before it).

    perplexity = exp(mean NLL); its standard error comes from the spread between rows (tokens of one row are not
    independent). bits_per_byte = NLL / ln 2 / UTF-8 bytes of the predicted text, which compares across tokenizers.
    Raises UsageError for a teacher with another tokenizer and for too short a text, PareError when a model answers NaN.
    """
    model, teacher = opened(model), None if teacher is None else opened(teacher)
    checkpoint = Checkpoint(model)
    spooled = stream.must_spool(checkpoint, rows, memory_cap)
    if teacher is not None:
        _same_tokenizer(checkpoint, Checkpoint(teacher))
        kept = rows.count * rows.length * checkpoint.arch.sizes["hidden"] * 4  # the student's, while the teacher runs
        head = stream.head_bytes(checkpoint)
        spooled = stream.must_spool(Checkpoint(teacher), rows, memory_cap, head, kept) or spooled
    if rows.tokens.max() >= checkpoint.arch.sizes["vocab"]:
        raise UsageError(f"the data holds token {rows.tokens.max()}, the model knows {checkpoint.arch.sizes['vocab']}")
    predicted = np.maximum(rows.lengths - 1, 0)
    if predicted.sum() < 2:
        raise UsageError(f"{rows.total} tokens are too little to measure", "give more text or a larger --length")
    with tempfile.TemporaryDirectory() as scratch:
        spools = [Path(tempfile.mkdtemp(dir=scratch)) if spooled else None for _ in range(2)]
        student = stream.walk(model, rows, what=f"evaluate {model.name}: block", spool=spools[0])
        reference = teacher and stream.walk(teacher, rows, what="teacher: block", spool=spools[1])
        found = measure(rows, student, reference)
    nll = float(found["nll"].mean())
    for path, name in ((model, "nll"), (teacher, "kl")):
        if name in found and not math.isfinite(found[name].mean()):
            finite.require(Checkpoint(path))
            raise PareError(f"{path} answers NaN or infinity", "the model is broken: do not use it")
    perplexity = math.exp(min(nll, 700.0))
    windows = np.split(found["nll"], np.cumsum(predicted)[:-1])
    return Metrics(
        model=str(model),
        data=data,
        tokens=int(predicted.sum()),
        windows=rows.count,
        length=rows.length,
        perplexity=perplexity,
        perplexity_stderr=perplexity * _error(windows),
        bits_per_byte=nll * int(predicted.sum()) / math.log(2) / _bytes(rows, tokenizer) if tokenizer else None,
        **_against(found),
        window_nll=[float(window.mean()) for window in windows if len(window)],
    )


def _error(rows: list[np.ndarray]) -> float:
    """Standard error of the mean over all tokens, clustered by row; of a single row as if tokens were independent."""
    rows = [row for row in rows if len(row)]
    clusters = rows if len(rows) > 1 else [np.array([value]) for value in rows[0]]
    mean, total = np.concatenate(clusters).mean(), sum(map(len, clusters))
    squares = sum((cluster - mean).sum() ** 2 for cluster in clusters)
    return float(math.sqrt(squares * len(clusters) / (len(clusters) - 1)) / total)


def _against(found: dict[str, np.ndarray]) -> dict[str, float]:
    if "kl" not in found:
        return {}
    return {
        "kl_divergence": float(found["kl"].mean()),
        "kl_p95": float(np.percentile(found["kl"], 95)),
        "top1_agreement": float(found["agree"].mean()),
    }


def _bytes(rows: Rows, tokenizer: Any) -> int:
    return sum(
        len(tokenizer.decode(row[1:n].tolist(), skip_special_tokens=True).encode())
        for row, n in zip(rows.tokens, rows.lengths, strict=True)
    )


def _same_tokenizer(student: Checkpoint, teacher: Checkpoint) -> None:
    """Logits can only be compared id by id when both models mean the same tokens."""
    if student.arch.sizes["vocab"] != teacher.arch.sizes["vocab"]:
        raise UsageError(
            f"the teacher has {teacher.arch.sizes['vocab']} tokens, the model {student.arch.sizes['vocab']}"
        )
    files = [c.path / "tokenizer.json" for c in (student, teacher)]
    if all(f.exists() for f in files) and not lm.same_tokens(student.path, teacher.path):
        raise UsageError(
            f"{student.path} and {teacher.path} have different tokenizers",
            "the teacher must share the student's tokenizer",
        )
