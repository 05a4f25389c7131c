"""Whether a whole model fits in memory: most of mlx-pare streams, but some steps load it with stock mlx-lm."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from .. import lm
from ..base import machine
from ..base.errors import Refused
from ..base.units import gb
from ..model.checkpoint import Checkpoint
from ..model.footprint import parameters


def needed_bytes(model: Path, answers: bool = False) -> int:
    """Bytes that a whole model takes at most.

    On the CPU backend these are four times what is stored, or four bytes a parameter if it is loaded to answer.
    """
    checkpoint = Checkpoint(model)
    if not lm.cpu_backend():
        return checkpoint.nbytes()
    return 4 * (parameters(checkpoint.arch)["total"] if answers else checkpoint.nbytes())


def not_resident(model: Path, memory_cap: int | None, answers: bool = False) -> str:
    """The reason why a whole model does not fit in memory; empty if it fits.

    Args:
        model: its directory.
        memory_cap: bytes that it may take; None: the memory that is free.
        answers: whether it is loaded to answer (lm.load_to_answer).
    """
    needed, limit = needed_bytes(model, answers), memory_cap or machine.available_bytes()
    if needed <= limit:
        return ""
    room = f"--memory-cap allows ({gb(limit)})" if memory_cap else f"is free ({gb(limit)})"
    return f"{model} needs about {gb(needed)} of memory, more than {room}"


def require(models: Sequence[Path], memory_cap: int | None, answers: bool = False) -> None:
    """Refuse models that do not fit in memory, each alone.

    Args:
        models: their directories.
        memory_cap: bytes that one may take; None: the memory that is free.
        answers: whether they are loaded to answer (lm.load_to_answer).
    Raises:
        Refused: some do not fit; the error names all of them with sizes.
    """
    if found := [why for why in (not_resident(model, memory_cap, answers) for model in models) if why]:
        cure = "give a larger --memory-cap" if memory_cap else "close other programs"
        raise Refused("; ".join(found), f"{cure}, or leave these models out")
