"""GGUF files of multimodal models hold the language model, as llama.cpp wants it, and compute what stock MLX does."""

from __future__ import annotations

import gguf
import pytest

from mlx_pare.exporting.export import export
from mlx_pare.exporting.mlx_directory import hub_ready, packed
from mlx_pare.model.checkpoint import Checkpoint
from mlx_pare.pruning.prune import prune
from tests.exporting.test_export import difference, needs_llama
from tests.pruning.test_parents import plan_of
from tests.support import parents

WRITTEN = ("gemma3", "mistral3", "mistral3-ministral3", "qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe")


@needs_llama
@pytest.mark.parametrize("kind", WRITTEN)
def test_a_cut_model_matches_mlx(tmp_path, kind):
    model = parents.make(tmp_path / "m", kind)
    prune(model, plan_of(model), tmp_path / "cut")
    export(tmp_path / "cut", tmp_path / "m.gguf", "f32")
    # gelu of llama.cpp is a table in float16
    assert difference(tmp_path / "cut", tmp_path / "m.gguf") < (5e-3 if kind == "gemma3" else 1e-4)
    assert difference(model, tmp_path / "m.gguf") > 1e-2, "the cut changed nothing"


def test_special_tokens_are_read_from_either_config(tmp_path):
    """The outer config has none here."""
    model = parents.make(tmp_path / "m", "mistral3")
    export(model, tmp_path / "m.gguf", "f32")
    fields = gguf.GGUFReader(tmp_path / "m.gguf").fields
    assert fields["tokenizer.ggml.eos_token_id"].contents() == 0
    assert fields["llama.rope.freq_base"].contents() == 10000.0


def test_a_directory_for_the_hub_keeps_the_other_parts_and_mlx_lms_packing_says_that_it_does_not(tmp_path, capfd):
    model = parents.make(tmp_path / "m", "gemma3")
    hub_ready(model, tmp_path / "hub")
    assert Checkpoint(tmp_path / "hub").beside().keys() == Checkpoint(model).beside().keys()
    assert (tmp_path / "hub" / "preprocessor_config.json").exists() and "left out" not in capfd.readouterr().err
    packed(model, tmp_path / "packed", 4, 32)
    told = capfd.readouterr()
    assert "the 4 other tensors of this gemma3 are left out" in told.err + told.out
    assert not Checkpoint(tmp_path / "packed").beside()
