"""How MLX packs a quantized matrix: mode, bits, groups, bytes. Arithmetic only; the arrays are in tensors/packed.py.

An affine-packed matrix of logical shape (rows, columns) is three tensors: ``weight`` of uint32 words,
(rows, columns * bits / 32), and ``scales`` and ``biases``, (rows, columns / group_size) each, in the model's dtype.
In the float modes the codes are small floats (tensors/minifloat.py), a scale is one byte, and there are no biases.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

GROUP_SIZES = (128, 64, 32)  # what mx.quantize(mode="affine") accepts
BITS = (2, 3, 4, 5, 6, 8)
FLOAT_MODES = {"mxfp4": (4, 32), "mxfp8": (8, 32), "nvfp4": (4, 16)}  # bits, group size; a scale is 1 byte, no bias


@dataclass(frozen=True)
class Packing:
    """The quantization of a matrix: ``bits`` per weight, one scale per ``group_size`` columns, and one bias if affine.

    ``scale_bytes``: bytes of one affine scale or bias, which have the float dtype of the model.
    """

    bits: int
    group_size: int
    scale_bytes: int = 2
    mode: str = "affine"

    @classmethod
    def named(cls, mode: str, scale_bytes: int = 2) -> Packing:
        """The packing of "mxfp4", "mxfp8" or "nvfp4"."""
        return cls(*FLOAT_MODES[mode], scale_bytes, mode)

    @classmethod
    def of_config(cls, spec: Mapping[str, Any], scale_bytes: int = 2) -> Packing:
        """Read what ``as_config`` gave or mlx-lm wrote. No mode means affine; a float mode implies bits and groups.

        Raises ValueError if MLX cannot pack like that.
        """
        mode, bits, group = spec.get("mode", "affine"), spec.get("bits"), spec.get("group_size")
        if mode != "affine":
            own = FLOAT_MODES[mode]
            if (bits or own[0], group or own[1]) != own:
                raise ValueError(f"MLX packs {mode} in {own[0]} bits and groups of {own[1]}")
            return cls.named(mode, scale_bytes)
        if type(bits) is not int or bits not in BITS or type(group) is not int or group not in GROUP_SIZES:
            known = (", ".join(map(str, numbers)) for numbers in (BITS, GROUP_SIZES))
            raise ValueError("MLX packs {} bits in groups of {}".format(*known))
        return cls(int(bits), int(group), scale_bytes, mode)

    @property
    def affine(self) -> bool:
        """Whether a weight is scale * code + bias. In the float modes it is scale * (the float that the code means)."""
        return self.mode == "affine"

    @property
    def parts(self) -> tuple[str, ...]:
        """The tensors of a packed matrix, by the last word of their names, in the order of mx.quantize."""
        return ("weight", "scales", "biases") if self.affine else ("weight", "scales")

    def scale_dtype(self, dtype: str) -> str:
        """The dtype of scales (and biases) in a model whose floats are ``dtype``."""
        return dtype if self.affine else "U8"

    def __str__(self) -> str:
        return self.mode if not self.affine else f"{self.bits} bits in groups of {self.group_size}"

    def nbytes(self, rows: int, columns: int) -> int:
        """Bytes of weight, scales and biases together."""
        per_group = 2 * self.scale_bytes if self.affine else 1
        return rows * (self.words(columns) * 4 + self.groups(columns) * per_group)

    def stored_bytes(self, shape: Sequence[int]) -> int:
        """Bytes of a matrix, or of a stack of matrices, of this shape."""
        return self.nbytes(prod(shape[:-1]), shape[-1])

    def words(self, columns: int) -> int:
        return columns * self.bits // 32

    def groups(self, columns: int) -> int:
        return columns // self.group_size

    def fitted(self, columns: int) -> Packing | None:
        """This packing with the largest group size, at most its own, that divides ``columns``; None: keep it dense.

        mlx-lm leaves such a matrix dense without a message (mlx_lm/utils.py quantize_model); the planner must know.
        """
        if not self.affine:
            return self if columns % self.group_size == 0 else None
        for group in GROUP_SIZES:
            if group <= self.group_size and columns % group == 0:
                return Packing(self.bits, group, self.scale_bytes)
        return None

    def as_config(self) -> dict[str, Any]:
        """The packing as config.json writes it, and as MLX's functions take it."""
        return {"group_size": self.group_size, "bits": self.bits, "mode": self.mode}
