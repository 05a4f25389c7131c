"""The only door to mlx-lm: loading, tokenizing, generating, training, converting."""

from .backend import cpu_backend, dequantized, for_backend, packed, swift, swift_kept
from .conversion import convert
from .generation import continued, generate, greedy, speed
from .loading import load, load_stock
from .structure import blocks, body, each_block, embedding, head, logit_shape, put_embedding
from .tokens import SAMPLE, require_same_tokens, same_tokens, stock_tokenizer, tokenizer
from .training import add_lora, checkpointed, fused, train

__all__ = [
    "SAMPLE", "add_lora", "blocks", "body", "checkpointed", "continued", "convert", "cpu_backend", "dequantized",
    "each_block", "embedding", "for_backend", "fused", "generate", "greedy", "head", "load", "load_stock",
    "logit_shape", "packed", "put_embedding", "require_same_tokens", "same_tokens", "speed", "stock_tokenizer",
    "swift", "swift_kept", "tokenizer", "train",
]  # fmt: skip
