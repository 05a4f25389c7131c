"""Streaming accumulators: what is remembered of activations. All sums in float32, padding excluded."""

from __future__ import annotations

from collections.abc import Sequence

import mlx.core as mx
import numpy as np


class Moments:
    """Per-unit sums over the last axis of activations [rows, tokens, units].

    ``row_sq``  sum over rows of (mean over tokens of |x|)^2: its root is Minitron's importance (batch=L2, seq=mean of
                the absolute value), Model-Optimizer modelopt/torch/prune/plugins/mcore_minitron.py.
    ``sum``, ``abs_sum``, ``sq_sum``, ``max``  of x, |x|, x^2, |x| over all valid tokens.
    """

    NAMES = ("row_sq", "sum", "abs_sum", "sq_sum", "max")

    def __init__(self) -> None:
        self._sums: dict[str, mx.array] = {}

    def update(self, x: mx.array, mask: mx.array) -> None:
        """Add activations [rows, tokens, units]; ``mask`` [rows, tokens] is 1 where there is text."""
        x = x.astype(mx.float32) * mask[..., None]
        absolute = mx.abs(x)
        per_row = absolute.sum(axis=1) / mx.maximum(mask.sum(axis=1), 1)[:, None]
        new = {
            "row_sq": mx.square(per_row).sum(axis=0),
            "sum": x.sum(axis=(0, 1)),
            "abs_sum": absolute.sum(axis=(0, 1)),
            "sq_sum": mx.square(x).sum(axis=(0, 1)),
            "max": absolute.max(axis=(0, 1)),
        }
        if not self._sums:
            self._sums = new
            return
        for name, value in new.items():
            join = mx.maximum if name == "max" else mx.add
            self._sums[name] = join(self._sums[name], value)

    def arrays(self) -> dict[str, mx.array]:
        return self._sums


class BlockCosine:
    """Sum over valid tokens of cos(block input, block output); 1 - mean is block influence (ShortGPT, Men 2024)."""

    def __init__(self) -> None:
        self._sums: dict[str, mx.array] = {}

    def update(self, before: mx.array, after: mx.array, mask: mx.array) -> None:
        a, b = before.astype(mx.float32), after.astype(mx.float32)
        norms = mx.sqrt(mx.square(a).sum(-1) * mx.square(b).sum(-1))
        cosine = ((a * b).sum(-1) / mx.maximum(norms, 1e-12) * mask).sum()
        self._sums = {"cosine": self._sums.get("cosine", mx.array(0.0)) + cosine}

    def arrays(self) -> dict[str, mx.array]:
        return self._sums


class LastToken:
    """Hidden states at the last valid token of every row, float32 [rows, hidden]: ``after`` a block, and ``before`` it
    where it is the first. What ``angles`` need."""

    def __init__(self, first: bool) -> None:
        self.first = first
        self._states: dict[str, mx.array] = {}

    def update(self, before: mx.array, after: mx.array, mask: mx.array) -> None:
        """Add the rows of a micro-batch."""
        last = mx.maximum(mask.astype(mx.int32).sum(axis=1) - 1, 0)[:, None, None]
        for name, states in (("before", before), ("after", after))[0 if self.first else 1 :]:
            found = mx.take_along_axis(states, last, axis=1)[:, 0].astype(mx.float32)
            self._states[name] = mx.concatenate([self._states[name], found]) if name in self._states else found

    def arrays(self) -> dict[str, mx.array]:
        return self._states


def angles(states: Sequence[mx.array]) -> mx.array:
    """Angular distance [n, n] between n states [rows, hidden] of the same rows: arccos(cos(a, b)) / pi, mean over rows.
    Gromov et al. 2024, arXiv 2403.17887, there between the inputs of blocks, as arcee-ai/PruneMe
    compute_block_similarity/utils.py, which leaves out the first block. In float64: arccos is steep near 1."""

    def unit(state: mx.array) -> np.ndarray:
        x = np.asarray(state).astype(np.float64)
        return x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-30)

    found = np.zeros((len(states), len(states)))
    for i, state in enumerate(states):
        own = unit(state)
        for j in range(i + 1, len(states)):
            cosine = np.clip((own * unit(states[j])).sum(axis=1), -1.0, 1.0)
            found[i, j] = found[j, i] = np.arccos(cosine).mean() / np.pi
    return mx.array(found.astype(np.float32))


class Removal:
    """The order in which channels would be removed one after the other, the least missed first; ``removal`` [units]: 0
    for the first. NVIDIA Model-Optimizer modelopt/torch/prune/importance_hooks/base_hooks.py,
    IterativeChannelContributionHook, without its scale_by_magnitude.

    The contribution of channel i is what would be missing in the output without it and without those removed already:
    sum over tokens of || s + a_i w_i || = sqrt(|s|^2 + 2 a_i (s . w_i) + a_i^2 |w_i|^2 + 1e-8), s what they gave. It is
    summed over a micro-batch, after which a share of the channels goes, the greater shares first, and the sums start
    anew: so ``rounds`` must be the number of micro-batches. Memory: [tokens, units] a few times.
    """

    def __init__(self, weight: mx.array, rounds: int):
        units = weight.shape[1]
        self.weight, self.norms = weight, mx.square(weight).sum(axis=0)
        self.schedule = [units // rounds + (r < units % rounds) for r in range(rounds)]
        self.removed, self.order = 0, mx.full((units,), mx.inf)

    def update(self, x: mx.array, mask: mx.array) -> None:
        """Add activations [rows, tokens, units]; ``mask`` [rows, tokens] is 1 where there is text."""
        count = self.schedule.pop(0)
        if not count:
            return
        x, kept = x.astype(mx.float32).reshape(-1, x.shape[-1]), self.order == mx.inf
        squared = mx.square(x) * self.norms
        if self.removed:
            missing = mx.where(kept, 0, x) @ self.weight.T
            squared = squared + mx.square(missing).sum(axis=-1, keepdims=True) + 2 * x * (missing @ self.weight)
        contribution = (mx.sqrt(mx.maximum(squared, 0) + 1e-8) * mask.reshape(-1, 1)).sum(axis=0)
        least = mx.argsort(mx.where(kept, contribution, mx.inf))[:count]
        self.order[least] = mx.arange(self.removed, self.removed + count).astype(mx.float32)
        self.removed += count

    def arrays(self) -> dict[str, mx.array]:
        return {"removal": self.order}


class HeadContribution:
    """Sum over valid tokens of || A_g W_g^T ||_2, what each kv head with its query heads adds to the output of o_proj;
    ``contribution`` [kv_head]. Same file, IndependentKvHeadContributionHook.

    Through the Gram matrices W_g^T W_g, so that [kv_head, tokens, hidden] is never made.
    """

    def __init__(self, weight: mx.array, kv_heads: int):
        columns = weight.T.reshape(kv_heads, -1, weight.shape[0])
        self.grams = columns @ columns.swapaxes(1, 2)
        self.sums = mx.zeros((kv_heads,))

    def update(self, x: mx.array, mask: mx.array) -> None:
        """Add activations [rows, tokens, q_head*head_dim]; ``mask`` [rows, tokens] is 1 where there is text."""
        heads = x.astype(mx.float32).reshape(mask.size, len(self.grams), -1).swapaxes(0, 1)
        energy = ((heads @ self.grams) * heads).sum(axis=-1)
        self.sums = self.sums + (mx.sqrt(mx.maximum(energy, 0)) * mask.reshape(1, -1)).sum(axis=1)

    def arrays(self) -> dict[str, mx.array]:
        return {"contribution": self.sums}


def sparsity(abs_sum: mx.array, sq_sum: mx.array, tokens: int) -> mx.array:
    """Hoyer's sparsity of each unit over its tokens: 0 always equally active, 1 active on a single token.

    (sqrt(n) - L1/L2) / (sqrt(n) - 1), Hoyer 2004 (JMLR 5): relative to the unit's own scale, so that no threshold is
    needed, and exact from two sums. Dead units count as 1.
    """
    root = tokens**0.5
    ratio = abs_sum / mx.sqrt(mx.maximum(sq_sum, 1e-30))
    return mx.where(sq_sum > 0, (root - ratio) / max(root - 1, 1e-12), 1.0)
