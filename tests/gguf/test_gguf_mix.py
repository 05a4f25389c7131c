"""Types and bytes of a GGUF of every kind against llama.cpp's own quantizing, and against published sizes."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import gguf
import llama_quantize
import pytest
from gguf_conversion import STEMS, metadata, named, parts

from mlx_pare.arch import Architecture, describe
from mlx_pare.arch.spec import Family, Layer, tensor
from mlx_pare.base.errors import UsageError
from mlx_pare.exporting import llama_cpp
from mlx_pare.exporting.export import export
from mlx_pare.gguf import header as gguf_header, quant_mixes
from mlx_pare.gguf.architectures import FILE_TYPES
from mlx_pare.gguf.quant_mixes import kinds, storage, type_of
from mlx_pare.gguf.types import nbytes
from mlx_pare.gguf.write import quantizer
from mlx_pare.model.checkpoint import Checkpoint
from mlx_pare.sources import catalogue


def needs_llama(test):
    missing = not llama_cpp.available()
    return pytest.mark.llama(pytest.mark.skipif(missing, reason="llama-cpp-python is not installed")(test))


# ---- models in every way that a block may be built ----

SIZES = {
    "kv_head": 2, "group": 4, "head_dim": 32, "ffn": 512, "expert": 16, "expert_ffn": 256, "shared_ffn": 512,
    "q_latent": 256, "kv_latent": 512, "nope_dim": 128, "rope_dim": 64, "v_dim": 256, "linear_k_head": 2,
    "linear_v_head": 4, "linear_k_dim": 64, "linear_v_dim": 64, "conv_kernel": 4,
}  # fmt: skip


def m(role: str, dims: str, stored: str = ""):
    return tensor(f"{role}.weight", dims, "ffn", role, stored=stored)


NORM = tensor("attn_norm.weight", "hidden", "norm", "attn_norm")
OUT = m("o_proj", "hidden, q_head*head_dim")
ATTENTION = (m("q_proj", "q_head*head_dim, hidden"), m("k_proj", "kv_head*head_dim, hidden"))
ATTENTION += (m("v_proj", "kv_head*head_dim, hidden"), OUT)
ATTENTION += (tensor("q_proj.bias", "q_head*head_dim", "attention", "q_proj_bias"), NORM)
FUSED = (m("qkv_proj", "q_head*head_dim + kv_head*head_dim + kv_head*head_dim, hidden"), OUT, NORM)
MLA = (m("q_a_proj", "q_latent, hidden"), m("q_b_proj", "q_head*nope_dim + q_head*rope_dim, q_latent"))
MLA += (m("kv_a_proj", "kv_latent + rope_dim, hidden"), m("kv_b_proj", "q_head*nope_dim + q_head*v_dim, kv_latent"))
MLA += (m("o_proj", "hidden, q_head*v_dim"), NORM)
K, V = "linear_k_head*linear_k_dim", "linear_v_head*linear_v_dim"
DELTA = (m("conv1d", f"{K} + {K} + {V}, conv_kernel, one", "float"), m("out_proj", f"hidden, {V}"))
DELTA += (tensor("A_log", "linear_v_head", "attention", "a_log"), NORM)
NEXT = (m("in_proj_qkvz", f"{K} + {K} + {V} + {V}, hidden"), m("in_proj_ba", "linear_v_head, hidden"), *DELTA)
QWEN35 = (m("in_proj_qkv", f"{K} + {K} + {V}, hidden"), m("in_proj_z", f"{V}, hidden"))
QWEN35 += (m("in_proj_a", "linear_v_head, hidden"), m("in_proj_b", "linear_v_head, hidden"), *DELTA)
CONV = (m("conv", "hidden, conv_kernel, one", "float"), m("conv_in", "hidden + hidden, hidden"))
CONV += (m("conv_out", "hidden, hidden"), NORM)
MAMBA = (m("in_proj", f"{V} + {K}, hidden"), *DELTA)
SWIGLU = (m("gate_proj", "ffn, hidden"), m("up_proj", "ffn, hidden"), m("down_proj", "hidden, ffn"))
WIDE = (m("gate_up_proj", "ffn + ffn, hidden"), m("down_proj", "hidden, ffn"))
ROUTER, DOWN = m("router", "expert, hidden", "8bit"), m("expert_down", "expert, hidden, expert_ffn")
EXPERTS = (ROUTER, m("expert_gate", "expert, expert_ffn, hidden"), m("expert_up", "expert, expert_ffn, hidden"), DOWN)
EXPERTS += (tensor("expert_down.bias", "expert, hidden", "ffn", "expert_down_bias"),)
GRANITE = (*EXPERTS, m("shared_gate_up", "shared_ffn + shared_ffn, hidden"), m("shared_down", "hidden, shared_ffn"))
WIDE_EXPERTS = (ROUTER, m("expert_gate_up", "expert, expert_ffn + expert_ffn, hidden"), DOWN)
SHARED = (m("shared_gate", "shared_ffn, hidden"), m("shared_up", "shared_ffn, hidden"))
SHARED += (m("shared_down", "hidden, shared_ffn"), m("shared_router", "one, hidden", "8bit"))
PER_LAYER = (m("embed_per_layer", "vocab, layer*layer_input"),)
PER_LAYER += (m("per_layer_model_projection", "layer*layer_input, hidden", "float"),)
ALTUP = (m("modality_router", "one + one, hidden"), m("correction_coefs", "one + one, one + one"))
ALTUP += (m("linear_left", "layer_input, hidden"),)


def model(name: str, layers: int, *blocks, tied: bool = False, hidden: int = 256, vocab: int = 512, more=(), **sizes):
    """Layers take the blocks in turn. A layer has the sizes of the axes that its tensors lie on."""
    ends = (m("embed_tokens", "vocab, hidden"), tensor("norm.weight", "hidden", "norm", "final_norm"))
    firsts = {CONV[0]: "conv", MAMBA[0]: "mamba", SWIGLU[1]: "feed_forward"}
    tables = {f"{firsts.get(block[0], 'full_attention')}+{i}": block for i, block in enumerate(blocks)}
    family = Family(name, (), {}, (*ends, m("lm_head", "vocab, hidden"), *more), tables, gguf=name)
    known = {**SIZES, **sizes}
    used = {
        kind: {axis for spec in table for d in spec.dims for segment in d for axis in segment}
        for kind, table in tables.items()
    }
    order = [list(tables)[i % len(tables)] for i in range(layers)]
    made = tuple(Layer(k, {a: n for a, n in known.items() if a in used[k] | {"kv_head", "group"}}) for k in order)
    return Architecture(family, {}, {"hidden": hidden, "vocab": vocab, "layer_input": 32}, made, tied)


DENSE = (*ATTENTION, *SWIGLU)
MODELS = {
    "llama": model("llama", 24, DENSE),
    "llama, tied, not grouped": model("llama", 9, DENSE, tied=True, group=1),
    "llama, groups of 8": model("llama", 32, DENSE, kv_head=1, group=8),
    "columns of 32": model("llama", 24, DENSE, hidden=320, ffn=352, head_dim=40),
    "tied, columns of 32": model("llama", 17, DENSE, hidden=320, ffn=352, head_dim=40, tied=True, group=2),
    "odd ffn": model("llama", 24, DENSE, ffn=500),
    "odd hidden": model("llama", 24, DENSE, hidden=500),
    "80 layers": model("llama", 80, DENSE),
    "80 layers, not grouped": model("llama", 80, DENSE, group=1),
    "qwen2 of 80 layers": model("qwen2", 80, DENSE, group=1),
    "qwen3 of 80 layers": model("qwen3", 80, DENSE),
    "gemma3": model("gemma3", 26, DENSE, tied=True, kv_head=1, group=4),
    "phi3": model("phi3", 32, (*FUSED, *WIDE), group=1),
    "mixtral": model("llama", 32, (*ATTENTION, *EXPERTS), expert=8),
    "mixtral of 80 layers": model("llama", 80, (*ATTENTION, *EXPERTS), expert=8, group=2),
    "80 layers with 16 experts": model("llama", 80, (*ATTENTION, *EXPERTS), group=2),
    "four experts": model("qwen3moe", 20, (*ATTENTION, *EXPERTS), expert=4, group=1),
    "two experts": model("qwen3moe", 20, (*ATTENTION, *EXPERTS), expert=2, group=1, tied=True),
    "shared experts": model("qwen2moe", 24, (*ATTENTION, *EXPERTS, *SHARED), group=1),
    "dense layers between": model("qwen3moe", 25, DENSE, (*ATTENTION, *EXPERTS), (*ATTENTION, *SHARED, *EXPERTS)),
    "experts beside dense": model("gemma4", 24, (*DENSE, *WIDE_EXPERTS), tied=True),
    "gpt-oss": model("gpt-oss", 24, (*ATTENTION, *EXPERTS), hidden=96, expert_ffn=96, expert=32),
    "embeddings per layer": model("gemma4", 30, DENSE, tied=True, more=PER_LAYER),
    "embeddings per layer, untied": model("gemma4", 30, DENSE, more=PER_LAYER),
    "alternating updates": model("gemma3n", 30, (*DENSE, *ALTUP), tied=True, more=PER_LAYER),
    "one thing per layer": model("nemotron_h", 40, MAMBA, SWIGLU[1:], ATTENTION, SWIGLU[1:]),
    "state space and experts": model("granitehybrid", 30, (*MAMBA, *GRANITE), (*ATTENTION, *GRANITE), tied=True),
    "latent attention": model("deepseek2", 27, (*MLA, *SWIGLU), (*MLA, *EXPERTS, *SHARED)),
    "delta net": model("qwen3next", 48, *[(*NEXT, *EXPERTS, *SHARED)] * 3, (*ATTENTION, *EXPERTS, *SHARED)),
    "qwen3.5": model("qwen35", 24, *[(*QWEN35, *SWIGLU)] * 3, DENSE, tied=True),
    "short convolutions": model("lfm2", 16, (*CONV, *SWIGLU), DENSE, DENSE, tied=True),
}


def squeezed(shape: tuple[int, ...], most: int = 2) -> tuple[int, ...]:
    """The shape with few rows and experts, and as converters squeeze it: a convolution has two dimensions."""
    shape = shape[:-1] if len(shape) > 2 and shape[-1] == 1 else shape
    return tuple(min(n, most) for n in shape[:-1]) + shape[-1:]


def settings(arch: Architecture) -> dict:
    """Keys with which llama.cpp reads a file of any of these architectures: what counts, and what it insists on."""
    first, layers = arch.layers[0].sizes, len(arch.layers)
    kv_heads = [first["kv_head"] if layer.kind.startswith("full") else 0 for layer in arch.layers]
    if any("kv_latent" in layer.sizes for layer in arch.layers):
        kv_heads = [1] * layers
    experts = max(layer.sizes.get("expert", 0) for layer in arch.layers)
    return {
        "context_length": 512, "feed_forward_length": 512, "vocab_size": 512, "attention.key_length": 32,
        "embedding_length": arch.sizes["hidden"], "embedding_length_per_layer_input": 32, "full_attention_interval": 4,
        "expert_count": experts, "expert_used_count": min(2, experts), "expert_feed_forward_length": 256,
        "expert_shared_count": 1, "expert_weights_scale": 1.0, "expert_gating_func": 2, "leading_dense_block_count": 1,
        "attention.head_count": first["kv_head"] * first["group"], "attention.head_count_kv": kv_heads,
        "attention.key_length_swa": 32, "attention.value_length_swa": 32, "attention.shared_kv_layers": 0,
        "attention.q_lora_rank": 64, "attention.kv_lora_rank": 64, "attention.layer_norm_rms_epsilon": 1e-5,
        "attention.layer_norm_epsilon": 1e-5,
        "attention.sliding_window": 512, "attention.sliding_window_pattern": [i % 2 == 0 for i in range(layers)],
        "rope.dimension_count": 32, "rope.dimension_count_swa": 32, "rope.dimension_sections": [11, 11, 10, 0],
        "rope.scaling.original_context_length": 512, "ssm.conv_kernel": 4, "ssm.inner_size": 256, "ssm.state_size": 32,
        "ssm.time_step_rank": 4, "ssm.group_count": 2, "shortconv.l_cache": 3,
    }  # fmt: skip


def dry_run(
    models: dict[str, Architecture], tried: list[str], root: Path, by_matrix: tuple[str, ...] = ()
) -> dict[str, dict[str, dict[str, str]]]:
    """For every model and kind, what llama.cpp would make of each tensor; ``by_matrix``: kinds that get an importance
    matrix beside those that need one."""
    jobs = []
    for number, arch in enumerate(models.values()):
        tensors = {name: squeezed(shape) for t in arch.tensors() for name, shape in parts(arch, t)}
        keys, path = settings(arch), root / f"{number}.gguf"
        if arch.config:  # a published model
            keys = {k: v for k, v in keys.items() if k not in ("rope.dimension_count", "attention.key_length")}
            keys |= metadata(arch)
        llama_quantize.write(path, named(arch), tensors, len(arch.layers), keys)
        for kind in tried:
            matrix = {"anything": 1} if kind in (*llama_quantize.NEEDS_MATRIX, *by_matrix) else None
            jobs.append({"gguf": str(path), "kind": kind, "imatrix": matrix, "out": None})
    found = iter(llama_quantize.types(jobs, root))
    return {name: {kind: next(found) for kind in tried} for name in models}


@pytest.fixture(scope="module")
def judged(tmp_path_factory) -> dict:
    return dry_run(MODELS, kinds(), tmp_path_factory.mktemp("mix"))


# where an importance matrix changes something, and some where it does not
BY_MATRIX = ("q4_0", "q5_0", "q4_1", "iq4_nl", "iq4_xs", "q4_k_s", "q3_k_m", "iq3_s", "q8_0")


@pytest.fixture(scope="module")
def judged_with_matrix(tmp_path_factory) -> dict:
    return dry_run(MODELS, list(BY_MATRIX), tmp_path_factory.mktemp("matrix"), BY_MATRIX)


# without apertus, whose activation is metadata under a name of its own
CATALOGUE = {e.name: describe(e.config) for e in catalogue.entries() if e.config["model_type"] != "apertus"}


KNOWN = {arch.config["model_type"]: arch for arch in CATALOGUE.values()}  # one of each type


@pytest.fixture(scope="module")
def judged_catalogue(tmp_path_factory) -> dict:
    return dry_run(KNOWN, ["q3_k_m", "q4_k_m", "iq2_s"], tmp_path_factory.mktemp("catalogue"))


def agrees(arch: Architecture, kind: str, theirs: dict[str, str], matrix: bool | None = None) -> list[tuple]:
    """The tensors whose type or bytes are other than llama.cpp's."""
    ours, size, different = type_of(arch, kind, matrix), storage(arch, kind, matrix), []
    for t in arch.tensors():
        expected = [(theirs[part], shape) for part, shape in parts(arch, t)]
        if t.spec.role in quant_mixes.HALF:  # stays what it was, here float32, in real files bfloat16
            assert expected[0][0] == "F32" and ours(t) in ("F32", "F16", "BF16")
        elif ours(t) != " + ".join(dict.fromkeys(kind for kind, _ in expected)):
            different.append((kind, t.name, ours(t), expected))
        else:
            assert size(t) == sum(nbytes(*piece) for piece in expected)
    return different


@needs_llama
@pytest.mark.parametrize("name", MODELS)
def test_every_tensor_has_the_type_that_llama_cpp_gives_it(judged, name):
    refused = [kind for kind, theirs in judged[name].items() if "refused" in theirs]
    assert not refused
    assert not [d for kind, theirs in judged[name].items() for d in agrees(MODELS[name], kind, theirs)]


@needs_llama
@pytest.mark.parametrize("name", MODELS)
def test_with_an_importance_matrix_too(judged_with_matrix, name):
    assert not [
        d for kind, theirs in judged_with_matrix[name].items() for d in agrees(MODELS[name], kind, theirs, True)
    ]


def test_an_importance_matrix_changes_some_types():
    """Or the test above would compare what does not differ."""
    arch = MODELS["llama"]
    both = {kind: (type_of(arch, kind, True), type_of(arch, kind)) for kind in BY_MATRIX}
    changed = {kind for kind, (by, without) in both.items() for t in arch.tensors() if by(t) != without(t)}
    assert changed == {"q4_0", "q5_0", "iq4_nl", "iq4_xs"}


@needs_llama
@pytest.mark.parametrize("name", KNOWN)
def test_well_known_models_too(judged_catalogue, name):
    for kind, theirs in judged_catalogue[name].items():
        assert "refused" not in theirs, theirs
        assert not agrees(KNOWN[name], kind, theirs)


def test_the_models_use_names_that_gguf_has():
    known = {name.rpartition(".{bid}.")[2] for name in gguf.TENSOR_NAMES.values()}
    assert set(STEMS.values()) <= known


# ---- files that our export wrote and llama-quantize quantized ----

SMALL = {"hidden_size": 256, "intermediate_size": 256, "num_attention_heads": 8, "head_dim": 32}
FILES = {
    "llama": ("llama-untied", {**SMALL, "num_hidden_layers": 8, "num_key_value_heads": 1}),
    "llama, tied": ("llama", {**SMALL, "num_hidden_layers": 5, "num_attention_heads": 2, "num_key_value_heads": 2}),
    "qwen2": ("qwen2", {"hidden_size": 320, "intermediate_size": 352, "num_hidden_layers": 8}),
    "qwen3": ("qwen3", {**SMALL, "num_hidden_layers": 5, "tie_word_embeddings": False, "num_key_value_heads": 2}),
    "gemma3_text": ("gemma3_text", {**SMALL, "num_hidden_layers": 8, "intermediate_size": 288}),
}
# The dry runs judge all kinds; here those are left out whose tables take llama.cpp seconds to set up
SLOW = {"iq1_s", "iq1_m", "iq2_xxs", "iq2_xs", "iq2_s", "iq2_m", "iq3_xxs", "iq3_xs"}
QUICK = [kind for kind in kinds() if kind not in SLOW]


@needs_llama
@pytest.mark.parametrize("name", FILES)
def test_files_of_every_kind_are_predicted_to_the_byte(tmp_path, pico_models, name):
    """The first model in every kind, the others in every third one, each beginning with another."""
    family, changes = FILES[name]
    number = list(FILES).index(name)
    tried = QUICK[number % 3 :: 3] if number else QUICK
    directory, source = pico_models(family, **changes), tmp_path / "f32.gguf"
    export(directory, source, "f32")
    columns = {n: t.shape[-1] for n, t in gguf_header.read(source).tensors.items() if len(t.shape) > 1}
    jobs = [
        {"gguf": str(source), "kind": kind, "out": str(tmp_path / kind)}
        | {"imatrix": columns if kind in llama_quantize.NEEDS_MATRIX else None}
        for kind in tried
    ]
    assert not [answer for answer in llama_quantize.types(jobs, tmp_path) if "refused" in answer]
    arch = Checkpoint(directory).arch
    for kind in tried:
        header = gguf_header.read(tmp_path / kind)
        assert not agrees(arch, kind, {n: t.type for n, t in header.tensors.items()})
        assert header.tensor_bytes == sum(map(storage(arch, kind), arch.tensors()))


@pytest.mark.parametrize("changes", [{}, {"intermediate_size": 72}])
def test_our_own_export_writes_the_same_types(tmp_path, pico_models, changes):
    directory = pico_models("llama", **changes)
    arch = Checkpoint(directory).arch
    for kind in quantizer.DIRECT:
        export(directory, tmp_path / kind, kind)
        assert not agrees(arch, kind, {n: t.type for n, t in gguf_header.read(tmp_path / kind).tensors.items()})


def test_the_kinds_that_can_be_written():
    assert set(kinds()) - set(FILE_TYPES) == set(quantizer.REASONS)
    for kind, number in FILE_TYPES.items():
        name = "ALL_F32" if kind == "f32" else f"MOSTLY_{kind.upper()}"
        assert gguf.LlamaFileType[name] == number


# ---- published sizes ----

# bits per weight of Llama-3.1-8B, tools/quantize/README.md of llama.cpp at 311c2c9
BITS_8B = {
    "iq1_s": 2.0042, "iq1_m": 2.1460, "iq2_xxs": 2.3824, "iq2_xs": 2.5882, "iq2_s": 2.7403, "iq2_m": 2.9294,
    "iq3_xxs": 3.2548, "iq3_xs": 3.4977, "iq3_s": 3.6606, "iq3_m": 3.7628, "iq4_xs": 4.4597, "iq4_nl": 4.6818,
    "q2_k_s": 2.9697, "q2_k": 3.1593, "q3_k_s": 3.6429, "q3_k_l": 4.2979, "q4_k_s": 4.6672, "q4_k_m": 4.8944,
    "q5_k_s": 5.5704, "q5_k_m": 5.7036, "q6_k": 6.5633, "q8_0": 8.5008, "f16": 16.0005,
}  # fmt: skip
# GB (10^9) of bartowski's Llama-3.1-70B files, header included. Made with an importance matrix, so without q4_0 and
# iq4_xs, which it changes.
FILES_70B = {
    "q8_0": 74.98, "q6_k": 57.89, "q5_k_m": 49.95, "q5_k_s": 48.66, "q4_k_m": 42.52, "q4_k_s": 40.35, "q3_k_l": 37.14,
    "q3_k_m": 34.27, "iq3_m": 31.94, "q3_k_s": 30.91,
}  # fmt: skip
# GiB of bartowski's Llama-3-70B files as matt-c1/llama-3-quant-comparison measured them, header (0.007) included
GIB_70B = {
    "q5_k_m": 46.52, "iq3_m": 29.74, "iq3_xxs": 25.58, "iq2_m": 22.46, "iq2_s": 20.71, "iq2_xs": 19.69,
    "iq2_xxs": 17.79, "iq1_m": 15.60, "iq1_s": 14.29,
}  # fmt: skip
# GiB of tensors as llama-bench prints them, of files made by llama-quantize without overrides: LLaMA-2 7B in llama.cpp
# discussion 4167, the others in many reports
BENCH = {
    "llama-2-7b": {"f16": 12.55, "q8_0": 6.67, "q4_0": 3.56},
    "llama-3-70b": {"q4_k_m": 39.59, "q2_k": 24.56, "iq3_xs": 27.29},
    "mixtral-8x7b": {"q4_k_m": 26.49},
    "qwen3-30b-a3b": {"q4_k_m": 17.28},
    "qwen3.5-27b": {"q4_k_m": 15.40},
    "qwen3.6-35b-a3b": {"q4_k_m": 19.70},
    "deepseek-v2-lite": {"q4_k_m": 9.65},
    "gpt-oss-20b": {"mxfp4_moe": 11.27},
    "gpt-oss-120b": {"mxfp4_moe": 59.02},
}
HEADER = 7.9e6  # a vocabulary of 128,256 tokens with its merges


def size_of(arch: Architecture, kind: str) -> int:
    return sum(map(storage(arch, kind), arch.tensors()))


def test_published_bits_of_llama_8b():
    arch = CATALOGUE["llama-3.1-8b"]
    count = sum(t.size for t in arch.tensors())
    for kind, bits in BITS_8B.items():
        assert 8 * size_of(arch, kind) / count == pytest.approx(bits, abs=6e-5), kind


def test_published_files_of_llama_70b():
    arch = CATALOGUE["llama-3-70b"]
    for kind, size in FILES_70B.items():
        assert size_of(arch, kind) + HEADER == pytest.approx(size * 1e9, rel=3e-4), kind
    for kind, size in GIB_70B.items():
        assert size_of(arch, kind) + HEADER == pytest.approx(size * 2**30, rel=5e-4), kind


@pytest.mark.parametrize("name", BENCH)
def test_sizes_that_llama_bench_prints(name):
    for kind, size in BENCH[name].items():
        assert size_of(CATALOGUE[name], kind) / 2**30 == pytest.approx(size, abs=0.0051), kind


def test_a_published_size_to_the_byte():
    """model_size in llama-bench's JSON of Qwen3-4B-Instruct-2507-Q4_K_M.gguf."""
    assert size_of(CATALOGUE["qwen3-4b-2507"], "q4_k_m") == 2491323904


# ---- asking ----


def test_what_falls_back():
    arch = MODELS["odd ffn"]
    found = {
        t.spec.role: (*quant_mixes.types_of(arch, "q4_k_m", wide=True)(t), type_of(arch, "q4_k_m")(t))
        for t in arch.tensors()
    }
    assert {role: pair for role, pair in found.items() if pair[0] != pair[1]} == {"down_proj": ("Q6_K", "F16")}
    assert found["lm_head"] == ("Q6_K", "Q6_K") and found["attn_norm"] == ("F32", "F32")


def test_kinds():
    asked = "f32 f16 bf16 q4_0 q4_1 q5_0 q5_1 q8_0 q2_k q2_k_s q3_k_s q3_k_m q3_k_l q4_k_s q4_k_m q5_k_s q5_k_m q6_k"
    asked += " iq1_s iq1_m iq2_xxs iq2_xs iq2_s iq2_m iq3_xxs iq3_xs iq3_s iq3_m iq4_nl iq4_xs tq1_0 tq2_0 mxfp4_moe"
    assert kinds() == asked.split()
    first = next(MODELS["llama"].tensors())
    assert type_of(MODELS["llama"], "Q4_K_M")(first) == type_of(MODELS["llama"], "q4_k_m")(first) == "Q4_K"


@pytest.mark.parametrize(("kind", "near"), [("q4km", "q4_k_m"), ("Q4_K", "q4_k_m"), ("iq3", "iq3_s"), ("fp16", "f16")])
@pytest.mark.parametrize("ask", [type_of, storage])
def test_an_unknown_kind_is_refused_with_near_ones(ask, kind, near):
    with pytest.raises(UsageError, match=f"no GGUF kind '{kind}'.*Choose one of .*{near}") as error:
        ask(MODELS["llama"], kind)
    assert len(str(error.value)) < 120


def test_an_unknown_kind_like_no_other_is_refused_with_all():
    with pytest.raises(UsageError, match=r"Choose one of f32, f16, .*mxfp4_moe"):
        storage(MODELS["llama"], "zzzzzz")


def test_a_tensor_stored_as_two_names_both_types():
    latent = next(t for t in MODELS["latent attention"].tensors() if t.spec.role == "kv_b_proj")
    assert type_of(MODELS["latent attention"], "q4_k_m")(latent) == "Q5_0 + Q4_K"  # columns of 128, and of 512
    assert type_of(MODELS["latent attention"], "q8_0")(latent) == "Q8_0"


def test_a_norm_is_float32_and_a_matrix_of_odd_columns_float16():
    arch = MODELS["odd ffn"]
    types = {t.spec.role: type_of(arch, "q4_k_m")(t) for t in arch.tensors() if t.layer == 0}
    assert types["attn_norm"] == types["q_proj_bias"] == "F32" and types["down_proj"] == "F16"


def test_pruned_widths_that_differ_between_layers():
    arch = MODELS["llama"]
    narrow = Layer(arch.layers[1].kind, {**arch.layers[1].sizes, "ffn": 352})
    arch = dataclasses.replace(arch, layers=(arch.layers[0], narrow, *arch.layers[2:]))
    down = [t for t in arch.tensors() if t.spec.role == "down_proj"]
    assert [type_of(arch, "q4_k_m")(t) for t in down[:4]] == ["Q6_K", "Q8_0", "Q6_K", "Q4_K"]
