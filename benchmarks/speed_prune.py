"""prune against copying the bytes that are kept: cold source, everything on the disk at the end, in turn.

    python benchmarks/speed_prune.py [--rounds 5] [--work DIR]

Blocks of Qwen3-8B's shapes. The copy is that of the result's own files, by the system. Cuts: units in whole groups of
64 and layers, whose codes stay; units inside of groups, where down_proj is requantized; bfloat16, where any is exact.
"""

from __future__ import annotations

import argparse
import random
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path

import synthetic
import timing

from mlx_pare import console
from mlx_pare.artifacts import LayerPlan, Plan, Size, Target
from mlx_pare.checkpoint import Checkpoint
from mlx_pare.layout import layout
from mlx_pare.prune import prune

GROUP = synthetic.PACKING.group_size


def plan_of(model: Path, layers: Sequence[int], ffn: float, heads: float, whole: bool) -> Plan:
    """Random units, the same in all layers; ``whole``: channels in whole groups of columns."""
    checkpoint, draw = Checkpoint(model), random.Random(0)
    total = {axis: checkpoint.arch.uniform(axis) for axis in ("ffn", "kv_head")}
    size = GROUP if whole else 1
    starts = sorted(draw.sample(range(0, total["ffn"], size), round(ffn * total["ffn"] / size)))
    kept = [start + i for start in starts for i in range(size)]
    groups = sorted(draw.sample(range(total["kv_head"]), round(heads * total["kv_head"])))
    nothing = Size(**dict.fromkeys(Size.model_fields, 0))
    return Plan(
        source=checkpoint.identity(),
        criterion="random",
        axes=["ffn", "kv_head", "layer"],
        target=Target(kind="keep", value=ffn, asked="a benchmark"),
        before=nothing,
        after=nothing,
        layers=[LayerPlan(source=layer, ffn=kept, kv_head=groups) for layer in layers],
    )


def needed(model: Path, plan: Plan) -> int:
    """Bytes of the tensors of which anything is kept."""
    checkpoint, total = Checkpoint(model), 0
    for piece in layout(checkpoint, plan.keep(checkpoint.arch), None):
        for origin in piece.origins:
            names = [origin.name]
            if checkpoint.packing(origin.module) and origin.matrix:
                names += [f"{origin.module}.scales", f"{origin.module}.biases"]
            total += sum(checkpoint.entries[name].nbytes for name in names)
    return total


def lines(packed: Path, dense: Path, rounds: int, work: Path) -> list[str]:
    """The table: seconds of prune and of the copy, their ratio, bytes read for those needed."""
    cases = {
        "4 bits, whole groups and kv heads": (packed, plan_of(packed, range(4), 0.75, 0.75, True)),
        "4 bits, two of four layers": (packed, plan_of(packed, (0, 3), 1, 1, True)),
        "4 bits, inside of groups (down_proj requantized)": (packed, plan_of(packed, range(4), 0.75, 0.75, False)),
        "bfloat16, any channels and kv heads": (dense, plan_of(dense, range(2), 0.75, 0.75, False)),
    }
    table = [
        "| cut | kept of | prune s | copy s | speed of prune / copy | read / needed |",
        "|---|---|---|---|---|---|",
    ]
    for name, (model, plan) in cases.items():
        once = work / "once"
        requantized = prune(model, plan, once)["requantized"]
        steps = {
            "prune": lambda out, model=model, plan=plan: prune(model, plan, out),
            "copy": lambda out, once=once: timing.copied(once, out),
        }
        found = timing.in_turn(steps, {"prune": model, "copy": once}, rounds, work)
        kept = sum(file.stat().st_size for file in once.glob("*.safetensors"))
        read = found["prune"][0].read
        seconds = {step: timing.spread([trial.seconds for trial in trials]) for step, trials in found.items()}
        table.append(
            f"| {name}{f', {len(requantized)} matrices' if requantized else ''} "
            f"| {console.gb(kept)} of {console.gb(Checkpoint(model).nbytes())} "
            f"| {seconds['prune']} | {seconds['copy']} "
            f"| {timing.spread(timing.ratios(found['copy'], found['prune']))} "
            f"| {'-' if read is None else f'{read / needed(model, plan):.3f}'} |"
        )
        shutil.rmtree(once)
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--work", type=Path, help="where there is room for 3 GB (default: a temporary directory)")
    asked = parser.parse_args()
    console.configure(quiet=True)
    with tempfile.TemporaryDirectory(dir=asked.work) as name:
        work = Path(name)
        packed, dense = synthetic.checkpoint(work / "4bit", 4, True), synthetic.checkpoint(work / "bf16", 2, False)
        print("\n".join(lines(packed, dense, asked.rounds, work)))


if __name__ == "__main__":
    main()
