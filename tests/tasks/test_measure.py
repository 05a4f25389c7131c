"""Models on tasks: what they write, choose and find likely, what is kept after a kill, and how two are compared."""

from __future__ import annotations

import json
import math
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from mlx_pare import lm
from mlx_pare.base.errors import PareError, Refused, UsageError
from mlx_pare.tasks import ask as asking
from mlx_pare.tasks.ask import Way
from mlx_pare.tasks.kept_answers import KeptAnswers
from mlx_pare.tasks.measure import measure_tasks
from mlx_pare.tasks.results import TaskResults
from tests.support import pico

TEMPLATE = "{% for m in messages %}<{{ m.role }}> {{ m.content }}\n{% endfor %}<assistant>"
RECORDS = [
    {"prompt": "The king of the sea", "check": {"regex": "."}, "max_tokens": 6, "category": "writes"},
    {"prompt": "She went to", "check": {"contains": "zqx"}, "max_tokens": 9, "category": "writes"},
    {"messages": [{"role": "user", "content": "A short one"}], "check": {"exact": "no"}, "max_tokens": 4,
     "category": "writes"},
    {"prompt": "It was a long", "check": {"choice": " way", "options": [" way", " the of a"]},
     "category": "chooses"},
    {"prompt": "It was a long", "check": {"choice": " day", "options": [" way", " day"]}, "category": "chooses"},
    {"prompt": "In the morning", "answer": "he came home", "category": "likely"},
]  # fmt: skip


def chat(model: Path) -> Path:
    settings = json.loads((model / "tokenizer_config.json").read_text())
    (model / "tokenizer_config.json").write_text(json.dumps(settings | {"chat_template": TEMPLATE}))
    return model


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    place = tmp_path_factory.mktemp("models")
    return [chat(pico.make(place / str(seed), "llama-untied", seed=seed, num_hidden_layers=2)) for seed in (0, 1)]


@pytest.fixture
def file(tmp_path) -> Path:
    found = tmp_path / "tasks.jsonl"
    found.write_text("".join(json.dumps(record) + "\n" for record in RECORDS))
    return found


def nats(model: Path, text: str, ending: str) -> tuple[np.ndarray, list[int]]:
    """-ln p of the tokens of a text behind another one, by one pass of the stock model in float64 numpy."""
    tok, stock = lm.tokenizer(model), lm.load(model)
    whole = tok.encode(text + ending, add_special_tokens=False)
    first = tok.encode(text, add_special_tokens=False)
    count = next((n for n, (a, b) in enumerate(zip(first, whole, strict=False)) if a != b), len(first))
    logits = np.array(stock(mx.array(whole)[None])[0]).astype(np.float64)
    logits = logits - logits.max(-1, keepdims=True)
    log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    return -np.array([log_p[i - 1, whole[i]] for i in range(count, len(whole))]), whole[count:]


def prompt(text: str) -> str:
    return f"<user> {text}\n<assistant>"


def test_what_a_model_writes_is_what_it_writes_alone(models, file, tmp_path):
    found = measure_tasks(models[0], [str(file)], tmp_path / "out")
    tok, stock = lm.tokenizer(models[0]), lm.load_stock(models[0])
    for item, record in zip(found.items[:3], RECORDS, strict=False):
        text = record.get("prompt") or record["messages"][0]["content"]
        ids = tok.encode(prompt(text), add_special_tokens=False)
        alone = lm.greedy(stock, ids, record["max_tokens"])
        ends = [n for n, token in enumerate(alone) if token in tok.eos_token_ids]
        assert item.answer.text == tok.decode(alone[: ends[0] if ends else None], skip_special_tokens=True)
        assert item.answer.finished is bool(ends)
    assert [item.answer.passed for item in found.items[:3]] == [True, False, False]
    writes = found.tasks[0]
    assert (writes.category, writes.passed, writes.total) == (
        "writes",
        1,
        3,
    ) and 0 < writes.low < 1 / 3 < writes.high < 1
    assert found.overall.total == 5 and TaskResults.load(tmp_path / "out" / "tasks.json") == found


def test_choices_and_given_answers_are_judged_by_likelihood(models, file):
    found = measure_tasks(models[0], [str(file)])
    for item, record in zip(found.items[3:5], RECORDS[3:5], strict=True):
        options = record["check"]["options"]
        costs = [nats(models[0], prompt(record["prompt"]), o)[0].sum() / len(o.encode()) for o in options]
        assert item.answer.text == options[int(np.argmin(costs))] and item.answer.finished is None
    expected, ids = nats(models[0], prompt("In the morning"), "he came home")
    given = found.items[5].answer.surprisal
    assert (given.tokens, given.mean, given.worst) == pytest.approx(
        (len(ids), expected.mean(), expected.max()), rel=1e-4
    )
    assert given.worst_token == lm.tokenizer(models[0]).decode([ids[int(expected.argmax())]])
    assert found.items[5].answer.passed is None and [row.category for row in found.surprisal] == ["likely"]


def test_raw_prompts_are_continued_as_they_are(models, tmp_path):
    file = tmp_path / "t.jsonl"
    file.write_text(json.dumps({"prompt": "It was a long", "answer": "day"}))
    found = measure_tasks(models[0], [str(file)], way=Way(raw=True)).items[0].answer.surprisal
    expected, _ = nats(models[0], "It was a long", " day")  # a space stands between them
    assert found.mean == pytest.approx(expected.mean(), rel=1e-4)
    assert found.mean != pytest.approx(measure_tasks(models[0], [str(file)]).items[0].answer.surprisal.mean, rel=1e-3)


def test_samples_depend_on_the_seed_and_on_nothing_else(models, file, tmp_path):
    hot = Way(temperature=1.5, seed=3)
    texts = [item.answer.text for item in measure_tasks(models[0], [str(file)], way=hot).items[:3]]
    assert texts == [item.answer.text for item in measure_tasks(models[0], [str(file)], way=hot).items[:3]]
    assert texts != [
        i.answer.text for i in measure_tasks(models[0], [str(file)], way=Way(temperature=1.5, seed=4)).items[:3]
    ]
    one = tmp_path / "one.jsonl"
    one.write_text(json.dumps(RECORDS[1]))
    assert measure_tasks(models[0], [str(one)], way=hot).items[0].answer.text == texts[1]


def test_two_models_on_the_same_items(models, file):
    found = measure_tasks(models[0], [str(file)], teacher=models[1])
    alone = [measure_tasks(model, [str(file)]) for model in models]
    assert [item.answer for item in found.items] == [item.answer for item in alone[0].items]
    assert [item.teacher for item in found.items] == [item.answer for item in alone[1].items]
    pairs = [(i.answer.passed, i.teacher.passed) for i in found.items if i.answer.passed is not None]
    both = found.overall_paired
    counts = (both.both, both.only_model, both.only_teacher, both.neither)
    assert counts == tuple(pairs.count(p) for p in ((True, True), (True, False), (False, True), (False, False)))
    assert both.p == min(1.0, 2 * sum(math.comb(n := both.only_model + both.only_teacher, k)
                                      for k in range(min(both.only_model, both.only_teacher) + 1)) / 2**n)  # fmt: skip
    assert [rate.says_nothing for rate in found.tasks] == [not any(
        i.teacher.passed for i in found.items if i.category == rate.category) for rate in found.tasks]  # fmt: skip


def test_a_killed_call_goes_on_and_asks_nobody_twice(models, file, tmp_path, monkeypatch):
    whole = measure_tasks(models[0], [str(file)], tmp_path / "whole")
    real, asked = lm.answers, []

    def dies(model, tok, questions, temperature=0.0):
        for number, *rest in real(model, tok, questions, temperature):
            asked.append(number)
            yield number, *rest

    monkeypatch.setattr(asking, "AT_ONCE", 1)
    monkeypatch.setattr(lm, "answers", dies)
    add, out = KeptAnswers.add, tmp_path / "out"

    def full(self, answers):
        if len(self.known) == 2:
            raise KeyboardInterrupt
        add(self, answers)

    monkeypatch.setattr(KeptAnswers, "add", full)
    with pytest.raises(KeyboardInterrupt):
        measure_tasks(models[0], [str(file)], out)
    monkeypatch.setattr(KeptAnswers, "add", add)
    assert len(asked) == 3 and not (out / "tasks.json").exists()
    with (out / "answers.jsonl").open("ab") as kept:
        kept.write(b'{"half": {"te')  # the kill cut a line off
    assert measure_tasks(models[0], [str(file)], out) == whole and len(asked) == 4
    assert measure_tasks(models[0], [str(file)], out) == whole and len(asked) == 4
    changed = [record | {"check": {"regex": "."}} if "max_tokens" in record else record for record in RECORDS]
    file.write_text("".join(json.dumps(record) + "\n" for record in changed))
    assert measure_tasks(models[0], [str(file)], out).tasks[0].passed == 3 and len(asked) == 4, (
        "another check, same answers"
    )
    measure_tasks(models[1], [str(file)], out)
    assert len(asked) == 7, "another model is asked"


def test_what_cannot_be_asked(models, file, tmp_path):
    bare = pico.make(tmp_path / "bare", "llama", num_hidden_layers=2)
    with pytest.raises(PareError, match=r"tasks.jsonl line 3 is a chat, and .* has no chat template"):
        measure_tasks(bare, [str(file)])
    long = tmp_path / "long.jsonl"
    long.write_text(json.dumps({"prompt": "word " * 600, "check": {"exact": "x"}}))
    with pytest.raises(UsageError, match=r"long.jsonl line 1 takes \d+ tokens with its answer, .* was made for 512"):
        measure_tasks(models[0], [str(long)])
    with pytest.raises(Refused, match="memory"):
        measure_tasks(models[0], [str(file)], memory_cap=1000)
    with pytest.raises(UsageError, match="temperature"):
        measure_tasks(models[0], [str(file)], way=Way(temperature=-1.0))
    damaged = tmp_path / "out"
    damaged.mkdir()
    (damaged / "answers.jsonl").write_text("[]\n")
    with pytest.raises(PareError, match=r"answers.jsonl line 1 is damaged.*asked again"):
        measure_tasks(models[0], [str(file)], damaged)


def test_the_command(models, file, tmp_path, pare):
    done = pare("evaluate", models[0], "--tasks", file, "--teacher", models[1], "--out", tmp_path / "out", "--json")
    assert done.code == 0
    assert all({"category", "passed", "total", "low", "high"} <= {*row} for row in done.document["tasks"])
    assert done.document["paired"][0]["category"] == "writes" and (tmp_path / "out" / "tasks.json").exists()
    plain = pare("evaluate", models[0], "--tasks", file, "--dry-run")
    assert "6 tasks, 6 of them not answered yet" in plain.out
    none = pare("evaluate", models[0])
    assert none.code == 2 and "Give --data PATH, --tasks FILE, or both" in none.err


def test_probes_on_a_model(models, tmp_path, pare):
    done = pare("evaluate", models[0], "--tasks", "probe:arithmetic", "--tasks", "probe:needle", "--json")
    assert done.code == 0
    rates = {row["category"]: row for row in done.document["tasks"]}
    assert rates["arithmetic"]["total"] == 24 and sum(name.startswith("needle") for name in rates) >= 2
