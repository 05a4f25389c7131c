"""Reading ahead: while a block computes, a thread brings the file of the next one into the page cache.

The thread reads the file and throws the bytes away. That works on every operating system. Advice to the system differs
between them, and a mapped file would count as memory of this process. Pages in the cache do not count, and the system
drops them first when memory is short.
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
    """Yield a function that has the tensors of a block read in the background. Errors of the reading are ignored."""
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
