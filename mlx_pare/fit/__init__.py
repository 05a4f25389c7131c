"""fit: which bytes does a Mac allow, and does a model fit into them?"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

NOTE = (
    "weights and mlx-lm's KV cache are counted exactly; work memory, the GPU's budget and tok/s are estimates "
    "(constants: fit/planner.py)"
)


def fit(model: Path, macs: Sequence[str] = (), context: int = 8192, macos: int = 26) -> dict[str, Any]:
    """One row per Mac (this Mac first, then all; or only the named ones) for a model directory as it is stored.

    Raises UsageError for a Mac nobody makes, PareError for a model that cannot be read.
    """
    from ..checkpoint import Checkpoint
    from . import footprint, planner

    checkpoint = Checkpoint(model)
    here = planner.this_mac()
    chosen = [planner.find(name) for name in macs] or ([here] if here else []) + planner.macs()
    weights = checkpoint.nbytes()
    lookup = footprint.lookup_bytes(checkpoint.arch, footprint.like(checkpoint))
    rows = planner.fit(checkpoint.arch, weights, chosen, context, macos, lookup, checkpoint.value_bytes)
    return {
        "model": str(model),
        "context": context,
        "macos": macos,
        "weights_bytes": weights,
        "rows": rows,
        "note": NOTE,
    }
