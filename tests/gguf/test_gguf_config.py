"""The config of a GGUF file: what our export wrote, and what llama.cpp's converters write, describes the same model."""

from __future__ import annotations

import contextlib
import random
import subprocess
import sys
from typing import Any

import llama_quantize
import pico
import pytest
from gguf_conversion import GENERIC, metadata, named, parts

from mlx_pare.arch import Architecture, describe
from mlx_pare.base.errors import PareError
from mlx_pare.exporting.export import export
from mlx_pare.gguf.header import Header, Skipped, TensorInfo, read
from mlx_pare.gguf.read import config as gguf_config
from mlx_pare.gguf.read.config import config_of
from mlx_pare.model.checkpoint import Checkpoint
from mlx_pare.sources import catalogue


def table(arch: Architecture) -> dict[str, tuple[int, ...]]:
    """Names and shapes; a language model that is part of a larger one is compared without its prefix."""
    return {t.name.removeprefix(arch.prefix): t.shape for t in arch.tensors()}


def same(ours: Architecture, theirs: Architecture) -> None:
    assert table(ours) == table(theirs) and ours.tied == theirs.tied
    assert [layer.kind for layer in ours.layers] == [layer.kind for layer in theirs.layers]
    for mine, other in zip(ours.layers, theirs.layers, strict=True):
        assert mine.sizes.get("active") == other.sizes.get("active")
    windowed = any(layer.mixer.windowed for layer in theirs.layers)
    assert not windowed or ours.config["sliding_window"] == theirs.config["sliding_window"]
    assert ours.config["max_position_embeddings"] == theirs.config["max_position_embeddings"]


# ---- what our export wrote ----

VARIANTS = [(family, {}) for family in pico.FAMILIES]
VARIANTS += [("llama", {"attention_bias": True, "mlp_bias": True}), ("llama", {"num_key_value_heads": 4})]
VARIANTS += [("qwen3", {"tie_word_embeddings": False, "intermediate_size": 96})]
VARIANTS += [("gemma3_text", {"num_hidden_layers": 12, "sliding_window_pattern": 6, "sliding_window": 24})]
VARIANTS += [
    ("qwen2", {"rope_scaling": {"rope_type": "llama3", "factor": 8.0, "original_max_position_embeddings": 64}})
]


@pytest.mark.parametrize(("family", "changes"), VARIANTS)
def test_our_own_files_describe_the_model_they_came_from(tmp_path, pico_models, family, changes):
    changes = {k: v for k, v in changes.items()}
    if family == "gemma3_text" and changes:
        changes["layer_types"] = (["sliding_attention"] * 5 + ["full_attention"]) * 2
    directory = pico_models(family, **changes)
    export(directory, tmp_path / "m.gguf", "q8_0")
    header = read(tmp_path / "m.gguf")
    ours = describe(config_of(header))
    same(ours, Checkpoint(directory).arch)
    assert ours.config["rms_norm_eps"] == pytest.approx(1e-5) and ours.config["rope_theta"] == 10000.0


# ---- what llama.cpp's converters write ----


def header_of(arch: Architecture) -> Header:
    """The header of a converted model, without the file."""
    prefix = named(arch)
    found = {"general.architecture": prefix, **{f"{prefix}.{key}": value for key, value in metadata(arch).items()}}
    found = {key: tuple(value) if isinstance(value, list) else value for key, value in found.items()}
    tensors = {n: TensorInfo(shape, "F16", 0, 0) for t in arch.tensors() for n, shape in parts(arch, t)}
    return Header(3, found, tensors, 0, 0)


# the same tensors under another name: mistral is llama in a GGUF file
CATALOGUE = {entry.name: entry.config for entry in catalogue.entries()}


@pytest.mark.parametrize("name", CATALOGUE)
def test_a_converted_model_of_the_catalogue_describes_itself(name):
    arch = describe(CATALOGUE[name])
    same(describe(config_of(header_of(arch))), arch)


SMALL = {"hidden_size": 64, "num_hidden_layers": 6, "intermediate_size": 96, "num_attention_heads": 4, "vocab_size": 50}
SMALL |= {"num_key_value_heads": 2, "max_position_embeddings": 512, "rms_norm_eps": 1e-6, "rope_theta": 5e5}
SMALL |= {"tie_word_embeddings": False}
EXPERTS = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
LOCAL = {"num_local_experts": 8, "num_experts_per_tok": 2}
ROUTED = {"n_routed_experts": 8, "n_shared_experts": 2, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
ROUTED |= {"first_k_dense_replace": 1, "moe_layer_freq": 1}
LATENT = {"kv_lora_rank": 32, "qk_nope_head_dim": 16, "qk_rope_head_dim": 8, "v_head_dim": 24, "num_key_value_heads": 4}
LINEAR = {"linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 16, "linear_value_head_dim": 8}
LINEAR |= {"linear_conv_kernel_dim": 4, "full_attention_interval": 3, "head_dim": 32}
KINDS = {"layer_types": ["sliding_attention", "full_attention"] * 3, "sliding_window": 32}
CONV = {"layer_types": ["conv", "conv", "full_attention"] * 2, "conv_L_cache": 3, "norm_eps": 1e-6, "conv_bias": False}
MAMBA = {"mamba_n_heads": 4, "mamba_d_head": 16, "mamba_n_groups": 2, "mamba_d_state": 8, "mamba_d_conv": 4}
MAMBA |= {"mamba_conv_bias": True}
NEMOTRON_H = {"mamba_num_heads": 4, "mamba_head_dim": 16, "n_groups": 2, "ssm_state_size": 8, "conv_kernel": 4}
NEMOTRON_H |= {"use_conv_bias": True, "head_dim": 16}
MODELS = {
    "mixtral": {"model_type": "mixtral", **LOCAL},
    "mistral": {"model_type": "mistral", "head_dim": 32},
    "ministral3": {"model_type": "ministral3", "head_dim": 32},
    "seed_oss, biased": {"model_type": "seed_oss", "head_dim": 32, "attention_bias": True, "attention_out_bias": False},
    "qwen2_moe": {"model_type": "qwen2_moe", **EXPERTS, "shared_expert_intermediate_size": 64},
    "qwen3_moe": {"model_type": "qwen3_moe", **EXPERTS, "head_dim": 32},
    "qwen3_moe, dense between": {"model_type": "qwen3_moe", **EXPERTS, "head_dim": 32, "mlp_only_layers": [0, 3]},
    "qwen3_moe, every other": {"model_type": "qwen3_moe", **EXPERTS, "head_dim": 32, "decoder_sparse_step": 2},
    "qwen3_next": {"model_type": "qwen3_next", **EXPERTS, **LINEAR, "shared_expert_intermediate_size": 48}
    | {"decoder_sparse_step": 1},
    "qwen3_5": {"model_type": "qwen3_5_text", **LINEAR},
    "qwen3_5_moe": {"model_type": "qwen3_5_moe_text", **EXPERTS, **LINEAR, "shared_expert_intermediate_size": 48},
    "deepseek_v2": {"model_type": "deepseek_v2", **ROUTED, **LATENT},
    "deepseek_v2, without shared": {"model_type": "deepseek_v2", **ROUTED, **LATENT, "n_shared_experts": None},
    "deepseek_v3": {"model_type": "deepseek_v3", **ROUTED, **LATENT, "q_lora_rank": 48},
    "glm4_moe": {"model_type": "glm4_moe", **ROUTED, "head_dim": 32, "use_qk_norm": True, "attention_bias": True},
    "glm4_moe, predicting more": {"model_type": "glm4_moe", **ROUTED, "head_dim": 32, "num_nextn_predict_layers": 1},
    "ernie4_5": {"model_type": "ernie4_5", "head_dim": 16, "use_bias": True},
    "ernie4_5_moe": {"model_type": "ernie4_5_moe", "use_bias": False, "moe_num_experts": 8, "moe_k": 2}
    | {"moe_layer_start_index": 1, "moe_num_shared_experts": 2, "moe_intermediate_size": 32, "moe_layer_interval": 1},
    "gpt_oss": {"model_type": "gpt_oss", **LOCAL, "head_dim": 32, "sliding_window": 16},
    "olmoe": {"model_type": "olmoe", "num_experts": 8, "num_experts_per_tok": 2},
    "phimoe": {"model_type": "phimoe", **LOCAL},
    "lfm2": {"model_type": "lfm2", **CONV, "block_ff_dim": 96, "block_auto_adjust_ff_dim": True}
    | {"block_multiple_of": 16, "block_ffn_dim_multiplier": 1.0},
    "lfm2_moe": {"model_type": "lfm2_moe", **CONV, **EXPERTS, "num_dense_layers": 2, "use_expert_bias": True},
    "phi3": {"model_type": "phi3", "sliding_window": 64},
    "olmo2": {"model_type": "olmo2"},
    "olmo3": {"model_type": "olmo3", **KINDS},
    "smollm3": {"model_type": "smollm3", "attention_bias": True},
    "granite": {"model_type": "granite", "attention_bias": False, "mlp_bias": False},
    "granitemoehybrid": {"model_type": "granitemoehybrid", **MAMBA, **LOCAL, "shared_intermediate_size": 64}
    | {"layer_types": ["mamba", "attention", "mamba"] * 2},
    "falcon_h1": {"model_type": "falcon_h1", **MAMBA, "head_dim": 32},
    "nemotron_h": {"model_type": "nemotron_h", **NEMOTRON_H, "hybrid_override_pattern": "M-*-M-"},
    "nemotron_h_moe": {"model_type": "nemotron_h", **NEMOTRON_H, **ROUTED, "hybrid_override_pattern": "MEM*ME"}
    | {"moe_shared_expert_intermediate_size": 40},
    "cohere": {"model_type": "cohere", "use_qk_norm": True},
    "cohere2": {"model_type": "cohere2", "head_dim": 32, "sliding_window": 32, "sliding_window_pattern": 4},
    "exaone4": {"model_type": "exaone4", "head_dim": 32, "sliding_window": 32, "sliding_window_pattern": "LLG"},
    "glm4": {"model_type": "glm4", "head_dim": 32, "attention_bias": True},
    "nemotron": {"model_type": "nemotron", "head_dim": 32},
    "starcoder2": {"model_type": "starcoder2"},
    "apertus": {"model_type": "apertus"},
    "gemma": {"model_type": "gemma", "head_dim": 32},
    "gemma2": {"model_type": "gemma2", "head_dim": 32, "sliding_window": 32},
    "gemma3n": {"model_type": "gemma3n_text", "head_dim": 32, "laurel_rank": 8, "altup_num_inputs": 4, **KINDS}
    | {"hidden_size_per_layer_input": 16, "vocab_size_per_layer_input": 48, "num_kv_shared_layers": 2},
    "gemma4": {"model_type": "gemma4_text", "head_dim": 32, "global_head_dim": 48, **KINDS, "num_kv_shared_layers": 2}
    | {"hidden_size_per_layer_input": 16, "vocab_size_per_layer_input": 48, "use_double_wide_mlp": True},
    "gemma4, experts": {"model_type": "gemma4_text", "head_dim": 32, "global_head_dim": 48, **KINDS, **EXPERTS}
    | {"num_kv_shared_layers": 0, "hidden_size_per_layer_input": 0, "use_double_wide_mlp": False}
    | {"enable_moe_block": True, "top_k_experts": 2, "num_global_key_value_heads": 1, "attention_k_eq_v": True},
}


@pytest.mark.parametrize("name", MODELS)
def test_a_converted_model_of_every_kind_describes_itself(tmp_path, name):
    arch = describe({**SMALL, **MODELS[name]})
    tensors = {n: shape or (1,) for t in arch.tensors() for n, shape in parts(arch, t)}
    llama_quantize.write(tmp_path / "m.gguf", named(arch), tensors, len(arch.layers), metadata(arch))
    same(describe(config_of(read(tmp_path / "m.gguf"))), arch)


def test_every_table_is_tried():
    tried = {named(describe({**SMALL, **config})) for config in MODELS.values()}
    tried |= {named(describe(config)) for config in CATALOGUE.values()} | {"qwen2", "qwen3", "gemma3", "llama"}
    assert set(gguf_config.TABLES) - tried == {"granitemoe"}  # no family here describes it


# ---- what is missing or strange ----


def facts(**more: Any) -> Header:
    keys = {"general.architecture": "llama", "llama.embedding_length": 64, "llama.block_count": 2}
    keys |= {"llama.attention.head_count": 4, "llama.feed_forward_length": 96, "llama.vocab_size": 50}
    return Header(3, keys | more, {}, 0, 0)


def test_an_unknown_architecture_keeps_its_name_and_the_generic_facts():
    header = facts()
    other = {key.replace("llama", "newthing"): value for key, value in header.metadata.items()}
    found = config_of(Header(3, other | {"general.architecture": "newthing"}, {}, 0, 0))
    assert found["model_type"] == "newthing" and found["hidden_size"] == 64 and found["num_hidden_layers"] == 2
    assert found["head_dim"] == 16 and found["tie_word_embeddings"] is True
    with pytest.raises(PareError, match="'newthing' is not described"):
        describe(found)


def test_an_empty_header():
    assert config_of(Header(3, {}, {}, 0, 0)) == {"model_type": "unknown", "tie_word_embeddings": True}
    assert config_of(Header(3, {"general.architecture": 7}, {}, 0, 0))["model_type"] == "unknown"


def test_the_vocabulary_is_the_rows_of_the_embedding_or_the_tokens():
    header = facts(**{"tokenizer.ggml.tokens": Skipped(70)})
    assert config_of(header)["vocab_size"] == 50
    del header.metadata["llama.vocab_size"]
    assert config_of(header)["vocab_size"] == 70
    rows = {"token_embd.weight": TensorInfo((60, 64), "F16", 0, 0)}
    assert config_of(Header(3, header.metadata, rows, 0, 0))["vocab_size"] == 60


def test_widths_of_layers_come_from_the_tensors_where_metadata_lists_them():
    header = facts(**{"llama.feed_forward_length": (96, 64), "llama.attention.head_count_kv": (2, 2)})
    assert config_of(header)["intermediate_size"] == 96
    rows = {"blk.1.ffn_down.weight": TensorInfo((64, 80), "F16", 0, 0)}
    found = config_of(Header(3, header.metadata, rows, 0, 0))
    assert found["intermediate_size"] == 80 and found["num_key_value_heads"] == 2


def test_old_deepseek_files_without_absorbed_heads():
    """Until April 2025 key_length was that of a head."""
    keys = {"general.architecture": "deepseek2", "deepseek2.attention.key_length": 192}
    keys |= {"deepseek2.attention.value_length": 128, "deepseek2.rope.dimension_count": 64}
    found = config_of(Header(3, keys, {}, 0, 0))
    assert (found["qk_nope_head_dim"], found["v_head_dim"], found["model_type"]) == (128, 128, "deepseek_v2")


STRANGE = [None, 0, -1, 2**63, 1e400, float("nan"), 0.5, "text", True, (), (1,), ("x", "y"), (0,) * 6, (1, 0) * 3]
STRANGE += [(True, False) * 3, (2**63,) * 6, Skipped(9)]


@pytest.mark.parametrize("architecture", [*gguf_config.TABLES, "other"])
def test_nonsense_never_raises_anything_but_a_pare_error(architecture):
    rng = random.Random(0)
    keys = sorted({key for table in gguf_config.TABLES.values() for key in table.keys.values()} | set(GENERIC.values()))
    keys += ["attention.sliding_window_pattern", "ssm.inner_size", "attention.key_length_mla", "nextn_predict_layers"]
    for _ in range(40):
        found = {f"{architecture}.{key}": rng.choice(STRANGE) for key in keys}
        found = {k: v for k, v in found.items() if v is not None} | {"general.architecture": architecture}
        if rng.random() < 0.7:
            found[f"{architecture}.block_count"] = 6
        config = config_of(Header(3, found, {}, 0, 0))
        with contextlib.suppress(PareError):
            describe(config)


def test_nothing_about_gguf_needs_arrays():
    modules = "mlx_pare.gguf.types, mlx_pare.gguf.header, mlx_pare.gguf.quant_mixes, mlx_pare.gguf.read.config"
    code = f"import sys, {modules}; sys.exit(', '.join({{'mlx', 'numpy', 'mlx_lm', 'gguf'}} & set(sys.modules)) or 0)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
