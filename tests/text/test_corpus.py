"""Texts become disjoint token rows, whole and in order; bad texts are errors that name the file and the line."""

from __future__ import annotations

import json

import numpy as np
import pytest

from mlx_pare import lm
from mlx_pare.base.errors import PareError, UsageError
from mlx_pare.text import corpus, overlap
from mlx_pare.text.corpus import Rows


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


@pytest.mark.parametrize(
    ("tokens", "lengths", "says"),
    [
        (-np.ones((2, 8)), None, "token ids hold -1"),
        (np.array([[1, 2], [3, -4]]), None, "token ids hold -4"),
        (np.array([[1.5, 2.0]]), None, "token ids are not whole numbers"),
        (np.array([[1.0, np.nan]]), None, "token ids are float64 that int32 cannot hold"),
        (np.array([[1, 1 << 40]]), None, "token ids are int64 that int32 cannot hold"),
        (np.array([["a"]]), None, "token ids are"),
        (np.array([[True]]), None, "token ids are bool"),
        (np.arange(4), None, r"token rows have the shape \[4\]"),
        (np.zeros((2, 3, 4), int), None, r"token rows have the shape"),
        (np.zeros((2, 3), int), [3, 4], "a row of 3 tokens has the length 4"),
        (np.zeros((2, 3), int), [3, -1], "lengths hold -1"),
        (np.zeros((2, 3), int), [3, 1.5], "lengths are not whole numbers"),
        (np.zeros((2, 3), int), [3], r"rows of shape \[2, 3\] have lengths of shape \[1\]"),
        (np.zeros((2, 3), int), [[3], [3]], "have lengths of shape"),
    ],
)
def test_f12_what_token_rows_may_not_be(tokens, lengths, says):
    with pytest.raises(UsageError, match=says):
        _ = Rows.full(tokens) if lengths is None else Rows(tokens, np.array(lengths))


@pytest.mark.parametrize("kind", [np.int32, np.int64, np.uint16, np.float32, np.float64])
def test_f12_whole_numbers_of_any_type_are_rows(kind):
    found = Rows(np.array([[1, 2], [3, 0]], dtype=kind), np.array([2, 1], dtype=kind))
    assert found.tokens.dtype == found.lengths.dtype == np.int32 and found.tokens.tolist() == [[1, 2], [3, 0]]
    assert Rows.full(np.zeros((0, 4), kind)).count == 0
    huge = Rows(np.broadcast_to(np.int32(7), (1 << 40, 4)), np.broadcast_to(np.int32(4), (1 << 40,)))
    assert huge.count == 1 << 40  # not a byte of it was read


PARAGRAPHS = [f"Paragraph {i} is about the number {i * i} and nothing else." for i in range(300)]


def test_split_is_disjoint_whole_and_stable():
    shares = {"calibration": 80, "validation": 10, "test": 10}
    documents = ["\n".join(PARAGRAPHS[:200]), "\n\n".join(PARAGRAPHS[200:])]
    parts = corpus.split(documents, shares)
    lines = {name: [p for d in texts for p in d.split("\n") if p] for name, texts in parts.items()}
    assert sorted(p for texts in lines.values() for p in texts) == sorted(PARAGRAPHS)
    assert 200 < len(lines["calibration"]) < 280 and 10 < len(lines["test"]) < 60
    assert corpus.split(documents, shares) == parts
    overlap.forbid(parts)


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
        overlap.forbid({"calibration": ["first\n" + shared], "validation": ["other"], "test": [f"  {shared} \nx"]})
    assert shared[:40] in str(found.value) and "disjoint" in found.value.cure
    overlap.forbid({"calibration": ["Chapter 1\n" + shared], "test": ["Chapter 1\n" + shared[1:]]})


def test_overlap_within_a_part_is_none():
    shared = "This paragraph is long enough that two texts do not share it by chance."
    texts = {"test one": [shared], "test two": [shared], "calibration": ["other"]}
    overlap.forbid(texts, lambda name: name.split()[0])
    with pytest.raises(PareError, match="test two text and the calibration text"):
        overlap.forbid({**texts, "calibration": [shared]}, lambda name: name.split()[0])


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


class Chat:
    """A tokenizer that can only write chats."""

    def apply_chat_template(self, messages, tokenize, **more):
        assert tokenize is False
        return "".join(f"<{m['role']}>{m['content']}" for m in messages) + "".join(map(str, more.get("tools", [])))


MESSAGES = [{"role": "user", "content": "hi"}, {"role": "bot", "content": "ho"}]


def test_chat_messages(tmp_path):
    file = write(tmp_path / "t.jsonl", {"messages": MESSAGES}, {"messages": MESSAGES, "tools": ["clock"]})
    assert corpus.read(file, Chat()) == ["<user>hi<bot>ho", "<user>hi<bot>hoclock"]
    with pytest.raises(PareError, match=r"t\.jsonl line 1 is a chat, which only a tokenizer with a chat template can"):
        corpus.read(file)


@pytest.mark.parametrize(
    ("record", "field", "text"),
    [
        ({"content": "a", "id": 3}, None, "a"),
        ({"text": "a", "content": "b"}, None, "a"),
        ({"text": None, "content": "b"}, None, "b"),
        ({"content": "b", "messages": MESSAGES}, None, "<user>hi<bot>ho"),
        ({"prompt": "a", "completion": "b"}, None, "<user>a<assistant>b"),
        ({"prompt": "a", "completion": "b", "text": "c"}, None, "c"),
        ({"prompt": "a", "completion": "b"}, "completion", "b"),
        ({"text": "a", "body": "b"}, "body", "b"),
        ({"turns": MESSAGES, "text": "a"}, "turns", "<user>hi<bot>ho"),
        ({"text": "a", "body": "b"}, "title, body", "b"),
        ({"text": "a", "messages": "b"}, "messages", "b"),
    ],
)
def test_where_a_record_holds_its_text(tmp_path, record, field, text):
    assert corpus.read(write(tmp_path / "t.jsonl", record), Chat(), field) == [text]


def test_what_is_left_out_is_counted(tmp_path, monkeypatch):
    said: list[str] = []
    monkeypatch.setattr(corpus.console, "say", said.append)
    empty = [{"text": ""}, {"text": " \n"}, {"text": None}, {"messages": []}]
    file = write(tmp_path / "t.jsonl", {"text": "a"}, *empty, {"text": "b"})
    assert corpus.read(file) == ["a", "b"]
    assert said == [f"{file}: 2 documents; left out: 4 empty (first {file} line 2)"]
    for name in ("a.csv", "b.csv", ".hidden"):
        (tmp_path / name).write_text("x")
    assert corpus.read(tmp_path) == ["a", "b"] and len(said) == 2
    assert said[1].endswith(f"4 empty (first {file} line 2), 2 of another kind (first {tmp_path}/a.csv)")
    write(file, {"text": "a"})
    (tmp_path / "plain").write_text("a file that was named is read, whatever its ending")
    assert corpus.read(file) == ["a"] and len(corpus.read(tmp_path / "plain")) == 1 and len(said) == 2


@pytest.mark.parametrize(
    ("line", "field", "says"),
    [
        ('{"id": 1, "title": "x"}', None, 'in "text" or "messages" or "content" or "prompt" with "completion" or '
                                          '"conversations" or "instruction" with "output". It has "id", "title": '
                                          'choose with --field'),
        ("{}", None, "It has nothing"),
        ('{"prompt": "a"}', None, "has no text in"),
        ('{"prompt": "a", "completion": 3}', None, "has no text in"),
        ('{"text": "a"}', "body", 'has no text in "body". It has "text"'),
        ('{"body": 3}', "body,title", 'has no text in "body" or "title"'),
        ('{"text": "a", "body": {}}', "body", 'has no text in "body"'),
        ('{"text": "\\ud83d"}', None, "holds half a character"),
        ("[" * 200_000, None, "is not JSON"),
    ],
    ids=str,
)  # fmt: skip
def test_what_a_record_may_not_be(tmp_path, line, field, says):
    good = json.dumps({"text": "fine", "body": "fine"})
    (tmp_path / "t.jsonl").write_text(f"{good}\n{good}\n{line}", "utf-8")
    with pytest.raises(PareError) as found:
        corpus.read(tmp_path / "t.jsonl", Chat(), field)
    assert "t.jsonl line 3 " in str(found.value) and says in str(found.value)


@pytest.mark.parametrize("messages", [[{"role": "user", "content": "hi"}], ["hi"], [{}]])
def test_chat_that_the_tokenizer_cannot_write(tmp_path, tok, messages):
    """A base model has no chat template; and templates raise what they like."""
    file = write(tmp_path / "t.jsonl", {"text": "fine"}, {"messages": messages})
    with pytest.raises(PareError, match=r"t\.jsonl line 2"):
        corpus.read(file, tok)


@pytest.mark.parametrize("line", ['{"text": 3}', '{"texts": "a"}', '["a"]', '"a"', "3", "null", '{"messages": "hi"}'])
def test_jsonl_without_text(tmp_path, tok, line):
    (tmp_path / "t.jsonl").write_text('{"text": "fine"}\n' + line, "utf-8")
    with pytest.raises(PareError, match=r"t\.jsonl line 2 (has no text in|is no record but)"):
        corpus.read(tmp_path / "t.jsonl", tok)


@pytest.mark.parametrize("line", ["{", "{'text': 'a'}", "text"])
def test_jsonl_that_is_no_json(tmp_path, line):
    (tmp_path / "t.jsonl").write_text('{"text": "fine"}\n' + line, "utf-8")
    with pytest.raises(PareError, match=r"t\.jsonl line 2 is not JSON"):
        corpus.read(tmp_path / "t.jsonl")


def test_prompt_and_completion_of_a_base_model(tmp_path, tok):
    with pytest.raises(PareError, match=r"t\.jsonl line 1: the tokenizer cannot write this chat") as found:
        corpus.read(write(tmp_path / "t.jsonl", {"prompt": "a", "completion": "b"}), tok)
    assert found.value.cure == "choose a field that holds text with --field"


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
