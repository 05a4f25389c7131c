"""A GGUF file as MODEL: rebuilt once into a cache, known again by its content, and cut like any other model."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import gguf_edit
import numpy as np
import pico
import pytest

from mlx_pare.base.errors import PareError
from mlx_pare.exporting import llama_cpp
from mlx_pare.exporting.export import export
from mlx_pare.gguf.header import read_parts
from mlx_pare.gguf.read import rebuild as gguf_model
from mlx_pare.model.checkpoint import Checkpoint
from mlx_pare.sources import open_model
from mlx_pare.store import atomic


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("MLX_PARE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def file(tmp_path, pico_models) -> Path:
    export(pico_models("llama"), tmp_path / "model.gguf", "q8_0")
    return tmp_path / "model.gguf"


def test_a_directory_is_itself(pico_models):
    assert open_model.opened(pico_models("llama")) == pico_models("llama")
    assert open_model.opened(Path("nowhere.gguf")) == Path("nowhere.gguf")


def test_a_file_is_rebuilt_once_and_known_again(file, cache, monkeypatch):
    first = open_model.opened(file)
    assert first.parent == cache and first.name.startswith("model-")
    known = Checkpoint(first).identity()
    monkeypatch.setattr(gguf_model, "rebuild", lambda *_: pytest.fail("rebuilt again"))
    os.utime(file, (1, 1))  # dates do not matter
    elsewhere = Path(shutil.copy(file, file.parent.parent / file.name))
    assert open_model.opened(file) == open_model.opened(elsewhere) == first
    monkeypatch.undo()
    monkeypatch.setenv("MLX_PARE_CACHE", str(cache))
    shutil.rmtree(cache)
    assert Checkpoint(open_model.opened(file)).identity() == known  # so a run over it goes on
    elsewhere.unlink()


@pytest.mark.parametrize("place", [40, -70, "middle"])
def test_another_content_is_another_model(file, place):
    raw, parts = bytearray(file.read_bytes()), read_parts(file)
    before = open_model.identity(parts)
    at = len(raw) // 2 if place == "middle" else place % len(raw)
    raw[at] ^= 1
    file.write_bytes(raw)
    assert open_model.identity(parts) != before
    file.write_bytes(raw[:at] + bytes([raw[at] ^ 1]) + raw[at + 1 :])
    renamed = file.rename(file.with_name("other.gguf"))
    assert open_model.identity(read_parts(renamed)) != before


@pytest.mark.parametrize("moment", ["write_config", "Checkpoint"])
def test_a_killed_call_leaves_nothing_that_looks_whole(file, cache, monkeypatch, moment):
    original = getattr(gguf_model, moment)

    def killed(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(gguf_model, moment, killed)
    monkeypatch.setattr(atomic.shutil, "rmtree", lambda *_, **__: None)  # as if there had been no time to clean up
    with pytest.raises(KeyboardInterrupt):
        open_model.opened(file)
    assert [p.suffix for p in cache.iterdir() if p.is_dir()] == [".part"]
    monkeypatch.undo()
    monkeypatch.setenv("MLX_PARE_CACHE", str(cache))
    monkeypatch.setattr(gguf_model, moment, original)
    assert len(Checkpoint(open_model.opened(file)).arch.layers) == 4
    assert [p.suffix for p in cache.iterdir() if p.is_dir()] == [""]


def test_a_damaged_file_leaves_nothing(file, cache):
    broken = gguf_edit.edited(
        file, file.with_name("broken.gguf"),
        change=lambda name, v: (np.where(v > 0, np.nan, v) if name == "blk.3.ffn_up.weight" else v, "F32"),
    )  # fmt: skip
    with pytest.raises(PareError, match="holds NaN"):
        open_model.opened(broken)
    assert not [p for p in cache.iterdir() if p.is_dir()]


def test_names_of_files_are_names_of_directories_only(tmp_path, file, cache):
    strange = file.rename(tmp_path / "..\x1b[31m model .gguf")
    made = open_model.opened(strange)
    assert made.parent == cache and made.is_dir()


@pytest.mark.parametrize("system", ["darwin", "linux"])
def test_where_the_cache_is(monkeypatch, system, tmp_path):
    monkeypatch.delenv("MLX_PARE_CACHE")
    monkeypatch.setattr(open_model.sys, "platform", system)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    expected = {"darwin": "Library/Caches/mlx-pare", "linux": ".cache/mlx-pare"}
    assert open_model.cache() == tmp_path / expected[system]
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "x"))
    assert open_model.cache() == tmp_path / (expected["darwin"] if system == "darwin" else "x/mlx-pare")


# ---- commands ----


def test_import(pare, file, tmp_path):
    done = pare("import", file, "-o", tmp_path / "out", "--json")
    assert done.code == 0 and done.document["types"] == {"Q8_0": 29, "F32": 9}
    assert Checkpoint(tmp_path / "out").quantized
    assert pare("import", file, "-o", tmp_path / "out").code == 3
    assert pare("import", tmp_path / "none.gguf", "-o", tmp_path / "no").code == 1
    dense = pare("import", file, "-o", tmp_path / "dense", "--dense")
    assert dense.code == 0 and "relative error" in dense.out and not Checkpoint(tmp_path / "dense").quantized


def test_commands_take_a_file(pare, file, tmp_path, two_texts):
    text = two_texts["test_data"]
    there = pare("evaluate", file, "--data", text, "--samples", 3, "--length", 32, "--teacher", file, "--json")
    assert there.code == 0 and there.document["kl_divergence"] == 0
    assert pare("export", file, "--gguf", "q8_0", "-o", tmp_path / "again.gguf", "--no-verify").code == 0
    again = gguf_edit.gguf.GGUFReader(tmp_path / "again.gguf").tensors
    assert {t.name: t.data.tobytes() for t in again} == {
        t.name: t.data.tobytes() for t in gguf_edit.gguf.GGUFReader(file).tensors
    }
    assert pare("bench", file, file, "--trials", 1, "--prompt", 8, "--new", 2).code == 0
    seen = pare("inspect", file, "--json")
    assert seen.code == 0 and seen.document["origin"] == "gguf"


SMALL = ["--keep", "0.75", "--length", "32", "--samples", "4", "--recover-steps", "2", "--trials", "0"]
SMALL += ["--context", "256", "--try", "2"]


@pytest.mark.parametrize("kind", ["q8_0", "q4_k_m"])
def test_from_a_file_to_a_smaller_file(pare, tmp_path, two_texts, kind):
    """What somebody does who has nothing but a GGUF file."""
    model = pico.make(tmp_path / "dense", "llama", hidden_size=256, head_dim=64, num_hidden_layers=2)
    source = tmp_path / "model.gguf"
    export(model, source, "q8_0")
    if kind == "q4_k_m":
        if not llama_cpp.available():
            pytest.skip("llama-cpp-python is not installed")
        import llama_quantize

        export(model, tmp_path / "f32.gguf", "f32")
        job = {"gguf": str(tmp_path / "f32.gguf"), "kind": kind, "imatrix": None, "out": str(source)}
        source.unlink()
        llama_quantize.types([job], tmp_path)
    texts = ["--data", two_texts["data"], "--test-data", two_texts["test_data"]]
    done = pare("run", source, "--out", tmp_path / "run", *SMALL, *texts, "--json")
    assert done.code == 0, done.err
    smaller = Path(done.document["gguf"])
    assert smaller.stat().st_size < (tmp_path / "model.gguf").stat().st_size * (1 if kind == "q8_0" else 2)
    again = pare("run", source, "--out", tmp_path / "run", *SMALL, *texts, "--json")  # it goes on where it ended
    assert again.code == 0 and "rebuilt" not in again.err
    if llama_cpp.available():
        tokens = list(range(20, 60))
        ours, theirs = llama_cpp.mlx_logits(Path(done.document["model"]), tokens), llama_cpp.logits(smaller, tokens)
        assert np.abs(ours - theirs).mean() < 0.2 * ours.std()


def test_the_command_line_stays_light():
    code = (
        "import sys, mlx_pare.sources.open_model; sys.exit(', '.join({'mlx', 'numpy', 'gguf'} & set(sys.modules)) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


# ---- case 07: a GGUF file is told by its first four bytes ----

QUICK = ["--samples", "4", "--length", "32", "--recover-steps", "0", "--widths", "even", "--trials", "0"]
QUICK += ["--axes", "ffn", "--keep", "0.9"]


@pytest.mark.parametrize("name", ["sha256-0123abcd", "model.bin", "no ending", "M.GGUF", ".gguf", "x.safetensors"])
def test_case_07_the_name_of_a_gguf_file_does_not_matter(pare, file, tmp_path, two_texts, name):
    blob = file.rename(tmp_path / name)
    seen = pare("inspect", blob, "--json")
    assert seen.code == 0 and seen.document["origin"] == "gguf", seen.err
    fits = pare("fit", blob, "--mac", "m4-24gb", "--json")
    assert fits.code == 0 and fits.document["origin"] == "gguf"
    asked = ["--data", two_texts["test_data"], "--samples", 3, "--length", 32, "--json"]
    assert pare("evaluate", blob, *asked, "--teacher", blob).code == 0
    assert pare("import", blob, "-o", tmp_path / "out").code == 0
    planned = pare("run", blob, "--out", tmp_path / "run", *QUICK, "--dry-run", "--json")
    assert planned.code == 0, planned.err


def test_case_07_run_of_an_ollama_blob(pare, file, tmp_path, two_texts):
    blob = file.rename(tmp_path / "sha256-0123abcd")
    texts = ["--data", two_texts["data"], "--test-data", two_texts["test_data"]]
    done = pare("run", blob, "--out", tmp_path / "run", *QUICK, *texts, "--json")
    assert done.code == 0, done.err


@pytest.mark.parametrize("beside", ["nothing", "config.json", "mmproj", "AppleDouble", "text"])
@pytest.mark.parametrize("name", ["model.gguf", "sha256-0123abcd"])
def test_case_07_a_folder_with_one_gguf_file_is_that_file(pare, file, tmp_path, two_texts, beside, name):
    folder = tmp_path / "folder"
    folder.mkdir()
    file.rename(folder / name)
    if beside == "config.json":  # as some repositories of GGUF files have it
        (folder / "config.json").write_text('{"model_type": "llama"}')
    elif beside == "mmproj":
        (folder / "mmproj-model.gguf").write_bytes(b"GGUF no model")
        name == "model.gguf" or (folder / "mmproj-model.gguf").unlink()
    elif beside == "AppleDouble":
        (folder / f"._{name}").write_bytes(b"\0\5\x16\7 GGUF")
    elif beside == "text":
        (folder / "README.md").write_text("GGUF\n")
        name == "model.gguf" or (folder / "README.md").write_text("a model\n")
    seen = pare("inspect", folder, "--json")
    assert seen.code == 0 and seen.document["origin"] == "gguf" and seen.document["layers"] == 4, seen.err
    done = pare("evaluate", folder, "--data", two_texts["test_data"], "--samples", 2, "--length", 32)
    assert done.code == 0, done.err
    assert pare("import", folder, "-o", tmp_path / "out").code == 0
    assert pare("run", folder, "--out", tmp_path / "run", *QUICK, "--dry-run").code == 0


def test_case_07_of_several_files_one_must_be_named(pare, file, tmp_path):
    folder = tmp_path / "folder"
    folder.mkdir()
    for name in ("q4.gguf", "q8.gguf"):
        shutil.copy(file, folder / name)
    done = pare("run", folder, "--out", tmp_path / "run", "--keep", "0.9")
    assert done.code == 2 and "q4.gguf, q8.gguf" in done.err and not (tmp_path / "run").exists()
    assert pare("inspect", folder).code == 0  # which says that it takes the first


def test_case_07_the_parts_of_one_model_are_one(pare, pico_models, tmp_path):
    folder = tmp_path / "folder"
    folder.mkdir()
    export(pico_models("llama"), tmp_path / "m.gguf", "f16")
    gguf_edit.edited(tmp_path / "m.gguf", folder / "m.gguf", split_max_tensors=7)
    assert len(list(folder.iterdir())) > 2
    assert open_model.opened(folder) == open_model.opened(sorted(folder.iterdir())[-1])


def test_case_07_a_model_directory_stays_one(pico_models, tmp_path, file):
    model = Path(shutil.copytree(pico_models("llama"), tmp_path / "both"))
    shutil.copy(file, model / "model.gguf")
    assert open_model.opened(model) == model


@pytest.mark.parametrize("content", [b"", b"GGU", b"ggml", b"PK\3\4"])
def test_case_07_what_is_called_gguf_and_is_none_is_said(pare, tmp_path, content):
    (tmp_path / "m.gguf").write_bytes(content)
    for asked in (["inspect", tmp_path / "m.gguf"], ["evaluate", tmp_path / "m.gguf", "--data", tmp_path / "m.gguf"]):
        done = pare(*asked)
        assert done.code == 1 and "GGUF" in done.err
