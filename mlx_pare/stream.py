"""The engine: the stock mlx-lm forward run once over all rows, with one block in memory at a time.

Every block is replaced by a proxy. Called by the stock forward with the hidden states of all rows, the proxy evaluates
the block's lazy weights, loops over micro-batches, shows them to the observer, drops the block and puts the rows
together again. Masks, rope and whatever else surrounds the blocks stay mlx-lm's business, so no family code is needed.
The head is not applied: ``Streamed`` applies it in chunks of the vocabulary, because logits of all rows never fit.

Peak memory = embedding + one block + three times the hidden states (in, out, joined) + activations of a micro-batch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import mlx.core as mx

from . import lm, machine
from .checkpoint import DTYPE_BYTES, Checkpoint
from .console import gb, progress
from .corpus import Rows
from .errors import Refused
from .quantized import dense_weight

MICRO_BATCH_TOKENS = 1024
HEAD_CHUNK_BYTES = 64 << 20


class Observer:
    """Watches one walk. ``enter`` is called before a block runs and may replace its submodules by taps, ``seen`` after
    each micro-batch, ``leave`` with the joined result; ``pending`` are arrays to evaluate with each micro-batch.

    An observer may also have ``again(index, before, after, run)``, called before ``leave`` while the block is still
    there: ``run`` sends other hidden states of all rows through it, in the same micro-batches; and
    ``called(index, x, args, kwargs)``, called before ``enter`` with what the stock forward gives to the block.
    ``enter`` may return another block, to run in the place of this one.
    """

    def enter(self, index: int, block: Any, mask: Callable[[], mx.array]) -> Any:
        return None

    def seen(self, index: int, before: mx.array, after: mx.array, mask: mx.array) -> None:
        pass

    def pending(self) -> list[mx.array]:
        return []

    def leave(self, index: int, hidden: mx.array) -> None:
        pass


class Enough(Exception):
    """Raised by a tap that has what it came for: the rest of the block is not computed for this micro-batch."""


@dataclass
class Resume:
    """Hidden states [rows, length, hidden] that go into block ``start``."""

    start: int
    hidden: mx.array


class _Walk:
    """What the proxies share: the rows, the observer, where to begin."""

    def __init__(self, rows: Rows, blocks: list, observer: Observer | None, resume: Resume | None, bar: Any):
        self.rows, self.blocks, self.observer, self.resume, self.bar = rows, blocks, observer, resume, bar
        self.parts = micro_batches(rows)
        self.mask = mx.array(rows.mask())
        self.part = slice(0, 0)

    def current_mask(self) -> mx.array:
        return self.mask[self.part]

    def run(self, index: int, x: mx.array, args: tuple, kwargs: dict) -> Any:
        if self.resume is not None and index < self.resume.start:
            self.blocks[index] = None
            return x
        if self.resume is not None and index == self.resume.start:
            x = self.resume.hidden
            self.resume = None
        block = self.blocks[index]
        called = getattr(self.observer, "called", None)
        if called:
            called(index, x, args, kwargs)
        if self.observer:
            block = self.observer.enter(index, block, self.current_mask) or block
        joined = self._all(lambda: self._watched(index, block, x, args, kwargs))
        again = getattr(self.observer, "again", None)
        if again:
            first = joined[0] if isinstance(joined, tuple) else joined
            again(index, x, first, lambda y, start=0: self._apart(block, y, start, args, kwargs))
        self.blocks[index] = block = again = None
        if self.observer:
            self.observer.leave(index, joined[0] if isinstance(joined, tuple) else joined)
        mx.clear_cache()  # or a GPU's allocator would keep the block that was dropped
        self.bar.advance()
        return joined

    def _all(self, micro_batch: Callable[[], Any], parts: list[slice] | None = None) -> Any:
        """All micro-batches, put together again; None when they were not computed to their end."""
        pieces = []
        for part in parts or self.parts:
            self.part = part
            pieces.append(micro_batch())
        joined = None if pieces[0] is None else _join(pieces)
        mx.eval(joined)
        return joined

    def _watched(self, index: int, block: Any, x: mx.array, args: tuple, kwargs: dict) -> Any:
        before = x[self.part]
        after = self._block(block, before, args, kwargs)
        pending: list = []
        if self.observer:
            hidden = after[0] if isinstance(after, tuple) else after
            self.observer.seen(index, before, hidden, self.current_mask())
            pending = self.observer.pending()
        mx.eval(after, pending)
        return after

    def _apart(self, block: Any, x: mx.array, start: int, args: tuple, kwargs: dict) -> mx.array | None:
        """Other hidden states of the rows from ``start`` on through the same block."""
        parts = micro_batches(self.rows, start) if start else None
        return self._all(lambda: self._unwatched(block, x, start, args, kwargs), parts)

    def _unwatched(self, block: Any, x: mx.array, start: int, args: tuple, kwargs: dict) -> mx.array | None:
        try:
            after = self._block(block, x[self.part.start - start : self.part.stop - start], args, kwargs)
        except Enough:
            return None
        hidden = after[0] if isinstance(after, tuple) else after
        mx.eval(hidden)
        return hidden

    def _block(self, block: Any, x: mx.array, args: tuple, kwargs: dict) -> Any:
        args, kwargs = shares(self.rows, self.part, args, kwargs)
        return block(x, *args, **kwargs)


def micro_batches(rows: Rows, first: int = 0) -> list[slice]:
    """The rows, from ``first`` on, that go through a block at a time."""
    step = max(1, MICRO_BATCH_TOKENS // rows.length)
    return [slice(start, min(start + step, rows.count)) for start in range(first, rows.count, step)]


def per_row(value: Any, rows: Rows) -> bool:
    """Whether an argument of a block has a share for each row: an array whose first axis is the batch.

    A boolean matrix is an attention mask [length, length] shared by all rows, also when there are as many rows.
    """
    if not isinstance(value, mx.array) or value.ndim < 2 or value.shape[0] != rows.count:
        return False
    return value.ndim > 2 or value.dtype != mx.bool_


def shares(rows: Rows, part: Any, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
    """The arguments of a block for some of the rows (a slice or indices)."""

    def share(value: Any) -> Any:
        return value[part] if per_row(value, rows) else value

    return tuple(map(share, args)), {k: share(v) for k, v in kwargs.items()}


def _join(pieces: list) -> Any:
    if len(pieces) == 1:
        return pieces[0]
    if isinstance(pieces[0], tuple):
        return tuple(
            _join(list(part)) if isinstance(part[0], mx.array) else part[0] for part in zip(*pieces, strict=True)
        )
    return mx.concatenate(pieces)


class _BlockProxy:
    """What the stock forward finds in place of a block."""

    def __init__(self, walk: _Walk, index: int):
        self._walk, self._index = walk, index

    def __getattr__(self, name: str) -> Any:
        return getattr(self._walk.blocks[self._index], name)

    def __call__(self, x: mx.array, *args: Any, **kwargs: Any) -> Any:
        return self._walk.run(self._index, x, args, kwargs)


@dataclass
class Streamed:
    """The end of a walk: ``hidden`` [rows, length, hidden] after the final norm, and the head to read it with."""

    hidden: mx.array
    head: Any
    vocab: int
    norm: Callable[[mx.array], mx.array]

    def of(self, hidden: mx.array) -> Streamed:
        """The same head for other hidden states, after the final norm."""
        return replace(self, hidden=hidden)

    def ended(self, hidden: mx.array) -> Streamed:
        """The same head for hidden states as the last block gives them."""
        return self.of(self.norm(hidden))

    def chunks(self, hidden: mx.array) -> Iterator[tuple[int, mx.array]]:
        """(first token id, float32 weight [chunk, hidden]) over the vocabulary; the logits of some hidden states in a
        chunk take no more memory than it does, or HEAD_CHUNK_BYTES."""
        width = max(1, HEAD_CHUNK_BYTES // (4 * max(hidden.shape[-1], hidden.size // hidden.shape[-1])))
        for start in range(0, self.vocab, width):
            yield start, dense_weight(self.head, start, min(start + width, self.vocab))

    def logits(self, hidden: mx.array) -> Iterator[tuple[int, mx.array]]:
        """(first token id, float32 logits [..., chunk]) over the vocabulary, for some of the hidden states."""
        x = hidden.astype(mx.float32)
        for start, weight in self.chunks(hidden):
            yield start, x @ weight.T

    def all_logits(self, rows: Any) -> mx.array:
        """Float32 logits [rows, length, vocab] of a few rows (indices or a slice)."""
        return mx.concatenate([logits for _, logits in self.logits(self.hidden[rows])], axis=-1)


def walk(
    path: Path, rows: Rows, observer: Observer | None = None, resume: Resume | None = None, what: str | None = "forward"
) -> Streamed:
    """Run the model in ``path`` over ``rows``; the observer sees every block from ``resume.start`` on. ``what`` its
    progress is called; None: it is not shown."""
    model = lm.load(path)
    vocab, head = lm.embedding(model).weight.shape[0], lm.head(model)
    model = lm.for_backend(model)
    blocks = lm.blocks(model)
    own = list(blocks)
    with progress(what, len(own)) as bar:
        bar.skip(resume.start if resume else 0)
        state = _Walk(rows, own, observer, resume, bar)
        for index in range(len(own)):
            blocks[index] = _BlockProxy(state, index)
        hidden = lm.body(model)(mx.array(rows.tokens))  # up to the final norm: the head is not applied
        mx.eval(hidden)
    return Streamed(hidden, head, vocab, lm.body(model).norm)


class _Until(Observer):
    """An observer that ends the walk after a block."""

    def __init__(self, last: int):
        self.last = last

    def leave(self, index: int, hidden: mx.array) -> None:
        if index == self.last:
            self.hidden = hidden
            raise Enough


def advance(path: Path, rows: Rows, hidden: mx.array | None, start: int, stop: int) -> mx.array:
    """Hidden states [rows, length, hidden] that go into block ``start`` (None: there is nothing before it) through the
    blocks up to ``stop``, which is not run: a walk in pieces, for who leads two models side by side."""
    until = _Until(stop - 1)
    try:
        walk(path, rows, until, None if hidden is None else Resume(start, hidden), what=None)
    except Enough:
        return until.hidden
    raise AssertionError(f"{path} has no block {stop - 1}")


def required_bytes(checkpoint: Checkpoint, rows: Rows) -> int:
    """Estimate of the peak of a walk beyond the interpreter itself (see the module's docstring)."""
    arch = checkpoint.arch
    hidden, value = arch.sizes["hidden"], 4 if lm.cpu_backend() else 2
    states = 3 * rows.count * rows.length * hidden * value
    block: dict[int | None, int] = {}
    widest = 0
    for tensor in arch.tensors():
        packing = checkpoint.packing(tensor.module) if tensor.matrix else None
        stored = packing.nbytes(*tensor.shape) if packing else tensor.size * DTYPE_BYTES[checkpoint.dtype(tensor)]
        block[tensor.layer] = block.get(tensor.layer, 0) + stored
        if tensor.layer is not None:
            widest = max(widest, tensor.size)
    expanded = 4 * widest if lm.cpu_backend() else 0
    blocks = block.pop(None, 0) + max(block.values())
    return states + blocks + expanded + activation_bytes(checkpoint, rows) + 4 * HEAD_CHUNK_BYTES


def activation_bytes(checkpoint: Checkpoint, rows: Rows) -> int:
    """What is computed inside a block for a micro-batch: an estimate."""
    arch, hidden = checkpoint.arch, checkpoint.arch.sizes["hidden"]
    heads, head_dim = arch.largest("kv_head", "group"), arch.largest("head_dim")
    tokens = min(rows.count, max(1, MICRO_BATCH_TOKENS // rows.length)) * rows.length
    units = 3 * arch.largest("ffn") + 4 * heads * head_dim + 4 * hidden + heads * rows.length
    return tokens * units * (4 if lm.cpu_backend() else 2)


def check_memory(checkpoint: Checkpoint, rows: Rows, cap: int | None, held: int = 0, instead: str = "") -> int:
    """The estimate, with ``held`` bytes beside it, when it stays under ``cap`` (default: the memory that is free now).
    Raises Refused otherwise; ``instead``: what else could be done about it."""
    needed, limit = required_bytes(checkpoint, rows) + held, cap or machine.available_bytes()
    if needed > limit:
        raise Refused(
            f"streaming {rows.count} x {rows.length} tokens through {checkpoint.path} needs about {gb(needed)}, "
            f"{'--memory-cap allows' if cap else 'free are'} {gb(limit)}",
            "use fewer rows (--samples, in recovery --train-rows) or a shorter --length (hidden states take "
            f"{gb(3 * rows.count * rows.length * checkpoint.arch.sizes['hidden'] * 4)}){instead}",
        )
    return needed
