"""Families with multi-head latent attention, as data. They are cut along experts and layers.

A head has a part without rope and a part with rope. They alternate in the rows of a matrix, head by head. Dimensions
cannot express that, because they are sums of products. The lengths are right, and heads are never sliced.
"""

from __future__ import annotations

from ..parent import TOWERS, Wrapper
from ..rows import PRE_NORMS, keys_without, swiglu, without
from ..spec import tensor
from .moe import GROUPED, ROUTED, ROUTED_MLP, after_dense, dense_first, shared_width, sparse

QUERIES, KEYS = "q_head*nope_dim + q_head*rope_dim", "kv_latent + rope_dim"

LATENT_IN = (  # without q_lora_rank, one matrix makes the queries
    tensor("self_attn.q_proj.weight", f"{QUERIES}, hidden", "attention", None, "!q_lora_rank"),
    tensor("self_attn.q_a_proj.weight", "q_latent, hidden", "attention", None, "q_lora_rank"),
    tensor("self_attn.q_a_proj.bias", "q_latent", "attention", "q_a_proj_bias", "q_lora_rank attention_bias"),
    tensor("self_attn.q_a_layernorm.weight", "q_latent", "norm", "q_a_norm", "q_lora_rank"),
    tensor("self_attn.q_b_proj.weight", f"{QUERIES}, q_latent", "attention", None, "q_lora_rank"),
    tensor("self_attn.kv_a_proj_with_mqa.weight", f"{KEYS}, hidden", "attention", "kv_a_proj"),
    tensor("self_attn.kv_a_proj_with_mqa.bias", KEYS, "attention", "kv_a_proj_bias", "attention_bias"),
    tensor("self_attn.kv_a_layernorm.weight", "kv_latent", "norm", "kv_a_norm"),
)
LATENT_OUT = (
    tensor("self_attn.o_proj.weight", "hidden, q_head*v_dim", "attention"),
    tensor("self_attn.o_proj.bias", "hidden", "attention", "o_proj_bias", "attention_bias"),
)

# kv_b_proj on the hub: deepseek_v2 keeps it, its successors store one matrix per head for each half
EXPANDED = (tensor("self_attn.kv_b_proj.weight", "q_head*nope_dim + q_head*v_dim, kv_latent", "attention"),)
ABSORBED = (
    tensor("self_attn.embed_q.weight", "q_head, kv_latent, nope_dim", "attention"),
    tensor("self_attn.unembed_out.weight", "q_head, v_dim, kv_latent", "attention"),
)

LATENT_KEYS = keys_without(  # every head has its own keys and values: num_key_value_heads is not read
    "kv_head",
    "head_dim",
    q_latent="q_lora_rank",
    kv_latent="kv_lora_rank",
    nope_dim="qk_nope_head_dim",
    rope_dim="qk_rope_head_dim",
    v_dim="v_head_dim",
    **ROUTED,
)
# of mlx-lm's ModelArgs, except for q_lora_rank: null means none there, but counts as absent here
DEFAULTS = {
    "kv_lora_rank": 512,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "moe_layer_freq": 1,
    "first_k_dense_replace": 0,
}

DEEPSEEK_V2 = sparse(
    "deepseek_v2",
    {
        "mla_expanded" + mark: (*LATENT_IN, *EXPANDED, *LATENT_OUT, *ffn, *PRE_NORMS)
        for mark, ffn in (("", swiglu()), ("+moe", without(ROUTED_MLP, "router_bias")))
    },
    keys=LATENT_KEYS,
    kinds=after_dense("mla_expanded"),
    widths=shared_width,
    recounted=dense_first,
    needed=frozenset(),
    fixed=(GROUPED,),
    defaults=DEFAULTS,
    tied=False,
    gguf="deepseek2",
)

ABSORBED_BLOCKS = {
    "mla" + mark: (*LATENT_IN, *ABSORBED, *LATENT_OUT, *ffn, *PRE_NORMS)
    for mark, ffn in (("", swiglu()), ("+moe", ROUTED_MLP))
}
DEEPSEEK_V3 = sparse(
    "deepseek_v3",
    ABSORBED_BLOCKS,
    model_types=("deepseek_v3", "kimi_k2", "joyai_llm_flash"),  # MODEL_REMAPPING in mlx_lm/utils.py
    keys=LATENT_KEYS,
    kinds=after_dense("mla"),
    widths=shared_width,
    recounted=dense_first,
    needed=frozenset(),
    fixed=(GROUPED,),
    defaults=DEFAULTS,
    tied=False,
    gguf="deepseek2",
)

GLM4_MOE_LITE = sparse(
    "glm4_moe_lite",
    ABSORBED_BLOCKS,
    keys=LATENT_KEYS,
    kinds=after_dense("mla"),
    widths=shared_width,
    recounted=dense_first,
    needed=frozenset(),
    fixed=(GROUPED,),
    defaults={  # mlx_lm/models/glm4_moe_lite.py ModelArgs
        **DEFAULTS,
        "qk_nope_head_dim": 192,
        "v_head_dim": 256,
        "first_k_dense_replace": 1,
        "n_shared_experts": 1,
        "n_routed_experts": 64,
        "num_experts_per_tok": 4,
        "moe_intermediate_size": 1536,
    },
    tied=False,
    gguf="deepseek2",
)

FAMILIES = (DEEPSEEK_V2, DEEPSEEK_V3, GLM4_MOE_LITE)
WRAPPERS = {
    "kimi_vl": Wrapper("deepseek_v3"),
    "kimi_k25": Wrapper("deepseek_v3", beside=(*TOWERS, "vision_model", "mm_projector")),
}
