"""The plan step of a run: how its sizes are chosen, before `plan` fills them with units.

  even       every axis is cut by the same share, nothing is tried
  uniform    all layers alike; every way to divide the cut between the axes is tried (trial.py)
  per-layer  every layer has widths of its own: sensitivities, an integer programme for many variations of them, all
             tried on held-out text; the best few are reconstructed for real, and the best of those is the plan

Where layers may go, --layers-by tells how they are chosen (drops.py, or a criterion); the units of what is left come
from the scores.

What was tried lies in RUN/trials.json by a hash of everything that it depends on, and is not tried again.
"""

from __future__ import annotations

import hashlib
import json
import math
import shutil
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from . import console
from .arch import why_uniform
from .artifacts import Arrays, Plan, dump_json, replace_file
from .checkpoint import Checkpoint
from .corpus import Rows
from .drops import layers_by_kl, trials
from .errors import PareError, UsageError
from .fit.reach import Level, protected_layers
from .plan import Losses, plan, plan_widths, propose, shape, spaces, splits
from .plan.goal import goal
from .reconstruct import reconstructed_kl
from .rundir import Run, fingerprint
from .score import criterion, score
from .sensitivity import sensitivity
from .steps import Settings, Texts
from .trial import Candidate, Curve, Curves, Width, try_out

WIDTHS = ("even", "uniform", "per-layer")
LAYERS_BY = ("block-influence", "angular", "kl")
HELD_TOKENS = 4096  # on which candidates are tried, at least: of the validation text, never of calibration or test
TRIES = {"uniform": 12, "per-layer": 50}  # candidates, when nobody says how many
FINALISTS = 3  # of them are reconstructed
ALIKE = 4  # ways to cut all layers alike, beside widths of their own


def plan_step(run: Run, texts: Texts, s: Settings) -> Path:
    """What to keep; plan.json may be edited afterwards."""
    scores = run.output("score", "scores.safetensors")
    names = ("keep", "target_params", "target_size", "mac", "context", "bits", "group_size", "step", "protect")
    asked = {**{name: getattr(s, name) for name in names}, "axes": list(s.axes)}
    inputs = {"model": run.manifest.source, "scores": fingerprint(scores)}
    how = widths_of(run.model, s)
    by = layers_by_of(s, Arrays.described(scores, "scores")["criterion"], how)
    if how != "even":
        asked |= {"widths": how, "tries": tries(s, how)}
        inputs |= {"data": texts.calibration.digest(), "held": held_rows(texts).digest()}
    if by is not None:
        asked["layers_by"] = by
    if by == "kl":
        inputs["held"] = held_rows(texts).digest()

    def work(directory: Path) -> None:
        chosen = scores if by is None else _with_layers(run, texts, s, how, by, scores, directory)
        made, tried = {"even": _even, "uniform": _uniform, "per-layer": _per_layer}[how](run, texts, s, chosen)
        if by == "kl" and s.layers_by is None and s.reconstruct and how == "uniform":
            made = _best_repaired(run, texts, s, made, scores, directory)
        (directory / "plan.json").write_bytes(made.dump())
        if tried:
            (directory / "tried.json").write_bytes(dump_json({"widths": how, "candidates": tried}))

    if how == "per-layer":
        sensitivity_step(run, texts, s)
    run.step("plan", asked, inputs, work, editable=True)
    return run.output("plan", "plan.json")


def widths_of(model: Path, s: Settings) -> str:
    """How sizes will be chosen: as asked, or as far as this model and these axes allow, which is said."""
    if s.widths == "even" or "hidden" in s.axes:
        return "even"
    why = why_uniform(Checkpoint(model).arch) if s.widths == "per-layer" else None
    if why is not None:
        console.warn(f"widths that differ between layers would load nowhere ({why}): all layers are cut alike")
        return "uniform"
    return s.widths


def tries(s: Settings, how: str) -> int:
    """How many candidates are tried."""
    return TRIES[how] if s.tries is None else s.tries


def layers_by_of(s: Settings, by_units: str, how: str) -> str | None:
    """How the layers that go are chosen; None: by the scores of the criterion ``by_units``. When nobody says: by KL,
    unless nothing else is tried either or the criterion has a formula of its own for layers.
    Raises UsageError for a way that is not known, and where no layers can go."""
    if s.layers_by not in (None, *LAYERS_BY):
        raise UsageError(f"unknown way to choose layers {s.layers_by!r}", f"choose one of {', '.join(LAYERS_BY)}")
    if s.layers_by is None:
        return "kl" if "layer" in s.axes and how != "even" and "layer" not in criterion(by_units).own else None
    if "layer" not in s.axes:
        raise UsageError(f"--layers-by {s.layers_by} chooses layers, but none may go", "add layer to --axes")
    return s.layers_by


def held_rows(texts: Texts) -> Rows:
    """Rows of the validation text, HELD_TOKENS of them or all there are."""
    rows = texts.validation
    return rows.first(math.ceil(HELD_TOKENS / rows.length))


def sensitivity_step(run: Run, texts: Texts, s: Settings) -> Path:
    """How much every part of every layer matters."""
    held = held_rows(texts)

    def work(directory: Path) -> None:
        sensitivity(
            run.model, texts.calibration, held, directory / "sensitivity.safetensors", s.choose_bits, s.group_size,
            s.memory_cap,
        )  # fmt: skip

    inputs = {"model": run.manifest.source, "data": texts.calibration.digest(), "held": held.digest()}
    run.step("sensitivity", {"bits": list(s.choose_bits), "group_size": s.group_size}, inputs, work)
    path = run.output("sensitivity", "sensitivity.safetensors")
    ranks = Arrays.described(path, "sensitivities")["rank_correlation"]
    console.say("rank correlation of local errors with measured KL: " + _listed(ranks))
    return path


def _listed(numbers: dict[str, float]) -> str:
    return ", ".join(f"{name} {value:.2f}" for name, value in numbers.items())


# ---- whole layers ----


def _with_layers(run: Run, texts: Texts, s: Settings, how: str, by: str, scores: Path, directory: Path) -> Path:
    """The scores with what chooses layers taken from elsewhere; written beside the plan."""
    found, out = Arrays.load(scores, "scores"), directory / f"{by}.safetensors"
    if by == "kl":
        deep = {"kept": _kept_by_kl(run, texts, s, how, directory)}
    else:
        stats = run.output("calibrate", "stats.safetensors")
        deep = Arrays.load(score(run.model, stats, out, by, s.seed), "scores").arrays
        deep = {name: deep[name] for name in ("layer", "angles") if name in deep}
    arrays = {name: array for name, array in found.arrays.items() if name != "angles"} | deep
    Arrays({name: mx.array(array) for name, array in arrays.items()}, {**found.about, "layers_by": by}).save(out)
    return out


def _best_repaired(run: Run, texts: Texts, s: Settings, made: Plan, scores: Path, directory: Path) -> Plan:
    """The layers that trials have chosen, or those of block influence or angular distance, whichever leave the least KL
    divergence once they are reconstructed: that makes up for neighbours more easily than trials without it know
    (benchmarks/LOG.md). Sets that are the same are reconstructed once, and not at all where there is no other."""
    one = made.layers[0]
    hidden = Checkpoint(run.model).arch.sizes["hidden"]
    level, found = Level(len(one.ffn), len(one.kv_head), len(made.layers), hidden), {"kl": made}
    for by in (by for by in LAYERS_BY if by != "kl"):
        other = plan(run.model, _with_layers(run, texts, s, "", by, scores, directory), s.plan_options(), level)
        if all([x.source for x in other.layers] != [x.source for x in each.layers] for each in found.values()):
            found[by] = other
    if len(found) == 1:
        return made
    kl = {by: _reconstructed(run, texts, s, each) for by, each in found.items()}
    noted = json.loads((directory / "layers.json").read_text())
    noted["reconstructed_kl"] = {by: kl[by] if math.isfinite(kl[by]) else None for by in kl}
    (directory / "layers.json").write_bytes(dump_json(noted))
    best = min(kl, key=kl.__getitem__)
    console.say(
        "layers, reconstructed: KL " + ", ".join(f"{by} {one:.4f}" for by, one in kl.items()) + f"; taken: {best}"
    )
    return found[best]


def _kept_by_kl(run: Run, texts: Texts, s: Settings, how: str, directory: Path) -> np.ndarray:
    """int32 [layers + 1, layers]: row n marks the layers that are kept when n are, for every n that a level may ask
    for. What went, and the KL divergence after each, is written to layers.json."""
    checkpoint, options, held = Checkpoint(run.model), s.plan_options(), held_rows(texts)
    total, known = len(checkpoint.arch.layers), _Known(run, held.digest(), "layers")
    most = {"uniform": max(1, tries(s, "uniform")), "per-layer": ALIKE}
    levels = [shape(checkpoint, options).level] if how == "even" else splits(checkpoint, options, most[how])
    protected = protected_layers(checkpoint.arch) if s.protect else []
    kept, drops = np.zeros((total + 1, total), np.int32), {}
    for count in sorted({level.layer for level in levels}):
        gone = layers_by_kl(
            run.model, count, held, protected, tried=_once(known, trials(run.model, held, s.memory_cap))
        )
        kept[count] = [i not in {drop.layer for drop in gone} for i in range(total)]
        drops[count] = [asdict(drop) for drop in gone]
    (directory / "layers.json").write_bytes(dump_json({"by": "kl", "held_tokens": held.total, "drops": drops}))
    told = ", ".join(f"{drop['layer']} (KL {drop['kl']:.4f})" for drop in drops[min(drops)])
    console.say(f"layers that go, one after the other: {told or 'none'}")
    return kept


# ---- the three ways ----


def _even(run: Run, texts: Texts, s: Settings, scores: Path) -> tuple[Plan, list]:
    return plan(run.model, scores, s.plan_options()), []


def _uniform(run: Run, texts: Texts, s: Settings, scores: Path) -> tuple[Plan, list[dict[str, Any]]]:
    """The best way to divide the cut between the axes; units by the scores."""
    options = s.plan_options()
    levels = splits(Checkpoint(run.model), options, max(1, tries(s, "uniform")))
    plans = [plan(run.model, scores, options, level) for level in levels]
    if len(plans) == 1:
        return plans[0], []
    kl = _tried(run, texts, s, [_candidate_of(run, made) for made in plans])
    rows = [{"level": asdict(level), "kl": one} for level, one in zip(levels, kl, strict=True)]
    best = min(range(len(plans)), key=kl.__getitem__)
    _say_best(rows, best, lambda row: str(Level(**row["level"])))
    return plans[best], rows


def _per_layer(run: Run, texts: Texts, s: Settings, scores: Path) -> tuple[Plan, list[dict[str, Any]]]:
    """The best of many proposals, the way to cut all layers alike among them."""
    checkpoint, options = Checkpoint(run.model), s.plan_options()
    found = Arrays.load(run.output("sensitivity", "sensitivity.safetensors"), "sensitivities")
    losses = Losses(found.arrays, found.about["bits"])
    wanted = goal(checkpoint, options)
    alike = [
        _candidate_of(run, plan(run.model, scores, options, level)) for level in splits(checkpoint, options, ALIKE)
    ]
    candidates = propose(
        checkpoint, losses, wanted, options, spaces(checkpoint, options, True, s.choose_bits), tries(s, "per-layer"),
        s.seed,
    )  # fmt: skip
    candidates = list(dict.fromkeys([*candidates[: max(1, tries(s, "per-layer") - len(alike))], *alike]))
    kl = _tried(run, texts, s, candidates)
    rows = [{"layers": _written(c), "kl": one} for c, one in zip(candidates, kl, strict=True)]
    order = sorted(range(len(rows)), key=kl.__getitem__)[:FINALISTS]
    plans = {i: plan_widths(run.model, scores, candidates[i], losses, options) for i in order}
    for i in order if s.reconstruct else ():
        rows[i]["reconstructed_kl"] = _reconstructed(run, texts, s, plans[i])
    best = min(order, key=lambda i: rows[i].get("reconstructed_kl", kl[i]))
    _say_best(rows, best, lambda row: "widths of their own" if isinstance(row["layers"], list) else "")
    return plans[best], rows


def _candidate_of(run: Run, made: Plan) -> Candidate:
    """The widths of a plan, for every layer of the source."""
    kept = {layer.source: Width(len(layer.kv_head), len(layer.ffn)) for layer in made.layers}
    return tuple(kept.get(i) for i in range(len(Checkpoint(run.model).arch.layers)))


def _written(candidate: Candidate) -> list[dict[str, int] | None]:
    return [None if w is None else {k: v for k, v in asdict(w).items() if v is not None} for w in candidate]


def _say_best(rows: Sequence[dict[str, Any]], best: int, name: Callable[[dict[str, Any]], str]) -> None:
    kl = sorted(row["kl"] for row in rows)
    taken = f"{name(rows[best])} ({rows[best]['kl']:.4f})"
    console.say(f"tried {len(rows)} candidates: KL {kl[0]:.4f} to {kl[-1]:.4f}; taken: {taken}")


# ---- trials, each done once ----


class _Known:
    """RUN/trials.json: results by a hash of what they depend on."""

    def __init__(self, run: Run, *about: str):
        self.file, self.about = run.path / "trials.json", [run.manifest.source, *about]
        try:
            self.found: dict[str, float] = json.loads(self.file.read_text()) if self.file.exists() else {}
        except ValueError as error:
            raise PareError(f"{self.file} is damaged", "delete it: what it holds is tried again") from error

    def key(self, what: Any) -> str:
        return hashlib.sha256(dump_json({"about": self.about, "what": what})).hexdigest()

    def add(self, found: dict[str, float]) -> None:
        self.found |= {key: kl if math.isfinite(kl) else None for key, kl in found.items()}
        replace_file(self.file, dump_json(self.found))

    def get(self, key: str) -> float | None:
        """None when it is not known; infinite for what was given up."""
        return (math.inf if self.found[key] is None else self.found[key]) if key in self.found else None


def _tried(run: Run, texts: Texts, s: Settings, candidates: Sequence[Candidate]) -> list[float]:
    """The KL divergence of every candidate."""
    calibration, held = texts.calibration, held_rows(texts)
    known = _Known(run, calibration.digest(), held.digest(), str(s.group_size))

    def tried(new: Sequence[Candidate]) -> list[float]:
        return try_out(run.model, new, calibration, held, _curves(run), s.group_size, s.memory_cap).kl

    return _once(known, tried)(candidates)


def _once(known: _Known, tried: Callable[[Sequence[Candidate]], Sequence[float]]) -> Callable:
    """Trials of which those are left out that were made before."""

    def all_of(candidates: Sequence[Candidate]) -> list[float]:
        keys = [known.key(_written(candidate)) for candidate in candidates]
        new = [i for i, key in enumerate(keys) if known.get(key) is None]
        if new:
            made = tried([candidates[i] for i in new])
            known.add({keys[i]: kl for i, kl in zip(new, made, strict=True)})
        return [known.get(key) for key in keys]

    return all_of


def _curves(run: Run) -> Curves:
    """The orders in which units go, as far as sensitivity has found them."""
    file = run.directory("sensitivity") / "sensitivity.safetensors"
    if not file.exists():
        return {}
    arrays = Arrays.load(file, "sensitivities").arrays
    keys = [name.split(".") for name in arrays if name.endswith(".order")]
    return {
        (int(layer), part): Curve(arrays[f"{layer}.{part}.order"].astype(int), arrays[f"{layer}.{part}.loss"])
        for layer, part, _ in keys
    }


def _reconstructed(run: Run, texts: Texts, s: Settings, made: Plan) -> float:
    """The KL divergence of a plan that is really reconstructed."""
    calibration, held = texts.calibration, held_rows(texts)
    known = _Known(run, calibration.digest(), held.digest(), "reconstructed")
    key = known.key([layer.model_dump() for layer in made.layers])
    if known.get(key) is None:
        scratch = run.path / "finalist.tmp"
        known.add({key: reconstructed_kl(run.model, made, calibration, held, scratch, s.memory_cap)})
        shutil.rmtree(scratch, ignore_errors=True)
    return known.get(key)
