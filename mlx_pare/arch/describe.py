"""describe(config) -> Architecture: the family of a model, its layers, and their tensors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ..base.errors import PareError, Unsupported
from . import uneven
from .axes import AXES
from .families import dense, gemma, hybrid, latent, mamba, moe, other_dense, post_norm
from .parent import Parent, Wrapper
from .rope import both_rope_spellings, check_numbers
from .rows import KEYS
from .spec import Architecture, Family, Layer, layer_types, whole

_FILES = (dense, post_norm, other_dense, gemma, moe, latent, hybrid, mamba, uneven)
FAMILIES: tuple[Family, ...] = tuple(family for file in _FILES for family in file.FAMILIES)
WRAPPERS: dict[str, Wrapper] = {name: wrapper for file in _FILES[:-1] for name, wrapper in file.WRAPPERS.items()}
RESULT_TYPES = frozenset(family.name for family in FAMILIES if family.result)  # only mlx-lm runs them so far
MAX_LAYERS = 500  # the deepest merges have 315; every layer costs a few objects, and the file may ask for any number
NEEDED = frozenset(KEYS)  # axes that cannot be 0; for other axes 0 means that there are none


def supported_types() -> list[str]:
    """Every model_type that can be cut, in alphabetical order."""
    return sorted(t for family in FAMILIES if family.cuttable for t in family.model_types)


def described_types() -> list[str]:
    """Every model_type whose tensors are known: those that can be cut, and those that can only be planned for."""
    return sorted({t for family in FAMILIES for t in family.model_types} | set(WRAPPERS))


def family_of(config: Mapping[str, Any]) -> Family:
    """The family of a config.json. Raises Unsupported, listing the known types, if there is none."""
    model_type = config.get("model_type")
    for family in FAMILIES:
        if model_type in family.model_types:
            return family
    raise Unsupported(
        f"model type {model_type!r} is not described here", f"supported types are {', '.join(supported_types())}"
    )


def describe(config: Mapping[str, Any], untied: bool | None = None) -> Architecture:
    """Describe the model of a config.json; of a multimodal model, its language model.

    Args:
        config: the content of config.json.
        untied: whether the checkpoint stores lm_head.weight; None: unknown. gemma3 decides by that alone.
    Returns:
        The architecture.
    Raises:
        Unsupported: the model type is unknown.
        PareError: sizes are missing or make no sense.
    """
    parent = parent_of(config)
    config = parent.inner() if parent else config
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
    return Architecture(family, full, shared, layers, tied, parent)


def parent_of(config: Mapping[str, Any]) -> Parent | None:
    """The multimodal model of a config.json; None if it is a language model alone."""
    wrapper = WRAPPERS.get(str(config.get("model_type")))
    if wrapper is None or not (isinstance(config.get("text_config"), dict) or wrapper.bare):
        return None
    return Parent(wrapper, config)


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
    if "q_head" not in family.keys:  # heads are set layer by layer
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
    """Raise PareError unless every axis on which a tensor of the model lies has a size."""
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
        kinds = [periodic(i, period) for i in range(count)]
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


def periodic(index: int, period: int) -> str:
    """The kind of a layer in a model in which every ``period``-th layer has full attention."""
    return "full_attention" if index % period == period - 1 else "sliding_attention"
