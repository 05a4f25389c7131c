"""What is shipped for the demo: a small real model that stock mlx-lm opens, and two texts that share nothing."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from mlx_pare import lm
from mlx_pare.base.errors import PareError
from mlx_pare.cli import main as cli
from mlx_pare.evaluation.evaluate import evaluate
from mlx_pare.model.checkpoint import Checkpoint
from mlx_pare.pipeline import run as pipeline, steps
from mlx_pare.text import corpus, overlap
from mlx_pare.text.splits import DEMO

MODEL = DEMO / "model"
TEXTS = {name: DEMO / f"{name}.txt" for name in ("calibration", "test")}
UNIFORM = 4096  # tokens in its vocabulary: the perplexity of knowing nothing


@pytest.fixture
def asked(monkeypatch) -> steps.Settings:
    """What `mlx-pare demo` asks of a run."""
    seen = {}
    monkeypatch.setattr(cli, "_run", lambda model, out, settings, dry_run=False: seen.update(of=(model, settings)))
    cli.app(["demo", "--quiet"], standalone_mode=False)
    model, settings = seen["of"]
    assert model == MODEL
    return settings


def test_shipped_model_is_small_and_packed():
    assert sum(f.stat().st_size for f in MODEL.iterdir()) < 11e6
    checkpoint = Checkpoint(MODEL)
    assert checkpoint.config["quantization"] == {"bits": 8, "group_size": 64, "mode": "affine"}
    assert (checkpoint.quantization.bits, checkpoint.quantization.group_size) == (8, 64)
    matrices = [t for t in checkpoint.arch.tensors() if t.matrix]
    assert matrices and all(checkpoint.packing(t.module).bits == 8 for t in matrices)


def test_shipped_model_needs_no_code_and_says_where_it_is_from():
    assert not {f.suffix for f in MODEL.iterdir()} - {".json", ".safetensors", ".md"}
    assert "auto_map" not in json.loads((MODEL / "config.json").read_text())
    assert "public-domain" in (MODEL / "README.md").read_text("utf-8")


def test_stock_mlx_lm_opens_it_and_it_writes_text():
    import mlx.core as mx
    from mlx_lm import generate, load

    model, tokenizer = load(str(MODEL))
    model.set_dtype(mx.float32)  # as loading.load_stock: bfloat16 is slow on the CPU backend
    text = generate(model, tokenizer, "The house was", max_tokens=24)
    assert len(text.split()) >= 8 and text.isascii()
    assert len(set(text.split())) >= 5


@pytest.mark.parametrize("name", TEXTS)
def test_texts_are_plain_and_of_some_thousand_words(name):
    text = TEXTS[name].read_text("utf-8")
    assert text.isascii() and "\r" not in text and "\t" not in text
    assert 4000 < len(text.split()) < 20000


def test_texts_are_disjoint():
    texts = {name: corpus.read(path) for name, path in TEXTS.items()}
    overlap.forbid(texts)
    paragraph = max(texts["test"][0].split("\n"), key=len)
    with pytest.raises(PareError, match="share the paragraph"):
        overlap.forbid({**texts, "calibration": [texts["calibration"][0] + "\n" + paragraph]})


MEASURED = [("test", 66, 75), ("calibration", 59, 68)]  # 70.31 and 63.42 on the CPU backend


@pytest.mark.parametrize("name, least, most", MEASURED)
def test_perplexity_is_that_of_a_model_that_knows_english(name, least, most):
    tokenizer = lm.tokenizer(MODEL)
    rows = corpus.windows(tokenizer, corpus.read(TEXTS[name]), 128, 4)
    found = evaluate(MODEL, rows, tokenizer)
    assert least < found.perplexity < most < UNIFORM / 20
    assert found.tokens == 4 * 127 and found.perplexity_stderr < found.perplexity / 3
    assert 1.0 < found.bits_per_byte < 2.2


def test_demo_asks_for_three_quarters_and_gets_them(asked):
    assert asked.keep == 0.75
    made = pipeline.shape_of(MODEL, asked)
    kept = made["after"]["non_embedding"] / made["before"]["non_embedding"]
    assert kept == pytest.approx(0.75, abs=0.01)
    assert made["after"]["bytes"] < made["before"]["bytes"]


def test_demo_has_text_enough_for_what_it_asks(asked):
    texts = steps.Texts(MODEL, asked)
    assert texts.calibration.count >= 32 and texts.test.count >= 16 and texts.validation.count >= 3
    assert texts.test.length == asked.length
    assert len({rows.digest() for rows in (texts.calibration, texts.validation, texts.test)}) == 3


def test_demo_has_a_place_of_its_own():
    assert Path("demo-run") == cli.demo_command.__wrapped__.__defaults__[0]
