"""local: heal a pruned model block by block. This needs the memory of a block, not of the model.

There are two streams, as in reconstruct, but the other way round: the pruned model is walked. Before each of its blocks
the original's stream is led on to where that block should end. The block is trained to get there from the pruned
model's own input, and is packed as it will be stored. It is taken if it then comes nearer on held-out rows. The pruned
stream goes on through the taken block, so that later blocks make up for what is still missing.
Memory: hidden states of both streams, one block of each model, what training one block takes (``training_bytes``).
Each finished block has a file next to the result until the result is complete. After an interruption, a call leads both
streams through the finished blocks, which costs a forward pass, and trains the others.
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
from ..base.plain_path import is_litter
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

FLOOR = 0.01  # share of the channels' mean energy: no channel weighs more than a hundred average ones
NOTHING = 1e-9  # an error of mere rounding: up to here both streams are the same

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
    """Heal a pruned model block by block and write it to ``out``.

    A result that is not better than the student is not kept: ``out`` is then the student, byte for byte.

    Args:
        student: directory of the pruned model.
        teacher: directory of the original.
        rows: token rows to train on.
        held: token rows that judge, of the same length.
        out: directory of the result. What is done of the blocks lies in OUT.blocks until the result is complete.
        options: how each block is trained.
        memory_cap: bytes that may be used; None: the memory that is free.
    Returns:
        "options"; "blocks": the errors of each block and whether its training was taken; "kl_before" and "kl_after":
        KL divergence to the teacher on ``held``, nats per token; "improved"; "seconds".
    Raises:
        UsageError: the method is unknown.
        PareError: the models are no pair, the hidden size was cut, or ``rows`` and ``held`` differ in length.
        Refused: ``out`` exists, the blocks in OUT.blocks are of another call, or the memory does not suffice.
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
    """For every block of the student, after how many blocks of the teacher it should end.

    This is where the student's next block begins in the teacher, or the teacher's end. So the block before removed
    layers makes up for them, and the blocks after it for what it could not (benchmarks/LOG.md).

    Raises PareError if blocks do not correspond, or if the hidden size was cut."""
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
    """For every layer of the student, the number of its layer in the teacher."""
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
    """Estimate the memory that training a block takes at most.

    It holds the widest block in float32, as it is and as it is learnt, its gradients, and in full training both moments
    of Adam. What a batch computes is kept until it is differentiated.

    Args:
        student: the pruned model.
        rows: rows to train on, or their number and length.
        options: method and batch.
    Returns:
        Bytes.
    """
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
    """Estimate what gradients of a batch keep under backend.swift.

    Args:
        student: the pruned model.
        rows: rows to train on, or their number and length.
        options: ``batch`` is how many rows go together.
    Returns:
        Bytes.
    """
    return lm.swift_kept(student.arch, min(options.batch, rows.count) * rows.length)


def check_memory(
    student: Checkpoint, teacher: Checkpoint, rows: Rows | Extent, options: Options, cap: int | None
) -> int:
    """Check that healing block by block fits in memory.

    Args:
        student: the pruned model.
        teacher: the original.
        rows: all rows, those that judge included, or their number and length.
        options: method and batch.
        cap: bytes that may be used; None: the memory that is free.
    Returns:
        The estimate in bytes.
    Raises:
        Refused: the estimate exceeds the cap.
    """
    state = rows.count * rows.length * student.arch.sizes["hidden"] * memory.STATE_BYTES
    training = training_bytes(student, rows, options)
    instead = f" and training a block {gb(training)}), or a smaller batch"
    needed = memory.check_memory(student, rows, cap, state + training, instead)
    return max(needed, memory.check_memory(teacher, rows, cap, state))


# ---- on the disk ----


def _begin(scratch: Path, pair: Sequence[Checkpoint], rows: Sequence[Rows], options: Options) -> None:
    """Make the directory of finished blocks. Raises Refused if it holds blocks of another call, or other files."""
    models = [checkpoint.identity() for checkpoint in pair]
    inputs = {"models": models, "rows": [each.digest() for each in rows], "options": asdict(options)}
    scratch.mkdir(parents=True, exist_ok=True)
    note = scratch / "inputs.json"
    if not note.exists() and not all(is_ours(f.name) or is_litter(f) for f in scratch.iterdir()):
        raise Refused(f"{scratch} was not made by mlx-pare", "move it away")
    if note.exists() and step_files.note(note) != inputs:
        raise Refused(f"{scratch} was begun with other models, rows or options", "remove it first")
    replace_file(note, dump_json(inputs))


def _file(scratch: Path, index: int) -> Path:
    return scratch / f"block-{index:04d}.safetensors"


def _entries(checkpoint: Checkpoint, tensor: Tensor, scratch: Path) -> dict[str, mx.array] | None:
    """The new entries of a tensor as they are stored, unread; None: it stays as it was."""
    if tensor.layer is None:
        return None
    found = mx.load(str(_file(scratch, tensor.layer)))
    return {name: found[name] for name in replace_tensors.names(checkpoint, tensor)} if tensor.name in found else None


def _judged(teacher: Path, student: Path, made: Path, held: Rows) -> dict[str, Any]:
    """KL divergence of both models to the teacher, measured from the written files."""
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
        self.target: mx.array | None = None  # the teacher's stream after ``reached`` blocks
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
        """Train a block: what happened to it, and its new tensors as they are stored, if they are taken."""
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
        """The entry of a block in the summary; an error that is not finite is null."""
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
        """The block as it will be loaded from the stored tensors, ready to compute on this device."""
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
        """What a block has to add to the stream, float32 [rows, length, hidden]."""
        return self.target[rows].astype(mx.float32) - self.x[rows].astype(mx.float32)

    def _weigh(self) -> mx.array:
        """The weight of every channel [hidden]: the inverse mean square of what must be added on the training rows.

        So a few channels with large values do not decide everything. A floor limits the weight of channels with small
        ones. The weights are divided by the number of channels: a block that adds nothing misses about 1 per token."""
        sums = mx.zeros(self.x.shape[-1])
        for part in batches.micro_batches(self.rows.first(self.count)):
            sums = sums + (mx.square(self._missing(part)) * self.mask[part][..., None]).sum(axis=(0, 1))
            mx.eval(sums)
        energy = sums / self.mask[: self.count].sum()
        return 1 / (energy + FLOOR * energy.mean() + 1e-30) / len(energy)

    def _missed(self, block: nn.Module, rows: Any) -> mx.array:
        """Weighted squares of what a block lacks to the teacher's stream, summed over the channels, [rows, length]."""
        difference = self._run(block, rows) - self.target[rows].astype(mx.float32)
        return (mx.square(difference) * self.weights).sum(axis=-1)

    def _loss(self, block: nn.Module, rows: mx.array) -> mx.array:
        mask = self.mask[rows]
        return (self._missed(block, rows) * mask).sum() / mx.maximum(mask.sum(), 1)

    def _error(self, block: nn.Module) -> float:
        """The weighted squares that the block misses, as a share of what it has to add, on the rows that judge."""
        missed = added = 0.0
        for part in batches.micro_batches(self.rows, self.count):
            added += ((mx.square(self._missing(part)) * self.weights).sum(axis=-1) * self.mask[part]).sum().item()
            missed += (self._missed(block, part) * self.mask[part]).sum().item()
        return missed / max(added, 1e-30)
