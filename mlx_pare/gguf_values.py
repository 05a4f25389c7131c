"""The values of one tensor as a GGUF file has them: rows in the order of llama.cpp's rope, encoded, checked."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from .checkpoint import Checkpoint
from .errors import PareError
from .gguf_rows import Row
from .gguf_types import TYPES


def encoded(checkpoint: Checkpoint, row: Row, q_norm: float = 1.0) -> Iterator[memoryview]:
    """The bytes of one tensor as they stand in the file, a few rows at a time; ``q_norm``: see gguf_target.Target.

    Raises PareError for values that are not finite, or not in the row's type."""
    import mlx.core as mx

    from .quantized import Packed
    from .slices import read_panels

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
    """float32 rows (an MLX array) as uint8 of a type: "F32", "F16" or "Q8_0"."""
    import mlx.core as mx
    import numpy as np

    if kind == "Q8_0":
        return _q8_0(values)
    values = mx.contiguous(values.astype({"F32": mx.float32, "F16": mx.float16}[kind]))
    return np.array(values, copy=False).reshape(-1).view(np.uint8)


def _q8_0(values: Any) -> Any:
    """Blocks of 32 values: a scale in float16, codes of 8 bits rounded half away from zero. The bytes that
    quantize_row_q8_0_ref of ggml-quants.c and gguf.quants write, in a third of the latter's time; on the CPU, whose
    divisions are exact."""
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


def _checked(raw: Any, values: Any, row: Row) -> memoryview:
    """Encoded rows. Raises PareError for what is not finite, before or after."""
    import mlx.core as mx

    if not finite(raw, row.type):
        if not mx.isfinite(values).all():
            raise PareError(f"{row.source.name} holds NaN or infinity", "the checkpoint is damaged")
        raise PareError(f"{row.source.name} has values too large for {row.type}", "export as f32")
    return raw.data


def finite(raw: Any, kind: str) -> bool:
    """Whether encoded whole values (Q8_0: blocks) are finite; ``raw`` is uint8."""
    import numpy as np

    if kind == "Q8_0":
        raw = np.ascontiguousarray(raw.reshape(-1, TYPES[kind].size)[:, :2]).reshape(-1)
    # infinity and NaN have all bits of the exponent; np.isfinite takes twenty times as long for float16
    bits, exponent = (raw.view("<u4"), 0x7F800000) if kind == "F32" else (raw.view("<u2"), 0x7C00)
    return bool((bits & exponent).max() < exponent)
