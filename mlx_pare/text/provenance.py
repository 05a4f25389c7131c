"""Note the text and the tokenizer that a run was calibrated with, and compare them in every later step.

The note lies next to the statistics. A step that reads other text would silently mix two runs. Runs that were begun
before such notes existed are compared by their calibration rows alone.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from ..base.errors import Refused, shell
from ..model.checkpoint import Checkpoint
from ..store.manifest import RECIPE
from ..store.rundir import Run
from ..store.schema import SCHEMA, Strict, dump_json

FILE = "text.json"
NOT_TOKENS = {"generation_config.json"}  # comes with the tokenizer, but does not change its tokens
TEST = "the test text"

Documents = Mapping[str, Mapping[str, Sequence[str]]]  # part -> domain -> documents


class Note(Strict):
    """RUN/calibrate/text.json: hashes of the tokenizer and of the documents (by name), and in ``asked`` the settings
    that rows depend on."""

    schema_version: int = SCHEMA
    tokenizer: str
    documents: dict[str, str]
    asked: dict[str, Any]


def tokenizer_hash(model: Path) -> str:
    """Return the sha256 of a model's tokenizer files and chat template, in the order of their names."""
    digest = hashlib.sha256()
    for file in sorted(Checkpoint(model).tokenizer_files()):
        if file.name not in NOT_TOKENS:
            digest.update(f"{file.name} {hashlib.sha256(file.read_bytes()).hexdigest()}\n".encode())
    return digest.hexdigest()


def document_hashes(parts: Documents, own_test: bool) -> dict[str, str]:
    """Return the sha256 of the documents of every domain, by its number ("1", "2", ...).

    With ``own_test`` the test text has its own hash. Names of files do not count, since a file may be moved.
    """
    found: dict[str, Any] = {}
    for part, domains in parts.items():
        for number, documents in enumerate(domains.values(), 1):
            digest = found.setdefault(TEST if own_test and part == "test" else str(number), hashlib.sha256())
            digest.update(part.encode())
            for document in documents:
                digest.update(hashlib.sha256(document.encode()).digest())
    return {key: digest.hexdigest() for key, digest in found.items()}


class Read(Protocol):
    """The attributes of splits.Texts that are compared."""

    calibration: Any
    specs: Sequence[Any]
    hashes: dict[str, str]
    asked: dict[str, Any]


@dataclass(frozen=True)
class Known:
    """What is known of the text of a calibrated run.

    ``rows``: the digest of its calibration rows. ``note``: None if the run was begun before notes existed.
    """

    run: Run
    rows: str
    note: Note | None

    def check_tokenizer(self) -> None:
        """Raises Refused if the tokenizer of the run's model has changed."""
        if self.note and tokenizer_hash(self.run.model) != self.note.tokenizer:
            raise self._changed(f"the tokenizer or the chat template of {self.run.model}")

    def check(self, texts: Read, test: bool = False) -> None:
        """Raises Refused if text or tokenizer changed, naming what did; the test text counts only with ``test``."""
        self.check_tokenizer()
        if self.note:
            before, now = self.note.documents, texts.hashes
            names = {str(number): f"the text {spec.name!r}" for number, spec in enumerate(texts.specs, 1)}
            for key in sorted(before.keys() | now.keys()):
                if before.get(key) != now.get(key) and (test or key != TEST):
                    raise self._asked_otherwise(texts.asked) or self._changed(names.get(key, key))
        if texts.calibration.digest() != self.rows:
            raise self._asked_otherwise(texts.asked) or self._changed("the text")

    def _asked_otherwise(self, asked: Mapping[str, Any]) -> Refused | None:
        for key, before in (self.note.asked if self.note else {}).items():
            if asked.get(key) != before:
                return Refused(
                    f"{key} was {before!r} when {self.run.path} was calibrated, now it is {asked.get(key)!r}",
                    f"put it back (in {self.run.path / RECIPE}), or start a new run with another --out",
                )
        return None

    def _changed(self, what: str) -> Refused:
        return Refused(
            f"{what} changed since {self.run.path} was calibrated on it",
            "restore it, or start a new run with another --out",
        )


def known(run: Run) -> Known | None:
    """Return what is known of the text of a run; None if it is not calibrated.

    Raises PareError if its note is damaged, Refused if the note is missing.
    """
    record = run.manifest.steps.get("calibrate")
    if record is None:
        return None
    file = run.directory("calibrate") / FILE
    if FILE not in record.outputs:
        return Known(run, record.inputs["data"], None)
    if not file.exists():
        raise Refused(f"{file} is missing", f"delete {shell(file.parent)} to calibrate again")
    return Known(run, record.inputs["data"], _read(file))


def _read(file: Path) -> Note:
    return Note.read(file, "note on the text", f"delete {shell(file.parent)} to calibrate again")


def asked_before(run: Path) -> dict[str, Any]:
    """Return the settings in the note of a run directory; empty if there is none. Raises PareError if it is damaged."""
    file = run / "calibrate" / FILE
    return _read(file).asked if file.exists() else {}


def check(run: Run, texts: Read, test: bool = False) -> None:
    """Refuse to go on with other text or another tokenizer than a run was calibrated with.

    Args:
        run: the run; one that is not calibrated passes.
        texts: the text of now.
        test: compare the test text too.
    Raises:
        Refused: the tokenizer, a text or a setting that the rows depend on has changed, or the note is missing.
        PareError: the note is damaged.
    """
    if before := known(run):
        before.check(texts, test)


def write(directory: Path, model: Path, texts: Read) -> None:
    """Write a note next to the statistics of a model.

    Args:
        directory: directory of the statistics.
        model: model directory, for its tokenizer files.
        texts: the text that was read.
    """
    note = Note(tokenizer=tokenizer_hash(model), documents=texts.hashes, asked=texts.asked)
    (directory / FILE).write_bytes(dump_json(note))
