"""What recovery minimises per token.

It is the divergence from the teacher, with a share of cross-entropy with the text if asked for, and the distance of
hidden states if layers were cut.

A batch is (tokens [b, length], the teacher's targets, hidden states of the teacher if they are matched). The targets
are full logits [b, length, vocab], or the three arrays of topk_targets.Targets. Hidden states are compared at the
places of teacher.places (Minitron, arXiv:2407.14679: logits alone suffice unless depth is cut much). If the hidden size
was cut, the kept coordinates are compared: the selection is the projection.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from .. import lm
from ..base.errors import UsageError
from ..evaluation import divergence
from ..options.values import SHARE, TEMPERATURE, WEIGHT, require

MATCHES = ("auto", "none", "cosine", "mse")


@dataclass(frozen=True)
class Objective:
    """The parts of the loss.

    ``kind``: a name in divergence.KINDS. ``temperature``: of teacher and student; the divergence is multiplied by its
    square, so that its gradient keeps its size (Hinton et al., arXiv:1503.02531). ``cross_entropy``: its share.
    ``match``: how hidden states are compared ("auto": cosine if layers were cut), with the weight ``match_weight``.
    """

    kind: str = "forward"
    temperature: float = 1.0
    cross_entropy: float = 0.0
    match: str = "auto"
    match_weight: float = 1.0

    def check(self) -> None:
        """Raises UsageError if a kind or matching is unknown, or a number is out of its range."""
        if self.kind not in divergence.KINDS:
            raise UsageError(f"unknown loss {self.kind!r}", f"choose one of {', '.join(divergence.KINDS)}")
        if self.match not in MATCHES:
            raise UsageError(f"unknown matching {self.match!r}", f"choose one of {', '.join(MATCHES)}")
        require("--temperature", self.temperature, TEMPERATURE)
        require("--cross-entropy", self.cross_entropy, SHARE)
        require("--match-weight", self.match_weight, WEIGHT)

    def matching(self, layers_were_cut: bool) -> str:
        """How hidden states are compared: "none", "cosine" or "mse"."""
        return ("cosine" if layers_were_cut else "none") if self.match == "auto" else self.match


class Taps:
    """The hidden states after some blocks of a model, from its last call. Other models of its class stay untouched."""

    def __init__(self, model: nn.Module, layers: Sequence[int]):
        self.layers, self.seen = tuple(layers), {}
        places = {id(block): index for index, block in enumerate(lm.blocks(model))}

        def listening(call: Callable) -> Callable:
            def heard(block: nn.Module, *args: Any, **kwargs: Any) -> Any:
                result = call(block, *args, **kwargs)
                self.seen[places[id(block)]] = result[0] if isinstance(result, tuple) else result
                return result

            return heard

        lm.each_block(model, listening)

    def states(self) -> list[mx.array]:
        """Give the hidden states after the layers, in their order.

        Returns:
            An array [b, length, hidden] for each layer, in the dtype of the model.
        """
        return [self.seen[layer] for layer in self.layers]


def loss_of(objective: Objective, how: str, taps: Taps | None) -> Callable[..., tuple[mx.array, mx.array]]:
    """Make the loss for the trainer: ``loss(model, tokens, *targets, *states) -> (mean, number of tokens)``.

    The loss counts every position, so the rows must not be padded.

    Args:
        objective: the parts of the loss and their weights.
        how: how hidden states are compared: "cosine" or "mse"; without ``taps`` it does not matter.
        taps: the student's hidden states; None: they are not compared.
    Returns:
        The loss. It takes tokens int [b, length], the targets and the states of a batch (see this module), and returns
        two scalars: the mean over the tokens, and b * length.
    """
    share, scale = objective.cross_entropy, objective.temperature**2

    def loss(model: nn.Module, tokens: mx.array, *given: mx.array) -> tuple[mx.array, mx.array]:
        logits = lm.logits(model, tokens)
        count = len(taps.layers) if taps else 0
        targets, states = given[: len(given) - count], given[len(given) - count :]
        total = (1 - share) * scale * apart(objective, targets, logits).mean() if share < 1 else mx.array(0.0)
        if share:
            total = total + share * nn.losses.cross_entropy(
                logits[:, :-1].astype(mx.float32), tokens[:, 1:], reduction="mean"
            )
        for own, wanted in zip(taps.states() if taps else (), states, strict=True):
            total = total + objective.match_weight / count * distance(how, own, wanted)
        return total, mx.array(tokens.size)

    return loss


def apart(objective: Objective, targets: Sequence[mx.array], logits: mx.array) -> mx.array:
    """Compute the divergence of every token from the teacher.

    Args:
        objective: kind and temperature.
        targets: either (logits [..., vocab],) of the teacher, or its stored (ids, log_p, log_tail).
        logits: of the student, [..., vocab].
    Returns:
        float32 [...], nats, not multiplied by temperature^2.
    Raises:
        UsageError: the kind is unknown.
    """
    if len(targets) == 1:
        return divergence.between(objective.kind, targets[0], logits, objective.temperature)
    return divergence.between_top(objective.kind, *targets, logits, objective.temperature)


def distance(how: str, own: mx.array, wanted: mx.array) -> mx.array:
    """Compute the distance of hidden states from those that are wanted.

    Args:
        how: "cosine": 1 - cosine, the mean over the tokens. "mse": the mean square of the error, relative to that of
            ``wanted``.
        own: [..., hidden].
        wanted: [..., hidden].
    Returns:
        A float32 scalar.
    """
    own, wanted = own.astype(mx.float32), wanted.astype(mx.float32)
    if how == "mse":
        return mx.square(own - wanted).mean() / mx.square(wanted).mean()
    product = mx.square(own).sum(axis=-1) * mx.square(wanted).sum(axis=-1)
    return (1 - (own * wanted).sum(axis=-1) * mx.rsqrt(product + 1e-12)).mean()
