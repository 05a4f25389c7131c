"""How long it takes to choose the inputs of one wide matrix and to solve it, beside one factorization of its size.

    python benchmarks/speed_repair.py [--sizes 4096x12288 5120x27648] [--only sums tokens] [--out FILE]

Two forms: sums over many tokens (Problem), as after a walk over more tokens than the matrix has inputs, and the tokens
themselves (Dual). A run asks the first form twice: the trials of a plan want the order down to the narrowest width and
the weights at six widths, reconstruction wants one width. Processor seconds; tokens are drawn from a seed.
"""

from __future__ import annotations

import argparse
import time
import tracemalloc
from collections.abc import Callable, Iterator
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
from criteria import show

from mlx_pare.repair.factors import factor
from mlx_pare.repair.least_squares import Dual, Problem, cost

SHARES = (0.85, 0.8, 0.75, 0.7, 0.65, 0.6)  # of the inputs, that the trials keep
TOKENS = 1024  # of the second form
KEPT = 0.75  # of them, that reconstruction keeps


def drawn(tokens: int, ffn: int, hidden: int) -> tuple[np.ndarray, np.ndarray]:
    """Inputs [tokens, ffn] of different sizes, each somewhat like the one before it, and weights [hidden, ffn]."""
    random = np.random.default_rng(0)
    x = random.standard_normal((tokens, ffn), np.float32) * np.exp(random.standard_normal(ffn, np.float32))
    x[:, 1:] += 0.5 * x[:, :-1]
    return x, random.standard_normal((hidden, ffn), np.float32)


def timed(work: Callable[[], Any]) -> tuple[float, Any]:
    """Processor seconds, and the result."""
    start = time.process_time()
    found = work()
    return time.process_time() - start, found


def sums(hidden: int, ffn: int) -> Iterator[str]:
    """The form of sums over tokens."""
    x, weight = drawn(ffn + 512, ffn, hidden)
    gram = (x.T @ x).astype(np.float64)
    del x
    once = timed(lambda: factor(gram + np.diag(np.full(ffn, gram.trace() / ffn))))[0]
    own, kept = Problem(gram, None, weight, 0.01), round(KEPT * ffn)
    counts = [round(share * ffn) for share in SHARES]
    trials, _ = timed(lambda: own.path(1, counts[-1], counts))
    told = Problem(gram, gram @ weight.T.astype(np.float64), weight, 0.01)
    choice, (units, new) = timed(lambda: told.choose(1, kept))
    errors, _ = timed(lambda: (told.error(told.old(units), units, 1.0), told.best_error(new, units, 1.0)))
    yield "\n| hidden / ffn | factorization | order and six widths | one width, chosen and solved | its errors |"
    yield "|---|---|---|---|---|"
    cells = " | ".join(f"{spent:.1f} s ({spent / once:.1f})" for spent in (trials, choice, errors))
    yield f"| {hidden} / {ffn} | {once:.1f} s | {cells} |"


def tokens(hidden: int, ffn: int) -> Iterator[str]:
    """The form of the tokens, with its peak of memory."""
    x, weight = drawn(TOKENS, ffn, hidden)
    target = x @ weight.T
    tracemalloc.start()
    spent, _ = timed(lambda: Dual(x, target, weight).choose(1, ffn // 2))
    peak = tracemalloc.get_traced_memory()[1] + x.nbytes + weight.nbytes + target.nbytes
    tracemalloc.stop()
    stated = cost(TOKENS, ffn, hidden).nbytes + weight.nbytes
    yield "\n| hidden / ffn | tokens | half of the inputs, chosen and solved | peak | stated beforehand |"
    yield "|---|---|---|---|---|"
    yield f"| {hidden} / {ffn} | {TOKENS} | {spent:.1f} s | {peak / 1e9:.2f} GB | {stated / 1e9:.2f} GB |"


def main() -> None:
    """Print the tables, and write them to a file if asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", default=["4096x12288"], help="HIDDENxFFN")
    parser.add_argument("--only", nargs="+", choices=FORMS, default=list(FORMS))
    parser.add_argument("--out", type=Path, help="also write the tables there")
    asked = parser.parse_args()
    lines = []
    for size in asked.sizes:
        for line in chain.from_iterable(FORMS[form](*map(int, size.split("x"))) for form in asked.only):
            show(line)
            lines.append(line)
    if asked.out:
        asked.out.write_text("\n".join(lines).strip() + "\n", "utf-8")


FORMS = {"sums": sums, "tokens": tokens}

if __name__ == "__main__":
    main()
