"""The families beside the first five, cut in every way that is theirs: phi3, olmo2, olmo3, smollm3, gemma2, granite and
ministral3. Sliced is masked, packed too; each stage of a run works on fused matrices and on norms behind them."""

from __future__ import annotations

import pico
import pytest
from test_prune import BROKEN, DENSE, PACKED, largest, logits, masked, plan_of, whole_groups

from mlx_pare import lm
from mlx_pare.arch import describe
from mlx_pare.prune import prune

HEADS = {"phi3", "smollm3", "gemma2", "ministral3"}  # whose heads can be cut
CASES = [(f, axes) for f in pico.MORE for axes in (("ffn",), ("layer",), ("ffn", "layer"))]
CASES += [(f, axes) for f in sorted(HEADS) for axes in (("kv_head",), ("ffn", "kv_head", "layer"))]
IDS = [f"{family}-{'-'.join(axes)}" for family, axes in CASES]


@pytest.mark.parametrize(("family", "axes"), CASES, ids=IDS)
def test_dense(pico_models, tmp_path, family, axes):
    source = pico_models(family)
    plan = plan_of(source, axes)
    done = prune(source, plan, tmp_path / "out")
    expected = masked(source, plan)
    assert largest(logits(lm.load(tmp_path / "out")), expected) < DENSE
    assert largest(expected, logits(lm.load(source))) > BROKEN
    assert done == {"requantized": {}, "dense": []}


@pytest.mark.parametrize(("family", "axes"), CASES, ids=IDS)
def test_packed_in_whole_groups(pico_models, tmp_path, family, axes):
    source = pico_models(family, (4, 32))
    plan = whole_groups(source, axes)
    if family == "granite" and "ffn" in axes:  # whose down_proj is packed in groups of 64, by mlx-lm itself
        for number, layer in enumerate(plan.layers):
            layer.ffn = list(range(64 * (number % 2), 64 * (number % 2) + 64))
    done = prune(source, plan, tmp_path / "out")
    assert done == {"requantized": {}, "dense": []}
    assert largest(logits(lm.load(tmp_path / "out")), masked(source, plan)) < PACKED


@pytest.mark.parametrize("family", pico.MORE)
def test_the_table_is_the_model(family):
    from mlx.utils import tree_flatten

    config = pico.config_of(family, vocab_size=512)
    model = dict(tree_flatten(pico.build(config).parameters()))
    assert {t.name: t.shape for t in describe(config).tensors()} == {name: array.shape for name, array in model.items()}
