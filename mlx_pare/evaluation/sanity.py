"""check: whether a model that we wrote works elsewhere: stock tools open it, and its text is compared."""

from __future__ import annotations

from pathlib import Path

from .. import lm
from ..arch import RESULT_TYPES
from ..base.errors import PareError
from ..base.optional import attempt
from ..base.plain_path import plain, warning
from ..base.untrusted import read_json
from ..lm.tokenizer_class import SETTINGS
from ..model.checkpoint import Checkpoint
from .resident import not_resident

PROMPT = "The"
TOKENS = 48


def check(model: Path, original: Path, memory_cap: int | None = None) -> list[str]:
    """Check a model directory that mlx-pare wrote.

    Both models write text, one after the other, if the original fits in memory.

    Args:
        model: the directory to check.
        original: the model directory that it was made from.
        memory_cap: bytes that one model may take; None: the memory that is free.
    Returns:
        Warnings; empty if all is well.
    Raises:
        PareError: stock mlx-lm or transformers cannot open it, or its tokenizer differs from the original's.
    """
    for file in Checkpoint(original).tokenizer_files():
        ours = model / file.relative_to(original)
        if not _same(ours, file):
            raise PareError(f"{ours} differs from the original's")
    warnings = [*([told] if (told := warning(model)) else []), *_transformers(model, original)]
    if too_large := not_resident(original, memory_cap, answers=True):
        return [*warnings, f"no text was generated: {too_large}"]
    lm.load(model)  # a model that stock mlx-lm cannot open is broken; the text of a sound one is only a hint
    texts, failed = attempt(lambda: [_text(path) for path in (model, original)])
    if texts is None:
        return [*warnings, f"no text was generated: {failed.problem}"]
    ours, theirs = texts
    if not ours.strip() and theirs.strip():
        warnings.append("generates nothing, the original does")
    if repeats(ours) and not repeats(theirs):
        warnings.append(f"repeats itself, the original does not: {ours[:80]!r}")
    return warnings


def _same(ours: Path, theirs: Path) -> bool:
    """Whether a tokenizer file is the original's. A cut may name another class in it (lm/tokenizer_class.py)."""
    if not ours.exists() or ours.name != SETTINGS:
        return ours.exists() and ours.read_bytes() == theirs.read_bytes()
    found, expected = (read_json(file, "tokenizer config") for file in (ours, theirs))
    return {**found, "tokenizer_class": None} == {**expected, "tokenizer_class": None}


def _text(path: Path) -> str:
    return lm.generate(lm.load_to_answer(path), lm.tokenizer(path), PROMPT, TOKENS)


def _transformers(model: Path, original: Path) -> list[str]:
    """A warning if transformers opens neither the model nor its original. Raises PareError if it opens the original."""
    _, failed = attempt(lambda: _open(model))
    if failed is None:
        return []
    if attempt(lambda: _open(original))[1] is None:
        raise PareError(f"transformers cannot open {model}: {failed.problem}")
    return [f"transformers can open neither the original nor the result: {failed.problem}"]


def _open(model: Path) -> None:
    """Open config and tokenizer with transformers, which has no class for layers that differ (arch/uneven.py)."""
    from transformers import AutoConfig, AutoTokenizer

    with plain(model) as name:
        if Checkpoint(model).config.get("model_type") not in RESULT_TYPES:
            AutoConfig.from_pretrained(name)
        AutoTokenizer.from_pretrained(name)


def repeats(text: str) -> bool:
    """Whether the second half of a text is one short phrase over and over."""
    tail = text[len(text) // 2 :]
    return len(tail) >= 24 and any(tail == (tail[:n] * len(tail))[: len(tail)] for n in range(1, len(tail) // 3 + 1))
