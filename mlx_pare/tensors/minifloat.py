"""The number that each code of a packed matrix means, before scale and bias, and the code nearest to a number.

In affine packing the codes are whole numbers. In MLX's float modes the codes and the scales are small floats: E2M1 and
E4M3 of the OCP Microscaling Formats specification 1.0. The scale is a power of two (E8M0; "mxfp4", "mxfp8") or an E4M3
("nvfp4"). ``xp`` is the array module in use, numpy or mlx.core: both have the few functions that are used here.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from math import nan
from typing import Any

from .packing import Packing


@dataclass(frozen=True)
class Minifloat:
    """A float of one byte or less: a sign, then an exponent, then ``mantissa`` bits.

    ``bias`` is subtracted from the exponent. ``top`` is the code of the largest number; the codes above it are no
    numbers.
    """

    bits: int
    mantissa: int
    bias: int
    top: int

    def value(self, code: int) -> float:
        """The number that a code means; NaN for codes above ``top``."""
        sign, code = divmod(code, 1 << (self.bits - 1))
        exponent, fraction = divmod(code, 1 << self.mantissa)
        whole = fraction + (1 << self.mantissa if exponent else 0)
        size = whole * 2.0 ** (max(exponent, 1) - self.bias - self.mantissa)
        return nan if code > self.top else -size if sign else size

    def nearest(self, x: Any, xp: Any) -> Any:
        """Find the nearest code for each number; of two codes that are equally near, take the even one.

        Numbers that are too large get the code of the largest number. The codes of positive numbers are consecutive.
        Codes with the exponent e lie 2^(e - mantissa) apart.

        Args:
            x: the numbers, a float array of any shape.
            xp: numpy or mlx.core, the module of ``x``.
        Returns:
            The codes as floats, shape and dtype of ``x``.
        """
        size, lowest = xp.minimum(xp.abs(x), self.value(self.top)), 1 - self.bias
        exponent = xp.maximum(xp.floor(xp.log2(xp.maximum(size, 2.0**lowest))), lowest)
        code = (exponent - lowest) * (1 << self.mantissa) + xp.round(size / 2.0 ** (exponent - self.mantissa))
        return xp.where(x < 0, code + (1 << (self.bits - 1)), code)


E2M1 = Minifloat(bits=4, mantissa=1, bias=1, top=7)
E4M3 = Minifloat(bits=8, mantissa=3, bias=7, top=126)
CODES = {"mxfp4": E2M1, "nvfp4": E2M1, "mxfp8": E4M3}
POWERS = (*(2.0 ** (code - 127) for code in range(255)), nan)  # E8M0


@cache
def _values(form: Minifloat) -> tuple[float, ...]:
    return tuple(form.value(code) for code in range(1 << form.bits))


def nearest(x: Any, packing: Packing, xp: Any) -> Any:
    """Find the codes whose numbers are nearest to ``x``.

    Args:
        x: weights without bias, divided by their scale; a float array of any shape.
        packing: how the matrix is packed.
        xp: numpy or mlx.core, the module of ``x``.
    Returns:
        The codes as floats, shape and dtype of ``x``.
    """
    if packing.affine:
        return xp.clip(xp.round(x), 0, 2**packing.bits - 1)
    return CODES[packing.mode].nearest(x, xp)


def values(codes: Any, packing: Packing, xp: Any) -> Any:
    """Convert codes to the numbers that they mean, before scale and bias.

    Args:
        codes: an array of any shape, whole numbers stored in any dtype.
        packing: how the matrix is packed.
        xp: numpy or mlx.core, the module of ``codes``.
    Returns:
        The numbers, shape of ``codes``; float32 in the float modes, ``codes`` itself if the packing is affine.
    """
    if packing.affine:
        return codes
    return xp.array(_values(CODES[packing.mode]), dtype=xp.float32)[codes.astype(xp.int32)]


def scales(stored: Any, packing: Packing, xp: Any) -> Any:
    """Convert stored scales to float32.

    Args:
        stored: scales [rows, groups]: floats if the packing is affine, else uint8 codes.
        packing: how the matrix is packed.
        xp: numpy or mlx.core, the module of ``stored``.
    Returns:
        The scales, float32 [rows, groups].
    """
    if packing.affine:
        return stored.astype(xp.float32)
    table = _values(E4M3) if packing.mode == "nvfp4" else POWERS
    return xp.array(table, dtype=xp.float32)[stored.astype(xp.int32)]
