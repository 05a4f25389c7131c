"""checkpoint: whatever is wrong with a model directory is said by name, and the writer's files are safetensors."""

from __future__ import annotations

import json
import os
import shutil
import struct
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from safetensors import safe_open

from mlx_pare import lm
from mlx_pare.base.errors import PareError
from mlx_pare.model.checkpoint import Checkpoint
from mlx_pare.model.directory import write_config
from mlx_pare.tensors.packed import raw_bytes
from mlx_pare.tensors.safetensors import read_header
from mlx_pare.tensors.shards import Planned, ShardWriter

DOWN = "model.layers.1.mlp.down_proj"


@pytest.fixture
def model(pico_models, tmp_path) -> Path:
    """A copy that may be damaged."""
    return Path(shutil.copytree(pico_models("llama"), tmp_path / "model"))


@pytest.fixture
def packed(pico_models, tmp_path) -> Path:
    return Path(shutil.copytree(pico_models("llama", (4, 32)), tmp_path / "packed"))


def assert_refused(directory: Path, *words: str) -> None:
    """Opening the model is a PareError whose text holds every word."""
    with pytest.raises(PareError) as caught:
        _ = Checkpoint(directory).arch
    assert all(word in str(caught.value) for word in words), str(caught.value)


def change_config(directory: Path, **changes) -> None:
    """None removes a key."""
    config = json.loads((directory / "config.json").read_text()) | changes
    (directory / "config.json").write_text(json.dumps({k: v for k, v in config.items() if v is not None}))


def header_of(file: Path) -> tuple[dict, bytes]:
    raw = file.read_bytes()
    length = struct.unpack("<Q", raw[:8])[0]
    return json.loads(raw[8 : 8 + length]), raw[8 + length :]


def write_raw(file: Path, header: bytes, data: bytes = b"") -> None:
    file.write_bytes(struct.pack("<Q", len(header)) + header + data)


def change_tensors(directory: Path, change) -> None:
    """Rewrite the only shard with ``change(arrays)``."""
    file = directory / "model.safetensors"
    arrays = dict(mx.load(str(file)))
    mx.eval(arrays)
    change(arrays)
    mx.save_safetensors(str(file), arrays)


# ---- files that are not what they should be ----


def test_a_whole_model_opens(model, packed):
    assert Checkpoint(model).quantization is None
    found = Checkpoint(packed)
    assert found.quantization.as_config() == {"bits": 4, "group_size": 32, "mode": "affine"}
    assert found.arch.sizes == Checkpoint(model).arch.sizes == {"hidden": 64, "vocab": 512}


def test_no_directory(tmp_path):
    assert_refused(tmp_path / "nothing", "no model directory", "nothing")


def test_no_weights(model):
    (model / "model.safetensors").unlink()
    assert_refused(model, "no model*.safetensors")


def test_a_dangling_link_is_named(model):
    (model / "model.safetensors").unlink()
    (model / "model.safetensors").symlink_to(model / "elsewhere")
    assert_refused(model, "model.safetensors")


@pytest.mark.parametrize("keep", [0, 7, 8, 100, -1])
def test_a_truncated_shard(model, keep):
    file = model / "model.safetensors"
    file.write_bytes(file.read_bytes()[:keep])
    assert_refused(model, "model.safetensors", "cut off")


def test_trailing_bytes(model):
    file = model / "model.safetensors"
    file.write_bytes(file.read_bytes() + b"\0")
    assert_refused(model, "model.safetensors", "damaged")


@pytest.mark.parametrize("length", [2**60, 2**63, 2**64 - 1, 200 << 20])
def test_a_header_length_bomb_allocates_nothing(model, length):
    (model / "model.safetensors").write_bytes(struct.pack("<Q", length) + b"{}")
    assert_refused(model, "model.safetensors", "not a safetensors file")


@pytest.mark.parametrize(
    "header",
    [b"not json", b"\xff\xfe{}", b"[1, 2]", b'"text"', b"[" * 50000, b'{"a": 3}', b'{"a": {}}', b'{"a": null}'],
    ids=lambda h: repr(h[:12]),
)
def test_a_header_that_is_no_table(model, header):
    write_raw(model / "model.safetensors", header)
    assert_refused(model, "model.safetensors", "header")


def entry(dtype="F32", shape=(2,), offsets=(0, 8)):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


DAMAGED = {
    "negative": {"a": entry(offsets=(-8, 0))},
    "backwards": {"a": entry(offsets=(8, 0))},
    "too short": {"a": entry(shape=(3,))},
    "negative shape": {"a": entry(shape=(-1, -2))},
    "overlapping": {"a": entry(), "b": entry(offsets=(4, 12)), "c": entry(shape=(1,), offsets=(12, 16))},
    "the same bytes twice": {"a": entry(offsets=(0, 8)), "b": entry(offsets=(0, 8)), "c": entry(offsets=(8, 16))},
    "a hole": {"a": entry(), "b": entry(shape=(1,), offsets=(12, 16))},
    "three offsets": {"a": entry(offsets=(0, 4, 8))},
    "shape is a number": {"a": {"dtype": "F32", "shape": 2, "data_offsets": [0, 8]}},
    "fractional shape": {"a": entry(shape=(2.5,))},
    "text for numbers": {"a": {"dtype": "F32", "shape": ["2"], "data_offsets": ["0", "8"]}},
}


@pytest.mark.parametrize("what", DAMAGED)
def test_damaged_entries(model, what):
    table = DAMAGED[what]
    size = max((o for e in table.values() for o in e["data_offsets"] if isinstance(o, int)), default=8)
    write_raw(model / "model.safetensors", json.dumps(table).encode(), bytes(max(size, 0)))
    assert_refused(model, "model.safetensors", "header")


def test_an_unsupported_type_of_numbers(model):
    write_raw(model / "model.safetensors", json.dumps({"a": entry(dtype="F8_E4M3", offsets=(0, 2))}).encode(), bytes(2))
    assert_refused(model, "8-bit floats", "not supported", "the float original")


def test_a_header_as_safetensors_writes_it_is_read(model):
    table = read_header(model / "model.safetensors")
    with safe_open(model / "model.safetensors", framework="numpy") as file:
        assert {n: list(e.shape) for n, e in table.items()} == {n: file.get_slice(n).get_shape() for n in table}


# ---- config ----


def test_no_config(model):
    (model / "config.json").unlink()
    assert_refused(model, "config.json", "No such file")


@pytest.mark.parametrize("text", ["[1, 2]", '"llama"', "3", "null"])
def test_a_config_that_is_no_object(model, text):
    (model / "config.json").write_text(text)
    assert_refused(model, "config.json", "expected an object")


@pytest.mark.parametrize("raw", [b"", b"{", b"\xff\xfe", b"[" * 50000], ids=lambda r: repr(r[:8]))
def test_a_config_that_is_no_json(model, raw):
    (model / "config.json").write_bytes(raw)
    assert_refused(model, "config.json", "not valid JSON")


def test_an_unknown_model_type(model):
    change_config(model, model_type="mamba2")
    assert_refused(model, "'mamba2'", "llama", "qwen3")


def test_a_shape_that_is_not_the_config_s(model):
    change_config(model, intermediate_size=96)
    assert_refused(model, "model.layers.0.mlp.gate_proj.weight", "[128, 64]", "[96, 64]", "model.safetensors")


def test_a_packed_shape_that_is_not_the_config_s(packed):
    change_config(packed, vocab_size=511)
    assert_refused(packed, "model.embed_tokens", "[512, 64]", "[511, 64]")


def test_a_missing_tensor(model):
    change_tensors(model, lambda arrays: arrays.pop(f"{DOWN}.weight"))
    assert_refused(model, f"lacks {DOWN}.weight")


def test_several_missing_tensors_are_counted(model):
    change_config(model, num_hidden_layers=5)
    assert_refused(model, "model.layers.4.", "8 more tensors")


def test_an_undescribed_tensor(model):
    change_tensors(model, lambda arrays: arrays.update({f"{DOWN}.lora_a": mx.zeros((2, 2))}))
    assert_refused(model, f"{DOWN}.lora_a", "llama", "does not describe")


def test_what_mlx_lm_ignores_is_ignored(model):
    extra = {"model.layers.0.self_attn.rotary_emb.inv_freq": mx.zeros((8,))}
    before = Checkpoint(model).nbytes()
    change_tensors(
        model, lambda arrays: arrays.update(extra, **{"lm_head.weight": arrays["model.embed_tokens.weight"]})
    )
    assert Checkpoint(model).nbytes() == before


def test_a_matrix_of_integers(model):
    change_tensors(model, lambda arrays: arrays.update({f"{DOWN}.weight": mx.zeros((64, 128), dtype=mx.int32)}))
    assert_refused(model, f"{DOWN}.weight", "I32")


# ---- quantization ----


@pytest.mark.parametrize("mode", ["mxfp3", "fp4", 7])
def test_an_unsupported_mode(packed, mode):
    change_config(packed, quantization={"bits": 4, "group_size": 32, "mode": mode})
    assert_refused(packed, str(mode), "affine, mxfp4")


def test_an_unsupported_mode_of_one_module(packed):
    change_config(packed, quantization={"bits": 4, "group_size": 32, DOWN: {"bits": 4, "group_size": 32, "mode": "x"}})
    assert_refused(packed, "'x'", "affine")


@pytest.mark.parametrize("method", ["gptq", "awq", "bitnet", "fp8"])
def test_a_foreign_quantization(model, method):
    change_config(model, quantization_config={"quant_method": method, "bits": 4})
    assert_refused(model, f"is quantized as {method}", "not supported")


@pytest.mark.parametrize(
    "value",
    [
        4,
        [4],
        {"bits": 7, "group_size": 32},
        {"bits": 4},
        {"group_size": 32},
        {"bits": 4, "group_size": 0},
        {"bits": "4", "group_size": 32},
        {"bits": 4, "group_size": 32, DOWN: {"bits": 4}},
    ],
    ids=str,
)
def test_a_quantization_that_makes_no_sense(packed, value):
    change_config(packed, quantization=value)
    assert_refused(packed, "quantization")


def test_a_quantization_of_nothing(model):
    """The config says packed, no tensor is: mlx-lm loads it dense, and so do we."""
    change_config(model, quantization={"bits": 4, "group_size": 32})
    found = Checkpoint(model)
    assert found.arch and found.quantization is None and not found.quantized


@pytest.mark.parametrize("part", ["scales", "biases"])
def test_packed_parts_that_are_missing(packed, part):
    change_tensors(packed, lambda arrays: arrays.pop(f"{DOWN}.{part}"))
    assert_refused(packed, DOWN)


@pytest.mark.parametrize(
    "shape", [(), (4,), (64, 2), (32, 4), (64, 4, 1)], ids=lambda s: "x".join(map(str, s)) or "scalar"
)
@pytest.mark.parametrize("part", ["scales", "biases"])
def test_packed_parts_of_a_wrong_shape(packed, part, shape):
    change_tensors(packed, lambda arrays: arrays.update({f"{DOWN}.{part}": mx.zeros(shape)}))
    assert_refused(packed, f"{DOWN}.{part}")


@pytest.mark.parametrize("part", ["weight", "scales", "biases"])
def test_packed_parts_of_a_wrong_dtype(packed, part):
    def change(arrays):
        arrays[f"{DOWN}.{part}"] = arrays[f"{DOWN}.{part}"].astype(mx.int16)

    change_tensors(packed, change)
    assert_refused(packed, DOWN, "I16")


def test_words_of_a_wrong_rank(packed):
    change_tensors(packed, lambda arrays: arrays.update({f"{DOWN}.weight": mx.array(1, dtype=mx.uint32)}))
    assert_refused(packed, f"{DOWN}.weight")


def test_other_bits_than_the_config_says(packed):
    change_config(packed, quantization={"bits": 8, "group_size": 32})
    assert_refused(packed, "model.embed_tokens")


# ---- shards and index ----


def shards(directory: Path, *tables: dict) -> None:
    (directory / "model.safetensors").unlink()
    for number, table in enumerate(tables, 1):
        mx.save_safetensors(str(directory / f"model-{number:05d}-of-{len(tables):05d}.safetensors"), table)


def test_a_tensor_in_two_shards(model):
    arrays = dict(mx.load(str(model / "model.safetensors")))
    mx.eval(arrays)
    shards(model, arrays, {"model.norm.weight": arrays["model.norm.weight"]})
    assert_refused(model, "model.norm.weight", "model-00001-of-00002", "model-00002-of-00002")


def test_a_file_that_the_index_lists_is_missing(model):
    index = {"weight_map": {"model.norm.weight": "model-00002-of-00002.safetensors", "a": "model.safetensors"}}
    (model / "model.safetensors.index.json").write_text(json.dumps(index))
    assert_refused(model, "lacks model-00002-of-00002.safetensors", "index")


@pytest.mark.parametrize("text", ["[]", '{"weight_map": [1]}', '{"weight_map": 3}', "{", '{"weight_map": null}'])
def test_an_index_that_makes_no_sense(model, text):
    (model / "model.safetensors.index.json").write_text(text)
    assert_refused(model, "index")


# ---- identity ----


def test_identity_stays_while_nothing_changes(model):
    assert Checkpoint(model).identity() == Checkpoint(model).identity()
    os.utime(model / "tokenizer.json")
    assert Checkpoint(model).identity() == Checkpoint(Path(shutil.copytree(model, model.parent / "copy"))).identity()


def test_identity_changes_with_any_one_tensor(model):
    before, file = Checkpoint(model).identity(), model / "model.safetensors"
    raw, found = file.read_bytes(), {before}
    for entry in Checkpoint(model).entries.values():
        changed = bytearray(raw)
        changed[(entry.start + entry.end) // 2] ^= 1
        file.write_bytes(changed)
        found.add(Checkpoint(model).identity())
    assert len(found) == 1 + len(Checkpoint(model).entries)
    file.write_bytes(raw)
    os.utime(file, (1, 1))  # a copy is as good
    assert Checkpoint(model).identity() == before


def test_identity_changes_with_the_config(model):
    before = Checkpoint(model).identity()
    change_config(model, rope_theta=10001.0)
    assert Checkpoint(model).identity() != before


# ---- no code is run ----


def test_code_in_a_model_directory_is_never_run(model):
    witness = model.parent / "ran"
    (model / "evil.py").write_text(f"open({str(witness)!r}, 'w')\n")
    change_config(model, model_file="evil.py", auto_map={"AutoModel": "evil.Model", "AutoTokenizer": ["evil.T", None]})
    _ = Checkpoint(model).arch
    with pytest.raises(PareError, match=r"evil\.py"):
        lm.load(model)
    try:
        lm.tokenizer(model)
    except PareError as error:
        assert "trust_remote_code" in str(error)
    assert not witness.exists()


# ---- the writer ----

ARRAYS = {
    "a": mx.arange(12, dtype=mx.float32).reshape(3, 4),
    "b.weight": mx.arange(8, dtype=mx.uint32).reshape(2, 4) + 4_000_000_000,
    "b.scales": (mx.arange(4) / 3).astype(mx.bfloat16).reshape(2, 2),
    "c": (mx.arange(5) / 7).astype(mx.float16),
}
DTYPES = {mx.float32: "F32", mx.uint32: "U32", mx.bfloat16: "BF16", mx.float16: "F16"}


def announced():
    return [Planned(name, DTYPES[a.dtype], a.shape) for name, a in ARRAYS.items()]


def write_all(directory: Path, shard_bytes: int) -> ShardWriter:
    writer = ShardWriter(directory, announced(), shard_bytes)
    for name, array in ARRAYS.items():
        writer.write(name, raw_bytes(array))
    return writer


LIMITS = {1 << 30: 1, 60: 2, 48: 3, 1: 4}  # bytes a shard may have -> shards


@pytest.mark.parametrize(("limit", "count"), LIMITS.items())
def test_written_files_open_everywhere(tmp_path, limit, count):
    write_all(tmp_path, limit).close()
    files = sorted(tmp_path.glob("model*.safetensors"))
    assert len(files) == count
    read = {}
    for file in files:
        read |= mx.load(str(file))
        with safe_open(file, framework="numpy") as opened:
            assert opened.metadata() == {"format": "mlx"}
            for name in set(opened.keys()) - {"b.scales"}:  # numpy has no bfloat16
                assert np.array_equal(opened.get_tensor(name), np.array(ARRAYS[name]))
    assert read.keys() == ARRAYS.keys()
    for name, array in ARRAYS.items():
        assert read[name].dtype == array.dtype and mx.array_equal(read[name], array)


def test_the_index_is_that_of_the_hub(tmp_path):
    write_all(tmp_path, 48).close()
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["metadata"] == {"total_size": 48 + 32 + 8 + 10}
    assert index["weight_map"] == {
        "a": "model-00001-of-00003.safetensors",
        "b.weight": "model-00002-of-00003.safetensors",
        "b.scales": "model-00002-of-00003.safetensors",
        "c": "model-00003-of-00003.safetensors",
    }


def test_exact_bytes(tmp_path):
    writer = ShardWriter(tmp_path, [Planned("x", "F16", (2,)), Planned("y", "U32", (1, 1))])
    writer.write("x", raw_bytes(mx.array([1.0, -2.0], dtype=mx.float16)))
    writer.write("y", raw_bytes(mx.array([[258]], dtype=mx.uint32)))
    writer.close()
    header = (
        b'{"__metadata__":{"format":"mlx"},"x":{"dtype":"F16","shape":[2],"data_offsets":[0,4]},'
        b'"y":{"dtype":"U32","shape":[1,1],"data_offsets":[4,8]}}'
    )
    header += b" " * (-len(header) % 8)
    data = b"\x00\x3c\x00\xc0" + b"\x02\x01\x00\x00"
    assert (tmp_path / "model.safetensors").read_bytes() == struct.pack("<Q", len(header)) + header + data
    assert not (tmp_path / "model.safetensors.index.json").exists()


def test_the_same_arrays_give_the_same_bytes(tmp_path):
    (tmp_path / "a").mkdir(), (tmp_path / "b").mkdir()
    for name in "ab":
        write_all(tmp_path / name, 60).close()
    for file in (tmp_path / "a").iterdir():
        assert file.read_bytes() == (tmp_path / "b" / file.name).read_bytes()


def test_nothing_looks_finished_before_close(tmp_path):
    write_all(tmp_path, 60)
    assert not (tmp_path / "model.safetensors.index.json").exists()
    with pytest.raises(PareError, match="config"):
        Checkpoint(tmp_path)


@pytest.mark.parametrize(
    ("name", "data"),
    [("b.weight", bytes(32)), ("a", bytes(47)), ("a", bytes(49)), ("zzz", bytes(48))],
    ids=["out of order", "too short", "too long", "unknown"],
)
def test_writing_what_was_not_announced_raises(tmp_path, name, data):
    with pytest.raises(AssertionError, match="announced"):
        ShardWriter(tmp_path, announced()).write(name, data)


def test_writing_less_or_more_than_announced_raises(tmp_path):
    writer = ShardWriter(tmp_path, announced())
    writer.write("a", bytes(48))
    with pytest.raises(AssertionError, match="3 announced tensors were not written"):
        writer.close()
    writer = write_all(tmp_path, 1 << 30)
    with pytest.raises(AssertionError, match="announced"):
        writer.write("a", bytes(48))
    writer.close()


def test_a_written_config_is_mirrored_for_the_hub(tmp_path):
    write_config(tmp_path, {"model_type": "llama", "quantization": {"bits": 4}, "_name_or_path": "/home/me/model"})
    config = json.loads((tmp_path / "config.json").read_text())
    assert config == {"model_type": "llama", "quantization": {"bits": 4}, "quantization_config": {"bits": 4}}


def test_tokenizer_files_are_found_by_name(model):
    (model / "notes.txt").write_text("private")
    found = {f.name for f in Checkpoint(model).tokenizer_files()}
    assert found == {"tokenizer.json", "tokenizer_config.json"}
