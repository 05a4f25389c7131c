"""A model directory opened for reading: config, tensor headers, lazy arrays. tensors/shards.py writes new ones.

Nothing in a checkpoint is trusted: headers are read within bounds (tensors/safetensors.py), and only files inside the
directory are opened. Looking at a model needs no array library.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from contextlib import ExitStack
from functools import cached_property
from pathlib import Path
from typing import Any

from ..arch import Architecture, Tensor, describe, parent_of, supported_types
from ..base import untrusted
from ..base.errors import PareError, Unsupported
from ..base.untrusted import read_json
from ..tensors.packing import FLOAT_MODES, Packing
from ..tensors.safetensors import DTYPE_BYTES, FLOATS, Entry, read_header
from . import tied_head
from .foreign_formats import foreign
from .weight_files import INDEX, PATTERN, leftovers, read_headers

__all__ = [
    "DTYPE_BYTES",
    "FLOATS",
    "TOKENIZER_FILES",
    "Checkpoint",
    "Entry",
    "read_header",
    "read_headers",
    "read_json",
]

PIECE = 256  # bytes of every tensor that go into the fingerprint of a model
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
    """The existing files of a model directory that define its tokenizer and its chat templates."""
    named = [directory / name for name in TOKENIZER_FILES]
    return [f for f in (*named, *sorted((directory / untrusted.MORE_TEMPLATES).glob("*.jinja"))) if f.is_file()]


def _free_head(arch: Architecture) -> str:
    """The advice about a trained head, depending on what the model's class can hold."""
    if arch.family.tied:
        return f"mlx-lm's {arch.family.name} has no head: train without lm_head, or take the model before it was merged"
    return f"set {arch.family.tied_key} to false in config.json; if the head is no part of the model, take it out"


def cuttable(config: Mapping[str, Any], where: Any, untied: bool | None = None) -> Architecture:
    """Describe a config whose model can be opened for work: one that can be cut, or that a cut has made.

    Args:
        config: the content of config.json.
        where: where it was found, for the message.
        untied: whether the checkpoint stores a head; None: unknown.
    Returns:
        The architecture.
    Raises:
        Unsupported: the type is unknown, or it can only be planned for.
        PareError: the config makes no sense.
    """
    arch = describe(config, untied=untied)
    if not (arch.cuttable or arch.family.result):
        raise Unsupported(
            f"{where} is of type {config['model_type']}, which can be planned for, but not cut",
            f"supported types are {', '.join(supported_types())}",
        )
    return arch


def refuse_foreign(config: Mapping[str, Any], where: Any, tensors: Mapping[str, str] | None = None) -> None:
    """Refuse the formats of other quantizers: they can be counted, but not cut.

    Args:
        config: the content of config.json.
        where: where it was found, for the message.
        tensors: name -> dtype of the stored tensors; None: unknown.
    Raises:
        Unsupported: the weights are in such a format.
    """
    if found := foreign(config, tensors or {}):
        raise Unsupported(f"{where} is quantized as {found.name}, which is not supported", found.cure)


def require_directory(path: Path) -> None:
    """Raise PareError if there is no directory. Stock libraries would take its path for a model name on the hub."""
    if not path.is_dir():
        raise PareError(
            f"no model directory at {path}", "give the path of a directory with config.json and *.safetensors"
        )


class Checkpoint:
    """A model directory opened for reading.

    Raises PareError if its files are missing, damaged or in an unsupported format. Names and shapes of its tensors are
    checked against its config when ``arch`` is first used.
    """

    def __init__(self, path: str | os.PathLike[str]):
        self.path = Path(path)
        require_directory(self.path)
        untrusted.check_links(self.path)
        self.config = read_json(self.path / "config.json", "model config")
        files = sorted(self.path.glob(PATTERN))
        if not files:
            raise PareError(f"no model*.safetensors in {self.path}")
        self._check_index(files)
        self.entries = read_headers(self.path)
        refuse_foreign(self.config, self.path, {name: entry.dtype for name, entry in self.entries.items()})
        self._quantization = self._read_quantization()
        self._packings: dict[str, Packing | None] = {}  # what ``packing`` found, by module

    def _check_index(self, files: list[Path]) -> None:
        index = self.path / INDEX
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
            return {}  # nothing is packed: mlx-lm loads it dense and ignores the config
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
        """The default packing of a quantized checkpoint; None if nothing is packed."""
        if not self.quantized:
            return None
        return Packing.of_config(self._quantization, DTYPE_BYTES[self._float])

    @cached_property
    def arch(self) -> Architecture:
        """The architecture. Raises PareError unless every tensor is described, present and of its shape."""
        parent = parent_of(self.config)
        head = (parent.wrapper.prefix if parent else "") + "lm_head.weight"
        arch = cuttable(self.config, self.path, untied=head in self.entries)
        expected = {t.name: t for t in arch.tensors()}
        self._check_described(arch, expected)
        for tensor in expected.values():
            self._check_shape(tensor)
        return arch

    @cached_property
    def by_role(self) -> dict[tuple[int | None, str], Tensor]:
        """The tensors of the architecture by layer (None: outside of the layers) and role."""
        return {(t.layer, t.spec.role): t for t in self.arch.tensors()}

    def _check_described(self, arch: Architecture, expected: Mapping[str, Tensor]) -> None:
        missing = [name for name in expected if name not in self.entries]
        if missing and (stacks := [t.name for t in expected.values() if t.spec.stack]) and {*stacks} <= {*missing}:
            raise Unsupported(
                f"{self.path} names its experts as on the hub, not as mlx-lm does ({stacks[0]} is missing)",
                "convert it with mlx_lm.convert first",
            )
        if missing:
            raise PareError(
                f"{self.path} lacks {missing[0]}"
                + (f" and {len(missing) - 1} more tensors" if len(missing) > 1 else "")
            )
        modules, head = {t.module for t in expected.values() if t.matrix}, f"{arch.prefix}lm_head"
        for name in self.entries:
            module, _, leaf = name.rpartition(".")
            packing = self.packing(module) if module in modules else None
            packed_part = packing is not None and leaf in packing.parts
            if packing and leaf == "biases" and not packed_part:
                raise PareError(f"{self.path} holds {name}, and {packing.mode} has no biases", "convert it again")
            dropped = any(s in name for s in arch.family.ignored) or (module == head and arch.tied)
            beside = arch.parent is not None and arch.parent.keeps(name)
            if not (name in expected or packed_part or dropped or beside):
                raise PareError(
                    f"{self.path} holds {name}, which the {arch.family.name} family does not describe",
                    "such a model is not supported; a tensor is never skipped silently",
                )
        if arch.tied and tied_head.differs(self.entries, next(arch.tensors()).module, head):
            raise PareError(
                f"{self.path} holds a head (lm_head.weight) that is not the embedding, and its config says that the "
                "embedding is the head: mlx-lm would drop the head",
                _free_head(arch),
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
        *rows, columns = tensor.shape
        for name in (f"{tensor.module}.{part}" for part in packing.parts[1:]):
            entry = self.entries.get(name)
            if entry is None:
                raise PareError(f"{self.path} lacks {name}")
            allowed = FLOATS if packing.affine else {"U8"}
            if entry.dtype != packing.scale_dtype(self.dtype(tensor)) or entry.dtype not in allowed:
                raise PareError(f"{name} has dtype {entry.dtype}, expected {' or '.join(sorted(allowed))}")
            if entry.shape != (*rows, packing.groups(columns)) or columns % packing.group_size:
                raise PareError(
                    f"{name} has shape {list(entry.shape)}, expected {tensor.rows} rows and a column for every "
                    f"{packing.group_size} of the {columns} columns of {tensor.name}"
                )

    def packing(self, module: str) -> Packing | None:
        """How a module is packed; None if it is dense."""
        if module not in self._packings:
            self._packings[module] = self._packing(module)
        return self._packings[module]

    def _packing(self, module: str) -> Packing | None:
        scales = self.entries.get(f"{module}.scales")
        if scales is None or not self.quantized:
            return None
        spec = self._quantization.get(module)
        spec = spec if isinstance(spec, dict) else self._quantization
        affine = spec.get("mode", "affine") == "affine"
        return Packing.of_config(spec, DTYPE_BYTES[scales.dtype if affine else self._float])

    def dtype(self, tensor: Tensor) -> str:
        """The float dtype of a tensor, or of its scales if it is packed: "F32", "F16" or "BF16".

        The scales of the float modes are bytes, so for these it is the dtype of the norms around them.
        """
        packed = self.packing(tensor.module) if tensor.matrix else None
        if packed and not packed.affine:
            return self._float
        return self.entries[f"{tensor.module}.scales" if packed else tensor.name].dtype

    @cached_property
    def _float(self) -> str:
        """The dtype of the floats: of affine scales if there are any, else of the norms."""
        floats = {name: entry.dtype for name, entry in self.entries.items() if entry.dtype in FLOATS}
        return floats[min(floats, key=lambda name: not name.endswith(".scales"))] if floats else "BF16"

    @property
    def value_bytes(self) -> int:
        """Bytes per value of the dtype that mlx-lm computes in, and of its KV cache: that of the embedding or its
        scales.

        An embedding in a float mode gives bfloat16 (mlx.nn.QuantizedEmbedding), and float32 with a norm of another
        dtype.
        """
        embedding = next(self.arch.tensors())
        packing = self.packing(embedding.module)
        if packing and not packing.affine:
            return 2 if self._float == "BF16" else 4
        return DTYPE_BYTES[self.dtype(embedding)]

    def nbytes(self) -> int:
        """Bytes of the tensors that mlx-lm loads, without headers and ignored tensors."""
        names = {t.name for t in self.arch.tensors()}
        modules = {n.rpartition(".")[0] for n in names}
        return sum(
            e.nbytes
            for n, e in self.entries.items()
            if n in names or (n.rpartition(".")[2] in ("scales", "biases") and n.rpartition(".")[0] in modules)
        )

    @property
    def text_config(self) -> dict[str, Any]:
        """The config of the language model; config.json itself, unless that is of a multimodal model."""
        parent = parent_of(self.config)
        return parent.inner() if parent else self.config

    @property
    def all_config(self) -> dict[str, Any]:
        """config.json with the keys that only the language model inside has: special tokens are in either."""
        return {**self.text_config, **self.config}

    def beside(self) -> dict[str, Entry]:
        """The tensors around the language model of a multimodal model, which no cut touches."""
        parent = self.arch.parent
        return {name: entry for name, entry in sorted(self.entries.items()) if parent and parent.keeps(name)}

    def packed_beside(self) -> dict[str, Any]:
        """How the matrices among them are packed, by module, as in config.json."""
        modules = (name.rpartition(".")[0] for name in self.beside() if name.endswith(".scales"))
        return {module: packing.as_config() for module in modules if (packing := self.packing(module))}

    def lazy(self) -> dict[str, Any]:
        """Load every array lazily: mx.load reads a tensor when it is first evaluated.

        Returns:
            Name -> mx.array of the stored shape and dtype.
        """
        import mlx.core as mx

        arrays: dict[str, Any] = {}
        for file in sorted({e.file for e in self.entries.values()}):
            arrays.update(mx.load(str(file)))
        return arrays

    def identity(self) -> str:
        """Compute a cheap fingerprint of the model, which copying does not change.

        It covers the config, and name, dtype, shape and the middle PIECE bytes of every tensor. store/rundir.py finds
        bits that flip elsewhere.
        """
        digest = hashlib.sha256(json.dumps(self.config, sort_keys=True).encode())
        with ExitStack() as stack:
            opened = {f: stack.enter_context(f.open("rb")) for f in sorted({e.file for e in self.entries.values()})}
            for name, entry in sorted(self.entries.items()):
                digest.update(f"{name} {entry.dtype} {entry.shape}".encode())
                begin = max(entry.start, (entry.start + entry.end - PIECE) // 2)
                digest.update(os.pread(opened[entry.file].fileno(), min(PIECE, entry.nbytes), begin))
        return digest.hexdigest()

    @property
    def leftovers(self) -> list[str]:
        """The names of weight files that are not read (model/weight_files.py)."""
        return leftovers(self.path, self.entries)

    def tokenizer_files(self) -> list[Path]:
        """The existing files that define the tokenizer and its chat templates."""
        return tokenizer_files(self.path)
