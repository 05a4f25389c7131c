"""Options that were typed but have no effect next to the others. Each is a warning, because silence would mislead.

Options of a recipe file are not judged: the recipe of a run names every option.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from ..options.settings import TABLE

Given = Mapping[str, Any]
Rule = tuple[Iterable[str], Callable[[Given], Any], str]  # parameters, whether they have an effect, what that takes
VALIDATIONS, ROUND = 6, 25  # equal to options.Options.reports and on_policy.ROUND: a test compares them

FIELDED = (".jsonl", ".ndjson", ".jsonlines", ".json", ".csv", ".tsv")  # endings of files with fields


def _texts(given: Given) -> list[str]:
    data, test = given.get("data") or [], given.get("test_data")
    return [*([data] if isinstance(data, str) else data), *([test] if test else [])]


def _may_have_fields(place: str) -> bool:
    """Tell whether the place is a file of records, or a folder with one."""
    files = Path(place).rglob("*") if os.path.isdir(place) else [Path(place)]
    return any(file.suffix.lower() in FIELDED for file in files)


def _has_records(given: Given) -> bool:
    """Tell whether a text that is read may have fields."""
    for text in _texts(given):
        head, tail = text.rpartition(":")[0], text.partition("=")[2]
        places = [place for place in (text, head, tail, tail.rpartition(":")[0]) if place and os.path.exists(place)]
        if not places or any(map(_may_have_fields, places)):
            return True  # a missing path is another error
    return False


def _validations(given: Given) -> int:
    steps = given["recover_steps"]
    return min(steps, max(VALIDATIONS, math.ceil(steps / ROUND) if given["on_policy"] else 0))


def _makes_matrix(given: Given) -> bool:
    from ..gguf.quant_mixes import NEEDS_MATRIX

    asked = given["imatrix"] or ("auto" if (given["gguf"] or "").lower() in NEEDS_MATRIX else "none")
    return asked == "auto"


TRAINED = ("accumulate", "clip", "cross_entropy", "grad_checkpoint", "kind", "learning_rate", "match", "mix",
           "on_policy", "patience", "rank", "schedule", "temperature", "top")  # fmt: skip
RECOVERY: tuple[Rule, ...] = (
    (TRAINED, lambda v: v["recover_steps"], "with --recover-steps 0"),
    (("batch", "method", "teacher", "train_rows"), lambda v: v["recover_steps"] or v["local_steps"],
     "without --recover-steps or --local-steps"),
    (("rank",), lambda v: v["method"] in ("lora", "dora"), "without --method lora or dora"),
    (("mix",), lambda v: len(v.get("data") or []) != 1, "with a single domain: repeat --data"),
)  # fmt: skip
SIZES: tuple[Rule, ...] = (
    (("group_size",), lambda v: v["bits"] or v["choose_bits"], "without --bits or --choose-bits"),
    (("tries",), lambda v: v["widths"] != "even", "with --widths even"),
)
RECORDS: Rule = (("field",), _has_records, "without a .jsonl file in --data or --test-data")
RULES: dict[str, tuple[Rule, ...]] = {
    "run": (*SIZES, *RECOVERY, RECORDS),
    "plan": SIZES,
    "recover": (*RECOVERY[:3], RECORDS),
    "calibrate": (RECORDS,),
    "evaluate": (
        (("field", "length", "samples"), lambda v: v["data"], "without --data"),
        (("field",), _has_records, "without a .jsonl file in --data"),
        (("out", "raw", "task_function", "temperature", "context"), lambda v: v["tasks"], "without --tasks"),
        (("seed",), lambda v: v["temperature"], "with a temperature of 0"),
    ),
    "score": ((("seed",), lambda v: v["criterion"] == "random", "without --criterion random"),),
    "stability": ((("reconstruct",), lambda v: v["measure"], "without --measure"),),
    "fit": (
        (("group_size",), lambda v: v["bits"], "without --bits"),
        (("prefill_step",), lambda v: not (v["train"] or v["gguf"] or v["runtime"] == "llama.cpp"),
         "with --train, --gguf or --runtime llama.cpp"),
    ),
    "export": (
        (("bits", "group_size", "mixed"), lambda v: v["mlx"], "without --mlx"),
        (("gguf", "imatrix", "mac", "context"), lambda v: not (v["mlx"] or v["hub_ready"]),
         "with --mlx or --hub-ready"),
        (("data", "field", "samples", "length"), _makes_matrix, "without --imatrix auto"),
    ),
}  # fmt: skip


def lines(command: str, typed: Iterable[str], given: Given) -> list[str]:
    """Return a sentence for every option of a command that was typed in vain.

    Args:
        command: its name.
        typed: the parameters on the command line.
        given: the values of all parameters.
    Returns:
        The sentences.
    """
    found: dict[str, str] = {}
    for fields, effective, why in RULES.get(command, ()):
        vain = [field for field in fields if field in typed and field not in found and given.get(field) is not None]
        if vain and not effective(given):
            found |= {field: f"{_flag(field, given[field])} has no effect {why}" for field in vain}
    if "patience" in typed and "patience" not in found and given["patience"] >= (most := _validations(given)):
        found["patience"] = f"--patience {given['patience']} has no effect: recovery validates {most} times"
    return list(found.values())


def _flag(field: str, value: Any) -> str:
    flag = TABLE[field].flag if field in TABLE else "--" + field.replace("_", "-")
    return flag.replace("--", "--no-", 1) if value is False else flag
