"""The order of the steps of a run, in one place: run.py does them in this order, status.py tells from it what is left.
A step ``evaluate-NAME`` measures the model NAME."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..store.places import name_of


def step_names(asked: Mapping[str, Any]) -> list[str]:
    """Return the steps in their order, as far as the settings of a run (or its recipe) tell. Some may turn out not to
    be needed. Steps in a stage are named ``stage-1/calibrate``."""
    found = []
    for stage, names in groups(asked):
        found += [name if stage is None or name.startswith("evaluate-") else f"{stage}/{name}" for name in names]
    return found


def groups(asked: Mapping[str, Any]) -> list[tuple[str | None, list[str]]]:
    """Return the steps, divided by the stage that they work in; None for the whole run. What is measured always belongs
    to the whole run."""
    count = len(asked.get("stages") or ())
    if count:
        each = [(name_of(number), _stage(asked, number, count)) for number in range(1, count + 1)]
        return [(None, ["evaluate-original"]), *each, (None, ["plan", "evaluate-pruned", *_last(asked)])]
    recovers = asked.get("recover_steps", 0) or asked.get("local_steps", 0)
    recover = ["recover", "evaluate-recovered"] if recovers else []
    return [(None, [*_cut(asked), "evaluate-original", "evaluate-pruned", *recover, *_last(asked)])]


def _cut(asked: Mapping[str, Any]) -> list[str]:
    """Return the steps that cut one model once."""
    sensitivity = ["sensitivity"] if asked.get("widths") == "per-layer" else []
    reconstruct = ["reconstruct"] if asked.get("reconstruct", True) else []
    return ["calibrate", "score", *sensitivity, "plan", *reconstruct, "prune"]


def _stage(asked: Mapping[str, Any], number: int, count: int) -> list[str]:
    """Return the steps of a stage, which cuts what the stage before left."""
    name = name_of(number)
    recovered = "recovered" if number == count else f"{name}-recovered"
    return [*_cut(asked), f"evaluate-{name}-pruned", "recover", f"evaluate-{recovered}"]


def _last(asked: Mapping[str, Any]) -> list[str]:
    """Return the steps that follow the result: what it is compared with, and what is made of it."""
    compared = [] if asked.get("quick") else ["evaluate-random", "evaluate-fewer-bits"]
    return [*compared, "export", *(["bench"] if asked.get("trials", 0) else [])]
