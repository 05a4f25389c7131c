"""A run goes on whatever the files of mlx-pare are called: what it is known again by names no module.

It goes on, too, with statistics and scores whose arrays have the names of an earlier version.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from mlx_pare import api
from mlx_pare.base import machine
from mlx_pare.base.errors import PareError
from mlx_pare.options.settings import Settings
from mlx_pare.pipeline import run as pipeline, steps
from mlx_pare.planning.goal import Options
from mlx_pare.planning.plan import plan
from mlx_pare.scoring.calibrate import Statistics, calibrate
from mlx_pare.scoring.score import score
from mlx_pare.store.arrays import Arrays
from mlx_pare.store.manifest import Manifest, read_manifest
from mlx_pare.text.corpus import Rows

PACKAGE = Path(pipeline.__file__).parents[1]
MODULES = {
    ".".join(file.relative_to(PACKAGE).with_suffix("").parts)
    for file in PACKAGE.rglob("*.py")
    if file.name not in ("__init__.py", "__main__.py")
}
CONTENT = re.compile(r"(?:quick:)?[0-9a-f]{16,64}|none|own")  # of a file, of rows, of a model


@pytest.fixture(scope="module")
def run(pico_models, two_texts, tmp_path_factory) -> Path:
    """A run of every step up to the pruned model and its measurement."""
    out = tmp_path_factory.mktemp("begun") / "run"
    pipeline.run(pico_models("llama", (4, 32), num_hidden_layers=2), out, asked(two_texts))
    return out


def asked(texts: dict) -> Settings:
    return Settings(**texts, keep=0.75, length=32, samples=16, context=256, criterion="minitron", quick=True)


@pytest.fixture(scope="module")
def manifest(run) -> Manifest:
    return read_manifest(run)


def texts_in(value: Any) -> Iterator[str]:
    """Every text in a JSON document, the keys as well."""
    if isinstance(value, dict):
        for key, inner in value.items():
            yield key
            yield from texts_in(inner)
    elif isinstance(value, list | tuple):
        for inner in value:
            yield from texts_in(inner)
    elif isinstance(value, str):
        yield value


def test_inputs_of_a_step_are_contents(manifest):
    assert len(manifest.steps) >= 6
    for name, record in manifest.steps.items():
        assert record.inputs, name
        for key, value in record.inputs.items():
            assert CONTENT.fullmatch(value), f"{name}: {key} = {value}"


def test_parameters_of_a_step_name_no_module(manifest):
    for name, record in manifest.steps.items():
        named = {text for text in texts_in(record.parameters) if "mlx_pare" in text or text in MODULES}
        assert not named, name
        assert not [text for text in texts_in(record.parameters) if text.endswith(".py")], name


def test_nothing_in_a_run_names_the_package(run):
    documents = [*run.rglob("*.json"), *run.rglob("*.toml")]
    assert len(documents) > 10
    assert not [str(file.relative_to(run)) for file in documents if "mlx_pare" in file.read_text("utf-8")]
    assert read_manifest(run).versions.keys().isdisjoint(MODULES)


# ---- names of an earlier version ----


def earlier_stats(file: Path) -> Path:
    """Give the arrays of a file of calibrate the names that they had."""
    found = Arrays.load(file, "statistics")
    arrays = {name.replace("attn_norm", "attn_ln").replace("ffn_norm", "ffn_ln"): a for name, a in found.arrays.items()}
    assert arrays.keys() != found.arrays.keys()
    Arrays({name: mx.array(a) for name, a in arrays.items()}, found.about).save(file)
    return file


def earlier_scores(file: Path, group: int = 2) -> Path:
    """Give the arrays of a file of scores the names and shapes that they had: query heads apart, and the two norms."""
    found = Arrays.load(file, "scores")
    arrays = dict(found.arrays)
    arrays |= {"mlp": arrays.pop("ffn"), "attention": np.repeat(arrays.pop("kv_head") / group, group, axis=1)}
    arrays |= dict.fromkeys(("attn_ln", "ffn_ln"), arrays.pop("hidden") / 2)
    Arrays({name: mx.array(a) for name, a in arrays.items()}, found.about).save(file)
    return file


def test_earlier_scores_give_the_same_units(pico_models, pico_stats, tmp_path):
    model, options = pico_models("llama"), Options(keep=0.5, axes=("ffn", "kv_head", "hidden"))
    scores = score(model, pico_stats(model), tmp_path / "scores.safetensors", "wanda")
    expected, lowest = plan(model, scores, options), api.candidates(scores, 0.25)
    assert len(expected.layers[0].kv_head) == 1 and expected.hidden
    earlier_scores(scores)
    assert plan(model, scores, options) == expected and api.candidates(scores, 0.25) == lowest


def test_earlier_scores_of_query_heads_are_summed(pico_models, pico_stats, tmp_path):
    """The sum over the group decides, not its best or its first head."""
    model = pico_models("llama")
    file = earlier_scores(score(model, pico_stats(model), tmp_path / "scores.safetensors", "wanda"))
    found = Arrays.load(file, "scores")
    found.arrays["attention"] = np.tile(np.float32([5, 0, 3, 3]), (4, 1))
    Arrays({name: mx.array(a) for name, a in found.arrays.items()}, found.about).save(file)
    made = plan(model, file, Options(keep=0.7, axes=("ffn", "kv_head")))
    assert [layer.kv_head for layer in made.layers] == [[1]] * 4


def test_earlier_scores_of_another_model_are_refused(pico_models, pico_stats, tmp_path):
    """By the model, before the numbers of heads are compared."""
    model, other = pico_models("llama"), pico_models("llama", num_attention_heads=6, num_key_value_heads=3)
    file = earlier_scores(score(model, pico_stats(model), tmp_path / "scores.safetensors", "wanda"))
    with pytest.raises(PareError, match="another model"):
        plan(other, file, Options(keep=0.5))


@pytest.mark.parametrize("criterion", ["minitron", "wanda", "composite"])
def test_earlier_statistics_give_the_same_scores(pico_models, pico_stats, tmp_path, criterion):
    model, stats = pico_models("qwen3"), tmp_path / "stats.safetensors"
    stats.write_bytes(pico_stats(model).read_bytes())
    expected = score(model, stats, tmp_path / "now.safetensors", criterion).read_bytes()
    assert score(model, earlier_stats(stats), tmp_path / "before.safetensors", criterion).read_bytes() == expected


def test_a_calibration_begun_earlier_goes_on(pico_models, tmp_path, monkeypatch):
    """The blocks that were done are not done again, and the file has the arrays and the names of today."""
    model, rows = pico_models("llama"), Rows.full(np.random.default_rng(0).integers(0, 500, (5, 16)))
    expected = Arrays.load(calibrate(model, rows, tmp_path / "whole"), "statistics")
    entered, enter, leave = [], Statistics.enter, Statistics.leave

    def then_stop(self, index, hidden):
        leave(self, index, hidden)
        if index == 1:
            raise InterruptedError

    with monkeypatch.context() as patch, pytest.raises(InterruptedError):
        patch.setattr(Statistics, "leave", then_stop)
        calibrate(model, rows, tmp_path / "begun", save_every_s=0)
    blocks = [earlier_stats(file) for file in (tmp_path / "begun").glob("block-*")]
    monkeypatch.setattr(Statistics, "enter", lambda s, i, b, m: (entered.append(i), enter(s, i, b, m))[1])
    found = Arrays.load(calibrate(model, rows, tmp_path / "begun"), "statistics")
    assert len(blocks) == 2 and entered == [2, 3]
    assert found.about == expected.about and found.arrays.keys() == expected.arrays.keys()
    assert all(np.array_equal(found.arrays[name], values) for name, values in expected.arrays.items())


def test_a_run_with_earlier_files_makes_the_same_plan(run, pico_models, two_texts, tmp_path, monkeypatch):
    def calibrated(model, rows, directory, *args, **options):
        return earlier_stats(calibrate(model, rows, directory, *args, **options))

    monkeypatch.setattr(steps, "calibrate", calibrated)
    monkeypatch.setattr(steps, "score", lambda *args: earlier_scores(score(*args)))
    pipeline.run(pico_models("llama", (4, 32), num_hidden_layers=2), tmp_path / "run", asked(two_texts))
    assert "mlp" in Arrays.load(tmp_path / "run" / "score" / "scores.safetensors", "scores").arrays
    plans = [(place / "plan" / "plan.json").read_bytes() for place in (run, tmp_path / "run")]
    assert plans[0] == plans[1]


# ---- keys that earlier manifests do not have ----


def test_a_run_that_did_not_note_on_what_it_was_computed_goes_on(
    run, pico_models, two_texts, tmp_path, monkeypatch, capsys
):
    """Without a warning, wherever it goes on."""
    out, model = Path(shutil.copytree(run, tmp_path / "run")), pico_models("llama", (4, 32), num_hidden_layers=2)
    manifest = json.loads((out / "manifest.json").read_text())
    assert manifest["computed_on"] == [machine.computes_on()]
    del manifest["computed_on"], manifest["steps"]["export"]
    (out / "manifest.json").write_text(json.dumps(manifest))
    shutil.rmtree(out / "export")
    monkeypatch.setattr(machine, "computes_on", lambda: {"mlx": "0.1", "device": "gpu", "chip": "x", "macos": "1"})
    capsys.readouterr()
    pipeline.run(model, out, asked(two_texts))
    assert "elsewhere" not in capsys.readouterr().err
    assert read_manifest(out).computed_on == [] and "export" in read_manifest(out).steps
    assert "Computed by" not in (out / "report.md").read_text()
