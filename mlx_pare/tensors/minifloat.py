"""What the codes of a packed matrix stand for, before scale and bias, and which code is nearest to a value.

In affine packing they are whole numbers. In MLX's float modes codes, and the scales, are small floats: E2M1 and E4M3 of
the OCP Microscaling Formats specification 1.0, scaled by a power of two (E8M0; "mxfp4", "mxfp8") or by an E4M3
("nvfp4"). ``xp`` is the module that the arrays are of, numpy or mlx.core: both have the few functions used here.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from math import nan
from typing import Any

from .packing import Packing


@dataclass(frozen=True)
class Minifloat:
    """A float of one byte or less: a sign, then an exponent, ``mantissa`` bits; ``bias`` of the exponent. ``top``: the
    code of the largest number, behind which there are none."""

    bits: int
    mantissa: int
    bias: int
    top: int

    def value(self, code: int) -> float:
        """What a code stands for; not a number behind ``top``."""
        sign, code = divmod(code, 1 << (self.bits - 1))
        exponent, fraction = divmod(code, 1 << self.mantissa)
        whole = fraction + (1 << self.mantissa if exponent else 0)
        size = whole * 2.0 ** (max(exponent, 1) - self.bias - self.mantissa)
        return nan if code > self.top else -size if sign else size

    def nearest(self, x: Any, xp: Any) -> Any:
        """The code nearest to each number, the even one of two as near; what is too large takes the largest.

        The codes of positive numbers are consecutive, and where their exponent is e they lie 2^(e - mantissa) apart.
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
    """The codes, as floats, that stand for what is nearest to ``x``, an array."""
    if packing.affine:
        return xp.clip(xp.round(x), 0, 2**packing.bits - 1)
    return CODES[packing.mode].nearest(x, xp)


def values(codes: Any, packing: Packing, xp: Any) -> Any:
    """What these codes stand for."""
    if packing.affine:
        return codes
    return xp.array(_values(CODES[packing.mode]), dtype=xp.float32)[codes.astype(xp.int32)]


def scales(stored: Any, packing: Packing, xp: Any) -> Any:
    """The scales that were stored, in float32."""
    if packing.affine:
        return stored.astype(xp.float32)
    table = _values(E4M3) if packing.mode == "nvfp4" else POWERS
    return xp.array(table, dtype=xp.float32)[stored.astype(xp.int32)]
