"""The whole job on a pico model: everything is there, a second run does nothing, the report says what was measured."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import sys
import tomllib
from collections.abc import Callable
from dataclasses import replace
from datetime import date
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
import reference

from mlx_pare import lm
from mlx_pare.base import machine, markdown
from mlx_pare.base.errors import PareError, Refused, UsageError
from mlx_pare.base.units import count, gb, readable
from mlx_pare.evaluation.metrics import Metrics
from mlx_pare.evaluation.sanity import check, repeats
from mlx_pare.model.checkpoint import Checkpoint
from mlx_pare.options.settings import TABLE, Settings
from mlx_pare.pipeline import choose_sizes, contenders, measure_steps, run as pipeline, steps
from mlx_pare.planning import trial_cache
from mlx_pare.pruning.plan_file import Plan
from mlx_pare.pruning.prune import prune
from mlx_pare.repair.reconstruct import reconstruct
from mlx_pare.reporting import report as reporting, verdict
from mlx_pare.scoring.score import CRITERIA
from mlx_pare.store.arrays import Arrays
from mlx_pare.store.places import repair_file

STEPS = ["calibrate", "score", "plan", "reconstruct", "prune", "evaluate-original", "evaluate-pruned", "recover",
         "evaluate-recovered", "evaluate-random", "evaluate-fewer-bits", "export", "bench"]  # fmt: skip
SMALL = {"num_hidden_layers": 2}  # of whole runs: half the time of four layers
CONTENDERS = {"original", "pruned", "recovered", "random", "fewer-bits"}


def hashes(directory: Path) -> dict[str, tuple]:
    """Contents and times of every file but the log, which every process adds to."""
    files = sorted(f for f in directory.rglob("*") if f.is_file() and f.name != "log.txt")
    return {
        str(f.relative_to(directory)): (hashlib.sha256(f.read_bytes()).digest(), f.stat().st_mtime_ns) for f in files
    }


@pytest.fixture(scope="module")
def settings(two_texts) -> Settings:
    """A small job, on our own text in two halves."""
    return Settings(
        **two_texts, keep=0.75, length=32, samples=16,
        recover_steps=4, trials=1, gguf="f16", context=256, criterion="minitron",
    )  # fmt: skip


@pytest.fixture(scope="module")
def finished(pico_models, settings, tmp_path_factory) -> dict:
    """One whole run: where, and what it returned."""
    model = pico_models("llama", (4, 32), **SMALL)
    before, out = hashes(model), tmp_path_factory.mktemp("whole") / "run"
    return {"model": model, "before": before, "out": out, "summary": pipeline.run(model, out, settings)}


@pytest.fixture
def copied(finished, tmp_path) -> Path:
    """The finished run, to be changed."""
    return Path(shutil.copytree(finished["out"], tmp_path / "copy"))


def read(path: Path) -> dict:
    return json.loads(path.read_text())


# ---- what a run leaves ----


def test_run_gives_all_it_promises(finished):
    summary, out = finished["summary"], finished["out"]
    assert set(summary["contenders"]) == CONTENDERS
    assert Path(summary["model"]) == out / "recover" / "model"
    assert Path(summary["gguf"]).read_bytes()[:4] == b"GGUF" and Path(summary["gguf"]).suffix == ".gguf"
    assert Path(summary["report"]).read_text().startswith("# ")
    assert summary["before"]["kl_divergence"] is None and summary["after"]["kl_divergence"] > 0
    assert summary["after"] == summary["contenders"]["recovered"]
    assert summary["verdict"] and json.dumps(summary, allow_nan=False)
    assert len(summary["fits"]["rows"]) > 50 and len(summary["bench"]["models"]) == 2


def test_result_is_as_small_as_asked_and_opens(finished):
    before, after = (Checkpoint(m) for m in (finished["model"], finished["summary"]["model"]))
    plan = Plan.load(finished["out"] / "plan" / "plan.json")
    assert plan.after.non_embedding / plan.before.non_embedding == pytest.approx(0.75, abs=0.1)
    assert after.nbytes() == plan.after.bytes == finished["summary"]["after"]["bytes"] < before.nbytes()
    assert lm.load_stock(after.path) is not None


def test_contenders_are_of_their_size(finished):
    sizes = {n: (c["bytes"], c["parameters"]) for n, c in finished["summary"]["contenders"].items()}
    assert sizes["random"] == sizes["pruned"] == sizes["recovered"]
    assert sizes["fewer-bits"][1] == sizes["original"][1] and sizes["fewer-bits"][0] <= sizes["recovered"][0]
    measured = {(c["tokens"], c["windows"], c["length"]) for c in finished["summary"]["contenders"].values()}
    assert measured == {(16 * 31, 16, 32)}


def test_manifest_records_every_step(finished):
    manifest = read(finished["out"] / "manifest.json")
    assert list(manifest["steps"]) == STEPS
    for name, record in manifest["steps"].items():
        assert record["seconds"] >= 0 and record["peak_bytes"] > 10 << 20, name
        assert record["inputs"] and record["outputs"], name
        assert record["swap_growth_bytes"] >= 0 and record["peak_mlx_bytes"] is not None, name
    assert manifest["source"] == Checkpoint(finished["model"]).identity()


def test_recipe_is_what_was_asked(finished, settings):
    recipe = tomllib.loads((finished["out"] / "recipe.toml").read_text("utf-8"))
    asked = {TABLE[k].name: v for k, v in vars(settings).items() if v not in (None, ())}
    assert recipe == {
        **asked,
        "axes": ["ffn", "kv_head"],
        "choose_bits": [],
        "gate": [],
        "runtimes": ["mlx"],
        "model": str(finished["model"].resolve()),
        "date": recipe["date"],
    }
    assert date.fromisoformat(recipe["date"]) <= date.today()


def test_original_is_not_touched(finished):
    assert hashes(finished["model"]) == finished["before"]


def test_nothing_temporary_is_left(finished):
    left = [
        f.name for f in finished["out"].rglob("*") if f.suffix in (".partial", ".tmp", ".part") or ".tmp." in f.name
    ]
    assert left == []
    assert not (finished["out"] / "evaluate-random" / "model").exists()


# ---- once more ----


def test_second_run_does_nothing_and_says_the_same(finished, settings, monkeypatch):
    before = hashes(finished["out"])
    monkeypatch.setattr("mlx_pare.pipeline.export_step.export", lambda *_: pytest.fail("done again"))
    for verb in ("calibrate", "reconstruct", "prune", "recover", "evaluate", "bench"):
        module = measure_steps if verb in ("evaluate", "bench") else steps
        monkeypatch.setattr(module, verb, lambda *_, **__: pytest.fail("done again"))
    for module, verb in (
        (choose_sizes, "plan"),
        (choose_sizes, "sensitivity"),
        (trial_cache, "try_out"),
        (trial_cache, "reconstructed_kl"),
    ):
        monkeypatch.setattr(module, verb, lambda *_, **__: pytest.fail("done again"))
    assert pipeline.run(finished["model"], finished["out"], settings) == finished["summary"]
    after = hashes(finished["out"])
    rewritten = {name for name in after if after[name] != before.get(name)}
    assert rewritten <= {"report.md", "recipe.toml"}
    assert {n: h for n, (h, _) in after.items()} == {n: h for n, (h, _) in before.items()}


CHANGES = [
    (dict(samples=15), "calibrate.*rows was 16, now it is 15"),
    (dict(seed=1), "calibrate.*seed"),
    (dict(criterion="wanda"), "score.*criterion was 'minitron'"),
    (dict(keep=0.5), "plan.*keep was 0.75, now it is 0.5"),
    (dict(reconstruct=False), "plan.*tries was 12, now it is None"),  # nothing is tried without
    (dict(recover_steps=5), "recover.*steps was 4"),
    (dict(gguf="q8_0"), "export.*kind was 'f16'"),
    (dict(trials=2), "bench.*trials was 1"),
]


@pytest.mark.parametrize("change, words", CHANGES)
def test_other_settings_are_refused_and_change_nothing(finished, settings, change, words):
    before = hashes(finished["out"])
    with pytest.raises(Refused, match=words):
        pipeline.run(finished["model"], finished["out"], replace(settings, **change))
    assert hashes(finished["out"]) == before


WRONG = [
    (dict(criterion="magic"), UsageError, "magic.*minitron"),
    (dict(method="prayer"), UsageError, "prayer.*lora"),
    (dict(gguf="q9_z"), UsageError, "q9_z.*q8_0"),
    (dict(axes=("depth",)), UsageError, "depth.*layer"),
    (dict(keep=None), UsageError, "exactly one target"),
    (dict(mac="m4-24gb"), UsageError, "exactly one target"),
    (dict(keep=None, target_size="1kB"), Refused, "smallest possible"),
    (dict(memory_cap=10_000), Refused, "--memory-cap allows"),
    (dict(length=100_000, recover_steps=0, reconstruct=False), PareError, "tokens, one row needs"),
    (dict(data="nowhere.txt"), PareError, "no text at nowhere.txt"),
]


@pytest.mark.parametrize("change, error, words", WRONG)
def test_what_cannot_work_is_found_before_anything_is_written(pico_models, settings, tmp_path, change, error, words):
    with pytest.raises(error, match=words):
        pipeline.run(pico_models("llama", (4, 32), **SMALL), tmp_path / "run", replace(settings, **change))
    assert not (tmp_path / "run").exists()


def test_dry_run_predicts_the_run_and_writes_nothing(finished, settings):
    before = hashes(finished["out"].parent)
    found = pipeline.dry_run(finished["model"], settings)
    assert hashes(finished["out"].parent) == before
    assert found["after"]["bytes"] == finished["summary"]["after"]["bytes"]
    assert found["before"]["bytes"] == finished["summary"]["before"]["bytes"] and found["calibration_bytes"] > 0


@pytest.fixture(scope="module")
def plain_run(pico_models, settings, tmp_path_factory) -> dict:
    """No recovery, no speed, and a model whose name is an attack on the report."""
    root = tmp_path_factory.mktemp("plain")
    model = root / "a|b <img src=x onerror=alert(1)> `c` #d"  # mlx-lm itself cannot open a path with [ ] or *
    shutil.copytree(pico_models("llama", (4, 32), **SMALL), model)
    out = root / "run"
    return {"out": out, "summary": pipeline.run(model, out, replace(settings, recover_steps=0, trials=0))}


def test_run_without_recovery_and_bench(plain_run):
    summary = plain_run["summary"]
    assert Path(summary["model"]) == plain_run["out"] / "prune" / "model"
    assert summary["after"] == summary["contenders"]["pruned"] and summary["bench"] is None
    assert set(summary["contenders"]) == CONTENDERS - {"recovered"}
    assert not (plain_run["out"] / "recover").exists()
    text = Path(summary["report"]).read_text()
    assert "## Recovery" not in text and "## Speed" not in text


@pytest.mark.parametrize("change", [dict(reconstruct=False), dict(axes=("hidden",))], ids=["not asked", "hidden"])
def test_run_without_reconstruction(pico_models, settings, tmp_path, capsys, change):
    """The matrices are cut as they are; a cut of the hidden size cannot be made up for, which is said."""
    model, out = pico_models("llama", (4, 32), **SMALL), tmp_path / "run"
    asked = replace(settings, criterion="obs", recover_steps=0, trials=0, **change)
    summary = pipeline.run(model, out, asked)
    assert not list(out.glob("reconstruct*"))
    assert ("cannot be reconstructed" in capsys.readouterr().err) == ("axes" in change)
    prune(model, Plan.load(out / "plan" / "plan.json"), tmp_path / "cut")
    written = Path(summary["model"]) / "model.safetensors"
    assert written.read_bytes() == (tmp_path / "cut" / "model.safetensors").read_bytes()
    assert summary == pipeline.run(model, out, asked)


# ---- whom the result competes with ----


@pytest.fixture(scope="module")
def contender(pico_models, settings, tmp_path_factory) -> Callable[..., tuple[Path, Plan, Path, Path]]:
    """Of a run: the contender that was measured (model, plan), the model it was made from, and where the run is. One
    run shows all its contenders."""
    runs: dict[str, tuple[Path, Path]] = {}

    def run_of(stored: dict, changes: dict) -> tuple[Path, Path]:
        root, model = tmp_path_factory.mktemp("contenders"), pico_models("llama", **stored)
        real = measure_steps.measured

        def measure(directory: Path, path: Path, *more) -> None:
            assert not (path.parent / "repair").exists(), "the matrices lie there twice"
            shutil.copytree(path, root / directory.name.removesuffix(".partial"), dirs_exist_ok=True)
            real(directory, path, *more)

        with pytest.MonkeyPatch.context() as patch:
            for module in (measure_steps, contenders):
                patch.setattr(module, "measured", measure)
            pipeline.run(model, root / "run", replace(settings, recover_steps=0, trials=0, **changes))
        return root, model

    def make(name: str, stored: dict, **changes) -> tuple[Path, Plan, Path, Path]:
        key = repr((stored, changes))
        if key not in runs:
            runs[key] = run_of(stored, changes)
        root, model = runs[key]
        assert {f.name for f in (root / "run" / f"evaluate-{name}").iterdir()} == {
            "metrics.json", "plan.json", "size.json", "step.json",
        }  # fmt: skip
        plan = Plan.load(root / "run" / f"evaluate-{name}" / "plan.json")
        return root / f"evaluate-{name}", plan, model, root / "run"

    return make


SOURCES = {"8 bits": dict(packed=(8, 32)), "float16": dict(dtype=mx.float16)}
ROLES = {"o_proj": "self_attn.o_proj", "down_proj": "mlp.down_proj"}


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("name", ["fewer-bits", "random"])
def test_contenders_are_reconstructed_as_the_result_is(contender, settings, tmp_path, name, source):
    """Or error feedback, not the choice of units, would be what the verdict measures."""
    found, plan, model, _ = contender(name, SOURCES[source])
    assert plan.criterion == ("none" if name == "fewer-bits" else "random")
    rows, repair, plain = steps.Texts(model, settings).calibration, tmp_path / "repair", tmp_path / "plain"
    reconstruct(model, plan, rows, repair)
    prune(model, plan, plain)
    have, without = (reference.tensors(path / "model.safetensors") for path in (found, plain))
    for layer in range(1, len(plan.layers)):  # of the first only what is cut is solved
        solved = Arrays.load(repair_file(repair, layer), "reconstruction").arrays
        for role, module in ROLES.items():
            weight = f"model.layers.{layer}.{module}.weight"
            wanted = solved[f"{role}.weight" if f"{role}.weight" in solved else role]
            assert np.array_equal(have[weight], wanted.astype(have[weight].dtype)), weight
            assert not np.array_equal(have[weight], without[weight]), weight


@pytest.mark.parametrize("change", [dict(reconstruct=False), dict(axes=("hidden",))], ids=["not asked", "hidden"])
@pytest.mark.parametrize("name", ["fewer-bits", "random"])
def test_contenders_of_a_result_that_is_not_reconstructed_are_not(contender, tmp_path, name, change):
    found, plan, model, out = contender(name, SOURCES["8 bits"], criterion="wanda", **change)
    prune(model, plan, tmp_path / "plain")
    assert (found / "model.safetensors").read_bytes() == (tmp_path / "plain" / "model.safetensors").read_bytes()
    report = (out / "report.md").read_text()
    assert "both without recovery" in report and "reconstructed as well" not in report


def test_contender_is_measured_anew_only_by_another_reconstruction(finished, copied, settings):
    """Other calibration text, or a run whose contenders were packed plainly; and under the cap of the others."""
    made = Plan.load(copied / "evaluate-fewer-bits" / "plan.json")
    texts, other = (steps.Texts(finished["model"], replace(settings, seed=seed)) for seed in (0, 1))
    with steps.open_run(finished["model"], copied) as run:
        contenders.contender_step(run, "fewer-bits", {"fewer-bits": made}, texts, settings)
        with pytest.raises(Refused, match=r"evaluate-fewer-bits.*calibration changed"):
            contenders.contender_step(run, "fewer-bits", {"fewer-bits": made}, other, settings)
        with pytest.raises(Refused, match=r"evaluate-fewer-bits.*reconstructed was"):
            contenders.contender_step(
                run, "fewer-bits", {"fewer-bits": made}, texts, replace(settings, reconstruct=False)
            )
        with pytest.raises(Refused, match="--memory-cap allows"):
            contenders.contender_step(run, "another", {"another": made}, texts, replace(settings, memory_cap=10_000))


# ---- the gates ----


def test_quality_gate_fails_and_keeps_everything(copied, finished, settings):
    ratio = finished["summary"]["after"]["perplexity"] / finished["summary"]["before"]["perplexity"]
    assert ratio > 1.0001
    with pytest.raises(PareError, match=r"perplexity is .* x the original's, --min-quality 1\.0001 allows") as error:
        pipeline.run(finished["model"], copied, replace(settings, min_quality=1.0001))
    assert error.value.exit_code == 1
    assert hashes(copied).keys() - {"gates.json"} == hashes(finished["out"]).keys()
    again = pipeline.run(finished["model"], copied, replace(settings, min_quality=ratio * 1.01))
    assert [row["passed"] for row in again["gates"] if row["stage"] == "recovered"] == [True]


@pytest.mark.parametrize(
    ("rule", "stage"),
    [
        ("size <= 1kB", "pruned"), ("kl <= 0", "recovered"), ("bits_per_byte <= 0.01 * random", "compared"),
        ("tok_s >= 1e9", "bench"),
    ],
)  # fmt: skip
def test_a_gate_that_fails_in_each_stage_stops_there(copied, finished, settings, rule, stage):
    """What comes after it is not done; the report has the numbers; without the gate the run goes on to its end."""
    later = {"pruned": "recover", "recovered": "evaluate-random", "compared": "export", "bench": "nothing"}[stage]
    if later != "nothing":
        shutil.rmtree(copied / later)
        manifest = json.loads((copied / "manifest.json").read_text())
        manifest["steps"].pop(later)
        (copied / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(PareError, match=re.escape(rule)) as error:
        pipeline.run(finished["model"], copied, replace(settings, gate=[rule, "perplexity > 0"]))
    assert error.value.exit_code == 1 and not (copied / later).exists()
    noted = json.loads((copied / "gates.json").read_text())["gates"]
    rows = {(row["rule"], row["stage"]): row["passed"] for row in noted}
    assert rows[rule, stage] is False and rows["perplexity > 0", "pruned"] is True
    assert f"| {markdown.escaped(rule)} | {stage} |" in (copied / "report.md").read_text()


def test_a_run_that_was_not_worth_it_fails_if_it_is_asked_to(copied, finished, settings):
    assert "**Not worth it:**" in finished["summary"]["verdict"]
    with pytest.raises(PareError, match="pruning was not worth it") as error:
        pipeline.run(finished["model"], copied, replace(settings, fail_if_not_worth_it=True))
    assert error.value.exit_code == 1 and (copied / "report.md").exists()


@pytest.mark.parametrize("harm", ["changed", "missing"])
def test_changed_tokenizer_is_an_error(finished, copied, harm):
    model = copied / "prune" / "model"
    file = model / "tokenizer.json"
    file.unlink() if harm == "missing" else file.write_text(file.read_text() + " ")
    with pytest.raises(PareError, match=r"tokenizer\.json differs from the original's"):
        check(model, finished["model"])


def test_model_that_transformers_cannot_open_is_an_error(finished, copied):
    config = copied / "prune" / "model" / "config.json"
    config.write_text(json.dumps(read(config) | {"model_type": "no-such-thing"}))
    with pytest.raises(PareError, match="transformers cannot open"):
        check(config.parent, finished["model"])


TALK = "It was the best of times, it was the worst of times, it was the age of wisdom"
WRITES = [
    (TALK, TALK, []),
    ("", TALK, ["generates nothing"]),
    ("the the the the " * 8, TALK, ["repeats itself"]),
    ("the the the the " * 8, "a b " * 20, []),
    ("", " ", []),
]


@pytest.mark.parametrize("ours, theirs, expected", WRITES)
def test_strange_text_is_a_warning(finished, monkeypatch, ours, theirs, expected):
    from mlx_pare.evaluation import sanity as checking

    model = Path(finished["summary"]["model"])
    monkeypatch.setattr(checking, "_text", lambda path: ours if path == model else theirs)
    found = check(model, finished["model"])
    assert len(found) == len(expected) and all(e in f for e, f in zip(expected, found, strict=True))


def test_what_memory_does_not_hold_is_not_made_to_write(finished, monkeypatch):
    """Neither under a cap nor where too little is free."""
    from mlx_pare.evaluation import sanity as checking

    model = Path(finished["summary"]["model"])
    monkeypatch.setattr(checking, "_text", lambda path: pytest.fail("it was loaded"))
    (found,) = check(model, finished["model"], memory_cap=10_000)
    assert re.match(r"no text was generated: .* needs about .* of memory, more than --memory-cap allows", found)
    monkeypatch.setattr(machine, "available_bytes", lambda: 10_000)
    (found,) = check(model, finished["model"])
    assert found.endswith("of memory, more than is free (10.00 kB)")


REPEATING = ["a" * 48, "ab" * 40, "and then " * 9, TALK + " no" * 60, "once, and " + "the house " * 14, "\n" * 50]
VARIED = ["", "aaa", "a" * 46, TALK, "the house was " * 2, TALK + TALK[:30], "abcdefghijklmnopqrstuvwxy" * 2]


@pytest.mark.parametrize("text, expected", [(t, True) for t in REPEATING] + [(t, False) for t in VARIED])
def test_repeats(text, expected):
    assert repeats(text) is expected


# ---- the report ----


def tables(text: str) -> dict[str, list[list[str]]]:
    """Section title -> rows of cells of its table, header first; every row has as many cells as the header."""
    found: dict[str, list[list[str]]] = {}
    title = ""
    for line in text.split("\n"):
        if line.startswith("#"):
            title = line.lstrip("# ")
        elif line.startswith("|"):
            cells = [c.strip() for c in line.replace("\\|", "\0").strip("|").split("|")]
            found.setdefault(title, []).append(cells)
            assert len(cells) == len(found[title][0]), line
    return {t: [r for r in rows if set("".join(r)) != {"-"}] for t, rows in found.items()}


@pytest.fixture
def parsed(finished) -> dict[str, list[list[str]]]:
    return tables(Path(finished["summary"]["report"]).read_text())


def test_report_has_the_measured_contenders(finished, parsed):
    rows = {row[0]: row[1:] for row in parsed["Contenders"]}
    titles = dict(reporting.CONTENDERS)
    assert len(rows) == 1 + len(CONTENDERS)
    for name in CONTENDERS:
        m = read(finished["out"] / f"evaluate-{name}" / "metrics.json")
        size = read(finished["out"] / f"evaluate-{name}" / "size.json")["bytes"]
        kl = (
            ["-"] * 3
            if name == "original"
            else [f"{m['kl_divergence']:.4f}", f"{m['kl_p95']:.3f}", f"{m['top1_agreement']:.1%}"]
        )
        ppl = readable(m["perplexity"], 3, m["perplexity_stderr"])
        assert rows[titles[name]] == [gb(size), ppl, f"{m['bits_per_byte']:.4f}", *kl]


def test_report_has_the_planned_shape(finished, parsed):
    plan = read(finished["out"] / "plan" / "plan.json")
    rows = {row[0]: row[1:] for row in parsed["Shape"][1:]}
    written = {"parameters": count, "non_embedding": count, "bytes": gb}
    for key in plan["before"]:
        assert rows[key.replace("_", " ")] == [written.get(key, str)(plan[side][key]) for side in ("before", "after")]


def test_an_unknown_loss_is_no_change_of_what_was_done(finished, settings):
    """It is named as what it is, also where the step is done."""
    asked = replace(settings, kind="hope")
    with steps.continue_run(finished["out"]) as run, pytest.raises(UsageError, match="unknown loss 'hope'"):
        steps.recover_step(run, steps.Texts(run.model, asked), asked)


def test_report_has_the_recovery_the_speed_and_the_steps(finished, parsed):
    curve = read(finished["out"] / "recover" / "recovery.json")["curve"]
    trained = [f"{point['train_loss']:.5f}" if point["step"] else "-" for point in curve]
    assert parsed["Recovery"][1:] == [
        [str(point["step"]), f"{point['loss']:.5f}", loss] for point, loss in zip(curve, trained, strict=True)
    ]
    bench = read(finished["out"] / "bench" / "bench.json")["models"]
    assert [float(row[2].split()[0]) for row in parsed["Speed"][1:]] == [
        round(m["decode_tokens_per_s"]["median"], 1) for m in bench
    ]
    manifest = read(finished["out"] / "manifest.json")["steps"]
    assert [row[0] for row in parsed["Steps"][1:]] == STEPS
    assert [row[2] for row in parsed["Steps"][1:]] == [gb(record["peak_bytes"]) for record in manifest.values()]


def test_report_has_the_verdict_the_gguf_and_the_macs(finished):
    text = Path(finished["summary"]["report"]).read_text()
    export, fits = (read(finished["out"] / "export" / f"{n}.json") for n in ("export", "fits"))
    assert finished["summary"]["verdict"] in text
    assert f"`{export['path']}`: f16, architecture llama, {gb(export['bytes'])}, {export['tensors']} tensors" in text
    assert (finished["out"] / export["path"]).stat().st_size == export["bytes"]
    fitting = sum(row["fits"] for row in fits["rows"])
    assert f"fits {fitting} of {len(fits['rows'])} Macs; the original {fits['original_fits']}." in text
    assert f"The GGUF file fits {sum(row['fits'] for row in fits['gguf_rows'])}." in text


def test_report_has_a_line_per_memory_size(finished, parsed):
    fits = read(finished["out"] / "export" / "fits.json")
    header, *rows = parsed["Macs"]
    assert header == ["memory", "GPU budget", "original", "result (MLX)", "GGUF"]
    assert [row[0] for row in rows] == [f"{size} GB" for size in sorted({r["memory_gb"] for r in fits["rows"]})]
    for size, budget, *cells in rows:
        for cell, key in zip(cells, ("original_rows", "rows", "gguf_rows"), strict=True):
            same = [r for r in fits[key] if f"{r['memory_gb']} GB" == size]
            least = min(same, key=lambda r: r["headroom_bytes"])
            assert budget.rstrip("?") == gb(least["budget_bytes"])
            assert cell == (
                f"{least['verdict']}, {gb(least['headroom_bytes'])} ({least['headroom_bytes'] / 2**30:.2f} GiB) left; "
                f"up to {least['max_context']} tokens"
            )


def test_report_has_a_picture_of_original_and_result(finished):
    text = Path(finished["summary"]["report"]).read_text()
    assert "](report-fit.svg)" in text
    picture = (finished["out"] / "report-fit.svg").read_text()
    assert "8 GB, original" in picture and 'id="budget-8-gb-result"' in picture


def test_report_draws_only_what_changed(finished, copied, monkeypatch):
    """To draw takes longer than everything else in a report."""
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    before = Path(finished["summary"]["report"]).read_text()
    assert reporting.report(copied).read_text() == before
    manifest = read(copied / "manifest.json")
    (copied / "manifest.json").write_text(json.dumps(manifest | {"model": "another"}))
    assert "No picture" in reporting.report(copied).read_text()


HARD = {"fits": False, "verdict": "over", "headroom_bytes": -(2**30), "max_context": 0}


def test_report_says_where_only_the_result_fits(copied):
    fits = read(copied / "export" / "fits.json")
    for row in fits["original_rows"]:
        row.update(HARD if row["memory_gb"] <= 16 else {})
    for row in fits["rows"] + fits["gguf_rows"]:
        row.update(HARD if row["memory_gb"] == 8 else {})
    (copied / "export" / "fits.json").write_text(json.dumps(fits))
    text = reporting.report(copied).read_text()
    assert "Memory sizes on which only the result fits: 16 GB." in text and "Smallest: 16 GB" in text
    assert tables(text)["Macs"][1][2:] == ["over by 1.07 GB (1.00 GiB); no context fits"] * 3


def test_report_of_an_older_run_has_its_macs(copied):
    """Made when rows had no verdict and the original only a number."""
    fits = read(copied / "export" / "fits.json")
    old = {key: fits[key] for key in ("context", "rows", "gguf_rows", "original_fits")}
    for row in old["rows"] + old["gguf_rows"]:
        for key in ("verdict", "headroom_gb", "headroom_gib", "state_bytes", "scores_bytes", "unsure"):
            del row[key]
    (copied / "export" / "fits.json").write_text(json.dumps(old))
    text = reporting.report(copied).read_text()
    assert tables(text)["Macs"][0] == ["memory", "GPU budget", "result (MLX)", "GGUF"]
    assert "](report-fit.svg)" in text


def test_report_without_matplotlib_says_so(copied, monkeypatch):
    (copied / "report-fit.svg").unlink()
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    text = reporting.report(copied).read_text()
    assert "No picture: cannot draw without matplotlib" in text and "report-fit.svg" not in text
    assert len(tables(text)["Macs"]) > 10 and not (copied / "report-fit.svg").exists()


def test_report_can_be_made_of_a_run_that_is_not_finished(copied):
    manifest = read(copied / "manifest.json")
    manifest["steps"] = {"calibrate": manifest["steps"]["calibrate"]}
    (copied / "manifest.json").write_text(json.dumps(manifest))
    for step in STEPS[1:]:
        shutil.rmtree(copied / step)
    text = reporting.report(copied).read_text()
    assert "Not measured yet." in text and set(tables(text)) == {"Steps"}


def harmless(text: str) -> None:
    assert tables(text).keys() >= {"Contenders", "Shape", "Steps"}
    text, _, seal = text.rpartition("\n<!-- mlx-pare wrote this; sha256 of all above: ")
    assert re.fullmatch(r"[0-9a-f]{64}\. If you change it, it is kept\. -->\n", seal)
    assert "<" not in text and text.count("\n# ") == 0 and text.startswith("# ")
    assert "](javascript" not in text.replace("\\]", "")


def test_name_of_a_model_cannot_break_the_report(plain_run):
    text = Path(plain_run["summary"]["report"]).read_text()
    harmless(text)
    assert text.split("\n")[0].startswith("# a\\|b &lt;img src=x")


@pytest.mark.parametrize("name", ["x\n| 1 | 2 |", "a\n# Worth it", "<script>", "[a](javascript:b)", "&lt;b>", "```"])
def test_text_from_outside_cannot_break_the_report(copied, name):
    manifest = read(copied / "manifest.json")
    (copied / "manifest.json").write_text(json.dumps(manifest | {"model": f"m/{name}"}))
    (copied / "prune" / "check.json").write_text(json.dumps({"warnings": [f"repeats itself: {name}"]}))
    plan = read(copied / "plan" / "plan.json")  # may be edited by hand
    plan["target"]["asked"] = plan["neighbours"][0] = plan["criterion"] = name
    (copied / "plan" / "plan.json").write_text(json.dumps(plan))
    text = reporting.report(copied).read_text()
    harmless(text)
    assert "```" not in text
    assert len(tables(text)["Contenders"]) == 6


# ---- criteria that need more than a plain calibration ----


@pytest.mark.parametrize("name", ["taylor", "iterative"])
def test_a_run_measures_what_its_criterion_needs(pico_models, settings, tmp_path, name):
    asked = replace(settings, criterion=name, recover_steps=0, trials=0)
    pipeline.run(pico_models("llama", **SMALL), tmp_path / "run", asked)
    assert read(tmp_path / "run" / "plan" / "plan.json")["criterion"] == name
    recorded = read(tmp_path / "run" / "manifest.json")["steps"]["calibrate"]["parameters"]
    assert recorded["extra"] == list(CRITERIA[name].extra)


def test_statistics_with_more_than_is_needed_are_kept(pico_models, settings, tmp_path):
    """A calibration with gradients serves other criteria; one without is not silently taken for taylor."""
    model, texts = pico_models("llama"), steps.Texts(pico_models("llama"), settings)
    with steps.open_run(model, tmp_path / "more") as run:
        stats = steps.calibrate_step(run, texts, replace(settings, criterion="taylor2")).read_bytes()
        for name in ("taylor", "minitron"):
            assert steps.calibrate_step(run, texts, replace(settings, criterion=name)).read_bytes() == stats
        with pytest.raises(Refused, match=r"extra was .'gradients'., now it is .'contributions', 'gradients'."):
            steps.calibrate_step(run, texts, replace(settings, criterion="iterative"))
    with steps.open_run(model, tmp_path / "less") as run:
        steps.calibrate_step(run, texts, settings)
        assert "extra" not in run.manifest.steps["calibrate"].parameters
        with pytest.raises(Refused, match=r"extra was None, now it is .'gradients'."):
            steps.calibrate_step(run, texts, replace(settings, criterion="taylor"))
        with pytest.raises(PareError, match=r"holds no gradients.*--criterion taylor"):
            steps.score_step(run, replace(settings, criterion="taylor"))


def test_dry_run_counts_what_the_criterion_needs(pico_models):
    needed = [
        pipeline.dry_run(pico_models("llama"), Settings(keep=0.75, samples=32, length=64, criterion=name))
        for name in ("obs", "taylor")
    ]
    assert needed[0]["calibration_bytes"] < needed[1]["calibration_bytes"]


# ---- the verdict ----


@pytest.fixture
def measured() -> Callable[..., dict]:
    def make(**perplexities: float) -> dict[str, tuple[Metrics, int]]:
        sizes = {"original": 1000, "fewer_bits": 700}
        found = {}
        for name, value in perplexities.items():
            numbers = dict(model="m", data="d", tokens=9, windows=3, length=4, perplexity_stderr=0.1, bits_per_byte=1.0)
            found[name.replace("_", "-")] = Metrics(perplexity=value, **numbers), sizes.get(name, 750)
        return found

    return make


VERDICTS = [
    (dict(original=10, pruned=12, random=30, fewer_bits=11), "**Not worth it:**"),
    (dict(original=10, pruned=12, random=30, fewer_bits=12), "**Not worth it:**"),
    (dict(original=10, pruned=12, random=30, fewer_bits=13), "**Worth it:**"),
    (dict(original=10, pruned=20, recovered=12, random=30, fewer_bits=13), "**Worth it:**"),
    (dict(original=10, pruned=12, recovered=14, random=30, fewer_bits=13), "**Not worth it:**"),
    (dict(original=10, pruned=12, random=30), "were not an alternative"),
    (dict(original=10, pruned=12), "**Not compared:**"),
    (dict(pruned=12, random=30), "Not measured yet"),
    (dict(original=10), "Not measured yet"),
]


@pytest.mark.parametrize("perplexities, words", VERDICTS)
def test_verdict(measured, perplexities, words):
    text = verdict.verdict(measured(**perplexities))
    assert words in text
    assert ("orth it" in words) == ("orth it" in text)
    decided = {"**Not worth it:**": False, "**Worth it:**": True, "were not an alternative": True}
    assert verdict.worth_it(measured(**perplexities)) is decided.get(words)


def test_verdict_says_when_the_choice_was_no_better_than_chance(measured):
    text = verdict.verdict(measured(original=10, pruned=20, recovered=12.5, random=19, fewer_bits=13))
    assert "no better than chance" in text


def test_verdict_compares_window_by_window(measured):
    """A difference that is smaller than twice its paired error decides nothing."""
    found = measured(original=10, pruned=12, random=30, fewer_bits=12.1)
    for name, values in (("pruned", [2.0, 3.0, 2.5, 2.2]), ("fewer-bits", [2.1, 2.9, 2.6, 2.2])):
        found[name] = (found[name][0].model_copy(update={"window_nll": values}), found[name][1])
    assert "no measurable difference" in verdict.verdict(found)
    assert verdict.paired(found["pruned"][0], found["fewer-bits"][0])[0] == pytest.approx(-0.025)


def test_verdict_compares_the_result_with_the_random_cut(measured):
    text = verdict.verdict(measured(original=10, pruned=20, recovered=12.5, random=30, fewer_bits=13))
    assert "1.00 kB -> 750 B (75%), perplexity 10.00 -> 12.50 (x 1.250)." in text
    assert (
        "A random cut of the same size has 30.00 (the chosen one 20.00, both without recovery)." in text
        and "700 B" in text
    )


def test_verdict_says_that_all_were_reconstructed(measured, finished):
    text = verdict.verdict(measured(original=10, pruned=20, random=30, fewer_bits=13), True)
    assert "(the chosen one 20.00, both reconstructed, without recovery)" in text
    assert "the whole model with fewer bits, reconstructed as well, without recovery, takes 700 B" in text
    assert "both reconstructed, without recovery" in finished["summary"]["verdict"]


def test_a_run_without_the_memory_for_reconstruction_goes_on_without(pico_models, monkeypatch):
    """What is free decides: said, not refused; under a cap that somebody chose it is refused."""
    model = pico_models("llama")

    def refuse(*_):
        raise Refused("streaming needs 99 GB, free are 1 GB")

    assert pipeline.affordable(model, Settings(keep=0.75)).reconstruct
    monkeypatch.setattr(pipeline, "AFFORDABLE", 100)
    assert not pipeline.affordable(model, Settings(keep=0.75, memory_cap=10**9)).reconstruct
    monkeypatch.setattr(pipeline, "AFFORDABLE", 5e6)
    assert not pipeline.affordable(model, Settings(keep=0.75, samples=8, length=64)).reconstruct
    assert pipeline.affordable(
        model, Settings(keep=0.75, samples=1, length=16)
    ).reconstruct  # fewer tokens than the ffn
    monkeypatch.undo()
    monkeypatch.setattr(pipeline, "check_reconstruction", refuse)
    assert not pipeline.affordable(model, Settings(keep=0.75)).reconstruct
    assert pipeline.affordable(model, Settings(keep=0.75, memory_cap=10**9)).reconstruct
    with pytest.raises(Refused):
        pipeline.preflight(model, Settings(keep=0.75, memory_cap=10**9))
