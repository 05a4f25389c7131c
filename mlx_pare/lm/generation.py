"""Text written by a resident model, and how fast."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import mlx.nn as nn


def generate(model: nn.Module, tok: Any, prompt: str, max_tokens: int, temperature: float = 0.0, seed: int = 0) -> str:
    """Text that stock mlx_lm.generate writes after ``prompt``."""
    from mlx_lm import stream_generate
    from mlx_lm.sample_utils import make_sampler

    mx.random.seed(seed)
    ids = tok.encode(prompt)
    pieces = [
        r.text for r in stream_generate(model, tok, ids, max_tokens=max_tokens, sampler=make_sampler(temperature))
    ]
    return "".join(pieces)


def continued(model: nn.Module, tokens: mx.array, length: int, key: mx.array) -> mx.array:
    """Rows [b, n] of a resident model's own, continued to ``length`` tokens by sampling at temperature 1, all at once
    with mlx-lm's KV cache. An end of text is a token like others: the row goes on behind it, as rows of text do."""
    from mlx_lm.models.cache import make_prompt_cache

    cache, pieces, now = make_prompt_cache(model), [tokens], tokens[:, -1:]
    if tokens.shape[1] > 1:
        model(tokens[:, :-1], cache=cache)
        mx.eval([layer.state for layer in cache if layer is not None])  # not the logits, which nobody needs
    for draw in mx.random.split(key, length - tokens.shape[1]):
        logits = model(now, cache=cache)[:, -1].astype(mx.float32)
        now = mx.random.categorical(logits, key=draw)[:, None].astype(tokens.dtype)
        mx.async_eval(now)
        pieces.append(now)
    return mx.concatenate(pieces, axis=1)


def speed(model: nn.Module, tok: Any, prompt_tokens: int, new_tokens: int) -> dict[str, float]:
    """One trial of mlx_lm's stream_generate on random tokens: prefill and decode tok/s, peak memory in bytes."""
    from mlx_lm import stream_generate

    prompt = mx.random.randint(0, tok.vocab_size, (prompt_tokens,)).tolist()
    mx.reset_peak_memory()
    eos, tok._eos_token_ids = tok._eos_token_ids, set()
    try:
        last = None
        for last in stream_generate(model, tok, prompt, max_tokens=new_tokens):  # noqa: B007 only the last response counts
            pass
    finally:
        tok._eos_token_ids = eos
    return {
        "prefill_tokens_per_s": last.prompt_tps,
        "decode_tokens_per_s": last.generation_tps,
        "peak_bytes": mx.get_peak_memory(),
    }


def greedy(model: nn.Module, tokens: list[int], count: int) -> list[int]:
    """The likeliest token after ``tokens``, ``count`` times, by a resident model with mlx-lm's KV cache."""
    from mlx_lm.generate import generate_step

    found = generate_step(mx.array(tokens), model, max_tokens=count)
    return [int(token) for token, _ in found]
