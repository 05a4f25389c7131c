"""Rows that the student writes: sampled as it would, judged as numpy would, the same again after a stop."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
import reference

from mlx_pare import lm
from mlx_pare.base.errors import PareError, Refused, UsageError
from mlx_pare.model.checkpoint import Checkpoint
from mlx_pare.planning.goal import Options as PlanOptions
from mlx_pare.planning.plan import plan
from mlx_pare.pruning.prune import prune
from mlx_pare.recovery import on_policy
from mlx_pare.recovery.on_policy import Lesson, Writer, judge_of, prompt_length
from mlx_pare.recovery.options import Options, required_bytes, savings
from mlx_pare.recovery.recover import recover
from mlx_pare.recovery.student import resident, trained_values
from mlx_pare.recovery.teacher import Places
from mlx_pare.scoring.calibrate import calibrate
from mlx_pare.scoring.score import score
from mlx_pare.stream import memory, walk as stream
from mlx_pare.text import corpus
from mlx_pare.text.corpus import Rows

DEMO = Path(corpus.__file__).parents[1] / "demo"
LENGTH, DRAWN = 24, np.array([[0, 3, 5, 1], [2, 4, 7, 0], [6, 1, 3, 2]])  # rows 0 to 3 twice
OPTIONS = Options(steps=6, batch=4, reports=2, on_policy=0.5, learning_rate=1e-3)


@pytest.fixture(scope="module")
def texts(pico_models) -> tuple[Rows, Rows]:
    """Rows to train on, and others to choose the best state by."""
    tok = lm.tokenizer(pico_models("llama"))
    train, other = (corpus.windows(tok, corpus.read(DEMO / f"{n}.txt"), LENGTH, 16, 0) for n in ("calibration", "test"))
    return train, other.take(np.arange(5))


@pytest.fixture(scope="module")
def cut(pico_models, tmp_path_factory, texts) -> tuple[Path, Path]:
    """(pruned, original): 0.6 of a pico llama, by magnitude; with a head of its own, as others echo their input."""
    model, work = pico_models("llama-untied"), tmp_path_factory.mktemp("cut")
    scores = score(model, calibrate(model, texts[0], work / "stats"), work / "scores.safetensors", "magnitude")
    prune(model, plan(model, scores, PlanOptions(keep=0.6)), work / "model")
    return work / "model", model


def files(directory: Path) -> dict[str, bytes]:
    return {f.name: f.read_bytes() for f in directory.iterdir()}


# ---- sampling ----


@pytest.mark.parametrize("given", [1, 6])
@pytest.mark.parametrize("family", ["llama", "gemma3_text", "qwen2"])
def test_sampled_with_the_cache_as_without(pico_models, family, given):
    """The same keys, every token from the whole row anew; gemma3's window of 8 is passed."""
    model = resident(pico_models(family), "lora")
    start, key = mx.array(np.random.default_rng(0).integers(1, 400, (3, given)), mx.int32), mx.random.key(5)
    found, row = lm.continued(model, start, LENGTH, key), start
    for draw in mx.random.split(key, LENGTH - given):
        logits = model(row)[:, -1].astype(mx.float32)
        row = mx.concatenate([row, mx.random.categorical(logits, key=draw)[:, None].astype(mx.int32)], axis=1)
    assert found.dtype == mx.int32 and np.array_equal(np.array(found), np.array(row))
    assert len(set(map(tuple, np.array(found)[:, given:].tolist()))) == 3


def test_sampled_by_the_students_probabilities(pico_models):
    """2000 draws of one token against float64 numpy: at temperature 1, over the whole vocabulary."""
    path = pico_models("llama")
    start, count = np.array([[5, 9, 2, 7]]), 2000
    found = lm.continued(resident(path, "lora"), mx.array(np.repeat(start, count, 0)), 5, mx.random.key(0))
    logits = reference.forward(*reference.load(path), start)[0][0, -1]
    wanted = np.exp(logits - logits.max())
    wanted /= wanted.sum()
    seen = np.bincount(np.array(found)[:, -1], minlength=len(wanted)) / count
    noise = np.sqrt(wanted * (1 - wanted) / count)
    assert np.abs(seen - wanted).sum() < 1.5 * np.sqrt(2 / np.pi) * noise.sum()
    hotter = wanted**0.5 / (wanted**0.5).sum()  # the bound would tell another temperature
    assert np.abs(seen - hotter).sum() > 1.5 * np.sqrt(2 / np.pi) * noise.sum()


# ---- the rows of a round ----


@pytest.fixture
def writer(cut, texts):
    """``writer(share, places, seed) -> Writer``, with the teacher's word on the text where some of it is trained on."""
    student, original = cut

    def make(share: float = 0.5, places: Places | None = None, seed: int = 0) -> Writer:
        judge = judge_of(original, places)
        text = judge(texts[0]) if share < 1 else None
        return Writer(resident(student, "lora"), texts[0], text, judge, share, 2, seed)

    return make


@pytest.mark.parametrize(("share", "written"), [(0.25, 3), (0.5, 6), (0.55, 7), (1.0, 12)])
def test_a_share_is_written_from_the_beginnings_of_the_rows(writer, texts, share, written):
    made, tokens = writer(share), texts[0].tokens
    numbers = made.write(DRAWN, 3)
    own = numbers >= texts[0].count
    assert own.sum() == written and sorted(numbers[own]) == list(range(16, 16 + written))
    assert (numbers[~own] == DRAWN[~own]).all()
    for number, given in zip(numbers[own], DRAWN[own], strict=True):
        row = made.batch(np.array([number]))[0][0]
        assert np.array_equal(np.array(row)[: prompt_length(LENGTH)], tokens[given][:6])
        assert not np.array_equal(np.array(row), tokens[given])


def test_a_row_drawn_twice_is_written_twice(writer):
    """From the same beginning, by lot: two texts."""
    made = writer(1.0)
    numbers = made.write(DRAWN, 0)
    pairs = [np.array(made.batch(numbers[row == DRAWN])[0]) for row in range(4)]
    assert all(np.array_equal(a[:6], b[:6]) for a, b in pairs)
    assert not any(np.array_equal(a, b) for a, b in pairs)


def test_the_teacher_judges_what_was_written(writer, cut, texts):
    """Logits and hidden states of given and written rows in one batch, against float64 numpy."""
    places = Places((1,), (2,), None)
    made = writer(0.5, places)
    numbers = made.write(DRAWN, 0)
    batch = numbers[(numbers >= 16).any(axis=1) & (numbers < 16).any(axis=1)][0]
    tokens, logits, states = made.batch(batch)
    assert tokens.shape == (4, LENGTH)
    wanted = reference.forward(*reference.load(cut[1]), np.array(tokens))[0]
    assert np.allclose(np.array(logits), wanted, rtol=1e-3, atol=1e-3)
    walked = Lesson(np.array(tokens), *_watched(cut[1], np.array(tokens), places))
    assert np.allclose(np.array(states), np.array(walked.states[0]), rtol=1e-4, atol=1e-4)
    assert not np.allclose(np.array(states), np.array(made.text.states[0][mx.array(batch % 16)]), atol=1e-2)


def _watched(path: Path, tokens: np.ndarray, places: Places):
    found = judge_of(path, places)(Rows.full(tokens))
    return found.streamed, found.states


def test_written_anew_every_round_and_the_same_again(writer):
    """What is written follows from the student, the seed and the step, not from what was drawn before."""

    def rows(made: Writer, step: int) -> np.ndarray:
        mx.random.seed(np.random.randint(1000))
        return np.array(made.batch(made.write(DRAWN, step).reshape(-1))[0])

    made = writer()
    first, second, again = rows(made, 0), rows(made, 3), rows(made, 0)
    assert np.array_equal(first, again) and not np.array_equal(first, second)
    assert not np.array_equal(rows(writer(seed=1), 0), first)


# ---- the training ----


@pytest.mark.parametrize("at", [1, 4, 5])
@pytest.mark.parametrize("share", [0.5, 1.0])
def test_killed_it_ends_in_the_same_bytes(cut, texts, tmp_path, monkeypatch, at, share):
    """Killed in a segment, its rows are written once more, by the student of its beginning."""
    options = replace(OPTIONS, on_policy=share, method="full", learning_rate=1e-4, kind="forward")
    whole = recover(*cut, *texts, tmp_path / "whole", options)
    batches, batch = [], Writer.batch

    def dying(self, numbers):
        batches.append(1)
        if len(batches) == at:
            raise KeyboardInterrupt
        return batch(self, numbers)

    monkeypatch.setattr(Writer, "batch", dying)
    with pytest.raises(KeyboardInterrupt):
        recover(*cut, *texts, tmp_path / "out", options)
    monkeypatch.undo()
    mx.random.seed(99)
    assert recover(*cut, *texts, tmp_path / "out", options) == whole
    assert whole["best_step"] and files(tmp_path / "out") == files(tmp_path / "whole")


def test_it_heals_and_the_teacher_reads_nothing_but_what_is_trained_on(cut, texts, tmp_path, monkeypatch):
    """All rows written: reverse KL unless another loss was asked for, and the text itself is not streamed."""
    streamed, walk = [], stream.walk
    monkeypatch.setattr(
        stream, "walk", lambda path, rows, *a, **k: (streamed.append(rows), walk(path, rows, *a, **k))[1]
    )
    found = recover(*cut, *texts, tmp_path / "out", replace(OPTIONS, steps=9, reports=3, on_policy=1.0))
    assert found["improved"] and found["options"]["kind"] == "reverse" and found["options"]["on_policy"] == 1.0
    assert [rows.count for rows in streamed] == [5, 12, 12, 12, 5, 5]
    losses = [point["train_loss"] for point in found["curve"][1:]]
    assert np.isfinite(losses).all() and losses[-1] < losses[0]


@pytest.mark.parametrize("change", [dict(kind="js"), dict(match="cosine"), dict(grad_checkpoint=True), dict(mix=True)])
def test_beside_other_options(cut, texts, tmp_path, change):
    plain = recover(*cut, *texts, tmp_path / "plain", OPTIONS)
    found = recover(*cut, *texts, tmp_path / "out", replace(OPTIONS, **change))
    assert found["options"]["kind"] == change.get("kind", "reverse")
    same = np.allclose([p["loss"] for p in plain["curve"]], [p["loss"] for p in found["curve"]], rtol=1e-4)
    assert same == bool({"grad_checkpoint", "mix"} & set(change))  # one domain: nothing to mix


def test_rounds_are_short(cut):
    """Samples grow no older than a round, however long the training."""
    assert Options(steps=1000, on_policy=0.1).course.segment == on_policy.ROUND
    assert Options(steps=1000).course.segment == 167 and Options(steps=12, on_policy=1.0).course.segment == 2


# ---- what is refused ----


@pytest.mark.parametrize(("change", "problem", "cure"), [
    (dict(on_policy=1.5), "--on-policy 1.5 is not", "0 to 1"),
    (dict(on_policy=-0.1), "--on-policy -0.1 is not", "0 to 1"),
    (dict(top=8), "of given text", "--targets full"),
    (dict(cross_entropy=0.1), "cross-entropy", "--cross-entropy 0"),
])  # fmt: skip
def test_refused(cut, texts, tmp_path, change, problem, cure):
    with pytest.raises(UsageError, match=problem) as found:
        recover(*cut, *texts, tmp_path / "out", replace(OPTIONS, **change))
    assert cure in found.value.cure and not list(tmp_path.iterdir())
    with pytest.raises(PareError):
        on_policy.check(2.0, None, 0.0)


def test_estimate_counts_the_teachers_walk_beside_the_student(cut, texts, pico_models):
    """A teacher of wide blocks: its walk needs more than a batch of the student; the text is held unless all is
    written."""
    student, original = (Checkpoint(path) for path in cut)
    wide = Checkpoint(pico_models("llama", intermediate_size=4096, num_hidden_layers=2))

    def needed(teacher: Checkpoint, **change) -> int:
        return required_bytes(student, teacher, *texts, replace(OPTIONS, **change))

    rows = Rows.full(np.zeros((6, LENGTH), int))  # half of 3 steps of 4
    batch_alone = needed(wide, on_policy=0.0)
    held = rows.count * LENGTH * 64 * 4
    resident_part = trained_values(student, "lora", 16) * 16 + sum(t.size for t in student.arch.tensors()) * 4
    assert needed(wide) >= memory.required_bytes(wide, rows) + resident_part + held
    assert needed(wide) > batch_alone
    head = memory.head_bytes(
        original
    )  # of the walk over the text: it holds its embedding, as that over what was written
    assert needed(original, on_policy=0.5) - needed(original, on_policy=1.0) == (16 - 6) * LENGTH * 64 * 4 + head - (
        on_policy.work_bytes(student, original, Rows.full(np.zeros((12, LENGTH), int)), 16)
        - on_policy.work_bytes(student, original, rows, 16)
    )


def test_too_much_memory_is_refused_with_a_cure_that_fits(cut, texts, tmp_path):
    flags = [name for name, _ in savings(OPTIONS)]
    assert flags[-2].endswith("--on-policy 0") and flags[-1].endswith("--on-policy 0 --targets 64")
    with pytest.raises(Refused):
        recover(*cut, *texts, tmp_path / "out", OPTIONS, memory_cap=1000)
