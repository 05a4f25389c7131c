"""How llama.cpp runs a model: its architecture there, and the metadata that describes it. No arrays.

The table of a family names its architecture; this file adds what concerns rope, attention and sizes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from ..arch import Architecture
from ..base.errors import PareError
from ..model.checkpoint import Checkpoint
from ..model.licence import licence_name
from . import experts, uneven_layers
from .special_cases import ALLOWED, FURTHER, LONG, NOTES, OBJECTIONS, WINDOWS, rotary

FILE_TYPES = {  # the kinds that can be written: enum llama_ftype, llama.cpp include/llama.h
    "f32": 0, "f16": 1, "bf16": 32, "q8_0": 7, "q4_0": 2, "q4_1": 3, "q5_0": 8, "q5_1": 9,
    "q2_k": 10, "q2_k_s": 21, "q3_k_s": 11, "q3_k_m": 12, "q3_k_l": 13, "q4_k_s": 14, "q4_k_m": 15, "q5_k_s": 16,
    "q5_k_m": 17, "q6_k": 18, "iq1_s": 24, "iq1_m": 31, "iq2_xxs": 19, "iq2_xs": 20, "iq2_s": 28, "iq2_m": 29,
    "iq3_xxs": 23, "iq3_xs": 22, "iq3_s": 26, "iq3_m": 27, "iq4_nl": 25, "iq4_xs": 30,
}  # fmt: skip


RUNTIMES = ("mlx", "llama.cpp", "ollama", "lm-studio")  # all except the first read GGUF, with llama.cpp


@dataclass(frozen=True)
class Target:
    """How llama.cpp will run the model."""

    architecture: str
    permute: bool  # its rope pairs neighbours; MLX's pairs halves of a head
    theta: float
    scaling: Mapping[str, Any] = field(default_factory=dict)  # rope scaling of config.json; empty: none
    q_norm: float = 1.0  # factor on q_norm (q_proj if there is none) that corrects the attention scale
    q_proj: float = 1.0
    notes: tuple[str, ...] = ()  # on what llama.cpp computes differently

    @property
    def scaling_type(self) -> str:
        return str(self.scaling.get("type") or self.scaling.get("rope_type") or "default")


def runtimes_of(arch: Architecture) -> dict[str, str | None]:
    """The class or architecture of every runtime that computes what this model does; None if there is none.

    ``target_of`` alone looks at what the config sets besides sizes (scaled rope).
    """
    if not arch.family.result:
        return {"mlx-lm": arch.family.name, "llama.cpp": arch.family.gguf, "transformers": arch.config["model_type"]}
    there = uneven_layers.architecture(arch) if uneven_layers.why_not(arch) is None else None
    return {"mlx-lm": arch.family.name, "llama.cpp": there, "transformers": None}


def target_of(checkpoint: Checkpoint) -> Target:
    """The llama.cpp architecture for a checkpoint. Raises PareError if no architecture computes the same."""
    arch, config, family = checkpoint.arch, checkpoint.arch.config, checkpoint.arch.family
    theta, scaling = _rope(checkpoint)
    if family.result:
        name = uneven_layers.architecture(arch)
        target = Target(name, name == "deci", theta, scaling)
        _check_scaling(checkpoint, target)
        return target
    target = Target(family.gguf, family.gguf_rope == "norm", theta, scaling)
    biased = config.get("attention_out_bias") or config.get("mlp_bias")
    if family.gguf in ("qwen2", "seed_oss") and (target.scaling_type == "llama3" or biased):
        # only the llama architecture has rope factors and those biases; its blocks differ in the row order alone
        target = Target("llama", True, theta, scaling)
    kinds = {layer.mixing for layer in arch.layers}
    if target.architecture not in WINDOWS and "sliding_attention" in kinds:
        raise PareError(f"{checkpoint.path} has sliding attention, which llama.cpp's {target.architecture} lacks")
    for objections in (OBJECTIONS, experts.OBJECTIONS if arch.uses("expert") else {}):
        if family.gguf in objections and (why := objections[family.gguf](arch)):
            raise PareError(f"{checkpoint.path} {why}")
    if others := sorted(kinds - {"full_attention", "sliding_attention"}):
        raise PareError(f"{checkpoint.path} has layers of {others[0]}, of which GGUF files are not written yet")
    if config.get("rope_traditional"):
        raise PareError(f"{checkpoint.path} sets rope_traditional, which is not supported in GGUF")
    _check_scaling(checkpoint, target)
    if target.architecture == "gemma3":
        return Target("gemma3", False, theta, scaling, _gemma_q_norm(arch))
    if target.architecture == "gemma2":
        return Target("gemma2", False, theta, q_proj=_gemma_q_proj(arch), notes=NOTES["gemma2"](arch))
    if target.architecture == "phi3" and target.scaling_type in LONG:
        return replace(target, notes=("its rope is scaled by the long factors at any length, as mlx-lm does it",))
    return target


def _check_scaling(checkpoint: Checkpoint, target: Target) -> None:
    architecture, kind, scaling = target.architecture, target.scaling_type, target.scaling
    allowed = ALLOWED.get(architecture, ("linear", "yarn"))
    if kind not in ("default", *allowed):
        raise PareError(
            f"{checkpoint.path} scales its rope by {kind!r}, which llama.cpp's {architecture} does not do",
            f"supported are {', '.join(allowed)}",
        )
    if kind not in ("default", *LONG) and not scaling.get("factor"):
        raise PareError(f"{checkpoint.path / 'config.json'} scales its rope by {kind!r} but gives no factor")
    if kind == "yarn" and (scaling.get("beta_fast", 32), scaling.get("beta_slow", 1)) != (32, 1):
        raise PareError(
            f"{checkpoint.path} uses yarn with other betas than 32 and 1",
            "llama.cpp does not read them from the file for this architecture",
        )


def _rope(checkpoint: Checkpoint) -> tuple[float, dict[str, Any]]:
    """Rope base and scaling from either spelling: rope_theta and rope_scaling, or transformers 5's rope_parameters."""
    raw = checkpoint.text_config
    parameters = raw.get("rope_parameters") or {}
    parameters = parameters.get("full_attention", parameters)
    theta = raw.get("rope_theta") or parameters.get("rope_theta") or checkpoint.arch.config.get("rope_theta")
    theta = theta or checkpoint.arch.config.get("rope_freq_constant")  # openelm
    if not theta:
        raise PareError(f"{checkpoint.path / 'config.json'} has no rope_theta")
    return float(theta), dict(raw.get("rope_scaling") or parameters)


def _gemma_q_norm(arch: Architecture, largest: int = 62) -> float:
    """The factor on q_norm that corrects the attention scale.

    llama.cpp scales attention by 1/sqrt(head_dim), but by 1/sqrt(hidden // heads) in a model of 62 layers
    (src/models/gemma3.cpp). The model means 1/sqrt(query_pre_attn_scalar). q_norm follows q_proj, so it can carry the
    difference, and a depth-pruned 27B stays what it was. ``largest``: the number of layers that llama.cpp looks for.
    """
    heads = arch.uniform("kv_head") * arch.uniform("group")
    assumed = arch.sizes["hidden"] // heads if len(arch.layers) == largest else arch.uniform("head_dim")
    return math.sqrt(assumed / arch.config["query_pre_attn_scalar"])


def _gemma_q_proj(arch: Architecture) -> float:
    """The same for gemma2, whose largest model has 46 layers (src/models/gemma2.cpp), and which has no q_norm."""
    return _gemma_q_norm(arch, largest=46)


# ---- metadata ----


def metadata(writer: Any, checkpoint: Checkpoint, target: Target, kind: str) -> None:
    """Add all metadata except for the name and the tokenizer.

    Args:
        writer: a gguf.GGUFWriter.
        checkpoint: the model.
        target: how llama.cpp will run it.
        kind: one of FILE_TYPES.
    """
    arch, config = checkpoint.arch, checkpoint.arch.config
    head_dim = arch.uniform("head_dim")
    licence = licence_name(checkpoint.path)
    if licence:
        writer.add_license(licence)
    writer.add_file_type(FILE_TYPES[kind])
    if kind not in ("f32", "f16", "bf16"):
        writer.add_quantization_version(2)  # GGML_QNT_VERSION
    writer.add_vocab_size(arch.sizes["vocab"])
    writer.add_context_length(config.get("max_position_embeddings") or 2048)  # transformers' default for llama
    writer.add_embedding_length(arch.sizes["hidden"])
    writer.add_block_count(len(arch.layers))
    if arch.family.result:
        layers = uneven_layers.sizes(arch)
        writer.add_feed_forward_length([layer.ffn for layer in layers])
        writer.add_head_count([layer.heads for layer in layers])
        writer.add_head_count_kv([layer.kv_heads for layer in layers])
    else:
        writer.add_feed_forward_length(arch.layers[0].sizes.get("ffn") or arch.uniform("expert_ffn"))
        writer.add_head_count(arch.uniform("kv_head") * arch.uniform("group"))
        writer.add_head_count_kv(arch.uniform("kv_head"))
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    writer.add_layer_norm_rms_eps(float(config["rms_norm_eps"]))
    writer.add_rope_dimension_count(rotary(arch, target.architecture))
    writer.add_rope_freq_base(target.theta)
    _scaling_metadata(writer, target)
    if arch.uses("expert"):
        experts.metadata(writer, arch, target.architecture)
    if target.architecture in FURTHER:
        FURTHER[target.architecture](writer, checkpoint)


def _scaling_metadata(writer: Any, target: Target) -> None:
    import gguf

    scaling, kind = target.scaling, target.scaling_type
    if kind not in ("linear", "yarn"):
        return
    factor = float(scaling["factor"])
    writer.add_rope_scaling_type(gguf.RopeScalingType(kind))
    writer.add_rope_scaling_factor(factor)
    if kind == "linear":
        return
    # mlx_lm/models/rope_utils.py YarnRoPE; the last divisor is what llama.cpp multiplies by itself (ggml rope_yarn)
    writer.add_rope_scaling_orig_ctx_len(int(scaling.get("original_max_position_embeddings", 4096)))
    growth = 0.1 * math.log(max(factor, 1))
    mscale = (1 + scaling.get("mscale", 1) * growth) / (1 + scaling.get("mscale_all_dim", 0) * growth)
    writer.add_rope_scaling_attn_factors(mscale / (1 + growth))
