"""plan: targets are met by the nearest reachable point, edited plans are checked in full, predictions are measured."""

from __future__ import annotations

import itertools
import json
import re
import struct
from pathlib import Path

import mlx.core as mx
import numpy as np
import pico
import pytest
from mlx.utils import tree_flatten

from mlx_pare import lm
from mlx_pare.arch import Keep, LayerKeep, describe
from mlx_pare.base.errors import PareError, Refused, UsageError
from mlx_pare.base.units import gb, parse_amount
from mlx_pare.model.checkpoint import Checkpoint
from mlx_pare.planning import choose_units
from mlx_pare.planning.goal import Options
from mlx_pare.planning.plan import plan, redraw, whole
from mlx_pare.planning.uniform import shape
from mlx_pare.pruning import reach
from mlx_pare.pruning.layout import total_bytes
from mlx_pare.pruning.plan_file import Plan
from mlx_pare.pruning.prune import prune
from mlx_pare.store.arrays import Arrays

ALL_AXES = ("ffn", "kv_head", "layer")


def scores_for(model: Path, path: Path, seed: int = 0) -> Path:
    """Random scores of every unit, as `score` writes them."""
    checkpoint, random = Checkpoint(model), np.random.RandomState(seed)
    arch = checkpoint.arch
    arrays = {axis: random.rand(len(arch.layers), arch.uniform(axis)) for axis in ("ffn", "kv_head")}
    arrays |= {"layer": random.rand(len(arch.layers)), "sparsity": random.rand(len(arch.layers))}
    arrays["hidden"] = random.rand(arch.sizes["hidden"])
    about = {"criterion": "random", "seed": seed, "model": checkpoint.identity()}
    Arrays({k: mx.array(v.astype(np.float32)) for k, v in arrays.items()}, about).save(path)
    return path


@pytest.fixture
def planned(pico_models, tmp_path):
    """``planned(family, packed, options...) -> (model, Plan)``."""

    def make(family="llama", packed=None, **options):
        model = pico_models(family, packed)
        scores = scores_for(model, tmp_path / f"{model.name}.safetensors")
        return model, plan(model, scores, Options(**options))

    return make


# ---- the nearest reachable point ----

LLAMA = {"vocab": 512, "hidden": 64, "head_dim": 16, "group": 2, "ffn": 128, "kv_head": 2, "layer": 4}


def llama_parameters(ffn: int, kv_head: int, layer: int) -> int:
    """Non-embedding parameters of the pico llama, counted by hand."""
    attention = 64 * 16 * (2 * kv_head + kv_head + kv_head + 2 * kv_head)
    return layer * (attention + 3 * 64 * ffn + 2 * 64) + 64


def llama_packed_bytes(ffn: int, kv_head: int, layer: int) -> int:
    """Weights of the pico llama packed with 4 bits, groups of 32 and float32 scales."""

    def matrix(rows, columns):
        return rows * (columns // 2 + 2 * 4 * (columns // 32))

    attention = matrix(32 * kv_head, 64) + 2 * matrix(16 * kv_head, 64) + matrix(64, 32 * kv_head)
    block = attention + 2 * matrix(ffn, 64) + matrix(64, ffn) + 2 * 64 * 4
    return layer * block + 64 * 4 + matrix(512, 64)


def reachable(axes, step):
    """Every (ffn, kv_head, layer); the first, the last and one full-attention layer are protected."""
    ffn = sorted({*range(step, 129, step), 128}) if "ffn" in axes else [128]
    return list(
        itertools.product(ffn, [1, 2] if "kv_head" in axes else [2], [2, 3, 4] if "layer" in axes else [4]),
    )


def along(levels, level, axis):
    """The levels that differ from one on one axis only."""
    number = ("ffn", "kv_head", "layer").index(axis)
    return [other for other in levels if all(other[n] == level[n] for n in range(3) if n != number)]


FRACTIONS = [0.3, 0.52, 0.6, 0.77, 0.9, 1.0]
AXES = [("ffn",), ("kv_head",), ("layer",), ("ffn", "kv_head"), ("ffn", "layer"), ALL_AXES]
FINEST = {("kv_head",): "kv_head", ("layer",): "layer"}


def level_of(found: Plan):
    return found.after.ffn, found.after.kv_heads, found.after.layers


@pytest.mark.parametrize("axes", AXES, ids="+".join)
@pytest.mark.parametrize("fraction", FRACTIONS)
def test_keep_and_params_are_met_by_the_nearest_point(planned, fraction, axes):
    full = llama_parameters(128, 2, 4)
    goal, levels = fraction * full, reachable(axes, 1)
    if min(llama_parameters(*level) for level in levels) > goal + 0.02 * full:
        with pytest.raises(Refused, match="smallest possible"):
            planned(axes=axes, keep=fraction)
        return
    _, found = planned(axes=axes, keep=fraction)
    assert found.after.non_embedding == llama_parameters(*level_of(found))
    assert found.after.parameters == found.after.non_embedding + 512 * 64
    near = along(levels, level_of(found), FINEST.get(axes, "ffn"))
    best = min(abs(llama_parameters(*level) - goal) for level in near)
    assert abs(found.after.non_embedding - goal) == best
    if level_of(found) == (128, 2, 4):
        with pytest.raises(Refused, match=r"nothing needs to be cut: .* whole model"):
            planned(axes=axes, params=goal + 512 * 64)
    else:  # the same point, asked in parameters
        assert planned(axes=axes, params=goal + 512 * 64)[1].layers == found.layers


@pytest.mark.parametrize("axes", AXES, ids="+".join)
@pytest.mark.parametrize("fraction", [*FRACTIONS[:-1], 0.999])
def test_a_size_is_met_by_the_largest_point_below_it(planned, fraction, axes):
    goal, levels = fraction * llama_packed_bytes(128, 2, 4), reachable(axes, 32)
    if min(llama_packed_bytes(*level) for level in levels) > goal:
        with pytest.raises(Refused, match="smallest possible"):
            planned(packed=(4, 32), axes=axes, size=goal)
        return
    _, found = planned(packed=(4, 32), axes=axes, size=goal)
    assert found.after.bytes == llama_packed_bytes(*level_of(found)) <= goal
    axis = FINEST.get(axes, "ffn")
    near = [llama_packed_bytes(*level) for level in along(levels, level_of(found), axis)]
    assert found.after.bytes == max(n for n in near if n <= goal)


@pytest.mark.parametrize("bytes_allowed", [60_000, 90_000, 120_000])
def test_for_a_mac_is_met_below_its_budget(planned, bytes_allowed):
    """The budget depends on the architecture: here every layer costs 1000 bytes of cache."""
    options = {"budget": lambda arch, value_bytes: bytes_allowed - 1000 * len(arch.layers), "budget_name": "m1-8gb"}
    _, found = planned(packed=(4, 32), axes=ALL_AXES, **options)
    assert found.after.bytes <= bytes_allowed - 1000 * found.after.layers
    ffn, heads, layers = level_of(found)
    assert ffn == 128 or llama_packed_bytes(ffn + 32, heads, layers) > bytes_allowed - 1000 * layers
    assert found.target.kind == "for" and "m1-8gb" in found.target.asked


def test_more_asked_is_never_less_kept(planned):
    kept = [planned(axes=ALL_AXES, keep=f)[1].after.non_embedding for f in FRACTIONS]
    assert kept == sorted(kept)


UNEVEN = {"num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 8}


UNSTEADY = {
    "an odd number of heads leaves o_proj dense": ("llama", UNEVEN, "kv_head", None),
    "qwen2 is untied by any head cut": ("qwen2", {}, "kv_head", None),
    "a step of 8 leaves down_proj dense": ("llama", {}, "ffn", 8),
    "a step of 40 leaves down_proj dense": ("llama", {}, "ffn", 40),
}


@pytest.mark.parametrize("fraction", [0.3, 0.5, 0.6, 0.7, 0.8, 0.85, 0.9, 0.95, 0.999])
@pytest.mark.parametrize("case", UNSTEADY)
def test_a_size_is_met_where_less_may_take_more_bytes(pico_models, case, fraction):
    """Groups of 32 columns do not divide every width. Against the sizes of all cuts along the axis."""
    family, changes, axis, step = UNSTEADY[case]
    checkpoint = Checkpoint(pico_models(family, (4, 32), **changes))
    layers, full = range(len(checkpoint.arch.layers)), checkpoint.arch.uniform(axis)
    sizes = {full: checkpoint.nbytes()}
    for n in range(step or 1, full, step or 1):
        sizes[n] = total_bytes(checkpoint, Keep(tuple(LayerKeep(i, {axis: range(n)}) for i in layers)))
    goal = fraction * checkpoint.nbytes()
    options = Options(axes=(axis,), size=goal, step=step)
    if min(sizes.values()) > goal:
        with pytest.raises(Refused, match=f"smallest possible is {re.escape(gb(min(sizes.values())))}"):
            shape(checkpoint, options)
    else:
        found = shape(checkpoint, options).after
        most = max(n for n, size in sizes.items() if size <= goal)
        assert (getattr(found, {"kv_head": "kv_heads"}.get(axis, axis)), found.bytes) == (most, sizes[most])


# ---- steps ----


@pytest.mark.parametrize(
    ("packed", "options", "step"),
    [
        (None, {}, 1),
        ((4, 32), {}, 32),
        ((4, 64), {}, 64),
        (None, {"bits": 4, "group_size": 32}, 32),
        (None, {"bits": 4}, 64),
        ((4, 32), {"bits": 8, "group_size": 64}, 64),
        (None, {"step": 24}, 24),
        ((4, 32), {"step": 8}, 8),
    ],
    ids=str,
)
def test_steps_are_respected(planned, packed, options, step):
    widths = {planned(packed=packed, axes=("ffn",), keep=k, **options)[1].after.ffn for k in (0.68, 0.74, 0.8, 0.97)}
    assert all(w % step == 0 or w == 128 for w in widths)
    if step == 1:
        assert any(w % 2 for w in widths)


def test_wide_models_are_cut_in_steps_of_256(pico_models):
    model = pico_models("llama", intermediate_size=4096, num_hidden_layers=2)
    widths = {shape(Checkpoint(model), Options(keep=k, axes=("ffn",))).after.ffn for k in (0.31, 0.5, 0.77, 0.9)}
    assert all(w % 256 == 0 for w in widths) and len(widths) == 4


# ---- units and layers ----


def test_the_highest_scores_are_kept(planned, tmp_path):
    model, found = planned(axes=ALL_AXES, keep=0.5)
    scores = Arrays.load(tmp_path / f"{model.name}.safetensors", "scores").arrays
    for layer in found.layers:
        for axis, kept in (("ffn", layer.ffn), ("kv_head", layer.kv_head)):
            of = scores[axis][layer.source]
            dropped = sorted(set(range(len(of))) - set(kept))
            assert kept == sorted(kept) and (not dropped or of[kept].min() >= of[dropped].max())


def test_ties_go_to_the_lower_index():
    assert choose_units.top(np.array([1.0, 2.0, 1.0, 1.0]), 2) == [0, 1]


@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
def test_protected_layers_are_kept(planned, family):
    for fraction in (0.55, 0.7, 0.9):
        model, found = planned(family, axes=("layer",), keep=fraction)
        total = len(Checkpoint(model).arch.layers)
        sources = [layer.source for layer in found.layers]
        assert sources[0] == 0 and sources[-1] == total - 1


def test_nothing_is_protected_when_that_is_asked(planned, tmp_path):
    model = planned(keep=1.0)[0]
    scores = Arrays.load(scores_for(model, tmp_path / "s.safetensors"), "scores")
    scores.arrays["layer"] = np.array([0.1, 0.9, 0.8, 0.2], dtype=np.float32)
    Arrays({k: mx.array(v) for k, v in scores.arrays.items()}, scores.about).save(tmp_path / "s.safetensors")
    for protect, expected in ((True, [0, 3]), (False, [1, 2])):
        found = plan(model, tmp_path / "s.safetensors", Options(keep=0.5, axes=("layer",), protect=protect))
        assert [layer.source for layer in found.layers] == expected


def test_gemma_depth_is_the_best_of_all_subsets():
    """The dynamic programme against every subset of nine layers."""
    config = pico.config_of("gemma3_text", vocab_size=512, num_hidden_layers=9)
    config["layer_types"] = ["sliding_attention", "sliding_attention", "full_attention"] * 3
    arch = describe(config)
    protected = reach.protected_layers(arch)
    assert protected == [0, 8]
    for seed, count in itertools.product(range(5), range(1, 10)):
        scores = np.random.RandomState(seed).randn(9)
        valid = [
            layers
            for layers in itertools.combinations(range(9), count)
            if count >= 3
            and all((arch.layers[i].kind == "full_attention") == (n % 3 == 2) for n, i in enumerate(layers))
            and set(protected) <= set(layers)
        ]
        found = reach.best_layers(arch, scores, count, protected)
        assert (found is None) is (not valid)
        if valid:
            assert tuple(found) in valid
            assert scores[found].sum() == pytest.approx(max(scores[list(v)].sum() for v in valid))


def test_uniform_depth_is_the_best_of_all_subsets():
    arch = describe(pico.config_of("llama", vocab_size=512, num_hidden_layers=8))
    for seed, count in itertools.product(range(5), range(2, 9)):
        scores = np.random.RandomState(seed).randn(8)
        found = reach.best_layers(arch, scores, count, [0, 7])
        best = max(scores[[0, *v, 7]].sum() for v in itertools.combinations(range(1, 7), count - 2))
        assert {0, 7} <= set(found) and scores[found].sum() == pytest.approx(best)


def test_gemma_plans_keep_kinds(planned):
    for fraction in (0.5, 0.6, 0.8, 1.0):
        model, found = planned("gemma3_text", axes=ALL_AXES, keep=fraction)
        arch = Checkpoint(model).arch
        kinds = [arch.layers[layer.source].kind for layer in found.layers]
        assert [k == "full_attention" for k in kinds] == [n % 3 == 2 for n in range(len(kinds))]
        assert found.problems(arch) == []


# ---- what cannot be ----


@pytest.mark.parametrize(
    ("target", "smallest"),
    [({"keep": 0.01}, "keep 0."), ({"params": 1000}, "k"), ({"size": 1000}, "kB"), ({"keep": 0.2}, "keep 0.")],
    ids=str,
)
def test_an_impossible_target_names_the_smallest_possible(planned, target, smallest):
    with pytest.raises(Refused) as caught:
        planned(axes=("kv_head",), **target)
    assert "the smallest possible is" in str(caught.value) and smallest in str(caught.value)
    assert "1 kv heads" in str(caught.value) and "ffn 128" in str(caught.value)


def test_the_smallest_possible_is_possible(planned):
    smallest = llama_parameters(128, 1, 4) + 512 * 64
    assert planned(axes=("kv_head",), params=smallest)[1].after.parameters == smallest


@pytest.mark.parametrize("target", [{"params": 1e12}, {"size": 1e12}], ids=str)
def test_what_the_whole_model_meets_needs_no_cut(planned, target):
    with pytest.raises(Refused, match=r"nothing needs to be cut: .* holds for the whole model"):
        planned(**target)
    _, found = planned(bits=8, group_size=32, **target)  # fewer bits were asked, too
    assert found.after.parameters == found.before.parameters and found.after.bytes < found.before.bytes
    assert found.layers[0].ffn == list(range(128))


def test_keeping_everything_is_allowed(planned):
    _, found = planned(keep=1.0)
    assert found.after == found.before


@pytest.mark.parametrize("axes", [("heads",), ("ffn", "vocab"), ("",)], ids=str)
def test_an_unknown_axis_is_a_usage_error(planned, axes):
    with pytest.raises(UsageError, match="ffn, kv_head, layer, hidden"):
        planned(axes=axes, keep=0.5)


def test_an_axis_that_the_family_lacks_is_a_usage_error(planned):
    with pytest.raises(UsageError, match="gemma3_text cannot be cut along hidden"):
        planned("gemma3_text", axes=("hidden",), keep=0.5)


@pytest.mark.parametrize(
    "targets", [{}, {"keep": 0.5, "size": 1e6}, {"params": 1e6, "keep": 0.5}, {"size": 1.0, "budget": len}], ids=str
)
def test_exactly_one_target(planned, targets):
    with pytest.raises(UsageError, match="exactly one target"):
        planned(**targets)


@pytest.mark.parametrize("keep", [0.0, -1.0, 1.01, 75.0, float("nan")])
def test_keep_is_a_fraction(planned, keep):
    with pytest.raises(UsageError, match="between 0 and 1"):
        planned(keep=keep)


@pytest.mark.parametrize(("bits", "group"), [(7, 64), (1, 64), (4, 16), (4, 0)])
def test_bits_that_mlx_lacks(planned, bits, group):
    with pytest.raises(UsageError, match="2, 3, 4, 5, 6, 8 bits"):
        planned(keep=0.5, bits=bits, group_size=group)


def test_scores_of_another_model_are_refused(pico_models, tmp_path):
    scores = scores_for(pico_models("llama"), tmp_path / "scores.safetensors")
    with pytest.raises(PareError, match="made from another model"):
        plan(pico_models("llama-untied"), scores, Options(keep=0.5))


AMOUNTS = [
    ("24B", "parameters", 24e9),
    ("900M", "parameters", 900e6),
    ("1.5e9", "parameters", 1.5e9),
    ("750k", "parameters", 750e3),
    ("1T", "parameters", 1e12),
    (" 7 B ", "parameters", 7e9),
    ("15GB", "bytes", 15e9),
    ("15G", "bytes", 15e9),
    ("14GiB", "bytes", 14 * 2**30),
    ("14Gi", "bytes", 14 * 2**30),
    ("512MiB", "bytes", 512 * 2**20),
    ("900MB", "bytes", 900e6),
    ("100B", "bytes", 100.0),
    ("4096", "bytes", 4096.0),
]


@pytest.mark.parametrize(("text", "what", "value"), AMOUNTS, ids=str)
def test_amounts(text, what, value):
    assert parse_amount(text, what) == value


@pytest.mark.parametrize("what", ["parameters", "bytes"])
@pytest.mark.parametrize(
    "text", ["", "GB", "0", "0GB", "-3GB", "1.2.3G", ".", "15 apples", "5BB", "1e400", "nan", "inf", "5iB", "1,5G"]
)
def test_amounts_that_mean_nothing(text, what):
    with pytest.raises(UsageError, match="cannot read"):
        parse_amount(text, what)


@pytest.mark.parametrize("text", ["15GB", "14GiB", "14Gi"])
def test_bytes_are_no_parameters(text):
    with pytest.raises(UsageError, match="as parameters"):
        parse_amount(text, "parameters")


# ---- neighbours ----


def test_neighbours_are_one_step_away(planned):
    _, found = planned(packed=(4, 32), axes=ALL_AXES, size=70_000)
    ffn, heads, layers = level_of(found)
    near = [("ffn", ffn - 32), ("ffn", ffn + 32), ("kv_head", heads - 1), ("kv_head", heads + 1)]
    near += [("layer", layers - 1), ("layer", layers + 1)]
    allowed = {"ffn": (32, 128), "kv_head": (1, 2), "layer": (2, 4)}
    expected = [f"{axis} {n}" for axis, n in near if allowed[axis][0] <= n <= allowed[axis][1]]
    assert [n.split(":")[0] for n in found.neighbours] == expected


def test_neighbours_say_what_they_measure(planned):
    _, found = planned(axes=("ffn",), keep=0.75)
    ffn, full = found.after.ffn, llama_parameters(128, 2, 4)
    below, above = (llama_parameters(n, 2, 4) / full for n in (ffn - 1, ffn + 1))
    assert found.neighbours == [f"ffn {ffn - 1}: keep {below:.3f}", f"ffn {ffn + 1}: keep {above:.3f}"]


# ---- the file ----


@pytest.fixture
def written(planned, tmp_path):
    """A model, its plan, and the plan's JSON as people see it."""
    model, found = planned(axes=ALL_AXES, keep=0.5)
    (tmp_path / "plan.json").write_bytes(found.dump())
    return model, found, tmp_path / "plan.json"


def test_round_trip(written):
    _, found, path = written
    again = Plan.load(path)
    assert again == found and again.dump() == found.dump()


def test_round_trip_with_a_hidden_cut(planned, tmp_path):
    _, found = planned(axes=("hidden",), keep=0.7)
    assert found.hidden is not None and len(found.hidden) == found.after.hidden < 64
    (tmp_path / "plan.json").write_bytes(found.dump())
    assert Plan.load(tmp_path / "plan.json") == found


def test_one_line_per_list_of_indices(written):
    _, found, path = written
    lines = [line.strip() for line in path.read_text().splitlines() if "[" in line and "," in line.split("[")[1]]
    expected = [f'"ffn": {layer.ffn},' for layer in found.layers]
    assert [line for line in lines if line.startswith('"ffn"')] == expected
    assert sum(line.strip().startswith('"kv_head": [') for line in path.read_text().splitlines()) == len(found.layers)


def edited(written, change) -> Plan:
    """The plan after ``change(document)`` in its file."""
    _, _, path = written
    document = json.loads(path.read_text())
    change(document)
    path.write_text(json.dumps(document))
    return Plan.load(path)


def several_faults(document):
    layers = document["layers"]
    layers[0]["ffn"][-1] = 128
    layers[1]["ffn"][0] = layers[1]["ffn"][1]
    layers[2]["ffn"] = layers[2]["kv_head"] = []
    layers.append({"source": 9, "ffn": [0], "kv_head": [0]})
    document["hidden"] = [-1, 3]


def test_an_edited_plan_lists_all_its_faults(written):
    found = edited(written, several_faults).problems(Checkpoint(written[0]).arch)
    text = "; ".join(found)
    for words in (
        "layers keeps index 9, there are 4",
        "layer 0: ffn keeps index 128, there are 128",
        "ffn is not in ascending order without repeats",
        "layer 3 keeps nothing: leave it out",
        "hidden keeps index -1",
    ):
        assert words in text
    assert len(found) == 5


FAULTS = {
    "no layer": (lambda d: d.update(layers=[]), "no layer is kept"),
    "layers out of order": (lambda d: d["layers"].reverse(), "layers is not in ascending order"),
    "a layer twice": (lambda d: d["layers"].append(d["layers"][-1]), "layers is not in ascending order"),
    "a negative index": (lambda d: d["layers"][0]["ffn"].__setitem__(0, -1), "ffn keeps index -1"),
    "a layer without units": (lambda d: d["layers"][0].update(ffn=[], kv_head=[]), "layer 0 keeps nothing"),
    "no attention at all": (lambda d: [x.update(kv_head=[]) for x in d["layers"]], "layers have no attention"),
    "no hidden channel": (lambda d: d.update(hidden=[]), "hidden keeps nothing"),
    "seven bits": (lambda d: d.update(bits=7, group_size=64), "7 bits"),
    "bits without a group": (lambda d: d.update(bits=4, group_size=None), "4 bits"),
    "an odd group": (lambda d: d.update(bits=4, group_size=33), "33"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_every_fault_is_said(written, tmp_path, name):
    change, words = FAULTS[name]
    broken = edited(written, change)
    assert any(words in p for p in broken.problems(Checkpoint(written[0]).arch))
    with pytest.raises(PareError, match="does not suit"):
        prune(written[0], broken, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_hidden_cut_of_gemma_is_a_fault(planned):
    model, found = planned("gemma3_text", keep=1.0)
    broken = Plan.model_validate({**found.model_dump(), "hidden": list(range(60))})
    assert broken.problems(Checkpoint(model).arch) == [
        "the hidden size of gemma3_text cannot be cut: its embedding is scaled by the root of the hidden size"
    ]


def test_a_cut_that_changes_a_kind_is_a_fault(planned):
    model, found = planned("gemma3_text", keep=1.0)
    broken = Plan.model_validate({**found.model_dump(), "layers": found.model_dump()["layers"][:4:3]})
    assert "attention kind" in broken.problems(Checkpoint(model).arch)[0]


UNREADABLE = {
    "an unknown key": (lambda d: d.update(comment="mine"), "comment"),
    "an unknown key of a layer": (lambda d: d["layers"][0].update(experts=[0]), "experts"),
    "another schema": (lambda d: d.update(schema_version=2), "schema_version 2"),
    "text for an index": (lambda d: d["layers"][0]["ffn"].__setitem__(0, "x"), "layers.0.ffn.0"),
    "a missing key": (lambda d: d.pop("source"), "source"),
    "no layers": (lambda d: d.pop("layers"), "layers"),
}


@pytest.mark.parametrize("name", UNREADABLE)
def test_an_unreadable_plan_is_named(written, name):
    change, words = UNREADABLE[name]
    with pytest.raises(PareError) as caught:
        edited(written, change)
    assert "plan.json" in str(caught.value) and words in str(caught.value)


@pytest.mark.parametrize("text", ["", "{", "[]", "\xff"])
def test_a_plan_that_is_no_json(tmp_path, text):
    (tmp_path / "plan.json").write_text(text, "latin-1")
    with pytest.raises(PareError, match=r"plan\.json"):
        Plan.load(tmp_path / "plan.json")
    with pytest.raises(PareError, match=r"cannot read plan .*missing\.json"):
        Plan.load(tmp_path / "missing.json")


# ---- prediction is measurement ----


def tensor_bytes(directory: Path) -> int:
    """File sizes without the safetensors headers."""
    total = 0
    for file in directory.glob("model*.safetensors"):
        with file.open("rb") as opened:
            total += file.stat().st_size - 8 - struct.unpack("<Q", opened.read(8))[0]
    return total


def count_parameters(directory: Path) -> int:
    """Of the model as mlx-lm loads it, every packed matrix opened."""
    model = lm.dequantized(lm.load(directory))
    return sum(array.size for _, array in tree_flatten(model.parameters()))


STORED = [(None, {}), ((4, 32), {}), (None, {"bits": 4, "group_size": 32}), ((4, 32), {"bits": 8, "group_size": 64})]


@pytest.mark.parametrize(("packed", "options"), STORED, ids=str)
@pytest.mark.parametrize("family", sorted(pico.FAMILIES))
def test_predicted_is_measured(planned, tmp_path, family, packed, options):
    model, found = planned(family, packed, axes=ALL_AXES, keep=0.55, **options)
    assert found.before.bytes == tensor_bytes(model)
    assert found.before.parameters == count_parameters(model)
    prune(model, found, tmp_path / "out")
    assert found.after.bytes == tensor_bytes(tmp_path / "out") == Checkpoint(tmp_path / "out").nbytes()
    assert found.after.parameters == count_parameters(tmp_path / "out")
    packing = Checkpoint(tmp_path / "out").quantization
    expected = (options["bits"], options["group_size"]) if options else packed
    assert (packing and (packing.bits, packing.group_size)) == expected
    left = Checkpoint(tmp_path / "out").arch
    shape_on_disk = (len(left.layers), left.uniform("ffn"), left.uniform("kv_head"))
    assert shape_on_disk == (found.after.layers, found.after.ffn, found.after.kv_heads)


@pytest.mark.parametrize("packed", [None, (4, 32)])
@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_predicted_is_measured_for_a_hidden_cut(planned, tmp_path, family, packed):
    model, found = planned(family, packed, axes=("ffn", "hidden"), keep=0.55)
    prune(model, found, tmp_path / "out")
    assert found.after.bytes == tensor_bytes(tmp_path / "out")
    assert found.after.parameters == count_parameters(tmp_path / "out")


# ---- the same shape otherwise ----


@pytest.mark.parametrize("options", [{"keep": 0.5}, {"keep": 0.25, "protect": False}], ids=str)
@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
def test_redraw_keeps_the_sizes(planned, tmp_path, family, options):
    model, found = planned(family, axes=ALL_AXES, **options)
    other = redraw(model, scores_for(model, tmp_path / "other.safetensors", seed=9), found)
    assert other.problems(Checkpoint(model).arch) == []
    assert (other.after, other.source) == (found.after, found.source) and other.layers != found.layers
    assert [len(layer.ffn) for layer in other.layers] == [len(layer.ffn) for layer in found.layers]


def test_redraw_of_a_plan_that_protected_nothing(planned, tmp_path):
    model, found = planned(axes=("layer",), keep=0.25, protect=False)
    other = redraw(model, scores_for(model, tmp_path / "other.safetensors", seed=9), found)
    assert len(found.layers) == len(other.layers) == 1


def test_redraw_of_a_hidden_cut(planned, tmp_path):
    model, found = planned(axes=("hidden",), keep=0.6)
    other = redraw(model, scores_for(model, tmp_path / "other.safetensors", seed=9), found)
    assert len(other.hidden) == len(found.hidden) and other.hidden != found.hidden


@pytest.mark.parametrize("fraction", [0.15, 0.2, 0.3, 0.5, 1.0])
def test_whole_is_the_widest_packing_that_fits(planned, tmp_path, fraction):
    model, found = planned(keep=0.5)
    limit = int(fraction * found.before.bytes)
    uncut = whole(model, found, limit)
    sizes = {}
    for bits in (2, 3, 4, 5, 6, 8):
        directory = tmp_path / str(bits)
        pico.quantize(model, directory, bits, 64)
        sizes[bits] = tensor_bytes(directory)
    fitting = [bits for bits, size in sizes.items() if size <= limit]
    assert (uncut is None) is (not fitting)
    if fitting:
        assert uncut.bits == max(fitting) and uncut.after.bytes == sizes[uncut.bits]
        assert uncut.after.parameters == found.before.parameters
