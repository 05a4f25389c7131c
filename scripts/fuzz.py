"""Feeds damaged and hostile files to every reader, and holds each to its contract: a value, or a PareError of one line.

    python scripts/fuzz.py --runs 1000000 --seed 0 [--target header --target gguf] [--atheris]

Anything else is a finding: another exception, more than 200 MB allocated (a limit that the system enforces on Linux,
the resident size elsewhere), more than two seconds of processor time. Findings are kept in tests/fuzz_corpus, which the
tests replay. Inputs are sound ones, built here, changed by structure (JSON trees, GGUF rows) and by byte; the same seed
gives the same inputs. With --atheris libFuzzer chooses among them by coverage (pip install atheris; one process per
target). Exit code 1 when anything was found.
"""

from __future__ import annotations

import argparse
import contextlib
import faulthandler
import hashlib
import io
import json
import math
import os
import random
import resource
import shutil
import signal
import stat
import struct
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from mlx_pare import arch, artifacts, checkpoint, console, corpus, domains, gguf_header, gguf_tokenizer, hub, rundir
from mlx_pare.amounts import parse_amount
from mlx_pare.errors import PareError
from mlx_pare.fit import footprint, quantization, subject
from mlx_pare.fit.gguf_config import config_of
from mlx_pare.inspect import inspect

CORPUS = Path(__file__).resolve().parents[1] / "tests" / "fuzz_corpus"
MEMORY, SECONDS, HANG = 200 << 20, 2.0, 10  # bytes allocated; of processor time; seconds until it is stopped
LIMITS_DATA = sys.platform == "linux"
COMMIT = "0" * 40


class Hang(BaseException):
    """The reader did not come back."""


# ---- sound inputs ----

LLAMA = {
    "model_type": "llama", "hidden_size": 64, "num_hidden_layers": 2, "intermediate_size": 128, "vocab_size": 96,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "rms_norm_eps": 1e-5, "rope_theta": 10000.0,
    "tie_word_embeddings": True, "max_position_embeddings": 512, "torch_dtype": "float32",
}  # fmt: skip
PACKED = {**LLAMA, "quantization": {"group_size": 32, "bits": 4}}


def written(value: Any) -> bytes:
    """JSON, lone surrogates and infinities included."""
    return json.dumps(value).encode()


def entries(config: dict[str, Any]) -> dict[str, tuple[str, list[int]]]:
    """The tensors of a checkpoint: name -> (dtype, shape)."""
    found: dict[str, tuple[str, list[int]]] = {}
    packing = config.get("quantization")
    for t in arch.describe(config).tensors():
        if packing and t.matrix:
            rows, columns = t.shape
            found[t.name] = ("U32", [rows, columns * packing["bits"] // 32])
            for leaf in ("scales", "biases"):
                found[f"{t.module}.{leaf}"] = ("F16", [rows, columns // packing["group_size"]])
        else:
            found[t.name] = ("F16", list(t.shape))
    return found


def table_of(tensors: dict[str, tuple[str, list[int]]]) -> dict[str, Any]:
    """The header of a safetensors file."""
    table, at = {"__metadata__": {"format": "mlx"}}, 0
    for name, (dtype, shape) in tensors.items():
        size = checkpoint.DTYPE_BYTES[dtype] * math.prod(shape)
        table[name] = {"dtype": dtype, "shape": shape, "data_offsets": [at, at + size]}
        at += size
    return table


def packed_table(table: Any, size: int | None = None, length: int | None = None) -> bytes:
    """A safetensors file with this header, and so many bytes of data (None: as many as it says, within reason)."""
    raw = table if isinstance(table, bytes) else written(table)
    if size is None:
        try:
            size = max((t["data_offsets"][1] for n, t in table.items() if n != "__metadata__"), default=0)
            size = size if 0 <= size < 1 << 20 else 100
        except (TypeError, KeyError, IndexError, AttributeError):
            size = 100
    return struct.pack("<Q", len(raw) if length is None else length) + raw + bytes(size)


GGUF_CODES = {int: (4, "<I"), float: (6, "<f"), bool: (7, "<?")}


def gguf_value(value: Any) -> bytes:
    """A value with its type in front."""
    if isinstance(value, str):
        return struct.pack("<I", 8) + gguf_text(value)
    if isinstance(value, list):
        kind = 8 if value and isinstance(value[0], str) else 4 if not value else GGUF_CODES[type(value[0])][0]
        return struct.pack("<IIQ", 9, kind, len(value)) + b"".join(gguf_value(v)[4:] for v in value)
    number, code = GGUF_CODES[type(value)]
    if type(value) is int and not 0 <= value < 2**32:
        number, code, value = 10, "<Q", value % 2**64
    return struct.pack("<I", number) + struct.pack(code, value)


def gguf_text(text: str) -> bytes:
    raw = text.encode("utf-8", "surrogatepass")
    return struct.pack("<Q", len(raw)) + raw


def gguf_file(content: dict[str, Any]) -> bytes:
    """A GGUF file of "metadata" and "tensors" ([name, shape, type, offset]), as far as they can be written."""
    metadata, tensors = content["metadata"], content["tensors"]
    out = b"GGUF" + struct.pack("<IQQ", content["version"], len(tensors), len(metadata))
    out += b"".join(gguf_text(key) + gguf_value(value) for key, value in metadata.items())
    for name, shape, kind, offset in tensors:
        out += gguf_text(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, kind, offset)
    return out + bytes(-len(out) % 32) + bytes(min(content["data"], 1 << 18))


def gguf_seed(name: str, more: dict[str, Any]) -> dict[str, Any]:
    metadata = {
        "general.architecture": name, "general.alignment": 32, f"{name}.block_count": 2, f"{name}.embedding_length": 64,
        f"{name}.feed_forward_length": 128, f"{name}.attention.head_count": 4, f"{name}.attention.head_count_kv": 2,
        f"{name}.context_length": 512, f"{name}.rope.freq_base": 1e4, f"{name}.attention.layer_norm_rms_epsilon": 1e-5,
        "tokenizer.ggml.tokens": ["a", "b", "c"], **{f"{name}.{key}": value for key, value in more.items()},
    }  # fmt: skip
    tensors = [["token_embd.weight", [8, 12], 0, 0], ["blk.0.ffn_down.weight", [16, 8], 1, 384]]
    return {"version": 3, "metadata": metadata, "tensors": tensors, "data": 384 + 256}


GGUF = [
    gguf_seed("llama", {"expert_count": 0, "attention.key_length": 16}),
    gguf_seed("gemma3", {"attention.sliding_window": 8, "attention.sliding_window_pattern": [True, False]}),
    gguf_seed("deepseek2", {"expert_count": 4, "attention.kv_lora_rank": 8, "rope.dimension_count": 8}),
    gguf_seed("qwen3next", {"ssm.time_step_rank": 4, "ssm.inner_size": 64, "expert_count": 4, "split.count": 1}),
    gguf_seed("lfm2", {"attention.head_count_kv": [0, 2], "shortconv.l_cache": 3}),
    gguf_seed("nemotron_h", {"ssm.time_step_rank": 4, "ssm.inner_size": 64, "expert_used_count": 2}),
    gguf_seed("gemma4", {"attention.shared_kv_layers": 1, "feed_forward_length": [128, 256]}),
]

SIZE = {
    "layers": 2, "ffn": 128, "kv_heads": [2, 1], "q_heads": 4, "hidden": 64, "parameters": 9, "non_embedding": 8,
    "bytes": 7,
}  # fmt: skip
PLAN = {
    "schema_version": 1, "source": "ab", "criterion": "wanda", "axes": ["ffn"], "bits": 4, "group_size": 32,
    "target": {"kind": "keep", "value": 0.5, "asked": "half"}, "before": SIZE, "after": SIZE, "neighbours": ["x"],
    "hidden": list(range(64)), "embedding_bits": 8,
    "layers": [{"source": i, "ffn": list(range(0, 128, 2)), "kv_head": [0, 1], "ffn_bits": 3} for i in range(2)],
}  # fmt: skip
STEP = {"parameters": {"a": 1}, "inputs": {"x": "y"}, "outputs": {"z": "q"}, "seconds": 1.5, "peak_bytes": 3}
MANIFEST = {
    "schema_version": 1, "model": "m", "source": "s", "versions": {"mlx": "1"}, "machine": {"system": "x"},
    "steps": {"plan": STEP},
}  # fmt: skip
METRICS = {
    "schema_version": 1, "model": "m", "data": "d", "tokens": 1, "windows": 2, "length": 3, "perplexity": 1.5,
    "perplexity_stderr": 0.1, "bits_per_byte": None, "kl_divergence": 0.2, "window_nll": [0.5, 1e3],
}  # fmt: skip
UNITS = {"ffn": [0, 2], "kv_head": [0], "q_head": [0, 1]}
SURVIVORS = {
    "schema_version": 1, "source_identity": "ab", "hidden": [0, 1, 2], "parent": {"name": "p", "identity": "cd"},
    "layers": [{"layer": i, "source": 2 * i, **UNITS} for i in range(2)],
}  # fmt: skip
ARRAYS = packed_table(
    {
        "__metadata__": {"pare": json.dumps({"schema": 1, "criterion": "wanda", "samples": 4})},
        "0.ffn": {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]},
        "1.ffn": {"dtype": "I64", "shape": [2, 1], "data_offsets": [16, 32]},
    }
)
BYTES = [f"<0x{b:02X}>" for b in range(256)]
PLAIN_TOKEN = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
A_TOKEN, A_TEXT = {"SpecialToken": {"id": "a", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}
TOKENIZERS = [
    {
        "added_tokens": [{"id": 4, "content": "<s>", "special": True, **PLAIN_TOKEN}],
        "normalizer": None, "post_processor": None,
        "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True},
        "model": {"type": "BPE", "vocab": {"a": 0, "b": 1, "ab": 2, "c": 3}, "merges": ["a b"]},
    },
    {
        "added_tokens": [], "pre_tokenizer": {"type": "Sequence", "pretokenizers": [
            {"type": "Split", "pattern": {"Regex": gguf_tokenizer.QWEN2}, "behavior": "Isolated", "invert": False},
            {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False},
        ]},
        "normalizer": {"type": "Sequence", "normalizers": [{"type": "NFC"}]},
        "post_processor": {
            "type": "TemplateProcessing", "single": [A_TOKEN, A_TEXT], "pair": [A_TEXT, A_TEXT],
            "special_tokens": {"a": {"id": "a", "ids": [0], "tokens": ["a"]}},
        },
        "model": {"type": "BPE", "vocab": {"a": 0, "b": 1}, "merges": [], "ignore_merges": False},
    },
    {
        "added_tokens": [],
        "pre_tokenizer": {"type": "Metaspace", "replacement": "\u2581", "split": False, "prepend_scheme": "first"},
        "normalizer": None, "post_processor": None,
        "model": {
            "type": "BPE", "byte_fallback": True, "unk_token": "u", "merges": [["a", "b"]],
            "vocab": {t: i for i, t in enumerate([*BYTES, "u", "a", "b", "ab"])},
        },
    },
]  # fmt: skip
SETTINGS = {
    "tokenizer_class": "PreTrainedTokenizerFast",
    "bos_token": "a",
    "eos_token": {"__type": "AddedToken", "content": "b"},
    "add_bos_token": True,
    "chat_template": "{{ messages }}",
}
CHAT = {"messages": [{"role": "user", "content": "hi"}], "tools": []}
LINES = [{"text": "one two"}, CHAT, {"prompt": "p", "completion": "q"}, {"content": "c"}, {"text": None}]
LISTING = {
    "sha": COMMIT, "siblings": [
        {"rfilename": "config.json", "size": 400}, {"rfilename": "model.safetensors", "size": 900},
        {"rfilename": "model-q8_0.gguf", "size": 20},
    ],
}  # fmt: skip
AMOUNTS = ["24B", "15GB", "1.5e9", " 900M ", "14GiB", "0.5k", "1e308T", "9" * 400]
DATA = ["book.txt", "code=book.txt:2", "a=b=book.txt", "book.txt:1e-3", "x:y=book.txt:inf"]


# ---- the readers ----


class Memory:
    """A file that is not on a disk, with as much of pathlib.Path as bounded.py and checkpoint.py ask of it: writing and
    opening a real one takes ten times as long as reading it."""

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
    quantization.stays_packed(config)
    found = arch.describe(config)
    footprint.parameters(found)
    footprint.cache_values(found)
    quantization.described(config, quantization.value_bytes(config))
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


class Server(hub._Hub):
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
    hub._read(server, commit, sizes, lambda line: None)


def read_plan(place: Place, raw: bytes) -> None:
    plan = artifacts.Plan.load(Memory(raw))
    if not plan.problems(place.arch):
        plan.keep(place.arch)


def read_arrays(place: Place, raw: bytes) -> None:
    path = place.put(raw, ".safetensors")
    artifacts.Arrays.described(path, "scores")
    artifacts.Arrays.load(path, "scores")


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
    from mlx_pare.fit import catalogue as known

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
    "hub": Target(read_hub, [LISTING, LLAMA, HEADER], share=0.1, kinds=(0, 1, 2, 128, 129, 130)),
    "plan": Target(read_plan, [PLAN], share=0.5),
    "manifest": Target(lambda p, raw: rundir.Manifest.read(Memory(raw), "run manifest") and None, [MANIFEST]),
    "metrics": Target(lambda p, raw: artifacts.Metrics.load(Memory(raw)) and None, [METRICS]),
    "survivors": Target(lambda p, raw: artifacts.survivors(Memory(raw)) and None, [SURVIVORS]),
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

# ---- changes ----

NASTY: list[Any] = [
    None, True, False, 0, 1, -1, 2, 3, 7, 127, 255, 256, 4096, 2**31 - 1, 2**31, 2**32, 2**63 - 1, 2**63, 2**64,
    -(2**63), 10**9, 10**40, 10**4200, 0.0, -0.0, 0.5, 1e308, -1e308, 5e-324, math.nan, math.inf, -math.inf, "",
    "0", "x" * 3000, "\x1b[31mred\x1b[0m", "a\nb\rc\x00", "\ud800", "\u202eabc", "../../etc/passwd", "/dev/zero",
    "layer", "llama", "{{", "__proto__", [], {}, [[]], [0], [None, 1, "x"], [1] * 2000, {"a": {}},
    {"type": "Sequence"}, "sliding_attention", "full_attention", "mamba", "affine", "mxfp4", "F32", "F8_E4M3",
    "[bold]x[/]", "<script>", "$(id)", "`id`", "'; id",
]  # fmt: skip
INTERESTING = (0, 1, 2, 127, 128, 255, 256, 2**15, 2**16 - 1, 2**31 - 1, 2**31, 2**32 - 1, 2**63 - 1, 2**63, 2**64 - 1)


def nested(depth: int, of: Any = 0) -> Any:
    for i in range(depth):
        of = [of] if i % 2 else {"a": of}
    return of


class Mutator:
    """Changes inputs of one target, by a seed."""

    def __init__(self, target: Target, seed: int):
        self.target, self.random = target, random.Random(seed)
        self.seeds = [(json.dumps(value) if isinstance(value, dict | list) else None, value) for value in target.seeds]
        self.keys = sorted({key for value in target.seeds for key in self._keys(value)})

    def _keys(self, value: Any) -> set[str]:
        if isinstance(value, dict):
            return {str(key) for key in value} | {k for v in value.values() for k in self._keys(v)}
        return {k for v in value[:20] for k in self._keys(v)} if isinstance(value, list) else set()

    def make(self) -> bytes:
        """An input: most often a seed with a few changes of its structure, sometimes of its bytes, sometimes both."""
        draw, target = self.random, self.target
        (dumped, chosen), how = draw.choice(self.seeds), draw.random()
        raw = None
        if how < 0.7 and dumped:
            tree = json.loads(dumped)
            for _ in range(draw.choice((1, 1, 1, 2, 3, 6))):
                tree = self.change(tree)
            try:
                raw = target.write(tree)
                if target.kinds and isinstance(tree, dict) and any(k in tree for k in HEADER):
                    raw = packed_table(tree)
            except (ArithmeticError, TypeError, ValueError, LookupError, AttributeError, struct.error, RecursionError):
                raw = None  # the change made it something that cannot be written
        if raw is None or how < 0.15:
            raw = raw if raw is not None else target.write(chosen)
            raw = self.damage(raw)
        return bytes([draw.choice(target.kinds)]) + raw if target.kinds else raw

    def change(self, tree: Any) -> Any:
        """One value of a JSON tree replaced, removed, doubled or moved."""
        draw, path, node = self.random, [], tree
        while isinstance(node, dict | list) and node and (not path or draw.random() < 0.75):
            key = draw.choice(list(node)) if isinstance(node, dict) else draw.randrange(len(node))
            path.append((node, key))
            node = node[key]
        if not path:
            return self.value()
        parent, key = path[-1]
        what = draw.randrange(8)
        if what == 0:
            del parent[key]
        elif what == 1 and isinstance(parent, dict):
            parent[draw.choice(self.keys) if self.keys and draw.random() < 0.8 else str(self.value())] = self.value()
        elif what == 2 and isinstance(parent, list):
            parent[:] = parent * draw.choice((2, 3, 50)) if len(parent) < 200 else parent[: len(parent) // 2]
        elif what == 3 and type(node) in (int, float) and abs(node) < 1e300:
            parent[key] = draw.choice((node + 1, node - 1, -node, node * 2, node * 1000, float(node)))
        elif what == 4 and isinstance(parent, dict) and len(parent) > 1:
            parent[key] = parent[draw.choice(list(parent))]
        elif what == 5 and isinstance(node, str) and node:
            parent[key] = self.damage(text(node)).decode("utf-8", "replace")[:5000]
        else:
            parent[key] = self.value()
        return tree

    def value(self) -> Any:
        draw = self.random
        if draw.random() < 0.02:
            return nested(draw.choice((3, 50, 70, 400)), self.random.choice(NASTY))
        return json.loads(json.dumps(draw.choice(NASTY)))  # a copy: it may be changed again

    def damage(self, raw: bytes) -> bytes:
        """A few bytes changed, taken out, put in or repeated; numbers written over."""
        draw, out = self.random, bytearray(raw)
        for _ in range(draw.choice((1, 1, 2, 4, 16))):
            at, what = draw.randrange(len(out) + 1), draw.randrange(8)
            end = min(len(out), at + draw.choice((1, 2, 4, 8, 64)))
            if what == 0:
                del out[at:end]
            elif what == 1:
                out[at:at] = draw.randbytes(draw.choice((1, 4, 16)))
            elif what == 2:
                out[at:at] = out[at:end] * draw.choice((1, 2, 100))
            elif what == 3 and draw.random() < 0.3:
                del out[at:]
            elif what == 4:
                width = draw.choice((1, 2, 4, 8))
                out[at : at + width] = (draw.choice(INTERESTING) % 256**width).to_bytes(width, "little")
            elif what == 5:
                out[at:end] = draw.choice((b"[", b"{", b'"', b"\\u", b"}", b"]", b",", b":", b"1e999", b"NaN", b"\xff"))
            elif at < len(out):
                out[at] = draw.choice((out[at] ^ (1 << draw.randrange(8)), draw.randrange(256), 0, 255))
        return bytes(out[: 1 << 20])


# ---- the contract ----


@dataclass
class Tally:
    """What came of the inputs of one target."""

    inputs: int = 0
    accepted: int = 0
    slowest: float = 0.0
    peak: int = 0
    findings: dict[str, str] = field(default_factory=dict)  # where it broke -> how


def judged(target: Target, place: Place, raw: bytes) -> tuple[bool, float, str, str]:
    """(accepted, seconds, where, what): the last two are empty when the contract was kept."""
    started, what, accepted, where = time.perf_counter(), "", False, ""
    try:
        with reading():
            target.read(place, raw)
        accepted = True
    except PareError as error:
        line = str(error)
        if not line.isprintable() or len(line) > 10_000:
            what, where = f"a message that is not one plain line: {line[:100]!r}", "message"
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # also what is no Exception: panics of Rust, and Hang
        last = traceback.extract_tb(error.__traceback__)[-1]
        where = f"{type(error).__name__} at {Path(last.filename).name}:{last.lineno}"
        what = f"{where}: {str(error)[:200]!r}"
    seconds = time.perf_counter() - started
    if seconds > SECONDS and not what and (seconds := processor_seconds(target, place, raw)) > SECONDS:
        what, where = f"{seconds:.1f} seconds", "slow"
    return accepted, seconds, where, what


def processor_seconds(target: Target, place: Place, raw: bytes) -> float:
    """What reading this takes by itself: on a busy machine everything has to wait now and then."""
    started = time.process_time()
    with contextlib.suppress(PareError), reading():
        target.read(place, raw)
    return time.process_time() - started


def keep(name: str, raw: bytes) -> Path:
    CORPUS.mkdir(exist_ok=True)
    path = CORPUS / f"{name}-{hashlib.sha256(raw).hexdigest()[:10]}.bin"
    path.write_bytes(raw)
    return path


def note(tally: Tally, name: str, raw: bytes, result: tuple[bool, float, str, str]) -> None:
    accepted, seconds, where, what = result
    tally.inputs += 1
    tally.accepted += accepted
    tally.slowest = max(tally.slowest, seconds)
    if what and where not in tally.findings:
        tally.findings[where] = what
        print(f"FOUND in {name}: {what}\n  kept as {keep(name, raw)}", flush=True)


def resident(name: str = "VmHWM") -> int:
    """Bytes of memory, now (VmRSS) or at most (VmHWM, since it was last forgotten)."""
    if not LIMITS_DATA:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name))
    return int(line.split()[1]) << 10


def limit_memory() -> int:
    """Let this process allocate MEMORY more than it has; returns what it has. The peak begins anew."""
    if not LIMITS_DATA:
        return resident()
    Path("/proc/self/clear_refs").write_text("5")
    data = resident("VmData") + MEMORY
    resource.setrlimit(resource.RLIMIT_DATA, (data, resource.RLIM_INFINITY))
    return resident("VmRSS")


_busy: dict[str, Any] = {"input": 0, "reading": False, "seen": None}  # the number of the input; that at the last tick


@contextlib.contextmanager
def reading() -> Iterator[None]:
    """A reader is at work, on the next input."""
    _busy["input"] += 1
    _busy["reading"] = True
    try:
        yield
    finally:
        _busy["reading"] = False


def watch() -> None:
    """From here on a reader that is with the same input for two ticks gets a Hang: a timer for all of them, since
    setting one for each costs more than reading it."""
    signal.signal(signal.SIGALRM, _tick)
    signal.setitimer(signal.ITIMER_REAL, HANG, HANG)


def _tick(*_: Any) -> None:
    if _busy["reading"] and _busy["seen"] == _busy["input"]:
        raise Hang(f"no answer within {HANG} seconds")
    _busy["seen"] = _busy["input"]


def ready(name: str, place: Place) -> Target:
    """A target with its seeds, after everything it needs was imported and read once."""
    target = TARGETS[name]
    if not target.seeds:
        target.seeds.extend(catalogue())
    for seed in target.seeds:
        judged(target, place, bytes(target.kinds[:1]) + target.write(seed))
    return target


def fuzz(name: str, place: Place, runs: int, seed: int) -> Tally:
    """So many inputs for one reader."""
    target, tally = ready(name, place), Tally()
    mutator = Mutator(target, int.from_bytes(hashlib.sha256(f"{seed} {name}".encode()).digest()[:8]))
    before = limit_memory()
    while tally.inputs < runs:
        if tally.inputs % 1000 == 0:  # for what no signal reaches
            faulthandler.dump_traceback_later(600, exit=True)
        raw = mutator.make()
        note(tally, name, raw, judged(target, place, raw))
    faulthandler.cancel_dump_traceback_later()
    tally.peak = max(0, resident() - before)
    if tally.peak > MEMORY:
        tally.findings["memory"] = f"{tally.peak >> 20} MiB"
    return tally


def told(name: str, tally: Tally, seconds: float) -> str:
    rejected = tally.inputs - tally.accepted
    return (
        f"{name:16} {tally.inputs:9,} {tally.accepted:9,} {rejected:9,} {1e3 * tally.slowest:9.0f} ms "
        f"{tally.peak / 1e6:7.0f} MB {len(tally.findings):5} {seconds:7.0f} s"
    )


HEAD = f"{'target':16} {'inputs':>9} {'accepted':>9} {'rejected':>9} {'slowest':>12} {'memory':>10} found {'took':>8}"


def shares(names: list[str], runs: int) -> dict[str, int]:
    """How many inputs every target gets."""
    total = sum(TARGETS[name].share for name in names)
    return {name: max(1, math.ceil(runs * TARGETS[name].share / total)) for name in names}


# ---- by coverage ----


def fuzz_by_coverage(name: str, place: Place, runs: int, seed: int) -> None:
    """libFuzzer calls the reader, and our changes are among its own. It ends the process."""
    import atheris

    target, tally, started = ready(name, place), Tally(), time.monotonic()
    mutator = Mutator(target, seed)

    def one(raw: bytes) -> None:
        note(tally, name, raw, judged(target, place, raw))
        if tally.inputs == runs:
            tally.peak = max(0, resident() - before)
            print(told(name, tally, time.monotonic() - started), flush=True)
            place.close()
            os._exit(bool(tally.findings))

    def change(raw: bytes, most: int, number: int) -> bytes:
        mutator.random.seed(number)
        if number % 3 == 0:
            return mutator.make()[:most]
        return mutator.damage(raw)[:most] if number % 3 == 1 else atheris.Mutate(raw, len(raw))[:most]

    before = limit_memory()
    for module in [m for n, m in sys.modules.items() if n.startswith("mlx_pare.")]:
        for thing in list(vars(module).values()):
            if callable(thing) and getattr(thing, "__module__", "") == module.__name__ and hasattr(thing, "__code__"):
                setattr(module, thing.__name__, atheris.instrument_func(thing))
    atheris.Setup([sys.argv[0], f"-seed={seed + 1}", "-max_len=65536", "-verbosity=0"], one, custom_mutator=change)
    atheris.Fuzz()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=100_000, help="inputs for all targets together")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--target", action="append", choices=[*TARGETS], help="only this reader; may be repeated")
    parser.add_argument("--atheris", action="store_true", help="let libFuzzer guide it by coverage")
    asked = parser.parse_args()
    console.configure(quiet=True)
    sys.stdout = sys.__stdout__
    threading.stack_size(1 << 19)  # eight threads of the hub's would count as 64 MB
    watch()
    names = list(dict.fromkeys(asked.target or TARGETS))
    if asked.atheris and len(names) > 1:
        command = [sys.executable, __file__, "--atheris", "--seed", str(asked.seed)]
        print(HEAD, flush=True)
        counts = shares(names, asked.runs)
        done = [subprocess.run([*command, "--runs", str(n), "--target", name]) for name, n in counts.items()]
        return int(any(each.returncode for each in done))
    place, found, total, started = Place(), 0, 0, time.monotonic()
    try:
        if asked.atheris:
            fuzz_by_coverage(names[0], place, asked.runs, asked.seed)
        print(HEAD, flush=True)
        for name, runs in shares(names, asked.runs).items():
            begun = time.monotonic()
            tally = fuzz(name, place, runs, asked.seed)
            found, total = found + len(tally.findings), total + tally.inputs
            print(told(name, tally, time.monotonic() - begun), flush=True)
    finally:
        place.close()
    print(f"{total:,} inputs, seed {asked.seed}, {found} findings, {time.monotonic() - started:.0f} s")
    return int(bool(found))


if __name__ == "__main__":
    sys.exit(main())
