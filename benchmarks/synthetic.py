"""What the speed benchmarks measure on: some blocks of Qwen3-8B's shapes, random weights and a small vocabulary."""

from __future__ import annotations

import sys
from pathlib import Path

from mlx_pare.tensors.packing import Packing

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "scripts"))
from make_synthetic import DEMO, config_of, make

PACKING = Packing(4, 64)
VOCABULARY = 4096  # of the tokenizer that comes along; Qwen3 has 151,936
__all__ = ["DEMO", "PACKING", "VOCABULARY", "checkpoint"]


def checkpoint(directory: Path, blocks: int, packed: bool) -> Path:
    """A model of so many blocks, bfloat16 or 4 bits in groups of 64, written where it is not yet; its directory."""
    if not directory.exists():
        make(config_of("qwen3-8b", blocks) | {"vocab_size": VOCABULARY}, directory, PACKING if packed else None, 0)
    return directory
