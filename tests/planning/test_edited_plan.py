"""plan.json is made to be edited: the same check in plan, reconstruct, prune, stability and run, before any work."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from mlx_pare.options.settings import Settings
from mlx_pare.pipeline import choose_sizes, recipes, steps
from mlx_pare.reporting.report import report

SMALL = dict(samples=4, length=32, keep=0.75, widths="even", criterion="minitron")


@pytest.fixture(scope="module")
def planned(pico_models, two_texts, tmp_path_factory) -> Path:
    """A run up to plan."""
    out, model = tmp_path_factory.mktemp("edited") / "run", pico_models("llama")
    s = Settings(**two_texts, **SMALL)
    with steps.open_run(model, out) as run:
        run.write_recipe(recipes.recipe_of(model, recipes.dated(out, s)))
        texts = recipes.texts_of(run, s)
        steps.calibrate_step(run, texts, s)
        steps.score_step(run, s)
        choose_sizes.plan_step(run, texts, s)
    return out


@pytest.fixture
def out(planned, tmp_path) -> Path:
    return Path(shutil.copytree(planned, tmp_path / "run"))


def edited(out: Path, edit: Callable[[dict], None]) -> dict:
    """The plan after an edit of its document."""
    file = out / "plan" / "plan.json"
    plan = json.loads(file.read_text())
    edit(plan)
    file.write_text(json.dumps(plan))
    return plan


def layer(**changes) -> Callable[[dict], None]:
    return lambda plan: plan["layers"][0].update(changes)


def top(**changes) -> Callable[[dict], None]:
    return lambda plan: plan.update(changes)


EVIL = {
    "source 99": layer(source=99),
    "source -1": layer(source=-1),
    "source twice": layer(source=1),
    "layers unordered": lambda plan: plan["layers"].reverse(),
    "no layers": top(layers=[]),
    "bits 7": top(bits=7),
    "bits 0": top(bits=0),
    "bits without a group": top(bits=4, group_size=None),
    "group 48": top(bits=4, group_size=48),
    "embedding bits 9": top(embedding_bits=9, group_size=64),
    "ffn bits 1": layer(ffn_bits=1),
    "doubled units": layer(ffn=[0, 0, 1]),
    "unordered units": layer(ffn=[3, 2, 1]),
    "a unit of 2**70": layer(ffn=[2**70]),
    "a unit of -1": layer(ffn=[-1, 0]),
    "a unit too many": layer(ffn=list(range(129))),
    "kv_head 5": layer(kv_head=[5]),
    "nothing kept": layer(ffn=[], kv_head=[]),
    "hidden nothing": top(hidden=[]),
    "hidden twice": top(hidden=[0, 0, 1]),
    "hidden too many": top(hidden=list(range(65))),
    "hidden below": top(hidden=[-1, 0, 1]),
    "a typo": layer(fnn=[1]),
    "of another model": top(source="0" * 64),
    "of another schema": top(schema_version=2),
    "units as text": layer(ffn="all"),
    "a share of a unit": layer(ffn=[0.5]),
    "no number": lambda plan: plan["target"].update(value=float("nan")),
    "sizes of nobody": lambda plan: plan["before"].update(layers=10**30),
    "a null": top(layers=None),
    "a list": lambda plan: plan.clear(),
}
COMMANDS = {
    "plan": ["plan", "RUN", "--keep", "0.75", "--widths", "even"],
    "reconstruct": ["reconstruct", "RUN"],
    "prune": ["prune", "RUN", "--no-reconstruct"],
    "stability": ["stability", "RUN", "--draws", "0"],
    "fit": ["fit", "RUN/plan/plan.json"],
}


@pytest.mark.parametrize("name", EVIL)
@pytest.mark.parametrize("command", COMMANDS)
def test_f28_every_command_refuses_a_plan_that_cannot_be(pare, out, command, name):
    edited(out, EVIL[name])
    given = (str(out) if word == "RUN" else word.replace("RUN/", f"{out}/") for word in COMMANDS[command])
    code, said, err = pare(*given)
    if command == "fit" and name == "of another model":
        assert code == 0 and "changed since the plan was made" in said + err
        return
    lines = [line for line in err.splitlines() if not line.startswith("warning: ")]
    assert code in (1, 2, 3) and len(lines) == 1 and lines[0].startswith("mlx-pare: "), err
    assert "internal error" not in err and "plan" in lines[0]
    assert not (out / "reconstruct").exists() and not (out / "prune").exists() and "loads in" not in said


def test_f28_run_refuses_it_too(pare, out, pico_models, two_texts):
    edited(out, EVIL["hidden nothing"])
    asked = ["--data", two_texts["data"], "--test-data", two_texts["test_data"], "--samples", 4, "--length", 32]
    asked += ["--keep", 0.75, "--widths", "even", "--criterion", "minitron", "--no-reconstruct", "--recover-steps", 0]
    code, _, err = pare("run", pico_models("llama"), "--out", out, *asked)
    assert code == 1 and "hidden keeps nothing" in err and not (out / "prune").exists()


def test_f28_what_can_be_is_carried_out_and_counted(pare, out):
    """The sizes that the file claims are not believed."""

    def edit(plan: dict) -> None:
        plan["layers"][0]["ffn"] = [0, 5, 7]
        plan["before"].update(layers=90, parameters=1)
        plan["after"].update(ffn=7, parameters=1)

    edited(out, edit)
    code, said, err = pare(*(str(out) if word == "RUN" else word for word in COMMANDS["plan"]), "--json")
    assert code == 0, err
    found = json.loads(said)
    assert found["after"]["ffn"][0] == 3 and found["before"]["layers"] == 4 and found["after"]["parameters"] > 1000
    assert pare("prune", out, "--no-reconstruct")[0] == 0
    made = json.loads((out / "prune" / "model" / "plan.json").read_text())
    assert made["after"] == found["after"] and made["before"] == found["before"]
    assert "| layers | 4 | 4 |" in report(out).read_text()
