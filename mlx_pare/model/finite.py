"""NaN and infinite weights: which tensor holds them. One such weight makes all later numbers worthless."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np

from ..base.errors import PareError
from ..tensors.safetensors import Entry
from .checkpoint import Checkpoint

# dtype -> integers that hold its bits, and the exponent's bits, which are all set in NaN and infinity
EXPONENTS = {"F32": ("<u4", 0x7F800000), "BF16": ("<u2", 0x7F80), "F16": ("<u2", 0x7C00)}
PANEL = 1 << 24  # bytes that are checked together
CURE = "the model is damaged: download or convert it again"


def broken(checkpoint: Checkpoint, names: Iterable[str] | None = None) -> str | None:
    """The first stored tensor that holds NaN or infinity; None if there is none.

    ``names``: the modules to look at; None: all.
    """
    wanted = None if names is None else set(names)
    for name, entry in checkpoint.entries.items():
        module = name.rpartition(".")[0]
        if (wanted is None or module in wanted) and not _finite(entry, _float_mode(checkpoint, name, module)):
            return name
    return None


def require(checkpoint: Checkpoint, names: Iterable[str] | None = None) -> None:
    """Raise PareError, naming the tensor, if a weight is NaN or infinite. ``names`` as in ``broken``."""
    if name := broken(checkpoint, names):
        raise PareError(f"{checkpoint.path}: {name} holds NaN or infinite numbers", CURE)


def outside(checkpoint: Checkpoint) -> list[str]:
    """The modules outside the layers: embedding, last norm, head."""
    return [tensor.module for tensor in checkpoint.arch.tensors() if tensor.layer is None]


def blame(path: Path, layer: int) -> PareError:
    """The error for states behind a layer that are not finite. It blames a broken weight in or outside the layers, or
    the text."""
    checkpoint = Checkpoint(path)
    modules = [tensor.module for tensor in checkpoint.arch.tensors() if tensor.layer == layer]
    if name := broken(checkpoint, [*outside(checkpoint), *modules]):
        return PareError(f"{path}: {name} holds NaN or infinite numbers", CURE)
    return PareError(
        f"{path} computes infinite numbers in layer {layer}, though its weights are finite",
        "use other text; if the model is stored as float16, convert it to bfloat16",
    )


def _float_mode(checkpoint: Checkpoint, name: str, module: str) -> str | None:
    """The mode of scales that are 8-bit floats; None for all other tensors."""
    packing = checkpoint.packing(module) if name.endswith(".scales") else None
    return packing.mode if packing is not None and not packing.affine else None


def _finite(entry: Entry, mode: str | None) -> bool:
    if mode is not None:  # nvfp4 has E4M3: NaN of either sign; the others have E8M0, without a sign
        mask, nan = (0x7F, 0x7F) if mode == "nvfp4" else (0xFF, 0xFF)
        return all((part & mask != nan).all() for part in _panels(entry, "u1"))
    if entry.dtype not in EXPONENTS:
        return True
    width, exponent = EXPONENTS[entry.dtype]
    return all(int((part & exponent).max(initial=0)) < exponent for part in _panels(entry, width))


def _panels(entry: Entry, width: str) -> Iterator[np.ndarray]:
    with entry.file.open("rb") as file:
        file.seek(entry.start)
        left = entry.nbytes
        while left and (raw := file.read(min(left, PANEL))):
            left -= len(raw)
            yield np.frombuffer(raw, width)
