"""The families that can be cut, as data: one table of tensors each, and how their config.json spells the axes.

Families with norms behind their matrices are in arch/families/post_norm.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..parent import VISUAL, Wrapper
from ..rope import rope_scaling, rotary_share
from ..rows import (
    AROUND,
    EMBED,
    FUSED,
    HEAD,
    HEAD_NORMS,
    KEYS,
    NORM,
    PRE_NORMS,
    SQUARE_KEYS,
    attention,
    changed,
    norms,
    swiglu,
)
from ..spec import Exit, Family, Fixed, tensor, whole

LLAMA_BLOCK = attention("attention_bias", "attention_bias") + swiglu("mlp_bias") + PRE_NORMS
QWEN2_BLOCK = attention(qkv_bias=True) + swiglu() + PRE_NORMS
QWEN3_BLOCK = attention() + HEAD_NORMS + swiglu() + PRE_NORMS
SEED_OSS_BLOCK = attention("attention_bias", "attention_out_bias") + swiglu("mlp_bias") + PRE_NORMS

GEMMA3_BLOCK = (
    *attention(),
    *swiglu(),
    *changed(HEAD_NORMS, ("q_norm", "k_norm"), transforms=("norm+1",)),
    *norms(AROUND, "norm+1"),
)

# transformers refuses a llama config whose hidden size is no multiple of the number of heads, even if head_dim is given
# (models/llama/configuration_llama.py). mistral is the same block in mlx-lm, transformers and llama.cpp, without that
# check and without biases. seed_oss is the same block with biases.
LLAMA = Family(
    name="llama",
    model_types=("llama", "mistral"),
    keys=KEYS,
    model=(EMBED, NORM, HEAD),
    blocks={"full_attention": LLAMA_BLOCK, "sliding_attention": LLAMA_BLOCK},
    kinds="layer_types",
    defaults={"tie_word_embeddings": True, "rope_theta": 10000.0},
    cuttable=frozenset({"layer", "ffn", "kv_head", "hidden"}),
    exits=(
        Exit(
            lambda sizes, config: (
                sizes["hidden"] % sizes["q_head"] != 0
                and config["model_type"] == "llama"
                and not (config.get("attention_bias") or config.get("mlp_bias"))
            ),
            "mistral",
            "MistralForCausalLM",
            {"sliding_window": None},
        ),
        *(
            Exit(
                lambda sizes, config, biased=biased: (
                    sizes["hidden"] % sizes["q_head"] != 0
                    and config["model_type"] == "llama"
                    and bool(config.get("attention_bias")) == biased
                ),
                "seed_oss",
                "SeedOssForCausalLM",
                {"attention_bias": biased, "attention_out_bias": biased},
                unties_packed=True,
            )
            for biased in (True, False)
        ),
    ),
    plain=True,
    gguf="llama",
    gguf_rope="norm",
)

# mlx_lm/models/qwen2.py computes head_dim = hidden // heads, so any other head count leaves as seed_oss.
QWEN2 = Family(
    name="qwen2",
    model_types=("qwen2",),
    keys={k: v for k, v in KEYS.items() if k != "head_dim"},
    model=(EMBED, NORM, HEAD),
    blocks={"full_attention": QWEN2_BLOCK},
    defaults={"tie_word_embeddings": True, "rope_theta": 1000000.0},
    cuttable=frozenset({"layer", "ffn", "kv_head", "hidden"}),
    exits=(
        Exit(
            lambda sizes, config: sizes["q_head"] * sizes["head_dim"] != sizes["hidden"],
            "seed_oss",
            "SeedOssForCausalLM",
            {"attention_bias": True, "attention_out_bias": False, "mlp_bias": False},
            unties_packed=True,
        ),
    ),
    plain=True,
    gguf="qwen2",
)

SEED_OSS = Family(
    name="seed_oss",
    model_types=("seed_oss",),
    keys=KEYS,
    model=(EMBED, NORM, HEAD),
    blocks={"full_attention": SEED_OSS_BLOCK},
    defaults={"tie_word_embeddings": True, "rope_theta": 10000.0},
    cuttable=frozenset({"layer", "ffn", "kv_head", "hidden"}),
    plain=True,
    gguf="seed_oss",
)

QWEN3 = Family(
    name="qwen3",
    model_types=("qwen3",),
    keys=KEYS,
    model=(EMBED, NORM, HEAD),
    blocks={"full_attention": QWEN3_BLOCK},
    cuttable=frozenset({"layer", "ffn", "kv_head", "hidden"}),
    plain=True,
    gguf="qwen3",
)

# hidden is not cuttable: the embedding is scaled by sqrt(hidden), in every runtime.
GEMMA3 = Family(
    name="gemma3_text",
    model_types=("gemma3_text",),
    keys=KEYS,
    model=(EMBED, tensor("model.norm.weight", "hidden", "norm", "final_norm", None, "norm+1"), HEAD),
    blocks={"full_attention": GEMMA3_BLOCK, "sliding_attention": GEMMA3_BLOCK},
    kinds="sliding_window_pattern",
    period="sliding_window_pattern",
    defaults={  # mlx_lm/models/gemma3_text.py ModelArgs
        "hidden_size": 1152,
        "num_hidden_layers": 26,
        "intermediate_size": 6912,
        "num_attention_heads": 4,
        "num_key_value_heads": 1,
        "head_dim": 256,
        "vocab_size": 262144,
        "sliding_window": 512,
        "sliding_window_pattern": 6,
        "rope_theta": 1000000.0,
        "rope_local_base_freq": 10000.0,
        "query_pre_attn_scalar": 256,
        "rms_norm_eps": 1e-6,
        "max_position_embeddings": 32768,
    },
    divides=True,  # its configuration's validate_architecture
    fixed=(Fixed(("hidden",), "its embedding is scaled by the root of the hidden size"),),
    gguf="gemma3",
)

# ---- llama's block with a difference ----


def _rope_is_plain(config: Mapping[str, Any]) -> bool:
    """Whether rope turns the whole head and is not scaled."""
    return not rope_scaling(config) and rotary_share(config) == 1


# q, k and v are one matrix, gate and up another. mlx_lm/models/phi3.py computes head_dim = hidden // heads, so any
# other head count leaves as mistral, whose matrices are separate. Its sliding window is in the config, not in mlx-lm.
PHI3_BLOCK = (
    tensor("self_attn.qkv_proj.weight", "q_head*head_dim + kv_head*head_dim + kv_head*head_dim, hidden", "attention"),
    tensor("self_attn.o_proj.weight", "hidden, q_head*head_dim", "attention"),
    *FUSED,
    *PRE_NORMS,
)
PHI3 = Family(
    name="phi3",
    model_types=("phi3",),
    keys=SQUARE_KEYS,
    model=(EMBED, NORM, HEAD),
    blocks={"full_attention": PHI3_BLOCK},
    defaults={"tie_word_embeddings": False, "rope_theta": 10000.0},
    cuttable=frozenset({"layer", "ffn", "kv_head", "hidden"}),
    fixed=(
        Fixed(
            ("kv_head", "hidden"),
            "mlx-lm computes the width of its heads from their number, and no other class has its scaled or partial "
            "rope",
            lambda config: not _rope_is_plain(config),
        ),
    ),
    exits=(
        Exit(
            lambda sizes, config: sizes["q_head"] * sizes["head_dim"] != sizes["hidden"],
            "mistral",
            "MistralForCausalLM",
            {"sliding_window": None},
        ),
    ),
    plain=True,
    gguf="phi3",
)


def smollm3_rope(config: Mapping[str, Any], index: int) -> int:
    """Whether a layer has rope (1 or 0) if the config lists none: mlx_lm/models/smollm3.py ModelArgs."""
    interval = config.get("no_rope_layer_interval")
    return int((index + 1) % (4 if interval is None else whole(config, "no_rope_layer_interval")) != 0)


SMOLLM3 = Family(  # its class has no make_cache: layers with a window cache everything
    name="smollm3",
    model_types=("smollm3",),
    keys=KEYS,
    model=(EMBED, NORM, HEAD),
    blocks={"full_attention": LLAMA_BLOCK},
    defaults={"tie_word_embeddings": True, "rope_theta": 10000.0},
    per_layer=("layer_types", "no_rope_layers"),
    by_place={"no_rope_layers": smollm3_rope},
    cuttable=frozenset({"layer", "ffn", "kv_head", "hidden"}),
    gguf="smollm3",
    gguf_rope="norm",
)

GRANITE = Family(  # "8bit": mlx_lm/models/granite.py quant_predicate
    name="granite",
    model_types=("granite",),
    keys=SQUARE_KEYS,
    model=(EMBED, NORM, *changed((HEAD,), ("lm_head",), stored="8bit")),
    blocks={"full_attention": changed(LLAMA_BLOCK, ("o_proj", "down_proj"), stored="8bit")},
    defaults={"tie_word_embeddings": True},
    residual="residual_multiplier",
    exact=frozenset({"layer", "ffn", "vocab"}),
    cuttable=frozenset({"layer", "ffn"}),
    fixed=(
        Fixed(
            ("kv_head", "hidden"),
            "mlx-lm computes the width of its heads from their number, and no other class has its multipliers",
        ),
    ),
    gguf="granite",
    gguf_rope="norm",
)

MINISTRAL_BLOCK = (*attention(), *swiglu(), *PRE_NORMS)
MINISTRAL3 = Family(
    name="ministral3",
    model_types=("ministral3",),
    keys=KEYS,
    model=(EMBED, NORM, HEAD),
    blocks={"full_attention": MINISTRAL_BLOCK, "sliding_attention": MINISTRAL_BLOCK},
    kinds="layer_types",
    cuttable=frozenset({"layer", "ffn", "kv_head", "hidden"}),
    gguf="mistral3",
    gguf_rope="norm",
)

FAMILIES = (LLAMA, QWEN2, SEED_OSS, QWEN3, GEMMA3, PHI3, SMOLLM3, GRANITE, MINISTRAL3)
WRAPPERS = {
    "gemma3": Wrapper(
        "gemma3_text",
        defaults={"num_attention_heads": 8, "num_key_value_heads": 4, "vocab_size": 262208},
        shared=("vocab_size",),
    ),
    "qwen2_vl": Wrapper("qwen2", bare=True, beside=VISUAL),
    "qwen2_5_vl": Wrapper("qwen2", bare=True, beside=VISUAL),
    "qwen3_vl": Wrapper("qwen3", bare=True, beside=VISUAL),
}
