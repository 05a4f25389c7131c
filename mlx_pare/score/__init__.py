"""score: Stats (and weights) -> Scores, by one of the criteria in the table below."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from ..errors import PareError, UsageError


@dataclass(frozen=True)
class Criterion:
    """``width``: prefix of the functions in width.py; ``layer``: function in depth.py; ``needs``: what it looks at."""

    name: str
    width: str
    layer: str
    needs: str
    source: str


CRITERIA = {
    c.name: c
    for c in (
        Criterion("obs", "wanda", "block_influence", "activations and weights",
                  "optimal brain surgeon, Hassibi & Stork 1993, greedy: reconstruct chooses the units while it repairs "
                  "(least_squares.py); until then, and for layers and the hidden size, as wanda"),
        Criterion("minitron", "minitron", "block_influence", "activations",
                  "Muralidharan et al. 2024, arXiv 2407.14679; NVIDIA Model-Optimizer "
                  "modelopt/torch/prune/plugins/mcore_minitron.py"),
        Criterion("magnitude", "magnitude", "magnitude", "weights",
                  "Li et al. 2017, arXiv 1608.08710, over coupled rows and columns"),
        Criterion("wanda", "wanda", "block_influence", "activations and weights",
                  "Sun et al. 2023, arXiv 2306.11695, summed over a unit as in CASIA-IVA-Lab/FLAP lib/prune.py "
                  "(Wanda-sp)"),
        Criterion("block-influence", "minitron", "block_influence", "activations",
                  "Men et al. 2024, arXiv 2403.03853 (ShortGPT): for layers; widths as minitron"),
        Criterion("random", "random", "random", "a seed", "the row every comparison needs"),
    )
}  # fmt: skip


def criterion(name: str) -> Criterion:
    """A criterion by name. Raises UsageError, listing the names, when there is none."""
    if name not in CRITERIA:
        raise UsageError(f"unknown criterion {name!r}", f"choose one of {', '.join(CRITERIA)}")
    return CRITERIA[name]


def score(model: Path, stats: Path, out: Path, name: str = "obs", seed: int = 0) -> Path:
    """Write the scores of one criterion to ``out``: mlp [layers, ffn], attention [layers, q_head], attn_ln [hidden],
    ffn_ln [hidden] (summed over layers), layer [layers]; and sparsity [layers, ffn], for reading.

    Raises UsageError for an unknown criterion, PareError when the statistics are of another model.
    """
    import mlx.core as mx

    from .. import observers
    from ..arch import require_cuttable
    from ..artifacts import Arrays
    from ..checkpoint import Checkpoint
    from ..console import progress
    from . import depth, width
    from .source import Source

    chosen = criterion(name)
    checkpoint = Checkpoint(model)
    require_cuttable(checkpoint.arch)
    about = Arrays.load(stats, "statistics").about
    if about.get("model") != checkpoint.identity():
        raise PareError(f"{stats} was made from another model than {model}", "calibrate this model first")
    source = Source(checkpoint, mx.load(str(stats)), seed, about)

    def unit(axis: str) -> Callable:
        return getattr(width, f"{chosen.width}_{axis}")

    per_layer: dict[str, list[mx.array]] = {"mlp": [], "attention": [], "layer": [], "sparsity": []}
    hidden = {norm: mx.zeros((checkpoint.arch.sizes["hidden"],)) for norm in ("attn_ln", "ffn_ln")}
    layers = range(len(checkpoint.arch.layers))
    with progress(f"score ({name}): layer", len(layers)) as bar:
        for layer in layers:
            per_layer["mlp"].append(unit("ffn")(source, layer))
            per_layer["attention"].append(unit("heads")(source, layer))
            per_layer["layer"].append(getattr(depth, chosen.layer)(source, layer))
            sums = source.stat(layer, "ffn", "abs_sum"), source.stat(layer, "ffn", "sq_sum")
            per_layer["sparsity"].append(observers.sparsity(*sums, source.tokens))
            hidden = {norm: total + unit("hidden")(source, layer, norm) for norm, total in hidden.items()}
            mx.eval(hidden, [values[-1] for values in per_layer.values()])
            bar.advance()
    arrays = {key: mx.stack(values) for key, values in per_layer.items()} | hidden
    Arrays(arrays, {"criterion": name, "seed": seed, "model": checkpoint.identity()}).save(out)
    return out
