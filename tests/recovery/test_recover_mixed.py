"""What recovery must not mix up: the healed weights with the cut ones, one call's leavings with another's, half
precision with what is trained."""

from __future__ import annotations

import io
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
import typer
from mlx.utils import tree_flatten, tree_unflatten

from mlx_pare import lm
from mlx_pare.base.errors import PareError, Refused, UsageError
from mlx_pare.cli import main as cli
from mlx_pare.model.checkpoint import Checkpoint
from mlx_pare.options.settings import Settings
from mlx_pare.pipeline import choose_sizes, run as pipeline, steps
from mlx_pare.planning.goal import Options as PlanOptions
from mlx_pare.planning.plan import plan
from mlx_pare.pruning.prune import prune
from mlx_pare.recovery import recover as recovering, scale_tuning, student as student_module
from mlx_pare.recovery.options import DRAW_BYTES, Options, required_bytes, savings
from mlx_pare.recovery.recover import recover
from mlx_pare.recovery.student import merged, prepare, resident
from mlx_pare.recovery.teacher import held_bytes
from mlx_pare.recovery.trainer import ClippedAdamW
from mlx_pare.scoring.calibrate import calibrate
from mlx_pare.scoring.score import score
from mlx_pare.text import corpus
from mlx_pare.text.corpus import Rows
from mlx_pare.text.splits import Texts

DEMO = Path(corpus.__file__).parents[1] / "demo"
OPTIONS = Options(steps=2, batch=4, reports=1, learning_rate=1e-4)


@pytest.fixture(scope="session")
def texts(pico_models) -> tuple[Rows, Rows]:
    tok = lm.tokenizer(pico_models("llama"))
    return tuple(
        corpus.windows(tok, corpus.read(DEMO / f"{name}.txt"), 24, count, 0)
        for name, count in (("calibration", 16), ("test", 6))
    )


@pytest.fixture(scope="session")
def cut(pico_models, tmp_path_factory, texts) -> Callable[..., tuple[Path, Path]]:
    """``cut(family, packed) -> (pruned, original)``: keeps 0.6 by magnitude."""
    made: dict[tuple, tuple[Path, Path]] = {}

    def pruned(family: str = "llama", packed: tuple[int, int] | None = None) -> tuple[Path, Path]:
        if (family, packed) not in made:
            model, work = pico_models(family, packed), tmp_path_factory.mktemp("cut")
            scores = score(model, calibrate(model, texts[0], work / "stats"), work / "scores.safetensors", "magnitude")
            prune(model, plan(model, scores, PlanOptions(keep=0.6)), work / "model")
            made[family, packed] = work / "model", model
        return made[family, packed]

    return pruned


@pytest.mark.parametrize(("family", "packed"), [("llama", None), ("qwen2", (4, 32))], ids=str)
def test_training_of_norms_goes_on_from_what_was_healed_before(cut, texts, tmp_path, family, packed):
    """Block by block all weights are healed, biases too: what is written after training norms alone holds them."""
    asked = replace(OPTIONS, method="norms", local_steps=20)
    found = recover(*cut(family, packed), *texts, tmp_path / "out", asked)
    assert found["kl"]["local"] < found["kl"]["pruned"] and found["best_step"] > 0
    assert found["kl"]["trained"] == pytest.approx(found["kl_unmerged"], rel=1e-3)


@pytest.mark.parametrize("method", ["norms", "full"])
def test_every_process_has_all_weights_of_the_first(cut, texts, tmp_path, monkeypatch, method):
    """The codes too, which are no parameters any more once their scales are what is trained."""
    pruned, original = cut("llama", (4, 32))
    recover(pruned, original, *texts, tmp_path / "healed", replace(OPTIONS, steps=0, local_steps=20))
    tokens = mx.array(texts[1].tokens)
    expected = resident(tmp_path / "healed", method)(tokens)
    first = dict(tree_flatten(lm.load(tmp_path / "healed").parameters()))
    monkeypatch.setattr(student_module.distributed, "from_first", lambda about, arrays: (about, first))
    assert mx.array_equal(resident(pruned, method)(tokens), expected)
    assert not mx.allclose(expected, lm.dequantized(lm.load(pruned))(tokens), atol=1e-2)


class Killed(BaseException):
    """In the place of a signal."""


def killing(*_, **__):
    raise Killed


@pytest.mark.parametrize("change", [{"local_steps": 3}, {"seed": 1}, {"method": "full"}], ids=str)
def test_leavings_of_other_options_are_refused(cut, texts, tmp_path, monkeypatch, change):
    """Killed after the blocks were healed, and called again with something else to heal them by."""
    options = replace(OPTIONS, local_steps=2)
    with monkeypatch.context() as patched, pytest.raises(Killed):
        patched.setattr(recovering, "resident", killing)
        recover(*cut(), *texts, tmp_path / "out", options)
    with pytest.raises(Refused, match="begun with other models, rows or options"):
        recover(*cut(), *texts, tmp_path / "out", replace(options, **change))


def test_leavings_of_other_rows_are_refused(cut, texts, tmp_path, monkeypatch):
    """Those that choose the best state count as well."""
    train, validation = texts
    with monkeypatch.context() as patched, pytest.raises(Killed):
        patched.setattr(recovering._Job, "kl", killing)
        recover(*cut(), train, validation, tmp_path / "out", OPTIONS)
    with pytest.raises(Refused, match="another training"):
        recover(*cut(), train, validation.first(5), tmp_path / "out", OPTIONS)


def test_killed_while_it_tidies_up(cut, texts, tmp_path, monkeypatch):
    """The best state is deleted, the note of the training not yet: the next call begins anew, and ends the same."""
    whole = recover(*cut(), *texts, tmp_path / "whole", OPTIONS)

    rmtree = shutil.rmtree

    def some(directory: Path, **how) -> None:
        if not list(Path(directory).rglob("state-*")):
            rmtree(directory, **how)
            return
        for file in Path(directory).rglob("best-*"):
            file.unlink()
        raise Killed

    with monkeypatch.context() as patched, pytest.raises(Killed):
        patched.setattr(recovering.shutil, "rmtree", some)
        recover(*cut(), *texts, tmp_path / "first", OPTIONS, work=tmp_path / "work")
    again = recover(*cut(), *texts, tmp_path / "again", OPTIONS, work=tmp_path / "work")
    assert again == whole and sorted(f.name for f in tmp_path.iterdir()) == ["again", "first", "whole"]


@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16], ids=str)
def test_norms_of_half_precision_move(pico_models, texts, family, dtype):
    """As on Metal, where models stay as they are stored: a step of 3e-4 near 1 would round to nothing."""
    model, tokens, rate = lm.load(pico_models(family, dtype=dtype)), mx.array(texts[1].tokens), 3e-4
    before = model(tokens)
    prepare(model, "norms", 1, 1.0)
    after = model(tokens)
    assert after.dtype == dtype and mx.array_equal(before, after)
    gains = dict(tree_flatten(model.trainable_parameters()))
    assert gains and all(gain.dtype == mx.float32 for gain in gains.values())
    optimizer = ClippedAdamW(rate, 0.0)
    for _ in range(10):
        optimizer.update(model, tree_unflatten([(name, mx.ones_like(gain)) for name, gain in gains.items()]))
    for name, gain in tree_flatten(model.trainable_parameters()):
        np.testing.assert_allclose(np.array(gains[name] - gain), 10 * rate, rtol=1e-3)  # gradients of 1
    assert not mx.array_equal(model(tokens), after)


def test_what_is_healed_is_not_healed_again(pico_models, tmp_path, monkeypatch):
    """Killed, or stopped by the check, between the training and the record of it: a night's work stays."""
    asked = Settings(
        keep=0.7, length=24, samples=8, criterion="minitron", reconstruct=False, recover_steps=2, learning_rate=1e-4
    )
    model = pico_models("llama")
    texts = Texts(model, asked)
    with steps.open_run(model, tmp_path / "run") as run:
        for step in (steps.calibrate_step, lambda r, t, s: steps.score_step(r, s), choose_sizes.plan_step):
            step(run, texts, asked)
        steps.prune_step(run, False)
        with monkeypatch.context() as patched, pytest.raises(Killed):
            patched.setattr(steps, "_gate", killing)
            steps.recover_step(run, texts, asked)
        monkeypatch.setattr(steps, "recover", killing)
        assert Checkpoint(steps.recover_step(run, texts, asked)).nbytes() and "recover" in run.manifest.steps
        assert {"recovery.json", "check.json"} <= {f.name for f in run.directory("recover").iterdir()}


@pytest.mark.parametrize("family", ["llama", "llama-untied"])
@pytest.mark.parametrize("packed", [None, (4, 32)], ids=str)
def test_the_head_of_the_teacher_stays_too(pico_models, texts, family, packed):
    """With the final states, of which it makes the logits; targets on disk need neither."""
    teacher, rows = Checkpoint(pico_models(family, packed)), texts[0]
    states = rows.tokens.size * teacher.arch.sizes["hidden"] * 4
    name = "model.embed_tokens." if family == "llama" else "lm_head."
    head = sum(e.nbytes for n, e in teacher.entries.items() if n.startswith(name))
    assert head and held_bytes(teacher, rows, 2) == 3 * states + head
    assert held_bytes(teacher, rows, 2, whole=False) == 2 * states


def test_gradients_that_are_accumulated_are_counted(cut, texts):
    pair = [Checkpoint(m) for m in cut()]
    once, twice = (required_bytes(*pair, *texts, replace(OPTIONS, method="full", accumulate=n)) for n in (1, 2))
    gradients = 4 * sum(e.nbytes // 4 for n, e in pair[0].entries.items() if ".layers." in n)
    rows = OPTIONS.course.segment * (DRAW_BYTES + 8 * OPTIONS.batch)  # twice as many batches are drawn at once
    assert twice - once == gradients + rows


@pytest.mark.parametrize("method", ["lora", "dora"])
def test_adapters_are_merged_one_at_a_time(cut, method):
    """All at once a packed model would be there a second time, dense: on a small Mac the night's work would be lost."""
    model = resident(cut()[0], method)
    prepare(model, method, 4, 1.0)
    mx.eval(model.parameters())
    best = dict(tree_flatten(model.trainable_parameters()))
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    made = merged(model, best)
    sizes = []
    for make in made.values():
        matrix = make()
        mx.eval(matrix)
        sizes.append(matrix.nbytes)
        del matrix
    assert len(made) == len([name for name in best if name.endswith(".lora_a")])
    assert mx.get_peak_memory() - before < 6 * max(sizes) < sum(sizes)


def test_what_cannot_be_healed_block_by_block_is_said_first(pico_models):
    """Not after everything else is done: a cut hidden size, a teacher of another, memory."""
    model, asked = pico_models("llama"), Settings(keep=0.75, length=32, samples=8, local_steps=3, reconstruct=False)
    pipeline.preflight(model, asked)
    with pytest.raises(UsageError, match="block by block") as found:
        pipeline.preflight(model, replace(asked, axes=("ffn", "hidden")))
    assert "leave hidden out of --axes" in found.value.cure
    with pytest.raises(UsageError, match="block by block"):
        pipeline.preflight(model, replace(asked, teacher=str(pico_models("llama", hidden_size=32))))
    with pytest.raises(Refused, match="--memory-cap allows"):
        pipeline.preflight(model, replace(asked, recover_steps=0, memory_cap=1000))


def test_every_command_has_the_options_that_a_refusal_names():
    """What would take less memory can be asked of `run` as of `recover`."""
    named = {f"--{f.split()[0]}" for flags, _ in savings(OPTIONS) for f in flags.split("--")[1:]}
    assert named == {"--grad-checkpoint", "--batch", "--accumulate", "--targets"}
    commands = typer.main.get_command(cli.app).commands
    for command in ("run", "recover"):
        assert named <= {flag for parameter in commands[command].params for flag in parameter.opts}


def test_what_is_no_parameter_is_read_at_once(pico_models, monkeypatch):
    """As on Metal, where the packed matrix itself is used: a compiled step makes what is not there yet every time."""
    monkeypatch.setattr(scale_tuning.lm, "cpu_backend", lambda: False)
    block = lm.blocks(lm.load(pico_models("llama", (4, 32))))[0]
    layer = scale_tuning.Rescaled(block.mlp.up_proj)
    for array in (layer._packed.words, layer._packed.scales, layer._packed.biases):
        drawn = io.StringIO()
        mx.export_to_dot(drawn, array)
        assert "Load" not in drawn.getvalue() and "AsType" not in drawn.getvalue()
    drawn = io.StringIO()
    mx.export_to_dot(drawn, block.mlp.down_proj.weight)
    assert "Load" in drawn.getvalue()


def test_another_text_may_not_hold_what_the_run_is_tested_on(pico_models, tmp_path):
    """The same paragraphs, two to a file: they are divided otherwise."""
    paragraphs = [
        f"Paragraph {n} tells of the {n} ships that left the harbour on a grey morning in spring." for n in range(80)
    ]
    (tmp_path / "a.txt").write_text("\n\n".join(paragraphs))
    (tmp_path / "b").mkdir()
    for n in range(0, 80, 2):
        (tmp_path / "b" / f"{n}.txt").write_text("\n\n".join(paragraphs[n : n + 2]))
    run, same, other = (
        Texts(pico_models("llama"), Settings(data=[str(tmp_path / name)], length=16))
        for name in ("a.txt", "a.txt", "b")
    )
    same.apart_from(run)
    with pytest.raises(PareError, match="share the paragraph"):
        other.apart_from(run)
    mine = {p for d in other.documents["calibration"].values() for t in d for p in t.split("\n") if p}
    assert mine & {p for d in run.documents["test"].values() for t in d for p in t.split("\n") if p}
