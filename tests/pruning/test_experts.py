"""Experts that are cut: the result equals the original whose router cannot choose the others."""

from __future__ import annotations

import json
from pathlib import Path

import mlx.core as mx
import mlx_lm
import numpy as np
import pytest
from mlx_lm.models.cache import make_prompt_cache

from mlx_pare import lm
from mlx_pare.base.errors import PareError, Unsupported
from mlx_pare.model.checkpoint import Checkpoint
from mlx_pare.pruning.layout import size_of
from mlx_pare.pruning.plan_file import Plan, Target
from mlx_pare.pruning.prune import prune
from mlx_pare.pruning.reach import space
from mlx_pare.tensors.packing import Packing
from tests.support import pico, sparse

TOKENS = np.random.default_rng(0).integers(0, 500, (2, 40))


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """family, packing -> its directory, made once."""
    known: dict[tuple[str, str], Path] = {}

    def find(family: str, packing: str = "float", **changes) -> Path:
        key = (family, packing, *changes)
        if key not in known:
            place = tmp_path_factory.mktemp("sparse")
            known[key] = sparse.make(place / "float", family, **changes)
            if packing == "4":
                known[key] = pico.quantize(known[key], place / "packed")
            elif packing == "mxfp4":
                known[key] = pico.quantize(known[key], place / "packed", None, None, "mxfp4")
        return known[key]

    return find


def plan_of(model: Path, experts: int = 7, layers: list[int] | None = None, seed: int = 1) -> Plan:
    """A plan that keeps ``experts`` drawn by lot in each layer, and everything else."""
    checkpoint, random = Checkpoint(model), np.random.default_rng(seed)
    kept = []
    for i in range(len(checkpoint.arch.layers)) if layers is None else layers:
        units = {axis: list(range(count)) for axis, count in checkpoint.arch.units(i).items()}
        if "expert" in units:
            units["expert"] = sorted(random.choice(len(units["expert"]), experts, replace=False).tolist())
        kept.append({"source": i, "ffn": [], "kv_head": [], **units})
    size = size_of(checkpoint, None, None)
    return Plan(source=checkpoint.identity(), criterion="random", axes=["expert"], before=size, after=size,
                target=Target(kind="keep", value=1, asked="a number of experts"), layers=kept)  # fmt: skip


def logits(model) -> np.ndarray:
    return np.array(model(mx.array(TOKENS)))


@pytest.mark.parametrize("packing", ["float", "4"])
@pytest.mark.parametrize("family", sparse.CONFIGS)
def test_a_cut_is_the_same_as_masked_routers(made, tmp_path, family, packing):
    model = made(family, packing)
    plan = plan_of(model)
    done = prune(model, plan, tmp_path / "out")
    assert done == {"requantized": {}, "dense": []}
    kept = {layer.source: layer.expert for layer in plan.layers if layer.expert}
    small, whole = lm.load(tmp_path / "out"), lm.load(model)
    before = logits(whole)
    same = logits(sparse.masked(whole, family, kept))
    scale = np.abs(same).max()
    assert np.abs(logits(small) - same).max() < 1e-5 * scale
    assert np.abs(before - same).max() > 1e-3 * scale, "the mask changed nothing"
    made_of = Checkpoint(tmp_path / "out")
    assert made_of.nbytes() == size_of(Checkpoint(model), plan.keep(Checkpoint(model).arch), None).bytes
    survivors = json.loads((tmp_path / "out" / "survivors.json").read_text())["layers"]
    assert {layer["source"]: layer["expert"] for layer in survivors if "expert" in layer} == kept


def test_another_set_of_experts_is_another_model(made, tmp_path):
    """The test above could not fail if every set of experts were as good."""
    model = made("qwen3_moe")
    prune(model, plan_of(model), tmp_path / "out")
    wrong = {layer.source: layer.expert for layer in plan_of(model, seed=2).layers}
    whole = sparse.masked(lm.load(model), "qwen3_moe", wrong)
    assert np.abs(logits(lm.load(tmp_path / "out")) - logits(whole)).max() > 1e-2


@pytest.mark.parametrize("packing", ["4", "mxfp4"])
def test_codes_stay_bit_for_bit(made, tmp_path, packing):
    model = made("gpt_oss", packing)
    plan = plan_of(model)
    prune(model, plan, tmp_path / "out")
    old, new = Checkpoint(model).lazy(), Checkpoint(tmp_path / "out").lazy()
    for layer in plan.layers:
        index, prefix = mx.array(layer.expert), f"model.layers.{layer.source}.mlp"
        for name in (n for n in new if n.startswith(prefix)):
            assert mx.array_equal(new[name], old[name][index]), name
    assert sum("mlp.experts" in name for name in new) >= 4 * 3 * 2


def test_stock_mlx_lm_loads_and_writes_with_the_result(made, tmp_path):
    """With a cache: a prefix, then token by token, is the same as one pass."""
    prune(made("qwen3_moe", "4"), plan_of(made("qwen3_moe", "4")), tmp_path / "out")
    model, _ = mlx_lm.load(str(tmp_path / "out"))
    cache, whole = make_prompt_cache(model), logits(model)[:1]
    parts = [model(mx.array(TOKENS[:1, :30]), cache=cache)]
    parts += [model(mx.array(TOKENS[:1, i : i + 1]), cache=cache) for i in range(30, 40)]
    assert np.abs(np.concatenate([np.array(p) for p in parts], axis=1) - whole).max() < 1e-4


@pytest.mark.parametrize("family", [f for f in sparse.CONFIGS if f not in sparse.ONLY_EXPERTS])
def test_layers_that_are_cut_keep_their_kinds(made, tmp_path, family):
    model = made(family, **({"num_hidden_layers": 6} if family == "gpt_oss" else {}))
    arch = Checkpoint(model).arch
    keep = [i for i in range(len(arch.layers)) if i != 2]
    plan = plan_of(model, layers=keep)
    prune(model, plan, tmp_path / "out")
    whole = sparse.masked(lm.load(model), family, {one.source: one.expert for one in plan.layers if one.expert})
    blocks = lm.blocks(whole)
    blocks[:] = [blocks[i] for i in keep]
    if family == "gpt_oss":
        whole.model.layer_types = [whole.model.layer_types[i] for i in keep]
    assert np.abs(logits(lm.load(tmp_path / "out")) - logits(whole)).max() < 1e-4
    assert [one.kind for one in Checkpoint(tmp_path / "out").arch.layers] == [arch.layers[i].kind for i in keep]


def test_dense_layers_between_are_listed_again(made, tmp_path):
    """mlp_only_layers and decoder_sparse_step count places, which a cut changes."""
    model = made("qwen3_moe", mlp_only_layers=[0], num_hidden_layers=5, decoder_sparse_step=2)
    kinds = [layer.kind for layer in Checkpoint(model).arch.layers]
    assert kinds == ["full_attention", "full_attention+moe"] * 2 + ["full_attention"]
    prune(model, plan_of(model, layers=[1, 3, 4]), tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (config["mlp_only_layers"], config["decoder_sparse_step"]) == ([2], 1)
    whole = sparse.masked(
        lm.load(model), "qwen3_moe",
        {one.source: one.expert for one in plan_of(model, layers=[1, 3, 4]).layers if one.expert},
    )  # fmt: skip
    blocks = lm.blocks(whole)
    blocks[:] = [blocks[i] for i in (1, 3, 4)]
    assert np.abs(logits(lm.load(tmp_path / "out")) - logits(whole)).max() < 1e-4


def test_only_the_count_changes_in_the_config(made, tmp_path):
    prune(made("qwen3_moe"), plan_of(made("qwen3_moe")), tmp_path / "out")
    old, new = (json.loads((p / "config.json").read_text()) for p in (made("qwen3_moe"), tmp_path / "out"))
    changed = {key for key in {*old, *new} if old.get(key) != new.get(key)}
    assert changed == {"num_experts", "pare", "rope_parameters"} and new["num_experts"] == 7


def test_as_many_experts_as_a_token_visits_and_fewer(made, tmp_path):
    model = made("qwen3_moe")
    prune(model, plan_of(model, experts=3), tmp_path / "three")
    assert np.isfinite(logits(lm.load(tmp_path / "three"))).all()
    with pytest.raises(PareError, match="2 experts are left, and every token visits 3"):
        prune(model, plan_of(model, experts=2), tmp_path / "two")
    assert space(Checkpoint(model).arch, ["expert"], 1, []).choices["expert"] == list(range(3, 13))


def test_what_is_refused(made, tmp_path):
    model, plan = made("qwen3_moe"), plan_of(made("qwen3_moe"))

    def first_keeps(experts: list[int]) -> Plan:
        first = plan.layers[0].model_copy(update={"expert": experts})
        return plan.model_copy(update={"layers": [first, *plan.layers[1:]]})

    with pytest.raises(PareError, match="layers differ in expert"):
        prune(model, first_keeps([0, 1, 2, 3]), tmp_path / "out")
    with pytest.raises(PareError, match="layer 0 keeps no expert"):
        prune(model, first_keeps([]), tmp_path / "out")
    grouped = sparse.make(tmp_path / "grouped", "deepseek_v3", n_group=3, topk_group=2)
    with pytest.raises(PareError, match="chooses groups of experts"):
        prune(grouped, plan_of(grouped, 6), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_experts_one_by_one_must_be_converted(made, tmp_path):
    model, apart = made("qwen3_moe"), tmp_path / "hub"
    apart.mkdir()
    weights = mx.load(str(model / "model.safetensors"))
    stacks = [name for name in weights if ".switch_mlp." in name]
    for name in stacks:
        for i, matrix in enumerate(weights.pop(name)):
            weights[name.replace("switch_mlp", f"experts.{i}")] = matrix
    mx.save_safetensors(str(apart / "model.safetensors"), weights)
    (apart / "config.json").write_bytes((model / "config.json").read_bytes())
    with pytest.raises(Unsupported, match=r"as on the hub.*mlx_lm.convert"):
        _ = Checkpoint(apart).arch


def test_routers_keep_their_bits(made, tmp_path):
    """A result with fewer bits packs experts and attention, but not what chooses the experts."""
    model = made("qwen3_moe", "4")
    plan = plan_of(model).model_copy(update={"bits": 2, "group_size": 32})
    prune(model, plan, tmp_path / "out")
    old, new = Checkpoint(model), Checkpoint(tmp_path / "out")
    router, stack = "model.layers.0.mlp.gate", "model.layers.0.mlp.switch_mlp.up_proj"
    assert new.packing(router).as_config() == old.packing(router).as_config() and old.packing(router).bits == 8
    assert new.packing(stack).as_config() == Packing(2, 32).as_config()
    assert new.nbytes() == size_of(old, plan.keep(old.arch), plan.packing).bytes
