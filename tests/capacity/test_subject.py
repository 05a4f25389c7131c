"""fit asked about anything: directories, configs, GGUF files, runs, the hub, the catalogue; broken and unknown ones."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from math import prod
from pathlib import Path

import mlx.core as mx
import numpy as np
import pico
import pytest
from hub_server import Repo
from huggingface_hub import constants
from safetensors.numpy import save_file

from mlx_pare.arch import describe
from mlx_pare.base.errors import PareError, UsageError
from mlx_pare.capacity import macs
from mlx_pare.capacity.fit import fit
from mlx_pare.capacity.form import Form
from mlx_pare.capacity.memory import Use
from mlx_pare.capacity.subject import open_subject
from mlx_pare.cli import main as cli
from mlx_pare.exporting.export import export
from mlx_pare.model import footprint
from mlx_pare.model.checkpoint import Checkpoint
from mlx_pare.pipeline import steps
from mlx_pare.planning.goal import Options
from mlx_pare.planning.plan import plan
from mlx_pare.pruning.plan_file import Plan
from mlx_pare.pruning.prune import prune
from mlx_pare.sources import catalogue
from mlx_pare.store.arrays import Arrays
from mlx_pare.tensors.safetensors import read_header
from tests.gguf.test_gguf_header import build, row, s, u32

FORMS = {"4": Form.named("4"), "mxfp4": Form.named("mxfp4"), "16": Form.named("16"), "gguf": Form.named(gguf="q4_k_m")}
ENTRIES = {entry.name: entry for entry in catalogue.entries()}
NOT_DROPPED = {"gemma-4-e4b"}  # published with keys and values that mlx-lm drops, see its note
BYTES = ("weights_bytes", "kv_bytes", "activation_bytes", "total_bytes", "fits", "verdict", "max_context")


@pytest.fixture
def refused(pare) -> Callable[..., str]:
    """``fit`` of this fails with one line and this code; returns the line."""

    def call(code: int, *arguments) -> str:
        found, out, err = pare("fit", *arguments)
        assert (found, out) == (code, ""), err
        assert err.count("\n") == 1 and err.startswith("mlx-pare: ") and "internal error" not in err, err
        return err

    return call


def on_disk(directory: Path) -> int:
    return sum(e.nbytes for f in directory.glob("model*.safetensors") for e in read_header(f).values())


def answer(model, form: Form | None = None, mac: str = "m4-24gb", **use) -> dict:
    found = fit(model, [mac], Use(**use), form)
    json.dumps(found, allow_nan=False)
    return found


def bytes_of(found: dict) -> dict:
    return {key: found["rows"][0][key] for key in BYTES}


def written(folder: Path, config: object) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(config if isinstance(config, str) else json.dumps(config))
    return folder


# ---- the catalogue ----


@pytest.mark.parametrize("name", ENTRIES)
def test_every_model_has_an_answer_for_every_mac(name):
    entry = ENTRIES[name]
    for form in FORMS.values():
        found = fit(name, form=form)
        assert len(found["rows"]) >= len(macs.every()) and found["origin"] == "catalogue"
        counted = found["parameters"]["total"]
        if entry.parameters and name not in NOT_DROPPED:
            assert counted == pytest.approx(entry.parameters, rel=0.002)
        widths = {"16": 16, "4": 4.5, "mxfp4": 4.25}
        for key, width in widths.items():
            if form is FORMS[key]:
                assert found["weights_bytes"] == pytest.approx(counted * width / 8, rel=0.05)
        for r in found["rows"]:
            assert r["total_bytes"] == r["weights_bytes"] + r["kv_bytes"] + r["activation_bytes"]
            assert r["fits"] == (r["total_bytes"] <= r["budget_bytes"])
        assert found["runtime"] == ("llama.cpp" if form.gguf else "mlx")


def test_names_aliases_and_hub_ids_in_any_case():
    known: dict[str, str] = {}
    for entry in catalogue.entries():
        for name in {entry.name, *entry.aliases, *entry.like, entry.hub.lower()}:
            assert known.setdefault(name, entry.name) == entry.name, name  # nothing means two models
            assert name == name.lower() and catalogue.find(f" {name.upper()} ") is entry
    for name in ("Qwen3:4B", "LLAMA3:8b", "Mistral"):
        assert open_subject(name, Form()).origin == "catalogue"


def test_hub_ids_of_the_catalogue_are_known_offline(pare):
    for name in ("qwen/QWEN3-4b", "Qwen/Qwen3-4B@main"):
        found = answer(name)
        assert found["origin"] == "catalogue" and bytes_of(found) == bytes_of(answer("qwen3-4b"))
        assert "HF_HUB_OFFLINE" in found["notes"][0] and "catalogue" in found["notes"][0]


@pytest.mark.parametrize("name, near", [("qwen3-33b", "qwen3-32b"), ("qwen4-4b", "qwen3-4b"), ("xyzzy", ".gguf"),
                                        ("", "config.json"), ("a/b/c", "hub id"), ("../x", "hub id")])  # fmt: skip
def test_unknown_names(refused, name, near):
    assert near in refused(2, name)


def test_an_unknown_hub_id_is_a_failure(refused):
    assert "offline" in refused(1, "org/model")


def test_what_is_assumed_is_said():
    assert any("4 bits" in note for note in answer("qwen3-4b")["notes"])
    assert any("4 bits" in note for note in answer("deepseek-v3")["notes"])  # nobody runs it unpacked
    assert answer("gpt-oss-20b")["form"] == "mxfp4 experts"
    assert any("recalled" in note for note in answer("codestral-22b")["notes"])
    assert not answer("qwen3-4b", FORMS["4"])["notes"]


# ---- directories ----


@pytest.mark.parametrize("family", sorted(pico.FAMILIES))
@pytest.mark.parametrize("packed", [None, (4, 32)], ids=["dense", "4bit"])
@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16], ids=["f32", "bf16"])
def test_a_directory_is_what_its_files_hold(pico_models, family, packed, dtype):
    model, width = pico_models(family, packed, dtype=dtype), 4 if dtype == mx.float32 else 2
    subject = open_subject(str(model), Form())
    assert subject.weights.nbytes == on_disk(model) and subject.value_bytes == width
    assert subject.described == ("MLX, 4 bits in groups of 32" if packed else "float32" if width == 4 else "bfloat16")
    assert footprint.weight_bytes(subject.arch, subject.storage) == on_disk(model)
    values, window = footprint.cache_values(subject.arch), subject.arch.config.get("sliding_window") or 8192
    assert answer(model)["rows"][0]["kv_bytes"] == width * (8192 * values.growing + window * values.windowed)


@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma3_text"])
@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16], ids=["f32", "bf16"])
def test_another_form_is_predicted_as_mlx_lm_makes_it(pico_models, tmp_path, family, dtype):
    """--bits against mlx-lm's own packing of the same directory, whose scales have the width of the model."""
    model = pico_models(family, dtype=dtype)
    for bits, group in ((4, 32), (8, 64)):
        made = pico.quantize(model, tmp_path / f"{bits}", bits, group)
        form = Form.named(str(bits), group)
        assert open_subject(str(model), form).weights.nbytes == on_disk(made)
        assert bytes_of(answer(model, form)) == bytes_of(answer(made))
    sixteen = open_subject(str(model), Form.named("16"))
    assert sixteen.weights.nbytes == 2 * footprint.parameters(sixteen.arch)["total"] and sixteen.value_bytes == 2
    file = tmp_path / "m.gguf"
    done = export(model, file, "q8_0")
    assert open_subject(str(model), Form.named(gguf="q8_0")).weights.nbytes == done["tensor_bytes"]
    assert bytes_of(answer(model, Form.named(gguf="q8_0"))) == bytes_of(answer(file))  # the cache is f16 in both


def harmed(model: Path, place: Path, what: str) -> Path:
    copy = Path(shutil.copytree(model, place / "harmed"))
    shard = copy / "model.safetensors"
    if what == "cut off":
        shard.write_bytes(shard.read_bytes()[:-1000])
    elif what == "missing shard":
        shard.rename(copy / "model-00001-of-00002.safetensors")
        index = {"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}}
        (copy / "model.safetensors.index.json").write_text(json.dumps(index))
    elif what == "index alone":
        shard.unlink()
        (copy / "model.safetensors.index.json").write_text('{"weight_map": {"a": "model.safetensors"}}')
    else:
        weights = mx.load(str(shard))
        weights.pop("model.layers.1.mlp.down_proj.weight")
        mx.save_safetensors(str(shard), weights)
    return copy


BROKEN = {
    "cut off": "its header describes",
    "missing shard": "lacks model-00002",
    "index alone": r"model\*?\.safetensors",
    "tensor": "down_proj",
}


@pytest.mark.parametrize("what, words", BROKEN.items())
@pytest.mark.parametrize("form", [[], ["--bits", "4"], ["--gguf", "q4_k_m"]], ids=["", "bits", "gguf"])
def test_broken_directories(refused, pico_models, tmp_path, what, words, form):
    assert re.search(words, refused(1, harmed(pico_models("llama"), tmp_path, what), *form))


HOSTILE = {
    "text_config": ["no", [], {"model_type": "llama"}],
    "quantization": ["4bit", {"bits": 0, "group_size": 64}, {"bits": -4, "group_size": 64}, {"group_size": 64},
                     {"bits": 4, "group_size": 0}, {"bits": 4, "group_size": 64, "mode": ["affine"]}, [4, 64],
                     {"bits": 4, "group_size": 64, "model.layers.0.mlp.gate_proj": {"bits": 7}}],
    "layer_types": [["full_attention"], "full_attention", [["full_attention"]] * 36, [None] * 36],
    "hidden_size": [10**30, -1, 2.5, "2560", [[2560]], float("nan"), None],
    "num_hidden_layers": [0, 10**30, float("inf"), 10**6, 2**31 - 1],
    "intermediate_size": [10**9],
    "model_type": [["qwen3"], None, {}, 5],
    "num_key_value_heads": [7, 0, 10**18],
    "sliding_window": [-1, "x", [1]],
    "max_position_embeddings": ["x", -5, [1], 10**30, 2.5],
    "torch_dtype": [["float32"], 5],
    "quantization_config": [[], "fp8", {"quant_method": ["fp8"]}, {"quant_method": "gptq", "bits": "four"}],
    "filler": ["x" * 10_000_000],
}  # fmt: skip
CASES = [(key, number) for key, values in HOSTILE.items() for number in range(len(values))]


@pytest.mark.parametrize("key, number", CASES)
@pytest.mark.parametrize("name", ["qwen3-4b", "gemma-3-4b", "qwen3.5-35b-a3b"])
def test_hostile_configs(tmp_path, name, key, number):
    """An answer that is a JSON document and makes sense, or an error of one line; alone, and beside weights."""
    config = dict(ENTRIES[name].config)
    inner = config.get("text_config")
    if inner and key not in ("text_config", "model_type", "quantization", "quantization_config"):
        config["text_config"] = {**inner, key: HOSTILE[key][number]}
    else:
        config[key] = HOSTILE[key][number]
    folder = written(tmp_path / "model", config)
    for subject in (folder / "config.json", folder):
        try:
            found = answer(subject)
        except PareError as error:
            assert "\n" not in str(error) and len(str(error)) < 700
            continue
        assert found["weights_bytes"] > 0 and all(
            r["total_bytes"] is None or r["total_bytes"] > 0 for r in found["rows"]
        )
        if key == "quantization":
            pytest.fail("a packing that MLX does not have was believed")
        save_file({"model.norm.weight": np.zeros(4, np.float16)}, folder / "model.safetensors")


def test_what_is_no_config_at_all(refused, tmp_path):
    for raw, words in (("[]", "expected an object"), ("{", "not valid JSON"), ("{}", "neither a config"),
                       ("[" * 100_000, "not valid JSON"), ('"\ud83d', "JSON")):  # fmt: skip
        path = tmp_path / "config.json"
        path.write_bytes(raw.encode("utf-8", "surrogatepass"))
        assert words in refused(1 if raw != "{}" else 2, path)


def listed(folder: Path, config: dict, tensors: dict[str, np.ndarray]) -> Path:
    save_file(tensors, written(folder, config) / "model.safetensors")
    return folder


def test_a_type_nobody_knows_gives_bytes(tmp_path, pare):
    tensors = {f"blocks.{i}.w": np.zeros((64, 64), np.float16) for i in range(3)}
    folder = listed(tmp_path / "m", {"model_type": "mamba9"}, tensors)
    found = answer(folder)
    nothing_known = found["rows"][0]
    assert found["weights_bytes"] == on_disk(folder) == 3 * 8192 and found["parameters"] is None
    assert nothing_known["fits"] is None and nothing_known["verdict"] == "unknown" and nothing_known["kv_bytes"] is None
    assert "mamba9" in found["notes"][0] and found["alternatives"] == {} and found["curve"] == []
    small = fit(folder, ["m4-24gb"], budget=macs.Budget(limit_bytes=20_000))
    assert small["rows"][0]["fits"] is False and small["rows"][0]["verdict"] == "over"
    assert "as it is stored" in " ".join(answer(folder, FORMS["4"])["notes"])
    code, out, _ = pare("fit", folder)
    assert code == 0 and "unknown" in out


# ---- experts, as mlx-lm stores them and as the hub does ----

MOE = {
    "model_type": "qwen3_moe", "hidden_size": 64, "num_hidden_layers": 3, "intermediate_size": 128, "head_dim": 32,
    "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 96, "rms_norm_eps": 1e-6, "num_experts": 4,
    "num_experts_per_tok": 2, "moe_intermediate_size": 64, "decoder_sparse_step": 1, "mlp_only_layers": [],
    "norm_topk_prob": True, "tie_word_embeddings": True, "max_position_embeddings": 4096, "rope_theta": 1e6,
}  # fmt: skip


def experts_apart(tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """mlx-lm's stacks under the hub's names: one tensor for each expert."""
    found = {}
    for name, array in tensors.items():
        if ".switch_mlp." in name:
            found |= {name.replace("switch_mlp", f"experts.{i}"): part for i, part in enumerate(array)}
        else:
            found[name] = array
    return found


@pytest.fixture
def sparse() -> dict[str, np.ndarray]:
    return {t.name: np.zeros(t.shape, np.float16) for t in describe(MOE).tensors()}


def test_experts_in_the_naming_of_mlx_lm_and_of_the_hub(tmp_path, sparse):
    stacked = listed(tmp_path / "mlx", MOE, sparse)
    extra = {
        "lm_head.weight": np.zeros((96, 64), np.float16),  # stored although tied
        "model.visual.blocks.0.w": np.zeros((64, 64), np.float16),
        "model.vision_tower.w": np.zeros((64, 64), np.float16),
        "mtp.layers.0.mlp.w": np.zeros((64, 64), np.float16),
        "model.layers.3.self_attn.q_proj.weight": np.zeros((64, 64), np.float16),  # a block behind the last
        "model.layers.0.self_attn.rotary_emb.inv_freq": np.zeros(16, np.float32),
    }
    apart = listed(tmp_path / "hub", MOE, experts_apart(sparse) | extra)
    expected = sum(a.nbytes for a in sparse.values())
    for folder in (stacked, apart):
        found = answer(folder)
        assert found["weights_bytes"] == expected == on_disk(stacked) and not found["notes"]
        assert found["form"] == "bfloat16" and found["origin"] == "directory"
    assert bytes_of(answer(stacked)) == bytes_of(answer(apart))
    assert answer(apart, FORMS["4"])["weights_bytes"] == answer(stacked, FORMS["4"])["weights_bytes"] < expected / 2
    wide = {n: a.astype(np.float32) for n, a in sparse.items()}
    subject = open_subject(str(listed(tmp_path / "wide", MOE, wide)), Form())
    assert (subject.described, subject.value_bytes, subject.weights.nbytes) == ("float32", 4, 2 * expected)


def test_experts_that_are_lost_or_too_many(tmp_path, sparse, refused):
    lost = {n: a for n, a in sparse.items() if n != "model.layers.1.mlp.switch_mlp.up_proj.weight"}
    assert "lacks model.layers.1.mlp.switch_mlp.up_proj.weight" in refused(1, listed(tmp_path / "lost", MOE, lost))
    apart = experts_apart(sparse)
    fewer = {n: a for n, a in apart.items() if ".experts.3." not in n}
    assert "missing" in answer(listed(tmp_path / "fewer", MOE, fewer))["notes"][0]
    more = apart | {"model.other.weight": np.zeros((512, 64), np.float16)}
    assert "does not load" in answer(listed(tmp_path / "more", MOE, more))["notes"][0]


def test_packings_of_others(tmp_path, sparse):
    """mxfp4 (experts alone) and GPTQ."""
    apart = experts_apart(sparse)
    two = {n: np.zeros((a.shape[0], a.shape[1] // 8), np.int32) for n, a in apart.items() if ".mlp.experts." in n}
    gptq = {n: a for n, a in apart.items() if n not in two}
    gptq |= {n.replace(".weight", ".qweight"): a for n, a in two.items()}
    gptq |= {n.replace(".weight", ".scales"): np.zeros((a.shape[0], 1), np.float16) for n, a in two.items()}
    method = {"quantization_config": {"quant_method": "gptq", "bits": 4, "group_size": 64}}
    folder = listed(tmp_path / "gptq", MOE | method, gptq)
    found = answer(folder)
    assert found["weights_bytes"] == on_disk(folder) and found["form"] == "gptq, as stored"
    assert "mlx-lm 0.32 cannot load" in found["notes"][0]
    blocks = {n: np.zeros(a.size // 2, np.uint8) for n, a in apart.items() if ".mlp.experts." in n}
    scales = {
        n.replace("weight", "weight_scales"): np.zeros(a.size // 32, np.uint8) for n, a in apart.items() if n in blocks
    }
    folder = listed(
        tmp_path / "mxfp4", MOE | {"quantization_config": {"quant_method": "mxfp4"}}, apart | blocks | scales
    )
    found = answer(folder)
    assert found["weights_bytes"] == on_disk(folder) and "cannot load" in found["notes"][0]  # only gpt_oss's are
    assert on_disk(folder) == open_subject(str(written(tmp_path / "alone", json.loads(
        (folder / "config.json").read_text()))), Form()).weights.nbytes  # fmt: skip


def fp8(folder: Path, config: dict, tensors: dict[str, tuple[int, ...]]) -> Path:
    """A file of 8-bit floats, which numpy does not have."""
    table, at = {}, 0
    for name, shape in tensors.items():
        table[name] = {"dtype": "F8_E4M3", "shape": list(shape), "data_offsets": [at, at + prod(shape)]}
        at += prod(shape)
    header = json.dumps(table).encode()
    raw = len(header).to_bytes(8, "little") + header + bytes(at)
    (written(folder, config) / "model.safetensors").write_bytes(raw)
    return folder


def test_8_bit_floats_are_counted_as_what_they_become(tmp_path):
    """Where mlx-lm unpacks them; elsewhere they are counted as they are stored, since nothing loads them."""
    latent = {"kv_lora_rank": 32, "qk_nope_head_dim": 16, "qk_rope_head_dim": 8, "v_head_dim": 24, "q_lora_rank": 48}
    dense = {"n_routed_experts": None, "n_shared_experts": None, "first_k_dense_replace": 99, "moe_layer_freq": 1}
    deepseek = pico.config_of("llama", vocab_size=96, **latent, **dense) | {"model_type": "deepseek_v3"}
    for config in (deepseek, MOE, pico.config_of("llama", vocab_size=96)):
        config = {**config, "quantization_config": {"quant_method": "fp8"}}
        tensors = {t.name: t.shape for t in describe(config).tensors()}
        folder = fp8(tmp_path / config["model_type"], config, tensors | {"model.layers.0.mlp.weight_scale_inv": (1,)})
        found, unpacked = answer(folder), config["model_type"] == "deepseek_v3"
        assert ("unpacks" if unpacked else "cannot load") in found["notes"][0]
        if unpacked:
            assert found["weights_bytes"] == 2 * (on_disk(folder) - 1)
            assert bytes_of(found) == bytes_of(answer(folder / "config.json"))
        else:
            assert found["weights_bytes"] == on_disk(folder)
    unknown = fp8(tmp_path / "unknown", {"model_type": "mamba9"}, {"w": (64, 64)})
    assert answer(unknown)["weights_bytes"] == on_disk(unknown)


# ---- a config alone ----


def test_a_config_is_what_the_catalogue_says(tmp_path):
    for name, entry in ENTRIES.items():
        path = written(tmp_path / name, entry.config) / "config.json"
        for form in (FORMS["4"], FORMS["gguf"]):
            alone, known = (answer(m, form, "m3-ultra-512gb") for m in (path, name))
            assert bytes_of(alone) == bytes_of(known) and alone["form"] == known["form"]
    folder = tmp_path / "qwen3-4b"
    assert bytes_of(answer(folder)) == bytes_of(answer(folder / "config.json"))
    assert "no weights are there" in answer(folder)["notes"][0]


def test_its_own_packing_with_overrides(tmp_path, pico_models):
    """As mlx-lm writes and reads it: {} per module, false for what stays dense; a block without a mode is affine."""
    config = pico.config_of("llama-untied", vocab_size=96)
    storages = {"model.layers.0.mlp.gate_proj": {"bits": 8, "group_size": 64}, "lm_head": False}
    arch = describe(config)
    mixed = {**config, "quantization": {"bits": 4, "group_size": 32, **storages}}
    usual, eight, dense = 4 / 8 + 4 / 32, 1 + 4 / 64, 2

    def expected(tensor, usual=usual):
        own = {"model.layers.0.mlp.gate_proj": eight, "lm_head": dense}.get(tensor.module, usual)
        return tensor.size * (own if tensor.matrix else dense)

    found = open_subject(str(written(tmp_path / "mixed", mixed) / "config.json"), Form())
    assert (
        found.weights.nbytes == sum(map(expected, arch.tensors())) and found.described == "MLX, 4 bits in groups of 32"
    )
    floats = {**config, "quantization": {"bits": 4, "group_size": 32, "mode": "mxfp4", **storages}}
    found = open_subject(str(written(tmp_path / "floats", floats) / "config.json"), Form())
    assert found.weights.nbytes == sum(expected(t, 4 / 8 + 1 / 32) for t in arch.tensors())
    packed = pico_models("qwen3", (4, 32), dtype=mx.bfloat16)
    assert bytes_of(answer(packed / "config.json")) == bytes_of(answer(packed))


# ---- GGUF files ----


@pytest.mark.parametrize("family", sorted(pico.FAMILIES))
@pytest.mark.parametrize("kind", ["f16", "q8_0"])
def test_a_file_of_our_own(tmp_path, pico_models, family, kind):
    model, file = pico_models(family), tmp_path / "m.gguf"
    done = export(model, file, kind)
    found, source = answer(file), Checkpoint(model).arch
    subject = open_subject(str(file), Form())
    assert found["weights_bytes"] == done["tensor_bytes"] and (found["runtime"], found["origin"]) == (
        "llama.cpp",
        "gguf",
    )
    assert [layer.kind for layer in subject.arch.layers] == [layer.kind for layer in source.layers]
    assert footprint.parameters(subject.arch) == footprint.parameters(source)
    assert footprint.cache_values(subject.arch) == footprint.cache_values(source)
    assert bytes_of(found) == bytes_of(answer(model, Form.named(gguf=kind)))
    folder = tmp_path / "folder"
    folder.mkdir()
    file.rename(folder / "M.GGUF")
    assert answer(folder / "M.GGUF")["weights_bytes"] == done["tensor_bytes"]
    shutil.copy(folder / "M.GGUF", folder / "a.gguf")
    (folder / "mmproj-a.gguf").write_bytes(b"no model")
    assert answer(folder)["weights_bytes"] == done["tensor_bytes"]
    again = answer(folder / "a.gguf", FORMS["4"])
    assert again["runtime"] == "mlx"  # as MLX would pack it, it is no GGUF file any more


def test_several_files_in_a_directory_are_said(tmp_path, pico_models):
    for name in ("a", "b"):
        export(pico_models("llama"), tmp_path / f"{name}.gguf", "f16")
    assert "a.gguf" in answer(tmp_path)["notes"][-1]


def test_a_gguf_of_an_architecture_nobody_knows(tmp_path):
    file = tmp_path / "x.gguf"
    keys = [s("general.architecture") + (8).to_bytes(4, "little") + s("mamba9")]
    file.write_bytes(build(keys, [row("w", (64, 64))], data=64 * 64 * 4))
    found = answer(file)
    assert found["weights_bytes"] == 64 * 64 * 4 and found["rows"][0]["fits"] is None and "mamba9" in found["notes"][0]


def test_hostile_gguf_files(refused, tmp_path):
    keys = [s("general.architecture") + (8).to_bytes(4, "little") + s("llama"), u32("llama.block_count", 2**31)]
    for raw, words in ((b"", "empty"), (b"GGUF", "ends at byte"), (b"PK\3\4" * 9, "does not begin with GGUF"),
                       (build(keys, [row("w", (2**40, 2**20))]), "w"), (build(keys), "")):  # fmt: skip
        (tmp_path / "x.gguf").write_bytes(raw)
        assert words in refused(1, tmp_path / "x.gguf")
    (tmp_path / "x-00001-of-00002.gguf").write_bytes(build([*keys, u32("split.count", 2)]))
    assert "00002" in refused(1, tmp_path / "x-00001-of-00002.gguf")


# ---- runs ----


def begun(model: Path, out: Path, **options) -> Path:
    """A run directory up to its plan, with random scores."""
    with steps.open_run(model, out) as run:
        checkpoint = Checkpoint(model)
        arch, random = checkpoint.arch, np.random.RandomState(0)
        layers = len(arch.layers)
        shapes = {"ffn": (layers, arch.uniform("ffn")), "kv_head": (layers, arch.uniform("kv_head"))}
        shapes |= {"layer": (layers,), "hidden": (arch.sizes["hidden"],)}
        arrays = {axis: mx.array(random.rand(*shape).astype(np.float32)) for axis, shape in shapes.items()}
        Arrays(arrays, {"criterion": "random", "model": checkpoint.identity()}).save(run.path / "scores.safetensors")
        made = plan(model, run.path / "scores.safetensors", Options(**options))
        (out / "plan").mkdir()
        (out / "plan" / "plan.json").write_bytes(made.dump())
    return out


RUNS = [
    ("llama", None, {"keep": 0.6}),
    ("llama", (4, 32), {"keep": 0.6, "axes": ("ffn", "kv_head", "layer")}),
    ("qwen2", (4, 32), {"keep": 0.8, "axes": ("kv_head",)}),
    ("gemma3_text", None, {"keep": 0.7, "bits": 4, "group_size": 32}),
]


@pytest.mark.parametrize("family, packed, options", RUNS)
def test_a_run_is_what_prune_will_write(pico_models, tmp_path, monkeypatch, family, packed, options):
    model = pico_models(family, packed)
    out = begun(model, tmp_path / "run", **options)
    expected = answer(out)
    prune(model, Plan.load(out / "plan" / "plan.json"), tmp_path / "pruned")
    assert expected["weights_bytes"] == on_disk(tmp_path / "pruned") and expected["origin"] == "plan"
    assert bytes_of(expected) == bytes_of(answer(tmp_path / "pruned")) == bytes_of(answer(out / "plan" / "plan.json"))
    assert not expected["notes"]
    for form in (FORMS["4"], FORMS["16"], FORMS["gguf"]):
        assert bytes_of(answer(out, form)) == bytes_of(answer(tmp_path / "pruned", form))
    monkeypatch.chdir(out / "plan")
    assert bytes_of(answer("plan.json")) == bytes_of(expected)


def test_an_edited_plan(pico_models, tmp_path, refused):
    model = pico_models("llama")
    out = begun(model, tmp_path / "run", keep=0.6)
    file = out / "plan" / "plan.json"
    document = json.loads(file.read_text())
    document["layers"] = document["layers"][:1] + document["layers"][2:]
    file.write_text(json.dumps(document))
    found = answer(out)
    prune(model, Plan.load(file), tmp_path / "pruned")
    assert found["weights_bytes"] == on_disk(tmp_path / "pruned")
    document["layers"][0]["ffn"][-1] = 999
    file.write_text(json.dumps(document))
    assert "there are 128" in refused(1, out)
    file.write_text('{"criterion": 1, "layers": 2}')
    assert "is not valid" in refused(1, file)


def test_runs_that_lack_something(pico_models, tmp_path, refused):
    model = Path(shutil.copytree(pico_models("llama"), tmp_path / "model"))
    out = begun(model, tmp_path / "run", keep=0.6)
    (out / "plan" / "plan.json").rename(tmp_path / "plan.json")
    assert "a run without a plan" in refused(1, out)
    assert "has no manifest.json" in refused(1, tmp_path / "plan.json")
    (tmp_path / "plan.json").rename(out / "plan" / "plan.json")
    (model / "config.json").write_text((model / "config.json").read_text() + " ")
    assert not answer(out)["notes"]  # means the same
    shutil.copy(model / "model.safetensors", model / "again")
    (model / "again").replace(model / "model.safetensors")
    assert not answer(out)["notes"]  # a copy is as good
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"rope_theta": 777.0}))
    assert "changed since the plan" in answer(out)["notes"][0]
    shutil.rmtree(model)
    assert "no model directory at" in refused(1, out)
    for broken in (5, None, ["x"]):
        (out / "manifest.json").write_text(json.dumps({"model": broken}))
        assert "does not say which model" in refused(1, out)


# ---- the hub ----


def test_a_model_on_the_hub_is_as_its_directory(server, pico_models, tmp_path, sparse):
    folders = {
        "org/dense": pico_models("llama"),
        "org/packed": pico_models("qwen2", (4, 32)),
        "org/small": pico_models("gemma3_text", (8, 64), dtype=mx.bfloat16),
        "org/experts": listed(tmp_path / "moe", MOE, experts_apart(sparse)),
    }
    for name, folder in folders.items():
        server.repos[name] = Repo(folder)
        for form in (Form(), FORMS["4"], FORMS["gguf"]):
            here, there = answer(folder, form), answer(name, form)
            assert bytes_of(here) == bytes_of(there) and here["form"] == there["form"], (name, str(form))
            assert there["origin"] == "hub" and here["notes"] == there["notes"]


def test_a_hub_that_does_not_answer(server, pico_models, monkeypatch):
    """In the catalogue: answered from it, and it is said; otherwise an error."""
    with pytest.raises(PareError):
        answer("org/unknown")
    assert "catalogue" in answer("Qwen/Qwen3-4B")["notes"][0]
    server.repos["meta-llama/Llama-3.2-1B"] = Repo(pico_models("llama"), gated=True)
    assert answer("meta-llama/Llama-3.2-1B")["weights_bytes"] == answer("llama-3.2-1b")["weights_bytes"]
    asked = len(server.log)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert "HF_HUB_OFFLINE" in answer("Qwen/Qwen3-4B")["notes"][0]
    with pytest.raises(PareError, match="HF_HUB_OFFLINE"):
        answer("org/unknown")
    assert len(server.log) == asked
    server.repos["org/other"] = Repo(Path(__file__).parent)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    with pytest.raises(PareError, match="neither"):
        answer("org/other")


def test_only_fit_and_inspect_may_use_the_network_after_their_models_are_there():
    commands = {command.name: command for command in cli.app.registered_commands}
    found = {name for name, command in commands.items() if _network(command.callback)}
    assert found == {"fit", "inspect"}


def _network(called: Callable) -> bool:
    names = called.__code__.co_freevars
    return dict(zip(names, (cell.cell_contents for cell in called.__closure__), strict=True))["network"]


# ---- the command ----

KEYS = ["model", "origin", "form", "parameters", "context", "batch", "runtime", "train", "macos", "weights_bytes",
        "file_bytes", "here", "rows", "alternatives", "curve", "notes", "note"]  # fmt: skip


@pytest.mark.parametrize("options, check", [
    (["--mac", "m4-24gb", "--mac", "m1-8gb"], lambda d: [r["memory_gb"] for r in d["rows"]] == [24, 8]),
    (["--memory", "24GB"], lambda d: d["rows"][0]["memory_gb"] == 24 and d["rows"][0]["decode_tokens_per_s"] is None),
    (["--memory", "24"], lambda d: d["rows"][0]["mac"] == "24gb"),
    (["--memory", "24GiB"], lambda d: d["rows"][0]["mac"] == "24gb"),
    (["--context", "32768"], lambda d: d["context"] == 32768),
    (["--batch", "4"], lambda d: d["batch"] == 4),
    (["--bits", "8", "--group-size", "32"], lambda d: d["form"] == "8 bits in groups of 32"),
    (["--bits", "NVFP4"], lambda d: d["form"] == "nvfp4"),
    (["--gguf", "Q4_K_M"], lambda d: (d["form"], d["runtime"]) == ("GGUF q4_k_m", "llama.cpp")),
    (["--gguf", "q4_k_m", "--kv-bits", "5"], lambda d: d["runtime"] == "llama.cpp"),
    (["--kv-bits", "8"], lambda d: d["rows"][0]["kv_bytes"] > 0),
    (["--prefill-step", "512"], lambda d: d["rows"][0]["activation_bytes"] < 400e6),
    (["--runtime", "llama.cpp"], lambda d: d["runtime"] == "llama.cpp"),
    (["--train", "lora"], lambda d: (d["train"], d["context"], d["batch"]) == ("lora", 2048, 4)),
    (["--train", "full", "--bits", "16", "--context", "512"], lambda d: (d["context"], d["batch"]) == (512, 4)),
    (["--macos", "15"], lambda d: d["macos"] == 15),
    (["--limit", "20GB", "--mac", "m4-24gb"], lambda d: d["rows"][0]["budget_bytes"] == 20 * 10**9),
    (["--limit", "20480"], lambda d: d["rows"][0]["budget_bytes"] == 20480 << 20),
    (["--limit", "20GB", "--reserve", "3GB"], lambda d: d["rows"][0]["budget_bytes"] == 17 * 10**9),
], ids=lambda v: " ".join(v) if isinstance(v, list) else "")  # fmt: skip
def test_every_option(pare, options, check):
    code, out, err = pare("fit", "qwen3-4b", *options, "--json")
    document = json.loads(out)
    assert code == 0 and list(document) == KEYS and check(document), err
    code, out, _ = pare("fit", "qwen3-4b", *options)
    assert code == 0 and "qwen3-4b" in out and document["rows"][0]["mac"] in out


BAD = {
    "unknown bits": ["--bits", "7"], "no bits": ["--bits", "0"], "negative bits": ["--bits=-4"],
    "bits in words": ["--bits", "four"], "a small two": ["--bits", "²"],
    "unknown group": ["--bits", "4", "--group-size", "48"],
    "two forms": ["--bits", "4", "--gguf", "q8_0"], "unknown GGUF": ["--gguf", "q9_z"],
    "no context": ["--context", "0"],
    "huge context": ["--context", "9" * 400], "negative batch": ["--batch=-1"], "no step": ["--prefill-step", "0"],
    "unknown runtime": ["--runtime", "vllm"], "unknown training": ["--train", "dpo"],
    "unknown Mac": ["--mac", "m9-1gb"],
    "no memory": ["--memory", "0"], "memory in words": ["--memory", "lots"], "much memory": ["--memory", "99999"],
    "unknown cache": ["--kv-bits", "7"], "cache of five bits": ["--kv-bits", "5"], "no macOS": ["--macos", "0"],
    "cache of three in llama.cpp": ["--gguf", "q8_0", "--kv-bits", "3"], "limit in words": ["--limit", "all"],
    "reserve in words": ["--reserve", "-1GB"], "training in llama.cpp": ["--runtime", "llama.cpp", "--train", "lora"],
    "training packed weights in full": ["--train", "full"],
    "training a GGUF": ["--gguf", "q8_0", "--train", "lora"],
}  # fmt: skip


@pytest.mark.parametrize("options", BAD.values(), ids=BAD)
def test_bad_values_are_usage_errors(refused, options):
    refused(2, "qwen3-4b", *options)


@pytest.mark.parametrize("name", ["gemma-3-4b", "deepseek-v3", "gpt-oss-20b"])
def test_caches_that_cannot_be_quantized(refused, name):
    assert "--kv-bits 8" in refused(2, name, "--kv-bits", "8")
    assert answer(name, FORMS["gguf"], kv_bits=8)["rows"][0]["kv_bytes"] > 0


def test_help_has_examples(pare):
    code, out, _ = pare("fit", "--help")
    text = " ".join(out.split())
    assert code == 0 and text.count("mlx-pare fit") >= 4
    for example in text.partition("Examples:")[2].split("|"):
        assert example.strip().startswith("mlx-pare fit ")


LIGHT = """
import sys, time
from mlx_pare.capacity.fit import fit
fit(sys.argv[1])
heavy = {"mlx", "mlx.core", "numpy", "gguf", "transformers", "pydantic", "huggingface_hub", "mlx_lm"} & set(sys.modules)
assert not heavy, heavy
assert time.process_time() < 0.5, time.process_time()
"""


@pytest.mark.parametrize("what", ["name", "config", "gguf", "directory"])
def test_an_answer_costs_half_a_second(pico_models, tmp_path, what):
    places = {"name": "qwen3-30b-a3b", "config": tmp_path / "config.json", "gguf": tmp_path / "m.gguf"}
    if what == "config":
        written(tmp_path, ENTRIES["llama-3-70b"].config)
    if what == "gguf":
        export(pico_models("llama"), places["gguf"], "f16")
    model = places.get(what) or pico_models("llama")
    done = subprocess.run([sys.executable, "-c", LIGHT, str(model)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_a_form_is_one_form():
    with pytest.raises(UsageError):
        Form.named("4", 64, "q8_0")
    assert not Form().given and Form.named("MXFP8").packing.mode == "mxfp8" and Form.named("32").floats == 4
