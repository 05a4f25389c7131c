"""Which layers go: angular distance and greedy KL against float64, a layer that adds nothing goes first whoever is
asked, and re-scoring finds what scores of single layers cannot know."""

from __future__ import annotations

import itertools
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
import reference

from mlx_pare.arch import can_keep
from mlx_pare.base.errors import PareError, Refused, UsageError
from mlx_pare.model.checkpoint import Checkpoint
from mlx_pare.options.settings import TABLE, Settings
from mlx_pare.pipeline import choose_layers, choose_sizes, steps
from mlx_pare.pipeline.steps import plan_options
from mlx_pare.planning import candidate as trial_candidate, choose_units, trial_cache
from mlx_pare.planning.drop_layers import layers_by_kl, trials
from mlx_pare.planning.goal import Options
from mlx_pare.planning.plan import plan
from mlx_pare.pruning import reach
from mlx_pare.pruning.plan_file import LayerPlan, Plan
from mlx_pare.pruning.prune import prune
from mlx_pare.repair.reconstruct import reconstructed_kl
from mlx_pare.scoring.calibrate import calibrate
from mlx_pare.scoring.score import CRITERIA, score
from mlx_pare.store.arrays import Arrays
from mlx_pare.text.corpus import Rows

ROWS = Rows.full(np.random.default_rng(0).integers(0, 500, (6, 24)))
PADDED = Rows(ROWS.tokens, np.array([24, 3, 11, 9, 20, 24], dtype=np.int32))
WRITERS = ("self_attn.o_proj", "mlp.down_proj")


def changed(model: Path, directory: Path, change: Callable[[dict[str, np.ndarray]], None]) -> Path:
    """A copy of a dense model whose tensors ``change`` has changed in place."""
    shutil.copytree(model, directory)
    weights = {name: np.array(array) for name, array in mx.load(str(model / "model.safetensors")).items()}
    change(weights)
    arrays = {name: mx.array(array) for name, array in weights.items()}
    mx.save_safetensors(str(directory / "model.safetensors"), arrays, metadata={"format": "mlx"})
    return directory


def without(model: Path, *gone: int) -> trial_candidate.Candidate:
    full = trial_candidate.whole(Checkpoint(model).arch)
    return tuple(None if i in gone else width for i, width in enumerate(full))


def kl_without(model: Path, rows: Rows, gone: set[int]) -> float:
    """The reference: what the layers add to the stream is multiplied by nothing."""
    config, weights = reference.load(model)
    teacher, _ = reference.forward(config, weights, rows.tokens)
    student, _ = reference.forward(config, weights, rows.tokens, dict.fromkeys(gone, 0.0))
    return reference.kl(teacher, student)[:, :-1][rows.mask()[:, 1:]].mean()


# ---- a layer that adds nothing ----


@pytest.fixture(scope="module")
def idle(pico_models, tmp_path_factory) -> Path:
    """Its layer 2 adds almost nothing to the stream."""

    def still(weights: dict) -> None:
        for name in WRITERS:
            weights[f"model.layers.2.{name}.weight"] *= 1e-3

    return changed(pico_models("llama"), tmp_path_factory.mktemp("idle") / "model", still)


@pytest.mark.parametrize("name", ["block-influence", "angular", "magnitude", "obs"])
def test_a_layer_that_adds_nothing_has_the_least_score(idle, tmp_path, name):
    def silent(weights: dict) -> None:  # magnitude looks at all matrices
        for tensor, array in weights.items():
            if name == "magnitude" and tensor.startswith("model.layers.2.") and array.ndim == 2:
                array *= 1e-3

    model = changed(idle, tmp_path / "model", silent)
    stats = calibrate(model, ROWS, tmp_path / "stats")
    scores = score(model, stats, tmp_path / "scores.safetensors", name)
    made = plan(model, scores, Options(keep=0.75, axes=("layer",), protect=False))
    assert [layer.source for layer in made.layers] == [0, 1, 3]


def test_a_layer_that_adds_nothing_goes_first_by_kl(idle):
    assert layers_by_kl(idle, 2, ROWS)[0].layer == 2
    assert layers_by_kl(idle, 3, ROWS)[0].kl < 1e-5


# ---- greedy KL ----


@pytest.mark.parametrize("packed", [None, (4, 32)], ids=["dense", "4 bits"])
@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3_text"])
def test_kl_of_every_drop(pico_models, family, packed):
    """Each is the KL divergence with all layers gone that went so far, and none would have cost less."""
    model = pico_models(family, packed)
    count = {"gemma3_text": 3}.get(family, 2)
    drops, gone = layers_by_kl(model, count, PADDED), set()
    for drop in drops:
        gone.add(drop.layer)
        np.testing.assert_allclose(drop.kl, kl_without(model, PADDED, gone), rtol=2e-4)
    assert len(gone) == len(drops) == len(Checkpoint(model).arch.layers) - count
    others = {i: kl_without(model, PADDED, {i}) for i in range(len(Checkpoint(model).arch.layers))}
    if family != "gemma3_text":
        assert drops[0].layer == min(others, key=others.get)


@pytest.fixture(scope="module")
def redundant(pico_models, tmp_path_factory) -> Path:
    """Layers 1 and 2 add the same large vector: either may go, both may not. Layer 3 matters more than either."""
    vector = np.random.default_rng(1).normal(size=64)
    vector[0] = 0

    def twins(weights: dict) -> None:
        weights["model.embed_tokens.weight"][:, 0] = 8  # what the twins see in every token
        for layer in (1, 2):
            for name in ("self_attn.o_proj", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"):
                weights[f"model.layers.{layer}.{name}.weight"] *= 0
            for name in ("gate", "up"):
                weights[f"model.layers.{layer}.mlp.{name}_proj.weight"][0, 0] = 1
            weights[f"model.layers.{layer}.mlp.down_proj.weight"][:, 0] = 6 * vector / np.linalg.norm(vector)
        for layer, factor in ((0, 0.8), (3, 0.35), (4, 0.8)):
            for name in WRITERS:
                weights[f"model.layers.{layer}.{name}.weight"] *= factor

    model = pico_models("llama", num_hidden_layers=5)
    return changed(model, tmp_path_factory.mktemp("redundant") / "model", twins)


def test_scored_again_after_each_drop(redundant):
    """Once one of two layers that do the same is gone, the other is needed; scores of single layers take both."""
    singles = [kl_without(redundant, ROWS, {i}) for i in range(5)]
    assert sorted(np.argsort(singles)[:2].tolist()) == [1, 2]
    drops = layers_by_kl(redundant, 3, ROWS)
    gone = {drop.layer for drop in drops}
    assert 3 in gone and len(gone & {1, 2}) == 1
    assert drops[-1].kl < kl_without(redundant, ROWS, {1, 2}) / 100


def test_each_round_tries_what_is_left(redundant):
    """One walk a round; protected layers are never tried."""
    asked = []

    def tried(candidates):
        asked.append([{i for i, width in enumerate(candidate) if width is None} for candidate in candidates])
        return [float(10 - max(gone)) for gone in asked[-1]]

    drops = layers_by_kl(redundant, 2, ROWS, protected=[0, 4], tried=tried)
    assert asked == [[{1}, {2}, {3}], [{3, 1}, {3, 2}], [{3, 1, 2}]]
    assert [(drop.layer, drop.kl) for drop in drops] == [(3, 7.0), (1, 7.0), (2, 7.0)]
    with pytest.raises(Refused, match="1 of 5 layers cannot be kept"):
        layers_by_kl(redundant, 1, ROWS, protected=[0, 4], tried=tried)


def test_streams_that_are_shared_give_the_same(pico_models):
    """Candidates that are the same up to a block share its stream: as if each had been tried alone."""
    model = pico_models("llama", (4, 32))
    tried = trials(model, PADDED, None)
    candidates = [without(model, *gone) for gone in ((1,), (1, 2), (1, 3), (0,), (1, 2, 3), (1,), ())]
    together = tried(candidates)
    assert together == [tried([candidate])[0] for candidate in candidates]
    assert together[0] == together[5] and together[-1] == 0 and len(set(together)) == 6


def test_what_is_far_off_is_still_measured(pico_models):
    """Where trials of widths would give up (infinite), the order of drops needs a number."""
    model = pico_models("llama")
    assert all(np.isfinite(trials(model, ROWS, None)([without(model, 0, 1, 2, 3), without(model, 0)])))


@pytest.mark.parametrize("protect", [False, True])
@pytest.mark.parametrize("count", range(1, 6))
def test_layers_keep_their_kinds(pico_models, count, protect):
    """Gemma 3 takes the kind of a layer from its place: the layers that are left must be such a model."""
    model = pico_models("gemma3_text")
    arch = Checkpoint(model).arch
    protected = reach.protected_layers(arch) if protect else []
    if reach.best_layers(arch, [0.0] * 6, count, protected) is None:
        with pytest.raises(Refused, match="layers cannot be kept"):
            layers_by_kl(model, count, PADDED, protected)
        return
    gone = [drop.layer for drop in layers_by_kl(model, count, PADDED, protected)]
    left = [i for i in range(6) if i not in gone]
    assert len(left) == count and can_keep(arch, left) and {*protected} <= {*left}


# ---- angular distance ----


def runs(gone: set[int]) -> list[tuple[int, int]]:
    """Neighbours that go, as (first, one behind the last)."""
    starts = sorted(i for i in gone if i - 1 not in gone)
    return [(i, next(j for j in itertools.count(i) if j not in gone)) for i in starts]


@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
@pytest.mark.parametrize("protected", [(), (0, 5), (0, 3, 5)])
@pytest.mark.parametrize("seed", range(3))
def test_the_block_with_the_smallest_angle(pico_models, family, protected, seed):
    """All sets tried: one block where there is one, else the fewest, the smallest sum of angles."""
    arch = Checkpoint(pico_models(family, num_hidden_layers=6)).arch
    angles = np.random.default_rng(seed).random((7, 7))
    found = 0
    for count in range(1, 7):
        sets = [k for k in itertools.combinations(range(6), count) if {*protected} <= {*k} and can_keep(arch, k)]
        blocks = {k: runs({*range(6)} - {*k}) for k in sets}
        best = min(sets, key=lambda k: (len(blocks[k]), sum(angles[b] for b in blocks[k])), default=None)
        chosen = choose_units.around_blocks(arch, angles, count, protected)
        assert chosen == (None if best is None else list(best))
        found += best is not None
    assert found >= 2


def test_plans_by_angular_distance(pico_models, tmp_path):
    """From text to plan, against angles in float64; two plans of different depth need not be nested."""
    model = pico_models("llama", num_hidden_layers=6)
    _, layers = reference.forward(*reference.load(model), PADDED.tokens)
    angles = reference.angles(layers, PADDED.lengths)
    stats = calibrate(model, PADDED, tmp_path / "stats")
    scores = score(model, stats, tmp_path / "scores.safetensors", "angular")
    np.testing.assert_allclose(Arrays.load(scores, "scores").arrays["layer"], np.diag(angles, 1), atol=1e-5)
    for count in (1, 2, 3):
        start = min(range(7 - count), key=lambda i: angles[i, i + count])
        made = plan(model, scores, Options(keep=1 - count / 6, axes=("layer",), protect=False))
        assert [la.source for la in made.layers] == [i for i in range(6) if not start <= i < start + count]


def test_statistics_without_angles(pico_models, tmp_path):
    model = pico_models("llama")
    old = Arrays.load(calibrate(model, ROWS, tmp_path / "stats"), "statistics")
    arrays = {name: mx.array(a) for name, a in old.arrays.items() if name != "angles"}
    Arrays(arrays, old.about).save(tmp_path / "old.safetensors")
    with pytest.raises(PareError, match=r"hold no angles between layers. Calibrate again"):
        score(model, tmp_path / "old.safetensors", tmp_path / "scores.safetensors", "angular")


# ---- in a run ----

ASKED = Settings(samples=8, length=32, keep=0.5, axes=("layer",), widths="even", layers_by="kl", protect=False)


def begin(model: Path, directory: Path):
    """(open run, its texts) that is calibrated and scored by obs, on our own text."""
    run, texts = steps.open_run(model, directory / "run"), steps.Texts(model, ASKED)
    steps.calibrate_step(run, texts, ASKED)
    steps.score_step(run, ASKED)
    return run, texts


@pytest.fixture
def begun(redundant, tmp_path):
    """A run of the redundant model."""
    run, texts = begin(redundant, tmp_path)
    with run:
        yield run, texts


def settings(**changes) -> Settings:
    return Settings(**{**ASKED.__dict__, **changes})


def test_a_run_drops_layers_by_kl(begun):
    """As the function says on rows of the validation text; what it cost is noted, and no trial is made twice."""
    run, texts = begun
    held = trial_cache.held_rows(texts)
    made = Plan.load(choose_sizes.plan_step(run, texts, ASKED))
    expected = layers_by_kl(run.model, len(made.layers), held)
    assert len(made.layers) < 5 and {la.source for la in made.layers} == {*range(5)} - {d.layer for d in expected}
    assert made.criterion == "obs" and all(len(la.ffn) == 128 for la in made.layers)
    noted = json.loads((run.directory("plan") / "layers.json").read_text())
    assert noted["drops"] == {str(len(made.layers)): [d.__dict__ for d in expected]}
    assert noted["held_tokens"] == held.total


def test_trials_of_drops_are_kept(begun, monkeypatch):
    run, texts = begun
    choose_sizes.plan_step(run, texts, ASKED)
    shutil.rmtree(run.directory("plan"))
    monkeypatch.setattr(choose_layers, "trials", lambda *_: lambda candidates: 1 / 0)
    choose_sizes.plan_step(run, texts, ASKED)
    with pytest.raises(Refused, match=r"layers_by was 'kl', now it is 'angular'"):
        choose_sizes.plan_step(run, texts, settings(layers_by="angular"))


@pytest.mark.parametrize("by", ["block-influence", "angular"])
def test_a_run_drops_layers_by_another_criterion(begun, tmp_path, by):
    """The layers of that criterion, everything else by the run's own."""
    run, texts = begun
    asked = settings(layers_by=by, axes=("layer", "ffn"), criterion="obs")
    made = Plan.load(choose_sizes.plan_step(run, texts, asked))
    stats = run.output("calibrate", "stats.safetensors")
    names = {name: score(run.model, stats, tmp_path / f"{name}.safetensors", name) for name in (by, "obs")}
    deep, own = (plan(run.model, names[name], plan_options(asked)) for name in (by, "obs"))
    assert [la.source for la in made.layers] == [la.source for la in deep.layers] and made.criterion == "obs"
    units = {la.source: la.ffn for la in own.layers}
    assert all(la.ffn == units[la.source] for la in made.layers if la.source in units)
    prune(run.model, made, tmp_path / "cut")


def test_levels_of_many_depths(begun):
    """Uniform widths try levels with other numbers of layers: each has the layers that were found for it."""
    run, texts = begun
    asked = settings(axes=("layer", "ffn"), widths="uniform", layers_by=None, tries=4, keep=0.6, reconstruct=False)
    made = Plan.load(choose_sizes.plan_step(run, texts, asked))
    drops = json.loads((run.directory("plan") / "layers.json").read_text())["drops"]
    assert len(drops) > 1
    orders = sorted(([d["layer"] for d in each] for each in drops.values()), key=len)
    assert all(longer[: len(shorter)] == shorter for shorter, longer in itertools.pairwise(orders))
    assert {la.source for la in made.layers} == {*range(5)} - {d["layer"] for d in drops[str(len(made.layers))]}


@pytest.mark.parametrize("repaired", [True, False])
def test_what_is_best_once_it_is_reconstructed(pico_models, tmp_path, monkeypatch, repaired):
    """By default the sets of all three ways are reconstructed, each once, where they differ; the best is the plan.
    Trials are misled here, towards the first layers."""

    def misled(candidates):
        return [float(sum(i for i, width in enumerate(each) if width is None)) for each in candidates]

    monkeypatch.setattr(choose_layers, "trials", lambda *_: misled)
    asked = settings(widths="uniform", layers_by=None, tries=1, reconstruct=repaired)
    run, texts = begin(pico_models("llama", num_hidden_layers=6), tmp_path)
    with run:
        made = Plan.load(choose_sizes.plan_step(run, texts, asked))
    noted = json.loads((run.directory("plan") / "layers.json").read_text())
    by_kl = plan_without(run.model, [d["layer"] for d in noted["drops"][str(len(made.layers))]])
    if not repaired:
        assert made.layers == by_kl and "reconstructed_kl" not in noted
        return
    stats, sets = run.output("calibrate", "stats.safetensors"), {"kl": by_kl}
    for name in ("block-influence", "angular"):
        scores = score(run.model, stats, tmp_path / f"{name}.safetensors", name)
        sets[name] = plan(run.model, scores, plan_options(asked)).layers
    held, kl = trial_cache.held_rows(texts), {}
    for name in noted["reconstructed_kl"]:
        each = made.model_copy(update={"layers": sets[name]})
        kl[name] = reconstructed_kl(run.model, each, texts.calibration, held, tmp_path / "scratch")
    assert len(kl) > 1 and noted["reconstructed_kl"] == pytest.approx(kl)
    assert made.layers == sets[min(kl, key=kl.get)] != by_kl
    distinct = {tuple(la.source for la in layers) for layers in sets.values()}
    assert distinct == {tuple(la.source for la in sets[name]) for name in kl} and len(kl) == len(distinct)


def plan_without(model: Path, gone: list[int]) -> list[LayerPlan]:
    """All layers but some, whole."""
    layers = [i for i in range(len(Checkpoint(model).arch.layers)) if i not in gone]
    return [LayerPlan(source=i, ffn=list(range(128)), kv_head=[0, 1]) for i in layers]


@pytest.mark.parametrize(
    ("how", "axes", "criterion", "by", "expected"),
    [
        ("uniform", ("layer",), "obs", None, "kl"),
        ("per-layer", ("layer", "ffn"), "wanda", None, None),  # the programme does, by what was measured
        ("even", ("layer",), "obs", None, None),
        ("uniform", ("ffn",), "obs", None, None),
        ("uniform", ("layer",), "angular", None, None),  # somebody chose a formula for layers
        ("uniform", ("layer",), "random", None, None),
        ("even", ("layer",), "random", "kl", "kl"),
        ("uniform", ("layer",), "obs", "angular", "angular"),
    ],
)
def test_who_chooses_layers(how, axes, criterion, by, expected):
    assert choose_layers.layers_by_of(Settings(axes=axes, layers_by=by, widths=how), criterion) == expected


def test_widths_per_layer_choose_the_layers_too():
    with pytest.raises(UsageError, match="Leave out --layers-by"):
        choose_layers.layers_by_of(Settings(axes=("layer",), layers_by="kl", widths="per-layer"), "obs")


def test_mistakes(begun):
    run, texts = begun
    with pytest.raises(UsageError, match=r"none may go. Add layer to --axes"):
        choose_sizes.plan_step(run, texts, settings(axes=("ffn",)))
    with pytest.raises(
        UsageError, match=r"unknown way to choose layers 'luck'. Choose one of block-influence, angular, kl"
    ):
        choose_sizes.plan_step(run, texts, settings(layers_by="luck"))
    assert not run.directory("plan").exists()


def test_ways_are_named(pico_models):
    """In the help, and those that are criteria are criteria for layers."""
    told = re.split(r"[ .,;:]+", TABLE["layers_by"].help)
    assert {*choose_layers.LAYERS_BY} <= {*told}
    assert all("layer" in CRITERIA[name].own for name in choose_layers.LAYERS_BY if name != "kl")


def test_memory_is_asked_for_first(pico_models):
    with pytest.raises(Refused, match="--widths even"):
        layers_by_kl(pico_models("llama"), 3, ROWS, memory_cap=1000)
