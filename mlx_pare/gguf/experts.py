"""Models with experts in llama.cpp: names of their tensors, metadata, and which models its architectures cannot run.

``src`` is llama.cpp's. What it reads with defaults that depend on sizes is always written: other defaults apply to a
model after a cut.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from ..arch import Architecture, Tensor

NAMES = {  # role -> name in a block; biases of the experts have the suffix .bias
    "router": "ffn_gate_inp.weight",
    "router_bias": "exp_probs_b.bias",
    "expert_gate": "ffn_gate_exps.weight",
    "expert_up": "ffn_up_exps.weight",
    "expert_down": "ffn_down_exps.weight",
    "expert_gate_bias": "ffn_gate_exps.bias",
    "expert_up_bias": "ffn_up_exps.bias",
    "expert_down_bias": "ffn_down_exps.bias",
    "shared_gate": "ffn_gate_shexp.weight",
    "shared_up": "ffn_up_shexp.weight",
    "shared_down": "ffn_down_shexp.weight",
    "shared_router": "ffn_gate_inp_shexp.weight",
}
OWN_NAMES = {  # of single architectures
    "gpt-oss": {
        "router_bias": "ffn_gate_inp.bias",
        "sinks": "attn_sinks.weight",
        "ffn_norm": "post_attention_norm.weight",
    }
}


def name(architecture: str, tensor: Tensor) -> str | None:
    """The name of a tensor that only models with experts have; None for all others."""
    known = NAMES | OWN_NAMES.get(architecture, {})
    found = known.get(tensor.spec.role)
    return None if found is None or tensor.layer is None else f"blk.{tensor.layer}.{found}"


def shape(tensor: Tensor) -> tuple[int, ...]:
    """The shape of a tensor in a file: the gate of a shared expert is a vector there."""
    return tensor.shape[1:] if tensor.spec.role == "shared_router" else tensor.shape


def _dense_ones(arch: Architecture) -> list[int]:
    return [i for i, layer in enumerate(arch.layers) if not layer.kind.endswith("+moe")]


def _leading(arch: Architecture) -> int:
    """How many layers in front have no experts; llama.cpp takes all later ones to have them."""
    return len(_dense_ones(arch))


def _in_every_layer(arch: Architecture) -> str | None:
    """src/models/qwen3moe.cpp and others."""
    where = _dense_ones(arch)
    return f"has layers without experts, which llama.cpp's {arch.family.gguf} has no place for" if where else None


def _behind_dense(arch: Architecture) -> str | None:
    """src/models/glm4-moe.cpp, ernie4-5-moe.cpp."""
    if _dense_ones(arch) != list(range(_leading(arch))):
        return f"has layers without experts behind others, which llama.cpp's {arch.family.gguf} has no place for"
    return None


def _normalised(arch: Architecture, always: bool) -> str | None:
    """Whether the weights of the chosen experts add up to 1, as the architecture takes for granted."""
    if bool(arch.config.get("norm_topk_prob")) == always:
        return None
    does = "always normalises" if always else "never normalises"
    return f"sets norm_topk_prob to {not always}, and llama.cpp's {arch.family.gguf} {does} the weights of experts"


def _ungrouped(arch: Architecture) -> str | None:
    """src/models/olmoe.cpp: the norm of the keys is as wide as that of the queries."""
    if arch.uniform("group") == 1:
        return None
    return f"groups its queries, and llama.cpp's {arch.family.gguf} does not"


OBJECTIONS: Mapping[str, Callable[[Architecture], str | None]] = {
    "qwen3moe": lambda arch: _in_every_layer(arch) or _normalised(arch, True),
    "qwen2moe": _in_every_layer,
    "olmoe": lambda arch: _in_every_layer(arch) or _normalised(arch, False) or _ungrouped(arch),
    "glm4moe": _behind_dense,
    "ernie4_5-moe": _behind_dense,
    **{
        architecture: lambda arch: f"is a {arch.family.name}, of which GGUF files are not written yet"
        for architecture in ("phimoe", "deepseek2", "qwen3next", "qwen35", "lfm2moe", "granitehybrid", "nemotron_h")
    },
}


def metadata(writer: Any, arch: Architecture, architecture: str) -> None:
    """Add what llama.cpp needs to know about experts.

    Args:
        writer: a gguf.GGUFWriter.
        arch: the model, which has experts.
        architecture: of llama.cpp.
    """
    import gguf

    config, sizes = arch.config, next(layer.sizes for layer in arch.layers if layer.kind.endswith("+moe"))
    writer.add_expert_count(arch.uniform("expert"))
    writer.add_expert_used_count(sizes["active"])
    if architecture != "llama":
        writer.add_expert_feed_forward_length(sizes["expert_ffn"])
    if architecture == "qwen2moe" or (architecture == "ernie4_5-moe" and sizes.get("shared_ffn")):
        writer.add_expert_shared_feed_forward_length(sizes["shared_ffn"])
    if architecture in ("glm4moe", "ernie4_5-moe"):
        shared = config.get("n_shared_experts") or config.get("moe_num_shared_experts") or 0
        writer.add_leading_dense_block_count(_leading(arch))
        writer.add_expert_shared_count(shared)
    if architecture == "glm4moe":
        writer.add_expert_gating_func(gguf.ExpertGatingFuncType.SIGMOID)
        writer.add_expert_weights_scale(float(config["routed_scaling_factor"]))
        writer.add_expert_weights_norm(bool(config["norm_topk_prob"]))
    if architecture == "ernie4_5-moe":
        writer.add_interleave_moe_layer_step(1)
    if architecture == "gpt-oss":
        writer.add_sliding_window(config["sliding_window"])
        writer.add_sliding_window_pattern([layer.mixing == "sliding_attention" for layer in arch.layers])
