"""What a plan must reach: a target as a measure of cuts and a bound on it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from ..arch import Architecture, Keep, LayerKeep
from ..base.errors import UsageError
from ..base.units import count, gb
from ..model import footprint
from ..model.checkpoint import Checkpoint
from ..options import option
from ..options.settings import CutOptions, ReachOptions
from ..pruning.layout import smaller, total_bytes
from ..pruning.plan_file import Target
from ..tensors.packing import BITS, GROUP_SIZES, Packing


@dataclass(frozen=True)
class Options:
    """What the user asked of `plan`: exactly one of keep, params, size (bytes) or budget. The budget belongs to --for:
    it gives the bytes of weights, from the architecture and the width of a cached value."""

    keep: float | None = None
    params: float | None = None
    size: float | None = None
    budget: Callable | None = None
    budget_name: str = ""
    axes: Sequence[str] = CutOptions.axes
    bits: int | None = None
    group_size: int = ReachOptions.group_size
    step: int | None = None
    protect: bool = CutOptions.protect

    def __post_init__(self) -> None:
        option.check(self)


def packing_of(options: Options) -> Packing | None:
    """Return the packing that the result must have; None: that of the source."""
    if options.bits is None:
        return None
    if options.bits not in BITS or options.group_size not in GROUP_SIZES:
        raise UsageError(f"MLX packs {', '.join(map(str, BITS))} bits in groups of {', '.join(map(str, GROUP_SIZES))}")
    return Packing(options.bits, options.group_size)


@dataclass(frozen=True)
class Goal:
    """The ``measure`` of a cut must come near ``value``, or with ``at_most`` must not exceed it.

    ``counts`` is "parameters" or "bytes". ``show`` puts a measure into words.
    """

    target: Target
    measure: Callable[[Keep], float]
    value: float
    at_most: bool
    counts: str
    show: Callable[[float], str]


def everything(arch: Architecture) -> Keep:
    """Return the cut that removes nothing."""
    return Keep(tuple(LayerKeep(i) for i in range(len(arch.layers))))


def goal(checkpoint: Checkpoint, options: Options) -> Goal:
    """Turn the one target of the options into a goal. Raises UsageError unless there is exactly one, with a meaning."""
    packing = packing_of(options)

    def parameters(keep: Keep, what: str = "total") -> float:
        return footprint.parameters(smaller(checkpoint, keep, packing))[what]

    def size(keep: Keep, new: Architecture | None = None) -> float:
        return total_bytes(checkpoint, keep, packing, new)

    given = [n for n in ("keep", "params", "size", "budget") if getattr(options, n) is not None]
    if len(given) != 1:
        raise UsageError(
            "give exactly one target", "--keep 0.75, --target-params 24B, --target-size 15GB or --for m4-24gb"
        )
    if options.keep is not None:
        if not 0 < options.keep <= 1:
            raise UsageError(
                f"--keep {options.keep} is not between 0 and 1",
                "0.75 keeps three quarters of the non-embedding parameters",
            )
        whole = parameters(everything(checkpoint.arch), "non_embedding")
        asked = f"keeping {options.keep:g} of the non-embedding parameters"
        return Goal(
            Target(kind="keep", value=options.keep, asked=asked),
            lambda keep: parameters(keep, "non_embedding"),
            options.keep * whole,
            False,
            "parameters",
            lambda v: f"keep {v / whole:.3f}",
        )
    if options.params is not None:
        target = Target(kind="params", value=options.params, asked=f"{count(options.params)} parameters")
        return Goal(target, parameters, options.params, False, "parameters", count)
    if options.size is not None:
        target = Target(kind="size", value=options.size, asked=f"{gb(options.size)} of weights")
        return Goal(target, size, options.size, True, "bytes", gb)

    def over_budget(keep: Keep) -> float:
        new = smaller(checkpoint, keep, packing)
        return size(keep, new) - options.budget(new, checkpoint.value_bytes)

    target = Target(kind="for", value=0, asked=f"fitting {options.budget_name}")
    return Goal(target, over_budget, 0.0, True, "bytes", lambda v: f"{gb(-v)} of headroom")
