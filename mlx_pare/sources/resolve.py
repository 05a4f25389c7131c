"""Turn the name of a model into a path: a hub id, a GGUF file on the hub, or a name of the catalogue.

The command line and the Python API use this through open_model.opened. An existing path always wins over a name.
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
    """Where a model on this disk came from. ``asked``: the name that was given. ``hub``: its name with the commit."""

    asked: str
    hub: str


_origins: dict[Path, Origin] = {}  # path of each model that this process resolved -> its origin
_rebuilt: dict[Path, Path] = {}  # model directory in the cache -> GGUF file on this disk that it was rebuilt from


def local(model: str | os.PathLike[str], run: Path | None = None, gguf: bool = False) -> Path:
    """Return the directory or the GGUF file of a model; download it if needed.

    Args:
        model: a path, "org/name", "org/name@revision", "org/name/file.gguf", "org/name:Q4_K_M", or a name of the
            catalogue.
        run: a run directory; if the run was begun with this name, its commit is taken. None: the current one.
        gguf: download only a GGUF model.
    Returns:
        A path; the given one if it exists or looks like a path.
    Raises:
        UsageError: the name is unknown, in the catalogue for its sizes only, or as download.download.
        PareError: as download.download.
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
    """Return where a model came from; None if this process did not resolve it from a name of the hub."""
    return _origins.get(Path(model))


def rebuilt(file: Path, directory: Path) -> None:
    """Remember that a model directory was rebuilt from a GGUF file and has the same origin."""
    if found := _origins.get(file):
        _origins[directory] = found
    else:
        _rebuilt[directory.absolute()] = file.absolute()


def typed(text: str) -> Path:
    """Make a Path of what the user typed. "./org/name" becomes absolute, since a Path would drop the "./" of a path.

    Raises UsageError if the text is empty: a Path would take it for the current directory.
    """
    if not text.strip():
        raise UsageError("the name of a model is empty", "give a path, a hub id, or a name of `mlx-pare models`")
    if not os.path.exists(text) and (text.startswith("./") or text.endswith("/")):
        return Path(os.path.abspath(text))
    return Path(text)


def written(model: Path) -> str:
    """Return a model as a recipe names it: by name and commit on the hub, or by path.

    For a rebuilt model this is the GGUF file, since the cache may be emptied.
    """
    found = origin(model)
    return found.hub if found else str(_rebuilt.get(model.absolute(), model))


@contextmanager
def offline() -> Iterator[None]:
    """Keep everything from asking the hub: all models are there. huggingface_hub reads its variable once, at import."""
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
    """Return the repository of a name of the catalogue; None if it looks like a path. Raises UsageError otherwise."""
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
    """Return the commit that a run was begun with, if it was begun with this name."""
    if run is None or not (run / "manifest.json").is_file():
        return None
    from ..base.untrusted import read_json

    with suppress(PareError):  # a damaged manifest is refused elsewhere
        known = read_json(run / "manifest.json", "run manifest").get("origin")
        if isinstance(known, dict) and known.get("asked") == str(name):
            found = HubName.parse(str(known.get("hub")))
            if found and found.repo == name.repo:
                console.say(f"{run} was begun with {found.repo} at commit {str(found.revision)[:8]}, which it keeps")
                return found
    return None
