"""What was asked of a run, on which text and on which day, as RUN/recipe.toml keeps it for later steps."""

from __future__ import annotations

import datetime
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from ..options import recipe_file
from ..options.settings import Settings
from ..sources import resolve
from ..store.manifest import read_recipe
from ..store.rundir import Run
from ..text import domains, provenance
from ..text.splits import Texts

OF_TEXT = ("data", "test_data", "field", "date", "samples", "length", "seed")  # settings that say on what text


def dated(out: Path, s: Settings) -> Settings:
    """Add a date to the settings: that of the recipe of the run ``out``, or today's. A chat template with a clock then
    writes the same chats when the run continues tomorrow."""
    recipe = read_recipe(out)
    noted = provenance.asked_before(out) if recipe is None else recipe
    return replace(s, date=s.date or noted.get("date") or datetime.date.today().isoformat())


def located(s: Settings) -> Settings:
    """Make the paths of the settings absolute, because a later command may be called in another directory."""
    return replace(
        s,
        data=s.data and domains.absolute(s.data),
        test_data=s.test_data and str(Path(s.test_data).absolute()),
        teacher=s.teacher and resolve.written(Path(s.teacher).absolute()),
    )


def _asked(model: Path, s: Settings) -> dict[str, Any]:
    return {"model": resolve.written(model.absolute()), **asdict(located(s))}


def recipe_of(model: Path, s: Settings) -> dict[str, Any]:
    """Return what is asked of a run, as its recipe holds it."""
    return recipe_file.by_name(_asked(model, s))


def of_calibration(run: Run) -> dict[str, Any]:
    """Return what was asked of the calibration of a run, as settings. Raises Refused for a run without a recipe."""
    known = run.recipe()
    return {key: known[key] for key in OF_TEXT if key in known}


def write(run: Run, model: Path, s: Settings) -> None:
    """Note in the recipe that a run was calibrated with these settings. The rest of the recipe stays.

    Args:
        run: the run directory.
        model: as the user named it.
        s: settings of the calibration.
    """
    asked = _asked(model, s)
    known = read_recipe(run.path)
    if known is None:
        run.write_recipe(recipe_file.by_name(asked))
    elif changed := {key: asked[key] for key in ("model", *OF_TEXT) if asked[key] != known.get(key)}:
        run.write_recipe(recipe_file.by_name(known | changed))


def texts_of(run: Run, s: Settings | None = None) -> Texts:
    """Return the texts that a run was begun with. ``s`` are settings that include ``of_calibration``."""
    begun = provenance.known(run)
    return Texts(run.model, s or Settings(**of_calibration(run)), by_hash=begun is not None and begun.note is None)
