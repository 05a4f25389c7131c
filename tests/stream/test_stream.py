"""The streamed forward equals the stock one of the whole model and a float64 reference, one block in memory at once."""

from __future__ import annotations

import gc
import weakref
from pathlib import Path

import mlx.core as mx
import numpy as np
import pico
import pytest
import reference

from mlx_pare import lm
from mlx_pare.base.errors import PareError, Refused
from mlx_pare.model.checkpoint import Checkpoint
from mlx_pare.model.weights import StoredEmbedding
from mlx_pare.planning import try_candidates
from mlx_pare.recovery import blockwise, on_policy, teacher
from mlx_pare.recovery.block_trainer import Options
from mlx_pare.repair.reconstruct import held_bytes as pair_bytes
from mlx_pare.scoring import gradients
from mlx_pare.stream import batches, head, memory, spool, walk as stream
from mlx_pare.stream.prefetch import read_ahead
from mlx_pare.stream.spool import Spool
from mlx_pare.tensors import float32_layers
from mlx_pare.text.corpus import Rows

FORMATS = {
    "float32": {},
    "bfloat16": {"dtype": mx.bfloat16},
    "4 bits": {"packed": (4, 32)},
    "8 bits": {"packed": (8, 64), "dtype": mx.bfloat16},
}
SEED_OSS = {
    "model_type": "seed_oss",
    "architectures": ["SeedOssForCausalLM"],
    "head_dim": 8,
    "attention_bias": True,
    "attention_out_bias": False,
    "mlp_bias": False,
}
SLIDING = {"layer_types": ["full_attention", "sliding_attention"] * 2, "sliding_window": 8}


def rows(count: int, length: int, seed: int = 0) -> Rows:
    return Rows.full(np.random.default_rng(seed).integers(0, 500, (count, length)))


def streamed(model, data: Rows, **options) -> np.ndarray:
    return np.array(stream.walk(model, data, **options).all_logits(slice(None)))


def stock(model, data: Rows) -> np.ndarray:
    return np.array(lm.load_stock(model)(mx.array(data.tokens)).astype(mx.float32))


def exact(model, data: Rows) -> np.ndarray:
    return reference.forward(*reference.load(model), data.tokens)[0]


def check(model, data: Rows) -> None:
    """Against numpy on every device, and on the CPU backend against the stock model, which is float32 there too."""
    found = streamed(model, data)
    np.testing.assert_allclose(found, exact(model, data), rtol=0, atol=1e-4)
    if lm.cpu_backend():
        np.testing.assert_allclose(found, stock(model, data), rtol=0, atol=1e-4)


@pytest.mark.parametrize("stored", FORMATS)
@pytest.mark.parametrize("family", [*pico.FAMILIES, *pico.MORE])
def test_logits(pico_models, family, stored):
    check(pico_models(family, **FORMATS[stored]), rows(3, 20))


@pytest.mark.parametrize("family", [*pico.FAMILIES, *pico.MORE])
def test_dense_is_the_stock_forward(pico_models, family):
    model, data = pico_models(family), rows(3, 20)
    with lm.swift():  # or its rounding is another one: see test_cpu_math.py
        np.testing.assert_allclose(streamed(model, data), stock(model, data), rtol=0, atol=1e-5)


def test_family_that_reads_the_embedding_itself_as_head(pico_models):
    """Stock seed_oss multiplies by embed_tokens.weight; pruned qwen2 models leave as this family."""
    check(pico_models("qwen2", **SEED_OSS), rows(3, 20))


@pytest.mark.parametrize("stored", ["float32", "4 bits"])
def test_llama_with_sliding_layers(pico_models, stored):
    check(pico_models("llama", **FORMATS[stored], **SLIDING), rows(3, 20))


@pytest.mark.parametrize("family", ["gemma3_text", "llama"])
@pytest.mark.parametrize("micro_batch", [24, 120, 10_000])
def test_as_many_rows_as_tokens(pico_models, monkeypatch, family, micro_batch):
    """Then the mask [tokens, tokens] looks like a batch."""
    monkeypatch.setattr(batches, "MICRO_BATCH_TOKENS", micro_batch)
    changes = SLIDING if family == "llama" else {}
    check(pico_models(family, **changes), rows(24, 24))


@pytest.mark.parametrize("family", pico.FAMILIES)
@pytest.mark.parametrize("micro_batch", [1, 40])
def test_micro_batches(pico_models, monkeypatch, family, micro_batch):
    """One row at a time, and two with a rest."""
    model, data = pico_models(family), rows(5, 20)
    whole = streamed(model, data)
    monkeypatch.setattr(batches, "MICRO_BATCH_TOKENS", micro_batch)
    np.testing.assert_allclose(streamed(model, data), whole, rtol=0, atol=5e-5)  # of logits up to 60


def test_pieces_of_tuples_are_joined():
    """Blocks may answer (hidden, something shared, something without rows)."""
    a, b = mx.ones((2, 3, 4)), mx.zeros((1, 3, 4))
    hidden, shared, nothing = spool.join([(a, a + 1, None), (b, b + 1, None)])
    assert hidden.shape == (3, 3, 4) and nothing is None
    assert np.array_equal(np.array(shared), np.concatenate([np.array(a), np.array(b)]) + 1)


def test_padding_does_not_reach_the_text(pico_models):
    model, lengths = pico_models("gemma3_text"), np.array([20, 9, 1, 13], dtype=np.int32)
    a, b = rows(4, 20, 1), rows(4, 20, 2)
    mask = Rows(a.tokens, lengths).mask()
    mixed = Rows(np.where(mask, a.tokens, b.tokens), lengths)
    np.testing.assert_allclose(streamed(model, mixed)[mask], streamed(model, a)[mask], rtol=0, atol=1e-5)


# ---- one block at a time ----


class Watcher:
    """An observer that keeps weak references to blocks, and what was alive whenever a new one came in."""

    def __init__(self):
        self.blocks, self.alive, self.active, self.hidden = [], [], [], {}

    def enter(self, index, block, mask):
        gc.collect()
        self.alive.append(sum(ref() is not None for ref in self.blocks))
        self.blocks.append(weakref.ref(block))

    def seen(self, index, before, after, mask):
        pass

    def pending(self):
        return []

    def leave(self, index, hidden):
        self.hidden[index] = hidden
        gc.collect()
        self.active.append(mx.get_active_memory())


def test_blocks_are_dropped_behind_the_walk(pico_models):
    watcher = Watcher()
    stream.walk(pico_models("llama", num_hidden_layers=8), rows(2, 8), watcher)
    assert watcher.alive == [0] * 8


@pytest.mark.parametrize("packed", [None, (4, 32)])
def test_memory_does_not_grow_with_depth(pico_models, packed):
    """The hidden states that the watcher itself keeps are all that may be added."""
    model, watcher = pico_models("llama", packed, num_hidden_layers=8), Watcher()
    stream.walk(model, rows(1, 4), watcher)
    block = (Checkpoint(model).nbytes() - 512 * 64 * 4) / 8
    assert watcher.active[-1] - watcher.active[0] < 0.5 * block


@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
def test_resumed_walk_is_the_same_walk(pico_models, family):
    model, data, watcher = pico_models(family), rows(3, 20), Watcher()
    whole = streamed(model, data, observer=watcher)
    for start in range(1, len(watcher.hidden)):
        again = Watcher()
        found = streamed(model, data, observer=again, resume=stream.Resume(start, watcher.hidden[start - 1]))
        assert np.array_equal(found, whole)
        assert sorted(again.hidden) == list(range(start, len(watcher.hidden)))


# ---- the head ----


@pytest.mark.parametrize("family", ["llama", "llama-untied", "gemma3_text"])
@pytest.mark.parametrize("packed", [None, (4, 32)])
def test_head_in_chunks(pico_models, monkeypatch, family, packed):
    end = stream.walk(pico_models(family, packed), rows(3, 20))
    whole = np.array(end.all_logits(slice(None)))
    monkeypatch.setattr(head, "CHUNK_BYTES", 4 * 64 * 7)  # seven rows of the head, and a rest
    starts, parts = zip(*end.logits(end.hidden), strict=True)
    assert list(starts) == list(range(0, end.vocab, 7)) and len(starts) == 74
    np.testing.assert_allclose(np.concatenate(parts, axis=-1), whole, rtol=0, atol=5e-5)
    np.testing.assert_allclose(np.array(end.all_logits(mx.array([2]))), whole[2:], rtol=0, atol=5e-5)


# ---- memory ----


def test_refuses_what_does_not_fit(pico_models):
    checkpoint, data = Checkpoint(pico_models("llama")), rows(100, 64)
    with pytest.raises(Refused, match="--memory-cap allows") as found:
        memory.check_memory(checkpoint, data, 1000)
    assert found.value.exit_code == 3 and "--samples" in found.value.cure


def test_estimate_grows_with_the_rows_and_is_returned(pico_models):
    checkpoint, hidden = Checkpoint(pico_models("llama")), 64
    value = 4  # a float32 model, on any device
    small, large = (memory.check_memory(checkpoint, rows(n, 64), 1 << 40) for n in (100, 200))
    assert large - small == 3 * 100 * 64 * hidden * value
    memory.check_memory(checkpoint, rows(100, 64), small)
    with pytest.raises(Refused):
        memory.check_memory(checkpoint, rows(100, 64), small - 1)


@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16])
def test_fault_4_states_are_as_wide_as_they_are(pico_models, monkeypatch, dtype):
    """Off the CPU backend every checkpoint streams in float32 too: every estimate counts with that."""
    monkeypatch.setattr(lm, "cpu_backend", lambda: False)
    checkpoint, few, many = Checkpoint(pico_models("llama", dtype=dtype)), rows(4, 256), rows(104, 256)
    states = 100 * 256 * 64 * 4  # of the rows that are more; a micro-batch has four

    def grown(estimate) -> float:
        return (estimate(many) - estimate(few)) / states

    assert grown(lambda data: memory.required_bytes(checkpoint, data)) == 3
    assert grown(lambda data: pair_bytes(checkpoint, data)) == 3 + (128 + 64) / 64
    assert grown(lambda data: gradients.held_bytes(checkpoint, data)) == 4 + 3
    assert grown(lambda data: blockwise.check_memory(checkpoint, checkpoint, data, Options(batch=4), 1 << 40)) == 3 + 1
    assert grown(lambda data: teacher.held_bytes(checkpoint, data, 1)) == 2
    assert grown(lambda data: try_candidates.check_memory(checkpoint, data, few, 1, 1 << 40)) == 3 + (128 + 64) / 64
    assert grown(lambda data: on_policy.work_bytes(checkpoint, checkpoint, data, 1)) == 3


def test_free_memory_is_the_cap_when_none_is_given(pico_models, monkeypatch):
    monkeypatch.setattr(memory.machine, "available_bytes", lambda: 1000)
    with pytest.raises(Refused, match="free are"):
        memory.check_memory(Checkpoint(pico_models("llama")), rows(4, 8), None)


# ---- hidden states on disk ----


@pytest.mark.parametrize("family", pico.FAMILIES)
@pytest.mark.parametrize("micro_batch", [40, 10_000])
def test_spooled_is_the_same(pico_models, tmp_path, monkeypatch, family, micro_batch):
    """Bit for bit, and after every block there is one file."""
    monkeypatch.setattr(batches, "MICRO_BATCH_TOKENS", micro_batch)
    model, data, kept = pico_models(family, dtype=mx.bfloat16), rows(5, 20), []
    inside, ondisk = Watcher(), Watcher()
    whole = streamed(model, data, observer=inside)
    ondisk.leave = lambda index, hidden: kept.append((np.array(hidden[:]), sorted(tmp_path.iterdir())))
    found = stream.walk(model, data, ondisk, spool=tmp_path)
    assert np.array_equal(np.array(found.all_logits(slice(None))), whole)
    assert np.array_equal(np.array(found.hidden[2, :-1]), np.array(found.hidden[1:3])[1, :-1])
    for index, (states, files) in enumerate(kept):
        assert np.array_equal(states, np.array(inside.hidden[index]))
        assert [f.name for f in files] == [f"hidden-{n:04d}.safetensors" for n in (index, index + 1)]


def test_spooled_goes_on(pico_models, tmp_path):
    """From a file that a walk in memory could have left as well."""
    model, data, watcher = pico_models("llama"), rows(5, 20), Watcher()
    whole = streamed(model, data, observer=watcher)
    mx.save_safetensors(str(tmp_path / "hidden-0002.safetensors"), {"hidden": watcher.hidden[1]})
    later = stream.Resume(2, Spool(tmp_path / "hidden-0002.safetensors"))
    found = stream.walk(model, data, resume=later, spool=tmp_path)
    assert np.array_equal(np.array(found.all_logits(slice(None))), whole)


def test_what_cannot_be_spooled_is_refused(pico_models, tmp_path, monkeypatch):
    """A model that scales states between two blocks."""
    inner = lm.body(lm.load(pico_models("llama"))).__class__
    plain = inner.__call__

    def scaling(self, inputs, cache=None):
        first, rest = self.layers[0], self.layers[1:]
        hidden = first(self.embed_tokens(inputs), "causal", None) * 2
        for layer in rest:
            hidden = layer(hidden, "causal", None)
        return self.norm(hidden)

    monkeypatch.setattr(inner, "__call__", scaling)
    with pytest.raises(PareError, match="before block 1 the model changes hidden states"):
        stream.walk(pico_models("llama"), rows(2, 8), spool=tmp_path)
    monkeypatch.setattr(inner, "__call__", plain)
    stream.walk(pico_models("llama"), rows(2, 8), spool=tmp_path)


def test_when_to_spool(pico_models, monkeypatch):
    """In memory where that fits, on disk where that does, refused where nothing does."""
    checkpoint, data = Checkpoint(pico_models("llama")), rows(200, 256)
    inside, ondisk = (memory.required_bytes(checkpoint, data, spooled) for spooled in (False, True))
    assert inside - ondisk == 3 * 196 * 256 * 64 * 4
    assert not memory.must_spool(checkpoint, data, inside)
    assert memory.must_spool(checkpoint, data, inside - 1) and memory.must_spool(checkpoint, data, inside, 1)
    assert memory.must_spool(checkpoint, data, ondisk) and memory.must_spool(checkpoint, data, ondisk, 0, 10**9)
    with pytest.raises(Refused, match="--memory-cap allows"):
        memory.must_spool(checkpoint, data, ondisk, 1)
    monkeypatch.setattr(memory.machine, "available_bytes", lambda: inside)
    assert not memory.must_spool(checkpoint, data, None)


# ---- what is read ----


@pytest.mark.parametrize("stored", FORMATS)
def test_embedding_is_looked_up_in_the_file(pico_models, stored):
    """The same rows as numpy reads them, and the stock module of the CPU backend."""
    path = pico_models("llama", **FORMATS[stored])
    data, name = rows(3, 7), next(Checkpoint(path).arch.tensors()).name
    found = np.array(StoredEmbedding(Checkpoint(path), name, mx.float32)(mx.array(data.tokens)))
    np.testing.assert_allclose(found, reference.load(path)[1][name][data.tokens], rtol=0, atol=1e-6)
    if lm.cpu_backend():
        expected = lm.for_backend(lm.embedding(lm.load(path)))(mx.array(data.tokens))
        np.testing.assert_allclose(found, np.array(expected), rtol=0, atol=1e-6)


def test_large_matrices_are_expanded_in_parts(pico_models, monkeypatch):
    """Parts of 5 rows of 64 columns; the last one is smaller."""
    model, data = pico_models("llama", packed=(4, 32)), rows(3, 20)
    whole = streamed(model, data)
    monkeypatch.setattr(float32_layers, "EXPANDED_BYTES", 4 * 64 * 5)
    np.testing.assert_allclose(streamed(model, data), whole, rtol=0, atol=1e-4)


def test_reading_ahead(pico_models, monkeypatch):
    """Every byte of the next block, by a thread that ends with the walk, also when that is broken off."""
    checkpoint, seen = Checkpoint(pico_models("llama")), []
    with read_ahead(checkpoint) as ahead:
        ahead(2).result()
        ahead(99).result()  # behind the last block there is none
        monkeypatch.setattr(Path, "open", lambda *a, **k: seen.append(a) or (_ for _ in ()).throw(OSError("gone")))
        assert isinstance(ahead(1).exception(), OSError)  # and an error is left to the walk itself
    assert seen
    monkeypatch.undo()
    with pytest.raises(ZeroDivisionError), read_ahead(checkpoint) as ahead:
        pending = ahead(0)
        raise ZeroDivisionError
    assert pending.done()
