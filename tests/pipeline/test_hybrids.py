"""A whole run on a model of which some layers have no heads."""

from __future__ import annotations

import json

import mlx.core as mx
import mlx_lm

from mlx_pare.model.checkpoint import Checkpoint
from mlx_pare.options.settings import Settings
from mlx_pare.pipeline import run as pipeline
from tests.support import hybrids, pico


def test_channels_and_layers_of_a_hybrid(two_texts, tmp_path):
    model = hybrids.make(tmp_path / "model", "qwen3_5", mx.bfloat16)
    model = pico.quantize(model, tmp_path / "packed")
    given = {"keep": 0.7, "length": 32, "samples": 16, "trials": 2, "recover_steps": 2, "gguf": None, "context": 256}
    summary = pipeline.run(model, tmp_path / "run", Settings(**two_texts, **given, axes=("layer", "ffn")))
    assert {"original", "pruned", "recovered", "random"} == {*summary["contenders"]}
    plan = json.loads((tmp_path / "run" / "plan" / "plan.json").read_text())
    arch = Checkpoint(summary["model"]).arch
    assert Checkpoint(summary["model"]).nbytes() == plan["after"]["bytes"] < plan["before"]["bytes"]
    assert {layer.kind for layer in arch.layers} == {"linear_attention", "full_attention"}
    heads = [bool(layer["kv_head"]) for layer in plan["layers"]]
    assert heads == [layer.kind == "full_attention" for layer in arch.layers]
    assert mlx_lm.load(str(summary["model"]))[0](mx.array([[1, 2, 3]])).shape[:2] == (1, 3)
