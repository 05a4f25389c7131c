"""The mixers: what layers of each kind remember of earlier positions."""

from __future__ import annotations

from dataclasses import dataclass

from .axes import Dim, dim

_HEAD = dim("head_dim")


@dataclass(frozen=True)
class Mixer:
    """What a kind of layer remembers of earlier positions, in values. The first word of a layer's kind names its mixer.

    ``cache``: for every position (K and V). ``windowed``: the cache covers the sliding window only. ``state``: once for
    any length, in the model's dtype; ``state_f32``: the same in float32. ``attends``: it compares queries with
    positions, which another layer may cache, with heads as wide as ``head``. ``fused``: mlx-lm calls MLX's fused
    kernel, if there is one.
    """

    cache: Dim = ()
    windowed: bool = False
    state: Dim = ()
    state_f32: Dim = ()
    attends: bool = True
    head: Dim = _HEAD
    fused: bool = True


_KV = dim("kv_head*head_dim + kv_head*head_dim")
_CONV = dim("conv_tail*linear_k_head*linear_k_dim + conv_tail*linear_k_head*linear_k_dim + "
            "conv_tail*linear_v_head*linear_v_dim")  # fmt: skip

_SCAN = dim("linear_v_head*linear_v_dim*linear_k_dim")

# Source of each: make_cache and __call__ in the mlx_lm/models file named; tests/arch/test_families.py compares them
# with real caches. MLX has no fused kernel for keys and values of different widths.
MIXERS = {
    "full_attention": Mixer(cache=_KV),
    "sliding_attention": Mixer(cache=_KV, windowed=True),
    "full_attention_shared": Mixer(),  # gemma4_text, gemma3n: queries only, on the cache of an earlier layer
    "sliding_attention_shared": Mixer(windowed=True),
    "mla": Mixer(cache=dim("kv_latent + rope_dim"), head=dim("nope_dim"), fused=False),  # deepseek_v3
    "mla_expanded": Mixer(  # deepseek_v2 caches the keys and values of every head
        cache=dim("q_head*nope_dim + q_head*rope_dim + q_head*v_dim"), head=dim("nope_dim + rope_dim")
    ),
    "linear_attention": Mixer(state=_CONV, state_f32=_SCAN, attends=False),  # gated DeltaNet: qwen3_next, qwen3_5
    "mamba": Mixer(state=_CONV, state_f32=_SCAN, attends=False),  # Mamba 2: nemotron_h, granitemoehybrid
    "mamba_and_attention": Mixer(cache=_KV, state=_CONV, state_f32=_SCAN),  # falcon_h1: side by side
    "conv": Mixer(state=dim("conv_tail*hidden"), attends=False),  # lfm2
    "feed_forward": Mixer(attends=False),  # nemotron_h: a layer that mixes nothing
}
