"""Models whose layers differ as GGUF: llama.cpp itself computes what stock mlx-lm does."""

from __future__ import annotations

import gguf
import numpy as np
import pytest

from mlx_pare.base.errors import PareError
from mlx_pare.exporting import importance_matrix, llama_cpp
from mlx_pare.exporting.export import export
from mlx_pare.exporting.llama_cpp import verify
from mlx_pare.gguf import uneven_layers
from mlx_pare.gguf.write import size as gguf_size, tensors as gguf_rows
from mlx_pare.model.checkpoint import Checkpoint
from mlx_pare.pruning.prune import prune
from tests.arch.test_uneven import COUNTS, FUSED, NAS, ROWS, WIDE, model, plan_of  # noqa: F401 (model is a fixture)

pytestmark = [
    pytest.mark.llama,
    pytest.mark.skipif(not llama_cpp.available(), reason="llama-cpp-python is not installed"),
]
SCALED = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 16}  # fmt: skip
CASES = {
    "llama, widths": ("llama", COUNTS["both"], {}),
    "llama, no ffn": ("llama-untied", COUNTS["no ffn"], {}),
    "mistral": ("mistral", COUNTS["kv_head"], {}),
    "qwen3": ("qwen3", COUNTS["no ffn"], {}),
    "qwen3, widths": ("qwen3", COUNTS["both"], {}),
    "no attention": ("llama-untied", NAS, WIDE),
    "no attention first": ("llama", [(256, 0), *NAS[1:]], WIDE),
    "neither first": ("llama", [(512, 0), (0, 4), (512, 4), (256, 0)], WIDE),
    "biases": ("llama", NAS, {**WIDE, "attention_bias": True, "mlp_bias": True}),
    "llama3 rope": ("llama", NAS, {**WIDE, "rope_scaling": SCALED}),
    "linear rope": ("llama", NAS, {**WIDE, "rope_scaling": {"type": "linear", "factor": 4.0}}),
    "qwen2": ("qwen2", NAS, WIDE),
}


def exported(source, counts, tmp_path, kind="f32"):
    prune(source, plan_of(source, counts), tmp_path / "out")
    return tmp_path / "out", export(tmp_path / "out", tmp_path / "m.gguf", kind)


@pytest.mark.parametrize("case", CASES)
def test_llama_cpp_computes_the_same(model, tmp_path, case):  # noqa: F811
    name, counts, changes = CASES[case]
    out, done = exported(model(name, **changes), counts, tmp_path)
    found = verify(out, tmp_path / "m.gguf")
    assert found["max_abs_difference"] < 1e-4 and found["same_argmax"] == 1 and found["different"] == []
    assert done["architecture"] == ("openelm" if name == "qwen3" else "deci")
    fields = gguf.GGUFReader(tmp_path / "m.gguf").fields
    heads = fields[f"{done['architecture']}.attention.head_count_kv"].contents()
    expected = [h for _, h in counts]
    assert heads == (expected if expected[0] else [1, *expected[1:]])


def test_packed(model, tmp_path):  # noqa: F811
    """Codes of 4 bits, written as they are understood, and in 8 bits."""
    source = model("llama", (4, FUSED), **WIDE)
    out, _ = exported(source, NAS, tmp_path)
    assert verify(out, tmp_path / "m.gguf")["max_abs_difference"] < 1e-4
    export(out, tmp_path / "q.gguf", "q8_0")
    assert verify(out, tmp_path / "q.gguf")["relative_difference"] < 0.05


@pytest.mark.parametrize("name", ["llama", "qwen3"])
def test_quantized_by_llama_cpp(model, tmp_path, name):  # noqa: F811
    """Types and bytes are known beforehand, of parts of fused matrices too; an importance matrix has all of them."""
    source = model(name, hidden_size=256, intermediate_size=512, num_hidden_layers=4)
    counts = [(256, 4), (512, 2), (256, 3), (512, 4)]
    prune(source, plan_of(source, counts), tmp_path / "out")
    matrix = importance_matrix.measure(tmp_path / "out", ROWS)
    for kind, of in (("q4_k_m", None), ("q4_k_m", matrix), ("q3_k_m", matrix)):
        file = tmp_path / f"{kind}-{of is not None}.gguf"
        expected = gguf_size.measured(Checkpoint(tmp_path / "out"), kind, of)
        done = export(tmp_path / "out", file, kind, of)
        assert file.stat().st_size == expected.nbytes == done["bytes"]
        assert verify(tmp_path / "out", file)["relative_difference"] < 0.7


def test_nothing_stands_in_where_llama_cpp_quantizes(model, tmp_path):  # noqa: F811
    prune(source := model("llama", **WIDE), plan_of(source, NAS), tmp_path / "out")
    with pytest.raises(PareError, match="something else stands in the file"):
        export(tmp_path / "out", tmp_path / "m.gguf", "q4_k_m")


def test_what_has_no_architecture_is_refused(model, tmp_path):  # noqa: F811
    with pytest.raises(PareError, match="norms of queries and keys and an untied head"):
        exported(model("qwen3-untied"), COUNTS["both"], tmp_path)
    assert not (tmp_path / "m.gguf").exists()
    assert uneven_layers.why_not(Checkpoint(model("qwen3")).arch) is None


FAULTS = {
    "the rope of queries and keys": ("llama, widths", uneven_layers, "ROPE", {"attn_q"}),
    "gate and up in their places": ("llama, widths", uneven_layers, "GATE_UP", None),
    "a feed-forward that is nothing": ("no attention", uneven_layers, "stand_ins", None),
    "the factors of the rope": ("llama3 rope", gguf_rows, "rope_factors", lambda t, d: np.ones(d // 2, np.float32)),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_what_is_forgotten_is_noticed(model, tmp_path, monkeypatch, fault):  # noqa: F811
    case, module, what, other = FAULTS[fault]
    if what == "GATE_UP":
        swapped = {"gate_up_proj": ("ffn_up", "ffn_gate")}
        monkeypatch.setattr(uneven_layers, "SPLIT", {"deci": uneven_layers.QKV | swapped})
    elif what == "stand_ins":
        real = uneven_layers.stand_ins
        monkeypatch.setattr(module, what, lambda arch: ((n, v + 0.1) for n, v in real(arch)))
    else:
        monkeypatch.setattr(module, what, other)
    name, counts, changes = CASES[case]
    out, _ = exported(model(name, **changes), counts, tmp_path)
    assert verify(out, tmp_path / "m.gguf")["max_abs_difference"] > 0.01
