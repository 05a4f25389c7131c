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
from .axes import Dim, dim, length


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


_HEAD, _HIDDEN = dim("head_dim"), dim("hidden")


@dataclass(frozen=True)
class Mixer:
    """What a kind of layer remembers of earlier positions, in values. The first word of a layer's kind names its mixer.

    ``cache``: for every position (K and V). ``windowed``: the cache covers the sliding window only. ``state``: once for
    any length, in the model's dtype; ``state_f32``: the same in float32. ``attends``: it compares queries with
    positions, which another layer may cache, with heads as wide as ``head``. ``fused``: mlx-lm calls MLX's fused
    kernel, if there is one.
    """

    cache: Dim = ()
    windowed: bool = False
    state: Dim = ()
    state_f32: Dim = ()
    attends: bool = True
    head: Dim = _HEAD
    fused: bool = True


_KV = dim("kv_head*head_dim + kv_head*head_dim")
_CONV = dim("conv_tail*linear_k_head*linear_k_dim + conv_tail*linear_k_head*linear_k_dim + "
            "conv_tail*linear_v_head*linear_v_dim")  # fmt: skip

_SCAN = dim("linear_v_head*linear_v_dim*linear_k_dim")

# Source of each: make_cache and __call__ in the mlx_lm/models file named; tests/arch/test_families.py compares them
# with real caches. MLX has no fused kernel for keys and values of different widths.
MIXERS = {
    "full_attention": Mixer(cache=_KV),
    "sliding_attention": Mixer(cache=_KV, windowed=True),
    "full_attention_shared": Mixer(),  # gemma4_text, gemma3n: queries only, on the cache of an earlier layer
    "sliding_attention_shared": Mixer(windowed=True),
    "mla": Mixer(cache=dim("kv_latent + rope_dim"), head=dim("nope_dim"), fused=False),  # deepseek_v3
    "mla_expanded": Mixer(  # deepseek_v2 caches the keys and values of every head
        cache=dim("q_head*nope_dim + q_head*rope_dim + q_head*v_dim"), head=dim("nope_dim + rope_dim")
    ),
    "linear_attention": Mixer(state=_CONV, state_f32=_SCAN, attends=False),  # gated DeltaNet: qwen3_next, qwen3_5
    "mamba": Mixer(state=_CONV, state_f32=_SCAN, attends=False),  # Mamba 2: nemotron_h, granitemoehybrid
    "mamba_and_attention": Mixer(cache=_KV, state=_CONV, state_f32=_SCAN),  # falcon_h1: side by side
    "conv": Mixer(state=dim("conv_tail*hidden"), attends=False),  # lfm2
    "feed_forward": Mixer(attends=False),  # nemotron_h: a layer that mixes nothing
}


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
    widths: Callable[[Mapping[str, Any], int], Mapping[str, int]] | None = None  # config, index -> sizes that differ
    tied: bool | None = None  # whether the embedding is the head too; None: the config decides, under
    tied_key: str = "tie_word_embeddings"
    per_layer: tuple[str, ...] = ("layer_types",)  # config lists with one entry per layer
    # lists that a cut must write if the config has none, because a missing one is derived from the layer's place
    by_place: Mapping[str, Callable[[Mapping[str, Any], int], Any]] = field(default_factory=dict)
    needed: frozenset[str] = frozenset({"full_attention"})  # kinds of layers that its class needs to load
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


@dataclass(frozen=True)
class Wrapper:
    """A multimodal model type: which language model is inside, and how its tensors are named.

    ``model_type``: of the language model; None: its ``text_config`` says it. ``shared``: keys of the outer config that
    apply to it. ``bare``: the type is also used without a ``text_config``, for the language model alone.
    """

    model_type: str | None
    prefix: str = "language_model."
    defaults: Mapping[str, Any] = field(default_factory=dict)
    shared: tuple[str, ...] = ()
    bare: bool = False


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
    def mixer(self) -> Mixer:
        return MIXERS[self.kind.partition("+")[0]]


@dataclass(frozen=True)
class Architecture:
    """A family with concrete sizes: what one model consists of."""

    family: Family
    config: Mapping[str, Any]
    sizes: Mapping[str, int]  # hidden, vocab
    layers: tuple[Layer, ...]
    tied: bool
    prefix: str = ""  # of all names, if the language model is part of a larger one

    @property
    def cuttable(self) -> bool:
        """Whether mlx-pare can cut it. If not, it can be planned for."""
        return bool(self.family.cuttable) and not self.prefix

    def why_fixed(self, axis: str) -> str | None:
        """Why it cannot be cut along an axis; None if it can."""
        for fixed in self.family.fixed:
            if axis in fixed.axes and fixed.when(self.config):
                return fixed.why
        return None if axis in self.family.cuttable else "nobody has described how"

    def holds_heads(self, kv_heads: int) -> bool:
        """Whether a result with this number of kv heads per layer opens everywhere; the model's own number does."""
        sizes = self.layers[0].sizes
        whole = kv_heads == sizes["kv_head"] or not self.family.divides
        return whole or self.sizes["hidden"] % (kv_heads * sizes["group"]) == 0

    @property
    def cut_axes(self) -> list[str]:
        """The axes along which it can be cut."""
        return sorted(axis for axis in self.family.cuttable if self.why_fixed(axis) is None)

    def axes(self, kind: str) -> set[str]:
        """The axes on which tensors of this kind of layer lie. A config may also give sizes that no tensor has."""
        specs = (spec for spec in self.family.blocks[kind] if spec.present(self.config))
        return {axis for spec in specs for d in spec.dims for part in d for axis in part}

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
            prefix = self.prefix + self.family.prefix.format(layer=layer)
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
        """The size of a layer axis, or the product of several: one number if all layers agree, else one per layer."""
        sizes = [prod(layer.sizes[axis] for axis in axes) for layer in self.layers]
        return sizes[0] if len(set(sizes)) == 1 else sizes

    def largest(self, *axes: str) -> int:
        """The size of a layer axis, or the product of several, in the widest layer."""
        return max(prod(layer.sizes[axis] for axis in axes) for layer in self.layers)

    def uniform(self, axis: str) -> int:
        """The size of a layer axis; stock mlx-lm classes need one for all layers. Raises PareError if layers differ."""
        sizes = {layer.sizes[axis] for layer in self.layers}
        if len(sizes) != 1:
            raise PareError(
                f"layers differ in {axis} ({', '.join(map(str, sorted(sizes)))})",
                "stock mlx-lm loads this family with one width for all layers only",
            )
        return sizes.pop()
