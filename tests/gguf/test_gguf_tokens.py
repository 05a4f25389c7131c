"""Tokenizers rebuilt from GGUF files say the tokens that the original says, on 300 strings on which they differ."""

from __future__ import annotations

import io
import json
from pathlib import Path

import gguf
import gguf_edit
import pico
import pytest
import strings

from mlx_pare import lm
from mlx_pare.base.errors import PareError
from mlx_pare.exporting import llama_cpp
from mlx_pare.exporting.export import export
from mlx_pare.gguf.header import vocabulary
from mlx_pare.gguf.read import tokenizer as gguf_tokens
from mlx_pare.gguf.read.rebuild import rebuild
from tests.exporting.test_export import FORMS, model_of


def needs_llama(test):
    missing = not llama_cpp.available()
    return pytest.mark.llama(pytest.mark.skipif(missing, reason="llama-cpp-python is not installed")(test))


def back(model: Path) -> Path:
    """The model after an export and an import."""
    export(model, model.parent / "m.gguf", "f16")
    rebuild(model.parent / "m.gguf", model.parent / "back")
    return model.parent / "back"


def tokens(directory: Path, texts: list[str] = strings.ALL) -> list[list[int]]:
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(directory / "tokenizer.json"))
    return [tokenizer.encode(text, add_special_tokens=False).ids for text in texts]


@pytest.mark.parametrize("pre", ["gpt-2", "smollm", "llama-bpe", "smaug-bpe", "qwen2", "qwen35"])
def test_every_pre_tokenizer(tmp_path, pre):
    model = model_of(tmp_path / "model")
    strings.write_bpe(model, pre, specials=["<tool>", "  "])
    rebuilt = back(model)
    assert strings.wrong_by_category(model, tokens(rebuilt)) == {}
    texts = ["<tool>a  b<tool>", "x<|endoftext|>y", "<|endoftext|>"]  # cut out of the text in both
    assert tokens(model, texts) == tokens(rebuilt, texts)


@pytest.mark.parametrize("form", FORMS)
def test_every_sentencepiece_form(tmp_path, form):
    model = model_of(tmp_path / "model")
    strings.write_spm(model, *FORMS[form])
    noted = form in ("first", "always")  # llama.cpp, and so the rebuilt one, has a space in front of these as well
    skip = lambda text: noted and text[0] in " \u2581"  # noqa: E731
    assert strings.wrong_by_category(model, tokens(back(model)), skip) == {}


@pytest.mark.parametrize("kind", ["bpe", "spm"])
def test_text_comes_out_as_it_went_in(tmp_path, kind):
    """Through mlx-lm's own wrapper, with what ends a text and the way it is written piece by piece."""
    model = pico.make(tmp_path / "model", tokenizer=kind)
    settings = json.loads((model / "tokenizer_config.json").read_text())
    template = "{% for m in messages %}{{ m['content'] }}{{ eos_token }}{% endfor %}"
    (model / "tokenizer_config.json").write_text(json.dumps(settings | {"chat_template": template}))
    ours, theirs = lm.tokenizer(model), lm.tokenizer(back(model))
    assert type(ours.detokenizer) is type(theirs.detokenizer)
    assert ours.eos_token_ids == theirs.eos_token_ids and ours.bos_token_id == theirs.bos_token_id
    for text in ("The mill, the \n river  and 日本 🙂", "naïve"):
        assert ours.decode(ours.encode(text)) == theirs.decode(theirs.encode(text))
        assert ours.encode(text) == theirs.encode(text)
    chat = [{"role": "user", "content": "Hello <b>"}]
    assert ours.apply_chat_template(chat, tokenize=False) == theirs.apply_chat_template(chat, tokenize=False)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A model of SentencePiece itself, as Llama 2's: BPE, byte fallback, spaces in front, nothing normalized."""
    import sentencepiece

    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(pico.TEXT.read_text("utf-8").split("\n")), model_writer=model, model_type="bpe",
        vocab_size=1200, byte_fallback=True, normalization_rule_name="identity", remove_extra_whitespaces=False,
        split_digits=True, allow_whitespace_only_pieces=True, user_defined_symbols=["<tool>"], character_coverage=0.999,
        minloglevel=2, num_threads=1,
    )  # fmt: skip
    return sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())


def write_sentencepiece(trained, path: Path, **settings) -> Path:
    """A GGUF file with the vocabulary as llama.cpp's converter writes it: pieces, scores and kinds."""
    count = trained.get_piece_size()
    kinds = [
        2 if trained.is_unknown(i) else 3 if trained.is_control(i) else 6 if trained.is_byte(i) else 1
        for i in range(count)
    ]
    kinds[trained.piece_to_id("<tool>")] = 4
    model = pico.make(path.parent / "any")
    export(model, path.parent / "any.gguf", "f32")
    facts = {"tokenizer.ggml.model": "llama", "tokenizer.ggml.pre": "default", "tokenizer.ggml.merges": None}
    facts |= {"tokenizer.ggml.tokens": [trained.id_to_piece(i) for i in range(count)]}
    facts |= {"tokenizer.ggml.scores": [trained.get_score(i) for i in range(count)]}
    facts |= {"tokenizer.ggml.add_bos_token": None, "tokenizer.ggml.add_eos_token": None}
    facts |= {"tokenizer.ggml.token_type": kinds, "llama.vocab_size": count}
    facts |= {f"tokenizer.ggml.{k}_token_id": i for k, i in (("bos", 1), ("eos", 2), ("unknown", 0))}
    rows = lambda name, values: (values.repeat(5, 0)[:count] if name == "token_embd.weight" else values, "F32")  # noqa: E731
    return gguf_edit.edited(path.parent / "any.gguf", path, facts | settings, rows)


def test_scores_of_sentencepiece_itself(tmp_path, trained):
    source = write_sentencepiece(trained, tmp_path / "m.gguf")
    rebuild(source, tmp_path / "back")
    texts = [text for text in strings.ALL if "\u2581" not in text]
    wrong = [t for t, found in zip(texts, tokens(tmp_path / "back", texts), strict=True) if trained.encode(t) != found]
    assert not wrong, f"{len(wrong)} of {len(texts)}: {wrong[0]!r}"
    tokenizer = lm.tokenizer(tmp_path / "back")
    assert tokenizer.encode("a<tool>")[0] == 1  # a beginning where the file does not say
    assert tokenizer.decode(trained.encode("The river, 1984.")) == "The river, 1984."


@needs_llama
def test_scores_of_sentencepiece_in_llama_cpp(tmp_path, trained):
    source = write_sentencepiece(trained, tmp_path / "m.gguf")
    rebuild(source, tmp_path / "back")
    assert strings.wrong_by_category(tmp_path / "back", llama_cpp.tokenize(source, strings.ALL)) == {}


def test_a_wrong_order_of_merges_is_noticed(tmp_path, trained, monkeypatch):
    source, original = write_sentencepiece(trained, tmp_path / "m.gguf"), gguf_tokens.merges
    monkeypatch.setattr(gguf_tokens, "merges", lambda *given: original(*given)[::-1])
    rebuild(source, tmp_path / "back")
    assert any(trained.encode(t) != found for t, found in zip(strings.ALL, tokens(tmp_path / "back"), strict=True))


def test_several_ends_of_text(tmp_path, pico_models):
    export(pico_models("llama"), tmp_path / "m.gguf", "f32")
    ends = {"tokenizer.ggml.eot_token_id": 7, "tokenizer.ggml.eom_token_id": 9999, "tokenizer.ggml.padding_token_id": 3}
    rebuild(gguf_edit.edited(tmp_path / "m.gguf", tmp_path / "n.gguf", ends), tmp_path / "back")
    config = json.loads((tmp_path / "back" / "config.json").read_text())
    assert config["eos_token_id"] == [0, 7] and config["pad_token_id"] == 3


@pytest.mark.parametrize(
    ("flags", "added"), [((True, False), [5, 40]), ((True, True), [5, 40, 6]), ((False,) * 2, [40])]
)
def test_what_is_put_around_a_text(tmp_path, pico_models, flags, added):
    export(pico_models("llama"), tmp_path / "m.gguf", "f32")
    facts = {"tokenizer.ggml.bos_token_id": 5, "tokenizer.ggml.eos_token_id": 6}
    facts |= dict(zip(("tokenizer.ggml.add_bos_token", "tokenizer.ggml.add_eos_token"), flags, strict=True))
    rebuild(gguf_edit.edited(tmp_path / "m.gguf", tmp_path / "n.gguf", facts), tmp_path / "back")
    found = lm.tokenizer(tmp_path / "back")
    assert found.encode(found.decode([40])) == added


def test_another_name_of_a_pre_tokenizer(tmp_path):
    model = model_of(tmp_path / "model")
    strings.write_bpe(model, "llama-bpe")
    export(model, tmp_path / "m.gguf", "f32")
    rebuild(
        gguf_edit.edited(tmp_path / "m.gguf", tmp_path / "n.gguf", {"tokenizer.ggml.pre": "llama-v3"}), tmp_path / "b"
    )
    assert tokens(model) == tokens(tmp_path / "b")


# ---- strangers' vocabularies ----


def facts(**more) -> dict:
    found = {"model": "llama", "tokens": ("<unk>", "a", "b", "ab"), "token_type": (2, 1, 1, 1), "scores": (0.0,) * 4}
    return {f"tokenizer.ggml.{key}": value for key, value in (found | more).items()}


def test_long_tokens_do_not_take_for_ever():
    long = ("<unk>", "a", "b", "a" * 100_000)
    with pytest.raises(PareError, match="100000 characters"):
        gguf_tokens.files(facts(tokens=long), 4)
    assert gguf_tokens.files(facts(tokens=long, token_type=(2, 1, 1, 3)), 4)  # a special one may be long


STRANGE = [None, 7, "x", (), (1, 2), ("x",), (None,) * 4, (float("nan"),) * 4, (10**400,) * 4, True]


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_any_value_in_place_of_another(kind):
    base = facts(model=kind, pre="gpt-2", merges=("a b",), bos_token_id=1, add_bos_token=True)
    for key in base:
        for value in STRANGE:
            try:
                found = gguf_tokens.files({**base, key: value}, 4)
                json.dumps(found.tokenizer)
            except PareError as error:
                assert "\n" not in str(error)


def test_a_vocabulary_is_read_within_bounds(tmp_path):
    path = tmp_path / "m.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_token_list([f"t{i}" for i in range(1000)])
    writer.add_token_scores([0.5] * 1000)
    writer.add_array("llama.other", list(range(9000)))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    found = vocabulary(path)
    assert found["tokenizer.ggml.tokens"][999] == "t999" and found["tokenizer.ggml.scores"] == (0.5,) * 1000
    assert set(found) == {"tokenizer.ggml.tokens", "tokenizer.ggml.scores"}
    raw = path.read_bytes()
    path.write_bytes(raw.replace(b"t999", b"t\xff99"))
    with pytest.raises(PareError, match="not UTF-8"):
        vocabulary(path)
    path.write_bytes(raw[: raw.index(b"t500")])
    with pytest.raises(PareError, match="it ends at byte"):
        vocabulary(path)
    at = raw.index(b"tokenizer.ggml.tokens") + 21 + 8
    path.write_bytes(raw[:at] + (2**40).to_bytes(8, "little") + raw[at + 8 :])
    with pytest.raises(PareError, match="more than any tokenizer"):
        vocabulary(path)
