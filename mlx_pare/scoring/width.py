"""Importance of FFN channels [ffn], query heads [q_head] and hidden channels [hidden]. Higher: keep."""

from __future__ import annotations

from collections.abc import Callable

import mlx.core as mx
import numpy as np

from .accumulators import sparsity
from .source import Source

# The part whose matrices read the output of each norm, and the one that writes back to the residual stream after them.
READING = {"attn_ln": "attention", "ffn_ln": "ffn"}
WRITER = {"attn_ln": "o_proj", "ffn_ln": "down_proj"}


def _columns(source: Source, layer: int, norm: str, of: Callable[[mx.array], mx.array]) -> mx.array:
    """Sums [hidden] over the matrices that read a norm's output."""
    return sum(source.sums(layer, role, of, 0) for role in source.arch.readers(layer, READING[norm]))


def _norm(source: Source, layer: int, site: str) -> mx.array:
    """||x_j||_2 over all calibration tokens."""
    return mx.sqrt(source.stat(layer, site, "sq_sum"))


# ---- minitron: activations only ----


def minitron_ffn(source: Source, layer: int) -> mx.array:
    """sqrt(sum over rows of (mean over tokens of |x|)^2) at the input of down_proj."""
    return mx.sqrt(source.stat(layer, "ffn", "row_sq"))


def minitron_heads(source: Source, layer: int) -> mx.array:
    """L2 over each head's channels at the input of o_proj."""
    q_heads, _, head_dim = source.heads(layer)
    return mx.sqrt(source.stat(layer, "attention", "row_sq").reshape(q_heads, head_dim).sum(axis=1))


def minitron_hidden(source: Source, layer: int, norm: str) -> mx.array:
    """The same at the output of a norm; score() sums it over the layers."""
    return mx.sqrt(source.stat(layer, norm, "row_sq"))


# ---- magnitude: weights only ----


def magnitude_ffn(source: Source, layer: int) -> mx.array:
    """L2 norm of all weights that leave with a channel: its rows of gate and up, its column of down."""
    rows = sum(source.sums(layer, role, mx.square, 1) for role in ("gate_proj", "up_proj"))
    return mx.sqrt(rows + source.sums(layer, "down_proj", mx.square, 0))


def magnitude_heads(source: Source, layer: int) -> mx.array:
    """L2 norm of a head's rows of q and columns of o, and of its share of the k and v rows that its group uses."""
    q_heads, kv_heads, head_dim = source.heads(layer)
    own = source.sums(layer, "q_proj", mx.square, 1) + source.sums(layer, "o_proj", mx.square, 0)
    shared = sum(source.sums(layer, role, mx.square, 1) for role in ("k_proj", "v_proj"))
    group = q_heads // kv_heads
    shared = mx.repeat(shared.reshape(kv_heads, head_dim).sum(axis=1) / group, group)
    return mx.sqrt(own.reshape(q_heads, head_dim).sum(axis=1) + shared)


def magnitude_hidden(source: Source, layer: int, norm: str) -> mx.array:
    """L2 norm of a hidden channel's columns in the matrices that read it and rows in the one that writes it."""
    columns = _columns(source, layer, norm, mx.square)
    return mx.sqrt(columns + source.sums(layer, WRITER[norm], mx.square, 1))


# ---- wanda: |weight| x activation norm, summed over what a unit feeds ----


def wanda_ffn(source: Source, layer: int) -> mx.array:
    """sum_i |W_ij| * ||x_j||_2 over the outputs i of down_proj."""
    return source.sums(layer, "down_proj", mx.abs, 0) * _norm(source, layer, "ffn")


def wanda_heads(source: Source, layer: int) -> mx.array:
    """The same for o_proj, summed over the channels of a head."""
    q_heads, _, head_dim = source.heads(layer)
    columns = source.sums(layer, "o_proj", mx.abs, 0) * _norm(source, layer, "attention")
    return columns.reshape(q_heads, head_dim).sum(axis=1)


def wanda_hidden(source: Source, layer: int, norm: str) -> mx.array:
    """The same for all matrices that read a norm's output."""
    return _columns(source, layer, norm, mx.abs) * _norm(source, layer, norm)


# ---- flap: how much a unit's output fluctuates around its mean, which a bias could stand for ----


def variance(source: Source, layer: int, site: str) -> mx.array:
    """Variance of each channel over all calibration tokens."""
    mean = source.stat(layer, site, "sum") / source.tokens
    return mx.maximum(source.stat(layer, site, "sq_sum") / source.tokens - mx.square(mean), 0)


def flap_ffn(source: Source, layer: int) -> mx.array:
    """WIFV: var_j * sum_i W_ij^2 over the outputs i of down_proj."""
    return variance(source, layer, "ffn") * source.sums(layer, "down_proj", mx.square, 0)


def flap_heads(source: Source, layer: int) -> mx.array:
    """The same for o_proj, summed over the channels of a head (FLAP squares it first, for its z-scores)."""
    columns = variance(source, layer, "attention") * source.sums(layer, "o_proj", mx.square, 0)
    return source.per_head(layer, columns).sum(axis=1)


# ---- composite: three views of a unit, as ranks within the layer, weighted ----

COMPOSITE = {"magnitude": 1 / 3, "variance": 1 / 3, "activity": 1 / 3}  # activity: 1 - sparsity


def rank(values: mx.array) -> mx.array:
    """Ranks from 0 (lowest) to 1 (highest); equal values share their mean rank.

    Ranks, not z-scores: of the three some have a few values a thousand times the rest, which would decide alone.
    """
    found = np.array(values)
    ordered = np.sort(found)
    below, upto = (np.searchsorted(ordered, found, side) for side in ("left", "right"))
    return mx.array(((below + upto - 1) / max(2 * (len(found) - 1), 1)).astype(np.float32))


def composite(views: dict[str, mx.array]) -> mx.array:
    """The weighted sum of the ranks of the views that COMPOSITE names, each [units]."""
    return sum(weight * rank(views[name]) for name, weight in COMPOSITE.items())


def _activity(source: Source, layer: int, site: str) -> mx.array:
    """1 - Hoyer's sparsity of each channel over the tokens."""
    return 1 - sparsity(source.stat(layer, site, "abs_sum"), source.stat(layer, site, "sq_sum"), source.tokens)


def composite_ffn(source: Source, layer: int) -> mx.array:
    """magnitude as ``magnitude_ffn``; variance and activity at the input of down_proj."""
    activity = _activity(source, layer, "ffn")
    magnitude = magnitude_ffn(source, layer)
    return composite({"magnitude": magnitude, "variance": variance(source, layer, "ffn"), "activity": activity})


def composite_heads(source: Source, layer: int) -> mx.array:
    """The same at the input of o_proj: variances summed, activities averaged over the channels of a head."""
    spread = source.per_head(layer, variance(source, layer, "attention")).sum(axis=1)
    activity = source.per_head(layer, _activity(source, layer, "attention")).mean(axis=1)
    return composite({"magnitude": magnitude_heads(source, layer), "variance": spread, "activity": activity})


def composite_hidden(source: Source, layer: int, norm: str) -> mx.array:
    """The same at the output of a norm."""
    magnitude, activity = magnitude_hidden(source, layer, norm), _activity(source, layer, norm)
    return composite({"magnitude": magnitude, "variance": variance(source, layer, norm), "activity": activity})


# ---- taylor, taylor2: what the loss would do; scoring/gradients.py has the formulas ----


def taylor_ffn(source: Source, layer: int) -> mx.array:
    """Mean over rows of |sum over tokens of a * dL/da| at the input of down_proj."""
    return source.stat(layer, "ffn", "gradient_abs")


def taylor_heads(source: Source, layer: int) -> mx.array:
    """The same for a kv head with all that its query heads give to o_proj, in equal parts for these."""
    return source.shared(layer, source.stat(layer, "attention", "gradient_abs"))


def taylor2_ffn(source: Source, layer: int) -> mx.array:
    """Mean over rows of (sum over tokens of a * dL/da)^2 at the input of down_proj."""
    return source.stat(layer, "ffn", "gradient_sq")


def taylor2_heads(source: Source, layer: int) -> mx.array:
    """The same for a kv head with all that its query heads give to o_proj, in equal parts for these."""
    return source.shared(layer, source.stat(layer, "attention", "gradient_sq"))


# ---- iterative: what would be missing from the output; scoring/accumulators.py has the formulas ----


def iterative_ffn(source: Source, layer: int) -> mx.array:
    """When a channel would be removed: 0 first, ffn - 1 last."""
    return source.stat(layer, "ffn", "removal")


def iterative_heads(source: Source, layer: int) -> mx.array:
    """Mean over tokens of ||A_g W_g^T||_2 of a kv head, in equal parts for its query heads."""
    return source.shared(layer, source.stat(layer, "attention", "contribution") / source.tokens)


# ---- random: the row every table needs ----


def random_ffn(source: Source, layer: int) -> mx.array:
    """Drawn by lot, uniform in [0, 1)."""
    return mx.random.uniform(shape=(source.arch.layer_sizes(layer)["ffn"],), key=source.key(layer, "ffn"))


def random_heads(source: Source, layer: int) -> mx.array:
    """Drawn by lot, uniform in [0, 1)."""
    return mx.random.uniform(shape=(source.heads(layer)[0],), key=source.key(layer, "heads"))


def random_hidden(source: Source, layer: int, norm: str) -> mx.array:
    """Drawn by lot, uniform in [0, 1); the same draw in every layer."""
    return mx.random.uniform(shape=(source.arch.sizes["hidden"],), key=source.key(0, norm))
