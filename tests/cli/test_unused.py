"""Options that are typed in vain are a warning, paths in commands are quoted, stages can be done by hand (F35)."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import subprocess
from pathlib import Path

import click
import pytest
import typer

from mlx_pare.base.errors import shell
from mlx_pare.cli.app import app
from mlx_pare.cli.unused import RULES, lines
from mlx_pare.options.settings import TABLE
from mlx_pare.text.splits import DEMO

RUN = ["run", "MODEL", "--out", "NEW", "--keep", "0.75", "--length", "32", "--samples", "4", "--dry-run"]
VAIN = {
    "group size without bits": ([*RUN, "--group-size", "32"], "--group-size has no effect without --bits"),
    "field without records": ([*RUN, "--data", "TEXT", "--field", "body"], "--field has no effect without a .jsonl"),
    "patience beyond the validations": ([*RUN, "--patience", "1000000"], "recovery validates 6 times"),
    "patience without recovery": ([*RUN, "--recover-steps", "0", "--patience", "2"], "--patience has no effect with"),
    "method without recovery": ([*RUN, "--recover-steps", "0", "--method", "full"], "--method has no effect without"),
    "rank without adapters": ([*RUN, "--method", "full", "--rank", "4"], "--rank has no effect without --method lora"),
    "tries with even widths": ([*RUN, "--widths", "even", "--try", "3"], "--try has no effect with --widths even"),
    "mix with one domain": ([*RUN, "--data", "TEXT", "--mix"], "--mix has no effect with a single domain"),
    "group size of fit": (["fit", "MODEL", "--group-size", "32"], "--group-size has no effect without --bits"),
    "prefill of a GGUF": (["fit", "MODEL", "--gguf", "q8_0", "--prefill-step", "64"], "--prefill-step has no effect"),
    "bits without mlx": (["export", "MODEL", "--dry-run", "--bits", "4"], "--bits has no effect without --mlx"),
    "data without a matrix": (["export", "MODEL", "--dry-run", "--data", "TEXT"], "--data has no effect without --im"),
    "field of evaluate": (["evaluate", "MODEL", "--data", "TEXT", "--length", "32", "--samples", "1", "--field", "x"],
                          "--field has no effect without a .jsonl file in --data"),
}  # fmt: skip


@pytest.mark.parametrize("what", VAIN)
def test_f35_an_option_without_effect_is_a_warning(pare, pico_models, tmp_path, what):
    arguments, words = VAIN[what]
    (tmp_path / "text.txt").write_text((DEMO / "test.txt").read_text("utf-8")[:3000])
    places = {"MODEL": pico_models(), "NEW": tmp_path / "new", "TEXT": tmp_path / "text.txt"}
    done = pare(*(places.get(a, a) for a in arguments))
    assert done.code == 0, done.err
    assert any(line.startswith("warning: ") and words in line for line in done.err.split("\n")), done.err


def test_f35_nothing_is_said_of_options_that_have_an_effect(pare, pico_models, tmp_path):
    (tmp_path / "own.jsonl").write_text("".join(json.dumps({"body": line}) + "\n" for line in ["a b c"] * 9))
    useful = ["--bits", "8", "--group-size", "32", "--data", f"own={tmp_path / 'own.jsonl'}:2", "--field", "body",
              "--patience", "3", "--rank", "4", "--method", "dora"]  # fmt: skip
    done = pare(*(str(pico_models()) if a == "MODEL" else a for a in RUN), *useful)
    assert done.code == 0 and "has no effect" not in done.err, done.err


def test_f35_a_recipe_is_not_judged(pare, pico_models, tmp_path):
    """That of a run names every option, whether it matters or not."""
    (tmp_path / "r.toml").write_text('group_size = 32\nfield = "x"\npatience = 99\n')
    done = pare(*(str(pico_models()) if a == "MODEL" else a for a in RUN), "--recipe", tmp_path / "r.toml")
    assert done.code == 0 and "has no effect" not in done.err


def test_a_group_size_that_there_is_not_is_refused_with_bits(pare, pico_models):
    done = pare(*(str(pico_models()) if a == "MODEL" else a for a in RUN), "--bits", "4", "--group-size", "7")
    assert done.code == 2


def test_rules_name_parameters_that_there_are():
    for name, command in typer.main.get_command(app).commands.items():
        context = click.Context(command)
        parameters = {p.name: p.get_default(context, call=False) for p in command.params}
        for fields, effective, _ in RULES.get(name, ()):
            assert set(fields) <= set(parameters), name
            effective(parameters)  # what it looks at is there
        assert lines(name, (), parameters) == []
    assert {field for rules in (RULES["run"],) for fields, *_ in rules for field in fields} <= set(TABLE)


# ---- commands that errors name can be copied ----

PLACES = [
    "a b",
    "it's",
    "a;rm -rf $HOME",
    "$(touch x)",
    "-dash",
    "x*y",
    "a\nb",
    "tab\there",
    "ü",
    "\x1b[31m",
    "back\\slash",
]


@pytest.mark.parametrize("name", PLACES)
def test_f35_a_path_is_one_word_of_a_shell(name):
    done = subprocess.run(["bash", "-c", f"printf %s {shell(name)}"], capture_output=True, timeout=20)
    assert done.stdout.decode() == name
    assert shell(name).isprintable()


def test_f35_cures_quote_their_paths(pare, pico_models, tmp_path):
    out = tmp_path / "a b"
    text = ["--data", DEMO / "test.txt", "--length", "32"]
    assert pare("calibrate", pico_models(), "--out", out, *text, "--samples", "2").code == 0
    refused = pare("calibrate", pico_models(), "--out", out, *text, "--samples", "3")
    assert refused.code == 3 and f"elete {shlex.quote(str(out / 'calibrate'))}* to do it again" in refused.line
    first = pare("plan", out, "--keep", "0.5")
    assert first.code == 1 and f"`mlx-pare score {shlex.quote(str(out))}`" in first.line
    (out / "calibrate" / "stats.safetensors").unlink()
    missing = pare("calibrate", pico_models(), "--out", out, *text, "--samples", "2")
    assert missing.code == 3 and f"elete {shlex.quote(str(out / 'calibrate'))} to do" in missing.line


def test_no_cure_has_a_bare_path():
    """A path in a command of a message stands in shell(): whoever pastes the command must not lose another file."""
    package = Path(shell.__code__.co_filename).parent
    bare = re.compile(r"(?:\bdelete|`mlx-pare [a-z]+|--model|--adapter-path|-f) \{(?!shell\(|step\}|flags|name\})")
    found = [
        f"{file.name}: {match[0]}" for file in package.rglob("*.py") for match in bare.finditer(file.read_text("utf-8"))
    ]
    assert not found


# ---- a stage by hand ----


@pytest.fixture(scope="module")
def staged(pico_models, tmp_path_factory) -> Path:
    from mlx_pare.options.settings import Settings
    from mlx_pare.pipeline import run as pipeline

    out = tmp_path_factory.mktemp("staged") / "run"
    settings = Settings(stages=(0.8, 0.6), length=32, samples=4, recover_steps=2, trials=0, train_rows=8, widths="even",
                        context=256)  # fmt: skip
    pipeline.run(pico_models(), out, settings)
    return out


@pytest.mark.parametrize("stage", ["stage-1", "stage-2"])
def test_f35_a_stage_that_is_done_is_kept_by_hand(pare, staged, stage):
    done = pare("prune", staged / stage)
    assert done.code == 0 and "prune: done before, kept" in done.out, done.err


def test_f35_a_stage_is_done_again_by_hand_with_the_same_bytes(pare, staged, tmp_path):
    run = Path(shutil.copytree(staged, tmp_path / "run"))
    place = run / "stage-2"
    before = (place / "prune" / "model" / "survivors.json").read_bytes()
    shutil.rmtree(place / "prune")
    manifest = json.loads((place / "manifest.json").read_text())
    manifest["steps"] = {name: step for name, step in manifest["steps"].items() if name not in ("prune", "recover")}
    manifest["model"] = str(run / "stage-1" / "recover" / "model")
    (place / "manifest.json").write_text(json.dumps(manifest))
    done = pare("prune", place)
    assert done.code == 0, done.err
    assert (place / "prune" / "model" / "survivors.json").read_bytes() == before
    shutil.rmtree(place / "recover")
    healed = pare("recover", place, "--recover-steps", "1", "--train-rows", "8", "--quiet")
    assert healed.code == 0, healed.err
    inputs = json.loads((place / "manifest.json").read_text())["steps"]["recover"]["inputs"]
    assert inputs["teacher"] != inputs["model"], "the original teaches a stage, not the stage before"
