"""The table of the stages of gradual pruning."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..base.units import count, duration, readable
from ..evaluation.metrics import Metrics
from ..pruning.plan_file import Plan
from ..store import step_files
from ..store.manifest import Manifest
from ..store.places import name_of


def story(run: Path) -> list[dict[str, Any]]:
    """Describe every stage that was cut; empty for a run without stages.

    A row has the parent of the stage, its share of the original, parameters, steps and seconds, and perplexity and KL
    divergence to the original after the cut and after recovery (None: not measured).
    """
    found: list[dict[str, Any]] = []
    whole = math.nan
    while (place := run / name_of(len(found) + 1)).joinpath("prune", "model", "plan.json").exists():
        made = Plan.load(place / "prune" / "model" / "plan.json")
        manifest = Manifest.read(place / "manifest.json", "run manifest")
        whole = made.before.non_embedding if not found else whole
        row: dict[str, Any] = {"stage": place.name, "parent": found[-1]["stage"] if found else "original"}
        row |= {"share": made.after.non_embedding / whole, "parameters": made.after.parameters}
        healed = place / "recover" / "recovery.json"
        row["steps"] = done["options"]["steps"] if (done := step_files.find(healed)) else None
        row["seconds"] = sum(step.seconds for step in manifest.steps.values())
        last = not (run / name_of(len(found) + 2)).exists()
        for what in ("pruned", "recovered"):
            names = [f"{place.name}-{what}", *([what] if last and what == "recovered" else [])]
            files = [file for name in names if (file := run / f"evaluate-{name}" / "metrics.json").exists()]
            m = Metrics.load(files[0]) if files else None
            row[what] = {"perplexity": m.perplexity, "kl_divergence": m.kl_divergence} if m else None
        found.append(row)
    return found


HEAD = ("<stage", "<cut from", "keeps", "parameters", "perplexity", "KL", "recovered", "KL recovered", "steps", "time")


NOTE = (
    "Each stage cuts the recovered model of the one before and is recovered with the original as teacher; perplexity "
    "and KL to the original after the cut and after recovery, on the same windows as above. The row `pruned` above has "
    "the units of the last stage, cut out of the original at once and never recovered, as the random cut is."
)


def cells(told: Sequence[Mapping[str, Any]]) -> list[list[str | None]]:
    """Return a story as the rows of a table under HEAD."""

    def measured(m: Mapping[str, float] | None) -> list[str | None]:
        return [None, None] if m is None else [readable(m["perplexity"], 3), f"{m['kl_divergence']:.4f}"]

    return [
        [row["stage"], row["parent"], f"{row['share']:.3f}", count(row["parameters"]), *measured(row["pruned"]),
         *measured(row["recovered"]), row["steps"], duration(row["seconds"])]
        for row in told
    ]  # fmt: skip
