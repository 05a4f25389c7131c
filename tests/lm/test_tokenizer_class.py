"""The tokenizer that transformers makes of a directory: what it keeps of tokenizer.json, and a cut of it."""

from __future__ import annotations

import functools
import json
import shutil
from pathlib import Path

import pico
import pytest

from mlx_pare import lm
from mlx_pare.base.errors import PareError
from mlx_pare.evaluation.sanity import check
from mlx_pare.exporting import llama_cpp
from mlx_pare.exporting.export import export
from mlx_pare.lm import tokenizer_class
from mlx_pare.model.checkpoint import Checkpoint
from mlx_pare.pruning.prune import prune
from tests.exporting.test_export import needs_llama
from tests.pruning.test_prune import plan_of

CL100K = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
STRINGS = ("12345 67890", "a\n\nb", "lake\n\n\nriver 592319", "  two spaces", "HelloWorld don't", "日本 naïve")


@functools.cache
def trained(pattern: str) -> str:
    """A byte-level tokenizer.json with this pattern, of 512 tokens, among them runs of digits and line ends."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

    made = Tokenizer(models.BPE())
    level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    made.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(pattern), "isolated"), level])
    made.decoder = decoders.ByteLevel()
    letters = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=512, special_tokens=["<|endoftext|>"], initial_alphabet=letters, show_progress=False
    )
    made.train_from_iterator([f"{i * 7919} don't lake\n\n\nriver  two" for i in range(400)], trainer)
    return made.to_str()


def split_by(directory: Path, pattern: str, **settings) -> Path:
    """The directory with such a tokenizer.json, and these settings in tokenizer_config.json."""
    raw = json.loads(trained(pattern))
    for i in range(len(raw["model"]["vocab"]), 512):  # as many tokens as the model has rows
        raw["model"]["vocab"][f"\u0120unused{i}"] = i
    (directory / "tokenizer.json").write_text(json.dumps(raw), "utf-8")
    return configured(directory, **settings)


def configured(directory: Path, **settings) -> Path:
    """The directory with these settings in tokenizer_config.json."""
    file = directory / "tokenizer_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | settings))
    return directory


def uneven(model: Path, out: Path) -> Path:
    """A cut whose layers differ, so that it leaves as another type."""
    plan = plan_of(model, ("ffn",))
    plan.layers[0].ffn = plan.layers[0].ffn[:-3]
    prune(model, plan, out)
    return out


def read_by(model: Path) -> list[list[int]]:
    tokenizer = lm.stock_tokenizer(model)
    return [tokenizer.encode(text) for text in STRINGS]


# ---- the result reads what the original reads ----

CLASSES = ("GPT2Tokenizer", "GPT2TokenizerFast", "Qwen2Tokenizer", "PreTrainedTokenizerFast")


@pytest.mark.parametrize("named", CLASSES)
@pytest.mark.parametrize("family", ["phi3", "llama", "qwen2"])
def test_case_06_a_cut_that_leaves_as_another_type_reads_the_same_tokens(tmp_path, family, named):
    changes = {"intermediate_size": 1024, "hidden_size": 128} if family == "qwen2" else {}
    model = split_by(pico.make(tmp_path / "model", family, **changes), CL100K, tokenizer_class=named)
    if family == "qwen2":  # leaves as seed_oss with fewer heads
        prune(model, plan_of(model, ("kv_head",)), tmp_path / "out")
    else:
        uneven(model, tmp_path / "out")
    made = json.loads((tmp_path / "out" / "config.json").read_text())["model_type"]
    assert made != family and read_by(tmp_path / "out") == read_by(model)
    assert check(tmp_path / "out", model) == []


def test_case_06_the_class_is_written_only_where_it_must_be(tmp_path):
    model = configured(pico.make(tmp_path / "model", "phi3"), tokenizer_class="GPT2Tokenizer")
    prune(model, plan_of(model, ("ffn",)), tmp_path / "same")  # leaves as phi3
    assert (tmp_path / "same/tokenizer_config.json").read_bytes() == (model / "tokenizer_config.json").read_bytes()
    model = split_by(Path(shutil.copytree(model, tmp_path / "other")), CL100K)
    out = uneven(model, tmp_path / "out")
    before, after = (json.loads((d / "tokenizer_config.json").read_text()) for d in (model, out))
    assert after == before | {"tokenizer_class": "PreTrainedTokenizerFast"}


def test_case_06_without_settings_too(tmp_path):
    """config.json may name the class as well, which the result's config does not carry on."""
    model = split_by(pico.make(tmp_path / "model", "llama"), CL100K)
    (model / "tokenizer_config.json").unlink()
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"tokenizer_class": "GPT2Tokenizer"}))
    assert read_by(uneven(model, tmp_path / "out")) == read_by(model)


def test_case_06_tokens_that_no_class_keeps_are_an_error(tmp_path, monkeypatch):
    model = split_by(pico.make(tmp_path / "model", "phi3"), CL100K, tokenizer_class="GPT2Tokenizer")
    monkeypatch.setattr(tokenizer_class, "CLASSES", ())
    monkeypatch.setattr(tokenizer_class, "_name", lambda tokenizer: "GPT2Tokenizer")
    with pytest.raises(PareError, match=r"reads '.*' as other tokens than"):
        uneven(model, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_case_06_a_changed_tokenizer_is_still_found(tmp_path):
    model = pico.make(tmp_path / "model", "phi3")
    prune(model, plan_of(model, ("ffn",)), tmp_path / "out")
    configured(tmp_path / "out", eos_token="<other>")
    with pytest.raises(PareError, match="differs from the original's"):
        check(tmp_path / "out", model)


def test_case_06_a_model_without_a_tokenizer_is_cut_all_the_same(tmp_path):
    model = pico.make(tmp_path / "model", "llama")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (model / name).unlink()
    assert Checkpoint(uneven(model, tmp_path / "out")).arch.family.name == "openelm"


# ---- llama.cpp is judged by tokenizer.json ----


def llama2(directory: Path, named: str) -> Path:
    """A model with the tokenizer of Llama 2, whose class in transformers 5 drops a space at the beginning."""
    return configured(
        pico.make(directory, "llama", tokenizer="spm"), tokenizer_class=named, legacy=False, add_bos_token=True
    )


def test_case_22_transformers_leaves_tokenizer_json(tmp_path):
    """If this fails, transformers mended it, and the note below is never seen."""
    model = llama2(tmp_path / "model", "LlamaTokenizer")
    assert tokenizer_class.differing(model) and not tokenizer_class.differing(llama2(tmp_path / "2", "LlamaTokenizer2"))


@pytest.mark.parametrize(("named", "notes"), [("LlamaTokenizer", 1), ("PreTrainedTokenizerFast", 0)])
def test_case_22_a_class_that_leaves_tokenizer_json_is_a_note(tmp_path, named, notes):
    model = llama2(tmp_path / "model", named)
    found = [n for n in export(model, tmp_path / "m.gguf", "f16")["notes"] if "tokenizer.json" in n]
    assert len(found) == notes and all("LlamaTokenizer" in note and "two spaces" in note for note in found)


@needs_llama
@pytest.mark.parametrize("named", ["LlamaTokenizer", "PreTrainedTokenizerFast"])
def test_case_22_llama_cpp_is_judged_by_tokenizer_json(tmp_path, named):
    model = llama2(tmp_path / "model", named)
    export(model, tmp_path / "m.gguf", "f16")
    done = llama_cpp.judged(model, tmp_path / "m.gguf", "f16")
    assert done["checked"] and done["different"] == [] and (tmp_path / "m.gguf").exists()


@needs_llama
def test_case_22_a_wrong_section_is_still_rejected(tmp_path, monkeypatch):
    from mlx_pare.gguf.write import tokenizer as gguf_tokenizer

    model = llama2(tmp_path / "model", "LlamaTokenizer")
    monkeypatch.setattr(gguf_tokenizer, "_space_prefix", lambda *args: (False, []))
    export(model, tmp_path / "m.gguf", "f16")
    with pytest.raises(PareError, match=r"tokenizes .* differently"):
        llama_cpp.judged(model, tmp_path / "m.gguf", "f16")


def with_metaspace(model: Path, scheme: str) -> Path:
    """The same tokenizer as newer files write it."""
    raw = json.loads((model / "tokenizer.json").read_text("utf-8"))
    raw["normalizer"] = None
    raw["pre_tokenizer"] = {"type": "Metaspace", "replacement": "\u2581", "prepend_scheme": scheme, "split": False}
    (model / "tokenizer.json").write_text(json.dumps(raw), "utf-8")
    return model


@needs_llama
@pytest.mark.parametrize(("scheme", "notes"), [("first", 1), ("always", 1), ("never", 0)])
def test_case_22_a_difference_that_is_known_is_a_note_and_no_reason_to_reject(tmp_path, scheme, notes):
    model = with_metaspace(llama2(tmp_path / "model", "PreTrainedTokenizerFast"), scheme)
    done = export(model, tmp_path / "m.gguf", "f16")
    assert len([note for note in done["notes"] if "adds a space" in note]) == notes
    assert llama_cpp.judged(model, tmp_path / "m.gguf", "f16")["checked"]
