"""Importance matrices: sums against float64 numpy and llama.cpp's own, the file, and what they are good for."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import gguf
import numpy as np
import pytest
import reference

from mlx_pare.base.errors import PareError, UsageError
from mlx_pare.exporting import importance_matrix, llama_cpp
from mlx_pare.exporting.export import export
from mlx_pare.gguf import header as gguf_header
from mlx_pare.gguf.write import imatrix_file
from mlx_pare.model.checkpoint import Checkpoint
from mlx_pare.text.corpus import Rows

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))
import llama_eval

INPUTS = {"attn_q": "attn_norm", "attn_k": "attn_norm", "attn_v": "attn_norm", "attn_output": "attention"}
INPUTS |= {"ffn_gate": "ffn_norm", "ffn_up": "ffn_norm", "ffn_down": "ffn"}
# of whole blocks of 256, so that K types do not fall back
WIDE = {"hidden_size": 256, "intermediate_size": 256, "num_attention_heads": 4, "head_dim": 64, "num_hidden_layers": 2}


def needs_llama(test):
    missing = not llama_cpp.available()
    return pytest.mark.llama(pytest.mark.skipif(missing, reason="llama-cpp-python is not installed")(test))


def rows_of(count: int = 6, length: int = 40) -> Rows:
    """Random tokens; the first rows are shorter."""
    draw = np.random.default_rng(1)
    tokens = draw.integers(0, 500, (count, length)).astype(np.int32)
    lengths = np.array([7, length - 1, *[length] * (count - 2)], np.int32)
    return Rows(tokens, lengths)


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "gemma3_text"])
def test_sums_are_those_of_float64_numpy(pico_models, family):
    model, rows = pico_models(family), rows_of()
    found = importance_matrix.measure(model, rows)
    config, weights = reference.load(model)
    _, layers = reference.forward(config, weights, rows.tokens)
    assert len(found.sums) == 7 * config["num_hidden_layers"]
    for name, sums in found.sums.items():
        _, layer, stem, _ = name.split(".")
        expected = reference.moments(layers[int(layer)][INPUTS[stem]], rows.lengths)["sq_sum"]
        np.testing.assert_allclose(sums, expected, rtol=2e-4, err_msg=name)
        assert found.counts[name] == rows.lengths.sum()
    assert (found.chunks, found.chunk_size) == (6, 40)


def test_padding_does_not_count(pico_models):
    model, rows = pico_models("llama"), rows_of()
    other = rows.tokens.copy()
    other[0, 7:] = 3
    same = importance_matrix.measure(model, Rows(other, rows.lengths)).sums
    full = importance_matrix.measure(model, Rows.full(rows.tokens)).sums
    for name, sums in importance_matrix.measure(model, rows).sums.items():
        np.testing.assert_allclose(sums, same[name], rtol=1e-6)
        assert (full[name] > sums).all()


def test_with_hidden_states_on_disk_it_is_the_same(pico_models, tmp_path, monkeypatch):
    model, rows = pico_models("qwen3"), rows_of()
    resident = importance_matrix.measure(model, rows).sums
    monkeypatch.setattr(importance_matrix.memory, "must_spool", lambda *args: True)
    for name, sums in importance_matrix.measure(model, rows, scratch=tmp_path).sums.items():
        np.testing.assert_array_equal(sums, resident[name])
    assert list(tmp_path.iterdir()) == []


@needs_llama
@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma3_text"])
def test_sums_are_those_that_llama_cpp_sees(pico_models, tmp_path, family):
    """Also of q, k and o, whose rows are in another order there: columns are not."""
    model, rows = pico_models(family), Rows.full(rows_of().tokens)
    export(model, tmp_path / "m.gguf", "f32")
    theirs, ours = llama_eval.importance(tmp_path / "m.gguf", rows.tokens), importance_matrix.measure(model, rows).sums
    assert theirs.keys() == ours.keys()
    for name in ours:
        np.testing.assert_allclose(ours[name], theirs[name], rtol=2e-2 if family == "gemma3_text" else 1e-3)


# ---- the file ----


def made(**changes) -> imatrix_file.Importance:
    draw = np.random.default_rng(0)
    sums = {f"blk.{i}.ffn_{n}.weight": draw.random(8, np.float32) for i in range(2) for n in ("up", "down")}
    found = imatrix_file.Importance(sums, dict.fromkeys(sums, 12.0), ("a.txt", "b.txt"), 3, 4)
    return replace(found, **changes)


def test_the_file_is_as_llama_imatrix_writes_it(tmp_path):
    found = made()
    found.save(tmp_path / "m.gguf")
    reader = gguf.GGUFReader(tmp_path / "m.gguf")
    assert reader.fields["general.type"].contents() == "imatrix"
    assert reader.fields["imatrix.datasets"].contents() == ["a.txt", "b.txt"]
    assert reader.fields["imatrix.chunk_count"].contents() == 3
    assert reader.fields["imatrix.chunk_size"].contents() == 4
    assert "general.architecture" not in reader.fields
    assert [t.name for t in reader.tensors][:2] == ["blk.0.ffn_down.weight.in_sum2", "blk.0.ffn_down.weight.counts"]
    shapes = {t.name.rpartition(".")[2]: t.shape.tolist() for t in reader.tensors}
    assert shapes == {"in_sum2": [8, 1], "counts": [1, 1]}
    again = imatrix_file.load(tmp_path / "m.gguf")
    assert again.counts == found.counts and (again.chunks, again.chunk_size) == (3, 4) and again.name == "m.gguf"
    for name, mean in again.means().items():
        np.testing.assert_array_equal(mean, found.sums[name] / np.float32(12))
    assert [f.name for f in tmp_path.iterdir()] == ["m.gguf"]


def test_what_no_token_went_through_counts_as_one():
    found = made()
    found = replace(found, counts={**found.counts, "blk.1.ffn_up.weight": 0.0})
    assert (found.means()["blk.1.ffn_up.weight"] == 1).all()


def write(path: Path, tensors: dict[str, np.ndarray], keys: bool = True) -> Path:
    writer = gguf.GGUFWriter(path, "llama")
    if keys:
        writer.add_array("imatrix.datasets", ["t"])
        writer.add_uint32("imatrix.chunk_count", 1)
        writer.add_uint32("imatrix.chunk_size", 1)
    for name, values in tensors.items():
        writer.add_tensor(name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


SUM, COUNT = np.ones((1, 8), np.float32), np.ones((1, 1), np.float32)
BROKEN = [
    ({"a.in_sum2": SUM, "a.counts": COUNT}, False, "is no importance matrix"),
    ({"a.in_sum2": SUM, "a.counts": COUNT, "b.weight": SUM}, True, "'b.weight' .F32., which no importance matrix has"),
    ({"a.in_sum2": SUM.astype(np.float16), "a.counts": COUNT}, True, "which no importance matrix has"),
    ({"a.in_sum2": SUM}, True, "lacks one of the two tensors of 'a'"),
    ({"a.counts": COUNT}, True, "lacks one of the two tensors of 'a'"),
    ({"a.in_sum2": -SUM, "a.counts": COUNT}, True, "no sums of squares"),
    ({"a.in_sum2": SUM * np.float32("nan"), "a.counts": COUNT}, True, "no sums of squares"),
    ({"a.in_sum2": SUM.repeat(2, 0), "a.counts": COUNT.repeat(2, 0)}, True, "several experts"),
]


@pytest.mark.parametrize(("tensors", "keys", "said"), BROKEN)
def test_a_broken_file_is_refused(tmp_path, tensors, keys, said):
    with pytest.raises(PareError, match=said):
        imatrix_file.load(write(tmp_path / "m.gguf", tensors, keys))


def test_the_matrix_of_another_model_is_refused(pico_models):
    found = importance_matrix.measure(pico_models("llama"), rows_of(2))
    with pytest.raises(UsageError, match=r"has 128 inputs of blk\.0\.ffn_down.weight, the model 72"):
        imatrix_file.check(found, Checkpoint(pico_models("llama", intermediate_size=72)))
    with pytest.raises(UsageError, match=r"has nothing of blk\.4"):
        imatrix_file.check(found, Checkpoint(pico_models("llama", num_hidden_layers=5)))
    imatrix_file.check(found, Checkpoint(pico_models("llama")))


# ---- what it is good for ----


@needs_llama
@pytest.mark.parametrize("kind", ["q3_k_m", "q4_0"])
def test_the_weighted_error_falls_in_every_matrix(pico_models, tmp_path, kind):
    """Inputs of very different energy, planted by the norms in front: the error that the matrix weighs is smaller with
    it than without, matrix by matrix; which a matrix under the wrong name, or in the wrong order, would not bring."""
    model = pico_models("llama", **WIDE)
    matrix = importance_matrix.measure(model, rows_of())
    spread = np.exp(np.random.default_rng(2).normal(0, 2, 256)).astype(np.float32)
    matrix = replace(matrix, sums={name: sums * spread for name, sums in matrix.sums.items()})
    export(model, tmp_path / "plain.gguf", kind)
    export(model, tmp_path / "with.gguf", kind, matrix)
    export(model, tmp_path / "f32.gguf", "f32")

    def values(name: str) -> dict[str, tuple[str, np.ndarray]]:
        found = gguf.GGUFReader(tmp_path / name).tensors
        return {t.name: (t.tensor_type.name, gguf.quants.dequantize(t.data, t.tensor_type)) for t in found}

    true, plain, weighed = (values(f"{name}.gguf") for name in ("f32", "plain", "with"))
    means, compared = matrix.means(), 0
    for name, (kept, exact) in true.items():
        if name in means and plain[name][0] == weighed[name][0]:
            lost = [float((np.square(of[name][1] - exact) * means[name]).sum()) for of in (plain, weighed)]
            assert lost[1] < 0.97 * lost[0], (name, kept, lost)
            compared += 1
    assert compared >= 13


@needs_llama
def test_the_file_says_what_it_was_made_with(pico_models, tmp_path):
    matrix = replace(importance_matrix.measure(pico_models("llama"), rows_of(), "novel"), name="of-mine.gguf")
    export(pico_models("llama"), tmp_path / "m.gguf", "q4_k_m", matrix)
    told = gguf_header.read(tmp_path / "m.gguf").metadata
    assert told["quantize.imatrix.file"] == "of-mine.gguf" and told["quantize.imatrix.dataset"] == "novel"
    assert told["quantize.imatrix.entries_count"] == 28 and told["quantize.imatrix.chunks_count"] == 6
    assert [f.name for f in tmp_path.iterdir()] == ["m.gguf"]
