"""What can be known before any work is known before any work; and a run that once stopped late can be mended."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from mlx_pare.base.errors import PareError, Refused, UsageError
from mlx_pare.options.settings import Settings
from mlx_pare.pipeline import export_step, run as pipeline
from mlx_pare.recovery.options import Options
from mlx_pare.store.rundir import Run

LAYERS = {"num_hidden_layers": 2}  # whole runs take half the time of four
SMALL = dict(
    keep=0.75, samples=4, length=32, train_rows=8, recover_steps=0, trials=0, context=300, widths="even",
    criterion="minitron", reconstruct=False,
)  # fmt: skip


@pytest.fixture(scope="module")
def settings(two_texts) -> Settings:
    return Settings(**two_texts, **SMALL)


@pytest.mark.parametrize("top", [513, 99_999, 10**9])
def test_f30_more_targets_than_tokens_are_refused_before_any_work(pico_models, settings, tmp_path, top):
    for call in (pipeline.run, lambda model, _, s: pipeline.dry_run(model, s)):
        with pytest.raises(UsageError, match=f"--targets {top}.*512"):
            call(pico_models("llama", **LAYERS), tmp_path / "run", replace(settings, recover_steps=2, top=top))
    assert not (tmp_path / "run").exists()
    with pytest.raises(UsageError, match="512"):
        Options(top=top).check(vocab=512)
    Options(top=512).check(vocab=512)


def test_f30_a_teacher_of_other_tokens_is_refused_before_any_work(pico_models, settings, tmp_path):
    other = pico_models("llama", tokenizer="spm", **LAYERS)
    with pytest.raises(PareError, match=r"tokenizer|vocabulary"):
        pipeline.run(
            pico_models("llama", **LAYERS),
            tmp_path / "run",
            replace(settings, recover_steps=2, teacher=str(other)),
        )
    assert not (tmp_path / "run").exists()


@pytest.fixture(scope="module")
def stopped(pico_models, settings, tmp_path_factory) -> Path:
    """A run that stopped at its export, as a context that means nothing once made it."""
    out = tmp_path_factory.mktemp("stopped") / "run"
    with pytest.MonkeyPatch.context() as patch:

        def fails(*_: object) -> dict:
            raise UsageError("a context of 300 means nothing", "give another one")

        patch.setattr(export_step, "fits_of", fails)
        with pytest.raises(UsageError, match="means nothing"):
            pipeline.run(pico_models("llama", **LAYERS), out, settings)
    with Run(out) as run:
        assert "plan" in run.manifest.steps and "export" not in run.manifest.steps
    return out


@pytest.fixture
def out(stopped, tmp_path) -> Path:
    return Path(shutil.copytree(stopped, tmp_path / "run"))


def noted(out: Path, **parameters: object) -> None:
    """The plan's record with other parameters, as an earlier version wrote them."""
    manifest = json.loads((out / "manifest.json").read_text())
    manifest["steps"]["plan"]["parameters"] |= parameters
    (out / "manifest.json").write_text(json.dumps(manifest))


@pytest.mark.parametrize("earlier", [False, True], ids=["now", "an earlier version"])
def test_f30_the_context_of_a_stopped_run_can_be_mended(pico_models, settings, out, monkeypatch, earlier):
    if earlier:
        noted(out, context=300)
    monkeypatch.setattr("mlx_pare.pipeline.steps.prune", lambda *_, **__: pytest.fail("cut again"))
    summary = pipeline.run(pico_models("llama", **LAYERS), out, replace(settings, context=400))
    assert summary["fits"]["context"] == 400
    with pytest.raises(Refused, match=r"export step.*context was 400, now it is 500"):
        pipeline.run(pico_models("llama", **LAYERS), out, replace(settings, context=500))


def test_f30_the_context_belongs_to_a_plan_for_a_mac(pico_models, two_texts, tmp_path):
    """There it decides what is cut."""
    settings = Settings(**two_texts, **{**SMALL, "keep": None, "mac": "m4-24gb"})
    model = pico_models("llama")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("mlx_pare.capacity.planner.max_weight_bytes", lambda *_, **__: 500_000)
        pipeline.run(model, tmp_path / "run", settings)
        with pytest.raises(Refused, match=r"plan step.*context was 300, now it is 400"):
            pipeline.run(model, tmp_path / "run", replace(settings, context=400))
