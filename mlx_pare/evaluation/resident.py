"""Whether a whole model fits in memory: most of mlx-pare streams, but some steps load it with stock mlx-lm."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from .. import lm
from ..base import machine
from ..base.errors import Refused
from ..base.units import gb
from ..model.checkpoint import Checkpoint


def needed_bytes(model: Path) -> int:
    """Bytes that a whole model takes at most: what is stored, or four times that on the CPU backend (float32)."""
    return Checkpoint(model).nbytes() * (4 if lm.cpu_backend() else 1)


def not_resident(model: Path, memory_cap: int | None) -> str:
    """The reason why a whole model does not fit in memory; empty if it fits."""
    needed, limit = needed_bytes(model), memory_cap or machine.available_bytes()
    if needed <= limit:
        return ""
    room = f"--memory-cap allows ({gb(limit)})" if memory_cap else f"is free ({gb(limit)})"
    return f"{model} needs about {gb(needed)} of memory, more than {room}"


def require(models: Sequence[Path], memory_cap: int | None) -> None:
    """Raises Refused if one of the models does not fit in memory alone. The error names all such models with sizes."""
    if found := [why for why in (not_resident(model, memory_cap) for model in models) if why]:
        cure = "give a larger --memory-cap" if memory_cap else "close other programs"
        raise Refused("; ".join(found), f"{cure}, or leave these models out")
