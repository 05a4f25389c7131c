"""status: how far a run is, from its manifest, its log and its lock. It only reads, also while another process
works."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

from ..base import log
from ..sources.open_model import StrPath
from ..store.manifest import read_manifest, read_recipe
from ..store.places import name_of
from ..store.rundir import is_locked
from .order import step_names


def status(run: StrPath) -> dict[str, Any]:
    """Return how far the run in ``run`` is.

    ``state`` is working, finished, failed, killed (its process ended without a word) or waiting (some steps are done,
    as when they are called one by one). ``steps`` has name, seconds, peak_bytes and bytes on disk of those that are
    done. ``working`` is the step that has begun and is not done, ``next`` the first that has not begun. ``pid``,
    ``since``, ``said`` and ``error`` are those of the last process, from the log. Raises PareError without a run, or
    for a damaged manifest.
    """
    run = Path(run)
    manifest = read_manifest(run)
    recipe = read_recipe(run) or {}
    records = dict(manifest.steps)
    for number in range(1, len(recipe.get("stages") or []) + 1):
        if (place := run / name_of(number) / "manifest.json").exists():
            inner = read_manifest(place.parent).steps
            records |= {f"{name_of(number)}/{name}": record for name, record in inner.items()}
    steps = [
        {"step": name, "seconds": r.seconds, "peak_bytes": r.peak_bytes, "bytes": _bytes(run / name)}
        for name, r in records.items()
    ]
    order = step_names(recipe)
    reached = max((order.index(name) for name in records if name in order), default=-1)
    begun = sorted(str(p.relative_to(run).with_suffix("")) for p in [*run.glob("*.partial"), *run.glob("*/*.partial")])
    begun = [name for name in begun if name in order or "/" not in name]  # a partial model inside a step is not a step
    ahead = [name for name in order[reached + 1 :] if name not in begun]
    session = log.last_session(run)
    locked = _works(session) if (seen := is_locked(run)) is None else seen
    said = [line for line in session if line.kind in ("begun", "done", "said", "progress")]
    errors = [line for line in session if line.kind == "error"]
    return {
        "run": str(run),
        "model": manifest.model,
        "state": _state(session, locked, bool(begun or ahead)),
        "pid": session[-1].pid if session and locked else None,
        "since": session[0].time if session else None,
        "seconds": _seconds(session[0]) if session and locked else None,
        "steps": steps,
        "working": begun[0] if begun else None,
        "next": ahead[0] if ahead else None,
        "left": ahead,
        "said": {"time": said[-1].time, "text": said[-1].text} if said else None,
        "error": {"time": errors[-1].time, "text": errors[-1].text} if errors else None,
        "bytes": _bytes(run),
        "log": str(run / log.NAME) if session else None,
    }


def _state(session: list[log.Line], locked: bool, more: bool) -> str:
    kinds = [line.kind for line in session]
    if locked:
        return "working"
    if "error" in kinds:
        return "failed"
    if session and kinds[-1] != "ended":
        return "killed"
    return "waiting" if more else "finished"


def _works(session: list[log.Line]) -> bool:
    """On a file system without locks: tell whether the process that wrote last exists, and has not logged its end."""
    if not session or session[-1].kind == "ended":
        return False
    try:
        os.kill(session[-1].pid, 0)  # signal 0 only asks whether the process exists
    except ProcessLookupError:
        return False
    except PermissionError:  # a process of another user
        return True
    return True


def _seconds(line: log.Line) -> float:
    """Return the seconds since a line was written."""
    return max(0.0, time.time() - time.mktime(time.strptime(line.time, "%Y-%m-%d %H:%M:%S")))


def _bytes(directory: Path) -> int:
    """Return the bytes of all files below; some may vanish meanwhile."""
    total = 0
    for file in directory.rglob("*"):
        try:
            total += file.stat().st_size if file.is_file() else 0
        except OSError:
            continue
    return total
