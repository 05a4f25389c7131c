"""How fast the steps are, as ratios measured in one run: what is pruned per second against what is copied, and so on.

    python benchmarks/run.py [--only calibrate prune export decode] [--rounds 5] [--work DIR] [--out FILE]

Every part is a script of its own (speed_calibrate.py, speed_prune.py, speed_export.py, tok_s.py). Steps take turns,
after a round that does not count; median (least to greatest) over the rounds.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import speed_calibrate
import speed_export
import speed_prune
import tok_s

from mlx_pare.base import console

PARTS = {"calibrate": speed_calibrate, "prune": speed_prune, "export": speed_export, "decode": tok_s}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--work", type=Path, help="where there is room for 3 GB (default: where temporary files go)")
    parser.add_argument("--out", type=Path, help="also write the tables there")
    asked = parser.parse_args()
    console.configure(quiet=True)
    texts = []
    with tempfile.TemporaryDirectory(dir=asked.work) as name:
        for part in asked.only:
            title, rest = PARTS[part].__doc__.split("\n\n", 1)
            about = rest.rpartition("\n\n")[2].strip()
            table = "\n".join(PARTS[part].lines(Path(name), asked.rounds))
            texts.append(f"## {part}\n\n{title.strip()}\n{about}\n\n{table}\n")
            print(texts[-1], flush=True)
    if asked.out:
        asked.out.write_text("\n".join(texts), "utf-8")


if __name__ == "__main__":
    main()
