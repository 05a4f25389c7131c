"""Bits per part: attention, ffn and embedding packed as the plan says, layer by layer, and nothing else touched."""

from __future__ import annotations

import json
from pathlib import Path

import mlx.core as mx
import mlx_lm
import numpy as np
import pytest
import reference_packing as reference

from mlx_pare import lm
from mlx_pare.model.checkpoint import Checkpoint
from mlx_pare.pruning.plan_file import Plan
from mlx_pare.pruning.prune import prune
from tests.pruning.test_prune import TOKENS, arrays_of, largest, logits, masked, opened, plan_of

LAYERS = [{"attention_bits": 6}, {"ffn_bits": 3}, {"attention_bits": 8, "ffn_bits": 2}, {}]
PARTS = {"self_attn": "attention_bits", "mlp": "ffn_bits"}


def with_bits(source: Path, embedding: int | None = None, ffn: int = 64, **more) -> Plan:
    """A random cut to whole groups of channels whose layers have bits as in LAYERS."""
    plan = plan_of(source, ("ffn",), ffn=ffn, embedding_bits=embedding, group_size=32, **more)
    return plan.model_copy(update={"layers": [layer.model_copy(update=LAYERS[layer.source]) for layer in plan.layers]})


def wanted(module: str, usual: int | None, embedding: int | None) -> int | None:
    """What a module of the pico llama must be packed with, from its name alone."""
    if not module.startswith("model.layers."):
        return embedding or usual
    number, part = module.split(".")[2:4]
    return LAYERS[int(number)].get(PARTS[part]) or usual


CASES = [(None, None, None), (None, None, 8), ((4, 32), None, 6), ((4, 32), 5, None), (None, 4, 8)]


@pytest.mark.parametrize(("packed", "bits", "embedding"), CASES, ids=str)
@pytest.mark.parametrize("family", ["llama", "llama-untied", "qwen2"])
def test_every_part_has_its_bits(pico_models, tmp_path, family, packed, bits, embedding):
    source, out = pico_models(family, packed), tmp_path / "out"
    done = prune(source, with_bits(source, embedding, bits=bits), out)
    checkpoint, usual = Checkpoint(out), bits or (packed and packed[0])
    before, after = arrays_of(source), arrays_of(out)
    modules = {t.module for t in checkpoint.arch.tensors() if t.matrix}
    for module in modules:
        packing = checkpoint.packing(module)
        assert (packing and packing.bits) == wanted(module, usual, embedding), module
        same = f"{module}.scales" in before and packing.bits == packed[0]
        assert (module in done["requantized"]) is (packing is not None and not (same and "down_proj" not in module))
        if same and "mlp" not in module:
            assert mx.array_equal(before[f"{module}.weight"], after[f"{module}.weight"]), module
    said = Plan.load(out / "plan.json")
    assert said.after.bytes == checkpoint.nbytes() == sum(a.nbytes for a in after.values())
    module, _ = mlx_lm.load(str(out))
    assert np.isfinite(np.array(module(mx.array(TOKENS)))).all()


def test_requantized_to_other_bits_is_the_quantized_original(pico_models, tmp_path):
    """The values stand on disk with the error that is listed, and the model computes with them."""
    source, out = pico_models("llama"), tmp_path / "out"
    plan = with_bits(source, 8)
    done = prune(source, plan, out)
    before, after = arrays_of(source), arrays_of(out)
    for module, error in done["requantized"].items():
        own = opened(after, module, wanted(module, None, 8))
        original = np.array(before[f"{module}.weight"])
        if "mlp" in module:
            kept = plan.layers[int(module.split(".")[2])].ffn
            original = original[:, kept] if "down_proj" in module else original[kept]
        assert error == pytest.approx(reference.relative_error(original, own), rel=1e-3)
    rough = {n: e for n, e in done["requantized"].items() if ".2.mlp" in n}
    assert min(rough.values()) > 3 * max(e for n, e in done["requantized"].items() if n not in rough and ".1." not in n)
    assert largest(logits(lm.load(out)), masked(source, plan)) > 1e-3


def test_more_bits_are_nearer(pico_models, tmp_path):
    source = pico_models("llama")
    off = {}
    for bits in (2, 4, 8):
        plan = plan_of(source, ("ffn",), ffn=64, group_size=32)
        for layer in plan.layers:
            layer.ffn_bits = bits
        prune(source, plan, tmp_path / str(bits))
        off[bits] = largest(logits(lm.load(tmp_path / str(bits))), masked(source, plan))
    assert off[2] > 2 * off[4] > 4 * off[8] > 0


def test_the_config_says_which_modules_differ(pico_models, tmp_path):
    source = pico_models("llama", (4, 32))
    prune(source, with_bits(source, 6), tmp_path / "out")
    said = json.loads((tmp_path / "out" / "config.json").read_text())["quantization"]
    assert (said["bits"], said["group_size"], said["mode"]) == (4, 32, "affine")
    assert said["model.embed_tokens"]["bits"] == 6
    assert said["model.layers.2.mlp.gate_proj"] == {"bits": 2, "group_size": 32, "mode": "affine"}
    assert "model.layers.3.mlp.gate_proj" not in said


@pytest.mark.parametrize("where", ["embedding", "attention", "ffn"])
@pytest.mark.parametrize(("bits", "group"), [(7, 32), (4, None), (4, 33)])
def test_bits_that_mlx_lacks(pico_models, where, bits, group):
    source = pico_models("llama")
    plan = plan_of(source, group_size=group)
    if where == "embedding":
        plan.embedding_bits = bits
    else:
        setattr(plan.layers[1], f"{where}_bits", bits)
    assert plan.problems(Checkpoint(source).arch) == [f"MLX cannot pack {bits} bits in groups of {group}"]


def test_a_packed_embedding_unties_where_its_class_needs_it(pico_models, tmp_path):
    """qwen2 with fewer heads leaves as seed_oss, which multiplies by the embedding itself."""
    source = pico_models("qwen2")
    plan = plan_of(source, ("kv_head",), embedding_bits=8, group_size=32)
    prune(source, plan, tmp_path / "out")
    checkpoint = Checkpoint(tmp_path / "out")
    assert checkpoint.config["model_type"] == "seed_oss" and not checkpoint.arch.tied
    assert {checkpoint.packing(m).bits for m in ("model.embed_tokens", "lm_head")} == {8}
    assert largest(logits(lm.load(tmp_path / "out")), masked(source, plan)) < 0.05
