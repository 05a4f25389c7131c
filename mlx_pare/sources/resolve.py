"""The name of a model, turned into a path: a hub id, a GGUF file on the hub, or a name of the catalogue.

The command line and the Python API come here through open_model.opened. An existing path always wins over a name.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from ..base import console
from ..base.errors import PareError, UsageError
from ..model.hub_name import HubName
from . import catalogue


@dataclass(frozen=True)
class Origin:
    """Where a model on this disk came from. ``asked``: the name that was given, ``hub``: the same with its commit."""

    asked: str
    hub: str


_origins: dict[Path, Origin] = {}  # of the models that this process resolved
_rebuilt: dict[Path, Path] = {}  # a model directory in the cache -> the GGUF file on this disk that it was rebuilt from


def local(model: str | os.PathLike[str], run: Path | None = None, gguf: bool = False) -> Path:
    """The directory or the GGUF file that a model is, downloaded if it must be.

    Args:
        model: a path, "org/name", "org/name@revision", "org/name/file.gguf", "org/name:Q4_K_M", or a name of the
            catalogue.
        run: a run directory. If the run was begun with this name, the commit of then is taken.
        gguf: download nothing but a GGUF model.

    Returns:
        A path; the one that was given if it exists, or looks like a path.

    Raises:
        UsageError: nothing is known by that name. PareError: as download.download.
    """
    text = os.fspath(model)
    name = None if os.path.exists(text) else HubName.parse(text) or _catalogued(text)
    if name is None:
        return Path(text)
    from .download import download
    from .hub_reader import HubError, Unreachable

    pinned = _recorded(name, run)
    try:
        found = download(pinned or name, gguf)
    except HubError as error:
        if pinned and not isinstance(error, Unreachable):
            raise HubError(f"{error.problem}; {run} was begun with that commit", "use another --out") from error
        raise
    _origins[found.path] = Origin(str(name), str(found.name))
    return found.path


def origin(model: Path) -> Origin | None:
    """Where a model came from that this process resolved from a name of the hub; None for any other."""
    return _origins.get(Path(model))


def rebuilt(file: Path, directory: Path) -> None:
    """Remember that a model directory was rebuilt from a GGUF file, and so came from where that one did."""
    if found := _origins.get(file):
        _origins[directory] = found
    else:
        _rebuilt[directory.absolute()] = file.absolute()


def typed(text: str) -> Path:
    """A path or name as somebody typed it. "./org/name" is a path and no name, which a Path would forget.

    Raises UsageError for an empty text, which a Path would take for the current directory.
    """
    if not text.strip():
        raise UsageError("the name of a model is empty", "give a path, a hub id, or a name of `mlx-pare models`")
    if not os.path.exists(text) and (text.startswith("./") or text.endswith("/")):
        return Path(os.path.abspath(text))
    return Path(text)


def written(model: Path) -> str:
    """A model as a recipe names it: by its name and commit on the hub, or by its path. A GGUF file is named itself: the
    cache where it was rebuilt may be emptied."""
    found = origin(model)
    return found.hub if found else str(_rebuilt.get(model.absolute(), model))


@contextmanager
def offline() -> Iterator[None]:
    """Nothing asks the hub meanwhile: all models are there. huggingface_hub reads its variable once, when imported."""
    constants = sys.modules.get("huggingface_hub.constants")
    before = os.environ.get("HF_HUB_OFFLINE"), getattr(constants, "HF_HUB_OFFLINE", None)
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    if constants:
        constants.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        if before[0] is None:
            os.environ.pop("HF_HUB_OFFLINE", None)
        if constants:
            constants.HF_HUB_OFFLINE = before[1]


# ---- names ----


def _catalogued(text: str) -> HubName | None:
    """The repository of a name of the catalogue; None for what looks like a path. Raises UsageError for other texts."""
    entry = catalogue.find(text)
    if entry is None:
        if os.sep in text or text.startswith(("~", ".")) or text.lower().endswith((".gguf", ".json", ".safetensors")):
            return None
        raise catalogue.unknown(text)
    if text.strip().lower() in entry.like:
        raise UsageError(
            f"{text} is in the catalogue for its sizes only, which are those of {entry.name}",
            f"give the hub id of its weights (org/name), or {entry.name} for those of {entry.repository}",
        )
    stored = f"packed by MLX with {entry.bits} bits" if entry.bits else "the original weights, not packed"
    console.say(f"{text} is {entry.repository}, {stored}")
    return HubName.parse(entry.repository)


def _recorded(name: HubName, run: Path | None) -> HubName | None:
    """The commit that a run was begun with, if it was begun with this name."""
    if run is None or not (run / "manifest.json").is_file():
        return None
    from ..base.untrusted import read_json

    with suppress(PareError):  # a damaged one is not for us to refuse
        known = read_json(run / "manifest.json", "run manifest").get("origin")
        if isinstance(known, dict) and known.get("asked") == str(name):
            found = HubName.parse(str(known.get("hub")))
            if found and found.repo == name.repo:
                console.say(f"{run} was begun with {found.repo} at commit {str(found.revision)[:8]}, which it keeps")
                return found
    return None
