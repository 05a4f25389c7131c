"""The texts of a run as token rows: what it is calibrated and trained on, chosen by and judged by; all disjoint."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import Any

from .. import lm
from ..base import console
from ..base.errors import UsageError
from ..model.checkpoint import Checkpoint
from ..options.settings import Settings
from . import corpus, domains
from .provenance import document_hashes

DEMO = Path(__file__).parents[1] / "demo"
VALIDATION_ROWS = 64  # of recovery, at most: the teacher's hidden states are kept for them


class Texts:
    """The three disjoint texts of a run as token rows; read when first needed.

    ``by_hash``: text is divided by hash alone, as in runs that were begun before short texts were divided otherwise.
    """

    def __init__(self, model: Path, settings: Settings, by_hash: bool = False):
        self.model, self.settings, self.by_hash = model, settings, by_hash
        self.framing: set[str] = set()  # lines of chats that no speaker wrote

    def asking(self, settings: Settings) -> Texts:
        """The same documents, of which other rows are asked."""
        other = Texts(self.model, settings, self.by_hash)
        other.tokenizer, other.specs, other.documents = self.tokenizer, self.specs, self.documents
        other.framing = self.framing
        return other

    @cached_property
    def tokenizer(self) -> Any:
        return lm.tokenizer(self.model, self.settings.date)

    @cached_property
    def specs(self) -> list[domains.Spec]:
        return domains.parse_all(self.settings.data or DEMO / "calibration.txt")

    @cached_property
    def documents(self) -> dict[str, dict[str, list[str]]]:
        """Those of every domain, for "calibration" (also trains the recovery), "validation" (chooses its best state)
        and "test" (is reported). Raises UsageError for a token that the model does not have."""
        s = self.settings
        test = s.test_data or (None if s.data else DEMO / "test.txt")
        length = None if self.by_hash else s.length
        found = domains.read_parts(self.specs, test and Path(test), self.tokenizer, s.field, length, self.framing)
        self._require_known_tokens(found)
        return found

    def _require_known_tokens(self, parts: dict[str, dict[str, list[str]]]) -> None:
        rows = Checkpoint(self.model).arch.sizes["vocab"]
        if max(self.tokenizer.get_vocab().values(), default=0) < rows:
            return
        for documents in (documents for of in parts.values() for documents in of.values()):
            for ids in corpus.token_ids(self.tokenizer, documents):
                if ids and (most := max(ids)) >= rows:
                    token = self.tokenizer.convert_ids_to_tokens(most)
                    raise UsageError(
                        f"the text holds {token!r}, token {most}, and the embedding of {self.model} has {rows} rows",
                        "use the tokenizer that belongs to the model, or take that out of the text",
                    )

    @cached_property
    def hashes(self) -> dict[str, str]:
        """The documents as text_record notes them."""
        return document_hashes(self.documents, bool(self.settings.test_data or not self.settings.data))

    @property
    def asked(self) -> dict[str, Any]:
        """The settings that documents and calibration rows depend on."""
        s = self.settings
        weights = [spec.weight for spec in self.specs]
        return {"field": s.field, "date": s.date, "samples": s.samples, "length": s.length, "seed": s.seed,
                "weights": weights}  # fmt: skip

    def apart_from(self, run: Texts) -> None:
        """Raises PareError when these texts, read for a recovery alone, hold what the run is tested on, or when the
        best state would be chosen by what the run was calibrated on: another text may be divided otherwise."""
        own = {"training": self.documents["calibration"], "validation": self.documents["validation"]}
        framing = self.framing | run.framing
        domains.forbid_overlap(own | {"run's test": run.documents["test"]}, framing)
        calibration = {"run's calibration": run.documents["calibration"]}
        domains.forbid_overlap({"validation": own["validation"]} | calibration, framing)

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
