"""Recovery brings a pruned model closer to its original, says the truth about it, and otherwise leaves it as it was."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import mlx.core as mx
import mlx_lm
import numpy as np
import pytest
import reference

from mlx_pare import lm
from mlx_pare.base.errors import PareError, Refused, UsageError
from mlx_pare.exporting.export import export
from mlx_pare.model.checkpoint import Checkpoint
from mlx_pare.planning.goal import Options as PlanOptions
from mlx_pare.planning.plan import plan
from mlx_pare.pruning.prune import prune
from mlx_pare.recovery import recover as recovering
from mlx_pare.recovery.options import METHODS, Options, required_bytes, savings
from mlx_pare.recovery.recover import recover
from mlx_pare.scoring.calibrate import calibrate
from mlx_pare.scoring.score import score
from mlx_pare.text import corpus
from mlx_pare.text.corpus import Rows

DEMO = Path(corpus.__file__).parents[1] / "demo"
OPTIONS = Options(steps=9, batch=4, reports=3, learning_rate=1e-3)
RATES = {"lora": 4e-3, "dora": 4e-3, "full": 1.2e-3, "norms": 2e-3}  # the usual ones are for more than a dozen steps
SEEDS = {"a": 1, "b": 1, "c": 2}
WORSE = 1e3  # a learning rate after which nothing is left of a model


@pytest.fixture(scope="session")
def texts(pico_models) -> tuple[Rows, Rows]:
    """Rows to train on, and others to choose the best state by."""
    tok = lm.tokenizer(pico_models("llama"))
    train, validation = (
        corpus.windows(tok, corpus.read(DEMO / f"{n}.txt"), 24, 32, 0) for n in ("calibration", "test")
    )
    return train, replace(
        validation, tokens=validation.tokens[:9], lengths=validation.lengths[:9]
    )  # two batches and one


@pytest.fixture(scope="session")
def cut(pico_models, tmp_path_factory, texts) -> Callable[..., tuple[Path, Path]]:
    """``cut(family, packed) -> (pruned, original)``: keeps 0.6 by magnitude."""
    made: dict[tuple, tuple[Path, Path]] = {}

    def pruned(family: str = "llama", packed: tuple[int, int] | None = None, **config) -> tuple[Path, Path]:
        key = (family, packed, repr(config))
        if key not in made:
            model, work = pico_models(family, packed, **config), tmp_path_factory.mktemp("cut")
            scores = score(model, calibrate(model, texts[0], work / "stats"), work / "scores.safetensors", "magnitude")
            prune(model, plan(model, scores, PlanOptions(keep=0.6)), work / "model")
            made[key] = work / "model", model
        return made[key]

    return pruned


def stored(model: Path) -> dict[str, bytes]:
    """The bytes of every tensor as they lie on disk."""
    found = {}
    for name, entry in Checkpoint(model).entries.items():
        with entry.file.open("rb") as file:
            file.seek(entry.start)
            found[name] = file.read(entry.nbytes)
    return found


def files(directory: Path) -> dict[str, bytes]:
    return {f.name: f.read_bytes() for f in directory.iterdir()}


def divergence(student: Path, teacher: Path, data: Rows) -> float:
    """Mean KL over all positions, by numpy alone."""
    s, t = (reference.forward(*reference.load(m), data.tokens)[0] for m in (student, teacher))
    return float(reference.kl(t, s).mean())


CASES = [("llama", None), ("llama", (4, 32)), ("llama-untied", (8, 32)), ("qwen2", None), ("gemma3_text", None)]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(("family", "packed"), CASES, ids=str)
def test_recovery(cut, texts, tmp_path, family, packed, method):
    """The validation KL falls, numpy agrees, stock mlx-lm opens the result, and only what was trained changed."""
    (pruned, original), out = cut(family, packed), tmp_path / "out"
    before, weights = files(pruned), stored(pruned)
    found = recover(pruned, original, *texts, out, replace(OPTIONS, method=method, learning_rate=RATES[method]))
    assert found["improved"] and found["kl_after"] < found["kl_before"]
    assert found["kl_before"] == pytest.approx(divergence(pruned, original, texts[1]), rel=1e-3)
    assert found["kl_after"] == pytest.approx(divergence(out, original, texts[1]), rel=1e-3)
    steps, losses = ([point[key] for point in found["curve"]] for key in ("step", "loss"))
    assert losses[0] == pytest.approx(found["kl_before"], rel=1e-5) and found["options"]["method"] == method
    assert steps == [0, 3, 6, 9] and losses[steps.index(found["best_step"])] == min(losses) == found["kl_unmerged"]
    model, tok = mlx_lm.load(str(out))
    assert np.isfinite(np.array(model(mx.array([tok.encode("hello")])).astype(mx.float32))).all()
    assert files(pruned) == before and sorted(files(out)) == sorted(before)
    assert same_packing_and_shapes(Checkpoint(pruned), Checkpoint(out))
    check_what_changed(weights, stored(out), method)
    assert [f.name for f in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("rate", [3e-5, 1e-3])
def test_packed_anew_or_with_the_scales_there_were(cut, texts, tmp_path, rate):
    """Both are measured, the better one is kept; with the old scales the codes of what moved too little stay."""
    pruned, original = cut("llama", (4, 32))
    found = recover(pruned, original, *texts, tmp_path / "out", replace(OPTIONS, learning_rate=rate))
    assert set(found["kl"]) == {"pruned", "trained", "same scales"}
    assert found["kl"][found["kept"]] == min(found["kl"].values())
    before, after = stored(pruned), stored(tmp_path / "out")
    if found["kept"] == "same scales":
        assert all(before[name] == after[name] for name in before if name.endswith((".scales", ".biases")))


def same_packing_and_shapes(before: Checkpoint, after: Checkpoint) -> bool:
    shapes = [{n: (e.dtype, e.shape) for n, e in c.entries.items()} for c in (before, after)]
    return before.config == after.config and before.nbytes() == after.nbytes() and shapes[0] == shapes[1]


def check_what_changed(before: dict[str, bytes], after: dict[str, bytes], method: str) -> None:
    """lora and dora: every matrix of the blocks; full: their norms too; norms: these, and scales but no codes. None:
    embedding, head and last norm."""
    changed = {name for name in before if before[name] != after[name]}
    blocks = {name for name in before if ".layers." in name}
    matrices, norms = ({name for name in blocks if part in name} for part in ("_proj.weight", "norm"))
    assert changed <= blocks
    if method == "norms":
        assert norms <= changed and not changed & matrices
        assert {name for name in blocks if name.endswith((".scales", ".biases"))} <= changed
        return
    assert matrices <= changed
    assert norms <= changed if method == "full" else not changed & norms


def test_bfloat16_stays_bfloat16(cut, texts, tmp_path):
    pruned, original = cut("llama", dtype=mx.bfloat16)
    found = recover(pruned, original, *texts, tmp_path / "out", OPTIONS)
    assert {e.dtype for e in Checkpoint(tmp_path / "out").entries.values()} == {"BF16"}
    assert found["kl_after"] == pytest.approx(divergence(tmp_path / "out", original, texts[1]), rel=1e-3)


@pytest.mark.parametrize("method", METHODS)
def test_same_seed_same_bytes(cut, texts, tmp_path, method):
    (pruned, original), options = cut(), replace(OPTIONS, method=method, steps=2)
    runs = {n: recover(pruned, original, *texts, tmp_path / n, replace(options, seed=s)) for n, s in SEEDS.items()}
    assert files(tmp_path / "a") == files(tmp_path / "b") and runs["a"] == runs["b"]
    assert stored(tmp_path / "a") != stored(tmp_path / "c") and runs["a"]["kl_before"] == runs["c"]["kl_before"]


# ---- when it does not help ----


@pytest.mark.parametrize("packed", [None, (4, 32)], ids=["dense", "4 bits"])
@pytest.mark.parametrize("method", METHODS)
def test_worse_is_not_kept(cut, texts, tmp_path, capsys, method, packed):
    """Finite and worse: the pruned model, byte for byte. Not finite: an error and nothing written."""
    pruned, original = cut("llama", packed)
    try:
        found = recover(
            pruned, original, *texts, tmp_path / "out", replace(OPTIONS, method=method, learning_rate=WORSE)
        )
    except PareError as error:
        assert "diverged" in str(error) and "--learning-rate" in error.cure and not list(tmp_path.iterdir())
        return
    assert not found["improved"] and found["best_step"] == 0 and found["kl_after"] == found["kl_before"]
    assert min(point["loss"] for point in found["curve"][1:]) > found["kl_before"]
    assert files(tmp_path / "out") == files(pruned) and [f.name for f in tmp_path.iterdir()] == ["out"]
    assert "did not improve" in capsys.readouterr().err


def test_not_a_number_is_an_error(cut, texts, tmp_path, monkeypatch):
    monkeypatch.setattr(recovering, "loss_of", lambda *_: lambda m, x, t: (m(x).mean() * mx.nan, mx.array(1)))
    with pytest.raises(PareError, match="diverged at step 3"):
        recover(*cut(), *texts, tmp_path / "out", OPTIONS)
    assert not list(tmp_path.iterdir())


def test_blocks_that_were_healed_outlive_a_training_that_diverged(cut, texts, tmp_path, monkeypatch):
    """They may have taken hours; with another rate they are taken up."""
    options = replace(OPTIONS, local_steps=2, learning_rate=3e-4)
    with monkeypatch.context() as broken:
        broken.setattr(recovering, "loss_of", lambda *_: lambda m, x, t: (m(x).mean() * mx.nan, mx.array(1)))
        with pytest.raises(PareError, match="diverged"):
            recover(*cut(), *texts, tmp_path / "out", options)
    assert [f.name for f in tmp_path.iterdir()] == ["out.work"]
    monkeypatch.setattr(recovering.blockwise, "local", lambda *_: pytest.fail("healed again"))
    found = recover(*cut(), *texts, tmp_path / "out", replace(options, learning_rate=1e-3))
    assert found["local"]["blocks"] and [f.name for f in tmp_path.iterdir()] == ["out"]


def test_best_state_is_kept_not_the_last(cut, texts, tmp_path, monkeypatch):
    """A loss that turns against the model after three steps."""
    calls, loss_of = [], recovering.loss_of

    def turning(*how):
        def loss(model, tokens, logits):
            calls.append(1)
            mean, count = loss_of(*how)(model, tokens, logits)
            return (mean if len(calls) <= 3 else -100 * mean), count

        return loss

    monkeypatch.setattr(recovering, "loss_of", turning)
    pruned, original = cut()
    options = replace(OPTIONS, method="full", learning_rate=1e-4, clip=0.0)
    found = recover(pruned, original, *texts, tmp_path / "out", options)
    assert found["best_step"] == 3 and found["curve"][-1]["loss"] > found["curve"][1]["loss"]
    assert found["kl_after"] == pytest.approx(found["curve"][1]["loss"], rel=1e-5)
    assert found["kl_after"] == pytest.approx(divergence(tmp_path / "out", original, texts[1]), rel=1e-3)


def test_gain_lost_in_packing_is_not_kept(cut, texts, tmp_path, monkeypatch):
    """What counts is the model as it will be loaded, after packing."""
    monkeypatch.setattr(
        recovering.replace_tensors, "write", lambda checkpoint, trained, out, *_: broken(checkpoint, out)
    )
    pruned, original = cut()
    found = recover(pruned, original, *texts, tmp_path / "out", OPTIONS)
    assert found["best_step"] > 0 and not found["improved"] and found["kl_after"] == found["kl_before"]
    assert files(tmp_path / "out") == files(pruned)


def broken(checkpoint: Checkpoint, out: Path) -> None:
    """The pruned model with one matrix of zeros."""
    weights = {n: a * (0 if n.endswith("1.mlp.up_proj.weight") else 1) for n, a in checkpoint.lazy().items()}
    mx.save_safetensors(str(out / "model.safetensors"), weights)
    (out / "config.json").write_bytes((checkpoint.path / "config.json").read_bytes())


def test_no_steps(cut, texts, tmp_path):
    pruned, original = cut()
    found = recover(pruned, original, *texts, tmp_path / "out", replace(OPTIONS, steps=0))
    assert not found["improved"] and found["kl_after"] == found["kl_before"]
    assert files(tmp_path / "out") == files(pruned)


def test_nothing_is_written_elsewhere(cut, texts, tmp_path, monkeypatch):
    """mlx-lm saves its adapters at the end of training; they must not land beside the null device or anywhere else."""
    saved, save = [], mx.save_safetensors
    monkeypatch.setattr(mx, "save_safetensors", lambda file, *a, **k: (saved.append(Path(file)), save(file, *a, **k)))
    recover(*cut(), *texts, tmp_path / "out", OPTIONS)
    assert saved and all(file.suffix == ".safetensors" and not file.exists() for file in saved)
    assert not any(file.parent == Path("/dev") for file in saved)


# ---- what is refused ----


def test_unknown_method(cut, texts, tmp_path):
    with pytest.raises(UsageError, match="unknown method 'prayer'") as found:
        recover(*cut(), *texts, tmp_path / "out", replace(OPTIONS, method="prayer"))
    assert "lora, dora, full, norms" in found.value.cure


def test_usual_rates(cut, texts, tmp_path, monkeypatch):
    """0.12 over the hidden size where all weights move, 0.02 over its root for adapters; less for a student that is
    near the teacher already, unless a rate was asked for; the result says which."""
    hidden = Checkpoint(cut()[0]).arch.sizes["hidden"]
    for method, rate in (("full", 0.12 / hidden), ("lora", 0.02 / hidden**0.5)):
        asked = replace(OPTIONS, method=method, steps=1, learning_rate=None)
        found = recover(*cut(), *texts, tmp_path / method, asked)
        assert found["options"]["learning_rate"] == pytest.approx(rate)
        assert found["rate"] == found["options"]["learning_rate"]  # this one is far away
    monkeypatch.setattr(sys.modules["mlx_pare.recovery.recover"], "GENTLE_BELOW", 400 * found["curve"][0]["loss"])
    found = recover(*cut(), *texts, tmp_path / "near", replace(OPTIONS, steps=1, learning_rate=None))
    assert found["rate"] == pytest.approx(0.02 / hidden**0.5 / 20)
    found = recover(*cut(), *texts, tmp_path / "asked", replace(OPTIONS, steps=1, learning_rate=1e-3))
    assert found["rate"] == 1e-3


def test_memory_cap(cut, texts, tmp_path):
    with pytest.raises(Refused, match="--memory-cap allows") as found:
        recover(*cut(), *texts, tmp_path / "out", OPTIONS, memory_cap=1000)
    assert found.value.exit_code == 3 and found.value.cure and not list(tmp_path.iterdir())


def test_estimate_counts_the_optimizer(cut, texts):
    """Adam's two numbers, the gradient and the best state, float32, for everything that full trains of the blocks."""
    student, original = (Checkpoint(m) for m in cut())
    lora, full = (required_bytes(student, original, *texts, replace(OPTIONS, method=m)) for m in ("lora", "full"))
    blocks = [e.shape for n, e in student.entries.items() if ".layers." in n]
    adapters = sum(OPTIONS.rank * sum(shape) + shape[0] for shape in blocks if len(shape) == 2)
    assert full - lora == 4 * 4 * (sum(map(math.prod, blocks)) - adapters)


def test_the_smallest_change_that_would_fit_is_named(cut, texts, tmp_path):
    """What is refused says with which options it would not be; with them it is not."""
    (student, original), options = cut(), replace(OPTIONS, batch=8)
    ladder = list(savings(options))
    bytes_of = [required_bytes(*map(Checkpoint, (student, original)), *texts, o) for _, o in ladder]
    assert bytes_of == sorted(bytes_of, reverse=True)
    assert [flags for flags, _ in ladder] == [
        "--grad-checkpoint",
        "--grad-checkpoint --accumulate 2 --batch 4",
        "--grad-checkpoint --accumulate 4 --batch 2",
        "--grad-checkpoint --accumulate 8 --batch 1",
        "--grad-checkpoint --accumulate 8 --batch 1 --targets 64",
    ]
    with pytest.raises(Refused) as found:
        recover(student, original, *texts, tmp_path / "out", options, memory_cap=bytes_of[1])
    assert found.value.cure.startswith("--grad-checkpoint --accumulate 2 --batch 4 would take")


def test_a_gguf_file_is_a_student(cut, texts, tmp_path, monkeypatch):
    """As every MODEL: it is rebuilt into the cache."""
    monkeypatch.setenv("MLX_PARE_CACHE", str(tmp_path / "cache"))
    pruned, original = cut("llama")
    export(pruned, tmp_path / "pruned.gguf", "f32")
    found = recover(tmp_path / "pruned.gguf", original, *texts, tmp_path / "out", replace(OPTIONS, steps=1))
    assert found["kl_before"] > 0 and Checkpoint(tmp_path / "out").nbytes()


def test_existing_place_is_not_overwritten(cut, texts, tmp_path):
    """Said before the training, not after it."""
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "precious").write_text("mine")
    with pytest.raises(Refused, match="exists already"):
        recover(*cut(), *texts, tmp_path / "out", OPTIONS)
    assert files(tmp_path / "out") == {"precious": b"mine"}
