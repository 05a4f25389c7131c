"""Dense families that can be planned for but not cut, as data. If a row names no config key, mlx-lm reads none."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ...base.errors import PareError
from ..parent import Wrapper
from ..rows import (
    AFTER,
    BEFORE,
    EMBED,
    FUSED,
    HEAD,
    HEAD_NORMS,
    NORM,
    PRE_NORMS,
    SQUARE_KEYS,
    UNGATED,
    attention,
    every,
    feed_forward,
    norms,
    planned,
    swiglu,
)
from ..spec import tensor

# one norm before attention and feed-forward, which run in parallel; the head is the embedding
COHERE_NORM = norms({"attn_norm": "input_layernorm"}, bias="layer_norm_bias")
COHERE_MODEL = (EMBED, NORM, tensor("model.norm.bias", "hidden", "norm", "final_norm_bias", "layer_norm_bias"))
COHERE_BLOCK = (*attention("attention_bias", "attention_bias"), *swiglu(), *COHERE_NORM)

COHERE = planned(
    "cohere",
    (
        *COHERE_BLOCK,
        tensor("self_attn.q_norm.weight", "q_head, head_dim", "norm", "q_norm", "use_qk_norm", stored="float"),
        tensor("self_attn.k_norm.weight", "kv_head, head_dim", "norm", "k_norm", "use_qk_norm", stored="float"),
    ),
    keys=SQUARE_KEYS,
    model=COHERE_MODEL,
    tied=True,
    gguf="command-r",
)

COHERE2 = planned(
    "cohere2",
    {"full_attention": COHERE_BLOCK, "sliding_attention": COHERE_BLOCK},
    model=COHERE_MODEL,
    tied=True,
    kinds=every("sliding_window_pattern"),
    defaults={"head_dim": 128, "sliding_window": 4096, "sliding_window_pattern": 4},
)

APERTUS = planned(
    "apertus",
    (
        *attention(),
        *HEAD_NORMS,
        *feed_forward("mlp", UNGATED, bias="mlp_bias"),
        *(tensor(f"mlp.act_fn.{n}", "", "ffn", f"xielu_{n}") for n in ("alpha_p", "alpha_n", "beta", "eps")),
        *norms({"attn_norm": "attention_layernorm", "ffn_norm": "feedforward_layernorm"}),
    ),
    keys=SQUARE_KEYS,
)


def exaone4_kind(config: Mapping[str, Any], index: int) -> str:
    """The kind of a layer by mlx_lm/models/exaone4.py ExaoneModel: it repeats a pattern such as "LLLG", local and
    global."""
    pattern = config.get("sliding_window_pattern") or "G"
    if not isinstance(pattern, str):
        raise PareError(f"config.json says sliding_window_pattern = {str(pattern)[:80]!r}, expected letters L and G")
    return "sliding_attention" if pattern[index % len(pattern)] == "L" else "full_attention"


EXAONE4_BLOCK = (*attention(), *HEAD_NORMS, *swiglu(), *norms(AFTER))
EXAONE4 = planned("exaone4", {"full_attention": EXAONE4_BLOCK, "sliding_attention": EXAONE4_BLOCK}, kinds=exaone4_kind)

GLM4 = planned(
    "glm4",
    (
        *attention("attention_bias"),
        *FUSED,
        *PRE_NORMS,
        *norms({"attn_post_norm": "post_self_attn_layernorm", "ffn_post_norm": "post_mlp_layernorm"}),
    ),
    tied=False,
)

NEMOTRON = planned(
    "nemotron",
    (
        *attention("attention_bias", "attention_bias"),
        *feed_forward("mlp", UNGATED, bias="mlp_bias"),
        *norms(BEFORE, "norm+1", bias=True),
    ),
    model=(EMBED, *norms({"final_norm": "model.norm"}, "norm+1", bias=True), HEAD),
    defaults={"tie_word_embeddings": False},
)

STARCODER2 = planned(
    "starcoder2",
    (
        *attention(True, True),
        *feed_forward("mlp", {"up_proj": "c_fc", "down_proj": "c_proj"}, bias=True),
        *norms(BEFORE, bias=True),
    ),
    keys=SQUARE_KEYS,
    model=(EMBED, *norms({"final_norm": "model.norm"}, bias=True), HEAD),
    defaults={"vocab_size": 49152},
)

ERNIE4_5 = planned(
    "ernie4_5",
    (*attention("use_bias", "use_bias"), *swiglu("use_bias"), *PRE_NORMS),
    gguf="ernie4_5",
)

FAMILIES = (
    COHERE, COHERE2, APERTUS, EXAONE4, GLM4, NEMOTRON, STARCODER2, ERNIE4_5,
)  # fmt: skip
WRAPPERS = {"mistral3": Wrapper(None, defaults={"tie_word_embeddings": False})}
