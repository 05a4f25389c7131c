"""stability: how much a choice of units depends on the text. How many tokens would have been enough, what other tokens
of the same text would have chosen, and whether a quantized model chooses like a float one.

Scores are compared unit by unit: by Spearman's rank correlation within each layer, and by the units that are kept at
the sizes of a plan. Calibration text alone decides the scores. The cost of a cut is measured on test text.

Rows are taken in a random order, like fewer --samples would be: the first rows in the order of the text would be its
first chapters. Draws share no row.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import mlx.core as mx
import numpy as np

from .. import lm
from ..arch import Architecture
from ..base.errors import UsageError
from ..evaluation.evaluate import evaluate
from ..model.checkpoint import Checkpoint
from ..options.settings import Settings
from ..planning import choose_units
from ..planning.plan import redraw
from ..planning.ranks import rank_correlation
from ..pruning.plan_file import Plan
from ..pruning.prune import prune
from ..pruning.reach import protected_layers
from ..repair.reconstruct import reconstruct
from ..scoring.calibrate import calibrate, calibrate_in_parts
from ..scoring.score import criterion, score
from ..store.arrays import Arrays
from ..store.rundir import Run, fingerprint
from ..store.schema import dump_json
from ..stream import batches
from ..text import provenance
from ..text.corpus import Rows
from ..text.splits import Texts
from .steps import plan_of

SHARES = (1 / 8, 1 / 4, 1 / 2)  # of the calibration rows
DRAWS = 3
ENOUGH = 0.99  # rank correlation above which two sets of scores choose alike

Kept = dict[tuple[str, int], set[int]]  # (axis, layer; -1 for an axis that has none) -> units


def check(criteria: Sequence[str]) -> None:
    """Raises UsageError for unknown criteria, and for those whose statistics are not sums over rows."""
    for name in criteria:
        if extra := criterion(name).extra:
            raise UsageError(
                f"the stability of {name} is not measured: its {' and '.join(extra)} come from another walk",
                "name criteria that need activations or weights",
            )


def stability_step(
    run: Run, texts: Texts, s: Settings, criteria: Sequence[str], draws: int, other: Path | None, measure: bool
) -> Path:
    """Answer the questions for a run's plan and calibration text, in RUN/stability/stability.json.

    Args:
        run: the run directory, with a plan.
        texts: of the run.
        s: settings of the run.
        criteria: their names.
        draws: number of draws of calibration text; 0: none.
        other: the same model before it was quantized; None: it is not compared.
        measure: also make the cuts of the draws, and measure them on the test text.
    Returns:
        The file.
    Raises:
        UsageError: a criterion cannot be judged, the draws are too few or the text is too short, or the other model has
            other sizes.
        Refused: the text changed since it was calibrated on, the tokenizers differ, or the memory does not suffice.
        PareError: the run has no statistics or plan, or the plan does not suit the model.
    """
    check(criteria)
    planned, plan = run.output("plan", "plan.json"), plan_of(run)
    run.output("calibrate", "stats.safetensors")
    provenance.check(run, texts, test=measure)
    if draws == 1 or (measure and not draws):
        raise UsageError(f"{draws} draws have no spread", "ask for at least 2 --draws")
    every = texts.mixed("calibration", None)
    rows, drawn_rows = drawn(every.rows, s.samples, every.lot(s.seed), draws)
    elsewhere = "layers_by" in run.manifest.steps["plan"].parameters  # the criterion did not choose the layers
    question = Question(
        run.model, plan, criteria, rows, drawn_rows, other, texts.test if measure else None,
        s.reconstruct, not elsewhere, s.seed, s.memory_cap,
    )  # fmt: skip

    def work(directory: Path) -> None:
        found = stability(question, directory / "scratch")
        shutil.rmtree(directory / "scratch")
        (directory / "stability.json").write_bytes(dump_json(found))

    asked = {"criteria": list(criteria), "draws": draws, "measure": measure, "reconstruct": s.reconstruct}
    inputs = {"model": run.manifest.source, "plan": fingerprint(planned), "data": texts.calibration.digest()}
    if other is not None:
        inputs["float"] = Checkpoint(other).identity()
    if measure:
        inputs["test"] = texts.test.digest()
    run.step("stability", asked, inputs, work)
    return run.output("stability", "stability.json")


# ---- scores against scores ----


def jaccard(a: set[int], b: set[int]) -> float:
    """Return the share of the units in either set that are in both."""
    return len(a & b) / len(a | b) if a | b else 1.0


def orders(arch: Architecture, scores: Mapping[str, np.ndarray], plan: Plan) -> dict[tuple[str, int], np.ndarray]:
    """Collect the scores of every (axis, layer) that the plan cuts; layers count only if scores choose them.

    Args:
        arch: the model.
        scores: arrays of ``score``: ffn [layers, ffn], kv_head [layers, kv_head], layer [layers], hidden [hidden].
        plan: whose cuts count.
    Returns:
        (axis, layer; -1 for an axis that has none) -> float [units].
    """
    found: dict[tuple[str, int], np.ndarray] = {}
    for layer in plan.layers:
        counts = arch.units(layer.source)
        for axis, units in layer.units().items():
            if len(units) < counts.get(axis, 0):
                found[axis, layer.source] = scores[axis][layer.source]
    if len(plan.layers) < len(arch.layers) and "kept" not in scores:
        found["layer", -1] = scores["layer"]
    if plan.cuts_hidden(arch):
        found["hidden", -1] = scores["hidden"]
    return found


def kept(arch: Architecture, scores: Mapping[str, np.ndarray], plan: Plan) -> Kept:
    """Find the units that scores would keep at the sizes of a plan, for every (axis, layer) that it cuts.

    Args:
        arch: the model.
        scores: arrays of ``score``, as for ``orders``.
        plan: whose sizes count.
    Returns:
        (axis, layer; -1 for an axis that has none) -> indices of the units. Widths are those of the layers in the plan.
    """
    found: Kept = {}
    for layer in plan.layers:
        units = choose_units.units_of(layer.source, scores, {axis: len(kept) for axis, kept in layer.units().items()})
        found |= {(axis, layer.source): set(chosen) for axis, chosen in units.items()}
    planned = {layer.source for layer in plan.layers}
    protected = [i for i in protected_layers(arch) if i in planned]
    found["layer", -1] = set(choose_units.layers_of(arch, scores, len(planned), protected) or ())
    if plan.cuts_hidden(arch):
        found["hidden", -1] = set(choose_units.hidden_of(scores, len(plan.hidden)))
    return {place: found[place] for place in orders(arch, scores, plan)}


def agreement(arch: Architecture, a: Mapping[str, np.ndarray], b: Mapping[str, np.ndarray], plan: Plan) -> dict:
    """Compare two sets of scores of one model.

    Args:
        arch: the model.
        a: arrays of ``score``, as for ``orders``.
        b: the other ones.
        plan: whose cuts count.
    Returns:
        By axis: ``rank_correlation`` and the share of the ``same`` kept units, as means over the layers that are cut;
        ``least_rank_correlation`` and ``least_same`` of any layer; and the values of each layer in ``layers``.
    """
    first, second = orders(arch, a, plan), orders(arch, b, plan)
    ours, theirs = kept(arch, a, plan), kept(arch, b, plan)
    rows: dict[str, list[dict[str, Any]]] = {}
    for axis, layer in first:
        same = len(ours[axis, layer] & theirs[axis, layer]) / max(1, len(ours[axis, layer]))
        correlation = rank_correlation(first[axis, layer], second[axis, layer])
        row = {"layer": None if layer < 0 else layer, "rank_correlation": correlation, "same": same}
        rows.setdefault(axis, []).append(row)
    return {axis: _summed(of) for axis, of in rows.items()}


def _summed(rows: list[dict[str, Any]]) -> dict[str, Any]:
    names = ("rank_correlation", "same")
    means = {name: fmean(row[name] for row in rows) for name in names}
    return {**means, **{f"least_{name}": min(row[name] for row in rows) for name in names}, "layers": rows}


# ---- the questions ----


@dataclass(frozen=True)
class Question:
    """What is asked. ``plan``: whose sizes count. ``rows``: the calibration rows, in the order in which they count.
    ``draws``: rows that share none, the first draw being the beginning of ``rows`` (see ``drawn``). ``other``: the
    model before it was quantized. ``test``: rows on which the cuts of the draws are measured, ``repaired`` or not.
    ``choose_layers``: whether the scores of the criterion chose the plan's layers."""

    model: Path
    plan: Plan
    criteria: Sequence[str]
    rows: Rows
    draws: Sequence[Rows] = ()
    other: Path | None = None
    test: Rows | None = None
    repaired: bool = True
    choose_layers: bool = True
    seed: int = 0
    memory_cap: int | None = None


def stability(q: Question, scratch: Path) -> dict[str, Any]:
    """Answer a question. ``scratch`` is a directory for intermediate results.

    ``criteria``, by name, has four answers. ``tokens``: how the scores of the first SHARES of the rows agree with those
    of all, by axis as ``agreement``, and whether they are ``alike``. ``enough``: the fewest tokens from which on they
    are, None if all are needed. ``draws``: how the draws agree, by axis. ``float``: with the scores of the other model.
    ``cost`` describes the first criterion's cuts: see ``_cost``.

    Raises UsageError for a criterion that it cannot judge, or another model with other sizes, Refused if that has
    another tokenizer; otherwise as ``calibrate`` and the other verbs.
    """
    check(q.criteria)
    if q.other is not None:
        require_parent(q.model, q.other)
    counts = [max(1, round(share * q.rows.count)) for share in SHARES]
    parts = calibrate_in_parts(
        q.model, q.rows, [*counts, *(draw.count for draw in q.draws[:1])], scratch / "parts", q.memory_cap
    )
    steps = sorted({min(end for end in parts if end >= count) for count in counts} - {q.rows.count})
    draws = [
        parts[draw.count] if n == 0 else calibrate(q.model, draw, scratch / f"draw-{n}", q.memory_cap)
        for n, draw in enumerate(q.draws)
    ]
    other = None if q.other is None else calibrate(q.other, q.rows, scratch / "float", q.memory_cap)
    arch, found = Checkpoint(q.model).arch, {}
    for name in q.criteria:
        whole = _scores(q, q.model, parts[q.rows.count], name)
        of_parts = [_scores(q, q.model, parts[count], name) for count in steps]
        against = [
            {"tokens": q.rows.first(count).total, **_agreed(agreement(arch, part, whole, q.plan))}
            for count, part in zip(steps, of_parts, strict=True)
        ]
        found[name] = {"tokens": against, "enough": _enough(against)}
        if draws:
            found[name]["draws"] = _spread(arch, [_scores(q, q.model, stats, name) for stats in draws], q.plan)
        if other is not None:
            found[name]["float"] = _agreed(agreement(arch, whole, _scores(q, q.other, other, name), q.plan))
    answer = {"tokens": q.rows.total, "draw_tokens": [draw.total for draw in q.draws], "criteria": found}
    answer["float"] = None if q.other is None else str(q.other)
    return answer | {"cost": None if q.test is None else _cost(q, draws)}


def drawn(rows: Rows, samples: int, order: np.ndarray, draws: int = DRAWS) -> tuple[Rows, list[Rows]]:
    """Divide the rows of a text into the calibration rows and draws that share no rows.

    Args:
        rows: all rows of the text, int32 [rows, tokens].
        samples: number of calibration rows.
        order: int [rows]: a random order whose first entries are the calibration rows (domains.Domains.lot).
        draws: number of draws.
    Returns:
        The calibration rows, and the draws. A draw has ``samples`` rows, or as many as the text allows, in whole
        micro-batches.
    Raises:
        UsageError: the text is too short for this many draws.
    """
    step = batches.micro_batches(rows)[0].stop
    each = min(samples, rows.count // max(1, draws))
    each = each if each == samples else each // step * step
    if draws and not each:
        raise UsageError(f"{rows.count} rows of {rows.length} tokens are too few for {draws} draws", "give more text")
    return rows.take(order[:samples]), [rows.take(order[n * each : (n + 1) * each]) for n in range(draws)]


def _scores(q: Question, model: Path, stats: Path, name: str) -> Mapping[str, np.ndarray]:
    return choose_units.read_scores(_scored(q, model, stats, name)).arrays


def _scored(q: Question, model: Path, stats: Path, name: str) -> Path:
    """Return the scores next to the statistics; they are made once. Layers that no scores chose stay those of the
    plan."""
    out = stats.parent / f"{name}.safetensors"
    if not out.exists():
        score(model, stats, out, name, q.seed)
        if not q.choose_layers:
            made, layers = choose_units.read_scores(out), {layer.source for layer in q.plan.layers}
            total = len(made.arrays["layer"])
            rows = np.zeros((total + 1, total), np.int32)
            rows[len(layers)] = [i in layers for i in range(total)]
            Arrays({n: mx.array(a) for n, a in {**made.arrays, "kept": rows}.items()}, made.about).save(out)
    return out


def _agreed(axes: dict[str, Any]) -> dict[str, Any]:
    """Add whether two sets of scores choose alike on every axis: their order is almost the same, or the kept units are
    the same."""
    close = (of["rank_correlation"] > ENOUGH or of["same"] == 1 for of in axes.values())
    return {"axes": axes, "alike": all(close)}


def _enough(rows: Sequence[Mapping[str, Any]]) -> int | None:
    found = None
    for row in reversed(rows):  # a smaller part that agrees by luck is not enough
        if not row["alike"]:
            break
        found = row["tokens"]
    return found


def _spread(arch: Architecture, scores: Sequence[Mapping[str, np.ndarray]], plan: Plan) -> dict[str, Any]:
    """Return by axis the rank correlation and the Jaccard index of the kept units: the mean over each pair of draws and
    the layers, and the least."""
    ordered, units = ([of(arch, each, plan) for each in scores] for of in (orders, kept))
    found: dict[str, dict[str, list[float]]] = {}
    for i, j in combinations(range(len(scores)), 2):
        for place in ordered[i]:
            row = found.setdefault(place[0], {"rank_correlation": [], "jaccard": []})
            row["rank_correlation"].append(rank_correlation(ordered[i][place], ordered[j][place]))
            row["jaccard"].append(jaccard(units[i][place], units[j][place]))
    least = {axis: {f"least_{n}": min(values) for n, values in row.items()} for axis, row in found.items()}
    return {axis: {n: fmean(v) for n, v in row.items()} | least[axis] for axis, row in found.items()}


# ---- what the cuts cost ----


def _cost(q: Question, draws: Sequence[Path]) -> dict[str, Any]:
    """Measure perplexity and KL divergence on the test rows if each draw's scores choose the cut (and the same draw
    repairs it). Each has ``values``, ``mean`` and ``stdev``. ``jaccard`` is the Jaccard index of the units that were
    kept in the end, by axis."""
    perplexity, divergence, units = [], [], []
    for rows, stats in zip(q.draws, draws, strict=True):
        made = redraw(q.model, _scored(q, q.model, stats, q.criteria[0]), q.plan)
        repair, cut = (stats.parent / "repair" if q.repaired else None), stats.parent / "model"
        if repair is not None:
            made = reconstruct(q.model, made, rows, repair, memory_cap=q.memory_cap)
        prune(q.model, made, cut, repair=repair)
        measured = evaluate(cut, q.test, teacher=q.model, memory_cap=q.memory_cap)
        shutil.rmtree(cut)
        perplexity.append(measured.perplexity)
        divergence.append(measured.kl_divergence)
        units.append(_units(made))
    pairs = list(combinations(units, 2))
    same = {axis: fmean(jaccard(a[axis], b[axis]) for a, b in pairs) for axis in units[0]} if pairs else {}
    found = {"reconstructed": q.repaired, "criterion": q.criteria[0], "jaccard": same}
    return found | {"perplexity": _mean(perplexity), "kl_divergence": _mean(divergence)}


def _units(made: Plan) -> dict[str, set]:
    """Return all units that a plan keeps, by axis."""
    return {
        "ffn": {(layer.source, unit) for layer in made.layers for unit in layer.ffn},
        "kv_head": {(layer.source, unit) for layer in made.layers for unit in layer.kv_head},
        "layer": {layer.source for layer in made.layers},
    }


def _mean(values: list[float]) -> dict[str, Any]:
    return {"values": values, "mean": fmean(values), "stdev": stdev(values) if len(values) > 1 else None}


# ---- a float parent ----


def require_parent(model: Path, other: Path) -> None:
    """Raises UsageError for a model of other sizes, Refused for another tokenizer."""
    lm.require_same_tokens(model, other)
    arches = [Checkpoint(path).arch for path in (model, other)]
    if len({repr((arch.sizes, arch.layers)) for arch in arches}) > 1:
        raise UsageError(f"{other} has other sizes than {model}", "name the model that it was quantized from")
