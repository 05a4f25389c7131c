"""An importance matrix: for every linear layer the mean square of each of its inputs, over some text.

llama.cpp's quantizer weighs the error of a weight by it. Ours comes from one streamed pass with one block in memory at
a time. The file is that of llama.cpp (common/imatrix-loader.cpp, tools/imatrix): GGUF with two tensors per matrix,
``NAME.in_sum2`` [1, columns], the sum of squares over all tokens, and ``NAME.counts`` [1, 1], the number of tokens.
As there by default, the head has no entry: it is better quantized without (tools/imatrix/README.md). Rows of q and k
are stored in another order than ours, but their columns are not.
"""

from __future__ import annotations

import mmap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ...base.errors import PareError, UsageError
from ...model.checkpoint import Checkpoint
from ...store.atomic import replaced
from .. import header as gguf_header
from ..architectures import target_of
from .tensors import table

TOLD = 127  # bytes of a string that llama-quantize puts into a file's metadata (llama_model_kv_override)


@dataclass(frozen=True)
class Importance:
    """An importance matrix.

    ``sums`` (float32 [columns]) and ``counts`` by the name of a matrix in GGUF. ``datasets``: the texts, read as
    ``chunks`` pieces of ``chunk_size`` tokens. ``name``: the file name that is recorded for it.
    """

    sums: Mapping[str, np.ndarray]
    counts: Mapping[str, float]
    datasets: Sequence[str] = ("unknown",)
    chunks: int = 0
    chunk_size: int = 0
    name: str = "imatrix.gguf"

    def means(self) -> dict[str, np.ndarray]:
        """Compute what the quantizer takes: the mean square of every input (load_imatrix of
        tools/quantize/quantize.cpp).

        Returns:
            Name of a matrix -> float32 [columns]; ones if no token was seen.
        """
        return {
            name: sums / np.float32(self.counts[name]) if self.counts[name] > 0 else np.ones_like(sums)
            for name, sums in self.sums.items()
        }

    def describe(self, writer: Any) -> None:
        """Add the keys that llama-quantize adds to a file made with an importance matrix, to a gguf.GGUFWriter."""
        writer.add_string("quantize.imatrix.file", _cut(self.name))
        writer.add_string("quantize.imatrix.dataset", _cut(self.datasets[0]))
        writer.add_uint32("quantize.imatrix.entries_count", len(self.sums))
        if self.chunks:
            writer.add_uint32("quantize.imatrix.chunks_count", self.chunks)

    def save(self, path: Path) -> None:
        """Write it as llama-imatrix does."""
        import gguf

        with replaced(path) as place:
            self._write(gguf.GGUFWriter(place, ""))

    def _write(self, writer: Any) -> None:
        try:
            writer.kv_data[0].clear()  # without general.architecture, which only models have
            writer.add_type("imatrix")
            writer.add_array("imatrix.datasets", list(self.datasets))
            writer.add_uint32("imatrix.chunk_count", self.chunks)
            writer.add_uint32("imatrix.chunk_size", self.chunk_size)
            for name in sorted(self.sums):
                writer.add_tensor(f"{name}.in_sum2", self.sums[name].astype(np.float32)[None])
                writer.add_tensor(f"{name}.counts", np.array([[self.counts[name]]], np.float32))
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_tensors_to_file()
        finally:
            writer.close()


def _cut(text: str) -> str:
    return text.encode()[:TOLD].decode(errors="ignore")


# ---- from a file ----


def load(path: Path) -> Importance:
    """Read an importance matrix, ours or llama.cpp's. Raises PareError if the file is none, or is damaged."""
    path = Path(path)
    header = gguf_header.read(path)
    known = header.metadata
    if not all(f"imatrix.{key}" in known for key in ("datasets", "chunk_count", "chunk_size")):
        raise PareError(f"{path} is no importance matrix", "make one with --imatrix auto, or with llama-imatrix")
    sums, counts = {}, {}
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        for name, info in header.tensors.items():
            stem, _, leaf = name.rpartition(".")
            if leaf not in ("in_sum2", "counts") or info.type != "F32":
                raise PareError(f"{path} holds {name!r} ({info.type}), which no importance matrix has")
            start = header.data_start + info.offset
            values = np.frombuffer(data[start : start + info.nbytes], "<f4")
            if not np.isfinite(values).all() or (values < 0).any():
                raise PareError(f"{path}: {name!r} has values that are no sums of squares", "make it again")
            (sums if leaf == "in_sum2" else counts)[stem] = values
    for stem in sums.keys() ^ counts.keys():
        raise PareError(f"{path} lacks one of the two tensors of {stem!r}", "make it again")
    if wrong := next((stem for stem in sums if len(counts[stem]) != 1), None):
        raise PareError(f"{path}: {wrong!r} is of several experts, which cannot be exported here")
    chunks, size = (n if isinstance(n := known[f"imatrix.chunk_{key}"], int) else 0 for key in ("count", "size"))
    tokens = {stem: float(n[0]) for stem, n in counts.items()}
    return Importance(sums, tokens, chunks=chunks, chunk_size=size, name=path.name)  # lists of texts are not kept


def check(of: Importance, checkpoint: Checkpoint) -> None:
    """Raise UsageError if it belongs to another model: it lacks a matrix of a block, or has one of other columns."""
    for row in table(checkpoint.arch, target_of(checkpoint), "f16"):
        if row.source is None or row.source.layer is None or not row.source.matrix:
            continue
        found = of.sums.get(row.name)
        if found is None or len(found) != row.shape[-1]:
            what = "nothing" if found is None else f"{len(found)} inputs"
            raise UsageError(
                f"{of.name} has {what} of {row.name}, the model {row.shape[-1]}",
                "it was made of another model; --imatrix auto makes one of this",
            )
