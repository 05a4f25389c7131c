"""Candidates tried side by side: the KL of each is that of a float64 reference, whatever else is tried beside it."""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache
from pathlib import Path

import mlx.core as mx
import numpy as np
import pico
import pytest
import reference

from mlx_pare.base.errors import PareError, Refused
from mlx_pare.model.checkpoint import Checkpoint
from mlx_pare.planning import try_candidates
from mlx_pare.planning.candidate import Candidate, Width, whole
from mlx_pare.planning.try_candidates import Tried, try_out
from mlx_pare.repair.least_squares import DAMPING
from mlx_pare.stream import batches, head, walk as stream
from mlx_pare.text.corpus import Rows

RANDOM = np.random.default_rng(0)


def rows(count: int, random: np.random.Generator = RANDOM) -> Rows:
    """Every third row is short."""
    lengths = np.where(np.arange(count) % 3, 24, random.integers(3, 24, count)).astype(np.int32)
    return Rows(random.integers(0, 500, (count, 24)).astype(np.int32), lengths)


DATA, HELD = rows(26), rows(7)  # 500 tokens of text for 128 inputs

SEED_OSS = {"model_type": "seed_oss", "architectures": ["SeedOssForCausalLM"], "head_dim": 8, "attention_bias": True,
            "attention_out_bias": True, "mlp_bias": True}  # fmt: skip
VARIANTS = {family: (family, {}) for family in (*pico.FAMILIES, "phi3", "olmo2")} | {
    "llama with biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "seed_oss with biases": ("qwen2", SEED_OSS),
}


@pytest.fixture(autouse=True)
def small_batches(monkeypatch):
    """Four rows at a time, and a rest; calibration ends within a micro-batch."""
    monkeypatch.setattr(batches, "MICRO_BATCH_TOKENS", 100)


@pytest.fixture
def model(pico_models):
    def make(variant: str = "llama", **stored) -> Path:
        family, changes = VARIANTS[variant]
        return pico_models(family, **stored, **changes)

    return make


def candidate(path: Path, changes: dict[int, dict | None]) -> Candidate:
    """The whole model but for these layers."""
    full = whole(Checkpoint(path).arch)
    changed = {i: change and replace(full[i], **change) for i, change in changes.items()}
    return tuple(changed.get(i, width) for i, width in enumerate(full))


def several(path: Path) -> dict[str, Candidate]:
    """Everything a candidate may do, as far as it is done with a family of pico models."""
    heads = Checkpoint(path).arch.layers[0].sizes["kv_head"]
    last = len(Checkpoint(path).arch.layers) - 1
    return {
        name: candidate(path, changes)
        for name, changes in {
            "attention": {1: {"kv_head": heads - 1}},
            "ffn": {2: {"ffn": 96}},
            "both in several layers": {i: {"kv_head": heads - 1, "ffn": 64 + i} for i in (0, 1, last)},
            "a layer dropped": {2: None},
            "the first dropped, a later one narrow": {0: None, last: {"ffn": 120}},
            "attention gone": {1: {"kv_head": 0}},
            "ffn gone": {last: {"ffn": 0}},
            "much": {0: {"ffn": 127}, 1: {"kv_head": 0, "ffn": 100}, 2: None, last: {"kv_head": heads - 1}},
            "one channel left": {last: {"ffn": 1}},
        }.items()
    }


@lru_cache(maxsize=1)
def original(path: Path) -> tuple[dict, dict, list[dict], np.ndarray]:
    """(config, weights, activations of every layer on DATA, logits for HELD) by the reference."""
    config, weights = reference.load(path)
    layers, held = reference.forward(config, weights, DATA.tokens)[1], reference.forward(config, weights, HELD.tokens)
    return config, weights, layers, held[0][:, :-1]


def weights_of(path: Path, made: Candidate, tried: Tried) -> tuple[dict, dict]:
    """(config, weights) by the reference; the units are those that were tried."""
    config, weights, layers, _ = original(path)
    full = whole(Checkpoint(path).arch)

    def units(layer: int, part: str, width: Width, of: int) -> list[int]:
        count = width.units(part)
        return list(range(of)) if count == of else tried.curves[layer, part].kept(count)

    kept = {
        i: (units(i, "attention", width, full[i].kv_head), units(i, "ffn", width, full[i].ffn))
        for i, width in enumerate(made)
        if width is not None
    }
    return config, reference.repaired_alone(config, weights, DATA.tokens, DATA.lengths, kept, DAMPING, layers)


def kl_of(path: Path, config: dict, weights: dict) -> float:
    """Over every predicted token of the text."""
    cut = reference.forward(config, weights, HELD.tokens)[0][:, :-1]
    return float(reference.kl(original(path)[3], cut)[HELD.mask()[:, 1:]].mean())


# ---- against the reference ----


@pytest.mark.parametrize("stored", ["float32", "4 bits"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_kl(model, variant, stored):
    path = model(variant, **({"packed": (4, 32)} if stored == "4 bits" else {}))
    candidates = several(path)
    found = try_out(path, list(candidates.values()), DATA, HELD)
    for (name, made), kl in zip(candidates.items(), found.kl, strict=True):
        wanted = kl_of(path, *weights_of(path, made, found))
        assert kl == pytest.approx(wanted, rel=2e-3, abs=2e-6), name
        assert wanted > 1e-4, name  # it says something


@pytest.mark.parametrize("stored", ["float32", "bfloat16"])
@pytest.mark.parametrize("variant", ["qwen2", "gemma3_text", "seed_oss with biases"])
def test_kl_with_bits_of_a_part(model, variant, stored):
    """Every matrix of the part is as MLX packs it, the solved one as it is when its columns are gone."""
    dtype = getattr(mx, stored)
    path = model(variant, dtype=dtype)
    heads = Checkpoint(path).arch.layers[0].sizes["kv_head"]
    candidates = {
        "attention": candidate(path, {1: {"attention_bits": 3}}),
        "ffn": candidate(path, {2: {"ffn_bits": 2}}),
        "both": candidate(path, {i: {"ffn_bits": 4, "attention_bits": 4} for i in range(4)}),
        "narrow": candidate(path, {0: {"ffn_bits": 3, "ffn": 96, "attention_bits": 4, "kv_head": heads - 1}}),
        "gone": candidate(path, {0: {"ffn_bits": 3, "ffn": 0, "attention_bits": 4, "kv_head": heads - 1}}),
    }
    found = try_out(path, list(candidates.values()), DATA, HELD, group_size=32)
    for (name, made), kl in zip(candidates.items(), found.kl, strict=True):
        config, weights = weights_of(path, made, found)
        for i, width in enumerate(made):
            for part, roles in (("self_attn", "qkvo"), ("mlp", ("gate", "up", "down"))):
                bits = width.attention_bits if part == "self_attn" else width.ffn_bits
                for role in roles if bits else ():
                    matrix = f"model.layers.{i}.{part}.{role}_proj.weight"
                    weights[matrix] = packed(weights[matrix], bits, dtype)
        wanted = kl_of(path, config, weights)
        assert kl == pytest.approx(wanted, rel=2e-2 if stored == "bfloat16" else 2e-3, abs=2e-6), name
        assert wanted > 1e-4, name


def packed(matrix: np.ndarray, bits: int, dtype: mx.Dtype) -> np.ndarray:
    """By MLX itself, its columns that are not all zero in groups of 32 where those divide them."""
    kept = np.flatnonzero(np.abs(matrix).sum(axis=0))
    if len(kept) % 32 or len(kept) == 0:
        return matrix
    words, *scales = mx.quantize(mx.array(matrix[:, kept].astype(np.float32)).astype(dtype), 32, bits)
    made = np.zeros_like(matrix)
    made[:, kept] = np.array(mx.dequantize(words, *(a.astype(mx.float32) for a in scales), 32, bits))
    return made


@pytest.mark.parametrize("variant", ["llama", "gemma3_text"])
def test_whole_model_loses_nothing(model, variant):
    path = model(variant, packed=(4, 32))
    full, cut = whole(Checkpoint(path).arch), several(path)["ffn"]
    assert try_out(path, [full, cut, full], DATA, HELD).kl[::2] == [0.0, 0.0]


def test_order_and_loss_are_those_of_brute_force(model):
    """Greedy OBS of each part, on what the dense stream feeds it."""
    path = model("qwen2", intermediate_size=14)
    config, weights = reference.load(path)
    found = try_out(path, [], DATA, HELD).curves
    assert set(found) == {(i, part) for i in range(4) for part in ("attention", "ffn")}
    for i, layer in enumerate(reference.forward(config, weights, DATA.tokens)[1]):
        for part, name, size in (("attention", "self_attn.o_proj", 16), ("ffn", "mlp.down_proj", 1)):
            x, old = layer[part][DATA.mask()], weights[f"model.layers.{i}.{name}.weight"]
            target, curve = x @ old.T, found[i, part]
            strong, units = reference.ridge_of(x, DAMPING), old.shape[1] // size
            assert len(curve.order) == units and len(curve.loss) == units + 1
            for count in range(units + 1):
                if count:
                    assert curve.kept(count) == reference.greedy(x, target, old, strong, size, count), (i, part, count)
                kept = reference.inputs_of(curve.kept(count), size)
                lost = reference.loss(x, target, old, strong, kept) / (target**2).sum()
                assert curve.loss[count] == pytest.approx(lost, rel=1e-3, abs=1e-6), (i, part, count)


# ---- nothing else matters ----


def test_alone_is_together_in_any_order(model):
    path = model("qwen2", packed=(4, 32))
    candidates = list(several(path).values())
    together = try_out(path, candidates, DATA, HELD).kl
    backwards = try_out(path, candidates[::-1], DATA, HELD).kl
    assert backwards[::-1] == together and len(set(together)) == len(together)
    for made, kl in zip(candidates, together, strict=True):
        assert try_out(path, [made], DATA, HELD).kl == [kl]


@pytest.mark.parametrize("variant", ["llama", "gemma3_text"])
def test_size_of_micro_batches_changes_no_more_than_rounding(model, monkeypatch, variant):
    path = model(variant)
    candidates = list(several(path).values())
    expected = try_out(path, candidates, DATA, HELD)
    for tokens in (24, 1000):
        monkeypatch.setattr(batches, "MICRO_BATCH_TOKENS", tokens)
        found = try_out(path, candidates, DATA, HELD, expected.curves)
        assert found.kl == pytest.approx(expected.kl, rel=1e-3, abs=1e-6)


def test_held_rows_do_not_say_what_is_solved(model):
    """The first of them are measured alike, whatever the others say; the orders and losses are the same."""
    path = model("qwen2")
    candidates = list(several(path).values())
    wild = Rows.full(np.full((40, 24), 7))
    expected, other = (try_out(path, candidates, DATA, held) for held in (HELD, wild))
    for key, curve in expected.curves.items():
        assert np.array_equal(curve.order, other.curves[key].order)
        assert np.allclose(curve.loss, other.curves[key].loss, rtol=1e-4, atol=1e-7)
    both = try_out(path, candidates, DATA, HELD.joined(wild)).kl
    share = HELD.mask()[:, 1:].sum() / (HELD.mask()[:, 1:].sum() + wild.mask()[:, 1:].sum())
    mixed = [share * a + (1 - share) * b for a, b in zip(expected.kl, other.kl, strict=True)]
    assert both == pytest.approx(mixed, rel=1e-3, abs=1e-6)


def test_calibration_rows_are_not_measured(model):
    """Where nothing is solved they have no say."""
    path = model("qwen2")
    candidates = [candidate(path, changes) for changes in ({1: None}, {2: {"ffn": 0}}, {0: {"ffn_bits": 3}})]
    found = [try_out(path, candidates, data, HELD, {}).kl for data in (DATA, rows(9), Rows.full(np.full((3, 24), 7)))]
    assert found[1] == pytest.approx(found[0], rel=1e-4) and found[2] == pytest.approx(found[0], rel=1e-4)
    narrow = [candidate(path, {1: {"ffn": 64}})]
    assert try_out(path, narrow, DATA, HELD).kl[0] < 0.9 * try_out(path, narrow, rows(3), HELD).kl[0]


def other_padding(given: Rows) -> Rows:
    tokens = np.where(given.mask(), given.tokens, (given.tokens + 7) % 500).astype(np.int32)
    assert not np.array_equal(tokens, given.tokens)
    return Rows(tokens, given.lengths)


def test_padding_does_not_count(model):
    path = model("seed_oss with biases")
    candidates = list(several(path).values())
    found = [try_out(path, candidates, *data).kl for data in ((DATA, HELD), map(other_padding, (DATA, HELD)))]
    assert found[1] == pytest.approx(found[0], rel=1e-4, abs=1e-6)


def test_orders_of_an_earlier_call_are_taken(model):
    path = model("qwen2")
    made = [candidate(path, {1: {"ffn": 100, "kv_head": 2}})]
    first = try_out(path, made, DATA, HELD)
    assert try_out(path, made, DATA, HELD, first.curves).kl == pytest.approx(first.kl, rel=1e-5)
    turned = {key: replace(curve, order=curve.order[::-1]) for key, curve in first.curves.items()}
    again = try_out(path, made, DATA, HELD, turned)
    assert again.kl[0] != pytest.approx(first.kl[0], rel=0.2)
    narrow = [candidate(path, {1: {"ffn": 100}})]  # of four heads of a model drawn by lot, the dearest may be the best
    assert try_out(path, narrow, DATA, HELD, turned).kl[0] > 2 * try_out(path, narrow, DATA, HELD, first.curves).kl[0]
    assert kl_of(path, *weights_of(path, made[0], again)) == pytest.approx(again.kl[0], rel=1e-3)
    needed = try_out(path, made, DATA, HELD, {})  # those that are asked for, and no others
    assert needed.kl == first.kl and set(needed.curves) == {(1, "ffn"), (1, "attention")}


def test_no_order_goes_further_than_a_candidate_needs(model):
    """Also if the candidate that needs most of it comes in a later walk, because memory does not hold them together."""
    path = model("qwen2")
    made = [candidate(path, {1: {"ffn": count}}) for count in (120, 100)]
    every, needed = try_out(path, made, DATA, HELD), try_out(path, made, DATA, HELD, {})
    assert list(needed.curves) == [(1, "ffn")]
    order, loss = needed.curves[1, "ffn"].order, needed.curves[1, "ffn"].loss
    assert len(order) == 28 and np.array_equal(order, every.curves[1, "ffn"].order[:28])
    assert np.isinf(loss[:100]).all() and np.array_equal(loss[100:], every.curves[1, "ffn"].loss[100:])
    cap = try_candidates.check_memory(Checkpoint(path), DATA, HELD, 1, 10**12)
    apart = try_out(path, made, DATA, HELD, {}, memory_cap=cap)
    assert apart.kl == pytest.approx(needed.kl, rel=1e-5)


# ---- giving up ----


def test_hopeless_candidates_are_given_up_and_the_others_are_not(model):
    """By the error of the stream on the text of the held-out rows, padding aside."""
    path = model("qwen2")
    candidates = {"dropped": candidate(path, {3: None}), "narrow": candidate(path, {2: {"ffn": 120}})}
    expected = try_out(path, list(candidates.values()), DATA, HELD).kl
    last = reference.forward(*reference.load(path), HELD.tokens)[1][3]
    before, after = (last[name][HELD.mask()] for name in ("before", "after"))
    lost = float(((before - after) ** 2).sum() / (after**2).sum())
    assert try_out(path, list(candidates.values()), DATA, HELD, lost=lost * 1.001).kl == expected
    assert try_out(path, list(candidates.values()), DATA, HELD, lost=lost * 0.999).kl == [np.inf, expected[1]]


def test_infinite_numbers_are_given_up_or_an_error(pico_models, tmp_path):
    path = pico.make(tmp_path / "model", "llama")
    weights = dict(mx.load(str(path / "model.safetensors")))
    weights["model.layers.2.mlp.up_proj.weight"] *= 1e30
    mx.save_safetensors(str(path / "model.safetensors"), weights)
    with pytest.raises(PareError, match="infinite numbers"):
        try_out(path, [], DATA, HELD)
    assert try_out(path, [candidate(path, {0: {"ffn": 0}})], DATA, HELD, {}).kl == [np.inf]


# ---- memory ----


def test_memory_is_stated_and_refused(model, monkeypatch):
    path = model("qwen2")
    candidates = list(several(path).values())
    checkpoint = Checkpoint(path)
    stated = try_candidates.check_memory(checkpoint, DATA, HELD, len(candidates), 10**12)
    more = try_candidates.check_memory(checkpoint, DATA, HELD, 1000 + len(candidates), 10**12)
    grown = 1000 * 7 * 24 * 64 * 4  # a stream each, and a matrix for every width
    assert more - stated == grown + 4 * 64 * 128 * (try_candidates.MOST_WIDTHS - len(candidates))
    one = try_candidates.check_memory(checkpoint, DATA, HELD, 1, 10**12)
    with pytest.raises(Refused, match=r"--memory-cap allows.*--widths even"):
        try_out(path, candidates, DATA, HELD, memory_cap=one - 1)


def test_what_does_not_fit_side_by_side_goes_one_after_the_other(model, monkeypatch):
    """The same numbers from more walks; what was found in the first is known in the others."""
    path, walks, walk = model("qwen2"), [], stream.walk
    candidates = list(several(path).values())
    monkeypatch.setattr(stream, "walk", lambda *a, **k: walks.append(a[2]) or walk(*a, **k))
    together = try_out(path, candidates, DATA, HELD)
    assert len(walks) == 1
    cap = try_candidates.check_memory(Checkpoint(path), DATA, HELD, 2, 10**12)
    apart = try_out(path, candidates, DATA, HELD, memory_cap=cap)
    assert len(walks) > 2 and not any(each.every for each in walks[2:])
    assert apart.kl == pytest.approx(together.kl, rel=1e-6) and set(apart.curves) == set(together.curves)
    assert try_out(path, [], DATA, HELD).kl == []


def test_stated_memory_is_enough(pico_models, monkeypatch):
    """Of MLX: nothing beside the states is as large as the inputs of the matrices, of all rows."""
    path = pico_models("llama", hidden_size=128, intermediate_size=1024, num_hidden_layers=2)
    monkeypatch.setattr(batches, "MICRO_BATCH_TOKENS", 1024)
    monkeypatch.setattr(head, "CHUNK_BYTES", 1 << 20)
    data, held = (Rows.full(RANDOM.integers(0, 500, (count, 128))) for count in (8, 120))
    made = [candidate(path, {1: {"ffn": 512}})]
    stated = try_candidates.check_memory(Checkpoint(path), data, held, len(made), 10**12)
    mx.clear_cache()
    mx.reset_peak_memory()
    before = mx.get_active_memory()
    try_out(path, made, data, held)
    assert mx.get_peak_memory() - before < stated


# ---- codes that stay ----


def test_bits_that_a_part_has_already_change_nothing(pico_models):
    """prune keeps such codes; to quantize them again would change them."""
    path = pico_models("llama", packed=(4, 32))
    same = candidate(path, {1: {"ffn_bits": 4, "attention_bits": 4}})
    other = candidate(path, {1: {"ffn_bits": 3}})
    assert try_out(path, [same, other], DATA, HELD, group_size=32).kl[0] == 0
    assert try_out(path, [other], DATA, HELD, group_size=32).kl[0] > 1e-4
