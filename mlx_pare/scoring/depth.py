"""Importance of whole layers, one number for each. Higher: keep."""

from __future__ import annotations

import mlx.core as mx

from .source import Source


def block_influence(source: Source, layer: int) -> mx.array:
    """Score a layer by 1 - mean over tokens of cos(block input, block output).

    Args:
        source: statistics and weights of the model.
        layer: number of the layer.
    Returns:
        float32 [].
    """
    return 1 - source.stat(layer, "block", "cosine") / source.tokens


def angular(source: Source, layer: int) -> mx.array:
    """Score a layer by the angle between its input and output at the last token of a row, mean over rows.

    The angle of several layers together is not the sum of theirs. So `plan` chooses by the matrix of all angles
    (planning/choose_units.py).

    Args:
        source: statistics and weights of the model.
        layer: number of the layer.
    Returns:
        Angle / pi, from 0 to 1, float32 [].
    Raises:
        PareError: the statistics hold no angles.
    """
    return source.angles()[layer, layer + 1]


def magnitude(source: Source, layer: int) -> mx.array:
    """Score a layer by the L2 norm of all its matrices.

    Args:
        source: statistics and weights of the model.
        layer: number of the layer.
    Returns:
        float32 [].
    """
    arch = source.arch
    roles = [*arch.readers(layer, "attention"), *arch.readers(layer, "ffn"), *arch.writers(layer)]
    if arch.uses("expert"):
        roles = [tensor.spec.role for tensor in arch.tensors() if tensor.layer == layer and tensor.matrix]
    return mx.sqrt(sum(source.sums(layer, role, mx.square, 0).sum() for role in roles))


def taylor(source: Source, layer: int) -> mx.array:
    """Score a layer by the mean over rows of |slope| of the loss with a factor on all that it adds to the stream.

    Args:
        source: statistics and weights of the model; gradients are among them.
        layer: number of the layer.
    Returns:
        float32 [], in nats.
    """
    return source.stat(layer, "block", "gradient_abs")


def taylor2(source: Source, layer: int) -> mx.array:
    """Score a layer by the mean over rows of the slope in ``taylor``, squared.

    Args:
        source: statistics and weights of the model; gradients are among them.
        layer: number of the layer.
    Returns:
        float32 [], in nats^2.
    """
    return source.stat(layer, "block", "gradient_sq")


def random(source: Source, layer: int) -> mx.array:
    """Draw the score of a layer by lot.

    Args:
        source: gives the seed.
        layer: number of the layer.
    Returns:
        Uniform in [0, 1), float32 [].
    """
    return mx.random.uniform(key=source.key(layer, "layer"))
