"""recover: heal a pruned model by distilling the original into it, on mlx-lm's trainer. It goes on after a kill.

If asked, it first heals block by block (recovery/blockwise.py). Then it trains the whole model: the student's logits
are led to the teacher's, and so are its hidden states if whole layers were cut (recovery/objective.py). The teacher is
streamed once over the rows (recovery/teacher.py). If the student writes rows itself (recovery/on_policy.py), the
teacher is streamed over those before every segment. What is trained: LoRA or DoRA adapters, all weights of the blocks,
or only norms and the scales of packed matrices.
The best state by validation KL is merged, packed as the pruned model was, and measured again from the written files. If
it is not better than the pruned model, the result is the pruned model, with a warning.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from .. import lm
from ..base import console, machine
from ..base.errors import Refused, UsageError
from ..base.units import gb
from ..base.untrusted import read_json
from ..evaluation import divergence
from ..lm import distributed
from ..model import replace_tensors
from ..model.checkpoint import Checkpoint
from ..pruning.survivors import survivors
from ..sources.open_model import StrPath, opened
from ..store import step_files
from ..store.atomic import created, refuse_existing, remove, replace_file, working
from ..store.schema import dump_json
from ..stream import memory, walk as stream
from ..stream.kept import end_of
from ..text.corpus import Rows
from ..text.domains import Domains, Sampler
from . import blockwise, on_policy, teacher, topk_targets
from .objective import Objective, Taps, loss_of
from .options import GENTLE_BELOW, RATES, Options, check_memory, fitting, swift_fits
from .student import merged, prepare, resident
from .trainer import Course, Diverged, Trainer


def recover(
    student: StrPath,
    original: StrPath,
    train: Rows | Domains,
    validation: Rows | Domains,
    out: StrPath,
    options: Options,
    memory_cap: int | None = None,
    work: StrPath | None = None,
    kept: Path | None = None,
) -> dict[str, Any]:
    """Heal a pruned model by distillation and write it to ``out``.

    Args:
        student: directory of the pruned model.
        original: the teacher, any model with the student's tokenizer.
        train: token rows to train on, or several domains of them.
        validation: token rows that judge, or several domains of them.
        out: directory of the result.
        options: how to train.
        memory_cap: bytes that may be used; None: the memory that is free.
        work: directory that a killed call goes on from, removed at the end; None: OUT.work.
        kept: directory where hidden states of the original are kept (stream/kept.py); None: nowhere.
    Returns:
        A summary, as recovery.json holds it: "kl_before" and "kl_after", the mean KL divergence to the teacher on
        ``validation``, nats per token; "improved"; "kept", the candidate that became ``out``; "kl" of every candidate;
        "curve", the validations; "best_step"; what was trained how, and on what it was computed. Under mlx.launch only
        the first process measures the candidates and writes ``out``.
    Raises:
        UsageError: an option names something unknown, or the processes of mlx.launch cannot share a batch.
        Refused: ``out`` exists, the tokenizers differ, the training does not fit in memory, or ``work`` is of another
            training.
        Diverged: the validation loss is not finite any more.
    """
    student, original, out = opened(student), opened(original), Path(out)
    options.check(Checkpoint(student).arch.sizes["vocab"])
    refuse_existing(out)
    if usual := options.learning_rate is None:
        rate = RATES[options.method](Checkpoint(student).arch.sizes["hidden"])
        options = replace(options, learning_rate=rate)
    train, validation = Domains.of_one(train), Domains.of_one(validation)
    if (batch := min(options.batch, train.rows.count)) % (size := distributed.this()[1]):
        raise UsageError(f"{size} processes cannot share {batch} rows", f"give a --batch that {size} divides")
    lm.require_same_tokens(student, original)
    gentle_below = GENTLE_BELOW if usual else None  # a rate that the user gives is not changed
    course = replace(options.course, gentle_below=gentle_below)
    with nullcontext(Path(work)) if work else working(out.with_name(out.name + ".work")) as place:
        job = _Job(student, original, train, validation, options, course, place, memory_cap, kept)
        try:
            summary = job.run()
        except Diverged:  # the blocks that were healed before that are still good
            remove(place / "training" if options.local_steps else place)
            raise
        if distributed.this()[0] == 0:
            _keep_the_best(job, summary, out)
            remove(place)
    return summary


def fitted(
    student: Path,
    original: Path,
    train: Domains,
    validation: Domains,
    options: Options,
    memory_cap: int | None = None,
) -> Options:
    """Return the options with which the training fits in memory. If they are not those given, a warning says so.

    Args:
        student: directory of the pruned model.
        original: directory of the teacher.
        train: token rows to train on.
        validation: token rows that judge.
        options: how to train.
        memory_cap: bytes that may be used; None: the memory that is free.
    Returns:
        The options. Only those change that say how memory is used, and only if all of them have their defaults.
    Raises:
        Refused: the training does not fit so.
    """
    if not options.steps:
        return options
    _, places = _matched(student, original, options.objective)
    pair, matched = (Checkpoint(student), Checkpoint(original)), len(places.own) if places else 0
    found, line = fitting(*pair, train.rows, validation.rows, options, memory_cap, matched)
    if line:
        console.warn(line)
    return found


def _matched(student: Path, original: Path, objective: Objective) -> tuple[str, teacher.Places | None]:
    """How hidden states are to be matched, and where; None: nowhere, because nothing asks for it or relates them."""
    left = survivors(p) if (p := student / "survivors.json").exists() else None
    checkpoint = Checkpoint(original)
    related = left is not None and left["source_identity"] == checkpoint.identity()
    cut = related and len(left["layers"]) < len(checkpoint.arch.layers)
    how = objective.matching(cut)
    return how, teacher.places(left, checkpoint) if related and how != "none" else None


class _Job:
    """One recovery at work: what all its parts need to know."""

    def __init__(
        self,
        student: Path,
        original: Path,
        train: Domains,
        validation: Domains,
        options: Options,
        course: Course,
        work: Path,
        memory_cap: int | None,
        kept: Path | None = None,
    ):
        self.course, self.kept = course, kept
        self.student, self.original, self.train, self.validation = student, original, train, validation
        self.options, self.work, self.memory_cap = options, work, memory_cap
        self.candidates = {"pruned": student}

    def run(self) -> dict[str, Any]:
        """Train, write the candidates to the work directory, and return what the summary says about it."""
        options = self.options
        mx.random.seed(options.seed)
        places = self._places()
        if options.steps:
            sizes = Checkpoint(self.student), Checkpoint(self.original), self.train.rows, self.validation.rows
            matched = len(places.own) if places else 0
            needed = check_memory(*sizes, options, self.memory_cap, matched)
            self.swift = self._swift(*sizes, options, self.memory_cap or machine.available_bytes(), matched)
            console.say(f"recover: {options.method}, {options.objective.kind} divergence, takes about {gb(needed)}")
        memory.check_memory(Checkpoint(self.original), self.validation.rows, self.memory_cap)
        if distributed.this()[0] == 0:  # the first process validates
            self.judge = teacher.Whole(self._end_of(self.validation.rows, "teacher, validation: block"))
        found = {
            "options": asdict(options) | {"kind": options.objective.kind},
            "matched": None if places is None else {"student": places.own, "teacher": places.teacher},
            "local": self._local(),
            "computed_on": [machine.computes_on()],
        }
        return found | (
            self._trained(places) if options.steps else {"curve": [], "best_step": 0, "rate": 0.0, "domains": {}}
        )

    def _trained(self, places: teacher.Places | None) -> dict[str, Any]:
        """Train the whole model; the results become candidates."""
        options = self.options
        guide, states = self._teach(places) if options.on_policy < 1 else (None, [])
        start = self.candidates.get("local", self.student)
        model = resident(start, options.method)
        mx.random.seed(options.seed)  # the same adapters in every process, whatever was drawn so far
        prepare(model, options.method, options.rank, options.scale, options.grad_checkpoint)
        trainer = self._trainer(model, guide, states, places)
        with lm.swift() if self.swift else nullcontext():
            trainer.run()
        if trainer.best_step and trainer.rank == 0:
            both = Checkpoint(start).quantized and options.method != "norms"
            for name in ("trained", "same scales") if both else ("trained",):
                place = self.work / name.replace(" ", "-")
                shutil.rmtree(place, ignore_errors=True)  # left by a killed call
                place.mkdir()
                # what was not trained stays healed; new scales fit better, the old ones keep what moved little
                replace_tensors.write(Checkpoint(start), merged(model, trainer.best), place, name != "trained")
                self.candidates[name] = place
        rate = self.course.full_rate(trainer.curve[0]["loss"])
        about = {"best_step": trainer.best_step, "rate": rate, "domains": trainer.sampler.weights}
        about["computed_on"] = trainer.computed_on
        return {"curve": trainer.curve} | about

    def _swift(self, *asked: Any) -> bool:
        """Whether steps compute under backend.swift. This is decided once: after a kill, steps must compute alike."""
        note = self.work / "swift.json"
        if not note.exists() and distributed.this()[0] == 0:
            self.work.mkdir(parents=True, exist_ok=True)
            replace_file(note, dump_json({"swift": swift_fits(*asked)}))
        return read_json(note, "recovery")["swift"] if note.exists() else swift_fits(*asked)

    def _local(self) -> dict[str, Any] | None:
        """Heal block by block first; training starts from the result."""
        options, place, note = self.options, self.work / "local", self.work / "local.json"
        if not options.local_steps or distributed.this()[0]:  # the first process sends its weights to the others
            return None
        of = {**self.about(), "options": asdict(options.blocks)}
        if note.exists() and step_files.read(note)["of"] != of:
            raise Refused(f"{self.work} was begun with other models, rows or options", "remove it to begin again")
        if not (place.exists() and note.exists()):
            shutil.rmtree(place, ignore_errors=True)
            rows = self.train.rows, self.validation.rows
            done = blockwise.local(self.student, self.original, *rows, place, options.blocks, self.memory_cap)
            replace_file(note, dump_json({"of": of, "done": done}))
        self.candidates["local"] = place
        return step_files.read(note)["done"]

    def about(self) -> dict[str, str]:
        """The identities of models and rows: state that was saved with others is refused."""
        found = {"student": self.candidates.get("local", self.student), "teacher": self.original}
        rows = {"rows": self.train.digest(), "validation": self.validation.digest()}
        return {name: Checkpoint(path).identity() for name, path in found.items()} | rows

    def _places(self) -> teacher.Places | None:
        """Where hidden states are matched; None: nowhere.

        They are matched if it was asked for or layers were cut, and if the student's units come from this teacher."""
        self.how, places = _matched(self.student, self.original, self.options.objective)
        if self.how != "none" and places is None:
            console.warn(f"hidden states are not matched: {self.student} was not cut from {self.original}")
            self.how = "none"
        return places

    def _teach(self, places: teacher.Places | None) -> tuple[teacher.Guide, list[mx.array]]:
        """The teacher's targets for the training rows, and its hidden states at the places."""
        rows, options = self.train.rows, self.options
        watched = teacher.Watched(places.teacher, places.kept) if places else None
        if options.top is None or watched:
            matched = len(places.own) if places else 0
            held = teacher.held_bytes(Checkpoint(self.original), rows, matched, options.top is None)
            memory.check_memory(Checkpoint(self.original), rows, self.memory_cap, held, "; or --targets 64")
            if watched:
                streamed = stream.walk(self.original, rows, watched, what="teacher: block")
            else:
                streamed = self._end_of(rows, "teacher: block")
        states = [watched.states[layer] for layer in places.teacher] if watched else []
        if options.top is None:
            return teacher.Whole(streamed), states
        where = self.work / "targets"
        return (
            topk_targets.collect(
                self.original, rows, where, options.top, options.temperature, memory_cap=self.memory_cap
            ),
            states,
        )

    def _end_of(self, rows: Rows, what: str) -> stream.Streamed:
        """The end of the teacher's walk over these rows, with its hidden states in memory."""
        return end_of(self.original, rows, self.kept, self.memory_cap, what, whole=True)

    def _trainer(
        self, model: nn.Module, guide: teacher.Guide | None, states: list[mx.array], places: teacher.Places | None
    ) -> Trainer:
        options, rows = self.options, self.train.rows
        taps = Taps(model, places.own) if places else None
        sampler = Sampler(self.train.of, self.train.weights, options.batch, options.seed)

        def validate() -> dict[str, float]:
            tokens = self.validation.rows.tokens
            return by_domain(
                lambda r: lm.logits(model, mx.array(tokens[r])), self.judge, self.validation, options.batch
            )

        def batch(chosen: np.ndarray) -> tuple:
            found = (
                mx.array(rows.tokens[chosen]),
                *map(mx.array, guide.batch(chosen)),
                *(s[mx.array(chosen)] for s in states),
            )
            mx.eval(found)
            return found

        def mix(losses: dict[str, float]) -> None:
            sampler.reweight(losses, dict.fromkeys(losses, 0.0))  # the teacher's own divergence is 0 everywhere

        # only the first process has the locally healed student
        about, _ = distributed.from_first(self.about() | {"options": asdict(options), "course": asdict(self.course)})
        writer = self._writer(model, guide, states, places) if options.on_policy else None
        return Trainer(
            model,
            loss_of(options.objective, self.how, taps),
            sampler,
            writer.batch if writer else batch,
            validate,
            self.course,
            self.work / "training",
            about,
            mix if options.mix and len(self.train.names) > 1 else None,
            writer and writer.write,
        )

    def _writer(
        self, model: nn.Module, guide: teacher.Whole | None, states: list[mx.array], places: teacher.Places | None
    ) -> on_policy.Writer:
        options, rows = self.options, self.train.rows
        console.say(f"the student writes {options.on_policy:.0%} of the rows, {options.objective.kind} divergence")
        text = guide and on_policy.Lesson(rows.tokens, guide.streamed, states)
        judge = on_policy.judge_of(self.original, places)
        return on_policy.Writer(model, rows, text, judge, options.on_policy, options.batch, options.seed)

    def kl(self, path: Path) -> float:
        """Mean KL to the teacher of a model on disk, over all positions of the validation rows."""
        found = teacher.Whole(stream.walk(path, self.validation.rows, what="measure: block"))
        return by_domain(lambda r: found.batch(r)[0], self.judge, self.validation, self.options.batch)[""]


def _keep_the_best(job: _Job, summary: dict[str, Any], out: Path) -> None:
    """Copy the candidate with the smallest KL to ``out``: the pruned model if no other is better."""
    measured = {name: job.kl(path) for name, path in job.candidates.items()}
    best = min(measured, key=lambda name: measured[name])
    summary |= {"kl_before": measured["pruned"], "kl_after": measured[best], "improved": best != "pruned"}
    unmerged = min((point["loss"] for point in summary["curve"]), default=None)
    summary |= {"kept": best, "kl": measured, "kl_unmerged": unmerged}
    if best == "pruned":
        console.warn("recovery did not improve the validation KL: the pruned model is kept as it was")
    with created(out) as place:
        shutil.copytree(job.candidates[best], place)


def by_domain(
    logits: Callable[[np.ndarray], mx.array], judge: teacher.Whole, validation: Domains, batch: int
) -> dict[str, float]:
    """Measure the KL divergence to the teacher on every domain, over all positions of its rows.

    Args:
        logits: the student's logits [b, length, vocab] of row numbers int [b].
        judge: the teacher on the validation rows.
        validation: the rows and their domains.
        batch: rows at a time.
    Returns:
        The mean in nats per token: of all rows under "", and by the name of the domain if there are several.
    """
    sums = np.zeros(validation.rows.count)
    for start in range(0, len(sums), batch):
        rows = np.arange(start, min(start + batch, len(sums)))
        with lm.swift():
            sums[rows] = np.array(divergence.kl(judge.batch(rows)[0], logits(rows)).mean(axis=-1))
    found = {name: float(sums[validation.of == n].mean()) for n, name in enumerate(validation.names)}
    return {"": float(sums.mean()), **(found if len(found) > 1 else {})}
