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
        Axis("expert_ffn", "layer"),  # width of one expert
        Axis("shared_ffn", "layer"),  # width of the experts that every token visits
        Axis("active", "layer"),  # experts one token visits; no tensor has this axis
        Axis("expert_latent", "layer"),  # what the experts see, where it is not the hidden size
        Axis("q_latent", "layer"),  # multi-head latent attention: rank of the queries,
        Axis("kv_latent", "layer"),  # of keys and values,
        Axis("nope_dim", "layer"),  # and the parts of a head without rope,
        Axis("rope_dim", "layer"),  # with rope,
        Axis("v_dim", "layer"),  # and of its values
        Axis("linear_k_head", "layer"),  # linear attention and state-space layers
        Axis("linear_v_head", "layer"),
        Axis("linear_k_dim", "layer"),
        Axis("linear_v_dim", "layer"),
        Axis("conv_kernel", "layer"),  # positions a short convolution sees,
        Axis("conv_tail", "layer"),  # all but the newest of them
        Axis("layer_vocab", "model"),  # embeddings of their own for every layer
        Axis("layer_input", "model"),
        Axis("altup", "model"),  # copies of the hidden state in gemma3n,
        Axis("laurel", "layer"),  # and the rank of the way around its layers
        Axis("one", "model"),
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
        index = [offset]
        for i, axis in enumerate(segment):
            stride = prod(sizes[a] for a in segment[i + 1 :])
            units = keep.get(axis, range(sizes[axis]))
            steps = units if stride == 1 else [unit * stride for unit in units]
            index = [start + step for start in index for step in steps]
        kept += index
        offset += prod(sizes[axis] for axis in segment)
    return kept


@dataclass(frozen=True)
class TensorSpec:
    """One row of a family's table.

    ``name`` is the checkpoint name without the block prefix; ``role`` what the tensor is to a pruner ("down_proj",
    "attn_norm"), ``part`` what it is counted as (embedding, attention, ffn, norm). ``when`` names a boolean of the
    config (with ``!`` in front: its negation) without which the tensor is absent. ``transforms`` are what another
    format must undo or apply: "rope" (rows are rotary pairs, permuted by some GGUF architectures), "norm+1"
    (the model adds 1 to the weight). ``stored``: what mlx_lm.convert does with it when it quantizes: "" packs whatever
    has columns, "float" leaves it, "float32" leaves and never casts it, "8bit" packs it with 8 bits in groups of 64.
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
    """A TensorSpec written on one line; the role defaults to the name of the module. A scalar has no ``dims``."""
    parsed = tuple(dim(d) for d in dims.split(",")) if dims else ()
    return TensorSpec(name, parsed, role or name.split(".")[-2], part, when, tuple(transforms), stored)


_HEAD = dim("head_dim")


@dataclass(frozen=True)
class Mixer:
    """What a kind of layer remembers of earlier positions, in values; the first word of a layer's kind names it.

    ``cache``: for every position (K and V), ``windowed``: of the sliding window only. ``state``: once, whatever the
    length, in the model's dtype; ``state_f32``: the same in float32. ``attends``: it compares queries with positions,
    whoever caches them, with heads as wide as ``head``. ``fused``: mlx-lm calls MLX's fused kernel, where it has one.
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

# Source of each: the make_cache and __call__ of the mlx_lm/models file named; tests/test_families.py holds them to real
# caches. Where keys and values differ in width MLX has no fused kernel.
MIXERS = {
    "full_attention": Mixer(cache=_KV),
    "sliding_attention": Mixer(cache=_KV, windowed=True),
    "full_attention_shared": Mixer(),  # gemma4_text, gemma3n: queries only, on the cache of an earlier layer
    "sliding_attention_shared": Mixer(windowed=True),
    "mla": Mixer(cache=dim("kv_latent + rope_dim"), head=dim("nope_dim"), fused=False),  # deepseek_v3
    "mla_expanded": Mixer(  # deepseek_v2 caches keys and values of every head
        cache=dim("q_head*nope_dim + q_head*rope_dim + q_head*v_dim"), head=dim("nope_dim + rope_dim")
    ),
    "linear_attention": Mixer(state=_CONV, state_f32=_SCAN, attends=False),  # gated DeltaNet: qwen3_next, qwen3_5
    "mamba": Mixer(state=_CONV, state_f32=_SCAN, attends=False),  # Mamba 2: nemotron_h, granitemoehybrid
    "mamba_and_attention": Mixer(cache=_KV, state=_CONV, state_f32=_SCAN),  # falcon_h1: side by side
    "conv": Mixer(state=dim("conv_tail*hidden"), attends=False),  # lfm2
    "feed_forward": Mixer(attends=False),  # nemotron_h: a layer that mixes nothing
}


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
    # "uniform": all as the first of the blocks; or the config key: "layer_types" (a list), "sliding_window_pattern"
    # (a period); or config, index -> kind
    kinds: str | Callable[[Mapping[str, Any], int], str] = "uniform"
    widths: Callable[[Mapping[str, Any], int], Mapping[str, int]] | None = None  # config, index -> sizes that differ
    tied: bool | None = None  # whether the embedding is the head too; None: the config says, under
    tied_key: str = "tie_word_embeddings"
    per_layer: tuple[str, ...] = ("layer_types",)  # config lists with one entry per layer
    exact: frozenset[str] = frozenset({"layer", "ffn", "kv_head", "vocab"})
    cuttable: frozenset[str] = frozenset({"layer", "ffn", "kv_head"})
    exits: tuple[Exit, ...] = ()
    heads_divide: bool = False  # transformers refuses a hidden size that is no multiple of the heads, and no exit helps
    plain: bool = False  # its blocks compute what llama's do, but for what the rows and the rope say (see uneven.py)
    result: bool = False  # what a cut may leave as: opened and measured like a source, not cut again
    ignored: tuple[str, ...] = ("rotary_emb.inv_freq",)  # stored by old exporters, used by nobody
    gguf: str = "llama"  # llama.cpp architecture
    gguf_rope: str = "neox"  # "norm": q and k rows are permuted there


@dataclass(frozen=True)
class Wrapper:
    """A multimodal model type: which language model is in it, under which names.

    ``model_type``: of the language model; None: its ``text_config`` says it. ``shared``: keys of the outer config.
    ``bare``: the type is also used without a ``text_config``, for the language model alone.
    """

    model_type: str | None
    prefix: str = "language_model."
    defaults: Mapping[str, Any] = field(default_factory=dict)
    shared: tuple[str, ...] = ()
    bare: bool = False


def whole(config: Mapping[str, Any], key: str, what: str = "", least: int = 1) -> int:
    """A whole number of the config. Raises PareError when it is none, below ``least`` or beyond reason."""
    value = config.get(key)
    if not isinstance(value, int) or isinstance(value, bool) or not least <= value < 2**31:
        sort = "positive whole number" if least else "whole number"
        raise PareError(f"config.json says {key} = {shown(value)}, expected a {sort}" + (f" ({what})" if what else ""))
    return value


def shown(value: Any) -> str:
    """A value of the config in a message: a list of a million is not written out to be cut off."""
    if isinstance(value, list | dict) and len(value) > 20:
        return f"a {type(value).__name__} of {len(value)}"
    return repr(value)[:80]


def listed_layers(config: Mapping[str, Any], key: str, count: int) -> list[Any]:
    """The config's list of some of its layers. Raises PareError when it is none, or longer than there are layers."""
    found = config.get(key)
    if not isinstance(found, list) or len(found) > count:
        raise PareError(f"config.json says {key} = {shown(found)}, expected a list of layers")
    return found


def layer_types(config: Mapping[str, Any], count: int) -> list[str]:
    """The config's list of a kind for every layer. Raises PareError when it is none."""
    kinds = config.get("layer_types")
    if isinstance(kinds, list) and len(kinds) != count:
        raise PareError(f"config.json lists {len(kinds)} layer_types for {count} layers")
    if not (isinstance(kinds, list) and all(isinstance(kind, str) for kind in kinds)):
        raise PareError(f"config.json says layer_types = {str(kinds)[:80]}, expected a list of names")
    return list(kinds)


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
        """Rows and columns (of every expert, when there are three dimensions), so that MLX packs it."""
        return len(self.shape) > 1 and not self.spec.stored.startswith("float")

    @property
    def rows(self) -> int:
        return prod(self.shape[:-1])

    @property
    def size(self) -> int:
        return prod(self.shape)


@dataclass(frozen=True)
class Layer:
    """One layer of a model: its kind (which table describes it) and the sizes of its axes.

    A kind is the name of a mixer, with "+moe" behind it where the table has experts, "+no_ffn" where nothing follows.
    """

    kind: str
    sizes: Mapping[str, int]

    @property
    def mixer(self) -> Mixer:
        return MIXERS[self.kind.partition("+")[0]]


@dataclass(frozen=True)
class Architecture:
    """A family with concrete sizes: what is in one model."""

    family: Family
    config: Mapping[str, Any]
    sizes: Mapping[str, int]  # hidden, vocab
    layers: tuple[Layer, ...]
    tied: bool
    prefix: str = ""  # of all names, where the language model is one part of a larger one

    @property
    def cuttable(self) -> bool:
        """Whether mlx-pare can cut it; if not, it can be planned for."""
        return bool(self.family.cuttable) and not self.prefix

    def axes(self, kind: str) -> set[str]:
        """The axes on which the tensors of this kind of layer lie; a config may give sizes that nothing has."""
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
        outside = self._shapes(self.family.model, None)
        yield from (Tensor(self.prefix + s.name, shape, s, None) for s, shape in outside if s.role == "embed_tokens")
        known: dict[Any, list] = {}  # layers of one kind and size have the same shapes
        for layer, info in enumerate(self.layers):
            alike = (info.kind, frozenset(info.sizes.items()))
            if alike not in known:
                known[alike] = self._shapes(self.family.blocks[info.kind], layer)
            prefix = self.prefix + self.family.prefix.format(layer=layer)
            for spec, shape in known[alike]:
                yield Tensor(prefix + spec.name, shape, spec, layer)
        yield from (Tensor(self.prefix + s.name, shape, s, None) for s, shape in outside if s.role != "embed_tokens")

    def _shapes(self, specs: Sequence[TensorSpec], layer: int | None) -> list[tuple[TensorSpec, tuple[int, ...]]]:
        sizes = self.layer_sizes(layer)
        there = (s for s in specs if s.present(self.config) and not (s.role == "lm_head" and self.tied))
        return [(spec, tuple(length(d, sizes) for d in spec.dims)) for spec in there]

    def path(self, layer: int, role: str) -> str:
        """Module path of a role inside its block, e.g. "mlp.down_proj"."""
        for spec in self.family.blocks[self.layers[layer].kind]:
            if spec.role == role:
                return spec.name.rpartition(".")[0]
        raise KeyError(role)

    def each(self, *axes: str) -> int | list[int]:
        """The size of a layer axis, or of a product of some: one number where all layers agree, else one per layer."""
        sizes = [prod(layer.sizes[axis] for axis in axes) for layer in self.layers]
        return sizes[0] if len(set(sizes)) == 1 else sizes

    def largest(self, *axes: str) -> int:
        """The size of a layer axis, or of a product of some, in the widest layer."""
        return max(prod(layer.sizes[axis] for axis in axes) for layer in self.layers)

    def uniform(self, axis: str) -> int:
        """The size of a layer axis when all layers agree, as stock mlx-lm classes need."""
        sizes = {layer.sizes[axis] for layer in self.layers}
        if len(sizes) != 1:
            raise PareError(
                f"layers differ in {axis} ({', '.join(map(str, sorted(sizes)))})",
                "stock mlx-lm loads this family with one width for all layers only",
            )
        return sizes.pop()
