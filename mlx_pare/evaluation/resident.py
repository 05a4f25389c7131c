"""Whether the memory holds a whole model: most of mlx-pare streams, but some steps load it with stock mlx-lm."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from .. import lm
from ..base import machine
from ..base.errors import Refused
from ..base.units import gb
from ..model.checkpoint import Checkpoint


def needed_bytes(model: Path) -> int:
    """Memory that a whole model takes: as it is stored, or as float32 on the CPU backend, which computes in that."""
    return Checkpoint(model).nbytes() * (4 if lm.cpu_backend() else 1)


def not_resident(model: Path, memory_cap: int | None) -> str:
    """Why a model cannot be in memory as a whole; empty if it can."""
    needed, limit = needed_bytes(model), memory_cap or machine.available_bytes()
    if needed <= limit:
        return ""
    room = f"--memory-cap allows ({gb(limit)})" if memory_cap else f"is free ({gb(limit)})"
    return f"{model} needs about {gb(needed)} of memory, more than {room}"


def require(models: Sequence[Path], memory_cap: int | None) -> None:
    """Raises Refused for models of which the memory cannot hold each alone, naming all of them with their sizes."""
    if found := [why for why in (not_resident(model, memory_cap) for model in models) if why]:
        cure = "give a larger --memory-cap" if memory_cap else "close other programs"
        raise Refused("; ".join(found), f"{cure}, or leave these models out")
