"""The Python API: every verb takes text where it takes a path, a GGUF file where it takes a model, and says what is
wrong with a value of another type."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import mlx_pare
from mlx_pare import lm
from mlx_pare.base.errors import UsageError
from mlx_pare.capacity.macs import Budget
from mlx_pare.capacity.memory import Use
from mlx_pare.evaluation.metrics import Metrics
from mlx_pare.exporting.export import export as write_gguf
from mlx_pare.options.settings import Settings
from mlx_pare.planning.goal import Options as PlanOptions
from mlx_pare.pruning.plan_file import Plan
from mlx_pare.recovery.options import Options as RecoverOptions
from mlx_pare.text.corpus import Rows

LAYERS = {"num_hidden_layers": 2}  # whole runs take half the time of four
ROWS = Rows.full(np.random.default_rng(0).integers(0, 500, (4, 24)))


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("MLX_PARE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def steps(model: Any, at: Callable[[str], Any]) -> dict[str, Any]:
    """Every verb on a run of single calls; ``at`` makes a path from a name. Returns results that must not depend on
    what a path is given as."""
    found: dict[str, Any] = {}
    found["stats"] = str(mlx_pare.calibrate(model, ROWS, at("stats")))
    found["scores"] = str(mlx_pare.score(model, at("stats/stats.safetensors"), at("scores.safetensors")))
    made = mlx_pare.plan(model, at("scores.safetensors"), PlanOptions(keep=0.75, axes=("ffn",)))
    made = mlx_pare.reconstruct(model, made, ROWS, at("repair"))
    found["plan"] = made.model_dump()
    Path(at("plan.json")).write_bytes(made.dump())
    found["pruned"] = mlx_pare.prune(model, at("plan.json"), at("pruned"), repair=at("repair"))
    found["recovered"] = mlx_pare.recover(
        at("pruned"), model, ROWS, ROWS, at("recovered"), RecoverOptions(steps=1, batch=2), work=at("work")
    )["kept"]
    found["evaluated"] = mlx_pare.evaluate(at("recovered"), ROWS, lm.tokenizer(at("recovered")), model).kl_divergence
    found["exported"] = mlx_pare.export(at("pruned"), at("pruned.gguf"), "q8_0")["bytes"]
    timed = mlx_pare.bench([at("pruned"), model], trials=1, prompt=8, new=2)
    assert len(timed["models"]) == 2
    assert len(mlx_pare.bench(model, trials=1, prompt=8, new=2)["models"]) == 1
    found["inspected"] = mlx_pare.inspect(at("pruned"))["ffn"]
    found["fits"] = mlx_pare.fit(at("pruned"), "m4-24gb")["weights_bytes"]
    assert len(mlx_pare.fit(at("pruned"), ["m4-24gb"])["rows"]) == 1
    return {k: v.replace(str(at("")).rstrip("/"), "") if isinstance(v, str) else v for k, v in found.items()}


def test_f31_every_verb_takes_text_for_a_path(pico_models, tmp_path):
    model = pico_models("llama", **LAYERS)
    for name in ("text", "path"):
        (tmp_path / name).mkdir()
    as_text = steps(str(model), lambda name: str(tmp_path / "text" / name))
    as_path = steps(model, lambda name: tmp_path / "path" / name)
    assert as_text == as_path


def test_f31_run_report_and_status_take_text(pico_models, two_texts, tmp_path):
    settings = Settings(
        keep=0.9, axes=("ffn",), samples=4, length=32, recover_steps=0, widths="even", trials=0,
        data=Path(two_texts["data"]), test_data=Path(two_texts["test_data"]),
    )  # fmt: skip
    done = mlx_pare.run(str(pico_models("llama", **LAYERS)), str(tmp_path / "run"), settings)
    assert Path(done["model"]).is_dir()
    assert mlx_pare.report(str(tmp_path / "run")) == tmp_path / "run" / "report.md"
    assert mlx_pare.status(str(tmp_path / "run"))["state"] == "finished"
    again = mlx_pare.run(pico_models("llama", **LAYERS), tmp_path / "run", settings)
    assert again["after"] == done["after"]
    found = Plan.load(str(tmp_path / "run" / "plan" / "plan.json"))
    assert found == Plan.load(tmp_path / "run" / "plan" / "plan.json")
    assert Metrics.load(str(tmp_path / "run" / "evaluate-pruned" / "metrics.json")).windows


def test_f31_a_gguf_file_is_a_model(pico_models, tmp_path):
    write_gguf(pico_models("llama", **LAYERS), tmp_path / "m.gguf", "q8_0")
    (tmp_path / "out").mkdir()
    found = steps(str(tmp_path / "m.gguf"), lambda name: str(tmp_path / "out" / name))
    assert found["inspected"] < 128
    text = "It's a text."
    assert lm.tokenizer(str(tmp_path / "m.gguf")).encode(text) == lm.tokenizer(pico_models("llama", **LAYERS)).encode(
        text
    )


def test_f31_a_run_of_gguf_files(pico_models, two_texts, tmp_path):
    write_gguf(pico_models("llama", **LAYERS), tmp_path / "m.gguf", "q8_0")
    settings = Settings(
        keep=0.9, axes=("ffn",), samples=4, length=32, recover_steps=1, train_rows=4, widths="even", trials=0,
        teacher=str(tmp_path / "m.gguf"), **two_texts,
    )  # fmt: skip
    done = mlx_pare.run(str(tmp_path / "m.gguf"), str(tmp_path / "run"), settings)
    assert Path(done["model"]).is_dir()


# ---- options of another type ----

WRONG = [
    (Settings, "keep", "0.75", "keep=0.75"),
    (Settings, "samples", "4", "samples=4"),
    (Settings, "samples", 4.5, "int"),
    (Settings, "length", None, "int"),
    (Settings, "seed", True, "int"),
    (Settings, "axes", "ffn", "Sequence"),
    (Settings, "axes", ("ffn", 5), "Sequence"),
    (Settings, "stages", "0.8,0.5", "Sequence"),
    (Settings, "stages", (0.8, "0.5"), "Sequence"),
    (Settings, "data", 5, "str"),
    (Settings, "reconstruct", "no", "bool"),
    (Settings, "memory_cap", "4GB", "int"),
    (Settings, "learning_rate", "1e-4", "learning_rate=1e-4"),
    (PlanOptions, "keep", "0.75", "keep=0.75"),
    (RecoverOptions, "steps", "10", "steps=10"),
    (RecoverOptions, "learning_rate", [1e-4], "float"),
    (Use, "context", "8192", "context=8192"),
    (Budget, "reserve_bytes", "3GB", "int"),
]


@pytest.mark.parametrize(("options", "field", "value", "said"), WRONG, ids=lambda v: getattr(v, "__name__", str(v)))
def test_f31_an_option_of_another_type_is_named(options, field, value, said):
    with pytest.raises(UsageError) as error:
        options(**{field: value})
    assert field in str(error.value) and repr(value) in str(error.value) and said in str(error.value)


def test_f31_numbers_of_any_kind_are_numbers(tmp_path):
    made = Settings(keep=np.float32(0.75), samples=np.int64(4), stages=[0.5], data=[tmp_path / "a", "b"], min_speed=12)
    assert made.data == (str(tmp_path / "a"), "b") and made.keep == 0.75
    assert dataclasses.replace(made, keep=1).keep == 1


def test_f31_bench_of_text_is_one_model(tmp_path):
    with pytest.raises(mlx_pare.base.errors.PareError, match="none"):
        mlx_pare.bench(str(tmp_path / "none"))
