"""Importance of FFN channels [ffn], kv heads [kv_head] and hidden channels [hidden]. Higher: keep.

A kv head leaves with its query heads. A formula for query heads is summed over those of each kv head.
"""

from __future__ import annotations

from collections.abc import Callable

import mlx.core as mx
import numpy as np

from .accumulators import sparsity
from .source import Source

# For each norm: the part whose matrices read its output, and the matrix that writes back to the stream after them.
READING = {"attn_norm": "attention", "ffn_norm": "ffn"}
WRITER = {"attn_norm": "o_proj", "ffn_norm": "down_proj"}


def _columns(source: Source, layer: int, norm: str, of: Callable[[mx.array], mx.array]) -> mx.array:
    """Sum ``of`` the weights over the matrices that read a norm's output: [hidden]."""
    return sum(source.sums(layer, role, of, 0) for role in source.arch.readers(layer, READING[norm]))


def _norm(source: Source, layer: int, site: str) -> mx.array:
    """Compute ||x_j||_2 over all calibration tokens."""
    return mx.sqrt(source.stat(layer, site, "sq_sum"))


# ---- minitron: activations only ----


def minitron_ffn(source: Source, layer: int) -> mx.array:
    """Score FFN channels by sqrt(sum over rows of (mean over tokens of |x|)^2) at the input of down_proj.

    Args:
        source: statistics and weights of the model.
        layer: number of the layer.
    Returns:
        float32 [ffn].
    """
    return mx.sqrt(source.stat(layer, "ffn", "row_sq"))


def minitron_heads(source: Source, layer: int) -> mx.array:
    """Score kv heads by the L2 norms of ``minitron_ffn``'s formula over each query head's channels before o_proj.

    Args:
        source: statistics and weights of the model.
        layer: number of the layer.
    Returns:
        float32 [kv_head].
    """
    return mx.sqrt(source.per_head(layer, source.stat(layer, "attention", "row_sq")).sum(axis=2)).sum(axis=1)


def minitron_hidden(source: Source, layer: int, norm: str) -> mx.array:
    """Score hidden channels by ``minitron_ffn``'s formula at the output of a norm; score() sums over the layers.

    Args:
        source: statistics and weights of the model.
        layer: number of the layer.
        norm: "attn_norm" or "ffn_norm".
    Returns:
        float32 [hidden].
    """
    return mx.sqrt(source.stat(layer, norm, "row_sq"))


# ---- magnitude: weights only, without biases ----


def magnitude_ffn(source: Source, layer: int) -> mx.array:
    """Score FFN channels by the L2 norm of the weights that leave with them: rows of gate and up, column of down.

    Args:
        source: statistics and weights of the model.
        layer: number of the layer.
    Returns:
        float32 [ffn].
    """
    rows = sum(source.sums(layer, role, mx.square, 1) for role in ("gate_proj", "up_proj"))
    return mx.sqrt(rows + source.sums(layer, "down_proj", mx.square, 0))


def magnitude_heads(source: Source, layer: int) -> mx.array:
    """Score kv heads by the L2 norms of each query head's rows of q, columns of o, and share of the k and v rows.

    Args:
        source: statistics and weights of the model.
        layer: number of the layer.
    Returns:
        float32 [kv_head].
    """
    return _magnitude_queries(source, layer).sum(axis=1)


def _magnitude_queries(source: Source, layer: int) -> mx.array:
    """Compute the norms that ``magnitude_heads`` sums: [kv_head, group]."""
    rows, columns = source.sums(layer, "q_proj", mx.square, 1), source.sums(layer, "o_proj", mx.square, 0)
    own = source.per_head(layer, rows + columns).sum(axis=2)
    shared = sum(source.sums(layer, role, mx.square, 1) for role in ("k_proj", "v_proj"))
    return mx.sqrt(own + shared.reshape(len(own), -1).sum(axis=1, keepdims=True) / own.shape[1])


def magnitude_hidden(source: Source, layer: int, norm: str) -> mx.array:
    """Score hidden channels by the L2 norm of their columns in the readers of a norm and rows in the writer.

    Args:
        source: statistics and weights of the model.
        layer: number of the layer.
        norm: "attn_norm" or "ffn_norm".
    Returns:
        float32 [hidden].
    """
    columns = _columns(source, layer, norm, mx.square)
    return mx.sqrt(columns + source.sums(layer, WRITER[norm], mx.square, 1))


# ---- wanda: |weight| x activation norm, summed over what a unit feeds ----


def wanda_ffn(source: Source, layer: int) -> mx.array:
    """Score FFN channels by sum_i |W_ij| * ||x_j||_2 over the outputs i of down_proj.

    Args:
        source: statistics and weights of the model.
        layer: number of the layer.
    Returns:
        float32 [ffn].
    """
    return source.sums(layer, "down_proj", mx.abs, 0) * _norm(source, layer, "ffn")


def wanda_heads(source: Source, layer: int) -> mx.array:
    """Score kv heads by ``wanda_ffn``'s formula for o_proj, summed over their channels.

    Args:
        source: statistics and weights of the model.
        layer: number of the layer.
    Returns:
        float32 [kv_head].
    """
    columns = source.sums(layer, "o_proj", mx.abs, 0) * _norm(source, layer, "attention")
    return source.per_head(layer, columns).sum(axis=(1, 2))


def wanda_hidden(source: Source, layer: int, norm: str) -> mx.array:
    """Score hidden channels by ``wanda_ffn``'s formula for all matrices that read a norm's output.

    Args:
        source: statistics and weights of the model.
        layer: number of the layer.
        norm: "attn_norm" or "ffn_norm".
    Returns:
        float32 [hidden].
    """
    return _columns(source, layer, norm, mx.abs) * _norm(source, layer, norm)


# ---- flap: how much a unit's output fluctuates around its mean, which a bias could replace ----


def variance(source: Source, layer: int, site: str) -> mx.array:
    """Compute the variance of each channel over all calibration tokens.

    Args:
        source: statistics and weights of the model.
        layer: number of the layer.
        site: "ffn", "attention", "attn_norm" or "ffn_norm".
    Returns:
        float32 [units] of the site.
    """
    mean = source.stat(layer, site, "sum") / source.tokens
    return mx.maximum(source.stat(layer, site, "sq_sum") / source.tokens - mx.square(mean), 0)


def flap_ffn(source: Source, layer: int) -> mx.array:
    """Score FFN channels by WIFV: var_j * sum_i W_ij^2 over the outputs i of down_proj.

    Args:
        source: statistics and weights of the model.
        layer: number of the layer.
    Returns:
        float32 [ffn].
    """
    return variance(source, layer, "ffn") * source.sums(layer, "down_proj", mx.square, 0)


def flap_heads(source: Source, layer: int) -> mx.array:
    """Score kv heads by WIFV for o_proj, summed over their channels (FLAP squares these first, for its z-scores).

    Args:
        source: statistics and weights of the model.
        layer: number of the layer.
    Returns:
        float32 [kv_head].
    """
    columns = variance(source, layer, "attention") * source.sums(layer, "o_proj", mx.square, 0)
    return source.per_head(layer, columns).sum(axis=(1, 2))


# ---- composite: three views of a unit, as ranks within the layer, weighted ----

COMPOSITE = {"magnitude": 1 / 3, "variance": 1 / 3, "activity": 1 / 3}  # activity: 1 - sparsity


def rank(values: mx.array) -> mx.array:
    """Rank values from 0 (lowest) to 1 (highest); equal values share their mean rank.

    Ranks, not z-scores, because some views have a few values a thousand times the rest. These would decide alone.

    Args:
        values: float32, of any shape.
    Returns:
        Ranks, float32 of the same shape.
    """
    found = np.array(values)
    ordered = np.sort(found, axis=None)
    below, upto = (np.searchsorted(ordered, found, side) for side in ("left", "right"))
    return mx.array(((below + upto - 1) / max(2 * (found.size - 1), 1)).astype(np.float32))


def composite(views: dict[str, mx.array]) -> mx.array:
    """Add the ranks of the views that COMPOSITE names, weighted.

    Args:
        views: values by the name of the view, float32 of one shape.
    Returns:
        Scores, float32 of that shape.
    """
    return sum(weight * rank(views[name]) for name, weight in COMPOSITE.items())


def _activity(source: Source, layer: int, site: str) -> mx.array:
    """Compute 1 - Hoyer's sparsity of each channel over the tokens."""
    return 1 - sparsity(source.stat(layer, site, "abs_sum"), source.stat(layer, site, "sq_sum"), source.tokens)


def composite_ffn(source: Source, layer: int) -> mx.array:
    """Score FFN channels by ranks of ``magnitude_ffn``, and of variance and activity at the input of down_proj.

    Args:
        source: statistics and weights of the model.
        layer: number of the layer.
    Returns:
        float32 [ffn].
    """
    activity = _activity(source, layer, "ffn")
    magnitude = magnitude_ffn(source, layer)
    return composite({"magnitude": magnitude, "variance": variance(source, layer, "ffn"), "activity": activity})


def composite_heads(source: Source, layer: int) -> mx.array:
    """Score kv heads by their query heads' ranks: norms of ``magnitude_heads``, summed variances, mean activities.

    Args:
        source: statistics and weights of the model.
        layer: number of the layer.
    Returns:
        float32 [kv_head].
    """
    magnitude = _magnitude_queries(source, layer)
    spread = source.per_head(layer, variance(source, layer, "attention")).sum(axis=2)
    activity = source.per_head(layer, _activity(source, layer, "attention")).mean(axis=2)
    return composite({"magnitude": magnitude, "variance": spread, "activity": activity}).sum(axis=1)


def composite_hidden(source: Source, layer: int, norm: str) -> mx.array:
    """Score hidden channels by ranks of ``magnitude_hidden``, and of variance and activity at the output of a norm.

    Args:
        source: statistics and weights of the model.
        layer: number of the layer.
        norm: "attn_norm" or "ffn_norm".
    Returns:
        float32 [hidden].
    """
    magnitude, activity = magnitude_hidden(source, layer, norm), _activity(source, layer, norm)
    return composite({"magnitude": magnitude, "variance": variance(source, layer, norm), "activity": activity})


# ---- taylor, taylor2: how the loss would change; scoring/gradients.py has the formulas ----


def taylor_ffn(source: Source, layer: int) -> mx.array:
    """Score FFN channels by the mean over rows of |sum over tokens of a * dL/da| at the input of down_proj.

    Args:
        source: statistics and weights of the model; gradients are among them.
        layer: number of the layer.
    Returns:
        float32 [ffn], in nats.
    """
    return source.stat(layer, "ffn", "gradient_abs")


def taylor_heads(source: Source, layer: int) -> mx.array:
    """Score kv heads by ``taylor_ffn``'s formula at the input of o_proj.

    Args:
        source: statistics and weights of the model; gradients are among them.
        layer: number of the layer.
    Returns:
        float32 [kv_head], in nats.
    """
    return source.stat(layer, "attention", "gradient_abs")


def taylor2_ffn(source: Source, layer: int) -> mx.array:
    """Score FFN channels by the mean over rows of (sum over tokens of a * dL/da)^2 at the input of down_proj.

    Args:
        source: statistics and weights of the model; gradients are among them.
        layer: number of the layer.
    Returns:
        float32 [ffn], in nats^2.
    """
    return source.stat(layer, "ffn", "gradient_sq")


def taylor2_heads(source: Source, layer: int) -> mx.array:
    """Score kv heads by ``taylor2_ffn``'s formula at the input of o_proj.

    Args:
        source: statistics and weights of the model; gradients are among them.
        layer: number of the layer.
    Returns:
        float32 [kv_head], in nats^2.
    """
    return source.stat(layer, "attention", "gradient_sq")


# ---- iterative: what the output would lack; scoring/accumulators.py has the formulas ----


def iterative_ffn(source: Source, layer: int) -> mx.array:
    """Score FFN channels by the place at which they would be removed: 0 first, ffn - 1 last.

    Args:
        source: statistics and weights of the model; contributions are among them.
        layer: number of the layer.
    Returns:
        float32 [ffn].
    """
    return source.stat(layer, "ffn", "removal")


def iterative_heads(source: Source, layer: int) -> mx.array:
    """Score kv heads by the mean over tokens of ||A_g W_g^T||_2 (accumulators.HeadContribution).

    Args:
        source: statistics and weights of the model; contributions are among them.
        layer: number of the layer.
    Returns:
        float32 [kv_head].
    """
    return source.stat(layer, "attention", "contribution") / source.tokens


# ---- random: the row every table needs ----


def random_ffn(source: Source, layer: int) -> mx.array:
    """Draw the scores of FFN channels by lot, uniform in [0, 1).

    Args:
        source: gives the seed and the sizes.
        layer: number of the layer.
    Returns:
        float32 [ffn].
    """
    return mx.random.uniform(shape=(source.arch.layer_sizes(layer)["ffn"],), key=source.key(layer, "ffn"))


def random_heads(source: Source, layer: int) -> mx.array:
    """Score kv heads by lot: the sum of a draw for each of their query heads, uniform in [0, 1).

    Args:
        source: gives the seed and the sizes.
        layer: number of the layer.
    Returns:
        float32 [kv_head].
    """
    sizes = source.arch.layer_sizes(layer)
    return mx.random.uniform(shape=(sizes["kv_head"], sizes["group"]), key=source.key(layer, "heads")).sum(axis=1)


def random_hidden(source: Source, layer: int, norm: str) -> mx.array:
    """Draw the scores of hidden channels by lot, uniform in [0, 1); the same draw in every layer.

    Args:
        source: gives the seed and the sizes.
        layer: number of the layer.
        norm: "attn_norm" or "ffn_norm"; drawn as attn_ln or ffn_ln, the names in earlier versions, whose runs go on.
    Returns:
        float32 [hidden].
    """
    return mx.random.uniform(shape=(source.arch.sizes["hidden"],), key=source.key(0, norm.replace("norm", "ln")))
