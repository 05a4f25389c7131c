"""How far off the fit planner is: its bytes and speeds against what others measured (benchmarks/measured).

    python benchmarks/fit_accuracy.py

Prints every case, and fits the two constants of decoding on one half of the models of an M4 Pro to judge them on the
other half. tests/capacity/test_fit_truth.py holds the bounds.
"""

from __future__ import annotations

import csv
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import mean

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from mlx_pare.capacity import macs, planner, speed
from mlx_pare.capacity.form import Form
from mlx_pare.capacity.memory import Needs, Use
from mlx_pare.capacity.subject import open_subject
from mlx_pare.tensors.packing import Packing

MEASURED = Path(__file__).with_name("measured")
GIB = 2**30


@dataclass(frozen=True)
class Cell:
    """One measurement and what the planner says instead."""

    name: str
    measured: float
    predicted: float
    allowed: float = float("inf")  # absolute

    @property
    def off(self) -> float:
        """Relative error, with its sign."""
        return self.predicted / self.measured - 1


def rows(name: str) -> list[dict[str, str]]:
    """A table of benchmarks/measured."""
    with (MEASURED / name).open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def model(name: str, use: Use, form: Form) -> tuple[Needs, planner.Weights]:
    """A model of the catalogue in one form, and what it needs in one use."""
    subject = open_subject(name, form)
    return Needs(subject.arch, use), subject.weights


def some_mac(chip: str, cores: str) -> macs.Mac:
    """The largest Mac with this chip: speeds do not depend on its memory."""
    return [m for m in macs.every() if m.chip == chip and m.gpu_cores == int(cores)][-1]


# ---- memory ----


def memory_cells() -> Iterator[Cell]:
    """Peaks while a prompt is read, in GB."""
    for row in rows("memory.csv"):
        form = Form(floats=2) if row["form"] == "bf16" else Form(Packing(*map(int, row["form"].split("/"))))
        use = Use(**{key: int(value) for key, value in (part.split("=") for part in row["use"].split())})
        needs, weights = model(row["model"], use, form)
        if row["weights_gb"]:
            weights = replace(weights, nbytes=round(float(row["weights_gb"]) * 1e9))
        predicted = planner.assess(needs, weights, macs.find(row["mac"]))["total_bytes"] / 1e9
        measured, allowed = float(row["measured_gb"]), row["allowed"]
        bound = float(allowed[:-1]) / 100 * measured if allowed.endswith("%") else float(allowed)
        yield Cell(f"{row['case']:>2} {row['model']} {row['form']} {row['use']}", measured, predicted, bound)


# ---- speed ----


def m4_pro_cells(runtime: str, kind: str = "dense") -> list[tuple[Cell, float, float]]:
    """Decoding on an M4 Pro: (cell, bytes, layers), smallest model first."""
    found, mac = [], macs.find("m4-pro-20c-24gb")
    column, form = ("mlx_decode", Form(Packing(4, 64))) if runtime == "mlx" else ("gguf_decode", Form(gguf="q4_k_m"))
    for row in (r for r in rows("m4_pro_24gb.csv") if r["kind"] == kind):
        needs, weights = model(row["model"], Use(300, runtime=runtime), form)
        predicted = speed.decode(needs, weights.read_bytes, mac, weights.k_quants)
        moved, layers = speed.work(needs)
        found.append((Cell(row["model"], float(row[column]), predicted), weights.read_bytes + moved, layers))
    return sorted(found, key=lambda entry: entry[1])


def solve(entries: Sequence[tuple[Cell, float, float]], bandwidth: float) -> tuple[float, float]:
    """(share of the bandwidth, seconds per layer) that explain measured speeds best: least squares of relative errors.

    1 / tokens per second = bytes / (share * bandwidth) + layers * seconds is linear in 1 / share and in the seconds.
    """
    a = [(nbytes * cell.measured / bandwidth, layers * cell.measured) for cell, nbytes, layers in entries]
    xx, xy, yy = (sum(p[i] * p[j] for p in a) for i, j in ((0, 0), (0, 1), (1, 1)))
    x, y = sum(p[0] for p in a), sum(p[1] for p in a)
    determinant = xx * yy - xy * xy
    inverse, seconds = (x * yy - y * xy) / determinant, (y * xx - x * xy) / determinant
    return 1 / inverse, seconds


def judged(runtime: str) -> tuple[float, float, list[Cell]]:
    """Constants fitted on every second model of the M4 Pro, and the other models judged by them."""
    entries = m4_pro_cells(runtime)
    bandwidth = macs.find("m4-pro-20c-24gb").bandwidth_gb_s * 1e9
    share, seconds = solve(entries[::2], bandwidth)
    cells = [
        Cell(cell.name, cell.measured, 1 / (nbytes / (share * bandwidth) + layers * seconds))
        for cell, nbytes, layers in entries[1::2]
    ]
    return share, seconds, cells


def llama2_cells() -> Iterator[Cell]:
    """LLaMA-2 7B on every chip, llama.cpp: 128 tokens written, so that 64 are cached on the average, and 512 read."""
    for row in rows("llama2_7b.csv"):
        mac = some_mac(row["chip"], row["gpu_cores"])
        for kind in ("f16", "q8_0", "q4_0"):
            yield from _both(f"{mac.chip} {mac.gpu_cores}c {kind}", "llama-2-7b", kind, mac, row, kind + "_", 64, 512)


def llama3_cells() -> Iterator[Cell]:
    """Llama 3 on four Macs, at four lengths, llama.cpp. What is written is cached: half of it on the average."""
    for row in rows("llama3.csv"):
        mac, tokens = some_mac(row["chip"], row["gpu_cores"]), int(row["tokens"])
        name = f"{mac.chip} {row['model']} {row['kind']} {tokens}"
        yield from _both(name, row["model"], row["kind"], mac, row, "", tokens // 2, tokens)


def _both(
    name: str, which: str, kind: str, mac: macs.Mac, row: dict[str, str], prefix: str, writing: int, reading: int
) -> Iterator[Cell]:
    for what, context in (("decode", writing), ("prefill", reading)):
        if row[prefix + what]:
            needs, weights = model(which, Use(context, runtime="llama.cpp", flash=False), Form(gguf=kind))
            found = planner.speeds(needs, weights, mac)
            yield Cell(f"{name} {what}", float(row[prefix + what]), found[f"{what}_tokens_per_s"])


# ---- printing ----


def show(title: str, cells: Sequence[Cell]) -> None:
    """A table, and its mean and worst error."""
    print(f"\n{title}")
    for cell in cells:
        late = "" if abs(cell.predicted - cell.measured) <= cell.allowed else "   OUT OF BOUNDS"
        print(f"  {cell.name:<58} measured {cell.measured:9.3f}  planner {cell.predicted:9.3f}  {cell.off:+7.1%}{late}")
    worst = max(cells, key=lambda cell: abs(cell.off))
    print(f"  mean {mean(abs(c.off) for c in cells):.1%}, worst {worst.off:+.1%} ({worst.name})")


def main() -> None:
    """Everything."""
    show("peak of memory while a prompt is read, GB", list(memory_cells()))
    for runtime in ("mlx", "llama.cpp"):
        share, seconds, cells = judged(runtime)
        fitted = f"share {share:.3f}, {1e6 * seconds:.0f} us per layer fitted on the other half"
        show(f"M4 Pro, {runtime}: one half of the dense models, {fitted}", cells)
        show(f"M4 Pro, {runtime}: all dense models, as shipped", [c for c, *_ in m4_pro_cells(runtime)])
        show(f"M4 Pro, {runtime}: hybrids and experts, as shipped", [c for c, *_ in m4_pro_cells(runtime, "other")])
    llama2, llama3 = list(llama2_cells()), list(llama3_cells())
    for what in ("decode", "prefill"):
        show(f"LLaMA-2 7B, llama.cpp, {what} tokens/s", [c for c in llama2 if c.name.endswith(what)])
        show(f"Llama 3, llama.cpp, {what} tokens/s", [c for c in llama3 if c.name.endswith(what)])


if __name__ == "__main__":
    main()
