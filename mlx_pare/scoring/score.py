"""score: compute Scores from Stats (and weights), by one of the criteria in the table below."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx

from ..arch import Architecture, require_cuttable
from ..base.console import progress
from ..base.errors import PareError, UsageError
from ..model.checkpoint import Checkpoint
from ..sources.open_model import StrPath, opened
from ..store.arrays import Arrays
from . import accumulators, expert, formulas, width
from .source import Source, read_stats

AXES = ("ffn", "kv_head", "hidden", "layer")  # of models without experts


@dataclass(frozen=True)
class Criterion:
    """One way to tell what matters.

    ``ffn``, ``kv_head``, ``hidden``, ``layer``, ``expert``: names of formulas in scoring/formulas.py; None: it has none
    for experts, and no other stands in.
    ``own``: axes for which ``source`` has a formula; on the other axes the named function stands in.
    ``needs``: what it looks at. ``source``: paper or file it is taken from.
    ``extra``: what calibrate measures for it only on request (calibrate.EXTRA).
    """

    name: str
    ffn: str
    kv_head: str
    hidden: str
    layer: str
    own: tuple[str, ...]
    needs: str
    source: str
    extra: tuple[str, ...] = ()
    expert: str | None = "energy"


CRITERIA = {
    c.name: c
    for c in (
        Criterion("obs", "wanda", "wanda", "wanda", "block_influence", (), "activations and weights",
                  "optimal brain surgeon, Hassibi & Stork 1993, greedy: reconstruct chooses the units while it repairs "
                  "(least_squares.py); what stands in decides until then. Of experts those are kept with which a block "
                  "loses least on other text (planning/choose_experts.py)"),
        Criterion("minitron", "minitron", "minitron", "minitron", "block_influence", AXES, "activations",
                  "Muralidharan et al. 2024, arXiv 2407.14679; NVIDIA Model-Optimizer "
                  "modelopt/torch/prune/plugins/mcore_minitron.py"),
        Criterion("magnitude", "magnitude", "magnitude", "magnitude", "magnitude", AXES, "weights",
                  "Li et al. 2017, arXiv 1608.08710, over coupled rows and columns", expert="magnitude"),
        Criterion("wanda", "wanda", "wanda", "wanda", "block_influence", ("ffn", "kv_head", "hidden"),
                  "activations and weights",
                  "Sun et al. 2023, arXiv 2306.11695, summed over a unit as in CASIA-IVA-Lab/FLAP lib/prune.py "
                  "(Wanda-sp); for the hidden size the same over all readers"),
        Criterion("flap", "flap", "flap", "wanda", "block_influence", ("ffn", "kv_head"), "activations and weights",
                  "An et al. 2024, arXiv 2312.11983; CASIA-IVA-Lab/FLAP lib/prune.py, WIFV: how much a unit's output "
                  "fluctuates"),
        Criterion("composite", "composite", "composite", "composite", "block_influence", ("ffn", "kv_head", "hidden"),
                  "activations and weights",
                  "our own: magnitude of the weights, variance and sparsity of the activations, each as a rank within "
                  "its layer, weighted (width.COMPOSITE)"),
        Criterion("taylor", "taylor", "taylor", "minitron", "taylor", ("ffn", "kv_head", "layer"), "gradients",
                  "Molchanov et al. 2017, arXiv 1611.06440: first order, |a * dL/da| per row of text",
                  ("gradients",), expert=None),
        Criterion("taylor2", "taylor2", "taylor2", "minitron", "taylor2", ("ffn", "kv_head", "layer"), "gradients",
                  "Molchanov et al. 2019, arXiv 1906.10771: second order by the empirical Fisher matrix, "
                  "(a * dL/da)^2 per row of text", ("gradients",), expert=None),
        Criterion("iterative", "iterative", "iterative", "minitron", "block_influence", ("ffn", "kv_head"),
                  "activations and weights",
                  "NVIDIA Model-Optimizer modelopt/torch/prune/importance_hooks/base_hooks.py "
                  "(IterativeChannelContributionHook, IndependentKvHeadContributionHook): what is missing from the "
                  "output", ("contributions",), expert=None),
        Criterion("block-influence", "minitron", "minitron", "minitron", "block_influence", ("layer",), "activations",
                  "Men et al. 2024, arXiv 2403.03853 (ShortGPT)"),
        Criterion("angular", "minitron", "minitron", "minitron", "angular", ("layer",), "activations",
                  "Gromov et al. 2024, arXiv 2403.17887; arcee-ai/PruneMe compute_block_similarity/utils.py: the block "
                  "of neighbouring layers that turns the last token of a row least"),
        Criterion("random", "random", "random", "random", "random", AXES, "a seed", "the row every comparison needs",
                  expert="random"),
    )
}  # fmt: skip


def _of_experts(name: str, source: str) -> Criterion:
    return Criterion(name, "", "", "", "block_influence", ("expert",), "router and experts", source, expert=name)


EXPERT_CRITERIA = {  # for models with experts only
    c.name: c
    for c in (
        _of_experts("frequency", "the number of tokens that visit an expert"),
        _of_experts("seer", "Muzio et al. 2024, arXiv 2404.05089 (SEER-MoE): sum of the router's weights"),
        _of_experts("ean", "sum of the norms of an expert's outputs; CerebrasResearch/reap pruning_metrics.py ean_sum"),
        _of_experts("man", "arXiv 2606.15716: mean norm of an expert's outputs"),
        _of_experts("reap", "Lasby et al. 2025, arXiv 2510.13999: mean of weight times norm of an expert's output"),
        _of_experts("energy", "our own: sum of the squares of weight times norm of an expert's output"),
    )
}


def criterion(name: str) -> Criterion:
    """Return a criterion by name. Raises UsageError, listing the names, if the name is unknown."""
    if name not in (known := CRITERIA | EXPERT_CRITERIA):
        raise UsageError(f"unknown criterion {name!r}", f"choose one of {', '.join(known)}")
    return known[name]


def suits(name: str, arch: Architecture) -> Criterion:
    """Return a criterion by name. Raises UsageError if it is unknown, or does not suit a model with or without
    experts."""
    chosen = criterion(name)
    if arch.uses("expert") and chosen.expert is None:
        able = [c.name for c in (CRITERIA | EXPERT_CRITERIA).values() if c.expert]
        raise UsageError(f"the criterion {name} cannot score experts", f"choose one of {', '.join(able)}")
    if not arch.uses("expert") and not chosen.ffn:
        raise UsageError(
            f"the criterion {name} scores experts, and {arch.family.name} has none",
            f"choose one of {', '.join(CRITERIA)}",
        )
    return chosen


def described(stats: Path, name: str) -> dict[str, Any]:
    """Return the description of statistics, if they hold what a criterion needs.

    Raises PareError if they hold too little or cannot be read, UsageError if the criterion is unknown.
    """
    chosen, about = criterion(name), Arrays.described(stats, "statistics")
    if missing := set(chosen.extra) - set(about.get("extra", ())):
        raise PareError(
            f"{stats} holds no {' and '.join(sorted(missing))}, which the criterion {name} needs",
            f"calibrate with --criterion {name}, into another --out",
        )
    return about


def score(model: StrPath, stats: StrPath, out: StrPath, name: str = "obs", seed: int = 0) -> Path:
    """Write the scores of one criterion to ``out``; higher scores mean keep.

    The arrays are float32 and named after the axes: ffn [layers, ffn], kv_head [layers, kv_head], hidden [hidden]
    (summed over both norms of all layers), layer [layers]. The criterion angular adds angles [layers + 1, layers + 1].
    For reading only, the file also holds sparsity [layers, ffn]. Of a model with experts it holds expert
    [layers, expert], NaN in layers without, and layer alone; with obs also expert.NAME for every criterion that is
    tried.

    Args:
        model: model directory, GGUF file, or name of a model that can be downloaded.
        stats: stats.safetensors that calibrate wrote for this model.
        out: file to write; an earlier file of this name is replaced.
        name: the criterion, a key of CRITERIA.
        seed: seed of the criterion random; every file records it.
    Returns:
        ``out``.
    Raises:
        UsageError: the criterion or the name of the model is unknown, or the criterion does not suit the model.
        Unsupported: the model cannot be cut.
        PareError: the statistics cannot be read, are of another model, or hold too little for the criterion; the model
            cannot be opened; ``out`` cannot be written.
    """
    model, stats, out = opened(model), Path(stats), Path(out)
    checkpoint = Checkpoint(model)
    require_cuttable(checkpoint.arch)
    chosen = suits(name, checkpoint.arch)
    about = described(stats, name)
    if about.get("model") != checkpoint.identity():
        raise PareError(f"{stats} was made from another model than {model}", "calibrate this model first")
    source = Source(checkpoint, read_stats(stats), seed, about)

    arrays = _of_routed(source, chosen) if checkpoint.arch.uses("expert") else _arrays(source, chosen)
    if chosen.layer == "angular":
        arrays["angles"] = source.angles()
    Arrays(arrays, {"criterion": name, "seed": seed, "model": checkpoint.identity()}).save(out)
    return out


def _of_routed(source: Source, chosen: Criterion) -> dict[str, mx.array]:
    """Compute the scores of experts and layers. Super experts come before all others, whatever the criterion."""
    names = {"expert": chosen.expert}
    if chosen.name == "obs":
        names |= {f"expert.{name}": name for name in expert.CANDIDATES}
    rows, layers = {name: [] for name in (*names, "layer")}, range(len(source.arch.layers))
    experts, shielded = source.arch.uniform("expert"), expert.super_experts(source)
    with progress(f"score ({chosen.name}): layer", len(layers)) as bar:
        for layer in layers:
            rows["layer"].append(formulas.LAYER[chosen.layer](source, layer))
            for name, formula in names.items():
                if layer in shielded:
                    found = formulas.EXPERT[formula](source, layer)
                    raised = found + (found.max() - found.min() + 1) * (chosen.name != "random")
                    rows[name].append(mx.where(shielded[layer], raised, found))
                else:
                    rows[name].append(mx.full((experts,), mx.nan))
            mx.eval(rows)
            bar.advance()
    return {name: mx.stack(found) for name, found in rows.items()}


def _arrays(source: Source, chosen: Criterion) -> dict[str, mx.array]:
    """Compute the scores of all layers; the hidden size is summed over the norms and the layers. If some layers have no
    heads, heads are not cut: their scores are NaN, and hidden channels have none."""
    arch, hidden, rows = source.arch, mx.zeros((source.arch.sizes["hidden"],)), []
    layers = range(len(arch.layers))
    headed = all(arch.has(layer, "o_proj") for layer in layers)
    none = mx.full((arch.largest("kv_head"),), mx.nan)
    with progress(f"score ({chosen.name}): layer", len(layers)) as bar:
        for layer in layers:
            sums = source.stat(layer, "ffn", "abs_sum"), source.stat(layer, "ffn", "sq_sum")
            row = {
                "ffn": formulas.FFN[chosen.ffn](source, layer),
                "kv_head": formulas.HEADS[chosen.kv_head](source, layer) if headed else none,
                "layer": formulas.LAYER[chosen.layer](source, layer),
                "sparsity": accumulators.sparsity(*sums, source.tokens),
            }
            if headed:
                hidden = hidden + sum(formulas.HIDDEN[chosen.hidden](source, layer, norm) for norm in width.READING)
            mx.eval(hidden, row)
            rows.append(row)
            bar.advance()
    found = {name: mx.stack([row[name] for row in rows]) for name in rows[0]}
    return {**found, "hidden": hidden} if headed else found
