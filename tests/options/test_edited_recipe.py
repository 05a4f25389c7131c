"""recipe.toml is made to be read by people, so it is edited: a wrong one is one line with the file and the key."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from mlx_pare.base.errors import PareError
from mlx_pare.options.settings import TABLE, Settings, settings_of
from mlx_pare.store.manifest import read_recipe

COMMANDS = {
    "status": ["status", "RUN"],
    "plan": ["plan", "RUN", "--keep", "0.75", "--widths", "even"],
    "reconstruct": ["reconstruct", "RUN"],
    "recover": ["recover", "RUN", "--recover-steps", "2"],
    "stability": ["stability", "RUN", "--draws", "0"],
    "calibrate": ["calibrate", "MODEL", "--out", "RUN", "--length", "32", "--samples", "4"],
    "run": ["run", "MODEL", "--out", "RUN", "--keep", "0.75", "--length", "32", "--samples", "4"],
    "export": ["export", "RUN/prune/model", "--hub-ready", "OUT", "--no-verify"],
}
DAMAGES = {  # what stands in the file -> what the line names
    "not toml": (b"not toml", "recipe.toml"),
    "not UTF-8": (b"data = '\xff'", "recipe.toml"),
    "deep": (b"data = " + b"[" * 5000, "recipe.toml"),
    "zeros": (bytes(100), "recipe.toml"),
    "stages": (b'stages = "x"', "schedule"),
    "data": (b"data = 5", "data = 5"),
    "some data": (b'data = ["a", 5]', "data = "),
    "samples": (b'samples = "x"', 'samples = "x"'),
    "no samples": (b"samples = -3", "samples = -3"),
    "many samples": (b"samples = 1000000000000", "samples = 1000000000000"),
    "length": (b"length = nan", "length = NaN"),
    "seed": (b'seed = "a"', 'seed = "a"'),
    "field": (b"field = true", "field = true"),
    "date": (b'date = "yesterday"', "date = 'yesterday'"),
    "a table": (b"[samples]\nx = 1", "samples = "),
    "a large number": (b"samples = 1" + b"0" * 5000, "recipe.toml"),
    "recover_steps": (b'recover_steps = "none"', 'recover_steps = "none"'),
    "widths": (b"widths = 1", "widths = 1"),
    "model": (b"model = 1", "model = 1"),
}


@pytest.fixture(scope="module")
def pruned(pico_models, two_texts, tmp_path_factory) -> Path:
    """A run up to prune, made by single steps."""
    from mlx_pare.pipeline import choose_sizes, recipes, steps

    out, model = tmp_path_factory.mktemp("edited") / "run", pico_models("llama", num_hidden_layers=2)
    s = Settings(**two_texts, samples=4, length=32, keep=0.75, widths="even")
    with steps.open_run(model, out) as run:
        run.write_recipe(recipes.recipe_of(model, recipes.dated(out, s)))
        texts = recipes.texts_of(run, s)
        steps.calibrate_step(run, texts, s)
        steps.score_step(run, s)
        choose_sizes.plan_step(run, texts, s)
        steps.reconstruct_step(run, texts, s)
        steps.prune_step(run)
    return out


@pytest.fixture
def out(pruned, tmp_path) -> Path:
    return Path(shutil.copytree(pruned, tmp_path / "run"))


@pytest.mark.parametrize("damage", DAMAGES)
def test_f26_a_recipe_is_read_or_named(out, damage):
    raw, words = DAMAGES[damage]
    (out / "recipe.toml").write_bytes(raw)
    with pytest.raises(PareError) as found:
        read_recipe(out)
    assert str(out / "recipe.toml") in found.value.problem and words in found.value.problem and found.value.cure


@pytest.mark.parametrize("damage", ["not toml", "not UTF-8", "stages", "data", "samples", "seed"])
@pytest.mark.parametrize("command", COMMANDS)
def test_f26_every_command_says_it_in_one_line(pare, out, pico_models, tmp_path, command, damage):
    raw, words = DAMAGES[damage]
    (out / "recipe.toml").write_bytes(raw + b"\n")
    place = {
        "RUN": out,
        "MODEL": pico_models("llama", num_hidden_layers=2),
        "RUN/prune/model": out / "prune" / "model",
        "OUT": tmp_path / "o",
    }
    code, _, err = pare(*(place.get(word, word) for word in COMMANDS[command]))
    lines = [line for line in err.splitlines() if not line.startswith(("warning: ", "note: "))]
    assert code == 1 and len(lines) == 1, err
    assert "recipe.toml" in lines[0] and words.split(" =")[0] in lines[0] and "internal error" not in err


def test_f26_a_recipe_that_is_no_file(pare, out):
    (out / "recipe.toml").unlink()
    (out / "recipe.toml").mkdir()
    code, _, err = pare("status", out)
    assert code == 1 and err.count("\n") == 1 and "recipe" in err and "directory" in err


def test_status_of_a_run_without_a_recipe(pare, out):
    (out / "recipe.toml").unlink()
    code, said, err = pare("status", out)
    assert code == 0 and "prune" in said and not err


def test_a_whole_recipe_is_read_as_settings(out):
    recipe = read_recipe(out)
    assert recipe["samples"] == 4 and recipe["keep"] == 0.75
    known = {name: value for name, value in recipe.items() if name in TABLE}
    assert set(recipe) - set(known) == {"model"}
    assert Settings(**known).length == 32
    assert settings_of(data=recipe["data"], samples=recipe["samples"]).samples == 4
