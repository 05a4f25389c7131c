"""Added tokens that take the white space beside them (Phi-3, Phi-4): llama.cpp does that by the model's name alone."""

from __future__ import annotations

import json
from pathlib import Path

import pico
import pytest

from mlx_pare.exporting import llama_cpp
from mlx_pare.exporting.export import export
from mlx_pare.gguf import added_tokens, header as gguf_header
from mlx_pare.lm import tokenizer_class
from tests.exporting.test_export import needs_llama
from tests.model.test_more_tokens import TOKEN

CHAT = "<|user|>\nlake stone<|end|>\n<|assistant|>\n  and more"
PHI3 = ("<|endoftext|>", "<|user|>", "<|end|>", "<|assistant|>")


def phi3(directory: Path, tokens: dict[str, dict], ends: bool = True, family: str = "phi3") -> Path:
    """A model with these added tokens; ``ends``: "</s>" takes the white space behind it, as Phi-3's does."""
    model = pico.make(directory, family, "spm")
    file = model / "tokenizer.json"
    raw = json.loads(file.read_text("utf-8"))
    for token in raw["added_tokens"]:
        token["rstrip"] = ends and token["content"] == "</s>"
    vocab = raw["model"]["vocab"]
    last = [text for text, i in sorted(vocab.items(), key=lambda item: item[1])][-len(tokens) :]
    raw["model"]["merges"] = [m for m in raw["model"]["merges"] if "".join(m).replace(" ", "") not in last]
    for gone, (content, flags) in zip(last, tokens.items(), strict=True):  # in the rows of others
        raw["added_tokens"].append(TOKEN | {"id": vocab.pop(gone), "content": content} | flags)
    file.write_text(json.dumps(raw), "utf-8")
    return model


def stripping(**flags) -> dict[str, dict]:
    return {content: flags if content != "<|endoftext|>" else {} for content in PHI3}


def chats(gguf: Path, text: str) -> list[int]:
    """How llama.cpp reads a chat, special tokens by their names."""
    from llama_cpp import Llama

    return Llama(str(gguf), vocab_only=True, verbose=False).tokenize(text.encode(), add_bos=False, special=True)


def name_of(gguf: Path) -> str:
    return gguf_header.read(gguf).metadata["general.name"]


@pytest.mark.parametrize("family", ["phi3", "llama"])  # a phi3 with fewer heads leaves as mistral
def test_case_16_phi_3_gets_a_name_that_llama_cpp_knows(tmp_path, family):
    model = phi3(tmp_path / "model", stripping(rstrip=True), family=family)
    done = export(model, tmp_path / "m.gguf", "f32")
    assert name_of(tmp_path / "m.gguf") == "phi-3 model"
    assert not [note for note in done["notes"] if "white space" in note]


@needs_llama
def test_case_16_and_llama_cpp_reads_its_chats_as_tokenizer_json_does(tmp_path):
    model = phi3(tmp_path / "model", stripping(rstrip=True))
    export(model, tmp_path / "m.gguf", "f32")
    (expected,) = tokenizer_class.by_file(model, (CHAT,))
    assert chats(tmp_path / "m.gguf", CHAT) == expected
    assert llama_cpp.judged(model, tmp_path / "m.gguf", "f32")["checked"]


OTHERS = {
    "on both sides": (stripping(rstrip=True, lstrip=True), True),
    "one that does not": (stripping(rstrip=True) | {"<|end|>": {}}, True),
    "</s> does not": (stripping(rstrip=True), False),
    "without <|endoftext|>": ({c: {"rstrip": True} for c in PHI3[1:]}, True),
    "only on the left": (stripping(lstrip=True), False),
    "whole words": ({"<tool>": {"single_word": True}}, False),
}


@pytest.mark.parametrize("name", OTHERS)
@pytest.mark.parametrize("called", ["model", "Phi-3-clone"])
def test_case_16_what_llama_cpp_cannot_do_is_a_note(tmp_path, name, called):
    tokens, ends = OTHERS[name]
    model = phi3(tmp_path / called, tokens, ends)
    done = export(model, tmp_path / "m.gguf", "f32")
    assert len([note for note in done["notes"] if "beside" in note or "inside" in note]) == 1
    assert "phi-3" not in (found := name_of(tmp_path / "m.gguf").lower()) and "phi3" not in found


@needs_llama
@pytest.mark.parametrize("called", ["phi-3-mini", "my-PHI3"])
def test_case_16_a_name_that_would_mislead_llama_cpp_is_changed(tmp_path, called):
    """It would take white space away from tokens that keep it, and fail where "<|endoftext|>" is missing."""
    model = phi3(tmp_path / called, {"<|user|>": {}, "<|end|>": {}}, ends=False)
    done = export(model, tmp_path / "m.gguf", "f32")
    assert not [note for note in done["notes"] if "beside" in note]
    (expected,) = tokenizer_class.by_file(model, (CHAT,))
    assert chats(tmp_path / "m.gguf", CHAT) == expected
    assert name_of(tmp_path / "m.gguf") == {"phi-3-mini": "phi_3-mini", "my-PHI3": "my-PHI_3"}[called]


@pytest.mark.parametrize("called", ["model", "Phi-3-mini", "smollm"])
def test_case_16_other_models_keep_their_names(tmp_path, called):
    model = pico.make(tmp_path / called)
    export(model, tmp_path / "m.gguf", "f32")
    assert name_of(tmp_path / "m.gguf") == called.replace("Phi-3", "Phi_3")


def test_case_16_a_name_that_is_known_already_stays(tmp_path):
    model = phi3(tmp_path / "Phi-3-mini-cut", stripping(rstrip=True))
    export(model, tmp_path / "m.gguf", "f32")
    assert name_of(tmp_path / "m.gguf") == "Phi-3-mini-cut" and added_tokens.PHI3.search("Phi-3-mini-cut")
