"""What the fuzzer feeds: every reader of what strangers wrote, called with bytes; the table of them is TARGETS."""

from __future__ import annotations

import io
import os
import shutil
import stat
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from fuzz_inputs import (
    AMOUNTS,
    ARRAYS,
    DATA,
    GGUF,
    GGUF_MODELS,
    LINES,
    LISTING,
    LLAMA,
    MANIFEST,
    METRICS,
    PACKED,
    PLAN,
    SETTINGS,
    SURVIVORS,
    TOKENIZERS,
    entries,
    gguf_file,
    packed_table,
    table_of,
    written,
)

from mlx_pare import arch
from mlx_pare.base.errors import PareError
from mlx_pare.base.units import parse_amount
from mlx_pare.capacity import storage, subject
from mlx_pare.capacity.inspect import inspect
from mlx_pare.evaluation import metrics
from mlx_pare.gguf import header as gguf_header
from mlx_pare.gguf.read import rebuild as gguf_model, tensors as gguf_stored, tokenizer as gguf_tokens
from mlx_pare.gguf.read.config import config_of
from mlx_pare.gguf.write import tokenizer as gguf_tokenizer
from mlx_pare.model import checkpoint, footprint
from mlx_pare.pruning import plan_file, survivors
from mlx_pare.sources import hub_reader
from mlx_pare.store import arrays, manifest
from mlx_pare.text import corpus, domains


class Memory:
    """A file that is not on a disk, with as much of pathlib.Path as base/untrusted.py and model/checkpoint.py ask of
    it: writing and opening a real one takes ten times as long as reading it."""

    def __init__(self, raw: bytes):
        self.raw, self.name = raw, "file"

    def __str__(self) -> str:
        return self.name

    def stat(self) -> SimpleNamespace:
        return SimpleNamespace(st_size=len(self.raw), st_mode=stat.S_IFREG)

    def open(self, mode: str) -> io.BytesIO:
        return io.BytesIO(self.raw)


class Place:
    """A folder in memory where there is one, with the files that the targets read."""

    def __init__(self) -> None:
        memory = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
        self.path = Path(tempfile.mkdtemp(prefix="mlx-pare-fuzz-", dir=memory))
        self.file, self.model, self.packed = self.path / "file", self.path / "model", self.path / "packed"
        for directory, config in ((self.model, LLAMA), (self.packed, PACKED)):
            directory.mkdir()
            weights = packed_table(table_of(entries(config)))
            self.sound = {"config.json": written(config), "model.safetensors": weights, **self.beside(config)}
            for name, raw in self.sound.items():
                (directory / name).write_bytes(raw)
        (self.path / "book.txt").write_text("text")
        self.arch = arch.describe(LLAMA)

    @staticmethod
    def beside(config: dict[str, Any]) -> dict[str, bytes]:
        index = {"metadata": {}, "weight_map": dict.fromkeys(entries(config), "model.safetensors")}
        return {
            "model.safetensors.index.json": written(index), "tokenizer.json": written(TOKENIZERS[0]),
            "tokenizer_config.json": written(SETTINGS),
        }  # fmt: skip

    def put(self, raw: bytes, suffix: str = "") -> Path:
        path = self.file.with_suffix(suffix)
        path.write_bytes(raw)
        return path

    def close(self) -> None:
        shutil.rmtree(self.path, ignore_errors=True)


def read_config(place: Place, raw: bytes) -> None:
    config = checkpoint.read_json(Memory(raw), "model config")
    arch.both_rope_spellings(config)
    storage.stays_packed(config)
    found = arch.describe(config)
    footprint.parameters(found)
    footprint.cache_values(found)
    storage.described(config, storage.value_bytes(config))
    if found.cuttable:
        arch.uneven_types(found)


def read_fit(place: Place, raw: bytes) -> None:
    inspect(place.put(raw, ".json"))


def read_directory(place: Place, raw: bytes) -> None:
    """The first byte says which model, and which of its files the rest is."""
    which = raw[0] if raw else 0
    directory = (place.model, place.packed)[which & 1]
    name = ("config.json", "model.safetensors", "model.safetensors.index.json")[(which >> 1) % 3]
    sound = (directory / name).read_bytes()
    try:
        (directory / name).write_bytes(raw[1:])
        try:
            opened = checkpoint.Checkpoint(directory)
            opened.identity()
            opened.tokenizer_files()
            _ = opened.quantization, opened.arch, opened.value_bytes, opened.nbytes()
        except PareError:
            pass
        inspect(directory)
    finally:
        (directory / name).write_bytes(sound)


def read_gguf(place: Place, raw: bytes) -> None:
    arch.describe(config_of(gguf_header._Cursor(Path("file.gguf"), raw).header()))


def read_gguf_fit(place: Place, raw: bytes) -> None:
    subject.open_subject(str(place.put(raw, ".gguf")), subject.Form())


def read_gguf_model(place: Place, raw: bytes) -> None:
    """All that rebuilding one does, but for the disk and the process that tries the tokenizer."""
    opened = gguf_model.open_gguf(place.put(raw, ".gguf"))
    files = gguf_tokens.files(opened.vocabulary, opened.settings.arch.sizes["vocab"])
    written([files.tokenizer, files.config, opened.settings.config])
    for row in opened.rows:
        first, *rest = row.planned()
        parts = [io.BytesIO() for _ in rest]
        made = gguf_stored.words(row, parts, {}) if row.packing else gguf_stored.float_parts(row, {})
        assert sum(len(part) for part in made) == first.nbytes
        assert [len(part.getvalue()) for part in parts] == [planned.nbytes for planned in rest]


class Server(hub_reader.Hub):
    """A hub that answers with these bytes."""

    def __init__(self, answers: dict[str, bytes]):
        super().__init__("org/model", "main")
        self.answers = answers

    def _get(self, path: str, first: int, count: int, ranged: bool = False) -> bytes:
        found = next((raw for name, raw in self.answers.items() if path.endswith(name)), b"")
        self.received += len(found[first : first + count])
        return found[first : first + count]


def read_hub(place: Place, raw: bytes) -> None:
    """The first byte says what of the answers the rest is; sizes are as the listing says, or as they are."""
    which, body = raw[:1] or b"\0", raw[1:]
    answers = {"?blobs=true": written(LISTING), "config.json": place.sound["config.json"]}
    answers["model.safetensors"] = place.sound["model.safetensors"]
    answers[list(answers)[which[0] % 3]] = body
    server = Server(answers)
    commit, sizes = server.listing()
    if which[0] & 128:
        sizes |= {name: len(answers[name]) for name in sizes if name in answers}
    hub_reader._read(server, commit, sizes, lambda line: None)


def read_plan(place: Place, raw: bytes) -> None:
    plan = plan_file.Plan.load(Memory(raw))
    if not plan.problems(place.arch):
        plan.keep(place.arch)


def read_arrays(place: Place, raw: bytes) -> None:
    path = place.put(raw, ".safetensors")
    arrays.Arrays.described(path, "scores")
    arrays.Arrays.load(path, "scores")


class Writer:
    """A gguf.GGUFWriter that writes nothing, and stumbles over what the real one does."""

    def __getattr__(self, name: str) -> Callable[..., None]:
        return lambda value: None if not isinstance(value, str | list) else len(str(value).encode())


class Template:
    """A tokenizer with a template for well-formed chats."""

    def apply_chat_template(self, messages: list, tokenize: bool, **more: Any) -> str:
        return "".join(f"{m['role']}: {m['content']}" for m in messages)


def read_tokenizer(place: Place, raw: bytes) -> None:
    """The first byte says whether the rest is the tokenizer or its config."""
    name = ("tokenizer.json", "tokenizer_config.json")[(raw[0] if raw else 0) % 2]
    sound = (place.model / name).read_bytes()
    try:
        (place.model / name).write_bytes(raw[1:])
        gguf_tokenizer.write(Writer(), place.model, 300, LLAMA)
    finally:
        (place.model / name).write_bytes(sound)


def read_stock_tokenizer(place: Place, raw: bytes) -> None:
    """As read_tokenizer, by mlx-lm and the tokenizers library; with a process for each that is new."""
    from mlx_pare import lm

    name = ("tokenizer.json", "tokenizer_config.json")[(raw[0] if raw else 0) % 2]
    sound = (place.model / name).read_bytes()
    try:
        (place.model / name).write_bytes(raw[1:])
        corpus.windows(lm.tokenizer(place.model), ["abc ab c" * 10], 4)
    finally:
        (place.model / name).write_bytes(sound)


def read_data(place: Place, raw: bytes) -> None:
    os.chdir(place.path)
    domains.parse_all([part for part in raw.decode("utf-8", "surrogateescape").split("\n")[:3]])


@dataclass(frozen=True)
class Target:
    """One reader. ``seeds``: sound inputs, JSON values (written by ``write``) or bytes; ``kinds``: the first byte of an
    input that says which of several files it is. ``share``: of the inputs."""

    read: Callable[[Place, bytes], None]
    seeds: list[Any]
    write: Callable[[Any], bytes] = written
    share: float = 1.0  # small where files, processes or threads make an input dear
    kinds: tuple[int, ...] = ()
    starts: list[bytes] = field(default_factory=list)


def jsonl(value: Any) -> bytes:
    return b"\n".join(map(written, value if isinstance(value, list) else [value]))


def text(value: Any) -> bytes:
    return value if isinstance(value, bytes) else str(value).encode("utf-8", "surrogatepass")


def catalogue() -> list[dict[str, Any]]:
    """The configs of well-known models: of every family."""
    from mlx_pare.sources import catalogue as known

    return [LLAMA, PACKED, *(entry.config for entry in known.entries())]


HEADER = table_of({"a.weight": ("F32", [2, 3]), "b": ("BF16", [4]), "c": ("U32", [1, 2, 2])})
TARGETS: dict[str, Target] = {
    "json": Target(lambda p, raw: checkpoint.read_json(Memory(raw), "file") and None, [LLAMA, SETTINGS], share=2),
    "header": Target(lambda p, raw: checkpoint.read_header(Memory(raw)) and None, [HEADER], packed_table, 3),
    "config": Target(read_config, [], share=0.5),
    "fit": Target(read_fit, [], share=0.03),
    "directory": Target(read_directory, [LLAMA, PACKED, HEADER], share=0.03, kinds=(0, 1, 2, 3, 4, 5)),
    "gguf": Target(read_gguf, GGUF, gguf_file, 2),
    "gguf-fit": Target(read_gguf_fit, GGUF, gguf_file, 0.05),
    "gguf-model": Target(read_gguf_model, GGUF_MODELS, gguf_file, 0.05),
    "hub": Target(read_hub, [LISTING, LLAMA, HEADER], share=0.1, kinds=(0, 1, 2, 128, 129, 130)),
    "plan": Target(read_plan, [PLAN], share=0.5),
    "manifest": Target(lambda p, raw: manifest.Manifest.read(Memory(raw), "run manifest") and None, [MANIFEST]),
    "metrics": Target(lambda p, raw: metrics.Metrics.read(Memory(raw), "metrics") and None, [METRICS]),
    "survivors": Target(lambda p, raw: survivors.survivors(Memory(raw)) and None, [SURVIVORS]),
    "arrays": Target(read_arrays, [ARRAYS], text, 0.05),
    "tokenizer": Target(read_tokenizer, [*TOKENIZERS, SETTINGS], share=0.1, kinds=(0, 1)),
    "jsonl": Target(lambda p, raw: corpus.read(p.put(raw, ".jsonl"), Template()) and None, [LINES, *LINES], jsonl, 0.1),
    "text": Target(lambda p, raw: corpus.read(p.put(raw, ".txt")) and None, ["one\n\ntwo", "\ufeffx"], text, 0.05),
    "amounts": Target(
        lambda p, raw: parse_amount(raw.decode("utf-8", "replace"), ("bytes", "parameters")[len(raw) % 2]) and None,
        AMOUNTS, text, 1,
    ),
    "data": Target(read_data, DATA, text, 0.05),
    "stock-tokenizer": Target(read_stock_tokenizer, [*TOKENIZERS, SETTINGS], share=0.0006, kinds=(0, 1)),
}  # fmt: skip
