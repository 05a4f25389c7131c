"""The plan step of a run: how its sizes are chosen, before `plan` fills them with units.

  even       every axis is cut by the same share, nothing is tried
  uniform    all layers are alike; up to --tries ways to divide the cut between the axes are tried
             (planning/try_candidates.py)
  per-layer  every layer has its own widths: sensitivities, and an integer programme for many variations of them, all
             tried on held-out text; the best few are reconstructed for real, and the best of those is the plan

If layers can be removed, pipeline/choose_layers.py chooses them. Nothing is tried twice (planning/trial_cache.py).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..arch import why_uniform
from ..base import console
from ..base.errors import PareError, Refused, Unsupported, UsageError
from ..gguf import uneven_layers
from ..gguf.special_cases import BY_PLACE
from ..model.checkpoint import Checkpoint
from ..options.settings import CutOptions, Settings
from ..planning import try_candidates
from ..planning.candidate import Candidate, Width, whole
from ..planning.goal import Options, goal
from ..planning.per_layer import Losses, propose, spaces
from ..planning.plan import plan, plan_widths
from ..planning.sensitivity import sensitivity
from ..planning.trial_cache import HELD_TOKENS, candidates_kl, finite, held_rows, plan_kl, written
from ..planning.uniform import splits
from ..pruning.plan_file import Plan
from ..routing import plan_experts
from ..store.arrays import Arrays
from ..store.manifest import Manifest
from ..store.rundir import Run, fingerprint
from ..store.schema import dump_json
from ..text import provenance
from ..text.corpus import Extent
from ..text.splits import Texts
from .choose_layers import best_repaired, layers_by_of, with_layers
from .steps import plan_options

WIDTHS = ("even", "uniform", "per-layer")
TRIES = {"uniform": 12, "per-layer": 50}  # candidates without --tries
FINALISTS = 3  # candidates that are reconstructed
ALIKE = 4  # candidates, at most, whose layers are all alike; the integer programme proposes the others


def plan_step(run: Run, texts: Texts, s: Settings) -> Path:
    """Choose what to keep. People may edit plan.json afterwards.

    Args:
        run: the run directory, with scores.
        texts: of the run.
        s: settings that ``settled`` returned.
    Returns:
        RUN/plan/plan.json.
    Raises:
        UsageError: a target, an axis or a way to choose layers means nothing.
        Refused: the target cannot be reached, the text or what was asked changed, or the memory does not suffice.
        PareError: the run has no scores, or they cannot be read.
    """
    scores = run.output("score", "scores.safetensors")
    names = ("keep", "target_params", "target_size", "mac", "context", "bits", "group_size", "step", "protect")
    asked = {**{name: getattr(s, name) for name in names}, "axes": list(s.axes)}
    if s.mac is None:  # then nothing here depends on the context, but earlier versions noted it
        before = run.manifest.steps.get("plan")
        asked["context"] = before.parameters.get("context") if before else None
    if s.min_speed is not None:
        asked["min_speed"] = s.min_speed
    inputs = {"model": run.manifest.source, "scores": fingerprint(scores)}
    by = layers_by_of(s, Arrays.described(scores, "scores")["criterion"])
    if s.widths != "even" or by is not None:
        provenance.check(run, texts)
    if s.widths != "even":
        asked |= {"widths": s.widths, "tries": tries(s)}
        inputs |= {"data": texts.calibration.digest(), "held": held_rows(texts).digest()}
    if routes := plan_experts.chooses(run, s, scores):
        provenance.check(run, texts)
        asked["experts_by"], inputs["held"] = routes, held_rows(texts).digest()
    if by is not None:
        asked |= {"layers_by": by, "layers by default": s.layers_by is None, "reconstruct": s.reconstruct}
        inputs["held"] = held_rows(texts).digest()
    if s.widths == "per-layer":
        asked |= {"bits of parts": list(s.choose_bits), "reconstruct": s.reconstruct, "seed": s.seed}
        inputs["sensitivity"] = fingerprint(sensitivity_step(run, texts, s))

    def work(directory: Path) -> None:
        most = 0 if s.widths == "even" else tries(s)
        chosen = scores if by is None else with_layers(run, texts, s, most, by, scores, directory)
        made, tried = {"even": _even, "uniform": _uniform, "per-layer": _per_layer}[s.widths](run, texts, s, chosen)
        if by == "kl" and s.layers_by is None and s.reconstruct and s.widths == "uniform":
            made = best_repaired(run, texts, s, made, scores, directory)
        if routes:
            made = plan_experts.with_experts(run, texts, s, made, chosen, directory)
        (directory / "plan.json").write_bytes(made.dump())
        if tried:
            (directory / "tried.json").write_bytes(dump_json({"widths": s.widths, **tried}))

    run.step("plan", asked, inputs, work, editable=True)
    return run.output("plan", "plan.json")


def wants_gguf(s: Settings) -> bool:
    """Tell whether a GGUF file is a condition: by name, or because a program that must load the result reads nothing
    else."""
    return s.gguf is not None or any(name != "mlx" for name in s.runtimes)


def settled(model: Path, s: Settings, begun: str | None = None) -> Settings:
    """Replace the way to choose widths by one that this model, these axes, time and memory allow. A warning names each
    change.

    Args:
        model: model directory.
        s: settings as they were asked.
        begun: how the plan of this run was chosen before; it continues like that, whatever memory is free now.
    Returns:
        The settings to run with.
    Raises:
        UsageError: the way to choose widths is unknown, or bits cannot be chosen with it.
        Refused: a GGUF file is required and cannot be made, or the trials need more memory than --memory-cap allows, or
            (widths per layer) than is free.
    """
    s = plan_experts.settled(Checkpoint(model).arch, with_possible_axes(model, s))
    if wants_gguf(s) and "layer" in s.axes and (architecture := Checkpoint(model).arch.family.gguf) in BY_PLACE:
        raise Refused(
            f"llama.cpp treats the layers of a {architecture} by their place, which a cut changes, and a GGUF file was "
            "asked for",
            "leave layer out of --axes, or leave out --gguf and --runtimes: mlx-lm loads the result",
        )
    if s.widths not in WIDTHS:
        raise UsageError(f"unknown way to choose widths {s.widths!r}", f"choose one of {', '.join(WIDTHS)}")
    if s.choose_bits and (s.widths != "per-layer" or not (s.target_size or s.mac)):
        raise UsageError(
            "bits are chosen together with widths per layer, for a size in bytes",
            "give --widths per-layer and --target-size or --for, or leave out --choose-bits",
        )
    if "hidden" in s.axes:
        if s.widths == "per-layer":
            console.warn("a cut of the hidden size is the same for all layers: every axis is cut by the same share")
        return replace(s, widths="even", choose_bits=())
    if not s.reconstruct and s.widths != "even":
        if s.widths == "per-layer":
            console.warn(
                "without reconstruction nothing is tried, since trials repair: every axis is cut by the same share"
            )
        return replace(s, widths="even", choose_bits=())
    checkpoint = Checkpoint(model)
    if s.widths == "per-layer":
        s = _uneven_if_anything_loads_it(checkpoint, s)
    try:
        if s.widths != begun:
            _check_memory(checkpoint, s)
    except Refused as error:
        if s.widths == "per-layer" or s.memory_cap is not None:
            raise
        if begun != "even":
            console.warn(f"going on without trials, every axis is cut by the same share: {error.problem}")
        s = replace(s, widths="even")
    return s


def _uneven_if_anything_loads_it(checkpoint: Checkpoint, s: Settings) -> Settings:
    """Cut all layers alike if nothing would load layers that differ, and warn.

    Raises Refused if a GGUF file of layers that differ was asked for and cannot be made.
    """
    where = spaces(checkpoint, plan_options(s), True, s.choose_bits)
    if all(space.tied for space in where) and not s.choose_bits:
        why = why_uniform(checkpoint.arch)
        console.warn(f"widths that differ between layers would load nowhere ({why}): all layers are cut alike")
        return replace(s, widths="uniform")
    if wants_gguf(s) and (why := uneven_layers.why_not(checkpoint.arch)):
        if s.gguf or s.choose_bits:
            raise Refused(
                f"there is no GGUF of this model with layers that differ ({why}), and one was asked for",
                "use --widths uniform, or leave out --gguf and --runtimes",
            )
        console.warn(f"llama.cpp would not run layers that differ ({why}): all layers are cut alike")
        return replace(s, widths="uniform")
    return s


def with_possible_axes(model: Path, s: Settings) -> Settings:
    """Remove from the default axes those along which this model cannot be cut; a warning names each. Axes that the user
    asked for stay, and are refused later."""
    if tuple(s.axes) != CutOptions.axes:
        return s
    arch = Checkpoint(model).arch
    if arch.uses("expert") and arch.why_fixed("expert") is None:
        return replace(s, axes=("expert",))
    axes = tuple(axis for axis in s.axes if arch.why_fixed(axis) is None)
    if not axes:
        able = f"give --axes {','.join(arch.cut_axes)}" if arch.cut_axes else None
        raise Unsupported(f"this {arch.family.name} is cut along none of {', '.join(s.axes)}", able)
    for axis in s.axes:
        if why := arch.why_fixed(axis):
            console.warn(f"{arch.family.name} is not cut along {axis}: {why}")
    return replace(s, axes=axes)


def begun(out: Path) -> str | None:
    """Return how the plan of a run directory was chosen; None if it has no plan, or a manifest that cannot be read."""
    try:
        steps = Manifest.read(out / "manifest.json", "run manifest").steps
    except PareError:
        return None
    return steps["plan"].parameters.get("widths", "even") if "plan" in steps else None


def _check_memory(checkpoint: Checkpoint, s: Settings) -> None:
    """Raises Refused if the trials need more memory than may be used."""
    if s.widths == "even":
        return
    rows, held = (Extent(n, s.length) for n in (s.samples, math.ceil(HELD_TOKENS / s.length)))
    try_candidates.check_memory(checkpoint, rows, held, 1, s.memory_cap)  # more candidates take more walks


def tries(s: Settings) -> int:
    """Return how many candidates are tried."""
    return TRIES[s.widths] if s.tries is None else s.tries


def sensitivity_step(run: Run, texts: Texts, s: Settings) -> Path:
    """Measure how much every part of every layer matters.

    Args:
        run: the run directory.
        texts: of the run.
        s: settings of the run.
    Returns:
        RUN/sensitivity/sensitivity.safetensors; see ``sensitivity`` for its arrays.
    Raises:
        Refused: the text or what was asked changed, or the memory does not suffice.
    """
    provenance.check(run, texts)
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


Tried = dict[str, Any]  # what tried.json says; empty if nothing was tried


def _even(run: Run, texts: Texts, s: Settings, scores: Path) -> tuple[Plan, Tried]:
    return plan(run.model, scores, plan_options(s)), {}


def _uniform(run: Run, texts: Texts, s: Settings, scores: Path) -> tuple[Plan, Tried]:
    """Find the best way to divide the cut between the axes; the scores choose the units."""
    options = plan_options(s)
    levels = splits(Checkpoint(run.model), options, tries(s))
    plans = [plan(run.model, scores, options, level) for level in levels]
    if len(plans) == 1:
        return plans[0], {}
    kl = candidates_kl(run, texts, s, [_candidate_of(run, made) for made in plans])
    best = min(range(len(plans)), key=kl.__getitem__)
    _say_best(kl, best, str(levels[best]))
    rows = [{"level": level.counts(), **finite(one)} for level, one in zip(levels, kl, strict=True)]
    return plans[best], {"candidates": rows, "even": 0, "taken": best}


def _per_layer(run: Run, texts: Texts, s: Settings, scores: Path) -> tuple[Plan, Tried]:
    """Find the best of many proposals, which include some ways to cut all layers alike."""
    checkpoint, options, count = Checkpoint(run.model), plan_options(s), tries(s)
    found = Arrays.load(run.output("sensitivity", "sensitivity.safetensors"), "sensitivities")
    losses, where = Losses(found.arrays, found.about["bits"]), spaces(checkpoint, options, True, s.choose_bits)
    alike = _alike(run, scores, options, min(ALIKE, count // 2)) if not s.choose_bits else []
    proposed = propose(checkpoint, losses, goal(checkpoint, options), options, where, count - len(alike), s.seed)
    candidates = list(dict.fromkeys([*alike, *proposed]))
    kl = candidates_kl(run, texts, s, candidates)
    rows = [{"layers": written(c), **finite(one)} for c, one in zip(candidates, kl, strict=True)]
    order = sorted(range(len(rows)), key=kl.__getitem__)[:FINALISTS]
    plans = {i: plan_widths(run.model, scores, candidates[i], losses, options) for i in order}
    try:
        final = {i: plan_kl(run, texts, s, plans[i]) for i in order} if s.reconstruct else {}
    except Refused as error:  # with the held-out rows this needs more memory than reconstruction itself
        console.warn(f"the best are not reconstructed, the order of the trials stands: {error.problem}")
        final = {}
    if final:
        for i, one in final.items():
            rows[i] |= finite(one, "reconstructed_kl")
        order.sort(key=final.__getitem__)
    best = order[0]
    _say_best(kl, best, "all layers alike" if len({*candidates[best]} - {None}) == 1 else "widths per layer")
    tried = {"candidates": rows, "even": 0 if alike else None, "taken": best}
    return plans[best], tried | {"rank_correlation": found.about["rank_correlation"]}


def _alike(run: Run, scores: Path, options: Options, count: int) -> list[Candidate]:
    """Return candidates whose layers are all alike: the even split first, then other divisions of the cut."""
    levels = splits(Checkpoint(run.model), options, count)
    return [_candidate_of(run, plan(run.model, scores, options, level)) for level in levels]


def _candidate_of(run: Run, made: Plan) -> Candidate:
    """Return the widths of a plan, for every layer of the source. A layer without heads keeps all it has instead."""
    arch = Checkpoint(run.model).arch
    full, found = whole(arch), [None] * len(arch.layers)
    for layer in made.layers:
        heads = len(layer.kv_head) if "kv_head" in arch.units(layer.source) else full[layer.source].kv_head
        found[layer.source] = Width(heads, len(layer.ffn))
    return tuple(found)


def _say_best(kl: Sequence[float], best: int, what: str) -> None:
    console.say(f"tried {len(kl)} candidates: KL {min(kl):.4f} to {max(kl):.4f}; taken: {what} ({kl[best]:.4f})")
