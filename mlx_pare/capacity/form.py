"""How weights are to be stored: as they are, packed by MLX, as a type of GGUF, or as floats."""

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
    """How the weights are to be stored: packed by MLX, as GGUF of a kind like "q4_k_m", or as floats of 2 or 4 bytes;
    none of them: as they are."""

    packing: Packing | None = None
    gguf: str | None = None
    floats: int | None = None

    @classmethod
    def named(cls, bits: str | None = None, group_size: int = 64, gguf: str | None = None) -> Form:
        """From what the command line gives: "4" or "mxfp4", "q4_k_m". Raises UsageError."""
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
        """How any tensor is stored in this form, beside floats of ``width`` bytes; None: as it is."""
        if self.gguf:
            return gguf(arch, self.gguf)
        if self.floats:
            return footprint.dense(self.floats)
        return footprint.packed(replace(self.packing, scale_bytes=width), width) if self.packing else None

    def weights(self, arch: Architecture, storage: Storage) -> Weights:
        """What is known of weights stored so."""
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
    """As a GGUF file of ``kind`` ("f16", "q8_0", "q4_k_m") holds them. Tensor data only: no header, no padding.

    Raises UsageError for an unknown kind.
    """
    from ..gguf.quant_mixes import storage

    return storage(arch, kind)
