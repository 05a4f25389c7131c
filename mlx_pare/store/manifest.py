"""How a run directory describes itself: RUN/manifest.json has a record per finished step, RUN/recipe.toml the settings.

Anybody may read them, also while another process works there. Only store/rundir.py writes them.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from pydantic import Field, model_validator

from ..base import untrusted
from ..base.errors import PareError, shell
from ..base.plain_path import is_litter
from ..model.hub_name import HubName, of_snapshot
from ..options import recipe_file, settings
from ..options.values import shown
from . import step_files
from .schema import SCHEMA, Count, Strict

MANIFEST, RECIPE = "manifest.json", "recipe.toml"
SURVIVORS = "survivors.json"  # in every pruned model


class StepRecord(Strict):
    """One finished step. ``seconds`` is what it took.

    ``peak_bytes``: the largest resident size of the process during the step (on a Mac: until its end).
    ``peak_mlx_bytes``: the most that MLX had allocated, which on a Mac is not part of ``peak_bytes``.
    ``swap_growth_bytes``: how much more swap the computer used at the end.
    """

    parameters: dict[str, Any]
    inputs: dict[str, str]
    outputs: dict[str, str]
    seconds: float = Field(ge=0, le=1e12)
    peak_bytes: Count
    peak_mlx_bytes: Count | None = None
    swap_growth_bytes: Count = 0


class Manifest(Strict):
    """What is known about a run: the model, the machine and versions that were used, and every finished step.

    ``contents``: sha256 of all bytes of the model's weights ("model:" and the file name) and of every big output
    (step/file). ``origin``: for a model on the hub, the name that was given ("asked") and the same with its commit
    ("hub"). ``computed_on``: what machine.computes_on returned where the run was begun, and wherever it went on; empty
    in runs of earlier versions.
    """

    schema_version: int = SCHEMA
    model: str
    source: str
    versions: dict[str, str]
    machine: dict[str, Any]
    steps: dict[str, StepRecord] = Field(default_factory=dict)
    contents: dict[str, str] = Field(default_factory=dict)
    origin: dict[str, str] | None = None
    computed_on: list[dict[str, str | None]] = Field(default_factory=list)

    @property
    def hub(self) -> HubName | None:
        """The run's model on the hub, with its commit; None for any other model."""
        return HubName.parse(self.origin.get("hub", "")) if self.origin else of_snapshot(self.model)

    @property
    def called(self) -> str:
        """A short name of the model for people."""
        found = self.hub
        return str(HubName(found.repo, file=found.file)) if found else Path(self.model).name

    @model_validator(mode="after")
    def _known_schema(self) -> Manifest:
        if self.schema_version != SCHEMA:
            raise ValueError(f"schema_version {self.schema_version}, this version reads {SCHEMA}")
        return self


def read_manifest(path: Path) -> Manifest:
    """Read the manifest in ``path``, even if a process works there. Raises PareError if it is missing or damaged."""
    file = path / MANIFEST
    require_run(file)
    return Manifest.read(file, "run manifest", "restore it, or start a new run with another --out", "is damaged")


def is_run(path: Path) -> bool:
    """Whether a directory is a run directory. Its manifest may be damaged."""
    keys = _keys(path / MANIFEST)
    return (path / ".lock").exists() if keys is None else {"schema_version", "source", "steps"} <= keys


def is_pruned(path: Path) -> bool:
    """Whether a directory is a pruned model, or its copy for the hub.

    The keys of survivors.json decide, because another program's file may have the same name."""
    return {"schema_version", "source_identity", "layers"} <= (_keys(path / SURVIVORS) or set())


def _keys(file: Path) -> set[str] | None:
    """The keys of a JSON object: empty if it is something else, or if there is no file. None: it cannot be read."""
    try:
        found = json.loads(untrusted.contents(file)) if file.is_file() else None
    except (OSError, PareError, ValueError, RecursionError):
        return None
    return set(found) if isinstance(found, dict) else set()


def read_recipe(path: Path) -> dict[str, Any] | None:
    """Read the settings of the run in ``path``, by the fields of Settings; None if there is no recipe.

    Raises PareError, which names file and key, if the recipe is damaged."""
    file = path / RECIPE
    found = recipe_file.of_run(file) if file.exists() else None
    for name, value in (found or {}).items():
        if fault := settings.wrong(name, value):
            raise PareError(f"{file}: {name} = {shown(value)} is not allowed", f"give {fault}")
    return found


def require_run(manifest: Path) -> None:
    """Raises PareError if this manifest does not exist."""
    if not manifest.exists():
        raise PareError(
            f"no run at {manifest.parent}",
            "start one with `mlx-pare calibrate MODEL --out RUN` or `mlx-pare run MODEL --out RUN`",
        )


# ---- steps that are under way ----

NOTE = "step.json"  # in the directory of every step: its parameters and inputs


def noted(step: Path) -> dict[str, Any] | None:
    """Return "parameters" and "inputs" of the work that was done in a step's directory; None if there is no work yet.

    Raises PareError if the note is damaged."""
    note = step / NOTE
    if not note.exists():
        return None
    try:
        found = step_files.note(note)
        begun = {"parameters": dict(found["parameters"]), "inputs": dict(found["inputs"])}
    except (ValueError, KeyError, TypeError) as error:
        raise PareError(f"{note} is damaged", f"delete {shell(step)} to do the step again") from error
    return begun if any(p.name != NOTE and not is_litter(p) for p in step.iterdir()) else None


def begun(run: Path, step: str) -> dict[str, Any] | None:
    """Return the parameters with which a step was done, or is under way. None: it was not begun, or it cannot be read,
    which is an error of the step."""
    try:
        record = read_manifest(run).steps.get(step)
        if record is not None and (run / step).exists():
            return record.parameters
        found = noted(run / step) or noted(run / f"{step}.partial")
    except (OSError, PareError):
        return None
    return found and found["parameters"]
