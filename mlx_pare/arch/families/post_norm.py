"""Families that can be cut and have a norm behind attention and feed-forward, as data.

gemma2 has a norm before them too, olmo2 and olmo3 do not. A linear solve cannot reach the stream in these families (see
repair/reconstruct.py).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..rows import (
    AFTER,
    AROUND,
    EMBED,
    HEAD,
    KEYS,
    NORM,
    WIDE_HEAD_NORMS,
    attention,
    changed,
    every,
    listed,
    norms,
    swiglu,
)
from ..spec import Family, Fixed

# ---- olmo2, olmo3: one norm over the queries of all heads, one over the keys ----

WIDE_NORMS = (
    Fixed(("kv_head",), "the norms of queries and keys span all heads, so with fewer heads all of them would change"),
    Fixed(("hidden",), "what is read is the stream itself, not its norm, so every layer would see another scale"),
)
OLMO_NORMS = (*WIDE_HEAD_NORMS, *norms(AFTER))
OLMO2_BLOCK = (*attention("attention_bias", "attention_bias"), *swiglu("mlp_bias"), *OLMO_NORMS)
OLMO2 = Family(
    name="olmo2",
    model_types=("olmo2",),
    keys=KEYS,
    model=(EMBED, NORM, HEAD),
    blocks={"full_attention": OLMO2_BLOCK},
    defaults={"tie_word_embeddings": True, "rope_theta": 10000.0},
    exact=frozenset({"layer", "ffn", "vocab"}),
    cuttable=frozenset({"layer", "ffn"}),
    fixed=WIDE_NORMS,
    gguf="olmo2",
)

OLMO3_BLOCK = (*attention("attention_bias", "attention_bias"), *swiglu(), *OLMO_NORMS)
OLMO3_KIND = listed(every(4))
OLMO3 = Family(
    name="olmo3",
    model_types=("olmo3",),
    keys=KEYS,
    model=(EMBED, NORM, HEAD),
    blocks={"full_attention": OLMO3_BLOCK, "sliding_attention": OLMO3_BLOCK},
    kinds=OLMO3_KIND,
    by_place={"layer_types": OLMO3_KIND},
    needed=frozenset({"full_attention", "sliding_attention"}),  # mlx_lm/models/olmo3.py looks for one of each
    defaults={"tie_word_embeddings": False},
    exact=frozenset({"layer", "ffn", "vocab"}),
    cuttable=frozenset({"layer", "ffn"}),
    fixed=WIDE_NORMS,
    gguf="olmo2",
)

# ---- gemma2 ----


def gemma2_kind(config: Mapping[str, Any], index: int) -> str:
    """The kind of a layer for transformers (models/gemma2/configuration_gemma2.py) and llama.cpp: every other layer has
    a window of 4096 tokens.

    mlx-lm has no window, so for it all layers are alike. A cut writes the kinds down, because places change.
    """
    return listed(every(2))(config, index)


PLUS_ONE = (EMBED, *changed((NORM,), ("final_norm",), transforms=("norm+1",)))
GEMMA2 = Family(  # it caps its attention scores, so its class computes them itself
    name="gemma2",
    model_types=("gemma2",),
    keys=KEYS,
    model=PLUS_ONE,
    blocks={"full_attention": (*attention(), *swiglu(), *norms(AROUND, "norm+1"))},
    by_place={"layer_types": gemma2_kind},
    defaults={  # mlx_lm/models/gemma2.py ModelArgs
        "rope_theta": 10000.0,
        "attn_logit_softcapping": 50.0,
        "final_logit_softcapping": 30.0,
        "query_pre_attn_scalar": 144.0,
        "sliding_window": 4096,  # of transformers and llama.cpp
    },
    tied=True,
    divides=True,  # its configuration's validate_architecture
    fixed=(Fixed(("hidden",), "its embedding is scaled by the root of the hidden size"),),
    gguf="gemma2",
)

FAMILIES = (OLMO2, OLMO3, GEMMA2)
WRAPPERS = {}
