"""prune against copying the bytes that are kept: cold source, everything on the disk at the end, in turn.

    python benchmarks/speed_prune.py [--rounds 5] [--work DIR]

Blocks of Qwen3-8B's shapes. The copy is that of the result's own files, by the system. Cuts: units in whole groups of
64 and layers, whose codes stay; units inside of groups, where down_proj is requantized; bfloat16, where any is exact.
"""

from __future__ import annotations

import random
import shutil
from collections.abc import Sequence
from pathlib import Path

import synthetic
import timing

from mlx_pare.base.units import gb
from mlx_pare.model.checkpoint import Checkpoint
from mlx_pare.pruning.layout import layout
from mlx_pare.pruning.plan_file import LayerPlan, Plan, Size, Target
from mlx_pare.pruning.prune import prune

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


def lines(work: Path, rounds: int) -> list[str]:
    """The table: seconds of prune and of the copy, their ratio, bytes read for those needed."""
    packed, dense = synthetic.checkpoint(work / "4bit", 2, True), synthetic.checkpoint(work / "bf16", 1, False)
    cases = {
        "4 bits, whole groups and kv heads": (packed, plan_of(packed, (0, 1), 0.75, 0.75, True)),
        "4 bits, one of two layers": (packed, plan_of(packed, (1,), 1, 1, True)),
        "bfloat16, any channels and kv heads": (dense, plan_of(dense, (0,), 0.75, 0.75, False)),
        "4 bits, inside of groups: down_proj requantized": (packed, plan_of(packed, (0, 1), 0.75, 0.75, False)),
    }
    table = [
        "| cut | writes | prune s | copy s | speed of prune / copy | ... fastest of each | read / needed |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, (model, plan) in cases.items():
        once = work / "once"
        prune(model, plan, once)
        steps = {
            "prune": lambda out, model=model, plan=plan: prune(model, plan, out),
            "copy": lambda out, once=once: timing.copied(once, out),
        }
        found = timing.in_turn(steps, {"prune": model, "copy": once}, rounds, work)
        written = sum(file.stat().st_size for file in once.glob("*.safetensors"))
        table.append(
            f"| {name} | {gb(written)} of {gb(Checkpoint(model).nbytes())} "
            f"| {timing.seconds(found['prune'])} | {timing.seconds(found['copy'])} "
            f"| {timing.spread(timing.ratios(found['copy'], found['prune']))} "
            f"| {timing.fastest(found['copy'], found['prune'])} "
            f"| {timing.share(found['prune'], needed(model, plan))} |"
        )
        shutil.rmtree(once)
    return table


if __name__ == "__main__":
    timing.script(__doc__, lines)
