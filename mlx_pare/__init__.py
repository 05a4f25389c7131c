"""mlx-pare: prune language models on the Mac itself.

Every command is also a function: ``from mlx_pare import fit, prune``.

Nothing heavy is imported until a function is used.
"""

from __future__ import annotations

import sys
from importlib import import_module
from types import ModuleType
from typing import Any

__version__ = "0.1.0"

_VERBS = {
    "inspect": "capacity.inspect", "fit": "capacity.fit", "calibrate": "scoring.calibrate", "score": "scoring.score", "plan": "planning.plan",
    "reconstruct": "repair.reconstruct", "prune": "pruning.prune", "recover": "recovery.recover", "evaluate": "evaluation.evaluate", "export": "exporting.export",
    "bench": "evaluation.bench", "report": "reporting.report", "status": "pipeline.status", "run": "pipeline.run",
}  # fmt: skip
__all__ = sorted(_VERBS)


class _Package(ModuleType):
    """A verb and the file it lives in share a name; here the name means the verb; imports find the file."""

    def __setattr__(self, name: str, value: Any) -> None:
        if not (name in _VERBS and isinstance(value, ModuleType)):
            super().__setattr__(name, value)

    def __getattr__(self, name: str) -> Any:
        if name in _VERBS:
            return getattr(import_module(f"{__name__}.{_VERBS[name]}"), name)
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

    def __dir__(self) -> list[str]:
        return sorted({*super().__dir__(), *_VERBS})


sys.modules[__name__].__class__ = _Package
