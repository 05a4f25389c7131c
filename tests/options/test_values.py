"""Values that no option takes: they end a command with one line and exit code 2 before any work, in Python as well."""

from __future__ import annotations

import json
import math
import resource
from dataclasses import fields
from pathlib import Path

import pytest

from mlx_pare import bench
from mlx_pare.base.errors import PareError, Refused, UsageError
from mlx_pare.options.settings import TABLE, Settings, settings_of
from mlx_pare.pipeline import run as pipeline
from mlx_pare.recovery.options import Options

HUGE = 10**12
NUMBERS = {  # settings that hold a number -> values that mean nothing
    "samples": (0, -1, HUGE, 2.5, "x", True),
    "length": (1, 10**11),
    "keep": (0.0, -0.5, 1.5, "0.75"),
    "context": (0, 2 * 10**9),
    "min_speed": (0.0, -1.0),
    "bits": (7, 0),
    "group_size": (7, 0),
    "step": (0, HUGE),
    "tries": (0, HUGE),
    "recover_steps": (-1, HUGE),
    "train_rows": (0, 10**11),
    "learning_rate": (0.0, -1.0, 1e9),
    "local_steps": (-1,),
    "batch": (0, HUGE),
    "accumulate": (0, HUGE),
    "clip": (-1.0,),
    "patience": (-1,),
    "rank": (0, HUGE),
    "temperature": (0.0, -1.0, 1e9),
    "cross_entropy": (-0.1, 1.5),
    "top": (0,),
    "on_policy": (-0.1, 1.5),
    "trials": (-1,),
    "min_quality": (0.0, -1.0),
    "memory_cap": (0, -1),
    "seed": (-1, 2**32),
}
WRONG = [(name, value) for name, values in NUMBERS.items() for value in (*values, math.nan, math.inf, -math.inf)]


def test_every_setting_is_an_option_and_every_number_is_held_to_a_range():
    assert set(TABLE) == {f.name for f in fields(Settings)}
    numbers = {f.name for f in fields(Settings) if {"int", "float"} & set(f.type.split(" | "))}
    assert set(NUMBERS) == numbers == {name for name in numbers if TABLE[name].values}
    Settings()  # the defaults are in their ranges


def test_every_number_of_recovery_is_held_to_a_range():
    numbers = [f for f in fields(Options) if {"int", "float"} & set(f.type.split(" | "))]
    assert len(numbers) > 10 and all(f.metadata["values"] for f in numbers)
    Options()


@pytest.mark.parametrize(("name", "value"), WRONG)
def test_f13_f24_f25_no_setting_takes_it(name, value):
    with pytest.raises(UsageError) as found:
        Settings(**{name: value})
    of_another_type = f"{name} must be" in found.value.problem
    assert of_another_type or (TABLE[name].flag in found.value.problem and "give" in found.value.cure)


@pytest.mark.parametrize("name", [f.name for f in fields(Options) if f.type in ("int", "float", "float | None")])
def test_f24_no_option_of_recovery_is_nan(name):
    with pytest.raises(UsageError, match="nan"):
        Options(**{name: math.nan}).check()


@pytest.mark.parametrize("value", ["nan", "inf", "-inf", "-1", "0"])
@pytest.mark.parametrize("option", ["--min-quality", "--learning-rate", "--keep", "--min-speed"])
def test_f13_f24_the_command_line_refuses_before_any_work(pare, pico_models, tmp_path, option, value):
    more = [] if option == "--keep" else ["--keep", "0.75"]
    code, out, err = pare("run", pico_models("llama"), "--out", tmp_path / "run", *more, f"{option}={value}", "--json")
    assert code == 2 and err.count("\n") == 1 and option in err, err
    assert json.loads(out)["exit_code"] == 2
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "options",
    [
        ["--samples", HUGE], ["--length", 10**11], ["--train-rows", 10**11], ["--batch", HUGE], ["--rank", HUGE],
        ["--accumulate", HUGE], ["--recover-steps", HUGE], ["--context", 2 * 10**9],
    ],
    ids=lambda o: o[0],
)  # fmt: skip
def test_f25_counts_that_nothing_holds(pare, pico_models, tmp_path, options):
    code, _, err = pare("run", pico_models("llama"), "--out", tmp_path / "run", "--keep", "0.75", *options)
    assert code == 2 and err.count("\n") == 1 and options[0] in err, err
    assert not (tmp_path / "run").exists()


LARGE = 10**8  # in the range, and more than any memory holds


@pytest.mark.parametrize(
    "change",
    [
        dict(samples=LARGE, memory_cap=1 << 40), dict(length=LARGE), dict(train_rows=LARGE), dict(batch=LARGE),
        dict(accumulate=LARGE), dict(recover_steps=LARGE, on_policy=1.0, accumulate=LARGE), dict(rank=LARGE),
        dict(accumulate=LARGE, on_policy=0.5), dict(local_steps=1, recover_steps=0, train_rows=LARGE),
        dict(samples=LARGE, widths="per-layer", recover_steps=0, memory_cap=1 << 40),
    ],
    ids=str,
)  # fmt: skip
def test_f25_large_counts_are_estimated_not_allocated(pico_models, tmp_path, change):
    """In a little memory: an estimate needs no rows."""
    model, settings = pico_models("llama"), Settings(keep=0.75, **change)
    table = Path("/proc/self/statm")
    used = int(table.read_text().split()[0]) * resource.getpagesize() if table.exists() else 0
    before = resource.getrlimit(resource.RLIMIT_AS)
    if used:
        resource.setrlimit(resource.RLIMIT_AS, (used + (512 << 20), before[1]))
    try:
        with pytest.raises(PareError) as found:
            pipeline.run(model, tmp_path / "run", settings)
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)
    assert isinstance(found.value, Refused) and "--" in str(found.value)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("numbers", [dict(prompt=10**11), dict(prompt=0), dict(new=1), dict(trials=0)], ids=str)
def test_f25_bench_refuses_what_it_cannot_time(pico_models, numbers):
    with pytest.raises(UsageError):
        bench([pico_models("llama")], **numbers)


def test_f25_bench_asks_for_room_for_the_prompt(pico_models):
    with pytest.raises(Refused, match="prompt"):
        bench([pico_models("llama")], prompt=5 * 10**8)


def test_f25_stability_and_fit(pare, pico_models):
    for command in (["fit", "qwen3-8b", "--context", HUGE], ["fit", "qwen3-8b", "--batch", HUGE]):
        code, _, err = pare(*command)
        assert code == 2 and err.count("\n") == 1, err


def test_settings_of_the_command_line_are_checked():
    with pytest.raises(UsageError, match="--memory-cap"):
        settings_of(memory_cap="1e30GB")
    with pytest.raises(UsageError, match="--schedule"):
        settings_of(stages="0.8,nan")


@pytest.mark.parametrize(
    "options", [["--mlx", "OUT", "--group-size", 7], ["-o", "OUT", "--context", 2 * 10**9]], ids=str
)
def test_f30_export_refuses_numbers_before_it_writes(pare, pico_models, tmp_path, options):
    given = [tmp_path / "out" if word == "OUT" else word for word in options]
    code, _, err = pare("export", pico_models("llama"), *given, "--no-verify")
    assert code == 2 and err.count("\n") == 1 and options[2] in err, err
    assert not list(tmp_path.iterdir())
