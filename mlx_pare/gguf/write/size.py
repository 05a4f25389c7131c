"""What a GGUF file will be before it is written: type and bytes of every tensor, and the exact bytes of the header."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from ...model.checkpoint import Checkpoint
from ...model.hub_name import called
from ..added_tokens import name_for
from ..architectures import Target, metadata, target_of
from ..header import ALIGNMENT
from . import tokenizer as gguf_tokenizer
from .tensors import Row, table

if TYPE_CHECKING:
    from .imatrix_file import Importance


def padded(nbytes: int) -> int:
    """Bytes up to the beginning of the next tensor."""
    return -(-nbytes // ALIGNMENT) * ALIGNMENT


@dataclass(frozen=True)
class Prediction:
    """A GGUF file of ``kind`` as it will be.

    ``rows``: its tensors. ``header_bytes``: everything before their data, mostly the vocabulary. ``fallbacks``: name of
    a tensor -> its type if its rows were whole blocks of that.
    """

    kind: str
    target: Target
    rows: Sequence[Row]
    fallbacks: dict[str, str]
    header_bytes: int = 0

    @property
    def tensor_bytes(self) -> int:
        """Bytes of data, without padding."""
        return sum(row.nbytes for row in self.rows)

    @property
    def nbytes(self) -> int:
        """Bytes of the file, once the header is measured."""
        return self.header_bytes + sum(padded(row.nbytes) for row in self.rows)

    def about(self) -> dict[str, Any]:
        """For people and JSON: kind, architecture, tensor_bytes, tensors, types (tensors and bytes of each), fallbacks
        (names), fallback_types (how many tensors, by "Q4_K -> Q5_0")."""
        types: dict[str, dict[str, int]] = {}
        for row in self.rows:
            counted = types.setdefault(row.type, {"tensors": 0, "bytes": 0})
            counted["tensors"] += 1
            counted["bytes"] += row.nbytes
        told = Counter(f"{self.fallbacks[row.name]} -> {row.type}" for row in self.rows if row.name in self.fallbacks)
        return {
            "kind": self.kind,
            "architecture": self.target.architecture,
            "tensor_bytes": self.tensor_bytes,
            "tensors": len(self.rows),
            "types": types,
            "fallbacks": list(self.fallbacks),
            "fallback_types": dict(told),
        }


def predict(checkpoint: Checkpoint, kind: str, matrix: bool = False) -> Prediction:
    """Predict the tensors of a file, without its header.

    Args:
        checkpoint: the model.
        kind: such as "q4_k_m".
        matrix: whether an importance matrix is used.
    Returns:
        The prediction, with a header of 0 bytes.
    Raises:
        PareError: llama.cpp cannot compute what the model does.
        UsageError: there is no such kind.
    """
    target = target_of(checkpoint)
    rows = table(checkpoint.arch, target, kind, matrix)
    fallbacks = {row.name: row.ideal for row in rows if row.ideal not in ("", row.type)}
    return Prediction(kind, target, rows, fallbacks)


def measured(checkpoint: Checkpoint, kind: str, matrix: Importance | None = None, needs: bool = False) -> Prediction:
    """Predict a file with its header, which is written to a temporary file and measured. Raises as ``predict``.

    Args:
        checkpoint: the model.
        kind: such as "q4_k_m".
        matrix: the importance matrix; None: none yet.
        needs: whether a matrix will be made later; its few words in the header are not counted.
    Returns:
        The prediction.
    """
    found = predict(checkpoint, kind, matrix is not None or needs)
    with TemporaryDirectory() as scratch:
        file = Path(scratch) / "header.gguf"
        writer, _ = begun(file, checkpoint, found, matrix)
        writer.close()
        size = file.stat().st_size
    return Prediction(found.kind, found.target, found.rows, found.fallbacks, size)


def begun(
    path: Path, checkpoint: Checkpoint, of: Prediction, matrix: Importance | None = None
) -> tuple[Any, list[str]]:
    """Write everything up to the data of the first tensor.

    Args:
        path: the file to write.
        checkpoint: the model.
        of: the prediction of the file.
        matrix: the importance matrix to name in the header; None: none.
    Returns:
        The open gguf.GGUFWriter, and notes on the tokenizer.
    Raises:
        PareError: llama.cpp would read the tokenizer differently, or it is damaged.
    """
    import gguf
    import numpy as np

    writer = gguf.GGUFWriter(path, of.target.architecture)
    try:
        metadata(writer, checkpoint, of.target, of.kind)
        if matrix:
            matrix.describe(writer)
        tokenizer = gguf_tokenizer.write(writer, checkpoint.path, checkpoint.arch.sizes["vocab"], checkpoint.all_config)
        writer.add_name(name_for(called(checkpoint.path.resolve()).rpartition("/")[2], tokenizer.phi3))
        for row in of.rows:
            number = gguf.GGMLQuantizationType[row.type]
            writer.add_tensor_info(row.name, row.shape, np.dtype(np.float32), row.nbytes, raw_dtype=number)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        (file,) = writer.fout
        writer.write_padding(file, file.tell())
    except BaseException:
        writer.close()
        raise
    return writer, tokenizer.notes
