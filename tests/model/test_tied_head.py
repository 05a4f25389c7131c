"""A head beside a tied embedding: a copy is dropped, a trained one is an error that says how to keep it."""

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
from mlx_pare.model.checkpoint import Checkpoint
from mlx_pare.options.settings import Settings
from mlx_pare.pipeline import run as pipeline

EMBEDDING, HEAD = "model.embed_tokens", "lm_head"


def with_head(model: Path, change, leaf: str = "weight") -> Path:
    """The model with a head that is its embedding, changed in one of its tensors."""
    file = model / "model.safetensors"
    weights = mx.load(str(file))
    mx.eval(weights)
    for name in [name for name in weights if name.startswith(f"{EMBEDDING}.")]:
        own = weights[name]
        weights[name.replace(EMBEDDING, HEAD)] = change(own) if name.endswith(f".{leaf}") else own
    mx.save_safetensors(str(file), weights, metadata={"format": "pt"})
    return model


def one_value(array: mx.array) -> mx.array:
    """Other only in its very last value, as a head of which one added token was trained."""
    found = np.array(array)
    found[-1, -1] += 1
    return mx.array(found)


def test_case_08_a_copy_of_the_embedding_is_dropped(tmp_path):
    model = with_head(pico.make(tmp_path / "model"), lambda own: own)
    checkpoint = Checkpoint(model)
    assert checkpoint.arch.tied and checkpoint.nbytes() == Checkpoint(pico.make(tmp_path / "plain")).nbytes()


CHANGES = {
    "trained": lambda own: own + 0.1 * mx.random.normal(own.shape, key=mx.random.key(0)),
    "one value": one_value,
    "another type": lambda own: own.astype(mx.float16),
    "more rows": lambda own: mx.concatenate([own, own[:8]]),
}


@pytest.mark.parametrize("name", CHANGES)
def test_case_08_another_head_is_refused_with_the_cure(tmp_path, two_texts, name):
    model = with_head(pico.make(tmp_path / "model"), CHANGES[name])
    small = {"length": 32, "samples": 4, "recover_steps": 0, "trials": 0}
    asked = Settings(**two_texts, keep=0.9, axes=("ffn",), widths="even", **small)
    for call in (
        lambda: pipeline.run(model, tmp_path / "run", asked),
        lambda: inspect(model),
        lambda: fit(model, macs=["m4-24gb"]),
    ):
        with pytest.raises(PareError, match=r"lm_head\.weight.* not the embedding") as caught:
            call()
        assert "set tie_word_embeddings to false in config.json" in caught.value.cure
    assert not (tmp_path / "run").exists()


def test_case_08_the_cure_works(tmp_path):
    model = with_head(pico.make(tmp_path / "model"), CHANGES["trained"])
    file = model / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"tie_word_embeddings": False}))
    assert not Checkpoint(model).arch.tied
    tokens = mx.array([[1, 2, 3]])
    plain = lm.load(pico.make(tmp_path / "plain"))(tokens)
    assert not mx.allclose(lm.load(model)(tokens), plain)


def test_case_08_a_config_that_does_not_say_is_tied_in_mlx_lm(tmp_path):
    model = with_head(pico.make(tmp_path / "model"), CHANGES["trained"])
    config = json.loads((model / "config.json").read_text())
    del config["tie_word_embeddings"]
    (model / "config.json").write_text(json.dumps(config))
    with pytest.raises(PareError, match="not the embedding"):
        _ = Checkpoint(model).arch


def test_case_08_a_class_without_a_head_cannot_be_told_to_have_one(tmp_path):
    model = with_head(pico.make(tmp_path / "model", "gemma2"), CHANGES["trained"])
    with pytest.raises(PareError) as caught:
        _ = Checkpoint(model).arch
    assert "gemma2 has no head" in caught.value.cure and "false" not in caught.value.cure


@pytest.mark.parametrize("leaf", ["weight", "scales", "biases"])
def test_case_08_a_packed_head_is_compared_in_all_its_parts(pico_models, tmp_path, leaf):
    packed = pico_models("llama", (4, 32))
    same = with_head(Path(shutil.copytree(packed, tmp_path / "same")), lambda own: own)
    assert Checkpoint(same).arch.tied
    other = with_head(Path(shutil.copytree(packed, tmp_path / "other")), one_value, leaf)
    with pytest.raises(PareError, match="not the embedding"):
        _ = Checkpoint(other).arch


def test_case_08_a_head_that_lacks_a_part_or_has_one_more(tmp_path):
    model = with_head(pico.make(tmp_path / "model"), lambda own: own)
    file = model / "model.safetensors"
    weights = mx.load(str(file))
    mx.eval(weights)
    mx.save_safetensors(str(file), weights | {"lm_head.bias": mx.zeros((512,))})
    with pytest.raises(PareError, match="not the embedding"):
        _ = Checkpoint(model).arch


def test_case_08_gemma_3_with_a_head_keeps_it(tmp_path):
    """It has the head that is stored, whatever its config says."""
    model = with_head(pico.make(tmp_path / "model", "gemma3_text"), CHANGES["trained"])
    assert not Checkpoint(model).arch.tied
