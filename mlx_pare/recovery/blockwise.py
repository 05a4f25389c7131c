"""local: heal a pruned model block by block, so that it fits wherever a block fits.

Two streams, as in reconstruct, the other way round: the pruned model is walked, and before each of its blocks the
original's stream is led on to where that block should end. The block is trained to get there from the pruned model's
own input, packed as it will be stored, taken if that comes nearer on held-out rows, and the pruned stream goes on
through what was taken: what comes later makes up for what is still missing.
Memory: hidden states of both streams, one block of each model, what training one block takes (``training_bytes``).
What became of a block lies in a file of its own beside the result until that is complete: an interrupted call leads
both streams through what is done, which costs a forward pass, and trains what is left.
"""

from __future__ import annotations

import math
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from .. import lm
from ..arch import Tensor
from ..base import console
from ..base.errors import PareError, Refused, UsageError
from ..base.units import gb
from ..evaluation import divergence
from ..lm.cpu_math import MOST_KEPT
from ..model import replace_tensors
from ..model.checkpoint import Checkpoint
from ..pruning.survivors import survivors
from ..store import step_files
from ..store.arrays import Arrays
from ..store.atomic import created, is_ours, refuse_existing, replace_file
from ..store.schema import dump_json
from ..stream import batches, memory, walk as stream
from ..text.corpus import Extent, Rows
from .block_trainer import METHODS, Options, result_at, train, trainable, unrounded

FLOOR = 0.01  # of the mean energy of the channels: none weighs more than a hundred average ones
NOTHING = 1e-9  # an error that is rounding: both streams are one up to here

__all__ = ["Options", "check_memory", "local"]


def local(
    student: Path,
    teacher: Path,
    rows: Rows,
    held: Rows,
    out: Path,
    options: Options,
    memory_cap: int | None = None,
) -> dict[str, Any]:
    """Write the healed model to ``out``; returns what happened to each block and the KL divergence to the teacher on
    ``held`` rows, nats per token, before and after. A result that is not better than the student is not kept: ``out``
    is then the student, byte for byte, and "improved" false.

    ``rows`` and ``held`` have the same length. Raises UsageError for an unknown method, PareError for models that are
    no pair or where the hidden size was cut, Refused when ``out`` exists or the estimate of memory exceeds the cap.
    """
    if options.method not in METHODS:
        raise UsageError(f"unknown method {options.method!r}", f"choose one of {', '.join(METHODS)}")
    refuse_existing(out)
    begun, pair = time.monotonic(), (Checkpoint(student), Checkpoint(teacher))
    ends, joined = block_ends(*pair), rows.joined(held)
    check_memory(*pair, joined, options, memory_cap)
    scratch = out.with_name(out.name + ".blocks")
    _begin(scratch, pair, (rows, held), options)
    with console.progress("local: step", len(ends) * options.steps) as bar:
        healer = _Healer(pair, ends, joined, rows.count, options, scratch, bar)
        stream.walk(student, joined, healer, what=None)
    summary = {"options": asdict(options), "blocks": healer.done, "improved": False}
    with created(out) as place:
        place.mkdir()
        replace_tensors.write_stored(pair[0], lambda tensor: _entries(pair[0], tensor, scratch), place)
        summary |= _judged(teacher, student, place, held)
        if not summary["improved"]:
            console.warn("healing block by block did not improve the KL divergence: the pruned model is kept as it was")
            shutil.rmtree(place)
            shutil.copytree(student, place)
    shutil.rmtree(scratch)
    return summary | {"seconds": time.monotonic() - begun}


def block_ends(student: Checkpoint, teacher: Checkpoint) -> list[int]:
    """For every block of the student, after how many of the teacher's blocks the stream is that it should give: where
    the next one begins in the teacher, or its end. So the block before layers that are gone makes up for them, and the
    ones behind for what it could not (benchmarks/LOG.md).

    Raises PareError where blocks do not correspond, and where the hidden size was cut."""
    ours, theirs = student.arch, teacher.arch
    for size, why in (("hidden", "block by block it cannot be recovered: what was cut there is not in the stream"),
                      ("vocab", "they are no pair")):  # fmt: skip
        if ours.sizes[size] != theirs.sizes[size]:
            raise PareError(
                f"{student.path} has a {size} size of {ours.sizes[size]}, {teacher.path} {theirs.sizes[size]}: {why}",
                "use a global recovery, or leave hidden out of --axes" if size == "hidden" else "give the original",
            )
    sources = _sources(student, len(theirs.layers))
    return [*sources[1:], len(theirs.layers)]


def _sources(student: Checkpoint, theirs: int) -> list[int]:
    """Which of the teacher's layers every layer of the student was."""
    file, count, why = student.path / "survivors.json", len(student.arch.layers), ""
    try:
        sources = [layer["source"] for layer in survivors(file)["layers"]] if file.exists() else list(range(count))
    except PareError as error:
        sources, why = [], f": {error.problem}"
    if len(sources) != count or sources[-1] >= theirs or (not file.exists() and count != theirs):
        raise PareError(
            f"{student.path} does not say which of the {theirs} layers of the original its {count} are{why}",
            "survivors.json next to the weights says it for a model that mlx-pare pruned",
        )
    return sources


# ---- memory ----


def training_bytes(student: Checkpoint, rows: Rows | Extent, options: Options) -> int:
    """What training takes at most: the widest block in float32, as it is and with what was learnt, its gradients, both
    moments of Adam in full training, and what a batch computes, kept until it is differentiated. An estimate."""
    arch = student.arch
    sizes: dict[int | None, int] = {}
    for tensor in arch.tensors():
        sizes[tensor.layer] = sizes.get(tensor.layer, 0) + tensor.size
    widest = max(size for layer, size in sizes.items() if layer is not None)
    heads, length = arch.largest("kv_head", "group"), rows.length
    units = 9 * arch.largest("ffn") + 18 * arch.sizes["hidden"] + 5 * heads * length
    computed, kept = 4 * min(options.batch, rows.count) * length * units, swift_kept(student, rows, options)
    if lm.cpu_backend() and kept <= MOST_KEPT:
        computed = max(computed, kept)
    return 4 * widest * {"lora": 3, "full": 5}[options.method] + computed


def swift_kept(student: Checkpoint, rows: Rows, options: Options) -> int:
    """What a batch keeps under backend.swift."""
    return lm.swift_kept(student.arch, min(options.batch, rows.count) * rows.length)


def check_memory(
    student: Checkpoint, teacher: Checkpoint, rows: Rows | Extent, options: Options, cap: int | None
) -> int:
    """The estimate, when it stays under the cap (default: what is free). Raises Refused otherwise."""
    state = rows.count * rows.length * student.arch.sizes["hidden"] * memory.state_width(student)
    training = training_bytes(student, rows, options)
    instead = f" and training a block {gb(training)}), or a smaller batch"
    needed = memory.check_memory(student, rows, cap, state + training, instead)
    return max(needed, memory.check_memory(teacher, rows, cap, state))


# ---- on the disk ----


def _begin(scratch: Path, pair: Sequence[Checkpoint], rows: Sequence[Rows], options: Options) -> None:
    """A directory for blocks that are done. Raises Refused when blocks of something else lie there, or other files."""
    models = [checkpoint.identity() for checkpoint in pair]
    inputs = {"models": models, "rows": [each.digest() for each in rows], "options": asdict(options)}
    scratch.mkdir(parents=True, exist_ok=True)
    note = scratch / "inputs.json"
    if not note.exists() and not all(is_ours(file.name) for file in scratch.iterdir()):
        raise Refused(f"{scratch} was not made by mlx-pare", "move it away")
    if note.exists() and step_files.note(note) != inputs:
        raise Refused(f"{scratch} was begun with other models, rows or options", "remove it first")
    replace_file(note, dump_json(inputs))


def _file(scratch: Path, index: int) -> Path:
    return scratch / f"block-{index:04d}.safetensors"


def _entries(checkpoint: Checkpoint, tensor: Tensor, scratch: Path) -> dict[str, mx.array] | None:
    """What became of a tensor, as it is stored, unread; None: it stays as it was."""
    if tensor.layer is None:
        return None
    found = mx.load(str(_file(scratch, tensor.layer)))
    return {name: found[name] for name in replace_tensors.names(checkpoint, tensor)} if tensor.name in found else None


def _judged(teacher: Path, student: Path, made: Path, held: Rows) -> dict[str, Any]:
    """KL divergence of both to the teacher, measured from what is written."""
    reference = stream.walk(teacher, held, what="teacher: block")
    before, after = (
        float(divergence.measure(held, stream.walk(path, held, what=f"{what}: block"), reference)["kl"].mean())
        for path, what in ((student, "pruned"), (made, "healed"))
    )
    return {"kl_before": before, "kl_after": after if after < before else before, "improved": after < before}


# ---- the two streams ----


class _Healer(stream.Observer):
    """The observer of a walk of the student that leads the teacher's stream along and trains every block."""

    def __init__(
        self,
        pair: Sequence[Checkpoint],
        ends: list[int],
        rows: Rows,
        count: int,
        options: Options,
        scratch: Path,
        bar: console.Progress,
    ):
        """Only the first ``count`` rows are trained on; the others judge."""
        self.student, self.teacher = pair
        self.ends, self.rows, self.count, self.options, self.scratch, self.bar = (
            ends, rows, count, options, scratch, bar,
        )  # fmt: skip
        self.tensors: list[list[Tensor]] = [[] for _ in ends]
        for tensor in self.student.arch.tensors():
            if tensor.layer is not None:
                self.tensors[tensor.layer].append(tensor)
        self.mask = mx.array(rows.mask().astype(np.float32))
        self.target: mx.array | None = None  # the teacher's stream, as far as it was led
        self.reached = 0
        self.done: list[dict[str, Any]] = []

    # ---- what the engine calls ----

    def called(self, index: int, x: mx.array, args: tuple, kwargs: dict) -> None:
        mx.eval(x)
        self.x, self.args, self.kwargs = x, args, kwargs

    def enter(self, index: int, block: Any, mask: Callable[[], mx.array]) -> Any:
        stop = self.ends[index]
        self.target = stream.advance(self.teacher.path, self.rows, self.target, self.reached, stop)
        self.reached = stop
        file = _file(self.scratch, index)
        if file.exists():
            self.bar.skip(self.options.steps)
            about, new = Arrays.described(file, "block"), mx.load(str(file))
        else:
            about, new = self._healed(index, block)
            Arrays(new, about).save(file)
        self.done.append({name: value for name, value in about.items() if name != "schema"})
        return self._with(index, new) if about["taken"] else None

    def leave(self, index: int, hidden: mx.array) -> None:
        del self.x, self.args, self.kwargs

    # ---- one block ----

    def _healed(self, index: int, block: nn.Module) -> tuple[dict[str, Any], dict[str, mx.array]]:
        """What happened to a block, and its new tensors as they are stored, if they are taken."""
        begun, draw = time.monotonic(), np.random.RandomState([self.options.seed, index])
        self.weights = self._weigh()
        before, what = self._error(block), f"block {index + 1}/{len(self.ends)}"
        if before < NOTHING:
            self.bar.skip(self.options.steps)
            return self._about(index, begun, before, before, before), {}
        fresh = trainable(lm.blocks(lm.load(self.student.path))[index], self.options, draw)
        train(
            fresh, self._loss, self.count, self.options, draw,
            lambda value: self.bar.advance(1, f"{what}, error {before:.4f}, loss {value:.4f}"),
            swift_kept(self.student, self.rows, self.options),
        )  # fmt: skip
        new = self._stored(index, fresh)
        trained, after = self._error(unrounded(fresh)), self._error(self._with(index, new))
        about = self._about(index, begun, before, trained, after)
        told = "" if about["taken"] else ", which is not taken"
        console.say(f"local: {what}, error {before:.4f} -> {after:.4f}{told}")
        return about, new if about["taken"] else {}

    def _about(self, index: int, begun: float, before: float, trained: float, after: float) -> dict[str, Any]:
        """What the result says of a block; an error that is not a number is null."""
        errors = {"before": before, "trained": trained, "after": after}
        about = {name: value if math.isfinite(value) else None for name, value in errors.items()}
        about |= {"block": index, "teacher": self.ends[index], "taken": after < before}
        return about | {"seconds": time.monotonic() - begun}

    def _stored(self, index: int, block: nn.Module) -> dict[str, mx.array]:
        """The tensors that were trained, as they are stored."""
        new: dict[str, mx.array] = {}
        for tensor in self.tensors[index]:
            if self.options.method == "full" or tensor.matrix:
                new |= replace_tensors.stored(self.student, tensor, result_at(block, tensor.spec.name))
        mx.eval(new)
        return new

    def _with(self, index: int, new: dict[str, mx.array]) -> nn.Module:
        """The block as it will be loaded from what is stored, to compute on this device."""
        block = lm.blocks(lm.load(self.student.path))[index]
        for tensor in self.tensors[index]:
            module = block
            for part in tensor.spec.name.split(".")[:-1]:
                module = getattr(module, part)
            for name in replace_tensors.names(self.student, tensor):
                if name in new:
                    setattr(module, name.rpartition(".")[2], new[name])
        return lm.for_backend(block)

    def _run(self, block: nn.Module, rows: Any) -> mx.array:
        args, kwargs = batches.shares(self.rows, rows, self.args, self.kwargs)
        after = block(self.x[rows], *args, **kwargs)
        return (after[0] if isinstance(after, tuple) else after).astype(mx.float32)

    def _missing(self, rows: Any) -> mx.array:
        """What a block has to add to the stream, [rows, length, hidden]."""
        return self.target[rows].astype(mx.float32) - self.x[rows].astype(mx.float32)

    def _weigh(self) -> mx.array:
        """The weight of every channel [hidden]: the inverse of the mean square of what has to be added to it on the
        training rows, with a floor, so that a few channels with large values do not decide everything; divided by the
        number of channels, so that a block that adds nothing misses about 1 per token."""
        sums = mx.zeros(self.x.shape[-1])
        for part in batches.micro_batches(self.rows.first(self.count)):
            sums = sums + (mx.square(self._missing(part)) * self.mask[part][..., None]).sum(axis=(0, 1))
            mx.eval(sums)
        energy = sums / self.mask[: self.count].sum()
        return 1 / (energy + FLOOR * energy.mean() + 1e-30) / len(energy)

    def _missed(self, block: nn.Module, rows: Any) -> mx.array:
        """Weighted squares of what a block misses of the teacher's stream, summed over the channels, [rows, length]."""
        difference = self._run(block, rows) - self.target[rows].astype(mx.float32)
        return (mx.square(difference) * self.weights).sum(axis=-1)

    def _loss(self, block: nn.Module, rows: mx.array) -> mx.array:
        mask = self.mask[rows]
        return (self._missed(block, rows) * mask).sum() / mx.maximum(mask.sum(), 1)

    def _error(self, block: nn.Module) -> float:
        """The weighted share of what the block has to add that is missed, in squares, on the rows that judge."""
        missed = added = 0.0
        for part in batches.micro_batches(self.rows, self.count):
            added += ((mx.square(self._missing(part)) * self.weights).sum(axis=-1) * self.mask[part]).sum().item()
            missed += (self._missed(block, part) * self.mask[part]).sum().item()
        return missed / max(added, 1e-30)
