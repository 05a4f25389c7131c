"""What would make it fit: every change is applied for real, the smallest cut is held against `plan` and mlx-lm."""

from __future__ import annotations

import contextlib
import json
import re
import shlex
import time
from dataclasses import replace
from itertools import pairwise, product
from types import SimpleNamespace

import click
import mlx.core as mx
import pico
import pytest
import typer

from mlx_pare.arch import describe
from mlx_pare.base.errors import PareError, Refused, UsageError
from mlx_pare.base.units import parse_amount
from mlx_pare.capacity import advice, macs, memory, planner
from mlx_pare.capacity.advice import Case, changes, smallest_cut
from mlx_pare.capacity.form import Form
from mlx_pare.capacity.memory import Needs, Use
from mlx_pare.capacity.subject import Subject, open_subject
from mlx_pare.cli import app as shared
from mlx_pare.cli.app import app
from mlx_pare.model import footprint
from mlx_pare.model.checkpoint import Checkpoint
from mlx_pare.options.settings import Settings
from mlx_pare.pipeline import export_step
from mlx_pare.pipeline.steps import plan_options
from mlx_pare.planning.uniform import shape
from mlx_pare.pruning import reach
from mlx_pare.sources import catalogue
from mlx_pare.tensors.packing import Packing

GIB = 2**30
Q4 = Form(Packing(4, 64))
AXES = [("ffn",), ("kv_head",), ("layer",), ("ffn", "kv_head"), ("ffn", "kv_head", "layer")]


def case_of(model, mac="m4-24gb", form=None, budget=None, **use) -> Case:
    """As `fit` opens it."""
    subject = open_subject(str(model), form or Form())
    use = Use(**{"runtime": "llama.cpp" if subject.llama else "mlx", **use})
    mac = macs.find(mac) if isinstance(mac, str) else mac
    return Case(subject, Needs(subject.arch, use, subject.value_bytes), mac, budget or macs.Budget())


def tight(case: Case, missing: int, mac: macs.Mac | None = None) -> Case:
    """The same on a Mac of which the GPU gets so many bytes less than are needed."""
    total = case.row()["total_bytes"]
    return replace(case, mac=replace(mac or case.mac, working_set_bytes=total - missing))


# ---- every change, applied for real ----


def applied(case: Case, change: advice.Change) -> dict:
    """The row of what ``how`` names, recomputed from its words."""
    needs, weights, budget = case.needs, case.subject.weights, case.budget
    words = change.how.replace("=", " ").split()
    given = {w: words[i + 1] for i, w in enumerate(words[:-1]) if w.startswith("-")}
    if "iogpu.wired_limit_mb" in words:
        budget = replace(budget, limit_bytes=int(words[-1]) << 20)
    if "prompts 512 tokens" in change.what:
        needs = replace(needs, use=replace(needs.use, prefill_step=512))
    if "KV cache with" in change.what:
        needs = replace(
            needs, use=replace(needs.use, kv_bits=int(re.search("with ([0-9]) bits(?:$|,)", change.what)[1]))
        )
    numbers = {"--prefill-step-size": "prefill_step", "--context": "context", "-c": "context", "--batch-size": "batch",
               "--max-seq-length": "context", "--kv-bits": "kv_bits"}  # fmt: skip
    for flag, name in numbers.items():
        if flag in given and change.kind != "cut":
            needs = replace(needs, use=replace(needs.use, **{name: int(given[flag])}))
    if "--grad-checkpoint" in words:
        needs = needs.checkpointed()
    if change.kind == "bits":
        form = Form(gguf=words[-1]) if words[0] == "llama-quantize" else Form.named(
            given["--q-bits"], int(given.get("--q-group-size", 64)))  # fmt: skip
        weights = open_subject(case.subject.name, form).weights
    return planner.assess(needs, weights, case.mac, budget)


SINGLE = ("limit", "prefill_step", "kv_bits", "context", "batch", "grad_checkpoint", "bits")
CASES = [
    ("qwen3-32b", {}, None), ("qwen3-14b", {"context": 131072}, "m4-16gb"),
    ("gemma-3-12b", {"context": 65536}, "m4-16gb"),
    ("llama-3.1-8b", {"context": 100000, "batch": 2}, "m4-16gb"), ("qwen3-30b-a3b", {}, "m4-16gb"),
    ("qwen3.5-9b", {"context": 200000}, "m4-16gb"), ("gpt-oss-20b", {"context": 60000}, "m4-16gb"),
    ("llama-3.1-8b", {"train": "lora", "context": 4096, "batch": 4}, "m4-16gb"),
    ("llama-3.2-1b", {"train": "full", "context": 2048, "batch": 4}, "m4-24gb"),
    ("deepseek-v2-lite", {"context": 32768}, "m4-16gb"),
]  # fmt: skip


@pytest.mark.parametrize("form", [None, Form(gguf="q6_k"), Form(Packing(8, 32)), Form(floats=2)], ids=str)
@pytest.mark.parametrize("model, use, mac", CASES, ids=lambda v: v if isinstance(v, str) else "")
def test_every_change_makes_it_fit(model, use, mac, form):
    if "train" in use:
        form = Form(floats=2) if use["train"] == "full" or form is None or form.gguf else form
    case = case_of(model, mac or "m4-24gb", form, **use)
    found = [] if case.row()["fits"] else changes(case)
    for change in found:
        assert change.row["fits"] and change.row["headroom_bytes"] >= 0
        if change.kind in SINGLE:
            again = applied(case, change)
            assert again["fits"] and again["total_bytes"] == change.row["total_bytes"], change
        assert json.dumps(change.as_dict(), allow_nan=False)
    losses = [float("inf") if c.loss is None else c.loss for c in found]
    assert losses == sorted(losses) and all(loss >= 0 for loss in losses)
    for one, two in pairwise(found):
        assert one.loss != two.loss or one.row["headroom_bytes"] >= two.row["headroom_bytes"]
    assert len({c.what for c in found}) == len(found)


# ---- nothing that costs nothing is missing ----


def kinds(case: Case) -> list[str]:
    assert not case.row()["fits"]
    return [change.kind for change in changes(case)]


def test_a_little_less_than_the_wired_limit():
    """24 GiB with macOS's share, and what may be wired: up to 18 GiB."""
    case = case_of("llama-3.1-8b", form=Q4)
    for missing in (1, 10**9):
        short = tight(case, missing)
        found = {c.kind: c for c in changes(short) if c.loss == 0}
        assert found["limit"].how.startswith("sudo sysctl iogpu.wired_limit_mb=")
    most = macs.Budget().most(case.mac)
    for reserve in (0, 3 * GIB):
        budget = macs.Budget(reserve_bytes=reserve)
        total = case.row()["total_bytes"]
        for spare in (2 << 20, -(2 << 20)):  # one side of what macOS can live beside, and the other
            heavy = planner.Weights(most - reserve - spare - total + case.subject.weights.nbytes, 10**9)
            found = changes(replace(case, budget=budget, subject=replace(case.subject, weights=heavy)))
            assert ("limit" in [c.kind for c in found]) == (spare > 0), (reserve, spare)
    assert "limit" not in kinds(tight(replace(case, budget=macs.Budget(limit_bytes=4 * GIB)), 0))


def test_a_little_less_than_a_smaller_prefill_step_saves():
    """128 heads of 256 before M5: scores of a chunk are what is too much."""
    case = case_of("gemma-3-12b", form=Q4, context=32768)
    saved = [
        case.row()["total_bytes"] - case.row(needs=case.using(prefill_step=s))["total_bytes"] for s in advice.STEPS
    ]
    assert sorted(saved) == saved and saved[0] > 10**8
    for step, bytes_saved in zip(advice.STEPS, saved, strict=True):
        found = {c.kind: c for c in changes(tight(case, bytes_saved))}
        assert found["prefill_step"].how.endswith(f"--prefill-step-size {step}") and found["prefill_step"].loss == 0
    assert "prefill_step" not in kinds(tight(case, saved[-1] + 1))


@pytest.mark.parametrize("form, runtime", [(Q4, "mlx"), (Form(gguf="q4_k_m"), "llama.cpp")])
def test_a_little_less_than_a_quantized_cache_saves(form, runtime):
    case = case_of("llama-3.1-8b", form=form, context=65536)
    rows = [case.row(needs=case.using(kv_bits=b, prefill_step=s)) for b, s in product((8, 4), (2048, *advice.STEPS))]
    least = min(row["total_bytes"] for row in rows)
    saved = case.row()["total_bytes"] - least
    assert saved > 10**9
    for missing in (1, saved // 3, saved):
        assert "kv_bits" in kinds(tight(case, missing))
    assert "kv_bits" not in kinds(tight(case, saved + 1))


def test_a_little_less_than_training_can_save():
    case = case_of("llama-3.2-1b", form=Q4, train="lora", context=2048, batch=4)
    total = case.row()["total_bytes"]
    one = case.row(needs=case.using(batch=1))["total_bytes"]
    both = case.row(needs=case.using(batch=1).checkpointed())["total_bytes"]
    assert both < one < total
    assert {"batch", "grad_checkpoint"} <= set(kinds(tight(case, total - one)))
    smallest = [c for c in changes(tight(case, total - both)) if c.loss == 0 and c.kind != "limit"]
    assert [c.how for c in smallest] == ["mlx_lm.lora --batch-size 1 --grad-checkpoint"]


def test_fewer_bits_are_fewer():
    """Never more than it has, whatever its scales cost; the most that fit."""
    for form in (
        Q4,
        Form(Packing(4, 32)),
        Form.named("mxfp4"),
        Form(Packing(8, 64)),
        Form(gguf="q4_k_m"),
        Form(floats=2),
    ):
        case = case_of("qwen3-4b", form=form, context=2048)
        now = {"q4_k_m": 4}.get(form.gguf) or (form.packing.bits if form.packing else 16)
        for missing in (1, 3 * 10**8, 10**9, 4 * 10**9):
            for change in changes(tight(case, missing)):
                if change.kind == "bits":
                    bits = int(re.search(r"q([0-9])_|([0-9]) bits", change.what)[0].strip("q_ bits"))
                    assert bits < now and (change.loss > 0 or bits == 8)
                    assert form.gguf is None or "GGUF" in change.what


def test_a_gguf_is_quantized_by_llama_cpp_also_in_mlx_form():
    case = tight(case_of("qwen3-4b", form=Form(floats=2), runtime="llama.cpp"), 10**9)
    assert any(c.how.startswith("llama-quantize") for c in changes(case))
    assert not any("mlx_lm" in c.how for c in changes(case) if c.kind != "cut")


# ---- the smallest cut ----


def small_mac(nbytes: int) -> macs.Mac:
    """A Mac of which a pico model is too much."""
    return replace(macs.find("m4-24gb"), working_set_bytes=nbytes)


@pytest.fixture
def on_small_mac(monkeypatch):
    """``on_small_mac(bytes)``: m4-24gb, as everybody finds it, has so little for the GPU."""

    def set_to(nbytes: int) -> macs.Mac:
        mac = small_mac(nbytes)
        monkeypatch.setattr(macs, "find", lambda name: mac)
        monkeypatch.setattr(macs, "every", lambda: [mac])
        monkeypatch.setattr(memory, "ACTIVATIONS", {k: (1e5, w) for k, (_, w) in memory.ACTIVATIONS.items()})
        return mac

    monkeypatch.setattr(memory, "ACTIVATIONS", {k: (1e5, w) for k, (_, w) in memory.ACTIVATIONS.items()})
    return set_to


CUTS = [("llama", None, mx.float32), ("llama", None, mx.bfloat16), ("llama", (4, 32), mx.float32),
        ("qwen2", None, mx.float32), ("qwen2", (4, 32), mx.bfloat16), ("qwen3", (8, 64), mx.bfloat16),
        ("gemma3_text", None, mx.float32), ("gemma3_text", (4, 32), mx.float32)]  # fmt: skip


ASKED = [*((*cut, None) for cut in CUTS), *((*cut, 8) for cut in CUTS[1::3])]


@pytest.mark.parametrize("family, packed, dtype, bits", ASKED, ids=lambda v: str(v).rpartition(".")[2])
def test_the_smallest_cut_is_that_of_plan(pico_models, on_small_mac, family, packed, dtype, bits):
    model, context = pico_models(family, packed, dtype=dtype), 300
    checkpoint, form = Checkpoint(model), Form(Packing(bits, 32)) if bits else Form()
    whole = case_of(model, small_mac(0), form, context=context).row()["total_bytes"]
    cuts = 0
    for axes, share in product(AXES, (0.97, 0.8, 0.6)):
        mac = on_small_mac(int(whole * share))
        case = case_of(model, mac, form, context=context)
        settings = Settings(mac="m4-24gb", context=context, axes=axes, bits=bits, group_size=32)
        try:
            made = shape(checkpoint, plan_options(settings))
        except Refused:
            assert smallest_cut(case, axes) is None, axes
            continue
        found, after, cuts = smallest_cut(case, axes), made.after, cuts + 1
        assert found.row["weights_bytes"] == after.bytes and found.row["fits"]
        named = dict(re.findall(r"(ffn|kv_head|layer) ([0-9]+) of", found.what))
        counts = {"ffn": after.ffn, "kv_head": after.kv_heads, "layer": after.layers}
        assert {axis: int(n) for axis, n in named.items()} == {axis: counts[axis] for axis in axes}
        asked = parsed(found.how)
        assert (asked["mac"], asked["context"], asked["axes"]) == (mac.name, context, ",".join(axes))
        assert (asked["bits"], asked["group_size"]) == ((bits, 32) if bits else (None, 64))
        one_more(case, axes, made.level)
    assert cuts >= 6


def one_more(case: Case, axes, level: reach.Level) -> None:
    """One step more on the finest axis does not fit."""
    arch, stored = case.needs.arch, case.subject.packing
    protected = reach.protected_layers(arch)
    space = reach.space(arch, axes, reach.unit(arch, stored.group_size if stored else None), protected)
    axis = space.finest
    at = list(space.choices[axis]).index(getattr(level, axis))
    for count in space.choices[axis][at + 1 : at + 2]:
        larger = reach.Level(**{**level.__dict__, axis: count})
        smaller, nbytes = advice._after(case, reach.skeleton(arch, larger, protected), bool(stored))
        assert not case.row(needs=replace(case.needs, arch=smaller), weights=planner.weights_of(smaller, nbytes))[
            "fits"
        ]


@pytest.mark.parametrize("use", [{"batch": 2}, {"kv_bits": 8, "context": 5200}, {"prefill_step": 512}], ids=str)
def test_in_another_use_the_bytes_are_named(pico_models, on_small_mac, use):
    """`plan --for` knows the usual use only: the size it must have is said instead, and planning by it fits."""
    model = pico_models("llama-untied", num_attention_heads=2, num_key_value_heads=1, head_dim=64)
    whole = case_of(model, small_mac(0), **{"context": 300, **use})
    mac = on_small_mac(whole.row()["total_bytes"] - whole.subject.weights.nbytes // 10)
    case = replace(whole, mac=mac)
    found = smallest_cut(case, ("ffn", "layer"))
    asked = parsed(found.how)
    size = parse_amount(asked["target_size"], "bytes")
    assert size == found.row["weights_bytes"] and asked["mac"] is None
    settings = Settings(target_size=asked["target_size"], axes=("ffn", "layer"))
    made = shape(Checkpoint(model), plan_options(settings))
    assert made.after.bytes == size


def test_forms_the_surgeon_does_not_write(pico_models, on_small_mac):
    """GGUF and mxfp4 are made from the cut model: the cut is counted in that form, and named by parameters."""
    model = pico_models("llama", intermediate_size=256)
    for form, then in (
        (Form(gguf="q8_0"), "llama-quantize"),
        (Form.named("mxfp4"), "mlx_lm.convert"),
        (Form(floats=2), ""),
    ):
        whole = case_of(model, small_mac(0), form, context=300)
        mac = on_small_mac(int(whole.row()["total_bytes"] - 0.2 * whole.subject.weights.nbytes))
        found = smallest_cut(replace(whole, mac=mac), ("ffn",))
        first, _, second = found.how.partition(" && ")
        asked = parsed(first)
        assert second.startswith(then) and found.row["weights_bytes"] < 0.81 * whole.subject.weights.nbytes
        settings = Settings(target_params=asked["target_params"], axes=("ffn",))
        made = shape(Checkpoint(model), plan_options(settings))
        assert made.after.parameters == parse_amount(asked["target_params"], "parameters")


def test_a_directory_its_config_and_its_hub_listing_lead_to_the_same_cut(pico_models, on_small_mac):
    model = pico_models("qwen3", (4, 32), dtype=mx.bfloat16)
    whole = case_of(model, small_mac(0), context=300)
    mac = on_small_mac(int(whole.row()["total_bytes"] * 0.85))
    cuts = [smallest_cut(case_of(path, mac, context=300)) for path in (model, model / "config.json")]
    assert cuts[0].what == cuts[1].what and cuts[0].row["weights_bytes"] == cuts[1].row["weights_bytes"]


# ---- families that cannot be cut ----

COUNTS = {"expert": ("num_experts", "num_local_experts", "n_routed_experts"), "expert_ffn": ("moe_intermediate_size",),
          "ffn": ("intermediate_size",), "layer": ("num_hidden_layers",)}  # fmt: skip
PLANNED = ["qwen3-30b-a3b", "mixtral-8x7b", "gpt-oss-20b", "deepseek-v2-lite", "qwen3.5-35b-a3b", "aya-expanse-8b",
           "gemma-4-26b-a4b", "lfm2-8b-a1b", "apertus-8b"]  # fmt: skip


@pytest.mark.parametrize("name", PLANNED)
def test_cuts_that_are_only_counted(name):
    """Against the architecture of the config with the smaller number, where the config has such a number."""
    entry = catalogue.find(name)
    case = case_of(name, form=Form(floats=2), context=4096)
    checked = 0
    for share in (0.9, 0.6, 0.35):
        short = tight(case, int(case.subject.weights.nbytes * (1 - share)))
        for change in (c for c in changes(short) if c.kind == "cut" and ";" not in c.what):
            axis, count, whole = re.search(r": (\w+) ([0-9]+) of ([0-9]+)", change.what).groups()
            active = max((m.sizes.get("active", 1) for m in case.needs.arch.layers), default=1)
            assert int(count) < int(whole) and (axis != "expert" or int(count) >= active)
            inner = dict(entry.config.get("text_config", entry.config))
            key = next((k for k in COUNTS[axis] if inner.get(k) == int(whole)), None)
            if key is None or (axis == "layer" and len({m.kind for m in case.needs.arch.layers}) > 1):
                continue  # which of several kinds of layers go is ours to choose
            smaller = {**inner, key: int(count)}
            with contextlib.suppress(PareError):
                config = {**entry.config, "text_config": smaller} if "text_config" in entry.config else smaller
                arch = describe(config)
                assert change.row["weights_bytes"] == footprint.weight_bytes(arch, footprint.dense(2)), (axis, count)
                checked += 1
    assert checked >= 2


WAYS = [(form, context) for form in (Form(), Form(gguf="q4_k_m")) for context in (4096, 32768, 131072)]


@pytest.mark.parametrize("way", range(len(WAYS)))
def test_all_of_the_catalogue_gets_advice(way):
    """Every entry in one of the ways."""
    slowest, (form, context) = 0.0, WAYS[way]
    for entry in catalogue.entries()[way :: len(WAYS)]:
        for mac in ("m1-8gb", "m4-max-64gb"):
            begun = time.process_time()
            case = case_of(entry.name, mac, form, context=context)
            if not case.row()["fits"]:
                for change in changes(case):
                    assert change.row["fits"] and change.what and change.how
            slowest = max(slowest, time.process_time() - begun)
    assert slowest < 0.5


# ---- commands that exist ----


def parsed(how: str) -> dict:
    """The parameters of a mlx-pare command as the command line itself reads them."""
    program, command, *arguments = shlex.split(how)
    assert program == "mlx-pare"
    group = typer.main.get_command(app)
    with group.commands[command].make_context(command, arguments) as context:
        return context.params


def options_of(module: str) -> set[str]:
    """The options that a program of mlx-lm has."""
    import importlib

    found = importlib.import_module(f"mlx_lm.{module}")
    make = next(
        getattr(found, n) for n in ("setup_arg_parser", "build_parser", "configure_parser") if hasattr(found, n)
    )
    return {o for action in make()._actions for o in action.option_strings}


def test_commands_exist():
    known = {m: options_of(m) for m in ("generate", "convert", "lora")}
    seen = set()
    for model, use, mac in CASES:
        for form in (None, Form(gguf="q6_k"), Form.named("mxfp8")):
            form = Form(floats=2) if use.get("train") == "full" else None if "train" in use else form
            case = case_of(model, mac or "m4-24gb", form, **use)
            for change in [] if case.row()["fits"] else changes(case):
                for how in change.how.split(" && "):
                    program, *arguments = shlex.split(how)
                    seen.add(program)
                    if program == "mlx-pare" and arguments[0] != "cannot":
                        settings = {
                            k: v for k, v in parsed(how).items() if k in ("mac", "target_size", "target_params")
                        }
                        assert len([v for v in settings.values() if v is not None]) == 1
                        assert settings["mac"] is None or macs.find(settings["mac"]) == case.mac
                    if program.startswith("mlx_lm."):
                        flags = {a for a in arguments if a.startswith("-")}
                        assert flags <= known[program.removeprefix("mlx_lm.")], how
    assert {"mlx-pare", "mlx_lm.generate", "mlx_lm.convert", "mlx_lm.lora", "llama-quantize", "llama-cli"} <= seen
    assert "--context" in {o for p in typer.main.get_command(app).commands["fit"].params for o in p.opts}
    assert isinstance(shared.app, typer.Typer) and click


# ---- what must never be worse ----

VERDICTS = {"over": 0, "tight": 1, "fits": 2}
MODELS = ["qwen3-4b", "gemma-3-12b", "qwen3.5-9b", "qwen3-30b-a3b", "deepseek-v2-lite", "gpt-oss-20b", "lfm2-8b-a1b",
          "olmo-3-7b", "gemma-4-e4b", "gemma-2-9b"]  # fmt: skip
USES = {
    "plain": {}, "batch": {"batch": 4}, "small step": {"prefill_step": 512}, "llama.cpp": {"runtime": "llama.cpp"},
    "llama.cpp without flash": {"runtime": "llama.cpp", "flash": False}, "8 bits": {"kv_bits": 8},
    "4 bits": {"kv_bits": 4},
    "4 bits of four": {"kv_bits": 4, "batch": 4}, "llama.cpp 4 bits": {"runtime": "llama.cpp", "kv_bits": 4},
    "lora": {"train": "lora"}, "full": {"train": "full", "batch": 2},
}  # fmt: skip
CONTEXTS = [1, 255, 256, 257, 1000, 1023, 1024, 1025, 2047, 2049, 4864, 4999, 5000, 5001, 5120, 6144, 6145, 8192, 20000,
            32768, 100_000, 131_072, 262_144]  # fmt: skip


@pytest.fixture(scope="module")
def subjects() -> dict[str, Subject]:
    return {name: open_subject(name, Q4) for name in MODELS}


def needs_of(subject: Subject, **use) -> Needs | None:
    with contextlib.suppress(UsageError):  # a cache that cannot be quantized
        return Needs(subject.arch, Use(**use))
    return None


@pytest.mark.parametrize("use", USES.values(), ids=USES)
def test_memory_grows_with_the_context(subjects, use):
    for name, subject in subjects.items():
        needs = needs_of(subject, **use)
        for generation in (4, 5) if needs else ():
            peaks = [needs.peak(context, generation) for context in CONTEXTS]
            assert peaks == sorted(peaks), (name, generation)


@pytest.mark.parametrize("use", USES.values(), ids=USES)
def test_max_context_is_the_last_that_fits(subjects, use):
    for name, subject in subjects.items():
        base = needs_of(subject, **use)
        for mac in map(macs.find, ("m1-8gb", "m4-24gb", "m5-max-128gb")) if base else ():
            longest, limit = planner.assess(base, subject.weights, mac)["max_context"], planner.longest(subject.arch)

            def row(context, base=base, mac=mac, subject=subject):
                return planner.assess(replace(base, use=replace(base.use, context=context)), subject.weights, mac)

            assert 0 <= longest <= limit and (longest % 256 == 0 or longest == limit), name
            assert not longest or row(longest)["fits"], name
            assert longest >= limit or not row(min(longest + 256, limit))["fits"], name
            for context in (1, 4999, 5000, 8192):
                found = row(context)
                assert found["total_bytes"] == sum(found[f"{k}_bytes"] for k in ("weights", "kv", "activation"))
                if context <= limit:  # whole steps of 256
                    assert found["fits"] >= (longest >= context) and (not found["fits"] or longest > context - 256)


def test_a_model_made_for_an_odd_length():
    """Its last step is not a whole one: what fits at the limit is not refused for what would be behind it."""
    subject = open_subject("qwen3-4b", Q4)
    subject = replace(
        subject, arch=replace(subject.arch, config={**subject.arch.config, "max_position_embeddings": 5001})
    )
    needs = Needs(subject.arch, Use(train="lora", batch=1))
    room = needs.peak(5001, 4)
    assert planner.max_context(needs, room, macs.find("m4-24gb")) == 5001
    assert planner.max_context(needs, room - 1, macs.find("m4-24gb")) == 4864


def test_more_memory_and_fewer_bits_are_never_worse(subjects):
    sizes = [f"{gb}gb" for gb in (8, 16, 18, 24, 32, 36, 48, 64, 96, 128, 192, 256, 512)]
    for macos, (name, subject) in product((15, 26), subjects.items()):
        needs, budget = Needs(subject.arch), macs.Budget(macos)
        verdicts = [VERDICTS[planner.assess(needs, subject.weights, macs.find(m), budget)["verdict"]] for m in sizes]
        assert verdicts == sorted(verdicts), name
    for name in MODELS:
        for forms in (
            [Form.named(b) for b in "865432"],
            [Form(gguf=k) for k in ("q8_0", "q6_k", "q5_k_m", "q4_k_m", "q2_k")],
        ):
            case = case_of(name, "m4-16gb", forms[0])
            rows = [planner.assess(case.needs, open_subject(name, form).weights, case.mac) for form in forms]
            assert [r["total_bytes"] for r in rows] == sorted((r["total_bytes"] for r in rows), reverse=True)
            assert [r["max_context"] for r in rows] == sorted(r["max_context"] for r in rows)
    for row in planner.fit(Needs(subject.arch), subject.weights, macs.every()):
        assert row["headroom_gb"] == round(row["headroom_bytes"] / 1e9, 3)
        assert row["headroom_gib"] == round(row["headroom_bytes"] / GIB, 3)
        assert (row["headroom_bytes"] >= 0) == row["fits"]


def test_llama_cpp_keeps_its_cache_in_16_bits(pico_models):
    model = pico_models("llama")
    wide = [Needs(open_subject(str(model), Form()).arch, Use(512, runtime=r), 4).kv(512) for r in ("mlx", "llama.cpp")]
    assert wide[0] == 2 * wide[1]


def test_what_the_steps_of_a_run_say_agrees(pico_models):
    """fits_of, which a run writes, and fit."""
    model = pico_models("gemma3_text")
    rows = export_step.fits_of(model, 10**6, model, Settings(context=300))["rows"]
    case = case_of(model, context=300)
    assert next(r for r in rows if r["mac"] == case.mac.name)["total_bytes"] == case.row()["total_bytes"]
    assert SimpleNamespace(**case.row()).fits and pico.FAMILIES
