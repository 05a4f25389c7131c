"""Taps and stand-ins: modules put in the place of others while a block runs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


class Tap:
    """Stands in for a module and shows an accumulator what goes in (or comes out); otherwise it is the module."""

    def __init__(self, module, accumulator: Any, mask, side: str):
        self.module, self.accumulator, self.mask, self.side = module, accumulator, mask, side

    def __getattr__(self, name):
        return getattr(self.module, name)

    def __call__(self, x):
        y = self.module(x)
        self.accumulator.update(x if self.side == "input" else y, self.mask())
        return y


def replace_module(block: Any, path: str, make: Callable[[Any], Any]) -> Any:
    """Put ``make(module)`` in the place of a submodule of a block, named by its path such as "mlp.down_proj"."""
    parent_path, _, leaf = path.rpartition(".")
    parent = block
    for part in filter(None, parent_path.split(".")):
        parent = getattr(parent, part)
    made = make(getattr(parent, leaf))
    setattr(parent, leaf, made)
    return made
