"""describe(config) -> Architecture, and cutting one: which config the smaller model has."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ..base.errors import PareError, Unsupported
from . import dense, gemma, hybrid, latent, mamba, moe, plain, postnorm, uneven
from .axes import AXES
from .keep import Keep, LayerKeep
from .rope import both_rope_spellings, check_numbers
from .rows import KEYS
from .spec import Architecture, Family, Layer, Tensor, Wrapper, layer_types, whole
from .uneven import uneven_types, why_no_sublayer_drops, why_uniform

_FILES = (dense, postnorm, plain, gemma, moe, latent, hybrid, mamba, uneven)
FAMILIES: tuple[Family, ...] = tuple(family for file in _FILES for family in file.FAMILIES)
WRAPPERS: dict[str, Wrapper] = {name: wrapper for file in _FILES[:-1] for name, wrapper in file.WRAPPERS.items()}
RESULT_TYPES = frozenset(family.name for family in FAMILIES if family.result)  # of no runtime but mlx-lm so far
MAX_LAYERS = 500  # the deepest merges have 315; every layer costs a few objects, and a stranger says how many
NEEDED = frozenset(KEYS)  # axes for which 0 is nonsense; of the others it means that there are none

__all__ = [
    "RESULT_TYPES",
    "Architecture",
    "Keep",
    "LayerKeep",
    "Tensor",
    "both_rope_spellings",
    "can_keep",
    "cut",
    "describe",
    "described_types",
    "positions",
    "require_cuttable",
    "supported_types",
    "uneven_types",
    "why_no_sublayer_drops",
    "why_uniform",
]


def supported_types() -> list[str]:
    """Every model_type that can be cut, in alphabetical order."""
    return sorted(t for family in FAMILIES if family.cuttable for t in family.model_types)


def described_types() -> list[str]:
    """Every model_type whose tensors are known: those that can be cut, and those that can be planned for only."""
    return sorted({t for family in FAMILIES for t in family.model_types} | set(WRAPPERS))


def family_of(config: Mapping[str, Any]) -> Family:
    """The family of a config.json. Raises Unsupported, listing the known types, when there is none."""
    model_type = config.get("model_type")
    for family in FAMILIES:
        if model_type in family.model_types:
            return family
    raise Unsupported(
        f"model type {model_type!r} is not described here", f"supported types are {', '.join(supported_types())}"
    )


def describe(config: Mapping[str, Any], untied: bool | None = None) -> Architecture:
    """The architecture a config.json stands for; of a multimodal model, its language model.

    ``untied``: whether the checkpoint stores lm_head.weight, when known; gemma3 decides by that alone.
    Raises Unsupported for an unknown model type, and PareError for sizes that are missing or make no sense.
    """
    config, prefix = _unwrapped(config)
    family = family_of(config)
    check_numbers(both_rope_spellings(config))
    # a null counts as absent here, but stays in the config: transformers fills an absent key with its own default
    full = {**config, **{k: v for k, v in family.defaults.items() if config.get(k) is None}}
    sizes = _sizes(family, full)
    kinds = _kinds(family, full, sizes["layer"])
    per_layer = {axis: n for axis, n in sizes.items() if AXES[axis].scope == "layer" and axis != "q_head"}
    widths = [family.widths(full, i) if family.widths else {} for i in range(len(kinds))]
    layers = tuple(Layer(kind, {**per_layer, **wider}) for kind, wider in zip(kinds, widths, strict=True))
    shared = {axis: n for axis, n in sizes.items() if AXES[axis].scope == "model" and axis != "layer"}
    _check_complete(family, full, shared, layers)
    tied = family.tied
    if tied is None:
        tied = bool(config.get(family.tied_key, family.defaults.get(family.tied_key, True)))
    if family.kinds == "sliding_window_pattern" and untied is not None:
        tied = not untied
    return Architecture(family, full, shared, layers, tied, prefix)


def _unwrapped(config: Mapping[str, Any]) -> tuple[Mapping[str, Any], str]:
    """(the config of the language model, the prefix of its tensors): of a multimodal config, its ``text_config``."""
    wrapper = WRAPPERS.get(str(config.get("model_type")))
    inner = config.get("text_config")
    if wrapper is None or not (isinstance(inner, dict) or wrapper.bare):
        return config, ""
    inner = inner if isinstance(inner, dict) else {k: v for k, v in config.items() if k != "model_type"}
    shared = {key: config[key] for key in wrapper.shared if config.get(key) is not None}
    merged = {**wrapper.defaults, **inner, **shared}
    return {**merged, "model_type": wrapper.model_type or merged.get("model_type")}, wrapper.prefix


def _sizes(family: Family, config: Mapping[str, Any]) -> dict[str, int]:
    """The size of every axis that the config sets, and of those that follow from them."""
    given = {axis: key for axis, key in family.keys.items() if config.get(key) is not None}
    sizes = {axis: whole(config, key, axis) for axis, key in given.items() if axis in NEEDED or config[key] != 0}
    missing = [
        family.keys[a] for a in ("hidden", "vocab", "layer", "ffn", "q_head") if a in family.keys and a not in sizes
    ]
    if missing:
        raise PareError(f"config.json of type {config['model_type']} lacks {', '.join(missing)}")
    if sizes["layer"] > MAX_LAYERS:
        raise PareError(f"config.json says {family.keys['layer']} = {sizes['layer']}, more than any model has")
    if "q_head" not in family.keys:  # layer by layer
        return sizes
    sizes.setdefault("kv_head", sizes["q_head"])
    if "head_dim" not in sizes and "nope_dim" not in family.keys:
        if sizes["hidden"] % sizes["q_head"]:
            raise PareError(
                f"hidden_size {sizes['hidden']} is no multiple of {sizes['q_head']} heads and head_dim is not given"
            )
        sizes["head_dim"] = sizes["hidden"] // sizes["q_head"]
    if sizes["q_head"] % sizes["kv_head"]:
        raise PareError(f"{sizes['q_head']} query heads cannot share {sizes['kv_head']} kv heads evenly")
    sizes["group"] = sizes["q_head"] // sizes["kv_head"]
    if "conv_kernel" in sizes:
        sizes["conv_tail"] = sizes["conv_kernel"] - 1
    return sizes


def _check_complete(
    family: Family, config: Mapping[str, Any], sizes: Mapping[str, int], layers: Sequence[Layer]
) -> None:
    """Every axis on which a tensor of the model lies must have a size."""
    tables = [(family.model, {**sizes, "layer": len(layers), "one": 1})]
    tables += [(family.blocks[kind], {**tables[0][1], **layer_sizes}) for kind, layer_sizes in _distinct(layers)]
    for table, known in tables:
        used = {axis for spec in table if spec.present(config) for d in spec.dims for part in d for axis in part}
        lacking = sorted(family.keys.get(axis, axis) for axis in used - set(known))
        if lacking:
            raise PareError(f"config.json of type {config['model_type']} lacks {', '.join(lacking)}")


def _distinct(layers: Sequence[Layer]) -> list[tuple[str, Mapping[str, int]]]:
    """One layer of each kind."""
    return list({layer.kind: layer.sizes for layer in layers}.items())


def _kinds(family: Family, config: Mapping[str, Any], count: int) -> list[str]:
    if callable(family.kinds):
        kinds = [family.kinds(config, i) for i in range(count)]
    elif family.kinds == "sliding_window_pattern":
        period = whole(config, "sliding_window_pattern", "one layer in N has full attention")
        kinds = [_periodic(i, period) for i in range(count)]
    elif family.kinds == "layer_types" and config.get("layer_types") is not None:
        kinds = layer_types(config, count)
    else:
        kinds = [next(iter(family.blocks))] * count
    unknown = sorted(set(kinds) - set(family.blocks))
    if unknown:
        raise PareError(
            f"layers of kind {unknown[0]!r} are not described for {family.name}",
            f"known kinds: {', '.join(family.blocks)}",
        )
    return kinds


def _periodic(index: int, period: int) -> str:
    return "full_attention" if index % period == period - 1 else "sliding_attention"


# ---- cutting ----


def require_cuttable(arch: Architecture) -> None:
    """Raises Unsupported for a model that cannot be cut."""
    if arch.family.result:
        raise Unsupported(f"{arch.family.name} is what a cut left, and is not cut again", "cut the original instead")
    if not arch.cuttable:
        raise Unsupported(f"{arch.family.name} can be planned for, but not cut")


def positions(arch: Architecture, count: int) -> list[str | None]:
    """The kind each layer of a model cut to ``count`` layers must have; None: any. See ``can_keep``."""
    if arch.family.kinds != "sliding_window_pattern":
        return [None] * count
    period = arch.config["sliding_window_pattern"]
    return [_periodic(i, period) for i in range(count)]


def can_keep(arch: Architecture, layers: Sequence[int]) -> bool:
    """Whether the survivors of a depth cut keep their kinds in stock mlx-lm, which may derive them from the index, and
    are of all the kinds that it needs."""
    kinds = [arch.layers[i].kind for i in layers]
    if arch.family.kinds == "sliding_window_pattern":
        return len(layers) >= arch.config["sliding_window_pattern"] and kinds == positions(arch, len(layers))
    return arch.family.needed <= set(kinds)


def cut(arch: Architecture, keep: Keep, packed: bool = False) -> Architecture:
    """The architecture that is left, with the config.json that stock mlx-lm loads it by.

    Layers that differ in width, or have lost attention or feed-forward, leave as what uneven.py knows; all others stay
    in their family, or take one of its exits. ``packed``: the embedding will be stored quantized, which decides whether
    it may stay tied (see Exit). Raises PareError for layers whose kind would change, and where no class of stock mlx-lm
    can hold what is left, saying why.
    """
    require_cuttable(arch)
    sources = [layer.source for layer in keep.layers]
    _check_axes(arch, keep)
    if not can_keep(arch, sources):
        if arch.family.kinds != "sliding_window_pattern":
            raise PareError(
                f"keeping layers {sources} leaves an attention kind out: mlx-lm loads a {arch.family.name} only with "
                f"{' and '.join(sorted(arch.family.needed))}",
                "keep such a layer, or let `plan` choose",
            )
        raise PareError(
            f"keeping layers {sources} would change the attention kind of a survivor: {arch.family.name} derives it "
            "from the layer's position",
            "keep whole periods of layers, or let `plan` choose",
        )
    kept_sizes = []
    for layer in keep.layers:
        old = arch.layers[layer.source]
        kept_sizes.append(Layer(old.kind, {**old.sizes, **{a: len(i) for a, i in layer.keep.items()}}))
    sizes = dict(arch.sizes) if keep.hidden is None else {**arch.sizes, "hidden": len(keep.hidden)}
    smaller = Architecture(arch.family, arch.config, sizes, tuple(kept_sizes), arch.tied)
    if uneven.differ(smaller):
        return describe(uneven.config(smaller))
    left = describe(_config(arch, smaller, sources, packed), untied=not arch.tied)
    if [layer.kind for layer in left.layers] != [layer.kind for layer in kept_sizes]:
        raise PareError(
            f"{left.config['model_type']}, as which this model would leave, would change the attention kind of a layer",
            "keep a number of heads that divides the hidden size",
        )
    return left


def _check_axes(arch: Architecture, keep: Keep) -> None:
    """Raises PareError for a cut along an axis on which this model is not cut."""
    for axis in sorted({axis for layer in keep.layers for axis in layer.keep} | ({"hidden"} if keep.hidden else set())):
        if why := arch.why_fixed(axis):
            raise PareError(
                f"{arch.family.name} cannot be cut along {axis}: {why}", f"choose from {', '.join(arch.cut_axes)}"
            )
    for count in sorted({len(layer.keep["kv_head"]) for layer in keep.layers if "kv_head" in layer.keep} - {0}):
        if not arch.holds_heads(count):
            heads, hidden = count * arch.layers[0].sizes["group"], arch.sizes["hidden"]
            raise PareError(
                f"{heads} query heads do not divide the hidden size of {hidden}: transformers opens no such "
                f"{arch.family.name}, and mlx-lm reads the tokenizer with it",
                "keep another number of kv heads",
            )


def _config(arch: Architecture, smaller: Architecture, sources: list[int], packed: bool) -> dict[str, Any]:
    config = dict(arch.config)
    widths = {a: smaller.uniform(a) for a in ("kv_head", "group", "head_dim", "ffn")}
    widths |= {"q_head": widths["kv_head"] * widths["group"], "layer": len(sources), **smaller.sizes}
    config |= {key: widths[axis] for axis, key in arch.family.keys.items()}
    for key, by_place in arch.family.by_place.items():
        if config.get(key) is None:
            config[key] = [by_place(arch.config, i) for i in range(len(arch.layers))]
    for key in arch.family.per_layer:
        if isinstance(config.get(key), list):
            if len(config[key]) != len(arch.layers):
                raise PareError(f"config.json lists {len(config[key])} {key} for {len(arch.layers)} layers")
            config[key] = [config[key][i] for i in sources]
    for exit_ in arch.family.exits:
        if exit_.when(widths, config):
            config |= {"model_type": exit_.model_type, "architectures": [exit_.architecture], **exit_.settings}
            config["head_dim"] = widths["head_dim"]
            config.pop("auto_map", None)  # code for the original type
            if any(layer.kind == "sliding_attention" for layer in smaller.layers):
                config["sliding_window"] = arch.config.get("sliding_window")
            config["tie_word_embeddings"] = arch.tied and not (exit_.unties_packed and packed)
            break
    else:
        config["tie_word_embeddings"] = arch.tied
    return both_rope_spellings(config)
