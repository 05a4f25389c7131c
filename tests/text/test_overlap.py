"""Overlap of texts: a leak is refused, be it one line; what stands everywhere is no leak."""

from __future__ import annotations

import json

import pico
import pytest
from prose import chats, jsonl, paragraphs

from mlx_pare import lm
from mlx_pare.base.errors import PareError
from mlx_pare.text import corpus, domains
from mlx_pare.text.domains import parse_all, read_parts

SYSTEM = "You are a patient helper who was made for this test alone. Answer in full sentences."
LICENCE = "This file is part of the garden library and comes under the licence in LICENSE."
MARKS = "{%- for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{%- endfor %}"
DEFAULT = (
    "{%- if messages[0]['role'] != 'system' %}{{ '<|im_start|>system\n"
    + SYSTEM
    + "<|im_end|>\n' }}{%- endif %}"
    + MARKS
)
TOOLS = "{%- if tools %}{{ '<|tools|>' + (tools | tojson) + '\n' }}{%- endif %}" + MARKS


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    """Of a model with one of the templates."""

    made = {}

    def of(template):
        if template not in made:
            model = pico.make(tmp_path_factory.mktemp("model") / "m")
            config = json.loads((model / "tokenizer_config.json").read_text())
            (model / "tokenizer_config.json").write_text(json.dumps(config | {"chat_template": template}))
            made[template] = lm.tokenizer(model)
        return made[template]

    return of


def read(tokenizer, *data, test=None):
    return read_parts(parse_all([str(file) for file in data]), test, tokenizer, length=32)


# ---- boilerplate ----


@pytest.mark.parametrize("count", [6, 24, 150])
def test_case_01_a_templates_own_system_message(tokenizer, tmp_path, count):
    parts = read(tokenizer(DEFAULT), jsonl(tmp_path / "c.jsonl", chats(count)))
    assert all(of["c"] for of in parts.values())
    assert count < corpus.MANY_DOCUMENTS or all(SYSTEM in text for of in parts.values() for text in of["c"])


@pytest.mark.parametrize("count", [6, 24, 150])
def test_case_01_messages_with_blank_lines(tokenizer, tmp_path, count):
    """Chats that are few are divided by the paragraphs in them: the system message stands before the first."""
    records = chats(count)
    for record, more in zip(records, paragraphs(count, 20, 9), strict=True):
        record["messages"][0]["content"] += "\n\n" + more
    read(tokenizer(DEFAULT), jsonl(tmp_path / "c.jsonl", records))


@pytest.mark.parametrize("count", [6, 24, 150])
def test_case_01_a_system_message_in_every_record(tokenizer, tmp_path, count):
    first = [{"role": "system", "content": f"{SYSTEM}\n{LICENCE}"}]
    read(tokenizer(MARKS), jsonl(tmp_path / "c.jsonl", chats(count, first=first)))


def test_case_01_few_chats_for_each_of_many_system_messages(tokenizer, tmp_path):
    records = []
    for n, persona in enumerate(paragraphs(30, 20, 8)):
        records += chats(3, seed=100 + n, first=[{"role": "system", "content": persona}])
    read(tokenizer(MARKS), jsonl(tmp_path / "c.jsonl", records))


def test_case_01_tools_in_every_record(tokenizer, tmp_path):
    tool = {"type": "function", "function": {"name": "look_up", "description": LICENCE, "parameters": {}}}
    read(tokenizer(TOOLS), jsonl(tmp_path / "c.jsonl", [record | {"tools": [tool]} for record in chats(40)]))


@pytest.mark.parametrize("blank", ["\n", "\n\n"])
@pytest.mark.parametrize("count", [8, 40])
def test_case_01_a_licence_line_in_every_file(tokenizer, tmp_path, blank, count):
    for n in range(count):
        body = "\n".join(paragraphs(6, 15, 100 + n)) + "\n\n" + "\n".join(paragraphs(6, 15, 500 + n))
        (tmp_path / f"{n}.md").write_text(LICENCE + blank + body)
    read(tokenizer(MARKS), tmp_path)


def test_case_01_boilerplate_across_domains_and_test_data(tokenizer, tmp_path):
    first = [{"role": "system", "content": SYSTEM}]
    one, two, test = (
        jsonl(tmp_path / f"{name}.jsonl", chats(30, seed=n, first=first)) for n, name in enumerate(("a", "b", "t"))
    )
    read(tokenizer(MARKS), one, two)
    read(tokenizer(MARKS), one, two, test=test)


def test_case_01_the_same_greeting_is_no_leak(tokenizer, tmp_path):
    """Short chats that everybody has, behind a system message."""
    hello = [{"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello!"}]}]
    one = jsonl(tmp_path / "a.jsonl", chats(30) + hello)
    read(tokenizer(DEFAULT), one, test=jsonl(tmp_path / "t.jsonl", chats(30, seed=4) + hello))


# ---- leaks ----


@pytest.mark.parametrize(("template", "words"), [(DEFAULT, 20), (MARKS, 20), (DEFAULT, 8)])
def test_case_01_a_chat_in_both_is_refused(tokenizer, tmp_path, template, words):
    """Also one whose own lines are all short, so that only its boilerplate is compared line by line."""
    one = jsonl(tmp_path / "a.jsonl", chats(60, words))
    test = jsonl(tmp_path / "t.jsonl", chats(30, words, seed=4) + chats(60, words)[17:18])
    with pytest.raises(
        PareError, match=r"text and the test text share the (paragraph|document) '.*They must be disjoint"
    ):
        read(tokenizer(template), one, test=test)


def test_case_01_many_copies_are_still_a_leak(tokenizer, tmp_path):
    """A line that stands in many documents because they are one document is no boilerplate."""
    leak = chats(1, 30, seed=77)
    one = jsonl(tmp_path / "a.jsonl", chats(60) + leak * 20)
    test = jsonl(tmp_path / "t.jsonl", chats(30, seed=4) + leak * 20)
    with pytest.raises(PareError, match="text and the test text share"):
        read(tokenizer(DEFAULT), one, test=test)


def test_case_01_a_file_in_both_is_refused_licence_or_not(tokenizer, tmp_path):
    for folder, seeds in (("train", range(40)), ("held", [*range(90, 100), 7])):
        (tmp_path / folder).mkdir()
        for n in seeds:
            (tmp_path / folder / f"{n}.md").write_text(LICENCE + "\n" + "\n".join(paragraphs(6, 15, 100 + n)))
    with pytest.raises(PareError, match=r"share the paragraph '(?!This file is part)"):
        read(tokenizer(MARKS), tmp_path / "train", test=tmp_path / "held")


def test_case_01_a_quotation_is_refused(tokenizer, tmp_path):
    """One long line of another document, in documents that all have a licence line."""
    for n in range(40):
        (tmp_path / f"{n}.md").write_text(LICENCE + "\n" + "\n".join(paragraphs(6, 15, 100 + n)))
    test = tmp_path / "test.txt"
    test.write_text("\n".join([*paragraphs(30, 15, 900), paragraphs(6, 15, 110)[3]]))
    folder = tmp_path / "train"
    folder.mkdir()
    for file in tmp_path.glob("*.md"):
        file.rename(folder / file.name)
    with pytest.raises(PareError, match="share the paragraph"):
        read(tokenizer(MARKS), folder, test=test)


def test_a_passage_in_several_records_of_many_is_a_leak(tokenizer, tmp_path):
    """Eight questions on each of 60 passages: every passage stands in records of several parts."""
    passages = paragraphs(60, 40, 5)
    records = [{"text": f"Question {n}.\n{passage}"} for passage in passages for n in range(8)]
    with pytest.raises(PareError, match="share the paragraph"):
        read(tokenizer(MARKS), jsonl(tmp_path / "q.jsonl", records))


def test_parts_of_a_recovery_may_share_boilerplate():
    own = {"training": {"a": [f"{LICENCE}\n{text}" for text in paragraphs(6)]}}
    other = {"run's test": {"b": [f"{LICENCE}\n{text}" for text in paragraphs(6, seed=1)]}}
    domains.forbid_overlap(own | other)
    with pytest.raises(PareError, match="share the paragraph"):
        domains.forbid_overlap(own | {"run's test": {"b": [paragraphs(6)[2]]}})
