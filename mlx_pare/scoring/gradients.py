"""How the loss would change with every unit: exact gradients of a language model with one block in memory at a time.

The forward pass is the usual one (stream/walk.py), but the hidden states before every block are kept. The loss is the
sum over the rows of the nats of their predicted tokens. Its gradient at the last hidden states is computed in chunks
of the vocabulary.

The backward pass begins with the last block. Each block is loaded again and differentiated (mx.vjp) once, with the
inputs of down_proj and o_proj multiplied by masks of ones [rows, units]. The gradient of a mask is the slope of a row's
loss with that unit. The gradient of the hidden states is the cotangent of the block before.

Memory: hidden states x (layers + 3) of few rows (MOST_ROWS), and one block with the activations of a micro-batch and
their gradients.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx

from .. import lm
from ..arch import Architecture
from ..base.console import progress
from ..base.errors import PareError
from ..evaluation.divergence import Running
from ..lm.cpu_math import MOST_KEPT
from ..model.checkpoint import Checkpoint
from ..stream import batches, memory, walk as stream
from ..stream.taps import replace_module
from ..tensors.packed import dense_rows
from ..text.corpus import Extent, Rows

MOST_ROWS = 32  # the first ones are used (LLM-Pruner's Taylor criterion takes 10 rows of 64 tokens)
SITES = {"ffn": ("down_proj", "ffn"), "attention": ("o_proj", "kv_head")}  # site -> (role of the matrix, axis)


def used(rows: Rows | Extent) -> Rows | Extent:
    """Return the rows on which gradients are computed: the first MOST_ROWS.

    Args:
        rows: token rows [rows, length], or their extent.
    Returns:
        The same kind, with at most MOST_ROWS rows.
    """
    return rows.first(MOST_ROWS)


def measure(model: Path, rows: Rows) -> dict[str, mx.array]:
    """Measure statistics of the gradients on ``used(rows)``.

    They rest on s = sum over tokens of a * dL/da: the slope of the row's loss with a factor on the unit's input of
    down_proj (for attention on a kv head's input of o_proj, for block on all that the block adds to the stream).
    |s|: Molchanov et al. 2017, arXiv 1611.06440, row by row. Summed over all text, slopes cancel, since training has
    brought their sum near zero. What is left chooses badly (benchmarks/LOG.md).
    s^2: Molchanov et al. 2019, arXiv 1906.10771, the diagonal of the empirical Fisher matrix of those factors.

    Args:
        model: model directory.
        rows: token rows [rows, length].
    Returns:
        float32 arrays for each layer i. ``{i}.ffn.gradient_abs``, ``{i}.ffn.gradient_sq`` [ffn]: mean over rows of |s|
        in nats, and of s^2. ``{i}.attention.*`` [kv_head] and ``{i}.block.*`` []: the same.
        ``{i}.block.cotangent_sq`` []: mean over the valid tokens of |dL/dh|^2, h the states after the block.
    Raises:
        PareError: no row has two tokens, the blocks hand on more than hidden states, or the model computes NaN or
            infinite numbers.
        UsageError: the model does not know a token.
    """
    rows = used(rows)
    if rows.lengths.max() < 2:
        raise PareError("gradients need rows of at least two tokens", "calibrate on longer text")
    kept = _Kept(rows)
    end = stream.walk(model, rows, kept, what="gradients: forward, block")
    arch, fresh = Checkpoint(model).arch, lm.for_backend(lm.load(model))
    blocks, after = lm.blocks(fresh), kept.last
    with lm.swift(_swift_kept(arch, rows)):
        cotangent = _joined(rows, lambda part: _of_head(end, lm.final_norm(fresh), after, rows, part))[0]
        arrays: dict[str, mx.array] = {}
        with progress("gradients: backward, block", len(blocks)) as bar:
            for index in reversed(range(len(blocks))):
                backward = _Backward(blocks[index], arch, index, kept.calls.pop(), kept.states.pop(), after, rows)
                arrays |= {f"{index}.{name}": a for name, a in backward.statistics(cotangent).items()}
                cotangent, after, blocks[index] = backward.cotangent, backward.before, None
                mx.clear_cache()
                bar.advance()
    return arrays


def check_memory(checkpoint: Checkpoint, rows: Rows | Extent, cap: int | None) -> int:
    """Estimate the memory of ``measure`` and check that it stays under a cap.

    Args:
        checkpoint: the model.
        rows: token rows [rows, length], or their extent.
        cap: bytes; if None, what is free now.
    Returns:
        Estimate of the peak in bytes.
    Raises:
        Refused: the estimate exceeds the cap.
    """
    few = used(rows)
    return memory.check_memory(checkpoint, few, cap, held_bytes(checkpoint, few))


def held_bytes(checkpoint: Checkpoint, rows: Rows | Extent) -> int:
    """Estimate what the gradients of these rows need in addition to a plain walk.

    These are the states before every block and after the last, and the cotangents before and after a block. What a
    micro-batch computes is kept until it is differentiated; on the CPU backend the expanded matrices are, too.

    Args:
        checkpoint: the model.
        rows: what ``used`` returned.
    Returns:
        Bytes.
    """
    arch, value = checkpoint.arch, memory.STATE_BYTES
    states = (len(arch.layers) + 3) * rows.count * rows.length * arch.sizes["hidden"] * value
    block = sum(t.size for t in arch.tensors() if t.layer == 0)
    computed, kept = 2 * memory.activation_bytes(checkpoint, rows), _swift_kept(arch, rows)
    if not lm.cpu_backend():
        return states + computed
    return states + 4 * block + (max(computed, kept) if kept <= MOST_KEPT else computed)


def _swift_kept(arch: Architecture, rows: Rows) -> int:
    """Return the bytes that a micro-batch keeps under backend.swift."""
    return lm.swift_kept(arch, batches.micro_batches(rows)[0].stop * rows.length)


def _joined(rows: Rows, micro_batch: Callable[[slice], tuple[mx.array, ...]]) -> list[mx.array]:
    """Call a function with the rows of each micro-batch, and join what it returns for all rows."""
    pieces = []
    for part in batches.micro_batches(rows):
        pieces.append(micro_batch(part))
        mx.eval(pieces[-1])
    joined = [mx.concatenate(same) for same in zip(*pieces, strict=True)]
    mx.eval(joined)
    return joined


class _Kept(stream.Observer):
    """The observer of the forward walk: it keeps the inputs of every block, and the output of the last one."""

    def __init__(self, rows: Rows):
        self.rows = rows
        self.states: list[mx.array] = []
        self.calls: list[tuple[tuple, dict]] = []

    def called(self, index: int, x: mx.array, args: tuple, kwargs: dict) -> None:
        mx.eval(x)
        for value in (*args, *kwargs.values()):
            if batches.per_row(value, self.rows) and mx.issubdtype(value.dtype, mx.floating):
                raise PareError("gradients cannot follow blocks that hand on more than hidden states")
        self.states.append(x)
        self.calls.append((args, kwargs))

    def leave(self, index: int, hidden: mx.array) -> None:
        self.last = hidden


def _of_head(end: stream.Streamed, norm: Any, hidden: mx.array, rows: Rows, part: slice) -> tuple[mx.array]:
    """Compute dL/dh [rows, length, hidden] at the states before the final norm.

    It is softmax minus the true token, times the head, taken back through the norm. Two passes over the chunks of the
    head are needed: the first one computes the denominators.
    """
    x = end.hidden[part].astype(mx.float32)
    inner = x[:, :-1].reshape(-1, x.shape[-1])
    targets = mx.array(rows.tokens[part, 1:].reshape(-1))
    total = Running(targets)
    for start, logits in end.logits(inner):
        total.see(start, logits)
        mx.eval(total.mass, total.peak, total.target, total.top)
    slope = -dense_rows(end.head, targets)
    if not end.shape.plain:
        slope = slope * end.shape.slope(total.target)[..., None]
    for _, weight in end.chunks(inner):
        logits = end.shape(inner @ weight.T)
        steep = mx.exp(logits - total.lse[:, None])
        slope = slope + (steep if end.shape.plain else steep * end.shape.slope(logits)) @ weight
        mx.eval(slope)
    predicted = mx.array(rows.mask()[part, 1:])[..., None]
    slope = mx.where(predicted, slope.reshape(len(x), -1, x.shape[-1]), 0)
    slope = mx.pad(slope, [(0, 0), (0, 1), (0, 0)])
    return tuple(mx.vjp(norm, [hidden[part]], [slope.astype(hidden.dtype)])[1])


class _Mask:
    """Stands in for a matrix and multiplies its input by ``mask`` [rows, units]; a unit has adjacent channels."""

    def __init__(self, module: Any):
        self.module, self.mask = module, None

    def __getattr__(self, name: str) -> Any:
        return getattr(self.module, name)

    def __call__(self, x: mx.array) -> mx.array:
        wide = mx.repeat(self.mask, x.shape[-1] // self.mask.shape[-1], axis=-1)[:, None]
        return self.module((x.astype(mx.float32) * wide).astype(x.dtype))  # float32: so are the sums over tokens


class _Backward:
    """One block of the backward walk, from the cotangent of its output to the cotangent of its input."""

    def __init__(
        self, block: Any, arch: Architecture, index: int, call: tuple, before: mx.array, after: mx.array, rows: Rows
    ):
        self.block, self.call, self.before, self.after, self.rows = block, call, before, after, rows
        there = {site: (role, axis) for site, (role, axis) in SITES.items() if axis in arch.units(index)}
        self.sites = {site: replace_module(block, arch.path(index, role), _Mask) for site, (role, _) in there.items()}
        self.units = [arch.layer_sizes(index)[axis] for _, axis in there.values()]
        self.cotangent: mx.array | None = None

    def statistics(self, cotangent: mx.array) -> dict[str, mx.array]:
        """Compute the statistics of this block, named as in ``measure`` without the layer, and set ``cotangent``.

        Args:
            cotangent: dL/dh after the block [rows, length, hidden].
        Returns:
            float32 arrays [units] or [].
        """
        whole, spread, *slopes, self.cotangent = _joined(self.rows, lambda part: self._rows(cotangent[part], part))
        found = {"block.cotangent_sq": spread.sum() / self.rows.total}
        for site, slope in zip(("block", *self.sites), (whole, *slopes), strict=True):
            found |= {f"{site}.gradient_abs": mx.abs(slope).mean(axis=0)}
            found |= {f"{site}.gradient_sq": mx.square(slope).mean(axis=0)}
        mx.eval(found)
        return found

    def _rows(self, cotangent: mx.array, part: slice) -> tuple[mx.array, ...]:
        """Compute for some rows: slope with the block [rows], |dL/dh|^2 [rows], slopes with its units [rows, units],
        dL/dh before the block [rows, length, hidden]."""

        def share(value: Any) -> Any:
            return value[part] if batches.per_row(value, self.rows) else value

        def run(x: mx.array, *masks: mx.array) -> mx.array:
            for site, mask in zip(self.sites.values(), masks, strict=True):
                site.mask = mask
            args, kwargs = self.call
            return self.block(x, *map(share, args), **{k: share(v) for k, v in kwargs.items()})

        x, slope = self.before[part], cotangent.astype(mx.float32)
        added = self.after[part].astype(mx.float32) - x.astype(mx.float32)
        masks = [mx.ones((len(x), units)) for units in self.units]
        _, (inward, *slopes) = mx.vjp(run, [x, *masks], [cotangent])
        return (slope * added).sum(axis=(1, 2)), mx.square(slope).sum(axis=(1, 2)), *slopes, inward
