"""Ask a model the tasks: write the prompts, answer them in batches, measure options and given answers."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from .. import lm
from ..base import console
from ..base.errors import PareError, UsageError
from ..capacity.planner import longest
from ..model.checkpoint import Checkpoint
from ..model.hub_name import called
from ..text.provenance import tokenizer_hash
from .kept_answers import KeptAnswers, key
from .records import Task

AT_ONCE = 16  # prompts that are answered together
TOKENS_AT_ONCE = 16_384  # of prompts and answers of a batch, whose caches are in memory together


@dataclass(frozen=True)
class Way:
    """How models are asked. ``raw``: prompts are not written as chats. ``temperature`` 0: the likeliest token."""

    raw: bool = False
    temperature: float = 0.0
    seed: int = 0


@dataclass(frozen=True)
class Asked:
    """A task as one model reads it: token ids.

    ``endings``: the options of a choice, then the given answer if there is one. ``written`` and ``measured``: the keys
    of what is kept; "" if nothing is written, or nothing measured.
    """

    task: Task
    prompt: tuple[int, ...]
    endings: tuple[tuple[int, ...], ...] = ()
    contexts: tuple[int, ...] = ()  # tokens of the prompt before each ending
    written: str = ""
    measured: str = ""


class Reader:
    """Writes prompts as one model reads them."""

    def __init__(self, model: Path, way: Way):
        """Raises PareError for a model without a sound tokenizer."""
        self.model, self.way, self.tok = model, way, lm.tokenizer(model)
        self.checkpoint = Checkpoint(model)
        self.longest = longest(self.checkpoint.arch)
        self.identity = {"model": self.checkpoint.identity(), "tokenizer": tokenizer_hash(model)}

    def text(self, task: Task) -> tuple[str, bool]:
        """Return the text that the model continues, and whether the chat template wrote it.

        ``messages`` always are a chat. ``prompt`` is the message of a user if the tokenizer has a chat template, unless
        ``raw``. Raises PareError, with the place of the record, for a chat that the template cannot write.
        """
        if not task.messages and (self.way.raw or not self.tok.has_chat_template):
            return task.prompt, False
        if not self.tok.has_chat_template:
            raise PareError(
                f"{task.where} is a chat, and {called(self.model)} has no chat template", 'write "prompt" instead'
            )
        messages = list(task.messages) or [{"role": "user", "content": task.prompt}]
        try:
            return self.tok.apply_chat_template(messages, answer=True), True
        except ValueError as error:
            raise PareError(f"{task.where}: the chat template of {called(self.model)} fails: {error}") from error

    def ids(self, text: str, chat: bool) -> tuple[int, ...]:
        """The tokens of a text; a chat has its special tokens already."""
        return tuple(self.tok.encode(text, add_special_tokens=not chat))

    def count(self, prompt: str) -> int:
        """The number of tokens of a prompt, with what a chat template adds."""
        return len(self.ids(*self.text(Task("", "", prompt))))

    def asked(self, task: Task) -> Asked:
        """Return a task as token ids. Raises PareError or UsageError, with its place, if the model cannot read it."""
        text, chat = self.text(task)
        prompt = self.ids(text, chat)
        if not prompt:
            raise UsageError(f"{task.where}: the tokenizer makes no token of the prompt", "write a longer one")
        ends = [*task.options, *([task.answer] if task.answer else [])]
        pairs = [self._ending(text, chat, prompt, end, task.where) for end in ends]
        contexts, endings = tuple(n for n, _ in pairs), tuple(ids for _, ids in pairs)
        most = max([len(prompt) + task.max_tokens * task.writes, *(n + len(ids) for n, ids in pairs)])
        if most > self.longest:
            raise UsageError(
                f"{task.where} takes {most} tokens with its answer, and {called(self.model)} was made for "
                f"{self.longest}",
                "shorten it, or give a smaller max_tokens",
            )
        made: dict[str, Any] = {"prompt": prompt, **self.identity}
        sampled = {"temperature": self.way.temperature, "seed": self.way.seed if self.way.temperature else 0}
        written = key({**made, "stop": task.stop, "most": task.max_tokens, **sampled}) if task.writes else ""
        return Asked(task, prompt, endings, contexts, written, key({**made, "endings": pairs}) if endings else "")

    def _ending(
        self, text: str, chat: bool, prompt: tuple[int, ...], ending: str, where: str
    ) -> tuple[int, tuple[int, ...]]:
        """How many tokens of the prompt stay before an ending, and the tokens of the ending.

        Both are read as one text, because a tokenizer may join what is at the seam. After a raw prompt, a space stands
        between them if neither has one there.
        """
        apart = not chat and not text[-1:].isspace() and not ending[:1].isspace()
        whole = self.ids(text + (" " if apart else "") + ending, chat)
        differ = (n for n, (a, b) in enumerate(zip(prompt, whole, strict=False)) if a != b)
        same = next(differ, min(len(prompt), len(whole)))
        if not same or same == len(whole):
            raise UsageError(f"{where}: the tokenizer makes no token of {ending[:60]!r} after the prompt", "change it")
        return same, whole[same:]


def batches(asked: Sequence[Asked]) -> list[list[Asked]]:
    """Divide what models write into batches of prompts of like length. They depend on nothing but the tasks."""
    found: list[list[Asked]] = []
    for one in sorted((one for one in asked if one.written), key=lambda one: len(one.prompt)):
        size = len(one.prompt) + one.task.max_tokens
        if found and len(found[-1]) < AT_ONCE and (len(found[-1]) + 1) * size <= TOKENS_AT_ONCE:
            found[-1].append(one)
        else:
            found.append([one])
    return found


def work(one: Asked) -> int:
    """The tokens that a task costs: those read, and those written at most."""
    return len(one.prompt) * bool(one.written or one.measured) + one.task.max_tokens * bool(one.written)


def pending(asked: Sequence[Asked], kept: KeptAnswers) -> list[Asked]:
    """The tasks of which something is not kept yet."""
    keys = set(kept.missing(key for one in asked for key in (one.written, one.measured) if key))
    return [one for one in asked if keys & {one.written, one.measured}]


def ask(reader: Reader, asked: Sequence[Asked], kept: KeptAnswers) -> None:
    """Have a model answer all tasks of which nothing is kept. The model is in memory meanwhile.

    Args:
        reader: of the model.
        asked: the tasks, as ``reader`` made them.
        kept: what is known; new answers are added.
    Raises:
        PareError: mlx-lm cannot load the model, or it answers NaN.
    """
    left = pending(asked, kept)
    if not left:
        return
    model = lm.load_to_answer(reader.model)
    with console.progress(f"{called(reader.model)} answers: tokens", sum(map(work, asked))) as bar, lm.swift():
        bar.skip(sum(map(work, asked)) - sum(map(work, left)))
        for batch in batches(asked):
            _write(model, reader, batch, kept, bar.advance)
        for one in asked:
            if one.measured and kept.missing([one.measured]):
                kept.add({one.measured: _measured(model, reader, one)})
                bar.advance(0 if one.written else work(one))
    del model
    mx.clear_cache()


def _write(model: Any, reader: Reader, batch: list[Asked], kept: KeptAnswers, advance: Callable[[int], None]) -> None:
    """Answer the prompts of a batch that have no answer yet, each once."""
    wanted = kept.missing(one.written for one in batch)
    first = {one.written: one for one in reversed(batch)}
    questions = [
        lm.Question(
            first[name].prompt, first[name].task.max_tokens, first[name].task.stop, _seed(reader.way.seed, name)
        )
        for name in wanted
    ]
    found: dict[str, dict[str, Any]] = {}
    for number, text, finished in lm.answers(model, reader.tok, questions, reader.way.temperature):
        found[wanted[number]] = {"text": _spoken(reader.tok, text), "finished": finished}
        advance(sum(work(one) for one in batch if one.written == wanted[number]))
    if found:
        kept.add({name: found[name] for name in wanted})


def _seed(seed: int, name: str) -> int:
    """The seed of one question: another one for every question, whichever are asked together."""
    return int(hashlib.sha256(f"{seed} {name}".encode()).hexdigest()[:8], 16)


def _spoken(tok: Any, text: str) -> str:
    """An answer without the thoughts of a model that thinks before it."""
    end = tok.think_end if tok.has_thinking else None
    return text.rpartition(end)[2] if end else text


def _measured(model: Any, reader: Reader, one: Asked) -> dict[str, Any]:
    """The surprisals of the endings of a task, in nats per token. Raises PareError for NaN."""
    found: list[list[float] | None] = [None] * len(one.endings)
    known = reader.checkpoint.arch.cuttable
    for count in sorted(set(one.contexts)):  # endings that leave equally much of the prompt share its cache
        some = [number for number, n in enumerate(one.contexts) if n == count]
        values = lm.surprisals(model, one.prompt[:count], [one.endings[n] for n in some], known)
        for number, nats in zip(some, values, strict=True):
            if not np.isfinite(nats).all():
                raise PareError(f"{reader.model} answers NaN or infinity", "the model is broken: do not use it")
            found[number] = [float(value) for value in nats]
    return {"nats": found}


def chosen(one: Asked, kept: KeptAnswers) -> str:
    """The option with the largest probability per byte: exp(-nats / bytes). Ties go to the first.

    Longer texts are less probable; lm-evaluation-harness divides by the same in its acc_norm.
    """
    options = one.task.options
    nats = kept.known[one.measured]["nats"][: len(options)]
    costs = [math.fsum(values) / len(option.encode()) for values, option in zip(nats, options, strict=True)]
    return options[costs.index(min(costs))]
