"""calibrate: the observers watch the blocks of a model and write Stats.

A call continues an interrupted one from the last hidden states that were saved.
"""

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
from ..stream.experts import Routed
from ..stream.kept import keep
from ..stream.spool import Spool
from ..stream.taps import Tap, replace_module
from ..tensors.packed import matrix
from ..text.corpus import Extent, Rows
from . import gradients
from .accumulators import BlockCosine, HeadContribution, LastToken, Moments, Removal, RoutedSums, angles
from .source import read_stats

# site -> (role of the module in the family's table, side of the module that is watched)
SITES = {
    "ffn": ("down_proj", "input"),
    "attention": ("o_proj", "input"),
    "attn_norm": ("attn_norm", "output"),
    "ffn_norm": ("ffn_norm", "output"),
}
# If a layer has no such norm, its matrices read the stream itself, which is watched instead.
INSTEAD = {"attn_norm": ("q_proj", "input"), "ffn_norm": ("up_proj", "input")}
# Measured only on request, because it costs more. Criterion.extra names what a criterion needs.
EXTRA = ("contributions", "gradients")
SAVE_EVERY_S = 30.0
LAST = "last"  # in the file of a block: states from which _merge computes the angles


class Statistics(stream.Observer):
    """The observer of calibration: it writes the sums of each block, and from time to time hidden states."""

    def __init__(self, arch: Architecture, directory: Path, save_every_s: float, rounds: int | None = None):
        """Prepare for a walk.

        Args:
            arch: the architecture of the model.
            directory: where the sums and the hidden states go; it exists.
            save_every_s: seconds between two saves of hidden states that are in memory.
            rounds: number of micro-batches. If None, contributions are not measured.
        """
        self.arch, self.directory, self.save_every_s, self.rounds = arch, directory, save_every_s, rounds
        self.sums: list[tuple[str, Any]] = []
        self.cosine, self.last = BlockCosine(), LastToken(True)
        self._last_save = time.monotonic()

    def enter(self, index: int, block: Any, mask: Callable[[], mx.array]) -> None:
        """Put taps around the watched modules of a block, each with a fresh accumulator.

        Args:
            index: number of the layer.
            block: the block; some of its submodules are replaced.
            mask: returns the mask of the current micro-batch, True where there is text, bool [rows, tokens].
        """
        self.cosine, self.last = BlockCosine(), LastToken(index == 0)
        self.sums = [("block", self.cosine), (LAST, self.last)]

        def watch(site: str, accumulator: Callable[[Any], Any]) -> None:
            role, side = SITES[site] if self.arch.has(index, SITES[site][0]) else INSTEAD[site]

            def tap(module: Any) -> Tap:
                self.sums.append((site, accumulator(module)))
                return Tap(module, self.sums[-1][1], mask, side)

            replace_module(block, self.arch.path(index, role), tap)

        if self.arch.uses("expert"):
            if "expert" in self.arch.units(index):
                self._watch_experts(index, block, mask)
            return
        if self.rounds:
            kv_heads = self.arch.layer_sizes(index)["kv_head"]
            watch("ffn", lambda m: Removal(matrix(m), self.rounds))
            if "kv_head" in self.arch.units(index):
                watch("attention", lambda m: HeadContribution(matrix(m), kv_heads))
        for site in SITES:
            if site != "attention" or "kv_head" in self.arch.units(index):
                watch(site, lambda m: Moments())

    def _watch_experts(self, index: int, block: Any, mask: Callable[[], mx.array]) -> None:
        routed, sums = Routed.put(block, self.arch, index), RoutedSums(self.arch.units(index)["expert"])
        self.sums.append(("expert", sums))

        def add(x: mx.array, _: mx.array) -> None:
            chosen = routed.chosen(x)
            sums.update(chosen.experts, chosen.weights, chosen.outputs, mask())

        routed.watch = add

    def seen(self, index: int, before: mx.array, after: mx.array, mask: mx.array) -> None:
        """Add the input and output of the block for a micro-batch.

        Args:
            index: number of the layer.
            before: states that go into the block [rows, tokens, hidden].
            after: states that come out of it [rows, tokens, hidden].
            mask: True where there is text, bool [rows, tokens].
        """
        self.cosine.update(before, after, mask)
        self.last.update(before, after, mask)

    def pending(self) -> list[mx.array]:
        """Return the sums that are evaluated with the micro-batch.

        Returns:
            All arrays of the accumulators of this block.
        """
        return [a for _, m in self.sums for a in m.arrays().values()]

    def leave(self, index: int, hidden: mx.array | Spool) -> None:
        """Write the sums of the block, and the hidden states if they are in memory and a save is due.

        Args:
            index: number of the layer.
            hidden: states of all rows after the block [rows, tokens, hidden]; a Spool is in ``directory`` already.
        Raises:
            PareError: the disk is full or cannot be written.
        """
        self.save(index, self.directory)
        due = time.monotonic() - self._last_save >= self.save_every_s
        if due and not isinstance(hidden, Spool):  # a spool is in the directory already
            self._save_hidden(index + 1, hidden)

    def save(self, index: int, directory: Path) -> None:
        """Write the sums of a block so far to ``directory``/block-INDEX.safetensors."""
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
    """Stream ``rows`` through ``model`` and write ``directory``/stats.safetensors.

    The file holds float32 arrays, for each layer i:
    ``{i}.{site}.{name}``: the sums that accumulators.Moments names. Sites are ffn [ffn] and attention [q_head*head_dim]
    (inputs of down_proj and o_proj), attn_norm and ffn_norm [hidden] (outputs of the norms, or the stream itself if a
    layer has no such norm).
    ``{i}.block.cosine`` []: accumulators.BlockCosine. With experts: no sites, but ``{i}.expert.{name}`` (RoutedSums).
    With "contributions": ``{i}.ffn.removal`` [ffn] (accumulators.Removal), ``{i}.attention.contribution`` [kv_head]
    (HeadContribution). With "gradients": the arrays of gradients.measure.
    Once for the model: ``angles`` [layers + 1, layers + 1] between the inputs of all blocks, with the output of the
    last block at the end (accumulators.angles).

    If ``directory`` holds blocks of an interrupted call, this call continues it. On the CPU it writes the same bytes in
    the end, on a GPU the same up to rounding. Gradients, which use few rows, start again.

    Args:
        model: model directory, GGUF file, or name of a model that can be downloaded.
        rows: the text, tokens [rows, length].
        directory: where the file and everything unfinished go; it is created if needed.
        memory_cap: bytes of memory to stay under; if None, what is free now. States that do not fit are spooled.
        save_every_s: seconds between two saves of hidden states that are in memory.
        extra: names out of EXTRA to measure as well.
        kept: directory for the hidden states at the end (stream/kept.py); unused if every block was already done.
    Returns:
        Path of stats.safetensors.
    Raises:
        Unsupported: the model cannot be cut.
        UsageError: an extra or the name of the model is unknown, or the model does not know a token.
        Refused: not even spooled states fit under the cap, or ``directory`` holds a calibration of other inputs.
        PareError: the model cannot be opened or spooled, holds or computes NaN or infinite numbers, or the disk is
            full; for gradients also as in gradients.measure.
    """
    model, directory = opened(model), Path(directory)
    checkpoint = Checkpoint(model)
    require_cuttable(checkpoint.arch)
    extra = sorted(set(extra))
    check_memory(checkpoint, rows, memory_cap, extra)
    finite.require(checkpoint, finite.outside(checkpoint))  # the walk checks the layers
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
    """Saves the sums of every block also after some of the rows.

    ``directories``: where to, by the number of rows; the largest number is that of all rows.
    """

    def __init__(self, arch: Architecture, directories: dict[int, Path]):
        super().__init__(arch, next(iter(directories.values())), SAVE_EVERY_S)
        self.directories, self.done = directories, 0

    def seen(self, index: int, before: mx.array, after: mx.array, mask: mx.array) -> None:
        super().seen(index, before, after, mask)
        self.done = (self.done % max(self.directories)) + len(before)
        if self.done in self.directories:
            self.save(index, self.directories[self.done])

    def leave(self, index: int, hidden: mx.array) -> None:
        pass  # ``seen`` saved the sums of all rows


def calibrate_in_parts(
    model: Path, rows: Rows, counts: Sequence[int], directory: Path, memory_cap: int | None = None
) -> dict[int, Path]:
    """Write the statistics of the first rows, for several counts, by one walk.

    They go to ``directory``/COUNT/stats.safetensors as ``calibrate`` writes them, without extras. An interrupted call
    cannot be continued. Hidden states stay in memory; unlike ``calibrate``, it never spools them.

    Args:
        model: model directory.
        rows: the text, tokens [rows, length].
        counts: numbers of rows; each is raised to the next end of a micro-batch, at most to all rows.
        directory: where the folders go; it is created if needed.
        memory_cap: bytes of memory to stay under; if None, what is free now.
    Returns:
        Path of the file by the number of rows it was written for; all rows are always among them.
    Raises:
        Unsupported: the model cannot be cut.
        Refused: the estimate of memory exceeds the cap.
        UsageError: the model does not know a token.
        PareError: the model cannot be read, computes NaN or infinite numbers, or the disk is full.
    """
    checkpoint = Checkpoint(model)
    require_cuttable(checkpoint.arch)
    finite.require(checkpoint, finite.outside(checkpoint))  # the walk checks the layers
    memory.check_memory(checkpoint, rows, memory_cap)
    ends = [part.stop for part in batches.micro_batches(rows)]
    stops = sorted({next(end for end in ends if end >= min(count, rows.count)) for count in (*counts, rows.count)})
    directories = {stop: directory / str(stop) for stop in stops}
    for each in directories.values():
        each.mkdir(parents=True, exist_ok=True)
    stream.walk(model, rows, _Cumulative(checkpoint.arch, directories), what="calibrate in parts: block")
    return {stop: _merge(checkpoint, rows.first(stop), each, {}, ()) for stop, each in directories.items()}


def check_memory(checkpoint: Checkpoint, rows: Rows | Extent, cap: int | None, extra: Sequence[str] = ()) -> int:
    """Estimate the memory of ``calibrate`` and check that it stays under a cap.

    Args:
        checkpoint: the model.
        rows: the text, tokens [rows, length], or its extent.
        cap: bytes; if None, what is free now.
        extra: names out of EXTRA that are measured as well.
    Returns:
        Estimate of the peak in bytes; with spooled states if they do not fit otherwise.
    Raises:
        UsageError: an extra is unknown.
        Refused: not even spooled states fit under the cap, or the gradients do not.
    """
    if unknown := sorted({*extra} - {*EXTRA}):
        raise UsageError(f"unknown extra statistics {', '.join(unknown)}", f"choose of {', '.join(EXTRA)}")
    if extra and checkpoint.arch.uses("expert"):
        raise UsageError(f"{' and '.join(extra)} of experts are not measured", "choose another --criterion")
    held = _held(checkpoint, rows, extra)
    spooled = memory.must_spool(checkpoint, rows, cap, held)
    needed = memory.required_bytes(checkpoint, rows, spooled) + held
    return max(needed, gradients.check_memory(checkpoint, rows, cap)) if "gradients" in extra else needed


def _held(checkpoint: Checkpoint, rows: Rows | Extent, extra: Sequence[str]) -> int:
    """Return the bytes that the observer of calibration holds in addition to the walk."""
    return contribution_bytes(checkpoint, rows) if "contributions" in extra else 0


def contribution_bytes(checkpoint: Checkpoint, rows: Rows | Extent) -> int:
    """Estimate what contributions need in addition to a plain walk.

    These are both matrices and the Gram matrices of the heads in float32, and a few arrays [tokens, ffn],
    [tokens, q_head*head_dim] and [tokens, hidden] of a micro-batch.

    Args:
        checkpoint: the model; the first layer stands for all.
        rows: the text, tokens [rows, length], or its extent.
    Returns:
        Bytes.
    """
    sizes, hidden = checkpoint.arch.layer_sizes(0), checkpoint.arch.sizes["hidden"]
    wide = sizes["group"] * sizes["head_dim"]
    attention = sizes["kv_head"] * wide
    tokens = batches.micro_batch(rows) * rows.length
    matrices = (sizes["ffn"] + attention) * hidden + sizes["kv_head"] * wide**2
    return 4 * (matrices + tokens * (4 * sizes["ffn"] + 2 * attention + hidden))


def _same_inputs(directory: Path, inputs: dict[str, str]) -> None:
    """Note the inputs in ``directory``. Raises Refused if a calibration of other inputs was begun there."""
    note = directory / "inputs.json"
    if note.exists() and step_files.note(note) != inputs:
        raise Refused(f"{directory} holds statistics begun with another model, other text or extras", "remove it first")
    replace_file(note, dump_json(inputs))


def _resume(directory: Path, spooled: bool) -> stream.Resume | None:
    """Return the last saved hidden states whose earlier blocks are all there; None if there are none."""
    for file in sorted(directory.glob("hidden-*.safetensors"), reverse=True):
        start = int(file.stem.split("-")[1])
        if all((directory / f"block-{i:04d}.safetensors").exists() for i in range(start)):
            return stream.Resume(start, Spool(file) if spooled else mx.load(str(file))["hidden"])
    return None


def _merge(
    checkpoint: Checkpoint, rows: Rows, directory: Path, more: dict[str, mx.array], extra: Sequence[str]
) -> Path:
    """Write stats.safetensors from the files of the blocks and ``more``, remove these files, and return its path."""
    arrays = dict(more)
    blocks = [directory / f"block-{i:04d}.safetensors" for i in range(len(checkpoint.arch.layers))]
    states: list[mx.array] = []
    for index, file in enumerate(blocks):
        found = read_stats(file)
        mx.eval(found)  # a lazy array keeps its file open, and macOS allows 256
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
