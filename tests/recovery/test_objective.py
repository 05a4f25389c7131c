"""What recovery minimises, against float64 numpy; where hidden states are compared."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace

import mlx.core as mx
import numpy as np
import pytest

from mlx_pare import lm
from mlx_pare.base.errors import Refused, UsageError
from mlx_pare.recovery import teacher
from mlx_pare.recovery.objective import Objective, Taps, distance, loss_of
from mlx_pare.text.corpus import Rows

TOKENS = np.array([[1, 5, 9, 2, 7], [3, 3, 8, 1, 4]], np.int32)


def softmax(x: np.ndarray) -> np.ndarray:
    e = np.exp(x - x.max(axis=-1, keepdims=True))
    return e / e.sum(axis=-1, keepdims=True)


@pytest.fixture
def logits() -> tuple[np.ndarray, np.ndarray]:
    """(teacher, student) for TOKENS, 11 tokens."""
    rng = np.random.RandomState(0)
    return tuple(rng.randn(2, 5, 11) * 2 for _ in range(2))


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("share", [0.0, 0.25, 1.0])
def test_the_mixture_against_numpy(logits, share, temperature, monkeypatch):
    """The model is a function that gives the logits."""
    monkeypatch.setattr("mlx_pare.lm.logits", lambda model, tokens: model(tokens))
    t, s = logits
    p, q = softmax(t / temperature), softmax(s / temperature)
    divergence = (p * (np.log(p) - np.log(q))).sum(axis=-1).mean() * temperature**2
    entropy = -np.log(np.take_along_axis(softmax(s)[:, :-1], TOKENS[:, 1:, None], axis=-1)).mean()
    loss = loss_of(Objective(temperature=temperature, cross_entropy=share), "none", None)
    found, count = loss(lambda tokens: mx.array(s.astype(np.float32)), mx.array(TOKENS), mx.array(t.astype(np.float32)))
    assert found.item() == pytest.approx((1 - share) * divergence + share * entropy, rel=1e-5)
    assert count.item() == TOKENS.size


def test_distances_against_numpy():
    rng = np.random.RandomState(1)
    a, b = rng.randn(2, 3, 6), rng.randn(2, 3, 6)
    cosine = (a * b).sum(axis=-1) / np.linalg.norm(a, axis=-1) / np.linalg.norm(b, axis=-1)
    given = [mx.array(x.astype(np.float32)) for x in (a, b)]
    assert distance("cosine", *given).item() == pytest.approx(1 - cosine.mean(), rel=1e-5)
    assert distance("mse", *given).item() == pytest.approx(((a - b) ** 2).mean() / (b**2).mean(), rel=1e-5)
    assert distance("cosine", given[0], 3 * given[0]).item() == pytest.approx(0, abs=1e-5)


@pytest.mark.parametrize("how", ["cosine", "mse"])
def test_matched_states_are_those_behind_the_layers(pico_models, how):
    """The states that taps hear are what a streamed walk of the same model sees, so their distance is 0."""
    path = pico_models("llama")
    model, rows = lm.dequantized(lm.load(path)), Rows.full(TOKENS)
    watched = teacher.Watched((0, 1))
    streamed = teacher.stream.walk(path, rows, watched)
    taps = Taps(model, (0, 1))
    loss = loss_of(Objective(match=how, match_weight=2.0), how, taps)
    states = [watched.states[n] for n in (0, 1)]
    same, _ = loss(model, mx.array(TOKENS), streamed.all_logits(slice(0, 2)), *states)
    assert same.item() == pytest.approx(0, abs=1e-5)
    other, _ = loss(model, mx.array(TOKENS), streamed.all_logits(slice(0, 2)), *states[::-1])
    swapped = [distance(how, a, b).item() for a, b in (states, states[::-1])]
    assert other.item() == pytest.approx(2.0 * sum(swapped) / 2, rel=1e-3) and other.item() > 1e-2


def test_what_there_is_not():
    for wrong, message in (
        (dict(kind="hope"), "unknown loss"),
        (dict(match="all"), "unknown matching"),
        (dict(temperature=0.0), "--temperature 0.0 is not allowed"),
        (dict(cross_entropy=2.0), "--cross-entropy 2.0 is not allowed"),
    ):
        with pytest.raises(UsageError, match=message):
            replace(Objective(), **wrong).check()


def test_matching_is_chosen_by_what_was_cut():
    assert Objective().matching(True) == "cosine" and Objective().matching(False) == "none"
    assert Objective(match="mse").matching(False) == "mse" and Objective(match="none").matching(True) == "none"


@pytest.mark.parametrize(
    ("sources", "own", "theirs"),
    [
        ([0, 1, 4, 5], (1, 3), (3, 5)),  # two layers are missing behind the second
        ([0, 1, 2, 3], (3,), (5,)),  # the last two
        ([2, 3, 4, 5], (3,), (5,)),  # the first two: there is nothing before them to match
        ([0, 1, 2, 3, 4, 5], (5,), (5,)),  # none
    ],
)
def test_places(sources, own, theirs):
    """Behind a kept layer that is followed by cut ones the student should be where the next kept one begins."""
    original = _Layers(6, 8)
    survivors = {"layers": [{"source": n} for n in sources], "hidden": list(range(8))}
    assert teacher.places(survivors, original) == teacher.Places(own, theirs, None)
    survivors["hidden"] = [0, 2, 3]
    assert teacher.places(survivors, original).kept == (0, 2, 3)


class _Layers:
    """A checkpoint, as far as places look at it."""

    def __init__(self, layers: int, hidden: int):
        self.arch = self
        self.layers, self.sizes = [None] * layers, {"hidden": hidden}


def test_another_tokenizer_is_refused(pico_models, tmp_path):

    ours, theirs = pico_models("llama"), tmp_path / "other"
    lm.require_same_tokens(ours, ours)
    shutil.copytree(ours, theirs)
    content = json.loads((theirs / "tokenizer.json").read_text())
    vocab = content["model"]["vocab"]
    a, b = list(vocab)[-2:]
    vocab[a], vocab[b] = vocab[b], vocab[a]
    (theirs / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(Refused, match="another tokenizer"):
        lm.require_same_tokens(ours, theirs)
    content["model"]["vocab"] = {**vocab, a: vocab[b], b: vocab[a]}
    (theirs / "tokenizer.json").write_text(json.dumps(content, indent=1))  # the same, written in another way
    lm.require_same_tokens(ours, theirs)
