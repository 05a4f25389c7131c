"""Exponentials and attention for MLX's CPU backend, computed by numpy.

MLX's CPU backend on x86 calls libm several times for every exponential, which takes 9 to 14 ns per number. numpy takes
half a nanosecond (MLX 0.32.4, numpy 2.4). A walk of a small model spent nearly all its time there. Within ``swift`` the
stock forward finds numpy's versions under MLX's own names, so families need no code for that. The versions have
gradients and compute float32 only; MLX computes everything else as before. Attention skips keys that a mask hides.

These versions compute at once, while MLX waits until a result is needed. A gradient therefore keeps everything that led
to it, which takes more memory (``kept_bytes``). They must not be used under mx.compile and mx.vmap, where nothing can
be computed at once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import mlx.core as mx
import numpy as np

SMALL = 1 << 15  # numbers, or attention scores; for fewer, MLX is fast enough
MOST_KEPT = 2 << 30  # bytes; training that would keep more uses MLX's versions
BLOCK = 128  # queries of a head computed together: their scores stay in the processor's cache
_STOCK = {
    "exp": mx.exp,
    "sigmoid": mx.sigmoid,
    "tanh": mx.tanh,
    "softmax": mx.softmax,
    "logsumexp": mx.logsumexp,
}
_STOCK_ATTENTION = mx.fast.scaled_dot_product_attention


@contextmanager
def swift(on: bool = True) -> Iterator[None]:
    """Let MLX's names mean the versions of this file, or with ``on`` False MLX's own. May be nested."""
    before = {name: getattr(mx, name) for name in _STOCK}, mx.fast.scaled_dot_product_attention
    try:
        _name(*((_SWIFT, attention) if on else (_STOCK, _STOCK_ATTENTION)))
        yield
    finally:
        _name(*before)


def _name(functions: dict[str, Callable], attend: Callable) -> None:
    """Let MLX's names mean these functions."""
    for name, function in functions.items():
        setattr(mx, name, function)
    mx.fast.scaled_dot_product_attention = attend


def kept_bytes(ffn: int, hidden: int, tokens: int) -> int:
    """Estimate what a block computes and keeps until it is differentiated: everything, since nothing waits.

    Measured with adapters at hidden sizes of 64 to 512: 0.95 to 1.1 times 32 ffn + 56 hidden numbers per token. That is
    three to four times what MLX keeps.

    Args:
        ffn: channels of the ffn.
        hidden: hidden size.
        tokens: tokens of a batch, all rows together.
    Returns:
        Bytes, at most: 4 * (36 ffn + 62 hidden) per token.
    """
    return 4 * tokens * (36 * ffn + 62 * hidden)


def _ours(x: Any) -> bool:
    """Tell whether numpy should compute this: float32 and large enough."""
    return isinstance(x, mx.array) and x.dtype == mx.float32 and x.size >= SMALL


def _numbers(x: mx.array) -> np.ndarray:
    return np.array(x, copy=False)


# ---- one number, or one row, at a time ----


def _differentiable(compute: Callable, pull: Callable) -> Callable[[mx.array], mx.array]:
    """Make numpy's ``compute(x)`` a function of MLX arrays with the gradient ``pull(x, cotangent, result)``."""
    made = mx.custom_function(lambda x: mx.array(compute(_numbers(x))))
    made.vjp(lambda x, cotangent, result: pull(x, cotangent, result))
    return made


def _sigmoid(x: np.ndarray) -> np.ndarray:
    with np.errstate(over="ignore"):  # 1 / (1 + infinity) is the right zero
        y = np.exp(-x)
    y += 1
    return np.reciprocal(y, out=y)


def _softmax(x: np.ndarray) -> np.ndarray:
    y = x - x.max(axis=-1, keepdims=True)
    np.exp(y, out=y)
    y /= y.sum(axis=-1, keepdims=True)
    return y


def _logsumexp(x: np.ndarray) -> np.ndarray:
    peak = x.max(axis=-1, keepdims=True)
    y = x - peak
    return np.log(np.exp(y, out=y).sum(axis=-1, keepdims=True)) + peak


_exp = _differentiable(np.exp, lambda x, cotangent, y: cotangent * y)
_tanh = _differentiable(np.tanh, lambda x, cotangent, y: cotangent * (1 - y * y))
_sigmoids = _differentiable(_sigmoid, lambda x, cotangent, y: cotangent * (y * (1 - y)))
_rows = _differentiable(_softmax, lambda x, cotangent, y: y * (cotangent - (cotangent * y).sum(axis=-1, keepdims=True)))
_sums = _differentiable(_logsumexp, lambda x, cotangent, y: cotangent * _exp(x - y))


def _elementwise(name: str, ours: Callable) -> Callable:
    def call(x: Any, **more: Any) -> mx.array:
        return ours(x) if _ours(x) and not more else _STOCK[name](x, **more)

    return call


def softmax(x: mx.array, axis: Any = None, **more: Any) -> mx.array:
    """Compute softmax as mx.softmax does, with numpy for large float32 arrays over the last axis.

    Args:
        x: any shape; numpy computes float32 with at least SMALL numbers.
        axis: as in mx.softmax; numpy computes -1 only.
        more: other arguments of mx.softmax, used only if MLX computes.
    Returns:
        As ``x``.
    """
    return _rows(x) if axis == -1 and _ours(x) else _STOCK["softmax"](x, axis, **more)


def logsumexp(x: mx.array, axis: Any = None, keepdims: bool = False, **more: Any) -> mx.array:
    """Compute logsumexp as mx.logsumexp does, with numpy for large float32 arrays over the last axis.

    Args:
        x: any shape; numpy computes float32 with at least SMALL numbers.
        axis: as in mx.logsumexp; numpy computes -1 only.
        keepdims: keep the axis with length 1.
        more: other arguments of mx.logsumexp, used only if MLX computes.
    Returns:
        As ``x`` without ``axis``.
    """
    if axis != -1 or not _ours(x):
        return _STOCK["logsumexp"](x, axis, keepdims, **more)
    return _sums(x) if keepdims else _sums(x)[..., 0]


_SWIFT = {
    "exp": _elementwise("exp", _exp),
    "sigmoid": _elementwise("sigmoid", _sigmoids),
    "tanh": _elementwise("tanh", _tanh),
    "softmax": softmax,
    "logsumexp": logsumexp,
}


# ---- attention ----


def attention(
    q: mx.array, k: mx.array, v: mx.array, *, scale: float, mask: Any = None, sinks: Any = None, **more: Any
) -> mx.array:
    """Compute attention as mx.fast.scaled_dot_product_attention does, with numpy for large float32 arrays.

    MLX computes if there are sinks, other arguments or fewer than SMALL scores. It also does if the mask differs
    between rows or heads, or hides all keys from a query.

    Args:
        q: [b, heads, queries, dim].
        k: [b, kv heads, keys, dim]; heads are a multiple of kv heads.
        v: [b, kv heads, keys, value dim].
        scale: factor of the scores.
        mask: None, "causal", or an array [..., queries, keys], bool (True: visible) or floats to be added.
        sinks, more: as in MLX's function.
    Returns:
        [b, heads, queries, value dim], dtype of ``q``.
    """
    scores = q.shape[0] * q.shape[1] * q.shape[2] * k.shape[2]
    plain = sinks is None and not more and scores >= SMALL and q.dtype == k.dtype == v.dtype == mx.float32
    seen = _Seen.of(mask, q.shape[2], k.shape[2]) if plain else None
    if seen is None:
        return _STOCK_ATTENTION(q, k, v, scale=scale, mask=mask, sinks=sinks, **more)

    @mx.custom_function
    def attend(q: mx.array, k: mx.array, v: mx.array) -> tuple[mx.array, mx.array]:
        out, peaks = _attend(*map(_numbers, (q, k, v)), scale, seen)
        return mx.array(out).transpose(0, 2, 1, 3), mx.array(peaks)

    @attend.vjp
    def pull(inputs: tuple, cotangents: tuple, outputs: tuple) -> tuple:
        arrays = map(_numbers, (*inputs, cotangents[0], *outputs))
        return tuple(map(mx.array, _pulled(*arrays, scale, seen)))

    return attend(q, k, v)[0]


class _Seen:
    """Which keys the queries see.

    ``added``: float32 [queries, keys], 0 or -infinity, or what a mask adds; None: all keys are seen. ``spans``: every
    block of queries, with the range of keys that any query of it sees.
    """

    def __init__(self, added: np.ndarray | None, spans: list[tuple[slice, slice]]):
        self.added, self.spans = added, spans

    @classmethod
    def of(cls, mask: Any, queries: int, keys: int) -> _Seen | None:
        """Read a mask; None if it is not the same for all rows and heads, or hides all keys from a query."""
        blocks = [slice(start, min(start + BLOCK, queries)) for start in range(0, queries, BLOCK)]
        if mask is None:
            return cls(None, [(block, slice(0, keys)) for block in blocks])
        if isinstance(mask, str):
            visible = np.tri(queries, keys, keys - queries, dtype=bool)
        elif not isinstance(mask, mx.array) or mask.shape[-2:] != (queries, keys) or mask.size != queries * keys:
            return None
        elif mask.dtype == mx.bool_:
            visible = np.array(mask).reshape(queries, keys)
        else:
            added = np.array(mask.astype(mx.float32)).reshape(queries, keys)
            return cls(added, [(block, slice(0, keys)) for block in blocks])
        if not visible.any(axis=1).all():
            return None
        spans = []
        for block in blocks:
            some = np.flatnonzero(visible[block].any(axis=0))
            spans.append((block, slice(int(some[0]), int(some[-1]) + 1)))
        return cls(np.where(visible, np.float32(0), np.float32(-np.inf)), spans)

    def hide(self, scores: np.ndarray, block: slice, span: slice) -> None:
        """Add the mask to the scores [heads, block, span]."""
        if self.added is not None:
            scores += self.added[block, span]


def _attend(q: np.ndarray, k: np.ndarray, v: np.ndarray, scale: float, seen: _Seen) -> tuple[np.ndarray, np.ndarray]:
    """Return the result of attention [b, queries, heads, dim], and the log-sum-exp of every query's scores
    [b, heads, queries, 1]; both float32."""
    batch, heads, queries, _ = q.shape
    group = heads // k.shape[1]
    out = np.empty((batch, queries, heads, v.shape[-1]), np.float32)
    sums = np.empty((batch, heads, queries, 1), np.float32)
    for row, head in np.ndindex(batch, k.shape[1]):
        own = slice(head * group, (head + 1) * group)
        keys, values = np.ascontiguousarray(k[row, head].T) * np.float32(scale), np.ascontiguousarray(v[row, head])
        for block, span in seen.spans:
            scores = np.ascontiguousarray(q[row, own, block]) @ keys[:, span]
            seen.hide(scores, block, span)
            peak = scores.max(axis=-1, keepdims=True)
            scores -= peak
            np.exp(scores, out=scores)
            total = scores.sum(axis=-1, keepdims=True)
            out[row, block, own] = ((scores @ values[span]) / total).swapaxes(0, 1)
            sums[row, own, block] = peak + np.log(total)
    return out, sums


def _pulled(
    q: np.ndarray, k: np.ndarray, v: np.ndarray, pulled: np.ndarray, out: np.ndarray, sums: np.ndarray,
    scale: float, seen: _Seen,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:  # fmt: skip
    """Return the gradients of q, k and v from the gradient of the output, ``pulled`` [b, heads, queries, dim]."""
    found = np.empty(q.shape, np.float32), np.zeros(k.shape, np.float32), np.zeros(v.shape, np.float32)
    group, factor = q.shape[1] // k.shape[1], np.float32(scale)
    for row, head in np.ndindex(q.shape[0], k.shape[1]):
        own = slice(head * group, (head + 1) * group)
        keys, values = np.ascontiguousarray(k[row, head]), np.ascontiguousarray(v[row, head])
        for block, span in seen.spans:
            asked, wanted = np.ascontiguousarray(q[row, own, block]), np.ascontiguousarray(pulled[row, own, block])
            weights = asked @ (keys[span].T * factor)
            seen.hide(weights, block, span)
            weights -= sums[row, own, block]
            np.exp(weights, out=weights)
            found[2][row, head, span] += _over_tokens(weights, wanted)
            slopes = wanted @ values[span].T
            slopes -= (wanted * out[row, own, block]).sum(axis=-1, keepdims=True)
            slopes *= weights
            found[0][row, own, block] = (slopes @ keys[span]) * factor
            found[1][row, head, span] += _over_tokens(slopes, asked) * factor
    return found


def _over_tokens(left: np.ndarray, right: np.ndarray) -> np.ndarray:
    """Return left^T right, summed over heads and queries: [keys, dim]."""
    return left.reshape(-1, left.shape[-1]).T @ right.reshape(-1, right.shape[-1])
