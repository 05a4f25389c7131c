"""Let a resident model write text, and measure its speed."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from .structure import logits

AT_ONCE = 256  # tokens of an answer whose logits are in memory at once
PREFILL = 2048  # tokens of a prompt that a model reads at once, as in mlx-lm


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


# ---- many prompts ----


@dataclass(frozen=True)
class Question:
    """A prompt to answer.

    ``prompt``: token ids, at least one. ``most``: tokens written at most. ``stop``: texts that end the answer, which
    does not contain them. ``seed``: of the samples.
    """

    prompt: tuple[int, ...]
    most: int
    stop: tuple[str, ...] = ()
    seed: int = 0


class _Writing:
    """One answer while it is written."""

    def __init__(self, tok: Any, question: Question):
        self.tok, self.question = tok, question
        self.tokens: list[int] = []

    def ends_with(self, token: int) -> tuple[str, bool] | None:
        """Add a token. Return the text and whether it ended before ``most`` tokens, or None if it goes on."""
        if ended := token in self.tok.eos_token_ids:
            return self._text(), True
        self.tokens.append(token)
        if self.question.stop:
            text = self._text()
            places = [place for stop in self.question.stop if (place := text.find(stop)) >= 0]
            if places:
                return text[: min(places)], True
        return (self._text(), ended) if len(self.tokens) >= self.question.most else None

    def _text(self) -> str:
        return self.tok.decode(self.tokens, skip_special_tokens=True)


def batches(model: nn.Module) -> bool:
    """Whether mlx-lm can answer several prompts of this model at once: all of its caches can be merged."""
    from mlx_lm.models.cache import make_prompt_cache

    return all(hasattr(cache, "merge") for cache in make_prompt_cache(model))


def answers(
    model: nn.Module, tok: Any, questions: Sequence[Question], temperature: float = 0.0
) -> Iterator[tuple[int, str, bool]]:
    """Answer prompts, all at once with mlx-lm's BatchGenerator if the model allows it, else one after the other.

    Every question has random numbers for itself, so its samples do not depend on the others.

    Args:
        model: resident model.
        tok: mlx-lm's wrapper of its tokenizer.
        questions: the prompts. Their caches are in memory together.
        temperature: of sampling; 0: the likeliest token.
    Returns:
        The number of the question, its answer without special tokens, and whether that ended before ``most`` tokens;
        in the order in which they are finished.
    """
    writing = [_Writing(tok, question) for question in questions]
    if len(questions) > 1 and batches(model):
        yield from _together(model, writing, temperature)
        return
    from mlx_lm.generate import generate_step

    for number, (question, one) in enumerate(zip(questions, writing, strict=True)):
        sampler = _sampler(temperature, question.seed)
        steps = generate_step(mx.array(question.prompt), model, max_tokens=question.most, sampler=sampler)
        yield number, *next(found for token, _ in steps if (found := one.ends_with(int(token))))


def _together(model: nn.Module, writing: list[_Writing], temperature: float) -> Iterator[tuple[int, str, bool]]:
    from mlx_lm.generate import BatchGenerator

    asked = [one.question for one in writing]
    generator = BatchGenerator(model, completion_batch_size=len(asked), prefill_batch_size=len(asked))
    try:
        # one token more: the generator must not end an answer of which this file has not seen the last token
        names = generator.insert(
            [list(question.prompt) for question in asked],
            [question.most + 1 for question in asked],
            samplers=[_sampler(temperature, question.seed) for question in asked],
        )
        numbers = {name: number for number, name in enumerate(names)}
        while found := generator.next_generated():
            for each in found:
                number = numbers[each.uid]
                if done := writing[number].ends_with(int(each.token)):
                    generator.remove([each.uid])
                    yield number, *done
    finally:
        generator.close()


def _sampler(temperature: float, seed: int) -> Callable[[mx.array], mx.array] | None:
    """What draws tokens from log probabilities with random numbers of one seed; None: the likeliest token."""
    if not temperature:
        return None
    keys = [mx.random.key(seed)]

    def draw(logprobs: mx.array) -> mx.array:
        keys[0], key = mx.random.split(keys[0])
        return mx.random.categorical(logprobs.astype(mx.float32) / temperature, key=key)

    return draw


def surprisals(
    model: nn.Module, prompt: Sequence[int], endings: Sequence[Sequence[int]], known: bool = True
) -> list[np.ndarray]:
    """Compute the surprisal of texts after a prompt, which is read once for all of them.

    Args:
        model: resident model.
        prompt: token ids, at least one.
        endings: token ids of each text, at least one.
        known: whether the model is body and head and nothing more, so that the head can compute in float32.
    Returns:
        -ln p of every token of each ending, float32 [tokens], in nats.
    """
    from mlx_lm.models.cache import make_prompt_cache

    cache = make_prompt_cache(model)
    for start in range(0, len(prompt) - 1, PREFILL):
        model(mx.array(prompt[start : min(start + PREFILL, len(prompt) - 1)])[None], cache=cache)
        mx.eval([layer.state for layer in cache if layer is not None])
    found = []
    for number, ending in enumerate(endings):
        own = cache if number == len(endings) - 1 else copy.deepcopy(cache)
        inputs, parts = [prompt[-1], *ending[:-1]], []
        for start in range(0, len(ending), AT_ONCE):
            ids = mx.array(inputs[start : start + AT_ONCE])[None]
            raw = logits(model, ids, own) if known else model(ids, cache=own).astype(mx.float32)
            wanted = mx.array(ending[start : start + AT_ONCE])[None, :, None]
            parts.append(np.array(mx.logsumexp(raw, -1) - mx.take_along_axis(raw, wanted, -1)[..., 0])[0])
        found.append(np.concatenate(parts))
    return found
