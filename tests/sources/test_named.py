"""Models by name, on the command line and in Python: what a name leads to, what is said, and the lines of errors."""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hub_server import SHA, Repo
from huggingface_hub import constants

import mlx_pare
from mlx_pare.arch import describe
from mlx_pare.base.errors import PareError, UsageError
from mlx_pare.exporting.export import export
from mlx_pare.gguf.header import read
from mlx_pare.model.hub_name import called
from mlx_pare.options.settings import Settings
from mlx_pare.sources import catalogue, download, hub_cache, hub_fetch, resolve
from mlx_pare.sources.hub_reader import HubError
from mlx_pare.sources.open_model import opened

NAME, OTHER = "org/model", "f" * 40
API = f"/api/models/{NAME}/revision/main"
WEIGHTS = "model.safetensors"


@dataclass(frozen=True)
class Done:
    """A command that ended: its exit code, stdout, stderr."""

    code: int
    out: str
    err: str

    @property
    def line(self) -> str:
        """The one line of an error."""
        (found,) = [line for line in self.err.splitlines() if line.startswith("mlx-pare: ")]
        return found


@pytest.fixture
def pare(pare, monkeypatch) -> Callable[..., Done]:
    """Call a command in this process; it waits for no server."""
    monkeypatch.setattr(hub_fetch, "PAUSE", 0.01)
    return lambda *arguments: Done(*pare(*arguments))


@pytest.fixture
def text(tmp_path) -> Path:
    file = tmp_path / "text.txt"
    file.write_text("\n\n".join(f"{i}: the quick brown fox and {i * i} lazy dogs went home." for i in range(2000)))
    return file


@pytest.fixture
def model(server, pico_models, tmp_path) -> Path:
    """org/model on the server."""
    folder = tmp_path / "model"
    shutil.copytree(pico_models("llama"), folder)
    server.repos[NAME] = Repo(folder)
    return folder


@pytest.fixture
def ggufs(server, pico_models, tmp_path) -> Path:
    """org/gguf on the server: a model as Q8_0 and F16."""
    folder = tmp_path / "ggufs"
    folder.mkdir()
    for kind in ("q8_0", "f16"):
        export(pico_models("llama"), folder / f"Model-{kind}.gguf", kind)
    server.repos["org/gguf"] = Repo(folder)
    return folder


@pytest.fixture(autouse=True)
def own_cache(monkeypatch, tmp_path) -> None:
    monkeypatch.setenv("MLX_PARE_CACHE", str(tmp_path / "rebuilt"))


def measured(done: Done) -> dict[str, Any]:
    assert done.code == 0, done.err
    return json.loads(done.out)


FEW = ["--length", 16, "--samples", 2, "--json"]


# ---- every command ----


def test_evaluate_takes_a_name_for_the_model_and_its_teacher(pare, server, model, text):
    there = measured(pare("evaluate", NAME, "--data", text, "--teacher", f"{NAME}@{SHA}", *FEW))
    here = measured(pare("evaluate", model, "--data", text, "--teacher", model, *FEW))
    assert there["perplexity"] == here["perplexity"] and there["kl_divergence"] == here["kl_divergence"]


def test_what_is_written_has_the_name_and_not_the_commit(pare, server, model, tmp_path):
    assert pare("export", NAME, "-o", tmp_path / "x.gguf", "--gguf", "q8_0", "--no-verify").code == 0
    assert read(tmp_path / "x.gguf").metadata["general.name"] == "model"
    for path, name in (
        (hub_cache.snapshot(NAME, SHA), NAME),
        (hub_cache.snapshot("a.b/c-d_e", SHA) / "f.gguf", "a.b/c-d_e/f.gguf"),
        (tmp_path / "plain", "plain"),
    ):
        assert called(path) == name


def test_the_table_of_evaluate_has_the_name(pare, server, model, text):
    done = pare("evaluate", NAME, "--data", text, "--length", 16, "--samples", 2)
    assert NAME in done.out.splitlines() and f"{NAME}: " in done.out.splitlines()[0]


def test_bench_takes_names_and_paths(pare, server, model):
    found = measured(pare("bench", NAME, model, "--trials", 1, "--prompt", 4, "--new", 2, "--json"))
    assert [Path(m["model"]) for m in found["models"]] == [hub_cache.snapshot(NAME, SHA), model]


def test_export_takes_a_name(pare, server, model, tmp_path):
    assert pare("export", NAME, "-o", tmp_path / "x.gguf", "--gguf", "q8_0", "--no-verify").code == 0
    assert pare("export", model, "-o", tmp_path / "y.gguf", "--gguf", "q8_0", "--no-verify").code == 0
    assert read(tmp_path / "x.gguf").tensors == read(tmp_path / "y.gguf").tensors


def test_adapters_takes_names(pare, server, model, tmp_path):
    done = pare("adapters", tmp_path / "no-adapter", "--parent", NAME, "--model", NAME, "-o", tmp_path / "out")
    assert done.code == 1 and "no-adapter" in done.line and hub_cache.snapshot(NAME, SHA).is_dir()


def test_import_takes_a_gguf_of_the_hub_and_nothing_else(pare, server, ggufs, model, tmp_path):
    assert pare("import", "org/gguf:F16", "-o", tmp_path / "out").code == 0
    assert (tmp_path / "out" / "config.json").is_file()
    done = pare("import", NAME, "-o", tmp_path / "other")
    assert done.code == 1 and f"{NAME} has no GGUF file" in done.line
    assert not hub_cache.storage(NAME).exists(), "gigabytes in vain"


def test_a_run_and_its_steps_take_names(pare, server, model, text, tmp_path):
    run = tmp_path / "run"
    calibrate = ["calibrate", NAME, "--out", run, "--data", text, "--length", 16, "--samples", 4]
    assert pare(*calibrate).code == 0
    known = json.loads((run / "manifest.json").read_text())
    assert known["origin"] == {"asked": NAME, "hub": f"{NAME}@{SHA}"}
    for step in (["score", run, "--criterion", "magnitude"], ["plan", run, "--keep", 0.75, "--widths", "even"]):
        assert pare(*step).code == 0
    found = pare("stability", run, "--against", NAME, "--draws", 0)
    assert found.code == 0, found.err
    assert pare("prune", run, "--no-reconstruct").code == 0
    few = ["--recover-steps", 1, "--train-rows", 4, "--batch", 1, "--rank", 2]
    done = pare("recover", run, "--teacher", f"{NAME}@{SHA}", *few)
    assert done.code == 0, done.err
    assert server.sent(WEIGHTS) < 1.2 * (model / WEIGHTS).stat().st_size, "fetched once"


def test_gguf_models_of_the_hub(pare, server, ggufs, text):
    sizes = {}
    for name in ("org/gguf:Q8_0", "org/gguf/Model-f16.gguf", "hf.co/org/gguf:q8_0@main"):
        found = measured(pare("evaluate", name, "--data", text, *FEW))
        sizes[name] = found["perplexity"]
    here = measured(pare("evaluate", ggufs / "Model-q8_0.gguf", "--data", text, *FEW))
    assert sizes["org/gguf:Q8_0"] == sizes["hf.co/org/gguf:q8_0@main"] == here["perplexity"]
    assert server.sent("Model-q8_0.gguf") < 1.2 * (ggufs / "Model-q8_0.gguf").stat().st_size, "fetched once"
    done = pare("evaluate", "org/gguf", "--data", text)
    assert done.code == 2 and "org/gguf has 2 GGUF models (F16, Q8_0). Name one, as in org/gguf:F16" in done.line
    done = pare("evaluate", "org/gguf:Q4_K_M", "--data", text)
    assert done.code == 1 and "no GGUF file of type Q4_K_M. There are F16, Q8_0" in done.line


def test_nothing_asks_the_hub_once_the_models_are_there(pare, server, model, text, monkeypatch):
    seen = []

    def online(*given: Any, **more: Any) -> dict:
        seen.append((os.environ["HF_HUB_OFFLINE"], constants.HF_HUB_OFFLINE))
        raise PareError("seen")

    monkeypatch.setattr(sys.modules["mlx_pare.evaluation.bench"], "bench", online)
    assert "seen" in pare("bench", NAME).line and seen == [("1", True)]
    assert not constants.HF_HUB_OFFLINE, "the next command may ask again"


# ---- fit and inspect ----


@pytest.mark.parametrize("kind", ["q8_0", "f16"])
def test_fit_and_inspect_read_the_header_of_a_gguf_by_ranges(pare, server, ggufs, kind):
    file = ggufs / f"Model-{kind}.gguf"
    for name in (f"org/gguf:{kind.upper()}", f"org/gguf/{file.name}"):
        there, here = measured(pare("inspect", name, "--json")), measured(pare("inspect", file, "--json"))
        assert file.name in there["model"]
        same = [key for key in here if key != "model"]
        assert [there[key] for key in same] == [here[key] for key in same]
        there, here = measured(pare("fit", name, "--json")), measured(pare("fit", file, "--json"))
        assert there["rows"] == here["rows"] and there["runtime"] == "llama.cpp"
    assert not hub_cache.storage("org/gguf").exists()


def test_a_gguf_header_takes_as_many_bytes_as_it_has(server, ggufs, monkeypatch):
    from mlx_pare.model.hub_name import HubName
    from mlx_pare.sources import hub_gguf

    file = ggufs / "Model-q8_0.gguf"
    local = read(file)
    monkeypatch.setattr(hub_gguf, "STARTS", tuple(1 << bits for bits in range(6, 24)))
    assert hub_gguf.gguf_header(HubName.parse("org/gguf:Q8_0"), print) == (file.name, local)
    assert server.sent(file.name) < 2 * local.data_start + 50 * len(b"Found. Redirecting")
    monkeypatch.setattr(hub_gguf, "STARTS", (1 << 6, 1 << 7))
    with pytest.raises(PareError, match="is larger than"):
        hub_gguf.gguf_header(HubName.parse("org/gguf:Q8_0"), print)


def test_a_damaged_gguf_on_the_hub_is_an_error_of_one_line(pare, server, ggufs):
    file = ggufs / "Model-f16.gguf"
    for raw in (b"", b"GG", b"nothing of this", file.read_bytes()[:-1], file.read_bytes()[:100]):
        file.write_bytes(raw)
        done = pare("inspect", "org/gguf:F16")
        assert done.code == 1 and "Model-f16.gguf" in done.line


def test_a_gguf_that_was_downloaded_can_be_inspected_offline(pare, server, ggufs, monkeypatch):
    resolve.local("org/gguf:F16")
    online = measured(pare("inspect", "org/gguf:F16", "--json"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert measured(pare("inspect", "org/gguf:F16", "--json")) == online
    assert "offline mode is set" in pare("inspect", "org/gguf:Q8_0").line


# ---- the six lines ----


def test_gated(pare, server, model, text):
    server.repos[NAME].gated = True
    done = pare("evaluate", NAME, "--data", text)
    assert done.code == 1 and done.line == (
        f"mlx-pare: 127.0.0.1 does not let you read {NAME} (401: gated or private). Accept its licence on the page "
        f"https://huggingface.co/{NAME} and log in with `hf auth login` (or set HF_TOKEN)."
    )


def test_missing_repository(pare, server, text):
    done = pare("evaluate", "Qwen/Qwen3-9B", "--data", text)
    assert done.code == 1 and "has no model Qwen/Qwen3-9B, or it is private (401). Did you mean Qwen/Qwen3" in done.line
    done = pare("evaluate", "org/nothing", "--data", text)
    assert "Check the name, or give a model directory; if it is private, log in" in done.line


def test_missing_revision(pare, server, model, text):
    done = pare("evaluate", f"{NAME}@v9", "--data", text)
    assert (
        done.code == 1 and done.line == f"mlx-pare: {NAME} has no revision v9. Name a branch, a tag or a commit of it."
    )


def test_unreachable(pare, server, model, text, monkeypatch):
    monkeypatch.setattr(constants, "ENDPOINT", "http://{}:9".format("127.0.0.1"))
    done = pare("evaluate", NAME, "--data", text)
    assert done.code == 1 and "the connection to 127.0.0.1 failed" in done.line
    assert f"and {NAME} is not in the cache" in done.line and "Check the network and give the same command" in done.line


def test_offline_and_not_in_the_cache(pare, server, model, text, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    done = pare("evaluate", NAME, "--data", text)
    assert done.code == 1 and "offline mode is set (HF_HUB_OFFLINE), the hub is not asked" in done.line
    assert f"and {NAME} is not in the cache" in done.line and "Unset it, or give a model directory" in done.line


def test_no_room(pare, server, model, text, monkeypatch):
    monkeypatch.setattr(download.shutil, "disk_usage", lambda place: SimpleNamespace(free=1000))
    done = pare("evaluate", NAME, "--data", text)
    assert done.code == 3 and f"{NAME} takes 7" in done.line and "has 1.00 kB free. Make room" in done.line


# ---- names of the catalogue, and paths ----


def test_a_name_of_the_catalogue_is_its_repository(pare, server, model, text):
    server.repos["Qwen/Qwen3-8B"] = server.repos[NAME]
    done = pare("evaluate", "qwen3:8b", "--data", text, "--length", 16, "--samples", 2)
    assert done.code == 0 and done.out.startswith("qwen3:8b is Qwen/Qwen3-8B, the original weights, not packed\n")
    assert hub_cache.snapshot("Qwen/Qwen3-8B", SHA).is_dir()


def test_a_packed_repository_that_has_a_source(server, model, capsys):
    server.repos["mlx-community/Qwen3-4B-Instruct-2507-4bit"] = server.repos[NAME]
    assert "models--mlx-community" in str(opened("Qwen3-4B-2507"))


def test_names_that_are_listed_for_their_sizes_are_not_downloaded(pare, server, text):
    done = pare("evaluate", "qwen2.5-coder-7b", "--data", text)
    assert done.code == 2 and "for its sizes only, which are those of qwen2.5-7b. Give the hub id" in done.line
    assert not server.log
    assert pare("fit", "qwen2.5-coder-7b", "--json").code == 0


@pytest.mark.parametrize("asked, words", [("qwen3-8", "did you mean qwen3-8b"), ("xyzzy", "mlx-pare models")])
def test_a_text_that_is_nothing_has_suggestions(pare, server, text, asked, words):
    done = pare("evaluate", asked, "--data", text)
    assert done.code == 2 and words.lower() in done.line.lower() and not server.log


def test_an_existing_path_wins(pare, server, model, text, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in (NAME, "qwen3-8b"):
        shutil.copytree(model, tmp_path / name)
        measured(pare("evaluate", name, "--data", text, *FEW))
    assert not server.log


@pytest.mark.parametrize(
    "path", ["/no/such/model", "./org/model", "org/model/", "runs/x/prune/model", "../model", "~/model", "./qwen3-8b"]
)
def test_what_looks_like_a_path_stays_one(pare, server, model, text, path):
    for command in (["bench", path], ["bench", model, path], ["evaluate", path, "--data", text]):
        done = pare(*command)
        assert done.code == 1 and ("no model directory at" in done.line or "No such file" in done.line)
    done = pare("evaluate", model, "--data", text, "--length", 16, "--samples", 2, "--teacher", path)
    assert done.code == 1 and not server.log


def test_like_names_and_aliases_mean_what_they_say():
    """An alias is downloaded as the repository of its entry, so no word of it may contradict that one."""
    words = {"instruct", "chat", "coder", "thinking", "think", "base", "pt", "it", "reasoning", "r1", "distill"}
    for entry in catalogue.entries():
        for alias in entry.aliases:
            other = (set(alias.replace(":", "-").split("-")) & words) - set(entry.repository.lower().split("-"))
            assert not other, (alias, entry.repository)
        assert not set(entry.aliases) & set(entry.like)


# ---- models ----


def test_models_lists_the_catalogue(pare):
    done = pare("models")
    assert done.code == 0 and done.out.count("\n") > 71
    (line,) = [line for line in done.out.splitlines() if line.split()[:1] == ["qwen3-8b"]]
    assert line.split() == [
        "qwen3-8b",
        "8.19B",
        "ffn,",
        "hidden,",
        "kv_head,",
        "layer",
        "as",
        "published",
        "Qwen/Qwen3-8B",
    ]
    found = measured(pare("models", "--json"))["models"]
    assert len(found) == len(catalogue.entries())
    for row in found:
        entry = catalogue.find(row["name"])
        arch = describe(entry.config)
        assert row["cuttable"] == (list(arch.cut_axes) if arch.cuttable else []) and row["source"]
        assert row["repository"] == entry.hub or (row["bits"] == 4 and entry.mlx["hub"] == row["repository"])


def test_models_by_a_part_of_the_name(pare):
    names = [row["name"] for row in measured(pare("models", "GEMMA-2", "--json"))["models"]]
    assert names == ["gemma-2-2b", "gemma-2-9b", "gemma-2-27b"]
    done = pare("models", "qwen4")
    assert done.code == 2 and "no model with 'qwen4' in its name. Did you mean" in done.line


# ---- a run keeps its commit ----


def test_a_run_goes_on_with_its_commit_when_the_branch_moves(pare, server, model, pico_models, text, tmp_path):
    run = tmp_path / "run"
    command = ["calibrate", NAME, "--out", run, "--data", text, "--length", 16, "--samples", 4]
    assert pare(*command).code == 0
    before = (run / "calibrate" / "stats.safetensors").read_bytes()
    shutil.copy(pico_models("llama", tokenizer="spm") / WEIGHTS, model / WEIGHTS)
    (model / WEIGHTS).write_bytes((model / WEIGHTS).read_bytes()[:-4] + b"\1\2\3\4")
    server.repos[NAME].refs["main"] = OTHER
    server.log.clear()
    done = pare(*command)
    assert done.code == 0 and not server.log, done.err
    assert f"{run} was begun with {NAME} at commit 01234567, which it keeps" in done.out
    assert (run / "calibrate" / "stats.safetensors").read_bytes() == before
    assert opened(NAME).name == OTHER, "others get the new one"


def test_another_commit_that_is_named_is_refused(pare, server, model, text, tmp_path):
    run = tmp_path / "run"
    rest = ["--out", run, "--data", text, "--length", 16, "--samples", 4]
    assert pare("calibrate", NAME, *rest).code == 0
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"rope_theta": 777.0}))
    server.repos[NAME].refs["main"] = OTHER
    done = pare("calibrate", f"{NAME}@{OTHER}", *rest)
    assert done.code == 3 and "is another model" in done.line


def test_a_commit_that_is_gone_from_the_cache_is_fetched_again(pare, server, model, text, tmp_path):
    run = tmp_path / "run"
    command = ["calibrate", NAME, "--out", run, "--data", text, "--length", 16, "--samples", 4]
    assert pare(*command).code == 0
    shutil.rmtree(hub_cache.storage(NAME))
    done = pare("score", run)
    assert done.code == 1 and f"`mlx-pare calibrate {NAME}@{SHA} --out {run}`, with the options of before" in done.line
    server.repos[NAME].refs["v2"] = OTHER
    assert pare(*command).code == 0 and pare("score", run).code == 0
    shutil.rmtree(hub_cache.storage(NAME))
    shutil.rmtree(Path(constants.HF_ASSETS_CACHE))
    server.repos[NAME].refs = {"main": OTHER}
    done = pare(*command)
    assert done.code == 1 and f"{NAME} has no revision {SHA}; {run} was begun with that commit" in done.line


# ---- in Python ----


def test_the_python_api_resolves_names(server, model, text, tmp_path):
    settings = Settings(data=str(text), keep=0.75, length=16, samples=4, criterion="magnitude", reconstruct=False,
                        widths="even", recover_steps=0, trials=0)  # fmt: skip
    found = mlx_pare.run(NAME, str(tmp_path / "run"), settings)
    assert Path(found["model"]).is_dir()
    assert json.loads((tmp_path / "run" / "manifest.json").read_text())["origin"]["hub"] == f"{NAME}@{SHA}"
    assert mlx_pare.inspect(NAME)["origin"] == "hub"
    with pytest.raises(UsageError, match="Did you mean"):
        mlx_pare.run("qwen3-8", tmp_path / "other", settings)
    with pytest.raises(HubError, match="no model org/nothing"):
        mlx_pare.export("org/nothing", tmp_path / "x.gguf", "f16")
    assert mlx_pare.run.__module__ == "mlx_pare.pipeline.run" and mlx_pare.bench.__doc__.startswith("Time")
