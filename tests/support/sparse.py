"""Tiny models with experts, made from a seed by mlx-lm's own classes, and the same models with masked experts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from operator import attrgetter
from pathlib import Path
from typing import Any

import mlx.core as mx

from mlx_pare import lm
from tests.support import pico

ROUTED = {"n_routed_experts": 12, "n_shared_experts": 1, "num_experts_per_tok": 3, "moe_intermediate_size": 64}
COUNTED = {"num_experts": 12, "num_experts_per_tok": 3, "moe_intermediate_size": 64}
LOCAL = {"num_local_experts": 12, "num_experts_per_tok": 3}
GLM = {"first_k_dense_replace": 1, "n_group": 1, "rope_scaling": None, "partial_rotary_factor": 0.5, "topk_group": 1}
GLM |= {"routed_scaling_factor": 1.5, "norm_topk_prob": True}
LATENT = {"kv_lora_rank": 32, "qk_nope_head_dim": 32, "qk_rope_head_dim": 32, "v_head_dim": 32}
LATENT |= {"num_key_value_heads": 4}
YARN = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128, "mscale": 1.0, "mscale_all_dim": 1.0}
YARN |= {"beta_fast": 32, "beta_slow": 1}
LINEAR = {"linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 32}
LINEAR |= {"linear_value_head_dim": 32}
LINEAR |= {"linear_conv_kernel_dim": 4, "full_attention_interval": 2, "head_dim": 32}
LINEAR |= {"shared_expert_intermediate_size": 64, "partial_rotary_factor": 0.5}
MAMBA = {"mamba_n_heads": 4, "mamba_d_head": 32, "mamba_n_groups": 2, "mamba_d_state": 32, "mamba_d_conv": 4}
MAMBA |= {"mamba_conv_bias": True, "mamba_expand": 2, "embedding_multiplier": 1.0, "attention_multiplier": 0.2}
MAMBA |= {"logits_scaling": 1.0, "residual_multiplier": 1.0, "attention_bias": False, "mamba_proj_bias": False}
MAMBA |= {"mlp_bias": False, "position_embedding_type": "rope"}
NEMOTRON = {"mamba_num_heads": 4, "mamba_head_dim": 32, "n_groups": 2, "ssm_state_size": 32, "conv_kernel": 4}
NEMOTRON |= {"use_conv_bias": True, "head_dim": 32, "moe_shared_expert_intermediate_size": 64, "n_group": 1}
NEMOTRON |= {"topk_group": 1, "norm_topk_prob": True, "routed_scaling_factor": 1.5, "layer_norm_epsilon": 1e-5}
NEMOTRON |= {"attention_bias": False, "mamba_proj_bias": False, "mlp_bias": False, "time_step_limit": [0.0, 100.0]}
NEMOTRON |= {"use_bias": False, "time_step_min": 0.001, "mlp_hidden_act": "relu2"}

# family -> config, without what pico.BASE has. Every one of these is cut along experts.
CONFIGS: dict[str, dict[str, Any]] = {
    "qwen3_moe": {**COUNTED, "head_dim": 32, "decoder_sparse_step": 1, "mlp_only_layers": [], "norm_topk_prob": True},
    "qwen2_moe": {**COUNTED, "shared_expert_intermediate_size": 64},
    "mixtral": LOCAL,
    "phimoe": {**LOCAL, "num_experts_per_tok": 2, "rope_scaling": None},
    "olmoe": {**COUNTED, "norm_topk_prob": False, "num_key_value_heads": 4},
    "gpt_oss": {**LOCAL, "head_dim": 32, "sliding_window": 16},
    "glm4_moe": {**ROUTED, **GLM, "head_dim": 32, "use_qk_norm": True, "attention_bias": True},
    "ernie4_5_moe": {
        "moe_num_experts": 12, "moe_k": 3, "moe_layer_start_index": 1, "moe_num_shared_experts": 1,
        "moe_intermediate_size": 64, "moe_layer_interval": 1, "use_bias": False,
    },
    "deepseek_v2": {**ROUTED, **LATENT, "first_k_dense_replace": 1, "topk_method": "gready", "q_lora_rank": None,
                    "rope_scaling": YARN},
    "deepseek_v3": {**ROUTED, **LATENT, **GLM, "q_lora_rank": 48, "topk_method": "noaux_tc"},
    "glm4_moe_lite": {**ROUTED, **LATENT, **GLM, "q_lora_rank": 48},
    "qwen3_next": {**COUNTED, **LINEAR, "decoder_sparse_step": 1, "mlp_only_layers": [], "norm_topk_prob": True},
    "lfm2_moe": {
        **COUNTED, "layer_types": ["conv", "conv", "full_attention", "conv"], "conv_L_cache": 3, "norm_eps": 1e-6,
        "conv_bias": False, "num_dense_layers": 1, "use_expert_bias": True, "norm_topk_prob": True,
    },
    "granitemoehybrid": {
        **LOCAL, **MAMBA, "shared_intermediate_size": 64, "layer_types": ["mamba", "attention", "mamba", "attention"],
    },
    "nemotron_h": {**ROUTED, **NEMOTRON, "hybrid_override_pattern": "MEM*EE", "num_hidden_layers": 6},
}  # fmt: skip
ONLY_EXPERTS = ("qwen3_next", "lfm2_moe", "granitemoehybrid", "nemotron_h")  # not cut along layers
ARCHITECTURES = {
    "qwen3_moe": "Qwen3MoeForCausalLM", "qwen2_moe": "Qwen2MoeForCausalLM", "mixtral": "MixtralForCausalLM",
    "phimoe": "PhimoeForCausalLM", "olmoe": "OlmoeForCausalLM", "gpt_oss": "GptOssForCausalLM",
    "deepseek_v2": "DeepseekV2ForCausalLM", "deepseek_v3": "DeepseekV3ForCausalLM",
    "glm4_moe_lite": "Glm4MoeLiteForCausalLM", "qwen3_next": "Qwen3NextForCausalLM",
    "lfm2_moe": "Lfm2MoeForCausalLM",
    "granitemoehybrid": "GraniteMoeHybridForCausalLM", "nemotron_h": "NemotronHForCausalLM",
    "glm4_moe": "Glm4MoeForCausalLM", "ernie4_5_moe": "Ernie4_5_MoeForCausalLM",
}  # fmt: skip
# family -> what makes its router leave an expert out, inside the block: a module that gives logits, or a bias that is
# added to choose experts, but not to weigh them
ROUTERS = {
    "mixtral": "block_sparse_moe.gate", "phimoe": "block_sparse_moe.gate", "gpt_oss": "mlp.router",
    "granitemoehybrid": "block_sparse_moe.router.layer", "deepseek_v2": "mlp.gate",
    **dict.fromkeys(("qwen3_moe", "qwen2_moe", "olmoe", "ernie4_5_moe", "qwen3_next"), "mlp.gate"),
}  # fmt: skip
BIASES = {
    **dict.fromkeys(("glm4_moe", "deepseek_v3", "glm4_moe_lite"), "mlp.gate.e_score_correction_bias"),
    "lfm2_moe": "feed_forward.expert_bias", "nemotron_h": "mixer.gate.e_score_correction_bias",
}  # fmt: skip


def config(family: str, **changes: Any) -> dict[str, Any]:
    return {
        **pico.BASE,
        "model_type": family,
        "architectures": [ARCHITECTURES[family]],
        "tie_word_embeddings": False,
        **CONFIGS[family],
        **changes,
    }


def make(directory: Path, family: str, dtype: mx.Dtype = mx.float32, seed: int = 0, **changes: Any) -> Path:
    """Write a tiny model with experts; return its directory."""
    pico.MORE[f"sparse {family}"] = config(family, **changes)
    return pico.make(directory, f"sparse {family}", dtype=dtype, seed=seed)


def masked(model: Any, family: str, kept: Mapping[int, Sequence[int]]) -> Any:
    """The stock model, changed so that its routers never choose other experts than those that are kept.

    Args:
        model: a model of mlx-lm, changed in place.
        family: its family.
        kept: number of the layer -> its experts; other layers stay as they are.
    """
    for index, experts in kept.items():
        block = lm.blocks(model)[index]
        gone = mx.array([expert not in experts for expert in range(12)])
        path, _, name = (ROUTERS | BIASES)[family].rpartition(".")
        owner = attrgetter(path)(block)
        router = getattr(owner, name)
        made = mx.where(gone, -1e9, router) if family in BIASES else _Masked(router, mx.where(gone, -mx.inf, 0.0))
        setattr(owner, name, made if family != "deepseek_v2" else _MaskedGate(router, mx.where(gone, -mx.inf, 0.0)))
    return model


class _Masked:
    """A router whose logits are minus infinity for some experts."""

    def __init__(self, router: Any, add: mx.array):
        self.router, self.add = router, add

    def __call__(self, x: mx.array) -> mx.array:
        return self.router(x).astype(mx.float32) + self.add


class _MaskedGate(_Masked):
    """The same for the gate of deepseek_v2, which chooses and weighs by itself."""

    def __call__(self, x: mx.array) -> tuple[mx.array, mx.array]:
        scores = mx.softmax(x @ self.router.weight.T + self.add, axis=-1)
        chosen = mx.argsort(-scores, axis=-1)[..., : self.router.top_k]
        return chosen, mx.take_along_axis(scores, chosen, axis=-1) * self.router.routed_scaling_factor
