"""Explicit cuts, rows of text and candidates: what mlx_pare/api.py adds to the verbs."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import mlx_pare
from mlx_pare import api, lm
from mlx_pare.base.errors import PareError, UsageError
from mlx_pare.model.checkpoint import Checkpoint
from mlx_pare.pruning.survivors import survivors
from mlx_pare.store.arrays import Arrays
from mlx_pare.text.splits import Texts


@pytest.fixture
def scores(pico_models, pico_stats, tmp_path) -> Path:
    model = pico_models("llama")
    return mlx_pare.score(model, pico_stats(model), tmp_path / "scores.safetensors", "wanda")


# ---- candidates ----


def test_candidates_are_the_units_with_the_lowest_scores(scores):
    found, arrays = api.candidates(scores, 0.25), Arrays.load(scores, "scores").arrays
    assert found["criterion"] == "wanda" and list(found["ffn"]) == [0, 1, 2, 3]
    for layer, channels in found["ffn"].items():
        left = np.delete(arrays["ffn"][layer], channels)
        assert len(channels) == 32 and channels == sorted(channels)
        assert arrays["ffn"][layer][channels].max() <= left.min()
    assert found["layers"] == [int(arrays["layer"].argmin())]


def test_candidates_need_no_model(scores, monkeypatch):
    monkeypatch.setattr(api, "Checkpoint", None)
    assert api.candidates(str(scores), 0.5) == api.candidates(scores, 0.5)
    assert api.candidates(scores, 0)["layers"] == []


@pytest.mark.parametrize("ratio", [-0.1, 1, 1.5, float("nan")])
def test_a_ratio_out_of_range_is_refused(scores, ratio):
    with pytest.raises(UsageError, match="between 0 and 1"):
        api.candidates(scores, ratio)


# ---- explicit cuts ----


def test_named_layers_go_and_no_others(pico_models, tmp_path):
    """Older tools kept evenly spaced layers whatever was named."""
    made = api.without(pico_models("llama"), layers=[1, 2])
    assert [layer.source for layer in made.layers] == [0, 3] and made.axes == ["layer"]
    mlx_pare.prune(pico_models("llama"), made, tmp_path / "out")
    assert [layer["source"] for layer in survivors(tmp_path / "out" / "survivors.json")["layers"]] == [0, 3]


def test_named_neurons_go_from_all_three_matrices(pico_models, tmp_path):
    model = pico_models("llama")
    made = api.without(model, ffn={np.int64(2): np.arange(8), 0: [5]})
    mlx_pare.prune(model, made, tmp_path / "out")
    assert [len(layer.ffn) for layer in made.layers] == [127, 128, 120, 128]
    assert 5 not in made.layers[0].ffn and made.layers[2].ffn[0] == 8
    before, after = Checkpoint(model), Checkpoint(tmp_path / "out")
    assert after.arch.layers[2].sizes["ffn"] == 120
    assert made.after.parameters == made.before.parameters - 9 * 3 * 64
    assert made.target.value == pytest.approx(made.after.non_embedding / made.before.non_embedding)
    assert after.nbytes() == made.after.bytes < before.nbytes()


def test_the_same_channels_of_every_layer_keep_the_class(pico_models, scores, tmp_path):
    """All layers end up cut: a tool that copied the whole model each time cut the last one only."""
    model = pico_models("llama")
    made = api.without(model, ffn=api.candidates(scores, 0.5)["ffn"])
    mlx_pare.prune(model, made, tmp_path / "out")
    found = mlx_pare.inspect(tmp_path / "out")
    assert found["ffn"] == 64 and Checkpoint(tmp_path / "out").config["model_type"] == "llama"


def test_named_heads_go_with_their_queries(pico_models, tmp_path):
    model = pico_models("qwen2")
    made = api.without(model, kv_head={layer: [0, 3] for layer in range(4)})
    mlx_pare.prune(model, made, tmp_path / "out")
    assert all(layer.kv_head == [1, 2] for layer in made.layers)
    assert survivors(tmp_path / "out" / "survivors.json")["layers"][0]["q_head"] == [2, 3, 4, 5]


@pytest.mark.parametrize(
    ("named", "said"),
    [
        ({"layers": [4]}, "no layer 4"),
        ({"layers": [-1]}, "no layer -1"),
        ({"layers": ["model.layers.1"]}, "no layer 'model.layers.1'"),
        ({"layers": "12"}, "no layer '1'"),
        ({"ffn": {9: [0]}}, "no layer 9"),
        ({"ffn": {1: [128]}}, "no ffn in layer 1 128"),
        ({"ffn": {1: [0.5]}}, "no ffn in layer 1 0.5"),
        ({"kv_head": {1: [2]}}, "no kv_head in layer 1 2"),
    ],
)
def test_what_the_model_does_not_have_is_refused(pico_models, named, said):
    with pytest.raises(UsageError) as error:
        api.without(pico_models("llama"), **named)
    assert said in str(error.value)


def test_a_cut_that_no_class_holds_is_refused_before_anything_is_written(pico_models):
    with pytest.raises(PareError, match="layers differ in ffn"):
        api.without(pico_models("gemma3_text"), ffn={1: [0]})


# ---- rows of text ----


def test_rows_are_those_of_a_run(pico_models, two_texts):
    model = pico_models("llama")
    found = api.rows(model, two_texts["data"], samples=6, length=32)
    settings = api.Settings(data=two_texts["data"], samples=6, length=32)
    assert found.digest() == Texts(model, settings).calibration.digest() and found.tokens.shape == (6, 32)
    assert api.rows(model, samples=2, length=16).count == 2


def test_every_name_is_there():
    assert all(getattr(api, name) for name in api.__all__) and api.tokenizer is lm.tokenizer
