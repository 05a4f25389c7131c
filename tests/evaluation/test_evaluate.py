"""Perplexity, KL and their neighbours equal float64 numpy, padded or not, in chunks or whole."""

from __future__ import annotations

import itertools
import json
import math
import shutil
from pathlib import Path

import mlx.core as mx
import numpy as np
import pico
import pytest
import reference
from mlx.utils import tree_flatten

from mlx_pare import lm
from mlx_pare.base.errors import PareError, Refused, UsageError
from mlx_pare.evaluation import divergence
from mlx_pare.evaluation.evaluate import evaluate
from mlx_pare.evaluation.metrics import Metrics
from mlx_pare.model.checkpoint import Checkpoint
from mlx_pare.pipeline import stability
from mlx_pare.recovery.options import Options
from mlx_pare.recovery.recover import recover
from mlx_pare.store.schema import dump_json
from mlx_pare.stream import head
from mlx_pare.text import corpus
from mlx_pare.text.corpus import Rows


def rows(count: int = 6, length: int = 16, lengths: list[int] | None = None) -> Rows:
    full = Rows.full(np.random.default_rng(0).integers(0, 500, (count, length)))
    return full if lengths is None else Rows(full.tokens, np.array(lengths, dtype=np.int32))


PADDED = rows(lengths=[16, 3, 2, 9, 12, 16])


def predicted(values: np.ndarray, data: Rows) -> list[np.ndarray]:
    """The values of the predicted tokens of each row; values [rows, tokens - 1]."""
    return [row[: n - 1] for row, n in zip(values, data.lengths, strict=True)]


def logits(model, data: Rows) -> np.ndarray:
    return reference.forward(*reference.load(model), data.tokens)[0][:, :-1]


# ---- perplexity ----


@pytest.mark.parametrize("data", [rows(), PADDED], ids=["full", "padded"])
@pytest.mark.parametrize("packed", [None, (4, 32)], ids=["dense", "4 bits"])
@pytest.mark.parametrize("family", [*pico.FAMILIES, "gemma2", "granite"])
def test_perplexity(pico_models, family, packed, data):
    model = pico_models(family, packed)
    found = evaluate(model, data)
    nll = predicted(reference.nll(logits(model, data), data.tokens[:, 1:]), data)
    every = np.concatenate(nll)
    assert found.perplexity == pytest.approx(np.exp(every.mean()), rel=1e-4)
    assert found.perplexity_stderr == pytest.approx(np.exp(every.mean()) * reference.clustered_error(nll), rel=1e-3)
    assert (found.tokens, found.windows, found.length) == (len(every), 6, 16)
    assert found.bits_per_byte is found.kl_divergence is found.kl_p95 is found.top1_agreement is None


def test_error_of_equal_rows_is_that_of_their_means(pico_models):
    nll = reference.nll(logits(pico_models("llama"), rows()), rows().tokens[:, 1:])
    error = nll.mean(axis=1).std(ddof=1) / math.sqrt(6)
    assert reference.clustered_error(list(nll)) == pytest.approx(error)
    found = evaluate(pico_models("llama"), rows())
    assert found.perplexity_stderr / found.perplexity == pytest.approx(error, rel=1e-3)


def test_error_of_a_single_row_is_that_of_its_tokens(pico_models):
    data = rows(1, 16)
    nll = reference.nll(logits(pico_models("llama"), data), data.tokens[:, 1:])
    found = evaluate(pico_models("llama"), data)
    assert found.perplexity_stderr / found.perplexity == pytest.approx(nll.std(ddof=1) / math.sqrt(15), rel=1e-3)


def test_rows_without_a_prediction_add_nothing(pico_models):
    """One token has nothing before it, and an empty row nothing at all."""
    full = rows()
    some = Rows(full.tokens, np.array([16, 1, 9, 0, 12, 16], dtype=np.int32))
    same = Rows(full.tokens[[0, 2, 4, 5]], some.lengths[[0, 2, 4, 5]])
    found, expected = evaluate(pico_models("llama"), some), evaluate(pico_models("llama"), same)
    assert found.tokens == expected.tokens == 15 + 8 + 11 + 15
    assert found.perplexity == pytest.approx(expected.perplexity, rel=1e-6)
    assert found.perplexity_stderr == pytest.approx(expected.perplexity_stderr, rel=1e-4)


@pytest.mark.parametrize("data", [rows(3, 1), rows(1, 2)], ids=["no prediction", "one"])
def test_too_little_to_measure(pico_models, data):
    with pytest.raises(UsageError, match="too little"):
        evaluate(pico_models("llama"), data)


@pytest.mark.parametrize("at_once", [1, 40])
def test_in_parts(pico_models, monkeypatch, at_once):
    """One row, and two rows, at a time; the vocabulary in pieces of seven."""
    model, teacher = pico_models("qwen3"), pico_models("qwen3", seed=1)
    whole = evaluate(model, PADDED, teacher=teacher)
    monkeypatch.setattr(divergence, "TOKENS_AT_ONCE", at_once)
    monkeypatch.setattr(head, "CHUNK_BYTES", 4 * 64 * 7)
    parts = evaluate(model, PADDED, teacher=teacher)
    for name in ("perplexity", "perplexity_stderr", "kl_divergence", "kl_p95", "top1_agreement"):
        assert getattr(parts, name) == pytest.approx(getattr(whole, name), rel=1e-4), name


def test_what_stands_in_the_padding_does_not_matter(pico_models):
    other = Rows(np.where(PADDED.mask(), PADDED.tokens, 7), PADDED.lengths)
    a, b = evaluate(pico_models("llama"), PADDED), evaluate(pico_models("llama"), other)
    assert a.perplexity == pytest.approx(b.perplexity, rel=1e-6)


@pytest.mark.parametrize("kind", ["bpe", "spm"])
@pytest.mark.parametrize("text", ["The first snow fell in November.", "Grüße: 日本 🙂 naïve"])
def test_bits_per_byte_of_a_short_text(pico_models, kind, text):
    """-log2 p(text | BOS) over its UTF-8 bytes."""
    model = pico_models("llama", tokenizer=kind)
    tok = lm.tokenizer(model)
    ids = [tok.bos_token_id, *tok.encode(text, add_special_tokens=False)]
    data = corpus.windows(tok, [text], len(ids))
    assert data.tokens.tolist() == [ids]
    nll = reference.nll(logits(model, data), data.tokens[:, 1:])
    found = evaluate(model, data, tok)
    assert found.bits_per_byte == pytest.approx(nll.sum() / math.log(2) / len(text.encode()), rel=1e-5)


def test_metrics_can_be_written_and_read(pico_models, tmp_path):
    found = evaluate(pico_models("llama"), rows(), teacher=pico_models("llama", (4, 32)), data="a book")
    (tmp_path / "m.json").write_bytes(dump_json(found))
    assert Metrics.load(tmp_path / "m.json") == found and found.data == "a book"


# ---- against a teacher ----


@pytest.mark.parametrize("data", [rows(), PADDED], ids=["full", "padded"])
@pytest.mark.parametrize("family", ["llama", "llama-untied", "gemma3_text"])
def test_teacher(pico_models, family, data):
    model, teacher = pico_models(family, (4, 32)), pico_models(family)
    found = evaluate(model, data, teacher=teacher)
    t, s = logits(teacher, data), logits(model, data)
    kl = np.concatenate(predicted(reference.kl(t, s), data))
    agree = np.concatenate(predicted(t.argmax(-1) == s.argmax(-1), data))
    assert found.kl_divergence == pytest.approx(kl.mean(), rel=1e-4)
    assert found.kl_p95 == pytest.approx(reference.percentile(kl, 95), rel=1e-4)
    assert found.top1_agreement == pytest.approx(agree.mean(), abs=1e-9) and 0.2 < agree.mean() < 1


@pytest.mark.parametrize("packed", [None, (4, 32)], ids=["dense", "4 bits"])
@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
def test_own_teacher(pico_models, family, packed):
    model = pico_models(family, packed)
    found = evaluate(model, PADDED, teacher=model)
    assert abs(found.kl_divergence) < 1e-6 and abs(found.kl_p95) < 1e-5 and found.top1_agreement == 1


def test_kl_has_a_direction(pico_models):
    a, b = pico_models("llama"), pico_models("llama", seed=1)
    there, back = evaluate(a, rows(), teacher=b).kl_divergence, evaluate(b, rows(), teacher=a).kl_divergence
    assert there == pytest.approx(reference.kl(logits(b, rows()), logits(a, rows())).mean(), rel=1e-4)
    assert abs(there - back) > 0.01


# ---- what cannot be measured ----


def damaged(model, directory):
    shutil.copytree(model, directory)
    weights = mx.load(str(model / "model.safetensors"))
    weights["model.layers.1.mlp.up_proj.weight"] *= mx.nan
    mx.save_safetensors(str(directory / "model.safetensors"), weights)
    return directory


def test_nan(pico_models, tmp_path):
    broken = damaged(pico_models("llama"), tmp_path / "m")
    with pytest.raises(PareError, match="NaN") as found:
        evaluate(broken, rows())
    assert str(broken) in str(found.value) and found.value.exit_code == 1


def test_nan_of_the_teacher(pico_models, tmp_path):
    broken = damaged(pico_models("llama"), tmp_path / "m")
    with pytest.raises(PareError, match="NaN") as found:
        evaluate(pico_models("llama"), rows(), teacher=broken)
    assert str(broken) in str(found.value)


def test_other_tokenizer(pico_models, tmp_path):
    with pytest.raises(Refused, match=r"has another vocabulary, 600 tokens, than .*, 512 tokens"):
        evaluate(pico_models("llama"), rows(), teacher=wide(tmp_path / "wide"))
    same_size = tmp_path / "same"
    shutil.copytree(pico_models("llama"), same_size)
    (same_size / "tokenizer.json").write_text(pico.tokenizer_json("spm"), "utf-8")
    with pytest.raises(Refused, match="has another tokenizer than"):
        evaluate(pico_models("llama"), rows(), teacher=same_size)


def test_a_tokenizer_that_is_written_in_another_way_is_the_same(pico_models, tmp_path):
    """mlx_lm.convert writes tokenizer.json anew."""
    again = tmp_path / "again"
    shutil.copytree(pico_models("llama"), again)
    content = json.loads((again / "tokenizer.json").read_text("utf-8"))
    (again / "tokenizer.json").write_text(json.dumps(content, indent=3), "utf-8")
    assert evaluate(pico_models("llama"), rows(), teacher=again).kl_divergence == pytest.approx(0, abs=1e-6)


def wide(directory):
    """A model with a larger vocabulary."""
    directory.mkdir()
    config = pico.config_of("llama", vocab_size=600)
    weights = dict(tree_flatten(pico.build(config).parameters()))
    mx.save_safetensors(str(directory / "model.safetensors"), weights)
    (directory / "config.json").write_text(json.dumps(config))
    return directory


def test_tokens_outside_the_vocabulary(pico_models):
    with pytest.raises(UsageError, match="token 512"):
        evaluate(pico_models("llama"), Rows.full(np.array([[1, 2, 512]])))


@pytest.mark.parametrize("teacher", [False, True])
def test_f23_special_tokens_only(pico_models, teacher):
    """They have no characters, so there are no bits per byte."""
    model = pico_models("llama")
    tokenizer = lm.tokenizer(model)
    special = Rows.full(np.full((2, 8), tokenizer.bos_token_id))
    found = evaluate(model, special, tokenizer, model if teacher else None)
    assert found.bits_per_byte is None and found.tokens == 14 and found.perplexity > 0
    mixed = Rows.full(np.concatenate([special.tokens[:1], rows().tokens[:1, :8]]))
    assert evaluate(model, mixed, tokenizer).bits_per_byte > 0


@pytest.mark.parametrize("asks", ["evaluate", "recover", "stability"])
@pytest.mark.parametrize("other", ["files", "sizes", "no files"])
def test_another_tokenizer_is_refused_in_one_way(pico_models, tmp_path, asks, other):
    """Whoever asks, the answer is one, with one exit code."""
    model = pico_models("llama")
    if other == "sizes":
        theirs = wide(tmp_path / "wide")
    else:
        theirs = Path(shutil.copytree(model, tmp_path / "theirs"))
        if other == "files":
            (theirs / "tokenizer.json").write_text(pico.tokenizer_json("spm"), "utf-8")
        else:
            for file in ("tokenizer.json", "tokenizer_config.json"):
                (theirs / file).unlink()
    ask = {
        "evaluate": lambda: evaluate(model, rows(), teacher=theirs),
        "recover": lambda: recover(model, theirs, rows(), rows(), tmp_path / "out", Options(steps=1)),
        "stability": lambda: stability.require_parent(model, theirs),
    }[asks]
    with pytest.raises(Refused, match=r"another (vocabulary|tokenizer)") as found:
        ask()
    assert found.value.exit_code == 3


def test_memory_cap(pico_models):
    with pytest.raises(Refused, match="memory-cap"):
        evaluate(pico_models("llama"), rows(), memory_cap=1000)


def test_models_share_a_tokenizer_when_their_files_do(pico_models):
    """What a pruned model is compared with: another family of the same vocabulary is no error."""
    assert Checkpoint(pico_models("llama")).arch.sizes["vocab"] == 512
    assert evaluate(pico_models("qwen3"), rows(), teacher=pico_models("llama")).kl_divergence > 0


# ---- divergence ----


def pieces(values: np.ndarray, sizes: list[int]) -> list[tuple[int, mx.array]]:
    starts = np.cumsum([0, *sizes])
    assert starts[-1] == values.shape[1]
    return [(int(a), mx.array(values[:, a:b])) for a, b in itertools.pairwise(starts)]


CHUNKS = [[97], [1] * 97, [40, 40, 17], [96, 1], [1, 96], [7] * 13 + [6]]


def pair(scale: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(targets, student, teacher): float32 logits over 97 tokens."""
    draw = np.random.default_rng(0)
    s, t = (draw.standard_normal((50, 97)).astype(np.float32) * scale for _ in range(2))
    return draw.integers(0, 97, 50), s, t


@pytest.mark.parametrize("scale", [0.1, 3, 30])
@pytest.mark.parametrize("sizes", CHUNKS, ids=lambda s: f"{len(s)} chunks")
def test_compare_in_chunks(sizes, scale):
    targets, s, t = pair(scale)
    found = divergence.compare(mx.array(targets), pieces(s, sizes), pieces(t, sizes))
    for kl in (reference.kl(t, s), np.array(divergence.kl(mx.array(t), mx.array(s)))):
        np.testing.assert_allclose(np.array(found["kl"]), kl, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(np.array(found["nll"]), reference.nll(s, targets), rtol=1e-5, atol=1e-5)
    assert np.array_equal(np.array(found["agree"]), t.argmax(-1) == s.argmax(-1))
    alone = divergence.compare(mx.array(targets), pieces(s, sizes))
    assert list(alone) == ["nll"] and np.array_equal(np.array(alone["nll"]), np.array(found["nll"]))


@pytest.mark.parametrize("sizes", CHUNKS, ids=lambda s: f"{len(s)} chunks")
def test_extreme_logits_stay_finite(sizes):
    targets, s, t = pair(1)
    s, t = np.sign(s) * 1e4, np.sign(t) * 1e4
    s[0], t[1] = -1e4, -1e4
    s[2, :-1], s[2, -1], t[3, 0], t[3, 1:] = -1e4, 1e4, 1e4, -1e4
    found = divergence.compare(mx.array(targets), pieces(s, sizes), pieces(t, sizes))
    assert all(np.isfinite(np.array(v)).all() for v in found.values())
    np.testing.assert_allclose(np.array(found["kl"]), reference.kl(t, s), rtol=1e-5, atol=4e-3)  # 1e4 in float32
    np.testing.assert_allclose(np.array(found["nll"]), reference.nll(s, targets), rtol=1e-5, atol=4e-3)
    whole = np.array(divergence.kl(mx.array(t), mx.array(s)))
    np.testing.assert_allclose(whole, reference.kl(t, s), rtol=1e-3, atol=4e-3)


def test_kl_of_equal_logits_is_zero():
    _, s, _ = pair(30)
    assert np.abs(np.array(divergence.kl(mx.array(s), mx.array(s)))).max() == 0
    assert np.abs(np.array(divergence.kl(mx.array(s), mx.array(s + 5)))).max() < 1e-5  # logits have no zero point


def test_agreement_takes_the_first_of_equal_logits():
    """As argmax does, however the vocabulary is cut."""
    flat = np.zeros((1, 6), dtype=np.float32)
    first = np.array([[1, 0, 0, 0, 0, 1]], dtype=np.float32)
    for sizes in ([6], [3, 3], [1] * 6):
        assert divergence.compare(mx.array([0]), pieces(first, sizes), pieces(flat, sizes))["agree"].item()


def test_percentile_of_the_reference():
    values = np.random.default_rng(0).standard_normal(37)
    assert reference.percentile(values, 95) == pytest.approx(np.percentile(values, 95))
