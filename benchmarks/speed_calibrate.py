"""Calibration (what minitron, wanda, flap, ... need) against a plain streamed forward over the same rows, in turn.

    python benchmarks/speed_calibrate.py [--rounds 5] [--work DIR]

One block of Qwen3-8B's shapes, 2 rows of 512 tokens: a micro-batch. Same backend and engine, the head not applied.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import synthetic
import timing

from mlx_pare.model.checkpoint import Checkpoint
from mlx_pare.scoring.calibrate import calibrate
from mlx_pare.stream import walk as stream
from mlx_pare.text import corpus


def lines(work: Path, rounds: int) -> list[str]:
    """The table: seconds of calibration and of the forward, their ratio, bytes read for those needed."""
    model = synthetic.checkpoint(work / "4bit-1", 1, True)
    draw = np.random.default_rng(0).integers(0, synthetic.VOCABULARY, (2, 512))
    rows = corpus.Rows.full(draw)
    steps = {"calibrate": lambda out: calibrate(model, rows, out), "forward": lambda out: stream.walk(model, rows)}
    found = timing.in_turn(steps, {}, rounds, work)
    return [
        "| block of | calibrate s | forward s | calibrate / forward | ... in processor time | read / needed |",
        "|---|---|---|---|---|---|",
        f"| 4 bits | {timing.seconds(found['calibrate'])} | {timing.seconds(found['forward'])} "
        f"| {timing.spread(timing.ratios(found['calibrate'], found['forward']))} "
        f"| {timing.spread(timing.ratios(found['calibrate'], found['forward'], 'processor'))} "
        f"| {timing.share(found['calibrate'], _blocks_and_norm(model))} |",
    ]


def _blocks_and_norm(model: Path) -> int:
    outside = ("lm_head", "model.embed_tokens")  # whose rows are looked up
    return sum(entry.nbytes for name, entry in Checkpoint(model).entries.items() if not name.startswith(outside))


if __name__ == "__main__":
    timing.script(__doc__, lines)
