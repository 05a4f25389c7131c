"""Every fault that docs/troubleshooting.md lists, done to whole runs of a pico model.

Each is one line, nothing looks whole and is not, and the same command goes on to the same bytes. PARE_KILLS=100: that
many kills at random moments, and at chosen ones.
"""

from __future__ import annotations

import errno
import fcntl
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import faults
import pico
import pytest
from faults import Done, Driver, differences, half_written, result

from mlx_pare.store import rundir
from mlx_pare.text.splits import DEMO

LAYERS = {"num_hidden_layers": 2}  # a fifth less time than four
KILLS = int(os.environ.get("PARE_KILLS", "2"))
PAGE = Path(__file__).resolve().parents[2] / "docs" / "troubleshooting.md"
SMALL = ["--keep", "0.75", "--length", "32", "--samples", "4", "--recover-steps", "2", "--gguf", "f16", "--try", "2",
         "--context", "256", "--trials", "0", "--quiet"]  # fmt: skip


@dataclass
class Job:
    """A run that nobody disturbed: how to call it, what it left, and copies of it at every moment on the way."""

    driver: Driver
    model: Path
    texts: Path
    folder: Path
    out: Path
    moments: Path
    whole: dict[str, bytes]
    seconds: float

    def argv(self, out: Path, model: Path | None = None) -> list:
        data = ["--data", self.texts / "data.txt", "--test-data", self.texts / "test.txt"]
        return ["run", model or self.model, "--out", out, *SMALL, *data]

    def run(self, out: Path, model: Path | None = None, **fault) -> Done:
        return self.driver.run(self.argv(out, model), out, **fault)

    def ends(self, out: Path, model: Path | None = None) -> None:
        """The same command goes on to the same bytes."""
        done = self.run(out, model)
        assert done.code == 0, done.err
        assert not differences(out, self.whole)


@pytest.fixture(scope="module")
def texts(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("texts")
    lines = (DEMO / "calibration.txt").read_text("utf-8").split("\n")
    (folder / "data.txt").write_text("\n".join(lines[::2])[:8000], "utf-8")
    (folder / "test.txt").write_text((DEMO / "test.txt").read_text("utf-8")[:1500], "utf-8")
    return folder


@pytest.fixture(scope="module")
def job(pico_models, texts, tmp_path_factory) -> Iterator[Job]:
    folder, model = tmp_path_factory.mktemp("faults"), pico_models("llama", (4, 32), **LAYERS)
    out, moments = folder / "whole", folder / "moments"
    moments.mkdir()
    with Driver(folder) as driver:
        made = Job(driver, model, texts, folder, out, moments, {}, 0.0)
        done = made.run(out, snapshots=str(moments))
        assert done.code == 0, done.err
        made.whole = result(out)
        again = made.run(folder / "again")  # the first one waited for imports and copied itself at every moment
        made.seconds = again.seconds
        assert again.code == 0 and not differences(folder / "again", made.whole)
        assert {"recover/model/model.safetensors", "export/model-f16.gguf", "trials.json", "recipe.toml"} < {
            *made.whole
        }
        yield made


@pytest.fixture
def late(job, tmp_path) -> Path:
    """A copy of the run whose last step is still to be done."""
    names = sorted(p.name for p in job.moments.iterdir() if "torn" not in p.name)
    chosen = next(n for n in reversed(names) if not (job.moments / n / "export").exists())
    return Path(shutil.copytree(job.moments / chosen, tmp_path / "late"))


@pytest.fixture
def model(job, tmp_path) -> Path:
    """A copy of the model, with its dates: the same to a run, and may be damaged."""
    return Path(shutil.copytree(job.model, tmp_path / "model"))


# ---- what the page promises ----


def rows() -> dict[str, str]:
    """The table of faults: what happens, what the user sees (code in it, as a pattern with ... for anything)."""
    section = PAGE.read_text("utf-8")
    cells = [[c.strip() for c in line.strip("|").split("|")] for line in section.splitlines() if line.startswith("|")]
    return {fault: sees for fault, sees, _ in cells[2:]}


def seen(fault: str, line: str) -> None:
    """A line is what docs/troubleshooting.md says that the user sees after this fault."""
    said = re.findall(r"`([^`]*)`", rows()[fault])
    patterns = [".*".join(re.escape(part) for part in text.split("...")) for text in said]
    assert any(re.search(pattern, line) for pattern in patterns), f"docs: {said}, seen: {line}"


def test_every_row_of_the_table_is_tested():
    text = Path(__file__).read_text("utf-8")
    assert len(rows()) > 9
    assert not [fault for fault in rows() if f'"{fault}"' not in text]


# ---- killed ----


def test_kills_at_random_moments(job, tmp_path):
    told = faults.kills(job.driver, job.argv(tmp_path / "run"), tmp_path / "run", job.whole, job.seconds, KILLS, seed=0)
    sys.stdout.write(f"{told}\n")
    assert told["kills"] == KILLS and told["ended"]


def test_killed_between_any_two_changes_of_the_disk(job, tmp_path):
    """Also with the file half written that was to get its name next."""
    every = sorted(job.moments.iterdir())
    assert len(every) > 200 and sum("torn" in p.name for p in every) > 50
    sound: set[int] = set()  # the copies share the files that did not change
    assert not [found for moment in every if (found := half_written(moment, sound))]
    chosen = every if len(every) <= KILLS else random.Random(0).sample(every, KILLS)
    for moment in chosen:
        out = Path(shutil.copytree(moment, tmp_path / moment.name))
        job.ends(out)
        shutil.rmtree(out)


def test_what_status_says_of_a_killed_run(job, late, tmp_path):
    done = job.run(late, kill_after=0.3)
    assert done.code == -signal.SIGKILL
    status = subprocess.run(
        [sys.executable, "-m", "mlx_pare", "status", str(late)], capture_output=True, text=True, timeout=60
    )
    assert status.returncode == 0
    seen("killed (`kill -9`)", status.stdout)


@pytest.mark.parametrize("sent", ["SIGINT", "SIGTERM", "SIGHUP"])
def test_interrupted(job, tmp_path, sent):
    """Twice in a row, as people do: the second one comes while the first is cleaned up after."""
    out, temporary = tmp_path / "run", Path(job.driver.temporary)
    shutil.rmtree(temporary)  # what runs left there that were killed
    temporary.mkdir()
    for number in (1, 12, 60):
        done = job.run(out, interrupt=number, signal=sent)
        assert done.code == 1
        seen("Ctrl-C, SIGTERM, SIGHUP (a closed terminal)", done.line)
        assert not half_written(out) and not list(temporary.iterdir())
    job.ends(out)


# ---- the disk ----


def test_no_room_from_some_change_on(job, tmp_path):
    """Every write fails from there on, whatever is tried to clean up."""
    out = tmp_path / "run"
    for number in (1, 2, 3, 9, 30, 60):
        done = job.run(out, full=number)
        assert done.code == 1
        seen("disk full", done.line)
        assert not half_written(out)
    job.ends(out)


def test_no_room_for_large_files(job, tmp_path):
    """The system itself refuses, in the middle of a file: also what MLX writes."""
    out, said = tmp_path / "run", []
    for size in (1000, 4000, 8000, 20_000, 60_000):
        done = job.run(out, file_size=size)
        assert done.code == 1
        seen("disk full", done.line)
        said.append(done.line)
        assert not half_written(out)
    assert any("cannot write" in line for line in said) and any("File too large" in line for line in said)
    job.ends(out)


def test_no_room_on_a_small_disk(job, tmp_path):
    """A real one, where it can be mounted; elsewhere the two tests above stand for it."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=48k", "tmpfs", str(disk)]
    if sys.platform != "linux" or os.geteuid() or subprocess.run(mount, capture_output=True, check=False).returncode:
        job.ends(tmp_path / "run")
        return
    try:
        for size in (48, 120, 240, 600):
            subprocess.run(["mount", "-o", f"remount,size={size}k", str(disk)], check=True)
            done = job.run(disk / "run")
            assert done.code == 1
            seen("disk full", done.line)
            assert not half_written(disk / "run")
        subprocess.run(["mount", "-o", "remount,size=64m", str(disk)], check=True)
        job.ends(disk / "run")
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=True)


def locked_away(place: Path, mode: int) -> None:
    for path in [place, *place.rglob("*")] if place.is_dir() else [place]:
        path.chmod(mode if path.is_file() else mode | 0o100)


def test_output_that_is_read_only(job, late, tmp_path):
    before = result(late)
    locked_away(late, 0o400)
    done = job.run(late, powerless=True)
    assert done.code == 1
    seen("run directory read-only", done.line)
    locked_away(late, 0o600)
    assert result(late) == before
    job.ends(late)


def test_place_for_the_output_that_is_read_only(job, tmp_path):
    place = tmp_path / "place"
    place.mkdir(mode=0o500)
    done = job.run(place / "run", powerless=True)
    assert done.code == 1 and not list(place.iterdir())
    seen("run directory read-only", done.line)
    place.chmod(0o700)


@pytest.mark.parametrize("what", ["model.safetensors", "tokenizer.json", "data.txt"])
def test_file_that_cannot_be_read(job, late, model, what, tmp_path):
    file = job.texts / what if what == "data.txt" else model / what
    try:
        file.chmod(0)
        done = job.run(late, model, powerless=True)
    finally:
        file.chmod(0o600)
    assert done.code == 1 and what in done.line
    seen("unreadable file", done.line)
    job.ends(late, model)


# ---- the model, and what lies in the run directory ----


def keeping_dates(file: Path, change: Callable[[Path], None]) -> None:
    times = file.stat().st_atime_ns, file.stat().st_mtime_ns
    change(file)
    os.utime(file, ns=times)


def flip(file: Path) -> None:
    """One bit, far behind the header."""
    with file.open("r+b") as opened:
        opened.seek(file.stat().st_size * 3 // 4)
        byte = opened.read(1)[0]
        opened.seek(-1, os.SEEK_CUR)
        opened.write(bytes([byte ^ 1]))


def test_shard_that_was_truncated(job, late, model):
    shard = model / "model.safetensors"
    whole = shard.read_bytes()
    keeping_dates(shard, lambda f: os.truncate(f, len(whole) - 1000))
    done = job.run(late, model)
    assert done.code == 1
    seen("shard truncated", done.line)
    keeping_dates(shard, lambda f: f.write_bytes(whole))
    job.ends(late, model)


def test_shard_with_a_flipped_bit(job, late, model):
    """Size and date are as they were."""
    before = result(late)
    keeping_dates(model / "model.safetensors", flip)
    done = job.run(late, model)
    assert done.code == 3 and result(late) == before
    seen("bit flipped in a shard", done.line)
    keeping_dates(model / "model.safetensors", flip)
    job.ends(late, model)


def test_bit_that_flips_before_the_first_step_is_done(job, model, tmp_path):
    """The bytes are noted before anything is computed from them."""
    out = tmp_path / "run"
    first = next(p for p in sorted(job.moments.iterdir()) if list(p.glob("calibrate.partial/block-0001*")))
    shutil.copytree(first, out)
    keeping_dates(model / "model.safetensors", flip)
    done = job.run(out, model)
    assert done.code == 3
    seen("bit flipped in a shard", done.line)


def test_shard_that_was_swapped(job, late, model, tmp_path):
    pico.make(tmp_path / "dense", seed=1, **LAYERS)
    other = pico.quantize(tmp_path / "dense", tmp_path / "other", 4, 32) / "model.safetensors"
    assert other.stat().st_size == (model / "model.safetensors").stat().st_size
    kept = model.parent / "kept.safetensors"
    shutil.copy2(model / "model.safetensors", kept)
    shutil.copy(other, model / "model.safetensors")
    before = result(late)
    done = job.run(late, model)
    assert done.code == 3 and result(late) == before
    seen("shard swapped or written anew", done.line)
    shutil.copy2(kept, model / "model.safetensors")
    job.ends(late, model)


@pytest.mark.parametrize("how", ["truncated", "flipped", "removed"])
@pytest.mark.parametrize("step", ["calibrate/stats.safetensors", "recover/model/model.safetensors"])
def test_result_of_a_step_that_was_damaged(job, late, step, how):
    file = late / step
    whole, change = file.read_bytes(), {"truncated": lambda f: os.truncate(f, 1000), "flipped": flip}
    if how == "removed":
        times = file.stat().st_atime_ns, file.stat().st_mtime_ns
        file.unlink()
    else:
        keeping_dates(file, change[how])
    done = job.run(late)
    assert done.code in (1, 3) and str(file) in done.line
    seen("result of a step damaged", done.line)
    if how == "removed":
        file.touch()
        os.utime(file, ns=times)
    keeping_dates(file, lambda f: f.write_bytes(whole))
    job.ends(late)


def test_large_result_with_a_flipped_bit(tmp_path, monkeypatch):
    """Told apart by size and date until there is work to do: then by all bytes."""
    monkeypatch.setattr(rundir, "BIG_FILE", 1000)
    (tmp_path / "model").mkdir()
    large, out = bytes(3 << 20), tmp_path / "run"
    with rundir.Run(out, tmp_path / "model", "identity") as run:
        run.step("prune", {}, {}, lambda d: (d / "large").write_bytes(large))
    keeping_dates(out / "prune" / "large", flip)
    with rundir.Run(out) as run:
        assert not run.step("prune", {}, {}, lambda d: pytest.fail("done again"))
        with pytest.raises(rundir.Refused, match="has other bytes than before") as refused:
            run.step("evaluate", {}, {}, lambda d: pytest.fail("read what is damaged"))
    seen("result of a step damaged", str(refused.value))
    shutil.rmtree(out / "prune")  # as it was told
    with rundir.Run(out) as run:
        assert run.step("prune", {}, {}, lambda d: (d / "large").write_bytes(large))
        assert run.step("evaluate", {}, {}, lambda d: (d / "small").write_bytes(b""))


def test_manifest_that_was_damaged(job, late):
    whole = (late / "manifest.json").read_bytes()
    (late / "manifest.json").write_bytes(whole[:-100])
    before = result(late)
    done = job.run(late)
    assert done.code == 1 and result(late) == before
    seen("manifest damaged", done.line)
    (late / "manifest.json").write_bytes(whole)
    job.ends(late)


# ---- two at once ----


def test_second_process(job, late):
    with (late / ".lock").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        before = result(late)
        done = job.run(late)
        assert done.code == 3 and result(late) == before
        seen("two processes in one run directory", done.line)
    job.ends(late)


def test_f15_file_system_without_locks(tmp_path, monkeypatch, capsys):
    assert "run directory on a file system without locks" in rows()
    monkeypatch.setattr(fcntl, "flock", lambda *_: (_ for _ in ()).throw(OSError(errno.ENOLCK, "No locks available")))
    (tmp_path / "model").mkdir()
    rundir.Run(tmp_path / "run", tmp_path / "model", "identity").close()
    seen("run directory on a file system without locks", capsys.readouterr().err)


def test_many_who_look_do_not_stop_one_who_works(tmp_path):
    """`status` asks for the lock, for a moment."""
    (tmp_path / "model").mkdir()
    with rundir.Run(tmp_path / "run", tmp_path / "model", "identity"):
        assert rundir.is_locked(tmp_path / "run")
    code = "import sys, time, mlx_pare.store.rundir as r\nfrom pathlib import Path\nend = time.time() + 1.5\n"
    code += "while time.time() < end: r.is_locked(Path(sys.argv[1]))"
    looking = subprocess.Popen([sys.executable, "-c", code, str(tmp_path / "run")])
    time.sleep(0.5)
    for _ in range(50):
        rundir.Run(tmp_path / "run").close()
    assert looking.wait(timeout=60) == 0
