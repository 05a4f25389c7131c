"""What a run directory says of itself: RUN/manifest.json, a record per finished step, and RUN/recipe.toml, what was
asked. Read by whoever wants to know, also while another process works there; written by store/rundir.py alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from pydantic import Field, model_validator

from ..base import untrusted
from ..base.errors import PareError
from ..model.hub_name import HubName, of_snapshot
from ..options import recipe_file, settings
from ..options.values import shown
from .schema import SCHEMA, Count, Strict

MANIFEST, RECIPE = "manifest.json", "recipe.toml"
SURVIVORS = "survivors.json"  # beside every pruned model


class StepRecord(Strict):
    """One finished step. ``peak_bytes``: the largest resident size of the process during it (on a Mac up to its end),
    ``peak_mlx_bytes`` the most that MLX had allocated, which on a Mac lies outside of it, ``swap_growth_bytes`` by how
    much more swap the computer used in the end."""

    parameters: dict[str, Any]
    inputs: dict[str, str]
    outputs: dict[str, str]
    seconds: float = Field(ge=0, le=1e12)
    peak_bytes: Count
    peak_mlx_bytes: Count | None = None
    swap_growth_bytes: Count = 0


class Manifest(Strict):
    """What is known of a run: the model, where it was made, and every finished step. ``contents``: sha256 of all bytes
    of the model's weights ("model:" and the name of the file) and of every big output (step/file). ``origin``: of a
    model that was named on the hub, the name that was given ("asked") and the same with its commit ("hub")."""

    schema_version: int = SCHEMA
    model: str
    source: str
    versions: dict[str, str]
    machine: dict[str, Any]
    steps: dict[str, StepRecord] = Field(default_factory=dict)
    contents: dict[str, str] = Field(default_factory=dict)
    origin: dict[str, str] | None = None

    @property
    def hub(self) -> HubName | None:
        """The model on the hub that the run is about, with its commit; None for any other model."""
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
    """What is known of the run in ``path``, whoever works on it. Raises PareError without one, or a damaged one."""
    file = path / MANIFEST
    require_run(file)
    return Manifest.read(file, "run manifest", "restore it, or start a new run with another --out", "is damaged")


def is_run(path: Path) -> bool:
    """Whether a directory is a run directory, its manifest may be damaged."""
    keys = _keys(path / MANIFEST)
    return (path / ".lock").exists() if keys is None else {"schema_version", "source", "steps"} <= keys


def is_pruned(path: Path) -> bool:
    """Whether a directory is a pruned model, or what was made of one for the hub. A file of somebody else may have the
    same name."""
    return {"schema_version", "source_identity", "layers"} <= (_keys(path / SURVIVORS) or set())


def _keys(file: Path) -> set[str] | None:
    """The names in a JSON object: none if it is something else, or if there is no file. None: it cannot be read."""
    try:
        found = json.loads(untrusted.contents(file)) if file.is_file() else None
    except (OSError, PareError, ValueError, RecursionError):
        return None
    return set(found) if isinstance(found, dict) else set()


def read_recipe(path: Path) -> dict[str, Any] | None:
    """What was asked of the run in ``path``, by the fields of Settings; None without a recipe. Raises PareError,
    with file and key, for a damaged one."""
    file = path / RECIPE
    found = recipe_file.of_run(file) if file.exists() else None
    for name, value in (found or {}).items():
        if fault := settings.wrong(name, value):
            raise PareError(f"{file}: {name} = {shown(value)} is not allowed", f"give {fault}")
    return found


def require_run(manifest: Path) -> None:
    """Raises PareError if there is no such manifest."""
    if not manifest.exists():
        raise PareError(
            f"no run at {manifest.parent}",
            "start one with `mlx-pare calibrate MODEL --out RUN` or `mlx-pare run MODEL --out RUN`",
        )
