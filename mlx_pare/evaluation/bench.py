"""bench: prefill and decode tok/s of models in stock mlx-lm, in turn, in one process; ratios with their spread."""

from __future__ import annotations

from collections.abc import Sequence
from os import PathLike
from pathlib import Path
from statistics import median
from typing import Any

import mlx.core as mx

from .. import lm
from ..base import machine
from ..base.console import progress
from ..base.errors import Refused, UsageError
from ..base.units import gb
from ..capacity.memory import Needs, Use
from ..model.checkpoint import Checkpoint
from ..options.values import COUNT, MOST, require, whole
from ..sources.open_model import StrPath, opened
from . import resident

PROMPT, NEW = whole(1, MOST // 2), whole(2, MOST // 2)
TOKEN_BYTES = 40  # what a token of the prompt takes as a number in a Python list
NUMBERS = ("prefill_tokens_per_s", "decode_tokens_per_s", "peak_bytes")


def bench(
    models: StrPath | Sequence[StrPath],
    trials: int = 5,
    prompt: int = 512,
    new: int = 128,
    memory_cap: int | None = None,
) -> dict[str, Any]:
    """Time ``trials`` rounds in which every model takes its turn (A B A B ...), after one round that does not count.

    One model is in memory at a time: it is loaded again for each turn. Ratios are taken pair by pair, so that a machine
    that slows down slows both.

    Args:
        models: one model or several: directories, GGUF files, or names of models on the hub.
        trials: rounds that count.
        prompt: tokens of the prompt, which are random.
        new: tokens that a model writes after the prompt.
        memory_cap: bytes that one model may take; None: the memory that is free.
    Returns:
        "trials", "prompt_tokens", "new_tokens", "backend", and "models": for each model "model" (its path), and median,
        minimum and maximum of "prefill_tokens_per_s", "decode_tokens_per_s" and "peak_bytes". "ratio" holds the same
        three relative to the first model.
    Raises:
        UsageError: there is no model, or a number is out of its range.
        Refused: a model, or the prompt and its cache, do not fit in memory. This is known before any model is loaded.
    """
    models = [opened(m) for m in ([models] if isinstance(models, str | PathLike) else models)]
    if not models:
        raise UsageError("bench needs at least one model")
    for flag, value, values in (("--trials", trials, COUNT), ("--prompt", prompt, PROMPT), ("--new", new, NEW)):
        require(flag, value, values)
    resident.require(models, memory_cap)  # this finds a broken model too, before minutes of work
    for path in models:
        _check_room(Checkpoint(path), prompt, new, memory_cap)
    raw: list[list[dict[str, float]]] = [[] for _ in models]
    with progress("bench: turn", (trials + 1) * len(models)) as bar:
        for trial in range(trials + 1):
            for number, path in enumerate(models):
                result = _turn(path, prompt, new)
                if trial:
                    raw[number].append(result)
                bar.advance()
    backend = "CPU backend, arithmetic in float32" if lm.cpu_backend() else str(mx.default_device())
    rows = [
        {"model": str(p), **{n: _spread([r[n] for r in raw[i]]) for n in NUMBERS}, "ratio": _ratios(raw[i], raw[0])}
        for i, p in enumerate(models)
    ]
    return {"trials": trials, "prompt_tokens": prompt, "new_tokens": new, "backend": backend, "models": rows}


def _check_room(checkpoint: Checkpoint, prompt: int, new: int, memory_cap: int | None) -> None:
    """Raises Refused if the prompt and its cache need more memory than may be used."""
    needs = Needs(checkpoint.arch, Use(prompt + new), 4 if lm.cpu_backend() else checkpoint.value_bytes)
    cache, free = needs.kv(prompt + new) + TOKEN_BYTES * prompt, memory_cap or machine.available_bytes()
    if cache > free:
        raise Refused(
            f"a prompt of {prompt} tokens and the cache for it need about {gb(cache)}, "
            f"{'--memory-cap allows' if memory_cap else 'free are'} {gb(free)}",
            "give a smaller --prompt",
        )


def _turn(path: Path, prompt: int, new: int) -> dict[str, float]:
    model, tokenizer = lm.load_stock(path), lm.tokenizer(path)
    lm.speed(model, tokenizer, min(8, prompt), 2)  # kernels are built and weights read before the clock starts
    result = lm.speed(model, tokenizer, prompt, new)
    del model
    mx.clear_cache()
    return result


def _spread(values: list[float]) -> dict[str, float]:
    return {"median": median(values), "min": min(values), "max": max(values)}


def _ratios(own: list[dict[str, float]], first: list[dict[str, float]]) -> dict[str, dict[str, float]]:
    return {n: _spread([a[n] / b[n] for a, b in zip(own, first, strict=True)]) for n in NUMBERS}
