"""The peers of the benchmarks run in our engine; a fault there would only be seen when somebody measures."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest

from mlx_pare import lm
from mlx_pare.model.checkpoint import Checkpoint
from mlx_pare.text import corpus
from mlx_pare.text.splits import DEMO

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks"))
import pruners


@pytest.fixture(scope="module")
def rows() -> corpus.Rows:
    return corpus.windows(lm.tokenizer(DEMO / "model"), corpus.read(DEMO / "calibration.txt"), 64, 8)


@pytest.mark.parametrize("way", ["Wanda-sp", "FLAP alike", "FLAP"])
def test_a_peer_loses_something_and_not_everything(rows, way):
    model = DEMO / "model"
    of = pruners.units(Checkpoint(model))
    most = {part: unit.count for part, unit in of.items()}
    if way == "Wanda-sp":
        whole, cut = (pruners.wanda_sp(model, rows, keep) for keep in (most, {**most, "ffn": most["ffn"] * 3 // 4}))
    else:
        whole, cut = (pruners.flap(model, rows, share, alike=way == "FLAP alike") for share in (1.0, 0.8))
    dense, pruned, nothing = (pruners.windows(model, each, rows) for each in (whole, cut, {}))
    assert np.allclose(dense, nothing, rtol=1e-4) and dense.shape == (rows.count,)
    assert dense.mean() < pruned.mean() < np.log(Checkpoint(model).arch.sizes["vocab"])
    assert sum(len(kept) for kept, _ in cut.values()) < sum(len(kept) for kept, _ in whole.values())
