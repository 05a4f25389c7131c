"""Faults that a review found, each held by a test: wrong rope, mixed statistics, stale numbers, unjudged files."""

from __future__ import annotations

import json
from dataclasses import replace

import mlx.core as mx
import numpy as np
import pico
import pytest

from mlx_pare import lm
from mlx_pare.base.errors import PareError, Refused
from mlx_pare.exporting import llama_cpp
from mlx_pare.model.checkpoint import Checkpoint
from mlx_pare.options.settings import Settings
from mlx_pare.pipeline import run as pipeline
from mlx_pare.planning.goal import Options
from mlx_pare.planning.plan import plan
from mlx_pare.pruning.plan_file import Plan
from mlx_pare.pruning.prune import prune
from mlx_pare.scoring.calibrate import Statistics, calibrate
from mlx_pare.store.arrays import Arrays
from mlx_pare.stream import walk as stream
from mlx_pare.tensors.packed import pack, relative_error
from mlx_pare.tensors.packing import Packing
from mlx_pare.text import corpus
from mlx_pare.text.corpus import Rows


def rows(seed: int = 0) -> Rows:
    return Rows.full(np.random.RandomState(seed).randint(1, 300, (4, 16)))


def scores_of(model, path):
    """Scores drawn by lot, in the form that `score` writes."""
    arch, draw = Checkpoint(model).arch, np.random.RandomState(1)
    arrays = {axis: mx.array(draw.rand(len(arch.layers), arch.uniform(axis))) for axis in ("ffn", "kv_head")}
    arrays["hidden"] = mx.array(draw.rand(arch.sizes["hidden"]))
    arrays["layer"] = mx.array(draw.rand(len(arch.layers)))
    Arrays(arrays, {"criterion": "random", "seed": 0, "model": Checkpoint(model).identity()}).save(path)
    return path


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_rope_of_transformers_5_is_understood(tmp_path, family):
    """A config with rope_parameters only is the same model: stock mlx-lm would compute with a theta of 10000."""
    old = pico.make(tmp_path / "old", family, rope_theta=500.0)
    new = pico.make(tmp_path / "new", family)
    config = json.loads((old / "config.json").read_text())
    config["rope_parameters"] = {"rope_theta": config.pop("rope_theta"), "rope_type": "default"}
    (new / "config.json").write_text(json.dumps(config))
    (new / "model.safetensors").write_bytes((old / "model.safetensors").read_bytes())
    expected, found = (np.array(stream.walk(path, rows()).hidden) for path in (old, new))
    assert np.array_equal(expected, found)
    del config["rope_parameters"]
    (new / "config.json").write_text(json.dumps(config))
    assert np.abs(np.array(stream.walk(new, rows()).hidden) - expected).max() > 1e-3


def test_statistics_of_other_rows_are_not_continued(pico_models, tmp_path, monkeypatch):
    model = pico_models("llama")
    with monkeypatch.context() as patch:
        patch.setattr(Statistics, "leave", stop_after(Statistics.leave))
        with pytest.raises(RuntimeError):
            calibrate(model, rows(0), tmp_path / "stats", save_every_s=0)
    with pytest.raises(Refused, match="other text"):
        calibrate(model, rows(1), tmp_path / "stats")
    calibrate(model, rows(0), tmp_path / "stats")


def stop_after(leave):
    def stopping(self, index, hidden):
        leave(self, index, hidden)
        raise RuntimeError("stopped")

    return stopping


def test_paragraphs_stay_whole_when_text_is_split():
    wrapped = "\n\n".join(f"first line of {i}\nsecond line of {i}" for i in range(200))
    parts = corpus.split([wrapped], {"a": 50, "b": 50})
    both = "\n\n".join(p for part in parts.values() for p in part)
    assert all(f"first line of {i}\nsecond line of {i}" in both for i in range(200))
    assert all(parts.values())


def test_records_stay_whole_when_there_are_many():
    chats = [f"user\nquestion {i}\nassistant\nanswer {i}\n" for i in range(60)]
    parts = corpus.split(chats, {"a": 50, "b": 50})
    assert sorted(d.strip() for part in parts.values() for d in part) == sorted(c.strip() for c in chats)
    assert not {d for d in parts["a"]} & {d for d in parts["b"]}


def test_every_window_begins_as_the_tokenizer_begins_a_text(pico_models):
    """Llama 3 and Gemma put BOS before every text; a window without one is nothing they have seen."""

    class Beginning:
        bos_token_id = 7

        def encode(self, text, add_special_tokens=True, verbose=True):
            ids = [100 + ord(c) for c in text]
            return [7, *ids] if add_special_tokens else ids

    found = corpus.windows(Beginning(), ["abcdefgh"], 5)
    assert found.tokens.tolist() == [[7, *(100 + ord(c) for c in part)] for part in ("abcd", "efgh")]


def test_a_chat_that_brings_its_own_bos_gets_no_second(pico_models):
    class Plain:
        bos_token_id = 7

        def encode(self, text, add_special_tokens=True, verbose=True):
            return [7 if c == "^" else 100 for c in text]

    assert corpus.windows(Plain(), ["^ab", "cd"], 6).tokens.tolist() == [[7, 100, 100, 7, 100, 100]]


def test_matrix_of_zeros_has_no_error():
    zeros = mx.zeros((4, 64))
    assert relative_error(zeros, pack(zeros, Packing(4, 32), mx.float32)) == 0.0


def test_packing_is_no_worse_than_mlx_in_the_same_dtype():
    """Codes must suit the scales that are stored, not those they were rounded from."""
    dense = mx.random.normal((64, 512), key=mx.random.key(0)).astype(mx.bfloat16)
    found = pack(dense, Packing(8, 64), mx.bfloat16)
    words, scales, biases = mx.quantize(dense, group_size=64, bits=8)
    assert np.array_equal(np.array(found.words), np.array(words))
    assert (
        found.scales.dtype == mx.bfloat16
        and bool((found.scales == scales).all())
        and bool((found.biases == biases).all())
    )


@pytest.mark.parametrize("options", [Options(params=1e9), Options(size=1e9)])
def test_a_model_that_fits_is_not_cut(pico_models, tmp_path, options):
    model = pico_models("llama")
    with pytest.raises(Refused, match="nothing needs to be cut"):
        plan(model, scores_of(model, tmp_path / "scores.safetensors"), options)


def test_parameters_are_met_also_when_the_cut_unties_the_head(pico_models, tmp_path):
    model = pico_models("qwen2")
    whole = plan(model, scores_of(model, tmp_path / "s.safetensors"), Options(keep=1.0)).before.parameters
    asked = Options(params=0.95 * whole, bits=8, group_size=32, axes=("ffn", "kv_head"))
    made = plan(model, tmp_path / "s.safetensors", asked)
    prune(model, made, tmp_path / "out")
    counted = sum(t.size for t in Checkpoint(tmp_path / "out").arch.tensors())
    assert counted == made.after.parameters
    assert abs(counted - asked.params) < 0.05 * whole


def test_what_is_written_about_an_edited_plan_is_counted(pico_models, tmp_path):
    model = pico_models("llama")
    made = plan(model, scores_of(model, tmp_path / "s.safetensors"), Options(keep=0.7))
    edited = Plan.model_validate({**made.model_dump(), "layers": made.model_dump()["layers"][:-1]})
    prune(model, edited, tmp_path / "out")
    arch = Checkpoint(tmp_path / "out").arch
    written = Plan.load(tmp_path / "out" / "plan.json").after
    assert written.layers == len(arch.layers) == 3
    assert written.parameters == sum(t.size for t in arch.tensors())
    assert f"{written.parameters:,} parameters" in (tmp_path / "out" / "README.md").read_text()


def test_a_run_repeated_without_recovery_reports_the_pruned_model(pico_models, tmp_path):
    s = Settings(keep=0.8, length=32, samples=8, recover_steps=2, trials=0, gguf="f16", context=128, seed=1)
    pipeline.run(pico_models("llama", num_hidden_layers=2), tmp_path / "run", s)
    for step in ("export",):  # as if it had been stopped before the export
        manifest = json.loads((tmp_path / "run" / "manifest.json").read_text())
        del manifest["steps"][step]
        (tmp_path / "run" / "manifest.json").write_text(json.dumps(manifest))
    found = pipeline.run(pico_models("llama", num_hidden_layers=2), tmp_path / "run", replace(s, recover_steps=0))
    assert "/prune/model" in found["model"] and "/prune/model" in found["after"]["model"]
    assert "recovered" not in found["contenders"] and "## Recovery" not in (tmp_path / "run" / "report.md").read_text()


@pytest.mark.parametrize(
    ("numbers", "words"),
    [
        ({"different": ["a b"]}, "tokenizes 'a b' differently"),
        ({"relative_difference": 0.5}, "computes something else"),
    ],
)
def test_a_gguf_that_differs_is_set_aside(pico_models, tmp_path, monkeypatch, numbers, words):
    file = tmp_path / "m.gguf"
    file.write_bytes(b"GGUF")
    found = {"checked": True, "different": [], "relative_difference": 0.0, **numbers}
    monkeypatch.setattr(llama_cpp, "verify", lambda *_: found)
    with pytest.raises(PareError, match=words):
        llama_cpp.judged(pico_models("llama"), file, "f32")
    assert not file.exists() and (tmp_path / "m.gguf.rejected").exists()
    monkeypatch.setattr(llama_cpp, "verify", lambda *_: found | {"different": [], "relative_difference": 0.001})
    file.write_bytes(b"GGUF")
    assert llama_cpp.judged(pico_models("llama"), file, "f32")["checked"] and file.exists()


def test_stock_load_reads_both_spellings(tmp_path):
    """What leaves us is read alike by classes that know either name."""
    model = pico.make(tmp_path / "m", "llama", rope_theta=500.0)
    prune(model, plan(model, scores_of(model, tmp_path / "s.safetensors"), Options(keep=0.9)), tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["rope_theta"] == config["rope_parameters"]["rope_theta"] == 500.0
    assert lm.load(tmp_path / "out").args.rope_theta == 500.0
