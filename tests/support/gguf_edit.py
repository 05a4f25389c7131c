"""GGUF files changed by gguf-py, which imports nothing of ours: other types of tensors, other metadata, faults."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np

Change = Callable[[str, np.ndarray], tuple[np.ndarray, str] | None]  # name, values -> values and type; None: left out


def edited(
    source: Path, out: Path, metadata: Mapping[str, Any] | None = None, change: Change | None = None, **writer: Any
) -> Path:
    """Write ``source`` again as ``out``: ``metadata`` replaces values (None: takes the key away), ``change`` tensors,
    whose values it gets in float32. ``writer``: more of gguf.GGUFWriter."""
    reader, metadata = gguf.GGUFReader(source), dict(metadata or {})
    architecture = metadata.pop("general.architecture", None) or reader.fields["general.architecture"].contents()
    made = gguf.GGUFWriter(out, architecture, **writer)
    for name, field in reader.fields.items():
        if name.startswith("GGUF.") or name == "general.architecture":
            continue
        value = metadata.pop(name, field.contents())
        if value is not None:
            sub = field.types[-1] if field.types[0] == gguf.GGUFValueType.ARRAY else None
            made.add_key_value(name, value, field.types[0], sub)
    for name, value in metadata.items():
        if value is not None:
            kinds = {str: "STRING", bool: "BOOL", int: "UINT32", float: "FLOAT32", list: "ARRAY"}
            made.add_key_value(name, value, gguf.GGUFValueType[kinds[type(value)]], gguf.GGUFValueType.FLOAT32)
    for tensor in reader.tensors:
        values = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        found = change(tensor.name, values) if change else (values, tensor.tensor_type.name)
        if found is not None:
            add(made, tensor.name, *found)
    made.write_header_to_file()
    made.write_kv_data_to_file()
    made.write_tensors_to_file()
    made.close()
    return out


def add(writer: gguf.GGUFWriter, name: str, values: np.ndarray, kind: str) -> None:
    """One tensor of a type that gguf-py can write."""
    number = gguf.GGMLQuantizationType[kind]
    if kind in ("F32", "F16"):
        writer.add_tensor(name, values.astype({"F32": np.float32, "F16": np.float16}[kind]))
    else:
        writer.add_tensor(name, gguf.quants.quantize(values.astype(np.float32), number), raw_dtype=number)


def matrices(kind: str) -> Change:
    """All matrices in one type; vectors stay F32."""
    return lambda name, values: (values, kind if values.ndim > 1 else "F32")
