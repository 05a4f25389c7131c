"""Streaming accumulators of activations. All sums are float32, and padding is excluded."""

from __future__ import annotations

from collections.abc import Sequence

import mlx.core as mx
import numpy as np


class Moments:
    """Sums over activations [rows, tokens, units], one for each unit.

    ``row_sq``: sum over rows of (mean over tokens of |x|)^2. Its root is Minitron's importance (batch=L2, seq=mean of
    the absolute value), Model-Optimizer modelopt/torch/prune/plugins/mcore_minitron.py.
    ``sum``, ``abs_sum``, ``sq_sum``: sums of x, |x| and x^2 over all valid tokens. ``max``: the largest |x| of them.
    """

    NAMES = ("row_sq", "sum", "abs_sum", "sq_sum", "max")

    def __init__(self) -> None:
        self._sums: dict[str, mx.array] = {}

    def update(self, x: mx.array, mask: mx.array) -> None:
        """Add the activations of a micro-batch.

        Args:
            x: activations [rows, tokens, units], any float dtype.
            mask: 1 or True where there is text [rows, tokens].
        """
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
        """Return the sums so far.

        Returns:
            float32 [units] by each of ``NAMES``; empty before the first ``update``.
        """
        return self._sums


class BlockCosine:
    """Sum over valid tokens of cos(block input, block output); 1 - mean is block influence (ShortGPT, Men 2024)."""

    def __init__(self) -> None:
        self._sums: dict[str, mx.array] = {}

    def update(self, before: mx.array, after: mx.array, mask: mx.array) -> None:
        """Add the hidden states of a micro-batch.

        Args:
            before: states that go into the block [rows, tokens, hidden].
            after: states that come out of it [rows, tokens, hidden].
            mask: 1 or True where there is text [rows, tokens].
        """
        a, b = before.astype(mx.float32), after.astype(mx.float32)
        norms = mx.sqrt(mx.square(a).sum(-1) * mx.square(b).sum(-1))
        cosine = ((a * b).sum(-1) / mx.maximum(norms, 1e-12) * mask).sum()
        self._sums = {"cosine": self._sums.get("cosine", mx.array(0.0)) + cosine}

    def arrays(self) -> dict[str, mx.array]:
        """Return the sum so far.

        Returns:
            ``cosine``, float32 []; empty before the first ``update``.
        """
        return self._sums


class LastToken:
    """Hidden states at the last valid token of every row, from which ``angles`` are computed.

    ``after``: states that leave a block. ``before``: states that enter it, kept for the first block only.
    """

    def __init__(self, first: bool) -> None:
        self.first = first
        self._states: dict[str, mx.array] = {}

    def update(self, before: mx.array, after: mx.array, mask: mx.array) -> None:
        """Add the rows of a micro-batch.

        Args:
            before: states that go into the block [rows, tokens, hidden].
            after: states that come out of it [rows, tokens, hidden].
            mask: 1 or True where there is text [rows, tokens]; a row without text counts with its first token.
        """
        last = mx.maximum(mask.astype(mx.int32).sum(axis=1) - 1, 0)[:, None, None]
        for name, states in (("before", before), ("after", after))[0 if self.first else 1 :]:
            found = mx.take_along_axis(states, last, axis=1)[:, 0].astype(mx.float32)
            self._states[name] = mx.concatenate([self._states[name], found]) if name in self._states else found

    def arrays(self) -> dict[str, mx.array]:
        """Return the states of all rows so far.

        Returns:
            ``after``, and for the first block ``before``, float32 [rows, hidden]; empty before the first ``update``.
        """
        return self._states


def angles(states: Sequence[mx.array]) -> mx.array:
    """Measure the angular distance arccos(cos(a, b)) / pi between every two states, mean over rows.

    Gromov et al. 2024, arXiv 2403.17887, take it between the inputs of blocks. So does arcee-ai/PruneMe
    compute_block_similarity/utils.py, which leaves out the first block. It is computed in float64, because arccos is
    steep near 1.

    Args:
        states: n arrays [rows, hidden] of the same rows.
    Returns:
        Distances from 0 (same direction) to 1 (opposite), symmetric, float32 [n, n].
    """

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


class RoutedSums:
    """Sums over the tokens that visit each expert. g: weight of the expert's output f(x) for the token x.

    ``visits``: their number. ``weight``: sum of g. ``norm``, ``norm_sq``: sums of ||f|| and ||f||^2. ``given``,
    ``given_sq``: sums of g ||f|| and g^2 ||f||^2. ``max``: the largest |f_i| of all tokens and channels.
    """

    NAMES = ("visits", "weight", "norm", "norm_sq", "given", "given_sq", "max")

    def __init__(self, experts: int) -> None:
        self._sums = {name: mx.zeros((experts,)) for name in self.NAMES}

    def update(self, experts: mx.array, weights: mx.array, outputs: mx.array, mask: mx.array) -> None:
        """Add a micro-batch.

        Args:
            experts: those that each token visits, int [rows, tokens, active].
            weights: g of each, float32 [rows, tokens, active].
            outputs: f(x) of each, float32 [rows, tokens, active, hidden].
            mask: 1 or True where there is text [rows, tokens].
        """
        there = mx.broadcast_to(mask[..., None], experts.shape).astype(mx.float32).reshape(-1)
        place, weight = experts.reshape(-1), mx.abs(weights).reshape(-1)
        norm_sq = mx.square(outputs).sum(axis=-1).reshape(-1)
        norm = mx.sqrt(norm_sq)
        values = (mx.ones_like(norm), weight, norm, norm_sq, weight * norm, mx.square(weight) * norm_sq)
        for name, value in zip(self.NAMES, values, strict=False):
            self._sums[name] = self._sums[name].at[place].add(value * there)
        largest = mx.abs(outputs).max(axis=-1).reshape(-1)
        self._sums["max"] = self._sums["max"].at[place].maximum(largest * there)

    def arrays(self) -> dict[str, mx.array]:
        """Return the sums so far.

        Returns:
            float32 [experts] by each of ``NAMES``.
        """
        return self._sums


class Removal:
    """The order in which channels would be removed one after the other; the least missed go first.

    NVIDIA Model-Optimizer modelopt/torch/prune/importance_hooks/base_hooks.py, IterativeChannelContributionHook,
    without its scale_by_magnitude.

    The contribution of channel i is what the output would lack without it and without the channels removed already:
    sum over tokens of || s + a_i w_i || = sqrt(|s|^2 + 2 a_i (s . w_i) + a_i^2 |w_i|^2 + 1e-8). Here s is what the
    removed channels gave. Contributions are summed over one micro-batch. Then a share of the channels is removed
    (larger shares first), and the sums start again from zero. So ``rounds`` must be the number of micro-batches.
    Memory: a few arrays [tokens, units].
    """

    def __init__(self, weight: mx.array, rounds: int):
        """Begin with all channels.

        Args:
            weight: the matrix that reads the channels, float32 [out, units].
            rounds: number of calls of ``update``, after which every channel has its place.
        """
        units = weight.shape[1]
        self.weight, self.norms = weight, mx.square(weight).sum(axis=0)
        self.schedule = [units // rounds + (r < units % rounds) for r in range(rounds)]
        self.removed, self.order = 0, mx.full((units,), mx.inf)

    def update(self, x: mx.array, mask: mx.array) -> None:
        """Add a micro-batch and remove the channels whose turn it is.

        Args:
            x: activations at the input of the matrix [rows, tokens, units].
            mask: 1 or True where there is text [rows, tokens].
        """
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
        """Return the order so far.

        Returns:
            ``removal``, float32 [units]: 0 for the channel removed first, infinity for those still there.
        """
        return {"removal": self.order}


class HeadContribution:
    """Sum over valid tokens of || A_g W_g^T ||_2: what each kv head with its query heads adds to the output of o_proj.

    NVIDIA Model-Optimizer modelopt/torch/prune/importance_hooks/base_hooks.py, IndependentKvHeadContributionHook. It is
    computed from the Gram matrices W_g^T W_g, so an array [kv_head, tokens, hidden] never exists.
    """

    def __init__(self, weight: mx.array, kv_heads: int):
        """Compute the Gram matrices.

        Args:
            weight: the matrix of o_proj, float32 [hidden, q_head*head_dim].
            kv_heads: number of kv heads; the query heads of one are adjacent.
        """
        columns = weight.T.reshape(kv_heads, -1, weight.shape[0])
        self.grams = columns @ columns.swapaxes(1, 2)
        self.sums = mx.zeros((kv_heads,))

    def update(self, x: mx.array, mask: mx.array) -> None:
        """Add the activations of a micro-batch.

        Args:
            x: activations at the input of o_proj [rows, tokens, q_head*head_dim].
            mask: 1 or True where there is text [rows, tokens].
        """
        heads = x.astype(mx.float32).reshape(mask.size, len(self.grams), -1).swapaxes(0, 1)
        energy = ((heads @ self.grams) * heads).sum(axis=-1)
        self.sums = self.sums + (mx.sqrt(mx.maximum(energy, 0)) * mask.reshape(1, -1)).sum(axis=1)

    def arrays(self) -> dict[str, mx.array]:
        """Return the sums so far.

        Returns:
            ``contribution``, float32 [kv_head].
        """
        return {"contribution": self.sums}


def sparsity(abs_sum: mx.array, sq_sum: mx.array, tokens: int) -> mx.array:
    """Measure Hoyer's sparsity of each unit over its tokens: 0 always equally active, 1 active on a single token.

    (sqrt(n) - L1/L2) / (sqrt(n) - 1), Hoyer 2004 (JMLR 5). It is relative to the unit's own scale, so it needs no
    threshold, and two sums give it exactly. Dead units count as 1.

    Args:
        abs_sum: sum over tokens of |x| [units].
        sq_sum: sum over tokens of x^2 [units].
        tokens: number n of valid tokens in both sums.
    Returns:
        Sparsity, float32 [units].
    """
    root = tokens**0.5
    ratio = abs_sum / mx.sqrt(mx.maximum(sq_sum, 1e-30))
    return mx.where(sq_sum > 0, (root - ratio) / max(root - 1, 1e-12), 1.0)
