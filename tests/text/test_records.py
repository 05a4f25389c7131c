"""Files of records: read as such whatever their ending looks like, or refused with the reason, never as one text."""

from __future__ import annotations

import json

import pytest
from prose import jsonl, paragraphs

from mlx_pare.base.errors import PareError
from mlx_pare.store.rundir import Run
from mlx_pare.text import corpus

TEXTS = paragraphs(6, 8)


class Chat:
    """A tokenizer that can only write chats."""

    def apply_chat_template(self, messages, tokenize, **more):
        return "".join(f"<{m['role']}>{m['content']}" for m in messages)


# ---- endings ----


@pytest.mark.parametrize("name", ["D.JSONL", "d.Jsonl", "d.ndjson", "D.NDJSON", "d.json", "d.jsonlines"])
def test_f10_one_record_a_line(tmp_path, name):
    """Also .json, which many data sets name such a file."""
    assert corpus.read(jsonl(tmp_path / name, [{"text": text} for text in TEXTS])) == TEXTS


@pytest.mark.parametrize("name", ["NOTES.TXT", "Notes.Md"])
def test_f10_text_is_text_in_any_case(tmp_path, name):
    (tmp_path / name).write_text("one\n\ntwo")
    assert corpus.read(tmp_path) == corpus.read(tmp_path / name) == ["one\n\ntwo"]


def test_f10_endings_in_a_folder(tmp_path):
    jsonl(tmp_path / "A.JSONL", [{"text": "one"}])
    jsonl(tmp_path / "b.ndjson", [{"text": "two"}])
    assert corpus.read(tmp_path) == ["one", "two"]


@pytest.mark.parametrize("name", ["records", "d.jsonl.bak", "d.dat", "d.yaml"])
@pytest.mark.parametrize("form", ["lines", "list"])
def test_f10_records_under_another_name_are_refused(tmp_path, name, form):
    records = [{"text": text} for text in TEXTS]
    file = jsonl(tmp_path / name, records)
    if form == "list":
        file.write_text(json.dumps(records, indent=1))
    with pytest.raises(PareError, match=r"holds JSON records. Name it .jsonl"):
        corpus.read(file)


def test_records_in_a_text_file_are_said(tmp_path, monkeypatch):
    """Such runs there are already: their rows stay."""
    warned: list[str] = []
    monkeypatch.setattr(corpus.console, "warn", warned.append)
    file = jsonl(tmp_path / "t.txt", [{"text": text} for text in TEXTS])
    assert corpus.read(file) == [file.read_text()]
    assert "name it .jsonl to read the records" in warned[0]
    (tmp_path / "t.txt").write_text("[a link](there) and more\n")
    assert corpus.read(file) and len(warned) == 1


# ---- lists and tables ----


def test_case_11_a_list_of_records(tmp_path):
    file = tmp_path / "a.json"
    file.write_text(json.dumps([{"text": text, "id": 3} for text in TEXTS], indent=2))
    assert corpus.read(file) == TEXTS
    file.write_text(json.dumps({"text": "one record"}))
    assert corpus.read(file) == ["one record"]


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ('[{"body": "a"}]', r'a\.json item 1 has no text in .* It has "body": choose with --field'),
        ('["a", "b"]', r"a\.json item 1 is no record but"),
        ('{"data": [{"text": "a"}]}', r'has no text in .* It has "data"'),
        ("3", "is no list of records"),
        ('[{"text": "a"}', r"a\.json is not JSON"),
        ("[" * 100_000, r"a\.json is not JSON"),
        ('[{"text": "\\ud83d"}]', "holds half a character"),
    ],
)
def test_case_11_what_a_list_may_not_be(tmp_path, content, says):
    (tmp_path / "a.json").write_text(content)
    with pytest.raises(PareError, match=says):
        corpus.read(tmp_path / "a.json")


@pytest.mark.parametrize("mark", [",", ";", "\t"])
@pytest.mark.parametrize("name", ["d.csv", "D.CSV", "d.tsv"])
def test_case_11_a_table(tmp_path, mark, name):
    file = tmp_path / name
    rows = ["id" + mark + "text", f'1{mark}"one, {mark} ""two"""', f'2{mark}"a\nb"', f"3{mark}"]
    file.write_text("\n".join(rows))
    assert corpus.read(file) == [f'one, {mark} "two"', "a\nb"]
    assert corpus.read(file, field="id") == ["1", "2", "3"]


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("id,body\n1,x\n", r'd\.csv line 2 has no text in .* It has "id", "body": choose with --field'),
        ("id,text\n1,x\n2,y,z\n", r"d\.csv line 3 has 3 fields, the first line names 2"),
        ('id,text\n1,"x', r"d\.csv line 2 is no row of a table"),
        ("id,text\n", "holds no text"),
    ],
)
def test_case_11_what_a_table_may_not_be(tmp_path, content, says):
    (tmp_path / "d.csv").write_text(content)
    with pytest.raises(PareError, match=says):
        corpus.read(tmp_path / "d.csv")


@pytest.mark.parametrize(
    ("record", "text"),
    [
        ({"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]}, "<user>a<assistant>b"),
        ({"conversations": [{"role": "user", "content": "a"}]}, "<user>a"),
        (
            {"system": "s", "conversations": [{"from": "human", "value": "a"}], "id": "x"},
            "<system>s<user>a",
        ),
        ({"messages": [{"from": "system", "value": "s"}, {"from": "gpt", "value": "b"}]}, "<system>s<assistant>b"),
        ({"instruction": "a", "input": "b", "output": "c"}, "<user>a\n\nb<assistant>c"),
        ({"instruction": "a", "input": "", "output": "c"}, "<user>a<assistant>c"),
        ({"instruction": "a", "output": "c", "text": "whole"}, "whole"),
    ],
)
@pytest.mark.parametrize("name", ["a.json", "a.jsonl"])
def test_case_11_sharegpt_and_alpaca(tmp_path, record, text, name):
    file = tmp_path / name
    file.write_text(json.dumps([record]) if name == "a.json" else json.dumps(record))
    assert corpus.read(file, Chat()) == [text]
    if "text" not in record:
        with pytest.raises(PareError, match="only a tokenizer with a chat template"):
            corpus.read(file)


def test_case_11_in_a_folder_lists_and_tables_are_left_out_and_said(tmp_path, monkeypatch):
    said: list[str] = []
    monkeypatch.setattr(corpus.console, "say", said.append)
    (tmp_path / "a.txt").write_text("text")
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "d.csv").write_text("id\n1\n")
    assert corpus.read(tmp_path) == ["text"]
    assert said[0].endswith(f"2 of another kind (first {tmp_path / 'config.json'})")
    (tmp_path / "a.txt").unlink()
    with pytest.raises(
        PareError, match=r"holds no text \(2 of another kind.* a .json or .csv file must be named itself"
    ):
        corpus.read(tmp_path)


# ---- what a folder holds beside its texts ----


@pytest.mark.parametrize("beside", ["._a.txt", "sub/._a.txt", "__MACOSX/a.txt", "__MACOSX/sub/._a.txt", ".git/a.txt",
                                    ".obsidian/notes.md", ".hidden.jsonl", "sub/.trash/a.md"])  # fmt: skip
def test_f32_case_05_hidden_files_are_left_out(tmp_path, beside):
    (tmp_path / "a.txt").write_text("text")
    (tmp_path / beside).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / beside).write_bytes(bytes.fromhex("0005160700020000") + b"Mac OS X" + bytes(range(128, 256)))
    assert corpus.read(tmp_path) == ["text"]


def test_f32_what_was_named_is_read_hidden_or_not(tmp_path):
    (tmp_path / ".notes").mkdir()
    (tmp_path / ".notes" / "a.txt").write_text("text")
    (tmp_path / ".b.txt").write_text("more")
    assert corpus.read(tmp_path / ".notes") == ["text"] and corpus.read(tmp_path / ".b.txt") == ["more"]


@pytest.mark.parametrize("damaged", [False, True])
def test_f09_run_directories_are_left_out(tmp_path, damaged):
    (tmp_path / "a.txt").write_text("text")
    (tmp_path / "model").mkdir()
    out = tmp_path / "deep" / "run"
    with Run(out, tmp_path / "model", "identity") as run:
        (out / "prune" / "model").mkdir(parents=True)
        (out / "prune" / "model" / "README.md").write_text("a card")
        (out / "report.md").write_text("a report")
        assert run.manifest and (out / "log.txt").exists()
    if damaged:
        (out / "manifest.json").write_text('{"schema')
    assert corpus.read(tmp_path) == ["text"]
    with pytest.raises(PareError, match="is a run directory, which mlx-pare wrote itself"):
        corpus.read(out)


def test_f09_directories_for_the_hub_are_left_out(tmp_path):
    (tmp_path / "a.txt").write_text("text")
    (tmp_path / "hub").mkdir()
    for name in ("README.md", "merges.txt"):
        (tmp_path / "hub" / name).write_text("a card")
    (tmp_path / "hub" / "survivors.json").write_text('{"schema_version": 1, "source_identity": "x", "layers": []}')
    assert corpus.read(tmp_path) == ["text"]


def test_f09_a_manifest_of_something_else_is_no_run(tmp_path):
    (tmp_path / "manifest.json").write_text('{"name": "an app"}')
    (tmp_path / "a.txt").write_text("text")
    assert corpus.read(tmp_path) == ["text"]
