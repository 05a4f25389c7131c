"""What somebody found who tried to break what was mended: each is another case of a kind that was known."""

from __future__ import annotations

import pytest

from mlx_pare import corpus, kept, recipe_file, unused
from mlx_pare.errors import PareError, UsageError
from mlx_pare.rundir import Run


@pytest.fixture
def run(pico_models, tmp_path):
    with Run(tmp_path / "run", pico_models("llama"), "identity") as opened:
        yield opened


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
