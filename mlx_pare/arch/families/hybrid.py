"""Families that mix attention with layers whose state has a fixed size, as data. Their heads are not cut."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ...base.errors import PareError
from ..parent import Wrapper
from ..rows import (
    EMBED,
    HEAD_NORMS,
    KEYS,
    PRE_NORMS,
    attention,
    feed_forward,
    keys_without,
    norms,
    planned,
    swiglu,
    without,
)
from ..spec import layer_types, listed_layers, tensor, whole
from .moe import DENSE, EXPERTS, WITHOUT, along, experts, gated_shared, is_sparse, router

# ---- gated DeltaNet: qwen3_next, qwen3_5 ----

LINEAR_KEYS = {
    "linear_k_head": "linear_num_key_heads",
    "linear_v_head": "linear_num_value_heads",
    "linear_k_dim": "linear_key_head_dim",
    "linear_v_dim": "linear_value_head_dim",
    "conv_kernel": "linear_conv_kernel_dim",
}
K, V = "linear_k_head*linear_k_dim", "linear_v_head*linear_v_dim"

# q_proj makes the queries and the gate of the output
GATED_ATTENTION = (
    *attention("attention_bias", "attention_bias", queries="q_head*head_dim + q_head*head_dim"),
    *HEAD_NORMS,
)


def delta_net(inputs: Mapping[str, str], keeps_decay: bool = False):
    """The rows of a gated DeltaNet.

    ``inputs``: name -> rows of its input projections, which the two families divide differently. ``keeps_decay``:
    whether A_log stays float32.
    """
    return (
        tensor("linear_attn.conv1d.weight", f"{K} + {K} + {V}, conv_kernel, one", "attention", stored="float"),
        *(tensor(f"linear_attn.{name}.weight", f"{rows}, hidden", "attention") for name, rows in inputs.items()),
        tensor("linear_attn.dt_bias", "linear_v_head", "attention", "dt_bias"),
        tensor("linear_attn.A_log", "linear_v_head", "attention", "a_log", stored="float32" if keeps_decay else ""),
        tensor("linear_attn.norm.weight", "linear_v_dim", "norm", "linear_norm"),
        tensor("linear_attn.out_proj.weight", f"hidden, {V}", "attention"),
    )


def mixed(mixer: tuple):
    """The four kinds of blocks: full or linear attention, dense or with experts."""
    return {
        kind + mark: (*rows, *ffn, *PRE_NORMS)
        for kind, rows in (("full_attention", GATED_ATTENTION), ("linear_attention", mixer))
        for mark, ffn in (("", swiglu()), ("+moe", gated_shared("8bit")))
    }


def delta_kind(config: Mapping[str, Any], index: int) -> str:
    """The kind of a layer by mlx_lm/models/qwen3_5.py DecoderLayer: every full_attention_interval-th has full
    attention."""
    full = (index + 1) % whole(config, "full_attention_interval") == 0
    return ("full_attention" if full else "linear_attention") + ("+moe" if config.get("num_experts") else "")


def next_kind(config: Mapping[str, Any], index: int) -> str:
    """The kind of a layer by mlx_lm/models/qwen3_next.py Qwen3NextDecoderLayer."""
    return delta_kind(config, index).partition("+")[0] + ("+moe" if is_sparse(config, index) else "")


DELTA_KEYS = {**KEYS, **EXPERTS, **LINEAR_KEYS, "shared_ffn": "shared_expert_intermediate_size"}

QWEN3_5 = planned(
    "qwen3_5",
    mixed(
        delta_net(
            {
                "in_proj_qkv": f"{K} + {K} + {V}",
                "in_proj_z": V,
                "in_proj_b": "linear_v_head",
                "in_proj_a": "linear_v_head",
            },
            keeps_decay=True,
        )
    ),
    model_types=("qwen3_5_text", "qwen3_5_moe_text"),
    **along("layer", "ffn", "expert"),
    fixed=(WITHOUT, DENSE),
    keys=DELTA_KEYS,
    kinds=delta_kind,
    period="full_attention_interval",
    defaults={"intermediate_size": 14336, "full_attention_interval": 4, "tie_word_embeddings": False},
    gguf="qwen35",
)

QWEN3_NEXT = planned(
    "qwen3_next",
    mixed(
        delta_net(
            {"in_proj_qkvz": f"{K} + {K} + {V} + {V}", "in_proj_ba": "linear_v_head + linear_v_head"},
        )
    ),
    keys=DELTA_KEYS,
    **along("layer", "expert"),
    fixed=(WITHOUT,),
    kinds=next_kind,
    period="full_attention_interval",
    defaults={"full_attention_interval": 4, "tie_word_embeddings": False},
    gguf="qwen3next",
)

# ---- short convolutions: lfm2 ----

SHORT_CONV = (
    tensor("conv.conv.weight", "hidden, conv_kernel, one", "attention", stored="float"),
    tensor("conv.conv.bias", "hidden", "attention", "conv_bias", "conv_bias"),
    tensor("conv.in_proj.weight", "hidden + hidden + hidden, hidden", "attention"),
    tensor("conv.in_proj.bias", "hidden + hidden + hidden", "attention", "in_proj_bias", "conv_bias"),
    tensor("conv.out_proj.weight", "hidden, hidden", "attention"),
    tensor("conv.out_proj.bias", "hidden", "attention", "out_proj_bias", "conv_bias"),
)
LFM2_ATTENTION = (
    *without(attention(), "o_proj"),
    tensor("self_attn.out_proj.weight", "hidden, q_head*head_dim", "attention", "o_proj"),
    tensor("self_attn.q_layernorm.weight", "head_dim", "norm", "q_norm"),
    tensor("self_attn.k_layernorm.weight", "head_dim", "norm", "k_norm"),
)
LFM2_MIXERS = {"conv": SHORT_CONV, "full_attention": LFM2_ATTENTION}
LFM2_NORMS = norms({"attn_norm": "operator_norm", "ffn_norm": "ffn_norm"})
LFM2_MODEL = (EMBED, *norms({"final_norm": "model.embedding_norm"}))


def conv_kind(config: Mapping[str, Any], index: int) -> str:
    """The kind of a layer by mlx_lm/models/lfm2.py ModelArgs: the config lists the layers that attend, or the kinds of
    all."""
    count = whole(config, "num_hidden_layers")
    if config.get("full_attn_idxs") is None:
        return layer_types(config, count)[index]
    return "full_attention" if index in listed_layers(config, "full_attn_idxs", count) else "conv"


def lfm2_key(config: Mapping[str, Any]) -> str:
    """The key that an lfm2 has its ffn under."""
    return "block_ff_dim" if config.get("block_ff_dim") is not None else "intermediate_size"


def lfm2_widths(config: Mapping[str, Any], index: int) -> dict[str, int]:
    """The ffn of a layer by mlx_lm/models/lfm2.py MLP: two thirds of the config's width, rounded up, if the config asks
    for it."""
    width = whole(config, lfm2_key(config))
    if config.get("block_auto_adjust_ff_dim"):
        factor, multiple = config.get("block_ffn_dim_multiplier"), whole(config, "block_multiple_of")
        if not (factor is None or (isinstance(factor, int | float) and 0 < factor < 2**31)):
            raise PareError(f"config.json says block_ffn_dim_multiplier = {factor!r}, expected a positive number")
        width = int(2 * width / 3)
        width = multiple * -(-int(width if factor is None else factor * width) // multiple)
    return {"ffn": width}


def lfm2_width(config: Mapping[str, Any], sizes: Mapping[str, int]) -> dict[str, Any]:
    """The keys by which ``lfm2_widths`` gives this ffn."""
    return {lfm2_key(config): sizes["ffn"], "block_auto_adjust_ff_dim": False} if "ffn" in sizes else {}


def conv_recounted(config: Mapping[str, Any], kinds: Sequence[str]) -> dict[str, Any]:
    """The keys of lfm2 and lfm2_moe for layers of these kinds; layer_types are a list for every layer."""
    found: dict[str, Any] = {}
    if config.get("full_attn_idxs") is not None:
        found["full_attn_idxs"] = [i for i, kind in enumerate(kinds) if kind.startswith("full_attention")]
    if "num_dense_layers" in config:  # the first ones
        found["num_dense_layers"] = sum("+moe" not in kind for kind in kinds)
    return found


LFM2_FFN = feed_forward("feed_forward", {"gate_proj": "w1", "up_proj": "w3", "down_proj": "w2"})
LFM2 = planned(
    "lfm2",
    {kind: (*mixer, *LFM2_FFN, *LFM2_NORMS) for kind, mixer in LFM2_MIXERS.items()},
    keys=keys_without("ffn", "head_dim", conv_kernel="conv_L_cache"),
    model=LFM2_MODEL,
    kinds=conv_kind,
    widths=lfm2_widths,
    resized=lfm2_width,
    recounted=conv_recounted,
    **along("layer", "ffn"),
    needed=frozenset(LFM2_MIXERS),
    tied=True,
)

LFM2_EXPERTS = (
    *router("feed_forward.gate", "8bit"),
    *experts("feed_forward.switch_mlp"),
    tensor("feed_forward.expert_bias", "expert", "ffn", "router_bias", "use_expert_bias", stored="float32"),
)
LFM2_MOE = planned(
    "lfm2_moe",
    {
        kind + mark: (*mixer, *ffn, *LFM2_NORMS)
        for kind, mixer in LFM2_MIXERS.items()
        for mark, ffn in (("", swiglu(path="feed_forward")), ("+moe", LFM2_EXPERTS))
    },
    keys=keys_without("head_dim", conv_kernel="conv_L_cache", **EXPERTS),
    **along("layer", "expert"),
    needed=frozenset({"full_attention"}),
    recounted=conv_recounted,
    model=LFM2_MODEL,
    kinds=lambda config, i: conv_kind(config, i) + ("+moe" if i >= whole(config, "num_dense_layers", least=0) else ""),
    tied=True,
    gguf="lfm2moe",
)

FAMILIES = (QWEN3_5, QWEN3_NEXT, LFM2, LFM2_MOE)
TOWERS = ("vision_tower", "model.visual")
WRAPPERS = {
    "qwen3_5": Wrapper("qwen3_5_text", bare=True, beside=TOWERS),
    "qwen3_5_moe": Wrapper("qwen3_5_moe_text", bare=True, beside=TOWERS),
    "lfm2-vl": Wrapper("lfm2"),
}
