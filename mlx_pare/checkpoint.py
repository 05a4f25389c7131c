"""A model directory: config, tensor headers, lazy arrays. New ones are written by shards.py.

Headers are read here, bounded and without any array library, so that looking at a model costs milliseconds. Nothing of
a checkpoint is trusted: sizes are checked before anything is allocated, names before anything is opened.
"""

from __future__ import annotations

import hashlib
import json
import os
import stat
import struct
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from . import bounded
from .arch import Architecture, Tensor, describe, supported_types
from .errors import PareError, Unsupported
from .packing import FLOAT_MODES, Packing

MAX_DIMENSIONS = 16
PIECE = 256  # bytes of every tensor that tell models apart
MAX_HEADER = bounded.MAX_JSON  # the safetensors library takes 100 MB, which would be 2 GB in memory
MAX_TENSORS = 1 << 18  # of all files together; the largest real model has 140,000
DTYPE_BYTES = {
    "F64": 8,
    "F32": 4,
    "F16": 2,
    "BF16": 2,
    "I64": 8,
    "I32": 4,
    "U64": 8,  # of random states
    "U32": 4,
    "I16": 2,
    "U16": 2,
    "I8": 1,
    "U8": 1,
    "BOOL": 1,
    "F8_E4M3": 1,  # counted, not read: mlx-lm unpacks them
    "F8_E5M2": 1,
    "F8_E8M0": 1,
}
FLOATS = {"F32", "F16", "BF16"}
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
    "chat_template.jinja",
    "generation_config.json",
)


def tokenizer_files(directory: Path) -> list[Path]:
    """The files of a model directory that make its tokenizer and its chat templates, those that are there."""
    named = [directory / name for name in TOKENIZER_FILES]
    return [f for f in (*named, *sorted((directory / bounded.MORE_TEMPLATES).glob("*.jinja"))) if f.is_file()]


@dataclass(frozen=True, slots=True)
class Entry:
    """Where one tensor lies: ``start`` and ``end`` are byte offsets in ``file``."""

    file: Path
    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int

    @property
    def nbytes(self) -> int:
        return self.end - self.start


def read_json(path: Path, what: str, most: int = bounded.MAX_JSON, budget: int = bounded.BUDGET) -> dict[str, Any]:
    """A JSON object from a file of bounded size; ``what`` it is goes into the PareError when it is not one."""
    try:
        found = bounded.loads(bounded.contents(path, most, what), budget)
    except OSError as error:
        raise PareError(f"cannot read {what} {path}: {error.strerror}") from error
    except ValueError as error:
        raise PareError(f"{what} {path} is not valid JSON: {error}") from error
    if not isinstance(found, dict):
        raise PareError(f"{what} {path} holds a {type(found).__name__}, expected an object")
    return found


def read_header(path: Path) -> dict[str, Entry]:
    """The tensor table of one safetensors file. Raises PareError when it is cut off or its header makes no sense."""
    try:
        found = path.stat()
        if not stat.S_ISREG(found.st_mode):
            raise PareError(f"{path} is not a safetensors file but a directory or a device")
        size = found.st_size
        with path.open("rb") as file:
            prefix = file.read(8)
            length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else 0
            if not 2 <= length <= min(MAX_HEADER, size - 8):
                raise PareError(
                    f"{path} is not a safetensors file or is cut off ({size} bytes)", "download or copy it again"
                )
            raw = file.read(length)
    except OSError as error:
        raise PareError(f"cannot read {path}: {error.strerror}") from error
    try:
        table = bounded.loads(raw, unique=True)
        table.pop("__metadata__", None)
        entries = {name: _entry(path, 8 + length, info) for name, info in table.items()}
        _check_contiguous(entries, 8 + length)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise PareError(f"the header of {path} is damaged: {error}", "download or copy it again") from error
    end = max((e.end for e in entries.values()), default=8 + length)
    if end != size:
        raise PareError(
            f"{path} has {size} bytes, its header describes {end}",
            "it is cut off or damaged: download or copy it again",
        )
    return entries


def read_headers(directory: Path) -> dict[str, Entry]:
    """The tensors of every model*.safetensors of a directory, by name: mlx_lm/utils.py load_model merges them all and
    never looks at the index. Raises PareError for a link out of the directory, a name that two files have, and as
    read_header does."""
    bounded.check_links(directory)
    entries: dict[str, Entry] = {}
    for file in sorted(directory.glob("model*.safetensors")):
        for name, entry in read_header(file).items():
            if name in entries:
                raise PareError(f"tensor {name} is in {entries[name].file.name} and in {file.name}")
            entries[name] = entry
        if len(entries) > MAX_TENSORS:
            raise PareError(f"{directory} holds more than {MAX_TENSORS} tensors")
    return entries


def _check_contiguous(entries: Mapping[str, Entry], base: int) -> None:
    """As the safetensors library: every byte belongs to exactly one tensor."""
    end = base
    for name, entry in sorted(entries.items(), key=lambda item: (item[1].start, item[1].end)):
        if entry.start != end:
            raise ValueError(f"{name} starts at byte {entry.start - base}, expected {end - base}")
        end = entry.end


def _entry(path: Path, base: int, info: Mapping[str, Any]) -> Entry:
    start, end = info["data_offsets"]
    shape = tuple(info["shape"])
    if any(type(n) is not int or not 0 <= n < 2**63 for n in (start, end, *shape)):
        raise ValueError(f"{info['data_offsets']} and {info['shape']} are not whole numbers of a possible size")
    if info["dtype"] not in DTYPE_BYTES:
        raise PareError(
            f"{path} holds tensors of type {info['dtype']}, which is not supported", "convert it with mlx_lm.convert"
        )
    if len(shape) > MAX_DIMENSIONS:  # the product of a hundred thousand numbers takes hours
        raise ValueError(f"{len(shape)} dimensions")
    size = DTYPE_BYTES[info["dtype"]]
    for n in shape:
        size *= n
    if end - start != size:
        raise ValueError(f"{end - start} bytes for {info['dtype']} {list(shape)}")
    return Entry(path, info["dtype"], shape, base + start, base + end)


class Checkpoint:
    """A model directory opened for reading. Raises PareError when it cannot be the model its config describes."""

    def __init__(self, path: str | os.PathLike[str]):
        self.path = Path(path)
        if not self.path.is_dir():
            raise PareError(
                f"no model directory at {self.path}", "give the path of a directory with config.json and *.safetensors"
            )
        bounded.check_links(self.path)
        self.config = read_json(self.path / "config.json", "model config")
        files = sorted(self.path.glob("model*.safetensors"))
        if not files:
            raise PareError(f"no model*.safetensors in {self.path}")
        self._check_index(files)
        self.entries = read_headers(self.path)
        # known to the header, so that fit can count them
        for entry in self.entries.values():
            if entry.dtype.startswith("F8"):
                raise Unsupported(
                    f"{entry.file} holds tensors of type {entry.dtype}, which is not supported",
                    "convert it with mlx_lm.convert",
                )
        self._quantization = self._read_quantization()

    def _check_index(self, files: list[Path]) -> None:
        index = self.path / "model.safetensors.index.json"
        if not index.exists():
            return
        weight_map = read_json(index, "weight index").get("weight_map", {})
        if not isinstance(weight_map, dict):
            raise PareError(f"weight index {index} has no weight_map of names", "download or copy it again")
        listed = {str(f) for f in weight_map.values()}
        missing = sorted(listed - {f.name for f in files})
        if missing:
            raise PareError(f"{self.path} lacks {missing[0]}, which its index lists", "download or copy it again")

    def _read_quantization(self) -> dict[str, Any]:
        found = self.config.get("quantization")
        if found is None:
            other = self.config.get("quantization_config")
            if other:
                method = other.get("quant_method", "unknown") if isinstance(other, dict) else other
                raise Unsupported(
                    f"{self.path} is quantized by {method!r}, which is not supported",
                    "supported are dense fp32/fp16/bf16 and MLX's own packings: convert it with mlx_lm.convert",
                )
            return {}
        if not isinstance(found, dict):
            raise PareError(f"{self.path}: config.json says quantization = {found!r}, expected an object")
        specs = {"": found, **{f" of {k}": v for k, v in found.items() if isinstance(v, dict)}}
        modes = {str(spec.get("mode", "affine")) for spec in specs.values()}
        if unknown := sorted(modes - {"affine", *FLOAT_MODES}):
            raise Unsupported(
                f"{self.path} uses quantization mode {', '.join(unknown)!r}, which is not supported",
                f"supported modes are affine, {', '.join(FLOAT_MODES)}",
            )
        if not any(name.endswith(".scales") for name in self.entries):
            return {}  # nothing is packed: mlx-lm loads it dense, whatever the config says
        for where, spec in specs.items():
            try:
                Packing.of_config(spec)
            except ValueError as error:
                bits, group = (spec.get(key) for key in ("bits", "group_size"))
                raise PareError(
                    f"{self.path}: the quantization{where} has {bits!r} bits in groups of {group!r}", str(error)
                ) from error
        if self.config.get("quantize_activations"):
            raise Unsupported(
                f"{self.path} rounds what goes through it too (quantize_activations), which is not supported",
                "take the key out of config.json: the weights are the same",
            )
        return found

    @property
    def quantized(self) -> bool:
        return bool(self._quantization)

    @property
    def quantization(self) -> Packing | None:
        """The default packing of a quantized checkpoint."""
        if not self.quantized:
            return None
        return Packing.of_config(self._quantization, DTYPE_BYTES[self._float])

    @cached_property
    def arch(self) -> Architecture:
        """The architecture, after checking that every tensor is described, present and of its shape."""
        arch = describe(self.config, untied="lm_head.weight" in self.entries)
        if not (arch.cuttable or arch.family.result):
            raise Unsupported(
                f"{self.path} is of type {self.config['model_type']}, which can be planned for, but not cut",
                f"supported types are {', '.join(supported_types())}",
            )
        expected = {t.name: t for t in arch.tensors()}
        self._check_described(arch, expected)
        for tensor in expected.values():
            self._check_shape(tensor)
        return arch

    def _check_described(self, arch: Architecture, expected: Mapping[str, Tensor]) -> None:
        missing = [name for name in expected if name not in self.entries]
        if missing:
            raise PareError(
                f"{self.path} lacks {missing[0]}"
                + (f" and {len(missing) - 1} more tensors" if len(missing) > 1 else "")
            )
        modules = {t.module for t in expected.values() if t.matrix}
        for name in self.entries:
            module, _, leaf = name.rpartition(".")
            packing = self.packing(module) if module in modules else None
            packed_part = packing is not None and leaf in packing.parts
            if packing and leaf == "biases" and not packed_part:
                raise PareError(f"{self.path} holds {name}, and {packing.mode} has no biases", "convert it again")
            dropped = any(s in name for s in arch.family.ignored) or (module == "lm_head" and arch.tied)
            if not (name in expected or packed_part or dropped):
                raise PareError(
                    f"{self.path} holds {name}, which the {arch.family.name} family does not describe",
                    "such a model is not supported; a tensor is never skipped silently",
                )

    def _check_shape(self, tensor: Tensor) -> None:
        entry, packing = self.entries[tensor.name], self.packing(tensor.module)
        shape = entry.shape
        if packing and tensor.matrix:
            if entry.dtype != "U32":
                raise PareError(f"{tensor.name} is packed and has dtype {entry.dtype}, expected U32")
            shape = (*shape[:-1], *(n * 32 // packing.bits for n in shape[-1:]))
        elif entry.dtype not in FLOATS:
            raise PareError(f"{tensor.name} has dtype {entry.dtype}, expected one of {', '.join(sorted(FLOATS))}")
        if shape != tensor.shape:
            raise PareError(
                f"{tensor.name} in {entry.file.name} has shape {list(shape)}, config.json means {list(tensor.shape)}"
            )
        if packing and tensor.matrix:
            self._check_scales(tensor, packing)

    def _check_scales(self, tensor: Tensor, packing: Packing) -> None:
        rows, columns = tensor.shape
        for name in (f"{tensor.module}.{part}" for part in packing.parts[1:]):
            entry = self.entries.get(name)
            if entry is None:
                raise PareError(f"{self.path} lacks {name}")
            allowed = FLOATS if packing.affine else {"U8"}
            if entry.dtype != packing.scale_dtype(self.dtype(tensor)) or entry.dtype not in allowed:
                raise PareError(f"{name} has dtype {entry.dtype}, expected {' or '.join(sorted(allowed))}")
            if entry.shape != (rows, packing.groups(columns)) or columns % packing.group_size:
                raise PareError(
                    f"{name} has shape {list(entry.shape)}, expected {rows} rows and a column for every "
                    f"{packing.group_size} of the {columns} columns of {tensor.name}"
                )

    def packing(self, module: str) -> Packing | None:
        """How a module is packed; None when it is dense."""
        scales = self.entries.get(f"{module}.scales")
        if scales is None or not self.quantized:
            return None
        spec = self._quantization.get(module)
        spec = spec if isinstance(spec, dict) else self._quantization
        affine = spec.get("mode", "affine") == "affine"
        return Packing.of_config(spec, DTYPE_BYTES[scales.dtype if affine else self._float])

    def dtype(self, tensor: Tensor) -> str:
        """The float dtype of a tensor, of its scales when it is packed, in the float modes, whose scales are bytes, of
        the norms around it: "F32", "F16" or "BF16"."""
        packed = self.packing(tensor.module) if tensor.matrix else None
        if packed and not packed.affine:
            return self._float
        return self.entries[f"{tensor.module}.scales" if packed else tensor.name].dtype

    @cached_property
    def _float(self) -> str:
        """The dtype of what is a float: of affine scales if there are any, else of the norms."""
        floats = {name: entry.dtype for name, entry in self.entries.items() if entry.dtype in FLOATS}
        return floats[min(floats, key=lambda name: not name.endswith(".scales"))] if floats else "BF16"

    @property
    def value_bytes(self) -> int:
        """Width of the dtype that mlx-lm computes in, and so of its KV cache: that of the embedding (or its scales).

        An embedding of a float mode gives bfloat16 (mlx.nn.QuantizedEmbedding), and that with a norm of another dtype
        float32."""
        embedding = next(self.arch.tensors())
        packing = self.packing(embedding.module)
        if packing and not packing.affine:
            return 2 if self._float == "BF16" else 4
        return DTYPE_BYTES[self.dtype(embedding)]

    def nbytes(self) -> int:
        """Bytes of the tensors that mlx-lm loads (headers and ignored tensors excluded)."""
        names = {t.name for t in self.arch.tensors()}
        modules = {n.rpartition(".")[0] for n in names}
        return sum(
            e.nbytes
            for n, e in self.entries.items()
            if n in names or (n.rpartition(".")[2] in ("scales", "biases") and n.rpartition(".")[0] in modules)
        )

    def lazy(self) -> dict[str, Any]:
        """Every array, unread: mx.load reads a tensor when it is first evaluated."""
        import mlx.core as mx

        arrays: dict[str, Any] = {}
        for file in sorted({e.file for e in self.entries.values()}):
            arrays.update(mx.load(str(file)))
        return arrays

    def identity(self) -> str:
        """A cheap fingerprint of what the model is, wherever and whenever it was copied: its config, and name, dtype,
        shape and the bytes in the middle of every tensor. Bits that flip elsewhere are found by rundir.
        """
        digest = hashlib.sha256(json.dumps(self.config, sort_keys=True).encode())
        with ExitStack() as stack:
            opened = {f: stack.enter_context(f.open("rb")) for f in sorted({e.file for e in self.entries.values()})}
            for name, entry in sorted(self.entries.items()):
                digest.update(f"{name} {entry.dtype} {entry.shape}".encode())
                begin = max(entry.start, (entry.start + entry.end - PIECE) // 2)
                digest.update(os.pread(opened[entry.file].fileno(), min(PIECE, entry.nbytes), begin))
        return digest.hexdigest()

    def tokenizer_files(self) -> list[Path]:
        """The files that make the tokenizer and its chat templates, those that are there."""
        return tokenizer_files(self.path)
