"""Reading ahead: while a block computes, the file of the next one comes into the page cache.

A thread that reads and throws away, because every operating system does that: advice differs between them, and a mapped
file would count as this process's memory. What it reads takes no memory of ours, and is dropped first when memory is
short.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

from ..model.checkpoint import Checkpoint

AT_ONCE = 1 << 20


@contextmanager
def read_ahead(checkpoint: Checkpoint) -> Iterator[Callable[[int], None]]:
    """A function that has the tensors of a block read in the background; an error there is none here."""
    of: dict[int, list] = {}
    for name, entry in checkpoint.entries.items():
        if found := re.search(r"\blayers\.(\d+)\.", name):
            of.setdefault(int(found[1]), []).append(entry)
    stopped = False

    def read(index: int) -> None:
        buffer = bytearray(AT_ONCE)
        for entry in of.get(index, ()):
            with entry.file.open("rb", buffering=0) as file:
                file.seek(entry.start)
                for _ in range(0, entry.nbytes, len(buffer)):
                    if stopped:
                        return
                    file.readinto(buffer)

    with ThreadPoolExecutor(1, "read-ahead") as thread:
        try:
            yield lambda index: thread.submit(read, index)
        finally:
            stopped = True
