"""Models that mix attention with other layers: channels and layers are cut as in the original without them."""

from __future__ import annotations

import json
from pathlib import Path

import mlx.core as mx
import mlx_lm
import numpy as np
import pytest
from mlx_lm.models.cache import make_prompt_cache

from mlx_pare import lm
from mlx_pare.arch import can_keep
from mlx_pare.base.errors import PareError
from mlx_pare.model.checkpoint import Checkpoint
from mlx_pare.pruning.layout import size_of
from mlx_pare.pruning.plan_file import Plan, Target
from mlx_pare.pruning.prune import prune
from mlx_pare.pruning.reach import best_layers, protected_layers, space
from tests.support import hybrids, pico, sparse

TOKENS = mx.array(np.random.default_rng(0).integers(0, 500, (2, 24)))
DENSE = ("qwen3_5", "lfm2", "lfm2-indices", "granite-dense")


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """name, packed -> its directory, made once."""
    known: dict[tuple[str, bool], Path] = {}

    def find(name: str, packed: bool = False) -> Path:
        if (name, packed) not in known:
            place = tmp_path_factory.mktemp("hybrids")
            model = hybrids.make(place / "float", name)
            known[name, packed] = pico.quantize(model, place / "packed") if packed else model
        return known[name, packed]

    return find


def plan_of(model: Path, layers: list[int] | None = None, ffn: int | None = None) -> Plan:
    checkpoint, random = Checkpoint(model), np.random.default_rng(1)
    kept = []
    for i in range(len(checkpoint.arch.layers)) if layers is None else layers:
        units = {axis: list(range(count)) for axis, count in checkpoint.arch.units(i).items()}
        if ffn:
            units["ffn"] = sorted(random.choice(len(units["ffn"]), ffn, replace=False).tolist())
        kept.append({"source": i, "ffn": [], "kv_head": [], **units})
    size = size_of(checkpoint, None, None)
    return Plan(source=checkpoint.identity(), criterion="random", axes=["ffn"], before=size, after=size, layers=kept,
                target=Target(kind="keep", value=1, asked="some units"))  # fmt: skip


def without_channels(model, plan: Plan):
    """The stock model with zeros in the columns of down_proj that the plan leaves out."""
    for layer in plan.layers:
        block = lm.blocks(model)[layer.source]
        owner = block.feed_forward if hasattr(block, "feed_forward") else block.mlp
        down = owner.w2 if hasattr(owner, "w2") else owner.down_proj
        down.weight = mx.where(mx.array([i in layer.ffn for i in range(down.weight.shape[1])]), down.weight, 0.0)
    return model


@pytest.mark.parametrize("name", DENSE)
def test_channels_are_cut_in_layers_of_every_kind(made, tmp_path, name):
    model = made(name)
    plan = plan_of(model, ffn=64)
    prune(model, plan, tmp_path / "out")
    result, whole = Checkpoint(tmp_path / "out"), lm.load(model)
    before = whole(TOKENS)
    same = without_channels(whole, plan)(TOKENS)
    assert mx.abs(mlx_lm.load(str(tmp_path / "out"))[0](TOKENS) - same).max() < 1e-5 * mx.abs(before).max()
    assert mx.abs(same - before).max() > 1e-2, "nothing was cut"
    assert result.arch.uniform("ffn") == 64 and len({layer.kind for layer in result.arch.layers}) == 2
    assert result.nbytes() == size_of(Checkpoint(model), plan.keep(Checkpoint(model).arch), None).bytes


@pytest.mark.parametrize("name", hybrids.HYBRIDS)
def test_layers_are_cut_and_keep_their_kinds(made, tmp_path, name):
    """With a cache too: a prefix, then token by token, is the same as one pass."""
    _, _, _, keep, _ = hybrids.HYBRIDS[name]
    model = made(name)
    old = Checkpoint(model).arch
    prune(model, plan_of(model, layers=keep), tmp_path / "out")
    small, whole = mlx_lm.load(str(tmp_path / "out"))[0], lm.load(model)
    inner = lm.body(whole)
    inner.layers[:] = [inner.layers[i] for i in keep]
    for index in ("fa_idx", "ssm_idx", "conv_idx"):
        if hasattr(inner, index):
            setattr(inner, index, 0)  # of a cache, of which there is none
    logits = small(TOKENS)
    assert mx.abs(logits - whole(TOKENS)).max() < 1e-5 * mx.abs(logits).max()
    assert [one.kind for one in Checkpoint(tmp_path / "out").arch.layers] == [old.layers[i].kind for i in keep]
    cache = make_prompt_cache(small)
    parts = [small(TOKENS[:1, :16], cache=cache)] + [small(TOKENS[:1, i : i + 1], cache=cache) for i in range(16, 24)]
    assert mx.abs(mx.concatenate(parts, axis=1) - logits[:1]).max() < 1e-4 * mx.abs(logits).max()


@pytest.mark.parametrize("name", [name for name, row in hybrids.HYBRIDS.items() if row[4]])
def test_layers_that_mlx_lm_would_read_otherwise_are_refused(made, tmp_path, name):
    model, wrong = made(name), hybrids.HYBRIDS[name][4]
    with pytest.raises(PareError, match=r"would change the attention kind|leaves an attention kind out"):
        prune(model, plan_of(model, layers=wrong), tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", hybrids.HYBRIDS)
def test_the_search_finds_sets_of_layers_that_can_stay(made, name):
    arch = Checkpoint(made(name)).arch
    protected = protected_layers(arch)
    counts = space(arch, ["layer"], 1, protected).choices["layer"]
    assert len(counts) > 1 and counts[-1] == len(arch.layers)
    scores = np.random.default_rng(3).random(len(arch.layers))
    for count in counts:
        found = best_layers(arch, scores, count, protected)
        assert len(found) == count and {*protected} <= {*found} and can_keep(arch, found)


@pytest.mark.parametrize("name", ["qwen3_5", "lfm2", "granite-dense", "nemotron_h"])
def test_packed_codes_stay(made, tmp_path, name):
    model, keep = made(name, True), hybrids.HYBRIDS[name][3]
    assert prune(model, plan_of(model, layers=keep), tmp_path / "out") == {"requantized": {}, "dense": []}
    old, new = Checkpoint(model), Checkpoint(tmp_path / "out")
    was, now = old.lazy(), new.lazy()
    for tensor in new.arch.tensors():
        if tensor.layer is not None:
            name = tensor.name.replace(new.arch.block(tensor.layer), old.arch.block(keep[tensor.layer]), 1)
            assert mx.array_equal(now[tensor.name], was[name]), name


def test_only_keys_of_size_and_kind_change(made, tmp_path):
    for name, expected in {
        "lfm2": {"block_ff_dim", "block_auto_adjust_ff_dim", "num_hidden_layers", "layer_types"},
        "lfm2-indices": {"block_ff_dim", "block_auto_adjust_ff_dim", "num_hidden_layers", "full_attn_idxs"},
        "nemotron_h": {"num_hidden_layers", "hybrid_override_pattern"},
    }.items():
        model, out = made(name), tmp_path / name
        prune(model, plan_of(model, hybrids.HYBRIDS[name][3], 64 if name in DENSE else None), out)
        was, now = (json.loads((place / "config.json").read_text()) for place in (model, out))
        changed = {key for key in {*was, *now} if was.get(key) != now.get(key)}
        assert changed == expected | {"pare", "rope_parameters"}, name


def test_a_nemotron_without_experts_is_not_cut(tmp_path, pare):
    """Its layers have either attention or a feed-forward, which nothing scores yet. A run says so before any work."""
    model = sparse.make(tmp_path / "m", "nemotron_h", hybrid_override_pattern="M-M*--", n_routed_experts=None)
    arch = Checkpoint(model).arch
    assert arch.cut_axes == []
    with pytest.raises(PareError, match="layers without a feed-forward are not scored"):
        space(arch, ["layer"], 1, [])
    plain = pare("run", model, "--out", tmp_path / "run", "--keep", "0.8")
    assert plain.code == 1 and "this nemotron_h is cut along none of ffn, kv_head" in plain.line
    asked = pare("run", model, "--out", tmp_path / "run", "--keep", "0.8", "--axes", "layer")
    assert asked.code == 2 and asked.line.endswith("layers without a feed-forward are not scored.")
    assert not (tmp_path / "run").exists()


def test_what_is_not_cut(made):
    """Feed-forwards that are experts, experts of a model without any, and heads."""
    for name, axis, why in (
        ("qwen3_5_moe", "ffn", "its feed-forwards are experts"),
        ("qwen3_5", "expert", "this model has no experts"),
        ("lfm2", "kv_head", "nobody has described how"),
    ):
        with pytest.raises(PareError, match=f"cannot be cut along {axis}: {why}"):
            space(Checkpoint(made(name)).arch, [axis], 1, [])
