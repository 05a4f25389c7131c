"""One way to read the JSON files that steps leave in a run directory.

``read`` and ``find`` give reports and summaries plain dictionaries, checked by the schemas of store/step_schemas.py.
For a damaged or edited file, one line names the file and the cure.
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
    """Read a file of a step. Raises PareError, which names file and cure, if it is missing or damaged."""
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
    """Read a file of a step as ``read`` does; None if the file does not exist."""
    return read(path) if path.exists() else None


def note(path: Path, cure: str | None = None) -> dict[str, Any]:
    """Read any JSON object that mlx-pare wrote, without a schema. Raises PareError as ``read`` does."""
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
