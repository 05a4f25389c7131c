"""What the picture of `fit` shows, before anything is drawn: rows become bars, and bars become words."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Any

from ..base.units import gb

MOST = 25  # bars in a picture: nobody reads more
COLUMNS = ("verdict", "headroom, GB", "budget, GB", "longest context")  # of the table next to the bars


@dataclass(frozen=True)
class Bar:
    """A model on one Mac, or on several alike. ``parts``: bytes by name; ``longest``: tokens, None if unknown."""

    name: str
    label: str
    parts: Mapping[str, int]
    budget: int
    verdict: str
    longest: int | None
    unsure: bool = False  # whether the budget is an estimate that was never measured
    second: bool = False  # belongs to the bar before it

    @property
    def key(self) -> str:
        """Return the name as part of an id: "24-gb-11-macs"."""
        return slug(self.name)

    @property
    def total(self) -> int:
        """Return the bytes, as far as they are known."""
        return sum(self.parts.values())

    @property
    def cells(self) -> tuple[str, str, str, str]:
        """Return what the table next to the bars says, in the order of COLUMNS."""
        headroom = f"{(self.budget - self.total) / 1e9:.2f}"
        if self.longest is None:  # the rest of the memory is unknown
            return self.verdict, f"< {headroom}", f"{self.budget / 1e9:.2f}", "?"
        return self.verdict, headroom, f"{self.budget / 1e9:.2f}", f"{self.longest:,}" if self.longest else "none"


def by_memory(rows: Iterable[Mapping[str, Any]]) -> dict[float, Mapping[str, Any]]:
    """Return for every memory size the Mac with the least room, smallest size first."""
    found: dict[float, Mapping[str, Any]] = {}
    for row in sorted(rows, key=lambda row: (row["memory_gb"], row["budget_bytes"] - _known_total(row))):
        found.setdefault(row["memory_gb"], row)
    return found


def bars_of(found: Mapping[str, Any]) -> list[Bar]:
    """Return the bars of the picture from top to bottom, at most as many as a reader takes in."""
    rows, here = found["rows"], found.get("here") or {}
    if original := found.get("original_rows"):
        return _pairs(by_memory(original), by_memory(rows))

    def key(row: Mapping[str, Any]) -> tuple:
        mine = (row["mac"], row["budget_bytes"]) == (here.get("mac"), here.get("budget_bytes"))
        alike = (row["budget_bytes"], row["memory_gb"], _known_total(row))
        return not mine, *alike, row["mac"] if len(rows) <= MOST else ""

    groups = [(not first, list(group)) for (first, *_), group in groupby(sorted(rows, key=key), key=key)]
    sizes = [group[0]["memory_gb"] for _, group in groups]
    bars = [_bar(_name(group, mine, sizes), group, bool(found.get("train"))) for mine, group in groups]
    nearest = sorted(bars, key=lambda bar: abs(bar.budget - bar.total))[:MOST]  # the others are clear cases
    return [bar for bar in bars if bar in nearest]


def _name(rows: Sequence[Mapping[str, Any]], mine: bool, sizes: Sequence[float]) -> str:
    """Name the Macs of one bar: one by its name, several by their memory."""
    if mine or len({row["mac"] for row in rows}) == 1:
        return f"this Mac ({rows[0]['mac']})" if mine else rows[0]["mac"]
    size = rows[0]["memory_gb"]
    chips = sorted({row["chip"].split()[0] for row in rows})
    which = f" {chips[0]} to {chips[-1]}" if sizes.count(size) > 1 else ""
    return f"{size:g} GB, {len(rows)}{which} Macs"


def _pairs(original: Mapping[float, Mapping[str, Any]], result: Mapping[float, Mapping[str, Any]]) -> list[Bar]:
    """Return bars of original and result for every memory size, up to the first on which both fit with room to
    spare."""
    sizes = list(result)
    plain = (i for i, n in enumerate(sizes) if verdict_of(original[n]) == verdict_of(result[n]) == "fits")
    last = next(plain, len(sizes) - 1) + 1
    bars = []
    for size in sizes[max(0, last - MOST // 2) : last]:
        bars.append(_bar(f"{size:g} GB, original", [original[size]]))
        bars.append(replace(_bar(f"{size:g} GB, result", [result[size]]), label="result", second=True))
    return bars


def _bar(name: str, rows: Sequence[Mapping[str, Any]], train: bool = False) -> Bar:
    """Return one bar for Macs on which the sum is the same. If only some of them hold scores for it, those are not
    shown."""
    row, longest = min(rows, key=lambda row: row.get("scores_bytes") or 0), [row["max_context"] for row in rows]
    return Bar(
        name=name,
        label=name,
        parts=parts_of(row, train),
        budget=row["budget_bytes"],
        verdict=verdict_of(row),
        longest=None if None in longest else min(longest),
        unsure="budget" in row.get("unsure", ()),
    )


def verdict_of(row: Mapping[str, Any]) -> str:
    """Return the verdict of a row of fit. The rows of older runs say only whether it fits."""
    return row.get("verdict") or ("fits" if row["fits"] else "over")


def _known_total(row: Mapping[str, Any]) -> int:
    return row["weights_bytes"] if row["total_bytes"] is None else row["total_bytes"]


def parts_of(row: Mapping[str, Any], train: bool) -> dict[str, int]:
    """Return the bytes of a row, or of a point of the curve, by their use, in the order in which they are stacked."""
    parts = {"weights": row["weights_bytes"]}
    work, scores = row["activation_bytes"], row.get("scores_bytes") or 0
    if work is None:
        return parts
    if train:
        return parts | {"training": work}
    memory = {"KV cache and states": row["kv_bytes"], "attention scores": scores}
    return parts | memory | {"other activations": work - scores}


# ---- in words ----


def heading(found: Mapping[str, Any], bars: Sequence[Bar]) -> str:
    """Say in a line how much memory the model takes."""
    name = clean(found["model"], 32)
    if any(bar.longest is None for bar in bars):
        return f"{name}: weights take {gb(bars[0].total)}, the rest is unknown"
    if any(bar.second for bar in bars):
        before, after = (max(bar.total for bar in bars if bar.second is second) for second in (False, True))
        takes = f"takes {gb(after)} instead of {gb(before)}"
    else:
        least, most = gb(min(bar.total for bar in bars)), gb(max(bar.total for bar in bars))
        takes = f"takes {most}" if least == most else f"takes {least} to {most}"
    if found.get("train"):
        return f"{name}: training on rows of {found['context']:,} tokens {takes}"
    return f"{name} {takes} at {found['context']:,} tokens of context"


def finding(found: Mapping[str, Any]) -> str:
    """Say in a line where the model fits."""
    answers, original = ([row["fits"] for row in found.get(key) or ()] for key in ("rows", "original_rows"))
    if None in answers:
        known = f"Does not fit {answers.count(False)} of {len(answers)} Macs; " if False in answers else ""
        return f"{known}unknown whether it fits {'the others' if known else 'any'}"
    said = (
        f"Fits {sum(answers)} of {len(answers)} Macs" if len(answers) > 1 else "Fits" if answers[0] else "Does not fit"
    )
    return f"{said}, the original {sum(original)}" if original else said


def clean(text: str, most: int = 60) -> str:
    """Shorten a name from outside to a piece of one line."""
    line = " ".join("".join(c if c.isprintable() else " " for c in text).split())
    return line if len(line) <= most else f"{line[: most // 2]}…{line[1 - most // 2 :]}"


def use(found: Mapping[str, Any], bars: Sequence[Bar]) -> str:
    """Say how the model is meant to run, and what is not certain about it."""
    batch, train = found.get("batch") or 1, found.get("train")
    facts = [found.get("form"), found.get("runtime"), f"batch {batch}" if batch > 1 else None, train]
    said = [clean(fact) for fact in facts if fact]
    if any(bar.unsure for bar in bars):
        said.append("? marks a budget that is estimated, not measured")
    return "; ".join(said)


def describe(found: Mapping[str, Any]) -> str:
    """Say what the bars show, for readers who cannot see them."""
    bars = bars_of(found)
    said = [
        f"{bar.name}: {gb(bar.total)} of {gb(bar.budget)}, {bar.verdict}, longest context {bar.cells[-1]}"
        for bar in bars
    ]
    return f"{heading(found, bars)}. {finding(found)}. {'; '.join(said)}."


def slug(text: str) -> str:
    """Return a name as part of an id."""
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")
