"""Well-known models by name: fit can plan for them without a file or a network, and they can be downloaded by name.

catalogue.json holds for each model the facts of its published config.json, their source, and a flag: V read in a
source, R partly recalled. ``hub`` is the repository of the original weights. ``mlx`` is a repository of weights packed
by MLX, if a source names one. ``like`` lists other models with the same shapes. They can be planned for, but are never
downloaded, since their weights differ.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from ..base.errors import UsageError


@dataclass(frozen=True, eq=False)  # one object per model: a config cannot be hashed
class Entry:
    """One model. ``parameters``: as published, to check our count; None if no exact number is published."""

    name: str
    aliases: tuple[str, ...]
    hub: str
    parameters: int | None
    config: Mapping[str, Any]
    source: str
    flag: str
    note: str = ""
    like: tuple[str, ...] = ()
    mlx: Mapping[str, Any] | None = None

    @property
    def repository(self) -> str:
        """Repository that weights are downloaded from for this name."""
        return self.mlx["hub"] if self.mlx else self.hub

    @property
    def bits(self) -> int | None:
        """Bits of the weights in that repository; None for floats, whose width is in its config."""
        return self.mlx["bits"] if self.mlx else None


def entries() -> list[Entry]:
    """List all models, by family."""
    return list(dict.fromkeys(_by_name().values()))


@cache
def _by_name() -> dict[str, Entry]:
    found = json.loads(Path(__file__).with_name("catalogue.json").read_text("utf-8"))
    known: dict[str, Entry] = {}
    for raw in found:
        lists = {key: tuple(raw.get(key, ())) for key in ("aliases", "like")}
        entry = Entry(**{**raw, **lists, "note": raw.get("note") or ""})
        for name in (entry.name, *entry.aliases, *entry.like, entry.hub.lower()):
            known.setdefault(name, entry)
    return known


def find(name: str) -> Entry | None:
    """Find a model by name, alias or hub id, in upper or lower case; None if it is not in the catalogue."""
    return _by_name().get(name.strip().lower())


def near(name: str) -> list[str]:
    """List known names that are similar to one that was typed."""
    return difflib.get_close_matches(name.strip().lower(), _by_name(), n=4, cutoff=0.6)


def unknown(text: str) -> UsageError:
    """Make the error for a text that is neither a path nor a name, with similar names."""
    close = near(text)
    kinds = "a directory, a config.json, a .gguf file, a hub id (org/name) or a name that `mlx-pare models` lists"
    cure = f"did you mean {', '.join(close)}?" if close else f"give {kinds}"
    return UsageError(f"there is no file, directory or known model {text!r}", cure)


def repositories_near(repo: str) -> list[str]:
    """List at most two repositories of the catalogue that are similar to one that was typed."""
    found = (entry.hub for name in near(repo) if (entry := find(name)))
    return list(dict.fromkeys(hub for hub in found if hub.lower() != repo.lower()))[:2]


def rows() -> list[dict[str, Any]]:
    """List the catalogue as `mlx-pare models` shows it, by family.

    Returns:
        A dictionary per model. ``parameters``: as published, else our count. ``repository``: where weights are
        downloaded from, with its ``bits`` (None: floats) and ``source``. ``cuttable``: axes along which the model can
        be cut; empty if it can only be planned for.
    """
    from ..arch import describe
    from ..model.footprint import parameters

    listed = []
    for entry in entries():
        arch = describe(entry.config)
        listed.append(
            {
                "name": entry.name,
                "aliases": list(entry.aliases),
                "same_shapes": list(entry.like),
                "model_type": entry.config["model_type"],
                "parameters": entry.parameters or parameters(arch)["total"],
                "cuttable": list(arch.cut_axes) if arch.cuttable else [],
                "repository": entry.repository,
                "original": entry.hub,
                "bits": entry.bits,
                "source": entry.mlx["source"] if entry.mlx else entry.source,
                "config_source": entry.source,
                "recalled": entry.flag != "V",
                "note": entry.note or None,
            }
        )
    return listed
