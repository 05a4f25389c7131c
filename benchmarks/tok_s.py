"""tok/s of an original and of cuts of it with equal bytes, one narrower and one shallower, through stock mlx-lm.

    python benchmarks/tok_s.py [--model DIR] [--keep 0.75] [--trials 5] [--prompt 64] [--new 32]

All models take turns in one process; what counts is the ratio to the original, pair by pair (median and spread).
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import numpy as np

from mlx_pare import corpus
from mlx_pare.bench import bench
from mlx_pare.calibrate import calibrate
from mlx_pare.checkpoint import Checkpoint
from mlx_pare.plan import Options, plan
from mlx_pare.prune import prune
from mlx_pare.score import score

DEMO = Path(corpus.__file__).parent / "demo" / "model"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=DEMO)
    parser.add_argument("--keep", type=float, default=0.75)
    parser.add_argument("--trials", type=int, default=5)
    parser.add_argument("--prompt", type=int, default=64)
    parser.add_argument("--new", type=int, default=32)
    asked = parser.parse_args()
    vocab = Checkpoint(asked.model).arch.sizes["vocab"]
    rows = corpus.Rows.full(
        np.random.RandomState(0).randint(0, vocab, (4, 64))
    )  # speed does not depend on what is kept
    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        stats = calibrate(asked.model, rows, work / "stats")
        scores = score(asked.model, stats, work / "scores.safetensors", "minitron")
        models = [asked.model]
        for axes in (("ffn", "kv_head"), ("layer",)):
            made = plan(asked.model, scores, Options(keep=asked.keep, axes=axes))
            models.append(work / "-".join(axes))
            prune(asked.model, made, models[-1])
        found = bench(models, asked.trials, asked.prompt, asked.new)
    print(f"{found['trials']} trials, prompt {found['prompt_tokens']}, new {found['new_tokens']}; {found['backend']}\n")
    print("| model | prefill tok/s | ratio | decode tok/s | ratio | peak memory ratio |\n|---|---|---|---|---|---|")
    for row in found["models"]:
        cells = [Path(row["model"]).name]
        for number in ("prefill_tokens_per_s", "decode_tokens_per_s"):
            cells += [spread(row[number], 1), spread(row["ratio"][number], 2)]
        print("| " + " | ".join([*cells, spread(row["ratio"]["peak_bytes"], 2)]) + " |")


def spread(value: dict, digits: int) -> str:
    return f"{value['median']:.{digits}f} ({value['min']:.{digits}f} to {value['max']:.{digits}f})"


if __name__ == "__main__":
    main()
