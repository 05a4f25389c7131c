"""Sound inputs of the fuzzer: small files of every kind that its targets read, built here."""

from __future__ import annotations

import json
import math
import struct
from typing import Any

from mlx_pare import arch
from mlx_pare.gguf import tokenizers
from mlx_pare.model import checkpoint

COMMIT = "0" * 40
LLAMA = {
    "model_type": "llama", "hidden_size": 64, "num_hidden_layers": 2, "intermediate_size": 128, "vocab_size": 96,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "rms_norm_eps": 1e-5, "rope_theta": 10000.0,
    "tie_word_embeddings": True, "max_position_embeddings": 512, "torch_dtype": "float32",
}  # fmt: skip
PACKED = {**LLAMA, "quantization": {"group_size": 32, "bits": 4}}


def written(value: Any) -> bytes:
    """JSON, lone surrogates and infinities included."""
    return json.dumps(value).encode()


def entries(config: dict[str, Any]) -> dict[str, tuple[str, list[int]]]:
    """The tensors of a checkpoint: name -> (dtype, shape)."""
    found: dict[str, tuple[str, list[int]]] = {}
    packing = config.get("quantization")
    for t in arch.describe(config).tensors():
        if packing and t.matrix:
            rows, columns = t.shape
            found[t.name] = ("U32", [rows, columns * packing["bits"] // 32])
            for leaf in ("scales", "biases"):
                found[f"{t.module}.{leaf}"] = ("F16", [rows, columns // packing["group_size"]])
        else:
            found[t.name] = ("F16", list(t.shape))
    return found


def table_of(tensors: dict[str, tuple[str, list[int]]]) -> dict[str, Any]:
    """The header of a safetensors file."""
    table, at = {"__metadata__": {"format": "mlx"}}, 0
    for name, (dtype, shape) in tensors.items():
        size = checkpoint.DTYPE_BYTES[dtype] * math.prod(shape)
        table[name] = {"dtype": dtype, "shape": shape, "data_offsets": [at, at + size]}
        at += size
    return table


def packed_table(table: Any, size: int | None = None, length: int | None = None) -> bytes:
    """A safetensors file with this header, and so many bytes of data (None: as many as it says, within reason)."""
    raw = table if isinstance(table, bytes) else written(table)
    if size is None:
        try:
            size = max((t["data_offsets"][1] for n, t in table.items() if n != "__metadata__"), default=0)
            size = size if 0 <= size < 1 << 20 else 100
        except (TypeError, KeyError, IndexError, AttributeError):
            size = 100
    return struct.pack("<Q", len(raw) if length is None else length) + raw + bytes(size)


GGUF_CODES = {int: (4, "<I"), float: (6, "<f"), bool: (7, "<?")}


def gguf_value(value: Any) -> bytes:
    """A value with its type in front."""
    if isinstance(value, str):
        return struct.pack("<I", 8) + gguf_text(value)
    if isinstance(value, list):
        kind = 8 if value and isinstance(value[0], str) else 4 if not value else GGUF_CODES[type(value[0])][0]
        return struct.pack("<IIQ", 9, kind, len(value)) + b"".join(gguf_value(v)[4:] for v in value)
    number, code = GGUF_CODES[type(value)]
    if type(value) is int and not 0 <= value < 2**32:
        number, code, value = 10, "<Q", value % 2**64
    return struct.pack("<I", number) + struct.pack(code, value)


def gguf_text(text: str) -> bytes:
    raw = text.encode("utf-8", "surrogatepass")
    return struct.pack("<Q", len(raw)) + raw


def gguf_file(content: dict[str, Any]) -> bytes:
    """A GGUF file of "metadata" and "tensors" ([name, shape, type, offset]), as far as they can be written."""
    metadata, tensors = content["metadata"], content["tensors"]
    out = b"GGUF" + struct.pack("<IQQ", content["version"], len(tensors), len(metadata))
    out += b"".join(gguf_text(key) + gguf_value(value) for key, value in metadata.items())
    for name, shape, kind, offset in tensors:
        out += gguf_text(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, kind, offset)
    return out + bytes(-len(out) % 32) + bytes(min(content["data"], 1 << 18))


def gguf_seed(name: str, more: dict[str, Any]) -> dict[str, Any]:
    metadata = {
        "general.architecture": name, "general.alignment": 32, f"{name}.block_count": 2, f"{name}.embedding_length": 64,
        f"{name}.feed_forward_length": 128, f"{name}.attention.head_count": 4, f"{name}.attention.head_count_kv": 2,
        f"{name}.context_length": 512, f"{name}.rope.freq_base": 1e4, f"{name}.attention.layer_norm_rms_epsilon": 1e-5,
        "tokenizer.ggml.tokens": ["a", "b", "c"], **{f"{name}.{key}": value for key, value in more.items()},
    }  # fmt: skip
    tensors = [["token_embd.weight", [8, 12], 0, 0], ["blk.0.ffn_down.weight", [16, 8], 1, 384]]
    return {"version": 3, "metadata": metadata, "tensors": tensors, "data": 384 + 256}


GGUF = [
    gguf_seed("llama", {"expert_count": 0, "attention.key_length": 16}),
    gguf_seed("gemma3", {"attention.sliding_window": 8, "attention.sliding_window_pattern": [True, False]}),
    gguf_seed("deepseek2", {"expert_count": 4, "attention.kv_lora_rank": 8, "rope.dimension_count": 8}),
    gguf_seed("qwen3next", {"ssm.time_step_rank": 4, "ssm.inner_size": 64, "expert_count": 4, "split.count": 1}),
    gguf_seed("lfm2", {"attention.head_count_kv": [0, 2], "shortconv.l_cache": 3}),
    gguf_seed("nemotron_h", {"ssm.time_step_rank": 4, "ssm.inner_size": 64, "expert_used_count": 2}),
    gguf_seed("gemma4", {"attention.shared_kv_layers": 1, "feed_forward_length": [128, 256]}),
]


def gguf_model(name: str, tokenizer: dict[str, Any], kind: int, size: int) -> dict[str, Any]:
    """A whole model of one layer: its matrices in blocks of 32 values, ``size`` bytes each; zeros."""
    known = gguf_seed(name, {"attention.key_length": 16, "block_count": 1, "rope.scaling.type": "none"})["metadata"]
    norms, tensors, at = ["blk.0.attn_norm", "blk.0.ffn_norm", "output_norm"], [], 0
    matrices = {"token_embd": (64, 8), "blk.0.attn_q": (64, 64), "blk.0.attn_k": (64, 32), "blk.0.attn_v": (64, 32)}
    matrices |= {"blk.0.attn_output": (64, 64), "blk.0.ffn_gate": (64, 128), "blk.0.ffn_up": (64, 128)}
    for tensor, shape in [*(matrices | {"blk.0.ffn_down": (128, 64)}).items(), *((n, (64,)) for n in norms)]:
        tensors.append([f"{tensor}.weight", list(shape), kind if len(shape) > 1 else 0, at])
        at += -(-(math.prod(shape) // 32 * size if len(shape) > 1 else 256) // 32) * 32
    metadata = known | {f"tokenizer.ggml.{key}": value for key, value in tokenizer.items()}
    return {"version": 3, "metadata": metadata, "tensors": tensors, "data": at}


BY_MERGES = {"model": "gpt2", "pre": "qwen2", "tokens": ["a", "b", "ab", "</s>"], "token_type": [1, 1, 1, 3]}
BY_MERGES |= {"merges": ["a b"], "eos_token_id": 3, "add_bos_token": False}
BY_SCORES = {"model": "llama", "tokens": ["u", "<0x00>", "a", "b", "ab"], "token_type": [2, 6, 1, 1, 1]}
BY_SCORES |= {"scores": [0.0, 0.0, -1.0, -2.0, -3.0], "bos_token_id": 0, "add_space_prefix": True}
GGUF_MODELS = [gguf_model("llama", BY_MERGES, 8, 34), gguf_model("llama", BY_SCORES, 0, 128)]

SIZE = {
    "layers": 2, "ffn": 128, "kv_heads": [2, 1], "q_heads": 4, "hidden": 64, "parameters": 9, "non_embedding": 8,
    "bytes": 7,
}  # fmt: skip
PLAN = {
    "schema_version": 1, "source": "ab", "criterion": "wanda", "axes": ["ffn"], "bits": 4, "group_size": 32,
    "target": {"kind": "keep", "value": 0.5, "asked": "half"}, "before": SIZE, "after": SIZE, "neighbours": ["x"],
    "hidden": list(range(64)), "embedding_bits": 8,
    "layers": [{"source": i, "ffn": list(range(0, 128, 2)), "kv_head": [0, 1], "ffn_bits": 3} for i in range(2)],
}  # fmt: skip
STEP = {"parameters": {"a": 1}, "inputs": {"x": "y"}, "outputs": {"z": "q"}, "seconds": 1.5, "peak_bytes": 3}
MANIFEST = {
    "schema_version": 1, "model": "m", "source": "s", "versions": {"mlx": "1"}, "machine": {"system": "x"},
    "steps": {"plan": STEP},
}  # fmt: skip
METRICS = {
    "schema_version": 1, "model": "m", "data": "d", "tokens": 1, "windows": 2, "length": 3, "perplexity": 1.5,
    "perplexity_stderr": 0.1, "bits_per_byte": None, "kl_divergence": 0.2, "window_nll": [0.5, 1e3],
}  # fmt: skip
UNITS = {"ffn": [0, 2], "kv_head": [0], "q_head": [0, 1]}
SURVIVORS = {
    "schema_version": 1, "source_identity": "ab", "hidden": [0, 1, 2], "parent": {"name": "p", "identity": "cd"},
    "layers": [{"layer": i, "source": 2 * i, **UNITS} for i in range(2)],
}  # fmt: skip
ARRAYS = packed_table(
    {
        "__metadata__": {"pare": json.dumps({"schema": 1, "criterion": "wanda", "samples": 4})},
        "0.ffn": {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]},
        "1.ffn": {"dtype": "I64", "shape": [2, 1], "data_offsets": [16, 32]},
    }
)
BYTES = [f"<0x{b:02X}>" for b in range(256)]
PLAIN_TOKEN = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
A_TOKEN, A_TEXT = {"SpecialToken": {"id": "a", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}
TOKENIZERS = [
    {
        "added_tokens": [{"id": 4, "content": "<s>", "special": True, **PLAIN_TOKEN}],
        "normalizer": None, "post_processor": None,
        "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True},
        "model": {"type": "BPE", "vocab": {"a": 0, "b": 1, "ab": 2, "c": 3}, "merges": ["a b"]},
    },
    {
        "added_tokens": [], "pre_tokenizer": {"type": "Sequence", "pretokenizers": [
            {"type": "Split", "pattern": {"Regex": tokenizers.QWEN2}, "behavior": "Isolated", "invert": False},
            {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False},
        ]},
        "normalizer": {"type": "Sequence", "normalizers": [{"type": "NFC"}]},
        "post_processor": {
            "type": "TemplateProcessing", "single": [A_TOKEN, A_TEXT], "pair": [A_TEXT, A_TEXT],
            "special_tokens": {"a": {"id": "a", "ids": [0], "tokens": ["a"]}},
        },
        "model": {"type": "BPE", "vocab": {"a": 0, "b": 1}, "merges": [], "ignore_merges": False},
    },
    {
        "added_tokens": [],
        "pre_tokenizer": {"type": "Metaspace", "replacement": "\u2581", "split": False, "prepend_scheme": "first"},
        "normalizer": None, "post_processor": None,
        "model": {
            "type": "BPE", "byte_fallback": True, "unk_token": "u", "merges": [["a", "b"]],
            "vocab": {t: i for i, t in enumerate([*BYTES, "u", "a", "b", "ab"])},
        },
    },
]  # fmt: skip
SETTINGS = {
    "tokenizer_class": "PreTrainedTokenizerFast",
    "bos_token": "a",
    "eos_token": {"__type": "AddedToken", "content": "b"},
    "add_bos_token": True,
    "chat_template": "{{ messages }}",
}
CHAT = {"messages": [{"role": "user", "content": "hi"}], "tools": []}
LINES = [{"text": "one two"}, CHAT, {"prompt": "p", "completion": "q"}, {"content": "c"}, {"text": None}]
LISTING = {
    "sha": COMMIT, "siblings": [
        {"rfilename": "config.json", "size": 400}, {"rfilename": "model.safetensors", "size": 900},
        {"rfilename": "model-q8_0.gguf", "size": 20},
    ],
}  # fmt: skip
AMOUNTS = ["24B", "15GB", "1.5e9", " 900M ", "14GiB", "0.5k", "1e308T", "9" * 400]
DATA = ["book.txt", "code=book.txt:2", "a=b=book.txt", "book.txt:1e-3", "x:y=book.txt:inf"]
