"""Multimodal models: the language model inside is cut as it would be alone, everything else is kept untouched."""

from __future__ import annotations

import json
from pathlib import Path

import mlx.core as mx
import mlx_lm
import numpy as np
import pytest

from mlx_pare import lm
from mlx_pare.base.errors import PareError
from mlx_pare.model.checkpoint import Checkpoint
from mlx_pare.pruning.layout import size_of
from mlx_pare.pruning.plan_file import Plan, Target
from mlx_pare.pruning.prune import prune
from mlx_pare.pruning.reach import space
from tests.support import parents, sparse

TOKENS = mx.array(np.random.default_rng(0).integers(0, 500, (2, 24)))
OWN = {"made_by", "source_identity", "parent", "criterion", "parameters_before", "survivors"}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """kind, packed -> the directory of a multimodal model, and that of its language model alone. Made once."""
    known: dict[tuple[str, bool], tuple[Path, Path]] = {}

    def find(kind: str, packed: bool = False) -> tuple[Path, Path]:
        if (kind, packed) not in known:
            place = tmp_path_factory.mktemp("parents")
            model = parents.make(place / kind, kind)
            model = parents.quantize(model, place / f"{kind}+4", kind) if packed else model
            known[kind, packed] = model, parents.alone(model, place / "alone")
        return known[kind, packed]

    return find


def plan_of(model: Path, seed: int = 1, **more) -> Plan:
    """A plan that keeps units drawn by lot along every axis on which the model is cut, but the hidden one."""
    checkpoint, random = Checkpoint(model), np.random.default_rng(seed)
    arch = checkpoint.arch
    layers, kept = range(len(arch.layers)), []
    if "layer" in arch.cut_axes:
        layers = layers[:3]  # gemma3: a whole period
    for i in layers:
        units = {axis: list(range(count)) for axis, count in arch.units(i).items()}
        for axis, count in (("ffn", 96), ("kv_head", 1), ("expert", 7)):
            if axis in units and axis in arch.cut_axes and arch.holds_heads(count if axis == "kv_head" else 1):
                units[axis] = sorted(random.choice(len(units[axis]), count, replace=False).tolist())
        kept.append({"source": i, "ffn": [], "kv_head": [], **units})
    size = size_of(checkpoint, None, None)
    return Plan(source=checkpoint.identity(), criterion="random", axes=["ffn"], before=size, after=size, layers=kept,
                target=Target(kind="keep", value=1, asked="some units"), **more)  # fmt: skip


def changed(old: dict, new: dict) -> set[str]:
    return {key for key in {*old, *new} if old.get(key) != new.get(key)}


def config(directory: Path) -> dict:
    return json.loads((directory / "config.json").read_text())


@pytest.mark.parametrize("packed", [False, True], ids=["float", "4"])
@pytest.mark.parametrize("kind", parents.PARENTS)
def test_the_language_model_is_cut_as_it_is_alone(made, tmp_path, kind, packed):
    model, alone = made(kind, packed)
    plan = plan_of(model)
    done = prune(model, plan, tmp_path / "out")
    same = prune(alone, plan.model_copy(update={"source": Checkpoint(alone).identity()}), tmp_path / "alone")
    assert done["requantized"] == {f"language_model.{name}": error for name, error in same["requantized"].items()}
    assert done["dense"] == [f"language_model.{name}" for name in same["dense"]]
    out, own = Checkpoint(tmp_path / "out"), Checkpoint(tmp_path / "alone")
    ours, theirs = out.lazy(), own.lazy()
    assert {n for n in ours if n.startswith("language_model.")} == {f"language_model.{name}" for name in theirs}
    for name, array in theirs.items():
        assert mx.array_equal(ours[f"language_model.{name}"], array), name
    assert out.nbytes() == own.nbytes() == size_of(Checkpoint(model), plan.keep(Checkpoint(model).arch), None).bytes
    stock, _ = mlx_lm.load(str(tmp_path / "out"))
    if not kind.startswith("qwen3_5"):  # mlx-lm has no class for that language model alone; see the next test
        assert mx.array_equal(stock(TOKENS), lm.load(tmp_path / "alone")(TOKENS))
    assert len(stock.layers) == len(plan.layers) and out.nbytes() < Checkpoint(model).nbytes()


@pytest.mark.parametrize("kind", ["qwen3_vl_moe", "qwen3_5_moe"])
def test_experts_inside_are_cut_as_with_masked_routers(made, tmp_path, kind):
    model, _ = made(kind)
    plan = plan_of(model)
    prune(model, plan, tmp_path / "out")
    whole, kept = lm.load(model), {layer.source: layer.expert for layer in plan.layers}
    before = whole(TOKENS)
    lm.blocks(sparse.masked(whole, "qwen3_moe", kept))[len(plan.layers) :] = []
    assert mx.abs(lm.load(tmp_path / "out")(TOKENS) - whole(TOKENS)).max() < 1e-5 * mx.abs(before).max()


@pytest.mark.parametrize("packed", [False, True], ids=["float", "4"])
@pytest.mark.parametrize("kind", parents.PARENTS)
def test_everything_else_is_untouched(made, tmp_path, kind, packed):
    model, _ = made(kind, packed)
    prune(model, plan_of(model), tmp_path / "out")
    before, after = Checkpoint(model), Checkpoint(tmp_path / "out")
    assert before.beside() and before.beside().keys() == after.beside().keys()
    old, new = before.lazy(), after.lazy()
    for name, entry in before.beside().items():
        assert after.entries[name].dtype == entry.dtype and mx.array_equal(old[name], new[name]), name
    assert (tmp_path / "out" / "preprocessor_config.json").read_bytes() == (
        model / "preprocessor_config.json"
    ).read_bytes()
    was, now = config(model), config(tmp_path / "out")
    assert changed(was, now) <= {"text_config", "pare", "quantization", "quantization_config"}
    keys = {"intermediate_size", "num_attention_heads", "num_key_value_heads", "num_hidden_layers", "layer_types"}
    written = {"rope_parameters", "rope_scaling", "rope_theta", "tie_word_embeddings", "num_experts"}
    assert changed(was["text_config"], now["text_config"]) <= keys | written
    assert now["text_config"]["num_hidden_layers"] == len(after.arch.layers)
    assert after.packed_beside() == before.packed_beside()


def test_a_packed_tower_keeps_its_bits_if_the_rest_gets_fewer(made, tmp_path):
    model, _ = made("gemma3", True)
    prune(model, plan_of(model, bits=3, group_size=32), tmp_path / "out")
    found, four = config(tmp_path / "out")["quantization"], {"group_size": 32, "bits": 4, "mode": "affine"}
    assert found["bits"] == 3 and found["vision_tower.blocks.0"] == four
    assert Checkpoint(tmp_path / "out").packed_beside() == {"vision_tower.blocks.0": four}
    assert mx.array_equal(
        *(Checkpoint(place).lazy()["vision_tower.blocks.0.weight"] for place in (model, tmp_path / "out"))
    )


def test_older_configs_have_the_language_model_at_the_top(tmp_path):
    model = parents.make(tmp_path / "qwen2_vl", "qwen2_vl", bare=True)
    prune(model, plan_of(model), tmp_path / "out")
    was, now = config(model), config(tmp_path / "out")
    assert "text_config" not in now and now["model_type"] == "qwen2_vl"
    assert changed(was, now) <= {"intermediate_size", "num_hidden_layers", "pare", "rope_parameters", "rope_scaling"}
    assert mlx_lm.load(str(tmp_path / "out"))[0](TOKENS).shape == (2, 24, now["vocab_size"])


def test_what_a_parent_cannot_hold_is_refused_before(made, tmp_path):
    """hidden channels, widths per layer, and heads with which the language model would leave as another type."""
    with pytest.raises(PareError, match="the other parts of the mistral3 read and write hidden channels"):
        space(Checkpoint(made("mistral3")[0]).arch, ["hidden"], 1, [])
    plan = plan_of(made("mistral3")[0])
    one = plan.layers[0].model_copy(update={"ffn": plan.layers[0].ffn[:40]})
    with pytest.raises(PareError, match="has no other parts, and this is the language model of a mistral3"):
        prune(made("mistral3")[0], plan.model_copy(update={"layers": [one, *plan.layers[1:]]}), tmp_path / "out")
    qwen = Checkpoint(made("qwen2_5_vl")[0]).arch
    assert not qwen.holds_heads(1) and qwen.holds_heads(4), "one kv head would make it a seed_oss"
    assert space(qwen, ["kv_head"], 1, []).choices["kv_head"] == [4]
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("kind", ["mistral3", "qwen3_5_moe"])
def test_the_rope_of_transformers_5_is_read_inside(tmp_path, kind):
    """mlx-lm's llama would take a theta of 10000, and qwen3_5 its own if there were no rope_parameters."""
    model = parents.make(tmp_path / kind, kind)
    before, found = lm.load(model)(TOKENS), config(model)
    rope = {"rope_theta": 500.0, "rope_type": "default", "partial_rotary_factor": 0.5}
    found["text_config"]["rope_parameters"] = rope
    del found["text_config"]["rope_theta"]
    (model / "config.json").write_text(json.dumps(found))
    turned = lm.load(model)(TOKENS)
    assert mx.abs(turned - before).max() > 1e-2
    plan = plan_of(model)
    prune(model, plan, tmp_path / "out")
    stock, ours = mlx_lm.load(str(tmp_path / "out"))[0](TOKENS), lm.load(tmp_path / "out")(TOKENS)
    assert mx.array_equal(stock, ours)
    assert config(tmp_path / "out")["text_config"]["rope_parameters"] == rope


def test_a_tensor_that_mlx_lm_would_not_drop_is_refused(made, tmp_path):
    model = parents.make(tmp_path / "gemma3", "gemma3")
    file = model / "model.safetensors"
    mx.save_safetensors(str(file), mx.load(str(file)) | {"audio_tower.weight": mx.zeros((4, 4))})
    with pytest.raises(PareError, match=r"holds audio_tower\.weight, which"):
        _ = Checkpoint(model).arch
