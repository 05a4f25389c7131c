"""Tiny multimodal models: a language model of mlx-lm's own classes, and parts beside it that mlx-lm drops."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import mlx.core as mx

from tests.support import pico, sparse

VISION = {"hidden_size": 32, "patch_size": 4}
UNTIED = {"tie_word_embeddings": False}
TOWER = ("vision_tower.blocks.0.weight", "vision_tower.patch.weight", "vision_tower.norm.bias")
# type -> (the family of the language model, keys of its config, keys of the outer config, names beside it)
PARENTS: dict[str, tuple[str, dict[str, Any], dict[str, Any], tuple[str, ...]]] = {
    "gemma3": ("gemma3_text", {}, {}, (*TOWER, "multi_modal_projector.mm_input_projection_weight")),
    "mistral3": ("mistral", UNTIED, {}, (*TOWER, "multi_modal_projector.linear_1.weight")),
    "mistral3-ministral3": ("ministral3", UNTIED, {}, TOWER),
    "qwen2_vl": ("qwen2", {}, {}, ("visual.patch.weight",)),
    "qwen2_5_vl": ("qwen2", UNTIED, {}, TOWER),
    "qwen3_vl": ("qwen3", UNTIED, {}, TOWER),
    "qwen3_vl_moe": ("qwen3_moe", {}, {}, TOWER),
    "qwen3_5_moe": ("qwen3_5_moe_text", {}, {}, TOWER),
    "qwen3_5": (
        "qwen3_5_text",
        {**sparse.LINEAR, **UNTIED, "full_attention_interval": 3},
        {},
        TOWER,
    ),
}
OURS = {"qwen3_5_moe_text": "qwen3_next"}  # the same config, under another name


def inner(kind: str, **changes: Any) -> dict[str, Any]:
    """The config of the language model inside."""
    family, keys, _, _ = PARENTS[kind]
    known = OURS.get(family, family)
    made = sparse.config(known) if known in sparse.CONFIGS else pico.config_of("llama" if "5_text" in known else known)
    return {**made, "model_type": family, **keys, **changes}


def make(directory: Path, kind: str, dtype: mx.Dtype = mx.float32, bare: bool = False, **changes: Any) -> Path:
    """Write a tiny multimodal model.

    Args:
        directory: where.
        kind: a key of PARENTS.
        dtype: of all tensors.
        bare: whether the keys of the language model stand in the outer config, as older ones have them.
        changes: keys of the language model.
    Returns:
        The directory.
    """
    text, outer = inner(kind, **changes), PARENTS[kind][2]
    vocab = len(json.loads(pico.tokenizer_json("bpe"))["model"]["vocab"])
    around = {"model_type": kind.partition("-")[0], "architectures": ["ForConditionalGeneration"], "vocab_size": vocab}
    around |= {"vision_config": VISION, "image_token_index": 7, **outer}
    text |= {"vocab_size": vocab}
    pico.MORE[f"parent {kind}"] = {**text, **around} if bare else {**around, "text_config": text}
    base, pico.BASE = pico.BASE, {}
    try:
        pico.make(directory, f"parent {kind}", dtype=dtype)
    finally:
        pico.BASE = base
    return beside(directory, kind, dtype)


def beside(directory: Path, kind: str, dtype: mx.Dtype = mx.float32) -> Path:
    """Add the other parts to a model that mlx-lm wrote, which has none."""
    [file] = directory.glob("*.safetensors")
    weights = mx.load(str(file))
    if inner(kind)["tie_word_embeddings"]:
        weights.pop("language_model.lm_head.weight", None)
    weights |= {
        name: mx.random.normal((6, 2, 32) if "patch" in name else (32, 64), key=mx.random.key(number)).astype(dtype)
        for number, name in enumerate(PARENTS[kind][3])
    }
    mx.save_safetensors(str(file), weights, metadata={"format": "mlx"})
    (directory / "preprocessor_config.json").write_text('{"size": 32}')
    return directory


def alone(parent: Path, directory: Path) -> Path:
    """Write the language model of a multimodal model as a model of its own."""
    directory.mkdir()
    config = json.loads((parent / "config.json").read_text())
    text = config.pop("text_config") if "text_config" in config else config
    if "quantization" in config:
        packings = {key.removeprefix("language_model."): value for key, value in config["quantization"].items()}
        text = {**text, "quantization": packings}
    [kind] = [k for k in PARENTS if k == parent.name.partition("+")[0]]
    text |= {"model_type": PARENTS[kind][0], "architectures": ["ForCausalLM"]}
    weights = mx.load(str(next(parent.glob("*.safetensors"))))
    own = {n.removeprefix("language_model."): a for n, a in weights.items() if n.startswith("language_model.")}
    mx.save_safetensors(str(directory / "model.safetensors"), own, metadata={"format": "mlx"})
    (directory / "config.json").write_text(json.dumps(text))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (directory / name).write_bytes((parent / name).read_bytes())
    return directory


def quantize(source: Path, target: Path, kind: str, bits: int = 4) -> Path:
    """The same model as mlx-vlm packs it: the matrices of the tower are packed too, in the same way."""
    pico.quantize(source, target, bits)
    beside(target, kind)
    file = target / "model.safetensors"
    weights = mx.load(str(file))
    for name in [name for name in PARENTS[kind][3] if name.endswith("blocks.0.weight")]:
        module = name.removesuffix(".weight")
        words, scales, biases = mx.quantize(weights[name], 32, bits)
        weights |= {name: words, f"{module}.scales": scales, f"{module}.biases": biases}
    mx.save_safetensors(str(file), weights, metadata={"format": "mlx"})
    return target
