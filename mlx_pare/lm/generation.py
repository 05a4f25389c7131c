"""Let a resident model write text, and measure its speed."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import mlx.nn as nn


def generate(model: nn.Module, tok: Any, prompt: str, max_tokens: int, temperature: float = 0.0, seed: int = 0) -> str:
    """Write text after a prompt with stock mlx_lm.stream_generate.

    Args:
        model: resident model.
        tok: mlx-lm's wrapper of its tokenizer.
        prompt: text; the tokenizer adds BOS if it does so by itself.
        max_tokens: tokens written at most.
        temperature: of sampling; 0: the likeliest token.
        seed: of MLX's random state, which is set.
    Returns:
        The new text without the prompt.
    """
    from mlx_lm import stream_generate
    from mlx_lm.sample_utils import make_sampler

    mx.random.seed(seed)
    ids = tok.encode(prompt)
    pieces = [
        r.text for r in stream_generate(model, tok, ids, max_tokens=max_tokens, sampler=make_sampler(temperature))
    ]
    return "".join(pieces)


def continued(model: nn.Module, tokens: mx.array, length: int, key: mx.array) -> mx.array:
    """Continue rows by sampling at temperature 1, all at once with mlx-lm's KV cache.

    End-of-text is a token like others: the row continues after it, as rows of text do.

    Args:
        model: resident model.
        tokens: int [b, n] with n >= 1.
        length: tokens per row of the result, more than n.
        key: MLX's random key of the samples.
    Returns:
        [b, length], dtype of ``tokens``, which come first.
    """
    from mlx_lm.models.cache import make_prompt_cache

    cache, pieces, now = make_prompt_cache(model), [tokens], tokens[:, -1:]
    if tokens.shape[1] > 1:
        model(tokens[:, :-1], cache=cache)
        mx.eval([layer.state for layer in cache if layer is not None])  # not the logits, which are not needed
    for draw in mx.random.split(key, length - tokens.shape[1]):
        logits = model(now, cache=cache)[:, -1].astype(mx.float32)
        now = mx.random.categorical(logits, key=draw)[:, None].astype(tokens.dtype)
        mx.async_eval(now)
        pieces.append(now)
    return mx.concatenate(pieces, axis=1)


def speed(model: nn.Module, tok: Any, prompt_tokens: int, new_tokens: int) -> dict[str, float]:
    """Time one run of mlx_lm's stream_generate on random tokens; it does not stop at end-of-text.

    Args:
        model: resident model.
        tok: mlx-lm's wrapper of its tokenizer.
        prompt_tokens: tokens of the prompt.
        new_tokens: tokens to write, at least 1.
    Returns:
        "prefill_tokens_per_s", "decode_tokens_per_s" and "peak_bytes" (MLX's peak memory).
    """
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
    """Continue tokens with the likeliest one, ``count`` times, with mlx-lm's KV cache.

    Args:
        model: resident model.
        tokens: ids of the prompt.
        count: number of new tokens.
    Returns:
        The new ids.
    """
    from mlx_lm.generate import generate_step

    found = generate_step(mx.array(tokens), model, max_tokens=count)
    return [int(token) for token, _ in found]
