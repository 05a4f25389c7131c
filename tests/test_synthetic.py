"""scripts/make_synthetic.py: true shapes, real files, weights that a model can be run with."""

from __future__ import annotations

import sys
from pathlib import Path

import mlx.core as mx
import numpy as np
import pico
import pytest

from mlx_pare import lm
from mlx_pare.model.checkpoint import Checkpoint
from mlx_pare.model.footprint import parameters
from mlx_pare.model.weights import read
from mlx_pare.sources import catalogue
from mlx_pare.stream import walk as stream
from mlx_pare.tensors.packing import Packing
from mlx_pare.text.corpus import Rows

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "scripts"))
import make_synthetic

SMALL = {**pico.BASE, "vocab_size": 2048, "tie_word_embeddings": False}
FAMILIES = {name: {**SMALL, **pico.FAMILIES[name]} for name in ("llama", "qwen2", "qwen3", "gemma3_text")}


@pytest.mark.parametrize("name", ["qwen2.5-7b", "qwen3-8b", "qwen2.5-32b", "gemma3-4b"])
def test_shapes_are_those_of_the_catalogue(name):
    """The whole model's parameters, and with fewer layers what they have less; of Gemma the language model."""
    whole = make_synthetic.describe(make_synthetic.config_of(name, None))
    short = make_synthetic.describe(make_synthetic.config_of(name, 2))
    count = parameters(whole)["total"]
    assert count == (catalogue.find(name).parameters if name != "gemma3-4b" else 3_880_263_168)
    block = sum(t.size for t in whole.tensors() if t.layer == 0)
    assert count - parameters(short)["total"] == (len(whole.layers) - 2) * block


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("bits", [3, 4, 16])
def test_what_it_writes_is_a_model(tmp_path, monkeypatch, family, bits):
    """Opened, run by mlx-lm and streamed; in several shards, with a tokenizer; the same seed gives the same bytes."""
    monkeypatch.setattr(make_synthetic, "SHARD_BYTES", 100_000)
    packing = None if bits == 16 else Packing(bits, 32)
    written = make_synthetic.make(FAMILIES[family], tmp_path / "a", packing, 7)
    checkpoint = Checkpoint(tmp_path / "a")
    assert written == checkpoint.nbytes() and len(list((tmp_path / "a").glob("model-*.safetensors"))) > 1
    assert lm.tokenizer(tmp_path / "a").encode("Once upon a time")
    rows = Rows.full(np.random.default_rng(0).integers(0, 2048, (2, 16)))
    found = np.array(stream.walk(tmp_path / "a", rows).all_logits(slice(None)))
    stock = np.array(lm.load_stock(tmp_path / "a")(mx.array(rows.tokens)).astype(mx.float32))
    assert np.isfinite(found).all() and found.std() > 0.01
    np.testing.assert_allclose(found, stock, rtol=0, atol=1e-3)
    for name, seed in (("b", 7), ("c", 8)):
        make_synthetic.make(FAMILIES[family], tmp_path / name, packing, seed)
        same = [
            (tmp_path / name / f.name).read_bytes() == f.read_bytes() for f in (tmp_path / "a").glob("*.safetensors")
        ]
        assert all(same) == (seed == 7)


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_weights_are_as_large_as_a_trained_models(tmp_path, bits):
    """Their deviation, and that rows differ in it."""
    make_synthetic.make(FAMILIES["qwen3"], tmp_path / "a", Packing(bits, 32), 0)
    weights = np.array(read(Checkpoint(tmp_path / "a"), "model.layers.1.mlp.up_proj.weight").dense())
    by_row = np.log(weights.std(axis=1))
    assert abs(np.median(by_row) - np.log(make_synthetic.DEVIATION)) < 0.3
    assert abs(by_row.std() - make_synthetic.SPREAD) < 0.15


def test_an_unknown_name():
    with pytest.raises(SystemExit, match=r"no model 'qwen3-8bb' in the catalogue; near are: .*qwen3-8b"):
        make_synthetic.config_of("qwen3-8bb", None)
