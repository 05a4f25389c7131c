"""The engine: it runs the stock mlx-lm forward once over all rows, with one block in memory at a time.

A proxy replaces every block. The stock forward calls it with the hidden states of all rows. The proxy evaluates the
lazy weights of the block, loops over micro-batches, shows them to the observer, drops the block and joins the rows.
mlx-lm keeps masks, rope and everything else around the blocks, so no family needs code here. The head is not applied:
``Streamed`` applies it in chunks of the vocabulary, because logits of all rows never fit.

Peak memory is one block + three times the hidden states (in, out, joined) + activations of a micro-batch; at the end,
the head. If the states do not fit they are spooled: they lie on disk, the forward gets a placeholder between blocks,
and the peak includes the states of a micro-batch only. While a block computes, a thread reads the file of the next one
into the page cache of the operating system.
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
from ..text.corpus import Rows
from .batches import micro_batches, shares
from .head import Streamed
from .prefetch import read_ahead
from .spool import InMemory, Spool, Spooled, placeholder


class Observer:
    """Watches one walk. An observer may have two more methods.

    ``called(index, x, args, kwargs)`` is called before ``enter`` with what the stock forward gives to the block.
    ``again(index, before, after, run)`` is called before ``leave``, while the block is still there. ``run(states)``
    sends other hidden states of all rows through it, in the same micro-batches, and ``run(states, start)`` those of the
    rows from ``start`` on.
    """

    def enter(self, index: int, block: Any, mask: Callable[[], mx.array]) -> Any:
        """Prepare for a block before it runs; may replace its submodules by taps.

        Args:
            index: number of the block.
            block: the block, with weights that are not read yet.
            mask: returns which tokens of the current micro-batch are text, bool [rows, length].

        Returns:
            None, or another block that runs in the place of this one.
        """
        return None

    def seen(self, index: int, before: mx.array, after: mx.array, mask: mx.array) -> None:
        """Look at a micro-batch that went through a block; ``after`` is not evaluated yet.

        Args:
            index: number of the block.
            before: states that go into the block [rows, length, hidden].
            after: states that come out of it [rows, length, hidden].
            mask: which tokens are text, bool [rows, length].
        """

    def pending(self) -> list[mx.array]:
        """Name what is evaluated together with a micro-batch.

        Returns:
            Arrays of any shape, such as the sums of the observer.
        """
        return []

    def leave(self, index: int, hidden: mx.array) -> None:
        """Look at the result of a block, which has been dropped.

        Args:
            index: number of the block.
            hidden: states of all rows that come out of it [rows, length, hidden]; a Spool in a walk that is spooled.
        """


class Enough(Exception):
    """Raised by a tap that has what it needs while ``run`` of ``again`` sends states through a block: the rest of the
    block is not computed for this micro-batch. Raised anywhere else, it ends the walk and reaches its caller."""


@dataclass
class Resume:
    """Hidden states [rows, length, hidden] that go into block ``start``, in memory or spooled."""

    start: int
    hidden: mx.array | Spool


@dataclass
class _Walk:
    """What the proxies share: the rows, the observer, and where to begin."""

    rows: Rows
    blocks: list
    observer: Observer | None
    resume: Resume | None
    store: Any  # where the hidden states of all rows are: InMemory or Spooled
    ahead: Callable[[int], None]  # has the tensors of a block read into the page cache
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
        mx.clear_cache()  # otherwise the allocator of a GPU would keep the block that was dropped
        self.bar.advance()
        return self.store.leaving(joined)

    def _each(self, micro_batch: Callable[[], Any], parts: list[slice] | None = None) -> Iterator[tuple[slice, Any]]:
        """Yield the rows of every micro-batch and their result."""
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
        """Send other hidden states of the rows from ``start`` on through the same block."""
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
    """What the stock forward finds in the place of a block."""

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
    """Run a model over rows, block by block.

    Args:
        path: model directory.
        rows: the rows, tokens int32 [rows, length].
        observer: sees every block from ``resume.start`` on.
        resume: states and number of the block to begin with; None: the walk begins with the tokens.
        what: how the progress is called; None: it is not shown.
        spool: directory for hidden states, which are then never in memory as a whole. Observers get a Spool instead of
            the states of all rows, and must not run states ``again``. The states of the result are read from there.
            None: they are in memory.

    Returns:
        Hidden states [rows, length, hidden] after the final norm, and the head.

    Raises:
        UsageError: the rows hold tokens that the model does not have.
        Refused: float32 products are rounded on this device.
        PareError: the model is damaged, cannot be spooled, or computes infinite numbers; the message names the layer or
            the broken weight.
    """
    checkpoint = Checkpoint(path)
    rows.require_known(checkpoint.arch.sizes["vocab"])
    lm.require_exact_products()
    model = lm.load(path)
    end = _ending(model)
    model = lm.for_backend(model)
    # float32 states make every block compute in float32: in 16 bits, errors of the stream hide what a cut changes
    embedding = StoredEmbedding(checkpoint, next(checkpoint.arch.tensors()).name, mx.float32)
    blocks, body, norm = lm.blocks(model), lm.body(model), lm.final_norm(model)
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
            lm.put_embedding(model, lambda tokens: placeholder((*tokens.shape, size), mx.float32))
        hidden = body(tokens)  # up to the final norm: the head is not applied
        if spool:
            return end(store.states.normed(norm), norm)
        mx.eval(hidden)
    return end(hidden, norm)


def ended(path: Path, hidden: mx.array | Spool) -> Streamed:
    """Return the end of a walk whose hidden states are known.

    Args:
        path: model directory.
        hidden: states after the final norm [rows, length, hidden], in memory or spooled.

    Returns:
        These states and the head of the model.
    """
    model = lm.load(path)
    end = _ending(model)
    return end(hidden, lm.for_backend(lm.final_norm(model)))


def _ending(model: Any) -> Callable[[Any, Any], Streamed]:
    """Return a function that makes the end of a walk from hidden states and the final norm. Call it before the model is
    changed."""
    vocab, readout, shape = lm.embedding(model).weight.shape[0], lm.head(model), lm.logit_shape(model)
    return lambda hidden, norm: Streamed(hidden, readout, vocab, norm, shape)


def _into_the_first(body: Any, blocks: list, tokens: mx.array) -> mx.array:
    """What the stock forward gives to its first block: embeddings, which some models scale before."""
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
    """Send hidden states through some blocks: a walk in pieces, for callers that lead two models side by side.

    Args:
        path: model directory.
        rows: the rows of the walk.
        hidden: states [rows, length, hidden] that go into block ``start``; None: begin with the tokens at block 0.
        start: number of the first block.
        stop: number of the block after the last.

    Returns:
        States that come out of block ``stop`` - 1, [rows, length, hidden].

    Raises:
        UsageError, PareError: as ``walk``.
    """
    until = _Until(stop - 1)
    try:
        walk(path, rows, until, None if hidden is None else Resume(start, hidden), what=None)
    except Enough:
        return until.hidden
    raise AssertionError(f"{path} has no block {stop - 1}")
