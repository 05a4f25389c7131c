"""Files of every kind: what is predicted is on the disk to the byte, whoever quantizes; and when nobody can."""

from __future__ import annotations

import ctypes
import json
import os
import stat
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import gguf
import mlx.core as mx
import numpy as np
import pytest

from mlx_pare.base.errors import PareError, Refused, UsageError
from mlx_pare.capacity.fit import fit
from mlx_pare.capacity.form import Form
from mlx_pare.exporting import importance_matrix, llama_cpp
from mlx_pare.exporting.export import export
from mlx_pare.exporting.llama_cpp import verify
from mlx_pare.gguf import header as gguf_header
from mlx_pare.gguf.quant_mixes import type_of
from mlx_pare.gguf.write import encode as gguf_values, imatrix_file, quantizer, size as gguf_size
from mlx_pare.model.checkpoint import Checkpoint
from mlx_pare.options.settings import Settings
from mlx_pare.pipeline.export_step import export_step
from mlx_pare.pipeline.steps import open_run
from mlx_pare.text.splits import Texts
from tests.exporting.test_imatrix import WIDE, needs_llama, rows_of

THROUGH_LLAMA = ["q2_k", "q3_k_m", "q4_k_s", "q4_k_m", "q5_k_m", "iq4_nl", "iq3_s"]


def left(directory: Path) -> list[str]:
    return sorted(f.name for f in directory.iterdir())


# ---- predicted and written ----


def agreed(model: Path, file: Path, kind: str, matrix: imatrix_file.Importance | None = None) -> dict:
    """Export, and hold the file to what was said of it before."""
    expected = gguf_size.measured(Checkpoint(model), kind, matrix)
    done, header = export(model, file, kind, matrix), gguf_header.read(file)
    assert done["bytes"] == file.stat().st_size == expected.nbytes
    assert header.data_start == expected.header_bytes
    assert header.tensor_bytes == expected.tensor_bytes == done["tensor_bytes"]
    assert {n: (t.type, t.nbytes) for n, t in header.tensors.items()} == {
        row.name: (row.type, row.nbytes) for row in expected.rows
    }
    assert sum(of["tensors"] for of in done["types"].values()) == done["tensors"] == len(header.tensors)
    return done


@needs_llama
@pytest.mark.parametrize("kind", [*quantizer.DIRECT, *THROUGH_LLAMA])
def test_what_is_predicted_is_on_the_disk_to_the_byte(tmp_path, pico_models, kind):
    done = agreed(pico_models("llama", **WIDE), tmp_path / "m.gguf", kind)
    assert left(tmp_path) == ["m.gguf"] and done["kind"] == kind
    assert gguf_header.read(tmp_path / "m.gguf").metadata["general.file_type"] == quantizer.FILE_TYPES[kind]
    assert llama_cpp.judged(pico_models("llama", **WIDE), tmp_path / "m.gguf", kind)["different"] == []


@needs_llama
@pytest.mark.parametrize("kind", ["q4_0", "q6_k", "q4_k_m", "iq4_xs", "q2_k_s"])
def test_with_an_importance_matrix_too(tmp_path, pico_models, kind):
    model = pico_models("llama", **WIDE)
    done = agreed(model, tmp_path / "m.gguf", kind, importance_matrix.measure(model, rows_of()))
    ours = type_of(Checkpoint(model).arch, kind, True)
    assert sorted(done["types"]) == sorted({ours(t) for t in Checkpoint(model).arch.tensors()})
    assert left(tmp_path) == ["m.gguf"]


@needs_llama
@pytest.mark.parametrize("family", ["qwen2", "qwen3", "gemma3_text"])
def test_rows_that_are_no_whole_blocks_fall_back(tmp_path, pico_models, family):
    done = agreed(pico_models(family), tmp_path / "m.gguf", "q4_k_m")  # hidden size 64
    assert "Q4_K -> Q5_0" in done["fallback_types"] and "Q4_K" not in done["types"]
    assert sum(done["fallback_types"].values()) == len(done["fallbacks"])
    assert verify(pico_models(family), tmp_path / "m.gguf")["relative_difference"] < 0.5


@needs_llama
@pytest.mark.parametrize(("dtype", "kind"), [(mx.float32, "f32"), (mx.bfloat16, "bf16"), (mx.float16, "f16")])
def test_it_is_quantized_from_what_the_checkpoint_holds(tmp_path, pico_models, monkeypatch, dtype, kind):
    model, seen, real = pico_models("llama", dtype=dtype), [], quantizer.quantize

    def watched(source, out, *rest):
        seen.append({t.type for t in gguf_header.read(source).tensors.values()})
        real(source, out, *rest)

    monkeypatch.setattr(quantizer, "quantize", watched)
    export(model, tmp_path / "m.gguf", "q4_k_m")
    assert quantizer.between(Checkpoint(model)) == kind and seen == [{kind.upper(), "F32"}]
    assert quantizer.between(Checkpoint(pico_models("llama", (4, 32), dtype=mx.bfloat16))) == "f16"


@needs_llama
def test_fit_says_how_large_the_file_will_be(tmp_path, pico_models):
    model = pico_models("qwen3", **WIDE)
    done = export(model, tmp_path / "m.gguf", "q4_k_m")
    found = fit(model, ["m4-24gb"], form=Form(gguf="q4_k_m"))
    assert found["file_bytes"] == done["bytes"] and found["weights_bytes"] == done["tensor_bytes"]
    assert fit("qwen3-8b", ["m4-24gb"], form=Form(gguf="q4_k_m"))["file_bytes"] is None


# ---- who quantizes ----


def program(directory: Path, body: str) -> None:
    """A llama-quantize that is a Python program."""
    file = directory / "llama-quantize"
    file.write_text(f"#!{sys.executable}\nimport json, os, subprocess, sys\n{body}\n")
    file.chmod(file.stat().st_mode | stat.S_IXUSR)


@needs_llama
def test_llama_quantize_on_the_path_is_used(tmp_path, pico_models, monkeypatch):
    """Asked for as its usage says, from the directory of the matrix, whose path it would write into the file."""
    (tmp_path / "bin").mkdir()
    program(
        tmp_path / "bin",
        f"""
matrix, source, out, kind, threads = sys.argv[2:]
assert sys.argv[1] == "--imatrix" and os.path.exists(matrix) and "/" not in matrix and int(threads) > 0
asked = dict(source=source, out=out, kind=kind.lower(), threads=1, matrix=os.path.abspath(matrix))
open({str(tmp_path / "asked")!r}, "w").write(kind)
done = subprocess.run([sys.executable, "-m", "mlx_pare.gguf.write.quantizer"], input=json.dumps(asked), text=True)
sys.exit(done.returncode)""",
    )
    model = pico_models("llama", **WIDE)
    matrix = importance_matrix.measure(model, rows_of())
    export(model, tmp_path / "extra.gguf", "q4_k_m", matrix)
    monkeypatch.setenv("PATH", str(tmp_path / "bin") + os.pathsep + os.environ["PATH"])
    export(model, tmp_path / "program.gguf", "q4_k_m", matrix)
    assert (tmp_path / "asked").read_text() == "Q4_K_M"
    assert (tmp_path / "program.gguf").read_bytes() == (tmp_path / "extra.gguf").read_bytes()


def test_a_quantizer_that_fails_is_quoted(tmp_path, pico_models, monkeypatch):
    """Also when it ends before it has read anything."""
    (tmp_path / "bin").mkdir()
    program(tmp_path / "bin", "print('loading'); print('error: no such thing as Q4_K_M'); print('bye'); sys.exit(1)")
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    with pytest.raises(PareError, match=r"llama\.cpp cannot write q4_k_m: error: no such thing as Q4_K_M"):
        export(pico_models("llama"), tmp_path / "out" / "m.gguf", "q4_k_m")
    assert not (tmp_path / "out").exists()


def nobody(monkeypatch) -> None:
    monkeypatch.setattr(quantizer, "program", lambda: None)
    monkeypatch.setattr(quantizer.importlib.util, "find_spec", lambda name: None)


def test_without_a_quantizer_it_is_said_before_anything_is_done(tmp_path, pico_models, monkeypatch):
    nobody(monkeypatch)
    monkeypatch.setattr(gguf_size, "begun", lambda *args: pytest.fail("something was written"))
    with pytest.raises(PareError, match=r"is here. Pip install 'llama-cpp-python\[server\]>=0.3.30', put"):
        export(pico_models("llama"), tmp_path / "m.gguf", "q4_k_m")
    assert left(tmp_path) == []


def test_without_a_quantizer_some_kinds_are_written_all_the_same(tmp_path, pico_models, monkeypatch):
    nobody(monkeypatch)
    for kind in quantizer.DIRECT:
        agreed(pico_models("llama", **WIDE), tmp_path / kind, kind)


# ---- refused, interrupted, damaged ----


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        ("mxfp4_moe", "mixtures of experts"),
        ("tq1_0", "ternary"),
        ("q2_k_s", "without an importance matrix"),
        ("q9", "q9"),
    ],
)
def test_kinds_that_make_no_sense_are_refused(tmp_path, pico_models, kind, said):
    with pytest.raises(UsageError, match=said):
        export(pico_models("llama"), tmp_path / "m.gguf", kind)


def test_a_matrix_that_would_change_nothing_is_refused(tmp_path, pico_models):
    for kind in quantizer.PLAIN:
        with pytest.raises(UsageError, match=f"{kind} is written without an importance matrix"):
            export(
                pico_models("llama"),
                tmp_path / "m.gguf",
                kind,
                importance_matrix.measure(pico_models("llama"), rows_of(2)),
            )


def test_an_existing_file_is_refused_first(tmp_path, pico_models):
    (tmp_path / "m.gguf").write_text("mine")
    with pytest.raises(Refused):
        export(pico_models("llama"), tmp_path / "m.gguf", "q4_k_m")


@needs_llama
def test_room_for_both_files_is_looked_for(tmp_path, pico_models, monkeypatch):
    model = pico_models("llama", **WIDE)
    sizes = [gguf_size.predict(Checkpoint(model), kind).tensor_bytes for kind in ("q4_k_m", "f32")]
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=sum(sizes) - 1))
    with pytest.raises(PareError, match=r"with f32 next to it to quantize from, needs .* free"):
        export(model, tmp_path / "m.gguf", "q4_k_m")
    export(model, tmp_path / "q.gguf", "q6_k")
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=2 * sum(sizes)))
    export(model, tmp_path / "m.gguf", "q4_k_m")


@needs_llama
@pytest.mark.parametrize("moment", ["quantize", "check"])
def test_interrupted_nothing_is_left(tmp_path, pico_models, monkeypatch, moment):
    def fail(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(quantizer if moment == "quantize" else llama_cpp, moment, fail)
    with pytest.raises(KeyboardInterrupt):
        export(pico_models("llama"), tmp_path / "m.gguf", "q4_k_m")
    assert left(tmp_path) == []


def test_an_interrupt_ends_the_child(tmp_path, monkeypatch):
    program(tmp_path, "import time; open('pid', 'w').write(str(os.getpid())); print('x', flush=True); time.sleep(60)")

    class Stopped(quantizer.console.Progress):
        def __init__(self, *args):
            raise KeyboardInterrupt

    monkeypatch.setattr(quantizer.console, "Progress", Stopped)
    with pytest.raises(KeyboardInterrupt):
        quantizer._watched([str(tmp_path / "llama-quantize")], "", 1, tmp_path)
    if (tmp_path / "pid").exists():  # it may have been ended before it said who it was
        with pytest.raises(ProcessLookupError):
            os.kill(int((tmp_path / "pid").read_text()), 0)


@needs_llama
def test_other_types_than_predicted_are_an_error(tmp_path, pico_models, monkeypatch):
    real = quantizer.quantize
    monkeypatch.setattr(quantizer, "quantize", lambda source, out, kind, *rest: real(source, out, "q4_k_s", *rest))
    with pytest.raises(
        PareError, match=r"attn_v.weight is Q5_K, expected Q6_K|attn_v.weight is Q4_K, expected Q6_K.*other rules"
    ):
        export(pico_models("llama", **{**WIDE, "num_hidden_layers": 8}), tmp_path / "m.gguf", "q4_k_m")
    assert left(tmp_path) == []


@needs_llama
def test_damage_in_the_middle_of_a_quantized_tensor_is_found(tmp_path, pico_models, monkeypatch):
    real = quantizer.quantize

    def damaged(source, out, *rest):
        real(source, out, *rest)
        header, raw = gguf_header.read(out), bytearray(out.read_bytes())
        info = header.tensors["token_embd.weight"]
        assert info.type == "Q6_K" and info.nbytes > 3 * 1024 * 210
        at = header.data_start + info.offset + 210 * 1500 + 208
        raw[at : at + 2] = np.float16("nan").tobytes()
        out.write_bytes(raw)

    monkeypatch.setattr(quantizer, "quantize", damaged)
    model = pico_models("llama", **{**WIDE, "hidden_size": 2048, "num_hidden_layers": 1})
    with pytest.raises(PareError, match=r"token_embd\.weight holds NaN"):
        export(model, tmp_path / "m.gguf", "q4_k_m")


@needs_llama
def test_a_wrong_order_of_rows_is_seen_before_it_is_quantized(tmp_path, pico_models, monkeypatch):
    """In four bits it would pass: the noise of quantizing is as large."""
    model = pico_models("llama", **WIDE)
    monkeypatch.setattr("mlx_pare.gguf.write.tensors.rope_order", lambda heads, head_dim: list(range(heads * head_dim)))
    export(model, tmp_path / "q.gguf", "q4_k_m")
    assert llama_cpp.judged(model, tmp_path / "q.gguf", "q4_k_m")["checked"]
    with pytest.raises(PareError, match=r"computes something else .*\. Nothing was written"):
        export(model, tmp_path / "m.gguf", "q4_k_m", judge=llama_cpp.judged)
    assert left(tmp_path) == ["q.gguf"]


# ---- in a run ----


@needs_llama
def test_a_run_makes_an_importance_matrix_of_its_calibration_text(tmp_path, pico_models, two_texts):
    model, settings = pico_models("llama", **WIDE), Settings(**two_texts, gguf="Q4_K_M", samples=4, length=32, keep=0.5)
    with open_run(model, tmp_path / "run") as run:
        file = export_step(run, model, Texts(model, settings), settings)
        kept = imatrix_file.load(file.with_name("imatrix.gguf"))
        imatrix_file.check(kept, Checkpoint(model))
        told = json.loads(file.with_name("export.json").read_text())
        written = file.stat().st_mtime_ns
        assert export_step(run, model, Texts(model, settings), settings).stat().st_mtime_ns == written
    assert file.name == "model-q4_k_m.gguf" and told["bytes"] == file.stat().st_size
    assert told["imatrix"] == {"entries": len(kept.sums), "dataset": "data"}
    assert (kept.chunks, kept.chunk_size, kept.counts["blk.0.attn_q.weight"]) == (4, 32, 128.0)
    with open_run(model, tmp_path / "run") as run, pytest.raises(Refused, match="kind was 'q4_k_m'"):
        export_step(run, model, Texts(model, settings), replace(settings, gguf="q6_k"))


@needs_llama
def test_a_run_makes_none_where_none_is_used(tmp_path, pico_models, two_texts):
    model, settings = pico_models("llama", **WIDE), Settings(**two_texts, gguf="q6_k", samples=4, length=32, keep=0.5)
    with open_run(model, tmp_path / "run") as run:
        file = export_step(run, model, Texts(model, settings), settings)
    assert left(file.parent) == ["export.json", "fits.json", "model-q6_k.gguf", "step.json"]


# ---- Q6_K, ours ----


def by_ggml(rows: np.ndarray) -> np.ndarray:
    """uint8 [blocks, 210] of ggml's own quantizer."""
    import llama_cpp as installed

    library = ctypes.CDLL(str(Path(installed.__file__).parent / "lib" / "libggml-base.so"))
    quantize = library.ggml_quantize_chunk
    quantize.argtypes = [ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p, *[ctypes.c_int64] * 3, ctypes.c_void_p]
    quantize.restype = ctypes.c_size_t
    out = np.zeros(rows.size // 256 * 210, np.uint8)
    quantize(14, rows.ctypes.data, out.ctypes.data, 0, *rows.shape, None)
    return out.reshape(-1, 210)


def rows_for_q6_k() -> np.ndarray:
    """Ordinary rows, zeros, zeros in part, tiny and huge values, one value alone, all alike."""
    rows = np.random.default_rng(0).standard_normal((64, 512)).astype(np.float32)
    rows[1], rows[2, :256], rows[2, 256:300] = 0, 0, 0
    rows[3] *= 1e-6
    rows[4] *= 1e5
    rows[5, 1:] = 0
    rows[6] = -3
    return rows


@needs_llama
def test_q6_k_is_what_ggml_makes():
    """Sums of 16 floats in another order now and then choose another of two scales that are as good."""
    rows = rows_for_q6_k()
    ours = gguf_values.convert(mx.array(rows), "Q6_K").reshape(-1, 210)
    theirs = by_ggml(rows)
    assert (ours == theirs).all(axis=1).mean() > 0.95
    kind = gguf.GGMLQuantizationType.Q6_K
    errors = [np.square(gguf.quants.dequantize(of, kind) - rows.reshape(-1, 256)).sum(1) for of in (ours, theirs)]
    np.testing.assert_allclose(errors[0], errors[1], rtol=0.02)
    for found in (ours, theirs):
        assert not found[2:5].any()  # blocks of zeros


@pytest.mark.parametrize("kind", ["Q6_K", "Q4_0", "Q5_1", "BF16"])
@pytest.mark.parametrize("wrong", [np.nan, np.inf])
def test_a_value_that_is_not_finite_is_refused(kind, wrong):
    rows = np.ones((3, 256), np.float32)
    rows[1, 40] = wrong
    row = SimpleNamespace(type=kind, source=SimpleNamespace(name="w"))
    with pytest.raises(PareError, match="w holds NaN or infinity"), np.errstate(all="ignore"):
        gguf_values._checked(gguf_values.convert(mx.array(rows), kind), mx.array(rows), row)


def test_the_scales_of_every_type_are_where_the_table_says():
    """A block of ones in gguf-py's reading, and NaN where its scales are set to NaN."""
    for name, place in gguf_values.SCALES.items():
        kind = gguf.GGMLQuantizationType[name]
        raw = np.random.default_rng(0).integers(0, 256, (4, gguf_values.TYPES[name].size), np.uint8)
        raw[:, slice(*place)] = np.tile(np.array([0.5], np.float16).view(np.uint8), (place[1] - place[0]) // 2)
        assert np.isfinite(gguf.quants.dequantize(raw, kind)).all() and gguf_values.finite(raw.reshape(-1), name)
        for at in range(*place, 2):
            bad = raw.copy()
            bad[1, at : at + 2] = np.float16("nan").tobytes()[0], np.float16("nan").tobytes()[1]
            assert not np.isfinite(gguf.quants.dequantize(bad, kind)[1]).any(), name
            assert not gguf_values.finite(bad.reshape(-1), name)


def test_tolerances_grow_as_bits_fall():
    order = ["f32", "f16", "bf16", "q8_0", "q6_k", "q5_k_m", "q4_k_m", "q3_k_m", "q2_k", "iq1_s"]
    found = [llama_cpp.largest_difference(kind) for kind in order]
    assert found == sorted(found) and found[-1] < 1.13
    assert all(llama_cpp.largest_difference(kind) for kind in quantizer.FILE_TYPES)
