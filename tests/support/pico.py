"""Tiny models made from a seed by mlx-lm's own classes, with real trained tokenizers: the tests' only models.

``make(directory, family)`` writes a directory that stock mlx_lm loads; ``quantize`` packs it with mlx-lm's own code.
"""

from __future__ import annotations

import functools
import json
from pathlib import Path

import mlx.core as mx
from mlx.utils import tree_flatten, tree_map_with_path

BASE = {
    "hidden_size": 64,
    "num_hidden_layers": 4,
    "intermediate_size": 128,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 512,
    "rope_theta": 10000.0,
    "tie_word_embeddings": True,
    "bos_token_id": 0,
    "eos_token_id": 0,
}

FAMILIES = {
    "llama": {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "head_dim": 16},
    "llama-untied": {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "tie_word_embeddings": False},
    "mistral": {
        "model_type": "mistral",
        "architectures": ["MistralForCausalLM"],
        "head_dim": 32,
        "sliding_window": None,
    },
    "qwen2": {
        "model_type": "qwen2",
        "architectures": ["Qwen2ForCausalLM"],
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
    },
    "qwen3": {"model_type": "qwen3", "architectures": ["Qwen3ForCausalLM"], "head_dim": 32},
    "gemma3_text": {
        "model_type": "gemma3_text",
        "architectures": ["Gemma3ForCausalLM"],
        "head_dim": 32,
        "num_hidden_layers": 6,
        "sliding_window": 8,
        "sliding_window_pattern": 3,
        "rope_local_base_freq": 1000.0,
        "query_pre_attn_scalar": 32,
        "hidden_activation": "gelu_pytorch_tanh",
        "layer_types": ["sliding_attention", "sliding_attention", "full_attention"] * 2,
    },
}

# These are the tests' families where a test says so: every one more costs seconds in every test over FAMILIES.
MORE = {
    "phi3": {
        "model_type": "phi3",
        "architectures": ["Phi3ForCausalLM"],
        "tie_word_embeddings": False,
        "pad_token_id": 0,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
    },
    "olmo2": {"model_type": "olmo2", "architectures": ["Olmo2ForCausalLM"], "tie_word_embeddings": False},
    "olmo3": {
        "model_type": "olmo3",
        "architectures": ["Olmo3ForCausalLM"],
        "tie_word_embeddings": False,
        "sliding_window": 8,
        "layer_types": ["sliding_attention", "sliding_attention", "full_attention", "sliding_attention"],
    },
    "gemma2": {
        "model_type": "gemma2",
        "architectures": ["Gemma2ForCausalLM"],
        "head_dim": 32,
        "query_pre_attn_scalar": 24,
        "attn_logit_softcapping": 5.0,
        "final_logit_softcapping": 2.0,
        "hidden_activation": "gelu_pytorch_tanh",
    },
    "smollm3": {
        "model_type": "smollm3",
        "architectures": ["SmolLM3ForCausalLM"],
        "num_hidden_layers": 8,
        "pad_token_id": 0,  # transformers has one of its own vocabulary
    },
    "granite": {
        "model_type": "granite",
        "architectures": ["GraniteForCausalLM"],
        "attention_bias": False,
        "mlp_bias": False,
        "logits_scaling": 4.0,
        "attention_multiplier": 0.2,
        "embedding_multiplier": 1.5,
        "residual_multiplier": 0.7,
    },
    "ministral3": {
        "model_type": "ministral3",
        "architectures": ["Ministral3ForCausalLM"],
        "head_dim": 32,
        "rope_parameters": {
            "rope_theta": 10000.0,
            "rope_type": "yarn",
            "factor": 4.0,
            "beta_fast": 32.0,
            "beta_slow": 1.0,
            "mscale": 1.0,
            "mscale_all_dim": 1.0,
            "original_max_position_embeddings": 16,
            "llama_4_scaling_beta": 0.3,
        },
    },
}

PLUS_ONE = ("gemma2", "gemma3_text")  # they add 1 to the weights of norms, and scale the embedding

TEXT = Path(__file__).resolve().parents[2] / "mlx_pare" / "demo" / "calibration.txt"


@functools.cache
def tokenizer_json(kind: str, vocab: int = 512) -> str:
    """A tokenizer.json trained on our own text: "bpe" byte-level with GPT-2's pattern, "spm" SentencePiece-style
    with byte fallback."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

    text = TEXT.read_text("utf-8").split("\n")
    if kind == "bpe":
        tok = Tokenizer(models.BPE())
        tok.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tok.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=vocab,
            special_tokens=["<|endoftext|>"],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
        tok.train_from_iterator(text, trainer)
        return tok.to_str()
    tok = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    tok.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    tok.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    specials = ["<unk>", "<s>", "</s>"] + [f"<0x{b:02X}>" for b in range(256)]
    trainer = trainers.BpeTrainer(vocab_size=vocab, special_tokens=specials, show_progress=False)
    words = [w for line in text for w in line.split()]
    tok.train_from_iterator(words, trainer)
    raw = json.loads(tok.to_str())
    raw["added_tokens"] = [t for t in raw["added_tokens"] if t["content"] in ("<unk>", "<s>", "</s>")]
    assert AddedToken  # the byte tokens are ordinary vocabulary entries, as in Llama 2
    return json.dumps(raw, ensure_ascii=False)


def write_tokenizer(directory: Path, kind: str = "bpe") -> int:
    raw = tokenizer_json(kind)
    (directory / "tokenizer.json").write_text(raw, "utf-8")
    special = "<|endoftext|>" if kind == "bpe" else None
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        "model_max_length": 512,
    }
    config |= {"bos_token": special or "<s>", "eos_token": special or "</s>"}
    if kind == "spm":
        config["unk_token"] = "<unk>"
    (directory / "tokenizer_config.json").write_text(json.dumps(config), "utf-8")
    return len(json.loads(raw)["model"]["vocab"])


def config_of(family: str, **changes) -> dict:
    return {**BASE, **(FAMILIES | MORE)[family], **changes}


def build(config: dict, seed: int = 0):
    """A stock mlx-lm model with random weights of sensible scale (norms near their neutral value)."""
    from mlx_lm.utils import _get_classes

    model_class, args_class = _get_classes(config)
    model = model_class(args_class.from_dict(config))
    if hasattr(model, "sanitize") and config.get("tie_word_embeddings"):
        model.sanitize({"model.embed_tokens.weight": None})
    mx.random.seed(seed)
    plus_one = config.get("text_config", config)["model_type"] in PLUS_ONE

    def draw(path: str, array: mx.array) -> mx.array:
        noise = mx.random.normal(array.shape)
        if "norm" in path:
            return 0.1 * noise + (0.0 if plus_one else 1.0)
        scale = 1.0 if "embed_tokens" in path and not plus_one else array.shape[-1] ** -0.5
        return noise * scale * (0.2 if path.endswith("bias") else 1.0)

    model.update(tree_map_with_path(draw, model.parameters()))
    mx.eval(model.parameters())
    return model


def make(
    directory: Path,
    family: str = "llama",
    tokenizer: str = "bpe",
    dtype: mx.Dtype = mx.float32,
    seed: int = 0,
    **changes,
) -> Path:
    """Write a pico model directory; returns it."""
    directory.mkdir(parents=True, exist_ok=True)
    vocab = write_tokenizer(directory, tokenizer)
    config = config_of(family, vocab_size=vocab, **changes)
    if tokenizer == "spm":
        config |= {"bos_token_id": 1, "eos_token_id": 2}
    model = build(config, seed)
    weights = {k: v.astype(dtype) for k, v in tree_flatten(model.parameters())}
    mx.save_safetensors(str(directory / "model.safetensors"), weights, metadata={"format": "mlx"})
    (directory / "config.json").write_text(json.dumps(config, indent=1))
    return directory


def quantize(
    source: Path, target: Path, bits: int | None = 4, group_size: int | None = 32, mode: str = "affine"
) -> Path:
    """The same model packed by mlx-lm itself; in modes other than affine bits and groups are None."""
    from mlx_lm.utils import load_model, quantize_model, save_config, save_model

    model, config = load_model(source)
    model, config = quantize_model(model, config, group_size, bits, mode)
    target.mkdir(parents=True, exist_ok=True)
    save_model(target, model)
    save_config(config, target / "config.json")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (target / name).write_bytes((source / name).read_bytes())
    return target
