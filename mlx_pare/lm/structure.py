"""Find the parts that all of mlx-lm's models have: body, blocks, embedding, head."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import mlx.core as mx
import mlx.nn as nn


@dataclass(frozen=True)
class LogitShape:
    """What some models do with the product of hidden states and head to get logits.

    They multiply it by ``factor`` (granite), and keep it within ``cap`` by cap * tanh(x / cap) (gemma2). None: no cap.
    """

    factor: float = 1.0
    cap: float | None = None

    @property
    def plain(self) -> bool:
        """Whether the product is the logits."""
        return self.factor == 1.0 and self.cap is None

    def __call__(self, product: mx.array) -> mx.array:
        """The logits of a product of any shape."""
        scaled = product if self.factor == 1.0 else product * self.factor
        return scaled if self.cap is None else self.cap * mx.tanh(scaled / self.cap)

    def slope(self, logits: mx.array) -> mx.array:
        """Compute the derivative of logits with respect to the product.

        Args:
            logits: logits of any shape.

        Returns:
            The derivative, of the same shape and dtype.
        """
        steep = mx.ones_like(logits) if self.cap is None else 1 - mx.square(logits / self.cap)
        return self.factor * steep


# Names of these parts in mlx-lm's classes; the first that a model has is meant.
BODIES = ("model", "transformer", "backbone")  # of most, of openelm, of nemotron_h
EMBEDDINGS = ("embed_tokens", "token_embeddings", "embeddings")  # the same
NORMS = ("norm", "embedding_norm", "final_layernorm", "norm_f")  # of most, of lfm2, of falcon_h1, of nemotron_h


def _named(module: nn.Module, names: Sequence[str]) -> str:
    return next(name for name in names if hasattr(module, name))


def language(model: nn.Module) -> nn.Module:
    """Return the language model of a multimodal model, or the model itself."""
    return getattr(model, "language_model", model)


def body(model: nn.Module) -> nn.Module:
    """Return the model up to its final norm, without the head."""
    inner = language(model)
    return getattr(inner, _named(inner, BODIES))


def final_norm(model: nn.Module) -> nn.Module:
    """Return the norm behind the last block."""
    inner = body(model)
    return getattr(inner, _named(inner, NORMS))


def blocks(model: nn.Module) -> list:
    """Return the list of transformer blocks itself, so that entries can be replaced."""
    return body(model).layers


def embedding(model: nn.Module) -> nn.Module:
    """Return the table of token embeddings."""
    inner = body(model)
    return getattr(inner, _named(inner, EMBEDDINGS))


def put_embedding(model: nn.Module, embedding: Callable[[mx.array], mx.array]) -> None:
    """Replace the table of token embeddings in the model's body. Call ``head`` before: a tied one is that table.

    Args:
        model: the model, changed in place.
        embedding: int token ids [b, n] -> hidden states [b, n, hidden].
    """
    inner = body(model)
    setattr(inner, _named(inner, EMBEDDINGS), embedding)


def head(model: nn.Module) -> nn.Module:
    """Return what turns hidden states into logits: a separate matrix, or the embedding."""
    own = getattr(language(model), "lm_head", None)
    return embedding(model) if own is None else own


def logit_shape(model: nn.Module) -> LogitShape:
    """Return what the model does with the product of hidden states and head.

    The attributes are those of mlx_lm/models/granite.py and gemma2.py.
    """
    inner = language(model)
    return LogitShape(1 / getattr(inner, "logits_scaling", 1.0), getattr(inner, "final_logit_softcapping", None))


def logits(model: nn.Module, tokens: mx.array, cache: list | None = None) -> mx.array:
    """Compute logits with a head in float32, whatever the model computes in.

    bfloat16 logits between 16 and 32 are an eighth apart, which would be the noise of every divergence.

    Args:
        model: the model.
        tokens: int [rows, length].
        cache: mlx-lm's cache of the tokens before these; None: there are none.
    Returns:
        float32 [rows, length, vocab].
    """
    before = {} if cache is None else {"cache": cache}
    states, readout = body(model)(tokens, **before).astype(mx.float32), head(model)
    return logit_shape(model)(readout.as_linear(states) if hasattr(readout, "as_linear") else readout(states))


def each_block(model: nn.Module, call: Callable[[Callable], Callable]) -> None:
    """Replace the ``__call__`` of every block by what ``call`` makes of it.

    Other models of the same class keep theirs. Names of parameters do not change.
    """
    for block in blocks(model):
        cls = type(block)
        block.__class__ = type(cls.__name__, (cls,), {"__call__": call(cls.__call__)})
