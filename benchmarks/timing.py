"""Steps timed in turn (A B C A B C ...), each from a cold source; ratios round by round, bytes read."""

from __future__ import annotations

import argparse
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from mlx_pare.base import console


@dataclass(frozen=True)
class Trial:
    """One run of a step: seconds by the clock, and of processors (all threads), which other programs hardly change.
    ``read``: bytes that it asked the system for, None where the system does not count them."""

    seconds: float
    processor: float
    read: int | None


def in_turn(
    steps: Mapping[str, Callable[[Path], object]], sources: Mapping[str, Path], rounds: int, scratch: Path
) -> dict[str, list[Trial]]:
    """Rounds in which every step is called with the path of something to write, after one round that does not count.

    ``sources``: the file or directory that a step reads, taken out of the system's cache before it runs; a step without
    one starts warm. What it wrote is removed, and what was not on the disk yet is waited for, outside of the clock.
    """
    found: dict[str, list[Trial]] = {name: [] for name in steps}
    for number in range(rounds + 1):
        for name, step in steps.items():
            if name in sources:
                cool(sources[name])
            out = scratch / "out"
            read, start, processor = bytes_read(), time.perf_counter(), time.process_time()
            step(out)
            seconds, processor = time.perf_counter() - start, time.process_time() - processor
            if number:
                found[name].append(Trial(seconds, processor, None if read is None else bytes_read() - read))
            shutil.rmtree(out) if out.is_dir() else out.unlink(missing_ok=True)
            os.sync()
    return found


def cool(path: Path) -> None:
    """Take files out of the system's cache, where the system can be asked to (Linux)."""
    if not hasattr(os, "posix_fadvise"):
        return
    for file in [path] if path.is_file() else path.iterdir():
        handle = os.open(file, os.O_RDONLY)
        try:
            os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(handle)


def bytes_read() -> int | None:
    """Bytes that this process has asked the system for by now, from the cache or not; None but on Linux."""
    counters = Path("/proc/self/io")
    return int(counters.read_text().split()[1]) if counters.exists() else None


def copied(source: Path, out: Path) -> None:
    """A file or the files of a directory copied by the system, and on the disk when it returns."""
    out.mkdir()
    for file in [source] if source.is_file() else source.iterdir():
        shutil.copyfile(file, out / file.name)
        handle = os.open(out / file.name, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def spread(values: Sequence[float], digits: int = 2) -> str:
    """Median, and from where to where."""
    return f"{median(values):.{digits}f} ({min(values):.{digits}f} to {max(values):.{digits}f})"


def seconds(trials: Sequence[Trial]) -> str:
    """Seconds of a step, and of those the processors'."""
    return f"{spread([t.seconds for t in trials])}, processor {median(t.processor for t in trials):.2f}"


def ratios(one: Sequence[Trial], other: Sequence[Trial], of: str = "seconds") -> list[float]:
    """Time of one step over that of another, round by round."""
    return [getattr(a, of) / getattr(b, of) for a, b in zip(one, other, strict=True)]


def fastest(one: Sequence[Trial], other: Sequence[Trial]) -> str:
    """Seconds of one step over those of another, the best round of each."""
    return f"{min(t.seconds for t in one) / min(t.seconds for t in other):.2f}"


def share(trials: Sequence[Trial], needed: int) -> str:
    """Bytes read for those needed; "-" where the system does not count."""
    return "-" if trials[0].read is None else f"{max(trial.read for trial in trials) / needed:.3f}"


def script(doc: str, lines: Callable[[Path, int], list[str]]) -> None:
    """The command line of one benchmark: ``lines`` makes its table in a directory, in so many rounds."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--work", type=Path, help="where there is room for 3 GB (default: where temporary files go)")
    asked = parser.parse_args()
    console.configure(quiet=True)
    with tempfile.TemporaryDirectory(dir=asked.work) as name:
        print("\n".join(lines(Path(name), asked.rounds)))
