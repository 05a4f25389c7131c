"""Pruning in stages: sizes, parents, teacher, units that are those of the original; killed, it goes on."""

from __future__ import annotations

import importlib
import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import reference
from typer.testing import CliRunner

from mlx_pare import lm
from mlx_pare.base.errors import PareError, Refused, UsageError
from mlx_pare.cli import main as cli
from mlx_pare.model.checkpoint import Checkpoint
from mlx_pare.options.settings import Settings, settings_of
from mlx_pare.pipeline import measure_steps, run as pipeline, stages, steps
from mlx_pare.pruning.layout import size_of
from mlx_pare.pruning.plan_file import LayerPlan, Plan, Target
from mlx_pare.pruning.prune import Lineage, prune
from mlx_pare.reporting.report import report

SHARES = (0.8, 0.6, 0.45)
DEEP = {"num_hidden_layers": 6}


@pytest.fixture(scope="module")
def settings(two_texts) -> Settings:
    """A small job on our own text in two halves; seven steps do not divide by three."""
    return Settings(
        **two_texts, stages=SHARES, length=32, samples=8,
        recover_steps=7, trials=0, gguf="f16", context=256, axes=("ffn", "layer"), protect=False, tries=1, batch=2,
        learning_rate=3e-4,
    )  # fmt: skip


@pytest.fixture(scope="module")
def taught() -> list[dict]:
    """What recovery was called with, in order."""
    return []


@pytest.fixture(scope="module")
def finished(pico_models, settings, taught, tmp_path_factory) -> dict:
    """One whole run."""
    model, out = pico_models("llama", **DEEP), tmp_path_factory.mktemp("whole") / "run"
    real = steps.recover

    def watched(student: Path, original: Path, train, validation, place: Path, options, *more):
        done = real(student, original, train, validation, place, options, *more)
        taught.append({"student": student, "teacher": original, "steps": options.steps, "seed": options.seed})
        return done

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(steps, "recover", watched)
        summary = pipeline.run(model, out, settings)
    return {"model": model, "out": out, "summary": summary}


def read(path: Path) -> dict:
    return json.loads(path.read_text())


def places(out: Path) -> list[Path]:
    return [out / f"stage-{number}" for number in (1, 2, 3)]


# ---- what a run in stages leaves ----


def test_every_stage_is_of_its_share_of_the_original(finished):
    whole = size_of(Checkpoint(finished["model"]), None, None).non_embedding
    for share, place in zip(SHARES, places(finished["out"]), strict=True):
        for step in ("prune", "recover"):
            left = size_of(Checkpoint(place / step / "model"), None, None).non_embedding / whole
            assert left == pytest.approx(share, abs=0.02), place
    assert Path(finished["summary"]["model"]) == finished["out"] / "stage-3" / "recover" / "model"
    assert lm.load_stock(Path(finished["summary"]["model"])) is not None


def test_every_stage_cuts_what_the_one_before_recovered(finished):
    """And it did recover, or neither this nor the next would tell."""
    parents = [finished["model"], *(place / "recover" / "model" for place in places(finished["out"])[:2])]
    original = Checkpoint(finished["model"]).identity()
    for number, (place, parent) in enumerate(zip(places(finished["out"]), parents, strict=True), 1):
        identity = Checkpoint(parent).identity()
        assert read(place / "manifest.json")["source"] == identity
        assert read(place / "recover" / "recovery.json")["improved"]
        said, config = (read(place / "recover" / "model" / f"{name}.json") for name in ("survivors", "config"))
        assert said["source_identity"] == config["pare"]["source_identity"] == original
        assert config["pare"]["parameters_before"] == size_of(Checkpoint(finished["model"]), None, None).parameters
        named = {"name": f"stage-{number - 1}/recover/model", "identity": identity} if number > 1 else None
        assert said.get("parent") == config["pare"].get("parent") == named
        card = (place / "recover" / "model" / "README.md").read_text()
        assert card.startswith(f"# {finished['model'].name}, pruned") and (number == 1 or named["name"] in card)


def test_the_original_is_the_teacher_of_all(finished, taught):
    """Not the stage before; and the steps are divided, each stage drawing rows of its own."""
    assert [Path(each["teacher"]) for each in taught] == [finished["model"].resolve()] * 3
    assert [each["steps"] for each in taught] == [3, 2, 2]
    assert [each["seed"] for each in taught] == [0, 1, 2]
    for place in places(finished["out"]):
        inputs = read(place / "manifest.json")["steps"]["recover"]["inputs"]
        assert inputs["teacher"] == Checkpoint(finished["model"]).identity()


def test_hidden_states_are_led_to_the_layers_of_the_original(finished):
    """Which needs to know, across stages, which of its layers are left."""
    assert [len(Checkpoint(place / "prune" / "model").arch.layers) for place in places(finished["out"])] == [5, 4, 3]
    for place in places(finished["out"]):
        said = read(place / "recover" / "model" / "survivors.json")["layers"]
        matched = read(place / "recover" / "recovery.json")["matched"]
        assert matched["student"][-1] == len(said) - 1 and matched["teacher"][-1] == 5
        sources = [layer["source"] for layer in said]
        following = [*(n - 1 for n in sources[1:]), 5]
        assert [following[n] for n in matched["student"]] == matched["teacher"]


def test_the_plan_of_the_run_is_all_stages_as_one(finished):
    plan = Plan.load(finished["out"] / "plan" / "plan.json")
    assert plan.source == Checkpoint(finished["model"]).identity()
    said = read(Path(finished["summary"]["model"]) / "survivors.json")["layers"]
    assert [layer.model_dump(include={"source", "ffn", "kv_head"}) for layer in plan.layers] == [
        {key: layer[key] for key in ("source", "ffn", "kv_head")} for layer in said
    ]
    assert not plan.problems(Checkpoint(finished["model"]).arch)
    assert plan.after.bytes == Checkpoint(finished["summary"]["model"]).nbytes()
    assert plan.before == size_of(Checkpoint(finished["model"]), None, None)
    contender = Plan.load(finished["out"] / "evaluate-pruned" / "plan.json")
    assert contender == plan and contender.criterion != "obs"  # or reconstruction would choose again


def test_all_are_measured_against_the_original(finished):
    summary, out = finished["summary"], finished["out"]
    assert set(summary["contenders"]) == {"original", "pruned", "recovered", "random", "fewer-bits"}
    sizes = {summary["contenders"][name]["parameters"] for name in ("pruned", "recovered", "random")}
    assert len(sizes) == 1 and summary["before"]["kl_divergence"] is None
    names = [*[f"stage-{n}-{what}" for n in (1, 2, 3) for what in ("pruned", "recovered")][:-1], "recovered"]
    inputs = read(out / "manifest.json")["steps"]
    for name in names:
        assert inputs[f"evaluate-{name}"]["inputs"]["original"] == Checkpoint(finished["model"]).identity()
        assert read(out / f"evaluate-{name}" / "metrics.json")["kl_divergence"] > 0
    assert "evaluate-stage-3-recovered" not in inputs
    assert summary["after"] == summary["contenders"]["recovered"]
    assert json.dumps(summary, allow_nan=False)


def test_report_tells_the_stages(finished):
    text = Path(finished["summary"]["report"]).read_text()
    rows = [line.split(" | ") for line in text.split("## Stages")[1].split("## ")[0].split("\n") if "| stage-" in line]
    assert [row[0] for row in rows] == ["| stage-1", "| stage-2", "| stage-3"]
    assert [row[1] for row in rows] == ["original", "stage-1", "stage-2"]
    assert [row[8] for row in rows] == ["3", "2", "2"]
    for number, row in enumerate(rows, 1):
        healed = "recovered" if number == 3 else f"stage-{number}-recovered"
        for column, name in ((4, f"stage-{number}-pruned"), (6, healed)):
            m = read(finished["out"] / f"evaluate-{name}" / "metrics.json")
            assert row[column : column + 2] == [f"{m['perplexity']:.3g}", f"{m['kl_divergence']:.4f}"]
    assert [f"{stage['share']:.3f}" for stage in finished["summary"]["stages"]] == [row[2] for row in rows]
    assert "keeping 0.8, 0.6, 0.45 of the non-embedding parameters, in stages" in text
    assert report(finished["out"]).read_text() == text


def test_report_has_the_warnings_of_the_stages(finished, tmp_path):
    out = Path(shutil.copytree(finished["out"], tmp_path / "copy"))
    (out / "stage-2" / "recover" / "check.json").write_text(json.dumps({"warnings": ["generates nothing"]}))
    assert "- generates nothing" in report(out).read_text()


# ---- units of a model that was cut twice ----


def drawn(model: Path, rng: np.random.Generator, layers: int, hidden: int | None = None) -> Plan:
    """A plan that keeps half of the channels, half of the kv heads and some layers, by lot."""
    checkpoint = Checkpoint(model)

    def some(n: int, count: int) -> list[int]:
        return sorted(map(int, rng.choice(n, count, replace=False)))

    kept = []
    for source in some(len(checkpoint.arch.layers), layers):
        sizes = checkpoint.arch.layers[source].sizes
        kept.append(
            LayerPlan(
                source=source, ffn=some(sizes["ffn"], sizes["ffn"] // 2),
                kv_head=some(sizes["kv_head"], sizes["kv_head"] // 2),
            )
        )  # fmt: skip
    now, of = size_of(checkpoint, None, None), checkpoint.arch.sizes["hidden"]
    return Plan(
        source=checkpoint.identity(), criterion="random", axes=["ffn"], before=now, after=now, layers=kept,
        target=Target(kind="keep", value=0.5, asked="half"), hidden=some(of, hidden) if hidden else None,
    )  # fmt: skip


@pytest.mark.parametrize("hidden", [None, 32])
def test_units_of_a_model_cut_twice_are_those_of_the_original(pico_models, tmp_path, hidden):
    """To cut them out of the original at once gives the same bytes."""
    model, rng = pico_models("llama", num_key_value_heads=4), np.random.default_rng(5)
    places = [tmp_path / f"stage-{n}" / "prune" / "model" for n in (1, 2)]
    prune(model, drawn(model, rng, 3, hidden and 48), places[0])
    again = drawn(places[0], rng, 2, hidden)
    prune(places[0], again, places[1], lineage=Lineage(model, "stage-1"))
    made = stages.composed(tmp_path, (0.5, 0.25))
    prune(model, made, tmp_path / "once")
    one, two = (reference.tensors(path / "model.safetensors") for path in (places[1], tmp_path / "once"))
    assert one.keys() == two.keys() and all(np.array_equal(one[name], two[name]) for name in one)
    said, once = (read(path / "survivors.json") for path in (places[1], tmp_path / "once"))
    assert said == {**once, "parent": {"name": "stage-1", "identity": Checkpoint(places[0]).identity()}}
    prune(places[0], again, tmp_path / "plain")
    assert read(tmp_path / "plain" / "survivors.json")["layers"] != said["layers"]


def test_a_lineage_must_be_that_of_the_model(pico_models, tmp_path):
    model, other = pico_models("llama", num_key_value_heads=4), pico_models("qwen3")
    rng = np.random.default_rng(5)
    prune(model, drawn(model, rng, 3), tmp_path / "cut")
    with pytest.raises(PareError, match="was not cut from"):
        prune(tmp_path / "cut", drawn(tmp_path / "cut", rng, 2), tmp_path / "no", lineage=Lineage(other, "a"))
    assert not (tmp_path / "no").exists()


# ---- killed, once more, otherwise ----


class Killed(BaseException):
    """What no handler of ours catches."""


def results(out: Path) -> dict[str, bytes]:
    """What must not depend on when a run was killed. The identity of a model tells when its files were written (so two
    runs never have the same): that of each stage's parent is replaced by a name, and so is the place."""
    patterns = ("**/*.safetensors", "**/model/*", "**/plan.json", "export/*.gguf", "evaluate-*/metrics.json")
    found = {str(f.relative_to(out)): f.read_bytes() for p in patterns for f in sorted(out.glob(p)) if f.is_file()}
    names = {str(out): "RUN"}
    for place in places(out)[1:]:
        if (place / "manifest.json").exists():
            identity = read(place / "manifest.json")["source"]
            names[identity] = place.name.ljust(len(identity), "-")
    for old, new in names.items():
        found = {name: data.replace(old.encode(), new.encode()) for name, data in found.items()}
    return found


def test_killed_in_a_stage_it_ends_in_the_same_bytes(finished, settings, tmp_path, monkeypatch):
    """In the reconstruction, the training and the measuring of the second stage, always in the same directory."""
    out = tmp_path / "run"

    def dies(module, name: str, when: Callable[..., bool]) -> None:
        real = getattr(module, name)

        def call(*given, **named):
            if when(*given):
                raise Killed
            return real(*given, **named)

        with monkeypatch.context() as patch:
            patch.setattr(module, name, call)
            with pytest.raises(Killed):
                pipeline.run(finished["model"], out, settings)

    second = "stage-2"
    dies(steps, "prune", lambda model, *_: "stage-1" in str(model))
    assert (out / second / "reconstruct").exists() and not (out / second / "prune").exists()
    validated = []

    def in_training(*_) -> bool:
        validated.append(1)
        return len(validated) == 2

    dies(importlib.import_module("mlx_pare.recovery.recover"), "by_domain", in_training)
    assert (out / second / "recover.partial" / "work").exists()
    dies(measure_steps, "evaluate", lambda model, *_: f"{second}/recover" in str(model))
    assert (out / second / "recover").exists() and not (out / "stage-3").exists()
    pipeline.run(finished["model"], out, settings)
    one, two = results(finished["out"]), results(out)
    assert one.keys() == two.keys() and len(one) > 30
    assert not [name for name in one if one[name] != two[name]]


def test_second_run_does_nothing_and_says_the_same(finished, settings, monkeypatch):
    monkeypatch.setattr("mlx_pare.pipeline.export_step.export", lambda *_: pytest.fail("done again"))
    for verb in ("calibrate", "reconstruct", "prune", "recover", "evaluate"):
        module = measure_steps if verb == "evaluate" else steps
        monkeypatch.setattr(module, verb, lambda *_, **__: pytest.fail("done again"))
    assert pipeline.run(finished["model"], finished["out"], settings) == finished["summary"]


OTHERWISE = [
    (dict(stages=None, keep=0.45), "was begun with --schedule"),
    (dict(stages=(0.8, 0.65, 0.45)), "plan step in .*stage-2 was made differently: keep was"),
    (dict(recover_steps=9), "recover step in .*stage-2 was made differently: steps was 2, now it is 3"),
]


@pytest.mark.parametrize("change, words", OTHERWISE)
def test_another_schedule_is_refused_and_changes_nothing(finished, settings, change, words):
    before = results(finished["out"])
    with pytest.raises(Refused, match=words):
        pipeline.run(finished["model"], finished["out"], replace(settings, **change))
    assert results(finished["out"]) == before


def test_a_run_begun_at_once_does_not_go_on_in_stages(pico_models, settings, tmp_path):
    model = pico_models("llama")
    with steps.open_run(model, tmp_path / "run") as run:
        steps.calibrate_step(run, steps.Texts(model, settings), settings)
    with pytest.raises(Refused, match="was begun without --schedule"):
        pipeline.run(model, tmp_path / "run", settings)
    assert not (tmp_path / "run" / "stage-1").exists()


# ---- what is asked ----

WRONG = [
    (dict(stages=(0.5, 0.8)), "0.5,0.8 does not fall"),
    (dict(stages=(0.8, 0.8)), "does not fall"),
    (dict(stages=(1.2, 0.8)), "not between 0 and 1"),
    (dict(stages=(1.0, 0.8)), "not between 0 and 1"),
    (dict(stages=(0.8, 0.0)), "not between 0 and 1"),
    (dict(stages=(0.8, -0.5)), "not between 0 and 1"),
    (dict(stages=(0.8, float("nan"))), "--schedule .*nan"),
    (dict(stages=(0.8,)), "has one stage"),
    (dict(keep=0.5), "is itself a target"),
    (dict(target_params="10k"), "is itself a target"),
    (dict(target_size="1MB"), "is itself a target"),
    (dict(mac="m4-24gb"), "is itself a target"),
    (dict(widths="per-layer"), "layers differ is not cut again.*--widths uniform"),
    (dict(recover_steps=0), "0 steps of recovery are too few for 3 stages"),
    (dict(recover_steps=2), "2 steps of recovery are too few"),
]


@pytest.mark.parametrize("change, words", WRONG)
def test_what_cannot_be_asked_is_found_before_anything_is_written(pico_models, settings, tmp_path, change, words):
    for call in (pipeline.run, lambda model, _, s: pipeline.dry_run(model, s)):
        with pytest.raises(UsageError, match=words):
            call(pico_models("llama"), tmp_path / "run", replace(settings, **change))
    assert not (tmp_path / "run").exists()


def test_a_stage_that_cannot_be_reached_is_refused_at_once(pico_models, settings, tmp_path):
    with pytest.raises(Refused, match="smallest possible"):
        pipeline.run(pico_models("llama"), tmp_path / "run", replace(settings, stages=(0.9, 0.001)))
    assert not (tmp_path / "run").exists()


def test_command_line(pico_models, tmp_path):
    """Numbers are read there, and nothing else; --dry-run shows the size of every stage."""
    assert settings_of(stages="0.8, 0.65,0.5").stages == (0.8, 0.65, 0.5) and settings_of().stages is None
    with pytest.raises(UsageError, match="cannot read --schedule 'cosine'"):
        settings_of(stages="cosine")
    arguments = ["run", str(pico_models("llama")), "--out", str(tmp_path / "run"), "--length", "32", "--samples", "8"]
    done = CliRunner().invoke(
        cli.app, [*arguments, "--schedule", "0.9,0.6", "--recover-steps", "5", "--dry-run", "--json"]
    )
    assert done.exit_code == 0 and not (tmp_path / "run").exists()
    s = Settings(stages=(0.9, 0.6), length=32, samples=8, recover_steps=5)
    shape = pipeline.dry_run(pico_models("llama"), s)
    whole = shape["before"]["non_embedding"]
    assert [stage["steps"] for stage in shape["stages"]] == [3, 2]
    assert [stage["non_embedding"] / whole for stage in shape["stages"]] == pytest.approx([0.9, 0.6], abs=0.02)
    assert shape["stages"][-1]["bytes"] == shape["after"]["bytes"]


def test_only_the_result_is_packed(pico_models, settings):
    """The stages before have widths that suit its groups."""
    model = pico_models("llama")
    s = replace(settings, bits=4, group_size=32)
    asked = [stage.settings(s, model, model) for stage in stages.stages(s)]
    assert [(a.bits, a.step) for a in asked] == [(None, 32), (None, 32), (4, None)]
    assert [a.keep for a in asked] == list(SHARES) and {a.stages for a in asked} == {None}


def test_a_stage_that_cut_too_much_leaves_nothing_to_the_next(pico_models, settings, tmp_path):
    model, rng = pico_models("llama"), np.random.default_rng(1)
    prune(model, drawn(model, rng, 2), tmp_path / "cut")
    stage = next(stages.stages(settings))
    assert stage.settings(settings, model, tmp_path / "cut").keep == 1.0
    whole, left = (size_of(Checkpoint(path), None, None).non_embedding for path in (model, tmp_path / "cut"))
    share = replace(stage, share=0.5 * left / whole).settings(settings, model, tmp_path / "cut").keep
    assert share == pytest.approx(0.5)
