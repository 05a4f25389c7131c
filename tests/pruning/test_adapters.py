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

from mlx_pare.base.errors import PareError, Refused, Unsupported
from mlx_pare.model.checkpoint import Checkpoint
from mlx_pare.pruning import adapters
from mlx_pare.pruning.prune import prune
from tests.arch.test_uneven import plan_of
from tests.pruning.test_prune import TOKENS, largest

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


# ---- adapters that cannot work ----


@pytest.fixture
def cut(parent, tmp_path):
    """(original, adapter of all layers, the cut model, where to)."""
    source = parent()
    prune(source, plan_of(source, [(40, 2)] * 3, layers=[0, 1, 3]), tmp_path / "pruned")
    return source, adapter_of(source, tmp_path / "adapter"), tmp_path / "pruned", tmp_path / "out"


def carried(cut) -> dict:
    source, adapter, pruned, out = cut
    return adapters.carry(adapter, source, pruned, out)


A, B = (f"model.layers.0.self_attn.q_proj.lora_{side}" for side in "ab")


def with_arrays(adapter: Path, change) -> None:
    arrays = dict(mx.load(str(adapter / adapters.WEIGHTS)))
    change(arrays)
    mx.eval(arrays)
    mx.save_safetensors(str(adapter / adapters.WEIGHTS), arrays)


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (lambda arrays: arrays.update({B: mx.zeros((8, arrays[B].shape[1]))}), "has rank 8, .* says 4"),
        (lambda arrays: arrays.update({A: mx.zeros((arrays[A].shape[0], 2))}), "has rank 2, .* says 4"),
        (lambda arrays: arrays.pop(A), r"has .*lora_b without .*lora_a"),
        (lambda arrays: arrays.pop(B), r"has .*lora_a without .*lora_b"),
        (lambda arrays: arrays.update({A: arrays[A] * mx.nan}), "holds NaN or infinity"),
        (lambda arrays: arrays.update({B: arrays[B].astype(mx.bfloat16) / 0}), "holds NaN or infinity"),
        (lambda arrays: arrays.update({A: arrays[A].astype(mx.int32)}), "expected floats"),
        (lambda arrays: arrays.update({A: arrays[A].reshape(-1)}), "has shape"),
    ],
)
def test_f11_arrays_that_cannot_work_are_refused(cut, change, why):
    with_arrays(cut[1], change)
    with pytest.raises(PareError, match=why):
        carried(cut)
    assert not cut[3].exists()


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"rank": 8}, "has rank 4, .* says 8"),
        ({"rank": 0}, "rank 0, expected"),
        ({"rank": True}, "rank True, expected"),
        ({"rank": None}, "rank None, expected"),
        ({"scale": None}, "scale None, expected a number"),
        ({"scale": float("nan")}, "scale nan, expected a number"),
        ({"scale": float("inf")}, "scale inf, expected a number"),
        ({"dropout": "0"}, "dropout '0', expected a number"),
        ({"keys": "self_attn.q_proj"}, "expected a list"),
        ({"keys": ["mlp.up_proj"]}, "has no place"),
        ({"other": float("nan")}, "holds NaN or infinity"),
    ],
)
def test_f11_a_config_that_cannot_work_is_refused(cut, change, why):
    config = json.loads((cut[1] / adapters.CONFIG).read_text())
    (cut[1] / adapters.CONFIG).write_text(json.dumps(config | {"lora_parameters": config["lora_parameters"] | change}))
    with pytest.raises(PareError, match=why):
        carried(cut)
    assert not cut[3].exists()


def test_f11_adapters_of_layers_that_the_config_leaves_out_are_refused(cut):
    """mlx-lm loads no such adapter for the original either."""
    config = json.loads((cut[1] / adapters.CONFIG).read_text())
    (cut[1] / adapters.CONFIG).write_text(json.dumps(config | {"num_layers": 2}))
    with pytest.raises(ValueError, match="not an adapter parameter"):
        mlx_lm.load(str(cut[0]), adapter_path=str(cut[1]))
    with pytest.raises(PareError, match="has no place by num_layers"):
        carried(cut)


@pytest.mark.parametrize("name", [adapters.WEIGHTS, adapters.CONFIG])
def test_f11_a_link_out_of_the_directory_is_refused(cut, tmp_path, name):
    (cut[1] / name).rename(tmp_path / name)
    (cut[1] / name).symlink_to(tmp_path / name)
    with pytest.raises(PareError, match="outside of the model's directory"):
        carried(cut)


def test_f11_modules_named_in_full_move_with_their_layers(cut):
    """mlx-lm takes "keys" of one layer, which stands elsewhere after a cut of depth."""
    source, adapter, pruned, out = cut
    kept = {f"model.layers.{layer}.self_attn.q_proj" for layer in (2, 3)}
    with_arrays(adapter, lambda arrays: [arrays.pop(name) for name in [*arrays] if name[:-7] not in kept])
    config = json.loads((adapter / adapters.CONFIG).read_text())
    lora = config["lora_parameters"] | {"keys": sorted(kept)}
    (adapter / adapters.CONFIG).write_text(json.dumps(config | {"lora_parameters": lora, "num_layers": 1}))
    mlx_lm.load(str(source), adapter_path=str(adapter))
    done = carried(cut)
    assert done["layers"] == [2] and len(done["left_out"]) == 2
    assert json.loads((out / adapters.CONFIG).read_text())["lora_parameters"]["keys"] == [
        "model.layers.2.self_attn.q_proj"
    ]
    assert largest(logits(pruned, out), logits(pruned)) > 0.001
