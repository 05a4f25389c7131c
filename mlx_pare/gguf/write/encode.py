"""The values of one tensor as a GGUF file stores them: rows in the order of llama.cpp's rope, encoded, checked."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from ...base.errors import PareError
from ...model.checkpoint import Checkpoint
from ..types import SCALES, TYPES
from .tensors import Row

FLOATS = ("F32", "F16", "BF16")


def encoded(checkpoint: Checkpoint, row: Row, q_norm: float = 1.0) -> Iterator[memoryview]:
    """Encode one tensor as it is stored in the file, a few rows at a time.

    Args:
        checkpoint: the model.
        row: the tensor of the file.
        q_norm: factor on the weights of q_norm (architectures.Target).
    Returns:
        The bytes.
    Raises:
        PareError: a value is not finite, or becomes infinite in the row's type.
    """
    import mlx.core as mx

    from ...model.weights import read_panels
    from ...tensors.packed import Packed

    if row.source is None:
        yield convert(mx.array(row.constant), row.type).data
        return
    for panel in read_panels(checkpoint, row.source, row.take):
        values = panel.dense() if isinstance(panel, Packed) else panel.astype(mx.float32)
        if "norm+1" in row.source.spec.transforms:
            values = (values + 1) * (q_norm if row.source.spec.role == "q_norm" else 1)
        if row.factor != 1:
            values = values * row.factor
        yield _checked(convert(values, row.type), values, row)


def convert(values: Any, kind: str) -> Any:
    """Encode float32 rows as a GGUF type.

    Args:
        values: an MLX array, float32 [..., columns].
        kind: F32, F16, BF16, Q8_0, Q6_K, Q4_0, Q4_1, Q5_0 or Q5_1.
    Returns:
        The bytes, a flat uint8 numpy array.
    """
    import mlx.core as mx
    import numpy as np

    if kind in ("Q8_0", "Q6_K"):
        return _q8_0(values) if kind == "Q8_0" else _q6_k(values)
    if kind not in FLOATS:
        import gguf

        with np.errstate(over="ignore", invalid="ignore"):  # `finite` looks at what came out
            return gguf.quants.quantize(np.array(values), gguf.GGMLQuantizationType[kind]).reshape(-1)
    values = mx.contiguous(values.astype({"F32": mx.float32, "F16": mx.float16, "BF16": mx.bfloat16}[kind]))
    values = values.view(mx.uint16) if kind == "BF16" else values  # numpy has no bfloat16
    return np.array(values, copy=False).reshape(-1).view(np.uint8)


def _q8_0(values: Any) -> Any:
    """Blocks of 32 values: a scale in float16, codes of 8 bits rounded half away from zero.

    The bytes are those of quantize_row_q8_0_ref of ggml-quants.c and of gguf.quants, in a third of the latter's time.
    It runs on the CPU, whose divisions are exact.
    """
    import mlx.core as mx
    import numpy as np

    with mx.stream(mx.cpu):
        blocks = values.reshape(-1, 32)
        scales = mx.abs(blocks).max(axis=1, keepdims=True) / 127
        scaled = blocks * mx.where(scales == 0, 0, 1 / scales)
        whole = mx.floor(mx.abs(scaled))
        codes = mx.sign(scaled) * (whole + mx.floor(2 * (mx.abs(scaled) - whole)))
        parts = scales.astype(mx.float16), codes.astype(mx.int8)
        mx.eval(parts)
    return np.concatenate([np.array(part, copy=False).view(np.uint8) for part in parts], axis=1).reshape(-1)


def _q6_k(values: Any) -> Any:
    """Blocks of 256 values: codes of 6 bits, an 8-bit scale for every 16, and one scale in float16 for the block.

    Layout and choice of scales are those of quantize_row_q6_K_ref of ggml-quants.c. Of 19 scales near the one that the
    largest value asks for, it takes that of the least error, weighted by the square of the values.
    """
    import mlx.core as mx
    import numpy as np

    with mx.stream(mx.cpu):
        scales = _best_scales(values.reshape(-1, 16)).reshape(-1, 16)
        largest = mx.take_along_axis(scales, mx.argmax(mx.abs(scales), axis=1, keepdims=True), axis=1)
        ratio = mx.where(largest == 0, 0, -128 / largest)
        whole = mx.where(largest == 0, 0, 1 / ratio).astype(mx.float16)
        parts = mx.minimum(mx.round(scales * ratio), 127)
        steps = (whole.astype(mx.float32) * parts)[..., None]
        codes = mx.clip(mx.round(values.reshape(-1, 16, 16) / steps), -32, 31) + 32
        codes = mx.where(steps == 0, 0, codes).astype(mx.uint8).reshape(-1, 2, 4, 32)
        low, high = codes & 15, codes >> 4
        low = low[:, :, :2] | (low[:, :, 2:] << 4)
        high = high[:, :, 0] | (high[:, :, 1] << 2) | (high[:, :, 2] << 4) | (high[:, :, 3] << 6)
        stored = low, high, parts.astype(mx.int8), whole
        mx.eval(stored)
    return np.concatenate([np.array(p).reshape(len(p), -1).view(np.uint8) for p in stored], axis=1).reshape(-1)


def _best_scales(parts: Any) -> Any:
    """The scale of every row of [n, 16] whose codes of 6 bits, -32 to 31, come nearest; 0 if all is (nearly) 0."""
    import mlx.core as mx

    peak = mx.take_along_axis(parts, mx.argmax(mx.abs(parts), axis=1, keepdims=True), axis=1)
    nothing = mx.abs(peak) < 1e-15
    weights, best, scales = mx.square(parts), None, None
    for step in sorted(range(-9, 10), key=bool):  # the plain one first
        codes = mx.clip(mx.round(parts * (-(32 + 0.1 * step) / peak)), -32, 31)
        weighted = weights * codes
        along, square = (weighted * of for of in (parts, codes))
        along, square = along.sum(axis=1, keepdims=True), square.sum(axis=1, keepdims=True)
        found = along / square
        better = mx.array(True) if best is None else mx.square(along) > best * square
        scales = found if best is None else mx.where(better, found, scales)
        best = found * along if best is None else mx.where(better, found * along, best)
        mx.eval(scales, best)
    return mx.where(nothing, 0, scales)


def _checked(raw: Any, values: Any, row: Row) -> memoryview:
    """Encoded rows. Raises PareError for values that are not finite, before or after."""
    import mlx.core as mx

    told = row.type in (*FLOATS, "Q8_0")  # by the encoded bytes alone; others hide a value among those of its block
    if not finite(raw, row.type) or not (told or mx.isfinite(values).all()):
        if not mx.isfinite(values).all():
            raise PareError(f"{row.source.name} holds NaN or infinity", "the checkpoint is damaged")
        raise PareError(f"{row.source.name} has values too large for {row.type}", "export as f32")
    return raw.data


def finite(raw: Any, kind: str) -> bool:
    """Check that encoded values are finite; of blocks, the numbers that scale them, if there are any.

    Args:
        raw: uint8 [bytes], of whole values or blocks.
        kind: the GGUF type.
    Returns:
        Whether no number is NaN or infinite.
    """
    import numpy as np

    if kind not in FLOATS:
        if kind not in SCALES:
            return True
        raw = np.ascontiguousarray(raw.reshape(-1, TYPES[kind].size)[:, slice(*SCALES[kind])]).reshape(-1)
    # infinity and NaN have all bits of the exponent; np.isfinite takes twenty times as long for float16
    width, exponent = {"F32": ("<u4", 0x7F800000), "BF16": ("<u2", 0x7F80)}.get(kind, ("<u2", 0x7C00))
    bits = raw.view(width)
    return bool((bits & exponent).max() < exponent)
