"""What recovery brings: one choice at a time, the best recipe against recovered pruners, packed students, speed.

    python benchmarks/recovery.py --reference DIR     the reference models; cuts are shared with quality.py --work
    python benchmarks/recovery.py                     the shipped model on our own texts

Tables: factors (100 steps of 8 x 256 tokens, one thing changed at a time), best (300 steps of the best recipe),
packed (LoRA on a student of 4 bits: targets of 64 tokens on disk, and what others make of them, against the whole
vocabulary), speed (a step of distillation beside mlx-lm's own LoRA step, in turn; the pass for the targets beside a
plain one). What is done lies in --work and is not done again.
"""

from __future__ import annotations

import argparse
import csv
import json
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import top_k_losses
from criteria import DEMO, show
from quality import HERE, WINDOW, Bench, Subject, _ids, _rows, subjects

from mlx_pare import lm
from mlx_pare.base import console
from mlx_pare.evaluation import divergence
from mlx_pare.evaluation.evaluate import evaluate
from mlx_pare.recovery import topk_targets
from mlx_pare.recovery.objective import Objective, loss_of
from mlx_pare.recovery.options import Options
from mlx_pare.recovery.recover import recover
from mlx_pare.recovery.student import prepare, resident
from mlx_pare.recovery.teacher import Whole
from mlx_pare.stream import walk as stream
from mlx_pare.text import corpus
from mlx_pare.text.corpus import Rows

BATCH, HELD = 8, 48  # rows: of a step; that choose the best state
BASE = {"method": "full", "steps": 100, "batch": BATCH, "reports": 5}
FACTORS = {
    "all weights, forward KL, whole vocabulary": {},
    "reverse KL": {"kind": "reverse"},
    "Jensen-Shannon": {"kind": "js"},
    "forward KL at temperature 2": {"temperature": 2.0},
    "half forward KL, half cross-entropy": {"cross_entropy": 0.5},
    "cross-entropy alone": {"cross_entropy": 1.0},
    "LoRA of rank 16": {"method": "lora"},
    "DoRA of rank 16": {"method": "dora"},
    "norms alone": {"method": "norms"},
    "hidden states, cosine": {"match": "cosine"},
    "hidden states, mse": {"match": "mse"},
    "block by block before, 100 steps each": {"local_steps": 100},
    "block by block alone, 100 steps each": {"local_steps": 100, "steps": 0},
    "64 tokens from disk": {"top": 64},
    "16 tokens from disk": {"top": 16},
    "half of the rows its own": {"on_policy": 0.5},
}
BEST = {"method": "full", "steps": 300, "batch": BATCH, "reports": 6}


@dataclass(frozen=True)
class Lesson:
    """What a subject's students learn from: rows to train on, and to choose the best state by."""

    train: Rows
    held: Rows


def lesson(subject: Subject, reference: Path | None, rows: int) -> Lesson:
    """Rows apart from those that plans are selected and results tested on: stories that the model wrote (the same as
    the recovered pruners had), novels, or our own text."""
    if reference is None:
        tokenizer = lm.tokenizer(DEMO / "model")
        own = corpus.windows(tokenizer, corpus.read(DEMO / "calibration.txt"), WINDOW, None)
        return Lesson(subject.calibration, own.first(own.count // 6))
    if subject.name == "stories260K":
        tokens = np.fromfile(subject.model / "kd.bin", np.uint16).reshape(-1, WINDOW)[subject.selection.count :]
    else:
        novels = sorted((reference / "data" / "novels").glob("*.txt"))
        seen = [f.read_text("utf-8") for f in novels if f.stem != "two_cities"]
        ids = _ids(lm.tokenizer(subject.model), seen)
        tokens = ids[: len(ids) // WINDOW * WINDOW].reshape(-1, WINDOW)
        tokens = tokens[np.random.RandomState(2).permutation(len(tokens))]
    return Lesson(_rows(tokens[HELD : HELD + rows]), _rows(tokens[:HELD]))


class Clinic:
    """Recoveries of one subject's cuts, each with its own directory; results are kept as JSON."""

    def __init__(self, bench: Bench, reference: Path | None):
        self.bench, self.subject, self.reference = bench, bench.subject, reference

    def cut(self, level: int, **asked) -> Path:
        """The pruned model: widths of its own."""
        name = f"per-layer-{level}" if not asked else f"packed-{level}"
        self.bench.prepare()
        widths = "per-layer" if not asked else "uniform"
        self.bench.cut(name, self.bench.settings(keep=1 - level / 100, widths=widths, **asked))
        return self.bench.work / f"{self.subject.name}-{name}" / "prune" / "model"

    def heal(self, name: str, student: Path, options: Options) -> dict:
        """Recover and measure; the same was done before: read."""
        note = self.bench.work / f"{self.subject.name}-healed-{name}.json"
        asked = asdict(options)
        if note.exists() and (found := json.loads(note.read_text()))["asked"] == asked:
            return found
        out, learnt = note.with_suffix(""), lesson(self.subject, self.reference, options.batch * max(options.steps, 50))
        shutil.rmtree(out, ignore_errors=True)
        begun = time.perf_counter()
        done = recover(student, self.subject.model, learnt.train, learnt.held, out, options)
        found = {
            "asked": asked,
            "seconds": time.perf_counter() - begun,
            "kept": done["kept"],
            "kl": done["kl_unmerged"],
        }
        found |= {"before": self.measure(student), "after": self.measure(out)}
        shutil.rmtree(out)
        note.write_text(json.dumps(found, indent=1))
        return found

    def measure(self, model: Path) -> tuple[float, float]:
        """Perplexity and KL divergence to the original, on the test rows."""
        found = evaluate(model, self.subject.test, teacher=self.subject.model)
        return found.perplexity, found.kl_divergence


def factors(clinic: Clinic, level: int, chosen: Sequence[str] | None = None) -> Iterator[str]:
    """A line per choice: all, or those in whose names one of these words stands."""
    student, name = clinic.cut(level), clinic.subject.name
    (perplexity, kl) = clinic.measure(student)
    amount = f"{BASE['steps']} steps of {BATCH} x {WINDOW}"
    yield f"\n{name}, {level} % removed, perplexity {perplexity:.3f}, KL {kl:.4f}; {amount}\n"
    yield "| changed | perplexity | KL | seconds |"
    yield "|---|---|---|---|"
    for what, change in FACTORS.items():
        if chosen and not any(word in what for word in chosen):
            continue
        found = clinic.heal(
            f"{level}-{what.replace(' ', '-').replace(',', '')}", student, Options(**{**BASE, **change})
        )
        yield f"| {what} | {found['after'][0]:.3f} | {found['after'][1]:.4f} | {found['seconds']:.0f} |"


def best(clinic: Clinic, levels: Sequence[int], before: Sequence[int]) -> Iterator[str]:
    """A line per size and number of steps that every block is healed by itself before: none, as others had, or some."""
    name = clinic.subject.name
    with (HERE / "measured" / "recovered.csv").open() as file:
        others = [row for row in csv.DictReader(file) if row["model"] == name]
    yield f"\n{name}: {BEST['steps']} steps of {BATCH} x {WINDOW}, all weights\n"
    yield "| removed | perplexity before | after | KL before | after | best recovered pruner | seconds |"
    yield "|---|---|---|---|---|---|---|"
    for level in levels:
        rivals = [(float(r["perplexity"]), r["pruner"]) for r in others if int(r["removed"]) == level]
        rival = "{:.2f} {}".format(*min(rivals)) if rivals else "-"
        for steps in before:
            what = f", {steps} steps block by block before" if steps else ""
            found = clinic.heal(f"{level}-best{steps or ''}", clinic.cut(level), Options(**BEST, local_steps=steps))
            (p0, k0), (p1, k1) = found["before"], found["after"]
            cells = f"{p0:.3f} | {p1:.3f} | {k0:.4f} | {k1:.4f} | {rival} | {found['seconds']:.0f}"
            yield f"| {level} %{what} | {cells} |"


def packed(clinic: Clinic, level: int) -> Iterator[str]:
    """LoRA on a student of 4 bits: what the targets are made of."""
    student, name = clinic.cut(level, bits=4, group_size=32), clinic.subject.name
    options = Options(**{**BASE, "method": "lora"})
    yield f"\n{name}, {level} % removed and 4 bits: LoRA, {options.steps} steps of {BATCH} x {WINDOW}\n"
    yield "| targets | KL before merging | against the whole vocabulary | perplexity | KL packed |"
    yield "|---|---|---|---|---|"
    ours, reference = divergence.between_top, None
    ways: dict[str, tuple[int | None, Callable]] = {"whole vocabulary": (None, ours), "64 and the rest": (64, ours)}
    ways |= {f"64, {what}": (64, _without_kind(loss)) for what, loss in top_k_losses.LOSSES.items()}
    for what, (top, loss) in ways.items():
        divergence.between_top = loss
        try:
            found = clinic.heal(f"{level}-packed-{what.replace(' ', '-')}", student, replace(options, top=top))
        finally:
            divergence.between_top = ours
        kl, reference = found["kl"], reference or found["kl"]
        yield f"| {what} | {kl:.5f} | {kl / reference - 1:+.1%} | {found['after'][0]:.3f} | {found['after'][1]:.4f} |"


def _without_kind(loss: Callable) -> Callable:
    """A loss of top_k_losses in the place of divergence.between_top."""
    return lambda kind, *given: loss(*given)


# ---- speed ----


def speed(clinic: Clinic, rounds: int = 7, steps: int = 4) -> Iterator[str]:
    """Ratios of what was timed in turn in this run."""
    subject = clinic.subject
    learnt = lesson(subject, clinic.reference, BATCH * steps)
    options = Options(batch=BATCH)
    seen = stream.walk(subject.model, learnt.train)
    with tempfile.TemporaryDirectory() as scratch:
        stored = topk_targets.collect(subject.model, learnt.train, Path(scratch), 64)
        ways = {
            "mlx-lm's LoRA step, cross-entropy": (Objective(cross_entropy=1.0), None),
            "distillation, whole vocabulary": (Objective(), Whole(seen)),
            "distillation, 64 tokens from disk": (Objective(), stored),
        }
        rates: dict[str, list[float]] = {what: [] for what in ways}
        for _ in range(rounds):
            for what, (objective, guide) in ways.items():
                rates[what].append(_rate(subject.model, learnt.train, objective, guide, options, steps))
    plain, *others = ways
    amount = f"{BATCH} x {WINDOW} tokens, {rounds} rounds in turn, median (range)"
    yield f"\n{subject.name}: speed relative to {plain}, {amount}\n"
    for what in others:
        yield _line(what, [a / b for a, b in zip(rates[what], rates[plain], strict=True)])
    passes = [_pass(subject.model, learnt.train) for _ in range(rounds)]
    yield _line("pass that writes 64 targets a token, relative to one that measures perplexity", passes)


def _line(what: str, ratios: Sequence[float]) -> str:
    return f"- {what}: {statistics.median(ratios):.3f} ({min(ratios):.3f} to {max(ratios):.3f})"


def _rate(model: Path, rows: Rows, objective: Objective, guide, options: Options, steps: int) -> float:
    """Tokens per second of LoRA steps, the making of the targets included; the first step does not count."""
    import mlx.core as mx

    from mlx_pare.recovery.trainer import ClippedAdamW

    student = resident(model, "lora")
    prepare(student, "lora", options.rank, options.scale)
    clock: list[float] = []

    def batches() -> Iterator[tuple]:
        for start in range(0, rows.count, BATCH):
            chosen = np.arange(start, start + BATCH)
            clock.append(time.perf_counter())
            found = (mx.array(rows.tokens[chosen]), *map(mx.array, guide.batch(chosen) if guide else [mx.zeros((1,))]))
            mx.eval(found)
            yield found

    optimizer = ClippedAdamW(1e-5, 1.0)
    lm.train(student, optimizer, loss_of(objective, "none", None), batches, steps, 1, steps, lambda info: None)
    return (steps - 1) * BATCH * rows.length / (time.perf_counter() - clock[1])


def _pass(model: Path, rows: Rows) -> float:
    with tempfile.TemporaryDirectory() as scratch:
        begun = time.perf_counter()
        divergence.measure(rows, stream.walk(model, rows))
        plain, begun = time.perf_counter() - begun, time.perf_counter()
        topk_targets.collect(model, rows, Path(scratch), 64)
        return plain / (time.perf_counter() - begun)


def main() -> None:
    """Print the tables, and write them to files."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--reference", type=Path, help="directory with models/stories260K, models/novelist-9m, data/novels"
    )
    tables = ("factors", "best", "packed", "speed")
    parser.add_argument("--only", nargs="+", choices=tables, default=tables)
    parser.add_argument("--subjects", nargs="+", help="of the reference models only these")
    parser.add_argument("--factors", nargs="+", help="only those with one of these words in their name")
    parser.add_argument("--before", type=int, nargs="+", default=[0, 100], help="best: steps of every block before")
    parser.add_argument("--levels", type=int, nargs="+", default=[25, 50], help="percent removed")
    parser.add_argument("--try", dest="tries", type=int, default=50, help="candidates with widths of their own")
    parser.add_argument("--work", type=Path, help="where to work; kept (default: a temporary directory)")
    parser.add_argument("--out", type=Path, default=HERE / "results")
    asked = parser.parse_args()
    console.configure(quiet=True)
    with tempfile.TemporaryDirectory() as temporary:
        work = asked.work or Path(temporary)
        work.mkdir(parents=True, exist_ok=True)
        for subject in subjects(asked.reference):
            if asked.subjects and subject.name not in asked.subjects:
                continue
            clinic = Clinic(Bench(subject, work, asked.tries), asked.reference)
            made = {
                "factors": lambda c: factors(c, asked.levels[0], asked.factors),
                "best": lambda c: best(c, asked.levels, asked.before),
                "packed": lambda c: packed(c, asked.levels[0]),
                "speed": speed,
            }
            for table in asked.only:
                lines = []
                for line in made[table](clinic):
                    show(line)
                    lines.append(line)
                asked.out.mkdir(exist_ok=True)
                (asked.out / f"recovery-{table}-{subject.name}.md").write_text("\n".join(lines).strip() + "\n")


if __name__ == "__main__":
    main()
