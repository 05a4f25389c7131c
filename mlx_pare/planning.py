"""The plan step of a run: how its sizes are chosen, before `plan` fills them with units.

  even       every axis is cut by the same share, nothing is tried
  uniform    all layers alike; every way to divide the cut between the axes is tried (trial.py)
  per-layer  every layer has widths of its own: sensitivities, an integer programme for many variations of them, all
             tried on held-out text; the best few are reconstructed for real, and the best of those is the plan

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

from . import console
from .arch import why_uniform
from .artifacts import Arrays, Plan, dump_json, replace_file
from .checkpoint import Checkpoint
from .corpus import Rows
from .errors import PareError
from .fit.reach import Level
from .plan import Losses, plan, plan_widths, propose, spaces, splits
from .plan.goal import goal
from .reconstruct import reconstructed_kl
from .rundir import Run, fingerprint
from .sensitivity import sensitivity
from .steps import Settings, Texts
from .trial import Candidate, Curve, Curves, Width, try_out

WIDTHS = ("even", "uniform", "per-layer")
HELD_TOKENS = 4096  # on which candidates are tried, at least: of the validation text, never of calibration or test
TRIES = {"uniform": 12, "per-layer": 50}  # candidates, when nobody says how many
FINALISTS = 3  # of them are reconstructed


def plan_step(run: Run, texts: Texts, s: Settings) -> Path:
    """What to keep; plan.json may be edited afterwards."""
    scores = run.output("score", "scores.safetensors")
    names = ("keep", "target_params", "target_size", "mac", "context", "bits", "group_size", "step", "protect")
    asked = {**{name: getattr(s, name) for name in names}, "axes": list(s.axes)}
    inputs = {"model": run.manifest.source, "scores": fingerprint(scores)}
    how = widths_of(run.model, s)
    if how != "even":
        asked |= {"widths": how, "tries": tries(s, how)}
        inputs |= {"data": texts.calibration.digest(), "held": held_rows(texts).digest()}

    def work(directory: Path) -> None:
        made, tried = {"even": _even, "uniform": _uniform, "per-layer": _per_layer}[how](run, texts, s, scores)
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
    alike = [_candidate_of(run, plan(run.model, scores, options, level)) for level in splits(checkpoint, options, 4)]
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
    keys = [known.key(_written(candidate)) for candidate in candidates]
    new = [i for i, key in enumerate(keys) if known.get(key) is None]
    if new:
        made = try_out(
            run.model, [candidates[i] for i in new], calibration, held, _curves(run), s.group_size, s.memory_cap
        )
        known.add({keys[i]: kl for i, kl in zip(new, made.kl, strict=True)})
    return [known.get(key) for key in keys]


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
