"""Every reader, on whatever bytes: a value, or a PareError of one line. What once broke is tried again.

The long run is scripts/fuzz.py, whose targets these are.
"""

from __future__ import annotations

import functools
import json
import signal
import struct
import sys
import time
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings, strategies as st

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "scripts"))
import fuzz
import fuzz_changes
import fuzz_inputs
import fuzz_targets

CORPUS = sorted((Path(__file__).resolve().parent / "fuzz_corpus").glob("*.bin"))
LIGHT = sorted(set(fuzz_targets.TARGETS) - {"stock-tokenizer"})
quick = settings(
    derandomize=True, database=None, deadline=None, max_examples=50, suppress_health_check=list(HealthCheck)
)


@pytest.fixture(scope="module")
def place():
    fuzz.watch()
    found = fuzz_targets.Place()
    yield found
    found.close()
    signal.setitimer(signal.ITIMER_REAL, 0)


@pytest.fixture(autouse=True)
def _stay(monkeypatch):
    monkeypatch.chdir(CORPUS[0].parent)  # some readers are tried in another directory


@functools.cache
def ready(name: str, place):
    """A target whose sound inputs were read once."""
    return fuzz.ready(name, place)


def broken(name: str, place, raw: bytes) -> str:
    """What is wrong with how a reader takes this; "" when nothing is. Time is the long run's affair."""
    where, what = fuzz.judged(ready(name, place), place, raw)[2:]
    return "" if where == "slow" else what


@pytest.mark.parametrize("file", CORPUS, ids=lambda f: f.stem)
def test_what_once_broke_does_not_any_more(file, place):
    assert not broken(file.stem.rpartition("-")[0], place, file.read_bytes())


def test_there_is_something_to_try_again():
    assert len(CORPUS) > 10 and all(file.stat().st_size < 1 << 16 for file in CORPUS)
    assert {file.stem.rpartition("-")[0] for file in CORPUS} <= set(fuzz_targets.TARGETS)


@pytest.mark.parametrize("name", LIGHT)
def test_sound_inputs_are_read(name, place):
    """Otherwise the fuzzer would only ever see refusals."""
    target = ready(name, place)
    kinds = target.kinds or (None,)
    seeds = [(b"" if kind is None else bytes([kind])) + target.write(seed) for kind in kinds for seed in target.seeds]
    results = [fuzz.judged(target, place, raw) for raw in seeds]
    assert any(accepted for accepted, *_ in results) and not any(what for *_, what in results)


@pytest.mark.parametrize("name", LIGHT)
def test_changed_inputs(name, place):
    mutator = fuzz_changes.Mutator(ready(name, place), 7)
    for _ in range(50):
        raw = mutator.make()
        assert not broken(name, place, raw), raw


@pytest.mark.parametrize("name", LIGHT)
@quick
@given(raw=st.binary(max_size=400))
def test_any_bytes(name, place, raw):
    assert not broken(name, place, raw)


scalars = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20)
values = st.recursive(scalars, lambda v: st.lists(v, max_size=5) | st.dictionaries(st.text(max_size=8), v, max_size=5))


@pytest.mark.parametrize("name", ["config", "plan", "manifest", "metrics", "survivors", "tokenizer", "hub"])
@quick
@given(data=st.data())
def test_any_json_in_place_of_a_part(name, place, data):
    """A sound document of which some values are whatever JSON can hold."""
    target = ready(name, place)
    found = json.loads(json.dumps(data.draw(st.sampled_from(target.seeds))))
    for _ in range(data.draw(st.integers(1, 3))):
        node = found
        while isinstance(node, dict | list) and node:
            parent, keys = node, list(node) if isinstance(node, dict) else range(len(node))
            key = data.draw(st.sampled_from(keys))
            node = parent[key]
            if data.draw(st.booleans()):
                break
        parent[key] = data.draw(values)
    kind = bytes([data.draw(st.sampled_from(target.kinds))]) if target.kinds else b""
    raw = kind + target.write(found)
    assert not broken(name, place, raw), raw


@quick
@given(
    head=st.binary(max_size=100) | values.map(fuzz_inputs.written),
    length=st.integers(0, 2**64 - 1) | st.none(),
    size=st.integers(0, 50),
)
def test_any_header(place, head, length, size):
    assert not broken("header", place, fuzz_inputs.packed_table(head, size, length))


@quick
@given(
    counts=st.tuples(st.integers(0, 2**64 - 1), st.integers(0, 4)),
    rest=st.lists(st.binary(max_size=30) | st.integers(0, 2**64 - 1).map(lambda n: struct.pack("<Q", n)), max_size=12),
)
def test_any_gguf(place, counts, rest):
    assert not broken("gguf", place, b"GGUF" + struct.pack("<IQQ", 3, *counts) + b"".join(rest))


# ---- the fuzzer itself can find something ----


@pytest.mark.parametrize(
    "reader",
    [
        lambda place, raw: {}["x"],
        lambda place, raw: (_ for _ in ()).throw(fuzz.Hang("no answer")),
        lambda place, raw: (_ for _ in ()).throw(MemoryError()),
    ],
)
def test_a_reader_that_breaks_is_found(reader, place):
    accepted, _, where, what = fuzz.judged(fuzz_targets.Target(reader, [LIGHT]), place, b"x")
    assert not accepted and where and what


def test_a_reader_that_does_not_come_back_is_found(place, monkeypatch):
    monkeypatch.setattr(fuzz, "HANG", 0.2)
    fuzz.watch()
    try:
        where = fuzz.judged(fuzz_targets.Target(lambda place, raw: time.sleep(60), []), place, b"x")[2]
    finally:
        monkeypatch.undo()
        fuzz.watch()
    assert where.startswith("Hang")


def test_the_same_seed_gives_the_same_inputs(place):
    target = ready("header", place)
    first, again, other = ([fuzz_changes.Mutator(target, seed).make() for _ in range(20)] for seed in (1, 1, 2))
    assert first == again != other
