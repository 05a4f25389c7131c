"""answers.jsonl: what models answered, so that a killed evaluation goes on and a changed check asks nobody again.

An answer is found by a hash of all that it depends on: the model, its tokenizer, the tokens of the prompt, and how it
was sampled; not the check. The answers of one batch are one line, written at once: after a kill the batches are the
same as without.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, BinaryIO

from ..base import untrusted
from ..base.errors import PareError, Refused
from ..store import locks
from ..store.schema import dump_json

FILE = "answers.jsonl"
VERSION = 1  # of the answers: if it changes, they are asked again
MOST_BYTES = 1 << 30  # of the file


def key(about: Mapping[str, Any]) -> str:
    """The name of an answer: a hash, in hexadecimal, of what it depends on."""
    return hashlib.sha256(dump_json({"version": VERSION, **about})).hexdigest()


class KeptAnswers:
    """The answers that are known: those of a directory, and those that are added, which are written to it.

    A context manager, which locks the file. Without a directory, answers are kept in memory only.
    """

    def __init__(self, directory: Path | None):
        self.file = None if directory is None else directory / FILE
        self.known: dict[str, Any] = {}
        self._opened: BinaryIO | None = None

    def __enter__(self) -> KeptAnswers:
        """Raises PareError for a damaged file, Refused if another process writes to it."""
        if self.file is not None:
            self.file.parent.mkdir(parents=True, exist_ok=True)
            self._opened = untrusted.regular(self.file, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW)
            try:
                if locks.acquire(self._opened.fileno()) is False:
                    raise Refused(f"another mlx-pare is writing {self.file}", "wait for it, or choose another --out")
                self._read(self._opened)
            except BaseException:
                self._opened.close()
                raise
        return self

    def __exit__(self, *error: object) -> None:
        if self._opened:
            self._opened.close()

    def _read(self, file: BinaryIO) -> None:
        """Read the lines. A last line without its end was cut off by a kill: it is removed."""
        raw = untrusted.contents(self.file, MOST_BYTES, "file of answers")
        whole = raw.rfind(b"\n") + 1
        for number, line in enumerate(raw[:whole].split(b"\n")[:-1], 1):
            try:
                found = untrusted.loads(line)
                if not isinstance(found, dict) or not all(isinstance(value, dict) for value in found.values()):
                    raise ValueError("it is no object of answers")
            except ValueError as error:
                raise PareError(
                    f"{self.file} line {number} is damaged: {error}", "delete the file: everything is asked again"
                ) from error
            self.known.update(found)
        file.truncate(whole)
        file.seek(whole)

    def add(self, answers: Mapping[str, Mapping[str, Any]]) -> None:
        """Add answers by key, and write them as one line."""
        self.known.update(answers)
        if self._opened:
            line = json.dumps(answers, ensure_ascii=True, allow_nan=False).encode() + b"\n"
            while line:  # unbuffered: a write may take a part only
                line = line[self._opened.write(line) :]

    def missing(self, keys: Iterable[str]) -> list[str]:
        """The keys without an answer, each once, in order."""
        return [name for name in dict.fromkeys(keys) if name not in self.known]
