"""How long a command takes before it does anything: processor time of whole processes, and what importing costs.

    python benchmarks/start_up.py [--rounds 9] [--imports]

The commands take turns; median (least to greatest), and the ratio to a Python that only imports typer. ``--imports``
also lists the modules that take the longest to import. Exit code 1 if a command takes more than 0.3 s.
"""

from __future__ import annotations

import argparse
import re
import resource
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from statistics import median

MOST = 0.3  # seconds of processor time
MODEL = Path(__file__).resolve().parents[1] / "mlx_pare" / "demo" / "model"
BARE = "python -c 'import typer'"
COMMANDS = {
    BARE: [sys.executable, "-c", "import typer"],
    **{
        f"mlx-pare {' '.join(arguments)}": [sys.executable, "-m", "mlx_pare", *arguments]
        for arguments in (
            ["--version"], ["--help"], ["run", "--help"], ["fit", "qwen3-32b"], ["inspect", "qwen3-32b"],
            ["inspect", str(MODEL)], ["doctor"],
        )
    },
}  # fmt: skip


def processor_seconds(command: Sequence[str]) -> float:
    """User and system time of one process that ends well."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run(command, check=True, capture_output=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def slowest(command: Sequence[str], count: int = 10) -> list[str]:
    """The modules of a command whose import takes the longest, without what they import themselves."""
    told = subprocess.run([command[0], "-X", "importtime", *command[1:]], capture_output=True, text=True).stderr
    found = [(int(own), name) for own, name in re.findall(r"^import time: +(\d+) \| +\d+ \| +(\S+)$", told, re.M)]
    return [f"{own / 1000:8.1f} ms  {name}" for own, name in sorted(found, reverse=True)[:count]]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--imports", action="store_true")
    asked = parser.parse_args()
    seconds: dict[str, list[float]] = {name: [] for name in COMMANDS}
    for _ in range(asked.rounds + 1):
        for name, command in COMMANDS.items():
            seconds[name].append(processor_seconds(command))
    print("| command | processor seconds | ratio |\n|---|---|---|")
    bare = median(seconds[BARE][1:])
    for name, every in seconds.items():
        counted = every[1:]  # the first round compiles and fills caches
        middle = median(counted)
        print(f"| `{name}` | {middle:.3f} ({min(counted):.3f}-{max(counted):.3f}) | {middle / bare:.1f} |")
        if asked.imports and name != BARE:
            print("\n".join(slowest(COMMANDS[name])), file=sys.stderr)
    return int(any(median(every[1:]) > MOST for every in seconds.values()))


if __name__ == "__main__":
    sys.exit(main())
