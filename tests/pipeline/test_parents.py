"""A whole run on a multimodal model: its language model is cut, recovered, compared, exported; the rest stays."""

from __future__ import annotations

import json

import mlx.core as mx
import mlx_lm
import pytest

from mlx_pare.exporting import llama_cpp
from mlx_pare.model.checkpoint import Checkpoint
from mlx_pare.options.settings import Settings
from mlx_pare.pipeline import run as pipeline
from tests.pipeline.test_pipeline import hashes
from tests.support import parents


@pytest.fixture(scope="module")
def finished(two_texts, tmp_path_factory):
    place = tmp_path_factory.mktemp("parents")
    model = parents.make(place / "qwen3_vl", "qwen3_vl", dtype=mx.bfloat16, num_hidden_layers=2)
    model = parents.quantize(model, place / "packed", "qwen3_vl")
    gguf = "f16" if llama_cpp.available() else None
    given = {"keep": 0.85, "length": 32, "samples": 16, "recover_steps": 2, "trials": 2, "gguf": gguf, "context": 256}
    settings = Settings(**two_texts, **given)
    return model, place / "run", pipeline.run(model, place / "run", settings), settings


def test_every_contender_is_there_and_the_tower_untouched(finished):
    model, out, summary, _ = finished
    assert {"original", "pruned", "recovered", "random", "fewer-bits"} == {*summary["contenders"]}
    before, tower = Checkpoint(model), Checkpoint(model).lazy()
    for place in (out / "prune" / "model", out / "recover" / "model"):
        found = Checkpoint(place)
        assert found.beside().keys() == before.beside().keys() and found.nbytes() < before.nbytes()
        assert all(mx.array_equal(tower[name], found.lazy()[name]) for name in before.beside())
        assert found.packed_beside() == before.packed_beside()
        assert json.loads((place / "config.json").read_text())["model_type"] == "qwen3_vl"
        assert (place / "preprocessor_config.json").exists()
    plan = json.loads((out / "plan" / "plan.json").read_text())
    assert Checkpoint(summary["model"]).nbytes() == plan["after"]["bytes"] and not plan["hidden"]
    assert mlx_lm.load(str(summary["model"]))[0](mx.array([[1, 2, 3]])).shape[:2] == (1, 3)


def test_the_report_says_that_no_pictures_were_seen(finished):
    _, out, _, _ = finished
    assert (
        "No picture" in (out / "report.md").read_text()
        and "No picture" in (out / "prune" / "model" / "README.md").read_text()
    )


def test_the_same_run_again_does_nothing(finished):
    model, out, summary, settings = finished
    before = hashes(out)
    assert pipeline.run(model, out, settings)["verdict"] == summary["verdict"]
    after = hashes(out)
    assert {name for name in before if before[name] != after[name]} <= {"report.md", "report.html"}
