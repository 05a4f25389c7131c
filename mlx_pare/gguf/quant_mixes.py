"""Which type every tensor gets in a GGUF file of a kind such as q4_k_m, as llama-quantize decides. Arithmetic only.

A kind is a base type and exceptions: more bits for the values of attention and for ffn_down in some layers, for the
head, and for what a model shares widely (grouped queries, eight experts). Learned from src/llama-quant.cpp of llama.cpp
(commit 007dbbf). tests/gguf/test_gguf_mix.py compares it with the installed llama.cpp, tensor by tensor, and with
published sizes.

Kinds that cannot be made without an importance matrix (NEEDS_MATRIX) are assumed to have one, other kinds to have none,
unless the caller says so. With a matrix, q4_0 and q5_0 get one more scale in the first eighth of ffn_down, and iq4_xs
and iq4_nl fewer bits there. Files whose types were chosen by hand (unsloth's UD) follow no rule: read their table with
gguf/header.py.
"""

from __future__ import annotations

from collections.abc import Callable
from difflib import get_close_matches
from math import prod
from typing import NamedTuple

from ..arch import Architecture, Tensor
from ..arch.axes import dim, length
from ..base.errors import UsageError
from . import uneven_layers
from .types import fits, nbytes

BASE = {
    "f32": "F32", "f16": "F16", "bf16": "BF16",
    "q4_0": "Q4_0", "q4_1": "Q4_1", "q5_0": "Q5_0", "q5_1": "Q5_1", "q8_0": "Q8_0",
    "q2_k": "Q2_K", "q2_k_s": "Q2_K", "q3_k_s": "Q3_K", "q3_k_m": "Q3_K", "q3_k_l": "Q3_K",
    "q4_k_s": "Q4_K", "q4_k_m": "Q4_K", "q5_k_s": "Q5_K", "q5_k_m": "Q5_K", "q6_k": "Q6_K",
    "iq1_s": "IQ1_S", "iq1_m": "IQ1_M",
    "iq2_xxs": "IQ2_XXS", "iq2_xs": "IQ2_XS", "iq2_s": "IQ2_XS", "iq2_m": "IQ2_S",
    "iq3_xxs": "IQ3_XXS", "iq3_xs": "IQ3_S", "iq3_s": "IQ3_S", "iq3_m": "IQ3_S",
    "iq4_nl": "IQ4_NL", "iq4_xs": "IQ4_XS",
    "tq1_0": "TQ1_0", "tq2_0": "TQ2_0", "mxfp4_moe": "MXFP4",
}  # fmt: skip

UNTIED = ("olmo2",)  # architectures that need a separate head, even if the model has none
FLOATS = ("F32", "F16", "BF16")
WIDEST = 256  # values of the longest blocks
TWO_BITS = ("iq1_s", "iq1_m", "iq2_xxs", "iq2_xs", "iq2_s", "iq2_m")
NEEDS_MATRIX = (*TWO_BITS, "iq3_xxs", "iq3_xs", "q2_k_s")  # tensor_requires_imatrix there

# What a type becomes if its blocks do not fit the columns; F16 if the second does not fit either
FALLBACK = {
    "Q2_K": "Q4_0", "Q3_K": "Q4_0", "TQ1_0": "Q4_0", "TQ2_0": "Q4_0", "Q4_K": "Q5_0", "Q5_K": "Q5_1", "Q6_K": "Q8_0",
    **dict.fromkeys(("IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S", "IQ4_XS"), "IQ4_NL"),
}  # fmt: skip


class Place(NamedTuple):
    """What a rule may look at: which of its group a tensor is (``index`` of ``count``), and facts about the model."""

    index: int
    count: int
    gqa: int
    experts: int


class Rule(NamedTuple):
    """``type`` if ``when`` is true, else ``otherwise``; empty means the base type."""

    type: str
    when: Callable[[Place], bool] = lambda place: True
    otherwise: str = ""


def _more(place: Place) -> bool:
    """The first and the last eighth, and every third between them."""
    eighth = place.count // 8
    return place.index < eighth or place.index >= 7 * place.count // 8 or (place.index - eighth) % 3 == 2


def _first(share: int) -> Callable[[Place], bool]:
    return lambda place: place.index < place.count // share


def _grouped(place: Place) -> bool:
    return place.gqa >= 4


def _spread(place: Place) -> bool:
    return place.gqa >= 4 or place.experts >= 4


def _middle(place: Place) -> bool:
    return place.count // 8 <= place.index < 7 * place.count // 8


def _of_eight(place: Place) -> bool:
    return place.experts == 8


VALUE = {  # v_proj, and a projection that has it among its rows
    "q2_k": Rule("Q4_K", _grouped, "Q3_K"),
    "q2_k_s": Rule("Q4_K", _grouped),
    "q3_k_m": Rule("Q5_K", lambda place: place.index < 2, "Q4_K"),
    "q3_k_l": Rule("Q5_K"),
    "q4_k_s": Rule("Q5_K", lambda place: place.index < 4),
    **dict.fromkeys(("q4_k_m", "q5_k_m"), Rule("Q6_K", _more)),
    **dict.fromkeys(("iq1_s", "iq1_m", "iq2_xxs", "iq2_xs"), Rule("Q4_K", _spread, "Q2_K")),
    **dict.fromkeys(("iq2_s", "iq2_m"), Rule("Q4_K", _spread, "IQ3_S")),
    **dict.fromkeys(("iq3_xxs", "iq3_xs", "iq3_s"), Rule("Q4_K", _grouped)),
    "iq3_m": Rule("Q4_K"),
    **dict.fromkeys(("iq4_nl", "iq4_xs"), Rule("Q5_K", _grouped)),
}
KEY = {
    **dict.fromkeys(TWO_BITS, Rule("Q4_K", _of_eight)),
    "iq3_xs": Rule("IQ3_XXS"),
    "iq3_xxs": Rule("IQ2_S"),
}
QUERY = {kind: KEY[kind] for kind in ("iq3_xs", "iq3_xxs")}
OUT = {
    "q2_k": Rule("Q5_K", _of_eight, "Q3_K"),
    "q3_k_m": Rule("Q5_K", _of_eight, "Q4_K"),
    "q3_k_l": Rule("", _of_eight, "Q5_K"),
    **dict.fromkeys(("iq1_s", "iq1_m"), Rule("Q5_K", _of_eight, "IQ2_XXS")),
    **dict.fromkeys(("iq2_s", "iq2_m", "iq3_xxs"), Rule("Q5_K", _of_eight, "IQ3_S")),
    "iq3_m": Rule("Q5_K", _of_eight, "Q4_K"),
    **dict.fromkeys(
        ("q3_k_s", "q4_k_s", "q4_k_m", "iq2_xxs", "iq2_xs", "iq3_xs", "iq3_s", "iq4_nl", "iq4_xs"),
        Rule("Q5_K", _of_eight),
    ),
}
DOWN = {
    "q2_k": Rule("Q3_K"),
    "q2_k_s": Rule("Q4_K", _first(8)),
    "q3_k_m": Rule("Q5_K", _first(16), "Q4_K"),
    "q3_k_l": Rule("Q5_K"),
    **dict.fromkeys(("q4_k_s", "iq4_nl", "iq4_xs"), Rule("Q5_K", _first(8))),
    **dict.fromkeys(("q4_k_m", "q5_k_m"), Rule("Q6_K", _more)),
    **dict.fromkeys(("iq1_s", "iq1_m", "iq2_xxs", "iq2_xs"), Rule("Q2_K", _first(8))),
    **dict.fromkeys(("iq2_s", "iq2_m"), Rule("IQ3_S", _first(8))),
    "iq3_m": Rule("Q4_K", lambda place: _first(8)(place) or (_of_eight(place) and _more(place))),
}
DOWN_BY_MATRIX = {  # instead, if there is an importance matrix
    "q4_0": Rule("Q4_1", _first(8)),
    "q5_0": Rule("Q5_1", _first(8)),
    **dict.fromkeys(("iq4_nl", "iq4_xs"), Rule("")),
}
WIDE = {"iq3_xs": Rule("IQ3_XXS", _middle)}
LOOKUP = {  # an untied embedding
    **dict.fromkeys(("iq1_s", "iq1_m", "iq2_xxs", "iq2_xs"), Rule("Q2_K")),
    **dict.fromkeys(("iq2_s", "iq2_m", "iq3_xxs"), Rule("IQ3_S")),
    **dict.fromkeys(("tq1_0", "tq2_0"), Rule("Q4_K")),
}

# What llama.cpp counts together: the roles, in the order of their names within a layer (ffn_down, ffn_down_exps,
# ffn_down_shexp), and their rules
GROUPS = {
    "value": (("v_proj", "qkv_proj", "in_proj_qkv"), VALUE),
    "key": (("k_proj",), KEY),
    "query": (("q_proj",), QUERY),
    "out": (("o_proj",), OUT),
    "down": (("down_proj", "expert_down", "shared_down"), DOWN),
    "gate": (("gate_proj", "expert_gate", "shared_gate", "expert_gate_up"), WIDE),
    "up": (("up_proj", "expert_up", "shared_up", "gate_up_proj"), WIDE),
}
GROUP_OF = {role: group for group, (roles, _) in GROUPS.items() for role in roles}

# Matrices that stay float32, and those that stay BF16 if a file is quantized (most are gemma3n's)
KEPT = frozenset({"router", "shared_router", "conv1d", "conv", "correction_coefs", "prediction_coefs"})
HALF = frozenset({"per_layer_model_projection", "modality_router", "altup_projections", "altup_unembed_projections"})
HALF |= {"linear_left", "linear_right"}
LOOKUPS = frozenset({"embed_tokens", "embed_per_layer"})

# Tensors that a GGUF stores as two: conversion/deepseek.py, qwen.py, granite.py
_K, _V = "linear_k_head*linear_k_dim", "linear_v_head*linear_v_dim"
SPLIT = {
    "kv_b_proj": {"embed_q": "q_head, kv_latent, nope_dim", "unembed_out": "q_head, v_dim, kv_latent"},
    "shared_gate_up": {"shared_gate": "shared_ffn, hidden", "shared_up": "shared_ffn, hidden"},
    "in_proj_qkvz": {"in_proj_qkv": f"{_K} + {_K} + {_V}, hidden", "in_proj_z": f"{_V}, hidden"},
}
# ... and those that the architecture in gguf/uneven_layers.py stores apart, in models whose layers differ
_QUERIES, _KEYS = "q_head*head_dim, hidden", "kv_head*head_dim, hidden"
APART = {
    "qkv_proj": {"q_proj": _QUERIES, "k_proj": _KEYS, "v_proj": _KEYS},
    "gate_up_proj": {"gate_proj": "ffn, hidden", "up_proj": "ffn, hidden"},
}
PARTS = {
    role: [(part, [dim(d) for d in dims.split(",")]) for part, dims in parts.items()]
    for role, parts in (SPLIT | APART).items()
}


def kinds() -> list[str]:
    """The known kinds of GGUF file, as llama-quantize spells them, in lower case."""
    return list(BASE)


def type_of(arch: Architecture, kind: str, matrix: bool | None = None) -> Callable[[Tensor], str]:
    """Name the GGUF type of each tensor in a file of ``kind``.

    Args:
        arch: the model.
        kind: such as "q4_k_m".
        matrix: whether an importance matrix is used; None: only if the kind cannot be made without one.
    Returns:
        A function of a tensor; "Q5_0 + Q4_K" for one that is stored as two.
    Raises:
        UsageError: there is no such kind.
    """
    types = types_of(arch, kind, matrix)
    return lambda tensor: " + ".join(dict.fromkeys(types(tensor)))


def types_of(
    arch: Architecture, kind: str, matrix: bool | None = None, wide: bool = False
) -> Callable[[Tensor], list[str]]:
    """Name the types as ``type_of`` does, separately for every piece that a tensor is stored as.

    Args:
        arch: the model.
        kind: such as "q4_k_m".
        matrix: whether an importance matrix is used; None: only if the kind cannot be made without one.
        wide: name the types for rows of whole blocks of any type. If that differs, a type falls back to another.
    Returns:
        A function of a tensor: the types of its pieces.
    Raises:
        UsageError: there is no such kind.
    """
    mix, factor = _Mix(arch, known(kind), matrix), WIDEST if wide else 1

    def named(tensor: Tensor) -> list[str]:
        pieces = ((role, (*shape[:-1], factor * shape[-1]) if shape else shape) for role, shape in mix.pieces(tensor))
        return [mix.type(tensor, role, shape) for role, shape in pieces]

    return named


def storage(arch: Architecture, kind: str, matrix: bool | None = None) -> Callable[[Tensor], int]:
    """Count the bytes of each tensor in a file of ``kind``: data only, no header and no padding.

    Args:
        arch: the model.
        kind: such as "q4_k_m".
        matrix: whether an importance matrix is used; None: only if the kind cannot be made without one.
    Returns:
        A function of a tensor: its bytes.
    Raises:
        UsageError: there is no such kind.
    """
    mix = _Mix(arch, known(kind), matrix)
    return lambda tensor: sum(nbytes(mix.type(tensor, role, shape), shape) for role, shape in mix.pieces(tensor))


def known(kind: str) -> str:
    """The kind in lower case. Raises UsageError, with similar names, if there is no such kind."""
    if kind.lower() in BASE:
        return kind.lower()
    near = get_close_matches(kind.lower(), BASE, 4, 0.5)
    raise UsageError(f"there is no GGUF kind {kind!r}", f"choose one of {', '.join(near or BASE)}")


class _Mix:
    """One kind for one model: what llama-quantize counts before it decides."""

    def __init__(self, arch: Architecture, kind: str, matrix: bool | None = None):
        first = arch.layers[0]
        heads, kv_heads = first.sizes["kv_head"] * first.sizes["group"], first.sizes["kv_head"]
        if "kv_latent" in first.sizes:  # stored as one head that all share
            kv_heads = 1
        self.arch, self.kind, self.base = arch, kind, BASE[kind]
        uneven = arch.family.result and uneven_layers.why_not(arch) is None
        self.split = {*SPLIT, *(uneven_layers.SPLIT[uneven_layers.architecture(arch)] if uneven else ())}
        self.matrix = kind in NEEDS_MATRIX if matrix is None else matrix
        self.tied = (
            not any(tensor.spec.role == "lm_head" for tensor in arch.tensors()) and arch.family.gguf not in UNTIED
        )
        self.experts = max(layer.sizes.get("expert", 0) for layer in arch.layers)
        # of the first layer, which has no kv heads if it does not attend; gated DeltaNets count as having some
        self.gqa = 0 if first.kind.partition("+")[0] in ("conv", "mamba", "feed_forward") else heads // kv_heads
        # LLM_TYPE_70B: src/models/llama.cpp, qwen2.cpp
        llama = arch.family.gguf == "llama" and heads != kv_heads and self.experts != 8
        self.is_70b = len(arch.layers) == 80 and (llama or arch.family.gguf == "qwen2")
        stored = [(t.layer or 0, role, t.name) for t in arch.tensors() for role, _ in self.pieces(t)]
        self.ranks = {}
        for group, (roles, _) in GROUPS.items():  # llama.cpp's order: by layer and name
            found = sorted((layer, roles.index(role), name) for layer, role, name in stored if role in roles)
            self.ranks[group] = {name: index for index, (_, _, name) in enumerate(found)}

    def pieces(self, tensor: Tensor) -> list[tuple[str, tuple[int, ...]]]:
        """Role and shape of every piece that a tensor is stored as."""
        if tensor.spec.role not in self.split:
            return [(tensor.spec.role, tensor.shape)]
        sizes = self.arch.layer_sizes(tensor.layer)
        return [(part, tuple(length(d, sizes) for d in dims)) for part, dims in PARTS[tensor.spec.role]]

    def type(self, tensor: Tensor, role: str, shape: tuple[int, ...]) -> str:
        """The type of one piece."""
        small = prod(shape[:-1]) == 1 or not tensor.name.endswith(".weight")
        if role not in HALF and (small or role in KEPT or not tensor.matrix):
            return "F32"
        if self.base in FLOATS:
            return self.base
        if role in HALF:
            return "BF16"
        chosen = self.chosen(tensor, role, shape)
        if not fits(chosen, shape[-1]):
            chosen = FALLBACK.get(chosen, "F16")
        return chosen if fits(chosen, shape[-1]) else "F16"

    def chosen(self, tensor: Tensor, role: str, shape: tuple[int, ...]) -> str:
        """The type before it is checked against the columns."""
        if role == "lm_head" or (role in LOOKUPS and self.tied):
            return self.head(shape[-1])
        if self.kind == "mxfp4_moe":
            return "MXFP4" if len(shape) > 2 else "Q8_0"
        group = GROUP_OF.get(role, "")
        table = LOOKUP if role in LOOKUPS else GROUPS[group][1] if group else {}
        chosen, rule = self.base, table.get(self.kind)
        if group == "down" and self.matrix:
            rule = DOWN_BY_MATRIX.get(self.kind, rule)
        if rule:
            chosen = (rule.type if rule.when(self.place(tensor, group)) else rule.otherwise) or self.base
        if self.kind in TWO_BITS:
            return chosen
        if group == "value" and self.is_70b and chosen in ("Q3_K", "Q4_K"):
            chosen = "Q5_K"
        return "Q8_0" if self.experts == 8 and group in ("value", "key") else chosen

    def head(self, columns: int) -> str:
        """The type of the head, or of the embedding that serves as one."""
        if self.kind == "mxfp4_moe" or self.base == "Q8_0" or not fits(self.base, columns):
            return "Q8_0"
        return "Q5_K" if self.kind in (*TWO_BITS, "iq3_xxs") else "Q6_K"

    def place(self, tensor: Tensor, group: str) -> Place:
        """The place of a tensor in its group.

        If there are experts, all except the values are counted by layer; but not ffn_down in the smallest kinds.
        """
        index, count = self.ranks.get(group, {}).get(tensor.name, 0), len(self.arch.layers)
        if group == "value":
            count = len(self.ranks[group])
        elif self.experts > 1 and self.kind not in TWO_BITS:
            index = tensor.layer or 0
        return Place(index, count, self.gqa, self.experts)
