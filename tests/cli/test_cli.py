"""The command line: help, exit codes, one line per error, one JSON document; killed, interrupted, resumed."""

from __future__ import annotations

import functools
import hashlib
import json
import random
import re
import shutil
import signal
import subprocess
import sys
import time
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path

import mlx.core as mx
import pico
import pytest
from commands import Done
from faults import Driver

from mlx_pare.cli import main as cli
from mlx_pare.cli.app import app
from mlx_pare.exporting import llama_cpp
from mlx_pare.gguf import header as gguf_header

EVERYDAY = ["fit", "run", "evaluate", "export", "bench"]
OTHERS = ["inspect", "import", "adapters", "demo", "doctor", "calibrate", "score", "plan", "stability", "reconstruct",
          "prune", "recover", "report", "status", "models"]  # fmt: skip
SMALL = ["--keep", "0.75", "--length", "32", "--samples", "4", "--try", "3", "--recover-steps", "2", "--trials", "0",
         "--gguf", "f16", "--context", "256"]  # fmt: skip


def started(*arguments) -> subprocess.Popen:
    """A command in a process of its own, with Ctrl-C as on a terminal even where the tests run in the background."""
    return subprocess.Popen(
        [sys.executable, "-m", "mlx_pare", *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )


def spawn(*arguments) -> Done:
    process = started(*arguments)
    out, err = process.communicate(timeout=120)
    return Done(process.returncode, out, err)


@pytest.fixture(scope="session")
def model(pico_models) -> Path:
    return pico_models("llama", (4, 32), num_hidden_layers=2)


@pytest.fixture(scope="session")
def texts(tmp_path_factory) -> Path:
    """data.txt, test.txt and other.txt share nothing; empty.txt and short.txt are what they say."""
    folder = tmp_path_factory.mktemp("texts")
    own = Path(cli.__file__).parents[1] / "demo"
    lines = (own / "calibration.txt").read_text("utf-8").split("\n")
    (folder / "data.txt").write_text("\n".join(lines[::2]))
    (folder / "other.txt").write_text("\n".join(lines[1::2]))
    (folder / "test.txt").write_text((own / "test.txt").read_text("utf-8")[:4000])
    (folder / "empty.txt").write_text(" \n\n")
    (folder / "short.txt").write_text("A few words only.")
    return folder


@pytest.fixture(scope="session")
def small(model, texts) -> Callable[..., list]:
    """The arguments of a small run into ``out``."""
    return lambda out, *more: ["run", model, "--out", out, *SMALL, "--data", texts / "data.txt", "--test-data",
                               texts / "test.txt", *more]  # fmt: skip


@pytest.fixture(scope="session")
def whole(small, tmp_path_factory) -> dict:
    """One run that nothing disturbed, made by a process of its own with --json."""
    out = tmp_path_factory.mktemp("whole") / "run"
    done = spawn(*small(out, "--json"))
    assert done.code == 0, done.err
    return {"out": out, "document": done.document}


@pytest.fixture
def copied(whole, tmp_path) -> Path:
    return Path(shutil.copytree(whole["out"], tmp_path / "copy"))


def contents(*paths: Path) -> dict[str, bytes]:
    return {
        str(f): hashlib.sha256(f.read_bytes()).digest()
        for path in paths
        for f in sorted(path.rglob("*"))
        if f.is_file() and f.name not in (".lock", "log.txt")
    }


# ---- help ----


@pytest.mark.parametrize("command", EVERYDAY + OTHERS)
def test_every_command_has_help_with_an_example(pare, command):
    done = pare(command, "--help")
    assert done.code == 0 and done.err == ""
    assert f"Examples: mlx-pare {command}" in " ".join(done.out.split())
    assert all(option in done.out for option in ("--json", "--quiet", "--debug"))


def test_help_names_every_command_and_the_everyday_ones_first(pare):
    done = pare("--help")
    panels = done.out.split("Everyday commands:")[1].split("\nOptions:")[0]
    listed = [line.split()[0] for line in panels.split("\n") if line.startswith("  ") and line[2] != " "]
    assert listed[: len(EVERYDAY)] == EVERYDAY and sorted(listed) == sorted(EVERYDAY + OTHERS)
    assert "Single steps of a run:\n  calibrate" in done.out and "Exit codes: 0 done" in done.out
    assert sorted(c.name for c in app.registered_commands) == sorted(EVERYDAY + OTHERS)


def test_no_arguments_show_the_help(pare):
    done = pare()
    assert done.code == 2 and "Everyday commands:" in done.err + done.out


@pytest.mark.parametrize("command", ["run", "plan"])
def test_costly_commands_can_be_asked_what_they_would_do(pare, command):
    assert "--dry-run" in pare(command, "--help").out


IMPORTS = """
import sys
from mlx_pare.cli import main as cli
sys.argv = ["mlx-pare", *sys.argv[2:]]
try:
    cli.main()
except SystemExit as left:
    assert left.code in (0, None), left.code
sys.exit(", ".join(sorted(set(FORBIDDEN) & set(sys.modules))) or 0)
"""
HEAVY = ["mlx_lm", "transformers", "tokenizers", "gguf", "llama_cpp", "scipy", "torch", "matplotlib"]
LOOKS = [
    (["--help"], True),
    (["run", "--help"], True),
    (["inspect", "MODEL"], True),
    (["fit", "MODEL"], True),
    (["inspect", "MODEL", "--json"], True),
    (["doctor"], True),
    (["report", "RUN"], True),
    (["status", "RUN"], True),
    (["plan", "RUN", "--keep", "0.5", "--dry-run"], False),
    (["run", "MODEL", "--out", "NEW", "--keep", "0.5", "--dry-run"], False),
]


@pytest.mark.parametrize("arguments, no_arrays", LOOKS, ids=lambda v: "-".join(v) if isinstance(v, list) else "")
def test_quick_commands_import_nothing_heavy(copied, model, tmp_path, arguments, no_arrays):
    places = {"MODEL": str(model), "RUN": str(copied), "NEW": str(tmp_path / "new")}
    forbidden = HEAVY + (["mlx", "mlx.core", "numpy"] if no_arrays else [])
    code = IMPORTS.replace("FORBIDDEN", repr(forbidden))
    command = [sys.executable, "-c", code, "-", *(places.get(a, a) for a in arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr[-500:]


# ---- errors: one line, the code that was designed, nothing half-written ----


def harmed(model: Path, place: Path, what: str) -> Path:
    """A copy of a model with one thing wrong."""
    copy = Path(shutil.copytree(model, place / what.replace(" ", "-")))
    shard, config = copy / "model.safetensors", json.loads((copy / "config.json").read_text())
    if what == "truncated":
        shard.write_bytes(shard.read_bytes()[:-1000])
    if what == "header":
        shard.write_bytes(b"\xff" * 8 + shard.read_bytes()[8:])
    if what == "no shard":
        shard.unlink()
    if what == "tensor missing":
        weights = mx.load(str(shard))
        weights.pop("model.norm.weight")
        mx.save_safetensors(str(shard), weights)
    changes = {
        "shape": {"intermediate_size": 160},
        "type": {"model_type": "mamba9"},
        "mode": {"quantization": {"bits": 4, "group_size": 32, "mode": "mxfp3"}},
        "sizes": {"hidden_size": -4},
    }
    (copy / "config.json").write_text(json.dumps({**config, **changes.get(what, {})}))
    if what == "config":
        (copy / "config.json").write_text('{"model_type": ')
    return copy


HARMS = [
    ("truncated", "model.safetensors has .* bytes, its header describes"),
    ("header", "model.safetensors is not a safetensors file"),
    ("no shard", r"lacks model\.safetensors|no model\*\.safetensors"),
    ("tensor missing", "lacks model.norm.weight"),
    ("shape", r"has shape \[.*config.json means"),
    ("type", "'mamba9' is not described here"),
    ("mode", "quantization mode 'mxfp3', which is not supported"),
    ("sizes", "hidden_size = -4"),
    ("config", "config.json is not valid JSON"),
]


@pytest.fixture
def checked(pare, tmp_path) -> Callable[..., None]:
    """Call a command that must fail: with and without --json one line, the code, and nothing is written."""

    def call(code: int, words: str, *arguments) -> None:
        before = contents(tmp_path)
        plain, as_json = pare(*arguments), pare(*arguments, "--json")
        assert (plain.code, as_json.code) == (code, code), plain.err
        assert plain.line.startswith("mlx-pare: ") and plain.line == as_json.line
        assert re.search(words, plain.line), plain.line
        assert plain.out == ""
        assert set(as_json.document) == {"error", "exit_code"} and as_json.document["exit_code"] == code
        assert " ".join(as_json.document["error"].split()) == plain.line.removeprefix("mlx-pare: ")
        assert contents(tmp_path) == before
        assert not [p for p in tmp_path.rglob("*") if p.suffix in (".part", ".tmp", ".partial")]

    return call


@pytest.mark.parametrize("what, words", HARMS)
def test_broken_models(checked, model, tmp_path, texts, what, words):
    broken = harmed(model, tmp_path, what)
    planning = [] if what in ("type", "mode") else [["fit"], ["inspect"]]  # these two can be planned for
    for command in (
        *planning,
        ["export", "-o", tmp_path / "x.gguf"],
        ["bench"],
        ["run", "--out", tmp_path / "run"],
    ):
        more = ["--keep", "0.5"] if command[0] == "run" else []
        checked(1, words, command[0], broken, *command[1:], *more)
    assert not (tmp_path / "x.gguf").exists() and not (tmp_path / "run").exists()


RUN = ["run", "MODEL", "--out", "NEW"]
REFUSALS = {
    "missing model": (1, "no model directory at", ["bench", "NEW"]),
    "file as model": (1, "no model directory at", ["bench", "TEXTS/data.txt"]),
    "nothing to plan for": (2, "there is no file, directory or known model", ["fit", "no-such-model"]),
    "a text to plan for": (1, "is not valid JSON", ["inspect", "TEXTS/data.txt"]),
    "no text": (1, "no text at", ["evaluate", "MODEL", "--data", "NEW"]),
    "empty text": (1, "holds no text", ["evaluate", "MODEL", "--data", "TEXTS/empty.txt"]),
    "short text": (1, "one row needs 512", ["evaluate", "MODEL", "--data", "TEXTS/short.txt"]),
    "short text for a run": (1, "one row needs", [*RUN, "--keep", "0.5", "--data", "TEXTS/short.txt"]),
    "empty text for a run": (1, "holds no text", [*RUN, "--keep", "0.5", "--data", "TEXTS/empty.txt"]),
    "impossible size": (3, "smallest possible is .* kB", [*RUN, "--target-size", "2kB"]),
    "impossible count": (3, "smallest possible is .*k", [*RUN, "--target-params", "900"]),
    "impossible on that Mac": (3, "smallest possible is", [*RUN, "--for", "m1-8gb", "--context", "90000000"]),
    "impossible as a dry run": (3, "smallest possible is", [*RUN, "--target-size", "2kB", "--dry-run"]),
    "two targets": (2, "exactly one target", [*RUN, "--keep", "0.5", "--target-size", "1MB"]),
    "no target": (2, "exactly one target", RUN),
    "target of nothing": (2, "--keep 0", [*RUN, "--keep", "0"]),
    "unreadable size": (2, "cannot read 'much' as bytes", [*RUN, "--target-size", "much"]),
    "unreadable memory": (2, "cannot read 'lots' as bytes", [*RUN, "--keep", "0.5", "--memory-cap", "lots"]),
    "unknown Mac": (2, "no Mac is known as 'm9-1gb'", ["fit", "MODEL", "--mac", "m9-1gb"]),
    "unknown Mac as target": (2, "no Mac is known as 'm4-25gb'. The nearest", [*RUN, "--for", "m4-25gb"]),
    "unknown axis": (2, "unknown axis 'depth'", [*RUN, "--keep", "0.5", "--axes", "ffn,depth"]),
    "unknown criterion": (2, "unknown criterion 'magic'", [*RUN, "--keep", "0.5", "--criterion", "magic"]),
    "unknown method": (2, "unknown recovery method 'hope'", [*RUN, "--keep", "0.5", "--method", "hope"]),
    "unknown GGUF type": (2, "'q9_z'", [*RUN, "--keep", "0.5", "--gguf", "q9_z"]),
    "unknown export type": (2, "'q9_z'", ["export", "MODEL", "--gguf", "q9_z", "-o", "NEW"]),
    "unknown packing": (2, "2, 3, 4, 5, 6, 8", [*RUN, "--keep", "0.5", "--bits", "7"]),
    "unknown command": (2, "No such command 'prun'", ["prun"]),
    "unknown option": (2, "No such option", ["inspect", "MODEL", "--nope"]),
    "missing argument": (2, "Missing argument 'MODEL'", ["inspect"]),
    "missing option": (2, "Missing option '--out'", ["run", "MODEL"]),
    "out of range": (2, "0 is not in the range", [*RUN, "--keep", "0.5", "--samples", "0"]),
    "seed too large": (2, "4294967296 is not in the range", [*RUN, "--keep", "0.5", "--seed", "4294967296"]),
    "not a number": (2, "'x' is not a valid", [*RUN, "--keep", "x"]),
    "no run": (1, "no run at .*mlx-pare calibrate", ["score", "NEW"]),
    "overlap": (1, "share the paragraph", [*RUN, "--keep", "0.5", "--length", "32", "--data", "TEXTS/data.txt",
                                           "--test-data", "TEXTS/data.txt"]),
    "too little memory": (3, "--memory-cap", [*RUN, "--keep", "0.5", "--memory-cap", "10kB"]),
    "too little memory to evaluate": (3, "memory-cap", ["evaluate", "MODEL", "--data", "TEXTS/data.txt", "--length",
                                                        "32", "--memory-cap", "10kB"]),
    "foreign directory": (3, "is no run directory", ["run", "MODEL", "--out", "TEXTS", "--keep", "0.5", "--length",
                                                     "32"]),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSALS)
def test_bad_input(checked, model, texts, tmp_path, name):
    code, words, arguments = REFUSALS[name]
    before = contents(texts, model)
    place = {"MODEL": str(model), "NEW": str(tmp_path / "new")}
    checked(code, words, *(place.get(a, a).replace("TEXTS", str(texts)) for a in arguments))
    assert not (tmp_path / "new").exists()
    assert contents(texts, model) == before and not (texts / ".lock").exists()


def test_existing_export_is_refused(checked, model, tmp_path):
    (tmp_path / "mine.gguf").write_text("precious")
    checked(3, "mine.gguf exists already", "export", model, "-o", tmp_path / "mine.gguf")


def test_export_that_does_not_fit_is_refused_and_kept(pare, model, tmp_path):
    file = tmp_path / "m.gguf"
    done = pare("export", model, "-o", file, "--for", "m1-8gb", "--context", "90000000", "--no-verify", "--quiet")
    assert done.code == 3 and "does not fit m1-8gb" in done.line and file.exists()


def test_other_teacher_is_refused(checked, model, pico_models, texts):
    other = pico_models("llama", None, "spm")
    arguments = ["--data", texts / "data.txt", "--length", "32", "--samples", "1"]
    checked(3, "has another tokenizer than", "evaluate", model, "--teacher", other, *arguments)


def test_debug_shows_where_and_keeps_the_code(pare, tmp_path):
    done = pare("bench", tmp_path / "nowhere", "--debug", "--json")
    assert done.code == 1 and "Traceback" in done.err and done.document["exit_code"] == 1
    assert done.err.strip().split("\n")[-1].startswith("mlx-pare: no model directory")


def test_defect_of_ours_is_one_line_too(pare, model, monkeypatch):
    from mlx_pare.capacity import inspect as module

    monkeypatch.setattr(module, "parameters", lambda _: {}["total"])
    done = pare("inspect", model, "--json")
    assert done.code == 1 and "internal error, KeyError" in done.line and "--debug" in done.document["error"]


def test_full_disk_is_one_line(pare, model, tmp_path):
    done = pare("run", model, "--out", Path("/proc/no/such"), "--keep", "0.5", "--length", "32")
    assert done.code == 1 and done.err.strip().split("\n")[-1].startswith("mlx-pare: No such file or directory")


# ---- --json, --quiet ----


def noisy(*_):
    print("a library talks")  # noqa: T201
    sys.stdout.write("and writes\n")
    return {"total": 1, "embedding": 0, "attention": 0, "ffn": 0, "norm": 0, "non_embedding": 1}


def test_one_document_also_while_libraries_print(pare, model, monkeypatch):
    monkeypatch.setattr("mlx_pare.capacity.inspect.parameters", noisy)
    done = pare("inspect", model, "--json")
    assert done.document["parameters"]["total"] == 1
    assert done.err == "a library talks\nand writes\n"


def test_quiet_says_nothing(pare, model):
    done = pare("inspect", model, "--quiet")
    assert (done.code, done.out, done.err) == (0, "", "")


def test_talk_is_on_stdout_without_json(pare, model):
    done = pare("inspect", model)
    assert done.code == 0 and "106,816" in done.out and done.err == ""


# ---- the keys that others rely on ----


def test_inspect_keys(pare, model):
    found = pare("inspect", model, "--json").document
    parts = found["parameters"]
    assert set(parts) == {"total", "embedding", "attention", "ffn", "norm", "non_embedding"}
    assert parts["total"] == parts["embedding"] + parts["attention"] + parts["ffn"] + parts["norm"]
    assert parts["non_embedding"] == parts["total"] - parts["embedding"] and parts["embedding"] == 512 * 64
    assert (found["layers"], found["kv_heads"], found["ffn"], found["hidden"]) == (2, 2, 128, 64)
    assert found["bytes"]["total"] == sum(a.nbytes for a in mx.load(str(model / "model.safetensors")).values())
    assert found["runtimes"]["llama.cpp"] == "llama"


FIT_KEYS = {"mac", "chip", "memory_gb", "budget_bytes", "weights_bytes", "kv_bytes", "activation_bytes", "total_bytes",
            "fits", "headroom_bytes", "max_context", "decode_tokens_per_s", "prefill_tokens_per_s"}  # fmt: skip
MORE_FIT_KEYS = {"verdict", "headroom_gb", "headroom_gib", "state_bytes", "scores_bytes", "load_peak_bytes",
                 "speed_error", "unsure"}  # fmt: skip


def test_fit_keys(pare, model):
    found = pare("fit", model, "--json", "--mac", "m4-24gb", "--mac", "M4 Pro 24GB", "--context", "4096").document
    assert [row["mac"] for row in found["rows"]] == ["m4-10c-24gb", "m4-pro-20c-24gb"] and found["context"] == 4096
    for row in found["rows"]:
        assert set(row) == FIT_KEYS | MORE_FIT_KEYS
        assert row["total_bytes"] == row["weights_bytes"] + row["kv_bytes"] + row["activation_bytes"]
        assert row["headroom_bytes"] == row["budget_bytes"] - row["total_bytes"] and row["fits"]


def test_evaluate_keys(pare, model, texts, tmp_path):
    arguments = ["evaluate", model, "--data", texts / "test.txt", "--length", "32", "--samples", "3", "--json"]
    alone = pare(*arguments).document
    assert alone["tokens"] == 93 and alone["perplexity"] > 1
    assert alone["perplexity_stderr"] > 0 and alone["bits_per_byte"] > 0
    assert alone["kl_divergence"] is alone["kl_p95"] is alone["top1_agreement"] is None
    dense = pare(*arguments, "--teacher", pico.make(tmp_path / "dense")).document
    assert dense["perplexity"] == alone["perplexity"]
    assert dense["kl_p95"] > dense["kl_divergence"] > 0 < dense["top1_agreement"] < 1
    itself = pare(*arguments, "--teacher", model).document
    assert itself["kl_divergence"] == pytest.approx(0, abs=1e-6) and itself["top1_agreement"] == 1


def test_run_keys(whole):
    found = whole["document"]
    assert Path(found["model"]).is_dir() and Path(found["gguf"]).is_file() and Path(found["report"]).is_file()
    for side in ("before", "after"):
        assert {"perplexity", "perplexity_stderr", "tokens", "bits_per_byte", "kl_divergence", "bytes"} <= set(
            found[side]
        )
    assert "random" in found["contenders"]


def test_bench_and_doctor_documents(pare, model, whole):
    timed = pare(
        "bench", model, whole["document"]["model"], "--trials", "1", "--prompt", "8", "--new", "2", "--json"
    ).document
    assert [m["model"] for m in timed["models"]] == [str(model), whole["document"]["model"]]
    assert timed["models"][0]["ratio"]["decode_tokens_per_s"]["median"] == 1
    found = pare("doctor", "--json").document
    assert found["machine"]["memory_bytes"] > 0 and found["versions"]["mlx"] and found["available_bytes"] > 0


# ---- a run and its single steps ----


def test_dry_run_writes_nothing(pare, model, copied, tmp_path):
    before = contents(tmp_path)
    done = pare("run", model, "--out", tmp_path / "new", "--keep", "0.75", "--dry-run", "--json")
    assert done.code == 0 and not (tmp_path / "new").exists()
    planned = pare("plan", copied, "--keep", "0.5", "--dry-run", "--json")
    assert planned.code == 0
    assert done.document["after"]["non_embedding"] > planned.document["after"]["non_embedding"]
    assert contents(tmp_path) == before


def test_single_steps_make_what_run_makes(pare, model, texts, whole, tmp_path):
    out = tmp_path / "steps"
    data = ["--data", texts / "data.txt", "--test-data", texts / "test.txt", "--length", "32"]
    for arguments in (
        ["calibrate", model, "--out", out, "--samples", "4", *data],
        ["score", out],
        ["plan", out, "--keep", "0.75", "--context", "256"],
        ["reconstruct", out],
        ["prune", out],
        ["report", out],
    ):
        done = pare(*arguments, "--json")
        assert done.code == 0, done.err
        assert all(
            Path(v).exists()
            for k, v in done.document.items()
            if k in ("stats", "scores", "plan", "repair", "model", "report")
        )
    for file in (
        "calibrate/stats.safetensors",
        "score/scores.safetensors",
        "plan/plan.json",
        "reconstruct/plan.json",
        "reconstruct/repair/0001.safetensors",
        "prune/model/model.safetensors",
    ):
        assert (out / file).read_bytes() == (whole["out"] / file).read_bytes(), file


def test_several_domains_go_through_a_run(pare, checked, model, texts, tmp_path):
    """The recipe keeps them as they were asked; every later step reads the same rows from it."""
    out, records = tmp_path / "run", (texts / "other.txt").read_text("utf-8").split("\n")
    own = tmp_path / "own.jsonl"
    own.write_text("\n".join(json.dumps({"body": line}) for line in [*records, ""]), "utf-8")
    two = ["--data", f"{texts / 'data.txt'}:2", "--data", f"own={own}"]
    asked = ["calibrate", model, "--out", out, "--samples", "12", "--length", "32"]
    checked(1, 'own.jsonl line 1 has no text in .* It has "body": choose with --field', *asked, *two)
    checked(2, "'much' in --data .* is no weight", *asked, "--data", f"{texts / 'data.txt'}:much")
    checked(2, "names .*data.txt twice", *asked, *two, "--data", texts / "data.txt")
    done = pare(*asked, *two, "--field", "body")
    assert done.code == 0 and "left out: " in done.out
    recipe = tomllib.loads((out / "recipe.toml").read_text("utf-8"))
    assert recipe["data"] == two[1::2] and recipe["field"] == "body"
    for later in (
        ["score", out], ["plan", out, "--keep", "0.75", "--widths", "even"], ["stability", out], ["reconstruct", out],
        ["prune", out], ["recover", out, "--recover-steps", "1"],
    ):  # fmt: skip
        done = pare(*later, "--quiet")
        assert done.code == 0, done.err
    checked(3, "its input data changed", *asked, *two[:2])
    one = pare(*asked[:3], tmp_path / "one", *asked[4:], *two[:2], "--json")
    assert one.code == 0
    assert f'data = "{two[1]}"' in (tmp_path / "one" / "recipe.toml").read_text("utf-8")


def test_evaluate_a_field(pare, model, tmp_path):
    file = tmp_path / "t.jsonl"
    file.write_text(json.dumps({"text": "no", "body": "One fine day, nobody came. " * 30}), "utf-8")
    asked = ["evaluate", model, "--data", file, "--length", "32", "--samples", "1", "--json"]
    assert pare(*asked).code == 1
    assert pare(*asked, "--field", "body").document["tokens"] == 31


def test_calibrate_for_a_criterion(pare, checked, model, texts, tmp_path):
    """With it score goes on, without it the line says what to do; a wrong name leaves nothing behind."""
    data = ["--data", texts / "data.txt", "--length", "32", "--samples", "4"]
    checked(2, "unknown criterion 'magic'", "calibrate", model, "--out", tmp_path / "no", *data, "--criterion", "magic")
    assert not (tmp_path / "no").exists()
    assert pare("calibrate", model, "--out", tmp_path / "a", *data, "--criterion", "taylor").code == 0
    assert pare("score", tmp_path / "a", "--criterion", "taylor2").code == 0
    assert pare("calibrate", model, "--out", tmp_path / "b", *data).code == 0
    checked(1, "holds no gradients.*alibrate with --criterion taylor", "score", tmp_path / "b", "--criterion", "taylor")


def test_step_before_its_time_says_what_to_do_first(checked, model, texts, pare, tmp_path):
    assert pare("calibrate", model, "--out", tmp_path / "run", "--data", texts / "data.txt", "--length", "32").code == 0
    checked(1, "no finished score step.*Do it first: `mlx-pare score", "plan", tmp_path / "run", "--keep", "0.5")
    checked(1, "no finished plan step", "prune", tmp_path / "run")


def test_plan_may_be_edited_until_it_was_pruned(pare, whole, tmp_path):
    out = tmp_path / "edited"
    out.mkdir()
    manifest = json.loads((whole["out"] / "manifest.json").read_text())
    manifest["steps"] = {k: v for k, v in manifest["steps"].items() if k in ("calibrate", "score", "plan")}
    for step in manifest["steps"]:
        shutil.copytree(whole["out"] / step, out / step)
    (out / "manifest.json").write_text(json.dumps(manifest))
    file = out / "plan" / "plan.json"
    plan = json.loads(file.read_text())
    plan["layers"][0]["ffn"] = list(range(len(plan["layers"][0]["ffn"])))
    file.write_text(json.dumps(plan))
    assert pare("prune", out).code == 0
    survivors = json.loads((out / "prune" / "model" / "survivors.json").read_text())
    assert survivors["layers"][0]["ffn"] == plan["layers"][0]["ffn"]
    plan["layers"][0]["ffn"][-1] += 1
    file.write_text(json.dumps(plan))
    refused = pare("prune", out)
    assert refused.code == 3 and "its input plan changed since" in refused.line


@pytest.fixture
def reconstructed(whole, tmp_path) -> Path:
    """The finished run as it was before its plan was pruned."""
    out = tmp_path / "reconstructed"
    manifest = json.loads((whole["out"] / "manifest.json").read_text())
    first = ("calibrate", "score", "plan", "reconstruct")
    manifest["steps"] = {step: manifest["steps"][step] for step in first}
    for step in first:
        shutil.copytree(whole["out"] / step, out / step)
    (out / "manifest.json").write_text(json.dumps(manifest))
    shutil.copy(whole["out"] / "recipe.toml", out)
    return out


def test_reconstruction_is_never_combined_with_another_plan(checked, pare, reconstructed):
    """After an edit both steps refuse; done again, or left out, it is the edited plan that is cut."""
    out, file = reconstructed, reconstructed / "plan" / "plan.json"
    plan = json.loads(file.read_text())
    plan["criterion"] = "by hand"
    plan["layers"][0]["ffn"] = list(range(len(plan["layers"][0]["ffn"])))
    file.write_text(json.dumps(plan))
    checked(3, "its input plan changed since.*delete .*reconstruct", "reconstruct", out)
    checked(3, "changed since it was reconstructed.*--no-reconstruct", "prune", out)

    def units() -> list:
        return json.loads((out / "prune" / "model" / "survivors.json").read_text())["layers"][0]["ffn"]

    assert pare("prune", out, "--no-reconstruct").code == 0
    assert units() == plan["layers"][0]["ffn"]
    plain = (out / "prune" / "model" / "model.safetensors").read_bytes()
    shutil.rmtree(out / "reconstruct")
    checked(1, "no finished reconstruct step", "prune", out)
    assert pare("reconstruct", out).code == 0
    refused = pare("prune", out)  # the model that was cut without it is not overwritten
    assert refused.code == 3 and "its input repair changed since" in refused.line
    shutil.rmtree(out / "prune")
    assert pare("prune", out).code == 0
    assert units() == plan["layers"][0]["ffn"]
    assert (out / "prune" / "model" / "model.safetensors").read_bytes() != plain


def test_changed_reconstruction_is_refused(checked, pare, small, reconstructed):
    file = reconstructed / "reconstruct" / "plan.json"
    plan = json.loads(file.read_text())
    kept = plan["layers"][0]["ffn"]
    kept[-1] = next(i for i in range(127, -1, -1) if i not in kept)
    file.write_text(json.dumps(plan | {"layers": [plan["layers"][0] | {"ffn": sorted(kept)}, *plan["layers"][1:]]}))
    refused = pare(*small(reconstructed), "--quiet")
    assert refused.code == 3 and "plan.json changed since it was written" in refused.line
    refused = pare("prune", reconstructed, "--quiet")
    assert refused.code == 1 and "made for another plan" in refused.line
    assert not (reconstructed / "prune").exists()


def test_too_little_memory_to_reconstruct(pare, reconstructed):
    shutil.rmtree(reconstructed / "reconstruct")
    refused = pare("reconstruct", reconstructed, "--memory-cap", "500kB")
    assert refused.code == 3 and re.search("--memory-cap allows.*--no-reconstruct", refused.line)
    assert not (reconstructed / "reconstruct").exists()


@pytest.mark.parametrize(
    "edit, words", [("kv_head", "there are 2"), ("source", "index 7, there are 2"), ("nonsense", "not valid")]
)
def test_broken_plan_is_an_error(pare, copied, edit, words):
    shutil.rmtree(copied / "prune")
    file = copied / "plan" / "plan.json"
    plan = json.loads(file.read_text())
    plan["layers"][-1][edit] = 7 if edit == "source" else [7]
    file.write_text(json.dumps(plan))
    manifest = json.loads((copied / "manifest.json").read_text())
    del manifest["steps"]["prune"]
    (copied / "manifest.json").write_text(json.dumps(manifest))
    done = pare("prune", copied, "--quiet", "--no-reconstruct")
    assert done.code == 1 and words in done.line
    assert not (copied / "prune").exists()
    shutil.rmtree(copied / "reconstruct")
    done = pare("reconstruct", copied, "--quiet")
    assert done.code == 1 and words in done.line
    assert not (copied / "reconstruct").exists()


@pytest.mark.parametrize("command", ["run", "score", "report"])
def test_corrupt_manifest(checked, small, copied, command):
    (copied / "manifest.json").write_text('{"schema_version": 1, "steps": ')
    checked(1, "manifest.json is damaged", *(small(copied) if command == "run" else [command, copied]))


def test_changed_data_is_refused_on_resume(checked, pare, small, copied, texts):
    other = ["--data", texts / "other.txt"]  # a second domain
    checked(3, "the calibrate step in .* was made differently: its input data changed", *small(copied), *other)
    before = contents(copied)
    later = pare(*small(copied), "--test-data", texts / "other.txt", "--quiet")
    assert later.code == 3 and "evaluate-original step" in later.line and "input data changed" in later.line
    assert contents(copied) == before


@pytest.mark.parametrize("change", ["config", "weights"])
def test_changed_source_is_refused_on_resume(checked, pare, model, texts, tmp_path, change):
    source, out = Path(shutil.copytree(model, tmp_path / "source")), tmp_path / "run"
    first = ["calibrate", source, "--out", out, "--data", texts / "data.txt", "--length", "32", "--samples", "4"]
    assert pare(*first).code == 0
    if change == "config":
        config = json.loads((source / "config.json").read_text())
        (source / "config.json").write_text(json.dumps(config | {"rope_theta": 5000.0}))
    else:
        weights = mx.load(str(source / "model.safetensors"))
        mx.save_safetensors(
            str(source / "model.safetensors"), weights | {"model.norm.weight": weights["model.norm.weight"] * 2}
        )
    checked(3, "was changed since", *first)
    checked(3, "was changed since", "run", *first[1:], "--keep", "0.5")
    checked(3, "changed since", "score", out)
    checked(3, "changed since", "plan", out, "--keep", "0.5", "--dry-run")


def test_second_process_is_refused(small, copied, checked):
    from mlx_pare.store.rundir import Run

    with Run(copied):
        checked(3, "another mlx-pare is working on", *small(copied))
        checked(3, "another mlx-pare is working on", "report", copied)


def test_module_can_be_run(model):
    done = spawn("inspect", model, "--json")
    assert done.code == 0 and done.document["layers"] == 2 and done.err == ""


# ---- interrupted, killed ----


def wait_for(process: subprocess.Popen, seen: Callable[[], bool]) -> None:
    """Until something is seen; the process must still be alive then."""
    for _ in range(30_000):
        if seen():
            assert process.poll() is None, "it was over before"
            return
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.002)
    raise AssertionError("never seen")


def results(out: Path) -> Iterator[Path]:
    """The files of a run that must not depend on when it was killed."""
    for pattern in ("*/*.safetensors", "*/repair/*", "*/model/*", "*/plan.json", "export/*.gguf"):
        yield from (f.relative_to(out) for f in sorted(out.glob(pattern)) if f.is_file())


def same_results(one: Path, two: Path) -> None:
    assert list(results(one)) == list(results(two)) != []
    different = [str(f) for f in results(one) if (one / f).read_bytes() != (two / f).read_bytes()]
    assert not different
    left = [f for f in two.rglob("*") if f.suffix in (".partial", ".part", ".tmp") or ".tmp." in f.name]
    assert not left


def test_interrupted_run_says_so_in_one_line_and_goes_on(small, whole, pare, tmp_path):
    out = tmp_path / "run"
    process = started(*small(out, "--quiet"))
    wait_for(process, (out / "calibrate").exists)
    time.sleep(random.uniform(0, 1.0))
    process.send_signal(signal.SIGINT)
    said, error = process.communicate(timeout=60)
    assert process.returncode == 1 and said == ""
    lines = [line for line in error.splitlines() if not line.startswith("warning: ")]
    assert lines == ["mlx-pare: interrupted: what is finished is kept, the same command continues"]
    again = pare(*small(out, "--quiet"))
    assert (again.code, again.out) == (0, ""), again.err
    same_results(whole["out"], out)


MOMENTS = [
    "calibrate.partial",
    "reconstruct.partial/repair/0000.safetensors",
    "recover.partial/step.json",
    "evaluate-random.partial",
    "export.partial/.*.part",
]


def test_killed_run_ends_with_the_same_bytes(small, whole, pare, tmp_path):
    """Killed once at each moment and a little later, always in the same directory."""
    out = tmp_path / "run"
    with Driver(tmp_path) as driver:
        for moment in MOMENTS[:-1]:
            seen = functools.partial(lambda name: any(out.glob(name)), moment)
            killed = driver.run(small(out, "--quiet"), out, kill_after=random.uniform(0, 0.1), until=seen)
            assert killed.code == -signal.SIGKILL, killed.err
            assert not out.joinpath("report.md").exists()
    process = started(*small(out, "--quiet"))  # the driver leaves out the check of the GGUF file: the moment is short
    wait_for(process, lambda: any(out.glob(MOMENTS[-1])))
    process.kill()
    assert process.wait(timeout=60) == -signal.SIGKILL
    assert not out.joinpath("report.md").exists()
    done = pare(*small(out, "--json"))
    assert done.code == 0, done.err
    same_results(whole["out"], out)
    steps = [list(json.loads((o / "manifest.json").read_text())["steps"]) for o in (whole["out"], out)]
    assert steps[0] == steps[1]


# ---- GGUF of fewer bits ----

WHOLE_BLOCKS = {"hidden_size": 256, "intermediate_size": 256, "num_attention_heads": 4, "head_dim": 64}


@pytest.mark.llama
@pytest.mark.skipif(not llama_cpp.available(), reason="llama-cpp-python is not installed")
def test_export_with_an_importance_matrix(tmp_path, pico_models, pare):
    model = pico_models("llama", **WHOLE_BLOCKS)
    told = json.loads(pare("export", model, "--gguf", "Q4_K_M", "--dry-run", "--json").out)
    text = tmp_path / "text.txt"
    text.write_text("\n".join(f"Sentence number {i} is about the number {i * i}." for i in range(400)))
    done = json.loads(
        pare("export", model, "--gguf", "q4_k_m", "--imatrix", "auto", "--data", text, "--samples", 4, "--length", 32,
             "-o", tmp_path / "m.gguf", "--json").out
    )  # fmt: skip
    assert told["tensor_bytes"] == done["tensor_bytes"] and told["types"] == done["types"] and told["path"] is None
    assert 0 < done["bytes"] - told["bytes"] < 250  # what is said of the matrix
    assert gguf_header.read(tmp_path / "m.gguf").metadata["quantize.imatrix.dataset"] == "text"
    assert done["verify"]["checked"] and sorted(f.name for f in tmp_path.iterdir()) == ["m.gguf", "text.txt"]
