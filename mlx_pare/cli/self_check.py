"""doctor --check: a self-test of about a minute on the device that MLX uses here. Its numbers say what no reading of
the code can, and they can be sent as JSON."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import scipy.linalg

from .. import lm
from ..base import console
from ..base.errors import PareError
from ..lm.backend import EXACT
from ..options.settings import Settings
from ..pipeline.run import dry_run, run
from ..store.manifest import read_manifest
from ..tensors.packed import pack
from ..tensors.packing import BITS, FLOAT_MODES, GROUP_SIZES, Packing
from ..text.splits import DEMO

JOB = Settings(
    keep=0.5, length=128, samples=16, train_rows=32, widths="even", axes=("ffn", "kv_head"), recover_steps=6,
    learning_rate=1e-3, batch=2, trials=0, context=512,
)  # fmt: skip
# What JOB gave on the CPU backend (Linux, x86-64)
EXPECTED = {
    "perplexity of the original": (67.6245, 0.002),
    "perplexity of the cut model": (86.731, 0.02),
    "KL divergence of the cut model": (0.32631, 0.05),
    "KL divergence after recovery": (0.30545, 0.05),
}  # (value, share that another device may be away)


@dataclass(frozen=True)
class Row:
    """One check: what was measured, what is expected, and whether that holds. ``passed`` None: it is only told."""

    what: str
    found: float | str
    expected: str
    passed: bool | None


def self_check() -> dict[str, Any]:
    """Check this device: float32 products, packing, a small job, memory and speed.

    Returns:
        "device", what MLX says of it; "rows", the checks as dicts; "seconds"; "passed".
    """
    begun, rows = time.monotonic(), []
    for part in (_products, _packing, _job, _speed):
        try:
            rows += part()
        except (PareError, RuntimeError) as error:
            rows.append(Row(part.__name__.strip("_"), f"{type(error).__name__}: {error}", "no error", False))
    return {
        "device": {"default": str(mx.default_device()), **mx.device_info()},
        "rows": [asdict(row) for row in rows],
        "seconds": round(time.monotonic() - begun, 1),
        "passed": all(row.passed is not False for row in rows),
    }


def _products() -> Iterator[Row]:
    error = lm.product_error()
    yield Row("relative error of float32 products", error, f"below {EXACT:g}", error < EXACT)


def _packing() -> Iterator[Row]:
    """Pack a matrix on this device and on the CPU: the errors must be alike. Where codes may differ, their share is
    told."""
    dense = mx.array(np.random.default_rng(0).standard_normal((256, 256)).astype(np.float32))
    worst, share, kinds = 1.0, 0.0, [Packing(bits, group) for bits in BITS for group in GROUP_SIZES]
    for packing in [*kinds, *map(Packing.named, FLOAT_MODES)]:
        here = pack(dense, packing, mx.float32)
        with mx.stream(mx.cpu):
            there = pack(dense, packing, mx.float32)
            lost = [float(mx.square(each.dense() - dense).sum()) for each in (here, there)]
            share = max(share, float((here.words != there.words).mean()))
        worst = max(worst, lost[0] / lost[1])
    yield Row("squared error of packing, against the CPU", worst, "at most 1.05", worst <= 1.05)
    yield Row("words that are packed differently than on the CPU", share, "told only", None)


def _job() -> Iterator[Row]:
    """Calibrate, reconstruct, recover and measure the demo model."""
    model = DEMO / "model"
    with tempfile.TemporaryDirectory() as scratch, console.hushed():
        done = run(model, Path(scratch) / "run", JOB)
        steps = read_manifest(Path(scratch) / "run").steps
    measured = done["contenders"]
    found = (
        measured["original"]["perplexity"],
        measured["pruned"]["perplexity"],
        measured["pruned"]["kl_divergence"],
        measured["recovered"]["kl_divergence"],
    )
    for (what, (value, share)), here in zip(EXPECTED.items(), found, strict=True):
        yield Row(what, here, f"{value:g} ± {share:.1%}", abs(here - value) <= share * value)
    estimate, peak = dry_run(model, JOB)["calibration_bytes"], steps["calibrate"].peak_bytes
    yield Row("peak memory of calibrate over its estimate", peak / estimate, "told only", None)


def _speed() -> Iterator[Row]:
    """Rates of the two operations that take most of the time: float32 products, and LAPACK in float64."""
    side = 2048
    a = mx.random.normal((side, side), key=mx.random.key(0))
    seconds = _fastest(lambda: mx.eval(a @ a))
    yield Row("float32 products, GFLOP/s", 2 * side**3 / seconds / 1e9, "told only", None)
    gram = np.eye(side) * side + np.array(a, dtype=np.float64)
    seconds = _fastest(lambda: scipy.linalg.cholesky(gram @ gram.T))
    yield Row("float64 Gram matrix and Cholesky, GFLOP/s", (2 + 1 / 3) * side**3 / seconds / 1e9, "told only", None)


def _fastest(call: Any) -> float:
    """Return the seconds of the fastest of three calls."""
    times = []
    for _ in range(3):
        begun = time.perf_counter()
        call()
        times.append(time.perf_counter() - begun)
    return min(times)


def show(found: dict[str, Any]) -> None:
    """Show what ``self_check`` returned."""
    marks = {True: "passed", False: "FAILED", None: ""}
    rows = [[row["what"], row["found"], row["expected"], marks[row["passed"]]] for row in found["rows"]]
    shown = [[what, value if isinstance(value, str) else f"{value:.4g}", *rest] for what, value, *rest in rows]
    console.table(f"self-test on {found['device']['default']}", ["<what", ">found", "<expected", "<"], shown)
    if not found["passed"]:
        console.warn("the self-test failed: do not trust results of this computer. Please report these numbers")
