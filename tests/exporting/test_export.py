"""GGUF files against llama.cpp itself: its logits against stock MLX's, its tokens against the tokenizers library."""

from __future__ import annotations

import hashlib
import json
import struct
from pathlib import Path

import mlx.core as mx
import numpy as np
import pico
import pytest
import strings
from mlx.utils import tree_flatten

from mlx_pare import lm
from mlx_pare.arch import describe
from mlx_pare.base.errors import PareError, Refused, UsageError
from mlx_pare.exporting import llama_cpp
from mlx_pare.exporting.export import export
from mlx_pare.exporting.llama_cpp import verify
from mlx_pare.gguf import architectures as gguf_target, header as gguf_header
from mlx_pare.gguf.quant_mixes import type_of
from mlx_pare.gguf.write import encode as gguf_values, tensors as gguf_rows, tokenizer as gguf_tokenizer
from mlx_pare.pruning.prune import prune
from tests.pruning.test_prune import plan_of

TOKENS = [int(t) for t in np.random.default_rng(0).integers(0, 500, 48)]  # six of gemma's pico windows


def needs_llama(test):
    missing = not llama_cpp.available()
    return pytest.mark.llama(pytest.mark.skipif(missing, reason="llama-cpp-python is not installed")(test))


def difference(model: Path, gguf: Path) -> float:
    return float(np.abs(llama_cpp.mlx_logits(model, TOKENS) - llama_cpp.logits(gguf, TOKENS)).max())


def save(directory: Path, config: dict, rows: int | None = None) -> Path:
    """A pico model from a config written by hand; ``rows`` of the embedding, by default as many as there are tokens."""
    directory.mkdir()
    vocab = pico.write_tokenizer(directory)
    config = {**config, "vocab_size": rows or vocab}
    weights = dict(tree_flatten(pico.build(config).parameters()))
    mx.save_safetensors(str(directory / "model.safetensors"), weights)
    (directory / "config.json").write_text(json.dumps(config))
    return directory


SEED_OSS = pico.BASE | dict(model_type="seed_oss", architectures=["SeedOssForCausalLM"], tie_word_embeddings=False)
SEED_OSS |= dict(attention_bias=True, attention_out_bias=False, mlp_bias=False)
SEED_OSS |= dict(num_attention_heads=6, num_key_value_heads=3, head_dim=18)  # 6 * 18 != 64

# ---- the same numbers ----


@needs_llama
@pytest.mark.parametrize(
    "family", ["llama", "llama-untied", "mistral", "qwen2", "qwen3", *sorted({*pico.MORE} - {"gemma2"})]
)
def test_f32_matches_mlx(tmp_path, family):
    model = pico.make(tmp_path / "model", family)
    done = export(model, tmp_path / "m.gguf", "f32")
    assert difference(model, tmp_path / "m.gguf") < 1e-4
    assert done["bytes"] == (tmp_path / "m.gguf").stat().st_size > done["tensor_bytes"]
    notes = [note for note in done["notes"] if "transformers makes a" not in note]  # pico's pattern is not qwen2's
    assert done["fallbacks"] == [] and notes == []


FACTORS = {"long_factor": [1.0, 2.0, 3.0, 5.0], "short_factor": [1.0, 1.1, 1.2, 1.3]}
LONG = {"rope_scaling": {"type": "longrope", **FACTORS}, "original_max_position_embeddings": 32}
LONG |= {"max_position_embeddings": 256}
YARN = {"rope_scaling": {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}}
OTHER_FORMS = [
    ("phi3", {"partial_rotary_factor": 0.5}),
    ("phi3", LONG),
    ("phi3", {"tie_word_embeddings": True}),
    ("olmo2", {"tie_word_embeddings": True}),  # llama.cpp wants a head of its own
    ("olmo3", YARN),  # in layers without a window only
    ("granite", {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": False}),
]


@needs_llama
@pytest.mark.parametrize(("family", "changes"), OTHER_FORMS)
def test_f32_of_other_forms_matches_mlx(tmp_path, family, changes):
    model = pico.make(tmp_path / "model", family, **changes)
    done = export(model, tmp_path / "m.gguf", "f32")
    assert difference(model, tmp_path / "m.gguf") < 1e-4
    assert len(done["notes"]) == ("rope_scaling" in changes and family == "phi3")


def test_phi3_as_transformers_5_writes_it(tmp_path):
    """Everything that rope is computed with in rope_parameters, none of it where mlx-lm's phi3 reads it."""
    old = {"original_max_position_embeddings": 32, "partial_rotary_factor": 0.5, "rope_theta": 5e3}
    factors = {name: factors[:2] for name, factors in FACTORS.items()}
    written = {"rope_scaling": {"type": "longrope", **factors}, "max_position_embeddings": 256, **old}
    model, other = (pico.make(tmp_path / version / "model", "phi3", **written) for version in ("4", "5"))
    config = json.loads((model / "config.json").read_text())
    config = {key: value for key, value in config.items() if key not in (*old, "rope_scaling")}
    config["rope_parameters"] = {"rope_type": "longrope", **factors, **old}
    (other / "config.json").write_text(json.dumps(config))
    assert np.array_equal(*(llama_cpp.mlx_logits(path, TOKENS) for path in (model, other)))
    files = []
    for path in (model, other):
        export(path, path / "m.gguf", "f32")
        files.append((path / "m.gguf").read_bytes())
    assert files[0] == files[1]


def without_ffn(model: Path) -> Path:
    """The same model with an FFN that adds nothing, so that no GELU is computed."""
    weights = mx.load(str(model / "model.safetensors"))
    weights = {name: w * 0 if "down_proj" in name else w for name, w in weights.items()}
    mx.eval(weights)  # the file is read lazily and overwritten
    mx.save_safetensors(str(model / "model.safetensors"), weights)
    return model


# llama.cpp looks GELU up in a float16 table (ggml-cpu/vec.h, GGML_GELU_FP16), so gemma's logits (standard deviation 1)
# come out 1e-3 to 3e-3 apart whatever is exported. Rounding MLX's GELU to float16 too leaves 7e-4: values next to a
# rounding boundary still fall on different sides.
GELU_TABLE = 5e-3


@needs_llama
@pytest.mark.parametrize("changes", [{}, {"query_pre_attn_scalar": 20}, {"num_hidden_layers": 5}])
def test_f32_gemma_matches_mlx(tmp_path, changes):
    model = pico.make(tmp_path / "model", "gemma3_text", **changes)
    export(model, tmp_path / "m.gguf", "f32")
    assert difference(model, tmp_path / "m.gguf") < GELU_TABLE
    export(without_ffn(model), tmp_path / "muted.gguf", "f32")
    assert difference(model, tmp_path / "muted.gguf") < 1e-4


@needs_llama
def test_gemma_of_62_layers_keeps_its_attention_scale(tmp_path):
    """llama.cpp takes hidden // heads instead of head_dim in a model of exactly 62 layers, the 27B."""
    changes = {"num_hidden_layers": 62, "query_pre_attn_scalar": 24, "intermediate_size": 32}
    model = without_ffn(pico.make(tmp_path / "model", "gemma3_text", **changes))
    export(model, tmp_path / "m.gguf", "f32")
    assert difference(model, tmp_path / "m.gguf") < 1e-4


@needs_llama
@pytest.mark.parametrize("changes", [{}, {"num_hidden_layers": 46, "intermediate_size": 32}])
def test_f32_gemma2_matches_mlx(tmp_path, changes):
    """Of 46 layers, the 27B, llama.cpp takes hidden // heads for the attention scale, and there is no q_norm."""
    model = pico.make(tmp_path / "model", "gemma2", **changes)
    if not changes:
        export(model, tmp_path / "m.gguf", "f32")
        assert difference(model, tmp_path / "m.gguf") < GELU_TABLE
    export(without_ffn(model), tmp_path / "muted.gguf", "f32")
    assert difference(model, tmp_path / "muted.gguf") < 1e-4


@pytest.mark.parametrize("listed", [False, True])
def test_gemma2_keeps_the_windows_of_the_original(tmp_path, listed):
    """mlx-lm has none, so no logits tell: what a cut writes down, and what the file says of it."""
    kinds = ["sliding_attention", "full_attention"] * 2
    changes = {"layer_types": kinds} if listed else {}
    model = pico.make(tmp_path / "model", "gemma2", max_position_embeddings=8192, **changes)
    prune(model, plan_of(model, ("layer",)), tmp_path / "out")  # the first two and the last
    done = export(tmp_path / "out", tmp_path / "m.gguf", "f32")
    header = gguf_header.read(tmp_path / "m.gguf")
    assert list(header.metadata["gemma2.attention.sliding_window_pattern"]) == [True, False, False]
    assert header.metadata["gemma2.attention.sliding_window"] == 4096
    assert json.loads((tmp_path / "out" / "config.json").read_text())["layer_types"] == [kinds[i] for i in (0, 1, 3)]
    assert len(done["notes"]) == 1 and "beyond 4096 tokens" in done["notes"][0]


BIASES = [({}, "seed_oss"), ({"attention_bias": False}, "seed_oss")]
BIASES += [({"attention_out_bias": True}, "llama"), ({"attention_bias": False, "mlp_bias": True}, "llama")]


@needs_llama
@pytest.mark.parametrize(("changes", "architecture"), BIASES)
def test_seed_oss_with_every_bias(tmp_path, changes, architecture):
    model = save(tmp_path / "model", {**SEED_OSS, **changes})
    done = export(model, tmp_path / "m.gguf", "f32")
    assert done["architecture"] == architecture
    assert difference(model, tmp_path / "m.gguf") < 1e-4


@needs_llama
def test_tied_seed_oss(tmp_path):
    model = save(tmp_path / "model", {**SEED_OSS, "tie_word_embeddings": True})
    export(model, tmp_path / "m.gguf", "f32")
    ours = np.array(lm.load(model)(mx.array(TOKENS)[None])[0])  # float32 as stored
    assert np.abs(ours - llama_cpp.logits(tmp_path / "m.gguf", TOKENS)).max() < 1e-4


LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "original_max_position_embeddings": 64}
SCALINGS = [
    ("llama", {**LLAMA3, "low_freq_factor": 1.0, "high_freq_factor": 4.0}),
    ("qwen2", LLAMA3),
    ("llama", {"rope_type": "linear", "factor": 4.0}),
    ("gemma3_text", {"rope_type": "linear", "factor": 8.0}),
    ("llama", {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}),
    ("qwen3", {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}),
    ("qwen2", {"type": "yarn", "factor": 2.0, "original_max_position_embeddings": 32, "mscale_all_dim": 0.7}),
]


@needs_llama
@pytest.mark.parametrize(("family", "scaling"), SCALINGS)
def test_rope_scaling(tmp_path, family, scaling):
    model = without_ffn(pico.make(tmp_path / "model", family, rope_scaling=scaling))
    export(model, tmp_path / "m.gguf", "f32")
    assert difference(model, tmp_path / "m.gguf") < 1e-4
    plain = without_ffn(pico.make(tmp_path / "plain", family))  # the same weights; the scaling must have mattered
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

FAULTS = [
    ("llama", gguf_rows, "rope_order", lambda heads, head_dim: list(range(heads * head_dim))),
    ("gemma3_text", gguf_target, "_gemma_q_norm", lambda arch: 1.1),
    ("gemma2", gguf_target, "_gemma_q_proj", lambda arch: 1.2),
    ("smollm3", gguf_rows, "rope_order", lambda heads, head_dim: list(range(heads * head_dim))),
    ("phi3-long", gguf_rows, "long_factors", lambda target, dims: np.ones(dims // 2, np.float32)),
    *((family, gguf_target, "FURTHER", {}) for family in ("gemma2", "ministral3", "olmo3", "phi3-long")),
    ("granite", gguf_target, "FURTHER", {"granite": lambda writer, _: writer.add_logit_scale(4.0)}),
]


@needs_llama
@pytest.mark.parametrize(("family", "module", "function", "fault"), FAULTS)
def test_a_forgotten_transform_is_noticed(tmp_path, monkeypatch, family, module, function, fault):
    model = pico.make(tmp_path / "model", family.removesuffix("-long"), **(LONG if family.endswith("-long") else {}))
    monkeypatch.setattr(module, function, fault)
    export(model, tmp_path / "m.gguf", "f32")
    assert verify(model, tmp_path / "m.gguf")["max_abs_difference"] > 0.05


@needs_llama
def test_a_broken_file_is_an_error_not_a_crash(tmp_path):
    model = pico.make(tmp_path / "model")
    export(model, tmp_path / "m.gguf", "f32")
    whole = (tmp_path / "m.gguf").read_bytes()
    (tmp_path / "short.gguf").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(PareError, match=r"cannot use .*short\.gguf: .*(within the file bounds|corrupted|incomplete)"):
        llama_cpp.logits(tmp_path / "short.gguf", TOKENS)


def test_an_existing_file_is_refused_and_untouched(tmp_path):
    model = pico.make(tmp_path / "model")
    (tmp_path / "m.gguf").write_text("mine")
    with pytest.raises(Refused):
        export(model, tmp_path / "m.gguf", "f32")
    assert (tmp_path / "m.gguf").read_text() == "mine"


@pytest.mark.parametrize("moment", ["encoded", "check"])
def test_a_failure_leaves_no_file(tmp_path, monkeypatch, moment):
    calls, original = [], gguf_values.encoded

    def fail(*args, **kwargs):
        calls.append(args)
        if moment == "check" or len(calls) == 5:
            raise KeyboardInterrupt
        return original(*args)

    monkeypatch.setattr(llama_cpp if moment == "check" else gguf_values, moment, fail)
    with pytest.raises(KeyboardInterrupt):
        export(pico.make(tmp_path / "model"), tmp_path / "out" / "m.gguf", "f32")
    assert not (tmp_path / "out").exists()  # nor the folder that was made for it


def test_damage_on_the_way_to_the_disk_is_found(tmp_path, monkeypatch):
    model = pico.make(tmp_path / "model")
    check = llama_cpp.check

    def damaged(path, rows, every):
        raw = bytearray(path.read_bytes())
        raw[-4:] = np.float32("nan").tobytes()
        path.write_bytes(raw)
        check(path, rows, every)

    monkeypatch.setattr(llama_cpp, "check", damaged)
    with pytest.raises(PareError, match="holds NaN"):
        export(model, tmp_path / "m.gguf", "f32")
    assert not (tmp_path / "m.gguf").exists()


def test_weights_too_large_for_float16_are_refused(tmp_path):
    model = pico.make(tmp_path / "model")
    weights = mx.load(str(model / "model.safetensors"))
    name = "model.layers.2.mlp.up_proj.weight"
    weights[name] = mx.where(mx.arange(64) == 3, 1e6, weights[name])
    mx.eval(weights)
    mx.save_safetensors(str(model / "model.safetensors"), weights)
    with pytest.raises(PareError, match=r"layers\.2\.mlp\.up_proj\.weight has values too large for F16"):
        export(model, tmp_path / "m.gguf", "f16")
    assert export(model, tmp_path / "m.gguf", "f32")["tensors"] == len(weights)


def awkward_blocks() -> np.ndarray:
    """Rows for Q8_0: ordinary ones, zeros, blocks with many ties, tiny and huge values, and alone in their block."""
    draw = np.random.default_rng(0)
    rows = draw.standard_normal((9, 128)).astype(np.float32)
    rows[1] = 0
    rows[2] = draw.integers(-254, 255, 128) / 2  # a scale of 1 where 127 is among them: halves are rounded
    rows[2, ::32] = 127
    rows[3] *= 1e-20
    rows[4] *= 1e6
    rows[5, 1:32] = 0
    rows[6] = -3
    rows[7, 32:64] = -0.0
    return rows


@pytest.mark.parametrize("kind", ["F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1"])
def test_converted_bytes_are_those_of_gguf_py(kind):
    import gguf

    rows = awkward_blocks()
    rows = rows[:4] if kind == "F16" else rows
    with np.errstate(over="ignore"):
        expected = gguf.quants.quantize(rows, gguf.GGMLQuantizationType[kind])
    found = gguf_values.convert(mx.array(rows), kind)
    assert found.tobytes() == np.ascontiguousarray(expected).tobytes()


@pytest.mark.parametrize("kind", ["F32", "F16", "Q8_0"])
@pytest.mark.parametrize("wrong", [np.nan, np.inf, -np.inf])
def test_one_value_that_is_not_finite_is_seen(kind, wrong):
    rows = np.ones((3, 64), np.float32)
    assert gguf_values.finite(gguf_values.convert(mx.array(rows), kind), kind)
    rows[1, 40] = wrong
    assert not gguf_values.finite(gguf_values.convert(mx.array(rows), kind), kind)


REFUSED = [
    ("llama", {"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}, "dynamic"),
    ("gemma3_text", {"rope_scaling": {"rope_type": "yarn", "factor": 2.0}}, "yarn"),
    ("llama", {"rope_scaling": {"rope_type": "yarn", "factor": 2.0, "beta_fast": 16}}, "betas"),
    ("llama", {"rope_scaling": {"rope_type": "linear"}}, "factor"),
    ("llama", {"layer_types": ["sliding_attention"] * 3 + ["full_attention"], "sliding_window": 8}, "sliding"),
    ("llama", {"rope_traditional": True}, "rope_traditional"),
    ("phi3", {"rope_scaling": {"type": "yarn", "factor": 2.0, "long_factor": [1.0]}}, "ignores"),
    ("smollm3", {"no_rope_layers": [1, 1, 0, 1] * 2}, "by position"),
    ("smollm3", {"layer_types": ["sliding_attention"] * 4 + ["full_attention"] * 4, "sliding_window": 8}, "sliding"),
    ("gemma2", {"rope_scaling": {"rope_type": "linear", "factor": 2.0}}, "linear"),
    ("ministral3", {"layer_types": ["sliding_attention", "full_attention"] * 2, "sliding_window": 8}, "sliding"),
]


@pytest.mark.parametrize(("family", "changes", "said"), REFUSED)
def test_what_llama_cpp_would_compute_differently_is_refused(tmp_path, family, changes, said):
    model = pico.make(tmp_path / "model", family)
    config = {**json.loads((model / "config.json").read_text()), **changes}
    (model / "config.json").write_text(json.dumps(config))
    with pytest.raises(PareError, match=said):
        export(model, tmp_path / "m.gguf", "f32")


@pytest.mark.parametrize(
    ("family", "changes", "said"),
    [
        ("olmo2", {"attention_bias": True}, "biases"),
        ("olmo2", {"head_dim": 32}, "not as wide"),
        ("smollm3", {"mlp_bias": True}, "biases"),
    ],
)
def test_tensors_that_llama_cpp_has_no_place_for_are_refused(tmp_path, family, changes, said):
    with pytest.raises(PareError, match=said):
        export(pico.make(tmp_path / "model", family, **changes), tmp_path / "m.gguf", "f32")


def test_types():
    with pytest.raises(UsageError, match="q4_k"):
        export(Path("model"), Path("m.gguf"), "q4_k")
    arch = describe({**pico.config_of("qwen2", vocab_size=512), "intermediate_size": 100})
    tensors = {t.spec.role: t for t in arch.tensors()}
    types = {kind: type_of(arch, kind) for kind in ("f32", "f16", "q8_0")}
    assert [types[kind](tensors["down_proj"]) for kind in types] == ["F32", "F16", "F16"]
    assert [types[kind](tensors["up_proj"]) for kind in types] == ["F32", "F16", "Q8_0"]
    assert {types[kind](tensors[r]) for r in ("final_norm", "q_proj_bias") for kind in ("f16", "q8_0")} == {"F32"}


# ---- tokenizers ----


def model_of(directory: Path) -> Path:
    """A model with room for the tokenizers of strings.py."""
    return save(directory, {**pico.config_of("llama"), "num_hidden_layers": 1}, strings.ROWS)


def wrong(model: Path, skip=lambda text: False) -> dict[str, str]:
    """Categories of strings that llama.cpp tokenizes differently after an export."""
    gguf = model.parent / "m.gguf"
    export(model, gguf, "f16")
    return strings.wrong_by_category(model, llama_cpp.tokenize(gguf, strings.ALL), skip)


def test_the_strings_are_fixed():
    assert len(strings.ALL) == len(set(strings.ALL)) == 300
    assert hashlib.sha256(json.dumps(strings.ALL).encode()).hexdigest()[:8] == "b239a386"


@needs_llama
@pytest.mark.parametrize("kind", ["bpe", "spm"])
def test_all_strings_of_both_kinds(tmp_path, kind):
    assert wrong(pico.make(tmp_path / "model", tokenizer=kind)) == {}


@needs_llama
@pytest.mark.parametrize("pre", ["gpt-2", "smollm", "llama-bpe", "smaug-bpe", "qwen2", "qwen35"])
def test_all_strings_of_every_known_pre_tokenizer(tmp_path, pre):
    model = model_of(tmp_path / "model")
    strings.write_bpe(model, pre, specials=["<tool>", "  "])
    assert wrong(model) == {}
    assert b"tokenizer.ggml.pre" + struct.pack("<IQ", 8, len(pre)) + pre.encode() in (tmp_path / "m.gguf").read_bytes()
    assert verify(model, tmp_path / "m.gguf")["different"] == []


CONFUSED = [("llama-bpe", "qwen2"), ("qwen2", "qwen35"), ("gpt-2", "smollm"), ("llama-bpe", "smaug-bpe")]


@needs_llama
@pytest.mark.parametrize(("real", "named"), CONFUSED)
def test_a_wrong_pre_tokenizer_is_noticed(tmp_path, monkeypatch, real, named):
    """The strings tell pre-tokenizers apart that differ in nothing but digits, accents or ignore_merges."""
    monkeypatch.setattr(gguf_tokenizer, "pre_tokenizer", lambda raw, where: (named, []))
    model = model_of(tmp_path / "model")
    strings.write_bpe(model, real)
    assert wrong(model)


REPLACE = {"type": "Replace", "pattern": {"String": " "}, "content": "\u2581"}
PREPEND = {"type": "Prepend", "prepend": "\u2581"}
NO_SPLIT = {"type": "Split", "pattern": {"String": " "}, "behavior": "MergedWithPrevious", "invert": False}
METASPACE = {"type": "Metaspace", "replacement": "\u2581", "split": False}
FORMS = {"llama": ([PREPEND, REPLACE], None), "gemma": ([REPLACE], NO_SPLIT)}
FORMS |= {scheme: ([], {**METASPACE, "prepend_scheme": scheme}) for scheme in ("first", "always", "never")}


@needs_llama
@pytest.mark.parametrize("form", FORMS)
def test_all_strings_of_every_sentencepiece_form(tmp_path, form):
    model = model_of(tmp_path / "model")
    strings.write_spm(model, *FORMS[form])
    noted = form in ("first", "always")  # a space in front of texts that already begin with one
    assert wrong(model, skip=lambda text: noted and text[0] in " \u2581") == {}
    assert len(export(model, tmp_path / "again.gguf", "f16")["notes"]) == noted


BYTES = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False}
REGEX = {"type": "Split", "pattern": {"Regex": r"\w+|\W"}, "behavior": "Isolated", "invert": False}
REFUSED_TOKENIZERS = [
    ("bpe", {"pre_tokenizer": {"type": "Sequence", "pretokenizers": [REGEX, BYTES]}}),
    ("bpe", {"pre_tokenizer": {**BYTES, "add_prefix_space": True, "use_regex": True}}),
    ("bpe", {"pre_tokenizer": BYTES}),
    ("bpe", {"pre_tokenizer": None}),
    ("bpe", {"normalizer": {"type": "Lowercase"}}),
    ("bpe", {"model": {"ignore_merges": True}}),
    ("bpe", {"model": {"type": "WordPiece"}}),
    ("spm", {"normalizer": {"type": "NFKC"}}),
    ("spm", {"normalizer": None, "pre_tokenizer": {**METASPACE, "split": True}}),
]


@pytest.mark.parametrize(("kind", "changes"), REFUSED_TOKENIZERS)
def test_an_unknown_tokenizer_is_refused(tmp_path, kind, changes):
    model = pico.make(tmp_path / "model", tokenizer=kind)
    raw = json.loads((model / "tokenizer.json").read_text())
    raw |= {k: {**raw["model"], **v} if k == "model" else v for k, v in changes.items()}
    (model / "tokenizer.json").write_text(json.dumps(raw))
    with pytest.raises(PareError, match=r"tokenizer\.json"):
        export(model, tmp_path / "m.gguf", "f32")
    assert not (tmp_path / "m.gguf").exists()


@needs_llama
def test_a_normalization_llama_cpp_lacks_is_noted(tmp_path):
    model = model_of(tmp_path / "model")
    strings.write_bpe(model, "qwen2", normalizer={"type": "NFC"})
    assert set(wrong(model)) == {"accents"}
    assert "NFC" in export(model, tmp_path / "again.gguf", "f16")["notes"][0]


@needs_llama
def test_a_short_vocabulary_is_padded_and_a_long_one_refused(tmp_path):
    model = save(tmp_path / "padded", pico.config_of("llama"), 520)
    export(model, tmp_path / "m.gguf", "f32")
    assert llama_cpp.logits(tmp_path / "m.gguf", TOKENS).shape == (48, 520)
    assert difference(model, tmp_path / "m.gguf") < 1e-4
    with pytest.raises(PareError, match="has ids up to 511, the embedding has 300 rows"):
        export(save(tmp_path / "short", pico.config_of("llama"), 300), tmp_path / "n.gguf", "f32")
