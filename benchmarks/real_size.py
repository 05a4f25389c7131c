"""A model of true size, cut under a cap of memory: minutes and peak memory of every step, each a process of its own.

    python benchmarks/real_size.py qwen2.5-32b --memory-cap 3GB --for m4-24gb --work DIR
    python benchmarks/real_size.py qwen3-8b --memory-cap 2GB --keep 0.75 --steps all --work DIR

Random weights (scripts/make_synthetic.py): memory and time are real, quality is not. The source needs 0.6 bytes of disk
for each parameter, the result a little less, a GGUF file of 8 bits 1.1. What lies in --work is not done again. The peak
is the resident size, with MLX's own beside it, which on a Mac lies outside of it. Exit code 1 when a step took more
than the cap.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from criteria import show

from mlx_pare.base.units import gb, parse_amount

ROOT = Path(__file__).resolve().parents[1]
TEXT = ROOT / "mlx_pare" / "demo" / "test.txt"
STEPS = ("calibrate", "score", "plan", "prune", "fit")
MORE = ("evaluate", "export")  # two more walks through both models; a file of 8 bits


def commands(asked: argparse.Namespace) -> dict[str, list[str]]:
    """The command line of every step."""
    source, run, cut = asked.work / "source", asked.work / "run", asked.work / "run" / "prune" / "model"
    cap = ["--memory-cap", asked.memory_cap]
    goal = ["--keep", str(asked.keep)] if asked.keep else ["--for", asked.mac, "--context", str(asked.context)]
    text = ["--data", TEXT, "--length", asked.length, "--samples", asked.samples]
    return {
        "calibrate": ["calibrate", source, "--out", run, "--samples", asked.samples, "--length", asked.length, *cap],
        "score": ["score", run],
        "plan": ["plan", run, *goal, "--widths", "even", *cap],
        "prune": ["prune", run, *cap],
        "fit": ["fit", cut, "--mac", asked.mac, "--context", asked.context],
        "evaluate": ["evaluate", cut, "--teacher", source, *text, *cap],
        "export": ["export", cut, "--gguf", "q8_0", "-o", asked.work / "model.gguf", "--no-verify"],
    }


def measure(command: list[str]) -> dict[str, float]:
    """Seconds and peak resident bytes of one call of mlx-pare. Raises SystemExit when it fails."""
    begun = time.perf_counter()
    process = subprocess.Popen([sys.executable, "-m", "mlx_pare", *map(str, command)], cwd=ROOT)
    _, status, usage = os.wait4(process.pid, 0)
    if code := os.waitstatus_to_exitcode(status):
        raise SystemExit(f"{' '.join(map(str, command))} ended with {code}")
    peak = usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return {"seconds": time.perf_counter() - begun, "peak_bytes": peak}


def table(asked: argparse.Namespace) -> Iterator[str]:
    """A line per step; the measurements are kept in --work."""
    note = asked.work / "measured.json"
    known = json.loads(note.read_text()) if note.exists() else {}
    amount = f"{asked.samples} x {asked.length} tokens, --memory-cap {asked.memory_cap}"
    yield f"\n{asked.name}, 4 bits in groups of 64, random weights; {amount}; {os.cpu_count()} cores\n"
    yield "| step | minutes | peak resident | peak of MLX |"
    yield "|---|---|---|---|"
    for step, command in commands(asked).items():
        if step not in asked.steps:
            continue
        if known.get(step, {}).get("command") != (words := [*map(str, command)]):
            known[step] = {"command": words, **measure(command)}
            note.write_text(json.dumps(known, indent=1))
        found = known[step]
        manifest = json.loads((asked.work / "run" / "manifest.json").read_text())["steps"]
        mlx = manifest.get(step, {}).get("peak_mlx_bytes")
        peaks = f"{gb(found['peak_bytes'])} | {gb(mlx) if mlx else '-'}"
        yield f"| {step} | {found['seconds'] / 60:.1f} | {peaks} |"
    most = max(known, key=lambda step: known[step]["peak_bytes"])
    yield f"\nThe most memory took {most}: {gb(known[most]['peak_bytes'])} of {asked.memory_cap}."
    if known[most]["peak_bytes"] > parse_amount(asked.memory_cap, "bytes"):
        raise SystemExit(f"{most} took more than the cap")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", help="a model of the catalogue")
    parser.add_argument("--memory-cap", default="3GB")
    parser.add_argument("--for", dest="mac", default="m4-24gb", help="the Mac it is to fit")
    parser.add_argument("--context", type=int, default=8192)
    parser.add_argument("--keep", type=float, help="in place of what fits --for")
    parser.add_argument("--samples", type=int, default=2, help="rows")
    parser.add_argument("--length", type=int, default=512, help="tokens of a row")
    parser.add_argument("--steps", nargs="+", choices=(*STEPS, *MORE, "all"), default=STEPS)
    parser.add_argument("--work", type=Path, required=True, help="where to work; kept")
    asked = parser.parse_args()
    asked.steps = (*STEPS, *MORE) if "all" in asked.steps else asked.steps
    if not (asked.work / "source").exists():
        make = [sys.executable, ROOT / "scripts" / "make_synthetic.py", asked.name, "--out", asked.work / "source"]
        subprocess.run(make, check=True)
    lines = []
    for line in table(asked):
        show(line)
        lines.append(line)
    results = ROOT / "benchmarks" / "results"
    results.mkdir(exist_ok=True)
    (results / f"real-size-{asked.name}.md").write_text("\n".join(lines).strip() + "\n")


if __name__ == "__main__":
    main()
