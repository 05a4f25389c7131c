"""A GGUF file, or all parts of one, rebuilt as an MLX model directory: the reverse of exporting/export.py, tensor by
tensor.

Names and shapes come from the family's table, as in an export. Our own bounded reader reads the header, and the data
come a few rows at a time. Codes of quantized tensors are kept if MLX has a packing for them (gguf/read/blocks.py).
"""

from __future__ import annotations

import re
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from ...arch import Tensor, describe
from ...arch.rope import rope_order
from ...base import console
from ...base.errors import PareError, Unsupported
from ...model import tokenizer_files
from ...model.checkpoint import Checkpoint
from ...model.directory import write_config
from ...store.atomic import created, refuse_existing, require_room
from ...tensors.panels import row_panels
from ...tensors.safetensors import Entry
from ...tensors.shards import OUR_KEY, ShardWriter
from .. import header as gguf_header
from . import blocks as gguf_blocks, settings as gguf_settings, tokenizer as gguf_tokens
from .settings import Settings
from .tensors import FLOATS, Rounding, Row, float_parts, holds, words

MAX_ROW = 1 << 24  # values of a row, because whole rows are read
MAX_FACTORS = 1 << 12  # of the rope, half a head
MB = 1 << 20


@dataclass
class Opened:
    """A GGUF file with a sound header."""

    path: Path
    settings: Settings
    rows: list[Row]
    vocabulary: Mapping[str, Any]
    licence: str | None
    notes: list[str] = field(default_factory=list)

    @property
    def nbytes(self) -> int:
        return sum(planned.nbytes for row in self.rows for planned in row.planned())


def rebuild(gguf: Path, out: Path, dense: bool = False, origin: str | None = None) -> dict:
    """Write the model of a GGUF file as an MLX model directory. Memory: a few rows, and the tokenizer.

    F32, F16 and BF16 stay, except for F32 vectors: they get the embedding's float dtype if it holds all their values.
    Q8_0, Q4_0, Q4_1, Q5_0, Q5_1, TQ1_0, TQ2_0 and MXFP4 keep codes and scales. Q4_K and Q5_K keep codes, and their
    scales are rounded to float16. Other types are packed again with 8 bits.

    Args:
        gguf: the file, or any part of a split one.
        out: the directory to create.
        dense: whether quantized tensors become float16.
        origin: the sha256 of the file's bytes for config.json, and so for Checkpoint.identity; None: left out.
    Returns:
        path, architecture, model_type, bytes, tensors, types (how many of each), rounded (by type: stored, tensors,
        relative_error, worst) and notes.
    Raises:
        Refused: ``out`` exists.
        PareError: the file cannot be rebuilt or is no sound model; nothing is left then.
    """
    gguf, out = Path(gguf), Path(out)
    refuse_existing(out)
    opened = open_gguf(gguf, dense)
    arch = opened.settings.arch
    files = gguf_tokens.files(opened.vocabulary, arch.sizes["vocab"], arch.config.get("max_position_embeddings"))
    require_room(out, opened.nbytes)
    with created(out) as place:
        place.mkdir()
        files.write(place)
        tokenizer_files.check(place)
        rounded = _write(opened, place)
        write_config(place, opened.settings.config | ({OUR_KEY: {"gguf_sha256": origin}} if origin else {}))
        if opened.licence:
            (place / "README.md").write_text(f"---\nlicense: {opened.licence}\n---\n", "utf-8")
        with suppress(Unsupported):  # a model that can be run, but not cut
            _ = Checkpoint(place).arch
    types: dict[str, int] = {}
    for row in opened.rows:
        types[row.kind] = types.get(row.kind, 0) + 1
    return {
        "path": str(out),
        "architecture": opened.settings.architecture,
        "model_type": arch.config["model_type"],
        "bytes": opened.nbytes,
        "tensors": len(opened.rows),
        "types": types,
        "rounded": rounded,
        "notes": [*opened.notes, *opened.settings.notes, *files.notes],
    }


# ---- what is in a file ----


def open_gguf(path: Path, dense: bool = False) -> Opened:
    """Map the tensors of a GGUF file to those of an MLX model.

    Raises PareError if one is missing, unknown or of another shape, Unsupported for an architecture or a type that
    cannot be rebuilt.
    """
    files = gguf_header.read_parts(path)
    header, first = gguf_header.union(path, files), next(iter(files))
    where = {name: (file, part.data_start) for file, part in files.items() for name in part.tensors}
    stored = {
        name: Entry(where[name][0], "U8", (), where[name][1] + t.offset, where[name][1] + t.offset + t.nbytes)
        for name, t in header.tensors.items()
    }
    settings = gguf_settings.settings(header, _factors(header, stored))
    if not dense:
        _untie(settings, header)
    names = _names(settings, path)
    names |= {} if "rope_freqs.weight" not in header.tensors else {"rope_freqs.weight": None}
    for name in header.tensors:
        if name not in names:
            raise PareError(
                f"{path} holds {name!r}, which {settings.arch.family.name} models do not have",
                "such a file cannot be rebuilt; a tensor is never skipped silently",
            )
    rows = [_row(path, header, stored, settings, name, t, dense) for name, ts in names.items() for t in ts or ()]
    order = {t.name: i for i, t in enumerate(settings.arch.tensors())}
    rows.sort(key=lambda row: order[row.tensor.name])
    opened = Opened(path, settings, rows, gguf_header.vocabulary(first), _licence(header))
    _narrow(opened)
    _quantization(opened)
    return opened


def _untie(settings: Settings, header: gguf_header.Header) -> None:
    """Store a packed embedding twice if it is also the head of a seed_oss, whose class multiplies by packed words."""
    table = header.tensors.get("token_embd.weight")
    if settings.arch.family.name == "seed_oss" and settings.arch.tied and table and table.type not in FLOATS:
        settings.config["tie_word_embeddings"] = False
        settings.arch = describe(settings.config, untied=True)


def _names(settings: Settings, path: Path) -> dict[str, list[Tensor] | None]:
    """Our tensors for each name in the file. An untied head may be the embedding once more."""
    import gguf

    number = {name: key for key, name in gguf.MODEL_ARCH_NAMES.items()}
    known = gguf.get_tensor_name_map(number[settings.architecture], len(settings.arch.layers))
    found: dict[str, list[Tensor] | None] = {}
    for tensor in settings.arch.tensors():
        name = known.get_name(tensor.name, try_suffixes=(".weight", ".bias"))
        if name is None:
            raise PareError(f"{path}: {tensor.name} has no name in llama.cpp's {settings.architecture} architecture")
        found.setdefault(name, []).append(tensor)
    return found


def _row(
    path: Path,
    header: gguf_header.Header,
    stored: Mapping[str, Entry],
    settings: Settings,
    name: str,
    tensor: Tensor,
    dense: bool,
) -> Row:
    if name not in header.tensors and tensor.spec.role == "lm_head":
        name = "token_embd.weight"
    info = header.tensors.get(name)
    if info is None:
        raise PareError(f"{path} lacks {name}", "download or export it again")
    if info.shape != tensor.shape:
        raise PareError(f"{name} in {path} has shape {list(info.shape)}, its metadata mean {list(tensor.shape)}")
    if not gguf_blocks.readable(info.type) or not (tensor.matrix or info.type in FLOATS):
        raise Unsupported(f"{name} in {path} is of {info.type}, which cannot be read", "convert it to another type")
    if info.shape[-1] > MAX_ROW:
        raise PareError(f"{name} in {path} has rows of {info.shape[-1]} values")
    rope = settings.source.norm_rope and "rope" in tensor.spec.transforms
    entry, count = stored[name], tensor.shape[0] if tensor.matrix or rope else 1  # every value of a bias is a row
    entry = replace(entry, shape=(count, info.nbytes // count))
    order = None
    if rope:
        width = settings.arch.uniform("head_dim")
        order = _undone(rope_order(tensor.shape[0] // width, width))
    if info.type in FLOATS or dense:
        return Row(tensor, info.type, entry, order, info.type if info.type in FLOATS else "F16", None)
    form = gguf_blocks.FORMS.get(info.type)
    return Row(tensor, info.type, entry, order, "F16", form.packing if form else gguf_blocks.ANEW)


def _undone(order: Sequence[int]) -> list[int]:
    """The permutation that reverses this one."""
    back = [0] * len(order)
    for there, here in enumerate(order):
        back[here] = there
    return back


def _factors(header: gguf_header.Header, stored: Mapping[str, Entry]) -> list[float] | None:
    """The values of rope_freqs.weight; None if the file has none."""
    info = header.tensors.get("rope_freqs.weight")
    if info is None:
        return None
    if info.type != "F32" or len(info.shape) != 1 or info.shape[0] > MAX_FACTORS:
        raise PareError(f"rope_freqs.weight of the GGUF file is {info.type} {list(info.shape)}, expected a few F32")
    entry = stored["rope_freqs.weight"]
    return next(row_panels(replace(entry, shape=(1, info.nbytes)), None, 1)).view("<f4")[0].tolist()


def _licence(header: gguf_header.Header) -> str | None:
    found = header.metadata.get("general.license")
    return found if isinstance(found, str) and re.fullmatch(r"[\w.+-]{1,80}", found) else None


def _narrow(opened: Opened) -> None:
    """Give vectors in F32 the dtype of the embedding, if it holds all their values.

    GGUF files hold vectors in F32 for every model. One vector in float32 would make MLX compute everything after it in
    float32.
    """
    dtype = opened.rows[0].dtype  # of the embedding, or of its scales
    vectors = {row.tensor.name: row for row in opened.rows if not row.tensor.matrix and row.kind == "F32"}
    if dtype == "F32" or not vectors:
        return
    if all(holds(row, dtype) for row in vectors.values()):
        opened.rows = [replace(row, dtype=dtype) if row.tensor.name in vectors else row for row in opened.rows]
    else:
        opened.notes.append(f"its norms are not numbers of {dtype}: they stay F32, and MLX will compute in float32")


def _quantization(opened: Opened) -> None:
    """Write to config.json the packing of most matrices, and of every module that differs."""
    packed = {row.tensor.module: row.packing for row in opened.rows if row.packing}
    if not packed:
        return
    counts = {p: list(packed.values()).count(p) for p in dict.fromkeys(packed.values())}
    most = max(counts, key=counts.__getitem__)
    others = {module: p.as_config() for module, p in packed.items() if p != most}
    opened.settings.config["quantization"] = {**most.as_config(), **others}


# ---- writing ----


def _write(opened: Opened, directory: Path) -> dict[str, Any]:
    """Write all tensors. Returns what was rounded, by type."""
    rounded: dict[str, Rounding] = {}
    writer = ShardWriter(directory, (planned for row in opened.rows for planned in row.planned()))
    total, done = sum(row.stored.nbytes for row in opened.rows), 0
    with console.progress(f"rebuilding {opened.path.name} (MB)", total // MB) as bar:
        for row in opened.rows:
            first, *others = row.planned()
            if row.packing is None:
                writer.stream(first.name, float_parts(row, rounded))
            else:
                with ExitStack() as stack:
                    rest = [stack.enter_context(tempfile.TemporaryFile(dir=directory)) for _ in others]
                    writer.stream(first.name, words(row, rest, rounded))
                    for planned, file in zip(others, rest, strict=True):
                        file.seek(0)
                        writer.stream(planned.name, iter(lambda file=file: file.read(MB), b""))
            before, done = done, done + row.stored.nbytes
            bar.advance(done // MB - before // MB, row.tensor.name)
    writer.close()
    return {kind: _told(kind, found, opened.rows) for kind, found in rounded.items()}


def _told(kind: str, found: Rounding, rows: Sequence[Row]) -> dict[str, Any]:
    packing = next(row.packing for row in rows if row.kind == kind)
    error = (found.lost / found.whole) ** 0.5 if found.whole else 0.0
    stored = str(packing) if packing else "float16"
    return {"stored": stored, "tensors": found.tensors, "relative_error": error, "worst": found.worst}
