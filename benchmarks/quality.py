"""What a cut costs before any training: with and without reconstruction, at several sizes, on a real model.

    python benchmarks/quality.py --model DIR --calibration TEXTS --test FILE [--windows N] [--keep 0.9 0.75 0.5]
    python benchmarks/quality.py                       the shipped model on our own texts

Texts as in criteria.py. Calibration: 128 windows drawn with seed 0. Cells: perplexity, and in brackets the excess
log-perplexity over the dense model. Writes a Markdown table, and the time of a pass through the blocks beside that of
selection and reconstruction.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from math import log
from pathlib import Path

from criteria import DEMO, rows_of, show

from mlx_pare import console, corpus, lm
from mlx_pare.calibrate import calibrate
from mlx_pare.evaluate import evaluate
from mlx_pare.plan import Options, plan
from mlx_pare.prune import prune
from mlx_pare.reconstruct import reconstruct
from mlx_pare.score import score

WAYS = (("obs", True), ("wanda", True), ("random", True), ("wanda", False))  # criterion, whether it is reconstructed
AXES = ("ffn", "kv_head")


def cut(model: Path, scores: Path, keep: float, repaired: bool, calibration: corpus.Rows, out: Path) -> float:
    """Write the cut model to ``out``; returns the seconds that reconstruction took."""
    made, repair, seconds = plan(model, scores, Options(keep=keep, axes=AXES)), None, 0.0
    if repaired:
        repair, start = out.with_suffix(".safetensors"), time.perf_counter()
        made = reconstruct(model, made, calibration, repair)
        seconds = time.perf_counter() - start
    prune(model, made, out, repair=repair)
    return seconds


def main() -> None:
    """One line per criterion, one column per size."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=DEMO / "model")
    parser.add_argument("--calibration", type=Path, default=DEMO / "calibration.txt")
    parser.add_argument("--test", type=Path, default=DEMO / "test.txt")
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--windows", type=int, default=50)
    parser.add_argument("--keep", type=float, nargs="+", default=[0.75, 0.5])
    asked = parser.parse_args()
    console.configure(quiet=True)
    tokenizer = lm.tokenizer(asked.model)
    test = rows_of(asked.test, tokenizer, asked.length, asked.windows, None)
    calibration = rows_of(asked.calibration, tokenizer, asked.length, 128, 0)
    with tempfile.TemporaryDirectory() as name:
        scratch, start = Path(name), time.perf_counter()
        stats = calibrate(asked.model, calibration, scratch / "stats")
        passed, spent = time.perf_counter() - start, []
        dense = evaluate(asked.model, test).perplexity
        show(f"{asked.model.name}, {test.count} windows of {test.length} tokens: perplexity {dense:.3f}\n")
        show("| units | reconstructed | " + " | ".join(f"keep {k:g}" for k in asked.keep) + " |")
        show("|---|---|" + "---|" * len(asked.keep))
        for criterion, repaired in WAYS:
            scores, cells = score(asked.model, stats, scratch / f"{criterion}.safetensors", criterion), []
            for keep in asked.keep:
                out = scratch / f"{criterion}-{repaired}-{keep}"
                seconds = cut(asked.model, scores, keep, repaired, calibration, out)
                if criterion == "obs":
                    spent.append(seconds / passed)
                found = evaluate(out, test).perplexity
                cells.append(f"{found:.2f} ({log(found / dense):.3f})")
            show(f"| {criterion} | {'yes' if repaired else 'no'} | " + " | ".join(cells) + " |")
        times = ", ".join(f"{ratio:.1f}" for ratio in spent)
        show(f"\nselection and reconstruction took {times} times as long as the calibration pass")


if __name__ == "__main__":
    main()
