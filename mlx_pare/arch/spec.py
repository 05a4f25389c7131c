"""Named axes: the vocabulary in which every model family is described.

A model is a table of tensors whose dimensions lie on axes such as ``hidden`` or ``kv_head``. Pruning is choosing the
indices to keep on an axis; counting, planning, slicing and renaming all read the same table.

A dimension is a concatenation of segments, each a product of axes, written as people write it::

    "kv_head*group*head_dim"                                       rows of q_proj
    "q_head*head_dim + kv_head*head_dim + kv_head*head_dim"        rows of a fused qkv
    "ffn + ffn"                                                    rows of a fused gate and up

Indices are logical: a quantized tensor has the same dimensions, only quantized.py knows about its packed words.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product
from math import prod
from typing import Any

from ..errors import PareError


@dataclass(frozen=True)
class Axis:
    """One axis. ``scope``: "model" (one set of indices for all layers) or "layer". ``factors``: nested in these."""

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
    )
}

Segment = tuple[str, ...]
Dim = tuple[Segment, ...]


def dim(text: str) -> Dim:
    """Parse "a*b + c" into segments of primitive axes: nested axes such as q_head become their factors."""
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


def select(dimension: Dim, sizes: Mapping[str, int], keep: Mapping[str, Sequence[int]]) -> list[int] | None:
    """Kept indices along a dimension, row-major within each segment; None when nothing on it is cut."""
    if not any(axis in keep for segment in dimension for axis in segment):
        return None
    kept, offset = [], 0
    for segment in dimension:
        strides = [prod(sizes[a] for a in segment[i + 1 :]) for i in range(len(segment))]
        choices = (keep.get(axis, range(sizes[axis])) for axis in segment)
        kept += [offset + sum(i * s for i, s in zip(index, strides, strict=True)) for index in product(*choices)]
        offset += prod(sizes[axis] for axis in segment)
    return kept


@dataclass(frozen=True)
class TensorSpec:
    """One row of a family's table.

    ``name`` is the checkpoint name without the block prefix; ``role`` what the tensor is to a pruner ("down_proj",
    "attn_norm"), ``part`` what it is counted as (embedding, attention, ffn, norm). ``when`` names a boolean of the
    config (with ``!`` in front: its negation) without which the tensor is absent. ``transforms`` are what another
    format must undo or apply: "rope" (rows are rotary pairs, permuted by some GGUF architectures), "norm+1"
    (the model adds 1 to the weight).
    """

    name: str
    dims: tuple[Dim, ...]
    role: str
    part: str
    when: str | None = None
    transforms: tuple[str, ...] = ()

    def present(self, config: Mapping[str, Any]) -> bool:
        if self.when is None:
            return True
        negated, key = self.when.startswith("!"), self.when.lstrip("!")
        return bool(config.get(key)) != negated


def tensor(name: str, dims: str, part: str, role: str | None = None, when: str | None = None, *transforms: str):
    """A TensorSpec written on one line; the role defaults to the name of the module."""
    return TensorSpec(
        name, tuple(dim(d) for d in dims.split(",")), role or name.split(".")[-2], part, when, tuple(transforms)
    )


@dataclass(frozen=True)
class Exit:
    """The model type a pruned model leaves as, when its own could not be loaded with the new shape."""

    when: Callable[[Mapping[str, int], Mapping[str, Any]], bool]  # (sizes, config)
    model_type: str
    architecture: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    unties_packed: bool = False  # its class multiplies by embed_tokens.weight, which fails on packed words


@dataclass(frozen=True)
class Family:
    """Everything known about one family of models, as data."""

    name: str
    model_types: tuple[str, ...]
    keys: Mapping[str, str]  # axis -> config key
    model: tuple[TensorSpec, ...]
    blocks: Mapping[str, tuple[TensorSpec, ...]]  # layer kind -> table
    prefix: str = "model.layers.{layer}."
    defaults: Mapping[str, Any] = field(default_factory=dict)  # of mlx-lm's ModelArgs
    kinds: str = "uniform"  # "uniform", or the config key: "layer_types" (a list), "sliding_window_pattern" (a period)
    per_layer: tuple[str, ...] = ("layer_types",)  # config lists with one entry per layer
    exact: frozenset[str] = frozenset({"layer", "ffn", "kv_head", "vocab"})
    cuttable: frozenset[str] = frozenset({"layer", "ffn", "kv_head"})
    exits: tuple[Exit, ...] = ()
    ignored: tuple[str, ...] = ("rotary_emb.inv_freq",)  # stored by old exporters, used by nobody
    gguf: str = "llama"  # llama.cpp architecture
    gguf_rope: str = "neox"  # "norm": q and k rows are permuted there


@dataclass(frozen=True)
class Tensor:
    """One concrete tensor: ``shape`` logical, ``layer`` None outside the blocks."""

    name: str
    shape: tuple[int, ...]
    spec: TensorSpec
    layer: int | None

    @property
    def module(self) -> str:
        return self.name.rpartition(".")[0]

    @property
    def matrix(self) -> bool:
        """Stored as a matrix, so that MLX packs it when the model is quantized."""
        return len(self.shape) == 2

    @property
    def size(self) -> int:
        return prod(self.shape)


@dataclass(frozen=True)
class Layer:
    """One layer of a model: its kind (which table describes it) and the sizes of its axes."""

    kind: str
    sizes: Mapping[str, int]


@dataclass(frozen=True)
class LayerKeep:
    """A surviving layer: its index in the original, and the kept indices per axis (an absent axis keeps all)."""

    source: int
    keep: Mapping[str, Sequence[int]] = field(default_factory=dict)


@dataclass(frozen=True)
class Keep:
    """What survives a cut, in indices of the original."""

    layers: tuple[LayerKeep, ...]
    hidden: Sequence[int] | None = None

    def of(self, layer: int | None) -> dict[str, Sequence[int]]:
        """Kept indices per axis for the tensors of one *new* layer, or (None) of the model."""
        shared = {} if self.hidden is None else {"hidden": self.hidden}
        return shared if layer is None else {**shared, **self.layers[layer].keep}


@dataclass(frozen=True)
class Architecture:
    """A family with concrete sizes: what is in one model."""

    family: Family
    config: Mapping[str, Any]
    sizes: Mapping[str, int]  # hidden, vocab
    layers: tuple[Layer, ...]
    tied: bool

    def layer_sizes(self, layer: int | None) -> dict[str, int]:
        return {**self.sizes, **(self.layers[layer].sizes if layer is not None else {})}

    def tensors(self) -> Iterator[Tensor]:
        """Every stored tensor once, in the order of the model. A tied head is the embedding and is not repeated."""
        before, after = [], []
        for spec in self.family.model:
            (before if spec.role == "embed_tokens" else after).append(spec)
        yield from self._concrete(before, None)
        for layer, info in enumerate(self.layers):
            yield from self._concrete(self.family.blocks[info.kind], layer)
        yield from self._concrete(after, None)

    def _concrete(self, specs: Sequence[TensorSpec], layer: int | None) -> Iterator[Tensor]:
        sizes = self.layer_sizes(layer)
        prefix = "" if layer is None else self.family.prefix.format(layer=layer)
        for spec in specs:
            if spec.present(self.config) and not (spec.role == "lm_head" and self.tied):
                yield Tensor(prefix + spec.name, tuple(length(d, sizes) for d in spec.dims), spec, layer)

    def path(self, layer: int, role: str) -> str:
        """Module path of a role inside its block, e.g. "mlp.down_proj"."""
        for spec in self.family.blocks[self.layers[layer].kind]:
            if spec.role == role:
                return spec.name.rpartition(".")[0]
        raise KeyError(role)

    def uniform(self, axis: str) -> int:
        """The size of a layer axis when all layers agree, as stock mlx-lm classes need."""
        sizes = {layer.sizes[axis] for layer in self.layers}
        if len(sizes) != 1:
            raise PareError(
                f"layers differ in {axis} ({', '.join(map(str, sorted(sizes)))})",
                "stock mlx-lm loads this family with one width for all layers only",
            )
        return sizes.pop()
