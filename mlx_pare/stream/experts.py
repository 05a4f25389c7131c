"""The feed-forward with experts of a block under watch: what its router chooses, with which weights, and what would
come out if some experts were gone.

No family code is needed: the stock module is called again with other answers in the place of its experts. Answers of
zero give what it adds besides (a shared expert). Unit vectors give the weight of each chosen expert as it multiplies
that expert, whatever the router does to get it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from operator import attrgetter
from typing import Any

import mlx.core as mx

from ..arch import Architecture
from .taps import replace_module

STACK = "expert_up"  # a role that every stack of experts has


@dataclass(frozen=True)
class Chosen:
    """What a router chose for a micro-batch.

    ``experts``: int [rows, tokens, active]. ``weights``: of each in the sum, float32 of that shape. ``outputs``: what
    each expert gave, before its weight, float32 [rows, tokens, active, hidden].
    """

    experts: mx.array
    weights: mx.array
    outputs: mx.array


class _Stack:
    """Stands in for the experts. ``answer`` answers for them if it is set; ``kept`` translates numbers of experts."""

    def __init__(self, module: Any):
        self.module = module
        self.answer: Callable[[mx.array, mx.array], mx.array] | None = None
        self.kept: mx.array | None = None
        self.noting, self.seen = False, (None, None)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.module, name)

    def __call__(self, x: mx.array, indices: mx.array) -> mx.array:
        if self.answer is not None:
            return self.answer(x, indices)
        y = self.module(x, indices if self.kept is None else self.kept[indices])
        if self.noting:
            self.seen = indices, y
        return y


class Routed:
    """Stands in for the module that holds the router and the experts of a block."""

    def __init__(self, module: Any, block: Any, arch: Architecture, index: int):
        self.module, self.shared = module, arch.has(index, "shared_up")
        self.watch: Callable[[mx.array, mx.array], None] | None = None  # called with every input and output
        self._router = [_arrays_of(block, name) for name in _router_arrays(arch, index)]
        self.stack = _Stack(None)

    @classmethod
    def put(cls, block: Any, arch: Architecture, index: int) -> Routed:
        """Put it in the place of the module in a block.

        Args:
            block: the block, changed in place.
            arch: the architecture of the model.
            index: number of the layer, which has experts.
        Returns:
            The stand-in.
        """
        path = arch.path(index, STACK).rpartition(".")[0]
        parent = path.rpartition(".")[0]
        made = replace_module(block, parent, lambda module: cls(module, block, arch, index))
        made.stack = replace_module(made.module, path.removeprefix(f"{parent}."), _Stack)
        return made

    def __getattr__(self, name: str) -> Any:
        return getattr(self.module, name)

    def __call__(self, x: mx.array) -> mx.array:
        y = self.module(x)
        if self.watch is not None:
            self.watch(x, y)
        return y

    def chosen(self, x: mx.array) -> Chosen:
        """Find which experts the router chooses, with which weights.

        Args:
            x: input of the module [rows, tokens, hidden], the very array that the stock forward gives to it.
        Returns:
            What was chosen.
        """
        self.stack.noting = True
        self.module(x)
        experts, outputs = self.stack.seen
        self.stack.noting, self.stack.seen = False, (None, None)
        active, hidden = outputs.shape[-2:]
        found = self._answered(x, mx.broadcast_to(mx.eye(active, hidden), outputs.shape))
        if self.shared:
            found = found - self._answered(x, mx.zeros_like(outputs))
        places = x.shape[:-1]  # some modules flatten the tokens of all rows
        weights = found[..., :active].reshape(*places, active).astype(mx.float32)
        outputs = outputs.reshape(*places, active, hidden).astype(mx.float32)
        return Chosen(experts.reshape(*places, active), weights, outputs)

    def _answered(self, x: mx.array, answer: mx.array) -> mx.array:
        self.stack.answer = lambda _, indices: answer
        try:
            return self.module(x)
        finally:
            self.stack.answer = None

    @contextmanager
    def only(self, kept: Sequence[int]) -> Iterator[None]:
        """Let the module have some of its experts only, as after a cut: the router loses the rows of the others.

        Args:
            kept: numbers of the experts, ascending.
        """
        index = mx.array(list(kept))
        before = [(owner, name, owner[name]) for owner, names in self._router for name in names]
        try:
            for owner, name, array in before:
                owner[name] = array[index]
            self.stack.kept = index
            yield
        finally:
            self.stack.kept = None
            for owner, name, array in before:
                owner[name] = array


def _router_arrays(arch: Architecture, index: int) -> list[str]:
    """The names, inside the block, of everything with a row for each expert, except for the experts."""
    stack = arch.path(index, STACK).rpartition(".")[0]
    specs = arch.family.blocks[arch.layers[index].kind]
    rows = (s for s in specs if s.present(arch.config) and s.dims and s.dims[0] == (("expert",),))
    return [spec.name for spec in rows if not spec.name.startswith(f"{stack}.")]


def _arrays_of(block: Any, name: str) -> tuple[Any, list[str]]:
    """The module that owns a stored tensor, and the names of the arrays in it that make up the tensor."""
    path, _, leaf = name.rpartition(".")
    owner = attrgetter(path)(block) if path else block
    owner = getattr(owner, "inner", owner)
    return owner, [leaf, *(part for part in ("scales", "biases") if leaf == "weight" and part in owner)]
