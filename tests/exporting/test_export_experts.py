"""GGUF files of models with experts: llama.cpp computes what stock MLX does, whole and cut; what it cannot run is
refused with the reason."""

from __future__ import annotations

import gguf
import numpy as np
import pytest

from mlx_pare.base.errors import PareError
from mlx_pare.exporting import llama_cpp
from mlx_pare.exporting.export import export
from mlx_pare.pruning.prune import prune
from tests.exporting.test_export import TOKENS, difference, needs_llama
from tests.pruning.test_experts import plan_of
from tests.support import pico, sparse

WRITTEN = ("qwen3_moe", "qwen2_moe", "mixtral", "olmoe", "gpt_oss", "glm4_moe", "ernie4_5_moe")


@needs_llama
@pytest.mark.parametrize("family", WRITTEN)
def test_a_cut_model_matches_mlx(tmp_path, family):
    model = sparse.make(tmp_path / "m", family)
    prune(model, plan_of(model), tmp_path / "cut")
    export(tmp_path / "cut", tmp_path / "m.gguf", "f32")
    assert difference(tmp_path / "cut", tmp_path / "m.gguf") < 1e-4
    assert difference(model, tmp_path / "m.gguf") > 1e-2, "the cut changed nothing"


@needs_llama
def test_packed_experts_become_q8_0(tmp_path):
    model = pico.quantize(sparse.make(tmp_path / "m", "qwen3_moe"), tmp_path / "q")
    export(model, tmp_path / "m.gguf", "q8_0")
    types = {t.name: t.tensor_type.name for t in gguf.GGUFReader(tmp_path / "m.gguf").tensors}
    assert types["blk.0.ffn_up_exps.weight"] == "Q8_0" and types["blk.0.ffn_gate_inp.weight"] == "F32"
    ours, theirs = llama_cpp.mlx_logits(model, TOKENS), llama_cpp.logits(tmp_path / "m.gguf", TOKENS)
    assert np.median(np.abs(ours - theirs)) < 0.02 * ours.std()  # a rounded state may visit other experts: no maximum


REFUSED = {
    "layers without experts": ("qwen3_moe", {"mlp_only_layers": [1]}, "has layers without experts, which .* no place"),
    "weights that do not add up to 1": ("qwen3_moe", {"norm_topk_prob": False}, "norm_topk_prob .*always normalises"),
    "weights that do": ("olmoe", {"norm_topk_prob": True}, "norm_topk_prob .*never normalises"),
    "grouped queries": ("olmoe", {"num_key_value_heads": 2}, "groups its queries"),
    **{family: (family, {}, "not written yet") for family in sparse.CONFIGS if family not in WRITTEN},
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_llama_cpp_would_compute_otherwise_is_refused(tmp_path, name):
    family, changes, why = REFUSED[name]
    model = sparse.make(tmp_path / "m", family, **changes)
    with pytest.raises(PareError, match=why):
        export(model, tmp_path / "m.gguf", "f16")
    assert not (tmp_path / "m.gguf").exists()
