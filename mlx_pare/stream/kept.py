"""Results on the original that several steps of a run need, computed once and kept on disk until the run is done.

The final hidden states of a model on some rows lie in a file that is named after both. Contenders are compared with
them, recovery learns from them, and a process that continues after a kill finds them. Next to them lie the matrices of
contenders that were reconstructed together (pipeline/contenders.py). Every name appears when its content is complete.
"""

from __future__ import annotations

import hashlib
import os
import shutil
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryDirectory

import mlx.core as mx

from ..base.errors import PareError
from ..model.checkpoint import Checkpoint
from ..text.corpus import Rows
from . import batches, memory, walk as stream
from .head import Streamed
from .spool import NAME, Spool

OURS = ("states-*", "repair-*", "walk.partial-*")


def end_of(
    model: Path,
    rows: Rows,
    kept: Path | None,
    memory_cap: int | None = None,
    what: str = "forward",
    whole: bool = False,
) -> Streamed:
    """Return the end of a walk: from the directory of kept states, or by a walk whose states are then kept there.

    Args:
        model: model directory.
        rows: the rows to walk over.
        kept: the directory. None: walk, and keep the states in memory only; nothing checks the memory then.
        memory_cap: bytes; None: the memory that is free now.
        what: how the progress of the walk is called.
        whole: load kept states into memory; otherwise they are read from the file when they are needed.

    Returns:
        Hidden states [rows, length, hidden] after the final norm, and the head.

    Raises:
        Refused: ``kept`` is given, the states are not there, and a walk needs more memory than ``memory_cap``.
        UsageError, PareError: as ``walk``.
    """
    if kept is None:
        return stream.walk(model, rows, what=what)
    if not has(model, rows, kept):
        spooled = memory.must_spool(Checkpoint(model), rows, memory_cap)
        kept.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(dir=kept, prefix="walk.partial-") as scratch:
            keep(stream.walk(model, rows, what=what, spool=Path(scratch) if spooled else None), model, rows, kept)
    file = _file(model, rows, kept)
    return stream.ended(model, mx.load(str(file))[NAME] if whole else Spool(file))


def has(model: Path, rows: Rows, kept: Path) -> bool:
    """Check whether the states are kept, as a whole.

    Args:
        model: model directory.
        rows: the rows of the walk.
        kept: the directory of kept states.

    Returns:
        Whether there is a file for this model and these rows, and it is not cut off.
    """
    file = _file(model, rows, kept)
    try:
        return file.exists() and bool(Spool(file).shape)
    except PareError:  # the disk lost some of it
        return False


def keep(streamed: Streamed, model: Path, rows: Rows, kept: Path) -> None:
    """Keep the states at the end of a walk.

    Args:
        streamed: the end of the walk.
        model: model directory of the walk.
        rows: the rows of the walk.
        kept: the directory for it, which is created if it is not there.
    """
    kept.mkdir(parents=True, exist_ok=True)
    file = _file(model, rows, kept)
    written = None
    for part in batches.micro_batches(rows):
        states = streamed.hidden[part]
        if written is None:
            written = Spool.create(file.with_suffix(".tmp"), (rows.count, *states.shape[1:]), states.dtype)
        written.write(part, states)
    written.finish()
    os.replace(written.path, file)


def _file(model: Path, rows: Rows, kept: Path) -> Path:
    about = f"{Checkpoint(model).identity()} {rows.digest()} {memory.STATE_BYTES}"
    return kept / f"states-{hashlib.sha256(about.encode()).hexdigest()[:32]}.safetensors"


def clear(kept: Path) -> None:
    """Delete what is kept there, when no step needs it any more. Files that mlx-pare did not write stay."""
    for pattern in OURS:
        for place in kept.glob(pattern):
            shutil.rmtree(place, ignore_errors=True) if place.is_dir() else place.unlink(missing_ok=True)
    with suppress(OSError):  # the directory is not empty, or not there
        kept.rmdir()
