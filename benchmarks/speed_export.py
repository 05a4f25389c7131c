"""GGUF export against its conversion kernels: cold source, everything on the disk at the end, in turn.

    python benchmarks/speed_export.py [--rounds 5] [--work DIR]

Blocks of Qwen3-8B's shapes. The kernels: all tensors in memory, expanded to float32 and converted as export does it, a
few rows at a time, and the bytes written and brought to the disk. gguf-py: the same with that package's converters.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import gguf
import mlx.core as mx
import numpy as np
import synthetic
import timing

from mlx_pare.base.units import gb
from mlx_pare.exporting.export import export
from mlx_pare.gguf.architectures import target_of
from mlx_pare.gguf.write.encode import convert
from mlx_pare.gguf.write.tensors import Row, table
from mlx_pare.model.checkpoint import Checkpoint
from mlx_pare.model.weights import read_panels
from mlx_pare.tensors.packed import Packed


def in_memory(checkpoint: Checkpoint, rows: list[Row]) -> list[tuple[Row, list[Packed | mx.array]]]:
    """Every tensor as it is stored, in the panels that export reads."""
    held = [(row, list(read_panels(checkpoint, row.source))) for row in rows]
    mx.eval([[(p.words, p.scales, p.biases) if isinstance(p, Packed) else p for p in panels] for _, panels in held])
    return held


def by_gguf(values: mx.array, kind: str) -> np.ndarray:
    """float32 rows as gguf-py writes them."""
    return gguf.quants.quantize(np.array(values, copy=False), gguf.GGMLQuantizationType[kind])


def converted(held: list[tuple[Row, list]], kernel: Callable[[mx.array, str], Any]) -> Iterator[memoryview]:
    for row, panels in held:
        for panel in panels:
            values = panel.dense() if isinstance(panel, Packed) else panel.astype(mx.float32)
            yield np.ascontiguousarray(kernel(values, row.type)).data.cast("B")


def kernels(held: list[tuple[Row, list]], kernel: Callable[[mx.array, str], Any], out: Path) -> None:
    """The conversion alone, and its bytes on the disk."""
    with out.open("wb") as file:
        for part in converted(held, kernel):
            file.write(part)
        file.flush()
        os.fsync(file.fileno())


def lines(work: Path, rounds: int) -> list[str]:
    """The table: seconds of export and of the kernels, their ratio, bytes read for those needed."""
    models = {"4 bits": synthetic.checkpoint(work / "4bit-1", 1, True)}
    models["bfloat16"] = synthetic.checkpoint(work / "bf16", 1, False)
    table_lines = [
        "| export | bytes | export s | kernels s | speed of export / kernels | ... in processor time "
        "| gguf-py's kernels / export | read / needed |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, model in models.items():
        checkpoint = Checkpoint(model)
        for kind in ("f16", "q8_0"):
            held = in_memory(checkpoint, table(checkpoint.arch, target_of(checkpoint), kind))
            steps = {
                "export": lambda out, model=model, kind=kind: export(model, out, kind),
                "kernels": lambda out, held=held: kernels(held, convert, out),
                "gguf-py": lambda out, held=held: kernels(held, by_gguf, out),
            }
            found = timing.in_turn(steps, {"export": model}, rounds, work)
            table_lines.append(
                f"| {name} to {kind} | {gb(sum(row.nbytes for row, _ in held))} "
                f"| {timing.seconds(found['export'])} | {timing.seconds(found['kernels'])} "
                f"| {timing.spread(timing.ratios(found['kernels'], found['export']))} "
                f"| {timing.spread(timing.ratios(found['kernels'], found['export'], 'processor'))} "
                f"| {timing.spread(timing.ratios(found['gguf-py'], found['export']))} "
                f"| {timing.share(found['export'], checkpoint.nbytes())} |"
            )
    return table_lines


if __name__ == "__main__":
    timing.script(__doc__, lines)
