"""Adapters carried over to a cut model: stock mlx-lm adds to it what is left of what it added to the original."""

from __future__ import annotations

import json
from pathlib import Path

import mlx.core as mx
import mlx_lm
import numpy as np
import pytest
from mlx.utils import tree_flatten
from mlx_lm.tuner.utils import linear_to_lora_layers
from test_prune import TOKENS, largest
from test_uneven import plan_of

from mlx_pare import adapters
from mlx_pare.checkpoint import Checkpoint
from mlx_pare.errors import PareError, Refused, Unsupported
from mlx_pare.prune import prune

LORA = {"rank": 4, "scale": 10.0, "dropout": 0.0}
COUNTS = [(40, 1), (100, 2), (7, 1)]
HEADS = {"num_attention_heads": 8, "num_key_value_heads": 4}


@pytest.fixture
def parent(pico_models):
    return lambda name="llama": pico_models(name, **(HEADS if name != "qwen2" else {}))


def adapter_of(parent: Path, out: Path, layers: int = -1, **settings) -> Path:
    """An adapter as mlx-lm's trainer writes it, drawn by lot."""
    module, _ = mlx_lm.load(str(parent))
    module.freeze()
    linear_to_lora_layers(module, layers, LORA | settings)
    random = np.random.RandomState(1)
    arrays = {n: mx.array(random.randn(*a.shape) / 20) for n, a in tree_flatten(module.trainable_parameters())}
    out.mkdir()
    mx.save_safetensors(str(out / adapters.WEIGHTS), {n: a.astype(mx.float32) for n, a in arrays.items()})
    config = {"fine_tune_type": "lora", "num_layers": layers, "lora_parameters": LORA | settings, "model": str(parent)}
    (out / adapters.CONFIG).write_text(json.dumps(config))
    return out


def logits(model: Path, adapter: Path | None = None) -> np.ndarray:
    module, _ = mlx_lm.load(str(model), adapter_path=adapter and str(adapter))
    return np.array(module(mx.array(TOKENS)).astype(mx.float32))


def fused(parent: Path, adapter: Path, out: Path) -> Path:
    """The parent with the adapter in its weights, in float64 numpy."""
    weights = {n: np.array(a, np.float64) for n, a in mx.load(str(parent / "model.safetensors")).items()}
    parts = {n: np.array(a, np.float64) for n, a in mx.load(str(adapter / adapters.WEIGHTS)).items()}
    for name in [n for n in parts if n.endswith("lora_a")]:
        module = name.removesuffix(".lora_a")
        weights[f"{module}.weight"] += LORA["scale"] * (parts[name] @ parts[f"{module}.lora_b"]).T
    out.mkdir()
    for file in parent.iterdir():
        (out / file.name).write_bytes(file.read_bytes())
    mx.save_safetensors(str(out / "model.safetensors"), {n: mx.array(a.astype(np.float32)) for n, a in weights.items()})
    return out


@pytest.mark.parametrize("layers", [-1, 2])
@pytest.mark.parametrize("name", ["llama", "qwen2", "qwen3", "gemma3_text"])
def test_cut_and_carried_is_carried_and_cut(parent, tmp_path, name, layers):
    source = parent(name)
    adapter = adapter_of(source, tmp_path / "adapter", layers)
    sizes = Checkpoint(source).arch.layers
    kept = [0, 1, 3] if name != "gemma3_text" else range(len(sizes))
    heads = sizes[0].sizes["kv_head"] // 2
    plan = plan_of(source, [(40, heads)] * len(kept), layers=kept)
    prune(source, plan, tmp_path / "pruned")
    done = adapters.carry(adapter, source, tmp_path / "pruned", tmp_path / "carried")
    whole = fused(source, adapter, tmp_path / "fused")
    other = plan.model_copy(update={"source": Checkpoint(whole).identity()})
    prune(whole, other, tmp_path / "other")
    found, expected = logits(tmp_path / "pruned", tmp_path / "carried"), logits(tmp_path / "other")
    assert largest(found, expected) < 1e-4
    assert largest(found, logits(tmp_path / "pruned")) > 0.01
    assert bool(done["left_out"]) == (name != "gemma3_text") and done["tensors"] > 0


def test_units_in_the_wrong_order_would_be_noticed(parent, tmp_path, monkeypatch):
    source = parent()
    adapter = adapter_of(source, tmp_path / "adapter")
    plan = plan_of(source, [(40, 2)] * 4)
    prune(source, plan, tmp_path / "pruned")
    whole = fused(source, adapter, tmp_path / "fused")
    prune(whole, plan.model_copy(update={"source": Checkpoint(whole).identity()}), tmp_path / "other")
    real = adapters.select
    monkeypatch.setattr(adapters, "select", lambda *given: (found := real(*given)) and found[::-1])
    adapters.carry(adapter, source, tmp_path / "pruned", tmp_path / "carried")
    assert largest(logits(tmp_path / "pruned", tmp_path / "carried"), logits(tmp_path / "other")) > 0.01


def test_what_is_refused(parent, tmp_path, pico_models):
    source, out = parent(), tmp_path / "out"
    adapter, config = adapter_of(source, tmp_path / "adapter", 1), tmp_path / "adapter" / adapters.CONFIG
    prune(source, plan_of(source, [(40, 2)] * 3, layers=[0, 1, 2]), tmp_path / "pruned")
    with pytest.raises(Unsupported, match="no layer with an adapter"):
        adapters.carry(adapter, source, tmp_path / "pruned", out)
    with pytest.raises(Refused, match="was not cut from"):
        adapters.carry(adapter, pico_models("llama", rope_theta=777.0), tmp_path / "pruned", out)
    with pytest.raises(Refused, match=r"has no survivors\.json"):
        adapters.carry(adapter, source, source, out)
    prune(source, plan_of(source, [*COUNTS, (9, 2)]), tmp_path / "uneven")
    with pytest.raises(Unsupported, match=r"has no .*_proj: its layers differ.*Fuse"):
        adapters.carry(adapter, source, tmp_path / "uneven", out)
    kept = json.loads(config.read_text())
    for kind, why in (("dora", "length"), ("full", "in their place")):
        config.write_text(json.dumps(kept | {"fine_tune_type": kind}))
        with pytest.raises(Unsupported, match=why):
            adapters.carry(adapter, source, tmp_path / "pruned", out)
    config.write_text(json.dumps({"num_layers": "all"}))
    with pytest.raises(PareError, match="lacks num_layers"):
        adapters.carry(adapter, source, tmp_path / "pruned", out)
    config.write_text(json.dumps(kept))
    mx.save_safetensors(str(adapter / adapters.WEIGHTS), {"model.layers.0.mlp.up_proj.lora_a": mx.zeros((3, 4))})
    with pytest.raises(PareError, match="has shape"):
        adapters.carry(adapter, source, tmp_path / "pruned", out)
    assert not out.exists()
    out.mkdir()
    with pytest.raises(Refused, match="exists already"):
        adapters.carry(adapter, source, tmp_path / "pruned", out)
