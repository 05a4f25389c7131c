"""Which experts of a layer survive: criteria propose them, and other text than that of the calibration decides.

Every criterion proposes the experts that it would keep. The block is computed with each of these sets, its router
choosing among them. The set whose output is nearest to that of all experts is kept. The error of a token is divided by
the size of its output: a few tokens with huge states would decide alone otherwise.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from ..arch import Architecture
from ..model.checkpoint import Checkpoint
from ..pruning.plan_file import Plan
from ..stream import memory, walk as stream
from ..stream.experts import Routed
from ..text.corpus import Rows

TINY = 1e-30


@dataclass
class Choice:
    """The experts that criteria propose for a layer, and what the block loses with them.

    ``proposed``: by the name of the criterion, the kept experts, ascending. ``errors``: by the same names, the mean
    over tokens of the squared error over the square of the output.
    """

    layer: int
    proposed: Mapping[str, tuple[int, ...]]
    errors: dict[str, float] = field(default_factory=dict)

    @property
    def best(self) -> str:
        """The criterion whose experts lose least; the first of several that are as good."""
        return min(self.errors, key=self.errors.__getitem__)


def choose_experts(
    model: Path, plan: Plan, scores: Mapping[str, np.ndarray], held: Rows, memory_cap: int | None = None
) -> tuple[Plan, list[Choice]]:
    """Choose the experts of every layer of a plan again, as many as it keeps.

    Args:
        model: model directory.
        plan: the plan; only its experts change.
        scores: criterion -> float [layers, experts].
        held: rows that decide, tokens int32 [rows, length].
        memory_cap: bytes that may be used; None: the memory that is free.
    Returns:
        The plan with the chosen experts, and what was compared, for each layer that loses some.
    Raises:
        Refused: the estimate of memory exceeds the cap.
        PareError: the model computes numbers that are not finite.
    """
    checkpoint = Checkpoint(model)
    memory.check_memory(checkpoint, held, memory_cap)
    full = checkpoint.arch.uniform("expert")
    counts = {layer.source: len(layer.expert) for layer in plan.layers if 0 < len(layer.expert) < full}
    choices = {layer: _proposed(layer, count, scores) for layer, count in counts.items()}
    if choices:
        stream.walk(model, held, _Comparison(checkpoint.arch, choices), what="choose experts: block")
    layers = [
        layer.model_copy(update={"expert": list(choices[layer.source].proposed[choices[layer.source].best])})
        if layer.source in choices
        else layer
        for layer in plan.layers
    ]
    return plan.model_copy(update={"layers": layers}), list(choices.values())


def _proposed(layer: int, count: int, scores: Mapping[str, np.ndarray]) -> Choice:
    kept = {name: np.sort(np.argsort(-found[layer], kind="stable")[:count]) for name, found in scores.items()}
    return Choice(layer, {name: tuple(experts.tolist()) for name, experts in kept.items()})


class _Comparison(stream.Observer):
    """The observer of a walk that computes each block with every set of experts that is proposed for it."""

    def __init__(self, arch: Architecture, choices: Mapping[int, Choice]):
        self.arch, self.choices = arch, choices
        self.sums: dict[tuple[int, ...], mx.array] = {}

    def enter(self, index: int, block: Any, mask: Callable[[], mx.array]) -> None:
        self.sums, self.tokens = {}, mx.array(0.0)
        if index not in self.choices:
            return
        routed = Routed.put(block, self.arch, index)
        self.sums = {kept: mx.array(0.0) for kept in self.choices[index].proposed.values()}

        def compare(x: mx.array, y: mx.array) -> None:
            text, size = mask().astype(mx.float32), mx.square(y.astype(mx.float32)).sum(axis=-1)
            self.tokens = self.tokens + text.sum()
            for kept in self.sums:
                with routed.only(kept):
                    missed = mx.square((routed.module(x) - y).astype(mx.float32)).sum(axis=-1)
                self.sums[kept] = self.sums[kept] + (missed / mx.maximum(size, TINY) * text).sum()
                mx.eval(self.sums[kept])

        routed.watch = compare

    def pending(self) -> Sequence[mx.array]:
        return [self.tokens, *self.sums.values()] if self.sums else []

    def leave(self, index: int, hidden: mx.array) -> None:
        for name, kept in self.choices[index].proposed.items() if self.sums else ():
            self.choices[index].errors[name] = self.sums[kept].item() / max(self.tokens.item(), 1.0)
