"""tok/s of the shipped model and of cuts of it with equal bytes, one shallower and one narrower, through stock mlx-lm
and, where llama-cpp-python is installed, through llama.cpp (GGUF q8_0).

    python benchmarks/tok_s.py [--rounds 5] [--work DIR]

All models take turns in one process; what counts is the ratio to the original, pair by pair (median and spread).
"""

from __future__ import annotations

import importlib.util
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import synthetic
import timing

from mlx_pare.base.units import gb
from mlx_pare.evaluation.bench import bench
from mlx_pare.exporting.export import export
from mlx_pare.model.checkpoint import Checkpoint
from mlx_pare.planning.goal import Options
from mlx_pare.planning.plan import plan
from mlx_pare.pruning.prune import prune
from mlx_pare.scoring.calibrate import calibrate
from mlx_pare.scoring.score import score
from mlx_pare.text import corpus

NUMBERS = ("prefill_tokens_per_s", "decode_tokens_per_s")


def cuts(model: Path, keep: float, work: Path) -> dict[str, Path]:
    """The original, without some of its layers, and narrower to the same bytes. Speed does not ask what was kept."""
    draw = np.random.default_rng(0).integers(0, Checkpoint(model).arch.sizes["vocab"], (4, 64))
    stats = calibrate(model, corpus.Rows.full(draw), work / "stats")
    scores = score(model, stats, work / "scores.safetensors", "minitron")
    depth = plan(model, scores, Options(keep=keep, axes=("layer",)))
    width = plan(model, scores, Options(size=depth.after.bytes, axes=("ffn", "kv_head")))
    for name, made in (("depth", depth), ("width", width)):
        prune(model, made, work / name)
    return {"original": model, "depth cut": work / "depth", "width cut": work / "width"}


def llama_turn(gguf: Path, prompt: int, new: int) -> dict[str, float]:
    """One trial of llama.cpp on the CPU, one thread: tokens/s of a prompt read at once, and of tokens one by one."""
    from llama_cpp import Llama

    model = Llama(str(gguf), n_ctx=prompt + new + 8, n_batch=prompt, n_threads=1, n_threads_batch=1, verbose=False)
    tokens = np.random.default_rng(0).integers(5, model.n_vocab(), prompt + new).tolist()
    model.eval(tokens[:8])  # weights are read before the clock starts
    model.reset()
    start = time.perf_counter()
    model.eval(tokens[:prompt])
    middle = time.perf_counter()
    for token in tokens[prompt:]:
        model.eval([token])
    end = time.perf_counter()
    model.close()
    return {NUMBERS[0]: prompt / (middle - start), NUMBERS[1]: new / (end - middle)}


def through_llama_cpp(models: Sequence[Path], rounds: int, prompt: int, new: int, work: Path) -> list[dict]:
    """As bench.bench does it: for every model its speeds and their ratios to the first one's, after a round in vain."""
    files = [work / f"{number}.gguf" for number in range(len(models))]
    for model, file in zip(models, files, strict=True):
        export(model, file, "q8_0")
    trials = [[llama_turn(file, prompt, new) for file in files] for _ in range(rounds + 1)][1:]
    return [
        {n: [t[i][n] for t in trials] for n in NUMBERS}
        | {"ratio": {n: [t[i][n] / t[0][n] for t in trials] for n in NUMBERS}}
        for i in range(len(models))
    ]


def through_mlx(models: Sequence[Path], rounds: int, prompt: int, new: int) -> list[dict]:
    """bench.bench, whose spreads are lists of three here: their median, least and greatest are what they are."""
    return [
        {n: list(row[n].values()) for n in NUMBERS} | {"ratio": {n: list(row["ratio"][n].values()) for n in NUMBERS}}
        for row in bench(models, rounds, prompt, new)["models"]
    ]


def lines(work: Path, rounds: int, prompt: int = 64, new: int = 32) -> list[str]:
    """The table: speeds and their ratios to the original's."""
    models = cuts(synthetic.DEMO, 0.75, work)
    table = [
        "| through | model | bytes | prefill tok/s | ratio | decode tok/s | ratio |",
        "|---|---|---|---|---|---|---|",
    ]
    runs = {"mlx-lm": through_mlx(list(models.values()), rounds, prompt, new)}
    if importlib.util.find_spec("llama_cpp"):
        runs["llama.cpp"] = through_llama_cpp(list(models.values()), rounds, prompt, new, work)
    for runtime, found in runs.items():
        for (name, path), row in zip(models.items(), found, strict=True):
            cells = [cell for n in NUMBERS for cell in (timing.spread(row[n], 1), timing.spread(row["ratio"][n]))]
            size = gb(Checkpoint(path).nbytes())
            table.append(f"| {runtime} | {name} | {size} | " + " | ".join(cells) + " |")
    return table


if __name__ == "__main__":
    timing.script(__doc__, lines)
