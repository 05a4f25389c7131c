"""Statistics equal float64 numpy, padding does not count, and an interrupted calibration ends in the same bytes."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import mlx.core as mx
import numpy as np
import pico
import pytest
import reference

from mlx_pare.base.errors import Refused, UsageError
from mlx_pare.model.checkpoint import Checkpoint
from mlx_pare.scoring import gradients
from mlx_pare.scoring.calibrate import EXTRA, SITES, Statistics, calibrate, check_memory
from mlx_pare.store.arrays import Arrays
from mlx_pare.stream import batches, memory
from mlx_pare.stream.spool import Spool, Spooled
from mlx_pare.text.corpus import Rows

LAYERS = 4


def rows(count: int = 5, length: int = 16, lengths: list[int] | None = None) -> Rows:
    full = Rows.full(np.random.default_rng(0).integers(0, 500, (count, length)))
    return full if lengths is None else Rows(full.tokens, np.array(lengths, dtype=np.int32))


PADDED = rows(lengths=[16, 3, 1, 9, 12])


def check(model: Path, data: Rows, directory: Path) -> None:
    """Every array of every layer and site against the reference, and no other array."""
    found = Arrays.load(calibrate(model, data, directory), "statistics")
    _, layers = reference.forward(*reference.load(model), data.tokens)
    names = set()
    for i, activations in enumerate(layers):
        for site in SITES:
            expected = reference.moments(activations[site], data.lengths)
            for name, values in expected.items():
                slack = 1e-5 * expected["abs_sum"].max() if name == "sum" else 1e-6
                np.testing.assert_allclose(found.arrays[f"{i}.{site}.{name}"], values, rtol=1e-4, atol=slack)
                names.add(f"{i}.{site}.{name}")
        cosine = reference.cosine_sum(activations["before"], activations["after"], data.lengths)
        np.testing.assert_allclose(found.arrays[f"{i}.block.cosine"], cosine, rtol=1e-5)
        names.add(f"{i}.block.cosine")
    expected = reference.angles(layers, data.lengths)
    np.testing.assert_allclose(found.arrays["angles"], expected, rtol=1e-4, atol=1e-5)
    names.add("angles")
    assert set(found.arrays) == names
    assert found.about["tokens"] == data.lengths.sum() and found.about["rows"] == data.count
    assert found.about["layers"] == len(layers) and found.about["data"] == data.digest()


@pytest.mark.parametrize("data", [rows(), PADDED], ids=["full", "padded"])
@pytest.mark.parametrize("packed", [None, (4, 32)], ids=["dense", "4 bits"])
@pytest.mark.parametrize("family", pico.FAMILIES)
def test_statistics(pico_models, tmp_path, family, packed, data):
    check(pico_models(family, packed), data, tmp_path / "s")


@pytest.mark.parametrize("micro_batch", [1, 32])
def test_statistics_over_micro_batches(pico_models, tmp_path, monkeypatch, micro_batch):
    """The greatest value, and the mean of each row, do not lie in the last micro-batch only."""
    monkeypatch.setattr(batches, "MICRO_BATCH_TOKENS", micro_batch)
    check(pico_models("gemma3_text"), PADDED, tmp_path / "s")


def test_what_stands_in_the_padding_does_not_matter(pico_models, tmp_path):
    other = Rows(np.where(PADDED.mask(), PADDED.tokens, 7), PADDED.lengths)
    a, b = (Arrays.load(calibrate(pico_models("llama"), d, tmp_path / n), n) for d, n in ((PADDED, "a"), (other, "b")))
    assert a.about["data"] != b.about["data"]
    for name, values in a.arrays.items():
        np.testing.assert_allclose(values, b.arrays[name], rtol=1e-5, atol=1e-5)


# ---- the same bytes ----


class Killed(Exception):
    pass


@pytest.fixture(scope="module", params=[None, (4, 32)], ids=["dense", "4 bits"])
def whole(request, pico_models, tmp_path_factory):
    """(model, rows, stats.safetensors of a calibration that nobody interrupted)."""
    model = pico_models("llama", request.param)
    return model, rows(), calibrate(model, rows(), tmp_path_factory.mktemp("whole")).read_bytes()


def before_block_is_saved(monkeypatch, block: int) -> None:
    leave = Statistics.leave
    monkeypatch.setattr(Statistics, "leave", lambda s, i, h: die() if i == block else leave(s, i, h))


def after_block_is_saved(monkeypatch, block: int) -> None:
    save = Statistics._save_hidden
    monkeypatch.setattr(Statistics, "_save_hidden", lambda s, n, h: die() if n == block + 1 else save(s, n, h))


def after_hidden_is_saved(monkeypatch, block: int) -> None:
    leave = Statistics.leave

    def then_die(self, index, hidden):
        leave(self, index, hidden)
        if index == block:
            die()

    monkeypatch.setattr(Statistics, "leave", then_die)


def die() -> None:
    raise Killed


WHEN = [before_block_is_saved, after_block_is_saved, after_hidden_is_saved]


@pytest.mark.parametrize("block", range(LAYERS))
@pytest.mark.parametrize("when", WHEN, ids=lambda f: f.__name__)
def test_resumed_after_any_block(whole, tmp_path, monkeypatch, when, block):
    model, data, expected = whole
    with monkeypatch.context() as patch:
        when(patch, block)
        with pytest.raises(Killed):
            calibrate(model, data, tmp_path, save_every_s=0)
    entered = seen_blocks(monkeypatch)
    assert calibrate(model, data, tmp_path, save_every_s=0).read_bytes() == expected
    done = block + 1 if when is after_hidden_is_saved else block
    finished = block == LAYERS - 1 and when is not before_block_is_saved
    assert entered == ([] if finished else list(range(done, LAYERS)))
    assert [f.name for f in tmp_path.iterdir()] == ["stats.safetensors"]


def seen_blocks(monkeypatch) -> list[int]:
    entered, enter = [], Statistics.enter
    monkeypatch.setattr(Statistics, "enter", lambda s, i, b, m: (entered.append(i), enter(s, i, b, m))[1])
    return entered


@pytest.mark.parametrize("block", range(LAYERS))
def test_resumed_when_no_hidden_states_were_saved(whole, tmp_path, monkeypatch, block):
    model, data, expected = whole
    with monkeypatch.context() as patch:
        after_hidden_is_saved(patch, block)
        with pytest.raises(Killed):
            calibrate(model, data, tmp_path, save_every_s=1e9)
    assert not list(tmp_path.glob("hidden*"))
    assert calibrate(model, data, tmp_path, save_every_s=1e9).read_bytes() == expected


def test_resumed_after_every_block_in_turn(whole, tmp_path, monkeypatch):
    """A machine that never gets further than one block."""
    model, data, expected = whole
    for block in range(LAYERS - 1):
        with monkeypatch.context() as patch:
            after_hidden_is_saved(patch, block)
            with pytest.raises(Killed):
                calibrate(model, data, tmp_path, save_every_s=0)
    assert calibrate(model, data, tmp_path, save_every_s=0).read_bytes() == expected


def test_half_written_files_are_ignored(whole, tmp_path):
    model, data, expected = whole
    (tmp_path / ".block-0000.tmp.safetensors").write_bytes(b"half")
    (tmp_path / ".hidden-0003.tmp.safetensors").write_bytes(b"half")
    assert calibrate(model, data, tmp_path).read_bytes() == expected


def test_hidden_states_without_their_blocks_are_not_trusted(whole, tmp_path, monkeypatch):
    model, data, expected = whole
    with monkeypatch.context() as patch:
        after_hidden_is_saved(patch, 2)
        with pytest.raises(Killed):
            calibrate(model, data, tmp_path, save_every_s=0)
    (tmp_path / "block-0001.safetensors").unlink()
    assert calibrate(model, data, tmp_path, save_every_s=0).read_bytes() == expected


KILLED = """
import os, signal, sys
from pathlib import Path
sys.path[:0] = sys.argv[3:]
from mlx_pare.scoring.calibrate import Statistics, calibrate
from tests.scoring import test_calibrate
leave = Statistics.leave
def then_die(self, index, hidden):
    leave(self, index, hidden)
    if index == 1:
        os.kill(os.getpid(), signal.SIGKILL)
Statistics.leave = then_die
calibrate(Path(sys.argv[1]), test_calibrate.rows(), Path(sys.argv[2]), save_every_s=0)
"""


def test_resumed_after_kill_9(pico_models, tmp_path):
    model, here = pico_models("gemma3_text"), Path(__file__).resolve().parents[2]
    paths = [str(here), str(here / "tests" / "support")]
    done = subprocess.run([sys.executable, "-c", KILLED, model, tmp_path / "a", *paths], env=os.environ, timeout=120)
    assert done.returncode == -signal.SIGKILL
    assert sorted(f.name for f in (tmp_path / "a").iterdir()) == [
        "block-0000.safetensors",
        "block-0001.safetensors",
        "hidden-0002.safetensors",
        "inputs.json",
    ]
    resumed = calibrate(model, rows(), tmp_path / "a")
    assert resumed.read_bytes() == calibrate(model, rows(), tmp_path / "b").read_bytes()


def test_same_input_same_bytes(whole, tmp_path):
    model, data, expected = whole
    assert calibrate(model, data, tmp_path / "again").read_bytes() == expected
    assert calibrate(model, data, tmp_path / "often", save_every_s=0).read_bytes() == expected
    assert calibrate(model, rows(4), tmp_path / "other").read_bytes() != expected


def test_statistics_name_their_model(whole, pico_models, tmp_path):
    model, data, _ = whole
    about = Arrays.load(calibrate(model, data, tmp_path / "s"), "statistics").about
    assert about["model"] == Checkpoint(model).identity()


def test_the_model_is_not_touched(pico_models, tmp_path):
    model = tmp_path / "model"
    shutil.copytree(pico_models("llama"), model)
    before = {f.name: (f.read_bytes(), f.stat().st_mtime_ns) for f in model.iterdir()}
    calibrate(model, rows(), tmp_path / "s")
    assert {f.name: (f.read_bytes(), f.stat().st_mtime_ns) for f in model.iterdir()} == before


def test_refuses_before_it_starts(pico_models, tmp_path):
    with pytest.raises(Refused, match="memory-cap"):
        calibrate(pico_models("llama"), rows(), tmp_path / "s", memory_cap=1000)
    assert not (tmp_path / "s").exists()


def test_hidden_states_on_disk_are_only_the_last(pico_models, tmp_path, monkeypatch):
    after_hidden_is_saved(monkeypatch, 2)
    with pytest.raises(Killed):
        calibrate(pico_models("llama"), rows(), tmp_path, save_every_s=0)
    saved = list(tmp_path.glob("hidden-*"))
    assert [f.name for f in saved] == ["hidden-0003.safetensors"]
    assert mx.load(str(saved[0]))["hidden"].shape == (5, 16, 64)


# ---- what is measured only when asked for ----


@pytest.fixture(scope="module")
def extended(pico_models, tmp_path_factory) -> tuple[Path, bytes]:
    """(model, statistics with all extras of PADDED) that nobody interrupted."""
    model = pico_models("llama")
    return model, calibrate(model, PADDED, tmp_path_factory.mktemp("extended"), extra=EXTRA).read_bytes()


def test_extras_come_beside_the_rest(extended, tmp_path):
    model, expected = extended
    plain = Arrays.load(calibrate(model, PADDED, tmp_path / "plain"), "statistics")
    (tmp_path / "more.safetensors").write_bytes(expected)
    more = Arrays.load(tmp_path / "more.safetensors", "statistics")
    assert all(np.array_equal(more.arrays[name], values) for name, values in plain.arrays.items())
    added = {name.split(".", 1)[1] for name in set(more.arrays) - set(plain.arrays)}
    assert added == {
        "ffn.removal", "attention.contribution", "block.cotangent_sq",
        *(f"{site}.gradient_{n}" for site in ("ffn", "attention", "block") for n in ("abs", "sq")),
    }  # fmt: skip
    assert plain.about["extra"] == [] and more.about["extra"] == sorted(EXTRA)


def test_padding_does_not_matter_to_extras(extended, tmp_path):
    model, expected = extended
    (tmp_path / "a.safetensors").write_bytes(expected)
    other = Rows(np.where(PADDED.mask(), PADDED.tokens, 7), PADDED.lengths)
    a = Arrays.load(tmp_path / "a.safetensors", "statistics").arrays
    b = Arrays.load(calibrate(model, other, tmp_path / "b", extra=EXTRA), "statistics").arrays
    for name, values in a.items():
        np.testing.assert_allclose(values, b[name], rtol=1e-5, atol=1e-5 * np.abs(values).max(), err_msg=name)


@pytest.mark.parametrize("block", range(LAYERS))
def test_extras_after_an_interruption(extended, tmp_path, monkeypatch, block):
    model, expected = extended
    with monkeypatch.context() as patch:
        after_hidden_is_saved(patch, block)
        with pytest.raises(Killed):
            calibrate(model, PADDED, tmp_path, save_every_s=0, extra=EXTRA)
    assert calibrate(model, PADDED, tmp_path, save_every_s=0, extra=EXTRA).read_bytes() == expected
    assert [f.name for f in tmp_path.iterdir()] == ["stats.safetensors"]


def test_extras_interrupted_on_the_way_back(extended, tmp_path, monkeypatch):
    """The blocks that were observed are not observed again; the gradients begin anew."""
    model, expected = extended
    with monkeypatch.context() as patch:
        patch.setattr(gradients._Backward, "statistics", lambda *_: die())
        with pytest.raises(Killed):
            calibrate(model, PADDED, tmp_path, extra=EXTRA)
    entered = seen_blocks(monkeypatch)
    assert calibrate(model, PADDED, tmp_path, extra=EXTRA).read_bytes() == expected and entered == []


def test_begun_with_other_extras(extended, tmp_path, monkeypatch):
    model, _ = extended
    with monkeypatch.context() as patch:
        after_hidden_is_saved(patch, 1)
        with pytest.raises(Killed):
            calibrate(model, PADDED, tmp_path, save_every_s=0)
    with pytest.raises(Refused, match="begun with another model, other text or extras"):
        calibrate(model, PADDED, tmp_path, extra=["contributions"])


def test_memory_of_extras(pico_models, tmp_path):
    """Each costs something, and a cap below it is refused before anything is written. All rows are one micro-batch, so
    that spooling would not help."""
    checkpoint, data = Checkpoint(pico_models("llama")), rows(16, 64)
    needed = [check_memory(checkpoint, data, None, extra) for extra in ((), EXTRA[:1], EXTRA[1:])]
    assert needed[0] < needed[1] < needed[2]
    for extra, least in zip(((), EXTRA[:1], EXTRA[1:]), needed, strict=True):
        with pytest.raises(Refused, match="memory-cap"):
            calibrate(checkpoint.path, data, tmp_path / "s", memory_cap=least - 1, extra=extra)
        assert not (tmp_path / "s").exists()
    mx.reset_peak_memory()
    calibrate(checkpoint.path, data, tmp_path / "s", extra=EXTRA[:1])
    assert mx.get_peak_memory() < needed[1]


def test_unknown_extra(pico_models, tmp_path):
    with pytest.raises(UsageError, match="unknown extra statistics dreams"):
        calibrate(pico_models("llama"), rows(), tmp_path / "s", extra=["dreams"])
    assert not (tmp_path / "s").exists()


def test_spooled(pico_models, tmp_path, monkeypatch):
    """Under a cap that states do not fit: the same bytes, also when killed after any block; nothing is left behind."""
    model, data = pico_models("llama"), rows(64, 64)
    cap = memory.required_bytes(Checkpoint(model), data, spooled=True)
    assert cap < memory.required_bytes(Checkpoint(model), data)
    expected = calibrate(model, data, tmp_path / "whole").read_bytes()
    assert calibrate(model, data, tmp_path / "spooled", memory_cap=cap).read_bytes() == expected
    assert [f.name for f in (tmp_path / "spooled").iterdir()] == ["stats.safetensors"]
    leaving = Spooled.leaving
    for index in range(LAYERS):
        out = tmp_path / f"killed-{index}"

        def killed(store: Spooled, states: Spool, name: str = f"hidden-{index + 1:04d}.safetensors"):
            return die() if states.path.name == name else leaving(store, states)

        with monkeypatch.context() as patch:
            patch.setattr(Spooled, "leaving", killed)
            with pytest.raises(Killed):
                calibrate(model, data, out, memory_cap=cap)
        with monkeypatch.context() as patch:
            entered = seen_blocks(patch)
            assert calibrate(model, data, out, memory_cap=cap).read_bytes() == expected
        assert entered == list(range(index + 1, LAYERS))
