"""A teacher's targets on disk: against float64, killed and continued to the same bytes, damaged, over budget."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
import reference
import reference_targets

from mlx_pare import lm
from mlx_pare.base.errors import PareError, Refused, UsageError
from mlx_pare.evaluation.divergence import between_top, kl
from mlx_pare.model.checkpoint import Checkpoint
from mlx_pare.recovery import topk_targets
from mlx_pare.recovery.target_records import Top, largest, pack, record, unpack
from mlx_pare.recovery.topk_targets import Targets, collect
from mlx_pare.stream import batches, head, memory, walk as stream
from mlx_pare.text.corpus import Rows

EXACT = 2e-4 if lm.cpu_backend() else 0.1  # of log-probabilities, before they are rounded
HALF = 2.0**-11  # relative error of float16


def rows(count: int = 9, length: int = 12, seed: int = 0, padded: bool = True) -> Rows:
    rng = np.random.default_rng(seed)
    data = Rows.full(rng.integers(0, 500, (count, length)))
    return Rows(data.tokens, rng.integers(1, length + 1, count).astype(np.int32)) if padded else data


@pytest.fixture(autouse=True)
def small_parts(monkeypatch):
    """Nine rows are five parts, each a micro-batch of two rows, the last of one; heads see seven tokens at a time."""
    monkeypatch.setattr(batches, "MICRO_BATCH_TOKENS", 24)
    monkeypatch.setattr(topk_targets, "PART_TOKENS", 24)
    monkeypatch.setattr(topk_targets, "TOKENS_AT_ONCE", 7)


def exact(model: Path, data: Rows, temperature: float = 1.0) -> np.ndarray:
    return reference.forward(*reference.load(model), data.tokens)[0] / temperature


def contents(directory: Path) -> dict[str, bytes]:
    return {f.name: f.read_bytes() for f in sorted(directory.iterdir())}


# ---- the numbers ----


@pytest.mark.parametrize("packed", [None, (4, 32)])
@pytest.mark.parametrize(("k", "temperature", "chunk"), [(8, 1.0, 512), (64, 2.0, 100), (33, 1.0, 7), (511, 1.0, 100)])
def test_against_float64(pico_models, tmp_path, monkeypatch, packed, k, temperature, chunk):
    monkeypatch.setattr(head, "CHUNK_BYTES", 4 * 64 * chunk)  # so many rows of the head
    model, data = pico_models("llama", packed), rows()
    found = collect(model, data, tmp_path / "t", k, temperature)
    order = np.array([8, 0, 3, 3, 1, 6])
    ids, log_p, log_tail = found.batch(order)
    assert (ids.dtype, log_p.dtype, log_tail.dtype) == (np.int32, np.float32, np.float32)
    assert ids.shape == log_p.shape == (6, 12, k) and log_tail.shape == (6, 12)
    logits, valid = exact(model, data, temperature)[order], data.mask()[order]
    _, wanted, tail = reference_targets.top(logits, k)
    of_ids = np.take_along_axis(reference.log_softmax(logits), ids, -1)
    rounding = 2 * HALF * np.abs(wanted) + EXACT + 2e-3  # the last for what all are divided by
    assert (np.abs(log_p - wanted) < rounding)[valid].all(), "the k largest, in their order"
    assert (np.abs(log_p - of_ids) < rounding)[valid].all(), "and each with its own id"
    assert (np.diff(np.sort(ids, axis=-1), axis=-1) > 0)[valid].all()
    np.testing.assert_allclose(log_tail[valid], tail[valid], rtol=0, atol=2e-3 + EXACT)
    np.testing.assert_allclose(np.exp(log_p).sum(-1) + np.exp(log_tail), 1, atol=1e-6)


def test_tail_is_stored_to_seven_digits(pico_models, tmp_path):
    """What is divided out on reading is not lost on disk."""
    model, data = pico_models("llama"), rows(4, 12, padded=False)
    found = collect(model, data, tmp_path / "t", 64)
    stored = np.concatenate([np.fromfile(f, found.record, found.tokens_of(i)) for i, f in enumerate(files(tmp_path))])
    tail = reference_targets.top(exact(model, data), 64)[2]
    np.testing.assert_allclose(stored["log_tail"], tail.reshape(-1), rtol=0, atol=EXACT)


def files(directory: Path) -> list[Path]:
    return sorted((directory / "t").glob("part-*.bin"))


@pytest.mark.parametrize("kind", ["forward", "reverse", "js"])
def test_student_who_is_the_teacher_has_no_loss_and_another_has_less_than_full(pico_models, tmp_path, kind):
    model, data = pico_models("llama"), rows(4, padded=False)
    found = collect(model, data, tmp_path / "t", 16)
    ids, log_p, log_tail = map(mx.array, found.batch(range(4)))
    itself = stream.walk(model, data).all_logits(slice(None))
    assert -1e-6 < float(between_top(kind, ids, log_p, log_tail, itself).max()) < 1e-4
    if kind == "forward":
        other = stream.walk(pico_models("llama", (4, 32)), data).all_logits(slice(None))
        top, full = between_top(kind, ids, log_p, log_tail, other), kl(itself, other)
        assert float((top - full).max()) < 1e-3 and float(top.mean()) > 0.2 * float(full.mean())


def test_all_but_one_token_are_the_full_vocabulary(pico_models, tmp_path):
    teacher, data = pico_models("llama"), rows(4, padded=False)
    other = stream.walk(pico_models("llama", (4, 32)), data).all_logits(slice(None))
    full = np.array(kl(stream.walk(teacher, data).all_logits(slice(None)), other))
    for k in (511, 512):
        ids, log_p, log_tail = map(mx.array, collect(teacher, data, tmp_path / str(k), k).batch(range(4)))
        found = np.array(between_top("forward", ids, log_p, log_tail, other))
        np.testing.assert_allclose(found, full, rtol=0.01, atol=1e-3)  # float16 is all there is between them
    assert np.isneginf(np.array(log_tail)).all()


# ---- synthetic logits ----


@pytest.mark.parametrize(("many", "k"), [(512, 64), (70, 64), (64, 64), (5, 1), (4096, 64), (1187, 3), (999, 20)])
def test_largest(many, k):
    rng = np.random.default_rng(many)
    for x in (rng.normal(size=(20, many)), rng.integers(0, 9, (20, many)), np.zeros((2, many)), -np.arange(many)[None]):
        index = np.array(largest(mx.array(x.astype(np.float32)), k))
        assert all(len(set(row)) == k for row in index.tolist())
        found = -np.sort(-np.take_along_axis(x, index.astype(np.int64), -1), axis=-1)
        assert np.array_equal(found, -np.sort(-x, axis=-1)[:, :k])


@pytest.mark.parametrize(("vocab", "most"), [(512, 260), (65536, 260), (151936, 292), (262144, 292), (1 << 20, 292)])
def test_bytes_and_values_at_any_vocabulary(vocab, most):
    """The largest ids come back too, the tail is exact where it is e^-40, and a token takes less than 300 bytes."""
    tokens, k = (3, 64) if vocab < 1 << 20 else (1, 64)
    logits = np.random.default_rng(1).normal(size=(tokens, vocab)).astype(np.float32)
    high = np.stack([np.random.default_rng(i).permutation(vocab)[: k - 2] for i in range(tokens)])
    np.put_along_axis(logits, high, np.linspace(50, 60, k - 2, dtype=np.float32)[None], axis=-1)
    logits[:, [vocab - 1, vocab - 2]] = 55.5
    top = Top(k)
    for start in range(0, vocab, 50_000):
        top.update(start, mx.array(logits[:, start : start + 50_000]))
    ids, log_p, log_tail = top.found()
    _, wanted, tail = reference_targets.top(logits.astype(np.float64), k)
    np.testing.assert_allclose(log_p, wanted, rtol=0, atol=1e-4)
    np.testing.assert_allclose(log_tail, tail, rtol=0, atol=1e-4)
    assert tail.max() < -30
    packed = pack(ids, log_p, log_tail, vocab)
    assert packed.nbytes == most * tokens and packed.dtype == record(k, vocab)
    again = unpack(packed)
    assert np.array_equal(again[0], ids) and vocab - 1 in again[0] and vocab - 2 in again[0]
    np.testing.assert_allclose(again[1], wanted, rtol=2 * HALF, atol=2e-3)


@pytest.mark.parametrize("k", [1, 2, 7])
def test_ids_of_odd_number(k):
    ids = np.array([[0, 65535, 65536, 262143, (1 << 20) - 1, 1, 131072][:k]])
    found = unpack(pack(ids, np.log(np.full((1, k), 0.5 / k)), np.log([0.5]), 1 << 20))
    assert np.array_equal(found[0], ids)
    np.testing.assert_allclose(np.exp(found[2]), 0.5, atol=1e-3)


def test_tokens_that_cannot_be_said():
    """A head may answer -inf for ids that are only padding."""
    top = Top(4)
    top.update(0, mx.array([[0.0, -np.inf, 1.0, -np.inf, -np.inf, -np.inf]]))
    ids, log_p, log_tail = unpack(pack(*top.found(), 6))
    assert ids[0, :2].tolist() == [2, 0] and np.exp(log_p).sum() == pytest.approx(1) and np.isneginf(log_tail).all()


# ---- killed, continued ----


class Killed(Exception):
    pass


@pytest.mark.parametrize("packed", [None, (4, 32)])
@pytest.mark.parametrize("done", range(6))
def test_killed_at_each_part_and_continued(pico_models, tmp_path, monkeypatch, packed, done):
    model, data = pico_models("llama", packed), rows(9)
    whole = collect(model, data, tmp_path / "whole", 16)
    assert whole.parts == 5

    def write(self, part, records, before=Targets.write):
        if part == done:
            (self.directory / f".{self.file(part).name}.{'0' * 16}.mlx-pare.tmp").write_bytes(b"half")
            raise Killed
        before(self, part, records)

    with monkeypatch.context() as patched:
        patched.setattr(Targets, "write", write)
        if done < 5:
            with pytest.raises(Killed):
                collect(model, data, tmp_path / "t", 16)
            with pytest.raises(PareError, match=f"lacks {5 - done} of 5 parts"):
                Targets.open(tmp_path / "t", data)
        else:
            collect(model, data, tmp_path / "t", 16)
    walked = []
    monkeypatch.setattr(
        stream, "walk", lambda path, some, walk=stream.walk, **o: walked.append(some.count) or walk(path, some, **o)
    )
    found = collect(model, data, tmp_path / "t", 16)
    assert walked == ([9 - 2 * done] if done < 5 else []), "only what is missing goes through the model"
    assert contents(tmp_path / "t") == contents(tmp_path / "whole")
    for one, other in zip(found.batch(range(9)), Targets.open(tmp_path / "t", data).batch(range(9)), strict=True):
        assert np.array_equal(one, other)


def test_little_memory_takes_more_turns_and_gives_the_same_bytes(pico_models, tmp_path, monkeypatch):
    monkeypatch.setattr(head, "CHUNK_BYTES", 4 * 64 * 100)
    model, data = pico_models("llama"), rows(9)
    checkpoint, held = Checkpoint(model), 2 * head.CHUNK_BYTES
    walked = []
    monkeypatch.setattr(
        stream, "walk", lambda path, some, walk=stream.walk, **o: walked.append(some.count) or walk(path, some, **o)
    )
    collect(model, data, tmp_path / "whole", 16)
    for together, turns in ((1, [2, 2, 2, 2, 1]), (2, [4, 4, 1]), (4, [8, 1])):
        walked.clear()
        cap = memory.required_bytes(checkpoint, data.first(2 * together)) + held
        collect(model, data, tmp_path / str(together), 16, memory_cap=cap)
        assert walked == turns
        assert contents(tmp_path / str(together)) == contents(tmp_path / "whole")
    cap = memory.required_bytes(checkpoint, data.first(2)) + held - 1
    with pytest.raises(Refused, match="--memory-cap allows"):
        collect(model, data, tmp_path / "none", 16, memory_cap=cap)
    assert not (tmp_path / "none").exists()


def test_no_more_parts_at_once_than_may_be_lost(pico_models, tmp_path, monkeypatch):
    monkeypatch.setattr(topk_targets, "PARTS_AT_ONCE", 3)
    walked = []
    monkeypatch.setattr(
        stream, "walk", lambda path, some, walk=stream.walk, **o: walked.append(some.count) or walk(path, some, **o)
    )
    collect(pico_models("llama"), rows(9), tmp_path / "t", 16)
    assert walked == [6, 3]


# ---- other targets, faults ----


@pytest.fixture
def done(pico_models, tmp_path):
    model, data = pico_models("llama"), rows(9)
    collect(model, data, tmp_path / "t", 16)
    return model, data, tmp_path / "t"


def test_other_targets_are_refused(done, pico_models):
    model, data, out = done
    before = contents(out)
    others = {
        "model": (pico_models("llama", (4, 32)), data, 16, 1.0),
        "data": (model, rows(9, seed=1), 16, 1.0),
        "k": (model, data, 17, 1.0),
        "temperature": (model, data, 16, 2.0),
    }
    for name, (path, some, k, temperature) in others.items():
        with pytest.raises(Refused, match=f"made differently \\({name}\\)") as found:
            collect(path, some, out, k, temperature)
        assert "delete it" in found.value.cure and "\n" not in str(found.value)
    with pytest.raises(Refused, match="other rows"):
        Targets.open(out, rows(9, seed=1))
    assert contents(out) == before
    with pytest.raises(PareError, match="no targets"):
        Targets.open(out.parent, data)


@pytest.mark.parametrize(
    ("damage", "problem"),
    [
        (lambda file: file.write_bytes(file.read_bytes()[:-1]), "bytes instead of"),
        (lambda file: file.write_bytes(b""), "has 0 bytes instead of"),
        (lambda file: file.write_bytes(file.read_bytes() + b"x"), "bytes instead of"),
        (lambda file: file.write_bytes(flipped(file.read_bytes(), 100)), "is damaged"),
        (lambda file: file.write_bytes(flipped(file.read_bytes(), -1)), "is damaged"),
    ],
)
def test_damaged_part_is_found_and_made_again(done, damage, problem):
    model, data, out = done
    before, file = contents(out), out / "part-00002.bin"
    damage(file)
    for look in (lambda: Targets.open(out, data), lambda: collect(model, data, out, 16)):
        with pytest.raises(PareError, match=f"part-00002.bin .*{problem}") as found:
            look()
        assert "delete it" in found.value.cure
    file.unlink()
    collect(model, data, out, 16)
    assert contents(out) == before


def flipped(data: bytes, at: int) -> bytes:
    changed = bytearray(data)
    changed[at] ^= 1
    return bytes(changed)


def test_part_in_the_place_of_another(pico_models, tmp_path):
    model, data = pico_models("llama"), rows(8, padded=False)
    found = collect(model, data, tmp_path / "t", 16)
    shutil.copy(found.file(0), found.file(1))  # of the same size
    with pytest.raises(PareError, match=r"part-00001\.bin is damaged"):
        Targets.open(tmp_path / "t", data)


@pytest.mark.parametrize("text", ["", "{}", '{"schema": 1, "k": "x"}', "[1]"])
def test_damaged_description(done, text):
    model, data, out = done
    (out / "targets.json").write_text(text)
    for look in (lambda: Targets.open(out, data), lambda: collect(model, data, out, 16)):
        with pytest.raises(PareError, match=r"targets\.json is damaged"):
            look()
    (out / "targets.json").write_text(json.dumps({"schema": 99}))
    with pytest.raises(PareError, match="has schema 99"):
        Targets.open(out, data)


def test_a_file_is_in_the_way(pico_models, tmp_path):
    (tmp_path / "t").write_text("mine")
    with pytest.raises(Refused, match="not a directory"):
        collect(pico_models("llama"), rows(), tmp_path / "t")
    assert (tmp_path / "t").read_text() == "mine"


def test_what_cannot_be(pico_models, tmp_path):
    model, data, out = pico_models("llama"), rows(), tmp_path / "t"
    beyond = Rows.full(np.full((2, 4), 512))
    empty = Rows(data.tokens, np.zeros(9, np.int32))
    for arguments in (
        (data, out, 0),
        (data, out, 513),
        (data, out, 8, 0.0),
        (data, out, 8, np.inf),
        (data, out, 8, np.nan),
    ):
        with pytest.raises(UsageError):
            collect(model, *arguments)
    for some in (beyond, empty):
        with pytest.raises(UsageError, match="the model knows 512"):
            collect(model, some, out)
    with pytest.raises(UsageError, match="too large for targets"):
        record(8, (1 << 20) + 1)
    assert not out.exists()


def test_model_that_answers_nan(pico_models, tmp_path):
    broken = tmp_path / "broken"
    shutil.copytree(pico_models("llama"), broken)
    weights = mx.load(str(broken / "model.safetensors"))
    weights["model.norm.weight"] = weights["model.norm.weight"] * mx.nan
    mx.save_safetensors(str(broken / "model.safetensors"), weights, metadata={"format": "mlx"})
    with pytest.raises(PareError, match="answers NaN"):
        collect(broken, rows(), tmp_path / "t")
    assert not files(tmp_path)


# ---- disk ----


def test_size_is_known_beforehand(pico_models, tmp_path):
    model, data = pico_models("llama"), rows(9)
    found = collect(model, data, tmp_path / "a", 64)
    assert found.bytes_per_token == 260
    assert found.nbytes == 260 * data.total + 5 * 32 == sum(f.stat().st_size for f in (tmp_path / "a").glob("part-*"))
    collect(model, data, tmp_path / "b", 64, disk_budget=found.nbytes)
    with pytest.raises(Refused, match=r"the disk budget is .*The largest k that fits is 63") as refused:
        collect(model, data, tmp_path / "c", 64, disk_budget=found.nbytes - 1)
    assert not (tmp_path / "c").exists() and "\n" not in str(refused.value)
    fits = int(refused.value.cure.split()[-1])
    collect(model, data, tmp_path / "c", fits, disk_budget=found.nbytes - 1)
    with pytest.raises(Refused, match="not even k=1"):
        collect(model, data, tmp_path / "d", 64, disk_budget=300)


def test_full_disk(pico_models, tmp_path, monkeypatch):
    """What is on it already is not counted twice."""
    model, data = pico_models("llama"), rows(9)
    size = collect(model, data, tmp_path / "t", 64).nbytes
    last = (tmp_path / "t" / "part-00004.bin").stat().st_size
    free = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: free._replace(free=last))
    with pytest.raises(Refused, match=r"free are .*largest k that fits"):
        collect(model, data, tmp_path / "other", 64, disk_budget=size)
    (tmp_path / "t" / "part-00004.bin").unlink()
    collect(model, data, tmp_path / "t", 64)


# ---- reading ----


def test_rows_in_any_order_and_padding(done):
    _, data, out = done
    found = Targets.open(out, data)
    each = [found.batch([i]) for i in range(9)]
    together = found.batch(np.array([7, 0, 7, 4]))
    for part, arrays in enumerate(zip(*(each[i] for i in (7, 0, 7, 4)), strict=True)):
        assert np.array_equal(together[part], np.concatenate(arrays))
    _, log_p, log_tail = found.batch(range(9))
    assert np.isfinite(log_p).all() and np.isfinite(log_tail).all(), "padding too: 0 * inf would be NaN in a loss"
    assert [a.shape[0] for a in found.batch([])] == [0, 0, 0]
    for wrong in ([9], [-1]):
        with pytest.raises(UsageError, match="targets of 9 rows"):
            found.batch(wrong)


def test_only_the_parts_of_the_batch_are_read(done):
    _, data, out = done
    found = Targets.open(out, data)
    for part in (0, 2, 3, 4):
        found.file(part).unlink()
    found.batch([2, 3])
    with pytest.raises(FileNotFoundError):
        found.batch([4])
