"""Between the steps of a run nothing that they read changes unnoticed: text, tokenizer, recipe, working directory."""

from __future__ import annotations

import json
import os
import re
import shutil
import tomllib
from collections.abc import Callable
from pathlib import Path

import mlx.core as mx
import numpy as np
import pico
import pytest
from prose import paragraphs

from mlx_pare.base.errors import UsageError
from mlx_pare.pipeline import recipes, steps
from mlx_pare.scoring.calibrate import calibrate
from mlx_pare.store.rundir import Run
from mlx_pare.text import corpus, domains
from mlx_pare.text.corpus import Rows

L = ["--length", "32", "--samples", "4"]


@pytest.fixture
def pare(pare) -> Callable[..., tuple[int, str]]:
    """Call a command in this process: (exit code, what it said)."""

    def call(*arguments) -> tuple[int, str]:
        code, out, err = pare(*arguments)
        return code, out + err

    return call


@pytest.fixture
def place(tmp_path, monkeypatch) -> Path:
    """A directory to work in, with a model and texts."""
    pico.make(tmp_path / "model", num_hidden_layers=2)
    for n, name in enumerate(("d", "other", "test")):
        (tmp_path / f"{name}.txt").write_text("\n\n".join(paragraphs(120, seed=n)))
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def planned(place, pare) -> Path:
    """A run that is calibrated, scored and planned, on a path relative to that directory."""
    for arguments in (
        ["calibrate", "model", "--out", "r", "--data", "d.txt", *L],
        ["score", "r"],
        ["plan", "r", "--keep", "0.75", "--widths", "even"],
    ):
        code, said = pare(*arguments)
        assert code == 0, said
    return place / "r"


STEPS = {
    "reconstruct": ["reconstruct", "r"],
    "plan by trials": ["plan", "r", "--keep", "0.8", "--widths", "uniform", "--try", "2"],
    "sensitivity": ["plan", "r", "--keep", "0.8", "--widths", "per-layer", "--try", "2"],
    "stability": ["stability", "r", "--draws", "0"],
    "recover": ["recover", "r", "--recover-steps", "1"],
}


def ready(step: str, pare, planned: Path) -> None:
    """What a step needs to be called at all."""
    if step == "recover":
        assert pare("prune", "r", "--no-reconstruct")[0] == 0
    if step in ("plan by trials", "sensitivity"):
        shutil.rmtree(planned / "plan")


def text(place: Path) -> str:
    shutil.copy("other.txt", "d.txt")
    return "the text 'd' changed since r was calibrated on it"


def end_of_text(place: Path) -> str:
    """Paragraphs of the validation and the test part: the calibration rows stay."""
    kept = [p for p in Path("d.txt").read_text().split("\n\n") if _part(p) == "calibration"]
    Path("d.txt").write_text("\n\n".join(kept + [p for p in paragraphs(200, seed=9) if _part(p) != "calibration"]))
    return "the text 'd' changed since r was calibrated on it"


def _part(paragraph: str) -> str:
    return next(name for name, of in corpus.split([paragraph], domains.SHARES).items() if of)


def tokenizer(place: Path) -> str:
    """The same vocabulary, but another way to a text: what it reads as tokens differs nowhere here."""
    file = place / "model" / "tokenizer.json"
    found = json.loads(file.read_text())
    found["added_tokens"].append(dict(found["added_tokens"][0], id=1, content=found["model"]["vocab"] and "!!!x"))
    file.write_text(json.dumps(found))
    return "the tokenizer or the chat template of .*model changed since r was calibrated on it"


def chat_template(place: Path) -> str:
    (place / "model" / "chat_template.jinja").write_text("{{ messages }}")
    return "the tokenizer or the chat template of .*model changed"


def recipe_gone(place: Path) -> str:
    (place / "r" / "recipe.toml").unlink()
    return r"recipe.toml is missing, which says on what text the run works. `mlx-pare calibrate"


def edited(old: str, new: str, says: str) -> Callable[[Path], str]:
    def change(place: Path) -> str:
        file = place / "r" / "recipe.toml"
        assert old in file.read_text()
        file.write_text(file.read_text().replace(old, new))
        return says

    return change


def text_gone(place: Path) -> str:
    (place / "d.txt").unlink()
    return "no text at .*d.txt"


CHANGES = {
    "text": text,
    "rest of the text": end_of_text,
    "tokenizer": tokenizer,
    "chat template": chat_template,
    "recipe gone": recipe_gone,
    "seed": edited("seed = 0", "seed = 1", "seed was 0 when r was calibrated, now it is 1"),
    "length": edited("length = 32", "length = 16", "length was 32 when r was calibrated, now it is 16"),
    "samples": edited("samples = 4", "samples = 3", "samples was 4 when r was calibrated, now it is 3"),
    "data": edited("d.txt", "other.txt", "the text '(d|other)' changed since"),
    "no data": edited("data = ", "# ", "the text '(d|calibration)' changed since"),
    "test data": edited("data = ", 'test_data = "test.txt"\ndata = ', "the test text|the text 'd' changed since"),
}


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("change", ["text", "rest of the text", "tokenizer", "recipe gone"])
def test_f02_every_step_refuses_what_changed(planned, pare, place, step, change):
    ready(step, pare, planned)
    says = CHANGES[change](place)
    code, said = pare(*STEPS[step])
    assert code == 3, said
    assert re.search(says, said), said


@pytest.mark.parametrize("change", CHANGES)
def test_f02_whatever_changed_is_named(planned, pare, place, change):
    says = CHANGES[change](place)
    code, said = pare("reconstruct", "r")
    assert code == 3 and re.search(says, said), said
    assert not (planned / "reconstruct").exists()


@pytest.mark.parametrize("step", ["score", "prune"])
def test_f02_steps_that_read_no_text_copy_no_other_tokenizer(planned, pare, place, step):
    says = tokenizer(place)
    code, said = pare(step, "r")
    assert code == 3 and re.search(says, said), said


def test_f02_nothing_changed_is_no_change(planned, pare, place):
    """A model that was copied, another generation config."""
    shutil.copytree("model", "again")
    shutil.rmtree("model")
    shutil.move("again", "model")
    (place / "model" / "generation_config.json").write_text("{}")
    for arguments in (STEPS["reconstruct"], ["prune", "r"], STEPS["recover"], STEPS["stability"]):
        code, said = pare(*arguments)
        assert code == 0, said


def test_f02_another_working_directory_reads_the_same_file(planned, pare, place, monkeypatch):
    """One with another d.txt, and one without any."""
    for name in ("with", "without"):
        (place / name).mkdir()
    shutil.copy("other.txt", "with/d.txt")
    monkeypatch.chdir(place / "with")
    code, said = pare("reconstruct", "../r")
    assert code == 0, said
    record = json.loads((planned / "manifest.json").read_text())["steps"]
    assert record["reconstruct"]["inputs"]["data"] == record["calibrate"]["inputs"]["data"]
    monkeypatch.chdir(place / "without")
    assert pare("prune", "../r")[0] == 0
    code, said = pare("recover", "../r", "--recover-steps", "1")
    assert code == 0, said


def test_f02_the_recipe_has_absolute_paths(place, pare):
    (place / "n=x").mkdir()
    (place / "n=x" / "a:2.txt").write_text("\n\n".join(paragraphs(80, seed=5)))
    asked = ["calibrate", "model", "--out", "r", "--data", "d.txt:2", "--data", "name=n=x/a:2.txt", "--test-data",
             "test.txt", *L]  # fmt: skip
    assert pare(*asked)[0] == 0
    recipe = tomllib.loads((place / "r" / "recipe.toml").read_text())
    assert recipe["data"] == [f"{place}/d.txt:2", f"name={place}/n=x/a:2.txt"]
    assert recipe["test_data"] == f"{place}/test.txt" and recipe["model"] == f"{place}/model"
    assert [spec.path for spec in recipes.texts_of(Run(place / "r")).specs] == [
        place / "d.txt",
        place / "n=x" / "a:2.txt",
    ]


def test_f02_calibrate_writes_the_recipe_again(planned, pare, place):
    """With the same text only: a refused one leaves no recipe behind."""
    (planned / "recipe.toml").unlink()
    code, said = pare("calibrate", "model", "--out", "r", "--data", "other.txt", *L)
    assert code == 3 and not (planned / "recipe.toml").exists(), said
    assert pare("calibrate", "model", "--out", "r", "--data", "d.txt", *L)[0] == 0
    assert pare("reconstruct", "r")[0] == 0


def test_f02_a_text_that_was_moved_is_named_by_calibrate(planned, pare, place):
    (place / "texts").mkdir()
    shutil.move("d.txt", "texts/e.txt")
    code, said = pare("reconstruct", "r")
    assert code == 1 and "no text at" in said
    assert pare("calibrate", "model", "--out", "r", "--data", "texts/e.txt", *L)[0] == 0
    assert pare("reconstruct", "r")[0] == 0


def test_f02_run_after_a_deleted_recipe_goes_on(place, pare):
    asked = ["run", "model", "--out", "r", "--data", "d.txt", "--keep", "0.8", "--recover-steps", "0", "--trials", "0",
             "--widths", "even", "--gguf", "f16", "--context", "128", *L]  # fmt: skip
    assert pare(*asked)[0] == 0
    (place / "r" / "recipe.toml").unlink()
    assert pare(*asked)[0] == 0 and (place / "r" / "recipe.toml").exists()
    tokenizer(place)
    code, said = pare(*asked)
    assert code == 3 and "the tokenizer or the chat template" in said


def older(out: Path) -> None:
    """The same run as an earlier version left it: without a note on the text, without a date."""
    manifest = json.loads((out / "manifest.json").read_text())
    del manifest["steps"]["calibrate"]["outputs"]["text.json"]
    (out / "manifest.json").write_text(json.dumps(manifest))
    (out / "calibrate" / "text.json").unlink()
    lines = [line for line in (out / "recipe.toml").read_text().split("\n") if not line.startswith("date")]
    (out / "recipe.toml").write_text("\n".join(lines))


def test_f02_runs_without_a_note_are_compared_by_their_rows(planned, pare, place):
    older(planned)
    assert pare("reconstruct", "r")[0] == 0
    assert pare("prune", "r")[0] == 0
    kept = Path("d.txt").read_text()
    text(place)
    code, said = pare("recover", "r", "--recover-steps", "1")
    assert code == 3 and "the text changed since r was calibrated on it" in said
    Path("d.txt").write_text(kept)
    code, said = pare("recover", "r", "--recover-steps", "1")
    assert code == 0, said


def test_recover_on_other_text_is_kept_apart_from_the_runs_test_text(planned, pare, place):
    """--test-data alone divides the run's text otherwise: what it is tested on would be trained on."""
    assert pare("prune", "r", "--no-reconstruct")[0] == 0
    code, said = pare("recover", "r", "--recover-steps", "1", "--test-data", "test.txt")
    assert code == 1 and "the run's test text share" in said, said
    code, said = pare("recover", "r", "--recover-steps", "1", "--data", "other.txt")
    assert code == 0, said


# ---- what else may be found late ----


def test_f09_a_run_inside_of_its_data_goes_on(place, pare):
    """Its own reports and logs are no text."""
    asked = ["run", "model", "--out", "deep/r", "--data", ".", "--keep", "0.8", "--recover-steps", "1", "--trials", "0",
             "--widths", "even", "--gguf", "f16", "--context", "128", *L]  # fmt: skip
    code, said = pare(*asked)
    assert code == 0, said
    code, said = pare(*asked)
    assert code == 0, said
    shutil.rmtree("deep/r/reconstruct")
    code, said = pare("reconstruct", "deep/r")
    assert code == 0, said


def test_f16_a_moved_model_is_noted(planned, pare, place):
    shutil.move("model", "elsewhere")
    code, said = pare("score", "r")
    assert code == 1 and "no model directory at" in said
    code, said = pare("calibrate", "elsewhere", "--out", "r", "--data", "d.txt", *L)
    assert code == 0 and "kept" in said
    assert json.loads((planned / "manifest.json").read_text())["model"] == str(place / "elsewhere")
    assert tomllib.loads((planned / "recipe.toml").read_text())["model"] == str(place / "elsewhere")
    assert pare("score", "r")[0] == 0 and pare("reconstruct", "r")[0] == 0


@pytest.mark.parametrize("where", ["calibration", "anywhere"])
def test_f22_tokens_beyond_the_embedding(place, pare, where):
    """Found before there is a run directory, in whatever part of the text such a token stands."""
    small = place / "small"
    pico.make(small, num_hidden_layers=1)
    config = json.loads((small / "config.json").read_text())
    weights = mx.load(str(small / "model.safetensors"))
    rows = 512 if where == "anywhere" else 300
    if where == "anywhere":
        found = json.loads((small / "tokenizer.json").read_text())
        found["added_tokens"].append(dict(found["added_tokens"][0], id=512, content="<|late|>"))
        (small / "tokenizer.json").write_text(json.dumps(found))
        (place / "d.txt").write_text((place / "d.txt").read_text() + "\n\nOnce <|late|> only.")
    weights["model.embed_tokens.weight"] = weights["model.embed_tokens.weight"][:rows]
    mx.save_safetensors(str(small / "model.safetensors"), weights)
    (small / "config.json").write_text(json.dumps(config | {"vocab_size": rows}))
    code, said = pare("calibrate", "small", "--out", "new", "--data", "d.txt", *L)
    assert code == 2 and said.count("\n") == 1 and f"the embedding of small has {rows} rows" in said, said
    assert not (place / "new").exists()


def test_f22_tokens_beyond_the_embedding_that_no_text_has(place, pare):
    found = json.loads((place / "model" / "tokenizer.json").read_text())
    found["added_tokens"].append(dict(found["added_tokens"][0], id=512, content="<|late|>"))
    (place / "model" / "tokenizer.json").write_text(json.dumps(found))
    code, said = pare("calibrate", "model", "--out", "new", "--data", "d.txt", *L)
    assert code == 0, said


def test_f22_a_step_of_the_library_says_it_too(place):
    with pytest.raises(UsageError, match="the data holds token 512, the model knows 512"):
        calibrate(place / "model", Rows.full(np.full((2, 4), 512)), place / "out")


def test_recipe_paths_of_the_library_are_absolute(place):
    asked = recipes.recipe_of(Path("model"), steps.Settings(data="d.txt", test_data="test.txt", teacher="model"))
    assert all(os.path.isabs(asked[key]) for key in ("model", "data", "test_data", "teacher"))
