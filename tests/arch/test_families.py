"""Every described family against mlx-lm's own class: names and shapes, bytes when packed, bytes of a real cache."""

from __future__ import annotations

import contextlib
import copy

import mlx.core as mx
import pytest
from mlx.utils import tree_flatten, tree_map_with_path
from mlx_lm.models.cache import make_prompt_cache
from mlx_lm.utils import _get_classes, quantize_model

from mlx_pare.arch import describe, described_types
from mlx_pare.arch.axes import length
from mlx_pare.arch.describe import FAMILIES
from mlx_pare.base.errors import PareError
from mlx_pare.capacity.memory import Needs
from mlx_pare.model import footprint
from mlx_pare.sources import catalogue
from mlx_pare.tensors.packing import Packing

WINDOW, CONTEXT = 64, 300

# Columns are multiples of 64 or none of 32, so that mlx-lm packs in groups of 64 what it packs in groups of 32.
BASE = {
    "hidden_size": 128,
    "num_hidden_layers": 4,
    "intermediate_size": 192,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 96,
    "rms_norm_eps": 1e-6,
    "max_position_embeddings": 512,
    "rope_theta": 1e4,
    "tie_word_embeddings": False,
}
WIDE = {"head_dim": 64}  # more than hidden / heads
FULL, SLIDING = "full_attention", "sliding_attention"
MIXED = {"layer_types": [SLIDING, SLIDING, FULL, SLIDING], "sliding_window": WINDOW}
BIASED = {"attention_bias": True, "mlp_bias": True}
PLAIN = {"attention_bias": False, "mlp_bias": False}
TIED = {"tie_word_embeddings": True}
YARN = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128}

EXPERTS = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 64, "norm_topk_prob": True}
LOCAL = {"num_local_experts": 8, "num_experts_per_tok": 2}
ROUTED = {
    "n_routed_experts": 8,
    "n_shared_experts": 2,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 64,
    "first_k_dense_replace": 1,
    "n_group": 1,
    "topk_group": 1,
    "routed_scaling_factor": 1.0,
    "norm_topk_prob": True,
}
LATENT = {
    "kv_lora_rank": 64,
    "q_lora_rank": 128,
    "qk_nope_head_dim": 64,
    "qk_rope_head_dim": 16,
    "v_head_dim": 32,
    "rope_scaling": YARN,
}
LINEAR = {
    "linear_num_value_heads": 4,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 32,
    "linear_value_head_dim": 64,
    "linear_conv_kernel_dim": 4,
    "full_attention_interval": 3,
    "partial_rotary_factor": 0.5,
}
SPARSE = {"decoder_sparse_step": 2, "mlp_only_layers": [3], "num_hidden_layers": 6}
GEMMA = {"head_dim": 64, "sliding_window": WINDOW, **TIED}
PER_LAYER = {
    "num_hidden_layers": 6,
    "layer_types": [SLIDING, FULL, SLIDING, FULL, SLIDING, FULL],
    "num_kv_shared_layers": 3,
    "vocab_size_per_layer_input": 64,
    "hidden_size_per_layer_input": 64,
}
GEMMA4 = {**GEMMA, **PER_LAYER, "global_head_dim": 128}
GEMMA4_MOE = {
    **GEMMA,
    "layer_types": [SLIDING, FULL, SLIDING, FULL],
    "global_head_dim": 128,
    "num_kv_shared_layers": 0,
    "hidden_size_per_layer_input": 0,
    "attention_k_eq_v": True,
    "num_global_key_value_heads": 1,
    "enable_moe_block": True,
    "num_experts": 8,
    "top_k_experts": 2,
    "moe_intermediate_size": 64,
}
GEMMA3N = {
    **GEMMA,
    **PER_LAYER,
    "intermediate_size": [192, 192, 192, 128, 128, 128],
    "activation_sparsity_pattern": [0.9, 0.0, 0.0, 0.0, 0.0, 0.0],
    "rope_local_base_freq": 1e4,
    "final_logit_softcapping": 30.0,
    "altup_num_inputs": 4,
    "altup_coef_clip": 120.0,
    "altup_correct_scale": True,
    "altup_active_idx": 0,
    "laurel_rank": 64,
}
GRANITE = {
    "logits_scaling": 8.0,
    "attention_multiplier": 0.1,
    "embedding_multiplier": 12.0,
    "residual_multiplier": 0.2,
}
LFM2 = {"norm_eps": 1e-5, "conv_L_cache": 3, "layer_types": ["conv", "conv", FULL, "conv"], **TIED}
LFM2_FF = {
    "block_dim": 128,
    "block_ff_dim": 400,
    "block_multiple_of": 64,
    "block_ffn_dim_multiplier": 1.0,
    "block_auto_adjust_ff_dim": True,
}
MAMBA = {
    "mamba_n_heads": 4,
    "mamba_d_head": 64,
    "mamba_n_groups": 2,
    "mamba_d_state": 32,
    "mamba_d_conv": 4,
    "mamba_proj_bias": False,
    "mamba_conv_bias": True,
}
NEMOTRON_H = {
    "mamba_num_heads": 4,
    "mamba_head_dim": 64,
    "n_groups": 2,
    "ssm_state_size": 32,
    "conv_kernel": 4,
    "mamba_proj_bias": False,
    "use_bias": False,
    "use_conv_bias": True,
    "layer_norm_epsilon": 1e-5,
    "head_dim": 64,
    **PLAIN,
}
OPENELM = {
    "model_dim": 128,
    "num_transformer_layers": 4,
    "head_dim": 64,
    "num_query_heads": [4, 4, 6, 2],
    "num_kv_heads": [2, 4, 3, 1],
    "ffn_multipliers": [1.5, 1 / 128, 2.5, 4.0],  # a width of 1 stays dense
    "ffn_dim_divisor": 1,
    "normalize_qk_projections": True,
    "share_input_output_layers": True,
}
NAS_BLOCKS = [
    {"attention": {"n_heads_in_group": group} if group else {"no_op": True}, "ffn": ffn}
    for group, ffn in ((2, {"ffn_mult": 1.6}), (0, {"ffn_mult": 4.5}), (4, {"no_op": True}), (0, {"no_op": True}))
]
MINISTRAL_ROPE = {
    "rope_parameters": {
        "rope_type": "default",
        "rope_theta": 1e4,
        "llama_4_scaling_beta": 0.1,
        "original_max_position_embeddings": 128,
    }
}


def cfg(model_type, *parts, **more):
    """A config of BASE and some parts; ``...`` takes a key away."""
    merged = {**BASE, **{key: value for part in parts for key, value in part.items()}, **more, "model_type": model_type}
    return {key: value for key, value in merged.items() if value is not ...}


def wrapped(model_type, text, **outer):
    """The config of a multimodal model with such a language model in it."""
    return {"model_type": model_type, "text_config": text, **outer}


CONFIGS = {
    # those that can be cut
    "llama": cfg("llama", BIASED, MIXED, WIDE),
    "llama tied": cfg("llama", TIED, num_key_value_heads=...),
    "mistral": cfg("mistral", WIDE),
    "qwen2": cfg("qwen2", TIED),
    "qwen3": cfg("qwen3", WIDE),
    "seed_oss": cfg("seed_oss", BIASED, WIDE, attention_out_bias=False),
    "gemma3_text": cfg("gemma3_text", GEMMA, sliding_window_pattern=3),
    "gemma3": wrapped("gemma3", cfg("gemma3_text", GEMMA, sliding_window_pattern=3, vocab_size=5), vocab_size=96),
    "qwen2_vl": wrapped("qwen2_vl", cfg("qwen2", TIED)),
    "qwen2_5_vl": cfg("qwen2_5_vl"),
    "qwen3_vl": wrapped("qwen3_vl", cfg("qwen3", WIDE)),
    # dense
    "gemma": cfg("gemma", GEMMA),
    "gemma2": cfg("gemma2", GEMMA, tie_word_embeddings=...),
    "phi3": cfg("phi3", head_dim=99, sliding_window=WINDOW),
    "phi3 tied": cfg("phi3", TIED, partial_rotary_factor=0.5),
    "olmo2": cfg("olmo2", BIASED),
    "olmo2 tied": cfg("olmo2", TIED, WIDE),
    "olmo3": cfg("olmo3", MIXED),
    "olmo3 by period": cfg("olmo3", TIED, BIASED, WIDE, sliding_window=WINDOW),
    "smollm3": cfg("smollm3", BIASED, TIED),
    "smollm3 sliding": cfg("smollm3", MIXED),
    "cohere": cfg("cohere", BIASED, layer_norm_bias=True, use_qk_norm=True),
    "cohere plain": cfg("cohere", tie_word_embeddings=...),
    "cohere2": cfg(
        "cohere2", BIASED, head_dim=32, layer_norm_bias=True, sliding_window=WINDOW, sliding_window_pattern=2
    ),
    "apertus": cfg("apertus", BIASED, post_norm=False, qk_norm=True),
    "apertus tied": cfg("apertus", PLAIN, TIED, post_norm=False, qk_norm=True),
    "granite": cfg("granite", BIASED, GRANITE),
    "granite tied": cfg("granite", PLAIN, GRANITE, TIED),
    "ministral3": cfg("ministral3", WIDE, MIXED, MINISTRAL_ROPE),
    "ministral3 tied": cfg("ministral3", TIED, MINISTRAL_ROPE),
    "mistral3": wrapped("mistral3", cfg("mistral", WIDE, tie_word_embeddings=...)),
    "mistral3 of ministral3": wrapped("mistral3", cfg("ministral3", TIED, MINISTRAL_ROPE)),
    "exaone4": cfg("exaone4", WIDE, rope_scaling=None, sliding_window=WINDOW, sliding_window_pattern="LLG"),
    "exaone4 full": cfg("exaone4", WIDE, TIED, rope_scaling=None, sliding_window=None, sliding_window_pattern=None),
    "glm4": cfg("glm4", WIDE, attention_bias=True, partial_rotary_factor=0.5),
    "nemotron": cfg("nemotron", BIASED, hidden_act="relu2", norm_eps=1e-5),
    "nemotron tied": cfg("nemotron", PLAIN, TIED, WIDE, hidden_act="relu2", norm_eps=1e-5),
    "starcoder2": cfg("starcoder2", TIED, vocab_size=...),
    "starcoder2 untied": cfg("starcoder2"),
    "ernie4_5": cfg("ernie4_5", WIDE, use_bias=True),
    "ernie4_5 tied": cfg("ernie4_5", TIED, use_bias=False, head_dim=None),
    # experts
    "qwen3_moe": cfg("qwen3_moe", EXPERTS, WIDE, SPARSE),
    "qwen3_vl_moe": wrapped("qwen3_vl_moe", cfg("qwen3_moe", EXPERTS, WIDE, SPARSE)),
    "qwen2_moe": cfg("qwen2_moe", EXPERTS, shared_expert_intermediate_size=192),
    "mixtral": cfg("mixtral", LOCAL),
    "mixtral tied": cfg("mixtral", LOCAL, TIED),
    "phimoe": cfg("phimoe", LOCAL),
    "olmoe": cfg("olmoe", EXPERTS, BIASED, TIED),
    "olmoe untied": cfg("olmoe", EXPERTS, WIDE),
    "gpt_oss": cfg("gpt_oss", LOCAL, WIDE, MIXED),
    "gpt_oss in turns": cfg("gpt_oss", LOCAL, WIDE, sliding_window=WINDOW),
    "glm4_moe": cfg(
        "glm4_moe", ROUTED, WIDE, rope_scaling=None, use_qk_norm=True, attention_bias=True, partial_rotary_factor=0.5
    ),
    "glm4_moe plain": cfg(
        "glm4_moe", ROUTED, WIDE, rope_scaling=None, use_qk_norm=False, attention_bias=False, partial_rotary_factor=0.5
    ),
    "ernie4_5_moe": cfg(
        "ernie4_5_moe",
        use_bias=True,
        moe_num_experts=8,
        moe_k=2,
        moe_intermediate_size=64,
        moe_layer_start_index=[1, 2],
        moe_layer_end_index=[2, 3],
        moe_num_shared_experts=2,
    ),
    "ernie4_5_moe plain": cfg("ernie4_5_moe", TIED, use_bias=False, moe_num_experts=8, moe_k=2, moe_layer_interval=2),
    # latent attention
    "deepseek_v2": cfg("deepseek_v2", ROUTED, LATENT, topk_method="greedy"),
    "deepseek_v2 lite": cfg(
        "deepseek_v2", ROUTED, LATENT, q_lora_rank=None, n_shared_experts=None, attention_bias=True
    ),
    "deepseek_v3": cfg("deepseek_v3", ROUTED, LATENT, attention_bias=True, moe_layer_freq=2),
    "deepseek_v3 direct": cfg("deepseek_v3", ROUTED, LATENT, q_lora_rank=None),
    "kimi_k2": cfg("kimi_k2", ROUTED, LATENT),
    "joyai_llm_flash": cfg("joyai_llm_flash", ROUTED, LATENT),
    "kimi_vl": wrapped("kimi_vl", cfg("deepseek_v3", ROUTED, LATENT)),
    "kimi_k25": wrapped("kimi_k25", cfg("deepseek_v3", ROUTED, LATENT)),
    "glm4_moe_lite": cfg("glm4_moe_lite", ROUTED, LATENT, qk_nope_head_dim=..., v_head_dim=..., rope_scaling=None),
    # linear attention, convolutions
    "qwen3_next": cfg("qwen3_next", EXPERTS, LINEAR, WIDE, SPARSE, shared_expert_intermediate_size=192),
    "qwen3_5": wrapped("qwen3_5", cfg("qwen3_5_text", LINEAR, WIDE, tie_word_embeddings=...)),
    "qwen3_5 bare": cfg("qwen3_5", LINEAR, TIED),
    "qwen3_5_moe": wrapped(
        "qwen3_5_moe", cfg("qwen3_5_moe_text", LINEAR, WIDE, EXPERTS, shared_expert_intermediate_size=192)
    ),
    "lfm2": cfg("lfm2", LFM2, LFM2_FF, conv_bias=True),
    "lfm2-vl": wrapped("lfm2-vl", cfg("lfm2", LFM2, LFM2_FF, conv_bias=False)),
    "lfm2 by index": cfg(
        "lfm2",
        LFM2,
        LFM2_FF,
        conv_bias=False,
        block_auto_adjust_ff_dim=False,
        block_ff_dim=...,
        full_attn_idxs=[0, 3],
        layer_types=...,
    ),
    "lfm2_moe": cfg("lfm2_moe", LFM2, EXPERTS, conv_bias=False, use_expert_bias=True, num_dense_layers=1),
    "lfm2_moe plain": cfg("lfm2_moe", LFM2, EXPERTS, conv_bias=True, use_expert_bias=False, num_dense_layers=3),
    # shared caches
    "gemma4": wrapped("gemma4", cfg("gemma4_text", GEMMA4), vocab_size=96),
    "gemma4_text": cfg("gemma4_text", GEMMA4, use_double_wide_mlp=False, tie_word_embeddings=False),
    "gemma4_unified": wrapped("gemma4_unified", cfg("gemma4_text", GEMMA4_MOE), vocab_size=96),
    "gemma4_text moe": cfg("gemma4_text", GEMMA4_MOE, attention_k_eq_v=False, num_kv_shared_layers=2),
    "gemma3n": wrapped("gemma3n", cfg("gemma3n_text", GEMMA3N)),
    # Mamba 2
    "granitemoehybrid": cfg(
        "granitemoehybrid",
        GRANITE,
        MAMBA,
        LOCAL,
        PLAIN,
        TIED,
        shared_intermediate_size=192,
        layer_types=["mamba", "attention", "mamba", "mamba"],
    ),
    "granitemoehybrid dense": cfg(
        "granitemoehybrid",
        GRANITE,
        MAMBA,
        BIASED,
        layer_types=["mamba", "attention"] * 2,
        mamba_proj_bias=True,
        mamba_conv_bias=False,
    ),
    "falcon_h1": cfg("falcon_h1", MAMBA, WIDE, PLAIN, mamba_d_ssm=256),
    "falcon_h1 tied": cfg(
        "falcon_h1",
        MAMBA,
        TIED,
        BIASED,
        head_dim=...,
        mamba_d_ssm=256,
        mamba_rms_norm=True,
        mamba_proj_bias=True,
        projectors_bias=True,
    ),
    "nemotron_h": cfg("nemotron_h", NEMOTRON_H, hybrid_override_pattern="M-M*"),
    "nemotron_h moe": cfg(
        "nemotron_h",
        NEMOTRON_H,
        ROUTED,
        layers_block_type=["mamba", "moe", "attention", "mlp"],
        moe_shared_expert_intermediate_size=128,
    ),
    "nemotron_h latent": cfg(
        "nemotron_h",
        NEMOTRON_H,
        ROUTED,
        BIASED,
        layers_block_type=["mamba", "moe", "attention", "moe"],
        moe_latent_size=64,
        moe_shared_expert_intermediate_size=128,
    ),
    # what a cut leaves whose layers differ
    "openelm": cfg("openelm", OPENELM),
    "openelm untied": cfg("openelm", OPENELM, normalize_qk_projections=False, share_input_output_layers=False),
    "openelm of others": cfg("openelm", OPENELM, ffn_multipliers=[0.5, 1.0, 1.7, 4.0], ffn_dim_divisor=64),
    "nemotron-nas": cfg("nemotron-nas", BIASED, block_configs=NAS_BLOCKS, rope_scaling=None),
    "nemotron-nas tied": cfg("nemotron-nas", TIED, PLAIN, block_configs=NAS_BLOCKS, rope_scaling=None),
}


def build(config):
    """mlx-lm's own model of a config, tied as it is when it loads a checkpoint."""
    config = copy.deepcopy(config)
    model_class, args_class = _get_classes(config)
    model = model_class(args_class.from_dict(config))
    if config["model_type"] in ("gemma3", "gemma3_text"):  # a checkpoint without lm_head takes it away
        getattr(model, "language_model", model).sanitize({})
    return model


def cast(model):
    """In bfloat16 as mlx_lm.convert casts: some arrays stay float32."""
    wanted = getattr(model, "cast_predicate", lambda _: True)
    model.update(tree_map_with_path(lambda name, a: a.astype(mx.bfloat16) if wanted(name) else a, model.parameters()))
    return model


def shapes(model):
    return {name: tuple(array.shape) for name, array in tree_flatten(model.parameters())}


def nbytes(model):
    return sum(array.nbytes for _, array in tree_flatten(model.parameters()))


def test_every_described_type_is_here():
    configs = [c.get("text_config", c) for c in CONFIGS.values()] + list(CONFIGS.values())
    assert {c.get("model_type") for c in configs} - {None} == set(described_types())


@pytest.mark.parametrize("name", CONFIGS)
def test_names_and_shapes(name):
    assert {t.name: t.shape for t in describe(CONFIGS[name]).tensors()} == shapes(build(CONFIGS[name]))


@pytest.mark.parametrize("group", [32, 64])
@pytest.mark.parametrize("name", CONFIGS)
def test_packed_bytes(name, group):
    arch, model = describe(CONFIGS[name]), cast(build(CONFIGS[name]))
    assert footprint.weight_bytes(arch, footprint.dense(2)) == nbytes(model)
    quantize_model(model, {}, group, 4)
    assert footprint.weight_bytes(arch, footprint.packed(Packing(4, group))) == nbytes(model)


@pytest.mark.parametrize("name", CONFIGS)
def test_cache_bytes(name):
    """A prompt and one more token through the real model, against what the mixers of the layers say.

    Nothing is computed: MLX knows shapes and dtypes before, and its CPU backend has no experts in bfloat16.
    """
    arch, model = describe(CONFIGS[name]), cast(build(CONFIGS[name]))
    cache, tokens = make_prompt_cache(model), mx.ones((1, CONTEXT), dtype=mx.int32)
    for part in (tokens[:, :-1], tokens[:, -1:]):
        model(part, cache=cache)
    expected = 0
    for index, layer in enumerate(arch.layers):
        mixer, sizes = layer.mixer, arch.layer_sizes(index)
        positions = WINDOW if mixer.windowed else 512  # steps of 256
        expected += 2 * length(mixer.cache, sizes) * positions
        expected += 2 * length(mixer.state, sizes) + 4 * length(mixer.state_f32, sizes)
    assert sum(c.nbytes for c in cache) == expected == Needs(arch).kv(CONTEXT) + Needs(arch).state


def test_every_kind_of_layer_is_tried():
    tried = {(arch.family.name, layer.kind) for arch in map(describe, CONFIGS.values()) for layer in arch.layers}
    assert tried == {(family.name, kind) for family in FAMILIES for kind in family.blocks}


# ---- configs that make no sense ----


NONSENSE = (None, 0, -1, 3, 2.5, "x", "", True, [], [7], ["x"], {}, 2**40)


@pytest.mark.parametrize("name", CONFIGS)
def test_nonsense_is_refused_or_described(name):
    """Whatever a key is changed into, or left out: an architecture or a PareError, nothing else."""
    outer = CONFIGS[name]
    inner = outer.get("text_config", outer)
    changed = [{**inner, key: value} for key in inner for value in NONSENSE]
    changed += [{k: v for k, v in inner.items() if k != key} for key in inner]
    for config in changed:
        with contextlib.suppress(PareError):
            arch = describe(config if inner is outer else {**outer, "text_config": config})
            assert footprint.active_parameters(arch) <= footprint.parameters(arch)["total"]


# ---- the catalogue ----

CATALOGUE = {entry.name: entry for entry in catalogue.entries()}
NOT_DROPPED = {"gemma-4-e4b": 7463013418}  # published with keys and values of layers that have none in mlx-lm


@pytest.mark.parametrize("name", CATALOGUE)
def test_catalogue_models_are_described(name):
    """Names and shapes at full size, where nothing is computed either, and the published number of parameters."""
    entry = CATALOGUE[name]
    arch = describe(entry.config)
    assert {t.name: t.shape for t in arch.tensors()} == shapes(build(entry.config))
    if entry.parameters:
        counted = footprint.parameters(arch)["total"]
        assert counted == pytest.approx(NOT_DROPPED.get(name, entry.parameters), rel=0.002)
