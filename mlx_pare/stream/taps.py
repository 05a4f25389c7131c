"""Taps and stand-ins: modules that take the place of others while a block runs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


class Tap:
    """Stands in for a module and shows an accumulator its input or output. In all else it behaves as the module."""

    def __init__(self, module, accumulator: Any, mask, side: str):
        self.module, self.accumulator, self.mask, self.side = module, accumulator, mask, side

    def __getattr__(self, name):
        return getattr(self.module, name)

    def __call__(self, x):
        y = self.module(x)
        self.accumulator.update(x if self.side == "input" else y, self.mask())
        return y


def replace_module(block: Any, path: str, make: Callable[[Any], Any]) -> Any:
    """Put another module in the place of a submodule of a block.

    Args:
        block: the block, changed in place.
        path: path of the submodule in it, such as "mlp.down_proj".
        make: makes the new module from the one that is there.

    Returns:
        The new module.
    """
    parent_path, _, leaf = path.rpartition(".")
    parent = block
    for part in filter(None, parent_path.split(".")):
        parent = getattr(parent, part)
    made = make(getattr(parent, leaf))
    setattr(parent, leaf, made)
    return made
