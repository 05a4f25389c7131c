"""Tiny models that mix attention with layers of another kind, made from a seed by mlx-lm's own classes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import mlx.core as mx

from tests.support import parents, pico, sparse

CONV = {
    "model_type": "lfm2",
    "architectures": ["Lfm2ForCausalLM"],
    "norm_eps": 1e-5,
    "conv_bias": False,
    "conv_L_cache": 3,
}
CONV |= {"block_dim": 64, "block_ff_dim": 150, "block_multiple_of": 32, "block_ffn_dim_multiplier": 1.0}
CONV |= {"block_auto_adjust_ff_dim": True}
ATTENDS = ["conv", "full_attention", "conv", "full_attention", "conv", "conv"]
ROPE = {"rope_theta": 10000.0, "rope_type": "default", "partial_rotary_factor": 0.5}
MAMBAS = ["mamba", "attention", "mamba", "mamba"]
# name -> (what makes it, its family, changes, layers that can stay, layers that cannot)
HYBRIDS: dict[str, tuple[str, str, dict[str, Any], list[int], list[int] | None]] = {
    "qwen3_5": ("parent", "qwen3_5", {"num_hidden_layers": 6, "rope_parameters": ROPE}, [0, 4, 5], [0, 1, 3, 4]),
    "qwen3_5_moe": ("parent", "qwen3_5_moe", {"num_hidden_layers": 6}, [0, 1, 4, 5], [0, 2]),
    "qwen3_next": ("sparse", "qwen3_next", {"num_hidden_layers": 6}, [0, 3, 4], [1, 2, 3]),
    "lfm2": ("pico", "lfm2", {"num_hidden_layers": 6, "layer_types": ATTENDS}, [1, 2, 4], [0, 2, 4]),
    "lfm2-indices": ("pico", "lfm2", {"num_hidden_layers": 6, "full_attn_idxs": [1, 3]}, [0, 3, 4], [1, 3]),
    "lfm2_moe": ("sparse", "lfm2_moe", {}, [0, 2, 3], [0, 1]),
    "granitemoehybrid": ("sparse", "granitemoehybrid", {}, [0, 3], None),
    "granite-dense": ("sparse", "granitemoehybrid", {"num_local_experts": 0, "layer_types": MAMBAS}, [1, 3], None),
    "nemotron_h": ("sparse", "nemotron_h", {}, [0, 2, 3, 4], [0, 1, 2]),
}


def make(directory: Path, name: str, dtype: mx.Dtype = mx.float32) -> Path:
    """Write one of HYBRIDS; return its directory."""
    way, family, changes, _, _ = HYBRIDS[name]
    if way == "parent":
        return parents.make(directory, family, dtype=dtype, **changes)
    if way == "sparse":
        return sparse.make(directory, family, dtype=dtype, **changes)
    pico.MORE["hybrid lfm2"] = {**CONV, **changes}
    return pico.make(directory, "hybrid lfm2", dtype=dtype)
