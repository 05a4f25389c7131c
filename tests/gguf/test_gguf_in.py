"""GGUF files rebuilt as MLX models: exact where a packing is, the same logits as llama.cpp, and strangers' files."""

from __future__ import annotations

import json
import math
from pathlib import Path

import gguf
import gguf_edit
import llama_quantize
import mlx.core as mx
import numpy as np
import pico
import pytest

from mlx_pare import lm
from mlx_pare.base.errors import PareError, Refused, Unsupported
from mlx_pare.exporting import llama_cpp
from mlx_pare.exporting.export import export
from mlx_pare.gguf.architectures import Target
from mlx_pare.gguf.read import (
    blocks as gguf_blocks,
    rebuild as gguf_model,
    settings as gguf_settings,
    tensors as gguf_stored,
)
from mlx_pare.gguf.read.rebuild import rebuild
from mlx_pare.gguf.types import TYPES
from mlx_pare.gguf.write.tensors import rope_factors
from mlx_pare.model.checkpoint import Checkpoint
from mlx_pare.model.weights import read
from mlx_pare.tensors.packed import Packed, pack_codes
from mlx_pare.tensors.packing import Packing

TOKENS = [int(t) for t in np.random.default_rng(0).integers(0, 500, 48)]


def needs_llama(test):
    missing = not llama_cpp.available()
    return pytest.mark.llama(pytest.mark.skipif(missing, reason="llama-cpp-python is not installed")(test))


def weights(directory: Path) -> dict[str, np.ndarray]:
    """Every tensor of a checkpoint in float32, packed ones expanded."""
    checkpoint, found = Checkpoint(directory), {}
    for tensor in checkpoint.arch.tensors():
        stored = read(checkpoint, tensor.name)
        found[tensor.name] = np.array(stored.dense() if isinstance(stored, Packed) else stored.astype(mx.float32))
    return found


def bits(array: np.ndarray) -> bytes:
    return np.ascontiguousarray(array, np.float32).tobytes()


# ---- there and back ----

LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "original_max_position_embeddings": 64}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}
VARIANTS = {
    "llama": ("llama", {}),
    "llama, untied": ("llama-untied", {}),
    "llama, biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "llama, llama3": ("llama", {"rope_scaling": {**LLAMA3, "low_freq_factor": 1.0, "high_freq_factor": 4.0}}),
    "llama, linear": ("llama", {"rope_scaling": {"rope_type": "linear", "factor": 4.0}}),
    "llama, yarn": ("llama", {"rope_scaling": YARN}),
    "mistral": ("mistral", {}),
    "qwen2": ("qwen2", {}),
    "qwen2, llama3": ("qwen2", {"rope_scaling": LLAMA3}),
    "qwen2, yarn with mscale": ("qwen2", {"rope_scaling": {**YARN, "mscale_all_dim": 0.7}}),
    "qwen3": ("qwen3", {}),
    "qwen3, untied": ("qwen3", {"tie_word_embeddings": False}),
    "gemma3": ("gemma3_text", {}),
    "gemma3, linear": ("gemma3_text", {"rope_scaling": {"rope_type": "linear", "factor": 8.0}}),
}


ALIKE = ("f32", "f16", "bf16", "q8_0")  # kinds whose matrices all have one type


def stored_as(name: str, array: np.ndarray, kind: str, gemma: bool) -> np.ndarray:
    """What a file of a kind holds of a tensor, by gguf-py."""
    if array.ndim == 1:
        return array + np.float32(1) - np.float32(1) if gemma else array
    number = gguf.GGMLQuantizationType[kind.upper()]
    return gguf.quants.dequantize(gguf.quants.quantize(array, number), number)


KINDS = ("f32", "f16", "q8_0", "bf16", "q4_0", "q5_1")


@pytest.mark.parametrize(
    "variant, kind",
    [(v, k) for n, v in enumerate(VARIANTS) for m, k in enumerate(KINDS) if v == "llama" or (n + m) % 2],
)
def test_there_and_back_is_exact(tmp_path, pico_models, variant, kind):
    """llama in every kind, the other variants in every second one."""
    family, changes = VARIANTS[variant]
    model = pico_models(family, **changes)
    written = kind if kind in ALIKE else "f32"
    export(model, tmp_path / "m.gguf", written)
    if written != kind:
        gguf_edit.edited(tmp_path / "m.gguf", tmp_path / "n.gguf", change=gguf_edit.matrices(kind.upper()))
    done = rebuild(tmp_path / ("m.gguf" if written == kind else "n.gguf"), tmp_path / "back")
    before, after = weights(model), weights(tmp_path / "back")
    assert list(before) == list(after) and done["rounded"] == {}
    for name, array in before.items():
        expected, found = stored_as(name, array, kind, family == "gemma3_text"), after[name]
        signed = 0 if kind.startswith("q") else -0.0  # a code times a negative scale may be -0
        assert bits(expected + signed) == bits(found + signed), name
    if kind == "f32":  # the config says the same too
        ours, theirs = llama_cpp.mlx_logits(model, TOKENS), llama_cpp.mlx_logits(tmp_path / "back", TOKENS)
        assert np.abs(ours - theirs).max() < (1e-4 if family == "gemma3_text" or "mscale" in variant else 1e-12)
    export(tmp_path / "back", tmp_path / "again.gguf", "f32")  # and out again: what Gemma's norms lost, once
    source = tmp_path / ("m.gguf" if written == kind else "n.gguf")
    first, again = file_values(source), file_values(tmp_path / "again.gguf")
    assert all(bits(again[name] + signed) == bits(first[name] + signed) for name in again if "rope" not in name)


def file_values(path: Path) -> dict[str, np.ndarray]:
    """Every tensor of a GGUF file in float32, by gguf-py."""
    return {t.name: gguf.quants.dequantize(t.data, t.tensor_type) for t in gguf.GGUFReader(path).tensors}


@pytest.mark.parametrize("changes", [{"query_pre_attn_scalar": 20}, {"num_hidden_layers": 62, "intermediate_size": 32}])
def test_the_attention_scale_of_gemma_stays_in_its_q_norm(tmp_path, changes):
    """A file does not say it: llama.cpp goes by the number of layers, and our export puts the rest into q_norm."""
    model = pico.make(tmp_path / "model", "gemma3_text", **changes)
    export(model, tmp_path / "m.gguf", "f32")
    rebuild(tmp_path / "m.gguf", tmp_path / "back")
    config = json.loads((tmp_path / "back" / "config.json").read_text())
    assert config["query_pre_attn_scalar"] == (16 if "num_hidden_layers" in changes else 32)
    ours, theirs = llama_cpp.mlx_logits(model, TOKENS), llama_cpp.mlx_logits(tmp_path / "back", TOKENS)
    assert np.abs(ours - theirs).max() < 1e-4


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "qwen2"])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_a_model_of_sixteen_bits_is_one_again(tmp_path, family, dtype):
    """Its file holds norms and biases in F32; they come back in the dtype of the matrices."""
    model = pico.make(tmp_path / "model", family, dtype=getattr(mx, dtype))
    export(model, tmp_path / "m.gguf", "f16" if dtype == "float16" else "f32")
    source = tmp_path / "m.gguf"
    if dtype == "bfloat16":
        source = gguf_edit.edited(source, tmp_path / "n.gguf", change=gguf_edit.matrices("BF16"))
    done = rebuild(source, tmp_path / "back")
    before, after = mx.load(str(model / "model.safetensors")), mx.load(str(tmp_path / "back" / "model.safetensors"))
    assert {a.dtype for a in after.values()} == {getattr(mx, dtype)} and not any("norms" in n for n in done["notes"])
    for name, array in before.items():
        assert mx.array_equal(array.view(mx.uint16), after[name].view(mx.uint16)).item(), name


def test_norms_that_no_short_float_holds_stay_float32(tmp_path, pico_models):
    export(pico_models("llama"), tmp_path / "m.gguf", "q8_0")
    done = rebuild(tmp_path / "m.gguf", tmp_path / "back")
    assert "F32" in done["notes"][0]
    after = mx.load(str(tmp_path / "back" / "model.safetensors"))
    assert after["model.norm.weight"].dtype == mx.float32 and after["model.embed_tokens.scales"].dtype == mx.float16


def test_a_head_of_other_widths_leaves_as_what_loads(tmp_path):
    """llama with three heads of 20 on 64: transformers takes it as mistral only."""
    model = pico.make(tmp_path / "model", "mistral", num_attention_heads=3, num_key_value_heads=3, head_dim=20)
    export(model, tmp_path / "m.gguf", "f32")
    assert rebuild(tmp_path / "m.gguf", tmp_path / "back")["model_type"] == "mistral"
    assert json.loads((tmp_path / "back" / "config.json").read_text())["architectures"] == ["MistralForCausalLM"]


def test_a_file_in_parts(tmp_path, pico_models):
    export(pico_models("llama"), tmp_path / "m.gguf", "q8_0")
    gguf_edit.edited(tmp_path / "m.gguf", tmp_path / "p.gguf", split_max_tensors=7)
    parts = sorted(tmp_path.glob("p-*.gguf"))
    assert len(parts) > 3
    for source, out in ((tmp_path / "m.gguf", "whole"), (parts[2], "parts")):
        rebuild(source, tmp_path / out)
    for name in ("model.safetensors", "config.json", "tokenizer.json"):
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "parts" / name).read_bytes()


def test_packings_differ_by_module_and_stock_mlx_lm_loads_them(tmp_path, pico_models):
    from mlx_lm import generate, load

    kinds = {"attn_q": "Q4_0", "attn_v": "Q5_0", "ffn_up": "Q8_0", "ffn_down": "F16", "token_embd": "Q5_1"}

    def change(name: str, values: np.ndarray) -> tuple[np.ndarray, str]:
        return values, kinds.get(name.split(".")[-2], "Q4_1") if values.ndim > 1 else "F32"

    export(pico_models("llama"), tmp_path / "m.gguf", "f32")
    gguf_edit.edited(tmp_path / "m.gguf", tmp_path / "n.gguf", change=change)
    done = rebuild(tmp_path / "n.gguf", tmp_path / "back")
    assert done["types"] == {"Q5_1": 1, "Q4_0": 4, "Q4_1": 12, "Q5_0": 4, "Q8_0": 4, "F16": 4, "F32": 9}
    quantization = json.loads((tmp_path / "back" / "config.json").read_text())["quantization"]
    assert quantization["bits"] == 4 and quantization["model.embed_tokens"]["bits"] == 5
    model, tokenizer = load(str(tmp_path / "back"))
    assert model.layers[0].mlp.up_proj.bits == 8 and not hasattr(model.layers[0].mlp.down_proj, "bits")
    assert generate(model, tokenizer, "The mill", max_tokens=4)


def test_dense_makes_floats(tmp_path, pico_models):
    export(pico_models("llama"), tmp_path / "m.gguf", "q8_0")
    done = rebuild(tmp_path / "m.gguf", tmp_path / "back", dense=True)
    checkpoint = Checkpoint(tmp_path / "back")
    assert not checkpoint.quantized and 0 < done["rounded"]["Q8_0"]["relative_error"] < 3e-4
    packed = rebuild(tmp_path / "m.gguf", tmp_path / "packed")
    assert done["bytes"] > packed["bytes"]


def test_a_tied_seed_oss_is_untied_when_it_is_packed(tmp_path):
    """Its class in mlx-lm multiplies by the words of a packed embedding."""
    from tests.exporting.test_export import SEED_OSS, save

    model = save(tmp_path / "model", {**SEED_OSS, "tie_word_embeddings": True, "head_dim": 32})
    export(model, tmp_path / "m.gguf", "q8_0")
    rebuild(tmp_path / "m.gguf", tmp_path / "back")
    assert "lm_head.scales" in Checkpoint(tmp_path / "back").entries
    lm.load(tmp_path / "back")(mx.array(TOKENS)[None])


# ---- the numbers of llama.cpp ----


def wide(directory: Path, **changes) -> Path:
    """A model whose rows are blocks of 256; an embedding of the usual size keeps logits near 1."""
    sizes = {"hidden_size": 256, "intermediate_size": 512, "head_dim": 64, "num_hidden_layers": 2}
    return pico.make(directory, "llama-untied", **{**sizes, **changes})


@pytest.fixture(scope="module")
def by_llama(tmp_path_factory) -> dict[str, tuple[Path, Path]]:
    """Files made by llama.cpp's own quantizer, and what it makes of them in F32."""
    folder = tmp_path_factory.mktemp("kinds")
    export(wide(folder / "model"), folder / "f32.gguf", "f32")

    def job(source: str, kind: str, out: str) -> dict:
        return {"gguf": str(folder / source), "kind": kind, "imatrix": None, "out": str(folder / out)}

    types = llama_quantize.types([job("f32.gguf", kind, f"{kind}.gguf") for kind in KINDS], folder)
    assert not any("refused" in found for found in types)
    llama_quantize.types([job(f"{kind}.gguf", "f32", f"{kind}-back.gguf") for kind in KINDS], folder)
    return {kind: (folder / f"{kind}.gguf", folder / f"{kind}-back.gguf") for kind in KINDS}


# the largest relative error of a type that is not exact, and of the logits
KINDS = {
    "bf16": (0, 1e-4),
    "q8_0": (0, 1e-4),
    "q4_k_m": (6e-3, 0.08),
    "q5_k_m": (6e-3, 0.08),
    "q6_k": (6e-3, 0.08),
    "q2_k": (6e-3, 0.08),
    "q3_k_m": (6e-3, 0.08),
    "iq4_xs": (6e-3, 0.08),
}


@needs_llama
@pytest.mark.parametrize("kind", KINDS)
def test_the_rebuilt_model_computes_what_llama_cpp_does(tmp_path, by_llama, kind):
    """Against the same numbers in F32: with quantized ones llama.cpp rounds what goes through them as well."""
    error, difference = KINDS[kind]
    source, back = by_llama[kind]
    done = rebuild(source, tmp_path / "model")
    assert all(0 < found["relative_error"] <= found["worst"] < error for found in done["rounded"].values())
    assert bool(done["rounded"]) == bool(error)
    ours, theirs = llama_cpp.mlx_logits(tmp_path / "model", TOKENS), llama_cpp.logits(back, TOKENS)
    assert np.abs(ours - theirs).max() < difference
    if "Q4_K" in done["types"] or "Q5_K" in done["types"]:  # their codes stay
        assert max(done["rounded"][k]["worst"] for k in ("Q4_K", "Q5_K") if k in done["rounded"]) < 1e-3


@needs_llama
@pytest.mark.parametrize("variant", ["llama, llama3", "llama, biases", "qwen2", "qwen3", "gemma3"])
def test_exact_packings_against_llama_cpp(tmp_path, pico_models, variant):
    family, changes = VARIANTS[variant]
    export(pico_models(family, **changes), tmp_path / "f32.gguf", "f32")
    packed = gguf_edit.edited(tmp_path / "f32.gguf", tmp_path / "m.gguf", change=gguf_edit.matrices("Q4_1"))
    back = gguf_edit.edited(packed, tmp_path / "back.gguf", change=lambda name, values: (values, "F32"))
    rebuild(packed, tmp_path / "model")
    ours, theirs = llama_cpp.mlx_logits(tmp_path / "model", TOKENS), llama_cpp.logits(back, TOKENS)
    assert np.abs(ours - theirs).max() < (1e-2 if variant == "gemma3" else 1e-4)  # a GELU of float16


@needs_llama
def test_gemma2(tmp_path):
    """Soft caps, and norms after attention and feed-forward; not cut, but run."""
    config = pico.BASE | {"model_type": "gemma2", "head_dim": 32, "query_pre_attn_scalar": 32}
    config |= {"attn_logit_softcapping": 20.0, "final_logit_softcapping": 10.0}
    (tmp_path / "model").mkdir()
    config["vocab_size"] = pico.write_tokenizer(tmp_path / "model")
    model = pico.build(config)
    export(pico.make(tmp_path / "gemma3", "gemma3_text", num_hidden_layers=4), tmp_path / "gemma3.gguf", "f32")
    settings = {"general.architecture": "gemma2", "gemma2.attention.sliding_window": 512}
    settings |= {"gemma2.attn_logit_softcapping": 20.0, "gemma2.final_logit_softcapping": 10.0}
    fields = gguf.GGUFReader(tmp_path / "gemma3.gguf").fields
    for name in [name for name in fields if name.startswith("gemma3.")]:
        if not name.startswith("gemma3.attention.sliding") and "swa" not in name:
            settings[name.replace("gemma3.", "gemma2.")] = fields[name].contents()
        settings[name] = None
    names, parameters = gguf.get_tensor_name_map(gguf.MODEL_ARCH.GEMMA2, 4), dict(model.parameters())
    from mlx.utils import tree_flatten

    there = {
        names.get_name(k, try_suffixes=(".weight",)): np.array(v) + ("norm" in k) for k, v in tree_flatten(parameters)
    }
    source = gguf_edit.edited(
        tmp_path / "gemma3.gguf", tmp_path / "m.gguf", settings,
        lambda name, values: (there[name], "F32") if name in there else None,
    )  # fmt: skip
    assert rebuild(source, tmp_path / "back")["model_type"] == "gemma2"
    ours, theirs = llama_cpp.mlx_logits(tmp_path / "back", TOKENS), llama_cpp.logits(source, TOKENS)
    assert np.abs(ours - theirs).max() < 1e-2
    exact = np.array(model(mx.array(TOKENS)[None])[0])
    assert np.abs(ours - exact).max() < 1e-4


# ---- every block ----

HALVES = {"Q8_0": [0], "Q4_0": [0], "Q4_1": [0, 2], "Q5_0": [0], "Q5_1": [0, 2], "Q4_K": [0, 2], "Q5_K": [0, 2]}
HALVES |= {"TQ1_0": [52], "TQ2_0": [64], "MXFP4": []}


def random_rows(kind: str, rows: int = 16, columns: int = 512) -> np.ndarray:
    """Stored rows of any bytes, but for sane float16 numbers and exponents."""
    draw, size = np.random.default_rng(0), TYPES[kind].size
    raw = draw.integers(0, 256, (rows, columns // TYPES[kind].values, size), np.uint8)
    for at in HALVES[kind]:
        raw[..., at : at + 2] = (draw.standard_normal((*raw.shape[:2], 1)) * 0.01).astype(np.float16).view(np.uint8)
    if kind == "MXFP4":
        raw[..., 0] = draw.integers(0, 255, raw.shape[:2])
        raw[..., 0] = np.minimum(raw[..., 0], 250)
    if kind == "TQ1_0":  # five to a byte leave no other
        ternary = draw.integers(-1, 2, (rows, columns)).astype(np.float32) * 0.125
        return gguf.quants.quantize(ternary, gguf.GGMLQuantizationType.TQ1_0)
    return raw.reshape(rows, -1)


@pytest.mark.parametrize("kind", gguf_blocks.FORMS)
def test_blocks_keep_their_values(kind):
    rows, form = random_rows(kind), gguf_blocks.FORMS[kind]
    expected = gguf.quants.dequantize(rows, gguf.GGMLQuantizationType[kind])
    codes, scales, biases = gguf_blocks.parts(rows, kind)
    words = mx.array(pack_codes(codes, form.packing.bits))
    if form.packing.affine:
        dtype = np.float16 if form.exact else np.float32
        made = Packed(words, mx.array(scales.astype(dtype)), mx.array(biases.astype(dtype)), form.packing)
    else:
        made = Packed(words, mx.array(scales), None, form.packing)
    found = np.array(made.dense())
    # in float32 MLX adds to a product what gguf-py subtracts: the last bit of K-quants
    tiny = np.abs(expected) < 2.0**-126  # MLX takes what is below for 0
    assert np.abs(found - expected)[~tiny].max() <= (0 if form.exact else 1e-6)
    assert np.abs(gguf_blocks.dense(rows, kind) - expected).max() == 0


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8])
def test_words_of_codes_are_those_of_mlx(bits):
    values = mx.random.normal((8, 128), key=mx.random.key(bits))
    words, scales, biases = mx.quantize(values, 32, bits)
    plain = mx.dequantize(words, scales, biases, 32, bits)
    codes = mx.round((plain - mx.repeat(biases, 32, 1)) / mx.repeat(scales, 32, 1))
    assert np.array_equal(pack_codes(np.array(codes), bits), np.array(words))


# ---- rope ----


@pytest.mark.parametrize("dims", [8, 32, 64, 128])
@pytest.mark.parametrize("theta", [1e4, 5e5])
@pytest.mark.parametrize(
    "shape", [(8, 1, 4, 8192), (32, 1, 4, 8192), (4, 2, 8, 512), (3.5, 1, 1.5, 4096), (8, 1, 2, 7)]
)
def test_llama3_scaling_is_found_again(dims, theta, shape):
    factor, low, high, length = shape
    scaling = {"factor": factor, "low_freq_factor": low, "high_freq_factor": high}
    scaling["original_max_position_embeddings"] = length
    target = Target("llama", True, theta, {**scaling, "rope_type": "llama3"})
    factors = rope_factors(target, dims)
    found = gguf_settings.llama3_scaling(factors.tolist(), theta)
    if found.get("rope_type") == "llama3":
        again = rope_factors(Target("llama", True, theta, found), dims)
        assert np.abs(again / factors - 1).max() < 4e-6
    else:
        assert len(set(factors.tolist())) == 1 and found.get("factor", 1) == factors[0]
    if dims == 128 and shape[1:] == (1, 4, 8192):
        assert {k: found[k] for k in scaling} == scaling


@pytest.mark.parametrize(
    "factors", [[1, 2, 1, 4], [0.5, 1, 2, 2], [1, math.nan, 2, 2], [2, 1, 1, 1], [1, 1.5, 1.6, 3, 4]]
)
def test_other_factors_are_refused(factors):
    with pytest.raises(PareError, match="rope_freqs"):
        gguf_settings.llama3_scaling(factors, 1e4)


# ---- planted faults ----


@pytest.mark.parametrize(("family", "module", "function", "fault"), [
    ("llama", gguf_model, "_undone", lambda order: list(order)),
    ("gemma3_text", gguf_stored, "_shifted", lambda values, row: values),
    ("llama", gguf_settings, "_scaling", lambda *_: {}),
])  # fmt: skip
def test_a_forgotten_step_is_noticed(tmp_path, monkeypatch, pico_models, family, module, function, fault):
    changes = {"rope_scaling": LLAMA3} if function == "_scaling" else {}
    model = pico_models(family, **changes)
    export(model, tmp_path / "m.gguf", "f32")
    monkeypatch.setattr(module, function, fault)
    rebuild(tmp_path / "m.gguf", tmp_path / "back")
    ours, theirs = llama_cpp.mlx_logits(model, TOKENS), llama_cpp.mlx_logits(tmp_path / "back", TOKENS)
    assert np.abs(ours - theirs).max() > 0.02


# ---- strangers' files ----


def spoiled(value: float, name: str = "blk.1.ffn_up.weight") -> gguf_edit.Change:
    def change(found: str, values: np.ndarray) -> tuple[np.ndarray, str]:
        if found == name:
            values = values.copy()
            values.reshape(-1)[7] = value
        return values, "F32"

    return change


def without(name: str) -> gguf_edit.Change:
    return lambda found, values: None if found == name else (values, "F32")


def reshaped(name: str, shape: tuple[int, ...]) -> gguf_edit.Change:
    return lambda found, values: (np.zeros(shape) if found == name else values, "F32")


LINKS = [f"<0x{b:02X}>" for b in range(256)]
HOSTILE = {
    "nan": ({}, spoiled(np.nan), "holds NaN"),
    "infinity in a norm": ({}, spoiled(np.inf, "blk.0.attn_norm.weight"), "holds NaN"),
    "a tensor is missing": ({}, without("blk.2.attn_k.weight"), "lacks blk.2.attn_k.weight"),
    "no embedding": ({}, without("token_embd.weight"), "lacks token_embd.weight"),
    "another shape": ({}, reshaped("blk.0.ffn_down.weight", (64, 64)), "has shape"),
    "a vector as a matrix": ({}, reshaped("output_norm.weight", (64, 1)), "has shape"),
    "another architecture": ({"general.architecture": "../../x"}, None, "cannot be rebuilt"),
    "a mixture of experts": ({"llama.expert_count": 4}, None, "mixtral, which cannot be rebuilt"),
    "more layers": ({"llama.block_count": 5}, None, "lacks blk.4"),
    "fewer layers": ({"llama.block_count": 3}, None, "holds 'blk.3"),
    "a million layers": ({"llama.block_count": 10**6}, None, "more than any model has"),
    "wide heads": ({"llama.attention.key_length": 32, "llama.attention.value_length": 32}, None, "for heads of 32"),
    "half a rope": ({"llama.rope.dimension_count": 8}, None, "rope.dimension_count = 8"),
    "a huge hidden size": ({"llama.embedding_length": 2**31}, None, "more than any model has"),
    "a negative epsilon": ({"llama.attention.layer_norm_rms_epsilon": -1.0}, None, "epsilon of the norms is -1.0"),
    "no epsilon": ({"llama.attention.layer_norm_rms_epsilon": None}, None, "epsilon of the norms is None"),
    "a base of 0.5": ({"llama.rope.freq_base": 0.5}, None, "base of the rope"),
    "another rope": ({"llama.rope.scaling.type": "longrope", "llama.rope.scaling.factor": 2.0}, None, "'longrope'"),
    "no factor": ({"llama.rope.scaling.type": "linear"}, None, "without a factor"),
    "yarn of no length": ({"llama.rope.scaling.type": "yarn", "llama.rope.scaling.factor": 2.0}, None, "context"),
    "a tokenizer of words": ({"tokenizer.ggml.model": "bert"}, None, "kind 'bert'"),
    "another pre-tokenizer": ({"tokenizer.ggml.pre": "../x"}, None, "is '../x', which is not known"),
    "no pre-tokenizer": ({"tokenizer.ggml.pre": None}, None, "is none"),
    "no tokens": ({"tokenizer.ggml.tokens": None}, None, "no list of tokens"),
    "too many tokens": ({"tokenizer.ggml.tokens": [f"t{i}" for i in range(600)]}, None, "600 tokens"),
    "a token twice": ({"tokenizer.ggml.tokens": ["a"] * 512}, None, "two ids for one token"),
    "types of too few": ({"tokenizer.ggml.token_type": [1, 1]}, None, "not one number for each"),
    "merges of nothing": ({"tokenizer.ggml.merges": ["a nowhere"]}, None, "merges 'a nowhere'"),
    "merges of three": ({"tokenizer.ggml.merges": ["a b c"]}, None, "merges 'a b c'"),
}  # fmt: skip


@pytest.mark.parametrize("case", HOSTILE)
def test_a_file_that_means_nothing_is_one_line(tmp_path, pico_models, case):
    settings, change, said = HOSTILE[case]
    export(pico_models("llama"), tmp_path / "m.gguf", "f32")
    found = gguf_edit.edited(tmp_path / "m.gguf", tmp_path / "n.gguf", settings, change)
    with pytest.raises(PareError) as caught:
        rebuild(found, tmp_path / "out" / "model")
    assert said in str(caught.value) and "\n" not in str(caught.value)
    assert not list((tmp_path / "out").iterdir()) if (tmp_path / "out").exists() else True


@pytest.mark.parametrize(("kind", "at"), [("Q8_0", 0), ("Q4_1", 2), ("MXFP4", 0)])
def test_scales_that_are_no_numbers_are_refused(tmp_path, pico_models, kind, at):
    export(pico_models("llama"), tmp_path / "m.gguf", "f32")
    source = gguf_edit.edited(tmp_path / "m.gguf", tmp_path / "n.gguf", change=gguf_edit.matrices(kind))
    raw = bytearray(source.read_bytes())
    tensor = next(t for t in gguf.GGUFReader(source).tensors if t.name == "blk.3.ffn_gate.weight")
    raw[tensor.data_offset + at : tensor.data_offset + at + 2] = b"\xff\xff"
    source.write_bytes(raw)
    with pytest.raises(PareError, match=r"layers\.3\.mlp\.gate_proj\.weight holds NaN"):
        rebuild(source, tmp_path / "back")
    assert not (tmp_path / "back").exists()


@pytest.mark.parametrize("number", [24, 15, 41])  # I8, Q8_K, Q1_0
def test_types_that_nobody_reads_are_refused(tmp_path, pico_models, number):
    export(pico_models("llama"), tmp_path / "m.gguf", "f32")
    raw = (tmp_path / "m.gguf").read_bytes()
    name = b"token_embd.weight"
    at = raw.index(name) + len(name) + 4 + 16
    (tmp_path / "n.gguf").write_bytes(raw[:at] + number.to_bytes(4, "little") + raw[at + 4 :])
    with pytest.raises((Unsupported, PareError), match=r"cannot be read|its rows of 64 values are not"):
        rebuild(tmp_path / "n.gguf", tmp_path / "back")


def test_an_existing_directory_is_refused_and_untouched(tmp_path, pico_models):
    export(pico_models("llama"), tmp_path / "m.gguf", "f32")
    (tmp_path / "back").mkdir()
    with pytest.raises(Refused):
        rebuild(tmp_path / "m.gguf", tmp_path / "back")
    assert not list((tmp_path / "back").iterdir())


def test_what_does_not_fit_on_the_disk_is_not_begun(tmp_path, pico_models, monkeypatch):
    export(pico_models("llama"), tmp_path / "m.gguf", "f32")
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("Usage", (), {"free": 1000}))
    with pytest.raises(PareError, match="free"):
        rebuild(tmp_path / "m.gguf", tmp_path / "out" / "back")
    assert not (tmp_path / "out").exists()


def test_memory_is_a_few_rows(tmp_path, monkeypatch):
    """An embedding of 36 MB, 134 in float32: neither is in memory. (To read any JSON takes 16.)"""
    import tracemalloc

    monkeypatch.setattr(gguf_model.tokenizer_files, "check", lambda directory: None)  # takes 64 MB to read any

    model = pico.make(tmp_path / "model", "llama", num_hidden_layers=1)
    export(model, tmp_path / "m.gguf", "f32")
    rows = 1 << 19
    wider = gguf_edit.edited(
        tmp_path / "m.gguf", tmp_path / "n.gguf", {"llama.vocab_size": rows},
        lambda name, v: (np.zeros((rows, 64), np.float32) if name == "token_embd.weight" else v,
                         "Q8_0" if v.ndim > 1 else "F32"),
    )  # fmt: skip
    tracemalloc.start()
    mx.reset_peak_memory()
    rebuild(wider, tmp_path / "back")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 24e6 and mx.get_peak_memory() < 12e6
    assert Checkpoint(tmp_path / "back").packing("model.embed_tokens") == Packing(8, 32)
