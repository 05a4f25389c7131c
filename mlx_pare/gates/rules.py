"""What a result must reach, as people write it: "perplexity <= 1.05 * original". Rules are read, never evaluated."""

from __future__ import annotations

import difflib
import operator
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from ..base.errors import UsageError
from ..base.units import parse_amount

EXAMPLES = '"perplexity <= 1.05 * original", "kl <= 0.1", "tok_s >= 20", "peak <= 17GB"'
OPERATORS: dict[str, Callable[[float, float], bool]] = {
    "<=": operator.le, ">=": operator.ge, "<": operator.lt, ">": operator.gt,
}  # fmt: skip
FORM = re.compile(r"\s*([\w.]+)\s*(<=|>=|<|>)\s*([0-9.]+(?:e-?[0-9]+)?)\s*([A-Za-z]*)\s*(?:\*\s*([\w-]+)\s*)?")


@dataclass(frozen=True)
class Quantity:
    """Something that a run measures.

    ``measured``: by "evaluate" on the test text, or by "bench". ``recovers``: recovery may improve it. ``what``: its
    meaning, for messages. ``unit``: "bytes", or nothing.
    """

    measured: str
    what: str
    recovers: bool = False
    unit: str = ""


QUANTITIES = {
    "perplexity": Quantity("evaluate", "the perplexity", recovers=True),
    "kl": Quantity("evaluate", "the KL divergence from the original, in nats per token,", recovers=True),
    "bits_per_byte": Quantity("evaluate", "the number of bits per byte of text", recovers=True),
    "size": Quantity("evaluate", "the size of the weights", unit="bytes"),
    "tok_s": Quantity("bench", "the number of tokens written per second"),
    "prefill_tok_s": Quantity("bench", "the number of tokens read per second"),
    "peak": Quantity("bench", "the peak of MLX's memory", unit="bytes"),
}
COMPARED = {"evaluate": ("original", "random", "fewer-bits"), "bench": ("original",)}  # what a rule may compare with


@dataclass(frozen=True)
class Rule:
    """One rule. ``of``: the contender whose value is multiplied with ``number``; None: the number is the limit."""

    text: str
    name: str
    sign: str
    number: float
    of: str | None = None

    @property
    def quantity(self) -> Quantity:
        return QUANTITIES[self.name]

    def holds(self, value: float, limit: float) -> bool:
        """Whether a value keeps to a limit."""
        return OPERATORS[self.sign](value, limit)


def parse(text: str) -> Rule:
    """Read a rule. Raises UsageError that names what is wrong, and the cure."""
    found = FORM.fullmatch(text)
    if not found:
        raise UsageError(f"cannot read the gate {text!r}", f"write for example {EXAMPLES}")
    name, sign, number, unit, of = found.groups()
    if name not in QUANTITIES:
        near = difflib.get_close_matches(name, QUANTITIES, 1) or ["perplexity"]
        raise UsageError(
            f"no run measures {name!r}, of the gate {text!r}", f"write {near[0]}, or one of {', '.join(QUANTITIES)}"
        )
    quantity = QUANTITIES[name]
    if of is not None and of not in COMPARED[quantity.measured]:
        raise UsageError(
            f"the gate {text!r} compares with {of!r}", f"choose one of {', '.join(COMPARED[quantity.measured])}"
        )
    if name == "kl" and of == "original":
        raise UsageError(f"the gate {text!r} compares with 0", "leave out the original: kl is measured from it")
    if unit and (of is not None or quantity.unit != "bytes"):
        raise UsageError(f"the gate {text!r} has the unit {unit!r}, which means nothing there", "leave it out")
    if quantity.unit == "bytes" and of is None:
        return Rule(text, name, sign, parse_amount(number + unit, "bytes"))
    try:
        return Rule(text, name, sign, float(number), of)
    except ValueError:
        raise UsageError(f"cannot read {number!r} in the gate {text!r}", "write a number") from None


def rules_of(s: Any) -> list[Rule]:
    """The rules of the settings of a run; --min-quality is one of them.

    Raises UsageError if a rule cannot be read, or if the run will not measure what it asks for.
    """
    quality = [] if s.min_quality is None else [Rule(f"--min-quality {s.min_quality:g}", "perplexity", "<=",
                                                     s.min_quality, "original")]  # fmt: skip
    if s.fail_if_not_worth_it and s.quick:
        raise UsageError("--fail-if-not-worth-it needs the verdict, which --quick leaves out", "leave out one of them")
    found = [*quality, *map(parse, s.gate)]
    for rule in found:
        if rule.quantity.measured == "bench" and not s.trials:
            why = "--quick leaves it out" if s.quick else "--trials is 0"
            raise UsageError(f"the gate {rule.text!r} needs the speed measured: {why}", "change one of them")
        if rule.of in ("random", "fewer-bits") and s.quick:
            raise UsageError(f"the gate {rule.text!r} compares with what --quick leaves out", "change one of them")
    return found


def needed(rules: Sequence[Rule], measured: str, compared: bool) -> list[Rule]:
    """Those rules that one kind of measurement decides.

    Args:
        rules: all of them.
        measured: "evaluate" or "bench".
        compared: those that compare with a random cut or with fewer bits, or the others.
    Returns:
        Some of the rules.
    """
    return [
        rule for rule in rules
        if rule.quantity.measured == measured and (rule.of in ("random", "fewer-bits")) == compared
    ]  # fmt: skip
