"""Named axes, and dimensions made of them: which entries of a tensor belong to which units."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod


@dataclass(frozen=True)
class Axis:
    """One axis.

    ``scope``: "model" (one set of indices for all layers) or "layer". ``factors``: the axes that it is the product of.
    """

    name: str
    scope: str
    factors: tuple[str, ...] = ()


AXES = {
    axis.name: axis
    for axis in (
        Axis("layer", "model"),
        Axis("vocab", "model"),
        Axis("hidden", "model"),
        Axis("ffn", "layer"),
        Axis("kv_head", "layer"),
        Axis("group", "layer"),  # query heads that share one kv_head
        Axis("q_head", "layer", ("kv_head", "group")),
        Axis("head_dim", "layer"),
        Axis("expert", "layer"),
        Axis("expert_ffn", "layer"),  # width of one expert
        Axis("shared_ffn", "layer"),  # width of the experts that every token visits
        Axis("active", "layer"),  # experts one token visits; no tensor has this axis
        Axis("expert_latent", "layer"),  # what the experts see, if it is not the hidden size
        Axis("q_latent", "layer"),  # multi-head latent attention: rank of the queries,
        Axis("kv_latent", "layer"),  # of keys and values,
        Axis("nope_dim", "layer"),  # the parts of a head without rope,
        Axis("rope_dim", "layer"),  # with rope,
        Axis("v_dim", "layer"),  # and of its values
        Axis("linear_k_head", "layer"),  # linear attention and state-space layers
        Axis("linear_v_head", "layer"),
        Axis("linear_k_dim", "layer"),
        Axis("linear_v_dim", "layer"),
        Axis("conv_kernel", "layer"),  # positions a short convolution sees,
        Axis("conv_tail", "layer"),  # all but the newest of them
        Axis("layer_vocab", "model"),  # an embedding for every layer
        Axis("layer_input", "model"),
        Axis("altup", "model"),  # copies of the hidden state in gemma3n,
        Axis("laurel", "layer"),  # and the rank of the path around its layers
        Axis("one", "model"),
    )
}

UNITS = ("ffn", "kv_head", "expert")  # the axes of which a plan lists the kept units of every layer

Segment = tuple[str, ...]
Dim = tuple[Segment, ...]


def dim(text: str) -> Dim:
    """Parse "a*b + c" into segments of primitive axes; nested axes such as q_head become their factors.

    Raises ValueError for an unknown axis.
    """
    segments = []
    for part in text.split("+"):
        names = [name.strip() for name in part.split("*")]
        unknown = [name for name in names if name not in AXES]
        if unknown:
            raise ValueError(f"unknown axis {unknown[0]!r} in {text!r}")
        segments.append(tuple(p for name in names for p in (AXES[name].factors or (name,))))
    return tuple(segments)


def length(dimension: Dim, sizes: Mapping[str, int]) -> int:
    """How many entries a dimension has, given the size of each axis."""
    return sum(prod(sizes[axis] for axis in segment) for segment in dimension)


def select(
    dimension: Dim, sizes: Mapping[str, int], keep: Mapping[str, Sequence[int]], only: int | None = None
) -> list[int] | None:
    """Find the kept indices along a dimension, row-major within each segment.

    Args:
        dimension: the dimension, as ``dim`` gives it.
        sizes: the size of each axis before the cut.
        keep: the kept units of each axis that is cut; all units of other axes stay.
        only: the number of one segment, to get its indices alone; None: all segments.
    Returns:
        Indices along the whole dimension; None if nothing on it is cut and ``only`` is None.
    """
    if only is None and not any(axis in keep for segment in dimension for axis in segment):
        return None
    kept, offset = [], 0
    for number, segment in enumerate(dimension):
        if only not in (None, number):
            offset += prod(sizes[axis] for axis in segment)
            continue
        index = [offset]
        for i, axis in enumerate(segment):
            stride = prod(sizes[a] for a in segment[i + 1 :])
            units = keep.get(axis, range(sizes[axis]))
            steps = units if stride == 1 else [unit * stride for unit in units]
            index = [start + step for start in index for step in steps]
        kept += index
        offset += prod(sizes[axis] for axis in segment)
    return kept
