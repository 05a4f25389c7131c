"""What people see of inspect, evaluate, bench and reports: sentences and tables, no values of Python."""

from __future__ import annotations

import json
import re
import shutil

import pytest

from mlx_pare.base import machine, markdown
from mlx_pare.base.units import readable
from mlx_pare.evaluation import resident
from mlx_pare.exporting.ollama import Modelfile
from mlx_pare.model.checkpoint import Checkpoint
from mlx_pare.pruning.plan_file import Plan
from mlx_pare.reporting import report as reporting
from mlx_pare.sources.catalogue import entries
from mlx_pare.store.manifest import Manifest
from mlx_pare.text.splits import DEMO

PYTHON = re.compile(r"\bNone\b|\bTrue\b|\bFalse\b|\[['\"]|['\"]\]|why_not|\{['\"]|why not:")


def inspected(pare, model) -> tuple[str, dict]:
    seen, told = pare("inspect", model), pare("inspect", model, "--json")
    assert seen.code == told.code == 0, seen.err
    return seen.out, told.document


# ---- inspect ----


@pytest.mark.parametrize("name", [entry.name for entry in entries()])
def test_inspect_has_no_values_of_python(pare, name):
    seen, told = inspected(pare, name)
    assert not PYTHON.search(seen), PYTHON.search(seen)
    assert not re.search(r"^ +\S.*\S {2,}$", seen, re.M) and "leaves as" not in seen
    groups = told["layer_groups"]
    assert sum(group["layers"] for group in groups) == told["layers"]
    assert {group["kind"]: group["layers"] for group in groups} == told["layer_kinds"]


def test_inspect_shows_a_line_per_kind_of_layer(pare, pico_models):
    seen, told = inspected(pare, pico_models("gemma3_text"))
    rows = [line.split() for line in seen.split("\n") if re.search(r"(sliding|full) attention", line)]
    assert rows == [["sliding", "attention", "4", "4", "2", "32", "128", "8"],
                    ["full", "attention", "2", "4", "2", "32", "128", "-"]]  # fmt: skip
    names = ("layers", "q_heads", "kv_heads", "head_dim", "ffn", "window")
    assert [[str(group[n]) for n in names] for group in told["layer_groups"]] == [
        ["4", "4", "2", "32", "128", "8"], ["2", "4", "2", "32", "128", "None"],
    ]  # fmt: skip


def test_inspect_says_what_a_token_visits(pare):
    """Every token is multiplied with 8 of 128 experts: 3.3 billion parameters with both embeddings, as Qwen says."""
    seen, told = inspected(pare, "qwen3-30b-a3b")
    assert (told["experts"], told["experts_per_token"]) == (128, 8) and "8 experts" in seen
    idle = told["parameters"]["ffn"] - 48 * 2048 * 128  # but for the routers
    assert told["active_parameters"] == told["parameters"]["non_embedding"] - idle * 120 // 128


def test_inspect_says_in_sentences_what_loads_it_and_what_can_be_cut(pare, pico_models):
    seen, _ = inspected(pare, pico_models())
    for sentence in (
        "mlx-lm loads it as llama.", "llama.cpp loads it as llama.", "transformers loads it as llama.",
        "mlx-pare can cut ffn, kv_head, layer and hidden.",
        "Layers of different widths load in mlx-lm as nemotron-nas or openelm, and in llama.cpp as deci.",
    ):  # fmt: skip
        assert sentence in seen, seen


def test_inspect_says_why_a_program_does_not_load_it(pare, pico_models):
    """A rope that llama.cpp cannot scale is found in the config; runtimes in JSON stays what it was."""
    seen, told = inspected(pare, pico_models("llama", rope_scaling={"type": "dynamic", "factor": 2.0}))
    assert re.search(r"llama.cpp does not load it: .*scales its rope by 'dynamic'", seen), seen
    assert told["runtimes"]["llama.cpp"] == "llama"


def test_inspect_says_why_a_model_cannot_be_cut(pare):
    seen, told = inspected(pare, "apertus-8b")
    assert "mlx-pare cannot cut this model: no one has described yet how to cut apertus." in seen
    assert told["cuttable"] == {} and told["not_cuttable"] == {}
    seen, told = inspected(pare, "qwen3-30b-a3b")
    assert told["cuttable"] == {"expert": "exact", "layer": "exact"} and "cannot cut this model" not in seen


# ---- evaluate, bench, report ----


def test_evaluate_shows_no_list_of_windows(pare, pico_models):
    asked = ["evaluate", pico_models(), "--data", DEMO / "test.txt", "--length", "32", "--samples", "3"]
    seen, told = pare(*asked), pare(*asked, "--json").document
    assert len(told["window_nll"]) == 3
    assert "window" not in seen.out.replace("tokens per window", "").replace("windows ", "") and "[" not in seen.out
    assert not PYTHON.search(seen.out) and max(map(len, seen.out.split("\n"))) < 200
    assert readable(told["perplexity"], 4, told["perplexity_stderr"]) in seen.out


def test_bench_asks_for_room_before_it_loads_a_model(pare, pico_models, monkeypatch):
    """Per model, with numbers, exit code 3; nothing is loaded."""
    large, small = pico_models("llama-untied"), pico_models("llama", (4, 32))
    monkeypatch.setattr("mlx_pare.lm.load_stock", lambda *_: pytest.fail("a model was loaded"))
    limit = (resident.needed_bytes(large) + resident.needed_bytes(small)) // 2
    monkeypatch.setattr(machine, "available_bytes", lambda: limit)
    done = pare("bench", small, large, "--json")
    assert done.code == 3 and done.document["exit_code"] == 3
    assert re.search(rf"{large} needs about [\d.]+ [kM]B of memory, more than is free \([\d.]+ [kM]B\)\.", done.line)
    assert str(small) not in done.line
    capped = pare("bench", small, large, "--memory-cap", "1kB")
    assert capped.code == 3 and str(small) in capped.line and str(large) in capped.line
    assert "--memory-cap allows (1.00 kB)" in capped.line


def test_report_shows_neighbours_of_the_plan_or_nothing(pare, pico_models, tmp_path):
    out = tmp_path / "run"
    data = ["--data", DEMO / "test.txt", "--length", "32", "--samples", "2"]
    for step in (["calibrate", pico_models(), "--out", out, *data], ["score", out],
                 ["plan", out, "--keep", "0.75", "--widths", "even"], ["prune", out], ["report", out]):  # fmt: skip
        assert pare(*step).code == 0
    neighbours = Plan.load(out / "plan" / "plan.json").neighbours
    assert neighbours and "Neighbours: " in (out / "report.md").read_text()
    plan = json.loads((out / "plan" / "plan.json").read_text())
    (out / "plan" / "plan.json").write_text(json.dumps(plan | {"neighbours": []}))
    assert pare("report", out).code == 0
    assert "eighbours" not in (out / "report.md").read_text()
    shown = pare("plan", out, "--keep", "0.75", "--widths", "even").out
    assert "neighbours: \n" not in shown


# ---- what strangers wrote, in files for people (F34) ----

EVIL = "a <b>\x1b[31m\u202e`x`|*y*\nz"


def test_f34_the_card_of_a_pruned_model_escapes_names(pare, pico_models, tmp_path):
    model = shutil.copytree(pico_models(), tmp_path / "a <b> *c* \u202e")
    out = tmp_path / "run"
    data = ["--data", DEMO / "test.txt", "--length", "32", "--samples", "2"]
    for step in (["calibrate", model, "--out", out, *data], ["score", out],
                 ["plan", out, "--keep", "0.75", "--widths", "even"]):  # fmt: skip
        assert pare(*step).code == 0
    file = out / "plan" / "plan.json"
    plan = json.loads(file.read_text())
    plan["criterion"] = plan["target"]["asked"] = EVIL
    file.write_text(json.dumps(plan))
    assert pare("prune", out, "--no-reconstruct").code == 0
    card = (out / "prune" / "model" / "README.md").read_text("utf-8")
    assert all(line.isprintable() for line in card.split("\n"))
    assert "<b>" not in card and "&lt;b>" in card and "\\*y\\*" in card and "\nz" not in card


def test_f34_a_licence_in_a_modelfile_is_printable():
    licence = "Free\tto use\r\n\x1b[2Jevil \u202e backwards\n" + "\u202e" * 50
    text = Modelfile("m.gguf", None, [], {}, licence).text()
    assert all(line.isprintable() for line in text.split("\n"))
    assert "Free to use" in text and "\\x1b[2Jevil \\u202e backwards" in text and "..." not in text


def test_f34_a_span_of_code_cannot_be_ended():
    assert markdown.code("a`b\x1b\u202e\nc") == "`a'b\\x1b\\u202e c`"


def test_window_and_sizes_of_layers_that_differ(pare, pico_models, tmp_path):
    """Sizes that differ within a kind of layer are a range for people, a list in JSON."""
    out = tmp_path / "run"
    model = pico_models("llama", **{"intermediate_size": 512})
    data = ["--data", DEMO / "test.txt", "--length", "32", "--samples", "2"]
    for step in (["calibrate", model, "--out", out, *data], ["score", out],
                 ["plan", out, "--keep", "0.75", "--widths", "even", "--axes", "ffn"]):  # fmt: skip
        assert pare(*step).code == 0
    file = out / "plan" / "plan.json"
    plan = json.loads(file.read_text())
    plan["layers"][0]["ffn"] = list(range(256))
    file.write_text(json.dumps(plan))
    assert pare("prune", out, "--no-reconstruct").code == 0
    seen, told = inspected(pare, out / "prune" / "model")
    sizes = told["layer_groups"][0]["ffn"]
    assert isinstance(sizes, list) and f"{sizes[0]} to {sizes[-1]}" in seen
    assert "transformers does not load it: layers differ in width" in seen and not PYTHON.search(seen)
    assert Checkpoint(out / "prune" / "model").arch.family.result


MAC = {"mlx": "0.32.0", "device": "gpu", "chip": "Apple M1", "macos": "15.1"}
LINUX = {"mlx": "0.33.0", "device": "cpu", "chip": None, "macos": None}


@pytest.mark.parametrize(
    "places, told",
    [
        ([], ""),
        ([LINUX], " Computed by MLX 0.33.0 on the cpu."),
        ([MAC], " Computed by MLX 0.32.0 on the gpu (Apple M1, macOS 15.1)."),
        (
            [MAC, LINUX],
            " Computed by MLX 0.32.0 on the gpu (Apple M1, macOS 15.1), then by MLX 0.33.0 on the cpu: the numbers "
            "agree to rounding only.",
        ),
    ],
)
def test_a_report_says_on_what_it_was_computed(places, told):
    known = Manifest(model="m", source="0" * 64, versions={"mlx": "0.32.0"}, machine={}, computed_on=places)
    assert reporting._title(known).endswith(f"; mlx 0.32.0.{told}")
