"""MODEL of the command line: a model directory is itself, a GGUF file is rebuilt once, into a cache, and reused.

The cache is MLX_PARE_CACHE, or where the system keeps such things. What lies there may be deleted at any time: the same
file is rebuilt to the same bytes, so that a run goes on.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import sys
from pathlib import Path

from . import console
from .gguf_header import Header, read_parts

VARIABLE = "MLX_PARE_CACHE"
VERSION = 1  # of what is rebuilt: another one is rebuilt again
SAMPLES, SAMPLE = 64, 1 << 12  # places in a file, and bytes of each, by which it is known again


def cache() -> Path:
    """The directory of rebuilt models."""
    if named := os.environ.get(VARIABLE):
        return Path(named).expanduser()
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches" / "mlx-pare"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "mlx-pare"


def identity(parts: dict[Path, Header]) -> str:
    """What tells the files of a model apart, in hexadecimal: names, sizes, headers, and samples of the data."""
    digest = hashlib.sha256(f"{VERSION}".encode())
    for path, header in parts.items():
        digest.update(f"\0{path.name}\0{header.file_bytes}\0".encode())
        with path.open("rb") as file:
            left = header.data_start
            while left and (piece := file.read(min(left, 1 << 20))):
                digest.update(piece)
                left -= len(piece)
            step = max(1, (header.file_bytes - header.data_start) // SAMPLES)
            for place in range(header.data_start, header.file_bytes, step):
                file.seek(place)
                digest.update(file.read(SAMPLE))
    return digest.hexdigest()


def opened(model: Path) -> Path:
    """The model directory of MODEL: itself, or that of a GGUF file, which is rebuilt unless the cache has it.

    Raises PareError for a file that cannot be rebuilt.
    """
    if model.suffix.lower() != ".gguf" or not model.is_file():
        return model
    parts = read_parts(model)
    first = next(iter(parts))
    out = cache() / f"{first.stem[:50]}-{identity(parts)[:16]}"
    out.parent.mkdir(parents=True, exist_ok=True)
    with (out.parent / f"{out.name}.lock").open("w") as lock:  # another process may be at it
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not out.is_dir():
            _rebuild(model, out)
    console.say(f"{model} as an MLX model: {out}")
    return out


def _rebuild(model: Path, out: Path) -> None:
    from .gguf_model import rebuild

    console.say(f"{model} is rebuilt as an MLX model, once; it stays in {out.parent} ({VARIABLE} names another place)")
    told(rebuild(model, out))


def told(found: dict) -> None:
    """What rebuilding a file rounded, and what is to be known of it, on the console."""
    for kind, error in found["rounded"].items():
        console.say(
            f"{kind}: {error['tensors']} tensors as {error['stored']}, relative error {error['relative_error']:.2g} "
            f"(at most {error['worst']:.2g})"
        )
    for note in found["notes"]:
        console.say(f"note: {note}")
