"""Read the header of a GGUF file on the hub by byte ranges: some megabytes, since it holds the vocabulary."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from ..base.errors import PareError
from ..gguf.header import Header, check_part, read_all, read_start, union
from ..model.hub_name import HubName
from . import hub_cache
from .hub_files import needed
from .hub_reader import OTHERWISE, File, Hub, Unreachable, in_time

STARTS = tuple(1 << bits for bits in (20, 22, 24, 26))  # bytes read in turn until the whole header is among them


def gguf_header(name: HubName, say: Callable[[str], None]) -> tuple[str, Header]:
    """Read the headers of all parts of a GGUF model on the hub, as one.

    Args:
        name: the model; its ``file`` or ``tag`` chooses one of several.
        say: receives lines about the progress.
    Returns:
        The path of the (first) file in the repository, and the header.
    Raises:
        HubError: the hub does not give it.
        Unreachable: the hub does not answer, and the model was not downloaded before.
        PareError: the repository has no such file, or it is damaged.
        UsageError: the repository has several, and the name does not choose one.
    """
    hub = Hub(name.repo, name.revision or "main")
    try:
        commit, sizes = in_time(hub.listing)
    except Unreachable as error:
        here = hub_cache.found(name, hub.asked, gguf=True)
        if here is None:
            raise
        commit, parts = here
        say(f"{error.problem}: taken from the cache, {hub.repo} as of commit {commit[:8]}")
        return parts[0], read_all(hub_cache.snapshot(name.repo, commit) / parts[0])
    parts = needed(name, sizes, gguf=True)
    headers = {}
    for done, part in enumerate(parts, 1):
        headers[Path(part)] = header = _header(hub, commit, part, sizes[part])
        check_part(Path(f"{hub.repo}/{part}"), header, done, len(parts))
        say(f"reading headers {done} of {len(parts)}")
    return parts[0], union(Path(f"{hub.repo}/{parts[0]}"), headers)


def _header(hub: Hub, commit: str, file: str, size: int | None) -> Header:
    if type(size) is not int or size < 0:
        raise PareError(f"{hub.host} does not say how large {hub.repo}/{file} is", OTHERWISE)
    start, remote = b"", File(hub, commit, file, size)
    for wanted in STARTS:
        start += remote.read(len(start), min(wanted, size) - len(start))
        if (found := read_start(f"{hub.repo}/{file}", start, size)) is not None:
            return found
        if len(start) < min(wanted, size):
            raise Unreachable(f"{hub.host} sends {len(start)} of {size} bytes of {hub.repo}/{file}", OTHERWISE)
    raise PareError(f"the header of {hub.repo}/{file} is larger than {STARTS[-1] >> 20} MiB")
