"""All Gemma families except gemma2 and gemma3, which can be cut, as data. For planning only."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ...base.errors import PareError
from ..parent import Wrapper
from ..rows import (
    AROUND,
    BEFORE,
    EMBED,
    HEAD,
    HEAD_NORMS,
    KEYS,
    NORM,
    attention,
    changed,
    every,
    keys_without,
    listed,
    norms,
    planned,
    swiglu,
    without,
)
from ..spec import layer_types, tensor, whole
from .moe import experts
from .post_norm import PLUS_ONE

# It has no window in mlx-lm, which ignores the config here.
GEMMA = planned("gemma", (*attention(), *swiglu(), *norms(BEFORE, "norm+1")), model=PLUS_ONE, tied=True)

# ---- layers that use the keys and values of an earlier one, and a further embedding for every layer ----


def _first_shared(config: Mapping[str, Any]) -> int:
    """The first layer that uses the cache of an earlier one."""
    return whole(config, "num_hidden_layers") - whole(config, "num_kv_shared_layers", least=0)


def _shared(config: Mapping[str, Any], index: int) -> bool:
    return index >= _first_shared(config)


PER_LAYER_MODEL = (
    ("embed_tokens_per_layer.weight", "layer_vocab, layer*layer_input", "embedding", "embed_per_layer"),
    ("per_layer_model_projection.weight", "layer*layer_input, hidden", "ffn", "per_layer_model_projection"),
    ("per_layer_projection_norm.weight", "layer_input", "norm", "per_layer_projection_norm"),
)
PER_LAYER_KEYS = {"layer_vocab": "vocab_size_per_layer_input", "layer_input": "hidden_size_per_layer_input"}
FLAG = "hidden_size_per_layer_input"


def per_layer_model(path: str, when: str | None = None):
    """The rows outside the blocks for the further input that every layer gets."""
    return tuple(tensor(path + name, dims, part, role, when) for name, dims, part, role in PER_LAYER_MODEL)


def per_layer_block(when: str | None = None):
    """The rows of a block for that input."""
    return (
        tensor("per_layer_input_gate.weight", "layer_input, hidden", "ffn", None, when),
        tensor("per_layer_projection.weight", "hidden, layer_input", "ffn", None, when),
        tensor("post_per_layer_input_norm.weight", "hidden", "norm", None, when),
    )


# ---- gemma4 ----

GEMMA4_MOE = (  # in addition to the dense feed-forward, which every token visits too
    tensor("router.proj.weight", "expert, hidden", "ffn", "router", stored="8bit"),
    tensor("router.scale", "hidden", "ffn", "router_scale"),
    tensor("router.per_expert_scale", "expert", "ffn", "router_expert_scale"),
    *experts("experts.switch_glu"),
    *norms(
        {
            "dense_post_norm": "post_feedforward_layernorm_1",
            "expert_norm": "pre_feedforward_layernorm_2",
            "expert_post_norm": "post_feedforward_layernorm_2",
        }
    ),
)
GEMMA4_FFN = (
    *swiglu(),
    *norms(AROUND),
    *per_layer_block(FLAG),
    tensor("layer_scalar", "one", "norm", "layer_scalar"),
)
GEMMA4_ATTENTION = {
    "sliding_attention": (*attention(), *HEAD_NORMS),
    "full_attention": (*changed(attention(), ("v_proj",), when="!attention_k_eq_v"), *HEAD_NORMS),
}
for _kind in tuple(GEMMA4_ATTENTION):
    GEMMA4_ATTENTION[f"{_kind}_shared"] = without(GEMMA4_ATTENTION[_kind], "k_proj", "v_proj", "k_norm")


def gemma4_kind(config: Mapping[str, Any], index: int) -> str:
    """The kind of a layer by mlx_lm/models/gemma4_text.py Attention, DecoderLayer."""
    kind = listed(every("sliding_window_pattern"))(config, index)
    return kind + ("_shared" if _shared(config, index) else "") + ("+moe" if config.get("enable_moe_block") else "")


def gemma4_widths(config: Mapping[str, Any], index: int) -> dict[str, int]:
    """The sizes that differ by layer: full attention has other heads, and layers without a cache may have twice the
    ffn."""
    found = {}
    heads = whole(config, "num_attention_heads")
    if gemma4_kind(config, index).startswith("full_attention"):
        if config.get("global_head_dim"):
            found["head_dim"] = whole(config, "global_head_dim")
        if config.get("attention_k_eq_v") and config.get("num_global_key_value_heads") is not None:
            found["kv_head"] = whole(config, "num_global_key_value_heads")
            if heads % found["kv_head"]:
                raise PareError(f"{heads} query heads cannot share {found['kv_head']} global kv heads evenly")
            found["group"] = heads // found["kv_head"]
    if config.get("use_double_wide_mlp") and _shared(config, index) and _first_shared(config) > 0:
        found["ffn"] = 2 * whole(config, "intermediate_size")
    return found


GEMMA4 = planned(
    "gemma4_text",
    {
        kind + mark: (*attn, *GEMMA4_FFN, *moe)
        for kind, attn in GEMMA4_ATTENTION.items()
        for mark, moe in (("", ()), ("+moe", GEMMA4_MOE))
    },
    keys={
        **KEYS,
        **PER_LAYER_KEYS,
        "expert": "num_experts",
        "active": "top_k_experts",
        "expert_ffn": "moe_intermediate_size",
    },
    model=(EMBED, NORM, HEAD, *per_layer_model("model.", FLAG)),
    kinds=gemma4_kind,
    widths=gemma4_widths,
    defaults={  # mlx_lm/models/gemma4_text.py ModelArgs
        "hidden_size": 1536,
        "num_hidden_layers": 35,
        "intermediate_size": 6144,
        "num_attention_heads": 8,
        "num_key_value_heads": 1,
        "head_dim": 256,
        "global_head_dim": 512,
        "vocab_size": 262144,
        "vocab_size_per_layer_input": 262144,
        "hidden_size_per_layer_input": 256,
        "num_kv_shared_layers": 20,
        "use_double_wide_mlp": True,
        "sliding_window": 512,
        "sliding_window_pattern": 5,
        "max_position_embeddings": 131072,
    },
    gguf="gemma4",
)

# ---- gemma3n ----

ALTUP_COPIES = 4  # of all published models; one projection fewer than that are separate tensors


def gemma3n_kind(config: Mapping[str, Any], index: int) -> str:
    """The kind of a layer by mlx_lm/models/gemma3n.py make_cache. Layers that share a cache still store k_proj and
    v_proj."""
    if whole(config, "altup_num_inputs") != ALTUP_COPIES:
        raise PareError(f"gemma3n is described with altup_num_inputs = {ALTUP_COPIES} only")
    kind = layer_types(config, whole(config, "num_hidden_layers"))[index]
    return f"{kind}_shared" if _shared(config, index) else kind


def gemma3n_widths(config: Mapping[str, Any], index: int) -> dict[str, int]:
    """The ffn of one layer: intermediate_size is one number, or a list with one for every layer."""
    given = config.get("intermediate_size")
    if isinstance(given, list) and index < len(given):
        config = {"intermediate_size": given[index]}
    return {"ffn": whole(config, "intermediate_size")}


GEMMA3N_BLOCK = (
    *attention(),
    *HEAD_NORMS,
    *swiglu(),
    *norms(AROUND),
    *per_layer_block(),
    tensor("altup.correct_output_scale", "hidden", "ffn", "altup_scale"),
    tensor("altup.correction_coefs.weight", "altup, altup", "ffn"),
    tensor("altup.prediction_coefs.weight", "altup*altup, altup", "ffn"),
    tensor("altup.modality_router.weight", "altup, hidden", "ffn"),
    *norms({"altup_norm": "altup.router_norm", "laurel_norm": "laurel.post_laurel_norm"}),
    tensor("laurel.linear_left.weight", "laurel, hidden", "ffn"),
    tensor("laurel.linear_right.weight", "hidden, laurel", "ffn"),
)
GEMMA3N = planned(
    "gemma3n",
    {f"{kind}{mark}": GEMMA3N_BLOCK for kind in ("full_attention", "sliding_attention") for mark in ("", "_shared")},
    model_types=("gemma3n_text",),
    prefix="layers.{layer}.",
    keys=keys_without("ffn", altup="altup_num_inputs", laurel="laurel_rank", **PER_LAYER_KEYS),
    model=(
        tensor("embed_tokens.weight", "vocab, hidden", "embedding"),
        tensor("norm.weight", "hidden", "norm", "final_norm"),
        *per_layer_model(""),
        *(
            tensor(f"{name}.{i}.weight", "hidden, hidden", "ffn", name)
            for name in ("altup_projections", "altup_unembed_projections")
            for i in range(ALTUP_COPIES - 1)
        ),
    ),
    kinds=gemma3n_kind,
    widths=gemma3n_widths,
    tied=True,
)

FAMILIES = (GEMMA, GEMMA4, GEMMA3N)
WRAPPERS = {
    "gemma4": Wrapper("gemma4_text", shared=("vocab_size",)),
    "gemma4_unified": Wrapper("gemma4_text", shared=("vocab_size",)),
    "gemma3n": Wrapper("gemma3n_text", prefix="model.language_model."),
}
