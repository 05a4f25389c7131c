"""What single architectures of llama.cpp cannot do, do differently, or need in addition to the common metadata. No
arrays.

``src/models`` is llama.cpp's.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ..arch import Architecture
from ..arch.rope import both_rope_spellings, rope_scaling, rotary_share
from ..model.checkpoint import Checkpoint

WINDOWS = ("gemma2", "gemma3", "olmo2", "gpt-oss")  # architectures that take a list of the layers with a window
BY_PLACE = ("smollm3",)  # architectures that treat layers by their place, and take no list
LONG = ("longrope", "su")  # two names of phi3's scaling, which has a factor for every pair

ALLOWED = {  # ways to scale a rope, by architecture
    "llama": ("linear", "yarn", "llama3"),
    "deci": ("linear", "yarn", "llama3"),
    "gemma2": (),
    "gemma3": ("linear",),
    "phi3": ("linear", *LONG),
}

# ---- why the architecture of a family cannot run a model; None if it can ----


def _why_no_biases(arch: Architecture) -> str | None:
    biases = sorted({t.spec.role for t in arch.tensors() if t.spec.role.endswith("_bias")})
    return f"has biases ({', '.join(biases)}), which llama.cpp's {arch.family.gguf} lacks" if biases else None


def _why_no_olmo2(arch: Architecture) -> str | None:
    """src/models/olmo2.cpp: q_proj is as wide as the hidden size, and no bias is added."""
    if why := _why_no_biases(arch):
        return why
    wide = arch.uniform("kv_head") * arch.uniform("group") * arch.uniform("head_dim")
    return None if wide == arch.sizes["hidden"] else "has heads that are together not as wide as its hidden size"


def _why_no_smollm3(arch: Architecture) -> str | None:
    """src/models/smollm3.cpp: every fourth layer, by its place, has no rope."""
    if "sliding_attention" in (arch.config.get("layer_types") or ()):
        return "has sliding attention, which llama.cpp's smollm3 lacks"
    if why := _why_no_biases(arch):
        return why
    by_place = arch.family.by_place["no_rope_layers"]
    found = arch.config.get("no_rope_layers") or [by_place(arch.config, i) for i in range(len(arch.layers))]
    if [bool(has) for has in found] == [(i + 1) % 4 != 0 for i in range(len(arch.layers))]:
        return None
    return (
        "has layers without rope at other places than every fourth, but llama.cpp takes them by position (mlx-lm loads "
        "it): cut whole groups of four layers, or other axes"
    )


def _why_no_phi3(arch: Architecture) -> str | None:
    """mlx_lm/models/phi3.py ModelArgs drops scalings that it does not know."""
    kind = rope_scaling(arch.config).get("rope_type")
    known = kind in (None, "linear", *LONG)
    return None if known else f"says rope scaling {kind!r}, which mlx-lm ignores in a phi3"


OBJECTIONS: Mapping[str, Callable[[Architecture], str | None]] = {
    "olmo2": _why_no_olmo2,
    "phi3": _why_no_phi3,
    "smollm3": _why_no_smollm3,
}


# ---- further metadata, and notes for people ----


def rotary(arch: Architecture, architecture: str) -> int:
    """How many dimensions of a head the rope turns."""
    return int(arch.uniform("head_dim") * (rotary_share(arch.config) if architecture in ("phi3", "glm4moe") else 1.0))


def _windows(writer: Any, config: Mapping[str, Any], kinds: Sequence[str]) -> None:
    """Write one entry per layer: llama.cpp would apply its default period to the layers that are left."""
    writer.add_sliding_window(config["sliding_window"])
    writer.add_sliding_window_pattern([kind == "sliding_attention" for kind in kinds])


def _gemma3_metadata(writer: Any, checkpoint: Checkpoint) -> None:
    raw, arch = checkpoint.text_config, checkpoint.arch
    local = (raw.get("rope_parameters") or {}).get("sliding_attention", {}).get("rope_theta")
    _windows(writer, arch.config, [layer.kind for layer in arch.layers])
    local = raw.get("rope_local_base_freq") or local or arch.config["rope_local_base_freq"]
    writer.add_rope_freq_base_swa(float(local))


def _gemma2_metadata(writer: Any, checkpoint: Checkpoint) -> None:
    """Write the windows of the original, which mlx-lm does not have."""
    arch, kind = checkpoint.arch, checkpoint.arch.family.by_place["layer_types"]
    _windows(writer, arch.config, [kind(arch.config, i) for i in range(len(arch.layers))])
    writer.add_attn_logit_softcapping(float(arch.config["attn_logit_softcapping"]))
    writer.add_final_logit_softcapping(float(arch.config["final_logit_softcapping"]))


def _olmo2_metadata(writer: Any, checkpoint: Checkpoint) -> None:
    kinds = [layer.kind for layer in checkpoint.arch.layers]
    if "sliding_attention" in kinds:  # olmo3
        _windows(writer, checkpoint.arch.config, kinds)


def _granite_metadata(writer: Any, checkpoint: Checkpoint) -> None:
    config = checkpoint.arch.config
    writer.add_logit_scale(float(config["logits_scaling"]))
    writer.add_residual_scale(float(config["residual_multiplier"]))
    writer.add_embedding_scale(float(config["embedding_multiplier"]))
    writer.add_attention_scale(float(config["attention_multiplier"]))


def _mistral3_metadata(writer: Any, checkpoint: Checkpoint) -> None:
    """Write how queries are scaled up step by step; a step is the original length."""
    parameters = checkpoint.arch.config["rope_parameters"]
    writer.add_attn_temperature_scale(float(parameters["llama_4_scaling_beta"]))
    if parameters.get("rope_type") != "yarn":  # for yarn, the rope metadata already have it
        writer.add_rope_scaling_orig_ctx_len(int(parameters["original_max_position_embeddings"]))


def _phi3_metadata(writer: Any, checkpoint: Checkpoint) -> None:
    """mlx_lm/models/rope_utils.py SuScaledRoPE; the factors themselves are tensors (see gguf/write/tensors.py)."""
    config = both_rope_spellings(checkpoint.arch.config)
    if rope_scaling(config).get("rope_type") not in LONG:
        return
    original = config.get("original_max_position_embeddings") or 4096
    factor = (config.get("max_position_embeddings") or 131072) / original
    writer.add_rope_scaling_orig_ctx_len(original)
    writer.add_rope_scaling_attn_factors(1.0 if factor <= 1 else math.sqrt(1 + math.log(factor) / math.log(original)))


# metadata of an architecture in addition to the common ones
FURTHER: Mapping[str, Callable[[Any, Checkpoint], None]] = {
    "gemma2": _gemma2_metadata,
    "gemma3": _gemma3_metadata,
    "granite": _granite_metadata,
    "mistral3": _mistral3_metadata,
    "olmo2": _olmo2_metadata,
    "phi3": _phi3_metadata,
}


def _gemma2_notes(arch: Architecture) -> tuple[str, ...]:
    """Notes on differences between llama.cpp and mlx-lm."""
    window = arch.config["sliding_window"]
    if (arch.config.get("max_position_embeddings") or 0) <= window:
        return ()
    return (f"beyond {window} tokens llama.cpp attends to the last {window} in every other layer, mlx-lm to all",)


NOTES: Mapping[str, Callable[[Architecture], tuple[str, ...]]] = {"gemma2": _gemma2_notes}
