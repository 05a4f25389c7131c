"""Texts become disjoint token rows, whole and in order; bad texts are errors that name the file and the line."""

from __future__ import annotations

import json

import numpy as np
import pytest

from mlx_pare import corpus, lm
from mlx_pare.corpus import Rows
from mlx_pare.errors import PareError


@pytest.fixture(scope="module")
def tok(pico_models):
    return lm.tokenizer(pico_models("llama"))


TEXTS = ["One fine day, nobody came.\n\nThen it rained.", "Grüße aus Köln 🙂", "x = {1: 'a'}\n"]


def test_windows_are_the_text_in_order(tok):
    ids = [i for text in TEXTS for i in [tok.bos_token_id, *tok.encode(text, add_special_tokens=False)]]
    data = corpus.windows(tok, TEXTS, 7)
    assert data.tokens.reshape(-1).tolist() == ids[: len(ids) // 7 * 7]
    assert data.tokens.dtype == np.int32 and set(data.lengths) == {7} and data.mask().all()
    assert (data.tokens == tok.bos_token_id).sum() == 3


def test_windows_without_bos(tok):
    class Plain:
        bos_token_id = None

        def encode(self, text, **options):
            return [ord(c) for c in text]

    assert corpus.windows(Plain(), ["abc", "def"], 3).tokens.tolist() == [[97, 98, 99], [100, 101, 102]]


def test_windows_count_and_seed(tok):
    every = corpus.windows(tok, TEXTS * 5, 5)
    first, drawn, again, other = (corpus.windows(tok, TEXTS * 5, 5, 8, seed) for seed in (None, 1, 1, 2))
    assert np.array_equal(first.tokens, every.tokens[:8])
    assert np.array_equal(drawn.tokens, again.tokens) and drawn.digest() == again.digest()
    assert drawn.digest() != other.digest()
    order = [every.tokens.tolist().index(row) for row in drawn.tokens.tolist()]
    assert len(set(order)) <= 8 and drawn.count == 8
    assert corpus.windows(tok, TEXTS, 5, 1000, 0).count == corpus.windows(tok, TEXTS, 5).count


def test_too_short_a_text(tok):
    with pytest.raises(PareError, match="one row needs 512") as found:
        corpus.windows(tok, ["short"], 512)
    assert "--length" in found.value.cure


def test_digest_sees_tokens_lengths_and_shape():
    tokens = np.arange(12, dtype=np.int32)
    digests = {
        Rows.full(tokens.reshape(3, 4)).digest(),
        Rows.full(tokens.reshape(4, 3)).digest(),
        Rows.full(tokens.reshape(3, 4) + 1).digest(),
        Rows(tokens.reshape(3, 4), np.array([4, 4, 3], dtype=np.int32)).digest(),
    }
    assert len(digests) == 4


PARAGRAPHS = [f"Paragraph {i} is about the number {i * i} and nothing else." for i in range(300)]


def test_split_is_disjoint_whole_and_stable():
    shares = {"calibration": 80, "validation": 10, "test": 10}
    documents = ["\n".join(PARAGRAPHS[:200]), "\n\n".join(PARAGRAPHS[200:])]
    parts = corpus.split(documents, shares)
    lines = {name: [p for d in texts for p in d.split("\n") if p] for name, texts in parts.items()}
    assert sorted(p for texts in lines.values() for p in texts) == sorted(PARAGRAPHS)
    assert 200 < len(lines["calibration"]) < 280 and 10 < len(lines["test"]) < 60
    assert corpus.split(documents, shares) == parts
    corpus.forbid_overlap(parts)


def test_split_follows_the_paragraph_not_its_place():
    """Also with other neighbours, in another document, or indented."""
    shares = {"a": 50, "b": 50}

    def side(documents: list[str], paragraph: str) -> list[str]:
        return [n for n, texts in corpus.split(documents, shares).items() if any(paragraph in t for t in texts)]

    for paragraph in PARAGRAPHS[:20]:
        alone = side([paragraph], paragraph)
        assert len(alone) == 1
        assert side(["\n".join(reversed(PARAGRAPHS))], paragraph + "\n") == alone
        assert side([f"  {paragraph}  \n{PARAGRAPHS[40]}"], paragraph) == alone


def test_overlap_is_an_error():
    shared = "This paragraph is long enough that two texts do not share it by chance."
    with pytest.raises(PareError, match="calibration text and the test text share") as found:
        corpus.forbid_overlap(
            {"calibration": ["first\n" + shared], "validation": ["other"], "test": [f"  {shared} \nx"]}
        )
    assert shared[:40] in str(found.value) and "disjoint" in found.value.cure
    corpus.forbid_overlap({"calibration": ["Chapter 1\n" + shared], "test": ["Chapter 1\n" + shared[1:]]})


# ---- files ----


def write(path, *records, newline="\n"):
    path.write_text(newline.join(json.dumps(r, ensure_ascii=False) for r in records), "utf-8", newline="")
    return path


def test_read_text_and_folder(tmp_path):
    (tmp_path / "sub").mkdir()
    (tmp_path / "b.txt").write_text("two", "utf-8")
    (tmp_path / "a.md").write_text("Eins: ä", "utf-8")
    (tmp_path / "sub" / "c.jsonl").write_text('{"text": "three"}\n\n{"text": "four"}\n', "utf-8")
    (tmp_path / "d.csv").write_text("not text", "utf-8")
    (tmp_path / "e.txt").write_text("  \n ", "utf-8")
    assert corpus.read(tmp_path) == ["Eins: ä", "two", "three", "four"]
    assert corpus.read(tmp_path / "b.txt") == ["two"]


@pytest.mark.parametrize("newline", ["\n", "\r\n"])
def test_jsonl_lines_end_at_newlines_only(tmp_path, newline):
    """JSON strings may hold other line separators as they are."""
    texts = ["a\u2028b", "c\u0085d", "e\u2029f", "g\x7fh"]
    file = write(tmp_path / "t.jsonl", *({"text": t} for t in texts), newline=newline)
    assert corpus.read(file) == texts


def test_byte_order_mark(tmp_path):
    (tmp_path / "t.jsonl").write_bytes(b'\xef\xbb\xbf{"text": "a"}\n')
    (tmp_path / "t.txt").write_bytes(b"\xef\xbb\xbfb")
    assert corpus.read(tmp_path) == ["a", "b"]


def test_chat_messages(tmp_path):
    class Chat:
        def apply_chat_template(self, messages, tokenize):
            assert tokenize is False
            return "".join(f"<{m['role']}>{m['content']}" for m in messages)

    file = write(
        tmp_path / "t.jsonl", {"messages": [{"role": "user", "content": "hi"}, {"role": "bot", "content": "ho"}]}
    )
    assert corpus.read(file, Chat()) == ["<user>hi<bot>ho"]
    with pytest.raises(PareError, match="neither"):
        corpus.read(file)


@pytest.mark.parametrize("messages", [[{"role": "user", "content": "hi"}], ["hi"], [{}]])
def test_chat_that_the_tokenizer_cannot_write(tmp_path, tok, messages):
    """A base model has no chat template; and templates raise what they like."""
    file = write(tmp_path / "t.jsonl", {"text": "fine"}, {"messages": messages})
    with pytest.raises(PareError, match=r"t\.jsonl line 2"):
        corpus.read(file, tok)


@pytest.mark.parametrize("line", ['{"text": 3}', '{"texts": "a"}', '["a"]', '"a"', "3", "null", '{"messages": "hi"}'])
def test_jsonl_without_text(tmp_path, tok, line):
    (tmp_path / "t.jsonl").write_text('{"text": "fine"}\n' + line, "utf-8")
    with pytest.raises(PareError, match=r't\.jsonl line 2 has neither "text" nor "messages"'):
        corpus.read(tmp_path / "t.jsonl", tok)


@pytest.mark.parametrize("line", ["{", "{'text': 'a'}", "text"])
def test_jsonl_that_is_no_json(tmp_path, line):
    (tmp_path / "t.jsonl").write_text('{"text": "fine"}\n' + line, "utf-8")
    with pytest.raises(PareError, match=r"t\.jsonl line 2 is not JSON"):
        corpus.read(tmp_path / "t.jsonl")


def test_not_utf8(tmp_path):
    (tmp_path / "t.txt").write_bytes("Grüße".encode("latin-1"))
    with pytest.raises(PareError, match=r"t\.txt is not UTF-8 text \(byte 2\)"):
        corpus.read(tmp_path)


def test_nothing_to_read(tmp_path):
    with pytest.raises(PareError, match="holds no text"):
        corpus.read(tmp_path)
    (tmp_path / "t.txt").write_text("\n \n", "utf-8")
    with pytest.raises(PareError, match="holds no text"):
        corpus.read(tmp_path / "t.txt")
    with pytest.raises(PareError, match="no text at"):
        corpus.read(tmp_path / "none")
