"""What only a Mac shows, seen by recorders and fakes: limits of the allocator, wired memory, rounded products, merges.

Messages and numbers are those of MLX's Metal backend; nothing here ran on a Mac.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import mlx_lm.tuner.trainer
import numpy as np
import pytest
from mlx_lm.tuner.dora import DoRALinear
from mlx_lm.tuner.lora import LoRALinear

from mlx_pare import lm
from mlx_pare.base import errors, machine
from mlx_pare.base.errors import Refused
from mlx_pare.lm import backend
from mlx_pare.model.checkpoint import Checkpoint
from mlx_pare.repair import output_projection
from mlx_pare.repair.least_squares import Problem
from mlx_pare.stream import memory
from mlx_pare.stream.walk import walk
from mlx_pare.text.corpus import Extent, Rows

WORKING_SET = 40_200_896_512  # of an M4 Pro with 48 GB
ROWS = Rows.full(np.random.default_rng(0).integers(0, 500, (2, 12)))


@pytest.fixture
def gpu(monkeypatch) -> None:
    """The way that the code takes on a GPU."""
    for module in (lm, backend):
        monkeypatch.setattr(module, "cpu_backend", lambda: False)


@pytest.fixture
def calls(monkeypatch) -> list[tuple]:
    """Every call of an allocator function of MLX; the limits are kept as MLX keeps them."""
    seen, now = [], {"set_cache_limit": 1 << 40, "set_wired_limit": 7 << 20, "set_memory_limit": 1 << 40}

    def recorded(name: str):
        def call(value: int = 0) -> int | None:
            seen.append((name, value))
            before = now.get(name)
            now[name] = value
            return before

        return call

    for name in (*now, "clear_cache"):
        monkeypatch.setattr(mx, name, recorded(name))
    return seen


# ---- memory ----


def test_the_cache_of_the_allocator_has_a_limit(gpu, calls, monkeypatch):
    monkeypatch.setattr(machine, "memory_bytes", lambda: 8 << 30)
    backend.prepare()
    monkeypatch.setattr(machine, "memory_bytes", lambda: 64 << 30)
    backend.prepare()
    assert calls == [("set_cache_limit", 512 << 20), ("set_cache_limit", 1 << 30)]


def test_the_cpu_backend_has_no_cache(calls):
    backend.prepare()
    backend.limit_memory(1 << 30)
    assert calls == [] and backend.cache_bytes() == 0


def test_a_cap_reaches_the_allocator(gpu, calls):
    lm.limit_memory(None)
    lm.limit_memory(3 << 30)
    assert calls == [("set_memory_limit", 3 << 30)]


def test_estimates_of_a_gpu_count_float32_and_the_cache(pico_models, monkeypatch):
    """The walk computes in float32 there too, whatever the model stores."""
    rows = Extent(64, 64)
    monkeypatch.setattr(memory.head, "CHUNK_BYTES", 0)  # else the head takes more than a block
    for dtype in (mx.float32, mx.bfloat16, mx.float16):
        checkpoint = Checkpoint(pico_models("llama", dtype=dtype))
        here = memory.required_bytes(checkpoint, rows)
        with monkeypatch.context() as patch:
            for module in (lm, backend):
                patch.setattr(module, "cpu_backend", lambda: False)
            there = memory.required_bytes(checkpoint, rows) - lm.cache_bytes()
            assert memory.resident_width(checkpoint) == checkpoint.value_bytes
        expanded = 4 * sum(t.size for t in checkpoint.arch.tensors() if t.layer == 0)
        assert here - there == (expanded if dtype == mx.float32 else 0)  # what is float32 already is not expanded


@pytest.mark.parametrize("stored", [{"dtype": mx.bfloat16}, {"packed": (4, 32), "dtype": mx.bfloat16}])
def test_a_walk_computes_in_float32_on_a_gpu(pico_models, monkeypatch, stored):
    """Its states are float32 from the embedding to the norm, and as near to the CPU's as rounding allows."""
    model = pico_models("llama", **stored)
    there = np.array(walk(model, ROWS, what=None).all_logits(slice(None)))
    for module in (lm, backend):
        monkeypatch.setattr(module, "cpu_backend", lambda: False)
    found = walk(model, ROWS, what=None)
    here = np.array(found.all_logits(slice(None)))
    assert found.hidden.dtype == mx.float32
    assert np.abs(here - there).max() < 1e-4 * np.abs(there).max()


def test_nothing_is_cached_while_lapack_works(calls, monkeypatch, pico_models):
    site = output_projection.Site(nn.Linear(16, 8))
    site.remembering = True
    site(mx.random.normal((2, 30, 16)))
    made = site.problem(None, np.ones((2, 30), bool))[0]
    assert isinstance(made, Problem) and calls == [("clear_cache", 0)]


class Quadratic(nn.Module):
    def __init__(self):
        super().__init__()
        self.w = mx.ones(3)


def trained(fails: bool = False) -> None:
    from mlx.optimizers import SGD

    def loss(model, x):
        if fails:
            raise RuntimeError("[METAL] Command buffer execution failed")
        return mx.square(model.w - x).sum(), mx.array(1)

    def batches():
        while True:
            yield (mx.zeros(3),)

    lm.train(Quadratic(), SGD(0.1), loss, batches, 2, 1, 1, lambda _: None)


@pytest.mark.parametrize("fails", [False, True])
def test_training_gives_the_wired_limit_back(calls, monkeypatch, fails):
    monkeypatch.setattr(mx, "device_info", lambda: {"max_recommended_working_set_size": WORKING_SET})
    monkeypatch.setattr(mx.metal, "is_available", lambda: True)
    if fails:
        with pytest.raises(RuntimeError):
            trained(fails)
    else:
        trained()
    wired = [value for name, value in calls if name == "set_wired_limit"]
    assert wired[-1] == 7 << 20 and (fails or WORKING_SET in wired)


def test_without_metal_no_wired_limit_is_touched(calls):
    trained()
    assert not [name for name, _ in calls if name == "set_wired_limit"]


def test_the_cache_is_not_cleared_at_every_step(gpu, monkeypatch):
    seen = {}
    monkeypatch.setattr(mlx_lm.tuner.trainer, "train", lambda *_, args, **__: seen.update(vars(args)))
    trained()
    assert seen["clear_cache_threshold"] == lm.cache_bytes() > 0


# ---- numbers ----


def test_products_are_exact_here_and_refused_if_they_are_not(monkeypatch):
    assert backend.product_error() < 1e-6
    backend.require_exact_products.cache_clear()
    real = mx.array

    def of_ten_bits(values, *more):
        rounded = np.frombuffer((np.asarray(values, np.float32).view(np.uint32) & 0xFFFFE000).tobytes(), np.float32)
        return real(rounded.reshape(values.shape), *more)

    with monkeypatch.context() as patch:
        patch.setattr(backend.mx, "array", of_ten_bits)
        with pytest.raises(Refused, match=r"TF32.*MLX_ENABLE_TF32=0"):
            backend.require_exact_products()
    backend.require_exact_products()


@pytest.mark.parametrize("kind", [LoRALinear, DoRALinear])
@pytest.mark.parametrize("stored", ["bfloat16", "8 bits"])
def test_adapters_are_merged_in_float32(kind, stored):
    """mlx-lm's own merge adds in bfloat16: 0.4 % of every weight is lost."""
    linear = nn.Linear(64, 32, bias=False)
    linear.weight = linear.weight.astype(mx.bfloat16)
    if stored == "8 bits":
        linear = nn.QuantizedLinear.from_linear(linear, 32, 8)
    module = kind.from_base(linear, r=4, scale=10.0)
    module.lora_b = 1e-3 * mx.random.normal(module.lora_b.shape)
    if stored == "8 bits":
        parts = (
            np.array(x.astype(mx.float32)).astype(np.float64).repeat(32, 1) for x in (linear.scales, linear.biases)
        )
        codes = np.array(linear.weight).view(np.uint8).astype(np.float64)
        scales, biases = parts
        dense = scales * codes + biases
    else:
        dense = np.array(linear.weight.astype(mx.float32)).astype(np.float64)
    a, b = (np.array(x).astype(np.float64) for x in (module.lora_a, module.lora_b))
    wanted = dense + 10.0 * (a @ b).T
    if kind is DoRALinear:
        wanted *= (np.array(module.m).astype(np.float64) / np.linalg.norm(wanted, axis=1))[:, None]
    found = lm.fused(module)
    assert found.dtype == mx.float32
    assert np.linalg.norm(np.array(found) - wanted) < 1e-6 * np.linalg.norm(wanted)


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "granite"])
def test_logits_come_from_a_head_in_float32(pico_models, family):
    model = lm.load(pico_models(family, dtype=mx.bfloat16))
    found, states = lm.logits(model, mx.array(ROWS.tokens)), lm.body(model)(mx.array(ROWS.tokens))
    weight = np.array(lm.head(model).weight.astype(mx.float32)).astype(np.float64)
    factor = lm.logit_shape(model).factor
    wanted = factor * np.array(states.astype(mx.float32)).astype(np.float64) @ weight.T
    assert found.dtype == mx.float32 and np.abs(np.array(found) - wanted).max() < 1e-5 * np.abs(wanted).max()


# ---- errors of the GPU, files ----

OF_METAL = {
    "[METAL] Command buffer execution failed: Insufficient Memory "
    "(00000008:kIOGPUCommandBufferCallbackErrorOutOfMemory)":
        "ran out of memory",
    "[metal::malloc] Attempting to allocate 17179869184 bytes which is greater than the maximum allowed buffer size of "
    "9534832640 bytes.": "ran out of memory",
    "[METAL] Command buffer execution failed: Caused GPU Timeout Error": "took too long",
    "[METAL] Command buffer execution failed: Impacting Interactivity (0000000e)": "took too long",
    "[METAL] Command buffer execution failed: Internal Error": "the GPU failed",
}  # fmt: skip


@pytest.mark.parametrize("message", OF_METAL, ids=lambda text: text[-24:])
def test_an_error_of_the_gpu_is_no_internal_error(message):
    line, code = errors.told(RuntimeError(message))
    assert OF_METAL[message] in line and "the same command continues" in line and code == 1
    assert "internal error" not in line and "\n" not in line
    assert "internal error" in errors.told(RuntimeError("of ours"))[0]


SEVENTY_LAYERS = """
import resource, sys
from pathlib import Path
resource.setrlimit(resource.RLIMIT_NOFILE, (60, 4096))
import numpy as np
from mlx_pare.scoring.calibrate import calibrate
from mlx_pare.text.corpus import Rows
print(calibrate(Path(sys.argv[1]), Rows.full(np.arange(16).reshape(2, 8)), Path(sys.argv[2])))
"""


def test_sixty_open_files_are_enough_for_seventy_layers(pico_models, tmp_path):
    model = pico_models("llama", num_hidden_layers=70)
    done = subprocess.run(
        [sys.executable, "-c", SEVENTY_LAYERS, str(model), str(tmp_path / "stats")], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert Path(done.stdout.strip()).is_file()
