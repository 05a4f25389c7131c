"""What `recover` does if its training does not fit in memory: it saves memory by itself as long as it trains the same,
says so, and goes on like that. Everything else is still refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from mlx_pare.base.errors import Refused
from mlx_pare.base.units import gb
from mlx_pare.model.checkpoint import Checkpoint
from mlx_pare.options.settings import Settings
from mlx_pare.pipeline import choose_sizes, run as pipeline, steps
from mlx_pare.recovery import options as recover_options
from mlx_pare.recovery.options import (
    Options,
    alike,
    as_begun,
    check_memory,
    fitting,
    required_bytes,
    savings,
    teaching_bytes,
)
from mlx_pare.recovery.trainer import Trainer
from mlx_pare.reporting import report as reporting
from mlx_pare.store.manifest import read_manifest
from mlx_pare.text.corpus import Extent
from mlx_pare.text.splits import Texts

ROWS = Extent(512, 512), Extent(64, 512)
WAYS = [
    "--grad-checkpoint",
    "--grad-checkpoint --accumulate 2 --batch 2",
    "--grad-checkpoint --accumulate 4 --batch 1",
    "--targets 64",
    "--grad-checkpoint --targets 64",
    "--grad-checkpoint --accumulate 2 --batch 2 --targets 64",
    "--grad-checkpoint --accumulate 4 --batch 1 --targets 64",
]
ASKED = Settings(
    keep=0.7, length=32, samples=8, criterion="minitron", reconstruct=False, widths="even", recover_steps=4,
    learning_rate=1e-3,
)  # fmt: skip
TIMES = 2000  # estimates of the tiny models of whole runs, as if they were that many times larger


@pytest.fixture
def model(pico_models) -> Checkpoint:
    return Checkpoint(pico_models("llama"))


@pytest.fixture
def no_walk(monkeypatch) -> None:
    """The training alone decides."""
    monkeypatch.setattr(recover_options, "teaching_bytes", lambda *_: 0)


def needed(model: Checkpoint, options: Options) -> int:
    return required_bytes(model, model, *ROWS, options)


def chosen(model: Checkpoint, options: Options, limit: int) -> tuple[Options, str]:
    return fitting(model, model, *ROWS, options, limit)


def refused(model: Checkpoint, options: Options, limit: int) -> None:
    """As it always was: by the same words."""
    with pytest.raises(Refused) as found:
        chosen(model, options, limit)
    with pytest.raises(Refused) as before:
        check_memory(model, model, *ROWS, options, limit)
    assert str(found.value) == str(before.value)


# ---- the choice ----


def test_what_fits_is_done_as_it_was_asked(model):
    assert chosen(model, Options(), 1 << 40) == (Options(), "")


@pytest.mark.parametrize("way", range(len(WAYS)))
def test_the_first_way_that_fits_is_taken(model, no_walk, way):
    """The whole vocabulary as long as possible, and the least that is enough."""
    ladder = list(alike(Options()))
    assert [recover_options.flags(o) for o in ladder] == WAYS
    limit = needed(model, ladder[way])
    expected = next(o for o in ladder if needed(model, o) <= limit)
    assert limit < needed(model, Options())
    found, line = chosen(model, Options(), limit)
    assert found == expected
    assert line == (
        f"recovering {model.path} needs about {gb(needed(model, Options()))}, --memory-cap allows {gb(limit)}: going "
        f"on with {recover_options.flags(expected)}, which takes about {gb(needed(model, expected))}"
    )


def test_without_a_cap_the_free_memory_counts(model, no_walk, monkeypatch):
    limit = needed(model, next(alike(Options())))
    monkeypatch.setattr(recover_options, "machine", SimpleNamespace(available_bytes=lambda: limit))
    found, line = fitting(model, model, *ROWS, Options(), None)
    assert found.grad_checkpoint and f"free are {gb(limit)}: going on with --grad-checkpoint, " in line


@pytest.mark.parametrize("asked", [{}, {"method": "full"}, {"on_policy": 0.5}, {"cross_entropy": 0.2}], ids=str)
def test_what_is_trained_stays_the_same(asked):
    options = Options(**asked)
    for one in alike(options):
        rest = {"grad_checkpoint": False, "batch": 4, "accumulate": 1, "top": None}
        assert replace(one, **rest) == options and one.batch * one.accumulate == 4
        one.check(512)


def test_targets_are_not_for_rows_that_the_student_writes():
    assert [recover_options.flags(o) for o in alike(Options(on_policy=0.5))] == WAYS[:3]


def test_the_batch_that_blocks_are_healed_with_stays():
    """They are trained with it too, and accumulate nothing."""
    ways = [recover_options.flags(o) for o in alike(Options(local_steps=3))]
    assert ways == [way for way in WAYS if "--batch" not in way]


@pytest.mark.parametrize(
    "asked, cure", [({"method": "full"}, "--method lora"), ({"on_policy": 0.5}, "--on-policy 0")], ids=str
)
def test_another_training_is_only_suggested(model, no_walk, asked, cure):
    """Another method, or no rows of its own: that is for the user to say."""
    options = Options(**asked)
    limit = max(needed(model, o) for text, o in savings(options) if cure in text)
    assert limit < min(needed(model, o) for o in alike(options))
    refused(model, options, limit)
    with pytest.raises(Refused, match=cure):
        chosen(model, options, limit)


@pytest.mark.parametrize(
    "asked", [{"batch": 8}, {"accumulate": 2}, {"grad_checkpoint": True}, {"top": 300}, {"batch": 2}], ids=str
)
def test_who_says_how_memory_is_used_is_refused(model, no_walk, asked):
    options = Options(**asked)
    limit = needed(model, options) - 1
    assert not list(alike(options)) and any(needed(model, o) <= limit for _, o in savings(options))
    refused(model, options, limit)


def test_what_never_fits_is_refused(model, no_walk):
    refused(model, Options(), 1000)


def test_a_batch_is_shared_by_all_processes(model, no_walk, monkeypatch):
    monkeypatch.setattr(recover_options.distributed, "this", lambda: (0, 2))
    ladder = list(alike(Options()))
    assert chosen(model, Options(), needed(model, ladder[1]))[0].batch == 2
    assert chosen(model, Options(), needed(model, ladder[2]))[0].batch > 1


def test_more_targets_than_tokens_are_no_way(model, no_walk, monkeypatch):
    monkeypatch.setattr(recover_options, "TOP", model.arch.sizes["vocab"] + 1)
    limit = min(needed(model, one) for one in alike(Options()))
    assert limit == needed(model, list(alike(Options()))[-1])
    with pytest.raises(Refused):
        chosen(model, Options(), limit)


def test_the_walk_of_the_teacher_must_fit_too(model):
    """It comes before the training and would refuse what was chosen. Targets are collected part by part."""
    rows = Extent(60_000, 512), Extent(64, 512)
    training = required_bytes(model, model, *rows, Options())
    whole, parts = (teaching_bytes(model, rows[0], Options(top=top)) for top in (None, 64))
    limit = (training + whole) // 2
    assert parts < training < limit < whole
    found, line = fitting(model, model, *rows, Options(), limit)
    assert found == Options(top=64) and f"needs about {gb(whole)}" in line
    kept = fitting(model, model, *rows, Options(top=64), limit)
    assert kept == (Options(top=64), "")


def test_what_an_earlier_call_chose_is_taken_over():
    for one in alike(Options(method="full")):
        before = json.loads(json.dumps(asdict(one)))
        assert as_begun(Options(method="full"), before) == one
        assert as_begun(Options(method="full", batch=8), before) == Options(method="full", batch=8)
    explicit = asdict(Options(batch=2))
    assert as_begun(Options(), explicit) == Options()  # nobody chose it: it is refused as a change
    assert as_begun(Options(), {}) == Options()  # of an earlier version


# ---- whole runs ----


@pytest.fixture(scope="module")
def pruned(pico_models, two_texts, tmp_path_factory) -> Path:
    """A run that is done up to prune."""
    out, model = tmp_path_factory.mktemp("less") / "run", pico_models("llama", num_hidden_layers=2)
    asked = replace(ASKED, **two_texts)
    texts = Texts(model, asked)
    with steps.open_run(model, out) as run:
        run.write_recipe({"model": str(model), "length": asked.length, "samples": asked.samples, **two_texts})
        steps.calibrate_step(run, texts, asked)
        steps.score_step(run, asked)
        choose_sizes.plan_step(run, texts, asked)
        steps.prune_step(run, False)
    return out


@pytest.fixture
def asked(two_texts) -> Settings:
    return replace(ASKED, **two_texts)


@pytest.fixture
def out(pruned, tmp_path) -> Path:
    return Path(shutil.copytree(pruned, tmp_path / "run"))


@contextmanager
def free(way: int | None) -> Iterator[int]:
    """As if the models were larger, and so much memory were free that a way fits and those before do not; None: any.
    The number is the limit that a command would name by --memory-cap."""
    real = required_bytes
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(recover_options, "required_bytes", lambda *given, **named: TIMES * real(*given, **named))
        patch.setattr(recover_options, "machine", SimpleNamespace(available_bytes=lambda: LIMITS[way]))
        yield LIMITS[way]


LIMITS: dict[int | None, int] = {None: 1 << 50}


@pytest.fixture(scope="module", autouse=True)
def limits(pruned, two_texts) -> None:
    """The memory that every way takes in these runs."""
    options = steps.recover_options(replace(ASKED, **two_texts))
    with steps.continue_run(pruned) as run:
        texts = Texts(run.model, replace(ASKED, **two_texts))
        sizes = Checkpoint(run.path / "prune" / "model"), Checkpoint(run.model)
        rows = texts.training_domains.rows, texts.validation_domains.rows
    for number, one in enumerate(alike(options)):
        LIMITS[number] = TIMES * required_bytes(*sizes, *rows, one)
    assert LIMITS[1] < LIMITS[0] and min(LIMITS.values()) > 1 << 30  # more than any walk takes


def recovered(out: Path, asked: Settings) -> dict[str, bytes]:
    with steps.continue_run(out) as run:
        steps.recover_step(run, Texts(run.model, asked), asked)
    return files(out)


def files(out: Path) -> dict[str, bytes]:
    """The recovered model."""
    return {f.name: f.read_bytes() for f in (out / "recover" / "model").iterdir()}


def used(out: Path) -> dict:
    """The options that the manifest has, and recovery.json too."""
    found = read_manifest(out).steps["recover"].parameters
    told = json.loads((out / "recover" / "recovery.json").read_text())["options"]
    assert all(told[name] == found[name] for name in recover_options.SAVING)
    return {name: found[name] for name in recover_options.SAVING}


SECOND = {"grad_checkpoint": True, "batch": 2, "accumulate": 2, "top": None}  # WAYS[1]


@pytest.fixture(scope="module")
def finished(pruned, limits, two_texts, tmp_path_factory) -> Path:
    """A run that was recovered with memory for WAYS[1]."""
    out = Path(shutil.copytree(pruned, tmp_path_factory.mktemp("finished") / "run"))
    with free(1):
        recovered(out, replace(ASKED, **two_texts))
    return out


def test_recover_saves_memory_by_itself_and_says_so(finished):
    lines = (finished / "log.txt").read_text().splitlines()
    (line,) = [line for line in lines if " warning " in line]
    assert " recovering " in line and f"free are {gb(LIMITS[1])}: going on with {WAYS[1]}, which takes" in line
    assert used(finished) == SECOND
    assert " Each step: 4 rows in 2 batches, activations computed twice." in reporting._recovery(finished)


def test_the_report_says_how_memory_was_used_if_nothing_was_chosen(out, asked, capsys):
    with free(None):
        recovered(out, replace(asked, batch=8, top=32))
    assert "going on with" not in capsys.readouterr().err
    assert " Each step: 8 rows, the teacher's 32 most likely tokens." in reporting._recovery(out)


class Killed(Exception):
    pass


@pytest.fixture
def kill(monkeypatch) -> Callable[[], None]:
    """``kill()``: from now on training stops after its first segment."""

    def begin() -> None:
        real, done = Trainer._segment, []

        def segment(self, *given):
            if done:
                raise Killed
            done.append(real(self, *given))

        monkeypatch.setattr(Trainer, "_segment", segment)

    return begin


def stop(out: Path, asked: Settings, kill: Callable[[], None], monkeypatch) -> None:
    with monkeypatch.context(), pytest.raises(Killed):
        kill()
        recovered(out, asked)
    monkeypatch.undo()
    assert list((out / "recover.partial" / "work" / "training").iterdir())


def test_a_killed_recovery_goes_on_as_it_began(finished, out, asked, kill, capsys, monkeypatch):
    """Whatever memory is free then, and to the same bytes. If it is less, it waits."""
    with free(1):
        stop(out, asked, kill, monkeypatch)
    with free(2), pytest.raises(Refused, match="needs about"):
        recovered(out, asked)
    (out / "log.txt").rename(out.with_name("before.txt"))
    capsys.readouterr()
    with free(None):
        assert recovered(out, asked) == files(finished)
    log = (out / "log.txt").read_text()
    assert "going on with" not in log and "warning" not in capsys.readouterr().err
    assert log.count(f"recover: goes on with {WAYS[1]}, as it began") == 1
    assert used(out) == SECOND


def test_a_recovery_that_began_as_asked_does_not_change(out, asked, kill, monkeypatch):
    """If less is free when it goes on, it waits for memory."""
    with free(None):
        stop(out, asked, kill, monkeypatch)
    with free(1), pytest.raises(Refused, match="needs about"):
        recovered(out, asked)
    with free(None):
        recovered(out, asked)
    assert used(out) == {"grad_checkpoint": False, "batch": 4, "accumulate": 1, "top": None}


@pytest.mark.parametrize("now", [None, 6], ids=["all memory", "little"])
def test_a_finished_recovery_is_kept(finished, asked, tmp_path, capsys, now):
    out = Path(shutil.copytree(finished, tmp_path / "run"))
    (out / "log.txt").unlink()
    with free(now):
        assert recovered(out, asked) == files(finished)
    log = (out / "log.txt").read_text()
    assert "recover: done before, kept" in log and "goes on" not in log and "warning" not in capsys.readouterr().err


def test_explicit_options_are_kept_and_missed(out, asked, kill, monkeypatch):
    explicit = replace(asked, batch=2)
    with free(None):
        stop(out, explicit, kill, monkeypatch)
        with pytest.raises(Refused, match="batch was 2, now it is 4"):
            recovered(out, asked)
        recovered(out, explicit)
        with pytest.raises(Refused, match="batch was 2, now it is 4"):
            recovered(out, asked)
    assert used(out)["batch"] == 2 and used(out)["accumulate"] == 1


def test_explicit_options_that_do_not_fit_are_refused(out, asked):
    with free(1), pytest.raises(Refused, match="needs about") as found:
        recovered(out, replace(asked, batch=8))
    assert found.value.cure.startswith("--grad-checkpoint --accumulate ")
    assert not (out / "recover").exists()


def test_under_a_cap_from_the_command_line(out, pare):
    asked = ["--recover-steps", 2, "--learning-rate", 1e-3]
    with free(1) as cap:
        done = pare("recover", out, *asked, "--memory-cap", cap)
        assert done.code == 0 and done.err.count("going on with") == 1
        assert f"--memory-cap allows {gb(cap)}: going on with {WAYS[1]}, " in done.err
        assert pare("status", out, "--json").document["steps"][-1]["step"] == "recover"
    assert used(out) == SECOND
    again = pare("recover", out, *asked, "--quiet")
    assert again.code == 0 and not again.err


def test_what_the_first_process_chose_counts_for_all(out, asked, monkeypatch):
    """Under mlx.launch: the others have no record of the run, and may have other memory."""
    taken, first = [], {"train": True, "options": asdict(steps.recover_options(replace(asked, grad_checkpoint=True)))}
    monkeypatch.setattr(steps.distributed, "this", lambda: (1, 2))
    monkeypatch.setattr(steps.distributed, "from_first", lambda about: (first, {}))
    monkeypatch.setattr(steps, "recover", lambda *given: taken.append(given))
    with steps.continue_run(out, locked=False) as run:
        steps.recover_step(run, Texts(run.model, asked), asked)
    assert [o.grad_checkpoint for (given,) in [taken] for o in given if isinstance(o, Options)] == [True]


# ---- before a run ----


def test_a_run_is_not_refused_for_what_recovery_can_save(pruned, asked, capsys):
    """The uncut model bounds the cut one: what is chosen is told when it is known."""
    model = read_manifest(pruned).model
    asked = replace(asked, train_rows=8)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(recover_options, "teaching_bytes", lambda *_: 0)
        rows = Extent(8, asked.length), Extent(64, asked.length)
        options, whole = steps.recover_options(asked), Checkpoint(Path(model))
        limit = required_bytes(whole, whole, *rows, next(alike(options)))
        patch.setattr(recover_options, "machine", SimpleNamespace(available_bytes=lambda: limit))
        assert "going on with --grad-checkpoint" in pipeline.preflight(Path(model), asked)
        assert "going on with" not in capsys.readouterr().err
        found = pipeline.dry_run(model, asked)
        assert f"going on with {WAYS[0]}, which takes about {gb(limit)}" in capsys.readouterr().err
        with pytest.raises(Refused, match="needs about"):
            pipeline.preflight(Path(model), replace(asked, batch=8))
        pipeline.preflight(Path(model), replace(asked, batch=8), True)
    assert pipeline.preflight(Path(model), asked) == "" and pipeline.dry_run(model, asked) == found
