"""Importance of whole layers, one number each. Higher: keep."""

from __future__ import annotations

import mlx.core as mx

from .source import Source


def block_influence(source: Source, layer: int) -> mx.array:
    """1 - mean over tokens of cos(block input, block output)."""
    return 1 - source.stat(layer, "block", "cosine") / source.tokens


def angular(source: Source, layer: int) -> mx.array:
    """The angle between the layer's input and output at the last token of a row, mean over rows. Of more layers at once
    the angle is another than the sum: `plan` chooses by the matrix of them all (planning/choose_units.py)."""
    return source.angles()[layer, layer + 1]


def magnitude(source: Source, layer: int) -> mx.array:
    """L2 norm of all matrices of the layer."""
    arch = source.arch
    roles = (*arch.readers(layer, "attention"), "o_proj", *arch.readers(layer, "ffn"), "down_proj")
    return mx.sqrt(sum(source.sums(layer, role, mx.square, 0).sum() for role in roles))


def taylor(source: Source, layer: int) -> mx.array:
    """Mean over rows of the |slope| of the loss with a factor on all that the layer adds to the stream."""
    return source.stat(layer, "block", "gradient_abs")


def taylor2(source: Source, layer: int) -> mx.array:
    """Mean over rows of that slope squared."""
    return source.stat(layer, "block", "gradient_sq")


def random(source: Source, layer: int) -> mx.array:
    """A number drawn by lot."""
    return mx.random.uniform(key=source.key(layer, "layer"))
