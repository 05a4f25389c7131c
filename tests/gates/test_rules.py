"""Rules as people write them: read strictly, and checked against numbers that are written by hand."""

from __future__ import annotations

import json
import re

import numpy as np
import pytest

from mlx_pare.base.errors import PareError, UsageError
from mlx_pare.gates import check
from mlx_pare.gates.rules import QUANTITIES, Rule, parse, rules_of
from mlx_pare.options.settings import Settings

READ = {
    "perplexity <= 1.05 * original": ("perplexity", "<=", 1.05, "original"),
    " kl<=0.1 ": ("kl", "<=", 0.1, None),
    "bits_per_byte < 1e-2": ("bits_per_byte", "<", 0.01, None),
    "peak <= 17 GB": ("peak", "<=", 17e9, None),
    "size < 1.5GiB": ("size", "<", 1.5 * 2**30, None),
    "size <= 0.5*fewer-bits": ("size", "<=", 0.5, "fewer-bits"),
    "tok_s >= 20": ("tok_s", ">=", 20.0, None),
    "prefill_tok_s > 1 * original": ("prefill_tok_s", ">", 1.0, "original"),
}
WRONG = {
    "perplexty <= 2": "no run measures 'perplexty'.*Write perplexity",
    "kl <= 1 GB": "the unit 'GB'",
    "size <= 2GB * original": "the unit 'GB'",
    "size <= 3 * rival": "compares with 'rival'.*original, random, fewer-bits",
    "tok_s >= 1 * random": "compares with 'random'.*original",
    "kl <= 2 * original": "compares with 0",
    "kl <= 1.2.3": "cannot read '1.2.3'",
    "size <= 3 parsecs": "cannot read '3parsecs' as bytes",
    "kl == 1": "cannot read the gate.*for example",
    "kl <= __import__('os')": "cannot read the gate",
    "": "cannot read the gate",
    "kl <= 0.1 and tok_s >= 2": "cannot read the gate",
}


@pytest.mark.parametrize("text", READ)
def test_what_is_read(text):
    assert parse(text) == Rule(text, *READ[text])


@pytest.mark.parametrize("text", WRONG)
def test_what_is_refused_says_why(text):
    with pytest.raises(UsageError) as error:
        parse(text)
    assert re.search(WRONG[text], f"{error.value.problem}. {error.value}")


def test_no_text_is_anything_but_a_rule_or_a_usage_error():
    random = np.random.default_rng(0)
    pieces = [*QUANTITIES, "<=", ">=", "*", " ", "1", "0.5", "e", "GB", "original", "\0", "é", "(", "-"]
    for _ in range(2000):
        text = "".join(random.choice(pieces, random.integers(1, 8)))
        try:
            assert parse(text).name in QUANTITIES
        except UsageError as error:
            assert error.cure


@pytest.mark.parametrize(
    ("given", "why"),
    [
        ({"gate": ["tok_s >= 2"], "trials": 0}, "--trials is 0"),
        ({"gate": ["tok_s >= 2"], "trials": 0, "quick": True}, "--quick leaves it out"),
        ({"gate": ["kl <= 1 * random"], "quick": True}, "what --quick leaves out"),
        ({"fail_if_not_worth_it": True, "quick": True}, "the verdict, which --quick leaves out"),
    ],
)
def test_a_rule_that_the_run_cannot_decide_is_refused_before_work(given, why):
    with pytest.raises(UsageError, match=why):
        rules_of(Settings(keep=0.5, **given))


# ---- checked ----


@pytest.fixture
def run(tmp_path):
    """A run directory with measurements: perplexity 10 -> 12 -> 11; sizes 1000 -> 500; 40 -> 50 tokens per second."""
    for name, perplexity, kl, size in (
        ("original", 10.0, None, 1000), ("pruned", 12.0, 0.2, 500), ("recovered", 11.0, 0.1, 500),
        ("random", 14.0, 0.4, 500),
    ):  # fmt: skip
        place = tmp_path / f"evaluate-{name}"
        place.mkdir()
        found = {"schema_version": 1, "model": "m", "data": "d", "tokens": 9, "windows": 1, "length": 4,
                 "nll": float(np.log(perplexity)), "perplexity": perplexity, "perplexity_stderr": 0.1,
                 "bits_per_byte": perplexity / 10, "kl_divergence": kl}  # fmt: skip
        (place / "metrics.json").write_text(json.dumps(found))
        (place / "size.json").write_text(json.dumps({"bytes": size, "parameters": size}))
    (tmp_path / "bench").mkdir()

    def speeds(decode: float) -> dict:
        one = {name: {"median": decode, "min": decode - 1, "max": decode + 1} for name in check.BENCHED.values()}
        return {"model": "m", **one, "ratio": one}

    bench = {"trials": 1, "prompt_tokens": 8, "new_tokens": 2, "backend": "CPU", "models": [speeds(40.0), speeds(50.0)]}
    (tmp_path / "bench" / "bench.json").write_text(json.dumps(bench))
    return tmp_path


CHECKED = {  # rule: stage, whether the run recovers, value, limit, passed
    "perplexity <= 1.2001 * original": ("pruned", False, 12.0, 12.001, True),
    "perplexity <= 1.19 * original": ("pruned", False, 12.0, 11.9, False),
    "perplexity < 11.5": ("recovered", True, 11.0, 11.5, True),
    "perplexity > 0.9 * random": ("compared", True, 11.0, 12.6, False),
    "kl <= 0.05": ("recovered", True, 0.1, 0.05, False),
    "kl <= 0.5 * random": ("compared", False, 0.2, 0.2, True),
    "bits_per_byte <= 1.1 * original": ("recovered", True, 1.1, 1.1, True),
    "size <= 0.4kB": ("pruned", True, 500.0, 400.0, False),
    "size <= 0.5 * original": ("pruned", True, 500.0, 500.0, True),
    "tok_s >= 50": ("bench", True, 50.0, 50.0, True),
    "tok_s >= 1.3 * original": ("bench", True, 50.0, 52.0, False),
    "peak <= 50": ("bench", False, 51.0, 50.0, False),
    "kl <= 1 * fewer-bits": ("compared", False, 0.2, None, None),
}


@pytest.mark.parametrize("text", CHECKED)
def test_numbers_and_limits(run, text):
    stage, recovers, value, limit, passed = CHECKED[text]
    written = []
    rules = [parse(text)]
    if passed is False:
        with pytest.raises(check.GateFailed, match=re.escape(text)) as error:
            check.settle(run, rules, stage, recovers, lambda: written.append(1) or run / "report.md")
        assert written and error.value.exit_code == 1 and "Everything is kept" in str(error.value)
    else:
        check.settle(run, rules, stage, recovers, lambda: pytest.fail("no report is needed"))
    (row,) = check.rows_of(run)
    assert (row["rule"], row["stage"], row["passed"]) == (text, stage, passed)
    assert row["value"] == pytest.approx(value) and row["limit"] == (limit and pytest.approx(limit))


def test_only_what_recovery_improves_may_fail_before_it(run, capfd):
    check.settle(run, [parse("kl <= 0.15")], "pruned", True, lambda: pytest.fail("not yet"))
    assert "before recovery the KL divergence" in capfd.readouterr().err
    assert [(row["stage"], row["passed"]) for row in check.rows_of(run)] == [("pruned", False)]
    check.settle(run, [parse("kl <= 0.15")], "recovered", True, lambda: pytest.fail("it holds"))
    assert [(row["stage"], row["passed"]) for row in check.rows_of(run)] == [("pruned", False), ("recovered", True)]
    with pytest.raises(check.GateFailed, match="is 500 B, size <= 400 allows 400 B"):
        check.settle(run, [parse("size <= 400")], "pruned", True, lambda: run)


def test_what_was_not_measured_fails(run):
    """A bench that did not fit in memory is no reason to pass."""
    (run / "bench" / "bench.json").unlink()
    with pytest.raises(check.GateFailed, match="tokens written per second was not measured, so tok_s >= 1 could not"):
        check.settle(run, [parse("tok_s >= 1")], "bench", True, lambda: run)
    assert check.rows_of(run)[0]["passed"] is None


def test_rules_that_are_not_asked_any_more_leave(run):
    check.settle(run, [parse("kl <= 0.5"), parse("size <= 1kB")], "pruned", False, lambda: run)
    check.only(run, [parse("size <= 1kB")])
    assert [row["rule"] for row in check.rows_of(run)] == ["size <= 1kB"]


def test_a_damaged_file_is_named(run):
    (run / check.FILE).write_text('{"gates": [{"rule": 1}]}')
    with pytest.raises(PareError, match=r"gates\.json is damaged"):
        check.rows_of(run)
