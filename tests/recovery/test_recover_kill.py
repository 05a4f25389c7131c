"""kill -9 at random moments of a recovery: the same command goes on, to the same bytes. PARE_KILLS=20: more of them."""

from __future__ import annotations

import os
import random
import shutil
import signal
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from faults import Done, Driver

from mlx_pare.options.settings import Settings
from mlx_pare.pipeline import choose_sizes, steps
from mlx_pare.text.splits import Texts

KILLS = int(os.environ.get("PARE_KILLS", "1"))
LIMIT = 120  # seconds after which a run hangs, which is an error
SETTINGS = Settings(keep=0.7, length=32, samples=8, criterion="minitron", reconstruct=False, axes=("ffn", "kv_head"))
RECOVER = ["--recover-steps", "6", "--local-steps", "2", "--targets", "16", "--batch", "2", "--learning-rate", "1e-3",
           "--train-rows", "64"]  # fmt: skip


@pytest.fixture(scope="module")
def pruned(pico_models, two_texts, tmp_path_factory) -> Path:
    """A run that is done up to prune."""
    out, model = tmp_path_factory.mktemp("kill") / "run", pico_models("llama", (4, 32))
    settings = replace(SETTINGS, **two_texts)
    texts = Texts(model, settings)
    with steps.open_run(model, out) as run:
        run.write_recipe({"length": settings.length, "samples": settings.samples, **two_texts})
        steps.calibrate_step(run, texts, settings)
        steps.score_step(run, settings)
        choose_sizes.plan_step(run, texts, settings)
        steps.prune_step(run, False)
    return out


@pytest.fixture(scope="module")
def driver(tmp_path_factory) -> Iterator[Driver]:
    """Starts the command without the seconds that a new process takes to import; they are over when it is given."""
    folder = tmp_path_factory.mktemp("driver")
    with Driver(folder) as running:
        assert running.run(["--version"], folder).code == 0
        yield running


def call(driver: Driver, run: Path, kill_after: float | None = None) -> Done:
    return driver.run(["recover", run, *RECOVER], run, kill_after)


def finish(driver: Driver, run: Path) -> tuple[dict[str, bytes], float]:
    """Run to the end; the files of the result, and how many seconds it took."""
    done = call(driver, run, LIMIT)
    assert done.code == 0, done.err
    return {f.name: f.read_bytes() for f in (run / "recover" / "model").iterdir()}, done.seconds


def test_killed_at_random_moments(driver, pruned, tmp_path):
    runs = {name: shutil.copytree(pruned, tmp_path / name) for name in ("whole", "killed")}
    (whole, lasted), moments = finish(driver, runs["whole"]), random.Random(0)
    killed = 0
    while killed < KILLS:
        done = call(driver, runs["killed"], moments.uniform(0.3, 1.0) * lasted)
        if done.code == 0:  # it was done before: once more from the beginning
            assert finish(driver, runs["killed"])[0] == whole
            shutil.rmtree(runs["killed"])
            shutil.copytree(pruned, runs["killed"])
            continue
        assert done.code == -signal.SIGKILL, done.err
        killed += 1
    assert finish(driver, runs["killed"])[0] == whole
    assert not (runs["killed"] / "recover" / "work").exists() and not (runs["killed"] / "recover.partial").exists()
