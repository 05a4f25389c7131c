"""Well-known models by name, so that they can be planned for without a file and without a network.

catalogue.json holds for each the facts of its published config.json, where they were read, and a flag: V read in a
source, R partly recalled.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any


@dataclass(frozen=True, eq=False)  # one object per model: a config cannot be hashed
class Entry:
    """One model. ``parameters``: as published, to check our count against; None where nobody says it exactly."""

    name: str
    aliases: tuple[str, ...]
    hub: str
    parameters: int | None
    config: Mapping[str, Any]
    source: str
    flag: str
    note: str = ""


def entries() -> list[Entry]:
    """All of them, by family."""
    return list(dict.fromkeys(_by_name().values()))


@cache
def _by_name() -> dict[str, Entry]:
    found = json.loads(Path(__file__).with_name("catalogue.json").read_text("utf-8"))
    known: dict[str, Entry] = {}
    for raw in found:
        entry = Entry(**{**raw, "aliases": tuple(raw["aliases"]), "note": raw.get("note") or ""})
        for name in (entry.name, *entry.aliases, entry.hub.lower()):
            known.setdefault(name, entry)
    return known


def find(name: str) -> Entry | None:
    """The model of a name, an alias or a hub id, in any case; None when it is not in the catalogue."""
    return _by_name().get(name.strip().lower())


def near(name: str) -> list[str]:
    """Names that somebody who typed this may have meant."""
    return difflib.get_close_matches(name.strip().lower(), _by_name(), n=4, cutoff=0.6)
