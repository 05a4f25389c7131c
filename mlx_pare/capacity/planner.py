"""Compute which Mac runs a model, up to which context, and how fast: one row per Mac.

    weights + KV cache and states + activations <= what macOS lets the GPU keep resident

Bytes come from capacity/memory.py and model/footprint.py, budgets from capacity/macs.py, speeds from
capacity/speed.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ..arch import Architecture
from ..model import footprint
from ..options.values import MOST
from . import speed
from .macs import GIB, Budget, Mac
from .memory import Needs

LONGEST_CONTEXT = 1 << 20  # for a config without max_position_embeddings
ROW = (
    "mac", "chip", "memory_gb", "budget_bytes", "weights_bytes", "kv_bytes", "activation_bytes", "total_bytes", "fits",
    "headroom_bytes", "max_context", "decode_tokens_per_s", "prefill_tokens_per_s", "verdict", "headroom_gb",
    "headroom_gib", "state_bytes", "scores_bytes", "load_peak_bytes", "speed_error", "unsure",
)  # fmt: skip
SPEEDS = ("decode_tokens_per_s", "prefill_tokens_per_s")
TIGHT = 0.90  # share of the budget; above it another program or a longer answer may be too much, and mlx-lm warns


@dataclass(frozen=True)
class Weights:
    """What is known of a model's weights.

    ``read_bytes``: bytes that one decoding step reads. ``largest_bytes``: the largest tensor, which exists twice for a
    moment while it is loaded. ``k_quants``: number of weights of K-quant types that a step unpacks.
    """

    nbytes: int
    read_bytes: int
    largest_bytes: int = 0
    k_quants: int = 0


def weights_of(arch: Architecture, nbytes: int) -> Weights:
    """Describe weights of which only the sum is known: all parameters are assumed to be equally wide."""
    flat = footprint.dense(1)
    total = footprint.weight_bytes(arch, flat)
    share = footprint.read_bytes(arch, flat) / total
    return Weights(nbytes, round(nbytes * share), round(nbytes * max(map(flat, arch.tensors())) / total))


def stored(arch: Architecture, storage: footprint.Storage) -> Weights:
    """Count the weights of an architecture in a storage."""
    largest = max(map(storage, arch.tensors()))
    return Weights(footprint.weight_bytes(arch, storage), footprint.read_bytes(arch, storage), largest)


def fit(needs: Needs, weights: Weights, macs: Sequence[Mac], budget: Budget | None = None) -> list[dict[str, Any]]:
    """Assess one model in one use on several Macs.

    Args:
        needs: architecture and use.
        weights: bytes of the weights.
        macs: the Macs.
        budget: how the GPU's share of memory is set; None: the defaults of Budget.
    Returns:
        One row of ``assess`` per Mac.
    """
    return [assess(needs, weights, mac, budget) for mac in macs]


def assess(needs: Needs, weights: Weights, mac: Mac, budget: Budget | None = None) -> dict[str, Any]:
    """Assess one model in one use on one Mac. Whether the model was made for the context is not judged.

    Args:
        needs: architecture and use.
        weights: bytes of the weights.
        mac: the Mac.
        budget: how the GPU's share of memory is set; None: the defaults of Budget.
    Returns:
        mac, chip, memory_gb (GiB), budget_bytes, weights_bytes, kv_bytes (state_bytes is the part of it that does not
        grow), activation_bytes (scores_bytes is its largest matrix of attention scores; in training everything that
        training needs), total_bytes, fits, verdict ("fits", "tight" above nine tenths of the budget, "over"),
        headroom_bytes (negative: that much is missing), the same as headroom_gb (1e9) and headroom_gib (2^30),
        max_context (tokens, a multiple of 256 or what the model was made for; 0: not even 256), load_peak_bytes,
        decode_tokens_per_s and prefill_tokens_per_s (None in training, if the chip is not known well enough, or if the
        model does not fit, because then it is paged), speed_error (share), and unsure: which of "memory", "budget",
        "bandwidth", "tflops" were never verified.
    """
    budget = budget or Budget()
    use, allowed = needs.use, budget.of(mac)
    kv = 0 if use.train else needs.kv(use.context) + needs.state
    scores = 0 if use.train else needs.scores(use.context, mac.generation)
    activations = needs.training(use.context) if use.train else needs.activations(use.context, mac.generation)
    total = weights.nbytes + kv + activations
    fits = total <= allowed
    spare = allowed - total
    runs = fits and not use.train
    return {
        "mac": mac.name,
        "chip": mac.chip,
        "memory_gb": mac.memory_gb,
        "budget_bytes": allowed,
        "weights_bytes": weights.nbytes,
        "kv_bytes": kv,
        "activation_bytes": activations,
        "total_bytes": total,
        "fits": fits,
        "headroom_bytes": spare,
        "max_context": max_context(needs, allowed - weights.nbytes, mac),
        **(speeds(needs, weights, mac) if runs else dict.fromkeys(SPEEDS)),
        "verdict": "over" if not fits else "tight" if total > TIGHT * allowed else "fits",
        "headroom_gb": round(spare / 1e9, 3),
        "headroom_gib": round(spare / GIB, 3),
        "state_bytes": 0 if use.train else needs.state,
        "scores_bytes": scores,
        "load_peak_bytes": weights.nbytes + weights.largest_bytes,
        "speed_error": speed.error(needs, mac),
        "unsure": unsure(mac, budget),
    }


def speeds(needs: Needs, weights: Weights, mac: Mac) -> dict[str, float | None]:
    """Estimate the speeds of a model that fits.

    Args:
        needs: architecture and use.
        weights: bytes of the weights.
        mac: the Mac.
    Returns:
        decode_tokens_per_s and prefill_tokens_per_s; None if the chip is not known well enough.
    """
    decode = speed.decode(needs, weights.read_bytes, mac, weights.k_quants)
    return dict(zip(SPEEDS, (decode, speed.prefill(needs, mac, weights.k_quants)), strict=True))


def weights_only(weights: Weights, mac: Mac, budget: Budget | None = None) -> dict[str, Any]:
    """Make the row of a model of which only the weights are known.

    Args:
        weights: bytes of the weights.
        mac: the Mac.
        budget: how the GPU's share of memory is set; None: the defaults of Budget.
    Returns:
        The keys of ``assess``; unknown values are None. ``fits`` is False if the weights alone are too much, else None.
    """
    allowed = (budget or Budget()).of(mac)
    over = weights.nbytes > allowed
    known = {
        "mac": mac.name,
        "chip": mac.chip,
        "memory_gb": mac.memory_gb,
        "budget_bytes": allowed,
        "weights_bytes": weights.nbytes,
        "fits": False if over else None,
        "verdict": "over" if over else "unknown",
        "unsure": unsure(mac, budget),
    }
    return dict.fromkeys(ROW) | known


def unsure(mac: Mac, budget: Budget | None = None) -> list[str]:
    """List the facts about a Mac that were never verified: "memory", "bandwidth", "tflops", "budget"."""
    found = [cell for cell in ("memory", "bandwidth", "tflops") if mac.unsure(cell)]
    return found + (["budget"] if (budget or Budget()).unsure(mac) else [])


def max_weight_bytes(needs: Needs, mac: Mac, budget: Budget | None = None, tokens_per_s: float | None = None) -> int:
    """Compute how many bytes of weights leave room for everything else.

    Args:
        needs: architecture (as cut) and use.
        mac: the Mac.
        budget: how the GPU's share of memory is set; None: the defaults of Budget.
        tokens_per_s: decoding speed to reach, as if every weight were read for each token; None: any.
    Returns:
        Bytes; 0 if nothing is left.
    Raises:
        UsageError: a speed is given, and the bandwidth of the Mac is not known.
    """
    most = max((budget or Budget()).of(mac) - needs.peak(needs.use.context, mac.generation), 0)
    return most if tokens_per_s is None else min(most, speed.readable_bytes(needs, mac, tokens_per_s))


def curve(needs: Needs, weights: Weights, mac: Mac) -> list[dict[str, int]]:
    """Compute how memory grows with the context on one Mac.

    Args:
        needs: architecture and use.
        weights: bytes of the weights.
        mac: the Mac.
    Returns:
        context, weights_bytes, kv_bytes, activation_bytes (scores_bytes is a part of it) and total_bytes at every
        doubling from 1024 tokens (at most 2^20), and at the context that the model was made for.
    """
    limit = longest(needs.arch)
    contexts = [c for c in (1024 << i for i in range(11)) if c < limit] + [limit]
    points = []
    for context in contexts:
        kv = needs.kv(context) + needs.state
        peak = needs.peak(context, mac.generation)
        kv = 0 if needs.use.train else kv
        points.append({"context": context, "weights_bytes": weights.nbytes, "kv_bytes": kv})
        points[-1] |= {"activation_bytes": peak - kv, "total_bytes": weights.nbytes + peak}
        points[-1]["scores_bytes"] = 0 if needs.use.train else needs.scores(context, mac.generation)
    return points


def longest(arch: Architecture) -> int:
    """Return the context that a model was made for, in tokens."""
    found = arch.config.get("max_position_embeddings")
    return found if isinstance(found, int) and 0 < found <= MOST else LONGEST_CONTEXT


def max_context(needs: Needs, room: int, mac: Mac) -> int:
    """Find the largest context that fits.

    Args:
        needs: architecture and use; in training the context is tokens per row.
        room: bytes for everything besides the weights.
        mac: the Mac.
    Returns:
        Tokens, a multiple of 256 or what the model was made for; 0 if 256 are too many.
    """
    limit = longest(needs.arch)
    step = footprint.KV_STEP
    low, high = 0, -(-limit // step)  # in steps; memory grows with context, so halving finds the last that fits
    while low < high:
        middle = (low + high + 1) // 2
        if needs.peak(min(middle * step, limit), mac.generation) <= room:
            low = middle
        else:
            high = middle - 1
    return min(low * step, limit)
