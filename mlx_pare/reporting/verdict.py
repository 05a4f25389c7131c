"""Was it worth it? The result is compared with its competitors, in sentences. A step measured every number."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean, stdev

from ..base.units import gb, readable
from ..evaluation.metrics import Metrics
from ..store import step_files
from ..store.manifest import Manifest
from ..store.places import CONTENDERS


def metrics(run: Path, names: Sequence[str] | None = None) -> dict[str, tuple[Metrics, int]]:
    """Return the measured contenders: name -> (metrics, bytes of weights). ``names`` restricts them, if an earlier call
    measured more."""
    found = {}
    for name in [n for n, _ in CONTENDERS] if names is None else names:
        path = run / f"evaluate-{name}"
        if (path / "metrics.json").exists():
            found[name] = Metrics.load(path / "metrics.json"), step_files.read(path / "size.json")["bytes"]
    return found


def reconstructed(manifest: Manifest) -> bool:
    """Tell whether the contenders of the result were reconstructed as it was."""
    steps = [manifest.steps.get(f"evaluate-{name}") for name in ("random", "fewer-bits")]
    return all(step.parameters.get("reconstructed") for step in steps if step)


Found = Mapping[str, tuple[Metrics, int]]
LEFT_OUT = "recovery, the random cut, fewer bits and the measurement of speed are left out"
NOT_COMPARED = (
    "**Not compared:** --quick leaves out the random cut and the original with fewer bits, so there is no verdict on "
    "pruning."
)


def first_result(found: Found) -> str:
    """Say what is known as soon as the cut is measured: sizes, perplexity and KL divergence, compared with the
    original."""
    (dense, dense_bytes), (ours, our_bytes) = found["original"], found["pruned"]
    return (
        f"first result: {gb(dense_bytes)} -> {gb(our_bytes)} ({our_bytes / dense_bytes:.0%}), perplexity "
        f"{readable(dense.perplexity, 2)} -> {readable(ours.perplexity, 2)}, KL divergence {ours.kl_divergence:.4f}"
    )


def verdict(found: Found, reconstructed: bool = False) -> str:
    """Say whether pruning was worth it, against the whole model with fewer bits in no more bytes, and against a random
    cut.

    ``reconstructed``: whether those were reconstructed, as the result was.
    """
    if "original" not in found or "pruned" not in found:
        return "Not measured yet."
    dense, dense_bytes = found["original"]
    ours, ours_bytes = found.get("recovered", found["pruned"])
    text = (
        f"{gb(dense_bytes)} -> {gb(ours_bytes)} ({ours_bytes / dense_bytes:.0%}), perplexity "
        f"{readable(dense.perplexity, 2)} -> {readable(ours.perplexity, 2)} (x {readable(ours.times(dense), 3)})."
    )
    if "random" not in found:
        return f"{text} {NOT_COMPARED}"
    luck, chosen = found["random"][0].perplexity, found["pruned"][0].perplexity
    both = "both reconstructed, without recovery" if reconstructed else "both without recovery"
    text += f" A random cut of the same size has {readable(luck, 2)} (the chosen one {readable(chosen, 2)}, {both})."
    text += " **The choice was no better than chance.**" if luck <= chosen else ""
    return f"{text} {_against_fewer_bits(found, ours, reconstructed)}"


def worth_it(found: Found) -> bool | None:
    """Whether the result is better than fewer bits in no more bytes, as ``verdict`` says it; None: not compared."""
    if not {"original", "pruned", "random"} <= {*found}:
        return None
    if "fewer-bits" not in found:
        return True
    difference, error = paired(found.get("recovered", found["pruned"])[0], found["fewer-bits"][0])
    return difference < 0 and abs(difference) >= 2 * error


def _against_fewer_bits(found: Found, ours: Metrics, reconstructed: bool) -> str:
    if "fewer-bits" not in found:
        return "No narrower packing reaches this size, so fewer bits were not an alternative."
    other, size = found["fewer-bits"]
    how = "reconstructed as well, without recovery" if reconstructed else "without recovery"
    perplexity = readable(other.perplexity, 2)
    rival = f"the whole model with fewer bits, {how}, takes {gb(size)} and has perplexity {perplexity}"
    difference, error = paired(ours, other)
    if worth_it(found):
        return f"**Worth it:** {rival}."
    if abs(difference) < 2 * error:
        return (
            f"**Not worth it:** {rival}, which is no measurable difference ({difference:+.4f} ± {error:.4f} nats per "
            "token, paired). Quantize instead: it is simpler."
        )
    return f"**Not worth it:** {rival}. Quantize instead of pruning, or prune further than fewer bits can reach."


def paired(a: Metrics, b: Metrics) -> tuple[float, float]:
    """Return the mean difference of NLL in nats per token, and its standard error, over the windows that both were
    measured on."""
    if len(a.window_nll) != len(b.window_nll) or len(a.window_nll) < 2:
        return a.mean_nll - b.mean_nll, 0.0
    differences = [x - y for x, y in zip(a.window_nll, b.window_nll, strict=True)]
    return fmean(differences), stdev(differences) / math.sqrt(len(differences))
