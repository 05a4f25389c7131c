"""Training of the scales and biases of a packed matrix, whose codes stay. Nothing is quantized again afterwards.

What is trained are factors of the old scales and biases. So one learning rate suits them whatever their size, and also
the gains of the norms. (mlx_lm's quant/dwq.py trains scales and biases themselves.) This is for affine packing only: a
scale of the float modes is one byte, which has nothing between one power of two (or one eighth) and the next.
"""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_unflatten

from .. import lm
from ..tensors.packed import Packed, packed


class Rescaled(nn.Module):
    """Takes the place of an affine quantized linear layer and trains ``scale_gain`` and ``bias_gain`` [out, groups].

    On the CPU backend, whose quantized matmul is slow, it also holds what the codes contribute in float32.
    """

    def __init__(self, inner: nn.QuantizedLinear):
        super().__init__()
        self.scale_gain, self.bias_gain = mx.ones(inner.scales.shape), mx.ones(inner.scales.shape)
        p = packed(inner)
        self._packed = Packed(p.words, p.scales.astype(mx.float32), p.biases.astype(mx.float32), p.packing)
        self._dtype = inner.scales.dtype
        self._bias = inner.bias.astype(mx.float32) if "bias" in inner else None
        self._codes = None
        # nobody else evaluates what is no parameter: a compiled step would read it from the disk every time
        mx.eval(self._packed.words, self._packed.scales, self._packed.biases)
        if lm.cpu_backend():
            whole = self._packed.dense().reshape(*self.scale_gain.shape, -1)
            self._codes = whole - self._packed.biases[..., None]
            mx.eval(self._codes)

    def arrays(self) -> dict[str, mx.array]:
        """Compute the current scales and biases.

        Returns:
            "scales" and "biases", float32 [out, groups].
        """
        return {"scales": self._packed.scales * self.scale_gain, "biases": self._packed.biases * self.bias_gain}

    def stored(self) -> Packed:
        """The matrix as it will be stored, with the same codes."""
        now = {name: array.astype(self._dtype) for name, array in self.arrays().items()}
        return Packed(self._packed.words, **now, packing=self._packed.packing)

    def __call__(self, x: mx.array) -> mx.array:
        if self._codes is not None:
            weight = self._codes * self.scale_gain[..., None] + (self._packed.biases * self.bias_gain)[..., None]
            y = x @ weight.reshape(len(weight), -1).T
        else:
            now, p = {n: a.astype(x.dtype) for n, a in self.arrays().items()}, self._packed.packing
            y = mx.quantized_matmul(x, self._packed.words, **now, group_size=p.group_size, bits=p.bits)
        return y if self._bias is None else y + self._bias.astype(y.dtype)


def rescale(model: nn.Module) -> None:
    """Replace every affine packed linear layer of the blocks by a Rescaled."""
    for block in lm.blocks(model):
        linear = ((n, m) for n, m in block.named_modules() if isinstance(m, nn.QuantizedLinear))
        found = [(name, Rescaled(module)) for name, module in linear if packed(module).packing.affine]
        block.update_modules(tree_unflatten(found))
