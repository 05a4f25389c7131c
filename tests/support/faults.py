"""Runs that are killed, starved and disturbed from outside, and what they must leave: the harness of test_faults.

Run as a program it kills a run so many times at random moments:  python tests/support/faults.py KILLS SEED -- run MODEL
...
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

DRIVER = Path(__file__).with_name("faults_driver.py")
# what holds times (step.json: of the files it names), or is of the process alone
NOT_COMPARED = {"manifest.json", "step.json", "log.txt", ".lock", "report.md", "report-fit.svg", "bench.json"}
IN_A_ROW = 5
OF_THE_PLACE = {"seconds", "model", "path"}  # keys of JSON files: times, and where the run directory lies


@dataclass
class Done:
    """How a run ended: exit code (negative: the signal that killed it), what it said on stderr, seconds."""

    code: int
    err: str
    seconds: float

    @property
    def line(self) -> str:
        """The one line of the error; there is no other, warnings apart."""
        lines = [line for line in self.err.splitlines() if line.startswith("mlx-pare: ")]
        assert len(lines) == 1 and "Traceback" not in self.err and "internal error" not in self.err, self.err
        return lines[0]


class Driver:
    """Starts mlx-pare with faults planted: children of a warm process where that can fork, or processes themselves."""

    def __init__(self, folder: Path):
        self.said, self.temporary = folder / "stderr.txt", folder / "temporary"
        self.temporary.mkdir()
        self.environment = {**ENVIRONMENT, "TMPDIR": str(self.temporary)}
        self.server = None
        if sys.platform != "darwin":  # Apple's frameworks do not survive a fork
            self.server = subprocess.Popen(
                [sys.executable, str(DRIVER)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
                env=self.environment,
            )

    def close(self) -> None:
        if self.server:
            self.server.stdin.close()
            self.server.stdout.close()
            self.server.wait(timeout=30)

    def __enter__(self) -> Driver:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def run(
        self,
        argv: list,
        out: Path,
        kill_after: float | None = None,
        sent: int = signal.SIGKILL,
        until: Callable[[], bool] = lambda: True,
        **fault,
    ) -> Done:
        """One run to its end, or until it is sent a signal: so many seconds after ``until`` is seen to be true."""
        job = json.dumps({"argv": [str(a) for a in argv], "out": str(out), "stderr": str(self.said), **fault})
        begun = time.monotonic()
        if self.server:
            self.server.stdin.write(job + "\n")
            self.server.stdin.flush()
            pid = int(self.server.stdout.readline())
        else:
            process = subprocess.Popen([sys.executable, str(DRIVER), job], env=self.environment)
            pid = process.pid
        over = threading.Event()
        bomb = threading.Thread(target=strike, args=(pid, sent, until, kill_after, over))
        if kill_after is not None:
            bomb.start()
        code = int(self.server.stdout.readline()) if self.server else process.wait()
        over.set()
        if kill_after is not None:
            bomb.join()
        return Done(code, self.said.read_text("utf-8"), time.monotonic() - begun)


ENVIRONMENT = {**os.environ, "PYTHONPATH": os.pathsep.join([str(DRIVER.parents[2]), os.environ.get("PYTHONPATH", "")])}


def strike(pid: int, sent: int, until: Callable[[], bool], after: float, over: threading.Event) -> None:
    """A signal so many seconds after ``until`` is true, unless the process is over by then."""
    while not until():
        if over.wait(0.002):
            return
    if not over.wait(after):
        with suppress(ProcessLookupError):
            os.kill(pid, sent)


# ---- what a run leaves ----


def timeless(value):
    """JSON without times and places."""
    if isinstance(value, dict):
        return {k: timeless(v) for k, v in value.items() if k not in OF_THE_PLACE}
    return [timeless(v) for v in value] if isinstance(value, list) else value


def result(out: Path) -> dict[str, bytes]:
    """Everything in a run directory that must not depend on how often it was killed, byte for byte."""
    found = {}
    for file in sorted(f for f in out.rglob("*") if f.is_file() and f.name not in NOT_COMPARED):
        data = file.read_bytes()
        if file.name == "recipe.toml":
            data = b"\n".join(line for line in data.split(b"\n") if not line.startswith((b"model = ", b"# ")))
        if file.suffix == ".json" and "model" not in file.relative_to(out).parts[:-1]:
            data = json.dumps(timeless(json.loads(data))).encode()
        found[str(file.relative_to(out))] = data
    return found


def differences(out: Path, whole: dict[str, bytes]) -> list[str]:
    """The files that are not as those of a run that nobody disturbed, of JSON what of it; leavings among them."""
    now = result(out)
    found = [str(f.relative_to(out)) for f in out.rglob("*") if ".tmp" in f.name or f.suffix in (".partial", ".part")]
    for name in sorted({*now, *whole}):
        one, two = whole.get(name), now.get(name)
        if one != two and one and two and name.endswith(".json"):
            one, two = (dict(leaves(json.loads(data))) for data in (one, two))
            found += [f"{name}: {k} {one.get(k)} -> {two.get(k)}" for k in {*one, *two} if one.get(k) != two.get(k)]
        elif one != two:
            found.append(name)
    return found


def leaves(value, name: str = ""):
    """The values in JSON with where they stand."""
    if isinstance(value, dict | list):
        for key, inner in value.items() if isinstance(value, dict) else enumerate(value):
            yield from leaves(inner, f"{name}.{key}")
    else:
        yield name, value


def half_written(out: Path, sound: set[int] | None = None) -> list[str]:
    """Files that have their name and yet cannot be read: of a run that was stopped. What says of itself that it is not
    finished (.tmp, .part, .partial) may be anything.

    ``sound``: inodes of files that were read and are sound, of several copies that share files; more are added.
    """
    from mlx_pare.tensors.safetensors import read_header

    found = []
    for file in sorted(f for f in out.rglob("*") if f.is_file()):
        if ".tmp" in file.name or file.suffix == ".part" or ".part" in str(file.relative_to(out)):
            continue
        if sound is not None and file.stat().st_ino in sound:
            continue
        try:
            if file.suffix == ".json":
                json.loads(file.read_bytes())
            if file.suffix == ".safetensors":
                read_header(file)
            if sound is not None:
                sound.add(file.stat().st_ino)
        except Exception as error:
            found.append(f"{file.relative_to(out)}: {error}")
    return found


def kills(driver: Driver, argv: list, out: Path, whole: dict[str, bytes], lasts: float, count: int, seed: int) -> dict:
    """Kill a run ``count`` times at random moments: of a new one, and then up to IN_A_ROW times of the same that goes
    on, which is then left alone until it is done.

    ``lasts``: seconds of a run that is left alone. Returns how many kills, whole runs, and in which steps it died.
    Raises AssertionError when anything differs from ``whole``.
    """
    moments, told = random.Random(seed), {"kills": 0, "ended": 0, "died in": {}}

    killed = 0  # this run
    while told["kills"] < count or killed:
        enough = killed == IN_A_ROW or told["kills"] == count
        after = None if enough else moments.uniform(0, lasts / 2 if killed else lasts)
        done = driver.run(argv, out, kill_after=after)
        if done.code == -signal.SIGKILL:
            told["kills"] += 1
            killed += 1
            assert not half_written(out), f"{told}: {half_written(out)}"
            step = min((p.stem for p in out.glob("*.partial")), default="between")
            told["died in"][step] = told["died in"].get(step, 0) + 1
            sys.stderr.write(f"{told}\n")
        else:
            assert done.code == 0, f"{told}: {done.err}"
            assert not differences(out, whole), f"{told}: {differences(out, whole)}"
            told["ended"] += 1
            killed = 0
            shutil.rmtree(out)
    return told


def main() -> None:
    """See the top of the file."""
    count, seed, argv = int(sys.argv[1]), int(sys.argv[2]), sys.argv[sys.argv.index("--") + 1 :]
    with tempfile.TemporaryDirectory() as folder, Driver(Path(folder)) as driver:
        whole, out = Path(folder) / "whole", Path(folder) / "killed"
        done = driver.run([*argv, "--out", whole, "--quiet"], whole)
        assert done.code == 0, done.err
        told = kills(driver, [*argv, "--out", out, "--quiet"], out, result(whole), done.seconds, count, seed)
        sys.stdout.write(json.dumps({"seconds undisturbed": round(done.seconds, 1), **told}) + "\n")


if __name__ == "__main__":
    main()
