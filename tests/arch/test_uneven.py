"""Layers that differ in width, or have lost a part, through STOCK mlx-lm: the result is the original, masked."""

from __future__ import annotations

import importlib
import json
from pathlib import Path

import mlx.core as mx
import mlx_lm
import numpy as np
import pico
import pytest
import reference_packing as reference
from mlx_lm.models import openelm
from transformers import AutoTokenizer

from mlx_pare import lm
from mlx_pare.arch import Keep, LayerKeep, cut, describe, uneven_types, why_no_sublayer_drops, why_uniform
from mlx_pare.arch.uneven import divisible, nas_config, nas_multiplier, nas_width
from mlx_pare.base import console
from mlx_pare.base.errors import PareError, Unsupported
from mlx_pare.capacity.fit import fit
from mlx_pare.capacity.inspect import inspect
from mlx_pare.cli.tables import show_shape
from mlx_pare.evaluation.bench import bench
from mlx_pare.evaluation.evaluate import evaluate
from mlx_pare.evaluation.sanity import check
from mlx_pare.model.checkpoint import Checkpoint
from mlx_pare.planning.goal import Options as PlanOptions
from mlx_pare.planning.plan import redraw
from mlx_pare.planning.uniform import shape
from mlx_pare.pruning.layout import size_of
from mlx_pare.pruning.plan_file import LayerPlan, Plan, Size, Target
from mlx_pare.pruning.prune import prune
from mlx_pare.recovery.options import Options
from mlx_pare.recovery.recover import recover
from mlx_pare.reporting.report import _shape
from mlx_pare.scoring.calibrate import calibrate
from mlx_pare.scoring.score import score
from mlx_pare.text.corpus import Rows
from tests.pruning.test_prune import DENSE, FUSED, PACKED, TOKENS, arrays_of, largest, masked, opened

ROWS = Rows.full(np.random.RandomState(1).randint(1, 500, (6, 24)))
HEADS = {"num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 8}
WIDE = {"intermediate_size": 768}  # nemotron-nas takes multiples of 256
FAMILIES = {
    "llama": ("llama", HEADS),
    "llama-untied": ("llama-untied", HEADS),
    "qwen3": ("qwen3", HEADS | {"head_dim": 16}),
    "qwen3-untied": ("qwen3", HEADS | {"tie_word_embeddings": False}),
    "mistral": ("mistral", HEADS),
}


@pytest.fixture
def model(pico_models):
    """``model(name, packed=None, dtype=float32, **config) -> Path``."""

    def make(name="llama", packed=None, dtype=mx.float32, **config):
        family, changes = FAMILIES.get(name, (name, {}))
        return pico_models(family, packed, dtype=dtype, **{**changes, **config})

    return make


def plan_of(source: Path, counts: list[tuple[int, int]], layers=None, seed=0, **more) -> Plan:
    """A plan with so many (ffn channels, kv heads) in every kept layer, drawn by lot."""
    checkpoint, random = Checkpoint(source), np.random.RandomState(seed)
    sizes = checkpoint.arch.layers[0].sizes
    kept = []
    for layer, (ffn, heads) in zip(layers or range(len(counts)), counts, strict=True):
        drawn = {
            axis: sorted(random.permutation(sizes[axis])[:n].tolist()) for axis, n in (("ffn", ffn), ("kv_head", heads))
        }
        kept.append(LayerPlan(source=layer, **drawn))
    nothing = dict.fromkeys(Size.model_fields, 0)
    return Plan(
        source=checkpoint.identity(),
        criterion="random",
        axes=["ffn", "kv_head"],
        target=Target(kind="keep", value=0.5, asked="half"),
        before=nothing,
        after=nothing,
        layers=kept,
        **more,
    )


def in_groups(source: Path, counts: list[tuple[int, int]]) -> Plan:
    """The same with whole groups of columns: channels in runs of 32, heads as neighbours."""
    plan = plan_of(source, counts)
    sizes = Checkpoint(source).arch.layers[0].sizes
    run = max(1, FUSED // (sizes["group"] * sizes["head_dim"]))  # heads that share a group
    for number, layer in enumerate(plan.layers):
        ffn, heads = len(layer.ffn) // FUSED, len(layer.kv_head) // run
        layer.ffn, layer.kv_head = (
            sorted(g * width + i for g in np.roll(range(total // width), number)[:count].tolist() for i in range(width))
            for total, width, count in ((sizes["ffn"], FUSED, ffn), (sizes["kv_head"], run, heads))
        )
    return plan


def stock(directory: Path) -> np.ndarray:
    """Logits of the model as mlx_lm.load gives it: nothing of ours in between."""
    module, _ = mlx_lm.load(str(directory))
    return np.array(module(mx.array(TOKENS)).astype(mx.float32))


COUNTS = {
    "ffn": [(77, 4), (128, 4), (1, 4), (40, 4)],
    "kv_head": [(128, 3), (128, 1), (128, 4), (128, 2)],
    "both": [(97, 3), (3, 4), (128, 1), (40, 2)],
    "no ffn": [(97, 3), (0, 4), (128, 1), (0, 2)],
}


# ---- sliced is masked ----


@pytest.mark.parametrize("counts", COUNTS)
@pytest.mark.parametrize("name", FAMILIES)
def test_dense(model, tmp_path, name, counts):
    source, out = model(name), tmp_path / "out"
    plan = plan_of(source, COUNTS[counts])
    expected = size_of(Checkpoint(source), plan.keep(Checkpoint(source).arch), None)
    assert prune(source, plan, out) == {"requantized": {}, "dense": []}
    assert largest(stock(out), masked(source, plan)) < DENSE
    arch = Checkpoint(out).arch
    assert arch.config["model_type"] == "openelm" and arch.tied is Checkpoint(source).arch.tied
    assert [(s["ffn"], s["kv_head"]) for s in (y.sizes for y in arch.layers)] == [
        (max(f, 1), h) for f, h in COUNTS[counts]
    ]
    assert expected.bytes == Checkpoint(out).nbytes() == sum(a.nbytes for a in arrays_of(out).values())
    assert expected.parameters == sum(a.size for a in arrays_of(out).values())
    assert expected.ffn == arch.each("ffn") and expected.kv_heads == arch.each("kv_head")


@pytest.mark.parametrize("name", FAMILIES)
def test_fewer_layers_too(model, tmp_path, name):
    source = model(name)
    plan = plan_of(source, [(50, 2), (60, 4)], layers=[1, 3])
    prune(source, plan, tmp_path / "out")
    assert largest(stock(tmp_path / "out"), masked(source, plan)) < DENSE


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("name", ["llama", "llama-untied", "qwen3", "qwen3-untied"])
def test_packed_in_whole_groups(model, tmp_path, name, bits):
    """Nothing is quantized again, and the codes of the joined matrices are those of their parts."""
    source, out = model(name, (bits, FUSED)), tmp_path / "out"
    plan = in_groups(source, [(64, 2), (128, 4), (0, 2), (32, 4)])
    assert prune(source, plan, out) == {"requantized": {}, "dense": []}
    assert largest(stock(out), masked(source, plan)) < PACKED
    before, after, sizes = arrays_of(source), arrays_of(out), Checkpoint(source).arch.layers[0].sizes
    for part in ("weight", "scales", "biases"):
        for new, layer in enumerate(plan.layers):
            old, at = f"model.layers.{layer.source}.", f"transformer.layers.{new}."
            width = sizes["head_dim"]
            k = [h * width + i for h in layer.kv_head for i in range(width)]
            q = [h * width * sizes["group"] + i for h in layer.kv_head for i in range(width * sizes["group"])]
            rows = [before[f"{old}self_attn.{n}_proj.{part}"][mx.array(r)] for n, r in (("q", q), ("k", k), ("v", k))]
            assert mx.array_equal(after[f"{at}attn.qkv_proj.{part}"], mx.concatenate(rows))
            if layer.ffn:
                rows = [before[f"{old}mlp.{n}_proj.{part}"][mx.array(layer.ffn)] for n in ("gate", "up")]
                assert mx.array_equal(after[f"{at}ffn.proj_1.{part}"], mx.concatenate(rows))
    said = size_of(Checkpoint(source), plan.keep(Checkpoint(source).arch), None)
    assert said.bytes == Checkpoint(out).nbytes() == sum(a.nbytes for a in after.values())


@pytest.mark.parametrize("requantize", [False, True])
@pytest.mark.parametrize("name", ["llama", "qwen3"])
def test_packed_inside_groups(model, tmp_path, name, requantize):
    """Columns cut inside a group: left dense it is the same function; quantized again it is listed with its error."""
    source, out = model(name, (4, FUSED)), tmp_path / "out"
    plan = plan_of(source, [(64, 2), (96, 3), (77, 4), (32, 1)])
    done = prune(source, plan, out, requantize)
    names = {f"transformer.layers.{n}.ffn.proj_2" for n in range(4)}
    if not requantize:
        assert not done["requantized"] and names <= set(done["dense"])
        assert largest(stock(out), masked(source, plan)) < PACKED
        return
    assert {n for n in done["requantized"] if "proj_2" in n} == names - {"transformer.layers.2.ffn.proj_2"}
    assert [n for n in done["dense"] if "ffn" in n] == ["transformer.layers.2.ffn.proj_2"]  # 77 columns
    before, after = arrays_of(source), arrays_of(out)
    for n in (0, 1, 3):
        wanted = opened(before, f"model.layers.{n}.mlp.down_proj", 4)[:, plan.layers[n].ffn]
        measured = reference.relative_error(wanted, opened(after, f"transformer.layers.{n}.ffn.proj_2", 4))
        assert done["requantized"][f"transformer.layers.{n}.ffn.proj_2"] == pytest.approx(measured, rel=1e-3)
    assert np.isfinite(stock(out)).all()


@pytest.mark.parametrize("axis", ["ffn", "kv_head"])
@pytest.mark.parametrize("packed", [None, (4, FUSED)], ids=str)
@pytest.mark.parametrize("name", ["llama-untied", "qwen3"])
def test_a_wrong_index_is_seen(model, tmp_path, name, packed, axis):
    source = model(name, packed)
    plan = (in_groups if packed else plan_of)(source, [(64, 2), (96, 4), (32, 2), (64, 4)])
    wrong = plan.model_copy(deep=True)
    layer, size = wrong.layers[2], {"ffn": 128, "kv_head": 4}[axis]
    setattr(layer, axis, sorted((i + 1) % size for i in getattr(layer, axis)))
    prune(source, wrong, tmp_path / "out", requantize=False)
    assert largest(stock(tmp_path / "out"), masked(source, plan)) > 100 * PACKED
    assert largest(stock(tmp_path / "out"), masked(source, wrong)) < PACKED


def test_parts_with_different_packings_are_joined_anew(model, tmp_path):
    """v_proj with 8 bits among q and k with 4: together they get 8, and that is listed."""
    from mlx_lm.utils import load_model, quantize_model, save_config, save_model

    plain, mixed, out = model("llama"), tmp_path / "mixed", tmp_path / "out"
    module, config = load_model(plain)
    own = {"bits": 8, "group_size": 32, "mode": "affine"}
    module, config = quantize_model(module, config, 32, 4, quant_predicate=lambda p, m: own if "v_proj" in p else True)
    save_model(mixed, module)
    save_config(config, mixed / "config.json")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (mixed / name).write_bytes((plain / name).read_bytes())
    plan = in_groups(mixed, [(64, 2), (128, 4), (32, 2), (64, 4)])
    done = prune(mixed, plan, out)
    assert set(done["requantized"]) == {f"transformer.layers.{n}.attn.qkv_proj" for n in range(4)}
    assert Checkpoint(out).packing("transformer.layers.0.attn.qkv_proj").bits == 8
    assert max(done["requantized"].values()) < 0.01
    assert largest(stock(out), masked(mixed, plan)) < 0.05


@pytest.mark.parametrize("name", ["llama", "qwen3-untied"])
def test_bits_of_parts(model, tmp_path, name):
    source, out = model(name), tmp_path / "out"
    plan = plan_of(source, [(64, 2), (128, 4), (0, 3), (96, 1)], embedding_bits=8, group_size=32)
    for layer, (attention, ffn) in zip(plan.layers, [(8, 8), (8, None), (8, 4), (None, 8)], strict=True):
        layer.attention_bits, layer.ffn_bits = attention, ffn
    said = size_of(Checkpoint(source), plan.keep(Checkpoint(source).arch), None)
    prune(source, plan, out)
    checkpoint = Checkpoint(out)
    assert said.bytes == checkpoint.nbytes() == sum(a.nbytes for a in arrays_of(out).values())

    def bits(module):
        packing = checkpoint.packing(f"transformer.{module}")
        return packing and packing.bits

    assert [bits(f"layers.{n}.attn.qkv_proj") for n in range(4)] == [8, 8, 8, None]
    assert [bits(f"layers.{n}.ffn.proj_1") for n in range(4)] == [8, None, 4, 8]
    assert bits("layers.2.ffn.proj_2") is None and bits("token_embeddings") == 8  # one column: dense zeros
    assert largest(stock(out), masked(source, plan)) < 0.1


@pytest.mark.parametrize("packed", [None, (4, FUSED), (8, FUSED)], ids=str)
def test_a_layer_without_ffn_adds_exactly_nothing(model, tmp_path, packed):
    source = model("llama", packed)
    prune(source, plan_of(source, [(0, 4), (128, 4), (128, 4), (0, 4)]), tmp_path / "out")
    module = lm.load(tmp_path / "out")
    for n in (0, 3):
        ffn = module.transformer.layers[n].ffn
        assert mx.array_equal(ffn(1e4 * mx.random.normal((2, 3, 64))), mx.zeros((2, 3, 64)))
        assert ffn.proj_2.weight.shape == (64, 1)


@pytest.mark.parametrize("packed", [None, (4, FUSED)], ids=str)
def test_the_dtype_stays(model, tmp_path, packed):
    source = model("qwen3", packed, mx.bfloat16)
    prune(source, plan_of(source, [(64, 2), (0, 4), (77, 1), (128, 4)]), tmp_path / "out")
    floats = {array.dtype for array in arrays_of(tmp_path / "out").values()} - {mx.uint32}
    assert floats == {mx.bfloat16}
    assert np.isfinite(stock(tmp_path / "out")).all()


def test_a_hidden_cut_too(model, tmp_path):
    """Approximate by nature, so: shapes, and finite numbers."""
    source = model("llama")
    plan = plan_of(source, COUNTS["no ffn"], hidden=list(range(0, 64, 2)))
    prune(source, plan, tmp_path / "out")
    assert np.isfinite(stock(tmp_path / "out")).all()
    assert Checkpoint(tmp_path / "out").arch.sizes["hidden"] == 32


# ---- nemotron-nas ----

NAS = [(768, 4), (256, 0), (512, 4), (0, 4)]


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("llama", {}),
        ("llama-untied", {}),
        ("mistral", {}),
        ("llama", {"attention_bias": True, "mlp_bias": True}),
        ("llama", {"rope_scaling": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0,
                                    "high_freq_factor": 4.0, "original_max_position_embeddings": 16}}),
        ("llama", {"rope_scaling": {"type": "linear", "factor": 4.0}}),
        ("qwen2", {}),
    ],
    ids=str,
)  # fmt: skip
def test_attention_and_ffn_may_go(model, tmp_path, name, changes):
    source, out = model(name, **WIDE, **changes), tmp_path / "out"
    plan = plan_of(source, NAS)
    said = size_of(Checkpoint(source), plan.keep(Checkpoint(source).arch), None)
    prune(source, plan, out)
    assert largest(stock(out), masked(source, plan)) < DENSE
    arch = Checkpoint(out).arch
    assert arch.config["model_type"] == "nemotron-nas"
    assert [layer.kind for layer in arch.layers] == [
        "full_attention",
        "feed_forward",
        "full_attention",
        "full_attention+no_ffn",
    ]
    assert said.bytes == Checkpoint(out).nbytes() == sum(a.nbytes for a in arrays_of(out).values())
    assert (said.ffn, said.kv_heads) == ([768, 256, 512, 0], [4, 0, 4, 4])
    assert said.q_heads == [n * Checkpoint(source).arch.uniform("group") for n in (4, 0, 4, 4)]


@pytest.mark.parametrize("first", [(0, 4), (256, 0)], ids=str)
@pytest.mark.parametrize("name", ["llama", "llama-untied"])
def test_packed_without_a_part(model, tmp_path, name, first):
    source, out = model(name, (4, FUSED), **WIDE), tmp_path / "out"
    plan = in_groups(source, [first, (256, 4), (512, 4), (768, 4)])
    assert prune(source, plan, out) == {"requantized": {}, "dense": []}
    assert Checkpoint(out).config["model_type"] == "nemotron-nas"
    assert largest(stock(out), masked(source, plan)) < PACKED


def test_widths_in_steps_of_256_of_a_model_with_scaled_rope(model, tmp_path):
    source = model("llama", **WIDE, rope_scaling={"rope_type": "linear", "factor": 2.0})
    plan = plan_of(source, [(256, 4), (512, 4), (768, 4), (256, 4)])
    prune(source, plan, tmp_path / "out")
    assert largest(stock(tmp_path / "out"), masked(source, plan)) < DENSE
    for counts, why in (
        ([(300, 4)] * 3 + [(256, 4)], "multiples of 256"),
        ([(256, 4)] * 3 + [(256, 3)], "all the heads"),
    ):
        (problem,) = plan_of(source, counts).problems(Checkpoint(source).arch)
        assert why in problem and "openelm has no rope scaling (linear)" in problem


# ---- arithmetic of the classes ----


@pytest.mark.parametrize("hidden", [64, 576, 896, 1536, 2048, 2560, 3072, 4096, 5120, 7168, 8192, 16384])
def test_every_width_comes_back(hidden):
    """As mlx-lm computes it, from a number that went through JSON."""
    for width in range(1, 40000, 1 if hidden < 1000 else 7):
        multiplier = json.loads(json.dumps(width / hidden))
        assert int(openelm.make_divisible(multiplier * hidden, 1)) == width == divisible(multiplier * hidden, 1)
    nas = importlib.import_module("mlx_lm.models.nemotron-nas")
    for width in range(256, 256 * 300, 256):
        kept = nas.FFNConfig(ffn_mult=json.loads(json.dumps(nas_multiplier(width, hidden)))).ffn_mult
        assert nas._ffn_mult_to_intermediate_size(kept, hidden) == width == nas_width(kept, hidden)


@pytest.mark.parametrize("divisor", [1, 8, 256])
def test_widths_of_other_openelms(divisor):
    """Also those that no cut made: rounding, and going up when it would lose a tenth."""
    for value in np.random.RandomState(0).uniform(0.2, 3000, 4000):
        assert divisible(value, divisor) == int(openelm.make_divisible(value, divisor))


def test_the_multiplier_of_nemotron_is_what_the_class_reads():
    arch = describe(pico.config_of("llama", vocab_size=512, **HEADS, **WIDE))
    left = cut(arch, Keep((LayerKeep(0, {"ffn": range(256)}), LayerKeep(1, {"kv_head": []}))))
    blocks = left.config["block_configs"]
    assert blocks[1]["attention"] == {"no_op": True} and blocks[0]["attention"] == {"n_heads_in_group": 2}
    assert nas_config(left)["block_configs"] == blocks


# ---- what is refused, and why ----


def refused(source: Path, counts) -> str:
    plan = plan_of(source, counts)
    (problem,) = plan.problems(Checkpoint(source).arch)
    return problem


def test_refusals_say_why(model, tmp_path):
    uneven, no_attention = [(64, 2), (32, 2), (64, 2), (64, 2)], [(64, 2), (32, 0), (64, 2), (64, 2)]
    qwen2 = refused(model("qwen2"), [(64, 4), (32, 4), (64, 4), (64, 4)])
    assert (
        "layers differ in ffn (32 to 64)" in qwen2 and "has no biases (k_proj_bias, q_proj_bias, v_proj_bias)" in qwen2
    )
    gemma = refused(model("gemma3_text"), [(64, 2)] * 5 + [(32, 2)])
    assert "attn_post_norm" in gemma and "layers differ" in gemma
    assert "layers have no attention (1 of 4)" in refused(model("qwen3"), no_attention)
    scaled = refused(model("qwen3", rope_scaling={"rope_type": "linear", "factor": 2.0}), uneven)
    assert "openelm has no rope scaling (linear)" in scaled and "nemotron-nas has no k_norm, q_norm" in scaled
    sliding = {"layer_types": ["sliding_attention", "full_attention"] * 2, "sliding_window": 8}
    assert "no sliding windows" in refused(model("llama", **sliding), uneven)
    assert "pairs neighbours" in refused(model("llama", rope_traditional=True), uneven)
    source = model("qwen2")
    with pytest.raises(PareError, match=r"does not suit .*has no biases"):
        prune(source, plan_of(source, [(64, 4), (32, 4), (64, 4), (64, 4)]), tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_what_a_planner_may_ask():
    def arch(family, **changes):
        return describe(pico.config_of(family, vocab_size=512, **changes))

    for family in ("llama", "llama-untied", "qwen3", "mistral"):
        assert why_uniform(arch(family)) is None
    assert why_no_sublayer_drops(arch("llama")) is None and uneven_types(arch("llama")) == ["nemotron-nas", "openelm"]
    assert "q_norm" in why_no_sublayer_drops(arch("qwen3")) and why_no_sublayer_drops(arch("qwen3"), "ffn") is None
    assert uneven_types(arch("qwen3")) == ["openelm"]
    assert "biases" in why_uniform(arch("qwen2")) and "biases" in why_uniform(arch("qwen2"), "kv_head")
    assert why_uniform(arch("qwen2"), "ffn") is None
    scaled = arch("llama", rope_scaling={"rope_type": "llama3", "factor": 8.0})
    assert "rope scaling (llama3)" in why_uniform(scaled) and why_uniform(scaled, "ffn") is None
    assert "factor" in why_uniform(arch("llama", rope_scaling={"rope_type": "longrope"}), "ffn").replace(
        "rope scaling", "factor"
    )
    for ask in (why_uniform, why_no_sublayer_drops):
        assert "attn_post_norm" in ask(arch("gemma3_text"))
    assert uneven_types(arch("gemma3_text")) == []


def test_a_result_is_not_cut_again(model, tmp_path):
    source, out = model("llama"), tmp_path / "out"
    prune(source, plan_of(source, COUNTS["both"]), out)
    again = plan_of(source, COUNTS["both"]).model_copy(update={"source": Checkpoint(out).identity()})
    with pytest.raises(PareError, match="openelm is not cut again"):
        prune(out, again, tmp_path / "again")
    with pytest.raises(Unsupported, match="is what a cut left"):
        calibrate(out, ROWS, tmp_path / "stats")
    with pytest.raises(Unsupported, match="is what a cut left"):
        shape(Checkpoint(out), PlanOptions(keep=0.5))
    with pytest.raises(Unsupported, match="is what a cut left"):
        score(out, tmp_path / "stats", tmp_path / "scores")


def test_a_plan_says_which_layers_lack_what(model):
    source = model("llama")
    plan = plan_of(source, [(64, 2), (0, 0), (64, 2), (64, 2)])
    assert plan.problems(Checkpoint(source).arch) == ["layer 1 keeps nothing: leave it out of the layers"]


# ---- the other verbs on a result ----

RESULTS = {
    "openelm": ("llama", COUNTS["no ffn"], {}),
    "openelm of qwen3": ("qwen3-untied", COUNTS["both"], {}),
    "nemotron-nas": ("llama-untied", NAS, WIDE),
}


@pytest.fixture(params=[(name, packed) for name in RESULTS for packed in (None, (8, FUSED))], ids=str)
def result(request, model, tmp_path):
    """(source, pruned, plan)."""
    name, packed = request.param
    family, counts, changes = RESULTS[name]
    source, plan = model(family, packed, **changes), None
    plan = plan_of(source, counts)
    prune(source, plan, tmp_path / "pruned")
    return source, tmp_path / "pruned", plan


def test_streamed_is_stock(result):
    """Perplexity block by block is that of the whole stock model, counted in numpy."""
    source, out, _ = result
    module, tokenizer = mlx_lm.load(str(out))
    logits = np.array(module(mx.array(ROWS.tokens)).astype(mx.float32)).astype(np.float64)[:, :-1]
    logits -= logits.max(axis=-1, keepdims=True)
    nll = np.log(np.exp(logits).sum(-1)) - np.take_along_axis(logits, ROWS.tokens[:, 1:, None], -1)[..., 0]
    found = evaluate(out, ROWS, tokenizer, teacher=source)
    assert found.perplexity == pytest.approx(np.exp(nll.mean()), rel=1e-4)
    assert found.kl_divergence > 0 and found.bits_per_byte > 0


def test_stock_tools_open_it(result, tmp_path):
    source, out, plan = result
    from mlx_lm import batch_generate, generate

    module, tokenizer = mlx_lm.load(str(out))
    text = "The old mill stood by the river."
    assert tokenizer.encode(text) == AutoTokenizer.from_pretrained(out).encode(text)
    assert len(module.layers) == len(plan.layers)
    alone = generate(module, tokenizer, tokenizer.encode("The old"), max_tokens=12)
    prompts = [tokenizer.encode("The old"), tokenizer.encode("A river runs by the mill and")]
    together = batch_generate(module, tokenizer, prompts, max_tokens=12).texts
    assert len(together) == 2 and together[0] == alone
    assert isinstance(check(out, source), list)


def test_it_is_inspected_and_fitted(result):
    _, out, _ = result
    found, checkpoint = inspect(out), Checkpoint(out)
    assert found["parameters"]["total"] == size_of(checkpoint, None, None).parameters
    assert found["ffn"] == sorted({layer.sizes["ffn"] for layer in checkpoint.arch.layers})
    assert found["cuttable"] == {} and found["runtimes"]["mlx-lm"] == checkpoint.arch.family.name
    normed = any("q_norm" in name for name in checkpoint.entries)
    assert found["runtimes"]["llama.cpp"] == (None if normed else "deci")
    fitted = fit(str(out))
    assert fitted["rows"][0]["weights_bytes"] == checkpoint.nbytes() and fitted["rows"][0]["fits"]


def test_it_is_timed(result):
    source, out, _ = result
    found = bench([source, out], trials=1, prompt=16, new=4)
    assert all(m["decode_tokens_per_s"]["median"] > 0 for m in found["models"])


@pytest.mark.parametrize("method", ["lora", "full"])
def test_it_is_healed(result, tmp_path, method):
    source, out, _ = result
    options = Options(method=method, steps=6, reports=2, batch=3, learning_rate=1e-3 if method == "lora" else 3e-4)
    found = recover(out, source, ROWS, ROWS, tmp_path / "healed", options)
    assert found["improved"] and found["kl_after"] < found["kl_before"]
    assert np.isfinite(stock(tmp_path / "healed")).all()
    assert Checkpoint(tmp_path / "healed").nbytes() == Checkpoint(out).nbytes()

    assert not (tmp_path / "model.gguf").exists()


def test_the_model_card_says_it_readably(result):
    text = (result[1] / "README.md").read_text()
    assert " to " in text and "[" not in text.split("\n\n")[1].split("`")[-1]


def test_survivors_name_every_unit(result):
    _, out, plan = result
    said = json.loads((out / "survivors.json").read_text())["layers"]
    assert [(s["ffn"], s["kv_head"]) for s in said] == [(layer.ffn, layer.kv_head) for layer in plan.layers]


def test_redraw_keeps_the_sizes_of_every_layer(model, tmp_path):
    from tests.planning.test_plan import scores_for

    source = model("llama")
    plan = plan_of(source, COUNTS["both"][:3], layers=[0, 2, 3], embedding_bits=8, group_size=32)
    plan.layers[1].ffn_bits = 4
    other = redraw(source, scores_for(source, tmp_path / "scores.safetensors"), plan)
    assert [(len(x.ffn), len(x.kv_head), x.ffn_bits) for x in other.layers] == [
        (97, 3, None),
        (3, 4, 4),
        (128, 1, None),
    ]
    assert other.layers[0].ffn != plan.layers[0].ffn and not other.problems(Checkpoint(source).arch)
    made = [size_of(Checkpoint(source), p.keep(Checkpoint(source).arch), None).bytes for p in (plan, other)]
    assert made[0] == made[1]


def test_sizes_are_shown_as_a_span(model, tmp_path, monkeypatch):
    source = model("llama")
    checkpoint = Checkpoint(source)
    plan = plan_of(source, [(96, 4), (128, 4), (100, 4), (128, 4)])
    after = size_of(checkpoint, plan.keep(checkpoint.arch), None)
    plan = plan.model_copy(update={"before": size_of(checkpoint, None, None), "after": after})
    assert Plan.model_validate_json(plan.dump()).after == after
    shown = []
    monkeypatch.setattr(console, "table", lambda title, columns, rows, caption: shown.extend(rows))
    show_shape({"asked": "half", "before": plan.before.model_dump(), "after": after.model_dump(), "neighbours": []})
    assert ["ffn", "128", "96 to 128"] in shown
    (tmp_path / "plan").mkdir()
    (tmp_path / "plan" / "plan.json").write_bytes(plan.dump())
    assert "| ffn | 128 | 96 to 128 |" in _shape(tmp_path)
