"""The plan step of a run: what is tried, what is remembered of it, and what comes out."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from typer.testing import CliRunner

from mlx_pare import lm
from mlx_pare.base.errors import PareError, Refused, UsageError
from mlx_pare.cli import main as cli
from mlx_pare.model.checkpoint import Checkpoint
from mlx_pare.options.settings import Settings
from mlx_pare.pipeline import choose_sizes, run as pipeline, steps
from mlx_pare.planning import trial_cache
from mlx_pare.pruning.plan_file import Plan
from mlx_pare.pruning.prune import prune
from mlx_pare.text.corpus import Rows
from mlx_pare.text.splits import Texts

SMALL = Settings(
    keep=0.75, length=32, samples=16, recover_steps=0, trials=0, context=256, axes=("ffn", "kv_head", "layer")
)
HOW = ("even", "uniform", "per-layer")


@pytest.fixture(scope="module", autouse=True)
def few_rows():
    """Of validation text, so that it takes seconds."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trial_cache, "HELD_TOKENS", 8 * 32)
        yield


@pytest.fixture(scope="module")
def model(pico_models) -> Path:
    return pico_models("llama", num_key_value_heads=4)


@pytest.fixture(scope="module")
def scored(model, tmp_path_factory) -> Path:
    """A run directory up to the scores."""
    out = tmp_path_factory.mktemp("scored") / "run"
    with steps.open_run(model, out) as run:
        run.write_recipe({"model": str(model), "length": 32, "samples": 16})
        steps.calibrate_step(run, Texts(model, SMALL), SMALL)
        steps.score_step(run, SMALL)
    return out


def planned(out: Path, s: Settings) -> Plan:
    with steps.continue_run(out) as run:
        return Plan.load(choose_sizes.plan_step(run, Texts(run.model, s), s))


@pytest.fixture(scope="module", params=HOW)
def made(request, scored, tmp_path_factory) -> tuple[str, Path, Plan]:
    """(way, run directory, plan) of every way to choose widths."""
    out = Path(shutil.copytree(scored, tmp_path_factory.mktemp("made") / "run"))
    s = replace(SMALL, widths=request.param, tries=10)
    return request.param, out, planned(out, s)


@pytest.fixture
def copied(made, tmp_path) -> tuple[str, Path]:
    return made[0], Path(shutil.copytree(made[1], tmp_path / "run"))


@pytest.fixture
def calls(monkeypatch) -> dict[str, list]:
    """What is tried and what is reconstructed from now on."""
    seen: dict[str, list] = {"tried": [], "reconstructed": []}
    try_out, reconstructed_kl = trial_cache.try_out, trial_cache.reconstructed_kl

    def counted(model, candidates, *rest):
        seen["tried"].extend(candidates)
        return try_out(model, candidates, *rest)

    def reconstructed(model, plan, *rest):
        seen["reconstructed"].append(plan)
        return reconstructed_kl(model, plan, *rest)

    monkeypatch.setattr(trial_cache, "try_out", counted)
    monkeypatch.setattr(trial_cache, "reconstructed_kl", reconstructed)
    return seen


def read(path: Path) -> dict:
    return json.loads(path.read_text())


# ---- what comes out ----


def test_plan_loads_and_prunes(made, model, tmp_path):
    how, _, plan = made
    assert plan.problems(Checkpoint(model).arch) == [] and plan.target.value == 0.75
    share = plan.after.non_embedding / plan.before.non_embedding
    assert share <= 0.751 if how == "per-layer" else 0.65 < share < 0.77
    prune(model, plan, tmp_path / "cut")
    assert Checkpoint(tmp_path / "cut").nbytes() == plan.after.bytes
    assert lm.load_stock(tmp_path / "cut") is not None
    if how != "per-layer":
        assert len({(len(layer.ffn), len(layer.kv_head)) for layer in plan.layers}) == 1


def test_candidates_are_listed(made):
    """With the KL of each; the plan is the best of them, after reconstruction where some were reconstructed."""
    how, out, plan = made
    file = out / "plan" / "tried.json"
    assert file.exists() == (how != "even")
    if how == "even":
        return
    tried = read(file)
    every = tried["candidates"]
    assert tried["widths"] == how and 1 < len(every) <= 10 and tried["even"] == 0
    assert all(row["kl"] > 0 for row in every)
    taken = every[tried["taken"]]
    final = [row for row in every if "reconstructed_kl" in row]
    if how == "uniform":
        assert not final and taken["kl"] == min(row["kl"] for row in every)
        assert taken["level"] == {
            "ffn": len(plan.layers[0].ffn), "kv_head": len(plan.layers[0].kv_head), "layer": len(plan.layers),
            "hidden": 64,
        }  # fmt: skip
        return
    assert len(final) == choose_sizes.FINALISTS
    assert taken["reconstructed_kl"] == min(row["reconstructed_kl"] for row in final)
    assert max(row["kl"] for row in final) <= min(row["kl"] for row in every if row not in final)
    kept = {layer.source: {"kv_head": len(layer.kv_head), "ffn": len(layer.ffn)} for layer in plan.layers}
    assert taken["layers"] == [kept.get(i) for i in range(4)]
    assert set(tried["rank_correlation"]) == {"attention", "ffn", "all"}
    assert any(len({json.dumps(layer) for layer in row["layers"] if layer}) == 1 for row in every)  # alike
    assert any(len({json.dumps(layer) for layer in row["layers"] if layer}) > 1 for row in every)


def test_nothing_temporary_is_left(made):
    assert not [f for f in made[1].rglob("*") if ".tmp" in f.name or f.suffix == ".partial"]


def test_one_candidate_is_one(scored, tmp_path):
    out = Path(shutil.copytree(scored, tmp_path / "run"))
    planned(out, replace(SMALL, widths="per-layer", tries=1))
    assert len(read(out / "plan" / "tried.json")["candidates"]) == 1


# ---- once more ----


def test_again_tries_nothing(copied, made, calls):
    how, out = copied
    s = replace(SMALL, widths=how, tries=10)
    assert planned(out, s) == made[2]  # the step is done
    shutil.rmtree(out / "plan")
    assert planned(out, s) == made[2]  # and what it tried is known
    assert calls == {"tried": [], "reconstructed": []}


def test_more_candidates_are_the_new_ones_alone(copied, made, calls):
    how, out = copied
    if how == "even":
        return
    found = []
    for count in (3, 16):
        shutil.rmtree(out / "plan", ignore_errors=True)
        (out / "trials.json").unlink() if count == 3 else None
        calls["tried"].clear()
        planned(out, replace(SMALL, widths=how, tries=count))
        rows = read(out / "plan" / "tried.json")["candidates"]
        found.append({json.dumps(row.get("layers") or row["level"]): row["kl"] for row in rows})
    assert found[0].items() <= found[1].items() and 1 < len(found[0]) < len(found[1])
    assert len(calls["tried"]) == len(found[1]) - len(found[0])


@pytest.mark.parametrize("content", ["", "[]", "{", '{"a": "b"}', '{"a": [1]}', "\x00"])
def test_damaged_trials_are_an_error(copied, content):
    how, out = copied
    if how == "even":
        return
    (out / "trials.json").write_text(content)
    shutil.rmtree(out / "plan")
    with pytest.raises(PareError, match=r"trials\.json is damaged.*[Dd]elete it") as error:
        planned(out, replace(SMALL, widths=how, tries=10))
    assert "\n" not in str(error.value)


CHANGES = [
    (dict(tries=11), "tries was 10, now it is 11"),
    (dict(keep=0.6), "keep was 0.75"),
    (dict(step=2), "step was None"),
    (dict(axes=("ffn", "kv_head")), "axes was"),
]
OF_LAYERS = [
    (dict(reconstruct=False), "reconstruct was True"),
    (dict(seed=1), "seed was 0 when .* was calibrated, now it is 1"),
    (dict(choose_bits=(4, 8)), "sensitivity.*bits was"),
]


@pytest.mark.parametrize(("change", "words"), [*CHANGES, *OF_LAYERS])
def test_other_settings_are_refused(copied, change, words):
    how, out = copied
    if (how == "even" and "tries" in change) or (how != "per-layer" and (change, words) in OF_LAYERS):
        return
    with pytest.raises(Refused, match=words):
        planned(out, replace(SMALL, **{"widths": how, "tries": 10, **change}))
    with pytest.raises(Refused, match=r"plan step .* was made differently"):
        planned(out, replace(SMALL, widths="even" if how != "even" else "uniform", tries=10))


def test_what_was_given_up_is_written_and_remembered(scored, tmp_path, calls, monkeypatch):
    """Infinity is no JSON."""
    monkeypatch.setattr("mlx_pare.planning.try_candidates.LOST", 0.35)
    for how in ("uniform", "per-layer"):
        out = Path(shutil.copytree(scored, tmp_path / how))
        s = replace(SMALL, widths=how, tries=10)
        first = planned(out, s)
        kl = [row["kl"] for row in read(out / "plan" / "tried.json")["candidates"]]
        assert None in kl and not all(one is None for one in kl)
        shutil.rmtree(out / "plan")
        calls["tried"].clear()
        assert planned(out, s) == first and not calls["tried"]


def test_finalists_of_other_bits_are_others(scored, tmp_path, calls):
    """The same units packed otherwise are reconstructed otherwise."""
    out = Path(shutil.copytree(scored, tmp_path / "run"))
    for bits in (8, 4):
        planned(out, replace(SMALL, widths="per-layer", tries=4, axes=("kv_head",), keep=0.9, bits=bits, group_size=32))
        shutil.rmtree(out / "plan")
    assert len(calls["reconstructed"]) == 6 and len(calls["tried"]) == 4


# ---- which texts ----


def test_texts_are_disjoint_and_used_for_what_they_are(model, scored, tmp_path, monkeypatch):
    """Solved on calibration rows, measured on validation rows, never on the test text."""
    out = Path(shutil.copytree(scored, tmp_path / "run"))
    seen = []
    for module, name in ((trial_cache, "try_out"), (trial_cache, "reconstructed_kl"), (choose_sizes, "sensitivity")):
        monkeypatch.setattr(module, name, seen_by(seen, getattr(module, name)))
    s = replace(SMALL, widths="per-layer", tries=4)
    planned(out, s)
    texts = Texts(model, s)
    assert len(seen) == 1 + 1 + choose_sizes.FINALISTS
    validation = texts.validation.first(8)
    for calibration, held in seen:
        assert calibration.digest() == texts.calibration.digest() and held.digest() == validation.digest()
    rows = [set(map(bytes, data.tokens)) for data in (texts.calibration, texts.validation, texts.test)]
    assert not (rows[0] & rows[1] or rows[0] & rows[2] or rows[1] & rows[2])


def seen_by(seen: list, function):
    def called(*args):
        seen.append([arg for arg in args if isinstance(arg, Rows)])
        return function(*args)

    return called


# ---- what cannot be had ----


@pytest.mark.parametrize("family", ["qwen2", "gemma3_text"])
def test_layers_that_must_be_alike_are(pico_models, family, capsys):
    s = replace(SMALL, widths="per-layer", axes=("ffn", "kv_head"))
    assert choose_sizes.settled(pico_models(family), s).widths == "uniform"
    assert "would load nowhere (openelm" in capsys.readouterr().err
    assert choose_sizes.settled(pico_models("qwen3"), s) == s and not capsys.readouterr().err
    wide = pico_models("qwen2", intermediate_size=512)  # nemotron-nas holds its biases, in steps of 256
    assert choose_sizes.settled(wide, s) == s


def test_default_axes_are_those_that_can_be_cut(pico_models, tmp_path, capsys):
    """What nobody asked for is left out and said; what was asked is refused."""
    for family, why in (("olmo2", "span all heads"), ("granite", "multipliers")):
        path = pico_models(family)
        assert choose_sizes.settled(path, replace(SMALL, axes=("ffn", "kv_head"))).axes == ("ffn",)
        assert re.search(rf"{family} is not cut along kv_head: .*{why}", capsys.readouterr().err)
        assert pipeline.dry_run(path, replace(SMALL, axes=("ffn", "kv_head")))["after"]["kv_heads"] == 2
        with pytest.raises(UsageError, match=f"{family} cannot be cut along kv_head: .*{why}.* Choose from ffn, layer"):
            pipeline.run(path, tmp_path / "run", replace(SMALL, axes=("kv_head", "ffn")))
    with pytest.raises(Refused, match="layers of a smollm3 by their place"):
        choose_sizes.settled(pico_models("smollm3"), replace(SMALL, gguf="f16"))
    assert choose_sizes.settled(pico_models("smollm3"), SMALL).axes == SMALL.axes
    assert not [*tmp_path.iterdir()]


def test_hidden_is_cut_evenly(model, capsys):
    s = replace(SMALL, axes=("ffn", "hidden"))
    assert choose_sizes.settled(model, s).widths == "even" and not capsys.readouterr().err
    assert choose_sizes.settled(model, replace(s, widths="per-layer")).widths == "even"
    assert "same for all layers" in capsys.readouterr().err


WRONG = [
    (dict(choose_bits=(4, 8)), UsageError, "widths per layer"),
    (dict(choose_bits=(4, 8), widths="per-layer"), UsageError, "size in bytes"),
    (
        dict(choose_bits=(4,), widths="per-layer", keep=None, target_size="200kB", group_size=48),
        UsageError,
        "--group-size",
    ),
    (dict(runtimes=("mlx", "vllm")), UsageError, "'vllm'.*llama.cpp"),
    (dict(widths="wide"), UsageError, "'wide'.*per-layer"),
    (dict(memory_cap=10_000), Refused, "--memory-cap allows"),
]


@pytest.mark.parametrize(("change", "error", "words"), WRONG)
def test_what_cannot_work_is_found_before_anything_is_written(model, tmp_path, change, error, words):
    with pytest.raises(error, match=words):
        pipeline.run(model, tmp_path / "run", replace(SMALL, **change))
    assert not (tmp_path / "run").exists()


def test_gguf_may_be_asked_where_layers_stay_alike(model, pico_models):
    s = replace(SMALL, widths="per-layer", gguf="f16", axes=("ffn", "kv_head"))
    assert choose_sizes.settled(pico_models("qwen2"), s).widths == "uniform"
    assert choose_sizes.settled(model, s).widths == "per-layer"  # llama.cpp has deci for these


def test_the_plan_respects_what_must_load_it(pico_models, capsys):
    """llama.cpp has nothing for qwen3 with a head of its own and layers that differ."""
    untied = pico_models("qwen3", tie_word_embeddings=False)
    s = replace(SMALL, widths="per-layer", axes=("ffn", "kv_head"))
    assert choose_sizes.settled(untied, s).widths == "per-layer"
    assert choose_sizes.settled(untied, replace(s, runtimes=("mlx", "ollama"))).widths == "uniform"
    assert "all layers are cut alike" in capsys.readouterr().err
    with pytest.raises(Refused, match=r"no GGUF of this model with layers that differ.*--widths uniform"):
        choose_sizes.settled(untied, replace(s, gguf="f16"))


def test_a_model_that_no_gguf_can_hold_is_refused_at_once(pico_models, tmp_path):
    model = pico_models("llama", rope_scaling={"rope_type": "dynamic", "factor": 2.0})
    with pytest.raises(Refused, match=r"no GGUF file can be made of it.*dynamic"):
        pipeline.run(model, tmp_path / "run", replace(SMALL, runtimes=("llama.cpp",)))


def test_without_memory_for_trials_it_goes_on_without(model, monkeypatch, capsys):
    def refuse(*_):
        raise Refused("too much")

    monkeypatch.setattr("mlx_pare.planning.try_candidates.check_memory", refuse)
    assert choose_sizes.settled(model, SMALL).widths == "even"
    assert "going on without trials" in capsys.readouterr().err
    assert choose_sizes.settled(model, replace(SMALL, widths="even")).widths == "even"
    for change in (dict(widths="per-layer"), dict(memory_cap=10**9)):
        with pytest.raises(Refused, match="too much"):
            choose_sizes.settled(model, replace(SMALL, **change))


# ---- the command, and the whole run ----


def command(*words: str | Path) -> dict:
    done = CliRunner().invoke(cli.app, [*map(str, words), "--json"])
    assert done.exit_code == 0, done.output
    return json.loads(done.stdout)


@pytest.mark.parametrize("how", HOW)
def test_plan_command_takes_the_rows_of_its_run(scored, tmp_path, monkeypatch, how):
    out = Path(shutil.copytree(scored, tmp_path / "run"))
    seen: list = []
    monkeypatch.setattr(trial_cache, "try_out", seen_by(seen, trial_cache.try_out))
    found = command("plan", out, "--keep", "0.75", "--widths", how, "--try", "5", "--axes", "ffn,kv_head")
    assert found["after"]["non_embedding"] < found["before"]["non_embedding"]
    assert all((a.count, a.length, b.count, b.length) == (16, 32, 8, 32) for a, b in seen)
    assert len(seen) == (how != "even")


@pytest.fixture(scope="module")
def finished(pico_models, tmp_path_factory) -> tuple[Path, dict]:
    """A whole run with widths of their own, forced by a part that nothing comes from."""
    model = pico_models("qwen3", num_key_value_heads=4, tie_word_embeddings=False)
    out = tmp_path_factory.mktemp("whole") / "run"
    s = replace(SMALL, widths="per-layer", tries=8, axes=("ffn", "kv_head"), trials=1, samples=8)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(choose_sizes, "splits", lambda *_: [])  # or the best may have layers that are all alike
        return out, pipeline.run(model, out, s)


def test_run_finishes_without_gguf(finished):
    out, summary = finished
    assert summary["gguf"] is None and not list(out.rglob("*.gguf"))
    assert Checkpoint(Path(summary["model"])).arch.family.name in ("openelm", "nemotron-nas")
    assert summary["after"]["kl_divergence"] > 0 and len(summary["bench"]["models"]) == 2
    assert len(summary["fits"]["rows"]) > 50 and summary["fits"]["gguf_rows"] == []
    assert json.dumps(summary, allow_nan=False)


def test_report_says_why_and_how(finished):
    out, summary = finished
    text = Path(summary["report"]).read_text()
    assert "There is no GGUF file: " in text and "layers that differ" in text and "The GGUF file fits" not in text
    tried = read(out / "plan" / "tried.json")
    section = text.split("## How the sizes were chosen")[1].split("\n## ")[0]
    assert f"Widths per-layer: {len(tried['candidates'])} candidates tried" in section
    best = sorted(row["kl"] for row in tried["candidates"])[:5]
    lines = [line for line in section.split("\n") if line.startswith("|")][2:]
    assert [line.split("|")[2].strip() for line in lines[:5]] == [f"{kl:.4f}" for kl in best]
    assert sum("taken" in line for line in lines) == 1 and "Rank correlation" in section
    taken = next(line for line in lines if "taken" in line)
    assert f"{tried['candidates'][tried['taken']]['reconstructed_kl']:.4f}" in taken


def test_it_is_said_once_and_a_second_run_does_nothing(finished, pico_models, capsys):
    out, summary = finished
    s = replace(SMALL, widths="per-layer", tries=8, axes=("ffn", "kv_head"), trials=1, samples=8)
    model = pico_models("qwen3", num_key_value_heads=4, tie_word_embeddings=False)
    assert pipeline.run(model, out, s) == summary
    assert "GGUF" not in capsys.readouterr().err


def test_report_of_even_and_of_given_up_candidates(made, tmp_path):
    from mlx_pare.reporting import report

    how, out, _plan = made
    text = report._tried(out)
    assert (text == "") == (how == "even")
    if how == "even":
        return
    tried = read(out / "plan" / "tried.json")
    assert "even split" in text and "given up" not in text
    tried["candidates"][1]["kl"] = None
    (tmp_path / "plan").mkdir()
    (tmp_path / "plan" / "tried.json").write_text(json.dumps(tried))
    assert "1 of them were given up" in report._tried(tmp_path)


# ---- a run that was begun ----


def test_without_reconstruction_nothing_is_tried(model, capsys):
    """Trials repair, so they would judge other models than those that are made."""
    assert choose_sizes.settled(model, replace(SMALL, reconstruct=False)).widths == "even"
    assert not capsys.readouterr().err
    assert choose_sizes.settled(model, replace(SMALL, reconstruct=False, widths="per-layer")).widths == "even"
    assert "nothing is tried" in capsys.readouterr().err


@pytest.mark.parametrize("free", [True, False])
def test_what_was_begun_goes_on_whatever_is_free_now(made, model, monkeypatch, free):
    how, out, _ = made
    assert choose_sizes.begun(out) == how and choose_sizes.begun(out / "nowhere") is None

    def refuse(*_):
        raise Refused("too much")

    if not free:
        monkeypatch.setattr("mlx_pare.planning.try_candidates.check_memory", refuse)
    if how == "uniform":
        assert choose_sizes.settled(model, SMALL, choose_sizes.begun(out)).widths == "uniform"
    if how == "even" and not free:
        assert choose_sizes.settled(model, SMALL, choose_sizes.begun(out)).widths == "even"


def test_orders_of_another_text_are_not_taken(made, model):
    how, out, _ = made
    with steps.continue_run(out) as run:
        rows = Texts(model, SMALL).calibration
        assert bool(trial_cache._curves(run, rows)) == (how == "per-layer")
        assert trial_cache._curves(run, rows.first(3)) == {}
