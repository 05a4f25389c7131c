"""Healing block by block: to the original's stream, by what is stored, never worse, going on after an interruption."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pico
import pytest
import reference
from mlx.utils import tree_flatten

from mlx_pare.base.errors import PareError, Refused, UsageError
from mlx_pare.model import weights as quantized_weights
from mlx_pare.model.checkpoint import Checkpoint
from mlx_pare.pruning.prune import prune
from mlx_pare.recovery import block_trainer, blockwise as healing
from mlx_pare.recovery.block_trainer import METHODS, Matrix, Options
from mlx_pare.recovery.blockwise import block_ends, check_memory, local, training_bytes
from mlx_pare.stream import head, memory
from mlx_pare.tensors import packed as quantized
from mlx_pare.text.corpus import Rows
from tests.arch import test_uneven
from tests.recovery.test_recover import files, same_packing_and_shapes, stored

DRAW = np.random.default_rng(5)
ROWS, HELD = (Rows.full(DRAW.integers(0, 500, (count, 16))) for count in (48, 12))
OPTIONS = Options(steps=30, batch=12, rank=8)
FAULTS = ("layers.1.mlp.down_proj.weight", "layers.2.self_attn.o_proj.weight")
CASES = [("llama", None), ("llama", (4, 32)), ("qwen2", None), ("gemma3_text", None)]


@pytest.fixture(scope="session")
def faulty(pico_models, tmp_path_factory) -> Callable[..., tuple[Path, Path]]:
    """``faulty(family, packed, dtype) -> (student, teacher)``: the same model, half of what two of its matrices write
    lost, packed after that."""
    made: dict[str, tuple[Path, Path]] = {}

    def pair(family: str = "llama", packed=None, dtype=mx.float32) -> tuple[Path, Path]:
        key = repr((family, packed, dtype))
        if key not in made:
            teacher, work = pico_models(family, packed, dtype=dtype), tmp_path_factory.mktemp("faulty")
            shutil.copytree(teacher, work / "student", ignore=shutil.ignore_patterns("*.index.json"))
            checkpoint, random = Checkpoint(teacher), np.random.default_rng(0)
            arrays = checkpoint.lazy()
            for tensor in checkpoint.arch.tensors():
                if tensor.name.endswith(FAULTS):
                    arrays |= _halved(checkpoint, tensor, random)
            mx.eval(arrays)
            mx.save_safetensors(str(work / "student" / "model.safetensors"), arrays, metadata={"format": "mlx"})
            made[key] = work / "student", teacher
        return made[key]

    return pair


def _halved(checkpoint: Checkpoint, tensor, random) -> dict[str, mx.array]:
    read = quantized_weights.read(checkpoint, tensor.name)
    packed = isinstance(read, quantized.Packed)
    dense = read.dense() if packed else read
    dense = dense * mx.array((random.random(dense.shape) < 0.5).astype(np.float32)).astype(dense.dtype)
    if not packed:
        return {tensor.name: dense}
    new = quantized.pack(dense, read.packing, quantized.MX_DTYPE[checkpoint.dtype(tensor)])
    return {f"{tensor.module}.{part}": array for part, array in new.arrays.items()}


def streams(model: Path, rows: Rows) -> tuple[np.ndarray, list[dict]]:
    """Logits and, per layer, what goes in and comes out, by numpy alone."""
    return reference.forward(*reference.load(model), rows.tokens)


def kl(student: Path, teacher: Path, rows: Rows) -> float:
    """Mean KL over the predicted tokens, by numpy alone."""
    return float(reference.kl(*(streams(m, rows)[0][:, :-1] for m in (teacher, student))).mean())


def shares(model: Path, teacher: Path, rows: Rows, held: Rows, ends: list[int]) -> list[float]:
    """The error of every block as the result gives it: a channel weighs the inverse of what is to be added to it."""

    def squares(of: Rows) -> list[tuple[np.ndarray, np.ndarray]]:
        ours, theirs = streams(model, of)[1], streams(teacher, of)[1]
        targets = [theirs[end - 1]["after"] for end in ends]
        return [
            tuple(((a - target) ** 2).mean(axis=(0, 1)) for a in (layer["after"], layer["before"]))
            for layer, target in zip(ours, targets, strict=True)
        ]

    found = []
    for (missed, added), (_, energy) in zip(squares(held), squares(rows), strict=True):
        weights = 1 / (energy + 0.01 * energy.mean())
        found.append(float((missed * weights).sum() / (added * weights).sum()))
    return found


# ---- it heals, and numpy agrees ----


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(("family", "packed"), CASES, ids=str)
def test_a_planted_fault_is_repaired(faulty, tmp_path, family, packed, method):
    """KL on held-out rows falls by a quarter at least; errors and KL are those of what is stored; only what was trained
    changed; nothing else is left behind."""
    (student, teacher), out = faulty(family, packed), tmp_path / "out"
    before, weights = files(student), stored(student)
    found = local(student, teacher, ROWS, HELD, out, replace(OPTIONS, method=method))
    assert found["improved"] and found["kl_after"] < 0.75 * found["kl_before"]
    assert found["kl_before"] == pytest.approx(kl(student, teacher, HELD), rel=1e-3)
    assert found["kl_after"] == pytest.approx(kl(out, teacher, HELD), rel=1e-3)
    ends = list(range(1, len(found["blocks"]) + 1))
    assert [block["teacher"] for block in found["blocks"]] == ends
    expected = shares(out, teacher, ROWS, HELD, ends)
    for block, error in zip(found["blocks"], expected, strict=True):
        assert (block["after"] if block["taken"] else block["before"]) == pytest.approx(error, rel=2e-3, abs=1e-6)
    assert found["blocks"][1]["taken"] and found["blocks"][1]["after"] < 0.9 * found["blocks"][1]["before"]
    assert files(student) == before and sorted(files(out)) == sorted(before)
    assert same_packing_and_shapes(Checkpoint(student), Checkpoint(out))
    changed = {name for name, data in stored(out).items() if data != weights[name]}
    taken = {f".layers.{block['block']}." for block in found["blocks"] if block["taken"]}
    assert changed and all(any(part in name for part in taken) for name in changed)
    assert method == "full" or not [name for name in changed if "norm" in name]
    assert [f.name for f in tmp_path.iterdir()] == ["out"]
    json.dumps(found, allow_nan=False)


def test_bfloat16_stays_bfloat16(faulty, tmp_path):
    student, teacher = faulty(dtype=mx.bfloat16)
    found = local(student, teacher, ROWS, HELD, tmp_path / "out", OPTIONS)
    assert found["improved"] and {e.dtype for e in Checkpoint(tmp_path / "out").entries.values()} == {"BF16"}
    assert found["kl_after"] == pytest.approx(kl(tmp_path / "out", teacher, HELD), rel=2e-3)


def test_padding_counts_for_nothing(faulty, tmp_path):
    """Other tokens behind the text change no byte and no number."""
    lengths = [np.minimum(rows.length, 5 + 2 * np.arange(rows.count)).astype(np.int32) for rows in (ROWS, HELD)]
    options, results = replace(OPTIONS, steps=3), []
    for number, filler in enumerate((0, 7)):
        padded = []
        for rows, length in zip((ROWS, HELD), lengths, strict=True):
            inside = np.arange(rows.length) < length[:, None]
            padded.append(Rows(np.where(inside, rows.tokens, filler).astype(np.int32), length))
        found = local(*faulty(), *padded, tmp_path / str(number), options)
        results.append((found["kl_after"], [b["after"] for b in found["blocks"]], stored(tmp_path / str(number))))
    assert results[0][:2] == results[1][:2] and results[0][2] == results[1][2]


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_rounding_is_trained_through(bits):
    """Forward as the packed matrix, gradient as the plain one; what did not move keeps its code."""
    layer = nn.QuantizedLinear.from_linear(nn.Linear(64, 8, bias=False), 32, bits)
    matrix, x = Matrix(layer, Options(method="full"), np.random.RandomState(0)), mx.random.normal((5, 64))
    assert mx.array_equal(matrix.result().words, layer.weight).item()
    step = mx.repeat(layer.scales, 32, axis=1) * mx.array(DRAW.uniform(-2, 2, (8, 64)).astype(np.float32))
    matrix.weight = matrix.weight + step
    kept = matrix.result()
    dense, scales, biases = (np.array(a, np.float64) for a in (matrix.weight, layer.scales, layer.biases))
    scales, biases = np.repeat(scales, 32, 1), np.repeat(biases, 32, 1)
    codes = np.clip(np.round((dense - biases) / scales), 0, 2**bits - 1)
    assert np.allclose(np.array(kept.dense()), codes * scales + biases, atol=1e-6)
    assert mx.allclose(matrix(x), x @ kept.dense().T, atol=1e-5).item()
    assert not mx.allclose(matrix(x), x @ matrix.weight.T, atol=1e-5).item()
    slope = nn.value_and_grad(matrix, lambda m: m(x).sum())(matrix)[1]["weight"]
    assert mx.allclose(slope, mx.broadcast_to(x.sum(axis=0), slope.shape), atol=1e-5).item()


# ---- layers that went, widths that differ, a hidden size that was cut ----


def test_a_dropped_layer_is_made_up_for(pico_models, tmp_path):
    """The block before the gap is led to where the original's stream is behind it, the last one to the end."""
    teacher = pico_models("llama")
    plan = test_uneven.plan_of(teacher, [(128, 2), (128, 2)], layers=[0, 2])
    prune(teacher, plan, tmp_path / "student")
    assert block_ends(Checkpoint(tmp_path / "student"), Checkpoint(teacher)) == [2, 4]
    found = local(tmp_path / "student", teacher, ROWS, HELD, tmp_path / "out", replace(OPTIONS, method="full"))
    assert found["improved"] and found["kl_after"] < found["kl_before"]
    expected = shares(tmp_path / "out", teacher, ROWS, HELD, [2, 4])
    assert [block["after"] for block in found["blocks"]] == pytest.approx(expected, rel=2e-3)


@pytest.mark.parametrize("damage", ["missing", "backwards", "too far", "words"])
def test_layers_that_nobody_knows(pico_models, tmp_path, damage):
    teacher, student = pico_models("llama"), tmp_path / "student"
    prune(teacher, test_uneven.plan_of(teacher, [(128, 2), (128, 2)], layers=[1, 2]), student)
    file = student / "survivors.json"
    if damage == "missing":
        file.unlink()
    else:
        sources = {"backwards": [2, 1], "too far": [1, 4], "words": ["a", None]}[damage]
        known = json.loads(file.read_text())
        for layer, source in zip(known["layers"], sources, strict=True):
            layer["source"] = source
        file.write_text(json.dumps(known))
    with pytest.raises(PareError, match="does not say which of the 4 layers") as found:
        local(student, teacher, ROWS, HELD, tmp_path / "out", OPTIONS)
    assert "survivors.json" in found.value.cure and not (tmp_path / "out").exists()


@pytest.mark.parametrize("packed", [None, (8, 32)], ids=["dense", "8 bits"])
@pytest.mark.parametrize("name", ["openelm", "nemotron-nas"])
def test_layers_that_differ(pico_models, tmp_path, name, packed):
    """openelm (fused qkv) and nemotron-nas are healed as they are."""
    family, counts, changes = test_uneven.RESULTS[name]
    family, base = test_uneven.FAMILIES.get(family, (family, {}))
    teacher = pico_models(family, packed, **base, **changes)
    prune(teacher, test_uneven.plan_of(teacher, counts), tmp_path / "student")
    found = local(tmp_path / "student", teacher, ROWS, HELD, tmp_path / "out", replace(OPTIONS, method="full"))
    assert found["improved"] and found["kl_after"] < found["kl_before"]
    assert same_packing_and_shapes(Checkpoint(tmp_path / "student"), Checkpoint(tmp_path / "out"))


def test_a_hidden_cut_is_refused(pico_models, tmp_path):
    teacher = pico_models("llama")
    plan = test_uneven.plan_of(teacher, [(128, 2)] * 4, hidden=list(range(48)))
    prune(teacher, plan, tmp_path / "student")
    with pytest.raises(PareError, match=r"hidden size of 48, .* 64") as found:
        local(tmp_path / "student", teacher, ROWS, HELD, tmp_path / "out", OPTIONS)
    assert "--axes" in found.value.cure and not (tmp_path / "out").exists()


# ---- never worse ----


def test_a_block_that_gets_worse_is_not_taken(faulty, tmp_path, capsys):
    """With a learning rate that ruins everything the student comes back, byte for byte, and the result says so."""
    student, teacher = faulty()
    found = local(student, teacher, ROWS, HELD, tmp_path / "out", replace(OPTIONS, learning_rate=1e3))
    assert not found["improved"] and found["kl_after"] == found["kl_before"]
    assert not any(block["taken"] for block in found["blocks"])
    assert files(tmp_path / "out") == files(student) and "did not improve" in capsys.readouterr().err
    assert [f.name for f in tmp_path.iterdir()] == ["out"]


def test_not_a_number_is_not_taken(faulty, tmp_path, monkeypatch):
    monkeypatch.setattr(healing._Healer, "_loss", lambda self, block, rows: self._run(block, rows).sum() * mx.nan)
    found = local(*faulty(), ROWS, HELD, tmp_path / "out", OPTIONS)
    assert not found["improved"] and found["blocks"][1]["after"] is None
    json.dumps(found, allow_nan=False)


def test_better_blocks_that_make_a_worse_model(faulty, tmp_path, monkeypatch):
    """Every block nearer to its target, the whole not: what counts is the KL of what was written."""
    student, teacher = faulty()

    def ruined(checkpoint, tensor, scratch):
        return {tensor.name: checkpoint.lazy()[tensor.name] * 0} if "up_proj" in tensor.name else None

    monkeypatch.setattr(healing, "_entries", ruined)
    found = local(student, teacher, ROWS, HELD, tmp_path / "out", OPTIONS)
    assert any(block["taken"] for block in found["blocks"]) and not found["improved"]
    assert found["kl_after"] == found["kl_before"] and files(tmp_path / "out") == files(student)


# ---- interruptions ----


class Killed(Exception):
    """What ends a run in these tests."""


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("packed", [None, (4, 32)], ids=["dense", "4 bits"])
def test_killed_after_any_block(faulty, tmp_path, monkeypatch, method, packed):
    """The same bytes as without interruption, and no block is trained twice."""
    options = replace(OPTIONS, method=method, steps=3)
    whole = local(*faulty("llama", packed), ROWS, HELD, tmp_path / "whole", options)
    trained, plain = [], healing.train

    def dying(*args):
        if len(trained) in deaths:
            deaths.remove(len(trained))
            raise Killed
        plain(*args)
        trained.append(1)

    deaths = [0, 1, 2]
    monkeypatch.setattr(healing, "train", dying)
    for _ in range(3):
        with pytest.raises(Killed):
            local(*faulty("llama", packed), ROWS, HELD, tmp_path / "killed", options)
        assert not (tmp_path / "killed").exists()
    again = local(*faulty("llama", packed), ROWS, HELD, tmp_path / "killed", options)
    assert len(trained) == 3 and files(tmp_path / "whole") == files(tmp_path / "killed")
    assert [timeless(block) for block in whole["blocks"]] == [timeless(block) for block in again["blocks"]]
    assert sorted(f.name for f in tmp_path.iterdir()) == ["killed", "whole"]


def timeless(block: dict) -> dict:
    return {name: value for name, value in block.items() if name != "seconds"}


def test_blocks_of_something_else_are_refused(faulty, tmp_path, monkeypatch):
    monkeypatch.setattr(healing, "_judged", lambda *args: (_ for _ in ()).throw(Killed()))
    options = replace(OPTIONS, steps=1)
    with pytest.raises(Killed):
        local(*faulty(), ROWS, HELD, tmp_path / "out", options)
    for rows, changed in ((ROWS, replace(options, seed=1)), (ROWS.first(16), options)):
        with pytest.raises(Refused, match="other models, rows or options") as found:
            local(*faulty(), rows, HELD, tmp_path / "out", changed)
        assert "remove" in found.value.cure


def test_same_seed_same_bytes(faulty, tmp_path):
    options = replace(OPTIONS, steps=2)
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        local(*faulty(), ROWS, HELD, tmp_path / name, replace(options, seed=seed))
    assert files(tmp_path / "a") == files(tmp_path / "b") and stored(tmp_path / "a") != stored(tmp_path / "c")


def test_every_row_once_before_any_comes_again():
    draw = block_trainer.batches(10, Options(batch=5), np.random.RandomState(0))
    first, second, third = next(draw), next(draw), next(draw)
    assert sorted([*first, *second]) == list(range(10)) and len(third) == 5
    assert len(next(block_trainer.batches(3, Options(batch=5), np.random.RandomState(0)))) == 3


# ---- what is refused ----


def test_memory_is_stated_beforehand(faulty, tmp_path):
    with pytest.raises(Refused, match="--memory-cap allows") as found:
        local(*faulty(), ROWS, HELD, tmp_path / "out", OPTIONS, memory_cap=1000)
    assert "training a block" in found.value.cure and not list(tmp_path.iterdir())


@pytest.mark.parametrize("method", METHODS)
def test_the_estimate_holds(faulty, tmp_path, monkeypatch, method):
    """Also without the interpreter, which MLX does not count, and chunks of the head that a small vocabulary never
    fills; nor is it idle."""
    monkeypatch.setattr(head, "CHUNK_BYTES", 1 << 16)
    student, teacher = faulty()
    rows, options = Rows.full(DRAW.integers(0, 500, (64, 64))), replace(OPTIONS, method=method, steps=2, batch=48)
    estimate = check_memory(Checkpoint(student), Checkpoint(teacher), rows.joined(rows.first(8)), options, 1 << 40)
    mx.reset_peak_memory()
    active = mx.get_active_memory()
    local(student, teacher, rows, rows.first(8), tmp_path / "out", options)
    used = mx.get_peak_memory() - active
    assert 0.4 * (estimate - memory.BASE_BYTES) < used < estimate - memory.BASE_BYTES


def test_the_estimate_grows_with_method_batch_and_rows(faulty):
    student, teacher = map(Checkpoint, faulty())
    block = sum(t.size for t in student.arch.tensors() if t.layer == 0)
    lora, full = (training_bytes(student, ROWS, replace(OPTIONS, method=method)) for method in METHODS)
    assert full - lora == 2 * 4 * block
    assert training_bytes(student, ROWS, replace(OPTIONS, batch=16)) > lora
    few, many = (check_memory(student, teacher, rows, OPTIONS, 1 << 40) for rows in (ROWS, ROWS.joined(HELD)))
    assert many - few >= 4 * 4 * HELD.count * HELD.length * 64


def test_other_refusals(faulty, pico_models, tmp_path):
    student, teacher = faulty()
    with pytest.raises(UsageError, match="unknown method 'prayer'"):
        local(student, teacher, ROWS, HELD, tmp_path / "out", replace(OPTIONS, method="prayer"))
    with pytest.raises(PareError, match="cannot go through a model together"):
        local(student, teacher, ROWS, Rows.full(HELD.tokens[:, :8]), tmp_path / "out", OPTIONS)
    other = _saved(tmp_path / "other", pico.config_of("llama", vocab_size=600))
    with pytest.raises(PareError, match=r"vocab size of 512, .* 600: they are no pair"):
        local(student, other, ROWS, HELD, tmp_path / "out", OPTIONS)
    (tmp_path / "out").mkdir()
    with pytest.raises(Refused, match="exists already"):
        local(student, teacher, ROWS, HELD, tmp_path / "out", OPTIONS)


def _saved(directory: Path, config: dict) -> Path:
    directory.mkdir()
    weights = dict(tree_flatten(pico.build(config).parameters()))
    mx.save_safetensors(str(directory / "model.safetensors"), weights, metadata={"format": "mlx"})
    (directory / "config.json").write_text(json.dumps(config))
    return directory
