"""Criterion x axis x cut on a real model: perplexity without any recovery, dense and random rows included.

    python benchmarks/criteria.py --model DIR --calibration TEXTS --test FILE [--windows N] [--keep 0.75 0.5]
                                  [--recover-steps N --train TEXTS]
    python benchmarks/criteria.py                     the shipped model on our own texts

Texts are .txt files or folders; a .bin file holds uint16 token ids in rows of --length. Calibration: 128 windows drawn
with seed 0. Writes a Markdown table to standard output.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import numpy as np

from mlx_pare import lm
from mlx_pare.base import console
from mlx_pare.base.errors import PareError
from mlx_pare.evaluation.evaluate import evaluate
from mlx_pare.model.checkpoint import Checkpoint
from mlx_pare.planning.goal import Options
from mlx_pare.planning.plan import plan
from mlx_pare.pruning.prune import prune
from mlx_pare.recovery.options import METHODS, Options as RecoverOptions
from mlx_pare.recovery.recover import recover
from mlx_pare.scoring.calibrate import calibrate
from mlx_pare.scoring.score import CRITERIA, score
from mlx_pare.text import corpus

DEMO = Path(corpus.__file__).parents[1] / "demo"
AXES = (("ffn",), ("kv_head",), ("ffn", "kv_head"), ("layer",), ("hidden",))


def rows_of(path: Path, tokenizer, length: int, count: int | None, seed: int | None) -> corpus.Rows:
    if path.suffix == ".bin":
        rows = np.fromfile(path, dtype=np.uint16).reshape(-1, length)
        return corpus.Rows.full(rows[:count])
    return corpus.windows(tokenizer, corpus.read(path), length, count, seed)


def cell(model: Path, scores: Path, axes: tuple[str, ...], keep: float, test: corpus.Rows, scratch: Path) -> str:
    """ "perplexity (share kept)" of one cut, or why there is none."""
    try:
        made = plan(model, scores, Options(keep=keep, axes=axes, protect=True))
    except PareError:
        return "-"
    out = scratch / "cut"
    prune(model, made, out)
    found = evaluate(out, test).perplexity
    for file in out.iterdir():
        file.unlink()
    out.rmdir()
    return f"{found:.2f} ({made.after.non_embedding / made.before.non_embedding:.3f})"


def recovered(asked: argparse.Namespace, stats: Path, tokenizer, test: corpus.Rows, scratch: Path) -> str:
    """The line of the distilled cut: perplexity before and after, validation KL before and after."""
    scores = score(asked.model, stats, scratch / "recover.safetensors", "wanda")
    cut, healed = scratch / "cut-to-heal", scratch / "healed"
    prune(asked.model, plan(asked.model, scores, Options(keep=asked.keep[0], axes=("ffn", "kv_head"))), cut)
    rows = rows_of(asked.train or asked.calibration, tokenizer, asked.length, 576, 1)
    train, held = corpus.Rows.full(rows.tokens[:-64]), corpus.Rows.full(rows.tokens[-64:])
    options = RecoverOptions(method=asked.method, steps=asked.recover_steps, batch=asked.batch)
    done = recover(cut, asked.model, train, held, healed, options)
    before, after = evaluate(cut, test, teacher=asked.model), evaluate(healed, test, teacher=asked.model)
    validation = f"{done['kl_before']:.4f} -> {done['kl_after']:.4f}"
    return (
        f"distilled (wanda, ffn+kv_head, keep {asked.keep[0]:g}; {asked.method}, {asked.recover_steps} steps of "
        f"{asked.batch} rows): perplexity {before.perplexity:.2f} -> {after.perplexity:.2f}, "
        f"KL {before.kl_divergence:.4f} -> {after.kl_divergence:.4f}; validation KL {validation}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=DEMO / "model")
    parser.add_argument("--calibration", type=Path, default=DEMO / "calibration.txt")
    parser.add_argument("--test", type=Path, default=DEMO / "test.txt")
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--windows", type=int, default=50)
    parser.add_argument("--keep", type=float, nargs="+", default=[0.75])
    parser.add_argument(
        "--recover-steps", type=int, default=0, help="also distil the wanda cut of ffn+kv_head this long"
    )
    parser.add_argument("--train", type=Path, help="text to distil on (default: the calibration text)")
    parser.add_argument("--method", choices=METHODS, default="lora")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument(
        "--criteria", nargs="*", default=["minitron", "magnitude", "wanda", "random"], choices=list(CRITERIA)
    )
    asked = parser.parse_args()
    console.configure(quiet=True)
    tokenizer = lm.tokenizer(asked.model)
    test = rows_of(asked.test, tokenizer, asked.length, asked.windows, None)
    calibration = rows_of(asked.calibration, tokenizer, asked.length, 128, 0)
    with tempfile.TemporaryDirectory() as name:
        scratch = Path(name)
        extra = {e for name in asked.criteria for e in CRITERIA[name].extra}
        stats = calibrate(asked.model, calibration, scratch / "stats", extra=sorted(extra))
        dense = evaluate(asked.model, test)
        kind = "quantized" if Checkpoint(asked.model).quantized else "dense"
        show(
            f"{asked.model.name} ({kind}), {test.count} windows of {test.length} tokens: perplexity "
            f"{dense.perplexity:.3f}"
        )
        show(f"calibrated on {calibration.count} rows; cells: perplexity (share of non-embedding parameters kept)\n")
        show("| criterion | axes | " + " | ".join(f"keep {k:g}" for k in asked.keep) + " |")
        show("|---|---|" + "---|" * len(asked.keep))
        for criterion in asked.criteria:
            scores = score(asked.model, stats, scratch / f"{criterion}.safetensors", criterion)
            for axes in AXES:
                cells = [cell(asked.model, scores, axes, keep, test, scratch) for keep in asked.keep]
                show(f"| {criterion} | {'+'.join(axes)} | " + " | ".join(cells) + " |")
        if asked.recover_steps:
            show("\n" + recovered(asked, stats, tokenizer, test, scratch))


def show(line: str) -> None:
    import sys

    print(line, file=sys.__stdout__, flush=True)


if __name__ == "__main__":
    main()
