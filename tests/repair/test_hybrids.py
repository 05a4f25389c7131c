"""Trials and reconstruction of models in which some layers have no heads, against stock models and float64."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from mlx_pare import lm
from mlx_pare.model.checkpoint import Checkpoint
from mlx_pare.planning.candidate import whole
from mlx_pare.planning.try_candidates import try_out
from mlx_pare.pruning.prune import prune
from mlx_pare.repair.reconstruct import reconstruct
from mlx_pare.scoring.calibrate import calibrate
from mlx_pare.scoring.score import score
from mlx_pare.store.arrays import Arrays
from mlx_pare.text.corpus import Rows
from tests.pruning.test_hybrids import plan_of
from tests.support import hybrids

RANDOM = np.random.default_rng(5)
ROWS = Rows.full(RANDOM.integers(0, 500, (12, 40)).astype(np.int32))
HELD = Rows.full(RANDOM.integers(0, 500, (4, 40)).astype(np.int32))
DENSE = ("qwen3_5", "lfm2", "granite-dense")


def kl(one, other) -> float:
    """Mean KL divergence of two models on the held-out rows, from float64 softmaxes."""
    p, q = (np.array(model(mx.array(HELD.tokens)), np.float64)[:, :-1] for model in (one, other))
    p, q = (x - x.max(-1, keepdims=True) for x in (p, q))
    p, q = (x - np.log(np.exp(x).sum(-1, keepdims=True)) for x in (p, q))
    return float((np.exp(p) * (p - q)).sum(-1).mean())


@pytest.fixture(scope="module", params=DENSE)
def model(request, tmp_path_factory) -> Path:
    return hybrids.make(tmp_path_factory.mktemp("hybrids") / request.param, request.param)


def test_trials_lead_whole_and_dropped_layers_as_stock_models_do(model):
    keep = next(row[3] for name, row in hybrids.HYBRIDS.items() if name == model.name)
    full = whole(Checkpoint(model).arch)
    dropped = tuple(width if i in keep else None for i, width in enumerate(full))
    narrow = (replace(full[0], ffn=64), *full[1:])
    found = try_out(model, [full, dropped, narrow], ROWS, HELD).kl
    stock, cut = lm.load(model), lm.load(model)
    blocks = lm.blocks(cut)
    blocks[:] = [blocks[i] for i in keep]
    for index in ("fa_idx", "ssm_idx", "conv_idx"):
        if hasattr(lm.body(cut), index):
            setattr(lm.body(cut), index, 0)
    assert found[0] == 0 and 0 < found[2] < found[1]
    assert found[1] == pytest.approx(kl(stock, cut), rel=1e-3)


def test_reconstruction_solves_what_stands_for_attention_too(model, tmp_path):
    """Layers without heads keep all inputs; their matrix makes up for what layers before them lost."""
    plan = plan_of(model, ffn=64)
    many = Rows.full(RANDOM.integers(0, 500, (192, 40)).astype(np.int32))  # random tokens: fewer would be overfitted
    made = reconstruct(model, plan, many, tmp_path / "repair")
    assert made == plan
    arch, original = Checkpoint(model).arch, lm.load(model)
    for index in range(len(arch.layers)):
        file = Arrays.load(tmp_path / "repair" / f"{index:04d}.safetensors", "reconstruction")
        mixer = arch.writers(index)[0]
        assert {*file.arrays} - {"out_proj_bias"} == ({"down_proj"} if index == 0 else {mixer, "down_proj"})
        for before, after in file.about["errors"].values():
            assert after <= before * (1 + 1e-6)
        if index and mixer == "out_proj":
            assert file.arrays[mixer].shape == next(
                t.shape for t in arch.tensors() if (t.layer, t.spec.role) == (index, mixer)
            )
    prune(model, plan, tmp_path / "cut")
    prune(model, plan, tmp_path / "repaired", repair=tmp_path / "repair")
    plain, repaired = kl(original, lm.load(tmp_path / "cut")), kl(original, lm.load(tmp_path / "repaired"))
    assert repaired < 0.9 * plain
    moved = Checkpoint(tmp_path / "repaired").lazy(), Checkpoint(tmp_path / "cut").lazy()
    names = {name for name in moved[0] if not mx.array_equal(moved[0][name], moved[1][name])}
    assert sum(".out_proj.weight" in name for name in names) >= 2


@pytest.mark.parametrize("criterion", ["obs", "flap", "taylor", "minitron", "magnitude", "random"])
def test_every_criterion_scores_channels_and_no_heads(model, tmp_path, criterion):
    extra = {"obs": ("contributions",), "taylor": ("gradients",)}.get(criterion, ())
    stats = calibrate(model, ROWS, tmp_path, extra=extra)
    found = Arrays.load(score(model, stats, tmp_path / "scores.safetensors", criterion), "scores").arrays
    arch = Checkpoint(model).arch
    for index in range(len(arch.layers)):
        assert np.isfinite(found["ffn"][index]).all() and np.isfinite(found["layer"][index])
    assert np.isnan(found["kv_head"]).all()
    assert "hidden" not in found
