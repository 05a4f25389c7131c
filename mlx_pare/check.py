"""check: is a model that we wrote fit to be handed on? Opened by stock tools, made to write, compared."""

from __future__ import annotations

from pathlib import Path

from . import lm
from .arch import RESULT_TYPES
from .checkpoint import Checkpoint
from .errors import PareError
from .resident import not_resident
from .stock_path import plain, warning

PROMPT = "The"
TOKENS = 48


def check(model: Path, original: Path, memory_cap: int | None = None) -> list[str]:
    """Warnings about a model directory, empty when all is well. Both models are made to write, one after the other, if
    the memory holds them (``memory_cap``; default: what is free).

    Raises PareError when stock mlx-lm or transformers cannot open it, or its tokenizer differs from the original's.
    """
    for file in Checkpoint(original).tokenizer_files():
        ours = model / file.relative_to(original)
        if not ours.is_file() or ours.read_bytes() != file.read_bytes():
            raise PareError(f"{ours} differs from the original's")
    _transformers(model)
    warnings = [told] if (told := warning(model)) else []
    if too_large := not_resident(original, memory_cap):
        return [*warnings, f"no text was generated: {too_large}"]
    ours, theirs = (_text(path) for path in (model, original))
    if not ours.strip() and theirs.strip():
        warnings.append("generates nothing, the original does")
    if repeats(ours) and not repeats(theirs):
        warnings.append(f"repeats itself, the original does not: {ours[:80]!r}")
    return warnings


def _text(path: Path) -> str:
    return lm.generate(lm.load_stock(path), lm.tokenizer(path), PROMPT, TOKENS)


def _transformers(model: Path) -> None:
    """Its config and its tokenizer. Of what only mlx-lm has a class for (arch/uneven.py), the tokenizer alone."""
    from transformers import AutoConfig, AutoTokenizer

    with plain(model) as name:
        try:
            if Checkpoint(model).config.get("model_type") not in RESULT_TYPES:
                AutoConfig.from_pretrained(name)
            AutoTokenizer.from_pretrained(name)
        except Exception as error:  # transformers raises whatever it likes
            raise PareError(f"transformers cannot open {model}: {error}") from error


def repeats(text: str) -> bool:
    """Whether the second half of a text is one short phrase over and over."""
    tail = text[len(text) // 2 :]
    return len(tail) >= 24 and any(tail == (tail[:n] * len(tail))[: len(tail)] for n in range(1, len(tail) // 3 + 1))
