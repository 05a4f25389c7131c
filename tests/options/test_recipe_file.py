"""Recipe files: any option by its name; the command line wins; what a run writes is a recipe that does the same."""

from __future__ import annotations

import dataclasses
import json
import tomllib
from pathlib import Path

import pytest

from mlx_pare.base.errors import PareError, UsageError
from mlx_pare.options import recipe_file
from mlx_pare.options.settings import TABLE, Settings, settings_of
from mlx_pare.store.rundir import Run
from mlx_pare.text.splits import DEMO

SMALL = ["--keep", "0.75", "--length", "32", "--samples", "4", "--recover-steps", "1", "--trials", "0", "--gguf", "f16",
         "--context", "256", "--widths", "even", "--train-rows", "8"]  # fmt: skip

# Every setting with a value that is not its default.
ODD = Settings(
    data=("one=a.txt:2", "notes/"), test_data='te"st \\ \n.txt', field="body,text", samples=7, length=33,
    criterion="wanda", reconstruct=False, axes=("ffn", "layer"), keep=0.5, stages=(0.8, 0.65, 0.5),
    target_params="24B", target_size="15GB", mac="m4-24gb", context=100, min_speed=2.5, bits=4, group_size=32, step=3,
    protect=False, widths="per-layer", runtimes=("mlx", "llama.cpp"), layers_by="kl", tries=5, choose_bits=(2, 4),
    recover_steps=11, train_rows=12, method="dora", learning_rate=1e-5, local_steps=13, batch=2, accumulate=3,
    schedule="linear", clip=0.5, patience=2, rank=8, kind="js", temperature=2.0, cross_entropy=0.25, match="mse",
    top=64, grad_checkpoint=True, mix=True, on_policy=0.5, teacher="some/model", gguf="q4_k_m", trials=3,
    min_quality=1.5, memory_cap=4_000_000_000, seed=5, quick=True, date="2024-02-29",
    gate=("kl <= 0.1", "tok_s >= 20"), fail_if_not_worth_it=True,
)  # fmt: skip


def recipe(place: Path, text: str) -> Path:
    file = place / "recipe.toml"
    file.write_text(text, "utf-8")
    return file


def read_back(place: Path, text: str) -> Settings:
    found = recipe_file.read(recipe(place, text))
    found.pop("model", None)
    return settings_of(**found)


# ---- what is written can be read ----


@pytest.mark.parametrize("settings", [ODD, Settings(keep=0.75), Settings(data="a b.txt", target_size="1MB")])
def test_what_a_run_writes_is_a_recipe_of_the_same_settings(tmp_path, settings):
    text = recipe_file.toml(recipe_file.by_name({"model": str(tmp_path), **dataclasses.asdict(settings)}))
    assert read_back(tmp_path, text) == settings
    assert recipe_file.read(tmp_path / "recipe.toml")["model"] == str(tmp_path.resolve())


def test_every_setting_is_odd():
    """Or the test above would not notice a setting that is lost."""
    usual = Settings()
    assert not [f.name for f in dataclasses.fields(Settings) if getattr(ODD, f.name) == getattr(usual, f.name)]


def test_it_has_the_names_of_the_options(tmp_path):
    written = tomllib.loads(recipe_file.toml(recipe_file.by_name({"model": str(tmp_path), **dataclasses.asdict(ODD)})))
    assert set(written) == {"model", *(option.name for option in TABLE.values())}
    assert written["for"] == "m4-24gb" and written["schedule"] == [0.8, 0.65, 0.5]
    assert written["rate_schedule"] == "linear" and written["targets"] == 64 and written["try"] == 5


def test_recipes_of_earlier_versions_are_read(tmp_path):
    """They had the names of the fields, and "schedule" was that of the learning rate."""
    values = {key: value for key, value in dataclasses.asdict(ODD).items() if value is not None}
    assert read_back(tmp_path, recipe_file.toml(values)) == ODD


def test_f34_marks_in_a_recipe_do_not_steer_a_terminal(tmp_path):
    text = recipe_file.toml({"data": "a\x1b[31m\u202e\x9b\x7f\U000e0001\ud800b", "field": "ü"})
    assert text.replace("\n", "").isprintable() and tomllib.loads(text)["field"] == "ü"
    assert tomllib.loads(text)["data"] == "a\x1b[31m\u202e\x9b\x7f\U000e0001?b"


def test_names_may_have_hyphens_and_flags_may_be_denied(tmp_path):
    found = read_back(tmp_path, 'target-size = "1MB"\nrecover_steps = 3\nno-reconstruct = true\nno_protect = false\n')
    assert (found.target_size, found.recover_steps, found.reconstruct, found.protect) == ("1MB", 3, False, True)


def test_values_as_people_write_them(tmp_path):
    found = read_back(
        tmp_path,
        'axes = ["ffn", "layer"]\nschedule = "0.8,0.5"\ntargets = 64\nmemory-cap = "2GB"\nchoose_bits = "2,4"\n'
        "keep = 1\ntarget-params = 24000000000\ndata = 'notes/'\ndate = 2026-01-31\n",
    )
    assert found.date == "2026-01-31"
    assert found.axes == ("ffn", "layer") and found.stages == (0.8, 0.5) and found.top == 64
    assert found.memory_cap == 2_000_000_000 and found.choose_bits == (2, 4) and found.keep == 1
    assert found.target_params == "24000000000" and found.data == "notes/"


# ---- what is no recipe ----

WRONG = {
    "unknown key": ("recover_step = 3", "unknown key 'recover_step'. Did you mean 'recover_steps'\\?$"),
    "unknown key, nothing near": ("zzzz = 3", "unknown key 'zzzz'. `mlx-pare run --help` lists the options"),
    "a table": ("[recovery]\nsteps = 3", "unknown key 'recovery'"),
    "text for a number": ('samples = "x"', 'samples = "x" is not right. It must be a whole number'),
    "fraction for a whole number": ("samples = 1.5", "must be a whole number"),
    "boolean for a number": ("keep = true", "keep = true .* must be a number"),
    "number for a boolean": ("mix = 1", "mix = 1 .* must be true or false"),
    "no number": ("keep = nan", "keep = NaN .* must be a number"),
    "infinite": ("learning_rate = inf", "must be a number"),
    "too small": ("samples = 0", "samples = 0 .* must be at least 1"),
    "too large": ("seed = 4294967296", "must be at most 4294967295"),
    "number for a text": ("method = 5", "method = 5 .* must be a text"),
    "number for a path": ("data = 5", "data = 5 .* must be a text, or a list of texts"),
    "list for a text": ('method = ["lora"]', "must be a text"),
    "table for a text": ("field = {a = 1}", "must be a text"),
    "a day for a number": ("seed = 2020-01-01", "must be a whole number"),
    "twice": ('for = "m4-24gb"\nmac = "m4-16gb"', "gives for twice"),
    "twice, once denied": ("mix = true\nno-mix = true", "gives mix twice"),
    "no TOML": ("not toml", "is not valid TOML: .*line 1"),
    "nested too deeply": ("data = " + "[" * 5000, "is not valid TOML"),
}


@pytest.mark.parametrize("what", WRONG)
def test_a_wrong_recipe_is_one_line_with_the_file_and_the_key(pare, tmp_path, what):
    text, words = WRONG[what]
    file = recipe(tmp_path, text)
    with pytest.raises(UsageError, match=words):
        recipe_file.read(file)
    done = pare("run", "MODEL", "--out", tmp_path / "new", "--recipe", file, "--json")
    assert done.code == 2 and str(file) in done.line and done.document["exit_code"] == 2
    assert not (tmp_path / "new").exists()


def test_a_recipe_that_is_not_there_or_not_text(pare, tmp_path):
    assert (missing := pare("run", "--recipe", tmp_path / "no.toml")).code == 2 and "there is no recipe" in missing.line
    (tmp_path / "latin").write_bytes(b'field = "\xe4"')
    assert (other := pare("run", "--recipe", tmp_path / "latin")).code == 2 and "is not UTF-8" in other.line
    assert pare("run", "--recipe", tmp_path).code == 1


@pytest.mark.parametrize("text", ["not toml", "stages = true", "data = 5", 'samples = "x"', 'seed = "a"', b"\xff"])
def test_f26_a_damaged_recipe_of_a_run_is_one_line(pare, tmp_path, pico_models, text):
    model, out = pico_models(), tmp_path / "run"
    Run(out, model, "identity").close()
    (out / "recipe.toml").write_bytes(text if isinstance(text, bytes) else text.encode())
    done = pare("status", out)
    assert done.code == 1 and "recipe.toml" in done.line and "internal error" not in done.line
    with pytest.raises(PareError):
        recipe_file.of_run(out / "recipe.toml")


# ---- on the command line ----


def test_the_command_line_wins(pare, tmp_path, pico_models):
    file = recipe(tmp_path, f'model = "{pico_models()}"\nkeep = 0.5\ncontext = 256\nreconstruct = false\nsamples = 4\n'
                            "length = 32\n")  # fmt: skip

    def asked(*more: str) -> dict:
        done = pare("run", "--out", tmp_path / "new", "--recipe", file, "--dry-run", "--json", *more)
        assert done.code == 0, done.err
        return done.document

    assert "0.5 of the non-embedding" in asked()["asked"]
    assert "0.75 of the non-embedding" in asked("--keep", "0.75")["asked"]
    assert "500.00 kB" in asked("--target-size", "500kB")["asked"], "a target replaces the target of the recipe"
    smaller, larger = asked(), asked("--axes", "layer", "--keep", "0.75")
    assert larger["after"]["layers"] < smaller["after"]["layers"]


def test_a_target_for_a_mac_takes_its_speed_along(pare, tmp_path, pico_models):
    file = recipe(tmp_path, 'for = "m4-24gb"\nmin-speed = 2\nlength = 32\nsamples = 4\n')
    done = pare("run", pico_models(), "--out", tmp_path / "new", "--recipe", file, "--keep", "0.75", "--dry-run")
    assert done.code == 0, done.err


def test_two_targets_in_one_recipe_are_refused(pare, tmp_path, pico_models):
    file = recipe(tmp_path, 'keep = 0.5\ntarget_size = "1MB"\n')
    done = pare("run", pico_models(), "--out", tmp_path / "new", "--recipe", file)
    assert done.code == 2 and "exactly one target" in done.line


def test_steps_take_what_concerns_them(pare, tmp_path, pico_models):
    file = recipe(tmp_path, f'model = "{pico_models()}"\nkeep = 0.5\nlength = 32\nsamples = 4\ncriterion = "wanda"\n'
                            'widths = "even"\n')  # fmt: skip
    out = tmp_path / "run"
    for arguments in (["calibrate", "--out", out], ["score", out], ["plan", out]):
        done = pare(*arguments, "--recipe", file, "--json")
        assert done.code == 0, done.err
    assert json.loads((out / "manifest.json").read_text())["steps"]["score"]["parameters"]["criterion"] == "wanda"
    assert "0.5 of the non-embedding" in json.loads((out / "plan" / "plan.json").read_text())["target"]["asked"]


def test_the_recipe_of_a_run_does_the_same_again(pare, tmp_path, pico_models):
    """Model, text and all options come from it; only the place is new."""
    first, second = tmp_path / "first", tmp_path / "second"
    data = ["--data", DEMO / "calibration.txt", "--test-data", DEMO / "test.txt"]
    done = pare("run", pico_models(), "--out", first, *SMALL, *data, "--quiet")
    assert done.code == 0, done.err
    done = pare("run", "--recipe", first / "recipe.toml", "--out", second, "--quiet")
    assert done.code == 0, done.err
    assert (first / "recipe.toml").read_text() == (second / "recipe.toml").read_text()
    for file in ("plan/plan.json", "recover/model/model.safetensors", "evaluate-recovered/metrics.json"):
        same = [(run / file).read_text("latin-1").replace(str(run), "RUN") for run in (first, second)]
        assert same[0] == same[1], file
    again = pare("run", "--recipe", second / "recipe.toml", "--out", second)
    assert again.code == 0 and "plan: done before, kept" in again.out
