"""The JSON files that steps leave in a run directory: one way to read them.

Reports and summaries take what ``read`` and ``find`` give as plain dictionaries, checked by the schemas of
store/step_schemas.py: a damaged or edited file is one line that names the file and the cure.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from ..base import untrusted
from ..base.errors import PareError, shell
from .schema import ARTIFACT_BUDGET, MAX_ARTIFACT, explain
from .step_schemas import SCHEMAS

CURES = {"trials.json": "delete it: what it holds is tried again"}


def read(path: Path) -> dict[str, Any]:
    """What a step left in a file. Raises PareError, with the file and the cure, when it is missing or damaged."""
    found = note(path, CURES.get(path.name))
    try:
        json.dumps(found, allow_nan=False)
        SCHEMAS[path.name].model_validate(found)
    except ValidationError as error:
        raise _damaged(path, explain(error), CURES.get(path.name)) from error
    except ValueError as error:
        raise _damaged(path, str(error), CURES.get(path.name)) from error
    return found


def find(path: Path) -> dict[str, Any] | None:
    """The same; None where there is no such file."""
    return read(path) if path.exists() else None


def note(path: Path, cure: str | None = None) -> dict[str, Any]:
    """A JSON object of our own, whatever is in it. Raises PareError as ``read`` does."""
    try:
        found = untrusted.loads(untrusted.contents(path, MAX_ARTIFACT, "file"), ARTIFACT_BUDGET)
    except OSError as error:
        raise PareError(f"cannot read {path}: {error.strerror}", cure or _redo(path)) from error
    except ValueError as error:
        raise _damaged(path, str(error), cure) from error
    if not isinstance(found, dict):
        raise _damaged(path, f"it holds a {type(found).__name__}, no object", cure)
    return found


def _damaged(path: Path, why: str, cure: str | None) -> PareError:
    return PareError(f"{path} is damaged: {why}", cure or _redo(path))


def _redo(path: Path) -> str:
    return f"delete {shell(path.parent)} to do the step again"
