"""The cache of rebuilt GGUF files: a changed file is another model, and what a cleaner took is made again."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import gguf_edit
import pico
import pytest

from mlx_pare.base.errors import PareError
from mlx_pare.exporting.export import export
from mlx_pare.gguf.header import read, read_parts
from mlx_pare.gguf.read import rebuild as gguf_model
from mlx_pare.model.checkpoint import Checkpoint
from mlx_pare.sources import open_model

SHORT = ["--length", 32, "--samples", 2]
QUICK = ["--samples", 4, "--length", 32, "--recover-steps", 0, "--widths", "even", "--trials", 0, "--axes", "ffn"]
QUICK += ["--keep", 0.9]


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("MLX_PARE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def file(tmp_path, pico_models) -> Path:
    export(pico_models("llama", num_hidden_layers=2), tmp_path / "model.gguf", "q8_0")
    return tmp_path / "model.gguf"


@pytest.fixture
def at_rest(monkeypatch):
    """Files count as finished at once."""
    monkeypatch.setattr(open_model, "AT_REST_S", -1)


def written_to(file: Path, place: int, data: bytes) -> None:
    """Other bytes in place, with the dates of before."""
    dates = file.stat().st_atime_ns, file.stat().st_mtime_ns
    with file.open("r+b") as stream:
        stream.seek(place)
        stream.write(data)
    os.utime(file, ns=dates)


def places(file: Path) -> list[int]:
    """A byte of every tensor, away from its beginning, middle and end, and one of the header."""
    header = read(file)
    return [40, *(header.data_start + t.offset + t.nbytes // 3 for t in header.tensors.values())]


# ---- F3: known again ----


def test_f03_any_byte_of_any_tensor_makes_it_another_model(file, at_rest):
    seen = {open_model.identity(read_parts(file))}
    for number, place in enumerate(places(file), 2):
        byte = file.read_bytes()[place]
        written_to(file, place, bytes([byte ^ 1]))
        parts = read_parts(file)
        content = open_model.remembered(parts, open_model.glimpse(parts))
        seen.add(open_model.identity(parts, content))
        assert content == open_model.content_of(parts) and len(seen) == number
        written_to(file, place, bytes([byte]))


def test_f03_a_changed_file_is_not_served_from_the_cache(pare, two_texts, tmp_path, monkeypatch):
    """As in an abliterated or a repaired file: the same header, the same size, other weights."""
    file = tmp_path / "wide.gguf"
    export(pico.make(tmp_path / "wide", "llama", hidden_size=256, head_dim=64, num_hidden_layers=2), file, "q8_0")

    def perplexity() -> float:
        done = pare("evaluate", file, "--data", two_texts["test_data"], *SHORT, "--json")
        assert done.code == 0, done.err
        return done.document["perplexity"]

    before, header = perplexity(), read(file)
    step = (header.file_bytes - header.data_start) // 64
    for place in range(header.data_start, header.file_bytes - step, step):  # all but 64 samples
        written_to(file, place + 4096, bytes(step - 4096))
    after = perplexity()
    monkeypatch.setenv("MLX_PARE_CACHE", str(tmp_path / "elsewhere"))
    assert after == perplexity() != before


@pytest.mark.parametrize("pause", [True, False])
def test_f03_an_untouched_file_is_hashed_once(file, monkeypatch, pause):
    monkeypatch.setattr(open_model, "AT_REST_S", -1 if pause else 3)
    first = open_model.opened(file)
    hashed, original = [], open_model.content_of
    monkeypatch.setattr(open_model, "content_of", lambda parts: hashed.append(parts) or original(parts))
    assert open_model.opened(file) == first
    assert len(hashed) == (0 if pause else 1)  # written this second: it may change once more without another date
    os.utime(file, (1, 1))
    assert open_model.opened(file) == first and hashed


def test_f03_dates_that_lie_are_caught_by_some_bytes_of_every_tensor(file, at_rest, monkeypatch):
    """On a disk that keeps no honest dates."""
    parts, stat = read_parts(file), os.stat(file)
    monkeypatch.setattr(Path, "stat", lambda self, **_: stat)
    before, raw = open_model.glimpse(parts), file.read_bytes()
    for tensor in read(file).tensors.values():
        start = parts[file].data_start + tensor.offset
        for place in (start, start + tensor.nbytes // 2, start + tensor.nbytes - 1):
            written_to(file, place, bytes([raw[place] ^ 1]))
            assert open_model.glimpse(parts) != before
            written_to(file, place, raw[place : place + 1])
    assert open_model.glimpse(parts) == before


def test_f03_what_is_remembered_may_be_damaged_or_a_lie(file, at_rest, cache):
    first = open_model.opened(file)
    (note,) = cache.glob("*.hash")
    for text in ("", "[]", "{}", '{"glimpse": 5, "content": "../.."}', "\xff"):
        note.write_text(text, "latin-1")
        assert open_model.opened(file) == first


def test_f03_a_file_that_grows_under_the_reader_is_refused(file, cache, monkeypatch):
    original = gguf_model.rebuild

    def rebuild(*arguments, **named):
        found = original(*arguments, **named)
        written_to(file, places(file)[5], b"\1\2\3")
        return found

    monkeypatch.setattr(gguf_model, "rebuild", rebuild)
    with pytest.raises(PareError, match="changed while it was read"):
        open_model.opened(file)
    assert not [p for p in cache.iterdir() if p.is_dir()]
    monkeypatch.undo()
    monkeypatch.setenv("MLX_PARE_CACHE", str(cache))
    assert open_model.opened(file).is_dir()


def test_f03_a_run_notices_that_its_gguf_file_changed(pare, file, two_texts, tmp_path):
    """Also a byte that the cheap identity of the rebuilt model does not look at."""
    asked = ["run", file, "--out", tmp_path / "run", "--data", two_texts["data"], "--test-data", two_texts["test_data"]]
    done = pare(*asked, *QUICK)
    assert done.code == 0, done.err
    header = read(file)
    tensor = header.tensors["blk.1.ffn_up.weight"]
    place = header.data_start + tensor.offset + 5
    before = Checkpoint(open_model.opened(file)).identity()
    written_to(file, place, bytes([file.read_bytes()[place] ^ 3]))
    assert Checkpoint(open_model.opened(file)).identity() != before
    again = pare(*asked, *QUICK)
    assert again.code == 3 and "another model" in again.err
    written_to(file, place, bytes([file.read_bytes()[place] ^ 3]))
    renamed = file.rename(tmp_path / "renamed.gguf")  # the same bytes are the same model
    assert pare("run", renamed, *asked[2:], *QUICK).code == 0


# ---- F4: what lies there may be deleted ----


def test_f04_a_file_that_is_gone_cut_off_or_changed_is_made_again(file, cache):
    made = open_model.opened(file)
    known = {f.name: f.read_bytes() for f in made.iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", open_model.LIST} <= set(
        known
    )
    for name, content in known.items():
        for change in (Path.unlink, lambda f, c=content: f.write_bytes(c[: len(c) // 2])):
            change(made / name)
            assert open_model.opened(file) == made
            assert {f.name: f.read_bytes() for f in made.iterdir()} == known
    raw = bytearray(known["model.safetensors"])
    raw[-100] ^= 1
    (made / "model.safetensors").write_bytes(raw)
    assert open_model.opened(file) == made and (made / "model.safetensors").read_bytes() == known["model.safetensors"]


def test_f04_evaluate_gives_the_same_after_a_cleaner_came(pare, file, two_texts):
    asked = ["evaluate", file, "--data", two_texts["test_data"], *SHORT, "--json"]
    before = pare(*asked)
    (open_model.opened(file) / "tokenizer_config.json").unlink()
    after = pare(*asked)
    assert after.document["perplexity"] == before.document["perplexity"]
    assert "not whole" in after.err


def test_f04_a_file_in_place_of_the_directory(file, cache):
    made = open_model.opened(file)
    shutil.rmtree(made)
    made.write_text("no directory")
    assert Checkpoint(open_model.opened(file)).path == made


@pytest.mark.parametrize("lost", ["all", "config.json", open_model.LIST])
def test_f04_a_step_says_how_to_get_the_model_back(pare, file, cache, two_texts, tmp_path, lost):
    texts = ["--data", two_texts["data"], "--test-data", two_texts["test_data"], "--samples", 4, "--length", 32]
    assert pare("calibrate", file, "--out", tmp_path / "run", *texts).code == 0
    if lost == "all":
        shutil.rmtree(cache)
    else:
        (open_model.opened(file) / lost).unlink()
    done = pare("score", tmp_path / "run")
    assert done.code == 1 and f"mlx-pare calibrate FILE.gguf --out {tmp_path / 'run'}" in done.err
    assert pare("calibrate", file, "--out", tmp_path / "run", *texts).code == 0  # as it says
    assert pare("score", tmp_path / "run").code == 0
    assert pare("plan", tmp_path / "run", "--keep", 0.9, "--widths", "even").code == 0
    shutil.rmtree(cache)
    done = pare("fit", tmp_path / "run")  # of the plan, which names the model
    assert done.code == 1 and "FILE.gguf" in done.err


def test_f04_a_model_that_is_no_gguf_file_may_have_moved(pare, pico_models, two_texts, tmp_path):
    model = Path(shutil.copytree(pico_models("llama", num_hidden_layers=2), tmp_path / "m"))
    asked = ["--out", tmp_path / "run", "--data", two_texts["data"], "--samples", 4, "--length", 32]
    assert pare("calibrate", model, *asked).code == 0
    model.rename(tmp_path / "moved")
    done = pare("score", tmp_path / "run")
    assert done.code == 1 and "moved" in done.err and "calibrate" in done.err


# ---- F6: locks in a shared directory ----


@pytest.mark.parametrize("what", ["link", "dangling", "directory", "pipe"])
def test_f06_a_lock_is_no_way_to_another_file(file, cache, tmp_path, what):
    lock = cache / f"{open_model.opened(file).name}.lock"
    victim = tmp_path / "victim"
    victim.write_text("precious")
    lock.unlink()
    if what in ("link", "dangling"):
        lock.symlink_to(victim if what == "link" else tmp_path / "new")
    else:
        lock.mkdir() if what == "directory" else os.mkfifo(lock)
    if what == "pipe":
        assert open_model.opened(file)  # it holds a lock as well as a file
    else:
        with pytest.raises(PareError, match="Remove it"):
            open_model.opened(file)
    assert victim.read_text() == "precious" and not (tmp_path / "new").exists()


def test_f06_a_lock_is_not_emptied(file, cache):
    lock = cache / f"{open_model.opened(file).name}.lock"
    lock.write_text("somebody's")
    open_model.opened(file)
    assert lock.read_text() == "somebody's"


def test_f04_a_cleaner_may_take_a_lock_from_who_waits_for_it(file, cache, monkeypatch):
    lock, original, held = cache / f"{open_model.opened(file).name}.lock", open_model.fcntl.flock, []

    def flock(handle, how):
        if not held:
            lock.unlink()
        held.append(handle)
        original(handle, how)

    monkeypatch.setattr(open_model.fcntl, "flock", flock)
    assert open_model.opened(file).is_dir() and len(held) == 2 and lock.exists()


@pytest.mark.parametrize("number", sorted(open_model.NO_LOCKS))
def test_f15_a_disk_without_locks_serves_as_a_cache(file, monkeypatch, number):
    def flock(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(open_model.fcntl, "flock", flock)
    assert open_model.opened(file).is_dir()


def test_f03_all_parts_of_a_model_count(tmp_path, pico_models, at_rest):
    export(pico_models("llama", num_hidden_layers=2), tmp_path / "m.gguf", "f16")
    gguf_edit.edited(tmp_path / "m.gguf", tmp_path / "p.gguf", split_max_tensors=7)
    parts = sorted(tmp_path.glob("p-*"))
    before = open_model.opened(parts[0])
    assert open_model.opened(parts[-1]) == before
    place = places(parts[-1])[-1]
    written_to(parts[-1], place, bytes([parts[-1].read_bytes()[place] ^ 1]))
    assert open_model.opened(parts[0]) != before
