"""evaluate: a model on held-out rows -> Metrics; against a teacher also KL and agreement. Streamed."""

from __future__ import annotations

import math
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from .. import lm
from ..base.errors import PareError, UsageError
from ..model import finite
from ..model.checkpoint import Checkpoint
from ..model.hub_name import called
from ..sources.open_model import StrPath, opened
from ..store.arrays import MOST_NATS
from ..stream import memory, walk as stream
from ..stream.kept import end_of
from ..text.corpus import Rows
from .divergence import measure
from .metrics import Metrics


def evaluate(
    model: StrPath,
    rows: Rows,
    tokenizer: Any = None,
    teacher: StrPath | None = None,
    data: str = "",
    memory_cap: int | None = None,
    kept: Path | None = None,
) -> Metrics:
    """Score the predictions of tokens 1.. of every row (the first has nothing before it).

    perplexity = exp(mean NLL). Its standard error comes from the spread between rows, because tokens of one row are not
    independent. bits_per_byte = NLL / ln 2 / UTF-8 bytes of the predicted text, which compares across tokenizers.

    Args:
        model: the model, as people give it: a directory, a GGUF file, or a name on the hub.
        rows: held-out token rows.
        tokenizer: decodes the predicted text. bits_per_byte is None without it, and for a text of special tokens only.
        teacher: the model to compare with, given like ``model``; None: no KL divergence and no agreement.
        data: what the result says of the text.
        memory_cap: bytes that may be used; None: the memory that is free.
        kept: directory where the teacher's hidden states (without a teacher: the model's) stay for the next call.
    Returns:
        Metrics, with NLL and KL divergence in nats per token.
    Raises:
        Refused: the teacher has another tokenizer, or the memory does not suffice.
        UsageError: fewer than 2 tokens are predicted, or the model does not know one of them.
        PareError: a model answers NaN or infinity.
    """
    model, teacher = opened(model), None if teacher is None else opened(teacher)
    checkpoint = Checkpoint(model)
    if teacher is not None:
        lm.require_same_tokens(model, teacher)
    head = memory.head_bytes(Checkpoint(teacher)) if teacher is not None else 0
    spooled = memory.must_spool(checkpoint, rows, memory_cap, head)
    rows.require_known(checkpoint.arch.sizes["vocab"])
    predicted = np.maximum(rows.lengths - 1, 0)
    if predicted.sum() < 2:
        raise UsageError(f"{rows.total} tokens are too little to measure", "give more text or a larger --length")
    with tempfile.TemporaryDirectory() as scratch:
        place, what = Path(scratch), f"evaluate {called(model)}: block"
        reference = teacher and end_of(teacher, rows, kept or place / "kept", memory_cap, "teacher: block")
        if teacher is None and kept is not None:
            student = end_of(model, rows, kept, memory_cap, what)
        else:
            student = stream.walk(model, rows, what=what, spool=place if spooled else None)
        found = measure(rows, student, reference)
    _require_finite(found, model, teacher)
    nll = float(found["nll"].mean())
    windows, perplexity = np.split(found["nll"], np.cumsum(predicted)[:-1]), math.exp(min(nll, MOST_NATS))
    tokens, size = int(predicted.sum()), _bytes(rows, tokenizer)
    return Metrics(
        model=str(model), data=data, tokens=tokens, windows=rows.count, length=rows.length,
        nll=nll,
        perplexity=perplexity,
        perplexity_stderr=perplexity * _error(windows),
        bits_per_byte=nll * tokens / math.log(2) / size if size else None,
        **_against(found),
        window_nll=[float(window.mean()) for window in windows if len(window)],
    )  # fmt: skip


def _require_finite(found: dict[str, np.ndarray], model: Path, teacher: Path | None) -> None:
    """Raise PareError if a model answers NaN or infinity; the weights that hold them are named."""
    for path, name in ((model, "nll"), (teacher, "kl")):
        if name in found and not math.isfinite(found[name].mean()):
            finite.require(Checkpoint(path))
            raise PareError(f"{path} answers NaN or infinity", "the model is broken: do not use it")


def _error(rows: list[np.ndarray]) -> float:
    """Standard error of the mean over all tokens, clustered by row. A single row counts as independent tokens."""
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
    """UTF-8 bytes of the predicted text; 0 without a tokenizer, and for a text of special tokens only."""
    if tokenizer is None:
        return 0
    return sum(
        len(tokenizer.decode(row[1:n].tolist(), skip_special_tokens=True).encode())
        for row, n in zip(rows.tokens, rows.lengths, strict=True)
    )
