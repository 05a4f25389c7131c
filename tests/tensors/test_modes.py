"""MLX's float modes (mxfp4, nvfp4, mxfp8) as a source: read as a float64 reference reads them, cut bit for bit, solved,
tried, healed, written; and affine packings of every width from `run` to GGUF. mlx-lm itself packs the models."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import gguf
import mlx.core as mx
import mlx.nn as nn
import mlx_lm
import numpy as np
import pico
import pytest
import reference
import reference_packing

from mlx_pare import lm
from mlx_pare.base.errors import PareError, Unsupported
from mlx_pare.capacity.inspect import inspect
from mlx_pare.evaluation.evaluate import evaluate
from mlx_pare.exporting.export import export
from mlx_pare.model.checkpoint import Checkpoint
from mlx_pare.model.weights import StoredEmbedding
from mlx_pare.options.settings import Settings
from mlx_pare.pipeline import run as pipeline
from mlx_pare.planning.candidate import Width, whole
from mlx_pare.planning.try_candidates import try_out
from mlx_pare.pruning.plan_file import Plan
from mlx_pare.pruning.prune import prune
from mlx_pare.recovery.blockwise import local
from mlx_pare.recovery.options import METHODS
from mlx_pare.recovery.recover import recover
from mlx_pare.repair import gptq
from mlx_pare.repair.reconstruct import reconstruct
from mlx_pare.store.places import repair_file
from mlx_pare.stream import walk as stream
from mlx_pare.tensors import float32_layers, minifloat, packed as quantized
from mlx_pare.tensors.packed import Packed, pack, repacked, rounded_on
from mlx_pare.tensors.packing import FLOAT_MODES, Packing
from mlx_pare.text.corpus import Rows
from tests.pruning.test_prune import (
    AXES,
    BROKEN,
    PACKED,
    TOKENS,
    arrays_of,
    kept_indices,
    largest,
    logits,
    masked,
    plan_of,
    take,
    whole_groups,
)
from tests.recovery.test_blockwise import HELD, OPTIONS as HEALING, ROWS, faulty, kl
from tests.recovery.test_recover import OPTIONS, RATES, cut, same_packing_and_shapes, stored, texts
from tests.repair.test_gptq import FORMS, N, alike

FIXTURES = cut, faulty, texts
MODES = list(FLOAT_MODES)
DOWN = "model.layers.1.mlp.down_proj"
GROUPS = {mode: group for mode, (_, group) in FLOAT_MODES.items()}
DTYPES = [mx.float32, mx.float16, mx.bfloat16]
DATA = Rows.full(np.random.default_rng(3).integers(0, 500, (26, 24)))


def matrix(rows: int = 8, columns: int = 192, seed: int = 0) -> mx.array:
    return mx.array(np.random.RandomState(seed).randn(rows, columns).astype(np.float32))


def packed(mode: str, dtype: mx.Dtype = mx.float32) -> Packed:
    """By MLX itself."""
    return Packed.of(mx.quantize(matrix().astype(dtype), mode=mode), Packing.named(mode))


def unpacked(p: Packed) -> np.ndarray:
    return reference_packing.float_dense(np.array(p.words), np.array(p.scales), p.packing.mode)


def codes(p: Packed) -> np.ndarray:
    return reference_packing.codes(np.array(p.words), p.packing.bits)


def in_mode(arrays: dict, module: str, mode: str) -> np.ndarray:
    """A matrix of a file, float64."""
    return reference_packing.float_dense(*(np.array(arrays[f"{module}.{p}"]) for p in ("weight", "scales")), mode)


# ---- a matrix ----


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("mode", MODES)
def test_dense_is_the_reference_to_the_last_bit(mode, dtype):
    p = packed(mode, dtype)
    assert len(np.unique(codes(p))) > 14 and p.biases is None and list(p.arrays) == ["weight", "scales"]
    assert np.array_equal(np.array(p.dense()), unpacked(p))
    scale, bias = p.grid()
    assert np.array_equal(np.array(scale), reference_packing.SCALES[mode][np.array(p.scales)]) and not bias.any()


@pytest.mark.parametrize("mode", MODES)
def test_rows_keep_their_codes(mode):
    p = packed(mode)
    cut = p.rows(mx.array([0, 3, 7]))
    assert np.array_equal(codes(cut), codes(p)[[0, 3, 7]])
    assert np.array_equal(np.array(cut.scales), np.array(p.scales)[[0, 3, 7]])
    assert np.array_equal(unpacked(cut), unpacked(p)[[0, 3, 7]])
    assert cut.packing.nbytes(3, p.scales.shape[1] * GROUPS[mode]) == sum(a.nbytes for a in cut.arrays.values())


@pytest.mark.parametrize("xp", [np, mx], ids=["numpy", "mlx"])
@pytest.mark.parametrize("mode", MODES)
def test_nearest_is_that_of_all_values(mode, xp):
    """Subnormal, normal, at powers of two, halfway, beyond the largest."""
    packing, random = Packing.named(mode), np.random.RandomState(0)
    own = reference_packing.VALUES[mode][np.isfinite(reference_packing.VALUES[mode])]
    x = np.concatenate([own, random.randn(3000) * 3, random.randn(3000) * 1e-3, random.randn(500) * 300])
    x = x.astype(np.float32)
    found = minifloat.nearest(xp.array(x), packing, xp)
    taken = np.array(minifloat.values(found, packing, xp)).astype(np.float64)
    wanted = reference_packing.nearest(x.astype(np.float64), mode)
    assert np.array_equal(np.abs(taken - x), np.abs(wanted - x))
    assert np.array_equal(taken[: len(own)], own)
    halves = np.array([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0] if packing.bits == 4 else [17.0, 19.0, 0.0029296875])
    even = np.array([0.0, 1.0, 1.0, 2.0, 2.0, 4.0, 4.0] if packing.bits == 4 else [16.0, 20.0, 0.00390625])
    assert np.array_equal(
        np.array(minifloat.values(minifloat.nearest(xp.array(halves), packing, xp), packing, xp)), even
    )


@pytest.mark.parametrize("mode", MODES)
def test_what_did_not_move_keeps_its_code(mode):
    """And what moved is nearest to where it went, on the scales there were."""
    p = packed(mode)
    assert np.array_equal(codes(repacked(p, p.dense())), codes(p) * (unpacked(p) != 0))
    moved = p.dense() + 0.3 * matrix(seed=1)
    scale = np.repeat(reference_packing.SCALES[mode][np.array(p.scales)], GROUPS[mode], axis=1)
    wanted = scale * reference_packing.nearest(np.array(moved).astype(np.float64) / scale, mode)
    assert np.array_equal(unpacked(repacked(p, moved)), wanted) and np.array_equal(rounded_on(p, moved), wanted)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("mode", MODES)
def test_pack_is_mlx_s(mode, dtype):
    p = pack(matrix(), Packing.named(mode), dtype)
    words, scales = mx.quantize(matrix().astype(dtype), mode=mode)
    assert np.array_equal(np.array(p.words), np.array(words)) and np.array_equal(np.array(p.scales), np.array(scales))
    assert quantized.relative_error(matrix(), p) == pytest.approx(
        reference_packing.relative_error(np.array(matrix()), unpacked(p)), rel=1e-4
    )


@pytest.mark.parametrize("size", [0.0, 1e-45, 1e-40, 1e-38, 3e-38, 1e-36, 1e-20])
@pytest.mark.parametrize("mode", MODES)
def test_a_group_of_next_to_nothing_is_not_infinite(mode, size):
    """mx.quantize alone makes infinities of some of these."""
    weight = np.concatenate([np.full((2, 32), size, np.float32), np.ones((2, 32), np.float32)], axis=1)
    found = unpacked(pack(mx.array(weight), Packing.named(mode), mx.float32))
    assert np.abs(found[:, :32]).max() <= 2 * size and np.allclose(found[:, 32:], 1, atol=0.05)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("form", FORMS)
def test_error_feedback(form, mode):
    """Codes of a reference that solves all columns again after each, and better than rounding."""
    x, weight = alike()
    problem, packing = FORMS[form](x, weight), Packing.named(mode)
    found, _ = gptq.quantize(weight, packing, mx.float32, problem.feedback(range(N)))

    def scale_of(left: np.ndarray) -> np.ndarray:
        _, scales = mx.quantize(mx.array(np.tile(left, (1, 32 // left.shape[1])).astype(np.float32)), mode=mode)
        return reference_packing.SCALES[mode][np.array(scales)[:, 0]]

    hessian = x.T @ x + problem.ridge * np.eye(N)
    wanted = reference_packing.float_feedback(weight, hessian, mode, scale_of)
    assert np.abs(unpacked(found) - wanted).max() < 1e-6
    energy, plain = float(((x @ weight.T) ** 2).sum()), pack(mx.array(weight.astype(np.float32)), packing, mx.float32)
    with_feedback, without = (problem.error(unpacked(p), range(N), energy) for p in (found, plain))
    assert with_feedback < 0.8 * without


# ---- modules ----


@pytest.mark.parametrize("mode", MODES)
def test_modules_compute_in_float32(mode):
    linear = nn.Linear(64, 16)
    linear.set_dtype(mx.bfloat16)
    linear = linear.to_quantized(None, None, mode=mode)
    assert quantized.packed_so(linear, Packing.named(mode)) and not quantized.packed_so(linear, Packing(4, 32))
    weight, x = unpacked(quantized.packed(linear)), matrix(3, 64)
    expected = np.array(x, dtype=np.float64) @ weight.T + np.array(linear.bias.astype(mx.float32))
    assert np.abs(np.array(float32_layers.to_float32(linear)(x)) - expected).max() < 1e-5
    assert np.array_equal(np.array(quantized.dense_weight(linear, 2, 5)), weight[2:5])
    anew = quantized.packed_layer(linear, Packing(8, 64))
    assert (anew.mode, anew.bits, anew.scales.dtype) == ("affine", 8, mx.bfloat16)
    assert quantized.packed_layer(linear, Packing.named(mode)) is linear
    back = quantized.packed_layer(anew, Packing.named(mode))
    assert back.mode == mode and back.scales.dtype == mx.uint8 and "biases" not in back


# ---- a whole model, streamed ----


def exact(model: Path, rows: Rows) -> np.ndarray:
    return reference.forward(*reference.load(model), rows.tokens)[0]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("family", pico.FAMILIES)
def test_streamed(pico_models, family, mode):
    """As the stock model, whose gemma rounds its embedding to bfloat16 on the way, and as numpy."""
    model, rows = pico_models(family, mode), Rows.full(np.random.default_rng(0).integers(0, 500, (3, 20)))
    found = np.array(stream.walk(model, rows).all_logits(slice(None)))
    np.testing.assert_allclose(found, exact(model, rows), rtol=0, atol=1e-4)
    stock = np.array(lm.load_stock(model)(mx.array(rows.tokens)).astype(mx.float32))
    np.testing.assert_allclose(found, stock, rtol=0, atol=0.1 if family == "gemma3_text" else 1e-4)
    dense = lm.dequantized(lm.load(model))(mx.array(rows.tokens))
    np.testing.assert_allclose(found, np.array(dense), rtol=0, atol=1e-4)


@pytest.mark.parametrize("mode", MODES)
def test_embedding_is_looked_up_in_the_file(pico_models, mode):
    checkpoint = Checkpoint(pico_models("llama", mode))
    found = StoredEmbedding(checkpoint, "model.embed_tokens.weight", mx.float32)(mx.array(DATA.tokens[:2]))
    table = in_mode(arrays_of(checkpoint.path), "model.embed_tokens", mode)
    assert np.array_equal(np.array(found), table[DATA.tokens[:2]])


@pytest.mark.parametrize("mode", MODES)
def test_evaluate_and_inspect(pico_models, mode):
    model, teacher = pico_models("llama", mode), pico_models("llama")
    found = evaluate(model, DATA, teacher=teacher)
    logits_of = [exact(m, DATA)[:, :-1] for m in (teacher, model)]
    assert found.kl_divergence == pytest.approx(float(reference.kl(*logits_of).mean()), rel=1e-3)
    said = inspect(model)
    bits, group = FLOAT_MODES[mode]
    assert said["quantization"] == {"mode": mode, "bits": bits, "group_size": group}
    assert said["bytes"]["total"] == sum(a.nbytes for a in arrays_of(model).values())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_dtype_of_the_cache(pico_models, family, dtype):
    """The embedding comes out in bfloat16; what the norm makes of it is what the cache holds."""
    from mlx_lm.models.cache import make_prompt_cache

    model = pico_models(family, "mxfp8", dtype=dtype)
    stock, checkpoint = lm.load(model), Checkpoint(model)
    cache = make_prompt_cache(stock)
    stock(mx.array([[1, 2, 3]]), cache=cache)
    assert cache[0].keys.dtype.size == checkpoint.value_bytes
    assert {checkpoint.dtype(t) for t in checkpoint.arch.tensors()} == {
        {v: k for k, v in quantized.MX_DTYPE.items()}[dtype]
    }


# ---- cut ----


@pytest.mark.parametrize("axes", AXES)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma3_text"])
def test_sliced_is_masked(pico_models, tmp_path, family, mode, axes):
    """In whole groups: every code and scale is the source's, the bytes are those that were predicted."""
    source, out = pico_models(family, mode), tmp_path / "out"
    plan = whole_groups(source, AXES[axes])
    assert prune(source, plan, out) == {"requantized": {}, "dense": []}
    assert largest(logits(lm.load(out)), masked(source, plan)) < PACKED
    before, after, head_dim = arrays_of(source), arrays_of(out), Checkpoint(source).arch.uniform("head_dim")
    group, bits = GROUPS[mode], FLOAT_MODES[mode][0]
    for module in {name.removesuffix(".scales") for name in after if name.endswith(".scales")}:
        origin, rows, columns = kept_indices(out, f"{module}.weight", head_dim)
        origin = origin.removesuffix(".weight") if origin in before else "model.embed_tokens"
        groups = None if columns is None else [c // group for c in columns[::group]]
        words = [
            reference_packing.codes(np.array(a[f"{m}.weight"]), bits) for a, m in ((before, origin), (after, module))
        ]
        assert np.array_equal(words[1], take(words[0], rows, columns)), module
        scales = np.array(after[f"{module}.scales"])
        assert scales.dtype == np.uint8 and np.array_equal(
            scales, take(np.array(before[f"{origin}.scales"]), rows, groups)
        )
    said = Plan.load(out / "plan.json").after.bytes
    assert said == Checkpoint(out).nbytes() == sum(a.nbytes for a in after.values())
    module, _ = mlx_lm.load(str(out))
    assert np.isfinite(np.array(module(mx.array(TOKENS)).astype(mx.float32))).all()


@pytest.mark.parametrize("axis", ["ffn", "kv_head", "layer"])
@pytest.mark.parametrize("mode", MODES)
def test_a_wrong_index_is_seen(pico_models, tmp_path, mode, axis):
    source = pico_models("qwen2", mode)
    plan = whole_groups(source, AXES["all"])
    wrong = plan.model_copy(deep=True)
    if axis == "layer":
        wrong.layers[1].source = 2
    else:
        layer, size = wrong.layers[1], Checkpoint(source).arch.uniform(axis)
        setattr(layer, axis, sorted((i + size // 4) % size for i in getattr(layer, axis)))  # other whole groups
    prune(source, wrong, tmp_path / "out")
    assert largest(logits(lm.load(tmp_path / "out")), masked(source, plan)) > BROKEN


@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16], ids=str)
@pytest.mark.parametrize("mode", MODES)
def test_inside_a_group(pico_models, tmp_path, mode, dtype):
    """Packed again in the same mode, and listed with the error that numpy finds; or left dense, and then exact."""
    source, out = pico_models("llama", mode, dtype=dtype), tmp_path / "out"
    plan = plan_of(source, ("ffn",), ffn=64)
    done = prune(source, plan, out)
    assert set(done["requantized"]) == {f"model.layers.{n}.mlp.down_proj" for n in range(4)} and not done["dense"]
    before, after, head_dim = arrays_of(source), arrays_of(out), Checkpoint(source).arch.uniform("head_dim")
    for module, error in done["requantized"].items():
        assert Checkpoint(out).packing(module).mode == mode
        _, rows, columns = kept_indices(out, f"{module}.weight", head_dim)
        wanted = take(in_mode(before, module, mode), rows, columns)
        measured = reference_packing.relative_error(wanted, in_mode(after, module, mode))
        assert error == pytest.approx(measured, rel=1e-3, abs=1e-7)
        assert 0 < measured < 0.2 or (mode == "mxfp8" and measured < 1e-3)  # powers of two change, seldom a digit
    left = prune(source, plan, tmp_path / "dense", requantize=False)
    assert left["requantized"] == {} and len(left["dense"]) == 4
    weight = arrays_of(tmp_path / "dense")[f"{DOWN}.weight"]
    assert weight.dtype == dtype
    assert largest(logits(lm.load(tmp_path / "dense")), masked(source, plan)) < PACKED
    assert Plan.load(out / "plan.json").after.bytes == Checkpoint(out).nbytes()


@pytest.mark.parametrize("mode", MODES)
def test_a_width_that_no_group_divides(pico_models, tmp_path, mode):
    """It is left dense, in the dtype of the norms; mlx-lm reads which in the config."""
    source = pico_models("llama", mode, dtype=mx.float16)
    done = prune(source, plan_of(source, ("ffn",), ffn=77), tmp_path / "out")
    assert done["requantized"] == {} and len(done["dense"]) == 4
    said = json.loads((tmp_path / "out" / "config.json").read_text())["quantization"]
    assert said["mode"] == mode and said[DOWN] is False
    assert arrays_of(tmp_path / "out")[f"{DOWN}.weight"].dtype == mx.float16
    assert np.isfinite(np.array(mlx_lm.load(str(tmp_path / "out"))[0](mx.array(TOKENS)))).all()


@pytest.mark.parametrize("mode", MODES)
def test_other_bits_for_a_part(pico_models, tmp_path, mode):
    """Affine beside a float mode: the config says which is which, and mlx-lm reads it so."""
    source = pico_models("llama", mode)
    plan = whole_groups(source, ("ffn",), group_size=32, embedding_bits=6)
    plan.layers[1].ffn_bits = 4
    done = prune(source, plan, tmp_path / "out")
    checkpoint = Checkpoint(tmp_path / "out")
    assert set(done["requantized"]) == {
        "model.embed_tokens", *(f"model.layers.1.mlp.{m}_proj" for m in ("gate", "up", "down"))
    }  # fmt: skip
    assert str(checkpoint.packing(DOWN)) == "4 bits in groups of 32" and checkpoint.quantization.mode == mode
    assert Plan.load(tmp_path / "out" / "plan.json").after.bytes == checkpoint.nbytes()
    model, _ = mlx_lm.load(str(tmp_path / "out"))
    assert (model.layers[1].mlp.down_proj.mode, model.layers[2].mlp.down_proj.mode) == ("affine", mode)
    assert largest(logits(model), masked(source, plan)) < 3


# ---- solved, tried, healed ----


@pytest.mark.parametrize("mode", MODES)
def test_reconstruct(pico_models, tmp_path, mode):
    """What is solved is stored in the mode, by the codes that were found; nearer to the original than the bare cut."""
    source = pico_models("llama", mode)
    plan = plan_of(source, ("ffn",), ffn=96).model_copy(update={"criterion": "obs"})
    plan = reconstruct(source, plan, DATA, tmp_path / "repair")
    done = prune(source, plan, tmp_path / "out", repair=tmp_path / "repair")
    files = mx.load(str(repair_file(tmp_path / "repair", 1)))
    after = arrays_of(tmp_path / "out")
    for part in ("weight", "scales"):
        assert np.array_equal(np.array(files[f"down_proj.{part}"]), np.array(after[f"{DOWN}.{part}"]))
    assert Checkpoint(tmp_path / "out").packing(DOWN).mode == mode and DOWN in done["requantized"]
    prune(source, plan, tmp_path / "bare")
    off = [evaluate(tmp_path / name, DATA, teacher=source).kl_divergence for name in ("out", "bare")]
    assert off[0] < 0.9 * off[1]


def test_trials_see_what_will_be_stored(pico_models):
    """More bits for a part are nearer to the original, whose own packing is a float mode; uncut is the original."""
    source = pico_models("llama", "mxfp8")
    full = whole(Checkpoint(source).arch)
    given = [tuple(replace(w, ffn_bits=bits) for w in full) for bits in (3, 8)]
    kl = try_out(source, [full, *given], DATA, DATA.first(5), group_size=32).kl
    assert kl[0] == 0 and 0 < kl[2] < 0.1 * kl[1] and isinstance(full[0], Width)


@pytest.mark.parametrize(
    ("mode", "method"), [*((mode, "lora") for mode in MODES), *(("mxfp8", method) for method in METHODS[1:])]
)
def test_recovery(cut, texts, tmp_path, mode, method):
    """The validation KL falls in what is stored; the packing stays, and under `norms` every code and scale."""
    (pruned, original), out = cut("llama", mode), tmp_path / "out"
    found = recover(pruned, original, *texts, out, replace(OPTIONS, method=method, learning_rate=RATES[method]))
    assert found["improved"] and found["kl_after"] < found["kl_before"]
    logits_of = [exact(m, texts[1]) for m in (original, out)]
    assert found["kl_after"] == pytest.approx(float(reference.kl(*logits_of).mean()), rel=1e-3)
    assert same_packing_and_shapes(Checkpoint(pruned), Checkpoint(out)) and mlx_lm.load(str(out))
    before, after = stored(pruned), stored(out)
    changed = {name for name in before if before[name] != after[name]}
    if method == "norms":
        assert changed and all("norm" in name for name in changed)
    elif found["kept"] == "same scales":
        assert not any(name.endswith(".scales") for name in changed)


@pytest.mark.parametrize("mode", MODES)
def test_healing_block_by_block(faulty, tmp_path, mode):
    """Through the rounding to the values of the mode, on the scales there are."""
    (student, teacher), out = faulty("llama", mode), tmp_path / "out"
    found = local(student, teacher, ROWS, HELD, out, HEALING)
    assert found["kl_after"] < 0.9 * found["kl_before"]
    assert found["kl_after"] == pytest.approx(kl(out, teacher, HELD), rel=1e-3)
    assert same_packing_and_shapes(Checkpoint(student), Checkpoint(out))


# ---- out of the house ----


@pytest.mark.parametrize("mode", MODES)
def test_gguf_holds_the_values(pico_models, tmp_path, mode):
    model = pico_models("llama", mode)
    export(model, tmp_path / "m.gguf", "f32")
    tensors = {t.name: t.data for t in gguf.GGUFReader(str(tmp_path / "m.gguf")).tensors}
    before = arrays_of(model)
    for name, module in {"blk.1.ffn_down": DOWN, "token_embd": "model.embed_tokens"}.items():
        assert np.array_equal(tensors[f"{name}.weight"], in_mode(before, module, mode).astype(np.float32))


@pytest.fixture(scope="module")
def settings(two_texts) -> Settings:
    """A small job, on our own text in two halves."""
    return Settings(
        **two_texts, keep=0.75, length=24, samples=12,
        recover_steps=2, trials=0, context=256,
    )  # fmt: skip


@pytest.mark.parametrize("how", [*MODES, 2, 3, 5, 6])
def test_run(pico_models, settings, tmp_path, how):
    """From the model to the GGUF, reconstructed and recovered: packed as it was, as large as was predicted, opened by
    stock mlx-lm. For affine packings of every width that no other test runs as well."""
    source = pico_models("llama", how if isinstance(how, str) else (how, 32), num_hidden_layers=2)
    # one with trials of widths, which take most of the time; two without recovery and comparison
    settings = replace(settings, widths="uniform" if how == "mxfp4" else "even", quick=how in (2, 5))
    done = pipeline.run(source, tmp_path / "run", settings)
    result, before = Checkpoint(done["model"]), Checkpoint(source)
    assert result.quantization.as_config() == before.quantization.as_config()
    assert all(result.packing(t.module) for t in result.arch.tensors() if t.matrix)
    assert Plan.load(tmp_path / "run" / "plan" / "plan.json").after.bytes == result.nbytes() < before.nbytes()
    assert mlx_lm.load(done["model"]) and done["after"]["kl_divergence"] > 0
    if isinstance(how, int):
        return
    tensors = {t.name: t for t in gguf.GGUFReader(done["gguf"]).tensors}
    found = gguf.dequantize(tensors["blk.1.ffn_gate.weight"].data, tensors["blk.1.ffn_gate.weight"].tensor_type)
    wanted = in_mode(arrays_of(Path(done["model"])), "model.layers.1.mlp.gate_proj", how)
    assert reference_packing.relative_error(wanted, found) < 0.01


def test_run_with_bits_chosen_per_layer(pico_models, settings, tmp_path):
    """Parts that get bits of their own stand beside those that stay in the mode of the source."""
    source = pico_models("llama", "mxfp4", num_hidden_layers=3)
    wanted = replace(settings, keep=None, target_size=f"{Checkpoint(source).nbytes() * 3 // 4}B", recover_steps=0)
    done = pipeline.run(source, tmp_path / "run", replace(wanted, widths="per-layer", tries=3, choose_bits=(3, 8)))
    plan = Plan.load(tmp_path / "run" / "plan" / "plan.json")
    assert plan.after.bytes == Checkpoint(done["model"]).nbytes() <= Checkpoint(source).nbytes() * 3 // 4


# ---- damaged, or not what it says ----


@pytest.fixture
def harmed(pico_models, tmp_path):
    """``harmed(mode, change) -> path``: a copy whose arrays were changed."""

    def copy(mode: str, change=lambda arrays: None, **config) -> Path:
        path = Path(shutil.copytree(pico_models("llama", mode), tmp_path / "model"))
        arrays = dict(mx.load(str(path / "model.safetensors")))
        mx.eval(arrays)
        change(arrays)
        mx.save_safetensors(str(path / "model.safetensors"), arrays, metadata={"format": "mlx"})
        said = json.loads((path / "config.json").read_text())
        (path / "config.json").write_text(json.dumps({**said, **config}))
        return path

    return copy


def to(dtype: mx.Dtype, part: str):
    return lambda arrays: arrays.update({f"{DOWN}.{part}": arrays[f"{DOWN}.{part}"].astype(dtype)})


HARMS = {
    "no scales": (lambda arrays: arrays.pop(f"{DOWN}.scales"), f"{DOWN}.weight has dtype U32, expected one of"),
    "biases": (lambda arrays: arrays.update({f"{DOWN}.biases": mx.zeros((64, 4))}), f"{DOWN}.biases, and .* no biases"),
    "float scales": (to(mx.float16, "scales"), f"{DOWN}.scales has dtype F16, expected U8"),
    "bytes for words": (to(mx.uint8, "weight"), f"{DOWN}.weight is packed and has dtype U8, expected U32"),
    "few scales": (
        lambda arrays: arrays.update({f"{DOWN}.scales": arrays[f"{DOWN}.scales"][:, 1:]}),
        f"{DOWN}.scales has shape .* expected 64 rows",
    ),
    "a scale of the whole tensor": (
        lambda arrays: arrays.update({f"{DOWN}.global_scale": mx.ones((1,))}),
        f"{DOWN}.global_scale, which the llama family does not describe",
    ),
}


@pytest.mark.parametrize("harm", HARMS)
@pytest.mark.parametrize("mode", MODES)
def test_damage_is_refused(harmed, mode, harm):
    change, said = HARMS[harm]
    with pytest.raises(PareError, match=said) as caught:
        _ = Checkpoint(harmed(mode, change)).arch
    assert "\n" not in str(caught.value)


OTHERS = {
    "another group": ({"mode": "mxfp4", "bits": 4, "group_size": 64}, "mxfp4 in 4 bits and groups of 32"),
    "another width": ({"mode": "mxfp8", "bits": 4, "group_size": 32}, "mxfp8 in 8 bits and groups of 32"),
    "an unknown mode": ({"mode": "mxfp6", "bits": 6, "group_size": 32}, "mode 'mxfp6'"),
    "affine": ({"bits": 4, "group_size": 32}, "scales has dtype U8"),
    "another mode": ({"mode": "nvfp4", "bits": 4, "group_size": 16}, "scales has shape"),
}


@pytest.mark.parametrize("other", OTHERS)
def test_a_config_that_says_otherwise_is_refused(harmed, other):
    spec, said = OTHERS[other]
    with pytest.raises(PareError, match=said):
        _ = Checkpoint(harmed("mxfp4", quantization=spec)).arch


def test_activations_that_are_rounded_are_refused(harmed):
    """mlx-lm would compute with other layers (QQLinear)."""
    with pytest.raises(Unsupported, match="quantize_activations"):
        Checkpoint(harmed("nvfp4", quantize_activations=True))


def test_a_mode_alone_is_enough(harmed):
    """As mlx-lm takes it for a module; bits and groups follow."""
    path = harmed("nvfp4", quantization={"mode": "nvfp4", "bits": 4, "group_size": 16, DOWN: {"mode": "nvfp4"}})
    assert Checkpoint(path).packing(DOWN) == replace(Packing.named("nvfp4"), scale_bytes=4)
