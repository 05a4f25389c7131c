"""kill -9 at random moments of a recovery: the same command goes on, to the same bytes. PARE_KILLS=20: more of them."""

from __future__ import annotations

import os
import random
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from mlx_pare.options.settings import Settings
from mlx_pare.pipeline import choose_sizes, steps
from mlx_pare.text.splits import Texts

KILLS = int(os.environ.get("PARE_KILLS", "1"))
SETTINGS = Settings(keep=0.7, length=32, samples=8, criterion="minitron", reconstruct=False, axes=("ffn", "kv_head"))
RECOVER = ["--recover-steps", "6", "--local-steps", "2", "--targets", "16", "--batch", "2", "--learning-rate", "1e-3"]


@pytest.fixture(scope="module")
def pruned(pico_models, tmp_path_factory) -> Path:
    """A run that is done up to prune."""
    out, model = tmp_path_factory.mktemp("kill") / "run", pico_models("llama", (4, 32))
    texts = Texts(model, SETTINGS)
    with steps.open_run(model, out) as run:
        run.write_recipe({"length": SETTINGS.length, "samples": SETTINGS.samples})
        steps.calibrate_step(run, texts, SETTINGS)
        steps.score_step(run, SETTINGS)
        choose_sizes.plan_step(run, texts, SETTINGS)
        steps.prune_step(run, False)
    return out


def start(run: Path) -> subprocess.Popen:
    command = [sys.executable, "-m", "mlx_pare", "recover", str(run), *RECOVER]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)


def finish(run: Path) -> dict[str, bytes]:
    """Run to the end; the files of the result."""
    process = start(run)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    return {f.name: f.read_bytes() for f in (run / "recover" / "model").iterdir()}


def test_killed_at_random_moments(pruned, tmp_path):
    runs = {name: shutil.copytree(pruned, tmp_path / name) for name in ("whole", "killed")}
    begun = time.monotonic()
    whole = finish(runs["whole"])
    lasted, moments = time.monotonic() - begun, random.Random(0)
    killed = 0
    while killed < KILLS:
        process = start(runs["killed"])
        try:
            process.communicate(timeout=moments.uniform(0.3, 1.0) * lasted)
        except subprocess.TimeoutExpired:
            process.kill()
            process.communicate()
            killed += 1
        if process.returncode == 0:  # it was done before: once more from the beginning
            assert finish(runs["killed"]) == whole
            shutil.rmtree(runs["killed"])
            shutil.copytree(pruned, runs["killed"])
    assert finish(runs["killed"]) == whole
    assert not (runs["killed"] / "recover" / "work").exists() and not (runs["killed"] / "recover.partial").exists()
