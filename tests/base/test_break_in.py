"""What somebody found who tried to break what was mended: each is another case of a kind that was known."""

from __future__ import annotations

import tomllib
from pathlib import Path

import pytest

from mlx_pare.base import console
from mlx_pare.base.errors import PareError, UsageError
from mlx_pare.cli import unused
from mlx_pare.evaluation.metrics import Metrics
from mlx_pare.exporting.export import export
from mlx_pare.gates import check as gates
from mlx_pare.gates.rules import rules_of
from mlx_pare.options import recipe_file
from mlx_pare.options.settings import Settings
from mlx_pare.reporting.verdict import verdict
from mlx_pare.sources import hub_cache
from mlx_pare.store.rundir import Run
from mlx_pare.store.schema import dump_json
from mlx_pare.stream import kept
from mlx_pare.text import corpus


@pytest.fixture
def run(pico_models, tmp_path):
    with Run(tmp_path / "run", pico_models("llama"), "identity") as opened:
        yield opened


@pytest.fixture
def said(monkeypatch) -> list[str]:
    """What is said and warned of, line by line."""
    lines: list[str] = []
    for how in ("say", "warn"):
        monkeypatch.setattr(console, how, lines.append)
    return lines


def done(run: Run, name: str = "prune") -> None:
    run.step(name, {}, {"model": "identity"}, lambda directory: (directory / "out.txt").write_text("ours"))


@pytest.mark.parametrize("place", ["prune", "prune.partial"])
def test_b1_files_of_the_user_under_the_name_of_a_step_are_set_aside(run, place):
    (run.path / place).mkdir()
    (run.path / place / "thesis.txt").write_text("precious")
    done(run)
    assert (run.path / f"{place}.yours-1" / "thesis.txt").read_text() == "precious"
    assert (run.path / "prune" / "out.txt").read_text() == "ours"


def test_b1_files_of_the_user_in_a_step_that_is_done_again_are_set_aside(run):
    done(run)
    (run.path / "prune" / "mine.gguf").write_text("precious")
    run.forget("prune")
    done(run)
    assert (run.path / "prune.yours-1" / "mine.gguf").read_text() == "precious"
    assert not (run.path / "prune" / "mine.gguf").exists()


def test_b1_a_step_that_is_done_again_leaves_nothing_else(run):
    done(run)
    run.forget("prune")
    assert not [place.name for place in run.path.iterdir() if place.name.startswith("prune")]


def test_b1_what_is_kept_goes_and_the_rest_stays(tmp_path):
    for name in ("states-1.safetensors", "thesis.txt"):
        (tmp_path / name).write_text("x")
    (tmp_path / "repair-1").mkdir()
    kept.clear(tmp_path)
    assert [place.name for place in tmp_path.iterdir()] == ["thesis.txt"]
    (tmp_path / "thesis.txt").unlink()
    kept.clear(tmp_path)
    assert not tmp_path.exists()


def test_b4_a_table_with_a_column_twice_is_refused(tmp_path):
    (tmp_path / "a.csv").write_text("text,text\nfirst,second\n")
    with pytest.raises(PareError, match="names the column 'text' twice"):
        corpus.read(tmp_path / "a.csv")


def test_b5_one_record_over_several_lines_is_no_text(tmp_path):
    (tmp_path / "x.ipynb").write_text('{\n "text": "hello"\n}\n')
    with pytest.raises(PareError):
        corpus.read(tmp_path / "x.ipynb")


def test_b11_tabs_divide_a_tsv(tmp_path):
    (tmp_path / "a.tsv").write_text("text\nhello, world\n")
    assert corpus.read(tmp_path / "a.tsv") == ["hello, world"]


def test_b8_no_text_of_a_recipe_holds_nul(tmp_path):
    (tmp_path / "r.toml").write_text('out = "r\\u0000"\n')
    with pytest.raises(UsageError, match="NUL"):
        recipe_file.read(tmp_path / "r.toml")


def test_b9_a_recipe_that_cannot_be_read_is_a_usage_error(tmp_path):
    with pytest.raises(UsageError, match=r"cannot read the recipe .* name too long"):
        recipe_file.read(tmp_path / ("a" * 300))


@pytest.mark.parametrize("name", ["f.json", "f2.JSONL", "f.csv"])
def test_b12_a_field_has_an_effect_in_every_file_of_records(tmp_path, name):
    (tmp_path / name).write_text("{}")
    assert unused._has_records({"data": [str(tmp_path / name)]})


# ---- what is read in a folder ----


@pytest.mark.parametrize("content", ["{}", '[{"age": 40}]', '{"rows": []}', "no JSON", "[" * 5000])
def test_b2_a_table_of_survivors_is_not_ours(tmp_path, content):
    (tmp_path / "titanic").mkdir()
    (tmp_path / "titanic" / "survivors.json").write_text(content)
    (tmp_path / "titanic" / "a.txt").write_text("text")
    assert corpus.read(tmp_path) == ["text"]


def test_b2_what_mlx_pare_made_is_counted(tmp_path, said):
    (tmp_path / "a.txt").write_text("text")
    (tmp_path / "hub").mkdir()
    (tmp_path / "hub" / "README.md").write_text("a card")
    (tmp_path / "hub" / "survivors.json").write_text('{"schema_version": 1, "source_identity": "x", "layers": []}')
    assert corpus.read(tmp_path) == ["text"]
    assert f"1 made by mlx-pare (first {tmp_path / 'hub'})" in said[0]
    with pytest.raises(PareError, match="is a pruned model, which mlx-pare wrote itself"):
        corpus.read(tmp_path / "hub")


def test_b3_linked_folders_are_read_once(tmp_path):
    data, other = tmp_path / "data", tmp_path / "other"
    (data / "deep").mkdir(parents=True)
    (other / "more").mkdir(parents=True)
    (data / "deep" / "a.txt").write_text("inside")
    (other / "b.txt").write_text("outside")
    (other / "more" / "c.txt").write_text("below")
    for link, target in (("link", other), ("again", other), ("deep/up", data), ("deep/self", data / "deep")):
        (data / link).symlink_to(target)
    assert corpus.read(data) == ["outside", "below", "inside"]


# ---- the recipe of a run ----


def test_b6_a_recipe_that_was_edited_is_kept(run, said):
    recipe = run.path / "recipe.toml"
    run.write_recipe({"keep": 0.5})
    recipe.write_text(recipe.read_text().replace("0.5", "0.6"))
    mine = recipe.read_text()
    run.write_recipe({"keep": 0.7})
    assert tomllib.loads(recipe.read_text()) == {"keep": 0.7}
    assert (run.path / "recipe.yours-1.toml").read_text() == mine
    assert len(said) == 1 and "your version is kept as" in said[0]
    run.write_recipe({"keep": 0.8})  # nobody touched this one
    assert sorted(file.name for file in run.path.glob("recipe*")) == ["recipe.toml", "recipe.yours-1.toml"]


@pytest.fixture
def cached_gguf(tmp_path, pico_models, monkeypatch) -> Path:
    monkeypatch.setenv("MLX_PARE_CACHE", str(tmp_path / "cache"))
    export(pico_models("llama"), tmp_path / "model.gguf", "q8_0")
    return tmp_path / "model.gguf"


def test_b10_a_recipe_names_the_gguf_file(pare, cached_gguf, tmp_path, two_texts):
    asked = ("--data", two_texts["data"], "--samples", "4", "--length", "32", "--recover-steps", "0", "--trials", "0")
    targets = ("--keep", "0.8", "--widths", "even", "--quick", "--teacher", cached_gguf)
    done = pare("run", cached_gguf, "--out", tmp_path / "run", *asked, *targets)
    assert done.code == 0, done.err
    recipe = tomllib.loads((tmp_path / "run" / "recipe.toml").read_text())
    assert recipe["model"] == recipe["teacher"] == str(cached_gguf)
    again = pare("run", "--recipe", tmp_path / "run" / "recipe.toml", "--out", tmp_path / "again", "--dry-run")
    assert again.code == 0, again.err
    recovered = pare("recover", tmp_path / "run", "--recover-steps", "1", "--batch", "2")
    assert recovered.code == 0, recovered.err


@pytest.mark.parametrize("wrong", ["kep = 0.5\n", 'keep = "much"\n', ""])
def test_b9_a_recipe_that_asks_for_json_gets_it_for_errors_too(pare, tmp_path, wrong):
    (tmp_path / "r.toml").write_text(f"json = true\n{wrong}")
    done = pare("run", "--recipe", tmp_path / "r.toml")
    assert done.code == 2 and done.document["exit_code"] == 2


def test_b14_the_cache_of_the_hub_has_an_absolute_path(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", "somewhere/hub")
    assert hub_cache.root() == Path.cwd() / "somewhere" / "hub"


@pytest.mark.parametrize("name", ["", " "])
def test_b15_an_empty_name_is_no_model(pare, tmp_path, name):
    """It is not the current directory either."""
    done = pare("run", name, "--out", tmp_path / "run", "--keep", "0.5")
    assert done.code == 2 and "the name of a model is empty" in done.line and not (tmp_path / "run").exists()


# ---- perplexities beyond every float ----


def numbers(nll: float) -> dict:
    return {"nll": nll, "perplexity": 1.0e304}


def test_b7_the_gate_compares_losses(tmp_path):
    """Both perplexities have the largest value that there is; one is e^100 times the other."""
    of = {"model": "m", "data": "d", "tokens": 9, "windows": 1, "length": 4, "perplexity_stderr": 1e304}
    for name, nll in (("original", 750.0), ("pruned", 850.0)):
        (tmp_path / f"evaluate-{name}").mkdir()
        metrics = Metrics(bits_per_byte=1.0, kl_divergence=1.0, **of, **numbers(nll))
        (tmp_path / f"evaluate-{name}" / "metrics.json").write_bytes(dump_json(metrics))
    rules = rules_of(Settings(min_quality=1.2))
    with pytest.raises(PareError, match=r"perplexity is 2.69e\+43 x the original's"):
        gates.settle(tmp_path, rules, "pruned", False, lambda: tmp_path)
    (tmp_path / "evaluate-pruned" / "metrics.json").write_bytes(
        dump_json(Metrics(bits_per_byte=1.0, kl_divergence=1.0, **of, **numbers(750.1)))
    )
    assert gates.settle(tmp_path, rules, "pruned", False, lambda: tmp_path)[0]["passed"]


def test_b7_large_perplexities_are_short():
    of = {"model": "m", "data": "d", "tokens": 9, "windows": 1, "length": 4, "perplexity_stderr": 1e304}
    found = {n: (Metrics(bits_per_byte=1.0, kl_divergence=1.0, **of, **numbers(nll)), 9)
             for n, nll in (("original", 750.0), ("pruned", 850.0))}  # fmt: skip
    assert "perplexity 1e+304 -> 1e+304 (x 2.69e+43)" in verdict(found)
