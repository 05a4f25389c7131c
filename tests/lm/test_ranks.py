"""Two processes under mlx.launch, each with a copy of the run directory as on two machines, against one."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import mlx.core as mx
import numpy as np
import pico
import pytest

from mlx_pare.options.settings import Settings
from mlx_pare.pipeline import choose_sizes, steps

LIMIT = 240  # where nothing else runs a call takes ten: seconds after which a call hangs, which is an error
PIPE = 1 << 16  # bytes that a pipe holds
LAUNCH = Path(sys.executable).with_name("mlx.launch")
ASKED = ["--recover-steps", "6", "--method", "full", "--learning-rate", "3e-4", "--batch", "4"]
MANY = ["--recover-steps", "12", "--batch", "4", "--rank", "4", "--local-steps", "1"]  # long enough to be killed in


@pytest.fixture(scope="module")
def pruned(pico_models, tmp_path_factory) -> Path:
    """A run directory up to prune, of rows of 32 tokens."""
    model, out = pico_models("llama-untied", num_hidden_layers=2), tmp_path_factory.mktemp("pruned") / "run"
    text = out.with_name("text.txt")
    text.write_text("\n\n".join(pico.TEXT.read_text("utf-8").split("\n\n")[:30]))
    s = Settings(
        data=str(text), samples=8, length=32, criterion="magnitude", keep=0.6, reconstruct=False, widths="even"
    )
    texts = steps.Texts(model, s)
    with steps.open_run(model, out) as run:
        run.write_recipe({"model": str(model), "data": str(text), "length": 32, "samples": 8})
        steps.calibrate_step(run, texts, s)
        steps.score_step(run, s)
        choose_sizes.plan_step(run, texts, s)
        steps.prune_step(run)
    return out


def files(directory: Path) -> dict[str, bytes]:
    return {str(f.relative_to(directory)): f.read_bytes() for f in sorted(directory.rglob("*")) if f.is_file()}


def free_port() -> int:
    """The first of two that are free now."""
    while True:
        with socket.socket() as one, socket.socket() as two:
            one.bind(("127.0.0.1", 0))
            try:
                two.bind(("127.0.0.1", one.getsockname()[1] + 1))
            except (OSError, OverflowError):
                continue
            return one.getsockname()[1]


class Launched:
    """``recover`` on DIRECTORY/run-0 by the first process and on DIRECTORY/run-1 by the second, which write what they
    have to say to DIRECTORY/said-0 and said-1."""

    def __init__(self, directory: Path, *options: str):
        self.directory, self.temporary = directory, directory / "tmp"
        self.temporary.mkdir(exist_ok=True)
        command = f'exec "{sys.executable}" -m mlx_pare recover "$0/run-$MLX_RANK" "$@" 2>"$0/said-$MLX_RANK"'
        launch = [str(LAUNCH), "-n", "2", "-p", str(free_port()), "--"]
        env = os.environ | {"TMPDIR": str(self.temporary), "PYTHONFAULTHANDLER": "1"}
        with (directory / "said-launch").open("w") as said:
            self.process = subprocess.Popen(
                [*launch, "bash", "-c", command, str(directory), *options], env=env, start_new_session=True,
                stdin=subprocess.PIPE, stdout=said, stderr=subprocess.STDOUT,
            )  # fmt: skip
        # mlx.launch spins on a stdin that has ended, and as long as the pipe to any of its processes is not full
        os.write(self.process.stdin.fileno(), bytes(PIPE))

    def end(self) -> str:
        """What was said, when all processes have ended by themselves. Fails after LIMIT seconds."""
        try:
            said = self._said(LIMIT)
        except subprocess.TimeoutExpired:
            pytest.fail(f"the processes hang: {self._where()}")
        with pytest.raises(ProcessLookupError):
            os.killpg(self.process.pid, 0)
        return said

    def _said(self, limit: float) -> str:
        self.process.wait(limit)
        self.process.stdin.close()
        return "\n".join(file.read_text() for file in sorted(self.directory.glob("said-*")))

    def _where(self) -> str:
        """What was said, and the line each has come to (faulthandler)."""
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGABRT)
        return self._said(10)

    def kill(self) -> None:
        """All at once, as a power failure would."""
        os.killpg(self.process.pid, signal.SIGKILL)

    def kill_behind(self, step: int) -> None:
        """When a state behind this step was saved."""
        begun, place = time.monotonic(), self.directory / "run-0" / "recover.partial" / "work" / "training"
        while not any(int(f.stem.split("-")[1]) >= step for f in place.glob("state-????????.safetensors")):
            if self.process.poll() is not None or time.monotonic() - begun > LIMIT:
                pytest.fail(f"no state was saved: {self._where()}")
            time.sleep(0.02)
        self.kill()
        self._said(LIMIT)

    def left(self) -> list[str]:
        """What was forgotten among the temporary files: of ours, not of mlx.launch's."""
        return sorted(f.name for f in self.temporary.iterdir() if not f.name.startswith("tmp."))


@pytest.fixture
def place(pruned, tmp_path):
    """``place(name) -> directory`` with two copies of the run."""

    def copies(name: str) -> Path:
        for number in (0, 1):
            shutil.copytree(pruned, tmp_path / name / f"run-{number}")
        return tmp_path / name

    return copies


def alone(directory: Path, **options) -> None:
    """``recover`` by this process."""
    with steps.continue_run(directory / "run-0") as run:
        s = Settings(**{key: run.recipe()[key] for key in ("data", "length")}, **options)
        steps.recover_step(run, steps.Texts(run.model, s), s)


def result(directory: Path) -> tuple[dict, dict[str, np.ndarray]]:
    recovered = directory / "run-0" / "recover"
    found = json.loads((recovered / "recovery.json").read_text())
    return found, {n: np.array(a) for n, a in mx.load(str(recovered / "model" / "model.safetensors")).items()}


def test_two_processes_train_as_one(place, pruned):
    """The same curve and weights; the second changes nothing and leaves nothing; asked again, both end at once."""
    one, two, untouched = place("one"), place("two"), files(pruned)
    alone(one, recover_steps=6, method="full", learning_rate=3e-4, batch=4)
    launched = Launched(two, *ASKED)
    launched.end()
    (expected, expected_weights), (found, weights) = result(one), result(two)
    for mine, other in zip(found["curve"], expected["curve"], strict=True):
        assert mine["step"] == other["step"] and mine["loss"] == pytest.approx(other["loss"], rel=1e-5)
        assert mine.get("train_loss", 0) == pytest.approx(other.get("train_loss", 0), rel=1e-5)
    assert found["improved"] and found["best_step"] == expected["best_step"] == 6
    for name, array in expected_weights.items():
        assert np.linalg.norm(weights[name] - array) <= 1e-5 * np.linalg.norm(array), name
    assert {n: b for n, b in files(two / "run-1").items() if n != ".lock"} == {
        n: b for n, b in untouched.items() if n != ".lock"
    }
    assert not launched.left()
    before, again = files(two / "run-0" / "recover"), Launched(two, *ASKED)
    assert "recover: done before, kept" in again.end() and files(two / "run-0" / "recover") == before


def test_both_killed_they_end_in_the_same_bytes(place):
    """Block by block first, by the first process alone, whose result and random numbers the other has not."""
    one, whole, broken = place("one"), place("whole"), place("broken")
    alone(one, recover_steps=12, batch=4, rank=4, local_steps=1)
    Launched(whole, *MANY).end()
    curves = [[point["loss"] for point in result(directory)[0]["curve"]] for directory in (one, whole)]
    assert curves[0] == pytest.approx(curves[1], rel=1e-4)  # adapters that did not begin alike end 1 % apart
    Launched(broken, *MANY).kill_behind(2)
    assert not (broken / "run-0" / "recover").exists()
    Launched(broken, *MANY).end()
    expected, found = ({k: v for k, v in result(d)[0].items() if k != "local"} for d in (whole, broken))  # has seconds
    assert found == expected and expected["kept"] == "trained"
    assert files(whole / "run-0" / "recover" / "model") == files(broken / "run-0" / "recover" / "model")


def test_both_train_on_what_the_first_sampled(place):
    """One round of rows that the student of the beginning writes: the same as by one process."""
    asked = [
        "--recover-steps",
        "1",
        "--method",
        "full",
        "--learning-rate",
        "3e-4",
        "--batch",
        "4",
        "--on-policy",
        "0.5",
    ]
    one, two = place("one"), place("two")
    alone(one, recover_steps=1, method="full", learning_rate=3e-4, batch=4, on_policy=0.5)
    Launched(two, *asked).end()
    (expected, _), (found, _) = result(one), result(two)
    assert found["options"]["kind"] == "reverse" and len(found["curve"]) == 2
    assert found["curve"][1]["train_loss"] == pytest.approx(expected["curve"][1]["train_loss"], rel=1e-5)
    assert found["curve"][1]["loss"] == pytest.approx(expected["curve"][1]["loss"], rel=1e-5)


def test_a_batch_that_cannot_be_shared_is_refused(place):
    directory = place("odd")
    said = Launched(directory, "--recover-steps", "2", "--batch", "3").end()
    assert "2 processes cannot share 3 rows" in said and "Give a --batch that 2 divides" in said
    assert not (directory / "run-0" / "recover").exists()


@pytest.mark.parametrize("failing", [0, 1])
def test_when_one_fails_the_other_ends(place, failing):
    """The config of one is damaged: it says so, and the other ends as well.

    The one that waits is ended by mlx.launch, or it finds that the connection is lost. It may then be gone first: how
    long the other takes to end after its last word is up to the machine.
    """
    directory = place("damaged")
    (directory / f"run-{failing}" / "prune" / "model" / "config.json").write_text("{}")
    said = Launched(directory, *ASKED).end()
    cause, waiting = ((directory / f"said-{rank}").read_text() for rank in (failing, 1 - failing))
    errors = [line for line in cause.splitlines() if line.startswith("mlx-pare: ")]
    assert len(errors) == 1 and errors[0].startswith("mlx-pare: model type None is not described here")
    ends = re.compile("mlx-pare: (interrupted: what is finished is kept|another process ended: )")
    assert not [line for line in waiting.splitlines() if line.startswith("mlx-pare: ") and not ends.match(line)]
    assert re.search(r"rank [01] exited with code 1\b", said) and not (directory / "run-0" / "recover").exists()
    assert "internal error" not in said and "Traceback" not in said
