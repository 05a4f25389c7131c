"""A run of hours on a laptop: how far it is, what is left, a log, and a machine that stays awake."""

from __future__ import annotations

import json
import os
import shutil
import stat
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from mlx_pare.base import console, log, machine
from mlx_pare.base.errors import PareError
from mlx_pare.base.units import duration
from mlx_pare.options.settings import Settings
from mlx_pare.pipeline.order import step_names
from mlx_pare.pipeline.run import run as run_all
from mlx_pare.pipeline.status import status
from mlx_pare.store import rundir
from mlx_pare.text.splits import DEMO

# ---- what is left ----


class Clock:
    """Time that passes when it is told to."""

    def __init__(self):
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch) -> Clock:
    made = Clock()
    monkeypatch.setattr(console.time, "monotonic", made)
    return made


def etas(clock: Clock, seconds: list[float]) -> list[float]:
    """The seconds that are said to be left after every piece, divided by those that are."""
    bar, found = console.Progress("walk: block", len(seconds)), []
    for number, each in enumerate(seconds):
        clock.now += each
        bar.advance()
        rest = sum(seconds[number + 1 :])
        found.append(bar.left() / rest if rest else 1.0 + bar.left())
    return found


WALKS = {
    "even": [1.0] * 40,
    "a first block that also reads the embedding": [6.0] + [1.0] * 39,
    "a first block that is not cut": [0.1] + [1.0] * 39,
    "uneven by turns": [1.0, 1.3] * 20,
    "a last block that is not cut": [0.1] + [1.0] * 38 + [0.1],
    "many small ones": [3.0] + [0.01] * 999,
}


@pytest.mark.parametrize("walk", WALKS)
def test_eta_after_a_tenth_of_the_work(clock, walk):
    """Within 20 % from there on, but for the last few pieces, where it is of no matter."""
    seconds = WALKS[walk]
    found = etas(clock, seconds)
    for said in found[len(seconds) // 10 - 1 : -6]:
        assert 0.8 < said < 1.2


def test_eta_of_work_that_goes_on(clock):
    """What was done before does not count, nor does what is told to come hide."""
    bar = console.Progress("walk: block", 100)
    bar.skip(80)
    for _ in range(5):
        clock.now += 2
        bar.advance()
    assert bar.left() == pytest.approx(30)
    clock.now += 6.0
    bar.aside(6.0, 12.0)
    assert bar.left() == pytest.approx(42)


def test_eta_of_training_that_is_validated(clock):
    """Six validations of 30 s between 60 steps of 1 s; the first one was before."""
    bar, end = console.Progress("recover: step", 60), 60.0 + 6 * 30
    bar.aside(0.0, 6 * 30.0)
    for step in range(1, 55):
        clock.now, end = clock.now + 1, end - 1
        bar.advance()
        if step > 5:
            assert bar.left() == pytest.approx(end, rel=0.2)
        if step % 10 == 0:
            clock.now, end = clock.now + 30, end - 30
            bar.aside(30.0, (6 - step // 10) * 30.0)


def test_eta_is_of_no_use_with_one_piece_done(clock):
    """It is all that is known; nothing is divided by zero."""
    bar = console.Progress("walk: block", 10)
    bar.advance(0)
    clock.now += 3
    bar.advance()
    assert bar.left() == pytest.approx(27)


# ---- the log ----


@pytest.fixture
def opened(tmp_path) -> Callable[..., rundir.Run]:
    (tmp_path / "model").mkdir()
    return lambda: rundir.Run(tmp_path / "run", tmp_path / "model", "identity")


def lines(path: Path) -> list[tuple[str, str]]:
    return [(line.kind, line.text) for line in log.last_session(path)]


def test_log_has_what_was_said_and_what_was_done(opened, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(console._state, "quiet", True)

    def work(directory: Path) -> None:
        console.say("said\nin two lines")
        console.warn("careful")

    with opened() as run:
        run.step("score", {}, {}, work)
    assert capsys.readouterr().out == ""
    found = lines(tmp_path / "run")
    kinds = [kind for kind, _ in found]
    assert kinds == ["started", "begun", "said", "said", "warning", "done", "ended"]
    assert [text for _, text in found][1:5] == ["score", "said", "in two lines", "careful"]
    console.say("after the run")
    assert lines(tmp_path / "run") == found


def test_log_has_errors_with_their_traceback(opened, tmp_path):
    with pytest.raises(PareError), opened() as run:
        run.step("score", {}, {}, lambda _: (_ for _ in ()).throw(PareError("broken", "mend it")))
    found = lines(tmp_path / "run")
    assert ("error", "broken. Mend it.") in found
    assert any(kind == "trace" and "test_long_runs.py" in text for kind, text in found)


def test_log_has_progress_twice_a_minute(opened, tmp_path, clock, monkeypatch):
    monkeypatch.setitem(console._state, "quiet", True)

    def work(_: Path) -> None:
        with console.progress("score: layer", 100) as bar:
            for _ in range(100):
                clock.now += 1.0
                bar.advance()

    with opened() as run:
        run.step("score", {}, {}, work)
    said = [text for kind, text in lines(tmp_path / "run") if kind == "progress"]
    assert said == [f"score: layer {n}/100, {duration(100 - n)} left" for n in (30, 60, 90)]


def test_a_log_that_cannot_be_written_stops_nothing(opened, tmp_path):
    with opened():
        pass
    (tmp_path / "run" / "log.txt").unlink()
    (tmp_path / "run" / "log.txt").mkdir()
    with opened() as run:
        assert run.step("score", {}, {}, lambda d: (d / "out").write_text("made"))
    assert log.last_session(tmp_path / "run") == []


def test_log_is_read_from_its_end_and_half_lines_are_left_out(tmp_path):
    for number in range(3000):
        log.write(tmp_path, "said", f"line {number}")
    log.write(tmp_path, "started", "again")
    log.write(tmp_path, "error", "\x00 odd, but whole")
    with (tmp_path / "log.txt").open("ab") as file:
        file.write(b"2026-11-26 12:00:00 17 said")
    assert lines(tmp_path) == [("started", "again"), ("error", "\x00 odd, but whole")]
    (tmp_path / "log.txt").write_bytes(b"\xff\xfe\n" * 100_000)
    assert lines(tmp_path) == []


# ---- status ----


@pytest.fixture(scope="module")
def settings(tmp_path_factory) -> Settings:
    folder = tmp_path_factory.mktemp("text")
    found = (DEMO / "calibration.txt").read_text("utf-8").split("\n")
    (folder / "data.txt").write_text("\n".join(found[::2]), "utf-8")
    (folder / "test.txt").write_text("\n".join(found[1::2]), "utf-8")
    return Settings(
        data=str(folder / "data.txt"), test_data=str(folder / "test.txt"), keep=0.75, length=32, samples=4,
        widths="even", recover_steps=2, trials=1, gguf="f16", context=256,
    )  # fmt: skip


@pytest.fixture(scope="module")
def whole(pico_models, settings, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("status") / "run"
    run_all(pico_models("llama", (4, 32), num_hidden_layers=2), out, settings)
    return out


def test_status_of_a_run_that_is_done(whole):
    found = status(whole)
    recorded = json.loads((whole / "manifest.json").read_text())["steps"]
    assert found["state"] == "finished" and found["next"] is None and found["error"] is None
    assert [s["step"] for s in found["steps"]] == list(recorded)
    assert [(s["seconds"], s["peak_bytes"]) for s in found["steps"]] == [
        (r["seconds"], r["peak_bytes"]) for r in recorded.values()
    ]
    assert found["bytes"] == sum(f.stat().st_size for f in whole.rglob("*") if f.is_file())


def test_status_knows_the_steps_of_a_run(whole):
    """Told from what was asked, before anything is done."""
    run = rundir.Run(whole, locked=False)
    assert step_names(run.recipe()) == list(run.manifest.steps)
    run.close()


def test_status_knows_the_steps_of_stages(pico_models, settings, tmp_path):
    asked = replace(settings, keep=None, stages=(0.9, 0.8), trials=0, reconstruct=False)
    run_all(pico_models("llama", (4, 32), num_hidden_layers=2), tmp_path / "run", asked)
    found = status(tmp_path / "run")
    assert found["state"] == "finished" and found["left"] == []
    assert sorted(s["step"] for s in found["steps"]) == sorted(
        name for name in step_names(rundir.Run(tmp_path / "run", locked=False).recipe())
    )


def test_status_while_a_step_works(opened, tmp_path, clock):
    answers = []

    def work(_: Path) -> None:
        with console.progress("score: layer", 100) as bar:
            clock.now += 40
            bar.advance(25)
        answers.append(status(tmp_path / "run"))

    with opened() as run:
        run.write_recipe({"recover_steps": 0})
        run.step("calibrate", {}, {}, lambda _: None)
        run.step("score", {}, {}, work)
    (found,) = answers
    assert found["state"] == "working" and found["pid"] == os.getpid()
    assert (found["working"], found["next"]) == ("score", "plan")
    assert found["said"]["text"] == "score: layer 25/100, 2 min 0 s left"
    assert [s["step"] for s in found["steps"]] == ["calibrate"]
    assert status(tmp_path / "run")["state"] == "waiting"


def test_status_after_an_error_and_after_a_kill(opened, tmp_path):
    with pytest.raises(PareError), opened() as run:
        run.step("score", {}, {}, lambda _: (_ for _ in ()).throw(PareError("broken", "mend it")))
    found = status(tmp_path / "run")
    assert found["state"] == "failed" and found["error"]["text"] == "broken. Mend it." and found["working"] == "score"
    text = (tmp_path / "run" / "log.txt").read_text().splitlines()
    (tmp_path / "run" / "log.txt").write_text("\n".join(text[:2]) + "\n")
    assert status(tmp_path / "run")["state"] == "killed"


def test_status_of_what_is_no_run_or_damaged(whole, tmp_path):
    with pytest.raises(PareError, match="no run at"):
        status(tmp_path)
    copy = Path(shutil.copytree(whole, tmp_path / "copy"))
    (copy / "log.txt").unlink()
    assert status(copy)["state"] == "finished" and status(copy)["log"] is None
    (copy / "manifest.json").write_text("{")
    with pytest.raises(PareError, match=r"manifest\.json is damaged"):
        status(copy)


def test_status_is_quick_and_changes_nothing(whole):
    def tree() -> dict[str, int]:
        return {str(f): f.stat().st_mtime_ns for f in whole.rglob("*")}

    before, times = tree(), []
    for _ in range(8):
        used = os.times()
        done = subprocess.run(
            [sys.executable, "-m", "mlx_pare", "status", str(whole), "--json"], capture_output=True, timeout=60
        )
        now = os.times()
        times.append(now.children_user + now.children_system - used.children_user - used.children_system)
        assert done.returncode == 0, done.stderr
        assert json.loads(done.stdout)["state"] == "finished"
    assert min(times) < 0.5  # of the processor: others may be busy
    assert tree() == before


# ---- awake ----


@pytest.fixture
def caffeinate(tmp_path, monkeypatch) -> Path:
    """A program of this name that notes how it was called, and waits to be ended; and a Mac to run it."""
    program, noted = tmp_path / "bin" / "caffeinate", tmp_path / "noted"
    program.parent.mkdir()
    program.write_text(f'#!/bin/sh\necho "$@" >> {noted}\nexec sleep 60\n')
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", f"{program.parent}{os.pathsep}{os.environ['PATH']}")
    return noted


@pytest.fixture
def on_a_mac(monkeypatch) -> Callable[[], None]:
    """From here on base/machine.py takes this for one."""
    mac = SimpleNamespace(platform="darwin", modules=sys.modules)
    return lambda: monkeypatch.setattr(machine, "sys", mac)


def sleeping(parent: int) -> int:
    """Children of this process that are `sleep` now."""
    done = subprocess.run(["ps", "-ax", "-o", "ppid=", "-o", "args="], capture_output=True, text=True, check=True)
    return sum(line.split()[0] == str(parent) and "sleep 60" in line for line in done.stdout.splitlines())


@pytest.mark.parametrize("error", [None, KeyboardInterrupt, PareError("broken")])
def test_a_mac_stays_awake_while_a_step_works(caffeinate, opened, on_a_mac, error):
    run = opened()
    on_a_mac()

    def work(_: Path) -> None:
        for _ in range(500):
            if caffeinate.exists() and caffeinate.read_text():
                break
            time.sleep(0.01)
        assert caffeinate.read_text() == f"-i -w {os.getpid()}\n"
        if error:
            raise error

    if error:
        with pytest.raises(BaseException, match=None if error is KeyboardInterrupt else "broken"):
            run.step("score", {}, {}, work)
    else:
        run.step("score", {}, {}, work)
    run.close()
    assert not sleeping(os.getpid())


def test_nothing_is_started_elsewhere(caffeinate, opened):
    with opened() as run:
        run.step("score", {}, {}, lambda _: time.sleep(0.2))
    assert not caffeinate.exists()


def test_a_mac_without_the_program_works_all_the_same(on_a_mac, monkeypatch):
    on_a_mac()
    monkeypatch.setattr(machine.shutil, "which", lambda _: None)
    monkeypatch.setattr(machine.subprocess, "Popen", lambda *_, **__: pytest.fail("something was started"))
    with machine.awake():
        worked = True
    assert worked
