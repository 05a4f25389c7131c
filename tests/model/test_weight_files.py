"""Which files make up a model: a second set of shards beside it, which mlx-lm would read as well."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import mlx.core as mx
import numpy as np
import pico
import pytest

from mlx_pare import fit, inspect, lm
from mlx_pare.base.errors import PareError
from mlx_pare.exporting import mlx_directory
from mlx_pare.exporting.export import export
from mlx_pare.model import weight_files
from mlx_pare.model.checkpoint import Checkpoint
from mlx_pare.options.settings import Settings
from mlx_pare.pipeline import run as pipeline

TOKENS = [[1, 2, 3, 4]]


def save_in(directory: Path, weights: dict, count: int, index: bool = False) -> list[str]:
    """Write weights as so many shards; with an index that names them."""
    names, files = sorted(weights), {}
    for k in range(count):
        file = f"model-{k + 1:05}-of-{count:05}.safetensors"
        mx.save_safetensors(str(directory / file), {n: weights[n] for n in names[k::count]})
        files |= dict.fromkeys(names[k::count], file)
    if index:
        (directory / weight_files.INDEX).write_text(json.dumps({"metadata": {}, "weight_map": files}))
    return sorted(set(files.values()))


@pytest.fixture
def two_sets(tmp_path) -> Path:
    """A model in three shards that its index names, beside two shards of other weights, which come last in the alphabet
    and so would win in mlx-lm."""
    model = pico.make(tmp_path / "model")
    weights = mx.load(str(model / "model.safetensors"))
    mx.eval(weights)
    (model / "model.safetensors").unlink()
    save_in(model, {name: w + 1 for name, w in weights.items()}, 5)
    save_in(model, weights, 3, index=True)
    pico.make(tmp_path / "alone")
    return model


def logits(model: Path) -> np.ndarray:
    return np.array(lm.for_backend(lm.load(model))(mx.array(TOKENS)).astype(mx.float32))


def test_case_14_the_set_that_the_index_names_is_the_model(two_sets, capsys):
    alone = two_sets.parent / "alone"
    assert len(Checkpoint(two_sets).leftovers) == 5 and Checkpoint(alone).leftovers == []
    assert {e.file.name for e in Checkpoint(two_sets).entries.values()} == {
        f"model-{k:05}-of-00003.safetensors" for k in (1, 2, 3)
    }
    assert np.array_equal(logits(two_sets), logits(alone))
    said = capsys.readouterr().err
    assert "5 weight files are left over and not read" in said and "00005.safetensors" in said
    logits(two_sets)
    assert capsys.readouterr().err == ""  # once is enough


def test_case_14_inspect_and_fit_say_so(two_sets):
    assert any("5 weight files are left over" in note for note in inspect(two_sets)["notes"])
    assert any("5 weight files are left over" in note for note in fit(two_sets, macs=["m4-24gb"])["notes"])
    assert inspect(two_sets.parent / "alone")["notes"] == []


def test_case_14_what_is_cut_is_what_is_computed(two_sets, two_texts, tmp_path):
    small = {"length": 32, "samples": 4, "recover_steps": 0, "trials": 0, "context": 64}
    asked = Settings(**two_texts, keep=0.9, axes=("ffn",), widths="even", **small)
    runs = [
        pipeline.run(model, tmp_path / f"run-{model.name}", asked) for model in (two_sets, two_sets.parent / "alone")
    ]
    assert runs[0]["before"]["perplexity"] == runs[1]["before"]["perplexity"]
    assert runs[0]["after"]["perplexity"] == runs[1]["after"]["perplexity"]
    for name, array in mx.load(str(Path(runs[1]["model"]) / "model.safetensors")).items():
        assert mx.array_equal(array, mx.load(str(Path(runs[0]["model"]) / "model.safetensors"))[name]), name


def test_case_14_other_ways_out_read_the_same_weights(two_sets, tmp_path):
    alone = two_sets.parent / "alone"
    for model in (two_sets, alone):
        mlx_directory.packed(model, tmp_path / f"{model.name}-4bit", 4, 32)
        export(model, tmp_path / f"{model.name}.gguf", "f32")
    assert np.array_equal(logits(tmp_path / "model-4bit"), logits(tmp_path / "alone-4bit"))
    mlx_directory.hub_ready(two_sets, tmp_path / "hub")
    assert sorted(f.name for f in (tmp_path / "hub").glob("*.safetensors")) == [
        f"model-{k:05}-of-00003.safetensors" for k in (1, 2, 3)
    ]


def test_case_14_one_whole_file_beside_shards(tmp_path):
    """A model saved again as one file: the index still names the shards."""
    model = pico.make(tmp_path / "model")
    weights = mx.load(str(model / "model.safetensors"))
    mx.eval(weights)
    save_in(model, weights, 2, index=True)
    mx.save_safetensors(str(model / "model.safetensors"), {name: w * 0 for name, w in weights.items()})
    assert Checkpoint(model).leftovers == ["model.safetensors"]
    assert np.array_equal(logits(model), logits(pico.make(tmp_path / "alone")))


def broken(model: Path, how: str) -> None:
    index = json.loads((model / weight_files.INDEX).read_text())
    names = sorted(index["weight_map"])
    if how == "none":
        (model / weight_files.INDEX).unlink()
        return
    if how == "a tensor is missing":
        del index["weight_map"][names[0]]
    if how == "a wrong file":
        index["weight_map"][names[0]] = "model-00001-of-00005.safetensors"
    if how == "no map":
        index = {"metadata": {}}
    (model / weight_files.INDEX).write_text(json.dumps(index))


@pytest.mark.parametrize("how", ["none", "a tensor is missing", "a wrong file", "no map"])
def test_case_14_without_a_whole_index_it_says_which_to_move_away(two_sets, how):
    broken(two_sets, how)
    with pytest.raises(PareError) as caught:
        Checkpoint(two_sets)
    assert "twice" in caught.value.problem
    assert "move the others" in caught.value.cure
    assert "model-*-of-00003 (3 files) or model-*-of-00005 (5 files)" in caught.value.cure
    with pytest.raises(PareError, match="twice"):
        lm.load(two_sets)


def test_files_that_share_no_tensor_are_all_read(tmp_path):
    """As mlx-lm does, with or without an index that knows of them."""
    model = pico.make(tmp_path / "model")
    weights = mx.load(str(model / "model.safetensors"))
    mx.eval(weights)
    (model / "model.safetensors").unlink()
    save_in(model, weights, 3)
    shutil.move(model / "model-00003-of-00003.safetensors", model / "model-more.safetensors")
    assert Checkpoint(model).leftovers == [] and Checkpoint(model).arch


def test_case_14_in_a_folder_whose_name_is_a_pattern(two_sets, tmp_path):
    """Both links at once: without the leftovers, and with a plain name."""
    model = two_sets.rename(tmp_path / "model [v1]")
    assert np.array_equal(logits(model), logits(tmp_path / "alone"))
    mlx_directory.packed(model, tmp_path / "packed", 4, 32)
    mlx_directory.packed(tmp_path / "alone", tmp_path / "expected", 4, 32)
    assert np.array_equal(logits(tmp_path / "packed"), logits(tmp_path / "expected"))
