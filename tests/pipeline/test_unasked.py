"""What nobody asked for cannot end a run: without a GGUF file, a text or a speed there is still a report."""

from __future__ import annotations

import json
import sys
import tomllib
from pathlib import Path

import pico
import pytest

from mlx_pare import lm
from mlx_pare.base.errors import PareError, Refused
from mlx_pare.evaluation.sanity import check
from mlx_pare.exporting import llama_cpp
from mlx_pare.exporting.llama_cpp import verify
from mlx_pare.gguf.write import quantizer
from mlx_pare.gguf.write.quantizer import INSTALL
from mlx_pare.options.settings import Settings
from mlx_pare.pipeline import export_step, measure_steps, run as pipeline, steps
from mlx_pare.pruning.prune import prune
from tests.pruning.test_prune import plan_of

CASED = (
    r"[^\r\n\p{L}\p{N}]?\p{Lu}*\p{Ll}+|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)


@pytest.fixture
def quick(two_texts) -> Settings:
    """The smallest run."""
    return Settings(
        **two_texts, keep=0.9, axes=("ffn",), widths="even", length=32, samples=4, recover_steps=0, trials=0, context=64
    )


def by_another_pattern(directory: Path) -> Path:
    """A tokenizer whose pattern no pre-tokenizer of llama.cpp has."""
    raw = json.loads((directory / "tokenizer.json").read_text("utf-8"))
    split = {"type": "Split", "pattern": {"Regex": CASED}, "behavior": "Isolated", "invert": False}
    raw["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [split, raw["pre_tokenizer"] | {"use_regex": False}]}
    (directory / "tokenizer.json").write_text(json.dumps(raw), "utf-8")
    return directory


def in_two_files(directory: Path) -> Path:
    """The tokenizer as vocab.json and merges.txt, without tokenizer.json."""
    file = directory / "tokenizer.json"
    model = json.loads(file.read_text("utf-8"))["model"]
    file.unlink()
    (directory / "vocab.json").write_text(json.dumps(model["vocab"]), "utf-8")
    merges = [" ".join(pair) if isinstance(pair, list) else pair for pair in model["merges"]]
    (directory / "merges.txt").write_text("\n".join(["#version: 0.2", *merges]) + "\n", "utf-8")
    settings = directory / "tokenizer_config.json"
    settings.write_text(json.dumps(json.loads(settings.read_text()) | {"tokenizer_class": "Qwen2Tokenizer"}))
    return directory


WITHOUT = {"pattern": (by_another_pattern, "splits text by"), "two files": (in_two_files, "tokenizer.json")}


@pytest.mark.parametrize("name", WITHOUT)
def test_case_02_run_goes_on_without_a_gguf_file(tmp_path, quick, capsys, name):
    change, why = WITHOUT[name]
    model = change(pico.make(tmp_path / "model", "qwen2", num_hidden_layers=2))
    summary = pipeline.run(model, tmp_path / "run", quick)
    assert summary["gguf"] is None and summary["fits"]["gguf_rows"] == []
    said = [line for line in capsys.readouterr().err.splitlines() if "going on without a GGUF file" in line]
    assert len(said) == 1 and why in said[0]
    assert "There is no GGUF file: " in Path(summary["report"]).read_text()
    again = pipeline.run(model, tmp_path / "run", quick)
    assert again["gguf"] is None


def test_case_02_one_that_was_asked_for_is_refused_before_any_work(tmp_path, quick):
    model = by_another_pattern(pico.make(tmp_path / "model", "qwen2", num_hidden_layers=2))
    for asked in ({"gguf": "f16"}, {"runtimes": ("llama.cpp",)}):
        with pytest.raises(Refused, match=r"no GGUF file can be made of it: .*splits text by"):
            pipeline.run(model, tmp_path / "run", steps.replace(quick, **asked))
    assert not (tmp_path / "run").exists()


FAILURES = {
    "the judge": ("judged", PareError("llama.cpp tokenizes 'x' differently", "the file was set aside")),
    "the writer": ("export", PareError("the file reads back wrong")),
    "a defect": ("export", ZeroDivisionError("division by zero")),
}


@pytest.mark.parametrize("name", FAILURES)
def test_case_02_a_gguf_file_that_fails_ends_nothing(pico_models, tmp_path, quick, capsys, monkeypatch, name):
    function, error = FAILURES[name]

    def fails(*args, **kwargs):
        raise error

    with monkeypatch.context() as patched:
        patched.setattr(export_step, function, fails)
        summary = pipeline.run(pico_models("llama", num_hidden_layers=2), tmp_path / "run", quick)
    assert summary["gguf"] is None and "There is no GGUF file" in Path(summary["report"]).read_text()
    assert str(error).partition(".")[0] in capsys.readouterr().err


def test_case_02_one_that_was_asked_for_fails_after_the_report_and_is_tried_again(
    pico_models, tmp_path, quick, monkeypatch
):
    def fails(*args, **kwargs):
        raise PareError("the file reads back wrong")

    asked = steps.replace(quick, gguf="f16")
    with monkeypatch.context() as patched:
        patched.setattr(export_step, "export", fails)
        with pytest.raises(PareError, match=r"no GGUF file was made: the file reads back wrong\. .*report\.md"):
            pipeline.run(pico_models("llama", num_hidden_layers=2), tmp_path / "run", asked)
    assert "There is no GGUF file: the file reads back wrong" in (tmp_path / "run" / "report.md").read_text()
    summary = pipeline.run(pico_models("llama", num_hidden_layers=2), tmp_path / "run", asked)
    assert Path(summary["gguf"]).read_bytes()[:4] == b"GGUF"


def test_case_02_what_llama_cpp_rejected_is_kept_and_named(pico_models, tmp_path, quick, monkeypatch):
    found = {"checked": True, "different": ["x"], "relative_difference": 0.0, "max_abs_difference": 0.0}
    monkeypatch.setattr(llama_cpp, "verify", lambda *args: found)
    summary = pipeline.run(pico_models("llama", num_hidden_layers=2), tmp_path / "run", quick)
    assert (tmp_path / "run" / "export" / "model-f16.gguf.rejected").exists()
    told = json.loads((tmp_path / "run" / "export" / "export.json").read_text())
    assert told["path"] is None and "export/model-f16.gguf.rejected" in told["why"] and "partial" not in told["why"]
    assert "model-f16.gguf.rejected" in Path(summary["report"]).read_text()


def test_case_02_a_bench_that_fails_ends_nothing(pico_models, tmp_path, quick, capsys, monkeypatch):
    def fails(*args, **kwargs):
        raise RuntimeError("the GPU is gone")

    monkeypatch.setattr(measure_steps, "bench", fails)
    summary = pipeline.run(pico_models("llama", num_hidden_layers=2), tmp_path / "run", steps.replace(quick, trials=1))
    assert summary["bench"] is None and Path(summary["report"]).exists()
    assert "speed was not measured" in (said := capsys.readouterr().err) and "the GPU is gone" in said


def test_case_02_a_text_that_cannot_be_written_is_a_warning(pico_models, tmp_path, quick, monkeypatch):
    def fails(*args, **kwargs):
        raise ValueError("no such sampler")

    monkeypatch.setattr(lm, "generate", fails)
    summary = pipeline.run(pico_models("llama", num_hidden_layers=2), tmp_path / "run", quick)
    report = Path(summary["report"]).read_text()
    assert "no text was generated" in report and "no such sampler" in report


def test_f36_the_cure_names_what_pyproject_installs():
    """`mlx-pare` itself is installed from its source: whoever owns that name on an index is somebody else."""
    root = Path(__file__).resolve().parents[2]
    extra = tomllib.loads((root / "pyproject.toml").read_text("utf-8"))["project"]["optional-dependencies"]["llama"]
    assert [f"pip install '{requirement}'" for requirement in extra] == [INSTALL]
    sources = [file.read_text("utf-8") for file in (root / "mlx_pare").rglob("*.py")]
    assert not [text for text in sources if "pip install 'mlx-pare" in text or "pip install mlx-pare" in text]


def test_f36_every_place_that_lacks_llama_cpp_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr(llama_cpp, "available", lambda: False)
    monkeypatch.setattr(quantizer.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(quantizer, "program", lambda: None)
    assert INSTALL in verify(tmp_path, tmp_path / "m.gguf")["reason"]
    for call in (lambda: quantizer.require("q4_k_m"), lambda: llama_cpp.tokenize(tmp_path / "m.gguf", ["x"])):
        with pytest.raises(PareError, match="llama-cpp-python"):
            call()


def opened_by_transformers(monkeypatch, closed: tuple[Path, ...]) -> None:
    """transformers cannot open these directories."""
    checking = sys.modules["mlx_pare.evaluation.sanity"]

    def opens(path: Path) -> None:
        if path in closed:
            raise ValueError("unknown model type")

    monkeypatch.setattr(checking, "_open", opens)


def test_case_02_what_transformers_cannot_open_either_way_is_a_warning(pico_models, tmp_path, monkeypatch):
    model, out = pico_models("llama", num_hidden_layers=2), tmp_path / "out"
    prune(model, plan_of(model, ("ffn",)), out)
    opened_by_transformers(monkeypatch, (model, out))
    assert any("neither the original nor the result: " in line for line in check(out, model))
    opened_by_transformers(monkeypatch, (out,))
    with pytest.raises(PareError, match=r"transformers cannot open .*unknown model type"):
        check(out, model)
