"""The engine: the stock mlx-lm forward run once over all rows, with one block in memory at a time.

Every block is replaced by a proxy. Called by the stock forward with the hidden states of all rows, the proxy evaluates
the block's lazy weights, loops over micro-batches, shows them to the observer, drops the block and puts the rows
together again. Masks, rope and whatever else surrounds the blocks stay mlx-lm's business, so no family code is needed.
The head is not applied: ``Streamed`` applies it in chunks of the vocabulary, because logits of all rows never fit.

Peak memory = one block + three times the hidden states (in, out, joined) + activations of a micro-batch; in the end
the head. Where the states do not fit they are spooled: they lie on disk, the forward is handed a placeholder between
blocks, and the peak has those of a micro-batch only. While a block computes, a thread reads the file of the next one,
so that the operating system has it at hand.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx

from .. import lm
from ..base.console import progress
from ..model import finite
from ..model.checkpoint import Checkpoint
from ..model.weights import StoredEmbedding
from ..tensors.packed import stored_dtype
from ..text.corpus import Rows
from . import head
from .batches import micro_batches, shares
from .head import Streamed
from .prefetch import read_ahead
from .spool import InMemory, Spool, Spooled, placeholder


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
    """Hidden states [rows, length, hidden] that go into block ``start``, in memory or spooled."""

    start: int
    hidden: mx.array | Spool


@dataclass
class _Walk:
    """What the proxies share: the rows, the observer, where to begin."""

    rows: Rows
    blocks: list
    observer: Observer | None
    resume: Resume | None
    store: Any  # where the hidden states of all rows are: InMemory or Spooled
    ahead: Callable[[int], None]  # has the file of a block read
    bar: Any
    path: Path

    def __post_init__(self) -> None:
        self.parts = micro_batches(self.rows)
        self.mask = mx.array(self.rows.mask())
        self.part = slice(0, 0)

    def current_mask(self) -> mx.array:
        return self.mask[self.part]

    def run(self, index: int, x: mx.array, args: tuple, kwargs: dict) -> Any:
        if self.resume is not None and index < self.resume.start:
            self.blocks[index] = None
            return x
        later, self.resume = self.resume, None
        x = self.store.entering(index, later.hidden if later else x)
        self.ahead(index + 1)
        block = self.blocks[index]
        called = getattr(self.observer, "called", None)
        if called:
            called(index, x, args, kwargs)
        if self.observer:
            block = self.observer.enter(index, block, self.current_mask) or block
        joined = self.store.collect(index, self._each(lambda: self._watched(index, block, x, args, kwargs)))
        again = getattr(self.observer, "again", None)
        if again:
            first = joined[0] if isinstance(joined, tuple) else joined
            again(index, x, first, lambda y, start=0: self._apart(block, y, start, args, kwargs))
        self.blocks[index] = block = again = None
        if self.observer:
            self.observer.leave(index, joined[0] if isinstance(joined, tuple) else joined)
        mx.clear_cache()  # or a GPU's allocator would keep the block that was dropped
        self.bar.advance()
        return self.store.leaving(joined)

    def _each(self, micro_batch: Callable[[], Any], parts: list[slice] | None = None) -> Iterator[tuple[slice, Any]]:
        """The rows of every micro-batch, and what became of them."""
        for part in parts or self.parts:
            self.part = part
            yield part, micro_batch()

    def _watched(self, index: int, block: Any, x: mx.array | Spool, args: tuple, kwargs: dict) -> Any:
        before = x[self.part]
        after = self._block(block, before, args, kwargs)
        pending: list = []
        hidden = after[0] if isinstance(after, tuple) else after
        if self.observer:
            self.observer.seen(index, before, hidden, self.current_mask())
            pending = self.observer.pending()
        sound = mx.isfinite(hidden).all()
        mx.eval(after, pending, sound)
        if not sound.item():
            raise finite.blame(self.path, index)
        return after

    def _apart(self, block: Any, x: mx.array, start: int, args: tuple, kwargs: dict) -> mx.array | None:
        """Other hidden states of the rows from ``start`` on through the same block."""
        parts = micro_batches(self.rows, start) if start else None
        return InMemory().collect(0, self._each(lambda: self._unwatched(block, x, start, args, kwargs), parts))

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


class _BlockProxy:
    """What the stock forward finds in place of a block."""

    def __init__(self, walk: _Walk, index: int):
        self._walk, self._index = walk, index

    def __getattr__(self, name: str) -> Any:
        return getattr(self._walk.blocks[self._index], name)

    def __call__(self, x: mx.array, *args: Any, **kwargs: Any) -> Any:
        return self._walk.run(self._index, x, args, kwargs)


class _Stub(_BlockProxy):
    """A block that does something else when it is called."""

    def __init__(self, proxy: _BlockProxy, call: Callable):
        super().__init__(proxy._walk, proxy._index)
        self._call = call

    def __call__(self, x: mx.array, *args: Any, **kwargs: Any) -> Any:
        return self._call(x, *args, **kwargs)


def walk(
    path: Path,
    rows: Rows,
    observer: Observer | None = None,
    resume: Resume | None = None,
    what: str | None = "forward",
    spool: Path | None = None,
) -> Streamed:
    """Run the model in ``path`` over ``rows``; the observer sees every block from ``resume.start`` on. ``what`` its
    progress is called; None: it is not shown. ``spool``: a directory for hidden states, which are then never in memory
    as a whole; observers get a Spool where they would get the states of all rows, and must not ask to run them
    ``again``. The result's are read from there. Raises UsageError for tokens that the model does not have, PareError
    for a model that cannot be spooled, and for one that computes infinite numbers, naming the layer or the broken
    weight."""
    checkpoint = Checkpoint(path)
    rows.require_known(checkpoint.arch.sizes["vocab"])
    model = lm.load(path)
    end = _ending(model)
    dtype = mx.float32 if lm.cpu_backend() else stored_dtype(lm.embedding(model))
    model = lm.for_backend(model)
    embedding = StoredEmbedding(checkpoint, next(checkpoint.arch.tensors()).name, dtype)
    blocks, body = lm.blocks(model), lm.body(model)
    own, tokens = list(blocks), mx.array(rows.tokens)
    store = Spooled(spool, rows.count) if spool else InMemory()
    with progress(what, len(own)) as bar, read_ahead(checkpoint) as ahead, lm.swift():
        bar.skip(resume.start if resume else 0)
        state = _Walk(rows, own, observer, resume, store, ahead, bar, path)
        for index in range(len(own)):
            blocks[index] = _BlockProxy(state, index)
        lm.put_embedding(model, embedding)
        if spool:
            if not resume:
                store.begin((part, _into_the_first(body, blocks, tokens[part])) for part in state.parts)
            size = checkpoint.arch.sizes["hidden"]
            lm.put_embedding(model, lambda tokens: placeholder((*tokens.shape, size), dtype))
        hidden = body(tokens)  # up to the final norm: the head is not applied
        if spool:
            return end(store.states.normed(body.norm), body.norm)
        mx.eval(hidden)
    return end(hidden, body.norm)


def ended(path: Path, hidden: mx.array | Spool) -> Streamed:
    """The end of a walk of the model in ``path`` whose hidden states, after the final norm, are known."""
    model = lm.load(path)
    end = _ending(model)
    return end(hidden, lm.for_backend(lm.body(model).norm))


def _ending(model: Any) -> Callable[[Any, Any], Streamed]:
    """What makes the end of a walk of hidden states and the final norm; to be asked before the model is changed."""
    vocab, readout, shape = lm.embedding(model).weight.shape[0], lm.head(model), head.Shape(*lm.logit_shape(model))
    return lambda hidden, norm: Streamed(hidden, readout, vocab, norm, shape)


def _into_the_first(body: Any, blocks: list, tokens: mx.array) -> mx.array:
    """What the stock forward hands to its first block, some of which scale embeddings on the way."""
    found, first = [], blocks[0]

    def caught(x: mx.array, *args: Any, **kwargs: Any) -> None:
        found.append(x)
        raise Enough

    blocks[0] = _Stub(first, caught)
    try:
        body(tokens)
    except Enough:
        return found[0]
    finally:
        blocks[0] = first


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
