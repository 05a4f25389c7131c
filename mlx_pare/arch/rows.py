"""The rows that many families share, and small functions that make them with other names, biases or storage."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from .spec import Family, TensorSpec, layer_types, tensor, whole

Rows = tuple[TensorSpec, ...]
Kind = Callable[[Mapping[str, Any], int], str]

KEYS = {
    "hidden": "hidden_size",
    "vocab": "vocab_size",
    "layer": "num_hidden_layers",
    "ffn": "intermediate_size",
    "q_head": "num_attention_heads",
    "kv_head": "num_key_value_heads",
    "head_dim": "head_dim",
}


def keys_without(*axes: str, **more: str) -> dict[str, str]:
    """KEYS without some axes, which mlx-lm does not read for a family, and with other keys added."""
    return {axis: key for axis, key in KEYS.items() if axis not in axes} | more


SQUARE_KEYS = keys_without("head_dim")  # head_dim is always hidden / heads; the config's is not read

EMBED = tensor("model.embed_tokens.weight", "vocab, hidden", "embedding")
NORM = tensor("model.norm.weight", "hidden", "norm", "final_norm")
HEAD = tensor("lm_head.weight", "vocab, hidden", "embedding")


def planned(name: str, blocks: Rows | Mapping[str, Rows], **more: Any) -> Family:
    """Make a family that can be counted and planned for, but not cut.

    gguf_rope (how llama.cpp turns its rope) is not set, because a model that cannot be cut is not exported.

    Args:
        name: of the family; also its model type and its llama.cpp architecture, unless ``more`` sets others.
        blocks: layer kind -> table of rows; or one table, if all layers are alike.
        more: other fields of Family.
    Returns:
        The family.
    """
    blocks = blocks if isinstance(blocks, Mapping) else {"full_attention": blocks}
    given = {"model_types": (name,), "keys": KEYS, "model": (EMBED, NORM, HEAD), "gguf": name, **more}
    return Family(name=name, blocks=blocks, **{"cuttable": frozenset(), **given})


# A bias exists if the named config flag is true, always (True), or never (False).
Bias = str | bool


def _flag(bias: Bias) -> str | None:
    return bias if isinstance(bias, str) else None


def attention(
    qkv_bias: Bias = False, out_bias: Bias = False, path: str = "self_attn", queries: str = "q_head*head_dim"
) -> Rows:
    """Make the rows of grouped-query attention: q, k, v, o.

    Args:
        qkv_bias: whether q, k and v have biases.
        out_bias: whether o has a bias.
        path: the module of the attention inside the block.
        queries: the dimension of the rows of q_proj.
    Returns:
        The rows.
    """
    qkv = [
        ("q_proj", queries, ("rope",)),
        ("k_proj", "kv_head*head_dim", ("rope",)),
        ("v_proj", "kv_head*head_dim", ()),
    ]
    rows = [tensor(f"{path}.{n}.weight", f"{d}, hidden", "attention", n, None, *tf) for n, d, tf in qkv]
    if qkv_bias:
        rows += [tensor(f"{path}.{n}.bias", d, "attention", f"{n}_bias", _flag(qkv_bias), *tf) for n, d, tf in qkv]
    rows.append(tensor(f"{path}.o_proj.weight", "hidden, q_head*head_dim", "attention"))
    if out_bias:
        rows.append(tensor(f"{path}.o_proj.bias", "hidden", "attention", "o_proj_bias", _flag(out_bias)))
    return tuple(rows)


def feed_forward(
    path: str, names: Mapping[str, str], ffn: str = "ffn", bias: Bias = False, when: str | None = None
) -> Rows:
    """Make the rows of a feed-forward.

    Args:
        path: the module of the feed-forward inside the block.
        names: role -> name of the matrix; roles that end in "down" or "down_proj" lead back to hidden.
        ffn: the axis of the inner width.
        bias: whether the matrices have biases.
        when: config flags without which the tensors are absent; None: always there.
    Returns:
        The rows.
    """
    rows, ends = [], ("down", "down_proj")
    sides = {role: ("hidden", ffn) if role.endswith(ends) else (ffn, "hidden") for role in names}
    rows += [tensor(f"{path}.{names[r]}.weight", ", ".join(d), "ffn", r, when) for r, d in sides.items()]
    if bias:
        flags = " ".join(filter(None, (when, _flag(bias)))) or None
        rows += [tensor(f"{path}.{names[r]}.bias", d[0], "ffn", f"{r}_bias", flags) for r, d in sides.items()]
    return tuple(rows)


GATED = {"gate_proj": "gate_proj", "up_proj": "up_proj", "down_proj": "down_proj"}
UNGATED = {"up_proj": "up_proj", "down_proj": "down_proj"}
SHARED = {"shared_gate": "gate_proj", "shared_up": "up_proj", "shared_down": "down_proj"}
FUSED = (  # gate and up as one matrix
    tensor("mlp.gate_up_proj.weight", "ffn + ffn, hidden", "ffn"),
    tensor("mlp.down_proj.weight", "hidden, ffn", "ffn"),
)


def swiglu(bias: Bias = False, path: str = "mlp") -> Rows:
    """Make the rows of a gated feed-forward: gate, up and down.

    Args:
        bias: whether the matrices have biases.
        path: the module of the feed-forward inside the block.
    Returns:
        The rows.
    """
    return feed_forward(path, GATED, bias=bias)


def shared_expert(path: str, bias: Bias = False, when: str | None = None) -> Rows:
    """Make gate, up and down of the experts that every token visits, stored as one wider expert.

    Args:
        path: the module of the experts inside the block.
        bias: whether the matrices have biases.
        when: config flags without which the tensors are absent; None: always there.
    Returns:
        The rows.
    """
    return feed_forward(path, SHARED, "shared_ffn", bias, when)


def norms(names: Mapping[str, str], *transforms: str, bias: Bias = False) -> Rows:
    """Make the rows of norms over the hidden size.

    Args:
        names: role -> module of the norm.
        transforms: of the weights (TensorSpec.transforms), such as "norm+1".
        bias: whether the norms have biases.
    Returns:
        The rows.
    """
    rows = [tensor(f"{name}.weight", "hidden", "norm", role, None, *transforms) for role, name in names.items()]
    if bias:
        rows += [tensor(f"{name}.bias", "hidden", "norm", f"{role}_bias", _flag(bias)) for role, name in names.items()]
    return tuple(rows)


BEFORE = {"attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm"}
AFTER = {"attn_post_norm": "post_attention_layernorm", "ffn_post_norm": "post_feedforward_layernorm"}
AROUND = {
    "attn_norm": "input_layernorm",
    "attn_post_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "ffn_post_norm": "post_feedforward_layernorm",
}
PRE_NORMS = norms(BEFORE)

HEAD_NORMS = (
    tensor("self_attn.q_norm.weight", "head_dim", "norm", "q_norm"),
    tensor("self_attn.k_norm.weight", "head_dim", "norm", "k_norm"),
)
WIDE_HEAD_NORMS = (  # over all heads at once
    tensor("self_attn.q_norm.weight", "q_head*head_dim", "norm", "q_norm"),
    tensor("self_attn.k_norm.weight", "kv_head*head_dim", "norm", "k_norm"),
)


def changed(rows: Iterable[TensorSpec], roles: Iterable[str], **changes: Any) -> Rows:
    """Copy rows, and change fields of some of them.

    Args:
        rows: the rows.
        roles: the roles of the rows to change.
        changes: the new values of fields of TensorSpec, such as ``stored``.
    Returns:
        All rows, in the same order.
    """
    roles = tuple(roles)
    return tuple(dataclasses.replace(row, **changes) if row.role in roles else row for row in rows)


def without(rows: Iterable[TensorSpec], *roles: str) -> Rows:
    """Copy rows, except for those of some roles.

    Args:
        rows: the rows.
        roles: the roles to leave out.
    Returns:
        The other rows, in the same order.
    """
    return tuple(row for row in rows if row.role not in roles)


# ---- kinds of layers ----


def every(period: str | int) -> Kind:
    """Kinds by a period, a number or a config key: each ``period``-th layer has full attention, the others a window."""

    def kind(config: Mapping[str, Any], index: int) -> str:
        count = period if isinstance(period, int) else whole(config, period)
        return "sliding_attention" if (index + 1) % count else "full_attention"

    return kind


def listed(otherwise: Kind) -> Kind:
    """Kinds by the config's layer_types; without them as ``otherwise``."""

    def kind(config: Mapping[str, Any], index: int) -> str:
        if config.get("layer_types") is None:
            return otherwise(config, index)
        return layer_types(config, whole(config, "num_hidden_layers"))[index]

    return kind
