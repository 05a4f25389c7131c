"""The tokenizers that llama.cpp knows: kinds of tokens, and its pre-tokenizers by their patterns."""

from __future__ import annotations

# enum llama_token_type, llama.cpp include/llama.h
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)


_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_TAIL = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
GPT2 = "the GPT-2 pattern of ByteLevel"
DIGITS = "single digits"
LLAMA3 = rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{{1,3}}|{_TAIL}"
QWEN2 = rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}|{_TAIL}"
QWEN35 = (
    rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?[\p{{L}}\p{{M}}]+|\p{{N}}| ?[^\s\p{{L}}\p{{M}}\p{{N}}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


# (what splits the text, in order; whether a word in the vocabulary is taken whole, "ignore_merges") -> name.
# Source: llm_tokenizer_bpe and llama_vocab::impl::load in llama.cpp src/llama-vocab.cpp; every row is tested against
# the tokenizers library on 300 strings (tests/exporting/test_export.py).
PRE_TOKENIZERS = {
    ((GPT2,), False): "gpt-2",
    ((DIGITS, GPT2), False): "smollm",
    ((LLAMA3,), True): "llama-bpe",
    ((LLAMA3,), False): "smaug-bpe",  # the same pattern without ignore_merges
    ((QWEN2,), False): "qwen2",
    ((QWEN35,), False): "qwen35",
}


SPACE = "\u2581"
