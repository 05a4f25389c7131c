"""Feeds damaged and hostile files to every reader, and holds each to its contract: a value, or a PareError of one line.

    python scripts/fuzz.py --runs 1000000 --seed 0 [--target header --target gguf] [--atheris]

Anything else is a finding: another exception, more than 200 MB allocated (a limit that the system enforces on Linux,
the resident size elsewhere), more than two seconds of processor time. Findings are kept in tests/fuzz_corpus, which the
tests replay. Inputs are sound ones, built here, changed by structure (JSON trees, GGUF rows) and by byte; the same seed
gives the same inputs. With --atheris libFuzzer chooses among them by coverage (pip install atheris; one process per
target). Exit code 1 when anything was found.
"""

from __future__ import annotations

import argparse
import contextlib
import faulthandler
import hashlib
import math
import os
import resource
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fuzz_changes import Mutator
from fuzz_targets import TARGETS, Place, Target, catalogue

from mlx_pare.base import console
from mlx_pare.base.errors import PareError

CORPUS = Path(__file__).resolve().parents[1] / "tests" / "fuzz_corpus"
MEMORY, SECONDS, HANG = 200 << 20, 2.0, 10  # bytes allocated; of processor time; seconds until it is stopped
LIMITS_DATA = sys.platform == "linux"


class Hang(BaseException):
    """The reader did not come back."""


# ---- the contract ----


@dataclass
class Tally:
    """What came of the inputs of one target."""

    inputs: int = 0
    accepted: int = 0
    slowest: float = 0.0
    peak: int = 0
    findings: dict[str, str] = field(default_factory=dict)  # where it broke -> how


def judged(target: Target, place: Place, raw: bytes) -> tuple[bool, float, str, str]:
    """(accepted, seconds, where, what): the last two are empty when the contract was kept."""
    started, what, accepted, where = time.perf_counter(), "", False, ""
    try:
        with reading():
            target.read(place, raw)
        accepted = True
    except PareError as error:
        line = str(error)
        if not line.isprintable() or len(line) > 10_000:
            what, where = f"a message that is not one plain line: {line[:100]!r}", "message"
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # also what is no Exception: panics of Rust, and Hang
        last = traceback.extract_tb(error.__traceback__)[-1]
        where = f"{type(error).__name__} at {Path(last.filename).name}:{last.lineno}"
        what = f"{where}: {str(error)[:200]!r}"
    seconds = time.perf_counter() - started
    if seconds > SECONDS and not what and (seconds := processor_seconds(target, place, raw)) > SECONDS:
        what, where = f"{seconds:.1f} seconds", "slow"
    return accepted, seconds, where, what


def processor_seconds(target: Target, place: Place, raw: bytes) -> float:
    """What reading this takes by itself: on a busy machine everything has to wait now and then."""
    started = time.process_time()
    with contextlib.suppress(PareError), reading():
        target.read(place, raw)
    return time.process_time() - started


def keep(name: str, raw: bytes) -> Path:
    CORPUS.mkdir(exist_ok=True)
    path = CORPUS / f"{name}-{hashlib.sha256(raw).hexdigest()[:10]}.bin"
    path.write_bytes(raw)
    return path


def note(tally: Tally, name: str, raw: bytes, result: tuple[bool, float, str, str]) -> None:
    accepted, seconds, where, what = result
    tally.inputs += 1
    tally.accepted += accepted
    tally.slowest = max(tally.slowest, seconds)
    if what and where not in tally.findings:
        tally.findings[where] = what
        print(f"FOUND in {name}: {what}\n  kept as {keep(name, raw)}", flush=True)


def resident(name: str = "VmHWM") -> int:
    """Bytes of memory, now (VmRSS) or at most (VmHWM, since it was last forgotten)."""
    if not LIMITS_DATA:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name))
    return int(line.split()[1]) << 10


def limit_memory() -> int:
    """Let this process allocate MEMORY more than it has; returns what it has. The peak begins anew."""
    if not LIMITS_DATA:
        return resident()
    Path("/proc/self/clear_refs").write_text("5")
    data = resident("VmData") + MEMORY
    resource.setrlimit(resource.RLIMIT_DATA, (data, resource.RLIM_INFINITY))
    return resident("VmRSS")


_busy: dict[str, Any] = {"input": 0, "reading": False, "seen": None}  # the number of the input; that at the last tick


@contextlib.contextmanager
def reading() -> Iterator[None]:
    """A reader is at work, on the next input."""
    _busy["input"] += 1
    _busy["reading"] = True
    try:
        yield
    finally:
        _busy["reading"] = False


def watch() -> None:
    """From here on a reader that is with the same input for two ticks gets a Hang: a timer for all of them, since
    setting one for each costs more than reading it."""
    signal.signal(signal.SIGALRM, _tick)
    signal.setitimer(signal.ITIMER_REAL, HANG, HANG)


def _tick(*_: Any) -> None:
    if _busy["reading"] and _busy["seen"] == _busy["input"]:
        raise Hang(f"no answer within {HANG} seconds")
    _busy["seen"] = _busy["input"]


def ready(name: str, place: Place) -> Target:
    """A target with its seeds, after everything it needs was imported and read once."""
    target = TARGETS[name]
    if not target.seeds:
        target.seeds.extend(catalogue())
    for seed in target.seeds:
        judged(target, place, bytes(target.kinds[:1]) + target.write(seed))
    return target


def fuzz(name: str, place: Place, runs: int, seed: int) -> Tally:
    """So many inputs for one reader."""
    target, tally = ready(name, place), Tally()
    mutator = Mutator(target, int.from_bytes(hashlib.sha256(f"{seed} {name}".encode()).digest()[:8]))
    before = limit_memory()
    while tally.inputs < runs:
        if tally.inputs % 1000 == 0:  # for what no signal reaches
            faulthandler.dump_traceback_later(600, exit=True)
        raw = mutator.make()
        note(tally, name, raw, judged(target, place, raw))
    faulthandler.cancel_dump_traceback_later()
    tally.peak = max(0, resident() - before)
    if tally.peak > MEMORY:
        tally.findings["memory"] = f"{tally.peak >> 20} MiB"
    return tally


def told(name: str, tally: Tally, seconds: float) -> str:
    rejected = tally.inputs - tally.accepted
    return (
        f"{name:16} {tally.inputs:9,} {tally.accepted:9,} {rejected:9,} {1e3 * tally.slowest:9.0f} ms "
        f"{tally.peak / 1e6:7.0f} MB {len(tally.findings):5} {seconds:7.0f} s"
    )


HEAD = f"{'target':16} {'inputs':>9} {'accepted':>9} {'rejected':>9} {'slowest':>12} {'memory':>10} found {'took':>8}"


def shares(names: list[str], runs: int) -> dict[str, int]:
    """How many inputs every target gets."""
    total = sum(TARGETS[name].share for name in names)
    return {name: max(1, math.ceil(runs * TARGETS[name].share / total)) for name in names}


# ---- by coverage ----


def fuzz_by_coverage(name: str, place: Place, runs: int, seed: int) -> None:
    """libFuzzer calls the reader, and our changes are among its own. It ends the process."""
    import atheris

    target, tally, started = ready(name, place), Tally(), time.monotonic()
    mutator = Mutator(target, seed)

    def one(raw: bytes) -> None:
        note(tally, name, raw, judged(target, place, raw))
        if tally.inputs == runs:
            tally.peak = max(0, resident() - before)
            print(told(name, tally, time.monotonic() - started), flush=True)
            place.close()
            os._exit(bool(tally.findings))

    def change(raw: bytes, most: int, number: int) -> bytes:
        mutator.random.seed(number)
        if number % 3 == 0:
            return mutator.make()[:most]
        return mutator.damage(raw)[:most] if number % 3 == 1 else atheris.Mutate(raw, len(raw))[:most]

    before = limit_memory()
    for module in [m for n, m in sys.modules.items() if n.startswith("mlx_pare.")]:
        for thing in list(vars(module).values()):
            if callable(thing) and getattr(thing, "__module__", "") == module.__name__ and hasattr(thing, "__code__"):
                setattr(module, thing.__name__, atheris.instrument_func(thing))
    atheris.Setup([sys.argv[0], f"-seed={seed + 1}", "-max_len=65536", "-verbosity=0"], one, custom_mutator=change)
    atheris.Fuzz()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=100_000, help="inputs for all targets together")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--target", action="append", choices=[*TARGETS], help="only this reader; may be repeated")
    parser.add_argument("--atheris", action="store_true", help="let libFuzzer guide it by coverage")
    asked = parser.parse_args()
    console.configure(quiet=True)
    sys.stdout = sys.__stdout__
    threading.stack_size(1 << 19)  # eight threads of the hub's would count as 64 MB
    watch()
    names = list(dict.fromkeys(asked.target or TARGETS))
    if asked.atheris and len(names) > 1:
        command = [sys.executable, __file__, "--atheris", "--seed", str(asked.seed)]
        print(HEAD, flush=True)
        counts = shares(names, asked.runs)
        done = [subprocess.run([*command, "--runs", str(n), "--target", name]) for name, n in counts.items()]
        return int(any(each.returncode for each in done))
    place, found, total, started = Place(), 0, 0, time.monotonic()
    try:
        if asked.atheris:
            fuzz_by_coverage(names[0], place, asked.runs, asked.seed)
        print(HEAD, flush=True)
        for name, runs in shares(names, asked.runs).items():
            begun = time.monotonic()
            tally = fuzz(name, place, runs, asked.seed)
            found, total = found + len(tally.findings), total + tally.inputs
            print(told(name, tally, time.monotonic() - begun), flush=True)
    finally:
        place.close()
    print(f"{total:,} inputs, seed {asked.seed}, {found} findings, {time.monotonic() - started:.0f} s")
    return int(bool(found))


if __name__ == "__main__":
    sys.exit(main())
