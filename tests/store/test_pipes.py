"""Files that became pipes: of a run or a model, met by any command. They are refused, nobody waits for them."""

from __future__ import annotations

import json
import os
import shutil
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pico
import pytest
from typer.testing import CliRunner

from mlx_pare.base import log
from mlx_pare.cli import main as cli
from mlx_pare.store import rundir

SECONDS = 60  # far more than any of it takes
SMALL = ["--keep", "0.75", "--length", "32", "--samples", "4", "--recover-steps", "0", "--no-reconstruct", "--widths",
         "even", "--gguf", "f16", "--context", "256", "--trials", "0"]  # fmt: skip


@contextmanager
def soon() -> Iterator[None]:
    """Fails if the block waits, for a pipe say."""

    def late(*_) -> None:
        raise AssertionError("it waits")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def told(*words) -> tuple[int, str]:
    """Exit code and document of a command."""
    with soon():
        done = CliRunner().invoke(cli.app, [*map(str, words), "--json"])
    assert "internal error" not in done.output and (done.exception is None or isinstance(done.exception, SystemExit))
    return done.exit_code, done.stdout


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    """A folder with a model and a run of it."""
    folder = tmp_path_factory.mktemp("pipes")
    pico.make(folder / "dense", num_hidden_layers=2)
    pico.quantize(folder / "dense", folder / "model", 4, 32)
    lines = pico.TEXT.read_text("utf-8").split("\n")
    (folder / "data.txt").write_text("\n".join(lines[::2]), "utf-8")
    (folder / "test.txt").write_text("\n".join(lines[1::2])[:4000], "utf-8")
    done = CliRunner().invoke(cli.app, [*map(str, command(folder, folder / "run"))])
    assert done.exit_code == 0, done.output
    return folder


def command(folder: Path, run: Path) -> list:
    data = ["--data", folder / "data.txt", "--test-data", folder / "test.txt"]
    return ["run", folder / "model", "--out", run, *SMALL, *data]


def pipe(file: Path) -> None:
    file.unlink(missing_ok=True)
    file.parent.mkdir(exist_ok=True)
    os.mkfifo(file)


ANYWHERE = ["manifest.json", "recipe.toml", "log.txt", ".lock"]
OF_STEPS = [
    "calibrate/stats.safetensors",
    "score/scores.safetensors",
    "plan/plan.json",
    "prune/model/config.json",
    "prune/done.json",
    "evaluate-original/size.json",
    "evaluate-pruned/metrics.json",
    "export/fits.json",
    "export/export.json",
    "report.md",
    "report-fit.svg",
]


@pytest.mark.parametrize("name", [*ANYWHERE, *OF_STEPS])
def test_f29_pipes_in_a_run_directory(finished, tmp_path, name):
    run = Path(shutil.copytree(finished / "run", tmp_path / "run"))
    pipe(run / name)
    for words in (["status", run], ["report", run], ["prune", run], command(finished, run)):
        code, said = told(*words)
        assert code in (0, 1, 3)
        if code:
            assert Path(name).name in json.loads(said)["error"]


@pytest.mark.parametrize("name", ["manifest.json", "recipe.toml", "log.txt", ".lock"])
def test_f29_devices_in_a_run_directory(finished, tmp_path, name):
    run = Path(shutil.copytree(finished / "run", tmp_path / "run"))
    (run / name).unlink()
    (run / name).symlink_to("/dev/zero")
    for words in (["status", run], ["report", run]):
        code, said = told(*words)
        assert code in (0, 1, 3) and (not code or name in said)


MODEL = ["config.json", "model.safetensors", "model-00002-of-00002.safetensors", "tokenizer.json", "README.md",
         "LICENSE", "tokenizer_config.json", "special_tokens_map.json", "generation_config.json", "chat_template.jinja",
         "survivors.json", "plan.json", "stray.safetensors", "additional_chat_templates/tool.jinja"]  # fmt: skip


@pytest.mark.parametrize("name", MODEL)
def test_f29_pipes_in_a_model(finished, tmp_path, name):
    model, out = Path(shutil.copytree(finished / "model", tmp_path / "model")), tmp_path / "out"
    pipe(model / name)
    calibrate = ["calibrate", model, "--out", tmp_path / "run", "--length", "32", "--samples", "2"]
    exports = (["export", model, "--hub-ready", out], ["export", model, "-o", out], ["export", model, "--ollama", out])
    for words in (["inspect", model], ["fit", model], calibrate, *([*e, "--no-verify"] for e in exports)):
        assert told(*words)[0] in (0, 1, 2, 3)
        if out.is_dir():
            shutil.rmtree(out)
        out.unlink(missing_ok=True)


def test_f29_pipes_in_the_cache_of_rebuilt_models(finished, tmp_path, monkeypatch):
    cache, file = tmp_path / "cache", tmp_path / "model.gguf"
    monkeypatch.setenv("MLX_PARE_CACHE", str(cache))
    assert told("export", finished / "model", "-o", file, "--no-verify")[0] == 0
    evaluate = ["evaluate", file, "--data", finished / "test.txt", "--length", "32", "--samples", "2"]
    code, said = told(*evaluate)
    assert code == 0
    rebuilt = next(place for place in cache.iterdir() if place.is_dir())
    for name in sorted(f.relative_to(cache) for f in [*rebuilt.iterdir(), *cache.glob("*.hash")]):
        pipe(cache / name)
        again = told(*evaluate)
        assert again == (0, said) or name.name in json.loads(again[1])["error"]


def test_f29_a_pipe_is_no_log_and_no_lock(tmp_path):
    for name in (log.NAME, ".lock"):
        os.mkfifo(tmp_path / name)
    with soon():
        log.write(tmp_path, "said", "something")
        assert log.last_session(tmp_path) == []
        with pytest.raises(rundir.PareError, match="is a pipe or a device"):
            rundir.is_locked(tmp_path)
