"""What convert_hf_to_gguf.py (conversion/*.py of llama.cpp) makes of a model: names of tensors, and metadata."""

from __future__ import annotations

from typing import Any

from mlx_pare.arch import Architecture, Tensor

STEMS = {
    "embed_tokens": "token_embd", "lm_head": "output", "final_norm": "output_norm",
    "attn_norm": "attn_norm", "attn_post_norm": "post_attention_norm", "ffn_norm": "ffn_norm",
    "ffn_post_norm": "post_ffw_norm", "q_proj": "attn_q", "k_proj": "attn_k", "v_proj": "attn_v",
    "o_proj": "attn_output", "qkv_proj": "attn_qkv", "q_norm": "attn_q_norm", "k_norm": "attn_k_norm",
    "sinks": "attn_sinks", "q_a_proj": "attn_q_a", "q_b_proj": "attn_q_b", "kv_a_proj": "attn_kv_a_mqa",
    "q_a_norm": "attn_q_a_norm", "kv_a_norm": "attn_kv_a_norm", "embed_q": "attn_k_b", "unembed_out": "attn_v_b",
    "gate_proj": "ffn_gate", "up_proj": "ffn_up", "gate_up_proj": "ffn_up", "down_proj": "ffn_down",
    "router": "ffn_gate_inp", "expert_gate": "ffn_gate_exps", "expert_up": "ffn_up_exps",
    "expert_gate_up": "ffn_gate_up_exps", "expert_down": "ffn_down_exps",
    "shared_gate": "ffn_gate_shexp", "shared_up": "ffn_up_shexp", "shared_down": "ffn_down_shexp",
    "shared_router": "ffn_gate_inp_shexp", "fc1_latent_proj": "ffn_latent_down", "fc2_latent_proj": "ffn_latent_up",
    "dense_post_norm": "post_ffw_norm_1", "expert_norm": "pre_ffw_norm_2", "expert_post_norm": "post_ffw_norm_2",
    "in_proj_qkv": "attn_qkv", "in_proj_z": "attn_gate", "in_proj_ba": "ssm_ba", "in_proj_a": "ssm_alpha",
    "in_proj_b": "ssm_beta", "in_proj": "ssm_in", "conv1d": "ssm_conv1d", "out_proj": "ssm_out",
    "linear_norm": "ssm_norm",
    "conv": "shortconv.conv", "conv_in": "shortconv.in_proj", "conv_out": "shortconv.out_proj",
    "embed_per_layer": "per_layer_token_embd", "per_layer_model_projection": "per_layer_model_proj",
    "per_layer_projection_norm": "per_layer_proj_norm", "per_layer_input_gate": "inp_gate",
    "per_layer_projection": "proj", "post_per_layer_input_norm": "post_norm",
    "modality_router": "altup_router", "correction_coefs": "altup_correct_coef",
    "prediction_coefs": "altup_predict_coef",
    "altup_norm": "altup_router_norm", "linear_left": "laurel_l", "linear_right": "laurel_r",
    "laurel_norm": "laurel_post_norm",
}  # fmt: skip
WHOLE = {  # without .weight or .bias, or with one that the checkpoint does not have
    "a_log": "ssm_a", "d": "ssm_d", "dt_bias": "ssm_dt.bias", "router_bias": "exp_probs_b.bias",
    "sinks": "attn_sinks.weight", "router_scale": "ffn_gate_inp.scale", "router_expert_scale": "ffn_down_exps.scale",
    "altup_scale": "altup_correct_scale.weight", "layer_scalar": "layer_output_scale.weight",
}  # fmt: skip
IN_METADATA = ("xielu_alpha_p", "xielu_alpha_n", "xielu_beta", "xielu_eps")


def parts(arch: Architecture, t: Tensor) -> list[tuple[str, tuple[int, ...]]]:
    """Name and shape of what a tensor becomes: mostly one, sometimes two, rarely none."""
    s, role = arch.layer_sizes(t.layer), t.spec.role
    prefix = "" if t.layer is None else f"blk.{t.layer}."
    if role in IN_METADATA:
        return []
    if role in WHOLE:
        return [(prefix + WHOLE[role], t.shape)]
    if role in ("altup_projections", "altup_unembed_projections"):  # stacked
        return [
            (
                {"altup_projections": "altup_proj.", "altup_unembed_projections": "altup_unembd_proj."}[role] + t.name,
                t.shape,
            )
        ]
    if arch.layers[t.layer or 0].kind.startswith("conv"):
        role = {"in_proj": "conv_in", "out_proj": "conv_out"}.get(role, role)
    split = [(role.removesuffix("_bias"), t.shape)]
    if role == "kv_b_proj":
        heads = s["kv_head"] * s["group"]
        split = [
            ("embed_q", (heads, s["kv_latent"], s["nope_dim"])),
            ("unembed_out", (heads, s["v_dim"], s["kv_latent"])),
        ]
    if role == "in_proj_qkvz":
        gate = s["linear_v_head"] * s["linear_v_dim"]
        split = [("in_proj_qkv", (t.shape[0] - gate, t.shape[1])), ("in_proj_z", (gate, t.shape[1]))]
    if role == "shared_gate_up":
        split = [(half, (t.shape[0] // 2, t.shape[1])) for half in ("shared_gate", "shared_up")]
    return [(f"{prefix}{STEMS[r]}.{t.name.rpartition('.')[2]}", shape) for r, shape in split]


# ---- metadata ----

GENERIC = {
    "max_position_embeddings": "context_length", "hidden_size": "embedding_length", "num_hidden_layers": "block_count",
    "num_attention_heads": "attention.head_count", "num_key_value_heads": "attention.head_count_kv",
    "intermediate_size": "feed_forward_length", "rms_norm_eps": "attention.layer_norm_rms_epsilon",
    "norm_eps": "attention.layer_norm_rms_epsilon", "layer_norm_eps": "attention.layer_norm_epsilon",
    "rope_theta": "rope.freq_base", "num_experts": "expert_count", "num_local_experts": "expert_count",
    "num_experts_per_tok": "expert_used_count", "top_k_experts": "expert_used_count",
    "head_dim": "attention.key_length", "n_group": "expert_group_count", "topk_group": "expert_group_used_count",
}  # fmt: skip
SPECIAL = {  # set_gguf_parameters of conversion/*.py, where it copies
    "qwen2moe": {
        "moe_intermediate_size": "expert_feed_forward_length",
        "shared_expert_intermediate_size": "expert_shared_feed_forward_length",
    },
    "delta": {
        "linear_conv_kernel_dim": "ssm.conv_kernel", "linear_key_head_dim": "ssm.state_size",
        "linear_num_key_heads": "ssm.group_count", "linear_num_value_heads": "ssm.time_step_rank",
        "full_attention_interval": "full_attention_interval",
    },
    "routed": {
        "n_routed_experts": "expert_count", "moe_intermediate_size": "expert_feed_forward_length",
        "n_shared_experts": "expert_shared_count", "first_k_dense_replace": "leading_dense_block_count",
    },
    "glm4moe": {"num_nextn_predict_layers": "nextn_predict_layers"},
    "deepseek2": {
        "q_lora_rank": "attention.q_lora_rank", "kv_lora_rank": "attention.kv_lora_rank",
        "v_head_dim": "attention.value_length_mla", "qk_rope_head_dim": "rope.dimension_count",
    },
    "ernie4_5-moe": {
        "moe_num_experts": "expert_count", "moe_num_shared_experts": "expert_shared_count",
        "moe_k": "expert_used_count", "moe_layer_interval": "interleave_moe_layer_step",
        "moe_layer_start_index": "leading_dense_block_count", "moe_intermediate_size": "expert_feed_forward_length",
    },
    "windowed": {"sliding_window": "attention.sliding_window"},
    "gemma4": {
        "num_kv_shared_layers": "attention.shared_kv_layers", "head_dim": "attention.key_length_swa",
        "hidden_size_per_layer_input": "embedding_length_per_layer_input", "global_head_dim": "attention.key_length",
        "moe_intermediate_size": "expert_feed_forward_length",
    },
    "gemma3n": {
        "num_kv_shared_layers": "attention.shared_kv_layers", "altup_num_inputs": "altup.num_inputs",
        "hidden_size_per_layer_input": "embedding_length_per_layer_input",
    },
    "gpt-oss": {"intermediate_size": "expert_feed_forward_length"},
    "conv": {
        "conv_L_cache": "shortconv.l_cache", "moe_intermediate_size": "expert_feed_forward_length",
        "num_dense_layers": "leading_dense_block_count",
    },
    "mamba": {
        "mamba_d_conv": "ssm.conv_kernel", "mamba_d_state": "ssm.state_size", "mamba_n_groups": "ssm.group_count",
        "mamba_n_heads": "ssm.time_step_rank", "shared_intermediate_size": "expert_shared_feed_forward_length",
    },
    "nemotron_h": {
        "conv_kernel": "ssm.conv_kernel", "ssm_state_size": "ssm.state_size", "n_groups": "ssm.group_count",
        "mamba_num_heads": "ssm.time_step_rank", "n_routed_experts": "expert_count",
        "moe_shared_expert_intermediate_size": "expert_shared_feed_forward_length",
        "moe_intermediate_size": "expert_feed_forward_length", "n_shared_experts": "expert_shared_count",
    },
}  # fmt: skip
USES = {
    "qwen2moe": ["qwen2moe"], "qwen3moe": ["qwen2moe"], "qwen3next": ["qwen2moe", "delta"], "qwen35": ["delta"],
    "qwen35moe": ["qwen2moe", "delta"], "deepseek2": ["routed", "deepseek2"], "glm4moe": ["routed", "glm4moe"],
    "ernie4_5-moe": ["ernie4_5-moe"], "gemma2": ["windowed"], "gemma3": ["windowed"], "phi3": ["windowed"],
    "olmo2": ["windowed"], "cohere2": ["windowed"], "exaone4": ["windowed"], "gpt-oss": ["windowed", "gpt-oss"],
    "gemma4": ["windowed", "gemma4"], "gemma3n": ["windowed", "gemma3n"], "lfm2": ["conv"], "lfm2moe": ["conv"],
    "falcon-h1": ["mamba"], "granitehybrid": ["mamba"], "nemotron_h": ["nemotron_h"], "nemotron_h_moe": ["nemotron_h"],
    "mistral3": ["windowed"], "llama": [],
}  # fmt: skip


def named(arch: Architecture) -> str:
    """general.architecture; two families have another one with experts."""
    experts = any("expert" in layer.sizes for layer in arch.layers)
    return (
        {"qwen35": "qwen35moe", "nemotron_h": "nemotron_h_moe"}.get(arch.family.gguf, arch.family.gguf)
        if experts
        else arch.family.gguf
    )


def metadata(arch: Architecture) -> dict[str, Any]:
    """The keys below the architecture's name, as convert_hf_to_gguf.py writes them for a config."""
    name, config = named(arch), arch.config
    found = {}
    for keys in (GENERIC, *(SPECIAL[use] for use in USES.get(name, ()))):
        found |= {gguf: config[key] for key, gguf in keys.items() if config.get(key) is not None}
    found |= computed(name, arch)
    return {key: float(value) if key.endswith(("epsilon", "freq_base")) else value for key, value in found.items()}


def computed(name: str, arch: Architecture) -> dict[str, Any]:
    """What converters compute, one branch for each."""
    config, kinds = arch.config, [layer.kind.partition("+")[0] for layer in arch.layers]
    sliding = [kind.startswith("sliding") for kind in kinds]
    heads = config["num_attention_heads"]
    if "linear_value_head_dim" in config:
        return {"ssm.inner_size": config["linear_value_head_dim"] * config["linear_num_value_heads"]}
    if name == "deepseek2":
        rope, rank = config["qk_rope_head_dim"], config["kv_lora_rank"]
        mla = {"attention.key_length": rank + rope, "attention.key_length_mla": config["qk_nope_head_dim"] + rope}
        mla |= {"attention.value_length": rank, "attention.head_count_kv": 1}
        return mla | {"expert_gating_func": 2 if config["model_type"] != "deepseek_v2" else 1}
    if name == "glm4moe":
        extra = config.get("num_nextn_predict_layers") or 0
        return {"block_count": len(kinds) + extra, "expert_gating_func": 2}
    if name in ("lfm2", "lfm2moe", "granitehybrid", "nemotron_h", "nemotron_h_moe"):
        found = {"attention.head_count_kv": [config["num_key_value_heads"] * (k == "full_attention") for k in kinds]}
        if name == "nemotron_h":
            found["feed_forward_length"] = [config["intermediate_size"] * (k == "feed_forward") for k in kinds]
        if name == "lfm2":
            found["feed_forward_length"] = arch.layers[0].sizes["ffn"]
        width = config.get("mamba_d_head") or config.get("mamba_head_dim")
        count = config.get("mamba_n_heads") or config.get("mamba_num_heads")
        return found | ({"ssm.inner_size": width * count} if width else {})
    if name == "falcon-h1":
        return {"ssm.inner_size": config["mamba_d_head"] * config["mamba_n_heads"]}
    if name in ("gemma4", "gemma3n", "exaone4") or (name == "olmo2" and any(sliding)):
        found = {"attention.sliding_window_pattern": sliding}
        if name == "gemma4" and config.get("use_double_wide_mlp"):
            found["feed_forward_length"] = [layer.sizes["ffn"] for layer in arch.layers]
        if name == "gemma4" and config.get("num_global_key_value_heads"):
            found["attention.head_count_kv"] = [
                config["num_key_value_heads" if s else "num_global_key_value_heads"] for s in sliding
            ]
        if name == "gemma3n":
            found["feed_forward_length"] = [layer.sizes["ffn"] for layer in arch.layers]
        return found
    return {} if config.get("num_key_value_heads") else {"attention.head_count_kv": heads}
