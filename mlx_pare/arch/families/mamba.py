"""Families with Mamba 2 layers, as data. Of these only experts are cut.

The axes are those of linear attention. Value heads and their width are the heads of Mamba; key heads are its groups,
and the key width is the size of its state.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ...base.errors import PareError
from ..parent import Wrapper
from ..rows import (
    EMBED,
    HEAD,
    KEYS,
    PRE_NORMS,
    UNGATED,
    Rows,
    attention,
    feed_forward,
    keys_without,
    norms,
    planned,
    swiglu,
)
from ..spec import Fixed, layer_types, tensor, whole
from .moe import DENSE, GROUPED, LOCAL, ROUTED, WITHOUT, along, bare_router, experts, has_none, router

K, V = "linear_k_head*linear_k_dim", "linear_v_head*linear_v_dim"


def mamba(
    path: str, in_bias: str, conv_bias: str, out_bias: str, norm: str | None = None, keeps_decay: bool = False
) -> Rows:
    """Make the rows of a Mamba 2 mixer.

    Args:
        path: the module of the mixer inside the block.
        in_bias: the config flag for the bias of in_proj.
        conv_bias: the config flag for the bias of the convolution.
        out_bias: the config flag for the bias of out_proj.
        norm: the config flag for the norm; None: always there.
        keeps_decay: whether A_log stays float32.
    Returns:
        The rows.
    """
    return (
        tensor(f"{path}.conv1d.weight", f"{V} + {K} + {K}, conv_kernel, one", "attention", stored="float"),
        tensor(f"{path}.conv1d.bias", f"{V} + {K} + {K}", "attention", "conv1d_bias", conv_bias),
        tensor(f"{path}.in_proj.weight", f"{V} + {V} + {K} + {K} + linear_v_head, hidden", "attention"),
        tensor(f"{path}.in_proj.bias", f"{V} + {V} + {K} + {K} + linear_v_head", "attention", "in_proj_bias", in_bias),
        tensor(f"{path}.dt_bias", "linear_v_head", "attention", "dt_bias"),
        tensor(f"{path}.A_log", "linear_v_head", "attention", "a_log", stored="float32" if keeps_decay else ""),
        tensor(f"{path}.D", "linear_v_head", "attention", "d"),
        tensor(f"{path}.norm.weight", V, "norm", "linear_norm", norm),
        tensor(f"{path}.out_proj.weight", f"hidden, {V}", "attention"),
        tensor(f"{path}.out_proj.bias", "hidden", "attention", "out_proj_bias", out_bias),
    )


# ---- granitemoehybrid ----

MAMBA_KEYS = {
    "linear_v_head": "mamba_n_heads",
    "linear_v_dim": "mamba_d_head",
    "linear_k_head": "mamba_n_groups",
    "linear_k_dim": "mamba_d_state",
    "conv_kernel": "mamba_d_conv",
}
GRANITE_MIXERS = {
    "full_attention": attention("attention_bias", "attention_bias"),
    "mamba": mamba("mamba", "mamba_proj_bias", "mamba_conv_bias", "mamba_proj_bias"),
}
GRANITE_MOE = (
    tensor("shared_mlp.input_linear.weight", "shared_ffn + shared_ffn, hidden", "ffn", "shared_gate_up"),
    tensor("shared_mlp.output_linear.weight", "hidden, shared_ffn", "ffn", "shared_down"),
    *router("block_sparse_moe.router.layer", "8bit"),
    *experts("block_sparse_moe.switch_mlp"),
)


def granite_kind(config: Mapping[str, Any], index: int) -> str:
    """The kind of a layer by mlx_lm/models/granitemoehybrid.py GraniteMoeHybridLayer, which writes attention for
    full_attention."""
    kind = layer_types(config, whole(config, "num_hidden_layers"))[index]
    kind = "full_attention" if kind == "attention" else kind
    return kind + ("+moe" if config.get("num_local_experts") else "")


GRANITE_HYBRID = planned(
    "granitemoehybrid",
    {
        kind + mark: (*mixer, *ffn, *PRE_NORMS)
        for kind, mixer in GRANITE_MIXERS.items()
        for mark, ffn in (("", swiglu("mlp_bias")), ("+moe", GRANITE_MOE))
    },
    keys=keys_without("head_dim", shared_ffn="shared_intermediate_size", **LOCAL, **MAMBA_KEYS),
    **along("layer", "expert", "ffn"),
    needed=frozenset(),
    fixed=(WITHOUT, DENSE),
    kinds=granite_kind,
    gguf="granitehybrid",
)

# ---- falcon_h1: attention and Mamba side by side in every layer ----

FALCON_H1 = planned(
    "falcon_h1",
    {
        "mamba_and_attention": (
            *mamba("mamba", "mamba_proj_bias", "mamba_conv_bias", "projectors_bias", "mamba_rms_norm"),
            *attention("attention_bias", "attention_bias"),
            *swiglu("mlp_bias", "feed_forward"),
            *norms({"attn_norm": "input_layernorm", "ffn_norm": "pre_ff_layernorm"}),
        )
    },
    keys={**KEYS, **MAMBA_KEYS},
    model=(EMBED, *norms({"final_norm": "model.final_layernorm"}), HEAD),
    defaults={  # mlx_lm/models/falcon_h1.py ModelArgs
        "head_dim": 64,
        "mamba_conv_bias": True,
        "mamba_d_conv": 4,
        "mamba_d_head": 64,
        "mamba_d_state": 128,
        "mamba_n_groups": 1,
    },
    gguf="falcon-h1",
)

# ---- nemotron_h: every layer is a mixer or a feed-forward ----

SPELLINGS = {  # of a kind, as a letter and as a word: mlx_lm/models/nemotron_h.py ModelArgs
    "mamba": ("M", "mamba", "linear_attention", "conv"),
    "full_attention": ("*", "attention", "full_attention"),
    "feed_forward": ("-", "mlp"),
    "feed_forward+moe": ("E", "moe"),
}
NEMOTRON_KINDS = {spelling: kind for kind, spellings in SPELLINGS.items() for spelling in spellings}


def nemotron_kind(config: Mapping[str, Any], index: int) -> str:
    """The kind that a letter of the pattern, or a name in the list, stands for."""
    for key in ("hybrid_override_pattern", "layers_block_type", "layer_types"):
        if (pattern := config.get(key)) is not None:
            break
    count = whole(config, "num_hidden_layers")
    if not isinstance(pattern, str | list) or len(pattern) != count or str(pattern[index]) not in NEMOTRON_KINDS:
        raise PareError(
            f"config.json says {key} = {str(pattern)[:80]!r}, expected a known kind for each of {count} layers"
        )
    return NEMOTRON_KINDS[str(pattern[index])]


def nemotron_recounted(config: Mapping[str, Any], kinds: Sequence[str]) -> dict[str, Any]:
    """The pattern of layers of these kinds; layer_types are a list for every layer."""
    letters, words = ([SPELLINGS[kind][which] for kind in kinds] for which in (0, 1))
    found: dict[str, Any] = {}
    if (pattern := config.get("hybrid_override_pattern")) is not None:
        found["hybrid_override_pattern"] = "".join(letters) if isinstance(pattern, str) else letters
    if config.get("layers_block_type") is not None:
        found["layers_block_type"] = words
    return found


FC, SHARED_UNGATED = {"expert_up": "fc1", "expert_down": "fc2"}, {"shared_up": "up_proj", "shared_down": "down_proj"}
NEMOTRON_MOE = (  # in some models the experts work on fewer dimensions than the model has
    *bare_router("mixer.gate"),
    *experts("mixer.switch_mlp", FC, when="!moe_latent_size"),
    *experts("mixer.switch_mlp", FC, inner="expert_latent", when="moe_latent_size"),
    *feed_forward("mixer.shared_experts", SHARED_UNGATED, "shared_ffn", "mlp_bias", "n_shared_experts"),
    tensor("mixer.fc1_latent_proj.weight", "expert_latent, hidden", "ffn", None, "moe_latent_size"),
    tensor("mixer.fc1_latent_proj.bias", "expert_latent", "ffn", "fc1_latent_proj_bias", "moe_latent_size mlp_bias"),
    tensor("mixer.fc2_latent_proj.weight", "hidden, expert_latent", "ffn", None, "moe_latent_size"),
    tensor("mixer.fc2_latent_proj.bias", "hidden", "ffn", "fc2_latent_proj_bias", "moe_latent_size mlp_bias"),
)
APART = Fixed(("layer",), "layers without a feed-forward are not scored", has_none)
LATENT = Fixed(
    ("expert",),
    "its experts work on fewer dimensions than the model has",
    lambda config: bool(config.get("moe_latent_size")),
)
NEMOTRON_BLOCKS = {
    "mamba": mamba("mixer", "mamba_proj_bias", "use_conv_bias", "mamba_proj_bias", keeps_decay=True),
    "full_attention": attention("attention_bias", "attention_bias", "mixer"),
    "feed_forward": feed_forward("mixer", UNGATED, bias="mlp_bias"),
    "feed_forward+moe": NEMOTRON_MOE,
}
NEMOTRON_H = planned(
    "nemotron_h",
    {kind: (*rows, *norms({"attn_norm": "norm"})) for kind, rows in NEMOTRON_BLOCKS.items()},
    prefix="backbone.layers.{layer}.",
    keys={
        **KEYS,
        **ROUTED,
        "shared_ffn": "moe_shared_expert_intermediate_size",
        "expert_latent": "moe_latent_size",
        "linear_v_head": "mamba_num_heads",
        "linear_v_dim": "mamba_head_dim",
        "linear_k_head": "n_groups",
        "linear_k_dim": "ssm_state_size",
        "conv_kernel": "conv_kernel",
    },
    model=(
        tensor("backbone.embeddings.weight", "vocab, hidden", "embedding", "embed_tokens"),
        *norms({"final_norm": "backbone.norm_f"}),
        HEAD,
    ),
    **along("layer", "expert"),
    needed=frozenset({"mamba", "full_attention"}),
    fixed=(WITHOUT, GROUPED, LATENT, APART),
    kinds=nemotron_kind,
    recounted=nemotron_recounted,
    tied=False,
)

FAMILIES = (GRANITE_HYBRID, FALCON_H1, NEMOTRON_H)
WRAPPERS: dict[str, Wrapper] = {}
