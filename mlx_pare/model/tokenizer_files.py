"""A model's tokenizer and chat template, kept within bounds: both are programs that came with the model.

A search for a regular expression of a tokenizer may take for ever. A chat template is Jinja, in which two lines can
fill the memory. mlx-pare tries both, and always runs templates, in a separate process with limits of time and memory.
The process limits itself, and its parent ends it too. Run as a module, this file tries a tokenizer; lm/chat_writer.py
writes chats.
"""

from __future__ import annotations

import contextlib
import datetime
import hashlib
import json
import resource
import signal
import sys
import threading
import weakref
from pathlib import Path
from subprocess import DEVNULL, PIPE, TimeoutExpired
from typing import Any

from ..base import children, untrusted
from ..base.errors import PareError
from ..base.untrusted import read_json
from .checkpoint import TOKENIZER_FILES

MAX_TOKENIZER = 64 << 20  # bytes of a tokenizer.json; the largest known (gemma) has 33 million
TOKENIZER_BUDGET = 640 << 20  # bytes of memory that reading one may take; gemma's takes 300 million
# What transformers opens to make a tokenizer, besides the files that every model has
MORE_FILES = ("config.json", "vocab.txt", "spiece.model", "sentencepiece.bpe.model", "processor_config.json")
TRY_SECONDS, TRY_BYTES = 20, 4 << 30  # of processor time and address space, to load a tokenizer and read PROBES
MOST_RESIDENT = 2 << 30  # bytes in memory of the process that loads a tokenizer or writes chats
START_SECONDS, CHAT_SECONDS = 120, 10  # until the process is ready, and until a chat is written
MAX_CHAT = 64 << 20  # bytes of a written chat
# What makes a search backtrack: runs of every sort of character, and ordinary text
RUNS = ("a", "A", "0", " ", "\n", "\t", "!", "-", "'", "é", "日", "🙂", "\u0301", "ab ", "a1", " \n")
TEXT = "It's 3,141.59 — don't\n\n\tfor (int i = 0; i < n; ++i) { naïve Größe 日本語 🙂 } The quick brown fox. "
PROBES = (*(run * (4000 // len(run)) + "\x00" for run in RUNS), TEXT * 40)


def check(directory: Path) -> None:
    """Raise PareError for tokenizer files that lead out of the directory, are too large or damaged, or take too much
    time or memory."""
    untrusted.check_links(directory)
    try:
        named = [directory / name for name in (*TOKENIZER_FILES, *MORE_FILES)]
        for file in (*named, *(directory / untrusted.MORE_TEMPLATES).glob("*.jinja")):
            if file.exists():
                limit = (
                    MAX_TOKENIZER if file.suffix == ".model" or file.name == "tokenizer.json" else untrusted.MAX_JSON
                )
                raw = untrusted.contents(file, limit, "tokenizer file")
                if file.name == "tokenizer.json":
                    _try(str(file), hashlib.sha256(raw).hexdigest())
                elif file.name in ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"):
                    untrusted.loads(raw)
    except OSError as error:
        raise PareError(f"cannot read tokenizer file {file}: {error.strerror}") from error
    except ValueError as error:
        raise PareError(f"{file} is not valid JSON: {error}", "download or copy it again") from error


_passed: set[str] = set()  # sha256 of every tokenizer.json that was tried: a run has a dozen copies of one


def _try(file: str, digest: str) -> None:
    """Raise PareError if the other process cannot use a tokenizer.json of this content. A content that passed is not
    tried again, wherever it lies."""
    if digest in _passed:
        return
    try:
        command = children.module("model.tokenizer_files", file)
        done = children.run(command, timeout=START_SECONDS, most=MOST_RESIDENT)
    except TimeoutExpired:
        done = None
    if done is None or done.returncode:
        lines = done.stderr.strip().splitlines() if done else []
        why = (
            "takes too long, or too much memory"
            if done is None or done.returncode < 0
            else (lines or ["cannot be loaded"])[-1][:300]
        )
        raise PareError(
            f"cannot load the tokenizer {file}: it {why}", "tokenizer.json must be whole, and of a sane model"
        )
    _passed.add(digest)


def has_chat_template(directory: Path) -> bool:
    """Whether a model directory has a chat template. Raises PareError for a damaged tokenizer_config.json."""
    file = directory / "tokenizer_config.json"
    settings = read_json(file, "tokenizer config") if file.is_file() else {}
    return bool(settings.get("chat_template")) or (directory / "chat_template.jinja").is_file()


class Chats:
    """Writes chats by the template of a model directory, instead of the tokenizer's own apply_chat_template.

    The first chat starts the process. ``date``: the day, YYYY-MM-DD, that templates see; None: today. Raises PareError
    if ``date`` is no date.
    """

    def __init__(self, directory: Path, date: str | None = None):
        self.directory, self._process = directory, None
        try:
            self.date = datetime.date.fromisoformat(date or datetime.date.today().isoformat()).isoformat()
        except (TypeError, ValueError) as error:
            raise PareError(f"{date!r} is no date", "write it as 2026-01-31") from error

    def __call__(
        self,
        messages: list[Any],
        tokenize: bool = False,
        tools: Any = None,
        answer: bool = False,
        today: datetime.datetime | None = None,
    ) -> str:
        """Write a chat as text.

        Args:
            messages: the messages, as apply_chat_template takes them.
            tokenize: must be False: chats are written as text.
            tools: descriptions of tools for the template; None: no tools.
            answer: whether the text ends where the model's answer begins.
            today: the time that the template sees; None: the date of these chats.
        Returns:
            The text.
        Raises:
            ValueError: the template fails, with its own message, or reaches a limit; or ``tokenize`` is set.
        """
        if tokenize:
            raise ValueError("a chat is written as text here")
        if self._process is None or self._process.poll() is not None:
            self._start()
        now = today.isoformat() if today else self.date
        question = {"messages": messages, "tools": tools, "answer": answer, "now": now}
        found = self._answer(CHAT_SECONDS, json.dumps(question).encode() + b"\n")
        if "text" not in found:
            raise ValueError(found["error"])
        return found["text"]

    def _start(self) -> None:
        command = children.module("lm.chat_writer", str(self.directory), str(CHAT_SECONDS))
        self._process = children.start(command, stdin=PIPE, stdout=PIPE, stderr=DEVNULL)
        children.bound(self._process, MOST_RESIDENT)
        weakref.finalize(self, children.end, self._process)
        self._answer(START_SECONDS)

    def _answer(self, seconds: float, question: bytes = b"") -> dict[str, Any]:
        """The next answer of the process. The process is ended if it does not answer in time or answers too much."""
        process = self._process
        timer = threading.Timer(seconds, children.kill, (process,))
        timer.start()
        try:
            process.stdin.write(question)
            process.stdin.flush()
            line = process.stdout.readline(MAX_CHAT)
            if line.endswith(b"\n"):
                return json.loads(line)
        except OSError:  # the process is gone
            pass
        finally:
            timer.cancel()
        children.end(process)
        raise ValueError(f"its template takes more than {seconds} seconds, or too much memory")


# ---- the other process ----


def limit(what: int, most: int) -> None:
    """Lower a limit of this process. macOS has no limit of memory: there the parent watches (children.bound)."""
    with contextlib.suppress(OSError, ValueError):
        resource.setrlimit(what, (most, resource.getrlimit(what)[1]))


def try_out(file: str) -> None:
    """Load a tokenizer.json and read the probes with it."""
    signal.alarm(START_SECONDS)
    limit(resource.RLIMIT_CPU, TRY_SECONDS)
    limit(resource.RLIMIT_AS, TRY_BYTES)
    from tokenizers import Tokenizer

    found = Tokenizer.from_file(file)
    for text in PROBES:
        found.decode(found.encode(text).ids)


if __name__ == "__main__":
    try_out(*sys.argv[1:])
