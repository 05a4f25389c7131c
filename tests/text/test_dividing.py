"""Texts that a division by hash leaves without a part: divided otherwise. All other texts: as they always were."""

from __future__ import annotations

import hashlib
import json
import random

import pytest
from prose import jsonl, paragraphs

from mlx_pare import lm
from mlx_pare.base.errors import PareError
from mlx_pare.options.settings import Settings
from mlx_pare.text import corpus, domains
from mlx_pare.text.dividing import divide
from mlx_pare.text.splits import Texts

LENGTH = 32


def texts(pico_models, file, length=LENGTH, **more) -> Texts:
    return Texts(pico_models("llama"), Settings(data=str(file), length=length, samples=16, **more))


def rows(found: Texts) -> dict[str, int]:
    return {"calibration": found.calibration.count, "validation": found.validation.count, "test": found.test.count}


def spoken(found: Texts) -> str:
    """All characters of all parts but white space, in no order."""
    return "".join(sorted(c for of in found.documents.values() for d in of.values() for t in d for c in t if c > " "))


CHINESE = "天气很好今日我们去河边看见一只白鸟飞过老桥旁有三个孩子在唱歌"
WRITTEN = {
    "one line": lambda lot: " ".join(paragraphs(120)),
    "one line, with an end": lambda lot: " ".join(paragraphs(120)) + "\n",
    "no white space": lambda lot: "".join(lot.choice(CHINESE) for _ in range(9000)),
    "Chinese sentences": lambda lot: "。".join("".join(lot.choice(CHINESE) for _ in range(20)) for _ in range(300)),
    "two paragraphs": lambda lot: "\n\n".join([" ".join(paragraphs(60)), " ".join(paragraphs(60, seed=1))]),
    "a heading and a line": lambda lot: "Title\n\n" + " ".join(paragraphs(120)),
    "five paragraphs": lambda lot: "\n\n".join(paragraphs(5, 200)),
    "three lines": lambda lot: "\n".join(paragraphs(3, 300)),
}


@pytest.mark.parametrize("name", WRITTEN)
def test_case_12_f35_every_part_of_a_long_line_has_rows(pico_models, tmp_path, name):
    text = WRITTEN[name](random.Random(1))
    (tmp_path / "t.txt").write_text(text, "utf-8")
    found = texts(pico_models, tmp_path / "t.txt")
    assert min(rows(found).values()) >= 1
    assert found.calibration.count >= found.test.count
    assert spoken(found) == "".join(sorted(c for c in text if c > " "))
    assert found.documents == texts(pico_models, tmp_path / "t.txt").documents


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize("count", [3, 5, 20, 25])
def test_case_12_few_documents_leave_no_part_empty(pico_models, tmp_path, seed, count):
    file = jsonl(tmp_path / "t.jsonl", [{"text": text} for text in paragraphs(count, 120, seed)])
    found = texts(pico_models, file)
    assert min(rows(found).values()) >= 1


def test_case_12_documents_stay_whole_if_that_suffices(pico_models):
    """30 documents none of which falls into the test part: they are dealt out, not cut."""
    shares = domains.SHARES
    lot = next(written for seed in range(1000) if not corpus.split(written := paragraphs(30, 60, seed), shares)["test"])
    tokenizer = lm.tokenizer(pico_models("llama"))
    found = divide(lot, shares, lambda part: corpus.enough(tokenizer, part, LENGTH), 100)
    assert sorted(text.strip() for part in found.values() for text in part) == sorted(lot)
    assert len(found["calibration"]) > 20 and len(found["test"]) in range(1, 6)


def test_case_12_pieces_end_where_sentences_do(pico_models, tmp_path):
    (tmp_path / "t.txt").write_text(" ".join(paragraphs(120, 12)))
    found = texts(pico_models, tmp_path / "t.txt").documents
    pieces = [text.strip() for of in found.values() for text in of["t"]]
    assert len(pieces) > 10 and all(piece.endswith(".") for piece in pieces)


def test_case_12_several_domains(pico_models, tmp_path):
    (tmp_path / "a.txt").write_text(" ".join(paragraphs(100)))
    (tmp_path / "b.txt").write_text("\n\n".join(paragraphs(100, seed=1)))
    found = Texts(pico_models("llama"), Settings(data=[str(tmp_path / "a.txt"), f"{tmp_path / 'b.txt'}:2"], length=32))
    assert all(found.documents[part][name] for part in domains.SHARES for name in "ab")
    assert found.documents["test"]["b"] == corpus.split(corpus.read(tmp_path / "b.txt"), domains.SHARES)["test"]


def test_case_12_says_what_is_the_matter(pico_models, tmp_path):
    (tmp_path / "t.txt").write_text(" ".join(paragraphs(2, 20)))
    with pytest.raises(PareError) as found:
        _ = texts(pico_models, tmp_path / "t.txt", length=512).test
    assert (
        "one row needs 512. Give more text or a smaller --length: calibration, validation and test take a row"
        in str(found.value)
    )


@pytest.mark.parametrize("separator", ["\n", "\n\n"])
def test_case_12_a_text_that_repeats_itself(pico_models, tmp_path, separator):
    (tmp_path / "t.txt").write_text(separator.join(paragraphs(1) * 200))
    with pytest.raises(PareError, match=r"the text is one paragraph 200 times, 'L?.*no part can be kept to measure on"):
        _ = texts(pico_models, tmp_path / "t.txt").documents


def test_case_12_parts_still_share_nothing(pico_models, tmp_path):
    """A text of two long paragraphs, again and again: each is cut in the same way every time."""
    (tmp_path / "t.txt").write_text("\n".join(paragraphs(2, 120) * 40))
    found = texts(pico_models, tmp_path / "t.txt")
    assert min(rows(found).values()) >= 1
    said = {part: {s for t in of["t"] for line in t.split("\n") for s in [line.strip()] if len(s) > 20}
            for part, of in found.documents.items()}  # fmt: skip
    assert not any(
        one in other
        for part, lines in said.items()
        for one in lines
        for others, text in said.items()
        if others != part
        for other in text
    )


# ---- all other texts are divided as before ----

BEFORE = {  # sha256 of the rows of calibration, training, validation and test, before there was any other division
    "a 16": "d088aea379c85551",
    "b 16": "dadfcea9e95673bc",
    "c 16": "5e388ba864cdbd4f",
    "d 16": "4184f4ca94da53a1",
    "a:2 b 16": "3ff63af62b4a21b0",
    "a b 16": "61ccc65e0392fa05",
    "a 64": "ef7c63046c12e794",
    "b 64": "7a185319239d168e",
    "c 64": "a903d3c87eb3a104",
    "d 64": "39598d39e74992fc",
    "a:2 b 64": "57057c0a4a203386",
    "a b 64": "ddf9ee3d13158a80",
}


def ordinary(folder):
    """Ordinary texts: paragraphs, lines with headings, records, a folder, several domains."""
    (folder / "a.txt").write_text("\n\n".join(paragraphs(120)))
    lines = [f"# {text}\n{text}" if n % 5 == 0 else text for n, text in enumerate(paragraphs(150, 30, 1))]
    (folder / "b.md").write_text("\n".join(lines))
    jsonl(folder / "c.jsonl", [{"text": text} for text in paragraphs(60, 60, 2)])
    (folder / "d").mkdir()
    for n in range(60):
        (folder / "d" / f"{n}.txt").write_text("\n\n".join(paragraphs(6, 25, n)))
    one, two = str(folder / "a.txt"), str(folder / "b.md")
    return {"a": one, "b": two, "c": str(folder / "c.jsonl"), "d": str(folder / "d"), "a:2 b": [f"{one}:2", two],
            "a b": Settings(data=one, test_data=two)}  # fmt: skip


def digests(model, data, length):
    s = data if isinstance(data, Settings) else Settings(data=data)
    found = Texts(model, Settings(data=s.data, test_data=s.test_data, samples=20, length=length, seed=3))
    of = (found.calibration, found.training_domains, found.validation_domains, found.test)
    return hashlib.sha256(json.dumps([rows.digest() for rows in of]).encode()).hexdigest()[:16]


@pytest.mark.parametrize("length", [16, 64])
def test_rows_of_ordinary_texts_are_as_they_always_were(pico_models, tmp_path, length):
    """Runs that were begun long ago go on."""
    model, written = pico_models("llama"), ordinary(tmp_path)
    found = {f"{name} {length}": digests(model, data, length) for name, data in written.items()}
    assert found == {key: BEFORE[key] for key in found}
