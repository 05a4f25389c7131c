"""calibrate: the blocks of a model through the observers -> Stats. Resumable after every block."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx

from ..arch import Architecture, require_cuttable
from ..base.errors import Refused, UsageError
from ..model import finite
from ..model.checkpoint import Checkpoint
from ..sources.open_model import StrPath, opened
from ..store import step_files
from ..store.arrays import Arrays
from ..store.atomic import replace_file, sweep
from ..store.schema import dump_json
from ..stream import batches, memory, walk as stream
from ..stream.kept import keep
from ..stream.spool import Spool
from ..stream.taps import Tap, replace_module
from ..tensors.packed import matrix
from ..text.corpus import Extent, Rows
from . import gradients
from .accumulators import BlockCosine, HeadContribution, LastToken, Moments, Removal, angles

# site -> (role of the module in the family's table, which side of it)
SITES = {
    "ffn": ("down_proj", "input"),
    "attention": ("o_proj", "input"),
    "attn_ln": ("attn_norm", "output"),
    "ffn_ln": ("ffn_norm", "output"),
}
# Where there is no such norm, what is read is the stream itself.
INSTEAD = {"attn_ln": ("q_proj", "input"), "ffn_ln": ("up_proj", "input")}
# What is measured only when asked for, because it costs more; what a criterion wants of it its table says.
EXTRA = ("contributions", "gradients")
SAVE_EVERY_S = 30.0
LAST = "last"  # in the file of a block: states that become angles in the end


class Statistics(stream.Observer):
    """The observer of calibration. After each block its sums go to ``directory``; hidden states from time to time."""

    def __init__(self, arch: Architecture, directory: Path, save_every_s: float, rounds: int | None = None):
        """``rounds``: number of micro-batches, when contributions are asked for."""
        self.arch, self.directory, self.save_every_s, self.rounds = arch, directory, save_every_s, rounds
        self.sums: list[tuple[str, Any]] = []
        self.cosine, self.last = BlockCosine(), LastToken(True)
        self._last_save = time.monotonic()

    def enter(self, index: int, block: Any, mask: Callable[[], mx.array]) -> None:
        self.cosine, self.last = BlockCosine(), LastToken(index == 0)
        self.sums = [("block", self.cosine), (LAST, self.last)]

        def watch(site: str, accumulator: Callable[[Any], Any]) -> None:
            role, side = SITES[site] if self.arch.has(index, SITES[site][0]) else INSTEAD[site]

            def tap(module: Any) -> Tap:
                self.sums.append((site, accumulator(module)))
                return Tap(module, self.sums[-1][1], mask, side)

            replace_module(block, self.arch.path(index, role), tap)

        if self.rounds:
            kv_heads = self.arch.layer_sizes(index)["kv_head"]
            watch("ffn", lambda m: Removal(matrix(m), self.rounds))
            watch("attention", lambda m: HeadContribution(matrix(m), kv_heads))
        for site in SITES:
            watch(site, lambda m: Moments())

    def seen(self, index: int, before: mx.array, after: mx.array, mask: mx.array) -> None:
        self.cosine.update(before, after, mask)
        self.last.update(before, after, mask)

    def pending(self) -> list[mx.array]:
        return [a for _, m in self.sums for a in m.arrays().values()]

    def leave(self, index: int, hidden: mx.array | Spool) -> None:
        self.save(index, self.directory)
        due = time.monotonic() - self._last_save >= self.save_every_s
        if due and not isinstance(hidden, Spool):  # a spool lies in the directory
            self._save_hidden(index + 1, hidden)

    def save(self, index: int, directory: Path) -> None:
        """Write what has been summed up of a block so far."""
        arrays = {f"{site}.{name}": a for site, m in self.sums for name, a in m.arrays().items()}
        Arrays(arrays, {}).save(directory / f"block-{index:04d}.safetensors")

    def _save_hidden(self, start: int, hidden: mx.array) -> None:
        old = sorted(self.directory.glob("hidden-*.safetensors"))
        Arrays({"hidden": hidden}, {}).save(self.directory / f"hidden-{start:04d}.safetensors")
        for file in old:
            file.unlink()
        self._last_save = time.monotonic()


def calibrate(
    model: StrPath,
    rows: Rows,
    directory: StrPath,
    memory_cap: int | None = None,
    save_every_s: float = SAVE_EVERY_S,
    extra: Sequence[str] = (),
    kept: Path | None = None,
) -> Path:
    """Stream ``rows`` through ``model`` and write ``directory``/stats.safetensors; returns its path.

    Arrays, per layer i: ``{i}.{site}.{name}`` for the sites ffn [ffn] and attention [q_head*head_dim] (inputs of
    down_proj and o_proj), attn_ln and ffn_ln [hidden] (outputs of the norms, or what is read where there are none),
    with the names of accumulators.Moments; and ``{i}.block.cosine`` []; and ``angles`` [layers + 1, layers + 1] between
    the inputs of all blocks, the output of the last one behind them (accumulators.angles). With ``extra``
    "contributions" also ``{i}.ffn.removal`` [ffn] and ``{i}.attention.contribution`` [kv_head] (accumulators.Removal,
    HeadContribution); with "gradients" the arrays of gradients.measure. A directory with the blocks of an interrupted
    call is continued (gradients, which use few rows, from their beginning): same bytes in the end. ``kept``: a
    directory for the hidden states at the end (stream/kept.py). Raises Unsupported for a model that cannot be cut,
    Refused when the estimate of memory exceeds the cap, UsageError for an extra that is not known.
    """
    model, directory = opened(model), Path(directory)
    checkpoint = Checkpoint(model)
    require_cuttable(checkpoint.arch)
    extra = sorted(set(extra))
    check_memory(checkpoint, rows, memory_cap, extra)
    finite.require(checkpoint, finite.outside(checkpoint))  # the walk finds those of the layers
    spooled = memory.must_spool(checkpoint, rows, memory_cap, _held(checkpoint, rows, extra))
    directory.mkdir(parents=True, exist_ok=True)
    sweep(directory)
    _same_inputs(directory, {"model": checkpoint.identity(), "data": rows.digest(), "extra": ", ".join(extra)})
    if len(list(directory.glob("block-*.safetensors"))) < len(checkpoint.arch.layers):
        rounds = len(batches.micro_batches(rows)) if "contributions" in extra else None
        observer = Statistics(checkpoint.arch, directory, save_every_s, rounds)
        spool = directory if spooled else None
        streamed = stream.walk(model, rows, observer, _resume(directory, spooled), "calibrate: block", spool)
        if kept is not None:
            keep(streamed, model, rows, kept)
    more = gradients.measure(model, rows) if "gradients" in extra else {}
    return _merge(checkpoint, rows, directory, more, extra)


class _Cumulative(Statistics):
    """Saves the sums of every block also after some of the rows: ``directories`` by the number of rows."""

    def __init__(self, arch: Architecture, directories: dict[int, Path]):
        super().__init__(arch, next(iter(directories.values())), SAVE_EVERY_S)
        self.directories, self.done = directories, 0

    def seen(self, index: int, before: mx.array, after: mx.array, mask: mx.array) -> None:
        super().seen(index, before, after, mask)
        self.done = (self.done % max(self.directories)) + len(before)
        if self.done in self.directories:
            self.save(index, self.directories[self.done])

    def leave(self, index: int, hidden: mx.array) -> None:
        pass  # the sums of all rows were saved with the last of them


def calibrate_in_parts(
    model: Path, rows: Rows, counts: Sequence[int], directory: Path, memory_cap: int | None = None
) -> dict[int, Path]:
    """The statistics of the first so many rows, for several counts, by one walk: ``directory``/COUNT/stats.safetensors
    as ``calibrate`` writes them, without extras. Counts are moved to the next end of a micro-batch, the last one being
    all rows, by which the files are returned. Not resumable. Raises as ``calibrate``."""
    checkpoint = Checkpoint(model)
    require_cuttable(checkpoint.arch)
    memory.check_memory(checkpoint, rows, memory_cap)
    ends = [part.stop for part in batches.micro_batches(rows)]
    stops = sorted({next(end for end in ends if end >= min(count, rows.count)) for count in (*counts, rows.count)})
    directories = {stop: directory / str(stop) for stop in stops}
    for each in directories.values():
        each.mkdir(parents=True, exist_ok=True)
    stream.walk(model, rows, _Cumulative(checkpoint.arch, directories), what="calibrate in parts: block")
    return {stop: _merge(checkpoint, rows.first(stop), each, {}, ()) for stop, each in directories.items()}


def check_memory(checkpoint: Checkpoint, rows: Rows | Extent, cap: int | None, extra: Sequence[str] = ()) -> int:
    """The estimate of memory, when it stays under ``cap`` (default: what is free now). Raises Refused otherwise."""
    if unknown := sorted({*extra} - {*EXTRA}):
        raise UsageError(f"unknown extra statistics {', '.join(unknown)}", f"choose of {', '.join(EXTRA)}")
    held = _held(checkpoint, rows, extra)
    spooled = memory.must_spool(checkpoint, rows, cap, held)
    needed = memory.required_bytes(checkpoint, rows, spooled) + held
    return max(needed, gradients.check_memory(checkpoint, rows, cap)) if "gradients" in extra else needed


def _held(checkpoint: Checkpoint, rows: Rows | Extent, extra: Sequence[str]) -> int:
    """What the observer of calibration has in memory beside the walk."""
    return contribution_bytes(checkpoint, rows) if "contributions" in extra else 0


def contribution_bytes(checkpoint: Checkpoint, rows: Rows | Extent) -> int:
    """What contributions need beyond a plain walk: both matrices and the Gram matrices of the heads in float32, and a
    few arrays [tokens, ffn] and [tokens, hidden] of a micro-batch."""
    sizes, hidden = checkpoint.arch.layer_sizes(0), checkpoint.arch.sizes["hidden"]
    wide = sizes["group"] * sizes["head_dim"]
    attention = sizes["kv_head"] * wide
    tokens = batches.micro_batch(rows) * rows.length
    matrices = (sizes["ffn"] + attention) * hidden + sizes["kv_head"] * wide**2
    return 4 * (matrices + tokens * (4 * sizes["ffn"] + 2 * attention + hidden))


def _same_inputs(directory: Path, inputs: dict[str, str]) -> None:
    """Blocks of another model or other rows must not be mixed in. Raises Refused when they lie there."""
    note = directory / "inputs.json"
    if note.exists() and step_files.note(note) != inputs:
        raise Refused(f"{directory} holds statistics begun with another model, other text or extras", "remove it first")
    replace_file(note, dump_json(inputs))


def _resume(directory: Path, spooled: bool) -> stream.Resume | None:
    """Where an interrupted walk goes on: at the last hidden states, if all blocks before them are there."""
    for file in sorted(directory.glob("hidden-*.safetensors"), reverse=True):
        start = int(file.stem.split("-")[1])
        if all((directory / f"block-{i:04d}.safetensors").exists() for i in range(start)):
            return stream.Resume(start, Spool(file) if spooled else mx.load(str(file))["hidden"])
    return None


def _merge(
    checkpoint: Checkpoint, rows: Rows, directory: Path, more: dict[str, mx.array], extra: Sequence[str]
) -> Path:
    arrays = dict(more)
    blocks = [directory / f"block-{i:04d}.safetensors" for i in range(len(checkpoint.arch.layers))]
    states: list[mx.array] = []
    for index, file in enumerate(blocks):
        found = mx.load(str(file))
        states += [found.pop(f"{LAST}.{side}") for side in ("before", "after") if f"{LAST}.{side}" in found]
        arrays |= {f"{index}.{name}": array for name, array in found.items()}
    arrays["angles"] = angles(states)
    path = directory / "stats.safetensors"
    about = {"tokens": rows.total, "rows": rows.count, "data": rows.digest(), "layers": len(blocks)}
    about |= {"model": checkpoint.identity(), "extra": list(extra)}
    Arrays(arrays, about).save(path)
    for file in [*blocks, *directory.glob("hidden-*.safetensors"), directory / "inputs.json"]:
        file.unlink(missing_ok=True)
    return path
