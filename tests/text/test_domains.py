"""Domains: what --data may say, parts that share nothing, rows mixed by weight, and an order of drawing that goes on
after a stop exactly as it would have."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest

from mlx_pare import lm
from mlx_pare.base.errors import PareError, UsageError
from mlx_pare.options.settings import Settings, settings_of
from mlx_pare.text import corpus, domains
from mlx_pare.text.corpus import Rows
from mlx_pare.text.domains import FLOOR, Domains, Sampler, mix, parse, parse_all, reweighted
from mlx_pare.text.splits import DEMO, Texts

# ---- what was asked ----


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A folder to be in: src.jsonl, book.txt, notes/, and names that hold ":" and "="."""
    monkeypatch.chdir(tmp_path)
    for name in ("src.jsonl", "book.txt", "a=b.txt", "x:2", "odd:1=y.txt", "notes/one.md", "v1.2/t.txt", "3:4/t.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text('{"text": "x"}' if name.endswith("jsonl") else name)
    return tmp_path


@pytest.mark.parametrize(
    ("text", "name", "path", "weight"),
    [
        ("book.txt", "book", "book.txt", 1.0),
        ("book.txt:2", "book", "book.txt", 2.0),
        ("code=src.jsonl:0.5", "code", "src.jsonl", 0.5),
        ("code=src.jsonl", "code", "src.jsonl", 1.0),
        ("notes/:1e1", "notes", "notes", 10.0),
        ("notes", "notes", "notes", 1.0),
        ("v1.2", "v1.2", "v1.2", 1.0),
        ("Grüße-1.a_b=notes:.5", "Grüße-1.a_b", "notes", 0.5),
        ("a=b.txt", "a=b", "a=b.txt", 1.0),
        ("a=b.txt:3", "a=b", "a=b.txt", 3.0),
        ("name=a=b.txt:3", "name", "a=b.txt", 3.0),
        ("x:2", "x:2", "x:2", 1.0),
        ("x:2:3", "x:2", "x:2", 3.0),
        ("n=x:2", "n", "x:2", 1.0),
        ("odd:1=y.txt", "odd:1=y", "odd:1=y.txt", 1.0),
        ("3:4", "3:4", "3:4", 1.0),
        (".", None, ".", 1.0),
    ],
)
def test_what_data_may_say(here, text, name, path, weight):
    found = parse(text)
    assert (found.name, str(found.path), found.weight) == (name or here.name, path, weight)
    assert parse(f"q={here / path}:7") == domains.Spec("q", here / path, 7.0)


@pytest.mark.parametrize(
    ("text", "error", "says"),
    [
        ("book.txt:0", UsageError, "'0' in --data book.txt:0 is no weight. Give a number greater than zero"),
        ("book.txt:-1", UsageError, "'-1' in --data book.txt:-1 is no weight"),
        ("book.txt:", UsageError, "'' in --data book.txt: is no weight"),
        ("n=book.txt:much", UsageError, "'much' in --data n=book.txt:much is no weight"),
        ("book.txt:nan", UsageError, "'nan' in"),
        ("book.txt:inf", UsageError, "'inf' in"),
        ("book.txt:1e999", UsageError, "'1e999' in"),
        ("book.txt:1_0", UsageError, "'1_0' in"),
        ("book.txt:١", UsageError, "is no weight"),
        ("a b=book.txt", UsageError, "'a b' in --data a b=book.txt is no name. Use letters"),
        ("=book.txt:2", UsageError, "'' in --data =book.txt:2 is no name"),
        ("nothing.txt", PareError, "no text at nothing.txt. Give a .txt"),
        ("nothing.txt:2", PareError, "no text at nothing.txt. "),
        ("n=nothing.txt", PareError, "no text at nothing.txt. "),
        ("n=nothing.txt:2", PareError, "no text at nothing.txt. "),
        ("n=:2", PareError, "no text at "),
        ("", PareError, "no text at "),
        ("book.txt\0", PareError, "no text at "),
        ("x" * 5000, PareError, "no text at "),
    ],
)
def test_what_data_may_not_say(here, text, error, says):
    with pytest.raises(error) as found:
        parse(text)
    assert type(found.value) is error and says in str(found.value)


def test_parsing_of_noise(here):
    """Anything is either a spec of something that is there, or an error of ours."""
    random, made = np.random.default_rng(0), 0
    pieces = ["book.txt", "a=b.txt", "x:2", "notes", "/", ":", "=", "2", ".5", "-", "n", " ", "é", ".", "e9", "\n"]
    for _ in range(3000):
        text = "".join(random.choice(pieces, random.integers(0, 6)))
        try:
            found = parse(text)
        except PareError as error:
            assert error.problem
            continue
        made += 1
        assert found.path.exists() and found.name and found.weight > 0
        assert text in (
            form.format(n=name, p=path, w=weight)
            for form in ("{p}", "{n}={p}", "{p}:{w}", "{n}={p}:{w}")
            for name in {found.name, text.partition("=")[0]}
            for weight in [text.rpartition(":")[2]]
            for path in {p for p in (text, text.rpartition(":")[0], text.partition("=")[2],
                                     text.rpartition(":")[0].partition("=")[2])}
        )  # fmt: skip
    assert made > 100


def test_several(here):
    found = parse_all(["code=src.jsonl:2", "notes/:1", "book.txt"])
    assert [(spec.name, spec.weight) for spec in found] == [("code", 2.0), ("notes", 1.0), ("book", 1.0)]
    assert [spec.name for spec in parse_all("x:2")] == ["x:2"] and len(parse_all(here)) == 1
    read = domains.read_domains(found)
    assert read == {"code": ["x"], "notes": ["notes/one.md"], "book": ["book.txt"]}
    with pytest.raises(UsageError, match=r"names .*book.txt twice. Give it once, with a weight"):
        parse_all(["book.txt", f"again={here}/notes/../book.txt:2"])
    (here / "book.md").write_text("x")
    with pytest.raises(UsageError, match=r"book.txt and book.md are both the domain 'book'. Name them"):
        parse_all(["book.txt", "book.md"])
    assert len(parse_all(["book.txt", "other=book.md"])) == 2


@pytest.mark.parametrize(
    ("given", "kept"),
    [(None, None), ([], None), ("a", "a"), (["a"], "a"), (["a", "b:2"], ("a", "b:2")), (("a", "b"), ("a", "b"))],
)
def test_one_text_stays_text_in_the_recipe(given, kept):
    assert settings_of(data=given).data == kept


# ---- parts ----

LINES = [f"Line {n} of this text is about the number {n * n}, and long enough to be a paragraph of its own." for n in
         range(1200)]  # fmt: skip


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    """a.txt and b.txt of 400 lines each; many.jsonl of 60 documents; odd.jsonl of 30 that hold lines of a.txt too."""
    folder = tmp_path_factory.mktemp("domains")
    (folder / "a.txt").write_text("\n".join(LINES[:400]))
    (folder / "b.txt").write_text("\n".join(LINES[400:800]))
    records = ["\n".join(LINES[n : n + 5]) for n in range(800, 1100, 5)]
    (folder / "many.jsonl").write_text(
        "\n".join(json.dumps({"text": text, "body": f"b{n}"}) for n, text in enumerate(records))
    )
    records = ["\n".join(LINES[n : n + 10]) for n in range(0, 300, 10)]
    (folder / "odd.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in records))
    return folder


def test_every_domain_is_in_every_part(texts):
    specs = parse_all([f"{texts}/a.txt", f"{texts}/b.txt:2", f"{texts}/many.jsonl"])
    parts = domains.read_parts(specs, None)
    assert list(parts) == ["calibration", "validation", "test"]
    for of in parts.values():
        assert list(of) == ["a", "b", "many"] and all(of.values())
    for spec in specs:
        whole = {line for text in corpus.read(spec.path) for line in text.split("\n")}
        found = [line for of in parts.values() for text in of[spec.name] for line in text.split("\n") if line]
        assert len(found) == len(set(found)) and set(found) == whole
        alone = corpus.split(corpus.read(spec.path), domains.SHARES)
        assert alone == {part: of[spec.name] for part, of in parts.items()}


def test_overlap_across_domains(texts):
    """odd.jsonl has lines of a.txt, divided otherwise: by record, not by line."""
    with pytest.raises(PareError, match=r"the \w+ \(\w+\) text and the \w+ \(\w+\) text share the paragraph 'Line"):
        domains.read_parts(parse_all([f"{texts}/a.txt", f"{texts}/odd.jsonl"]), None)
    with pytest.raises(PareError, match=r"\(b\) text and the test text share the paragraph 'Line 400 "):
        domains.read_parts(parse_all([f"{texts}/b.txt"]) + parse_all(f"{texts}/many.jsonl"), texts / "b.txt")
    twice = {"calibration": {"a": [LINES[0]], "b": [LINES[0]]}, "test": {"a": [LINES[1]]}}
    domains.forbid_overlap(twice)  # within a part it is only read twice
    with pytest.raises(PareError, match=r"the calibration .* text and the test text share"):
        domains.forbid_overlap({**twice, "test": {"a": [LINES[0]]}})


# ---- rows ----


def rows_of(*sizes: int) -> dict[str, Rows]:
    """Domain n has rows of n * 1000 + number."""
    return {
        name: Rows.full(1000 * n + np.arange(size)[:, None].repeat(3, 1))
        for n, (name, size) in enumerate(zip("abcdefg", sizes, strict=False))
    }


def test_mixed_by_weight():
    found = mix(rows_of(100, 100, 100), {"a": 2, "b": 1, "c": 1}, 100)
    assert Counter(found.of.tolist()) == {0: 50, 1: 25, 2: 25} and found.rows.count == 100
    for n in range(3, 101):
        counts = np.bincount(found.of[:n], minlength=3)
        assert (np.abs(counts - n * np.array([0.5, 0.25, 0.25])) < 2).all() and counts.min() >= 1
    assert (found.rows.tokens[:, 0] // 1000 == found.of).all()
    for number, name in enumerate(found.names):
        assert found.part(name).tokens[:, 0].tolist() == [1000 * number + i for i in range((found.of == number).sum())]


def test_short_domains_give_way_and_every_one_has_a_row():
    found = mix(rows_of(3, 50, 50), {"a": 10, "b": 1, "c": 2}, 33)
    assert Counter(found.of.tolist()) == {0: 3, 1: 10, 2: 20}
    assert sorted(mix(rows_of(5, 50, 50), {"a": 1e-9, "b": 1, "c": 1e9}, 3).of) == [0, 1, 2]
    assert mix(rows_of(3, 4), {"a": 1e-300, "b": 1e300}, 1000).rows.count == 7
    everything = mix(rows_of(3, 4), {"a": 5, "b": 1})
    assert sorted(everything.rows.tokens[:, 0]) == [0, 1, 2, 1000, 1001, 1002, 1003]
    with pytest.raises(PareError, match=r"2 rows are too few for 3 domains. Ask for more"):
        mix(rows_of(5, 5, 5), {"a": 1, "b": 1, "c": 1}, 2)


@pytest.mark.parametrize("weights", [{"a": 0, "b": 0}, {"a": -1, "b": 2}, {"a": np.nan, "b": 1}, {"a": np.inf, "b": 1}])
def test_weights_that_are_none(weights):
    with pytest.raises(PareError, match=r"are no weights. Give numbers that are not negative"):
        mix(rows_of(5, 5), weights)
    with pytest.raises(PareError, match="are no weights"):
        Sampler(np.array([0, 1]), weights, 1)


@pytest.mark.parametrize("sizes", [(40,), (40, 30, 5)])
@pytest.mark.parametrize("count", [3, 20, 1000])
def test_lot_begins_with_the_rows_of_the_same_seed(sizes, count):
    parts = rows_of(*sizes)
    weights = {name: n + 1.0 for n, name in enumerate(parts)}
    every, chosen = mix(parts, weights), mix(parts, weights, count, 7)
    lot = every.lot(7)
    assert sorted(lot) == list(range(sum(sizes)))
    assert sorted(every.rows.tokens[lot[:count], 0]) == sorted(chosen.rows.tokens[:, 0])
    assert every.of[lot[:count]].tolist() == chosen.of.tolist()
    for name in chosen.names:
        assert (np.diff(chosen.part(name).tokens[:, 0]) > 0).all()  # in the order of the text


def test_digest_sees_rows_domains_and_weights():
    one = mix(rows_of(9), {"a": 3})
    assert one.digest() == one.rows.digest() == mix(rows_of(9), {"a": 1}).digest()
    found = mix(rows_of(9, 9), {"a": 1, "b": 1})
    others = [
        replace(found, of=1 - found.of), replace(found, weights={"a": 1.0, "b": 2.0}),
        replace(found, weights={"a": 1.0, "c": 1.0}), replace(found, rows=found.rows.first(5)),
    ]  # fmt: skip
    assert len({found.digest(), found.rows.digest(), *(other.digest() for other in others)}) == 6


def test_one_domain_is_as_it_was(pico_models, texts):
    """The rows of one text, named and weighted or not, are those that its parts give by themselves."""
    model = pico_models("llama")
    tokenizer = lm.tokenizer(model)
    parts = corpus.split(corpus.read(texts / "a.txt", tokenizer), {"calibration": 80, "validation": 10, "test": 10})
    for data in (f"{texts}/a.txt", [f"{texts}/a.txt"], (f"name={texts}/a.txt:3",)):
        found = Texts(model, Settings(data=data, samples=20, length=16, seed=3))
        for part, rows, count, seed in (
            ("calibration", found.calibration, 20, 3), ("calibration", found.training_domains.rows, 512, 3),
            ("validation", found.validation, 64, None), ("test", found.test, 20, None),
        ):  # fmt: skip
            own = corpus.windows(tokenizer, parts[part], 16, count, seed)
            assert own.digest() == rows.digest()
            assert own.tokens.dtype == rows.tokens.dtype and own.lengths.dtype == rows.lengths.dtype
        assert found.training_domains.digest() == found.training_domains.rows.digest()
        assert found.validation_domains.digest() == found.validation.digest()


def test_own_text_is_as_it_was(pico_models):
    model = pico_models("llama")
    tokenizer, found = lm.tokenizer(model), Texts(model, Settings(samples=20, length=64, seed=3))
    parts = corpus.split(corpus.read(DEMO / "calibration.txt"), {"calibration": 88, "validation": 12})
    assert found.calibration.digest() == corpus.windows(tokenizer, parts["calibration"], 64, 20, 3).digest()
    assert found.validation.digest() == corpus.windows(tokenizer, parts["validation"], 64, 64).digest()
    test = corpus.read(DEMO / "test.txt")
    assert found.test.digest() == corpus.windows(tokenizer, test, 64, 20).digest()
    assert found.name("test") == "mlx-pare's own text"


def test_texts_of_several_domains(pico_models, texts):
    data = (f"{texts}/a.txt:3", f"two={texts}/b.txt")
    found = Texts(pico_models("llama"), Settings(data=data, samples=24, length=16))
    training, validation = found.training_domains, found.validation_domains
    assert isinstance(training, Domains) and training.weights == validation.weights == {"a": 3.0, "two": 1.0}
    assert found.validation is validation.rows
    of = found.mixed("calibration", 24, 0).of
    assert found.calibration.count == 24 and Counter(of.tolist()) == {0: 18, 1: 6}
    for part in (training, validation):
        assert min(part.part(name).count for name in part.names) >= 1
    assert found.name("test") == ", ".join(data)
    short = Texts(pico_models("llama"), Settings(data=data, length=20000))
    with pytest.raises(PareError, match=r"validation of a: the text has \d+ tokens, one row needs 20000"):
        _ = short.validation
    few = Texts(pico_models("llama"), Settings(data=data, length=16, samples=1))
    with pytest.raises(PareError, match="calibration: 1 rows are too few for 2 domains"):
        _ = few.calibration


def test_the_field_of_a_run(pico_models, texts):
    s = Settings(data=f"{texts}/many.jsonl", field="body", length=2, samples=4)
    found = Texts(pico_models("llama"), s).documents
    assert {text.strip() for of in found.values() for text in of["many"]} == {f"b{n}" for n in range(60)}


# ---- drawing ----


def drawn(sampler: Sampler, batches: int) -> np.ndarray:
    return np.stack([sampler.draw() for _ in range(batches)])


def test_one_domain_is_shuffled_epochs():
    rows = drawn(Sampler(np.zeros(24, int), {"a": 5}, 8, 1), 9).reshape(3, 24)
    assert all(sorted(epoch) == list(range(24)) for epoch in rows.tolist())
    assert len({tuple(epoch) for epoch in [*rows.tolist(), range(24)]}) == 4
    same, other = (drawn(Sampler(np.zeros(24, int), {"a": 1}, 8, seed), 9).reshape(3, 24) for seed in (1, 2))
    assert np.array_equal(rows, same) and not np.array_equal(rows, other)


def test_equal_domains_are_shuffled_epochs_too():
    rows = drawn(Sampler(np.arange(24) % 3, dict.fromkeys("abc", 1), 8), 6).reshape(2, 24)
    assert all(sorted(epoch) == list(range(24)) for epoch in rows.tolist())


@pytest.mark.parametrize("seed", range(5))
def test_shares_and_epochs(seed):
    """After any number of rows every domain is where its weight says, and has drawn each row as often as any, or once
    more."""
    random = np.random.default_rng(seed)
    count = int(random.integers(2, 6))
    of = np.concatenate([np.arange(count), random.integers(0, count, 40)])
    weights = dict(zip("abcdef", random.random(count) + 0.05, strict=False))
    shares = np.array(list(weights.values())) / sum(weights.values())
    rows = drawn(Sampler(of, weights, 7, seed), 60).reshape(-1)
    for n in range(1, len(rows) + 1):
        ahead = np.bincount(of[rows[:n]], minlength=count) - n * shares
        assert ahead.max() < 1 and ahead.min() > -count
    for number in range(count):
        own = np.flatnonzero(of == number)
        for n in range(0, len(rows), 11):
            times = np.bincount(rows[:n][of[rows[:n]] == number], minlength=len(of))[own]
            assert times.max() - times.min() <= 1


def test_a_batch_larger_than_the_rows_is_cut():
    assert sorted(Sampler(np.zeros(5, int), {"a": 1}, 8).draw()) == [0, 1, 2, 3, 4]
    assert len(Sampler(np.array([0, 0, 0, 1]), {"a": 1, "b": 0}, 8).draw()) == 3


def test_a_domain_without_weight_is_not_drawn():
    sampler = Sampler(np.array([0, 1, 0, 1, 2]), {"a": 1, "b": 0, "c": 1}, 2)
    assert not {1, 3} & set(drawn(sampler, 50).reshape(-1).tolist())
    assert sampler.weights == {"a": 0.5, "b": 0.0, "c": 0.5}
    Sampler(np.array([0]), {"a": 1, "b": 0}, 1)
    with pytest.raises(PareError, match=r"the domain 'b' has no rows to draw from. Give it more text"):
        Sampler(np.array([0]), {"a": 1, "b": 1}, 1)
    with pytest.raises(PareError, match="rows of 2 domains and weights of 1"):
        Sampler(np.array([0, 1]), {"a": 1}, 1)


OF, WEIGHTS = np.array([0] * 7 + [1] * 11 + [2] * 3), {"a": 0.3, "b": 1 / 3, "c": 0.1}


@pytest.mark.parametrize("stop", [0, 1, 5, 17, 40])
def test_goes_on_exactly(stop):
    """Through JSON, across epochs, with a reweighting before and one after."""

    def run(sampler: Sampler, start: int, end: int) -> list:
        found = []
        for n in range(start, end):
            if n in (4, 20):
                sampler.reweight({"a": 2.1 + n, "b": 3.0, "c": 1.7}, {"a": 2.0, "b": 3.1, "c": 0.3})
            found.append(sampler.draw().tolist())
        return found

    whole, first, again = (Sampler(OF, WEIGHTS, 5, 9) for _ in range(3))
    expected = run(whole, 0, 60)
    head = run(first, 0, stop)
    again.draw()
    again.restore(json.loads(json.dumps(first.state())))
    assert again.state() == first.state()
    assert head + run(again, stop, 60) == expected and again.state() == whole.state()


@pytest.mark.parametrize("key", ["seed", "batch", "rows"])
def test_the_place_in_other_data(key):
    other = {"seed": (OF, WEIGHTS, 5, 8), "batch": (OF, WEIGHTS, 4, 9), "rows": (OF[1:], WEIGHTS, 5, 9)}[key]
    with pytest.raises(PareError, match=f"the place in the data belongs to other data: {key} was"):
        Sampler(OF, WEIGHTS, 5, 9).restore(Sampler(*other).state())


@pytest.mark.parametrize(
    "damage",
    [
        {"drawn": None}, {"drawn": {"a": 1}}, {"drawn": {"a": 1.5, "b": 0, "c": 0}}, {"due": {"a": 0, "b": 0}},
        {"drawn": {"a": -1, "b": 0, "c": 0}}, {"weights": {"a": 0, "b": 0, "c": 0}}, {"weights": []},
        {"weights": {"a": -1, "b": 1, "c": 1}}, {"due": {"a": float("nan"), "b": 0, "c": 0}},
        {"weights": {"a": "x", "b": 0, "c": 0}},
    ],
)  # fmt: skip
def test_a_damaged_place(damage):
    sampler = Sampler(OF, WEIGHTS, 5)
    before = sampler.state()
    with pytest.raises(PareError, match="the place in the data is damaged"):
        sampler.restore(before | damage)
    assert sampler.state() == before


# ---- dynamic mixing ----


def reference_mix(weights: np.ndarray, losses: np.ndarray, reference: np.ndarray) -> np.ndarray:
    """float64: w * exp(loss - reference), normalised, then a 1e-4 part of it shared evenly."""
    new = weights * np.exp(losses - reference)
    new /= new.sum()
    return new * 0.9999 + 0.0001 / len(weights)


@pytest.mark.parametrize("seed", range(5))
def test_reweighting_is_the_formula(seed):
    random = np.random.default_rng(seed)
    weights, losses, reference = random.random((3, 4)) * [[1], [6], [6]]
    names = "wxyz"[: len(weights)]
    found = reweighted(*(dict(zip(names, of, strict=True)) for of in (weights, losses, reference)))
    assert list(found) == list(names) and abs(sum(found.values()) - 1) < 1e-12
    np.testing.assert_allclose(list(found.values()), reference_mix(weights, losses, reference), rtol=1e-12)


def test_reweighting_has_a_direction_and_adds_up():
    sampler = Sampler(np.array([0, 1]), {"a": 1, "b": 1}, 1)
    new = sampler.reweight({"a": 3.0, "b": 2.0}, {"a": 2.0, "b": 2.0})
    assert new == sampler.weights and new["a"] > 0.7 > new["b"] > 0
    assert sampler.reweight({"a": 3.0, "b": 2.0}, {"a": 2.0, "b": 2.0})["a"] > new["a"]  # from the weights as they are
    same = reweighted({"a": 3, "b": 1}, {"a": 2.0, "b": 1.0}, {"a": 2.0, "b": 1.0})
    assert abs(same["a"] - 0.75) < FLOOR
    assert reweighted({"a": 3}, {"a": 9.0}, {"a": 1.0}) == {"a": 1.0}
    counts = Counter(drawn(Sampler(np.array([0, 1]), new, 1), 1000).reshape(-1).tolist())
    assert abs(counts[0] / 1000 - new["a"]) < 0.002


@pytest.mark.parametrize("loss", [1e3, -1e3, 1e30, 1.7e308, -1.7e308])
@pytest.mark.filterwarnings("error")
def test_extreme_losses(loss):
    """No overflow; nobody dies out but who had no weight."""
    weights = {"a": 1.0, "b": 1e-200, "c": 0.0, "d": 1e300}
    found = reweighted(weights, {"a": loss, "b": -loss, "d": 1.0}, {"a": 0.0, "b": loss, "d": 1.0})
    assert abs(sum(found.values()) - 1) < 1e-12 and found["c"] == 0
    assert all(found[name] >= FLOOR / 3 * 0.999 for name in "abd")
    assert max(found, key=found.get) == ("a" if loss > 0 else "b")
    again = reweighted(found, {"a": 0.0, "b": 0.0, "d": 0.0}, {"a": 0.0, "b": 0.0, "d": 0.0})
    np.testing.assert_allclose(list(again.values()), list(found.values()), atol=FLOOR)


@pytest.mark.parametrize("loss", [float("nan"), float("inf"), -float("inf")])
def test_losses_that_are_none(loss):
    with pytest.raises(PareError, match="the loss of the domain 'b' is"):
        reweighted({"a": 1, "b": 1}, {"a": 1.0, "b": loss}, {"a": 1.0, "b": 1.0})
    with pytest.raises(PareError, match="the reference loss of the domain 'b' is"):
        reweighted({"a": 1, "b": 1}, {"a": 1.0, "b": 1.0}, {"a": 1.0, "b": loss})
    with pytest.raises(PareError, match="the loss of the domain 'b' is missing"):
        reweighted({"a": 1, "b": 1}, {"a": 1.0}, {"a": 1.0, "b": 1.0})
    sampler = Sampler(np.array([0, 1]), {"a": 1, "b": 1}, 1)
    with pytest.raises(PareError):
        sampler.reweight({"a": 1.0}, {})
    assert sampler.weights == {"a": 0.5, "b": 0.5}
