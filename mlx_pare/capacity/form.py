"""The form that weights are stored in: as they are, packed by MLX, as a type of GGUF, or as floats."""

from __future__ import annotations

from dataclasses import dataclass, replace

from ..arch import Architecture
from ..base.errors import UsageError
from ..model import footprint
from ..model.footprint import Storage
from ..tensors.packing import BITS, FLOAT_MODES, GROUP_SIZES, Packing
from . import planner
from .planner import Weights


@dataclass(frozen=True)
class Form:
    """How to store the weights: packed by MLX, as GGUF of a kind like "q4_k_m", or as floats of 2 or 4 bytes.

    If none of them is given, weights stay as they are.
    """

    packing: Packing | None = None
    gguf: str | None = None
    floats: int | None = None

    @classmethod
    def named(cls, bits: str | None = None, group_size: int = 64, gguf: str | None = None) -> Form:
        """Read the form from the values of command-line options.

        Args:
            bits: "2" to "8", "16", "32", or a mode such as "mxfp4"; None: not given.
            group_size: values per group of a packing with "2" to "8" bits.
            gguf: kind of GGUF such as "q4_k_m"; None: not given.
        Raises:
            UsageError: both are given, or one is unknown.
        """
        if bits and gguf:
            raise UsageError("--bits and --gguf are two forms", "give one of them")
        if gguf:
            from ..gguf.quant_mixes import known

            return cls(gguf=known(gguf))
        if bits is None:
            return cls()
        if bits in ("16", "32"):
            return cls(floats=int(bits) // 8)
        if bits.lower() in FLOAT_MODES:
            return cls(Packing.named(bits.lower()))
        if not (bits.isdecimal() and int(bits) in BITS and group_size in GROUP_SIZES):
            known = ", ".join([*map(str, BITS), "16", "32", *FLOAT_MODES])
            raise UsageError(
                f"MLX cannot pack {bits} bits in groups of {group_size}", f"bits are {known}, groups 32, 64, 128"
            )
        return cls(Packing(int(bits), group_size))

    def storage(self, arch: Architecture, width: int = 2) -> Storage | None:
        """Return how a tensor is stored in this form, if other floats have ``width`` bytes; None: as it is."""
        if self.gguf:
            return gguf(arch, self.gguf)
        if self.floats:
            return footprint.dense(self.floats)
        return footprint.packed(replace(self.packing, scale_bytes=width), width) if self.packing else None

    def weights(self, arch: Architecture, storage: Storage) -> Weights:
        """Count weights stored in this form."""
        found = planner.stored(arch, storage)
        k_quants = footprint.read_bytes(arch, footprint.dense(1)) if self.gguf and "_k" in self.gguf else 0
        return replace(found, k_quants=k_quants)

    @property
    def given(self) -> bool:
        """Whether a form was asked for."""
        return bool(self.packing or self.gguf or self.floats)

    def __str__(self) -> str:
        if self.floats:
            return "16-bit floats" if self.floats == 2 else "32-bit floats"
        return f"GGUF {self.gguf}" if self.gguf else str(self.packing or "as stored")


def gguf(arch: Architecture, kind: str) -> Storage:
    """Return how a GGUF file of ``kind`` ("f16", "q8_0", "q4_k_m") stores tensors. Data only: no header, no padding.

    Raises UsageError if the kind is unknown.
    """
    from ..gguf.quant_mixes import storage

    return storage(arch, kind)
