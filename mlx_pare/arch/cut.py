"""Cutting an architecture: the config of the smaller model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ..base.errors import PareError, Unsupported
from . import uneven
from .axes import UNITS
from .describe import describe
from .keep import Keep
from .rope import both_rope_spellings, older_rope_spelling
from .spec import Architecture, Layer


def require_cuttable(arch: Architecture) -> None:
    """Raise Unsupported for a model that cannot be cut."""
    if arch.family.result:
        raise Unsupported(f"{arch.family.name} is what a cut left, and is not cut again", "cut the original instead")
    if not arch.cuttable:
        raise Unsupported(f"{arch.family.name} can be planned for, but not cut")


def positions(arch: Architecture, count: int) -> list[str | None]:
    """The kind that each layer of a model with ``count`` layers must have; None: any. See ``can_keep``."""
    return [None] * count if arch.period is None else [layer.kind for layer in arch.layers[:count]]


def can_keep(arch: Architecture, layers: Sequence[int]) -> bool:
    """Whether stock mlx-lm treats these layers, alone, as it did in the original, and finds all the kinds that it
    needs.

    It may derive the kind of a layer from its index.
    """
    if arch.period is None:
        return arch.family.needed <= {arch.layers[i].mixing for i in layers}
    return len(layers) >= arch.period and [arch.layers[i].kind for i in layers] == positions(arch, len(layers))


def cut(arch: Architecture, keep: Keep, packed: bool = False) -> Architecture:
    """Describe what a cut leaves, with the config.json by which stock mlx-lm loads it.

    Layers that differ in width, or have lost attention or feed-forward, leave as a type that uneven.py knows. Others
    stay in their family, or take one of its exits (see Exit).

    Args:
        arch: the original.
        keep: the layers and units that survive.
        packed: whether the embedding will be stored quantized, which decides whether it may stay tied.
    Returns:
        The architecture that is left.
    Raises:
        Unsupported: the model cannot be cut.
        PareError: the model is not cut along an axis, the kind of a layer would change, or no class of stock mlx-lm can
            hold what is left.
    """
    require_cuttable(arch)
    sources = [layer.source for layer in keep.layers]
    _check_axes(arch, keep)
    if not can_keep(arch, sources):
        if arch.period is None:
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
    smaller = Architecture(arch.family, arch.config, sizes, tuple(kept_sizes), arch.tied, arch.parent)
    if uneven.differ(smaller):
        return describe(uneven.config(smaller))
    config = _config(arch, smaller, sources, packed)
    if arch.parent:
        config = arch.parent.around({key: v for key, v in config.items() if arch.config.get(key) != v})
    left = describe(config, untied=not arch.tied)
    if [layer.kind for layer in left.layers] != [layer.kind for layer in kept_sizes]:
        raise PareError(
            f"{left.config['model_type']}, as which this model would leave, would change the attention kind of a layer",
            "keep a number of heads that divides the hidden size",
        )
    return left


def _check_axes(arch: Architecture, keep: Keep) -> None:
    """Raise PareError for a cut along an axis on which this model is not cut."""
    for axis in sorted({axis for layer in keep.layers for axis in layer.keep} | ({"hidden"} if keep.hidden else set())):
        if why := arch.why_fixed(axis):
            raise PareError(
                f"{arch.family.name} cannot be cut along {axis}: {why}",
                f"choose from {', '.join(arch.cut_axes)}" if arch.cut_axes else None,
            )
    for count in sorted({len(layer.keep["expert"]) for layer in keep.layers if "expert" in layer.keep}):
        if count < (active := arch.layers[0].sizes["active"]):
            raise PareError(f"{count} experts are left, and every token visits {active}", "keep more experts")
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
    there = smaller.layers[0].sizes
    widths = {a: smaller.uniform(a) for a in (*UNITS, "group", "head_dim") if a in there}
    widths |= {"q_head": widths["kv_head"] * widths["group"]} if "kv_head" in widths else {}
    widths |= {"layer": len(sources), **smaller.sizes}
    config |= {key: widths[axis] for axis, key in arch.family.keys.items() if axis in widths}
    if arch.family.resized:
        config |= arch.family.resized(config, widths)
    if arch.family.recounted and len(sources) < len(arch.layers):
        config |= arch.family.recounted(config, [layer.kind for layer in smaller.layers])
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
    return older_rope_spelling(config) if arch.parent else both_rope_spellings(config)
