"""Layers that compute in float32, whatever the weights are stored in."""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_map

from .packed import dense_matrix, dense_rows, dense_weight

EXPANDED_BYTES = 64 << 20  # of one matrix, expanded to float32 at a time
MATRICES = nn.Linear | nn.QuantizedLinear | nn.Embedding | nn.QuantizedEmbedding


class Float32Linear(nn.Module):
    """A linear layer that computes in float32 from weights in any format. It expands the weights only during a call.

    The CPU backend needs it: there MLX's bfloat16 quantized matmul accumulates in bfloat16 (mlx
    backend/cpu/quantized.cpp, 3-7 % wrong), and runs at a hundredth of the speed of a float32 matmul. A matrix of more
    than EXPANDED_BYTES is expanded in parts: MLX plans ahead, and would have those of several layers in memory at once.
    """

    def __init__(self, inner: nn.Module):
        super().__init__()
        self.inner = inner

    def __call__(self, x: mx.array) -> mx.array:
        x, rows = x.astype(mx.float32), self.inner.weight.shape[0]
        step = min(rows, max(1, EXPANDED_BYTES // (4 * x.shape[-1])))
        parts = []
        for start in range(0, rows, step):
            parts.append(x @ dense_weight(self.inner, start, start + step).T)
            if step < rows:
                mx.eval(parts[-1])
        y = mx.concatenate(parts, axis=-1) if len(parts) > 1 else parts[0]
        return y + self.inner.bias.astype(mx.float32) if "bias" in self.inner else y


class Float32Stack(nn.Module):
    """A stack of matrices, one for each expert, that computes in float32 and expands one of them at a time.

    It is called as mlx-lm's SwitchLinear is. The CPU backend needs it: there gather_qmm is 4 % wrong in bfloat16, and
    gather_mm takes float32 only (mlx 0.32.4).
    """

    def __init__(self, inner: nn.Module):
        super().__init__()
        self.inner = inner

    def __call__(self, x: mx.array, indices: mx.array, sorted_indices: bool = False) -> mx.array:
        """Multiply each row by the matrix of its expert.

        Args:
            x: inputs [..., 1, in], of a shape that broadcasts to that of the indices in front.
            indices: the expert of each row [...].
            sorted_indices: whether they ascend; what comes out is the same.
        Returns:
            float32 [*indices.shape, 1, out].
        """
        chosen = np.array(indices).reshape(-1)
        order = np.argsort(chosen, kind="stable")
        rows = mx.broadcast_to(x.astype(mx.float32), (*indices.shape, 1, x.shape[-1])).reshape(len(chosen), -1)
        rows, parts = rows[mx.array(order)], []
        experts, starts = np.unique(chosen[order], return_index=True)
        for expert, start, stop in zip(experts.tolist(), starts, [*starts[1:], len(chosen)], strict=True):
            parts.append(rows[int(start) : int(stop)] @ dense_matrix(self.inner, expert).T)
            if "bias" in self.inner:
                parts[-1] = parts[-1] + self.inner.bias[expert].astype(mx.float32)
            mx.eval(parts[-1])  # else all the experts would be expanded together
        found = mx.concatenate(parts)[mx.array(np.argsort(order, kind="stable"))]
        return found.reshape(*indices.shape, 1, -1)


def is_stack(module: nn.Module) -> bool:
    """Whether a layer holds a matrix for each expert, as mlx-lm's SwitchLinear and QuantizedSwitchLinear do."""
    return hasattr(type(module), "num_experts") and "weight" in module


class Float32Embedding(nn.Module):
    """An embedding whose rows come out in float32. Only the rows that are looked up are expanded."""

    def __init__(self, inner: nn.Module):
        super().__init__()
        self.inner = inner

    def __call__(self, tokens: mx.array) -> mx.array:
        return dense_rows(self.inner, tokens)

    @property
    def weight(self) -> mx.array:
        """The whole table, for classes that multiply by it themselves (mlx_lm/models/seed_oss.py).

        Returns:
            The weights, float32 [vocab, hidden].
        """
        return dense_weight(self.inner)

    def as_linear(self, x: mx.array) -> mx.array:
        """Multiply by the table, as a tied head does.

        Args:
            x: hidden states [..., hidden].
        Returns:
            The logits, float32 [..., vocab].
        """
        return x.astype(mx.float32) @ self.weight.T


def others_to_float32(module: nn.Module) -> nn.Module:
    """Make all parameters of ``module`` float32 except those of matrices. Gemma's norms add 1 to their weight, which in
    bfloat16 loses most of it."""
    for _, part in module.named_modules():
        if not (isinstance(part, MATRICES) or is_stack(part)):
            _widen_own(part)
    return module


def _widen_own(module: nn.Module) -> None:
    """Make the parameters of a module itself float32, not those of the modules in it."""
    for name, value in module.items():
        if isinstance(value, mx.array):
            module[name] = _wide(value)


def _wide(array: mx.array) -> mx.array:
    return array.astype(mx.float32) if mx.issubdtype(array.dtype, mx.floating) else array


def to_float32(module: nn.Module) -> nn.Module:
    """Wrap every matrix in ``module`` in Float32Linear, Float32Stack or Float32Embedding; other parameters become
    float32. A ``module`` that is a single layer is wrapped itself."""

    def wrap(leaf: nn.Module) -> nn.Module:
        if isinstance(leaf, nn.Linear | nn.QuantizedLinear):
            return Float32Linear(leaf)
        if isinstance(leaf, nn.Embedding | nn.QuantizedEmbedding):
            return Float32Embedding(leaf)
        if is_stack(leaf):
            return Float32Stack(leaf)
        leaf.apply(_wide)
        return leaf

    for _, part in module.named_modules():
        if part.children():
            _widen_own(part)
    if not module.children():
        return wrap(module)
    leaves = tree_map(wrap, module.leaf_modules(), is_leaf=nn.Module.is_module)
    module.update_modules(leaves)
    return module
