"""The only door to mlx-lm: loading, tokenizing, generating, training, converting."""

from .backend import (
    cache_bytes,
    cpu_backend,
    dequantized,
    for_backend,
    limit_memory,
    own_wired_limit,
    packed,
    product_error,
    require_exact_products,
    swift,
    swift_kept,
)
from .conversion import convert
from .generation import Question, answers, batches, continued, generate, greedy, speed, surprisals
from .loading import load, load_stock, load_to_answer
from .structure import (
    LogitShape,
    blocks,
    body,
    each_block,
    embedding,
    final_norm,
    head,
    logit_shape,
    logits,
    put_embedding,
)
from .tokens import SAMPLE, require_same_tokens, same_tokens, stock_tokenizer, tokenizer
from .training import add_lora, checkpointed, fused, train

__all__ = [
    "SAMPLE", "LogitShape", "Question", "add_lora", "answers", "batches", "blocks", "body", "cache_bytes",
    "checkpointed", "continued", "convert", "cpu_backend", "dequantized", "each_block", "embedding", "final_norm",
    "for_backend", "fused", "generate", "greedy", "head", "limit_memory", "load", "load_stock", "load_to_answer",
    "logit_shape", "logits", "own_wired_limit", "packed", "product_error", "put_embedding",
    "require_exact_products", "require_same_tokens", "same_tokens", "speed", "stock_tokenizer", "surprisals",
    "swift", "swift_kept", "tokenizer", "train",
]  # fmt: skip
