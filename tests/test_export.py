"""GGUF files against llama.cpp itself: its logits against stock MLX's, its tokens against the tokenizers library."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pico
import pytest
import strings
from mlx.utils import tree_flatten
from mlx_pare import llama_cpp
from mlx_pare.arch import describe
from mlx_pare.errors import PareError, Refused, UsageError
from mlx_pare.export import export, tensor_type, verify

exporting = importlib.import_module("mlx_pare.export")  # mlx_pare.export itself is the function
llama = [pytest.mark.llama, pytest.mark.skipif(not llama_cpp.available(), reason="llama-cpp-python is not installed")]


def needs_llama(test):
    for mark in llama:
        test = mark(test)
    return test


TOKENS = [int(t) for t in np.random.default_rng(0).integers(0, 500, 48)]  # six of gemma's pico windows


def difference(model: Path, gguf: Path) -> float:
    return float(np.abs(llama_cpp.mlx_logits(model, TOKENS) - llama_cpp.logits(gguf, TOKENS)).max())


def save(directory: Path, config: dict, tokenizer: str = "bpe") -> Path:
    """A pico model from a config written by hand."""
    directory.mkdir()
    config = {**config, "vocab_size": pico.write_tokenizer(directory, tokenizer)}
    weights = dict(tree_flatten(pico.build(config).parameters()))
    mx.save_safetensors(str(directory / "model.safetensors"), weights)
    (directory / "config.json").write_text(json.dumps(config))
    return directory


SEED_OSS = {
    **pico.BASE,
    "model_type": "seed_oss",
    "architectures": ["SeedOssForCausalLM"],
    "num_attention_heads": 6,
    "num_key_value_heads": 3,
    "head_dim": 18,  # 6 * 18 != 64
    "attention_bias": True,
    "attention_out_bias": False,
    "mlp_bias": False,
}

# ---- the same numbers ----


@needs_llama
@pytest.mark.parametrize("family", ["llama", "llama-untied", "mistral", "qwen2", "qwen3"])
def test_f32_matches_mlx(tmp_path, family):
    model = pico.make(tmp_path / "model", family)
    done = export(model, tmp_path / "m.gguf", "f32")
    assert difference(model, tmp_path / "m.gguf") < 1e-4
    assert done["bytes"] == (tmp_path / "m.gguf").stat().st_size > done["tensor_bytes"]
    assert done["fallbacks"] == [] and done["notes"] == []


def gelu_table(x):
    """GELU as llama.cpp's CPU code computes it: looked up in float16 (ggml-cpu/vec.h, GGML_GELU_FP16)."""
    half = x.astype(mx.float16).astype(mx.float32)
    inner = 0.79788456080286535588 * half * (1 + 0.044715 * half * half)
    found = (0.5 * half * (1 + mx.tanh(inner))).astype(mx.float16).astype(mx.float32)
    return mx.where(x <= -10, 0, mx.where(x >= 10, x, found))


@needs_llama
@pytest.mark.parametrize("changes", [{}, {"query_pre_attn_scalar": 20}, {"num_hidden_layers": 5}])
def test_f32_gemma_matches_mlx_but_for_its_gelu_table(tmp_path, monkeypatch, changes):
    """Exact arithmetic differs by llama.cpp's float16 GELU table alone: with that table in MLX, nothing else is left."""
    model = pico.make(tmp_path / "model", "gemma3_text", **changes)
    export(model, tmp_path / "m.gguf", "f32")
    assert difference(model, tmp_path / "m.gguf") < 2e-2
    monkeypatch.setattr(nn, "gelu_approx", gelu_table)
    assert difference(model, tmp_path / "m.gguf") < 1e-4


@needs_llama
def test_gemma_of_62_layers_keeps_its_attention_scale(tmp_path, monkeypatch):
    """llama.cpp takes another scale in a model of exactly 62 layers; a 27B has it right only by that."""
    monkeypatch.setattr(nn, "gelu_approx", gelu_table)
    changes = {"num_hidden_layers": 62, "query_pre_attn_scalar": 24, "intermediate_size": 32}
    model = pico.make(tmp_path / "model", "gemma3_text", **changes)
    export(model, tmp_path / "m.gguf", "f32")
    assert difference(model, tmp_path / "m.gguf") < 1e-3  # rounding of 62 layers


BIASES = [
    ({}, "seed_oss"),
    ({"attention_bias": False}, "seed_oss"),
    ({"tie_word_embeddings": False}, "seed_oss"),
    ({"attention_out_bias": True}, "llama"),
    ({"attention_bias": False, "mlp_bias": True}, "llama"),
]


@needs_llama
@pytest.mark.parametrize(("changes", "architecture"), BIASES)
def test_seed_oss_with_every_bias(tmp_path, changes, architecture):
    model = save(tmp_path / "model", {**SEED_OSS, **changes})
    done = export(model, tmp_path / "m.gguf", "f32")
    assert done["architecture"] == architecture
    assert difference(model, tmp_path / "m.gguf") < 1e-4


LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
SCALINGS = [
    ("llama", {**LLAMA3, "original_max_position_embeddings": 64}),
    ("qwen2", {**LLAMA3, "original_max_position_embeddings": 64}),
    ("llama", {"rope_type": "linear", "factor": 4.0}),
    ("gemma3_text", {"rope_type": "linear", "factor": 8.0}),
    ("llama", {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}),
    ("qwen3", {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}),
    ("qwen2", {"type": "yarn", "factor": 2.0, "original_max_position_embeddings": 32, "mscale_all_dim": 0.7}),
]


@needs_llama
@pytest.mark.parametrize(("family", "scaling"), SCALINGS)
def test_rope_scaling(tmp_path, monkeypatch, family, scaling):
    monkeypatch.setattr(nn, "gelu_approx", gelu_table)
    model = pico.make(tmp_path / "model", family, rope_scaling=scaling)
    export(model, tmp_path / "m.gguf", "f32")
    assert difference(model, tmp_path / "m.gguf") < 1e-4
    plain = pico.make(tmp_path / "plain", family)  # the same weights; the scaling must have mattered
    assert np.abs(llama_cpp.mlx_logits(plain, TOKENS) - llama_cpp.mlx_logits(model, TOKENS)).max() > 1e-2


@needs_llama
@pytest.mark.parametrize(("kind", "tolerance"), [("f16", 0.02), ("q8_0", 0.2)])
@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma3_text"])
def test_smaller_types(tmp_path, family, kind, tolerance):
    model = pico.make(tmp_path / "model", family, dtype=mx.bfloat16)
    done = export(model, tmp_path / "m.gguf", kind)
    ours, theirs = llama_cpp.mlx_logits(model, TOKENS), llama_cpp.logits(tmp_path / "m.gguf", TOKENS)
    assert np.abs(ours - theirs).mean() < tolerance * ours.std()
    assert done["fallbacks"] == []


@needs_llama
def test_rows_that_are_no_multiple_of_32_stay_f16(tmp_path):
    model = pico.make(tmp_path / "model", "llama", intermediate_size=100)
    done = export(model, tmp_path / "m.gguf", "q8_0")
    assert done["fallbacks"] == [f"blk.{i}.ffn_down.weight" for i in range(4)]
    assert difference(model, tmp_path / "m.gguf") < 1.0


@needs_llama
def test_a_packed_model_exports_as_its_dequantized_form(tmp_path):
    packed = pico.quantize(pico.make(tmp_path / "dense", "llama", dtype=mx.bfloat16), tmp_path / "packed")
    export(packed, tmp_path / "m.gguf", "f32")
    assert difference(packed, tmp_path / "m.gguf") < 1e-4


@needs_llama
def test_verify_reports_the_same(tmp_path):
    model = pico.make(tmp_path / "model", "qwen2")
    export(model, tmp_path / "m.gguf", "f32")
    found = verify(model, tmp_path / "m.gguf")
    assert found["checked"] and found["tokens"] == 64
    assert found["max_abs_difference"] < 1e-4 and found["same_argmax"] == 1.0 and found["different"] == []


def test_verify_without_llama_cpp_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr(llama_cpp, "available", lambda: False)
    assert verify(tmp_path, tmp_path / "m.gguf")["checked"] is False


# ---- planted faults ----


@needs_llama
@pytest.mark.parametrize("fault", ["rope", "norm"])
def test_a_forgotten_transform_is_noticed(tmp_path, monkeypatch, fault):
    family = {"rope": "llama", "norm": "gemma3_text"}[fault]
    model = pico.make(tmp_path / "model", family)
    if fault == "rope":
        monkeypatch.setattr(exporting, "rope_order", lambda heads, head_dim: list(range(heads * head_dim)))
    else:
        monkeypatch.setattr(exporting, "_gemma_q_norm", lambda arch: 1.1)
    export(model, tmp_path / "m.gguf", "f32")
    assert verify(model, tmp_path / "m.gguf")["max_abs_difference"] > 0.05


@needs_llama
def test_a_broken_file_is_an_error_not_a_crash(tmp_path):
    model = pico.make(tmp_path / "model")
    export(model, tmp_path / "m.gguf", "f32")
    whole = (tmp_path / "m.gguf").read_bytes()
    (tmp_path / "short.gguf").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(PareError, match="cannot use .*short.gguf: .*(within the file bounds|corrupted|incomplete)"):
        llama_cpp.logits(tmp_path / "short.gguf", TOKENS)


def test_an_existing_file_is_refused_and_untouched(tmp_path):
    model = pico.make(tmp_path / "model")
    (tmp_path / "m.gguf").write_text("mine")
    with pytest.raises(Refused):
        export(model, tmp_path / "m.gguf", "f32")
    assert (tmp_path / "m.gguf").read_text() == "mine"


@pytest.mark.parametrize("moment", ["_encoded", "check"])
def test_a_failure_leaves_no_file(tmp_path, monkeypatch, moment):
    model = pico.make(tmp_path / "model")
    calls, original = [], exporting._encoded

    def fail(*args):
        calls.append(args)
        if moment == "check" or len(calls) == 5:
            raise KeyboardInterrupt
        return original(*args)

    monkeypatch.setattr(llama_cpp if moment == "check" else exporting, moment, fail)
    with pytest.raises(KeyboardInterrupt):
        export(model, tmp_path / "out" / "m.gguf", "f32")
    assert list((tmp_path / "out").iterdir()) == []


def test_damage_on_the_way_to_the_disk_is_found(tmp_path, monkeypatch):
    model = pico.make(tmp_path / "model")
    check = llama_cpp.check

    def damaged(path, rows):
        raw = bytearray(path.read_bytes())
        raw[-4:] = np.float32("nan").tobytes()
        path.write_bytes(raw)
        check(path, rows)

    monkeypatch.setattr(llama_cpp, "check", damaged)
    with pytest.raises(PareError, match="holds NaN"):
        export(model, tmp_path / "m.gguf", "f32")
    assert not (tmp_path / "m.gguf").exists()


def test_weights_too_large_for_float16_are_refused(tmp_path):
    model = pico.make(tmp_path / "model")
    weights = mx.load(str(model / "model.safetensors"))
    name = "model.layers.2.mlp.up_proj.weight"
    weights[name] = mx.where(mx.arange(64) == 3, 1e6, weights[name])
    mx.save_safetensors(str(model / "model.safetensors"), weights)
    with pytest.raises(PareError, match=r"layers\.2\.mlp\.up_proj\.weight has values too large for F16"):
        export(model, tmp_path / "m.gguf", "f16")
    assert export(model, tmp_path / "m.gguf", "f32")["tensors"] == len(weights)


REFUSED = [
    ("llama", {"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}, "dynamic"),
    ("gemma3_text", {"rope_scaling": {"rope_type": "yarn", "factor": 2.0}}, "yarn"),
    ("llama", {"rope_scaling": {"rope_type": "yarn", "factor": 2.0, "beta_fast": 16}}, "betas"),
    ("llama", {"rope_scaling": {"rope_type": "linear"}}, "factor"),
    ("llama", {"layer_types": ["sliding_attention"] * 3 + ["full_attention"], "sliding_window": 8}, "sliding"),
    ("llama", {"rope_traditional": True}, "rope_traditional"),
]


@pytest.mark.parametrize(("family", "changes", "said"), REFUSED)
def test_what_llama_cpp_would_compute_differently_is_refused(tmp_path, family, changes, said):
    model = pico.make(tmp_path / "model", family)
    config = {**json.loads((model / "config.json").read_text()), **changes}
    (model / "config.json").write_text(json.dumps(config))
    with pytest.raises(PareError, match=said):
        export(model, tmp_path / "m.gguf", "f32")


def test_unknown_kind_is_a_usage_error(tmp_path):
    with pytest.raises(UsageError, match="q4_k"):
        export(tmp_path, tmp_path / "m.gguf", "q4_k")


def test_tensor_type_needs_no_arrays():
    tensors = {t.spec.role: t for t in describe({**pico.config_of("qwen2", vocab_size=512), "intermediate_size": 100}).tensors()}
    assert [tensor_type(tensors["down_proj"], kind) for kind in ("f32", "f16", "q8_0")] == ["F32", "F16", "F16"]
    assert [tensor_type(tensors["up_proj"], kind) for kind in ("f32", "f16", "q8_0")] == ["F32", "F16", "Q8_0"]
    assert {tensor_type(tensors[r], kind) for r in ("final_norm", "q_proj_bias") for kind in ("f16", "q8_0")} == {"F32"}


# ---- tokenizers ----


def write_bpe(directory: Path, steps: list, ignore_merges: bool = False, normalizer=None, specials=()) -> None:
    """A byte-level tokenizer trained on our own text that splits it by ``steps`` (of tokenizers.pre_tokenizers)."""
    from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers, trainers

    tok = Tokenizer(models.BPE(ignore_merges=ignore_merges))
    tok.normalizer = normalizer
    tok.pre_tokenizer = pre_tokenizers.Sequence(steps) if len(steps) > 1 else steps[0]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=500, initial_alphabet=alphabet, special_tokens=["<|endoftext|>"], show_progress=False)
    tok.train_from_iterator(pico.TEXT.read_text("utf-8").split("\n"), trainer)
    tok.add_tokens([AddedToken(s, normalized=False) for s in specials])
    tok.save(str(directory / "tokenizer.json"))


def steps_of(pre: str) -> list:
    from mlx_pare import gguf_tokenizer
    from tokenizers import Regex
    from tokenizers.pre_tokenizers import ByteLevel, Digits, Split

    if pre in ("gpt-2", "smollm"):
        return ([Digits(individual_digits=True)] if pre == "smollm" else []) + [ByteLevel(add_prefix_space=False)]
    regex = next(key[0][0] for key, name in gguf_tokenizer.PRE_TOKENIZERS.items() if name == pre)
    return [Split(Regex(regex), "isolated"), ByteLevel(add_prefix_space=False, use_regex=False)]


def write_spm(directory: Path, normalizers: list, pre_tokenizer) -> None:
    """The SentencePiece-style pico tokenizer with another treatment of spaces."""
    raw = json.loads(pico.tokenizer_json("spm"))
    raw["normalizer"] = {"type": "Sequence", "normalizers": normalizers} if normalizers else None
    raw["pre_tokenizer"] = pre_tokenizer
    (directory / "tokenizer.json").write_text(json.dumps(raw))


def wrong_by_category(model: Path, gguf: Path, skip=lambda text: False) -> dict[str, str]:
    """Categories in which llama.cpp tokenizes differently: how many, and the first with both results."""
    from tokenizers import Tokenizer

    tok = Tokenizer.from_file(str(model / "tokenizer.json"))
    theirs = iter(llama_cpp.tokenize(gguf, strings.ALL))
    wrong = {}
    for category, texts in strings.CATEGORIES.items():
        pairs = [(t, tok.encode(t, add_special_tokens=False).ids, next(theirs)) for t in texts]
        bad = [(t, a, b) for t, a, b in pairs if a != b and not skip(t)]
        if bad:
            wrong[category] = f"{len(bad)} of {len(texts)}, first {bad[0]}"
    return wrong


def test_the_strings_are_fixed():
    import hashlib

    assert len(strings.ALL) == len(set(strings.ALL)) == 300
    assert hashlib.sha256(json.dumps(strings.ALL).encode()).hexdigest()[:8] == "b239a386"


@needs_llama
@pytest.mark.parametrize("kind", ["bpe", "spm"])
def test_all_strings_of_both_kinds(tmp_path, kind):
    model = pico.make(tmp_path / "model", tokenizer=kind)
    export(model, tmp_path / "m.gguf", "f16")
    assert wrong_by_category(model, tmp_path / "m.gguf") == {}


@needs_llama
@pytest.mark.parametrize("pre", ["gpt-2", "smollm", "llama-bpe", "smaug-bpe", "qwen2", "qwen35"])
def test_all_strings_of_every_known_pre_tokenizer(tmp_path, pre):
    model = pico.make(tmp_path / "model")
    write_bpe(model, steps_of(pre), ignore_merges=pre == "llama-bpe", specials=["<tool>", "  "])
    export(model, tmp_path / "m.gguf", "f16")
    assert f"tokenizer.ggml.pre\x08\x00\x00\x00{chr(len(pre))}".encode() in (tmp_path / "m.gguf").read_bytes()
    assert wrong_by_category(model, tmp_path / "m.gguf") == {}
    assert verify(model, tmp_path / "m.gguf")["different"] == []


REPLACE = {"type": "Replace", "pattern": {"String": " "}, "content": "\u2581"}
NO_SPLIT = {"type": "Split", "pattern": {"String": " "}, "behavior": "MergedWithPrevious", "invert": False}
METASPACE = {"type": "Metaspace", "replacement": "\u2581", "split": False}


@needs_llama
@pytest.mark.parametrize("spaces", ["gemma", "first", "always", "never"])
def test_all_strings_of_other_sentencepiece_forms(tmp_path, spaces):
    model = pico.make(tmp_path / "model", tokenizer="spm")
    if spaces == "gemma":
        write_spm(model, [REPLACE], NO_SPLIT)
    else:
        write_spm(model, [], {**METASPACE, "prepend_scheme": spaces})
    done = export(model, tmp_path / "m.gguf", "f16")
    prefixed = spaces in ("first", "always")
    assert len(done["notes"]) == prefixed
    known = (lambda text: text[0] in " \u2581") if prefixed else (lambda text: False)
    assert wrong_by_category(model, tmp_path / "m.gguf", skip=known) == {}


def test_a_wrong_pre_tokenizer_is_noticed(tmp_path, monkeypatch):
    """The 300 strings tell every pair of known pre-tokenizers apart that splits differently."""


UNKNOWN = ["another regex", "prefix space", "lowercase", "whitespace only", "ignore_merges", "metaspace split", "wordpiece"]


@pytest.mark.parametrize("what", UNKNOWN)
def test_an_unknown_tokenizer_is_refused(tmp_path, what):
    from tokenizers import Regex, normalizers
    from tokenizers.pre_tokenizers import ByteLevel, Split

    model = pico.make(tmp_path / "model", tokenizer="spm" if what == "metaspace split" else "bpe")
    if what == "another regex":
        write_bpe(model, [Split(Regex(r"\w+|\W"), "isolated"), ByteLevel(add_prefix_space=False, use_regex=False)])
    elif what == "prefix space":
        write_bpe(model, [ByteLevel(add_prefix_space=True)])
    elif what == "lowercase":
        write_bpe(model, steps_of("gpt-2"), normalizer=normalizers.Lowercase())
    elif what == "whitespace only":
        write_bpe(model, [Split(" ", "isolated"), ByteLevel(add_prefix_space=False, use_regex=False)])
    elif what == "ignore_merges":
        write_bpe(model, steps_of("gpt-2"), ignore_merges=True)
    elif what == "metaspace split":
        write_spm(model, [], {**METASPACE, "split": True})
    else:
        raw = json.loads((model / "tokenizer.json").read_text())
        raw["model"] = {"type": "WordPiece", "vocab": {}}
        (model / "tokenizer.json").write_text(json.dumps(raw))
    with pytest.raises(PareError, match=r"tokenizer\.json"):
        export(model, tmp_path / "m.gguf", "f32")
    assert not (tmp_path / "m.gguf").exists()


@needs_llama
def test_a_normalization_llama_cpp_lacks_is_noted(tmp_path):
    from tokenizers import normalizers

    model = pico.make(tmp_path / "model")
    write_bpe(model, steps_of("qwen2"), normalizer=normalizers.NFC())
    done = export(model, tmp_path / "m.gguf", "f32")
    assert "NFC" in done["notes"][0]
    assert set(wrong_by_category(model, tmp_path / "m.gguf")) <= {"accents"}


@needs_llama
def test_a_short_vocabulary_is_padded_and_a_long_one_refused(tmp_path):
    model = pico.make(tmp_path / "model", vocab_size=520) if False else save_with_rows(tmp_path / "padded", 520)
    export(model, tmp_path / "m.gguf", "f32")
    assert llama_cpp.logits(tmp_path / "m.gguf", TOKENS).shape == (48, 520)
    assert difference(model, tmp_path / "m.gguf") < 1e-4
    with pytest.raises(PareError, match="has ids up to 511, the embedding has 300 rows"):
        export(save_with_rows(tmp_path / "short", 300), tmp_path / "n.gguf", "f32")


def save_with_rows(directory: Path, rows: int) -> Path:
    directory.mkdir()
    pico.write_tokenizer(directory)
    config = pico.config_of("llama", vocab_size=rows)
    mx.save_safetensors(str(directory / "model.safetensors"), dict(tree_flatten(pico.build(config).parameters())))
    (directory / "config.json").write_text(json.dumps(config))
    return directory
