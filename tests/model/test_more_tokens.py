"""A tokenizer with more tokens than the embedding has rows: what belongs to other models of its family is left out."""

from __future__ import annotations

import json
from pathlib import Path

import gguf
import pico
import pytest

from mlx_pare.base.errors import PareError
from mlx_pare.exporting import llama_cpp
from mlx_pare.exporting.export import export
from mlx_pare.gguf.write import tokenizer as gguf_tokenizer
from mlx_pare.options.settings import Settings
from mlx_pare.pipeline import run as pipeline
from tests.exporting.test_export import needs_llama

TOKEN = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}


def with_tokens(model: Path, *contents: str, special: bool = True, in_vocab: bool = False, **settings) -> Path:
    """The model with more added tokens than rows; ``in_vocab``: listed in the vocabulary too, as some files do."""
    file = model / "tokenizer.json"
    raw = json.loads(file.read_text("utf-8"))
    rows = json.loads((model / "config.json").read_text())["vocab_size"]
    for i, content in enumerate(contents):
        raw["added_tokens"].append(TOKEN | {"id": rows + i, "content": content, "special": special})
        if in_vocab:
            raw["model"]["vocab"][content] = rows + i
    file.write_text(json.dumps(raw), "utf-8")
    file = model / "tokenizer_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | settings))
    return model


KINDS = {
    "gemma's image token": ("gemma3_text", "spm", ("<image_soft_token>",), {}),
    "a pad token": ("llama", "spm", ("[PAD]",), {"pad_token": "[PAD]"}),
    "some, byte level": ("qwen2", "bpe", ("<|image|>", "<|video|>"), {}),
    "no special ones": ("llama", "bpe", ("<tool>",), {"special": False}),
    "in the vocabulary too": ("llama", "spm", ("[PAD]",), {"in_vocab": True}),
}


@pytest.mark.parametrize("name", KINDS)
def test_case_03_tokens_beyond_the_rows_are_left_out_with_a_note(tmp_path, name):
    family, kind, contents, more = KINDS[name]
    plain = pico.make(tmp_path / "plain", family, kind)
    model = with_tokens(pico.make(tmp_path / "model", family, kind), *contents, **more)
    done = export(model, tmp_path / "m.gguf", "f16")
    (note,) = [note for note in done["notes"] if "no row" in note]
    assert all(content in note for content in contents)
    export(plain, tmp_path / "plain.gguf", "f16")
    ours, theirs = (gguf.GGUFReader(tmp_path / file).fields for file in ("m.gguf", "plain.gguf"))
    assert ours["tokenizer.ggml.tokens"].contents() == theirs["tokenizer.ggml.tokens"].contents()
    assert "tokenizer.ggml.padding_token_id" not in ours


def test_case_03_many_are_named_by_their_number(tmp_path):
    model = with_tokens(pico.make(tmp_path / "model"), *(f"<extra_{i}>" for i in range(40)))
    (note,) = [note for note in export(model, tmp_path / "m.gguf", "f16")["notes"] if "no row" in note]
    assert note.startswith("40 added tokens") and "<extra_0>" in note and len(note) < 200


def test_case_03_ordinary_vocabulary_beyond_the_rows_is_an_error(tmp_path):
    model = pico.make(tmp_path / "model")
    raw = json.loads((model / "tokenizer.json").read_text("utf-8"))
    raw["model"]["vocab"]["zzzz"] = 512
    (model / "tokenizer.json").write_text(json.dumps(raw), "utf-8")
    with pytest.raises(PareError, match="ids up to 512, the embedding has 512 rows"):
        export(model, tmp_path / "m.gguf", "f16")
    with_tokens(model, "<image>")  # of the same id
    with pytest.raises(PareError, match="ids up to 512, the embedding has 512 rows"):
        export(model, tmp_path / "m.gguf", "f16")


@pytest.mark.parametrize("role", ["bos", "eos"])
def test_case_03_a_token_that_is_put_around_every_text_must_have_a_row(tmp_path, role):
    """llama.cpp would put another one there: the id it assumes."""
    added = {f"{role}_token": "<edge>", f"add_{role}_token": True}
    model = with_tokens(pico.make(tmp_path / "model"), "<edge>", **added)
    with pytest.raises(PareError, match=r"'<edge>' .* no row"):
        export(model, tmp_path / "m.gguf", "f16")


def test_case_03_run_makes_the_file_and_reports_the_note(tmp_path, two_texts):
    model = with_tokens(pico.make(tmp_path / "model", tokenizer="spm"), "<image_soft_token>")
    small = {"length": 32, "samples": 4, "recover_steps": 0, "trials": 0, "context": 64}
    asked = Settings(**two_texts, keep=0.9, axes=("ffn",), widths="even", **small)
    summary = pipeline.run(model, tmp_path / "run", asked)
    assert Path(summary["gguf"]).exists() and "image_soft_token" in Path(summary["report"]).read_text()


@needs_llama
def test_case_03_llama_cpp_loads_it(tmp_path):
    model = with_tokens(pico.make(tmp_path / "model", tokenizer="spm"), "[PAD]", pad_token="[PAD]")
    export(model, tmp_path / "m.gguf", "f32")
    assert llama_cpp.judged(model, tmp_path / "m.gguf", "f32")["checked"]


def test_a_hole_is_filled_by_a_name_that_is_free():
    raw = {"model": {"type": "BPE", "vocab": {"a": 0, "[PAD2]": 1}, "merges": []}, "added_tokens": []}
    raw |= {"pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}}
    found = gguf_tokenizer.read(raw, 4, "here")
    assert len(set(found.tokens)) == 4 and found.tokens[:2] == ["a", "[PAD2]"]
