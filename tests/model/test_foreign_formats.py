"""Formats of other quantizers: what is said of each, held against what mlx-lm itself does with it."""

from __future__ import annotations

import importlib.util
import json
import struct
from collections.abc import Callable
from pathlib import Path

import mlx.core as mx
import numpy as np
import pico
import pytest

from mlx_pare import fit, inspect
from mlx_pare.base.errors import Unsupported
from mlx_pare.capacity.form import Form
from mlx_pare.capacity.subject import open_subject
from mlx_pare.model import foreign_formats
from mlx_pare.model.checkpoint import Checkpoint
from mlx_pare.model.weight_files import read_headers
from mlx_pare.tensors.safetensors import DTYPE_BYTES

Tensors = dict[str, tuple[str, tuple[int, ...], bytes | None]]


def written(directory: Path, tensors: Tensors, config: dict) -> Path:
    """The model directory with these tensors (None: zeros) and these keys of config.json."""
    table, at, parts = {}, 0, []
    for name, (dtype, shape, data) in tensors.items():
        data = bytes(DTYPE_BYTES[dtype] * int(np.prod(shape, dtype=int))) if data is None else data
        table[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [at, at + len(data)]}
        at += len(data)
        parts.append(data)
    raw = json.dumps(table).encode()
    (directory / "model.safetensors").write_bytes(struct.pack("<Q", len(raw)) + raw + b"".join(parts))
    file = directory / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | config))
    return directory


def matrix(**parts: tuple[str, Callable[[int, int], tuple[int, ...]]]) -> Callable[[int, int], Tensors]:
    """What a format stores of a matrix of so many rows and columns: leaf -> dtype and shape."""
    return lambda o, i: {leaf.replace("__", "."): (dtype, shape(o, i), None) for leaf, (dtype, shape) in parts.items()}


F8 = ("F8_E4M3", lambda o, i: (o, i))
ROW, ONE = ("F32", lambda o, i: (o, 1)), ("F32", lambda o, i: ())
AWQ = matrix(
    qweight=("I32", lambda o, i: (i, o // 8)),
    qzeros=("I32", lambda o, i: (i // 32, o // 8)),
    scales=("F16", lambda o, i: (i // 32, o)),
)
GPTQ = {"qweight": ("I32", lambda o, i: (i // 8, o)), "qzeros": ("I32", lambda o, i: (i // 32, o // 8))}
GPTQ |= {"scales": ("F16", lambda o, i: (i // 32, o))}
FOUR = {"bits": 4, "group_size": 32}
COMPRESSED = {"quant_method": "compressed-tensors"}
FORMS = {
    "awq": ({"quant_method": "awq", **FOUR, "version": "gemm", "zero_point": True}, AWQ),
    "awq of 8 bits": ({"quant_method": "awq", "bits": 8, "group_size": 32}, AWQ),
    "awq of another layout": (
        {"quant_method": "awq", **FOUR, "version": "gemv"},
        matrix(
            qweight=("I32", lambda o, i: (o, i // 8)),
            qzeros=("I32", lambda o, i: (o, 1)),
            scales=("F16", lambda o, i: (o, i // 32)),
        ),
    ),
    "gptq": ({"quant_method": "gptq", **FOUR}, matrix(**GPTQ, g_idx=("I32", lambda o, i: (i,)))),
    "gptq without g_idx": ({"quant_method": "gptq", **FOUR}, matrix(**GPTQ)),
    "bnb of 4 bits": (
        {"quant_method": "bitsandbytes", "load_in_4bit": True},
        matrix(weight=("U8", lambda o, i: (o * i // 2, 1)), weight__absmax=("U8", lambda o, i: (o * i // 64,))),
    ),
    "bnb of 8 bits": (
        {"quant_method": "bitsandbytes", "load_in_8bit": True},
        matrix(weight=("I8", lambda o, i: (o, i)), SCB=("F32", lambda o, i: (o,))),
    ),
    "fp8 in blocks": (
        {"quant_method": "fp8", "weight_block_size": [128, 128]},
        matrix(weight=F8, weight_scale_inv=ONE),
    ),
    "fp8": ({"quant_method": "fp8"}, matrix(weight=F8, weight_scale=ONE, input_scale=ONE)),
    "fbgemm": ({"quant_method": "fbgemm_fp8"}, matrix(weight=F8, weight_scale=ROW)),
    "modelopt": ({"quant_method": "modelopt", "quant_algo": "FP8"}, matrix(weight=F8, weight_scale=ONE)),
    "float-quantized": ({**COMPRESSED, "format": "float-quantized"}, matrix(weight=F8, weight_scale=ROW)),
    "int-quantized": (
        {**COMPRESSED, "format": "int-quantized"},
        matrix(weight=("I8", lambda o, i: (o, i)), weight_scale=ROW),
    ),
    "pack-quantized": (
        {**COMPRESSED, "format": "pack-quantized"},
        matrix(weight_packed=("I32", lambda o, i: (o, i // 8)), weight_scale=("BF16", lambda o, i: (o, i // 32))),
    ),
    "nvfp4-pack-quantized": (
        {**COMPRESSED, "format": "nvfp4-pack-quantized"},
        matrix(weight_packed=("U8", lambda o, i: (o, i // 2)), weight_scale=("F8_E4M3", lambda o, i: (o, i // 16))),
    ),
    "mxfp4 of experts": (
        {"quant_method": "mxfp4"},
        matrix(weight_blocks=("U8", lambda o, i: (o, i // 32, 16)), weight_scales=("U8", lambda o, i: (o, i // 32))),
    ),
    "mxfp4 with MLX's names": (
        {"quant_method": "mxfp4"},
        matrix(weight=("U32", lambda o, i: (o, i // 8)), scales=("U8", lambda o, i: (o, i // 32))),
    ),
    "hqq": (
        {"quant_method": "hqq"},
        matrix(W_q=("U8", lambda o, i: (o, i // 2)), scale=("F16", lambda o, i: (o, 1))),
    ),
    "quanto": ({"quant_method": "quanto"}, matrix(weight___data=("I8", lambda o, i: (o, i)))),
}
CONVERTS = {"awq", "mxfp4 with MLX's names"}
ORIGINAL = "meta-llama/Llama-3.2-1B"


@pytest.fixture(scope="module")
def quantized(tmp_path_factory) -> Callable[..., Path]:
    """``quantized(name, family, **config)``: a model whose matrices are stored in one of the FORMS."""

    def make(name: str, family: str = "llama", **config) -> Path:
        directory = pico.make(tmp_path_factory.mktemp("foreign") / "model", family, dtype=mx.float16)
        arrays = mx.load(str(directory / "model.safetensors"))
        tensors: Tensors = {n: ("F16", a.shape, np.array(a).tobytes()) for n, a in arrays.items()}
        method, stored = FORMS[name]
        for module in [n.removesuffix(".weight") for n in tensors if n.endswith("proj.weight")]:
            shape = tensors.pop(f"{module}.weight")[1]
            tensors |= {f"{module}.{leaf}": told for leaf, told in stored(*shape).items()}
        return written(directory, tensors, {"quantization_config": method, "torch_dtype": "bfloat16", **config})

    return make


@pytest.mark.parametrize("name", FORMS)
def test_case_10_what_is_said_is_what_mlx_lm_does(quantized, tmp_path, name):
    """The cure is tried: where it says mlx_lm.convert, that makes a model that can be cut; else that fails."""
    from mlx_lm.convert import convert

    model = quantized(name)
    with pytest.raises(Unsupported) as caught:
        _ = Checkpoint(model).arch
    if name in CONVERTS:
        assert "convert it with mlx_lm.convert" in caught.value.cure
        convert(str(model), str(tmp_path / "made"))
        assert Checkpoint(tmp_path / "made").arch.cuttable and Checkpoint(tmp_path / "made").quantized
        return
    assert "cannot load this format" in caught.value.cure and "the float original" in caught.value.cure
    assert "convert it with" not in caught.value.cure
    with pytest.raises(Exception):  # noqa: B017 of whatever sort
        convert(str(model), str(tmp_path / "made"))


@pytest.mark.parametrize("name", FORMS)
def test_case_10_fit_and_inspect_say_that_mlx_lm_cannot_load_it(quantized, name):
    model = quantized(name, _name_or_path=ORIGINAL)
    for notes in (fit(model, macs=["m4-24gb"])["notes"], inspect(model)["notes"]):
        assert any("mlx-lm 0.32 cannot load" in note and ORIGINAL in note for note in notes) == (name not in CONVERTS)
        assert not any("unpacks" in note for note in notes)
    if name not in CONVERTS:
        found = open_subject(str(model), Form())
        assert "as stored" in found.described and "float16" not in found.described
        assert found.weights.nbytes == sum(entry.nbytes for entry in read_headers(model).values())


NAMED = [
    ({"base_model": ORIGINAL}, ORIGINAL),
    ({"_name_or_path": ORIGINAL}, ORIGINAL),
    ({"text_config": {"_name_or_path": ORIGINAL}}, ORIGINAL),
    ({"quantization_config": {"quant_method": "hqq", "base_model_name_or_path": ORIGINAL}}, ORIGINAL),
    ({"_name_or_path": "unsloth/llama-3-8b-bnb-4bit"}, None),
    ({"_name_or_path": "unsloth/llama-3-8b-bnb-4bit", "base_model": ORIGINAL}, ORIGINAL),
    ({"_name_or_path": "RedHatAI/Qwen3-8B-FP8-dynamic"}, None),
    ({"_name_or_path": "org/model-w4a16"}, None),
    ({"_name_or_path": "/home/somebody/llama"}, None),
    ({"_name_or_path": ""}, None),
    ({"_name_or_path": ["a/b"], "base_model": 7}, None),
    ({"_name_or_path": "a/b\x1b[2J"}, None),
    ({}, None),
]


@pytest.mark.parametrize(("config", "named"), NAMED)
def test_case_10_the_float_original_is_named_if_the_config_does(config, named):
    found = foreign_formats.foreign(
        {"quantization_config": {"quant_method": "hqq"}, "model_type": "llama"} | config, {}
    )
    assert found.original == named
    assert (named in found.cure) if named else "model card" in found.cure


NONE = [
    {},
    {"quantization": {"bits": 4, "group_size": 64}, "quantization_config": {"bits": 4, "group_size": 64}},
    {"text_config": {"quantization": {"bits": 4, "group_size": 64}}},
]


@pytest.mark.parametrize("config", NONE)
def test_case_10_floats_and_mlx_packings_are_not_foreign(config):
    assert foreign_formats.foreign({"model_type": "llama", **config}, {"a.weight": "BF16"}) is None


def source(model_type: str) -> str:
    """The source of mlx-lm's class for a model type."""
    from mlx_lm.utils import MODEL_REMAPPING

    return Path(
        importlib.util.find_spec(f"mlx_lm.models.{MODEL_REMAPPING.get(model_type, model_type)}").origin
    ).read_text()


def test_case_10_the_tables_are_those_of_mlx_lm():
    assert all("from_fp8" in source(name) for name in foreign_formats.UNPACKS_FP8)
    assert all("weight_packed" in source(name) for name in foreign_formats.UNPACKS["compressed-tensors"])
    assert all("_blocks" in source(name) for name in foreign_formats.UNPACKS["mxfp4"])
    dense = ("llama", "qwen2", "qwen3", "phi3", "gemma3_text", "ministral3")
    assert not [name for name in dense if "from_fp8" in source(name) or "weight_packed" in source(name)]


def test_case_10_types_that_unpack_are_counted_as_what_they_become():
    eight = {"a.weight": "F8_E4M3", "a.weight_scale_inv": "F32"}
    config = {"quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128]}}
    for kind in ("deepseek_v3", "kimi_k2"):
        assert foreign_formats.foreign({"model_type": kind, **config}, eight).note == ""
    assert foreign_formats.foreign(
        {"model_type": "kimi_k25", "text_config": {"model_type": "kimi_k2"}, **config}, eight
    ).loads
    assert not foreign_formats.foreign({"model_type": "qwen3", **config}, eight).loads
    assert not foreign_formats.foreign({"model_type": "deepseek_v3", **config}, {"a.weight": "F8_E4M3"}).loads
