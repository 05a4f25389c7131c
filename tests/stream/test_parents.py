"""The walk over the language model of a multimodal model."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest

from mlx_pare import lm
from mlx_pare.stream import walk as stream
from mlx_pare.text.corpus import Rows
from tests.support import parents

ROWS = Rows.full(np.random.default_rng(0).integers(0, 500, (3, 40)).astype(np.int32))


@pytest.mark.parametrize("kind", parents.PARENTS)
def test_a_walk_is_the_whole_model(tmp_path, kind):
    model = parents.make(tmp_path / kind, kind, dtype=mx.bfloat16)
    model = parents.quantize(model, tmp_path / "packed", kind)
    whole = lm.load(model)
    whole.set_dtype(mx.float32)
    expected = lm.body(whole)(mx.array(ROWS.tokens))
    assert float(mx.abs(stream.walk(model, ROWS).hidden - expected).max()) < 2e-5
    logits = whole(mx.array(ROWS.tokens))
    assert float(mx.abs(lm.logits(whole, mx.array(ROWS.tokens)) - logits).max()) < 1e-4
