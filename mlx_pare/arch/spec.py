"""The vocabulary in which every model family is described, made of named axes (arch/axes.py).

A model is a table of tensors whose dimensions lie on axes such as ``hidden`` or ``kv_head``. Pruning is choosing the
indices to keep on an axis; counting, planning, slicing and renaming all read the same table. Indices are logical: a
quantized tensor has the same dimensions. Only tensors/packed.py knows about its packed words.

A dimension is a concatenation of segments, each a product of axes, written as people write it::

    "kv_head*group*head_dim"                                       rows of q_proj
    "q_head*head_dim + kv_head*head_dim + kv_head*head_dim"        rows of a fused qkv
    "ffn + ffn"                                                    rows of a fused gate and up
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from math import prod
from typing import Any, NamedTuple

from ..base.errors import PareError
from ..base.untrusted import shown
from .axes import UNITS, Dim, dim, length
from .mixers import MIXERS, Mixer
from .parent import Parent


@dataclass(frozen=True)
class TensorSpec:
    """One row of a family's table.

    ``name``: the checkpoint name without the block prefix. ``role``: what the tensor is to a pruner ("down_proj",
    "attn_norm"). ``part``: what it is counted as (embedding, attention, ffn, norm). ``when``: booleans of the config,
    separated by spaces (``!`` in front negates one), without which the tensor is absent. ``transforms``: what another
    format must undo or apply: "rope" (rows are rotary pairs, which some GGUF architectures permute), "norm+1" (the
    model adds 1 to the weight). ``stored``: what mlx_lm.convert does with it when it quantizes: "" packs it if it has
    columns, "float" leaves it, "float32" leaves and never casts it, "8bit" packs it with 8 bits in groups of 64.
    """

    name: str
    dims: tuple[Dim, ...]
    role: str
    part: str
    when: str | None = None
    transforms: tuple[str, ...] = ()
    stored: str = ""

    @property
    def stack(self) -> bool:
        """Whether it holds a matrix for each expert."""
        return len(self.dims) == 3 and self.dims[0] == (("expert",),)

    def present(self, config: Mapping[str, Any]) -> bool:
        flags = self.when.split() if self.when else ()
        return all(bool(config.get(flag.lstrip("!"))) != flag.startswith("!") for flag in flags)


def tensor(
    name: str,
    dims: str,
    part: str,
    role: str | None = None,
    when: str | None = None,
    *transforms: str,
    stored: str = "",
):
    """Make a TensorSpec on one line.

    Args:
        name: the checkpoint name without the block prefix.
        dims: the dimensions, separated by commas; empty for a scalar.
        part: embedding, attention, ffn or norm.
        role: what the tensor is to a pruner; None: the name of its module.
        when: booleans of the config without which the tensor is absent; None: always there.
        transforms: what another format must undo or apply.
        stored: what mlx_lm.convert does with it.
    """
    parsed = tuple(dim(d) for d in dims.split(",")) if dims else ()
    return TensorSpec(name, parsed, role or name.split(".")[-2], part, when, tuple(transforms), stored)


_HIDDEN = dim("hidden")

FUSED = {  # matrices in which some families store several roles: the roles, in the order of the segments of its rows
    "qkv_proj": ("q_proj", "k_proj", "v_proj"),
    "gate_up_proj": ("gate_proj", "up_proj"),
}


@dataclass(frozen=True)
class Fixed:
    """Axes along which a family is not cut, the reason, and the configs it applies to."""

    axes: tuple[str, ...]
    why: str
    when: Callable[[Mapping[str, Any]], bool] = lambda config: True


@dataclass(frozen=True)
class Exit:
    """The model type that a pruned model leaves as, if its own type could not be loaded with the new shape."""

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
    # "uniform": all as the first of the blocks; or the config key: "layer_types" (a list), "sliding_window_pattern"
    # (a period); or config, index -> kind
    kinds: str | Callable[[Mapping[str, Any], int], str] = "uniform"
    # config key of a period, after which the kinds of layers begin again: a cut must leave every place its kind
    period: str | None = None
    widths: Callable[[Mapping[str, Any], int], Mapping[str, int]] | None = None  # config, index -> sizes that differ
    # config, sizes -> keys of sizes that are computed from several keys
    resized: Callable[[Mapping[str, Any], Mapping[str, int]], Mapping[str, Any]] | None = None
    tied: bool | None = None  # whether the embedding is the head too; None: the config decides, under
    tied_key: str = "tie_word_embeddings"
    per_layer: tuple[str, ...] = ("layer_types",)  # config lists with one entry per layer
    # lists that a cut must write if the config has none, because a missing one is derived from the layer's place
    by_place: Mapping[str, Callable[[Mapping[str, Any], int], Any]] = field(default_factory=dict)
    # config, kinds of the layers that are left -> keys by which its class gives every layer its kind
    recounted: Callable[[Mapping[str, Any], Sequence[str]], Mapping[str, Any]] | None = None
    needed: frozenset[str] = frozenset({"full_attention"})  # mixers that its class needs to load
    divides: bool = False  # transformers opens it only if the number of query heads divides the hidden size
    residual: str | None = None  # config key of a factor on everything that its blocks add to the stream
    exact: frozenset[str] = frozenset({"layer", "ffn", "kv_head", "vocab"})
    cuttable: frozenset[str] = frozenset({"layer", "ffn", "kv_head"})
    fixed: tuple[Fixed, ...] = ()  # why it is not cut along other axes, or not with some configs
    exits: tuple[Exit, ...] = ()
    plain: bool = False  # its blocks compute what llama's do, except for rows and rope (see uneven.py)
    result: bool = False  # a cut may leave as this type: it is opened and measured like a source, but not cut again
    ignored: tuple[str, ...] = ("rotary_emb.inv_freq",)  # stored by old exporters, and not used
    gguf: str = "llama"  # llama.cpp architecture
    gguf_rope: str = "neox"  # "norm": q and k rows are permuted there


def whole(config: Mapping[str, Any], key: str, what: str = "", least: int = 1) -> int:
    """Read a whole number of the config.

    Args:
        config: the content of config.json.
        key: the key of the number.
        what: its meaning, for the message.
        least: the smallest allowed number.
    Raises:
        PareError: it is no whole number, below ``least`` or beyond reason.
    """
    value = config.get(key)
    if not isinstance(value, int) or isinstance(value, bool) or not least <= value < 2**31:
        sort = "positive whole number" if least else "whole number"
        raise PareError(f"config.json says {key} = {shown(value)}, expected a {sort}" + (f" ({what})" if what else ""))
    return value


def listed_layers(config: Mapping[str, Any], key: str, count: int) -> list[Any]:
    """Read the config's list of some of its layers. Raises PareError if it is no list, or longer than ``count``.

    Args:
        config: the content of config.json.
        key: the key of the list.
        count: the number of layers.
    """
    found = config.get(key)
    if not isinstance(found, list) or len(found) > count:
        raise PareError(f"config.json says {key} = {shown(found)}, expected a list of layers")
    return found


def layer_types(config: Mapping[str, Any], count: int) -> list[str]:
    """The config's list with a kind for every layer. Raises PareError if there is no such list."""
    kinds = config.get("layer_types")
    if isinstance(kinds, list) and len(kinds) != count:
        raise PareError(f"config.json lists {len(kinds)} layer_types for {count} layers")
    if not (isinstance(kinds, list) and all(isinstance(kind, str) for kind in kinds)):
        raise PareError(f"config.json says layer_types = {str(kinds)[:80]}, expected a list of names")
    return list(kinds)


class Tensor(NamedTuple):  # a search for a size creates hundreds of thousands; a tuple takes a third of the time
    """One concrete tensor: ``shape`` is logical, ``layer`` is None outside the blocks."""

    name: str
    shape: tuple[int, ...]
    spec: TensorSpec
    layer: int | None

    @property
    def module(self) -> str:
        return self.name.rpartition(".")[0]

    @property
    def matrix(self) -> bool:
        """Whether it has rows and columns (of every expert, if there are three dimensions), so that MLX packs it."""
        return len(self.shape) > 1 and not self.spec.stored.startswith("float")

    @property
    def rows(self) -> int:
        return prod(self.shape[:-1])

    @property
    def size(self) -> int:
        return prod(self.shape)


@dataclass(frozen=True)
class Layer:
    """One layer of a model: its kind (which table describes it) and the sizes of its axes. A kind is the name of a
    mixer, followed by "+moe" if the table has experts, or by "+no_ffn" if the layer has no feed-forward."""

    kind: str
    sizes: Mapping[str, int]

    @property
    def mixing(self) -> str:
        """The name of its mixer."""
        return self.kind.partition("+")[0]

    @property
    def mixer(self) -> Mixer:
        return MIXERS[self.mixing]


@dataclass(frozen=True)
class Architecture:
    """A family with concrete sizes: what one model consists of."""

    family: Family
    config: Mapping[str, Any]
    sizes: Mapping[str, int]  # hidden, vocab
    layers: tuple[Layer, ...]
    tied: bool
    parent: Parent | None = None  # the multimodal model that it is a part of

    @property
    def cuttable(self) -> bool:
        """Whether mlx-pare can cut it. If not, it can be planned for."""
        return bool(self.family.cuttable)

    @property
    def period(self) -> int | None:
        """The number of layers after which their kinds begin again, if mlx-lm derives a kind from the place."""
        return self.config[self.family.period] if self.family.period else None

    @property
    def prefix(self) -> str:
        """Of the names of all tensors."""
        return self.parent.wrapper.prefix if self.parent else ""

    def block(self, layer: int) -> str:
        """The prefix of the names of a layer."""
        return self.prefix + self.family.prefix.format(layer=layer)

    def why_fixed(self, axis: str) -> str | None:
        """Why it cannot be cut along an axis; None if it can."""
        for fixed in self.family.fixed:
            if axis in fixed.axes and fixed.when(self.config):
                return fixed.why
        if self.parent and axis == "hidden":
            return f"the other parts of the {self.parent.model_type} read and write hidden channels"
        return None if axis in self.family.cuttable else "nobody has described how"

    def holds_heads(self, kv_heads: int) -> bool:
        """Whether a result with this number of kv heads per layer opens everywhere; the model's own number does."""
        sizes = self.layers[0].sizes
        if kv_heads == sizes["kv_head"]:
            return True
        left = {**self.sizes, "head_dim": sizes["head_dim"], "q_head": kv_heads * sizes["group"]}
        if self.parent and any(exit_.when(left, self.config) for exit_ in self.family.exits):
            return False  # the parent holds a language model of its own type only
        return not self.family.divides or self.sizes["hidden"] % left["q_head"] == 0

    @property
    def cut_axes(self) -> list[str]:
        """The axes along which it can be cut."""
        return sorted(axis for axis in self.family.cuttable if self.why_fixed(axis) is None)

    def axes(self, kind: str) -> frozenset[str]:
        """The axes on which tensors of this kind of layer lie. A config may also give sizes that no tensor has."""
        return self._axes[kind]

    @cached_property
    def _axes(self) -> dict[str, frozenset[str]]:
        def of(specs: Sequence[TensorSpec]) -> frozenset[str]:
            present = (spec for spec in specs if spec.present(self.config))
            return frozenset(axis for spec in present for d in spec.dims for part in d for axis in part)

        return {kind: of(specs) for kind, specs in self.family.blocks.items()}

    def units(self, layer: int) -> dict[str, int]:
        """The number of units that a layer has, by the axes of UNITS on which its tensors lie."""
        info = self.layers[layer]
        return {axis: info.sizes[axis] for axis in UNITS if axis in self._axes[info.kind]}

    def uses(self, axis: str) -> bool:
        """Whether any tensor of any layer lies on this axis."""
        return any(axis in self.axes(kind) for kind in {layer.kind for layer in self.layers})

    def layer_sizes(self, layer: int | None) -> dict[str, int]:
        sizes = {**self.sizes, "layer": len(self.layers), "one": 1}
        return sizes if layer is None else {**sizes, **self.layers[layer].sizes}

    def tensors(self) -> Iterator[Tensor]:
        """Every stored tensor once, in the order of the model. A tied head is the embedding and is not repeated."""
        return iter(self._tensors)

    @cached_property
    def _tensors(self) -> tuple[Tensor, ...]:  # a search for a size asks for them again and again
        outside = [Tensor(self.prefix + s.name, shape, s, None) for s, shape in self._shapes(self.family.model, None)]
        found = [tensor for tensor in outside if tensor.spec.role == "embed_tokens"]
        known: dict[Any, list] = {}  # layers of one kind and size have the same shapes
        for layer, info in enumerate(self.layers):
            alike = (info.kind, frozenset(info.sizes.items()))
            if alike not in known:
                known[alike] = self._shapes(self.family.blocks[info.kind], layer)
            prefix = self.block(layer)
            found += [Tensor(prefix + spec.name, shape, spec, layer) for spec, shape in known[alike]]
        return (*found, *(tensor for tensor in outside if tensor.spec.role != "embed_tokens"))

    def _shapes(self, specs: Sequence[TensorSpec], layer: int | None) -> list[tuple[TensorSpec, tuple[int, ...]]]:
        sizes = self.layer_sizes(layer)
        there = (s for s in specs if s.present(self.config) and not (s.role == "lm_head" and self.tied))
        return [(spec, tuple(length(d, sizes) for d in spec.dims)) for spec in there]

    def row(self, layer: int, role: str) -> tuple[TensorSpec, int | None]:
        """The row of the table for a role, and which segment of its first dimension the role is, if the row holds
        several roles (None: it holds one). Raises KeyError if the layer has no such role."""
        found = {spec.role: spec for spec in self.family.blocks[self.layers[layer].kind]}
        if role in found:
            return found[role], None
        for fused, roles in FUSED.items():
            if fused in found and role in roles:
                return found[fused], roles.index(role)
        raise KeyError(role)

    def has(self, layer: int, role: str) -> bool:
        """Whether a layer has a tensor of this role, alone or as one with others."""
        try:
            return bool(self.row(layer, role))
        except KeyError:
            return False

    def writers(self, layer: int) -> tuple[str, str]:
        """The roles of the matrices that write to the stream: of attention, or what stands there, and of the ffn."""
        return "o_proj" if self.has(layer, "o_proj") else "out_proj", "down_proj"

    def path(self, layer: int, role: str) -> str:
        """Module path of a role inside its block, e.g. "mlp.down_proj"."""
        return self.row(layer, role)[0].name.rpartition(".")[0]

    def readers(self, layer: int, part: str) -> list[str]:
        """The roles of the matrices of a part ("attention", "ffn") that read the hidden state, as they are stored."""
        table = self.family.blocks[self.layers[layer].kind]
        return [s.role for s in table if s.part == part and len(s.dims) > 1 and s.dims[-1] == _HIDDEN]

    @property
    def residual(self) -> float:
        """The factor on everything that a block adds to the stream."""
        return float(self.config.get(self.family.residual, 1.0)) if self.family.residual else 1.0

    def each(self, *axes: str) -> int | list[int]:
        """The size of a layer axis, or the product of several: one number if all layers agree, else one per layer. It
        is 0 in a layer without tensors on the axes."""
        sizes = [
            prod(layer.sizes[axis] for axis in axes) if set(axes) <= self.axes(layer.kind) else 0
            for layer in self.layers
        ]
        return sizes[0] if len(set(sizes)) == 1 else sizes

    def largest(self, *axes: str) -> int:
        """The size of a layer axis, or the product of several, in the widest layer; 0 if no tensor lies on them."""
        there = (layer.sizes for layer in self.layers if set(axes) <= self.axes(layer.kind))
        return max((prod(sizes[axis] for axis in axes) for sizes in there), default=0)

    def uniform(self, axis: str) -> int:
        """The size of a layer axis; stock mlx-lm classes need one for all layers. Layers without tensors on the axis do
        not count, unless there are no others. Raises PareError if layers differ."""
        there = [layer for layer in self.layers if axis in self._axes[layer.kind]]
        sizes = {layer.sizes[axis] for layer in there or self.layers}
        if len(sizes) != 1:
            raise PareError(
                f"layers differ in {axis} ({', '.join(map(str, sorted(sizes)))})",
                "stock mlx-lm loads this family with one width for all layers only",
            )
        return sizes.pop()
