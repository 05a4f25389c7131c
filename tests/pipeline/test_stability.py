"""How far a choice depends on its text: parts of a calibration are calibrations of their own, draws share no row,
planted differences are found where they are, and text that is measured on is never calibrated on."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import mlx.core as mx
import numpy as np
import pico
import pytest
import reference_criteria

from mlx_pare import lm
from mlx_pare.base.errors import PareError, Refused, UsageError
from mlx_pare.base.units import readable
from mlx_pare.evaluation.evaluate import evaluate
from mlx_pare.model.checkpoint import Checkpoint
from mlx_pare.options.settings import Settings
from mlx_pare.pipeline import choose_sizes, stability, steps
from mlx_pare.pipeline.stability import Question, agreement, drawn, jaccard, kept, orders, rank_correlation
from mlx_pare.planning import trial_cache
from mlx_pare.planning.goal import Options
from mlx_pare.planning.plan import plan
from mlx_pare.pruning.plan_file import Plan
from mlx_pare.pruning.prune import prune
from mlx_pare.repair.reconstruct import reconstruct
from mlx_pare.reporting import stability_text
from mlx_pare.reporting.report import report
from mlx_pare.scoring.calibrate import calibrate, calibrate_in_parts
from mlx_pare.scoring.score import score
from mlx_pare.store.arrays import Arrays
from mlx_pare.stream import batches, walk as stream
from mlx_pare.text import corpus
from mlx_pare.text.corpus import Rows
from mlx_pare.text.splits import DEMO

ROWS = Rows(
    np.random.default_rng(0).integers(0, 500, (12, 16)).astype(np.int32),
    np.random.default_rng(1).integers(1, 17, 12).astype(np.int32),
)


@pytest.fixture(autouse=True)
def small_micro_batches(monkeypatch):
    """Two rows of 16 tokens at a time: parts end in the middle."""
    monkeypatch.setattr(batches, "MICRO_BATCH_TOKENS", 32)


def planned(model: Path, directory: Path, rows: Rows = ROWS, axes=("ffn", "kv_head"), keep: float = 0.6) -> Plan:
    stats = calibrate(model, rows, directory / "of-plan")
    scores = score(model, stats, directory / "of-plan.safetensors", "wanda")
    return plan(model, scores, Options(keep=keep, axes=axes))


def scores_of(model: Path, rows: Rows, directory: Path, name: str = "wanda") -> dict[str, np.ndarray]:
    stats = calibrate(model, rows, directory)
    return Arrays.load(score(model, stats, directory / "scores.safetensors", name), "scores").arrays


# ---- parts of one walk ----


@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
def test_parts_are_calibrations_of_their_own(pico_models, tmp_path, monkeypatch, family):
    """Every array of each part, from one walk."""
    model, walks, walk = pico_models(family, (4, 32)), [], stream.walk
    monkeypatch.setattr(stream, "walk", lambda *a, **k: (walks.append(a[1].count), walk(*a, **k))[1])
    parts = calibrate_in_parts(model, ROWS, [1, 3, 6], tmp_path / "parts")
    assert list(parts) == [2, 4, 6, 12] and walks == [12]
    for count, path in parts.items():
        alone = Arrays.load(calibrate(model, ROWS.first(count), tmp_path / str(count)), "statistics")
        found = Arrays.load(path, "statistics")
        assert found.about == alone.about and set(found.arrays) == set(alone.arrays)
        for name, values in alone.arrays.items():
            np.testing.assert_array_equal(found.arrays[name], values, err_msg=name)
        assert [f.name for f in path.parent.iterdir()] == ["stats.safetensors"]


# ---- draws ----


@pytest.mark.parametrize(("rows", "samples", "each"), [(60, 10, 10), (40, 30, 12), (7, 30, 2), (60, 20, 20)])
def test_draws_share_no_row(rows, samples, each):
    every = Rows.full(np.arange(rows * 16).reshape(rows, 16))
    lots = {seed: np.random.RandomState(seed).permutation(rows) for seed in (3, 4)}
    calibration, draws = drawn(every, samples, lots[3])
    assert calibration.count == min(samples, rows) and [d.count for d in draws] == [each] * 3
    ids = [set(d.tokens[:, 0].tolist()) for d in draws]
    assert len(set().union(*ids)) == 3 * each
    assert np.array_equal(draws[0].tokens, calibration.first(each).tokens)
    again, other = (drawn(every, samples, lots[seed])[0] for seed in (3, 4))
    assert np.array_equal(again.tokens, calibration.tokens) and not np.array_equal(other.tokens, calibration.tokens)
    assert drawn(every, samples, lots[3], 0)[1] == []


def test_too_little_text_for_draws():
    with pytest.raises(UsageError, match="5 rows of 16 tokens are too few for 3 draws"):
        drawn(Rows.full(np.zeros((5, 16))), 8, np.arange(5))


@pytest.mark.parametrize("seed", range(3))
def test_rows_are_those_of_the_run(pico_models, seed):
    """In another order: what the run was calibrated on."""
    texts = steps.Texts(pico_models("llama"), Settings(samples=40, length=32, seed=seed))
    every = texts.mixed("calibration", None)
    calibration, _ = drawn(every.rows, 40, every.lot(seed))
    assert sorted(calibration.tokens.tolist()) == sorted(texts.calibration.tokens.tolist())
    assert calibration.tokens.tolist() != texts.calibration.tokens.tolist()


# ---- scores against scores ----


@pytest.mark.parametrize("seed", range(4))
def test_rank_correlation(seed):
    random = np.random.default_rng(seed)
    a, b = random.normal(size=30), random.integers(0, 6, 30).astype(float)  # ties among them
    np.testing.assert_allclose(rank_correlation(a, b), reference_criteria.spearman(a, b), rtol=1e-12)
    assert rank_correlation(a, np.exp(a)) == pytest.approx(1) and rank_correlation(a, -a) == pytest.approx(-1)


def test_nothing_to_put_in_order():
    one, flat = np.ones(1), np.full(4, 2.0)
    assert rank_correlation(one, one) == 1 and rank_correlation(flat, flat) == 1
    assert rank_correlation(flat, np.arange(4.0)) == 0


def test_jaccard():
    assert jaccard({1, 2, 3}, {2, 3, 4}) == 0.5 and jaccard(set(), set()) == 1 and jaccard({1}, {2}) == 0


@pytest.fixture(scope="module")
def model_and_scores(pico_models, tmp_path_factory):
    directory = tmp_path_factory.mktemp("scores")
    model = pico_models("llama")
    return model, planned(model, directory), scores_of(model, ROWS, directory / "own")


def test_scores_agree_with_themselves(model_and_scores):
    model, made, scores = model_and_scores
    found = agreement(Checkpoint(model).arch, scores, scores, made)
    assert set(found) == {"ffn", "kv_head"}  # what is cut; layers are not
    for of in found.values():
        assert of["rank_correlation"] == pytest.approx(1) and of["same"] == of["least_same"] == 1
        assert len(of["layers"]) == 4
    assert stability._agreed(found)["alike"]


def test_a_planted_difference_is_found_where_it_is(model_and_scores):
    """The last channel that is kept in layer 2 changes places with the first that is not."""
    model, made, scores = model_and_scores
    order = np.argsort(-scores["ffn"][2])
    count = len(made.layers[2].ffn)
    inside, outside = order[count - 1], order[count]
    other = {**scores, "ffn": scores["ffn"].copy()}
    other["ffn"][2, [inside, outside]] = scores["ffn"][2, [outside, inside]]
    arch = Checkpoint(model).arch
    ours, theirs = kept(arch, scores, made), kept(arch, other, made)
    assert ours["ffn", 2] - theirs["ffn", 2] == {inside} and theirs["ffn", 2] - ours["ffn", 2] == {outside}
    found = agreement(arch, scores, other, made)["ffn"]
    assert [row["same"] for row in found["layers"]] == [1, 1, (count - 1) / count, 1]
    assert found["same"] == pytest.approx(1 - 1 / count / 4) and found["least_same"] == (count - 1) / count
    expected = reference_criteria.spearman(scores["ffn"][2], other["ffn"][2])
    assert found["least_rank_correlation"] == pytest.approx(expected) and expected < 1


def test_axes_that_are_cut(pico_models, tmp_path):
    """Layers and the hidden size count when the plan cuts them; layers that trials have chosen are nobody's scores."""
    model = pico_models("llama", num_hidden_layers=6)
    made = planned(model, tmp_path, axes=("layer", "hidden"), keep=0.5)
    arch, scores = Checkpoint(model).arch, scores_of(model, ROWS, tmp_path / "s")
    assert set(orders(arch, scores, made)) == {("layer", -1), ("hidden", -1)}
    assert kept(arch, scores, made)["layer", -1] == {layer.source for layer in made.layers}
    assert kept(arch, scores, made)["hidden", -1] == set(made.hidden)
    assert set(orders(arch, {**scores, "kept": np.zeros((7, 6))}, made)) == {("hidden", -1)}


@pytest.mark.parametrize(
    ("alike", "enough"),
    [([True, True, True], 1), ([False, True, True], 2), ([True, False, True], 4), ([True, False], None)],
)
def test_enough(alike, enough):
    """The fewest from which on all are alike: a small part that is so by luck is not enough."""
    rows = [{"tokens": 2**i, "alike": each} for i, each in enumerate(alike)]
    assert stability._enough(rows) == enough


# ---- the whole answer ----


def ask(model: Path, directory: Path, rows: Rows = ROWS, **changes) -> dict:
    made = changes.pop("plan", None) or planned(model, directory, rows)
    question = Question(model, made, changes.pop("criteria", ["wanda"]), rows, **changes)
    return stability.stability(question, directory / "scratch")


def test_against_fewer_tokens(pico_models, tmp_path):
    """Each part against all, as scored one by one."""
    model, criteria = pico_models("llama"), ["wanda", "angular"]
    made = planned(model, tmp_path)
    found = ask(model, tmp_path, plan=made, criteria=criteria)
    assert found["tokens"] == ROWS.total and list(found["criteria"]) == criteria and found["cost"] is None
    arch, whole = Checkpoint(model).arch, scores_of(model, ROWS, tmp_path / "whole")
    rows = found["criteria"]["wanda"]["tokens"]
    assert [row["tokens"] for row in rows] == [ROWS.first(n).total for n in (2, 4, 6)]
    for row, count in zip(rows, (2, 4, 6), strict=True):
        part = scores_of(model, ROWS.first(count), tmp_path / str(count))
        assert row["axes"] == agreement(arch, part, whole, made)
    ranks = [row["axes"]["ffn"]["rank_correlation"] for row in rows]
    assert ranks[0] < ranks[2] < 1


def test_text_that_says_the_same_again_is_enough_at_once(pico_models, tmp_path):
    rows = Rows.full(np.repeat(ROWS.tokens[:2], 6, axis=0).reshape(2, 6, 16).swapaxes(0, 1).reshape(12, 16))
    found = ask(pico_models("llama"), tmp_path, rows, draws=[rows.first(4), rows.first(4)])["criteria"]["wanda"]
    assert found["enough"] == 32 and found["draws"]["ffn"]["jaccard"] == 1
    assert found["draws"]["ffn"]["rank_correlation"] == pytest.approx(1)


def test_draws(pico_models, tmp_path):
    """Between each pair, mean over layers."""
    model = pico_models("llama")
    made, draws = planned(model, tmp_path), [Rows(ROWS.tokens[n : n + 4], ROWS.lengths[n : n + 4]) for n in (0, 4, 8)]
    found = ask(model, tmp_path, plan=made, draws=draws)["criteria"]["wanda"]["draws"]
    scores = [scores_of(model, rows, tmp_path / str(n)) for n, rows in enumerate(draws)]
    arch = Checkpoint(model).arch
    for axis in ("ffn", "kv_head"):
        ranks, shares = [], []
        for i, j in ((0, 1), (0, 2), (1, 2)):
            a, b = (orders(arch, scores[n], made) for n in (i, j))
            c, d = (kept(arch, scores[n], made) for n in (i, j))
            ranks += [reference_criteria.spearman(a[axis, layer], b[axis, layer]) for layer in range(4)]
            shares += [len(c[axis, la] & d[axis, la]) / len(c[axis, la] | d[axis, la]) for la in range(4)]
        assert found[axis]["rank_correlation"] == pytest.approx(np.mean(ranks))
        assert found[axis]["jaccard"] == pytest.approx(np.mean(shares)) and found[axis]["least_jaccard"] == min(shares)
    assert 0 < found["ffn"]["jaccard"] < 1


@pytest.mark.parametrize("repaired", [True, False])
def test_what_the_cuts_of_draws_cost(pico_models, tmp_path, repaired):
    """As cutting, reconstructing and evaluating by hand; the same draw twice has no spread."""
    model, test = pico_models("llama"), Rows.full(np.random.default_rng(9).integers(0, 500, (4, 16)))
    draws = [ROWS.first(4), ROWS.first(4), Rows(ROWS.tokens[4:8], ROWS.lengths[4:8])]
    made = planned(model, tmp_path)
    found = ask(model, tmp_path, plan=made, draws=draws, test=test, repaired=repaired, criteria=["obs"])["cost"]
    stats = calibrate(model, draws[2], tmp_path / "by-hand")
    own = plan(model, score(model, stats, tmp_path / "s.safetensors", "obs"), Options(keep=0.6))
    repair = tmp_path / "repair" if repaired else None
    if repaired:
        own = reconstruct(model, own, draws[2], repair)
    prune(model, own, tmp_path / "cut", repair=repair)
    metrics = evaluate(tmp_path / "cut", test, teacher=model)
    for name in ("perplexity", "kl_divergence"):
        values = found[name]["values"]
        assert values[2] == pytest.approx(getattr(metrics, name)) and values[0] == values[1] != values[2]
        assert found[name]["mean"] == pytest.approx(np.mean(values))
        assert found[name]["stdev"] == pytest.approx(np.std(values, ddof=1))
    assert found["reconstructed"] is repaired and 0 < found["jaccard"]["ffn"] < 1 and found["jaccard"]["layer"] == 1


def test_layers_of_trials_stay(pico_models, tmp_path):
    """A plan whose layers no scores have chosen keeps them in every draw."""
    model = pico_models("llama")
    whole = planned(model, tmp_path)
    made = whole.model_copy(update={"layers": [whole.layers[i] for i in (0, 2, 3)]})
    draws, test = [ROWS.first(4), Rows(ROWS.tokens[4:8], ROWS.lengths[4:8])], ROWS.first(2)
    options = {"plan": made, "draws": draws, "test": test, "repaired": False, "choose_layers": False}
    found = ask(model, tmp_path, **options)
    assert found["cost"]["jaccard"]["layer"] == 1
    assert {"ffn", "kv_head"} == set(found["criteria"]["wanda"]["draws"])
    scored = Arrays.load(tmp_path / "scratch" / "draw-1" / "wanda.safetensors", "scores").arrays
    assert np.flatnonzero(scored["kept"][3]).tolist() == [0, 2, 3]


# ---- against a float parent ----


def test_fewer_bits_agree_less(pico_models, tmp_path):
    found = {}
    for bits in (8, 2):
        model = pico_models("llama", (bits, 32))
        answer = ask(model, tmp_path / str(bits), other=pico_models("llama"))
        found[bits] = answer["criteria"]["wanda"]["float"]["axes"]["ffn"]
        assert answer["float"] == str(pico_models("llama")) and len(found[bits]["layers"]) == 4
    assert found[2]["rank_correlation"] < found[8]["rank_correlation"] < 1 and found[2]["same"] < found[8]["same"]
    again = shutil.copytree(pico_models("llama"), tmp_path / "again")  # with its tokenizer written another way
    text = json.loads((again / "tokenizer.json").read_text())
    (again / "tokenizer.json").write_text(json.dumps(text, indent=3))
    same = ask(pico_models("llama"), tmp_path / "same", other=again)["criteria"]["wanda"]["float"]
    assert same["alike"] and same["axes"]["ffn"]["rank_correlation"] == pytest.approx(1)


def test_a_planted_disagreement(pico_models, tmp_path):
    """The same function with the channels of layer 1 in another order: only there the scores disagree."""
    model, other = pico_models("llama"), tmp_path / "other"
    shutil.copytree(model, other)
    weights = {name: np.array(array) for name, array in mx.load(str(model / "model.safetensors")).items()}
    order, prefix = np.random.default_rng(0).permutation(128), "model.layers.1.mlp."
    for name in ("gate", "up"):
        weights[f"{prefix}{name}_proj.weight"] = weights[f"{prefix}{name}_proj.weight"][order]
    weights[f"{prefix}down_proj.weight"] = np.ascontiguousarray(weights[f"{prefix}down_proj.weight"][:, order])
    mx.save_safetensors(str(other / "model.safetensors"), {n: mx.array(a) for n, a in weights.items()})
    rows = ask(model, tmp_path, other=other)["criteria"]["wanda"]["float"]["axes"]["ffn"]["layers"]
    ranks = [row["rank_correlation"] for row in rows]
    assert [row["layer"] for row in rows] == [0, 1, 2, 3] and ranks[1] < 0.5 and rows[1]["same"] < 0.9
    assert min(ranks[0], ranks[2], ranks[3]) > 0.999


@pytest.mark.parametrize("other", ["sizes", "tokenizer"])
def test_another_model_is_no_parent(pico_models, tmp_path, other):
    change = {"intermediate_size": 64} if other == "sizes" else {}
    model = pico.make(tmp_path / "other", "llama", **change)
    if other == "tokenizer":
        text = json.loads((model / "tokenizer.json").read_text())
        a, b = list(text["model"]["vocab"])[300:302]
        vocab = text["model"]["vocab"]
        vocab[a], vocab[b] = vocab[b], vocab[a]
        (model / "tokenizer.json").write_text(json.dumps(text))
    error = UsageError if other == "sizes" else Refused
    with pytest.raises(error, match=f"other {other}|another {other}"):
        ask(pico_models("llama"), tmp_path, other=model)


@pytest.mark.parametrize("name", ["taylor", "iterative"])
def test_what_cannot_be_asked(pico_models, tmp_path, name):
    with pytest.raises(UsageError, match=f"the stability of {name} is not measured"):
        ask(pico_models("llama"), tmp_path, criteria=[name])
    with pytest.raises(UsageError, match="unknown criterion"):
        stability.check(["dreams"])


# ---- in a run ----

ASKED = Settings(samples=12, length=32, keep=0.6, widths="even")


@pytest.fixture
def run(pico_models, tmp_path):
    """A run that is calibrated, scored and planned, on our own text, and its texts."""
    model = pico_models("llama")
    texts = steps.Texts(model, ASKED)
    with steps.open_run(model, tmp_path / "run") as opened:
        opened.write_recipe({"model": str(model), "samples": 12, "length": 32})
        steps.calibrate_step(opened, texts, ASKED)
        steps.score_step(opened, ASKED)
        choose_sizes.plan_step(opened, texts, ASKED)
        yield opened, texts


def test_a_step_of_a_run(run):
    """Written once, refused when asked otherwise, told in the report."""
    opened, texts = run
    path = stability.stability_step(opened, texts, ASKED, ["wanda"], 3, opened.model, True)
    found = json.loads(path.read_text())
    assert found["tokens"] == 12 * 32 and found["draw_tokens"] == [12 * 32] * 3
    assert [f.name for f in path.parent.iterdir() if f.name != "step.json"] == ["stability.json"]
    before = path.stat().st_mtime_ns
    stability.stability_step(opened, texts, ASKED, ["wanda"], 3, opened.model, True)
    assert path.stat().st_mtime_ns == before
    with pytest.raises(Refused, match="draws was 3, now it is 2"):
        stability.stability_step(opened, texts, ASKED, ["wanda"], 2, opened.model, True)
    text = report(opened.path).read_text()
    assert "## Stability of the choice" in text
    told = text.replace("\\", "")
    assert [line for line in stability_text.stability_lines(found) if line.split(":")[-1] not in told] == []
    ppl = found["cost"]["perplexity"]
    assert readable(ppl["mean"], 3, ppl["stdev"]) in text


def test_a_report_without_it(run):
    opened, _ = run
    assert "Stability" not in report(opened.path).read_text()


@pytest.mark.parametrize(("draws", "measure"), [(1, False), (0, True)])
def test_draws_without_spread(run, draws, measure):
    with pytest.raises(UsageError, match=f"{draws} draws have no spread"):
        stability.stability_step(*run, ASKED, ["wanda"], draws, None, measure)


# ---- text that is measured on is not calibrated on ----


def test_selection_never_sees_calibration_or_test_text(pico_models):
    """Held-out rows come from the validation text, whose paragraphs no other part has."""
    texts = steps.Texts(pico_models("llama"), ASKED)
    held = trial_cache.held_rows(texts)
    own = corpus.windows(lm.tokenizer(texts.model), texts.documents["validation"]["calibration"], 32)
    assert held.tokens.tolist() == own.first(held.count).tokens.tolist()
    units = {
        part: {u for documents in of.values() for d in documents for u in corpus.paragraphs(d)[1]}
        for part, of in texts.documents.items()
    }
    assert not units["validation"] & units["calibration"] and not units["validation"] & units["test"]


@pytest.mark.parametrize("verb", ["plan", "stability"])
def test_text_that_is_measured_on_as_well_is_an_error(run, tmp_path, verb):
    """One paragraph of the calibration text in the test text."""
    opened, _ = run
    ours = (DEMO / "calibration.txt").read_text("utf-8").split("\n")
    shared = max(ours, key=len)
    (tmp_path / "test.txt").write_text((DEMO / "test.txt").read_text("utf-8") + "\n" + shared + "\n")
    leaking = replace(ASKED, test_data=str(tmp_path / "test.txt"), widths="uniform")
    texts = steps.Texts(opened.model, leaking)
    with pytest.raises(PareError, match="the calibration text and the test text share the paragraph"):
        if verb == "plan":
            choose_sizes.plan_step(opened, texts, leaking)
        else:
            stability.stability_step(opened, texts, leaking, ["wanda"], 3, None, True)


def test_text_that_changed_since_calibration(run):
    opened, _ = run
    texts = steps.Texts(opened.model, replace(ASKED, seed=1))
    with pytest.raises(Refused, match=r"seed was 0 when .* was calibrated, now it is 1"):
        stability.stability_step(opened, texts, ASKED, ["wanda"], 3, None, False)
