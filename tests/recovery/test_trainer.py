"""Training in segments: killed anywhere it ends in the same bytes; clipping, schedules, patience, checkpointing."""

from __future__ import annotations

import math
from dataclasses import replace

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten

from mlx_pare import lm
from mlx_pare.base import machine
from mlx_pare.base.errors import Refused, UsageError
from mlx_pare.recovery import trainer as training
from mlx_pare.recovery.trainer import ClippedAdamW, Course, Diverged, Trainer
from mlx_pare.text.domains import Sampler

COURSE = Course(steps=10, rate=1e-2, validations=5)
ROWS = 12


class Tiny(nn.Module):
    """Two layers: enough for every kind of state."""

    def __init__(self):
        super().__init__()
        mx.random.seed(3)
        self.layers = [nn.Linear(4, 8), nn.Linear(8, 1)]

    def __call__(self, x: mx.array) -> mx.array:
        return self.layers[1](mx.tanh(self.layers[0](x)))[..., 0]


def squares(model: nn.Module, x: mx.array, y: mx.array) -> tuple[mx.array, mx.array]:
    return mx.square(model(x) - y).mean(), mx.array(y.size)


@pytest.fixture
def data() -> tuple[mx.array, mx.array]:
    rng = np.random.RandomState(0)
    x = rng.randn(ROWS, 4).astype(np.float32)
    return mx.array(x), mx.array(np.sin(x).sum(axis=1))


@pytest.fixture
def trainer(data, tmp_path):
    """``trainer(course, ...) -> Trainer`` on the same data, in the same directory unless another is named."""
    x, y = data

    def make(course: Course = COURSE, directory: str = "state", validate=None, loss=squares, **more) -> Trainer:
        model = Tiny()
        sampler = Sampler(np.arange(ROWS) % 2, {"a": 1.0, "b": 2.0}, 4, 7)
        return Trainer(
            model,
            loss,
            sampler,
            lambda rows: (x[mx.array(rows)], y[mx.array(rows)]),
            validate or (lambda: {"": squares(model, x, y)[0].item()}),
            course,
            tmp_path / directory,
            **more,
        )

    return make


def weights(trainer: Trainer) -> dict[str, bytes]:
    return {name: bytes(memoryview(np.array(a))) for name, a in tree_flatten(trainer.model.parameters())}


class Killed(BaseException):
    """What cannot be caught by mistake."""


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("at", range(1, 10))
def test_killed_at_any_step_it_ends_in_the_same_bytes(trainer, at, accumulate):
    """Weights, curve, best state and the mix of the domains, which moves between the segments."""
    course = replace(COURSE, accumulate=accumulate)
    whole = trainer(course, "whole", after=lambda losses: None)
    whole.run()
    calls = []

    def dying(model, x, y):
        calls.append(1)
        if len(calls) == at * accumulate:
            raise Killed
        return squares(model, x, y)

    with pytest.raises(Killed):
        trainer(course, loss=dying).run()
    mx.random.seed(99)
    again = trainer(course)
    again.run()
    assert weights(again) == weights(whole)
    assert again.curve == whole.curve and again.best_step == whole.best_step
    assert again.sampler.state() == whole.sampler.state()


def test_a_finished_training_is_not_repeated(trainer):
    first = trainer()
    first.run()
    again = trainer(loss=lambda *_: pytest.fail("trained again"))
    again.run()
    assert weights(again) == weights(first) and again.curve == first.curve


def test_nothing_but_the_last_and_the_best_state_is_kept(trainer):
    made = trainer()
    made.run()
    assert len(list(made.directory.glob("state-*"))) == 1 and len(list(made.directory.glob("best-*"))) == 1


def test_the_state_of_another_training_is_refused(trainer):
    trainer(about={"rate": 1}).run()
    with pytest.raises(Refused, match="another training"):
        trainer(about={"rate": 2}).run()


def test_the_model_ends_in_its_best_state(trainer):
    """The validation prefers step 4."""
    losses, seen = iter([5.0, 4.0, 1.0, 2.0, 3.0, 4.0]), {}

    def validate() -> dict[str, float]:
        seen[made.step] = weights(made)
        return {"": next(losses)}

    made = trainer(validate=validate)
    made.run()
    assert made.best_step == 4 and weights(made) == seen[4] != seen[10]
    assert [(p["step"], p["loss"]) for p in made.curve] == [(0, 5.0), (2, 4.0), (4, 1.0), (6, 2.0), (8, 3.0), (10, 4.0)]


@pytest.mark.parametrize(("patience", "stops"), [(0, 10), (1, 6), (2, 8)])
def test_patience(trainer, patience, stops):
    losses = iter([5.0, 4.0, 1.0, 2.0, 3.0, 4.0])
    made = trainer(replace(COURSE, patience=patience), validate=lambda: {"": next(losses)})
    made.run()
    assert made.step == stops and made.best_step == 4


def test_not_a_number(trainer):
    losses = iter([1.0, math.nan])
    with pytest.raises(Diverged, match="diverged at step 2"):
        trainer(validate=lambda: {"": next(losses)}).run()


def test_domains_are_mixed_anew_after_every_validation(trainer):
    heard = []
    made = trainer(validate=lambda: {"": 1.0, "a": 2.0, "b": 3.0}, after=heard.append)
    made.run()
    assert heard == [{"a": 2.0, "b": 3.0}] * 5


# ---- the parts ----


@pytest.mark.parametrize("clip", [0.0, 1.0, 1e9])
def test_clipping_against_numpy(clip):
    """AdamW's first two steps, bias corrected, with a gradient of norm 5, float64 numpy."""
    model, rate = nn.Linear(2, 1, bias=False), 0.1
    model.weight = mx.array([[1.0, 2.0]])
    optimizer = ClippedAdamW(rate, clip)
    w, m, v = np.array([[1.0, 2.0]]), 0.0, 0.0
    for step, gradient in enumerate((np.array([[3.0, 4.0]]), np.array([[0.3, -0.4]])), 1):
        optimizer.update(model, {"weight": mx.array(gradient.astype(np.float32))})
        norm = np.linalg.norm(gradient)
        g = gradient * min(1.0, clip / norm) if clip else gradient
        m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g**2
        w = w - rate * m / (1 - 0.9**step) / (np.sqrt(v / (1 - 0.999**step)) + 1e-8)
        assert np.allclose(np.array(model.weight), w, rtol=1e-4)


@pytest.mark.parametrize(("schedule", "half", "end"), [("cosine", 0.525, 0.05), ("linear", 0.525, 0.05),
                                                       ("constant", 1.0, 1.0)])  # fmt: skip
def test_schedules(schedule, half, end):
    """Up to the full rate over a twentieth of the steps, then down to a twentieth of it."""
    rate = Course(steps=100, rate=0.2, schedule=schedule).learning_rate()
    assert rate(mx.array(0)).item() == pytest.approx(0.2 / 5) and rate(mx.array(5)).item() == pytest.approx(0.2)
    at = {5 + 95 // 2: half, 100: end}
    for step, share in at.items():
        assert rate(mx.array(step)).item() == pytest.approx(0.2 * share, rel=0.02)


def test_unknown_schedule():
    with pytest.raises(UsageError, match="unknown schedule 'hope'"):
        Course(steps=1, rate=1.0, schedule="hope").learning_rate()


def test_a_near_start_is_trained_gently():
    """A quarter of the distance, half the rate, all along the schedule."""
    course = Course(steps=100, rate=0.2, gentle_below=0.4)
    assert [course.full_rate(begun) for begun in (9.0, 0.4, 0.1)] == pytest.approx([0.2, 0.2, 0.1])
    usual, gentle = (course.learning_rate(begun) for begun in (0.4, 0.1))
    for step in (0, 3, 50, 99):
        assert gentle(mx.array(step)).item() == pytest.approx(usual(mx.array(step)).item() / 2, rel=1e-5)
    assert Course(steps=100, rate=0.2).full_rate(1e-9) == 0.2


def test_checkpointing_changes_neither_logits_nor_gradients_nor_other_models(pico_models):
    """mlx-lm's own checkpointing changes the class, for all models of the process."""
    tokens = mx.array([[1, 2, 3, 4, 5, 6]])

    def gradients(model):
        return nn.value_and_grad(model, lambda m: mx.square(m(tokens)).mean())(model)

    plain, other = (lm.load(pico_models("llama")) for _ in range(2))
    (value, grads), logits = gradients(plain), plain(tokens)
    kind = type(lm.blocks(other)[0])
    lm.each_block(plain, lm.checkpointed)
    again, regrads = gradients(plain)
    assert again.item() == value.item() and mx.array_equal(plain(tokens), logits)
    for (name, a), (_, b) in zip(tree_flatten(grads), tree_flatten(regrads), strict=True):
        assert np.allclose(np.array(a), np.array(b), rtol=1e-5, atol=1e-9), name
    assert type(lm.blocks(other)[0]) is kind and kind.__call__ is not type(lm.blocks(plain)[0]).__call__


@pytest.mark.parametrize("nth", [4, 5, 6, 7])
def test_a_state_survives_a_save_that_was_cut_short(trainer, monkeypatch, nth):
    """Killed while a state, or the best weights, are written, the ones before are taken."""
    whole = trainer(directory="whole")
    whole.run()
    saves, save = [], training.Arrays.save

    def dying(self, path):
        saves.append(path)
        if len(saves) == nth:
            path.with_name(f".{path.stem}.tmp.safetensors").write_bytes(b"half")
            raise Killed
        save(self, path)

    monkeypatch.setattr(training.Arrays, "save", dying)
    with pytest.raises(Killed):
        trainer().run()
    monkeypatch.undo()
    again = trainer()
    again.run()
    assert weights(again) == weights(whole)


def test_accumulated_batches_are_one_large_batch(trainer):
    """Twice 4 rows or once 8, the same rows: the same step."""
    results = []
    for batch, accumulate in ((4, 2), (8, 1)):
        made = trainer(Course(steps=3, rate=1e-2, accumulate=accumulate, validations=1), f"batch{batch}")
        made.sampler = Sampler(np.zeros(ROWS, int), {"all": 1.0}, batch, 7)
        order = iter(np.arange(24) % ROWS)
        made.sampler.draw = lambda b=batch, o=order: np.array([next(o) for _ in range(b)])
        made.run()
        results.append(np.concatenate([np.array(a).ravel() for _, a in tree_flatten(made.model.parameters())]))
    assert np.allclose(*results, rtol=1e-4, atol=1e-6)


# ---- on what it was computed ----

MAC = {"mlx": "0.0.1", "device": "gpu", "chip": "Apple M1", "macos": "15.1"}


def stopped(trainer, **more) -> None:
    def dying(model, x, y):
        raise Killed

    with pytest.raises(Killed):
        trainer(loss=dying, **more).run()


def test_a_training_that_goes_on_elsewhere_says_so(trainer, monkeypatch, capsys):
    here = machine.computes_on()
    with monkeypatch.context() as patch:
        patch.setattr(machine, "computes_on", lambda: MAC)
        stopped(trainer)
    again = trainer()
    again.run()
    assert again.step == COURSE.steps and again.computed_on == [MAC, here]
    told = capsys.readouterr().err
    assert told.count("warning: ") == 1 and f"mlx was 0.0.1, now it is {here['mlx']}" in told
    finished = trainer()
    finished.run()
    assert finished.computed_on == [MAC, here]


def test_a_state_of_an_earlier_version_did_not_note_it(trainer, monkeypatch, capsys):
    with monkeypatch.context() as patch:
        patch.setattr(training.Arrays, "save", without_the_note(training.Arrays.save))
        stopped(trainer)
    again = trainer()
    again.run()
    assert again.step == COURSE.steps and again.computed_on == []
    assert "warning" not in capsys.readouterr().err


def without_the_note(save):
    def saved(self, file):
        self.about.pop("computed_on")
        save(self, file)

    return saved


def test_only_the_first_process_compares(trainer, monkeypatch, capsys):
    """The others of mlx.launch may be on other machines, and have the state of the first."""
    with monkeypatch.context() as patch:
        patch.setattr(machine, "computes_on", lambda: MAC)
        stopped(trainer)
    again = trainer()
    monkeypatch.setattr(training.distributed, "from_first", lambda *given: state)
    state = again._read()
    again.rank = 1
    assert again._resume() and again.computed_on == [MAC]
    assert not capsys.readouterr().err
