"""The texts of a run as token rows: what it is calibrated and trained on, chosen by and judged by; all disjoint."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

from . import console, corpus, domains, lm

DEMO = Path(__file__).parent / "demo"
VALIDATION_ROWS = 64  # of recovery, at most: the teacher's hidden states are kept for them


class Asked(Protocol):
    """What texts need to know of steps.Settings."""

    data: Any
    test_data: str | None
    field: str | None
    samples: int
    train_rows: int
    length: int
    seed: int


class Texts:
    """The three disjoint texts of a run as token rows; read when first needed."""

    def __init__(self, model: Path, settings: Asked):
        self.model, self.settings = model, settings

    @cached_property
    def tokenizer(self) -> Any:
        return lm.tokenizer(self.model)

    @cached_property
    def specs(self) -> list[domains.Spec]:
        return domains.parse_all(self.settings.data or DEMO / "calibration.txt")

    @cached_property
    def documents(self) -> dict[str, dict[str, list[str]]]:
        """Those of every domain, for "calibration" (also trains the recovery), "validation" (chooses its best state)
        and "test" (is reported)."""
        s = self.settings
        test = s.test_data or (None if s.data else DEMO / "test.txt")
        return domains.read_parts(self.specs, test and Path(test), self.tokenizer, s.field)

    def apart_from(self, run: Texts) -> None:
        """Raises PareError when these texts, read for a recovery alone, hold what the run is tested on, or when the
        best state would be chosen by what the run was calibrated on: another text may be divided otherwise."""
        own = {"training": self.documents["calibration"], "validation": self.documents["validation"]}
        domains.forbid_overlap(own | {"run's test": run.documents["test"]})
        domains.forbid_overlap({"validation": own["validation"], "run's calibration": run.documents["calibration"]})

    def mixed(self, part: str, count: int | None, seed: int | None = None) -> domains.Domains:
        """Rows of every domain of a part, ``count`` of them or all."""
        weights = {spec.name: spec.weight for spec in self.specs}
        documents, length = self.documents[part], self.settings.length
        return domains.windows(self.tokenizer, part, documents, weights, length, count, seed)

    @cached_property
    def calibration(self) -> corpus.Rows:
        rows = self.mixed("calibration", self.settings.samples, self.settings.seed).rows
        if rows.count < self.settings.samples:
            console.say(
                f"calibration text holds {rows.count} rows of {rows.length} tokens, {self.settings.samples} "
                f"were asked: all are used"
            )
        return rows

    @cached_property
    def training_domains(self) -> domains.Domains:
        """The rows that recovery trains on: more of the calibration text than the statistics need."""
        return self.mixed("calibration", self.settings.train_rows, self.settings.seed)

    @cached_property
    def validation_domains(self) -> domains.Domains:
        return self.mixed("validation", VALIDATION_ROWS)

    @property
    def validation(self) -> corpus.Rows:
        return self.validation_domains.rows

    @cached_property
    def test(self) -> corpus.Rows:
        return self.mixed("test", self.settings.samples).rows

    def label(self, part: str) -> str:
        """What its texts are called, without where they lie: for files that leave this machine."""
        s = self.settings
        return ", ".join(spec.name for spec in self.specs) if s.data else self.name(part)

    def name(self, part: str) -> str:
        s = self.settings
        chosen = (s.test_data or s.data) if part == "test" else s.data
        return chosen if isinstance(chosen, str) else ", ".join(chosen or ["mlx-pare's own text"])
