"""Texts from a seed: all that tests of reading and dividing need."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

WORDS = ("lake", "stone", "river", "bright", "window", "morning", "carry", "table", "under", "winter", "garden",
         "quiet", "letter", "bread", "silver", "north")  # fmt: skip


def paragraphs(count: int, words: int = 40, seed: int = 0) -> list[str]:
    """Different paragraphs of one sentence each."""
    lot = random.Random(seed)
    return [" ".join(lot.choice(WORDS) for _ in range(words)).capitalize() + f" {seed} {n}." for n in range(count)]


def chats(count: int, words: int = 20, seed: int = 3, first: Sequence[dict] = ()) -> list[dict]:
    """Records of two messages each, after those of ``first``."""
    said = paragraphs(2 * count, words, seed)
    return [
        {"messages": [*first, {"role": "user", "content": asked}, {"role": "assistant", "content": answered}]}
        for asked, answered in zip(said[::2], said[1::2], strict=True)
    ]


def jsonl(file: Path, records: Sequence[Any]) -> Path:
    """Write records, one a line."""
    file.write_text("\n".join(json.dumps(record, ensure_ascii=False) for record in records), "utf-8")
    return file
