"""prune: the sliced model is the original with removed units masked, codes stay bit for bit, the source stays whole.

Differences of logits are relative to their standard deviation where that is above 1 (a tied pico head gives 8).
"""

from __future__ import annotations

import functools
import hashlib
import json
import shutil
from pathlib import Path

import mlx.core as mx
import numpy as np
import pico
import pytest
import reference_packing as reference

from mlx_pare import lm
from mlx_pare.base.errors import PareError, Refused
from mlx_pare.model.checkpoint import Checkpoint
from mlx_pare.pruning.plan_file import LayerPlan, Plan, Size, Target
from mlx_pare.pruning.prune import prune
from mlx_pare.tensors.shards import ShardWriter

DENSE, PACKED, BROKEN = 1e-5, 1e-4, 1e-2
TOKENS = np.random.RandomState(0).randint(1, 500, (2, 27))  # longer than gemma's window of 8
FAMILIES = sorted(pico.FAMILIES)
AXES = {"ffn": ("ffn",), "kv_head": ("kv_head",), "layer": ("layer",), "all": ("ffn", "kv_head", "layer")}
DEPTH = {"gemma3_text": [1, 3, 5], "olmo3": [0, 2, 3]}  # sliding, sliding, full, from different periods; both kinds
FUSED = 32  # columns in a quantization group of the packed models here

EIGHT = {"num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 8}  # three kv heads: 6 do not divide 64
VARIANTS = {family: (family, {}) for family in FAMILIES} | {
    "llama, leaving as mistral": ("llama", EIGHT),
    "llama with biases": ("llama", EIGHT | {"attention_bias": True, "mlp_bias": True}),
    "llama with attention biases": ("llama-untied", EIGHT | {"attention_bias": True}),
    "llama with mlp biases": ("llama", EIGHT | {"mlp_bias": True}),
    "llama with sliding layers": (
        "llama",
        EIGHT | {"layer_types": ["sliding_attention", "full_attention"] * 2, "sliding_window": 8},
    ),
    "qwen3 with one kv head a query head": ("qwen3", {"num_key_value_heads": 4}),
}


@pytest.fixture
def model(pico_models):
    """``model(variant, packed=None, dtype=float32) -> Path``."""

    def make(variant="llama", packed=None, dtype=mx.float32):
        family, changes = VARIANTS[variant]
        return pico_models(family, packed, dtype=dtype, **changes)

    return make


def plan_of(model: Path, axes=(), ffn=None, heads=None, hidden=None, seed=0, **more) -> Plan:
    """A plan with random units, different in every layer. ``ffn``: how many of 128; ``heads``: how many."""
    checkpoint, random = Checkpoint(model), np.random.RandomState(seed)
    arch = checkpoint.arch
    total = {axis: arch.uniform(axis) for axis in ("ffn", "kv_head")}
    count = {
        "ffn": (ffn or 77) if "ffn" in axes else total["ffn"],
        "kv_head": (heads or max(1, total["kv_head"] - 1)) if "kv_head" in axes else total["kv_head"],
    }
    every = list(range(len(arch.layers)))
    sources = DEPTH.get(arch.family.name, [0, 1, 3]) if "layer" in axes else every
    layers = []
    for source in sources:
        drawn = {axis: sorted(random.permutation(total[axis])[: count[axis]].tolist()) for axis in total}
        layers.append(LayerPlan(source=source, **drawn))
    nothing = dict.fromkeys(Size.model_fields, 0)
    return Plan(
        source=checkpoint.identity(),
        criterion="random",
        axes=list(axes),
        target=Target(kind="keep", value=0.5, asked="half"),
        before=nothing,
        after=nothing,
        hidden=None if hidden is None else sorted(random.permutation(64)[:hidden].tolist()),
        layers=layers,
        **more,
    )


def whole_groups(model: Path, axes, **more) -> Plan:
    """Channels and heads in whole groups of 32 columns."""
    plan = plan_of(model, axes, **more)
    sizes = Checkpoint(model).arch.layers[0].sizes
    per_head = sizes["group"] * sizes["head_dim"]
    heads = max(1, FUSED // per_head)  # neighbours that share one group of columns
    for number, layer in enumerate(plan.layers):
        if "ffn" in axes:
            layer.ffn = [g * FUSED + i for g in ((0, 2), (1, 3))[number % 2] for i in range(FUSED)]
        if "kv_head" in axes:
            start = heads * (number % (sizes["kv_head"] // heads))
            layer.kv_head = list(range(start, start + heads))
    return plan


def logits(module) -> np.ndarray:
    return np.array(lm.for_backend(module)(mx.array(TOKENS)).astype(mx.float32))


def masked(model: Path, plan: Plan) -> np.ndarray:
    """The original, dense, with the removed units silenced where they enter the residual stream."""
    module = lm.dequantized(lm.load(model))
    kept = {layer.source: layer for layer in plan.layers}
    for index, block in enumerate(module.model.layers):
        layer, mlp, attention = kept.get(index), block.mlp, block.self_attn
        _silence(mlp.down_proj, set(layer.ffn) if layer and layer.ffn else None, 1)
        heads = attention.n_kv_heads if "n_kv_heads" in vars(attention) else attention.num_key_value_heads
        columns = attention.o_proj.weight.shape[1] // heads
        _silence(attention.o_proj, set(layer.kv_head) if layer and layer.kv_head else None, columns)
    return logits(module)


def _silence(linear, kept: set[int] | None, width: int) -> None:
    """Zero the columns of the units that are not kept; None: all of it is gone, its bias too."""
    weight = np.array(linear.weight)
    for unit in range(weight.shape[1] // width):
        if kept is None or unit not in kept:
            weight[:, unit * width : (unit + 1) * width] = 0
    linear.weight = mx.array(weight)
    if kept is None and "bias" in linear:
        linear.bias = mx.zeros_like(linear.bias)


def largest(a: np.ndarray, b: np.ndarray) -> float:
    assert a.shape == b.shape and np.isfinite(a).all() and np.isfinite(b).all()
    return float(np.abs(a - b).max() / max(1.0, b.std()))


# ---- sliced is masked ----


@pytest.mark.parametrize("axes", AXES)
@pytest.mark.parametrize("variant", VARIANTS)
def test_dense(model, tmp_path, variant, axes):
    source = model(variant)
    plan = plan_of(source, AXES[axes])
    done = prune(source, plan, tmp_path / "out")
    expected = masked(source, plan)
    assert largest(logits(lm.load(tmp_path / "out")), expected) < DENSE
    assert largest(expected, logits(lm.load(source))) > BROKEN  # the cut is not nothing
    assert done == {"requantized": {}, "dense": []}


@pytest.mark.parametrize("axes", AXES)
@pytest.mark.parametrize("variant", VARIANTS)
def test_packed_in_whole_groups(model, tmp_path, variant, axes):
    source = model(variant, (4, FUSED))
    plan = whole_groups(source, AXES[axes])
    done = prune(source, plan, tmp_path / "out")
    assert done == {"requantized": {}, "dense": []}
    assert largest(logits(lm.load(tmp_path / "out")), masked(source, plan)) < PACKED


@pytest.mark.parametrize("ffn", [64, 77])
@pytest.mark.parametrize("axes", ["ffn", "kv_head", "all"])
@pytest.mark.parametrize("variant", ["llama", "qwen2", "gemma3_text", "llama, leaving as mistral"])
def test_packed_inside_groups_left_dense(model, tmp_path, variant, axes, ffn):
    source = model(variant, (4, FUSED))
    plan = plan_of(source, AXES[axes], ffn=ffn)
    done = prune(source, plan, tmp_path / "out", requantize=False)
    assert largest(logits(lm.load(tmp_path / "out")), masked(source, plan)) < PACKED
    expected = {f"model.layers.{n}.mlp.down_proj" for n in range(len(plan.layers))} if axes != "kv_head" else set()
    assert {name for name in done["dense"] if "down_proj" in name} == expected and not done["requantized"]


@pytest.mark.parametrize(("shift", "axis"), [(1, "ffn"), (1, "kv_head"), (1, "layer"), (-1, "ffn")])
@pytest.mark.parametrize("variant", ["llama", "qwen2", "qwen3"])
@pytest.mark.parametrize("packed", [None, (4, FUSED)], ids=str)
def test_a_wrong_index_is_seen(model, tmp_path, variant, packed, axis, shift):
    """The identity is able to fail: every kept list shifted by one gives another function."""
    source = model(variant, packed)
    plan = (whole_groups if packed else plan_of)(source, (axis,))
    wrong = plan.model_copy(deep=True)
    for layer in wrong.layers:
        if axis == "layer":
            layer.source = {0: 1, 1: 2, 3: 3}[layer.source]
        else:
            size = {"ffn": 128}.get(axis) or Checkpoint(source).arch.uniform("kv_head")
            setattr(layer, axis, sorted((i + shift) % size for i in getattr(layer, axis)))
    prune(source, wrong, tmp_path / "out", requantize=False)
    found = logits(lm.load(tmp_path / "out"))
    assert largest(found, masked(source, plan)) > BROKEN
    assert largest(found, masked(source, wrong)) < PACKED


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
@pytest.mark.parametrize("packed", [None, (4, FUSED)], ids=str)
def test_a_hidden_cut_runs(model, tmp_path, family, packed):
    """Approximate by nature (RMSNorm sees fewer entries): shape and finiteness."""
    source = model(family, packed)
    prune(source, plan_of(source, ("ffn",), ffn=64, hidden=32), tmp_path / "out")
    found = logits(lm.load(tmp_path / "out"))
    assert found.shape == (2, 27, 512) and np.isfinite(found).all()
    assert lm.load(tmp_path / "out").model.norm.weight.shape == (32,)


# ---- permuted units ----


def permuted(model: Path, target: Path, seed: int = 1) -> tuple[Path, dict]:
    """The same function with the channels and kv heads of every layer in another order: (directory, new order)."""
    arrays = {k: np.array(v) for k, v in mx.load(str(model / "model.safetensors")).items()}
    arch, random, orders = Checkpoint(model).arch, np.random.RandomState(seed), {}
    for n in range(len(arch.layers)):
        sizes, at = arch.layers[n].sizes, f"model.layers.{n}."
        ffn, heads = random.permutation(sizes["ffn"]), random.permutation(sizes["kv_head"])
        rows = {1: heads[:, None] * sizes["head_dim"] + np.arange(sizes["head_dim"])}
        wide = sizes["group"] * sizes["head_dim"]
        rows[0] = heads[:, None] * wide + np.arange(wide)
        for name, index, axis in (
            ("mlp.gate_proj.weight", ffn, 0),
            ("mlp.up_proj.weight", ffn, 0),
            ("mlp.down_proj.weight", ffn, 1),
            ("self_attn.o_proj.weight", rows[0].ravel(), 1),
            *((f"self_attn.q_proj.{p}", rows[0].ravel(), 0) for p in ("weight", "bias")),
            *((f"self_attn.{m}_proj.{p}", rows[1].ravel(), 0) for m in "kv" for p in ("weight", "bias")),
        ):
            if at + name in arrays:
                arrays[at + name] = np.take(arrays[at + name], index, axis=axis)
        orders[n] = {"ffn": ffn, "kv_head": heads}
    shutil.copytree(model, target)
    mx.save_safetensors(str(target / "model.safetensors"), {k: mx.array(v) for k, v in arrays.items()})
    return target, orders


@pytest.mark.parametrize("variant", ["llama", "qwen2", "qwen3", "gemma3_text"])
def test_permuting_units_changes_nothing(model, tmp_path, variant):
    source = model(variant)
    other, orders = permuted(source, tmp_path / "permuted")
    assert largest(logits(lm.load(other)), logits(lm.load(source))) < DENSE
    plan = plan_of(source, ("ffn", "kv_head", "layer"))
    again = plan.model_copy(deep=True, update={"source": Checkpoint(other).identity()})
    for layer in again.layers:
        for axis in ("ffn", "kv_head"):
            kept = set(getattr(layer, axis))
            setattr(layer, axis, [new for new, old in enumerate(orders[layer.source][axis]) if old in kept])
    prune(source, plan, tmp_path / "a")
    prune(other, again, tmp_path / "b")
    assert largest(logits(lm.load(tmp_path / "a")), logits(lm.load(tmp_path / "b"))) < DENSE


# ---- array by array ----


def arrays_of(directory: Path) -> dict[str, mx.array]:
    found = {}
    for file in directory.glob("model*.safetensors"):
        found |= mx.load(str(file))
    return found


def as_numpy(array: mx.array) -> np.ndarray:
    return np.array(array.view(mx.uint16) if array.dtype == mx.bfloat16 else array)


def spread(units, width):
    return None if units is None else [u * width + i for u in units for i in range(width)]


def kept_indices(directory: Path, name: str, head_dim: int) -> tuple[str, list | None, list | None]:
    """(name in the source, kept rows, kept columns) of a tensor of the result, from survivors.json alone."""
    survivors = json.loads((directory / "survivors.json").read_text())
    hidden = survivors["hidden"]
    if not name.startswith("model.layers."):
        return name, (hidden if name == "model.norm.weight" else None), hidden
    number, rest = name.removeprefix("model.layers.").split(".", 1)
    layer, module = survivors["layers"][int(number)], rest.split(".")[-2]
    q, kv = spread(layer["q_head"], head_dim), spread(layer["kv_head"], head_dim)
    rows = {"q_proj": q, "k_proj": kv, "v_proj": kv, "gate_proj": layer["ffn"], "up_proj": layer["ffn"]}
    columns = {"o_proj": q, "down_proj": layer["ffn"]}
    norm = None if module in ("q_norm", "k_norm") else hidden
    return f"model.layers.{layer['source']}.{rest}", rows.get(module, norm), columns.get(module, hidden)


def take(array: np.ndarray, rows, columns) -> np.ndarray:
    array = array if rows is None else array[rows]
    return array if columns is None or array.ndim == 1 else array[:, columns]


@pytest.mark.parametrize("hidden", [None, 48])
@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16, mx.float16], ids=str)
@pytest.mark.parametrize("family", ["llama", "llama-untied", "qwen2", "qwen3"])
def test_dense_arrays_are_the_survivors(model, tmp_path, family, dtype, hidden):
    source, out = model(family, dtype=dtype), tmp_path / "out"
    prune(source, plan_of(source, AXES["all"], hidden=hidden), out)
    before, after, head_dim = arrays_of(source), arrays_of(out), Checkpoint(source).arch.uniform("head_dim")
    for name, array in after.items():
        origin, rows, columns = kept_indices(out, name, head_dim)
        assert array.dtype == dtype, name
        assert np.array_equal(as_numpy(array), take(as_numpy(before[origin]), rows, columns)), name


@pytest.mark.parametrize(("bits", "dtype"), [(4, mx.float32), (3, mx.float32), (8, mx.bfloat16), (6, mx.float16)])
@pytest.mark.parametrize("variant", FAMILIES)
def test_codes_are_those_of_the_source(model, tmp_path, variant, bits, dtype):
    source, out = model(variant, (bits, FUSED), dtype), tmp_path / "out"
    assert not prune(source, whole_groups(source, AXES["all"]), out)["requantized"]
    before, after, head_dim = arrays_of(source), arrays_of(out), Checkpoint(source).arch.uniform("head_dim")
    for module in {name.removesuffix(".scales") for name in after if name.endswith(".scales")}:
        origin, rows, columns = kept_indices(out, f"{module}.weight", head_dim)
        origin = origin.removesuffix(".weight")
        if origin == "lm_head" and "lm_head.weight" not in before:
            origin = "model.embed_tokens"
        groups = None if columns is None else [c // FUSED for c in columns[::FUSED]]
        codes = [reference.codes(np.array(a[f"{m}.weight"]), bits) for a, m in ((before, origin), (after, module))]
        assert np.array_equal(codes[1], take(codes[0], rows, columns)), module
        for part in ("scales", "biases"):
            assert after[f"{module}.{part}"].dtype == dtype
            expected = take(as_numpy(before[f"{origin}.{part}"]), rows, groups)
            assert np.array_equal(as_numpy(after[f"{module}.{part}"]), expected), (module, part)


def opened(arrays: dict, module: str, bits: int) -> np.ndarray:
    """A matrix in float64, whether packed or not."""
    parts = [np.array(arrays[f"{module}.{p}"].astype(mx.float32)) for p in ("scales", "biases")]
    return reference.dense(np.array(arrays[f"{module}.weight"]), *parts, bits)


@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16], ids=str)
@pytest.mark.parametrize("variant", ["llama", "qwen2"])
def test_requantized_matrices_are_listed_with_their_error(model, tmp_path, variant, dtype):
    """Only what is cut inside its groups, and how far it is off is measured again in numpy."""
    source, out = model(variant, (4, FUSED), dtype), tmp_path / "out"
    plan = plan_of(source, ("ffn", "kv_head"), ffn=64, heads=2 if variant == "qwen2" else 1)
    for layer in plan.layers if variant == "qwen2" else ():
        layer.kv_head = [0, 2]  # half a group each
    done = prune(source, plan, out)
    cut = ["mlp.down_proj"] + (["self_attn.o_proj"] if variant == "qwen2" else [])
    assert set(done["requantized"]) == {f"model.layers.{n}.{m}" for n in range(4) for m in cut}
    assert not done["dense"]
    before, after, head_dim = arrays_of(source), arrays_of(out), Checkpoint(source).arch.uniform("head_dim")
    for module, error in done["requantized"].items():
        origin, rows, columns = kept_indices(out, f"{module}.weight", head_dim)
        wanted = take(opened(before, origin.removesuffix(".weight"), 4), rows, columns)
        measured = reference.relative_error(wanted, opened(after, module, 4))
        assert 0 < measured < 0.2 and error == pytest.approx(measured, rel=1e-3)


def test_packing_a_dense_model_lists_every_matrix(model, tmp_path):
    source, out = model("llama"), tmp_path / "out"
    done = prune(source, plan_of(source, ("ffn",), ffn=64, bits=8, group_size=32), out)
    matrices = {t.module for t in Checkpoint(out).arch.tensors() if t.matrix}
    assert set(done["requantized"]) == matrices and max(done["requantized"].values()) < 0.01
    assert Checkpoint(out).quantization.as_config() == {"bits": 8, "group_size": 32, "mode": "affine"}
    before, after = arrays_of(source), arrays_of(out)
    wanted = np.array(before["model.embed_tokens.weight"])
    measured = reference.relative_error(wanted, opened(after, "model.embed_tokens", 8))
    assert done["requantized"]["model.embed_tokens"] == pytest.approx(measured, rel=1e-3)


def test_packing_a_packed_model_anew_is_the_same_cut_of_its_values(model, tmp_path):
    source = model("llama", (8, FUSED))
    plan = whole_groups(source, ("ffn",), bits=4, group_size=32)
    done = prune(source, plan, tmp_path / "out")
    assert len(done["requantized"]) == 4 * 7 + 1 and Checkpoint(tmp_path / "out").quantization.bits == 4
    same = whole_groups(source, ("ffn",), bits=8, group_size=32)
    assert prune(source, same, tmp_path / "same")["requantized"] == {}


def test_a_width_that_no_group_divides(model, tmp_path):
    """77 columns stay dense and are listed; 96 take the smaller group. The config says so, and mlx-lm opens both."""
    source = model("llama", (4, 64))
    done = prune(source, plan_of(source, ("ffn",), ffn=77), tmp_path / "a")
    assert done == {"requantized": {}, "dense": [f"model.layers.{n}.mlp.down_proj" for n in range(4)]}
    done = prune(source, plan_of(source, ("ffn",), ffn=96), tmp_path / "b")
    assert not done["dense"] and len(done["requantized"]) == 4
    said = [json.loads((tmp_path / d / "config.json").read_text())["quantization"] for d in "ab"]
    assert said[0]["model.layers.2.mlp.down_proj"] is False
    assert said[1]["model.layers.2.mlp.down_proj"] == {"bits": 4, "group_size": 32, "mode": "affine"}
    assert [s["group_size"] for s in said] == [64, 64]
    for name in "ab":
        assert np.isfinite(logits(lm.load(tmp_path / name))).all()


def test_modules_with_bits_of_their_own_keep_them(model, tmp_path):
    from mlx_lm.utils import load_model, quantize_model, save_config, save_model

    source, mixed = model("llama"), tmp_path / "mixed"
    shutil.copytree(source, mixed)
    (mixed / "model.safetensors").unlink()
    module, config = load_model(source)
    own = {"bits": 8, "group_size": 32, "mode": "affine"}
    module, config = quantize_model(
        module, config, 64, 4, quant_predicate=lambda path, m: own if "down_proj" in path else True
    )
    save_model(mixed, module)
    save_config(config, mixed / "config.json")
    plan = whole_groups(mixed, ("ffn", "layer"))
    assert prune(mixed, plan, tmp_path / "out") == {"requantized": {}, "dense": []}
    assert Checkpoint(tmp_path / "out").packing("model.layers.0.mlp.down_proj").bits == 8
    assert Checkpoint(tmp_path / "out").packing("model.layers.0.mlp.up_proj").bits == 4
    assert largest(logits(lm.load(tmp_path / "out")), masked(mixed, plan)) < PACKED


def test_bfloat16_stays_bfloat16(model, tmp_path):
    source = model("qwen2", dtype=mx.bfloat16)
    prune(source, plan_of(source, AXES["all"]), tmp_path / "out")
    assert {a.dtype for a in arrays_of(tmp_path / "out").values()} == {mx.bfloat16}


def test_the_dtype_of_a_packed_bfloat16_model_stays(model, tmp_path):
    source = model("llama", (4, FUSED), mx.bfloat16)
    prune(source, plan_of(source, AXES["all"]), tmp_path / "out")  # 77 channels: down_proj is left dense
    found = {name.rpartition(".")[2]: a.dtype for name, a in arrays_of(tmp_path / "out").items() if "mlp" in name}
    assert found["scales"] == found["biases"] == mx.bfloat16
    assert arrays_of(tmp_path / "out")["model.layers.0.mlp.down_proj.weight"].dtype == mx.bfloat16


# ---- the directory ----


def hashes(directory: Path) -> dict[str, str]:
    return {
        str(f.relative_to(directory)): hashlib.sha256(f.read_bytes()).hexdigest()
        for f in directory.rglob("*")
        if f.is_file()
    }


@pytest.fixture
def small(model):
    """The pico llama and a plan for it."""
    source = model("llama")
    return source, plan_of(source, AXES["all"])


def test_the_source_is_never_modified(small, tmp_path):
    source, plan = small
    before = hashes(source)
    times = {f.name: f.stat().st_mtime_ns for f in source.iterdir()}
    prune(source, plan, tmp_path / "out")
    assert hashes(source) == before and times == {f.name: f.stat().st_mtime_ns for f in source.iterdir()}


def test_the_same_plan_gives_the_same_bytes(small, tmp_path):
    for name in "ab":
        prune(*small, tmp_path / name)
    assert hashes(tmp_path / "a") == hashes(tmp_path / "b")


@pytest.mark.parametrize("what", ["directory", "file"])
def test_an_existing_output_is_refused(small, tmp_path, what):
    out = tmp_path / "out"
    out.mkdir() if what == "directory" else out.write_text("mine")
    with pytest.raises(Refused, match="exists already"):
        prune(*small, out)
    assert list(tmp_path.iterdir()) == [out]
    assert what == "directory" or out.read_text() == "mine"


def test_a_plan_for_another_model_is_refused(small, model, tmp_path):
    with pytest.raises(Refused, match="another model"):
        prune(model("llama-untied"), small[1], tmp_path / "out")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("after", [0, 1, 7, 20])
@pytest.mark.parametrize("how", [KeyboardInterrupt, OSError])
def test_a_killed_write_leaves_nothing_under_the_name(small, tmp_path, monkeypatch, after, how):
    stream, written = ShardWriter.stream, []

    def failing(self, name, parts):
        if len(written) == after:
            raise how("no space left on device")
        written.append(name)
        stream(self, name, parts)

    with monkeypatch.context() as patched, pytest.raises(how):
        patched.setattr(ShardWriter, "stream", failing)
        prune(*small, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    prune(*small, tmp_path / "out")
    assert [f.name for f in tmp_path.iterdir()] == ["out"]
    assert largest(logits(lm.load(tmp_path / "out")), masked(*small)) < DENSE


def test_a_result_in_several_shards_is_the_same(small, tmp_path, monkeypatch):
    source, plan = small
    prune(source, plan, tmp_path / "one")
    from mlx_pare.pruning import prune as module

    monkeypatch.setattr(module, "ShardWriter", functools.partial(ShardWriter, shard_bytes=60_000))
    prune(source, plan, tmp_path / "many")
    assert len(list((tmp_path / "many").glob("model-*-of-*.safetensors"))) > 3
    one, many = arrays_of(tmp_path / "one"), arrays_of(tmp_path / "many")
    assert one.keys() == many.keys() and all(mx.array_equal(one[n], many[n]) for n in one)
    assert largest(logits(lm.load(tmp_path / "one")), logits(lm.load(tmp_path / "many"))) == 0


def test_a_source_in_several_shards_is_the_same(small, tmp_path):
    source, plan = small
    many = Path(shutil.copytree(source, tmp_path / "many"))
    arrays = sorted(arrays_of(source).items())
    (many / "model.safetensors").unlink()
    for n in range(2):
        mx.save_safetensors(str(many / f"model-0000{n + 1}-of-00002.safetensors"), dict(arrays[n::2]))
    prune(source, plan, tmp_path / "a")
    prune(many, plan.model_copy(update={"source": Checkpoint(many).identity()}), tmp_path / "b")
    assert hashes(tmp_path / "a")["model.safetensors"] == hashes(tmp_path / "b")["model.safetensors"]


@pytest.mark.parametrize("packed", [None, (4, FUSED)], ids=str)
@pytest.mark.parametrize("variant", ["llama", "qwen2", "gemma3_text", "llama, leaving as mistral"])
def test_stock_libraries_open_the_result(model, tmp_path, variant, packed):
    """mlx_lm.load gives model and tokenizer, transformers config and tokenizer, with the sizes that were cut."""
    import mlx_lm
    from transformers import AutoConfig, AutoTokenizer

    source, out = model(variant, packed), tmp_path / "out"
    plan = plan_of(source, AXES["all"], ffn=64)
    prune(source, plan, out)
    module, tokenizer = mlx_lm.load(str(out))
    assert np.isfinite(np.array(module(mx.array(TOKENS)).astype(mx.float32))).all()
    text = "The old mill stood by the river."
    expected = AutoTokenizer.from_pretrained(source).encode(text)
    assert tokenizer.encode(text) == AutoTokenizer.from_pretrained(out).encode(text) == expected
    config = AutoConfig.from_pretrained(out)
    assert config.num_hidden_layers == len(plan.layers) == len(module.layers)
    assert (config.intermediate_size, config.num_key_value_heads) == (64, len(plan.layers[0].kv_head))
    assert (config.hidden_size, config.head_dim) == (64, Checkpoint(source).arch.uniform("head_dim"))
    assert config.rope_parameters if variant != "gemma3_text" else config.layer_types[-1] == "full_attention"
    if variant == "llama, leaving as mistral":
        assert config.model_type == "mistral" and config.sliding_window is None


@pytest.mark.parametrize("variant", ["llama", "qwen3"])
def test_stock_mlx_lm_computes_the_same(model, tmp_path, variant):
    """Not a layer of ours in between."""
    import mlx_lm

    source = model(variant)
    plan = plan_of(source, AXES["all"])
    prune(source, plan, tmp_path / "out")
    module, _ = mlx_lm.load(str(tmp_path / "out"))
    assert largest(np.array(module(mx.array(TOKENS))), masked(source, plan)) < DENSE


def test_survivors_map_to_the_original(model, tmp_path):
    source = model("qwen2")
    plan = plan_of(source, AXES["all"], heads=2)
    prune(source, plan, tmp_path / "out")
    found = json.loads((tmp_path / "out" / "survivors.json").read_text())
    assert found["schema_version"] == 1 and found["source_identity"] == Checkpoint(source).identity()
    assert found["hidden"] == list(range(64))
    for new, (said, layer) in enumerate(zip(found["layers"], plan.layers, strict=True)):
        assert (said["layer"], said["source"]) == (new, layer.source)
        assert (said["ffn"], said["kv_head"]) == (layer.ffn, layer.kv_head)
        assert said["q_head"] == [q for q in range(8) if q // 2 in layer.kv_head]


def test_what_lies_beside_the_weights(small, tmp_path):
    source, plan = small
    (tmp_path / "deep").mkdir()
    prune(source, plan, tmp_path / "deep" / "er" / "out")
    out = tmp_path / "deep" / "er" / "out"
    config = json.loads((out / "config.json").read_text())
    assert config["pare"] == {
        "made_by": "mlx-pare",
        "source_identity": plan.source,
        "criterion": "random",
        "parameters_before": sum(t.size for t in Checkpoint(source).arch.tensors()),  # counted, not believed
        "survivors": "survivors.json",
    }
    assert "quantization" not in config and config["rms_norm_eps"] == pico.BASE["rms_norm_eps"]
    said = Plan.load(out / "plan.json")
    assert said.layers == plan.layers and said.after.bytes == Checkpoint(out).nbytes()  # counted, not believed
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (out / name).read_bytes() == (source / name).read_bytes()
    assert "licence" in (out / "README.md").read_text()
    assert {f.name for f in out.iterdir()} == {
        "README.md",
        "config.json",
        "model.safetensors",
        "plan.json",
        "survivors.json",
        "tokenizer.json",
        "tokenizer_config.json",
    }


def test_a_result_can_be_pruned_again(model, tmp_path):
    """Also when it left as another type: qwen2 -> seed_oss -> seed_oss."""
    source = model("qwen2", (4, FUSED))
    prune(source, whole_groups(source, ("kv_head",)), tmp_path / "a")
    again = plan_of(tmp_path / "a", ("ffn", "layer"), ffn=64)
    prune(tmp_path / "a", again, tmp_path / "b", requantize=False)
    assert Checkpoint(tmp_path / "b").config["model_type"] == "seed_oss"
    assert largest(logits(lm.load(tmp_path / "b")), masked(tmp_path / "a", again)) < PACKED


@pytest.mark.parametrize("scale", [1.0, 4.0])
@pytest.mark.parametrize("spelling", ["old", "new", "both"])
def test_rope_is_the_same_however_it_is_written(pico_models, tmp_path, spelling, scale):
    """qwen3 of mlx-lm reads both spellings of transformers; the cut model has both, and positions as before."""
    kind = {"rope_type": "linear", "factor": scale} if scale != 1 else {"rope_type": "default"}
    old = {"rope_theta": 500.0, "rope_scaling": kind if scale != 1 else None}
    new = {"rope_theta": None, "rope_parameters": {"rope_theta": 500.0, **kind}}
    changes = {"old": old, "new": new, "both": {**new, **old}}[spelling]
    source = pico_models("qwen3", **changes)
    plan = plan_of(source, AXES["all"])
    prune(source, plan, tmp_path / "out")
    assert largest(logits(lm.load(tmp_path / "out")), masked(source, plan)) < DENSE
    plain = pico_models("qwen3")
    assert largest(logits(lm.load(plain)), logits(lm.load(source))) > BROKEN  # the base matters


def test_an_unsuitable_plan_names_every_fault(small, tmp_path):
    source, plan = small
    broken = plan.model_copy(deep=True)
    broken.layers[0].ffn[-1] = 500
    broken.layers[2].kv_head = [0, 0]
    with pytest.raises(PareError) as caught:
        prune(source, broken, tmp_path / "out")
    assert "index 500" in str(caught.value) and "layer 3: kv_head is not in ascending" in str(caught.value)
    assert not list(tmp_path.iterdir())
