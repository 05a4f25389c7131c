"""Where mlx-lm's classes keep what all models have: body, blocks, embedding, head."""

from __future__ import annotations

from collections.abc import Callable

import mlx.core as mx
import mlx.nn as nn


def body(model: nn.Module) -> nn.Module:
    """The model up to its final norm, without the head."""
    return model.transformer if "transformer" in model else model.model  # openelm has names of its own


def blocks(model: nn.Module) -> list:
    """The list of transformer blocks itself, so that entries can be replaced."""
    return body(model).layers


def embedding(model: nn.Module) -> nn.Module:
    """The table of token embeddings."""
    inner = body(model)
    return inner.token_embeddings if "token_embeddings" in inner else inner.embed_tokens


def put_embedding(model: nn.Module, embedding: Callable[[mx.array], mx.array]) -> None:
    """Give the model's body another table of token embeddings, which its head does not see."""
    inner = body(model)
    setattr(inner, "token_embeddings" if "token_embeddings" in inner else "embed_tokens", embedding)


def head(model: nn.Module) -> nn.Module:
    """What makes logits of hidden states: a matrix of its own, or the embedding."""
    own = getattr(model, "lm_head", None)
    return embedding(model) if own is None else own


def logit_shape(model: nn.Module) -> tuple[float, float | None]:
    """What the model does with the product of hidden states and head: a factor, and a soft cap or None. The attributes
    are those of mlx_lm/models/granite.py and gemma2.py."""
    return 1 / getattr(model, "logits_scaling", 1.0), getattr(model, "final_logit_softcapping", None)


def each_block(model: nn.Module, call: Callable[[Callable], Callable]) -> None:
    """Give every block another ``__call__``, made by ``call`` from its own: these blocks alone, other models of the
    same class keep theirs. Names of parameters stay."""
    for block in blocks(model):
        cls = type(block)
        block.__class__ = type(cls.__name__, (cls,), {"__call__": call(cls.__call__)})
