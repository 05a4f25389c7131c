"""Rules checked against what the steps of a run have measured; gates.json holds every number."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..base import console
from ..base.errors import PareError
from ..base.units import gb, readable
from ..evaluation.metrics import Metrics
from ..store import step_files
from ..store.arrays import MOST_NATS
from ..store.atomic import replace_file
from ..store.schema import dump_json
from .rules import Rule, needed

FILE = "gates.json"
OF = {"original": "the original's", "random": "that of the random cut", "fewer-bits": "that of fewer bits"}
BENCHED = {"tok_s": "decode_tokens_per_s", "prefill_tok_s": "prefill_tokens_per_s", "peak": "peak_bytes"}


class GateFailed(PareError):
    """A result does not reach what was asked. Exit code 1; everything is kept."""


def checked(run: Path, rules: Sequence[Rule], stage: str, subject: str) -> list[dict[str, Any]]:
    """Check rules, and note rule, stage, value, limit and result in gates.json.

    Args:
        run: run directory; the models that the rules name are measured.
        rules: the rules to check now.
        stage: "pruned", "recovered", "compared" or "bench".
        subject: the contender that is checked, "pruned" or "recovered".
    Returns:
        One row for each rule: "rule", "stage", "value", "limit", "ratio" (of the value to that of the contender it is
        compared with, if it is) and "passed". What was not measured is None, and "passed" then is, too.
    """
    rows = [_row(run, rule, stage, subject) for rule in rules]
    if rows:
        known = step_files.find(run / FILE) or {"gates": []}
        now = {(row["rule"], row["stage"]) for row in rows}
        others = [row for row in known["gates"] if (row["rule"], row["stage"]) not in now]
        replace_file(run / FILE, dump_json({"gates": [*others, *rows]}))
    return rows


def only(run: Path, rules: Sequence[Rule]) -> None:
    """Drop what gates.json says of rules that are no longer asked for."""
    if known := step_files.find(run / FILE):
        texts = {rule.text for rule in rules}
        replace_file(run / FILE, dump_json({"gates": [row for row in known["gates"] if row["rule"] in texts]}))


def rows_of(run: Path) -> list[dict[str, Any]]:
    """What gates.json says; empty without gates."""
    return (step_files.find(run / FILE) or {"gates": []})["gates"]


def settle(
    run: Path, rules: Sequence[Rule], stage: str, recovers: bool, report: Callable[[], Path]
) -> list[dict[str, Any]]:
    """Check the rules that a stage decides. What recovery may still improve only gives a warning before it.

    Args:
        run: run directory.
        rules: all rules of the run.
        stage: "pruned", "recovered", "compared" (with a random cut and fewer bits) or "bench".
        recovers: whether the run recovers the cut model.
        report: writes the report if a rule fails, and returns its path.
    Returns:
        The rows of ``checked``.
    Raises:
        GateFailed: rules do not hold, or their quantity was not measured; it names each.
    """
    now = needed(rules, "bench" if stage == "bench" else "evaluate", stage == "compared")
    subject = stage if stage in ("pruned", "recovered") else "recovered" if recovers else "pruned"
    failed, rows = [], checked(run, now, stage, subject)
    for rule, row in zip(now, rows, strict=True):
        if row["value"] is None:
            failed.append(f"{rule.quantity.what} was not measured, so {rule.text} could not be checked")
        elif row["passed"] is None:
            console.warn(f"the gate {rule.text!r} was not checked: the run has nothing to compare with")
        elif not row["passed"] and stage == "pruned" and recovers and rule.quantity.recovers:
            console.warn(f"before recovery {_said(row, rule)}")
        elif not row["passed"]:
            failed.append(_said(row, rule))
    if failed:
        cure = f"everything is kept for inspection, see {report()}; keep more or recover longer"
        raise GateFailed("; ".join(failed), cure)
    return rows


def _said(row: Mapping[str, Any], rule: Rule) -> str:
    if rule.of is None:
        value, limit = _shown(row["value"], rule), _shown(row["limit"], rule)
    else:
        value, limit = f"{readable(row['ratio'], 3)} x {OF[rule.of]}", f"{rule.number:g}"
    return f"{rule.quantity.what} is {value}, {rule.text} allows {limit}"


def _shown(value: float, rule: Rule) -> str:
    return gb(value) if rule.quantity.unit == "bytes" else readable(value, 4)


def _row(run: Path, rule: Rule, stage: str, subject: str) -> dict[str, Any]:
    row: dict[str, Any] = {"rule": rule.text, "stage": stage, "value": _value(run, rule, subject), "limit": None}
    other = 1.0 if rule.of is None else _value(run, rule, rule.of)
    if row["value"] is None or other is None:
        return {**row, "ratio": None, "passed": None}
    ratio = row["value"] / other if other else math.inf
    if rule.name == "perplexity" and rule.of:  # perplexities have a largest value, differences of losses have none
        ratio = math.exp(min(_nats(run, subject) - _nats(run, rule.of), MOST_NATS))
    passed = rule.holds(ratio if rule.of else row["value"], rule.number)
    limit = min(rule.number * other, sys.float_info.max)
    return {**row, "limit": limit, "ratio": ratio if rule.of else None, "passed": passed}


def _value(run: Path, rule: Rule, name: str) -> float | None:
    """The value of a rule's quantity for a contender; None if it was not measured."""
    if rule.quantity.measured == "bench":
        bench = step_files.find(run / "bench" / "bench.json")
        model = bench and bench["models"][0 if name == "original" else -1]
        return model and model[BENCHED[rule.name]]["max" if rule.name == "peak" else "median"]
    step = run / f"evaluate-{name}"
    if not (step / "metrics.json").exists():
        return None
    if rule.name == "size":
        return float(step_files.read(step / "size.json")["bytes"])
    found = Metrics.load(step / "metrics.json")
    if rule.name == "perplexity":
        return math.exp(min(found.mean_nll, MOST_NATS))
    return found.kl_divergence if rule.name == "kl" else found.bits_per_byte


def _nats(run: Path, name: str) -> float:
    return Metrics.load(run / f"evaluate-{name}" / "metrics.json").mean_nll
