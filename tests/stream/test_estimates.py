"""Estimates of memory off the CPU backend: walks are float32, a resident model has its own dtype (house fault 4)."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest

from mlx_pare import lm
from mlx_pare.model.checkpoint import Checkpoint
from mlx_pare.planning import try_candidates
from mlx_pare.recovery import blockwise, on_policy, options as recover_options, teacher
from mlx_pare.recovery.block_trainer import Options as BlockOptions
from mlx_pare.recovery.options import Options
from mlx_pare.repair.reconstruct import held_bytes as reconstruct_bytes
from mlx_pare.scoring import gradients
from mlx_pare.stream import memory
from mlx_pare.text.corpus import Rows

MANY = 1 << 50


def rows(count: int, length: int = 64) -> Rows:
    return Rows.full(np.zeros((count, length), np.int32))


ESTIMATES = {
    "a walk": lambda c, r: memory.required_bytes(c, r),
    "reconstruct": reconstruct_bytes,
    "gradients": gradients.held_bytes,
    "the teacher's states": lambda c, r: teacher.held_bytes(c, r, 0),
    "block by block": lambda c, r: blockwise.check_memory(c, c, r, BlockOptions("lora", 1, 1), MANY),
    "trials": lambda c, r: try_candidates.check_memory(c, r, rows(1), 1, MANY),
    "candidates side by side": lambda c, r: try_candidates.check_memory(c, rows(1), r, 4, MANY),
    "sampling": lambda c, r: on_policy.work_bytes(c, c, r, r.count),
    "recovery": lambda c, r: recover_options.required_bytes(c, c, rows(1), rows(1), Options(batch=r.count)),
}  # fmt: skip


RESIDENT = ("sampling", "recovery")


@pytest.mark.parametrize("what", ESTIMATES)
def test_house_4_estimates_count_what_a_gpu_computes_in(pico_models, monkeypatch, what):
    """2 bytes per number were assumed for all. A walk takes 4, whatever is stored; a resident model its own dtype."""
    monkeypatch.setattr(lm, "cpu_backend", lambda: False)
    wide, narrow = (Checkpoint(pico_models("llama", dtype=dtype)) for dtype in (mx.float32, mx.bfloat16))
    estimate = ESTIMATES[what]
    grows = [estimate(model, rows(4096)) - estimate(model, rows(2048)) for model in (wide, narrow)]
    assert grows[1] > 0
    assert 1.4 * grows[1] < grows[0] if what in RESIDENT else grows[0] == grows[1]


@pytest.mark.parametrize("family", ["llama", "llama-untied", "gemma3_text"])
@pytest.mark.parametrize("packed", [None, (4, 32)])
def test_house_15_the_head_is_counted_once_as_it_is_stored(pico_models, family, packed):
    checkpoint = Checkpoint(pico_models(family, packed))
    name = "model.embed_tokens" if checkpoint.arch.tied else "lm_head"
    stored = [e.nbytes for n, e in checkpoint.entries.items() if n.rpartition(".")[0] == name]
    assert stored and memory.head_bytes(checkpoint) == sum(stored)
    none = teacher.held_bytes(checkpoint, rows(1), 0, whole=False)
    assert teacher.held_bytes(checkpoint, rows(1), 0) - none - 64 * 64 * memory.STATE_BYTES == sum(stored)
