"""Tensors of a GGUF file on their way into an MLX checkpoint: a few rows at a time, in our order, as the bytes that MLX
stores, and how much of them was rounded."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import IO

import mlx.core as mx
import numpy as np

from ...arch import Tensor
from ...base.errors import PareError
from ...tensors.packed import MX_DTYPE, Packed, energies, pack, pack_codes, raw_bytes
from ...tensors.packing import Packing
from ...tensors.panels import PANEL_VALUES, row_panels
from ...tensors.safetensors import Entry
from ...tensors.shards import Planned
from . import blocks as gguf_blocks

FLOATS = {"F32": np.dtype("<u4"), "F16": np.dtype("<u2"), "BF16": np.dtype("<u2")}  # type -> dtype of its bits
EXPONENT = {"F32": 0x7F800000, "F16": 0x7C00, "BF16": 0x7F80}  # all of these bits: NaN or infinity
TINY = 2.0**-24  # the smallest difference to 0 in float16, and to 1 in float32


@dataclass(frozen=True)
class Row:
    """One tensor.

    ``stored``: where its rows lie as bytes. ``order``: the stored row of each of our rows; None: the same. ``dtype``:
    of floats, or of scales. ``packing``: of codes; None: the tensor becomes floats.
    """

    tensor: Tensor
    kind: str
    stored: Entry
    order: Sequence[int] | None
    dtype: str
    packing: Packing | None

    def planned(self) -> list[Planned]:
        """The tensors that it becomes."""
        if self.packing is None:
            return [Planned(self.tensor.name, self.dtype, self.tensor.shape)]
        (rows, columns), module = self.tensor.shape, self.tensor.module
        groups, scale = (rows, self.packing.groups(columns)), self.packing.scale_dtype(self.dtype)
        rest = [Planned(f"{module}.{part}", scale, groups) for part in self.packing.parts[1:]]
        return [Planned(self.tensor.name, "U32", (rows, self.packing.words(columns))), *rest]

    def panels(self) -> Iterator[np.ndarray]:
        """Read its rows as they are stored, some at a time, in our order.

        Returns:
            Panels, uint8 [some rows, bytes of a row].
        """
        yield from row_panels(self.stored, self.order, max(1, PANEL_VALUES // self.tensor.shape[-1]))


@dataclass
class Rounding:
    """What was lost by a type that no packing holds exactly: energies of the error and of the weights."""

    tensors: int = 0
    lost: float = 0.0
    whole: float = 0.0
    worst: float = 0.0

    def add(self, lost: float, whole: float) -> None:
        self.tensors, self.lost, self.whole = self.tensors + 1, self.lost + lost, self.whole + whole
        self.worst = max(self.worst, (lost / whole) ** 0.5 if whole else 0.0)


# ---- floats ----


def holds(row: Row, dtype: str) -> bool:
    """Whether a dtype holds all values of a vector."""
    return all(_hold(gguf_blocks.dense(panel, row.kind).reshape(-1), row, dtype) for panel in row.panels())


def _hold(values: np.ndarray, row: Row, dtype: str) -> bool:
    """Whether a dtype holds these numbers as ``_shifted`` has them, except for what is too small for float16."""
    shifted = _shifted(values, row)
    found = np.array(_cast(shifted, dtype).astype(mx.float32))
    if shifted is not values:
        found, shifted = found + np.float32(1), values
    return bool((np.abs(found - shifted) <= TINY).all())


def _shifted(values: np.ndarray, row: Row) -> np.ndarray:
    """A Gemma norm without the 1 that the file includes. The difference is exact for values above a half.

    The model adds the 1 again, and gets what the file says.
    """
    return values - np.float32(1) if "norm+1" in row.tensor.spec.transforms else values


def _cast(values: np.ndarray, dtype: str) -> mx.array:
    return mx.array(values).astype(MX_DTYPE[dtype])


def float_parts(row: Row, rounded: dict[str, Rounding]) -> Iterator[memoryview]:
    """Convert a tensor to the bytes of its floats.

    Args:
        row: the tensor.
        rounded: by GGUF type, what was lost so far; the tensor is added unless its type is a float type.
    Returns:
        The bytes of ``row.dtype``, a few rows at a time.
    Raises:
        PareError: a value is NaN, infinite or too large for the dtype.
    """
    same = row.kind == row.dtype and "norm+1" not in row.tensor.spec.transforms
    lost = whole = 0.0
    for panel in row.panels():
        if same:
            yield _finite(panel, row)
            continue
        values = _shifted(gguf_blocks.dense(panel, row.kind), row)
        made = _cast(values, row.dtype)
        yield _finite(np.frombuffer(raw_bytes(made), np.uint8), row)
        if row.kind not in FLOATS:
            error = np.array(made.astype(mx.float32)) - values
            lost, whole = lost + float(np.square(error).sum()), whole + float(np.square(values).sum())
    if row.kind not in FLOATS:
        rounded.setdefault(row.kind, Rounding()).add(lost, whole)


def _finite(raw: np.ndarray, row: Row) -> memoryview:
    """The bytes of floats. Raises PareError for NaN and infinity."""
    raw = np.ascontiguousarray(raw).reshape(-1)
    if ((raw.view(FLOATS[row.dtype]) & EXPONENT[row.dtype]) == EXPONENT[row.dtype]).any():
        raise _unsound(row)
    return raw.data


def _unsound(row: Row) -> PareError:
    return PareError(
        f"{row.tensor.name} holds NaN, infinity, or numbers too large for {row.dtype}", "the GGUF file is damaged"
    )


# ---- codes ----


def _packed(panel: np.ndarray, row: Row) -> tuple[Packed, np.ndarray | None]:
    """Some rows as MLX packs them, and the energies [2] of the rounding; None if nothing is rounded."""
    form = gguf_blocks.FORMS.get(row.kind)
    if form is None:
        values = mx.array(gguf_blocks.dense(panel, row.kind))
        if not mx.isfinite(values).all().item():
            raise _unsound(row)
        made = pack(values, row.packing, mx.float16)
        return made, energies(values, made)
    codes, scales, biases = gguf_blocks.parts(panel, row.kind)
    words = mx.array(pack_codes(codes, row.packing.bits))
    if not row.packing.affine:
        return Packed(words, mx.array(scales), None, row.packing), None
    with np.errstate(over="ignore"):
        made = Packed(words, mx.array(scales.astype(np.float16)), mx.array(biases.astype(np.float16)), row.packing)
    if form.exact:
        return made, None
    exact = Packed(words, mx.array(scales), mx.array(biases), row.packing)
    return made, energies(exact.dense(), made)


def words(row: Row, rest: Sequence[IO[bytes]], rounded: dict[str, Rounding]) -> Iterator[memoryview]:
    """Convert a tensor to packed words; its scales and biases are written to files meanwhile.

    Args:
        row: the tensor.
        rest: open files, one for the scales, and one for the biases if the packing is affine.
        rounded: by GGUF type, what was lost so far; the tensor is added if anything was rounded.
    Returns:
        The bytes of the words, a few rows at a time.
    Raises:
        PareError: a value is NaN, infinite or too large for float16.
    """
    total = None
    for panel in row.panels():
        made, lost = _packed(panel, row)
        scales, *biases = list(made.arrays.values())[1:]
        sound = mx.isfinite(scales).all() & mx.isfinite(biases[0]).all() if biases else (scales < 255).all()
        if not sound.item():
            raise _unsound(row)
        for file, array in zip(rest, (scales, *biases), strict=True):
            file.write(raw_bytes(array))
        total = lost if total is None else total + lost
        yield raw_bytes(made.words)
    if total is not None:
        rounded.setdefault(row.kind, Rounding()).add(*map(float, total))
