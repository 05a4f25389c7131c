"""Families with experts, as data. mlx-pare cuts them along experts and layers.

The experts of a layer are one stack (expert, rows, columns), as mlx-lm stores them. Names are those of a checkpoint
that mlx_lm.convert wrote; on the hub the same weights have other names.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ..parent import VISUAL, Wrapper
from ..rows import (
    BEFORE,
    EMBED,
    HEAD,
    HEAD_NORMS,
    KEYS,
    PRE_NORMS,
    WIDE_HEAD_NORMS,
    Bias,
    Rows,
    attention,
    changed,
    every,
    keys_without,
    listed,
    norms,
    planned,
    shared_expert,
    swiglu,
)
from ..spec import Family, Fixed, listed_layers, tensor, whole

GATED_EXPERTS = {"expert_gate": "gate_proj", "expert_up": "up_proj", "expert_down": "down_proj"}


def experts(
    path: str = "mlp.switch_mlp",
    names: Mapping[str, str] = GATED_EXPERTS,
    bias: Bias = False,
    inner: str = "hidden",
    when: str | None = None,
) -> Rows:
    """Make the rows of all experts of a layer: SwitchGLU in mlx_lm/models/switch_layers.py.

    Biases have two dimensions, but MLX never packs them.

    Args:
        path: the module of the experts inside the block.
        names: role -> name of the matrix.
        bias: whether the matrices have biases.
        inner: the axis of the experts' inputs and outputs.
        when: config flags without which the matrices are absent; None: always there.
    Returns:
        The rows.
    """
    sides = {r: (inner, "expert_ffn") if r == "expert_down" else ("expert_ffn", inner) for r in names}
    rows = [tensor(f"{path}.{names[r]}.weight", f"expert, {a}, {b}", "ffn", r, when) for r, (a, b) in sides.items()]
    if bias:
        flag = bias if isinstance(bias, str) else None
        rows += [
            tensor(f"{path}.{names[r]}.bias", f"expert, {a}", "ffn", f"{r}_bias", flag, stored="float")
            for r, (a, _) in sides.items()
        ]
    return tuple(rows)


def router(name: str, stored: str = "") -> Rows:
    """Make the row of the matrix that chooses the experts of a token.

    Args:
        name: the module of the router inside the block.
        stored: what mlx_lm.convert does with it (TensorSpec.stored).
    Returns:
        The row.
    """
    return (tensor(f"{name}.weight", "expert, hidden", "ffn", "router", stored=stored),)


def bare_router(name: str) -> Rows:
    """Make the rows of MoEGate in mlx_lm/models/deepseek_v3.py: an array that is not packed, and a bias that stays
    float32.

    Args:
        name: the module of the router inside the block.
    Returns:
        The rows.
    """
    return (
        *router(name, "float"),
        tensor(f"{name}.e_score_correction_bias", "expert", "ffn", "router_bias", stored="float32"),
    )


# axis -> config key, in three spellings; the second uses intermediate_size for the experts alone
EXPERTS = {"expert": "num_experts", "active": "num_experts_per_tok", "expert_ffn": "moe_intermediate_size"}
LOCAL = {"expert": "num_local_experts", "active": "num_experts_per_tok", "expert_ffn": "intermediate_size"}
ROUTED = {**EXPERTS, "expert": "n_routed_experts"}


def along(*axes: str) -> dict[str, frozenset[str]]:
    """The fields of Family for cuts along these axes, which are exact."""
    return {"cuttable": frozenset(axes), "exact": frozenset({*axes, "vocab"})}


def sparse(name: str, blocks: Rows | Mapping[str, Rows], **more: Any) -> Family:
    """Make a family that is cut along experts and layers.

    Args:
        name: of the family (rows.planned).
        blocks: layer kind -> table of rows, or one table (rows.planned).
        more: other fields of Family.
    Returns:
        The family.
    """
    return planned(name, blocks, **{**along("layer", "expert"), **more})


def is_sparse(config: Mapping[str, Any], index: int) -> bool:
    """Whether a layer has experts: mlx_lm/models/qwen3_moe.py Qwen3MoeDecoderLayer, qwen3_next.py
    Qwen3NextDecoderLayer."""
    dense = config.get("mlp_only_layers")
    chosen = not dense or index not in listed_layers(config, "mlp_only_layers", whole(config, "num_hidden_layers"))
    return chosen and bool(config.get("num_experts")) and (index + 1) % whole(config, "decoder_sparse_step") == 0


def listed_dense(config: Mapping[str, Any], kinds: Sequence[str]) -> dict[str, Any]:
    """The keys of qwen3_moe for layers of these kinds: dense layers are listed, whatever their places are."""
    return {"decoder_sparse_step": 1, "mlp_only_layers": [i for i, kind in enumerate(kinds) if "+moe" not in kind]}


QWEN3_MOE = sparse(
    "qwen3_moe",
    {
        "full_attention": (*attention(), *HEAD_NORMS, *swiglu(), *PRE_NORMS),
        "full_attention+moe": (*attention(), *HEAD_NORMS, *router("mlp.gate", "8bit"), *experts(), *PRE_NORMS),
    },
    keys={**KEYS, **EXPERTS},
    kinds=lambda config, index: "full_attention" + ("+moe" if is_sparse(config, index) else ""),
    recounted=listed_dense,
    defaults={"decoder_sparse_step": 1},
    gguf="qwen3moe",
)


def gated_shared(stored: str = "") -> Rows:
    """Make the rows of experts with one that every token visits, weighted by a gate: qwen2_moe and its successors.

    Args:
        stored: what mlx_lm.convert does with the router and the gate (TensorSpec.stored).
    Returns:
        The rows.
    """
    return (
        *router("mlp.gate", stored),
        *experts(),
        *shared_expert("mlp.shared_expert"),
        tensor("mlp.shared_expert_gate.weight", "one, hidden", "ffn", "shared_router", stored=stored),
    )


QWEN2_MOE = sparse(
    "qwen2_moe",
    {"full_attention+moe": (*attention(True), *gated_shared(), *PRE_NORMS)},
    keys=keys_without("ffn", "head_dim", shared_ffn="shared_expert_intermediate_size", **EXPERTS),
    tied=False,
    gguf="qwen2moe",
)

MIXTRAL_MLP = (*router("block_sparse_moe.gate"), *experts("block_sparse_moe.switch_mlp"))
MIXTRAL = sparse(
    "mixtral",
    {"full_attention+moe": (*attention(), *MIXTRAL_MLP, *PRE_NORMS)},
    keys=keys_without("ffn", "head_dim", **LOCAL),
    defaults={"tie_word_embeddings": False, "num_local_experts": 8, "num_experts_per_tok": 2},
    gguf="llama",
    gguf_rope="norm",
)

PHIMOE = sparse(
    "phimoe",
    {"full_attention+moe": (*attention(True, True), *MIXTRAL_MLP, *norms(BEFORE, bias=True))},
    keys=keys_without("ffn", "head_dim", **LOCAL),
    model=(
        EMBED,
        *norms({"final_norm": "model.norm"}, bias=True),
        HEAD,
        tensor("lm_head.bias", "vocab", "embedding", "lm_head_bias"),
    ),
    defaults={"num_local_experts": 16, "num_experts_per_tok": 2},
    tied=False,
)

OLMOE = sparse(
    "olmoe",
    {
        "full_attention+moe": (
            *attention("attention_bias", "attention_bias"),
            *WIDE_HEAD_NORMS,
            *router("mlp.gate"),
            *experts(bias="mlp_bias"),
            *PRE_NORMS,
        )
    },
    keys=keys_without("ffn", **{**EXPERTS, "expert_ffn": "intermediate_size"}),
)

_in_turns = listed(every(2))
GPT_OSS_BLOCK = (
    *attention(True, True),
    tensor("self_attn.sinks", "q_head", "attention", "sinks"),
    *router("mlp.router", "8bit"),
    tensor("mlp.router.bias", "expert", "ffn", "router_bias"),
    *experts("mlp.experts", bias=True),
    *PRE_NORMS,
)
GPT_OSS = sparse(
    "gpt_oss",
    {"full_attention+moe": GPT_OSS_BLOCK, "sliding_attention+moe": GPT_OSS_BLOCK},
    keys=keys_without("ffn", **LOCAL),
    kinds=lambda config, index: _in_turns(config, index) + "+moe",
    by_place={"layer_types": _in_turns},
    needed=frozenset({"full_attention", "sliding_attention"}),
    defaults={  # mlx_lm/models/gpt_oss.py ModelArgs
        "num_hidden_layers": 36,
        "hidden_size": 2880,
        "intermediate_size": 2880,
        "head_dim": 64,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
        "num_local_experts": 128,
        "num_experts_per_tok": 4,
        "vocab_size": 201088,
        "sliding_window": 128,
    },
    tied=False,
    gguf="gpt-oss",
)


def after_dense(mixer: str):
    """Kinds of layers of which the first few are dense: deepseek_v2 and its successors."""

    def kind(config: Mapping[str, Any], index: int) -> str:
        first = whole(config, "first_k_dense_replace", least=0)
        sparse = config.get("n_routed_experts") is not None and index >= first
        return mixer + ("+moe" if sparse and index % whole(config, "moe_layer_freq") == 0 else "")

    return kind


def dense_first(config: Mapping[str, Any], kinds: Sequence[str]) -> dict[str, Any]:
    """The keys of ``after_dense`` for layers of these kinds."""
    return {"first_k_dense_replace": sum("+moe" not in kind for kind in kinds)}


def has_experts(config: Mapping[str, Any]) -> bool:
    """Whether a config of a family that may have experts has any."""
    return any(config.get(key) for key in ("num_experts", "num_local_experts", "n_routed_experts"))


def has_none(config: Mapping[str, Any]) -> bool:
    """The opposite of ``has_experts``."""
    return not has_experts(config)


WITHOUT = Fixed(("expert",), "this model has no experts", has_none)
DENSE = Fixed(("ffn",), "its feed-forwards are experts", has_experts)
GROUPED = Fixed(  # equal numbers in every group would be exact (deepseek_v3); nothing here chooses by groups yet
    ("expert",), "its router chooses groups of experts first", lambda config: (config.get("n_group") or 1) != 1
)


def shared_width(config: Mapping[str, Any], index: int) -> dict[str, int]:
    """The width of all shared experts together: they are stored as one."""
    if not config.get("n_shared_experts"):
        return {}
    return {"shared_ffn": whole(config, "n_shared_experts") * whole(config, "moe_intermediate_size")}


ROUTED_MLP = (*bare_router("mlp.gate"), *experts(), *shared_expert("mlp.shared_experts", when="n_shared_experts"))

GLM4_MOE_ATTENTION = (
    *attention("attention_bias"),
    *changed(HEAD_NORMS, ("q_norm", "k_norm"), when="use_qk_norm"),
    *PRE_NORMS,
)
GLM4_MOE = sparse(
    "glm4_moe",
    {
        "full_attention": (*GLM4_MOE_ATTENTION, *swiglu()),
        "full_attention+moe": (*GLM4_MOE_ATTENTION, *ROUTED_MLP),
    },
    keys={**KEYS, **ROUTED},
    kinds=after_dense("full_attention"),
    widths=shared_width,
    recounted=dense_first,
    fixed=(GROUPED,),
    defaults={"moe_layer_freq": 1},
    tied=False,
    gguf="glm4moe",
)


def _end(given: Any, of: Callable[[list], Any]) -> Any:
    """One end of the range of layers with experts; of a pair the outer end. What is neither is returned as it is."""
    pair = isinstance(given, list) and 0 < len(given) <= 2 and all(type(end) is int for end in given)
    return of(given) if pair else given


def ernie_kind(config: Mapping[str, Any], index: int) -> str:
    """The kind of a layer by mlx_lm/models/ernie4_5_moe.py Ernie4_5_DecoderLayer.

    The ends of the range may be lists, with one number for text and one for images.
    """
    first, last = config.get("moe_layer_start_index"), config.get("moe_layer_end_index")
    ends = {
        "moe_layer_start_index": _end(first, min),
        "moe_layer_end_index": _end(last, max),
    }
    if last is None:
        ends["moe_layer_end_index"] = whole(config, "num_hidden_layers") - 1
    first, last = (whole(ends, key, least=0) for key in ends)
    sparse = first <= index <= last and (index + 1) % whole(config, "moe_layer_interval") == 0
    return "full_attention" + ("+moe" if sparse else "")


def ernie_range(config: Mapping[str, Any], kinds: Sequence[str]) -> dict[str, Any]:
    """The keys of ``ernie_kind`` for layers of these kinds, if those with experts are neighbours."""
    sparse_ones = [i for i, kind in enumerate(kinds) if "+moe" in kind] or [0, -1]
    return {
        "moe_layer_start_index": sparse_ones[0],
        "moe_layer_end_index": sparse_ones[-1],
        "moe_layer_interval": 1,
    }


def ernie_widths(config: Mapping[str, Any], index: int) -> dict[str, int]:
    """The widths of the experts: that of the dense feed-forward if the config gives none."""
    key = "moe_intermediate_size" if config.get("moe_intermediate_size") else "intermediate_size"
    width, shared = whole(config, key), whole(config, "moe_num_shared_experts", least=0)
    return {"expert_ffn": width} | ({"shared_ffn": width * shared} if shared else {})


ERNIE_ATTENTION = (*attention("use_bias", "use_bias"), *PRE_NORMS)
ERNIE4_5_MOE = sparse(
    "ernie4_5_moe",
    {
        "full_attention": (*ERNIE_ATTENTION, *swiglu("use_bias")),
        "full_attention+moe": (
            *ERNIE_ATTENTION,
            *router("mlp.gate"),
            *experts(bias="use_bias"),
            *shared_expert("mlp.shared_experts", "use_bias", "moe_num_shared_experts"),
        ),
    },
    keys={**KEYS, "expert": "moe_num_experts", "active": "moe_k"},
    kinds=ernie_kind,
    recounted=ernie_range,
    widths=ernie_widths,
    defaults={"moe_layer_start_index": 0, "moe_num_shared_experts": 0, "moe_layer_interval": 1, "moe_k": 1},
    gguf="ernie4_5-moe",
)

FAMILIES = (QWEN3_MOE, QWEN2_MOE, MIXTRAL, PHIMOE, OLMOE, GPT_OSS, GLM4_MOE, ERNIE4_5_MOE)
WRAPPERS = {"qwen3_vl_moe": Wrapper("qwen3_moe", beside=VISUAL)}
