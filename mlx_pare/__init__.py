"""mlx-pare: prune language models on the Mac itself.

Every command is also a function: ``from mlx_pare import fit, prune``.

Nothing heavy is imported until a function is used.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

_VERBS = {  # verb -> module with the function of that name
    "inspect": "capacity.inspect",
    "fit": "capacity.fit",
    "calibrate": "scoring.calibrate",
    "score": "scoring.score",
    "plan": "planning.plan",
    "reconstruct": "repair.reconstruct",
    "prune": "pruning.prune",
    "recover": "recovery.recover",
    "evaluate": "evaluation.evaluate",
    "export": "exporting.export",
    "bench": "evaluation.bench",
    "report": "reporting.report",
    "status": "pipeline.status",
    "run": "pipeline.run",
}
__all__ = sorted(_VERBS)


def __getattr__(name: str) -> Any:
    if name in _VERBS:
        return getattr(import_module(f"{__name__}.{_VERBS[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_VERBS})
