"""Records and checks: what passes, what does not, and what a wrong record is told."""

from __future__ import annotations

import json
import time

import pytest

from mlx_pare.base.errors import PareError, UsageError
from mlx_pare.tasks.check_the_checkers import check_the_checkers
from mlx_pare.tasks.checks import Judge, parsed
from mlx_pare.tasks.patterns import Patterns
from mlx_pare.tasks.records import read, task
from mlx_pare.tasks.shipped import functions

ADDRESS = {
    "type": "object", "required": ["name", "age"], "additionalProperties": False,
    "properties": {"name": {"type": "string", "pattern": "^M"}, "age": {"type": "integer", "minimum": 0}},
}  # fmt: skip
PASSES = [  # check, answers that pass, answers that do not
    ({"exact": "Paris"}, ["Paris", "  Paris\n"], ["paris", "Paris.", "", "In Paris"]),
    ({"exact": ["yes", "ja"]}, ["yes", "ja"], ["yes ja", "no"]),
    ({"contains": "Paris"}, ["It is Paris.", "Paris"], ["PARIS", "Par is", ""]),
    ({"contains": ["Köln", "Cologne"]}, ["in Köln", "Cologne!"], ["Koln"]),
    ({"regex": r"(?i)\bwarm\b"}, ["Warm.", "so warm"], ["warmth", ""]),
    ({"number": 12}, ["12", "It is 12.", "3 and 9 make 12", "12.0", "1.2e1", "It is 12!"], ["121", "-12", "", "x12y"]),
    ({"number": 1234.5, "tolerance": 0.5}, ["1,234.5", "1234", "1,235.0"], ["1.234", "1,233.9", "12345"]),
    ({"number": -3}, ["−3", "-3"], ["3", "5-3 = 2"]),
    ({"number": 0.1, "tolerance": 0}, ["0.1", "0.10"], ["0.1000001", ".2"]),
    ({"json_schema": ADDRESS}, ['{"name": "Mara", "age": 3}', '```json\n{"age": 0, "name": "M"}\n```'],
     ['{"name": "Mara"}', '{"name": "Mara", "age": true}', '{"name": "Ada", "age": 3}', "Mara, 3",
      '{"name": "Mara", "age": 3, "x": 1}', '{"name": "Mara", "age": NaN}', '{"name": "Mara", "age": 3.5}', ""]),
    ([{"number": 7}, {"contains": "seven"}], ["7", "seven"], ["eight", "77"]),
    ({"choice": "b", "options": ["a", "b"]}, ["b"], ["a", ""]),
]  # fmt: skip


@pytest.fixture(scope="module")
def judge():
    return Judge()


@pytest.mark.parametrize(("check", "right", "wrong"), PASSES)
def test_what_passes(judge, check, right, wrong):
    checks = parsed(check)
    assert [judge.passes(checks, text, {}, "here") for text in right] == [True] * len(right), right
    assert [judge.passes(checks, text, {}, "here") for text in wrong] == [False] * len(wrong), wrong


SCHEMAS = [  # schema, values that suit, values that do not
    ({"enum": [1, "a", None]}, [1, 1.0, "a", None], [True, "A", 0]),
    ({"const": {"a": [1]}}, [{"a": [1.0]}], [{"a": [True]}, {"a": [1, 2]}, []]),
    ({"anyOf": [{"type": "string"}, {"type": "null"}]}, ["x", None], [0, []]),
    ({"allOf": [{"minimum": 2}, {"exclusiveMaximum": 4}]}, [2, 3.9, "no number"], [1.9, 4]),
    ({"not": {"type": "array"}}, [1, {}], [[]]),
    ({"type": "array", "items": {"type": "integer"}, "minItems": 1, "maxItems": 2}, [[1], [1, 2.0]],
     [[], [1, 2, 3], ["1"], {}]),
    ({"type": "string", "minLength": 2, "maxLength": 3}, ["ab", "äöü"], ["a", "abcd", 12]),
    ({"type": ["integer", "boolean"]}, [1, True, 2.0], ["1", 1.5, None]),
    ({"properties": {"a": True, "b": False}}, [{"a": 1}, {}], [{"b": 1}]),
    ({"additionalProperties": {"type": "string"}, "properties": {"n": {"type": "number"}}}, [{"n": 1, "x": "s"}],
     [{"x": 1}]),
]  # fmt: skip


@pytest.mark.parametrize(("schema", "suits", "not_"), SCHEMAS)
def test_schemas(judge, schema, suits, not_):
    checks = parsed({"json_schema": schema})
    for value in suits:
        assert judge.passes(checks, json.dumps(value), {}, "here"), value
    for value in not_:
        assert not judge.passes(checks, json.dumps(value), {}, "here"), value


def test_a_pattern_that_never_ends_is_stopped(capsys):
    """Python's search takes hours here; the process is ended, and the next search works again."""
    patterns, begun = Patterns(seconds=0.3), time.monotonic()
    assert patterns.found("(a+)+$", "a" * 40 + "b") is False
    assert time.monotonic() - begun < 30 and "takes more than 0.3 s" in capsys.readouterr().err
    assert patterns.found("b$", "ab") is True


WRONG = [  # record, what it is told
    ({"prompt": "x", "check": {"contain": "y"}}, r"unknown check 'contain', did you mean 'contains'\?"),
    ({"prompt": "x", "contains": "y", "check": {"exact": "y"}}, "unknown key 'contains', it belongs inside \"check\""),
    ({"promt": "x", "check": {"exact": "y"}}, r"unknown key 'promt', did you mean 'prompt'\?"),
    ({"check": {"exact": "y"}}, 'needs either "prompt" or "messages"'),
    ({"prompt": "x", "messages": [{"role": "user", "content": "x"}], "check": {"exact": "y"}}, "needs either"),
    ({"prompt": "x"}, 'needs "check", or "answer"'),
    ({"prompt": " ", "check": {"exact": "y"}}, "prompt must be a text that is not empty"),
    ({"prompt": "x", "check": {"exact": ""}}, "exact must be a text that is not empty"),
    ({"prompt": "x", "check": {"exact": []}}, "exact is an empty list"),
    ({"prompt": "x", "check": {}}, "exactly one of"),
    ({"prompt": "x", "check": {"exact": "a", "contains": "b"}}, "exactly one of"),
    ({"prompt": "x", "check": {"exact": "a", "tolerance": 1}}, "'tolerance' has no meaning next to 'exact'"),
    ({"prompt": "x", "check": {"number": "12"}}, "must be numbers"),
    ({"prompt": "x", "check": {"number": 1, "tolerance": -1}}, "must not be negative"),
    ({"prompt": "x", "check": {"regex": "(a"}}, "no regular expression"),
    ({"prompt": "x", "check": {"choice": "c", "options": ["a", "b"]}}, "none of the options"),
    ({"prompt": "x", "check": {"choice": ["a", "b"], "options": ["a", "b"]}}, "accepts everything"),
    ({"prompt": "x", "check": {"choice": "a"}}, 'choice needs "options"'),
    ({"prompt": "x", "check": {"json_schema": {"typ": "object"}}}, r"unknown keyword 'typ', did you mean 'type'\?"),
    ({"prompt": "x", "check": {"function": "os.system"}}, "function must be MODULE:FUNCTION"),
    ({"prompt": "x", "check": {"exact": "y"}, "max_tokens": 0}, "max_tokens must be a whole number"),
    ({"prompt": "x", "check": {"exact": "y"}, "max_tokens": True}, "max_tokens must be a whole number"),
    ({"prompt": "x", "check": {"exact": "y"}, "stop": [""]}, "stop must be"),
    ({"messages": [{"role": "usr", "content": "x"}], "check": {"exact": "y"}}, "role must be one of"),
    ({"messages": [{"role": "user", "content": ["x"]}], "check": {"exact": "y"}}, "a message must be"),
    ({"prompt": "\ud800", "check": {"exact": "y"}}, "half a character"),
]


@pytest.mark.parametrize(("record", "told"), WRONG)
def test_a_wrong_record_is_told_so(record, told):
    with pytest.raises(ValueError, match=told):
        task(record, "file line 1", "file")


@pytest.mark.parametrize(
    ("content", "kind", "told"),
    [
        (b"", UsageError, "holds no record"),
        (b"\n \n", UsageError, "holds no record"),
        (b'{"prompt": "x", "check": {"exact": "y"}}\n{"prompt": 1}\n', PareError, "line 2: a record needs"),
        (b'{"prompt": "x"', PareError, "line 1 is not JSON"),
        (b"[1]", PareError, "line 1 is no record"),
        (b"\xff\xfe", PareError, "is not UTF-8 text"),
        (b'{"prompt": "x", "prompt": "z", "check": {"exact": "y"}}', PareError, "line 1"),
    ],
)
def test_a_wrong_file_is_told_so(tmp_path, content, kind, told):
    file = tmp_path / "tasks.jsonl"
    file.write_bytes(content)
    with pytest.raises(kind, match=told):
        read(file)


def test_a_file_of_windows_reads_alike(tmp_path):
    line = '{"prompt": "Grüße", "check": {"contains": "ü"}, "stop": "\\n", "category": "c"}'
    plain, other = tmp_path / "a.jsonl", tmp_path / "b.jsonl"
    plain.write_text(f"{line}\n", "utf-8")
    other.write_bytes(b"\xef\xbb\xbf" + line.encode() + b"\r\n\r\n")
    one, two = read(plain)[0], read(other)[0]
    assert (one.prompt, one.checks, one.stop, one.category) == (two.prompt, two.checks, two.stop, two.category)
    assert one.stop == ("\n",) and one.category == "c" and one.writes


EVERYTHING = [{"regex": ""}, {"regex": ".*"}, {"json_schema": True}, {"json_schema": {}}]


def test_a_checker_that_accepts_everything_is_found(judge):
    found = []
    for check in EVERYTHING:
        try:
            record = task({"prompt": "x", "check": check}, "t line 1", "t")
            check_the_checkers([record], judge)
        except (PareError, ValueError) as error:
            found.append(str(error))
    # a schema without demands still rejects what is no JSON: the self-test cannot know that this is too little
    assert sum("accepts everything" in text for text in found) == 1 and any("not empty" in text for text in found)


def test_examples_judge_the_checks(judge):
    right = task({"prompt": "x", "check": {"number": 4}, "right": ["4"], "wrong": ["5"]}, "t line 1", "t")
    assert check_the_checkers([right], judge) == 2
    for examples, told in (
        ({"right": "5"}, "rejects the right example '5'"),
        ({"wrong": "4"}, "accepts the wrong example '4'"),
    ):
        with pytest.raises(PareError, match=told):
            check_the_checkers([task({"prompt": "x", "check": {"number": 4}, **examples}, "t line 1", "t")], judge)


def test_functions_of_the_user_run_only_if_they_are_named(tmp_path, monkeypatch):
    (tmp_path / "own_checks.py").write_text(
        "def polite(answer, record):\n    return 'please' in answer and record['category'] == 'c'\n"
        "def vague(answer, record):\n    return 1\n"
        "def broken(answer, record):\n    raise KeyError('x')\n"
    )
    monkeypatch.chdir(tmp_path)

    def record(name):
        return task({"prompt": "x", "category": "c", "check": {"function": f"own_checks:{name}"}}, "t line 1", "t")

    with pytest.raises(UsageError, match=r"t line 1 asks for the function own_checks:polite.*--task-function"):
        functions([record("polite")], [])
    with pytest.raises(UsageError, match="named by no check"):
        functions([task({"prompt": "x", "check": {"exact": "y"}}, "t", "t")], ["own_checks:polite"])
    with pytest.raises(UsageError, match="cannot import 'own_checks:absent'"):
        functions([record("absent")], ["own_checks:absent"])
    for name, told in (("vague", "returned '1'"), ("broken", "own_checks:broken failed: KeyError")):
        judge = Judge(functions([record(name)], [f"own_checks:{name}"]))
        with pytest.raises(PareError, match=told):
            judge.passes(record(name).checks, "x", {}, "t line 1")
    polite = record("polite")
    judge = Judge(functions([polite], ["own_checks:polite"]))
    assert [judge.passes(polite.checks, text, polite.raw, "t") for text in ("please", "")] == [True, False]
