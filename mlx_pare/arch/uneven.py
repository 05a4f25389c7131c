"""Model types for results whose layers differ in width, or have lost their attention or feed-forward.

Two classes of stock mlx-lm take a size for every layer, and compute what a llama block computes:

- openelm: any number of kv heads and any width of the feed-forward; q, k, v in one matrix, gate and up in another;
  norms of queries and keys, if wanted; no biases, no scaled rope. A layer without feed-forward is stored with one of
  width 1 that is zero. Source: mlx_lm/models/openelm.py.
- nemotron-nas: layers without attention or without feed-forward, which store nothing in their place; widths in
  multiples of 256; biases and scaled rope; all heads of a layer or none, and these as wide as the hidden size.
  Source: mlx_lm/models/nemotron-nas.py.

transformers knows neither type, so it opens the tokenizer of such a directory but not the model.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from ..base.errors import PareError
from .rope import both_rope_spellings, rope_scaling, rotary_share
from .rows import BEFORE, EMBED, HEAD, HEAD_NORMS, NORM, Rows, attention, keys_without, norms, planned, swiglu
from .spec import FUSED, Architecture, Family, tensor, whole

UNIT = 256  # nemotron-nas rounds the width of a feed-forward up to a multiple of this
ABSENT = 1  # width of the zero feed-forward that stands for a missing one in openelm
CARRIED = ("bos_token_id", "eos_token_id", "pad_token_id", "max_position_embeddings", "torch_dtype", "dtype")


def entry(config: Mapping[str, Any], key: str, index: int) -> Any:
    """Read one entry of a config list that has an entry for every layer.

    Args:
        config: the content of config.json.
        key: the key of the list.
        index: the layer.
    Returns:
        The entry.
    Raises:
        PareError: there is no such list or entry.
    """
    values = config.get(key)
    if not isinstance(values, list) or index >= len(values):
        raise PareError(f"config.json says {key} = {str(values)[:80]}, expected a list with an entry for every layer")
    return values[index]


def number(key: str, value: Any) -> float:
    """Check that a value of the config is a positive number. Raises PareError if it is not, or is beyond reason."""
    if not isinstance(value, int | float) or isinstance(value, bool) or not 0 < value < 2**31:
        raise PareError(f"config.json says {key} = {str(value)[:80]}, expected a positive number")
    return value


# ---- openelm ----


def divisible(value: float, divisor: int) -> int:
    """``value`` rounded to a multiple of ``divisor``: make_divisible in mlx_lm/models/openelm.py, with its own
    arithmetic."""
    new = max(divisor, int(value + divisor / 2) // divisor * divisor)
    return int(new + divisor if new < 0.9 * value else new)


def openelm_widths(config: Mapping[str, Any], index: int) -> dict[str, int]:
    """Heads and ffn of one layer. Raises PareError if the config makes no sense."""
    listed = {key: entry(config, key, index) for key in ("num_query_heads", "num_kv_heads")}
    q_heads, kv_heads = (whole(listed, key) for key in listed)
    if q_heads % kv_heads:
        raise PareError(f"{q_heads} query heads cannot share {kv_heads} kv heads evenly")
    multiplier = number("ffn_multipliers", entry(config, "ffn_multipliers", index))
    ffn = divisible(multiplier * whole(config, "model_dim"), whole(config, "ffn_dim_divisor"))
    ffn = whole({"ffn_multipliers": ffn}, "ffn_multipliers")
    return {"kv_head": kv_heads, "group": q_heads // kv_heads, "ffn": ffn}


OPENELM = planned(
    "openelm",
    (
        tensor("attn.qkv_proj.weight", "q_head*head_dim + kv_head*head_dim + kv_head*head_dim, hidden", "attention"),
        tensor("attn.out_proj.weight", "hidden, q_head*head_dim", "attention", "o_proj"),
        tensor("attn.q_norm.weight", "head_dim", "norm", "q_norm", "normalize_qk_projections"),
        tensor("attn.k_norm.weight", "head_dim", "norm", "k_norm", "normalize_qk_projections"),
        tensor("ffn.proj_1.weight", "ffn + ffn, hidden", "ffn", "gate_up_proj"),
        tensor("ffn.proj_2.weight", "hidden, ffn", "ffn", "down_proj"),
        *norms({"attn_norm": "attn_norm", "ffn_norm": "ffn_norm"}),
    ),
    keys={"hidden": "model_dim", "vocab": "vocab_size", "layer": "num_transformer_layers", "head_dim": "head_dim"},
    model=(
        tensor("transformer.token_embeddings.weight", "vocab, hidden", "embedding", "embed_tokens"),
        tensor("transformer.norm.weight", "hidden", "norm", "final_norm"),
        HEAD,
    ),
    prefix="transformer.layers.{layer}.",
    widths=openelm_widths,
    defaults={"normalize_qk_projections": True, "share_input_output_layers": True, "rope_freq_constant": 10000.0},
    tied_key="share_input_output_layers",
    result=True,
)


def openelm_config(smaller: Architecture) -> dict[str, Any]:
    """The keys that openelm reads. With a divisor of 1 its arithmetic gives back every whole width."""
    hidden, layers = smaller.sizes["hidden"], [layer.sizes for layer in smaller.layers]
    return {
        "model_dim": hidden,
        "num_transformer_layers": len(layers),
        "head_dim": layers[0]["head_dim"],
        "num_query_heads": [sizes["kv_head"] * sizes["group"] for sizes in layers],
        "num_kv_heads": [sizes["kv_head"] for sizes in layers],
        "ffn_dim_divisor": 1,
        "ffn_multipliers": [(sizes["ffn"] or ABSENT) / hidden for sizes in layers],
        "ffn_with_glu": True,
        "normalize_qk_projections": "q_norm" in roles(smaller),
        "share_input_output_layers": smaller.tied,
        "rope_freq_constant": number("rope_theta", both_rope_spellings(smaller.config).get("rope_theta")),
    }


def openelm_objection(arch: Architecture) -> str | None:
    """What openelm cannot hold of the layers as they are left, as a predicate; None if it can hold them."""
    if scaling := rope_scaling(arch.config):
        return f"has no rope scaling ({scaling['rope_type']})"
    return "has attention in every layer" if any(not layer.sizes["kv_head"] for layer in arch.layers) else None


# ---- nemotron-nas ----


def nas_block(config: Mapping[str, Any], index: int) -> tuple[Mapping[str, Any], Mapping[str, Any]]:
    """The attention and the ffn in one layer's block_configs. Raises PareError if it is no such block."""
    block = entry(config, "block_configs", index)
    parts = tuple(block.get(part) if isinstance(block, dict) else None for part in ("attention", "ffn"))
    if not all(isinstance(part, dict) for part in parts):
        raise PareError(f"config.json says block_configs = {str(block)[:80]}, expected attention and ffn of a layer")
    if any(part.get("replace_with_linear") for part in parts):
        raise PareError(f"layer {index} has a linear map for attention or feed-forward, which is not described")
    return parts


def nas_kind(config: Mapping[str, Any], index: int) -> str:
    """Which of its two parts a layer has."""
    mixer, ffn = nas_block(config, index)
    return ("feed_forward" if mixer.get("no_op") else "full_attention") + ("+no_ffn" if ffn.get("no_op") else "")


def nas_width(multiplier: float, hidden: int) -> int:
    """The width that nemotron-nas computes: _ffn_mult_to_intermediate_size of the rounded multiplier, as FFNConfig
    keeps it."""
    return -(-int(2 * round(multiplier, 6) * hidden / 3) // UNIT) * UNIT


def nas_multiplier(width: int, hidden: int) -> float:
    """The multiplier that gives a width. nas_width cuts off what rounding to six digits adds, and rounds up what it
    takes."""
    return round(1.5 * width / hidden, 6)


def nas_widths(config: Mapping[str, Any], index: int) -> dict[str, int]:
    """Heads and ffn of one layer; 0 if it has none. Raises PareError if the config makes no sense."""
    mixer, ffn = nas_block(config, index)
    heads = whole(config, "num_attention_heads")
    group = heads if mixer.get("no_op") else whole(mixer, "n_heads_in_group")
    if heads % group:
        raise PareError(f"{heads} query heads cannot share kv heads in groups of {group}")
    width = 0
    if not ffn.get("no_op"):
        width = nas_width(number("ffn_mult", ffn.get("ffn_mult")), whole(config, "hidden_size"))
        width = whole({"ffn_mult": width}, "ffn_mult")
    return {"kv_head": 0 if mixer.get("no_op") else heads // group, "group": group, "ffn": width}


NAS_PARTS: dict[str, Rows] = {
    "full_attention": (*attention("attention_bias", "attention_bias"), *norms({"attn_norm": BEFORE["attn_norm"]})),
    "feed_forward": (),
}
NAS_FFN: dict[str, Rows] = {"": (*swiglu("mlp_bias"), *norms({"ffn_norm": BEFORE["ffn_norm"]})), "+no_ffn": ()}

NEMOTRON_NAS = planned(
    "nemotron-nas",
    {mixer + mark: (*own, *ffn) for mixer, own in NAS_PARTS.items() for mark, ffn in NAS_FFN.items()},
    keys=keys_without("ffn", "kv_head", "head_dim"),
    kinds=nas_kind,
    widths=nas_widths,
    defaults={  # mlx_lm/models/nemotron-nas.py ModelArgs
        "hidden_size": 8192,
        "num_hidden_layers": 80,
        "num_attention_heads": 64,
        "vocab_size": 128256,
        "tie_word_embeddings": False,
    },
    result=True,
    gguf="deci",
)


def nas_config(smaller: Architecture) -> dict[str, Any]:
    """The keys that nemotron-nas reads."""
    hidden, config, present = smaller.sizes["hidden"], smaller.config, roles(smaller)
    # transformers 5 reads rope_type while it looks for the tokenizer. It fails for these types if it does not know the
    # model (modeling_rope_utils.py standardize_rope_params). mlx-lm reads type first (models/rope_utils.py).
    scaling = rope_scaling(config)
    scaling = {**scaling, "type": scaling["rope_type"], "rope_type": "default"} if scaling else None

    def block(sizes: Mapping[str, int]) -> dict[str, Any]:
        mixer = {"n_heads_in_group": sizes["group"]} if sizes["kv_head"] else {"no_op": True}
        ffn = {"ffn_mult": nas_multiplier(sizes["ffn"], hidden)} if sizes["ffn"] else {"no_op": True}
        return {"attention": mixer, "ffn": ffn}

    return {
        "hidden_size": hidden,
        "num_hidden_layers": len(smaller.layers),
        "num_attention_heads": hidden // smaller.layers[0].sizes["head_dim"],
        "block_configs": [block(layer.sizes) for layer in smaller.layers],
        "hidden_act": "silu",
        "attention_bias": bool({"q_proj_bias", "o_proj_bias"} & present),
        "mlp_bias": "down_proj_bias" in present,
        "tie_word_embeddings": smaller.tied,
        "rope_theta": number("rope_theta", both_rope_spellings(config).get("rope_theta")),
        "rope_scaling": scaling,
    }


def nas_objection(arch: Architecture) -> str | None:
    """What nemotron-nas cannot hold of the layers as they are left, as a predicate; None if it can hold them."""
    layers = [layer.sizes for layer in arch.layers]
    heads = [s["kv_head"] * s["group"] * s["head_dim"] for s in layers if s["kv_head"]]
    scaling = rope_scaling(arch.config)
    if scaling and "factor" not in scaling:
        return f"wants a factor with its rope scaling ({scaling['rope_type']})"
    if not heads:
        return "needs a layer with attention"
    if set(heads) != {arch.sizes["hidden"]}:
        return "takes all the heads of a layer or none, together as wide as the hidden size"
    if any(s["ffn"] % UNIT for s in layers):
        return f"takes widths in multiples of {UNIT}"
    return None


# ---- which of them ----


@dataclass(frozen=True)
class Uneven:
    """A class that takes a size for every layer.

    ``holds``: the roles of a source that it has a place for. ``objection``: why it cannot hold the sizes of some
    layers. ``config``: the keys that it reads them from.
    """

    family: Family
    architecture: str
    holds: frozenset[str]
    objection: Callable[[Architecture], str | None]
    config: Callable[[Architecture], dict[str, Any]]

    def why_not(self, arch: Architecture) -> str | None:
        """Why it cannot compute what this model does with layers of these sizes, as a predicate; None if it can."""
        if arch.parent:
            return f"has no other parts, and this is the language model of a {arch.parent.model_type}"
        foreign = sorted(roles(arch) - self.holds)
        if biases := [role for role in foreign if role.endswith("_bias")]:
            return f"has no biases ({', '.join(biases)})"
        if foreign or not arch.family.plain:
            return f"has no {', '.join(foreign) or 'such blocks'}"
        if any(layer.kind != "full_attention" for layer in arch.layers):
            return "has no sliding windows"
        if rotary_share(arch.config) != 1:
            return "has no rope for a part of a head"
        if arch.config.get("rope_traditional"):
            return "has no rope that pairs neighbours"
        return self.objection(arch)


_PLAIN = {row.role for row in (EMBED, NORM, HEAD, *attention(), *swiglu(), *norms(BEFORE))} | set(
    FUSED
)  # what every llama block has
EXITS = (  # the first that can hold a result is taken; nemotron-nas stores nothing for missing parts
    Uneven(
        NEMOTRON_NAS,
        "DeciLMForCausalLM",
        frozenset(_PLAIN | {row.role for row in (*attention(True, True), *swiglu(True))}),
        nas_objection,
        nas_config,
    ),
    Uneven(
        OPENELM,
        "OpenELMForCausalLM",
        frozenset(_PLAIN | {row.role for row in HEAD_NORMS}),
        openelm_objection,
        openelm_config,
    ),
)
FAMILIES = (OPENELM, NEMOTRON_NAS)


def roles(arch: Architecture) -> set[str]:
    """The roles of all tensors of a model."""
    return {tensor.spec.role for tensor in arch.tensors()}


def differ(smaller: Architecture) -> bool:
    """Whether the layers of a cut each need a size: they differ, or all lack a part. Layers with experts cannot."""
    if smaller.uses("expert"):
        return False
    sizes = {(layer.sizes["ffn"], layer.sizes["kv_head"]) for layer in smaller.layers}
    return len(sizes) > 1 or 0 in next(iter(sizes))


def config(smaller: Architecture) -> dict[str, Any]:
    """The config.json by which stock mlx-lm loads such layers.

    ``smaller``: the sizes that are left of a source, in the source's family. Raises PareError, with the reasons, if no
    class can hold them.
    """
    objections = []
    for exit_ in EXITS:
        if (why := exit_.why_not(smaller)) is None:
            carried = {key: smaller.config[key] for key in CARRIED if key in smaller.config}
            named = {"model_type": exit_.family.name, "architectures": [exit_.architecture]}
            eps = number("rms_norm_eps", smaller.config.get("rms_norm_eps"))
            shared = {"vocab_size": smaller.sizes["vocab"], "rms_norm_eps": eps}
            return {**carried, **named, **shared, **exit_.config(smaller)}
        objections.append(f"{exit_.family.name} {why}")
    raise PareError(
        f"{_difference(smaller)}, which no class of stock mlx-lm can hold: {', '.join(objections)}",
        "keep as many units in every layer",
    )


def _difference(smaller: Architecture) -> str:
    sizes = {axis: [layer.sizes[axis] for layer in smaller.layers] for axis in ("kv_head", "ffn")}
    for axis, part in (("kv_head", "attention"), ("ffn", "feed-forward")):
        if 0 in sizes[axis]:
            return f"layers have no {part} ({sizes[axis].count(0)} of {len(sizes[axis])})"
    return " and ".join(
        f"layers differ in {axis} ({min(counts)} to {max(counts)})"
        for axis, counts in sizes.items()
        if len(set(counts)) > 1
    )


# ---- what a planner may ask before it chooses ----


def uneven_types(arch: Architecture) -> list[str]:
    """The model types that this model may leave as if its layers differ."""
    return [e.family.name for e, why in zip(EXITS, _whole_objections(arch), strict=True) if why is None]


def width_multiple(arch: Architecture) -> int | None:
    """The number that feed-forward widths must be multiples of if layers may lose whole parts; None: no class allows
    that."""
    return UNIT if NEMOTRON_NAS.name in uneven_types(arch) else None


def why_uniform(arch: Architecture, axis: str | None = None) -> str | None:
    """Why all layers of this model must keep the same number of units on ``axis``; None if they need not.

    ``axis``: "ffn" or "kv_head"; None: both.
    """
    if arch.uses("expert"):
        return f"mlx-lm's {arch.family.name} has one number of experts for all layers"
    nas, openelm = _whole_objections(arch)
    if openelm is None or (axis == "ffn" and nas is None):
        return None
    return f"openelm, which takes a width for every layer, {openelm}"


def why_no_sublayer_drops(arch: Architecture, sublayer: str = "attention") -> str | None:
    """Why no layer of this model can lose its ``sublayer`` ("attention" or "ffn"); None if one can.

    A layer can lose its attention only if all other layers keep all their heads, and ffn widths that are multiples of
    256.
    """
    nas, openelm = _whole_objections(arch)
    if nas is None or (sublayer == "ffn" and openelm is None):
        return None
    return f"nemotron-nas, which takes layers without attention, {nas}"


def _whole_objections(arch: Architecture) -> tuple[str | None, str | None]:
    """Why nemotron-nas and openelm cannot hold a model's blocks, for any width that its feed-forwards are cut to."""
    sizes = [{**layer.sizes, "ffn": max(UNIT, layer.sizes.get("ffn", 0) // UNIT * UNIT)} for layer in arch.layers]
    layers = tuple(type(layer)(layer.kind, s) for layer, s in zip(arch.layers, sizes, strict=True))
    widened = Architecture(arch.family, arch.config, arch.sizes, layers, arch.tied, arch.parent)
    nas, openelm = (exit_.why_not(widened) for exit_ in EXITS)
    return nas, openelm
