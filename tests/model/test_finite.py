"""NaN and infinite weights: the command that meets them first names the tensor (F33)."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from mlx_pare.base.errors import PareError
from mlx_pare.exporting import mlx_directory
from mlx_pare.model import finite
from mlx_pare.model.checkpoint import Checkpoint
from mlx_pare.pruning.plan_file import Plan
from mlx_pare.pruning.prune import prune
from mlx_pare.scoring.calibrate import calibrate_in_parts
from mlx_pare.text.corpus import Rows
from mlx_pare.text.splits import DEMO

FORMS = {"float32": (None, mx.float32), "float16": (None, mx.float16), "bfloat16": (None, mx.bfloat16),
         "8 bits": ((8, 32), mx.float32), "mxfp4": ("mxfp4", mx.bfloat16)}  # fmt: skip
TEXT = ["--data", DEMO / "test.txt", "--length", "32", "--samples", "2"]


def harmed(model: Path, place: Path, name: str, value: float) -> Path:
    """A copy of a model of whose tensor ``name`` one number is another."""
    copy = Path(shutil.copytree(model, place / "harmed"))
    weights = mx.load(str(copy / "model.safetensors"))
    array = weights[name]
    if array.dtype == mx.uint8:  # scales of a float mode
        array = mx.array(np.where(np.arange(array.size).reshape(array.shape) == 5, 255, np.array(array)).astype("u1"))
    else:
        flat = array.reshape(-1)
        flat[flat.size // 2] = value
        array = flat.reshape(array.shape)
    mx.save_safetensors(str(copy / "model.safetensors"), weights | {name: array}, {"format": "mlx"})
    return copy


LAYER = "model.layers.2.mlp.down_proj.weight"
PLACES = {
    "a layer": LAYER, "attention": "model.layers.0.self_attn.k_proj.weight",
    "a norm": "model.layers.1.input_layernorm.weight", "embedding": "model.embed_tokens.weight",
    "the last norm": "model.norm.weight",
}  # fmt: skip


@pytest.mark.parametrize("form", FORMS)
def test_the_scan_finds_one_number_in_any_form(pico_models, tmp_path, form):
    packed, dtype = FORMS[form]
    model = pico_models("llama", packed, dtype=dtype)
    assert finite.broken(Checkpoint(model)) is None
    name = LAYER.replace(".weight", ".scales") if packed else LAYER
    for value in (float("nan"), float("inf"), -float("inf")):
        bad = harmed(model, tmp_path, name, value)
        assert finite.broken(Checkpoint(bad)) == name
        assert finite.broken(Checkpoint(bad), finite.outside(Checkpoint(bad))) is None
        shutil.rmtree(bad)


@pytest.mark.parametrize("where", PLACES)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_f33_calibrate_and_evaluate_name_the_broken_tensor(pare, pico_models, tmp_path, where, value):
    bad = harmed(pico_models(), tmp_path, PLACES[where], value)
    for command in (["calibrate", "--out", tmp_path / "run"], ["evaluate"]):
        done = pare(command[0], bad, *command[1:], *TEXT, "--quiet")
        assert done.code == 1, done.err
        assert f"{PLACES[where]} holds NaN or infinite numbers. The model is damaged: download" in done.line
        assert "--no-reconstruct" not in done.line


def test_f33_directories_to_hand_on_are_not_made_of_a_broken_model(pare, pico_models, tmp_path):
    bad = harmed(pico_models(), tmp_path, LAYER, float("nan"))
    for option in ("--hub-ready", "--mlx"):
        done = pare("export", bad, option, tmp_path / "out")
        assert done.code == 1 and LAYER in done.line and not (tmp_path / "out").exists()
    for write in (
        lambda: mlx_directory.hub_ready(bad, tmp_path / "out"),
        lambda: mlx_directory.packed(bad, tmp_path / "out", 4, 32),
    ):
        with pytest.raises(PareError, match="holds NaN"):
            write()


def test_f33_prune_refuses_a_broken_model(pare, pico_models, tmp_path):
    """Also when the plan was made for the same model before: the units are right, the weights are not."""
    out = tmp_path / "run"
    for step in (["calibrate", pico_models(), "--out", out, *TEXT], ["score", out],
                 ["plan", out, "--keep", "0.75", "--widths", "even"]):  # fmt: skip
        assert pare(*step).code == 0
    plan = Plan.load(out / "plan" / "plan.json")
    bad = harmed(pico_models(), tmp_path, "model.norm.weight", float("inf"))
    plan = plan.model_copy(update={"source": Checkpoint(bad).identity()})
    with pytest.raises(PareError, match=r"model\.norm\.weight holds NaN or infinite"):
        prune(bad, plan, tmp_path / "pruned")
    assert not (tmp_path / "pruned").exists()


def test_weights_that_are_finite_but_overflow_are_told_apart(pare, pico_models, tmp_path):
    model = Path(shutil.copytree(pico_models(), tmp_path / "large"))
    weights = mx.load(str(model / "model.safetensors"))
    for role in ("up_proj", "gate_proj"):
        weights[f"model.layers.1.mlp.{role}.weight"] *= 1e25
    mx.save_safetensors(str(model / "model.safetensors"), weights, {"format": "mlx"})
    done = pare("calibrate", model, "--out", tmp_path / "run", *TEXT, "--quiet")
    assert done.code == 1 and "computes infinite numbers in layer 1, though its weights are finite" in done.line


@pytest.mark.parametrize("where", PLACES)
def test_parts_of_a_calibration_name_the_broken_tensor(pico_models, tmp_path, where):
    """`stability` calibrates by another function than `calibrate`."""
    bad = harmed(pico_models(), tmp_path, PLACES[where], float("nan"))
    with pytest.raises(PareError, match=re.escape(PLACES[where])):
        calibrate_in_parts(bad, Rows.full(np.arange(128).reshape(4, 32)), [2], tmp_path / "parts")
