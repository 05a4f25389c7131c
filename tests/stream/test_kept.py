"""The original is walked once for all who need it, contenders go side by side, --quick says what it leaves out."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from dataclasses import replace
from pathlib import Path

import faults
import mlx.core as mx
import numpy as np
import pytest

from mlx_pare.base.errors import Refused, UsageError
from mlx_pare.base.units import readable
from mlx_pare.model.checkpoint import Checkpoint
from mlx_pare.options.settings import Settings
from mlx_pare.pipeline import contenders, run as pipeline, steps
from mlx_pare.pipeline.order import step_names
from mlx_pare.pruning.plan_file import Plan
from mlx_pare.recovery import options as recover_options
from mlx_pare.repair.reconstruct import check_memory, reconstruct, reconstruct_all
from mlx_pare.stream import kept, memory as stream_memory, walk as stream
from mlx_pare.text.corpus import Rows

ROWS = Rows.full(np.random.default_rng(3).integers(0, 500, (7, 24)))
SMALL = {"num_hidden_layers": 2}  # of whole runs: half the time of four layers


@pytest.fixture(scope="module")
def settings(two_texts, tmp_path_factory) -> Settings:
    """A text so short that recovery trains on the rows of calibration."""
    folder = tmp_path_factory.mktemp("short")
    for name, file in two_texts.items():
        (folder / name).with_suffix(".txt").write_text(Path(file).read_text("utf-8")[:3000], "utf-8")
    texts = {name: str((folder / name).with_suffix(".txt")) for name in two_texts}
    return Settings(
        **texts, keep=0.75, length=32, samples=400, recover_steps=3, trials=0, gguf="f16", context=256, tries=2
    )


@pytest.fixture
def walks(monkeypatch) -> Counter:
    """How often each model is walked over which rows from here on."""
    real, counted = stream.walk, Counter()

    def walk(path, rows, *more, **named):
        counted[Path(path).resolve(), rows.digest()] += 1
        return real(path, rows, *more, **named)

    monkeypatch.setattr(stream, "walk", walk)
    return counted


@pytest.fixture(scope="module")
def whole(pico_models, settings, tmp_path_factory) -> tuple[Path, Path, dict]:
    """A model, a run of it that nobody disturbed, and what that returned."""
    model, out = pico_models("llama", (4, 32), **SMALL), tmp_path_factory.mktemp("whole") / "run"
    return model, out, pipeline.run(model, out, settings)


# ---- walked once ----


def test_the_original_is_walked_once_over_the_test_rows(pico_models, settings, tmp_path, walks):
    """By all five contenders together; and over calibration rows once for each way to look at them: statistics,
    trials (beside held-out rows), the result, the other contenders. Recovery learns from the end of the first."""
    model = pico_models("llama", (4, 32), **SMALL).resolve()
    summary = pipeline.run(model, tmp_path / "run", settings)
    assert set(summary["contenders"]) == {"original", "pruned", "recovered", "random", "fewer-bits"}
    texts = steps.Texts(model, settings)
    assert texts.training_domains.rows.digest() == texts.calibration.digest()
    own = {digest: count for (path, digest), count in walks.items() if path == model}
    assert own.pop(texts.test.digest()) == 1
    assert own.pop(texts.calibration.digest()) == 3
    assert own.pop(texts.validation.digest()) == 1
    assert list(own.values()) == [1]  # the trials
    assert not (tmp_path / "run" / "kept").exists()


@pytest.mark.parametrize("spooled", [False, True])
def test_kept_states_are_those_of_the_walk(pico_models, tmp_path, monkeypatch, walks, spooled):
    monkeypatch.setattr(stream_memory, "must_spool", lambda *_: spooled)
    model = pico_models("qwen3", (4, 32))
    wanted = stream.walk(model, ROWS)
    first, again = (kept.end_of(model, ROWS, tmp_path) for _ in range(2))
    inside = kept.end_of(model, ROWS, tmp_path, whole=True)
    assert isinstance(inside.hidden, mx.array) and len(list(tmp_path.iterdir())) == 1
    for found in (first, again, inside):
        assert mx.array_equal(found.hidden[:], wanted.hidden).item()
        assert mx.array_equal(found.all_logits(slice(None)), wanted.all_logits(slice(None))).item()
        assert mx.array_equal(found.norm(wanted.hidden), wanted.norm(wanted.hidden)).item()
    assert sum(walks.values()) == 2  # one of them is the test's own


def test_states_are_of_one_model_and_one_text(pico_models, tmp_path):
    one, other = pico_models("llama"), pico_models("llama", (4, 32))
    kept.end_of(one, ROWS, tmp_path)
    assert kept.has(one, ROWS, tmp_path)
    assert not kept.has(other, ROWS, tmp_path) and not kept.has(one, ROWS.first(3), tmp_path)


def test_damaged_states_are_made_again(pico_models, tmp_path, walks):
    model = pico_models("llama")
    before = np.array(kept.end_of(model, ROWS, tmp_path).hidden[:])
    (file,) = tmp_path.iterdir()
    file.write_bytes(file.read_bytes()[:-100])
    assert not kept.has(model, ROWS, tmp_path)
    assert np.array_equal(np.array(kept.end_of(model, ROWS, tmp_path).hidden[:]), before)
    assert sum(walks.values()) == 2


class Stop(Exception):
    """As a kill."""


@pytest.mark.parametrize("begun_before", [False, True], ids=["with what was kept", "begun by an older version"])
def test_a_run_that_goes_on_does_not_walk_again(whole, settings, tmp_path, monkeypatch, walks, begun_before):
    """Stopped when the first of the two contenders was about to be measured. An older version kept nothing."""
    model, finished, _ = whole
    out, real = tmp_path / "run", contenders.measured

    def stop(*_):
        raise Stop

    monkeypatch.setattr(contenders, "measured", stop)
    with pytest.raises(Stop):
        pipeline.run(model, out, settings)
    monkeypatch.setattr(contenders, "measured", real)
    assert {f.name.split("-")[0] for f in (out / "kept").iterdir()} == {"states", "repair"}
    if begun_before:
        shutil.rmtree(out / "kept")
    walks.clear()
    pipeline.run(model, out, settings)
    texts = steps.Texts(model, settings)
    again = [walks[model.resolve(), rows.digest()] for rows in (texts.test, texts.calibration)]
    # the matrices of the one that was being measured are gone, those of the other are there
    assert again == ([1, 1] if begun_before else [0, 1])
    assert not faults.differences(out, faults.result(finished)) and not (out / "kept").exists()


# ---- side by side ----


def plans_of(whole) -> list[Plan]:
    _, out, _ = whole
    return [Plan.load(out / f"evaluate-{name}" / "plan.json") for name in ("random", "fewer-bits")] + [
        Plan.load(out / "plan" / "plan.json")
    ]


@pytest.mark.parametrize("memory", ["for all", "for one"])
def test_plans_side_by_side_are_as_each_alone(whole, tmp_path, walks, memory):
    """Bit for bit: a plan with other bits, which packs the block for itself, among them."""
    model, plans = whole[0], plans_of(whole)
    checkpoint = Checkpoint(model)
    one, all_of_them = (check_memory(checkpoint, ROWS, 1 << 40, count) for count in (1, 3))
    assert one < all_of_them
    places = [tmp_path / str(n) for n in range(3)]
    made = reconstruct_all(model, plans, ROWS, places, memory_cap=all_of_them if memory == "for all" else one)
    assert sum(walks.values()) == (1 if memory == "for all" else 3)
    for number, plan in enumerate(plans):
        assert made[number] == reconstruct(model, plan, ROWS, tmp_path / "alone")
        files = sorted((tmp_path / "alone").iterdir())
        assert files and [f.name for f in files] == sorted(f.name for f in places[number].iterdir())
        assert all(f.read_bytes() == (places[number] / f.name).read_bytes() for f in files)
        shutil.rmtree(tmp_path / "alone")
    with pytest.raises(Refused):
        reconstruct_all(model, plans, ROWS, places, memory_cap=one - 1)


# ---- --quick ----


def test_quick_says_what_it_leaves_out_and_goes_on_to_the_same_bytes(whole, settings, tmp_path):
    model, finished, _ = whole
    out, quick = tmp_path / "run", replace(settings, quick=True, trials=1)
    summary = pipeline.run(model, out, quick)
    said = (out / "log.txt").read_text("utf-8")
    assert "recovery, the random cut, fewer bits and the measurement of speed are left out" in said
    assert set(summary["contenders"]) == {"original", "pruned"} and summary["bench"] is None
    assert {p.name for p in out.glob("*")} >= {"evaluate-original", "evaluate-pruned", "export", "report.md"}
    assert not [p.name for p in out.iterdir() if p.name in ("recover", "evaluate-random", "bench", "kept")]
    report = (out / "report.md").read_text()
    assert summary["verdict"] in report and "**Not compared:**" in report and "--quick" in report
    assert "orth it" not in summary["verdict"] and "an alternative" not in report
    assert summary == pipeline.run(model, out, quick)
    pipeline.run(model, out, settings)
    assert "calibrate: done before" in (out / "log.txt").read_text("utf-8")[len(said) :]
    assert not faults.differences(out, faults.result(finished))


def test_quick_of_a_run_that_was_measured_in_full_claims_nothing(whole, settings, tmp_path):
    """What an earlier call compared is not this call's: the report is of the cut alone. The export is of another model,
    which is refused by name."""
    model, finished, _ = whole
    out = Path(shutil.copytree(finished, tmp_path / "run"))
    with pytest.raises(Refused, match="the export step"):
        pipeline.run(model, out, replace(settings, quick=True))
    shutil.rmtree(out / "export")
    summary = pipeline.run(model, out, replace(settings, quick=True))
    assert "**Not compared:**" in summary["verdict"] and set(summary["contenders"]) == {"original", "pruned"}


def test_quick_has_no_stages(pico_models, settings, tmp_path):
    asked = replace(settings, keep=None, stages=(0.8, 0.6), quick=True)
    with pytest.raises(UsageError, match="--schedule"):
        pipeline.run(pico_models("llama"), tmp_path / "run", asked)
    assert not (tmp_path / "run").exists()


def test_status_of_a_quick_run_waits_for_nothing_else():
    assert step_names({"quick": True, "recover_steps": 0, "trials": 0})[-3:] == [
        "evaluate-original", "evaluate-pruned", "export",
    ]  # fmt: skip


def test_the_first_result_comes_before_recovery(pico_models, settings, tmp_path, monkeypatch):
    def stop(*_):
        raise Stop

    monkeypatch.setattr(steps, "recover_step", stop)
    with pytest.raises(Stop):
        pipeline.run(pico_models("llama", (4, 32), **SMALL), tmp_path / "run", settings)
    log = (tmp_path / "run" / "log.txt").read_text("utf-8")
    (line,) = [line for line in log.splitlines() if "first result: " in line]
    found = json.loads((tmp_path / "run" / "evaluate-pruned" / "metrics.json").read_text())
    assert f"-> {readable(found['perplexity'], 2)}, KL divergence {found['kl_divergence']:.4f}" in line


# ---- memory of training ----


@pytest.mark.parametrize("change, limit, swift", [({}, 1 << 40, True), ({"grad_checkpoint": True}, 1 << 40, False),
                                                  ({}, 0, False)])  # fmt: skip
def test_training_is_swift_where_the_memory_is_there(pico_models, change, limit, swift, monkeypatch):
    monkeypatch.setattr(recover_options.lm, "cpu_backend", lambda: True)
    checkpoint, options = Checkpoint(pico_models("llama")), recover_options.Options(**change)
    assert recover_options.swift_fits(checkpoint, checkpoint, ROWS, ROWS, options, limit) is swift
    plain, more = (
        recover_options.required_bytes(checkpoint, checkpoint, ROWS, ROWS, options, swift=on) for on in (False, True)
    )
    assert more >= plain
    needed = recover_options.check_memory(checkpoint, checkpoint, ROWS, ROWS, options, 1 << 40)
    assert needed == (plain if change else more)
