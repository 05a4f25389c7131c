"""A whole run on a model with experts: chosen, cut, recovered, compared, exported."""

from __future__ import annotations

import json
from dataclasses import replace

import mlx.core as mx
import numpy as np
import pytest

from mlx_pare.base.errors import PareError, UsageError
from mlx_pare.exporting import llama_cpp
from mlx_pare.model.checkpoint import Checkpoint
from mlx_pare.options.settings import Settings
from mlx_pare.pipeline import run as pipeline
from mlx_pare.store.arrays import Arrays
from tests.pipeline.test_pipeline import hashes
from tests.support import pico, sparse


@pytest.fixture(scope="module")
def packed(tmp_path_factory):
    place = tmp_path_factory.mktemp("sparse")
    return pico.quantize(sparse.make(place / "float", "qwen3_moe", dtype=mx.bfloat16), place / "packed")


@pytest.fixture(scope="module")
def settings(two_texts) -> Settings:
    gguf = "f16" if llama_cpp.available() else None
    return Settings(**two_texts, keep=0.75, length=32, samples=16, recover_steps=2, trials=0, gguf=gguf, context=256)


@pytest.fixture(scope="module")
def finished(packed, settings, tmp_path_factory):
    out = tmp_path_factory.mktemp("whole") / "run"
    return out, pipeline.run(packed, out, settings)


def test_experts_are_chosen_layer_by_layer(packed, finished):
    out, summary = finished
    plan = json.loads((out / "plan" / "plan.json").read_text())
    assert plan["axes"] == ["expert"] and plan["before"]["experts"] == 12 and plan["after"]["experts"] == 8
    choices = json.loads((out / "plan" / "experts.json").read_text())
    scores = Arrays.load(out / "score" / "scores.safetensors", "scores").arrays
    for choice, layer in zip(choices, plan["layers"], strict=True):
        assert choice["best"] == min(choice["errors"], key=choice["errors"].get)
        top = np.argsort(-scores[f"expert.{choice['best']}"][choice["layer"]], kind="stable")[:8]
        assert layer["expert"] == choice["proposed"][choice["best"]] == sorted(top.tolist()) and layer["ffn"] == []
    result = Checkpoint(summary["model"])
    assert result.arch.uniform("expert") == 8 and result.nbytes() == plan["after"]["bytes"]
    assert {"original", "pruned", "recovered", "random", "fewer-bits"} == {*summary["contenders"]}
    drawn = json.loads((out / "evaluate-random" / "plan.json").read_text())["layers"]
    assert [len(layer["expert"]) for layer in drawn] == [8] * 4
    assert [layer["expert"] for layer in drawn] != [layer["expert"] for layer in plan["layers"]]


def test_recovery_leaves_the_experts_alone(finished):
    out, _ = finished
    before, after = (Checkpoint(out / step / "model").lazy() for step in ("prune", "recover"))
    moved = {name for name in before if not mx.array_equal(before[name], after[name])}
    assert not any(".switch_mlp." in name for name in moved)
    assert json.loads((out / "recover" / "recovery.json").read_text())["best_step"] == 0 or moved


def test_the_same_run_again_does_nothing(packed, finished, settings):
    before = hashes(finished[0])
    again = pipeline.run(packed, finished[0], settings)
    assert again["verdict"] == finished[1]["verdict"]
    after = hashes(finished[0])
    assert {name for name in before if before[name] != after[name]} <= {"report.md", "report.html"}


def test_a_criterion_alone_chooses_without_other_text(packed, settings, tmp_path):
    asked = replace(settings, criterion="reap", recover_steps=0, gguf=None, quick=True)
    pipeline.run(packed, tmp_path / "run", asked)
    assert not (tmp_path / "run" / "plan" / "experts.json").exists()
    plan = json.loads((tmp_path / "run" / "plan" / "plan.json").read_text())
    scores = Arrays.load(tmp_path / "run" / "score" / "scores.safetensors", "scores").arrays["expert"]
    for layer in plan["layers"]:
        assert set(layer["expert"]) == set(np.argsort(-scores[layer["source"]])[:8].tolist())


def test_what_a_model_with_experts_does_not_allow(packed, settings, tmp_path):
    with pytest.raises(UsageError, match="taylor cannot score experts"):
        pipeline.run(packed, tmp_path / "run", replace(settings, criterion="taylor"))
    with pytest.raises(PareError, match="cannot be cut along ffn"):
        pipeline.run(packed, tmp_path / "run", replace(settings, axes=("ffn",)))
    with pytest.raises(UsageError, match="block by block, experts are not recovered yet"):
        pipeline.run(packed, tmp_path / "run", replace(settings, local_steps=2))
    assert not (tmp_path / "run" / "calibrate").exists()
    assert pipeline.dry_run(packed, replace(settings, axes=("expert",)))["after"]["experts"] == 8
