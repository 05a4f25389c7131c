"""The disjoint texts of a run as token rows: for calibration and training, for choosing a state, and for the test."""

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
VALIDATION_ROWS = 64  # at most, in recovery: the teacher's hidden states are kept for them


class Texts:
    """The three disjoint texts of a run as token rows, read when first needed.

    ``by_hash``: text is divided by hash alone, as in runs from before short texts were divided by size.
    """

    def __init__(self, model: Path, settings: Settings, by_hash: bool = False):
        self.model, self.settings, self.by_hash = model, settings, by_hash
        self.framing: set[str] = set()  # lines of chats that no speaker wrote

    def asking(self, settings: Settings) -> Texts:
        """Return the same documents with other settings for their rows."""
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
        """Read part -> domain -> documents.

        The parts are "calibration" (also trains the recovery), "validation" (chooses its best state) and "test" (is
        reported). Raises UsageError if the text holds a token that the model does not have.
        """
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
        """Hashes of the documents as provenance notes them."""
        return document_hashes(self.documents, bool(self.settings.test_data or not self.settings.data))

    @property
    def asked(self) -> dict[str, Any]:
        """Settings that documents and calibration rows depend on."""
        s = self.settings
        weights = [spec.weight for spec in self.specs]
        return {"field": s.field, "date": s.date, "samples": s.samples, "length": s.length, "seed": s.seed,
                "weights": weights}  # fmt: skip

    def apart_from(self, run: Texts) -> None:
        """Raises PareError if these texts, read for a recovery alone, overlap with those of the run.

        Training and validation must not hold the run's test text, nor validation its calibration text: another text
        may be divided differently.
        """
        own = {"training": self.documents["calibration"], "validation": self.documents["validation"]}
        framing = self.framing | run.framing
        domains.forbid_overlap(own | {"run's test": run.documents["test"]}, framing)
        calibration = {"run's calibration": run.documents["calibration"]}
        domains.forbid_overlap({"validation": own["validation"]} | calibration, framing)

    def mixed(self, part: str, count: int | None, seed: int | None = None) -> domains.Domains:
        """Mix rows of every domain of a part.

        Args:
            part: "calibration", "validation" or "test".
            count: number of rows; None: all.
            seed: of a choice by lot within each domain; None: the first rows of each.
        Returns:
            Rows int32 [at most count, settings.length] with their domains.
        Raises:
            PareError: a text cannot be read, a domain has not one row, or there are more domains than ``count``.
        """
        weights = {spec.name: spec.weight for spec in self.specs}
        documents, length = self.documents[part], self.settings.length
        return domains.windows(self.tokenizer, part, documents, weights, length, count, seed)

    @cached_property
    def calibration(self) -> corpus.Rows:
        """Rows of the calibration text, chosen by lot.

        Returns:
            int32 [at most settings.samples, settings.length]; the console says if there are fewer than asked for.
        """
        rows = self.mixed("calibration", self.settings.samples, self.settings.seed).rows
        if rows.count < self.settings.samples:
            console.say(
                f"calibration text holds {rows.count} rows of {rows.length} tokens, {self.settings.samples} "
                f"were asked: all are used"
            )
        return rows

    @cached_property
    def training_domains(self) -> domains.Domains:
        """Rows that recovery trains on: more of the calibration text than the statistics need."""
        return self.mixed("calibration", self.settings.train_rows, self.settings.seed)

    @cached_property
    def validation_domains(self) -> domains.Domains:
        return self.mixed("validation", VALIDATION_ROWS)

    @property
    def validation(self) -> corpus.Rows:
        """Rows that choose the best state of recovery.

        Returns:
            int32 [at most VALIDATION_ROWS, settings.length].
        """
        return self.validation_domains.rows

    @cached_property
    def test(self) -> corpus.Rows:
        """First rows of the test text, which results are reported on.

        Returns:
            int32 [at most settings.samples, settings.length].
        """
        return self.mixed("test", self.settings.samples).rows

    def label(self, part: str) -> str:
        """Name the texts of a part without their paths: for files that leave this machine."""
        s = self.settings
        return ", ".join(spec.name for spec in self.specs) if s.data else self.name(part)

    def name(self, part: str) -> str:
        s = self.settings
        chosen = (s.test_data or s.data) if part == "test" else s.data
        return chosen if isinstance(chosen, str) else ", ".join(chosen or ["mlx-pare's own text"])
