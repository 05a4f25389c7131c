"""How MLX packs a quantized matrix: bits, groups, bytes. Arithmetic only, no arrays (those are in quantized.py).

An affine-packed matrix of logical shape (rows, columns) is three tensors: ``weight`` of uint32 words,
(rows, columns * bits / 32), and ``scales`` and ``biases``, (rows, columns / group_size) each, in the model's dtype.
"""

from __future__ import annotations

from dataclasses import dataclass

GROUP_SIZES = (128, 64, 32)  # what mx.quantize(mode="affine") accepts
BITS = (2, 3, 4, 5, 6, 8)
FLOAT_MODES = {"mxfp4": (4, 32), "mxfp8": (8, 32), "nvfp4": (4, 16)}  # bits, group; a scale of one byte and no bias


@dataclass(frozen=True)
class Packing:
    """Quantization of one matrix: ``bits`` per weight, one scale and bias per ``group_size`` columns.

    The modes other than affine can be counted, not cut.
    """

    bits: int
    group_size: int
    scale_bytes: int = 2
    mode: str = "affine"

    @classmethod
    def named(cls, mode: str, scale_bytes: int = 2) -> Packing:
        """The packing of "mxfp4", "mxfp8" or "nvfp4"."""
        return cls(*FLOAT_MODES[mode], scale_bytes, mode)

    def __str__(self) -> str:
        return self.mode if self.mode != "affine" else f"{self.bits} bits in groups of {self.group_size}"

    def nbytes(self, rows: int, columns: int) -> int:
        """Bytes of weight + scales + biases."""
        per_group = 2 * self.scale_bytes if self.mode == "affine" else 1
        return rows * (self.words(columns) * 4 + self.groups(columns) * per_group)

    def words(self, columns: int) -> int:
        return columns * self.bits // 32

    def groups(self, columns: int) -> int:
        return columns // self.group_size

    def fitted(self, columns: int) -> Packing | None:
        """This packing with the largest group size, no larger than now, that divides ``columns``; None: keep it dense.

        mlx-lm leaves such a matrix dense without a word (mlx_lm/utils.py quantize_model); the planner must know first.
        """
        if self.mode != "affine":
            return self if columns % self.group_size == 0 else None
        for group in GROUP_SIZES:
            if group <= self.group_size and columns % group == 0:
                return Packing(self.bits, group, self.scale_bytes)
        return None

    def as_config(self) -> dict:
        return {"group_size": self.group_size, "bits": self.bits, "mode": self.mode}
