"""The GGUF header reader against gguf-py's own, and against files that mean harm: only PareError may come out."""

from __future__ import annotations

import os
import random
import struct
import subprocess
import sys
import time
from pathlib import Path

import gguf
import numpy as np
import pytest

from mlx_pare.base.errors import PareError
from mlx_pare.exporting.export import export
from mlx_pare.gguf.header import MAX_ARRAY, Header, Skipped, read, read_all
from mlx_pare.gguf.types import TYPES, nbytes

# ---- making files, byte by byte ----


def s(text: str | bytes) -> bytes:
    raw = text if isinstance(text, bytes) else text.encode()
    return struct.pack("<Q", len(raw)) + raw


def u32(key: str, value: int) -> bytes:
    return s(key) + struct.pack("<II", 4, value)


def array(key: str, kind: int, count: int, body: bytes = b"") -> bytes:
    return s(key) + struct.pack("<IIQ", 9, kind, count) + body


def row(name: str | bytes, shape: tuple[int, ...], kind: int = 0, offset: int = 0) -> bytes:
    """``shape`` as GGUF has it, columns first."""
    dims = struct.pack(f"<I{len(shape)}Q", len(shape), *shape)
    return s(name) + dims + struct.pack("<IQ", kind, offset)


def build(keys: list[bytes] = (), rows: list[bytes] = (), data: int = 0, version: int = 3, align: int = 32) -> bytes:
    head = b"GGUF" + struct.pack("<IQQ", version, len(rows), len(keys)) + b"".join(keys) + b"".join(rows)
    return head + bytes(-len(head) % align) + bytes(data)


def opened(tmp_path: Path, raw: bytes) -> Header:
    file = tmp_path / "m.gguf"
    file.write_bytes(raw)
    return read(file)


def refused(tmp_path: Path, raw: bytes) -> str:
    """The message with which it is refused: one line, soon."""
    start = time.perf_counter()
    with pytest.raises(PareError) as error:
        opened(tmp_path, raw)
    assert time.perf_counter() - start < 1
    message = str(error.value)
    assert "\n" not in message and str(tmp_path) in message and len(message) < 400
    return message


# ---- real files ----


def same_as_gguf_py(path: Path) -> None:
    ours, theirs = read(path), gguf.GGUFReader(path)
    assert ours.version == 3 and ours.data_start == theirs.data_offset and ours.file_bytes == path.stat().st_size
    assert list(ours.tensors) == [t.name for t in theirs.tensors]
    for t in theirs.tensors:
        mine = ours.tensors[t.name]
        assert mine.shape == tuple(int(n) for n in t.shape)[::-1] and mine.type == t.tensor_type.name
        assert ours.data_start + mine.offset == t.data_offset and mine.nbytes == t.n_bytes
    assert ours.tensor_bytes == sum(int(t.n_bytes) for t in theirs.tensors)
    fields = {name: field for name, field in theirs.fields.items() if not name.startswith("GGUF.")}
    assert list(ours.metadata) == list(fields)
    for name, field in fields.items():
        mine, value = ours.metadata[name], field.contents()
        if isinstance(mine, Skipped):
            assert mine.count == len(value) and (isinstance(value[0], str) or len(value) > MAX_ARRAY)
        else:
            assert mine == (tuple(value) if isinstance(value, list) else value)


@pytest.mark.parametrize("kind", ["f32", "f16", "q8_0"])
@pytest.mark.parametrize("family", ["llama", "llama-untied", "qwen2", "qwen3", "gemma3_text"])
def test_files_of_our_export_read_as_gguf_py_reads_them(tmp_path, pico_models, family, kind):
    export(pico_models(family), tmp_path / "m.gguf", kind)
    same_as_gguf_py(tmp_path / "m.gguf")


def written(path: Path, name: str = "m.gguf") -> Path:
    """A small file with metadata of every type and tensors of several."""
    writer = gguf.GGUFWriter(path / name, "llama")
    writer.add_uint8("a.u8", 200)
    writer.add_int8("a.i8", -100)
    writer.add_uint16("a.u16", 60000)
    writer.add_int16("a.i16", -30000)
    writer.add_uint32("a.u32", 4 * 10**9)
    writer.add_int32("a.i32", -(2 * 10**9))
    writer.add_uint64("a.u64", 2**63)
    writer.add_int64("a.i64", -(2**62))
    writer.add_float32("a.f32", 0.5)
    writer.add_float64("a.f64", 1e-9)
    writer.add_bool("a.bool", True)
    writer.add_string("a.text", "naïve 🙂\nlines")
    writer.add_array("a.numbers", [3, 1, 2])
    writer.add_array("a.flags", [True, False])
    writer.add_array("a.floats", [0.25, 0.75])
    writer.add_token_list([f"tök{i}" for i in range(40)])
    rng = np.random.default_rng(0)
    writer.add_tensor("token_embd.weight", rng.normal(size=(40, 6)).astype(np.float32))
    writer.add_tensor("blk.0.ffn_gate_exps.weight", rng.normal(size=(2, 3, 32)).astype(np.float16))
    for kind in ("Q8_0", "Q4_0"):
        number = gguf.GGMLQuantizationType[kind]
        packed = gguf.quants.quantize(rng.normal(size=(5, 96)).astype(np.float32), number)
        writer.add_tensor(f"blk.0.{kind}.weight", packed, raw_dtype=number)
    writer.add_tensor("blk.0.norm.weight", np.ones(7, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path / name


def test_every_type_of_value(tmp_path):
    path = written(tmp_path)
    same_as_gguf_py(path)
    found = read(path).metadata
    assert found["a.u64"] == 2**63 and found["a.i8"] == -100 and found["a.bool"] is True
    assert (
        found["a.text"] == "naïve 🙂\nlines" and found["a.numbers"] == (3, 1, 2) and found["a.flags"] == (True, False)
    )
    assert found["tokenizer.ggml.tokens"] == Skipped(40)


def test_version_2_reads_the_same(tmp_path):
    raw = written(tmp_path).read_bytes()
    older = opened(tmp_path, raw[:4] + struct.pack("<I", 2) + raw[8:])
    newer = opened(tmp_path, raw)
    assert older.version == 2 and older.tensors == newer.tensors and older.metadata == newer.metadata


def test_any_type_and_any_alignment(tmp_path):
    rows, offset = [], 0
    for kind in TYPES.values():
        rows.append(row(f"t{kind.number}", (kind.values * 2, 3), kind.number, offset))
        offset += -(-6 * kind.size // 64) * 64
    header = opened(tmp_path, build([u32("general.alignment", 64)], rows, offset, align=64))
    assert header.data_start % 64 == 0
    for name, kind in TYPES.items():
        info = header.tensors[f"t{kind.number}"]
        assert (info.type, info.nbytes) == (name, nbytes(name, info.shape)) == (name, 6 * kind.size)


def test_an_unknown_type_reaches_up_to_the_next_tensor(tmp_path):
    rows = [row("a", (32,), 0, 0), row("b", (7, 5), 99, 128), row("c", (8,), 0, 192), row("d", (9,), 31, 224)]
    header = opened(tmp_path, build([], rows, 300))
    assert header.tensors["b"] == ((5, 7), "unknown type 99", 128, 64)
    assert header.tensors["d"][1:] == ("unknown type 31", 224, 76)
    assert header.tensor_bytes == 128 + 64 + 32 + 76


def test_long_values_are_counted_and_not_kept(tmp_path):
    keys = [
        array("long", 4, MAX_ARRAY + 1, bytes(4 * (MAX_ARRAY + 1))),
        array("short", 4, MAX_ARRAY, bytes(4 * MAX_ARRAY)),
        s("text") + struct.pack("<I", 8) + s("x" * 200_000),
        array("merges", 8, 3, s("a b") + s("") + s("ü")),
        s("after") + struct.pack("<II", 4, 7),
    ]
    found = opened(tmp_path, build(keys)).metadata
    assert found["long"] == Skipped(MAX_ARRAY + 1) and found["short"] == (0,) * MAX_ARRAY
    assert found["text"] == Skipped(200_000) and found["merges"] == Skipped(3) and found["after"] == 7


def test_nothing_in_it_is_no_error(tmp_path):
    assert opened(tmp_path, build()).tensor_bytes == 0
    assert opened(tmp_path, b"GGUF" + struct.pack("<IQQ", 3, 0, 0)).metadata == {}
    broken = s("general.name") + struct.pack("<I", 8) + s(b"caf\xe9")  # latin-1: a value may be anything
    assert opened(tmp_path, build([broken])).metadata["general.name"] == "caf\ufffd"


def test_a_vocabulary_of_150_000_tokens_takes_a_moment(tmp_path):
    tokens = b"".join(s(f"token{i}") for i in range(152_000))
    keys = [array("tokens", 8, 152_000, tokens), array("merges", 8, 152_000, tokens), u32("x.y", 3)]
    (tmp_path / "m.gguf").write_bytes(build(keys, [row("w", (4,))], 16))
    start = time.perf_counter()
    assert read(tmp_path / "m.gguf").metadata["tokens"] == Skipped(152_000)
    assert time.perf_counter() - start < 0.3  # measured: 0.02; gguf.GGUFReader: 7


# ---- files cut off and changed ----


def test_a_file_cut_off_at_any_byte_is_refused(tmp_path):
    """Inside the last padding nothing is missing, so there it may end."""
    path = written(tmp_path)
    raw, whole = path.read_bytes(), read(path)
    last = max(t.offset + t.nbytes for t in whole.tensors.values()) + whole.data_start
    assert last < len(raw)
    for size in reversed(range(len(raw))):
        os.truncate(path, size)
        if size >= last:
            assert read(path).tensors == whole.tensors
            continue
        with pytest.raises(PareError) as error:
            read(path)
        assert "\n" not in str(error.value)


def test_thousands_of_changed_files_end_in_a_header_or_a_pare_error(tmp_path):
    path = written(tmp_path)
    raw, rng = path.read_bytes(), random.Random(0)
    end = read(path).data_start
    numbers = [0, 1, 2, 0xFF, 2**31, 2**32 - 1, 2**60, 2**63, 2**64 - 1]
    outcomes = {"read": 0, "refused": 0}
    for _ in range(4000):
        changed = bytearray(raw)
        for _ in range(rng.choice((1, 1, 2, 8))):
            at = rng.randrange(end)
            match rng.randrange(4):
                case 0:
                    changed[at] = rng.randrange(256)
                case 1:
                    changed[at : at + 8] = struct.pack("<Q", rng.choice(numbers))
                case 2:
                    del changed[at : at + rng.randrange(1, 40)]
                case 3:
                    changed[at:at] = changed[: rng.randrange(1, 200)]
        path.write_bytes(changed)
        try:
            header = read(path)
        except PareError as error:
            assert "\n" not in str(error)
            outcomes["refused"] += 1
        else:
            assert all(t.nbytes >= 0 and t.offset >= 0 for t in header.tensors.values())
            outcomes["read"] += 1
    assert min(outcomes.values()) > 200  # both happened


# ---- planted ----

HUGE = [2**31, 2**32, 2**60, 2**63 - 1, 2**63, 2**64 - 1]


@pytest.mark.parametrize("huge", HUGE)
def test_huge_lengths_and_counts(tmp_path, huge):
    size = struct.pack("<Q", huge)
    assert "tensors" in refused(tmp_path, b"GGUF" + struct.pack("<IQQ", 3, huge, 0) + bytes(100))
    assert "metadata keys" in refused(tmp_path, b"GGUF" + struct.pack("<IQQ", 3, 0, huge) + bytes(100))
    one = b"GGUF" + struct.pack("<IQQ", 3, 0, 1)
    refused(tmp_path, one + size + bytes(100))  # a key
    refused(tmp_path, one + s("k") + struct.pack("<I", 8) + size + bytes(100))  # a text
    for kind in (0, 4, 7, 12, 8):
        refused(tmp_path, one + array("k", kind, huge) + bytes(100))
    refused(tmp_path, one + array("k", 8, 2, s("a") + size) + bytes(100))  # a string of an array
    refused(tmp_path, b"GGUF" + struct.pack("<IQQ", 3, 1, 0) + size + bytes(100))  # a tensor name
    assert "'w'" in refused(tmp_path, build([], [row("w", (4,), 0, huge - huge % 32)], 64))
    assert "'w'" in refused(tmp_path, build([], [row("w", (huge,))], 64))
    assert "'w'" in refused(tmp_path, build([], [row("w", (huge, huge, huge, huge))], 64))


def test_nested_arrays(tmp_path):
    deep = struct.pack("<IQ", 9, 1) * 100_000
    assert "array of arrays" in refused(tmp_path, build([s("k") + struct.pack("<I", 9) + deep]))


def test_more_of_everything_than_any_file_has(tmp_path):
    empty = struct.pack("<Q", 0) * (6 << 20)
    assert "strings" in refused(tmp_path, build([array("k", 8, 6 << 20, empty)]))
    assert "70000 tensors" in refused(tmp_path, build([], [row(f"t{i}", (1,), 0, 32 * i) for i in range(70_000)]))
    assert "70000 metadata keys" in refused(tmp_path, build([u32(f"k{i}", 1) for i in range(70_000)]))
    assert "a key of 2000 bytes" in refused(tmp_path, build([u32("k" * 2000, 1)]))
    keys = [array(f"k{i}".ljust(900), 4, 1, bytes(4)) for i in range(5000)]
    assert "names and settings" in refused(tmp_path, build(keys))


WRONG = {
    "overlapping": ([], [row("a", (32,), 0, 0), row("b", (32,), 0, 64)], 256, "'a' reaches beyond the next tensor"),
    "at one place": ([], [row("a", (8,)), row("b", (8,))], 256, "same offset"),
    "beyond the end": ([], [row("a", (64,))], 128, "'a' reaches beyond the end"),
    "far beyond the end": ([], [row("a", (8,), 0, 1 << 40)], 128, "'a' reaches beyond the end"),
    "unknown, beyond the end": ([], [row("a", (8,), 99, 256)], 128, "'a' reaches beyond the end"),
    "misaligned": ([], [row("a", (8,), 0, 16)], 128, "offset 16, which 32 does not divide"),
    "alignment 0": ([u32("general.alignment", 0)], [], 0, "general.alignment is 0"),
    "alignment 24": ([u32("general.alignment", 24)], [], 0, "general.alignment is 24"),
    "alignment a text": ([s("general.alignment") + struct.pack("<I", 8) + s("32")], [], 0, "general.alignment is '32'"),
    "alignment a flag": ([s("general.alignment") + struct.pack("<IB", 7, 1)], [], 0, "general.alignment is True"),
    "two tensors of a name": ([], [row("a", (8,)), row("a", (8,), 0, 32)], 64, "'a' is there twice"),
    "two keys of a name": ([u32("k", 1), u32("k", 1)], [], 0, "'k' is there twice"),
    "no dimensions": ([], [row("a", ())], 64, "'a' has 0 dimensions"),
    "five dimensions": ([], [row("a", (1, 1, 1, 1, 1))], 64, "'a' has 5 dimensions"),
    "an empty dimension": ([], [row("a", (8, 0))], 64, r"'a' has the shape [0, 8]"),
    "too many values": ([], [row("a", (2**32, 2**31))], 64, "'a' has the shape"),
    "half a block": ([], [row("a", (40, 2), 8)], 128, "'a' is Q8_0, but its rows of 40 values are not"),
    "a key that is no text": ([s(b"\xff\xfe") + struct.pack("<II", 4, 1)], [], 0, "not UTF-8"),
    "a name that is no text": ([], [row(b"\xc3", (8,))], 64, "not UTF-8"),
    "an unknown value": ([s("k") + struct.pack("<II", 13, 1)], [], 0, "'k' has a value of the unknown type 13"),
    "an unknown array": ([array("k", 77, 1, bytes(8))], [], 0, "'k' is an array of values of the unknown type 77"),
    "alignment a long text": ([s("general.alignment") + struct.pack("<I", 8) + s("y" * 9999)], [], 0, "is 'yyyy"),
    "a long name": ([], [row("x" * 1000, (8, 0))], 64, "has the shape [0, 8]"),
    "a name of two lines": ([], [row("a\nb", (8, 0))], 64, r"'a\nb' has the shape"),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_table_that_cannot_be(tmp_path, name):
    keys, rows, data, message = WRONG[name]
    assert message in refused(tmp_path, build(keys, rows, data))


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (b"", "is empty"),
        (b"\0" * 100, "does not begin with GGUF"),
        (b"PK\3\4" + bytes(100), "does not begin with GGUF"),
        (b"GG", "ends at byte 2"),
        (b"GGUF", "ends at byte 4"),
        (b"GGUF" + struct.pack("<I", 1) + bytes(100), "version 1"),
        (b"GGUF" + struct.pack("<I", 4) + bytes(100), "version 4"),
        (b"GGUF" + struct.pack("<I", 0) + bytes(100), "version 0"),
        (b"GGUF" + struct.pack(">I", 3) + bytes(100), "big-endian"),
        (b"GGUF" + struct.pack(">I", 2) + bytes(100), "big-endian"),
    ],
)
def test_other_files(tmp_path, raw, message):
    assert message in refused(tmp_path, raw)


def test_no_file_at_all(tmp_path):
    os.mkfifo(tmp_path / "pipe.gguf")  # opening it would wait for ever
    wrong = {"pipe.gguf": "is no regular file", ".": "is a directory", "none.gguf": "is not there"}
    for path, message in ((tmp_path / name, message) for name, message in wrong.items()):
        with pytest.raises(PareError, match=message):
            read(path)
    with pytest.raises(PareError, match=r"cannot be read|not there"):
        read(tmp_path / ("x" * 5000))


def test_the_worst_file_costs_little_memory(tmp_path):
    """45 MB of everything that is kept or walked over, up to every limit."""
    keys = [array("tokens", 8, 1 << 21, struct.pack("<Q", 0) * (1 << 21))]
    keys += [array(f"long{i}", 12, 4096, bytes(8 * 4096)) for i in range(500)]
    keys += [s(f"text{i}") + struct.pack("<I", 8) + s("x" * 100_000 + "🙂") for i in range(60)]
    keys += [s(f"k{i}") + struct.pack("<IB", 0, 1) for i in range(30_000)]
    rows = [row(f"blk.{i}.w", (1, 1, 1, 8), 0, 32 * i) for i in range(60_000)]
    raw = build(keys, rows, 32 * 60_000)
    assert len(raw) > 40 << 20
    (tmp_path / "m.gguf").write_bytes(raw)
    code = f"""
import time
from mlx_pare.base.errors import PareError
from mlx_pare.gguf.header import read
def mb(what):
    return int(next(line for line in open("/proc/self/status") if line.startswith(what)).split()[1]) >> 10
before, start = mb("VmRSS"), time.perf_counter()
try:
    read({str(tmp_path / "m.gguf")!r})
except PareError as error:
    print(error)
print(mb("VmHWM") - before, time.perf_counter() - start)
"""
    if not Path("/proc/self/status").exists():
        pytest.skip("memory is read from /proc")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    memory, seconds = map(float, done.stdout.splitlines()[-1].split())
    assert done.stdout.count("\n") <= 2 and memory < 100 and seconds < 1, done.stdout + done.stderr


# ---- parts ----


def split(tmp_path: Path, parts: int = 3, total: int | None = None, numbers=None) -> list[Path]:
    paths = []
    for i in range(parts):
        keys = [s("split.no") + struct.pack("<IH", 2, (numbers or range(parts))[i])]
        keys += [s("split.count") + struct.pack("<IH", 2, parts)]
        keys += [s("split.tensors.count") + struct.pack("<Ii", 5, parts * 2 if total is None else total)]
        if i == 0:
            keys.append(u32("llama.block_count", 9))
        rows = [row(f"t{i}a", (8,)), row(f"t{i}b", (16,), 0, 32)]
        paths.append(tmp_path / f"model-{i + 1:05}-of-{parts:05}.gguf")
        paths[-1].write_bytes(build(keys, rows, 96))
    return paths


def test_parts_are_one_model(tmp_path):
    paths = split(tmp_path)
    for path in paths:
        header = read_all(path)
        assert sorted(header.tensors) == ["t0a", "t0b", "t1a", "t1b", "t2a", "t2b"]
        assert header.tensor_bytes == 3 * 96 and header.file_bytes == sum(p.stat().st_size for p in paths)
        assert header.metadata["llama.block_count"] == 9
    assert list(read(paths[1]).tensors) == ["t1a", "t1b"]
    whole = written(tmp_path)
    assert read_all(whole) == read(whole)


def test_files_that_gguf_py_split(tmp_path):
    writer = gguf.GGUFWriter(tmp_path / "big.gguf", "llama", split_max_tensors=2)
    for i in range(5):
        writer.add_tensor(f"blk.{i}.w", np.full((2, 8), i, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    files = sorted(tmp_path.glob("*.gguf"))
    assert len(files) == 3 and len(read_all(files[1]).tensors) == 5


def test_a_missing_part_is_named(tmp_path):
    paths = split(tmp_path)
    paths[1].unlink()
    with pytest.raises(PareError, match=r"model-00002-of-00003\.gguf is missing"):
        read_all(paths[2])


def test_parts_that_do_not_belong_together(tmp_path):
    paths = split(tmp_path)
    renamed = paths[0].rename(tmp_path / "other.gguf")
    with pytest.raises(PareError, match="one of 3 parts, but is not named as such"):
        read_all(renamed)
    with pytest.raises(PareError, match="says it is part 0 of 3"):
        read_all(split(tmp_path, numbers=[0, 0, 2])[0])
    with pytest.raises(PareError, match="hold 6 tensors, expected 7"):
        read_all(split(tmp_path, total=7)[0])
    paths = split(tmp_path)
    paths[2].write_bytes(paths[0].read_bytes().replace(b"split.no\2\0\0\0\0\0", b"split.no\2\0\0\0\2\0"))
    with pytest.raises(PareError, match="part 3 repeats the tensor 't0a'"):
        read_all(paths[0])
    paths[2].write_bytes(b"GGUF")
    with pytest.raises(PareError, match=r"model-00003-of-00003\.gguf"):
        read_all(paths[0])


def test_a_split_count_that_makes_no_sense(tmp_path):
    for value in (struct.pack("<IQ", 10, 2**60), struct.pack("<IQ", 10, 70_000)):
        path = tmp_path / "model-00001-of-00003.gguf"
        path.write_bytes(build([s("split.count") + value]))
        with pytest.raises(PareError, match="not named as such"):
            read_all(path)
    for value in (struct.pack("<I", 8) + s("3"), struct.pack("<Id", 12, 3.0), struct.pack("<Ii", 5, -3)):
        path.write_bytes(build([s("split.count") + value]))
        assert read_all(path).tensors == {}
