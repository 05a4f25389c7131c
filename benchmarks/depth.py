"""Which whole layers to drop: block influence, angular distance and greedy KL, without and with reconstruction.

    python benchmarks/depth.py --model DIR --calibration TEXTS --test FILE [--windows N] [--counts 1 2] [--protect]
    python benchmarks/depth.py                         the shipped model on our own texts

Texts as in criteria.py. Calibration: 128 windows drawn with seed 0; KL is measured on 4096 further tokens of the same
text, none of which is calibrated on (of a .bin file, its last rows). All layers may go, unless --protect. Writes a
Markdown table, the KL divergence after each drop, and what choosing took beside the calibration pass.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path

from criteria import DEMO, rows_of, show

from mlx_pare import lm
from mlx_pare.base import console
from mlx_pare.evaluation.evaluate import evaluate
from mlx_pare.model.checkpoint import Checkpoint
from mlx_pare.planning import choose_units
from mlx_pare.planning.drop_layers import layers_by_kl
from mlx_pare.planning.goal import Options
from mlx_pare.planning.plan import plan
from mlx_pare.pruning.plan_file import Plan
from mlx_pare.pruning.prune import prune
from mlx_pare.pruning.reach import protected_layers
from mlx_pare.repair.reconstruct import reconstruct
from mlx_pare.scoring.calibrate import calibrate
from mlx_pare.scoring.score import score
from mlx_pare.store.arrays import Arrays
from mlx_pare.text import corpus
from mlx_pare.text.corpus import Rows

HELD_TOKENS = 4096
SCORED = ("block-influence", "angular")


def texts(asked: argparse.Namespace, tokenizer) -> tuple[Rows, Rows]:
    """Calibration rows, and rows apart from them."""
    count = HELD_TOKENS // asked.length
    if asked.calibration.suffix == ".bin":
        rows = rows_of(asked.calibration, tokenizer, asked.length, None, None)
        return rows.first(min(128, rows.count - count)), Rows.full(rows.tokens[-count:])
    parts = corpus.split(corpus.read(asked.calibration), {"calibration": 88, "held": 12})
    rows = [corpus.windows(tokenizer, parts[p], asked.length, n, 0) for p, n in (("calibration", 128), ("held", count))]
    return rows[0], rows[1]


def cells(asked: argparse.Namespace, plan: Plan, calibration: Rows, test: Rows, scratch: Path) -> list[str]:
    """Perplexity of a plan, without and with reconstruction."""
    found = []
    for repaired in (False, True):
        out = Path(tempfile.mkdtemp(dir=scratch)) / "cut"
        repair = out.with_name("repair") if repaired else None
        made = reconstruct(asked.model, plan, calibration, repair) if repaired else plan
        prune(asked.model, made, out, repair=repair)
        found.append(f"{evaluate(out, test).perplexity:.2f}")
    return found


def keeping(model: Path, scores: Path, layers: list[int]) -> Plan:
    """The plan that drops all other layers and cuts nothing else."""
    whole = plan(model, scores, Options(keep=1.0, axes=("ffn",)))
    return whole.model_copy(update={"layers": [layer for layer in whole.layers if layer.source in layers]})


def main() -> None:
    """One line per way to choose and number of layers."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=DEMO / "model")
    parser.add_argument("--calibration", type=Path, default=DEMO / "calibration.txt")
    parser.add_argument("--test", type=Path, default=DEMO / "test.txt")
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--windows", type=int, default=50)
    parser.add_argument("--counts", type=int, nargs="+", default=[1, 2], help="numbers of layers to drop")
    parser.add_argument("--protect", action="store_true", help="keep the first and the last layer")
    asked = parser.parse_args()
    console.configure(quiet=True)
    tokenizer, arch = lm.tokenizer(asked.model), Checkpoint(asked.model).arch
    test = rows_of(asked.test, tokenizer, asked.length, asked.windows, None)
    calibration, held = texts(asked, tokenizer)
    protected, total = (protected_layers(arch) if asked.protect else []), len(arch.layers)
    with tempfile.TemporaryDirectory() as name:
        scratch, start = Path(name), time.process_time()
        stats = calibrate(asked.model, calibration, scratch / "stats")
        passed = time.process_time() - start
        files = {by: score(asked.model, stats, scratch / f"{by}.safetensors", by) for by in SCORED}
        start = time.process_time()
        drops = layers_by_kl(asked.model, total - max(asked.counts), held, protected)
        spent = time.process_time() - start
        dense = evaluate(asked.model, test).perplexity
        show(f"{asked.model.name}, {test.count} windows of {test.length} tokens: perplexity {dense:.3f}\n")
        show("| layers chosen by | removed | perplexity | reconstructed |\n|---|---|---|---|")
        known: dict[tuple[int, ...], list[str]] = {}
        for count in asked.counts:
            for by in (*SCORED, "kl"):
                gone = [drop.layer for drop in drops[:count]]
                kept = [i for i in range(total) if i not in gone]
                if by != "kl":
                    arrays = Arrays.load(files[by], "scores").arrays
                    kept = choose_units.layers_of(arch, arrays, total - count, protected)
                    gone = sorted({*range(total)} - {*kept})
                if tuple(kept) not in known:
                    known[tuple(kept)] = cells(
                        asked, keeping(asked.model, files[SCORED[0]], kept), calibration, test, scratch
                    )
                show(f"| {by} | {', '.join(map(str, gone))} | " + " | ".join(known[tuple(kept)]) + " |")
        told = ", ".join(f"{drop.layer} ({drop.kl:.4f})" for drop in drops)
        show(f"\nby kl, one after the other, with the KL divergence on {held.total} held-out tokens: {told}")
        show(f"choosing by kl took {spent / passed:.1f} times the processor time of the calibration pass")


if __name__ == "__main__":
    main()
