"""fit: parameters, bytes and KV cache against real files and caches; budgets and speeds against published ones."""

import dataclasses
import json
import struct
import subprocess
import sys
from itertools import pairwise
from math import prod

import mlx.core as mx
import pico
import pytest
from mlx_lm.models.cache import make_prompt_cache

from mlx_pare import lm
from mlx_pare.arch import describe
from mlx_pare.base import machine
from mlx_pare.base.errors import UsageError
from mlx_pare.capacity import form, macs, memory, planner, speed
from mlx_pare.capacity.memory import Needs, Use
from mlx_pare.model import footprint
from mlx_pare.model.checkpoint import Checkpoint
from mlx_pare.tensors.packing import Packing


def published(model_type, hidden, layers, heads, ffn, vocab, tied, limit, **more):
    """config.json of a published model; ``heads`` is (query, key-value)."""
    keys = ("hidden_size", "num_hidden_layers", "intermediate_size", "vocab_size", "tie_word_embeddings")
    found = dict(zip(keys, (hidden, layers, ffn, vocab, tied), strict=True)) | {"model_type": model_type}
    found |= {"num_attention_heads": heads[0], "num_key_value_heads": heads[1], "max_position_embeddings": limit}
    return found | more


QWEN3_4B = published("qwen3", 2560, 36, (32, 8), 9728, 151936, True, 262144, head_dim=128)
QWEN3_8B = published("qwen3", 4096, 36, (32, 8), 12288, 151936, False, 40960, head_dim=128)
QWEN25_32B = published("qwen2", 5120, 64, (40, 8), 27648, 152064, False, 32768)
LLAMA31_8B = published("llama", 4096, 32, (32, 8), 14336, 128256, False, 131072)
MISTRAL_7B = published("mistral", 4096, 32, (32, 8), 14336, 32768, False, 32768)
GEMMA = {"tied": True, "limit": 131072, "sliding_window": 1024}
GEMMA3_27B = published("gemma3_text", 5376, 62, (32, 16), 21504, 262208, head_dim=128, **GEMMA)
GEMMA3_4B = published("gemma3_text", 2560, 34, (8, 4), 10240, 262208, head_dim=256, **GEMMA)
Q4, Q8 = footprint.packed(Packing(4, 64)), footprint.packed(Packing(8, 64))
BF16 = footprint.dense(2)


def rows_of(config, storage, context=8192, chosen=None, **use):
    arch = describe(config)
    return planner.fit(Needs(arch, Use(context, **use)), planner.stored(arch, storage), chosen or macs.every())


def row_of(config, storage, mac, context=8192, **use):
    return rows_of(config, storage, context, [macs.find(mac)], **use)[0]


def assessed(arch, weights, mac, context, **use):
    return planner.assess(Needs(arch, Use(context, **use)), planner.weights_of(arch, weights), mac)


def kv_bytes(arch, context, batch=1, value_bytes=2):
    needs = Needs(arch, Use(context, batch=batch), value_bytes)
    return needs.kv(context) + needs.state


# ---- files ----


@pytest.fixture(scope="module", params=sorted(pico.FAMILIES))
def stored(request, tmp_path_factory):
    """One family in every storage: {name: (directory, the storage that predicts it)}."""
    root, family = tmp_path_factory.mktemp(request.param), request.param
    made = {
        "f32": (pico.make(root / "f32", family), footprint.dense(4)),
        "bf16": (pico.make(root / "bf16", family, dtype=mx.bfloat16), BF16),
    }
    packings = [("q4", 4, 32, "f32", 4), ("q8", 8, 64, "f32", 4), ("q4b", 4, 32, "bf16", 2)]
    for name, bits, group, source, width in packings:
        directory = pico.quantize(made[source][0], root / name, bits, group)
        made[name] = (directory, footprint.packed(Packing(bits, group, width), width))
    return made


def bytes_on_disk(directory):
    """File size minus the safetensors header, of all weight files."""
    total = 0
    for file in directory.glob("model*.safetensors"):
        with file.open("rb") as opened:
            total += file.stat().st_size - 8 - struct.unpack("<Q", opened.read(8))[0]
    return total


def test_bytes_are_those_on_disk(stored):
    for name, (directory, storage) in stored.items():
        checkpoint = Checkpoint(directory)
        expected = bytes_on_disk(directory)
        assert checkpoint.nbytes() == expected, name
        assert footprint.weight_bytes(checkpoint.arch, storage) == expected, name
        assert footprint.weight_bytes(checkpoint.arch, footprint.like(checkpoint)) == expected, name


def test_parameters_are_those_on_disk(stored):
    checkpoint = Checkpoint(stored["f32"][0])
    counted = footprint.parameters(checkpoint.arch)
    sizes = {name: prod(entry.shape) for name, entry in checkpoint.entries.items()}
    marks = {
        "norm": "norm",
        "embed_tokens": "embedding",
        "lm_head": "embedding",
        "mlp": "ffn",
        "self_attn": "attention",
    }
    by_part = dict.fromkeys(marks.values(), 0)
    for name, size in sizes.items():
        by_part[next(part for mark, part in marks.items() if mark in name)] += size
    assert {part: counted[part] for part in by_part} == by_part
    assert counted["total"] == sum(sizes.values())
    assert counted["non_embedding"] == counted["total"] - counted["embedding"]
    assert footprint.parameters(Checkpoint(stored["q4"][0]).arch) == counted
    table = 0 if checkpoint.arch.tied else checkpoint.entries["model.embed_tokens.weight"].nbytes
    everything = footprint.weight_bytes(checkpoint.arch, footprint.dense(4))
    assert everything - footprint.read_bytes(checkpoint.arch, footprint.dense(4)) == table


def test_a_matrix_no_group_divides_is_counted_dense():
    arch = describe({**pico.config_of("llama"), "vocab_size": 64, "intermediate_size": 80})
    down = next(t for t in arch.tensors() if t.spec.role == "down_proj")
    gate = next(t for t in arch.tensors() if t.spec.role == "gate_proj")
    assert footprint.packed(Packing(4, 64))(down) == 64 * 80 * 2
    assert footprint.packed(Packing(4, 64))(gate) == 80 * 64 // 2 + 80 * 2 * 2


def test_gguf_bytes():
    pytest.importorskip("mlx_pare.exporting.export")
    arch = describe({**pico.config_of("qwen2"), "vocab_size": 96})
    vectors = sum(t.size for t in arch.tensors() if not t.matrix)
    matrices = sum(t.size for t in arch.tensors() if t.matrix)
    assert footprint.weight_bytes(arch, form.gguf(arch, "f32")) == 4 * (vectors + matrices)
    assert footprint.weight_bytes(arch, form.gguf(arch, "f16")) == 4 * vectors + 2 * matrices
    assert footprint.weight_bytes(arch, form.gguf(arch, "q8_0")) == 4 * vectors + matrices // 32 * 34


# ---- caches ----


def cache_bytes(directory, context, batch):
    """nbytes of the cache of a stock model that read all but one token as a prompt, and decoded one."""
    model = lm.load(directory)
    cache = make_prompt_cache(model)
    tokens = mx.ones((batch, context), dtype=mx.int32)
    model(tokens[:, :-1], cache=cache)
    model(tokens[:, -1:], cache=cache)
    mx.eval([c.state[:2] for c in cache])
    return sum(c.nbytes for c in cache)


@pytest.mark.parametrize("batch,context", [(1, 300), (2, 257), (1, 200)])
def test_kv_bytes_are_those_of_a_real_cache(stored, batch, context):
    for name, width in (("f32", 4), ("bf16", 2)):
        directory = stored[name][0]
        arch = Checkpoint(directory).arch
        assert kv_bytes(arch, context, batch, width) == cache_bytes(directory, context, batch), name


def test_kv_bytes_of_sliding_llama_layers(tmp_path):
    more = {"layer_types": ["sliding_attention", "full_attention"] * 2, "sliding_window": 16}
    directory = pico.make(tmp_path / "m", "llama", **more)
    arch = Checkpoint(directory).arch
    assert kv_bytes(arch, 300, value_bytes=4) == cache_bytes(directory, 300, 1)
    assert 4 * footprint.cache_values(arch).growing == 2 * (2 * 2 * 16 * 4)  # two full layers, K and V, 2 heads of 16


def test_kv_bytes_of_known_models():
    """The table of published configs: bytes per token, and GB at 8k, 32k and 128k of Gemma 3's mixed layers."""
    models = [describe(c) for c in (LLAMA31_8B, QWEN3_4B, GEMMA3_27B)]
    assert [2 * footprint.cache_values(m).growing for m in models] == [131072, 147456, 81920]
    found = [kv_bytes(models[2], t) / 1e9 for t in (8192, 32768, 131072)]
    assert found == pytest.approx([1.107, 3.121, 11.174], abs=1e-3)


def test_the_sliding_overhang_is_what_a_prompt_leaves_in_the_cache(tmp_path, monkeypatch):
    """While chunks of a prompt are read, a rotating cache holds window - 1 + chunk rows."""
    directory = pico.make(tmp_path / "m", "gemma3_text")
    arch, chunk, context = Checkpoint(directory).arch, 32, 96
    model = lm.load(directory)
    short, cache = make_prompt_cache(model), make_prompt_cache(model)
    model(mx.ones((1, 5), dtype=mx.int32), cache=short)
    assert sum(c.nbytes for c in short) == kv_bytes(arch, 5, value_bytes=4)
    for _ in range(context // chunk):
        model(mx.ones((1, chunk), dtype=mx.int32), cache=cache)
    rows = {c.keys.shape[2] for c in cache if hasattr(c, "max_size")}
    assert rows == {arch.config["sliding_window"] - 1 + chunk}
    monkeypatch.setattr(memory, "ACTIVATIONS", {"dense": (0.0, 1)})
    monkeypatch.setattr(memory, "SCORE_BYTES", 0)
    needs = Needs(arch, Use(context, prefill_step=chunk), value_bytes=4)
    real = sum(c.nbytes for c in cache if hasattr(c, "max_size"))
    steady = 4 * footprint.cache_values(arch).windowed * arch.config["sliding_window"]
    assert needs.activations(context, 4) == real - steady


# ---- known models ----


def independent_count(c, biases, head_norms):
    """Parameters of a gated transformer, written down without the tensor table."""
    d, n, f = c["hidden_size"], c["num_hidden_layers"], c["intermediate_size"]
    head = c.get("head_dim", d // c["num_attention_heads"])
    q, kv = c["num_attention_heads"] * head, c["num_key_value_heads"] * head
    block = d * q + 2 * d * kv + q * d + 3 * d * f + 2 * d
    block += (q + 2 * kv if biases else 0) + (2 * head if head_norms else 0)
    return n * block + d + c["vocab_size"] * d * (1 if c["tie_word_embeddings"] else 2)


def test_parameters_and_bytes_of_known_models():
    known = [(QWEN25_32B, 1, 0, 32.76), (LLAMA31_8B, 0, 0, 8.03), (QWEN3_4B, 0, 1, 4.02)]
    for config, biases, norms, billions in known:
        total = footprint.parameters(describe(config))["total"]
        assert total == independent_count(config, biases, norms)
        assert round(total / 1e9, 2) == billions
    found = [footprint.weight_bytes(describe(QWEN3_4B), s) / 1e9 for s in (Q4, Q8, BF16)]
    assert found == pytest.approx([2.263, 4.274, 8.045], rel=1e-3)


def test_peak_of_measured_runs():
    """mlx-lm BENCHMARKS.md: Qwen3-4B, prompt 2048, 128 new tokens, M4 Max: peak GB."""
    measured = {(8, 64): 5.254, (6, 64): 4.25, (5, 32): 4.00, (5, 64): 3.86, (4, 32): 3.603, (4, 64): 3.35}
    for storage, peak in [(BF16, 9.02), *((footprint.packed(Packing(*p)), peak) for p, peak in measured.items())]:
        row = row_of(QWEN3_4B, storage, "m4-max-64gb", 2048 + 128)
        assert row["total_bytes"] / 1e9 == pytest.approx(peak, abs=0.07)


# ---- Macs ----


def test_macs_are_named_canonically_and_once():
    known = macs.every()
    assert len({m.name for m in known}) == len(known) > 80
    for mac in known:
        assert macs.find(mac.name) == mac
        assert mac.name == macs.mac_name(mac.chip, mac.gpu_cores, mac.memory_gb)
        assert len(mac.flags.split("/")) == 3
        assert mac.memory_gb >= 8 and mac.bandwidth_gb_s > 60
    assert {m.chip for m in known if m.tflops is None} == {"M6"}
    known.clear()
    assert macs.every()


def test_a_name_without_cores_is_the_largest_bin_of_that_memory():
    assert macs.find("m4-pro-24gb").name == "m4-pro-20c-24gb"
    assert macs.find("m4-24gb").name == "m4-10c-24gb"
    assert macs.find("m3-ultra-96gb").gpu_cores == 80
    assert macs.find("m4-max-36gb").bandwidth_gb_s == 410
    assert macs.find("Apple M4 Pro 16c 48GB").name == "m4-pro-16c-48gb"
    assert macs.find("m6-16gb").bandwidth_gb_s == 153 and macs.find("m6-24gb").bandwidth_gb_s == 170


def test_an_unknown_mac_is_a_usage_error_with_near_names():
    for name, near in [("m4-pro-96gb", "m4-pro-64gb"), ("m4pro-24gb", "m4-pro-24gb"), ("gpu", "m4-24gb")]:
        with pytest.raises(UsageError) as caught:
            macs.find(name)
        assert near in str(caught.value) and name in str(caught.value)


def test_budgets_are_the_measured_ones():
    """Megabytes (1e6) that Metal reported, on macOS 26 and before."""
    new = {"m4-16gb": 12713.12, "m5-max-48gb": 40200.90, "m1-max-64gb": 55662.78, "m4-max-128gb": 115448.72}
    old = {"m4-16gb": 11453.25, "m2-24gb": 17179.89, "m1-max-32gb": 22906.50, "m3-max-48gb": 38654.71}
    for macos, table in ((26, new), (15, old)):
        for mac, megabytes in table.items():
            assert macs.Budget(macos).of(macs.find(mac)) / 1e6 == pytest.approx(megabytes, rel=1e-5)
    for macos in (15, 26):
        found = sorted({(m.memory_gb, macs.Budget(macos).of(m)) for m in macs.every()})
        assert [b for _, b in found] == sorted(b for _, b in found)
        assert all(0.6 < budget / (memory * 2**30) < 0.91 for memory, budget in found)


def test_this_mac(monkeypatch):
    assert macs.here() is None or sys.platform == "darwin"
    here = machine.Machine("Darwin", "Apple M4 Pro", 24 * 2**30, 16, 20000 << 20, False)
    monkeypatch.setattr(sys, "platform", "darwin")
    monkeypatch.setattr(macs.platform, "mac_ver", lambda: ("15.5", ("", "", ""), "arm64"))
    monkeypatch.setattr(machine, "this_machine", lambda: here)
    mac = macs.here()
    assert (mac.name, mac.bandwidth_gb_s, macs.Budget().of(mac)) == ("m4-pro-16c-24gb", 273, 20000 << 20)
    here = dataclasses.replace(here, wired_limit_bytes=None)
    assert macs.Budget(26).of(macs.here()) == 24 * 2**30 * 2 // 3  # its own macOS is the older one
    here = dataclasses.replace(here, chip="Apple M9 Max", gpu_cores=50, memory_bytes=256 * 2**30)
    unknown = macs.here()
    assert (unknown.name, unknown.bandwidth_gb_s) == ("m9-max-50c-256gb", None)
    row = assessed(describe(QWEN3_4B), 10**9, unknown, 4096)
    assert row["fits"] and row["decode_tokens_per_s"] is None and row["prefill_tokens_per_s"] is None


# ---- verdicts ----

CONTRACT = [
    "mac", "chip", "memory_gb", "budget_bytes", "weights_bytes", "kv_bytes", "activation_bytes", "total_bytes", "fits",
    "headroom_bytes", "max_context", "decode_tokens_per_s", "prefill_tokens_per_s",
]  # fmt: skip


def test_rows_add_up():
    for config in (QWEN3_4B, QWEN25_32B, GEMMA3_4B, GEMMA3_27B):
        for row in rows_of(config, Q4, 16384):
            assert list(row) == list(planner.ROW) and list(row)[: len(CONTRACT)] == CONTRACT
            assert row["total_bytes"] == row["weights_bytes"] + row["kv_bytes"] + row["activation_bytes"]
            assert row["headroom_bytes"] == row["budget_bytes"] - row["total_bytes"]
            assert row["fits"] == (row["headroom_bytes"] >= 0) == (row["max_context"] >= 16384)
            assert (row["decode_tokens_per_s"] is not None) == row["fits"]
            assert json.loads(json.dumps(row)) == row


@pytest.mark.parametrize("model", [QWEN3_4B, QWEN25_32B, GEMMA3_4B, GEMMA3_27B], ids=["q4", "q32", "g4", "g27"])
def test_max_context_is_the_last_that_fits(model):
    arch = describe(model)
    weights = footprint.weight_bytes(arch, Q4)
    limit = model["max_position_embeddings"]
    for mac in macs.every():
        longest = assessed(arch, weights, mac, 1)["max_context"]
        assert longest % 256 == 0 and 0 <= longest <= limit
        if longest:
            assert assessed(arch, weights, mac, longest)["fits"]
        if longest < limit:
            assert not assessed(arch, weights, mac, longest + 256)["fits"]


def test_max_context_ends_where_the_model_does():
    arch = describe({**QWEN3_4B, "max_position_embeddings": 1000})
    assert assessed(arch, 10**9, macs.find("m4-24gb"), 512)["max_context"] == 1000
    with pytest.raises(UsageError):
        assessed(arch, 10**9, macs.find("m4-24gb"), 0)


def test_more_context_never_fits_better():
    contexts = (1, 255, 256, 257, 1024, 2048, 2049, 8192, 32768, 131072)
    for config in (QWEN3_4B, GEMMA3_4B, GEMMA3_27B):
        for before, after in pairwise(contexts):
            for a, b in zip(rows_of(config, Q4, before), rows_of(config, Q4, after), strict=True):
                assert a["headroom_bytes"] >= b["headroom_bytes"] and a["fits"] >= b["fits"]
                assert not b["fits"] or a["decode_tokens_per_s"] >= b["decode_tokens_per_s"]


def test_fewer_bytes_and_more_memory_never_fit_worse():
    for four, eight in zip(rows_of(QWEN25_32B, Q4), rows_of(QWEN25_32B, Q8), strict=True):
        assert four["fits"] >= eight["fits"] and four["max_context"] >= eight["max_context"]
    fits = [row_of(QWEN25_32B, Q4, f"m4-max-{gb}gb")["headroom_bytes"] for gb in (36, 48, 64, 128)]
    assert fits == sorted(fits) and fits[0] > 0
    assert not row_of(QWEN25_32B, Q4, "m4-24gb")["fits"]


def test_weights_that_can_be_read_at_a_speed():
    """decode the other way round; memory still bounds them, and a Mac of unknown bandwidth is asked in vain."""
    needs, mac = Needs(describe(QWEN3_8B), Use(4096)), macs.find("m4-24gb")
    for wanted in (10.0, 20.0, 40.0):
        most = planner.max_weight_bytes(needs, mac, tokens_per_s=wanted)
        assert 0 < most < planner.max_weight_bytes(needs, mac)
        assert speed.decode(needs, most, mac) == pytest.approx(wanted, rel=1e-6)
    assert planner.max_weight_bytes(needs, mac, tokens_per_s=1e-3) == planner.max_weight_bytes(needs, mac)
    assert planner.max_weight_bytes(needs, mac, tokens_per_s=1e6) == 0
    with pytest.raises(UsageError, match="bandwidth"):
        planner.max_weight_bytes(needs, dataclasses.replace(mac, bandwidth_gb_s=None), tokens_per_s=10)


def test_max_weight_bytes_is_the_edge_of_fits():
    arch, mac = describe(QWEN25_32B), macs.find("m4-24gb")
    most = planner.max_weight_bytes(Needs(arch), mac)
    assert assessed(arch, most, mac, 8192)["headroom_bytes"] == 0
    assert not assessed(arch, most + 1, mac, 8192)["fits"]
    assert planner.max_weight_bytes(Needs(arch, Use(32768)), macs.find("m1-8gb")) == 0


def test_unfused_scores_are_counted_where_mlx_has_no_kernel():
    """Head size 256 before M5: heads x chunk x context x 2 bytes; head size 128: none. The larger of them and of the
    other work counts."""
    old, new = macs.find("m4-24gb"), macs.find("m5-24gb")
    gemma = Needs(describe(GEMMA3_4B), Use(65536))
    scores = 8 * 2048 * 65536 * 2
    sliding = 8 * 2048 * (1024 - 1 + 2048) * 2  # an array as mask, which no kernel takes
    assert (gemma.scores(65536, 4), gemma.scores(65536, 5)) == (scores, sliding)
    overhang = gemma.cache.windowed * 2 * (2048 - 1)
    assert gemma.activations(65536, 4) == scores + overhang
    assert 0.6e9 < gemma.activations(65536, 5) - overhang < 0.8e9
    assert Needs(describe(QWEN3_4B)).activations(8192, old.generation) == 700_000_000
    wide = Needs(describe({**QWEN3_4B, "head_dim": 192}))
    assert wide.scores(8192, new.generation) > wide.scores(4096, new.generation) > 0


def test_decode_speed_of_measured_runs():
    """M4 Pro with 20 cores and 24 GB, MLX 4-bit, 300 new tokens (llmfit community benchmarks)."""
    for config, measured in ((QWEN3_8B, 49.42), (MISTRAL_7B, 51.61), (GEMMA3_27B, 14.11)):
        row = row_of(config, Q4, "m4-pro-20c-24gb", 300)
        assert row["decode_tokens_per_s"] == pytest.approx(measured, rel=0.06)


def test_only_untied_embeddings_are_not_read():
    arch, mac = describe(QWEN3_8B), macs.find("m4-pro-24gb")
    weights, needs = planner.stored(arch, Q4), Needs(arch, Use(300))
    table = Q4(next(arch.tensors()))
    assert weights.read_bytes == weights.nbytes - table
    tied = planner.stored(describe(QWEN3_4B), Q4)
    assert tied.read_bytes == tied.nbytes
    guessed = planner.weights_of(arch, weights.nbytes)
    assert guessed.read_bytes == pytest.approx(weights.read_bytes, rel=1e-3)
    speed_of = planner.assess(needs, weights, mac)["decode_tokens_per_s"]
    read = weights.read_bytes + 2 * footprint.cache_values(arch).growing * 300
    assert 1 / speed_of == pytest.approx(read / (0.9 * 273e9) + 36 * 95e-6)


def test_prefill_speed():
    assert row_of(QWEN3_4B, Q4, "m6-24gb")["prefill_tokens_per_s"] is None
    assert row_of(QWEN3_4B, Q4, "m6-24gb")["decode_tokens_per_s"] > 0
    row = row_of(QWEN3_4B, Q4, "m4-max-64gb", 2048)
    flops = 2 * footprint.parameters(describe(QWEN3_4B))["non_embedding"] + 4 * 36 * 32 * 128 * 1024
    assert row["prefill_tokens_per_s"] == pytest.approx(0.65 * 18.4e12 / flops)
    assert row_of(QWEN3_4B, Q4, "m5-max-64gb", 2048)["prefill_tokens_per_s"] > 2 * row["prefill_tokens_per_s"]


def test_planning_imports_nothing_heavy():
    script = f"""
import sys, time
from mlx_pare.arch import describe
from mlx_pare.model import footprint
from mlx_pare.capacity import macs, memory, planner, speed
from mlx_pare.capacity.memory import Needs, Use
from mlx_pare.tensors.packing import Packing
arch = describe({QWEN25_32B!r})
for bits in (4, 8):
    planner.fit(Needs(arch), planner.stored(arch, footprint.packed(Packing(bits, 64))), macs.every())
heavy = {{"mlx", "numpy", "gguf", "transformers", "pydantic", "rich", "mlx_lm"}} & set(sys.modules)
assert not heavy, heavy
assert time.process_time() < 0.5, time.process_time()
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_free_memory_on_a_mac_is_what_its_gpu_may_keep(monkeypatch):
    free = machine.available_bytes()
    for most, expected in ((1000, 1000), (10**15, free)):
        monkeypatch.setattr(machine, "_working_set", lambda most=most: most)
        assert machine.available_bytes() == pytest.approx(expected, rel=0.2)
