"""The families that can be cut, as data: one table of tensors each, and how their config.json spells the axes."""

from __future__ import annotations

from .rows import AROUND, EMBED, HEAD, HEAD_NORMS, KEYS, NORM, PRE_NORMS, attention, changed, norms, swiglu
from .spec import Exit, Family, Wrapper, tensor

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

# transformers refuses a llama config whose hidden size is no multiple of the number of heads, even with head_dim given
# (models/llama/configuration_llama.py); mistral is the same block in mlx-lm, transformers and llama.cpp, without that
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
    heads_divide=True,
    gguf="gemma3",
)

FAMILIES = (LLAMA, QWEN2, SEED_OSS, QWEN3, GEMMA3)
WRAPPERS = {
    "gemma3": Wrapper(
        "gemma3_text",
        defaults={"num_attention_heads": 8, "num_key_value_heads": 4, "vocab_size": 262208},
        shared=("vocab_size",),
    ),
    "qwen2_vl": Wrapper("qwen2", bare=True),
    "qwen2_5_vl": Wrapper("qwen2", bare=True),
    "qwen3_vl": Wrapper("qwen3", bare=True),
}
