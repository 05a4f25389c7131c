"""Chats are written as of one date for all of a run, whatever way a template asks the clock."""

from __future__ import annotations

import datetime
import json
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pico
import pytest
from prose import chats, jsonl

from mlx_pare import lm
from mlx_pare.base.errors import PareError, Refused
from mlx_pare.model import tokenizer_files
from mlx_pare.options.settings import Settings
from mlx_pare.pipeline import recipes
from mlx_pare.pipeline.run import run
from mlx_pare.pipeline.steps import calibrate_step, open_run
from mlx_pare.store.rundir import Run
from mlx_pare.text import provenance
from mlx_pare.text.splits import Texts

SAYS = "{% for m in messages %}{{ '<|' + m['role'] + ' ' + CLOCK + '|>\n' + m['content'] + '\n' }}{% endfor %}"
CLOCK = SAYS.replace("CLOCK", "strftime_now('%d %b %Y %H:%M:%S')")
SET = "{% if not date_string is defined %}{% set date_string = strftime_now('%d %b %Y') %}{% endif %}"
IF_GIVEN = SET + SAYS.replace("CLOCK", "date_string")
CHAT = [{"role": "user", "content": "hello"}]


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    made = pico.make(tmp_path_factory.mktemp("model") / "m", num_hidden_layers=2)
    config = json.loads((made / "tokenizer_config.json").read_text())
    (made / "tokenizer_config.json").write_text(json.dumps(config | {"chat_template": CLOCK}))
    return made


@pytest.fixture
def data(tmp_path) -> str:
    return str(jsonl(tmp_path / "chats.jsonl", chats(60)))


@pytest.fixture
def tomorrow(monkeypatch):
    """Call it, and it is another day for this process and those that it starts."""

    def go(days: int = 1) -> None:
        real = datetime.date

        class Later(real):
            @classmethod
            def today(cls):
                return real.today() + datetime.timedelta(days=days)

        monkeypatch.setattr(datetime, "date", Later)

    return go


@pytest.mark.parametrize("template", [CLOCK, IF_GIVEN])
def test_case_20_a_template_is_told_the_date(model, tmp_path, template):
    shutil.copytree(model, tmp_path / "m")
    (tmp_path / "m" / "tokenizer_config.json").unlink()
    (tmp_path / "m" / "chat_template.jinja").write_text(template)
    written = tokenizer_files.Chats(tmp_path / "m", "2025-02-03")(CHAT)
    assert written.startswith("<|user 03 Feb 2025") and "hello" in written
    assert template is IF_GIVEN or "00:00:00" in written
    chats = tokenizer_files.Chats(tmp_path / "m")
    assert datetime.date.today().strftime("%d %b %Y") in chats(CHAT)
    assert "07 Jun 2031" in chats(CHAT, today=datetime.datetime(2031, 6, 7, 8, 9))
    assert datetime.date.today().strftime("%d %b %Y") in chats(CHAT)


def test_case_20_python_that_stands_in_for_a_template_is_told_it_too(tmp_path):
    """As mlx-lm's own templates, which are Python: they ask datetime, or time."""
    code = (
        "from mlx_pare.base.frozen_clock import Clock; Clock().set('2025-02-03')\n"
        "from datetime import date, datetime, timezone; import time\n"
        "print(datetime.now().isoformat(), datetime.now(timezone.utc).isoformat(), datetime.today().isoformat(),"
        " datetime.utcnow().isoformat(), date.today().isoformat(), time.strftime('%Y-%m-%d'),"
        " time.strftime('%Y', time.localtime()), time.strftime('%Y', time.gmtime(0)), time.time() > 1.7e9)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    midnight = "2025-02-03T00:00:00"
    expected = [midnight, f"{midnight}+00:00", midnight, midnight, "2025-02-03", "2025-02-03", "2025", "1970", "True"]
    assert done.stdout.split() == expected


@pytest.mark.parametrize("date", ["yesterday", "2025-13-01", 3])
def test_case_20_what_is_no_date(model, date):
    with pytest.raises(PareError, match=r"is no date. Write it as 2026-01-31"):
        lm.tokenizer(model, date)


def test_case_20_a_run_goes_on_tomorrow(model, data, tmp_path, tomorrow):
    """Calibrated on one day, finished on the next; and what was calibrated on another date is refused."""
    s = Settings(data=data, keep=0.8, samples=4, length=32, recover_steps=1, train_rows=4, trials=0, widths="even",
                 axes=("ffn",), gguf="f16", context=128)  # fmt: skip
    out = tmp_path / "run"
    with open_run(model, out) as opened:
        first = recipes.dated(out, s)
        opened.write_recipe(recipes.recipe_of(model, first))
        calibrate_step(opened, Texts(model, first), first)
    begun = tomllib.loads((out / "recipe.toml").read_text())["date"]
    tomorrow()
    assert datetime.date.today().isoformat() != begun
    run(model, out, s)
    assert tomllib.loads((out / "recipe.toml").read_text())["date"] == begun
    texts = Texts(model, recipes.dated(tmp_path / "new", s))
    assert texts.settings.date == datetime.date.today().isoformat()
    with Run(out) as opened:
        assert recipes.texts_of(opened).calibration.digest() == opened.manifest.steps["calibrate"].inputs["data"]
        with pytest.raises(Refused, match=r"the calibrate step .* its input data changed"):
            calibrate_step(opened, texts, texts.settings)


def test_case_20_a_date_that_was_edited_is_named(model, data, tmp_path):
    s = Settings(data=data, samples=4, length=32, date="2025-02-03")
    with open_run(model, tmp_path / "run") as opened:
        opened.write_recipe(recipes.recipe_of(model, s))
        calibrate_step(opened, Texts(model, s), s)
        file = tmp_path / "run" / "recipe.toml"
        file.write_text(file.read_text().replace("2025-02-03", "2025-02-04"))
        with pytest.raises(Refused, match=r"date was '2025-02-03' when .* was calibrated, now it is '2025-02-04'"):
            provenance.check(opened, recipes.texts_of(opened))
        file.unlink()
        assert recipes.dated(tmp_path / "run", Settings()).date == "2025-02-03"
