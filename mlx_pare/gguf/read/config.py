"""The config.json that a GGUF file stands for, from its metadata and tensor table: what ``arch.describe`` reads.

Only what decides tensors, caches and windows, in the spelling of the family on the hub; not the other numbers that a
model computes with. One table per llama.cpp architecture: which metadata key is which config key, which tensor is which
flag, and what needs a function. Sources: conversion/*.py of llama.cpp, which wrote the metadata, and ModelArgs in
mlx_lm/models.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from math import isfinite
from typing import Any

from ..header import Header, Skipped


@dataclass(frozen=True)
class Facts:
    """Reads a header by short names: ``number("attention.head_count")`` reads "<architecture>.attention.head_count".

    Files come from outside: a value of the wrong sort counts as absent.
    """

    header: Header

    @property
    def architecture(self) -> str:
        """general.architecture, or "unknown"."""
        found = self.header.metadata.get("general.architecture")
        return found if isinstance(found, str) else "unknown"

    def value(self, key: str) -> Any:
        """The raw value; None if there is none."""
        return self.header.metadata.get(f"{self.architecture}.{key}")

    def number(self, key: str) -> int | float | None:
        """A number; the largest, if there is one per layer."""
        found = self.value(key)
        if isinstance(found, tuple) and found:
            found = max(found)
        usable = isinstance(found, int | float) and not isinstance(found, bool) and isfinite(found)
        return found if usable else None

    def each(self, key: str) -> tuple[Any, ...] | None:
        """One value per layer, if the file has that many; else None."""
        found = self.value(key)
        return found[: self.layers] if isinstance(found, tuple) and len(found) >= self.layers > 0 else None

    @property
    def layers(self) -> int:
        """Layers of the model itself, without those that only predict further tokens."""
        return int(self.number("block_count") or 0) - int(self.number("nextn_predict_layers") or 0)

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of a tensor outside the layers, or of the first layer that has one; () if none has."""
        names = (name, *(f"blk.{i}.{name}" for i in range(min(self.layers, 1024))))
        return next((self.header.tensors[n].shape for n in names if n in self.header.tensors), ())

    def kinds(self, sliding: str, full: str) -> list[str] | None:
        """layer_types by attention.sliding_window_pattern, if it has one entry per layer."""
        pattern = self.each("attention.sliding_window_pattern")
        return [sliding if windowed else full for windowed in pattern] if pattern else None


@dataclass(frozen=True)
class Table:
    """One llama.cpp architecture: its model_type, config keys by metadata keys, flags by tensors, and the rest."""

    model_type: str
    keys: Mapping[str, str] = field(default_factory=dict)
    flags: Mapping[str, str] = field(default_factory=dict)
    more: Callable[[Facts], Mapping[str, Any]] = lambda facts: {}


def config_of(header: Header) -> dict[str, Any]:
    """config.json facts of a GGUF file. For an unknown architecture: its name as model_type, and the generic facts.

    Keys without a value are left out. Never raises: ``arch.describe`` reports what is missing.
    """
    facts = Facts(header)
    table = TABLES.get(facts.architecture, Table(facts.architecture))
    found = {
        "model_type": table.model_type,
        **_generic(facts),
        **{key: facts.number(name) for key, name in table.keys.items()},
        **{flag: bool(facts.shape(name)) for flag, name in table.flags.items()},
    }
    found |= table.more(facts)
    return {key: value for key, value in found.items() if value is not None}


def _generic(facts: Facts) -> dict[str, Any]:
    """The keys that every architecture has."""
    number = facts.number
    hidden, heads = number("embedding_length"), number("attention.head_count")
    rows, tokens = facts.shape("token_embd.weight"), facts.header.metadata.get("tokenizer.ggml.tokens")
    vocab = rows[0] if rows else number("vocab_size") or (tokens.count if isinstance(tokens, Skipped) else None)
    ffn = facts.value("feed_forward_length")
    if not isinstance(ffn, int):  # one per layer
        ffn = (facts.shape("ffn_down.weight") or (number("feed_forward_length"),))[-1]
    return {
        "hidden_size": hidden,
        "num_hidden_layers": facts.layers or None,
        "intermediate_size": ffn,
        "num_attention_heads": heads,
        "num_key_value_heads": number("attention.head_count_kv") or heads,
        "head_dim": number("attention.key_length") or (hidden // heads if hidden and heads else None),
        "vocab_size": vocab,
        "tie_word_embeddings": "output.weight" not in facts.header.tensors,
        "max_position_embeddings": number("context_length"),
        "rms_norm_eps": number("attention.layer_norm_rms_epsilon"),
        "rope_theta": number("rope.freq_base"),
    }


# ---- what takes a function ----


def _llama(facts: Facts) -> dict[str, Any]:
    """Also Mistral, Mixtral, and a qwen2 that needed llama's rope scaling: seed_oss is llama with other biases."""
    if facts.number("expert_count"):
        return {"model_type": "mixtral"}
    same = bool(facts.shape("attn_q.bias")) == bool(facts.shape("attn_output.bias"))
    return {} if same else {"model_type": "seed_oss"}


def _period(facts: Facts, otherwise: int) -> dict[str, Any]:
    """sliding_window_pattern: the distance between layers with full attention."""
    pattern = facts.each("attention.sliding_window_pattern")
    given = facts.value("attention.sliding_window_pattern")
    if pattern and not all(pattern):
        return {"sliding_window_pattern": list(map(bool, pattern)).index(False) + 1}
    return {"sliding_window_pattern": given if isinstance(given, int) and given > 0 else otherwise}


def _gemma4(facts: Facts) -> dict[str, Any]:
    """Heads and widths of two sorts: of layers with a window, and of those without."""
    kinds = facts.kinds("sliding_attention", "full_attention") or []
    heads, widths = facts.each("attention.head_count_kv"), facts.each("feed_forward_length") or ()
    own = facts.layers - int(facts.number("attention.shared_kv_layers") or 0)
    by_kind = dict(zip(kinds, heads or (), strict=False))
    full = [i for i, kind in enumerate(kinds[:own]) if kind == "full_attention"]
    bare = any(f"blk.{i}.attn_v.weight" not in facts.header.tensors for i in full)
    table = facts.shape("per_layer_token_embd.weight")
    return {
        "layer_types": kinds or None,
        "head_dim": facts.number("attention.key_length_swa") or facts.number("attention.key_length"),
        "num_key_value_heads": by_kind.get("sliding_attention") or facts.number("attention.head_count_kv"),
        "num_global_key_value_heads": by_kind.get("full_attention"),
        "attention_k_eq_v": bare,
        "num_kv_shared_layers": facts.number("attention.shared_kv_layers") or 0,
        "hidden_size_per_layer_input": facts.number("embedding_length_per_layer_input") or 0,
        "vocab_size_per_layer_input": table[0] if table else None,
        "use_double_wide_mlp": len(set(widths)) == 2,
        "intermediate_size": min(widths) if widths else facts.number("feed_forward_length"),
        "enable_moe_block": bool(facts.number("expert_count")),
    }


def _gemma3n(facts: Facts) -> dict[str, Any]:
    table, left = facts.shape("per_layer_token_embd.weight"), facts.shape("laurel_l.weight")
    return {
        "layer_types": facts.kinds("sliding_attention", "full_attention"),
        "vocab_size_per_layer_input": table[0] if table else None,
        "laurel_rank": left[0] if left else None,
    }


def _sparse(facts: Facts) -> dict[str, Any]:
    """The layers without experts, if other layers have some."""
    experts = {n.split(".")[1] for n in facts.header.tensors if n.startswith("blk.") and ".ffn_gate_exps." in n}
    dense = [i for i in range(min(facts.layers, 1024)) if str(i) not in experts]
    return {"mlp_only_layers": dense if experts else [], "decoder_sparse_step": 1}


def _linear(facts: Facts) -> dict[str, Any]:
    """Gated DeltaNet: its heads, in the names of state-space models."""
    heads, inner = facts.number("ssm.time_step_rank"), facts.number("ssm.inner_size")
    return {
        "linear_value_head_dim": inner // heads if heads and inner else None,
        "full_attention_interval": facts.number("full_attention_interval") or 4,
    }


def _latent(facts: Facts) -> dict[str, Any]:
    """key_length_mla is that of a head; files from before it have a head's length in key_length."""
    rope = facts.number("rope.dimension_count") or 0
    key = facts.number("attention.key_length_mla") or facts.number("attention.key_length") or 0
    sigmoid = facts.number("expert_gating_func") == 2
    return {
        "model_type": "deepseek_v3" if sigmoid else "deepseek_v2",
        "head_dim": None,
        "num_key_value_heads": facts.number("attention.head_count"),
        "qk_nope_head_dim": key - rope or None,
        "v_head_dim": facts.number("attention.value_length_mla") or facts.number("attention.value_length"),
        "n_routed_experts": facts.number("expert_count") or None,
    }


def _conv(facts: Facts) -> dict[str, Any]:
    """Short convolutions are the layers without kv heads."""
    heads = facts.each("attention.head_count_kv")
    kinds = ["full_attention" if n else "conv" for n in heads] if heads else None
    return {
        "layer_types": kinds,
        "full_attn_idxs": [i for i, kind in enumerate(kinds) if kind != "conv"] if kinds else None,
        "norm_eps": facts.number("attention.layer_norm_rms_epsilon"),
        "block_dim": facts.number("embedding_length"),
        "block_ff_dim": facts.number("feed_forward_length"),
        "block_auto_adjust_ff_dim": False,
        "conv_bias": bool(facts.shape("shortconv.conv.bias")),
    }


def _olmo(facts: Facts) -> dict[str, Any]:
    kinds = facts.kinds("sliding_attention", "full_attention")
    return {"model_type": "olmo3", "layer_types": kinds} if kinds else {}


def _exaone(facts: Facts) -> dict[str, Any]:
    """One letter per layer: local or global."""
    return {"sliding_window_pattern": "".join(facts.kinds("L", "G") or ()) or None}


def _state(key: str) -> Callable[[Facts], dict[str, Any]]:
    """The width of a Mamba 2 head, under this key."""

    def width(facts: Facts) -> dict[str, Any]:
        heads, inner = facts.number("ssm.time_step_rank"), facts.number("ssm.inner_size")
        return {key: inner // heads if heads and inner else None}

    return width


def _granite(facts: Facts) -> dict[str, Any]:
    """Mamba layers are those without kv heads."""
    heads = facts.each("attention.head_count_kv")
    kinds = ["attention" if n else "mamba" for n in heads] if heads else None
    return {"layer_types": kinds, **_state("mamba_d_head")(facts)}


def _nemotron(facts: Facts) -> dict[str, Any]:
    """The kind of every layer by its tensors."""
    letters = {"ssm_in": "M", "attn_q": "*", "ffn_down": "-", "ffn_down_exps": "E"}
    tensors = facts.header.tensors
    found = [
        next((letters[t] for t in letters if f"blk.{i}.{t}.weight" in tensors), "?")
        for i in range(min(facts.layers, 1024))
    ]
    experts = {"n_routed_experts": facts.number("expert_count") or None}
    return {"hybrid_override_pattern": "".join(found), **experts, **_state("mamba_head_dim")(facts)}


# ---- one table per architecture ----

WINDOW = {"sliding_window": "attention.sliding_window"}
ACTIVE = {"num_experts_per_tok": "expert_used_count"}
LOCAL = {"num_local_experts": "expert_count", **ACTIVE}
EXPERTS = {"num_experts": "expert_count", **ACTIVE, "moe_intermediate_size": "expert_feed_forward_length"}
SHARED = {**EXPERTS, "shared_expert_intermediate_size": "expert_shared_feed_forward_length"}
ROUTED = {
    "n_shared_experts": "expert_shared_count",
    "moe_intermediate_size": "expert_feed_forward_length",
    "first_k_dense_replace": "leading_dense_block_count",
    "n_group": "expert_group_count",
    "topk_group": "expert_group_used_count",
    **ACTIVE,
}
LINEAR = {
    "linear_conv_kernel_dim": "ssm.conv_kernel",
    "linear_key_head_dim": "ssm.state_size",
    "linear_num_key_heads": "ssm.group_count",
    "linear_num_value_heads": "ssm.time_step_rank",
}
LATENT = {
    "q_lora_rank": "attention.q_lora_rank",
    "kv_lora_rank": "attention.kv_lora_rank",
    "qk_rope_head_dim": "rope.dimension_count",
}
MAMBA = {
    "mamba_n_heads": "ssm.time_step_rank",
    "mamba_n_groups": "ssm.group_count",
    "mamba_d_state": "ssm.state_size",
    "mamba_d_conv": "ssm.conv_kernel",
}
NEMOTRON = {
    "mamba_num_heads": "ssm.time_step_rank",
    "n_groups": "ssm.group_count",
    "ssm_state_size": "ssm.state_size",
    "conv_kernel": "ssm.conv_kernel",
    "n_shared_experts": "expert_shared_count",
    "moe_intermediate_size": "expert_feed_forward_length",
    "moe_shared_expert_intermediate_size": "expert_shared_feed_forward_length",
    "moe_latent_size": "moe_latent_size",
    **ACTIVE,
}
PER_LAYER = {"hidden_size_per_layer_input": "embedding_length_per_layer_input"}
LAYER_NORM = {"layer_norm_eps": "attention.layer_norm_epsilon"}
BIAS = {"attention_bias": "attn_q.bias", "mlp_bias": "ffn_up.bias"}
OUT_BIAS = {**BIAS, "attention_out_bias": "attn_output.bias"}
ERNIE = {
    "moe_num_experts": "expert_count",
    "moe_k": "expert_used_count",
    "moe_intermediate_size": "expert_feed_forward_length",
    "moe_layer_interval": "interleave_moe_layer_step",
    "moe_layer_start_index": "leading_dense_block_count",
    "moe_num_shared_experts": "expert_shared_count",
}

TABLES = {
    "llama": Table("llama", {**WINDOW, **LOCAL}, OUT_BIAS, _llama),
    "mistral3": Table("ministral3", WINDOW),
    "seed_oss": Table("seed_oss", {}, OUT_BIAS),
    "smollm3": Table("smollm3", {}, BIAS),
    "granite": Table("granite", {}, BIAS),
    "granitemoe": Table("granitemoe", LOCAL, BIAS),
    "apertus": Table("apertus", {}, BIAS),
    "phi3": Table("phi3", WINDOW),
    "phimoe": Table("phimoe", {**WINDOW, **LOCAL}),
    "olmo2": Table("olmo2", WINDOW, BIAS, _olmo),
    "olmoe": Table("olmoe", {"num_experts": "expert_count", **ACTIVE}, BIAS),
    "command-r": Table("cohere", LAYER_NORM, {"attention_bias": "attn_q.bias", "use_qk_norm": "attn_q_norm.weight"}),
    "cohere2": Table("cohere2", {**WINDOW, **LAYER_NORM}, {"attention_bias": "attn_q.bias"}, lambda f: _period(f, 4)),
    "nemotron": Table("nemotron", LAYER_NORM, BIAS),
    "starcoder2": Table("starcoder2", LAYER_NORM),
    "exaone4": Table("exaone4", WINDOW, more=_exaone),
    "glm4": Table("glm4", {}, {"attention_bias": "attn_q.bias"}),
    "glm4moe": Table(
        "glm4_moe",
        {**ROUTED, "n_routed_experts": "expert_count"},
        {"attention_bias": "attn_q.bias", "use_qk_norm": "attn_q_norm.weight"},
    ),
    "ernie4_5": Table("ernie4_5", {}, {"use_bias": "attn_q.bias"}),
    "ernie4_5-moe": Table("ernie4_5_moe", ERNIE, {"use_bias": "attn_q.bias"}),
    "gpt-oss": Table("gpt_oss", {**WINDOW, **LOCAL, "intermediate_size": "expert_feed_forward_length"}),
    "qwen2": Table("qwen2"),
    "qwen2moe": Table("qwen2_moe", SHARED),
    "qwen3": Table("qwen3"),
    "qwen3moe": Table("qwen3_moe", EXPERTS, more=_sparse),
    "qwen3next": Table("qwen3_next", {**SHARED, **LINEAR}, more=lambda f: _sparse(f) | _linear(f)),
    "qwen35": Table("qwen3_5_text", LINEAR, more=_linear),
    "qwen35moe": Table("qwen3_5_moe_text", {**SHARED, **LINEAR}, more=_linear),
    "gemma": Table("gemma"),
    "gemma2": Table("gemma2", {**WINDOW, "attn_logit_softcapping": "attn_logit_softcapping"}),
    "gemma3": Table(
        "gemma3_text", {**WINDOW, "rope_local_base_freq": "rope.freq_base_swa"}, more=lambda f: _period(f, 6)
    ),
    "gemma3n": Table(
        "gemma3n_text",
        {
            **WINDOW,
            **PER_LAYER,
            "num_kv_shared_layers": "attention.shared_kv_layers",
            "altup_num_inputs": "altup.num_inputs",
        },
        more=_gemma3n,
    ),
    "gemma4": Table(
        "gemma4_text",
        {
            **WINDOW,
            "global_head_dim": "attention.key_length",
            "num_experts": "expert_count",
            "top_k_experts": "expert_used_count",
            "moe_intermediate_size": "expert_feed_forward_length",
        },
        more=_gemma4,
    ),
    "deepseek2": Table("deepseek_v2", {**ROUTED, **LATENT}, more=_latent),
    "falcon-h1": Table(
        "falcon_h1",
        MAMBA,
        {"mamba_conv_bias": "ssm_conv1d.bias", "mamba_rms_norm": "ssm_norm.weight", **BIAS},
        _state("mamba_d_head"),
    ),
    "granitehybrid": Table(
        "granitemoehybrid",
        {**MAMBA, **LOCAL, "shared_intermediate_size": "expert_shared_feed_forward_length"},
        {"mamba_conv_bias": "ssm_conv1d.bias", **BIAS},
        _granite,
    ),
    **dict.fromkeys(
        ("nemotron_h", "nemotron_h_moe"),
        Table("nemotron_h", NEMOTRON, {"use_conv_bias": "ssm_conv1d.bias", **BIAS}, _nemotron),
    ),
    "lfm2": Table("lfm2", {"conv_L_cache": "shortconv.l_cache"}, more=_conv),
    "lfm2moe": Table(
        "lfm2_moe",
        {"conv_L_cache": "shortconv.l_cache", **EXPERTS, "num_dense_layers": "leading_dense_block_count"},
        {"use_expert_bias": "exp_probs_b.bias"},
        _conv,
    ),
}
