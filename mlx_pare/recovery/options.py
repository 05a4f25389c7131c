"""How to recover, and how much memory it takes."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from .. import lm
from ..base import machine
from ..base.errors import Refused, UsageError
from ..base.units import gb
from ..lm import cpu_math, distributed
from ..model.checkpoint import Checkpoint
from ..options import option
from ..options.option import setting
from ..options.settings import GeneralOptions, RecoveryOptions, TrainingOptions
from ..options.values import COUNT, FROM_NONE, MOST, SEED, WEIGHT, above
from ..stream import memory
from ..text.corpus import Extent, Rows
from . import on_policy, target_records, teacher, topk_targets
from .block_trainer import Options as BlockOptions
from .objective import Objective
from .student import trained_values
from .trainer import Course

# For each method, the learning rate as a function of the hidden size. One step of Adam changes a matrix's output in
# proportion to its width (Yang et al., arXiv:2203.03466). Only one factor of an adapter is that wide. An exponent in
# between suits 64, and gives the usual rate at 4096. Tried at 64 and 256 (benchmarks/LOG.md).
RATES: dict[str, Callable[[int], float]] = {
    "lora": lambda hidden: 0.02 / hidden**0.5,
    "dora": lambda hidden: 0.02 / hidden**0.5,
    "full": lambda hidden: 0.12 / hidden,
    "norms": lambda hidden: 2e-3,
}
DRAW_BYTES = 128  # of an array of row numbers, without the numbers
GENTLE_BELOW = 0.1  # nats of KL divergence at the start, below which these rates are too high (see Course)
METHODS = tuple(RATES)
SAVING = ("grad_checkpoint", "batch", "accumulate", "top")  # options that only say how memory is used
TOP = 64  # tokens kept of the teacher's predictions, to save memory
LOCAL = {"lora": "lora", "dora": "lora", "full": "full", "norms": "full"}  # how the blocks are trained before that


@dataclass(frozen=True, kw_only=True)
class Options(TrainingOptions):
    """How to recover; see settings.TrainingOptions.

    ``scale`` is that of adapters. ``learning_rate`` None: RATES decides. ``kind`` None: reverse if the student writes
    rows (as MiniLLM, arXiv:2306.08543), else forward. ``reports``: validations of a Course, which has more if rounds of
    on_policy need them. ``match_weight``: see Objective.
    """

    steps: int = setting(RecoveryOptions.recover_steps, values=FROM_NONE, called="recover_steps")
    scale: float = setting(2.0, values=above(0, MOST))
    match_weight: float = setting(1.0, values=WEIGHT)
    seed: int = setting(GeneralOptions.seed, values=SEED)
    reports: int = setting(6, values=COUNT)

    def __post_init__(self) -> None:
        option.check(self)

    @property
    def course(self) -> Course:
        rate = self.learning_rate or 0.0  # recover() puts the usual one here
        validations = max(self.reports, math.ceil(self.steps / on_policy.ROUND)) if self.on_policy else self.reports
        return Course(
            self.steps, rate, self.accumulate, self.schedule, self.clip, validations, self.patience, self.seed
        )

    @property
    def objective(self) -> Objective:
        kind = self.kind or ("reverse" if self.on_policy else "forward")
        return Objective(kind, self.temperature, self.cross_entropy, self.match, self.match_weight)

    @property
    def blocks(self) -> BlockOptions:
        """How the blocks are healed before the whole model is trained."""
        return BlockOptions(LOCAL[self.method], self.local_steps, self.batch, seed=self.seed)

    def check(self, vocab: int | None = None) -> None:
        """Raises UsageError if an option names something unknown, or if options exclude each other.

        ``vocab``: tokens of the vocabulary; None: it is not known yet."""
        if self.method not in METHODS:
            raise UsageError(f"unknown method {self.method!r}", f"choose one of {', '.join(METHODS)}")
        if vocab is not None and self.top is not None:
            target_records.check(self.top, vocab)
        on_policy.check(self.on_policy, self.top, self.cross_entropy)
        self.objective.check()
        self.course.learning_rate()


# ---- memory ----


def required_bytes(
    student: Checkpoint,
    original: Checkpoint,
    train: Rows | Extent,
    validation: Rows | Extent,
    options: Options,
    matched: int = 0,
    swift: bool = False,
) -> int:
    """Estimate the memory that training takes at most.

    It holds the student, gradients and optimizer, and the teacher's hidden states. The largest of these is added,
    because they come in turn: logits and activations of a batch; if the student writes rows, sampling or the teacher's
    walk. Adam holds two float32 numbers for each trained number. The gradient and the best state are two more,
    accumulated gradients another.

    Args:
        student: the model to train.
        original: the teacher.
        train: rows to train on, or their number and length.
        validation: rows to validate on, or their number and length.
        options: how to train.
        matched: places where the teacher's hidden states are matched.
        swift: whether the steps compute under backend.swift.
    Returns:
        Bytes.
    """
    value = 4 if options.method == "full" else memory.resident_width(student)
    arch = student.arch
    weights = sum(t.size for t in arch.tensors()) * value
    if options.method != "full" and not lm.cpu_backend():
        weights = student.nbytes()
    hidden, layers = arch.sizes["hidden"], len(arch.layers)
    heads, length = arch.largest("kv_head", "group"), train.length
    tokens = options.batch * length
    in_block = tokens * (6 * arch.largest("ffn") + 8 * hidden + 3 * heads * length) * value
    activations = in_block + layers * tokens * hidden * value if options.grad_checkpoint else in_block * layers
    if swift:
        activations = max(activations, lm.swift_kept(arch, tokens, layers))
    vocab = arch.sizes["vocab"]
    held = 4 * (train.count + validation.count) * length  # the rows themselves
    held += teacher.held_bytes(original, validation, 0)
    if options.on_policy < 1:
        held += teacher.held_bytes(original, train, matched, options.top is None)
    work = 5 * tokens * vocab * 4 + activations
    draws = options.course.segment * options.accumulate  # batches whose row numbers are drawn at once
    drawn = draws * min(options.batch, train.count)
    held += DRAW_BYTES * draws + 8 * drawn
    if options.on_policy:
        own = Extent(on_policy.written_rows(options.on_policy, drawn), length)
        held += teacher.held_bytes(original, own, matched)
        work = max(work, on_policy.work_bytes(student, original, own, options.batch * on_policy.ROWS_AT_ONCE))
    copies = 4 + (options.accumulate > 1)
    return weights + trained_values(student, options.method, options.rank) * 4 * copies + held + work


def teaching_bytes(original: Checkpoint, train: Rows | Extent, options: Options, matched: int = 0) -> int:
    """Estimate the memory that the teacher takes while it is streamed over the text. The student comes after it.

    Args:
        original: the teacher.
        train: rows to train on, or their number and length.
        options: how to train.
        matched: places where the teacher's hidden states are matched.
    Returns:
        Bytes; 0 if the student writes all rows.
    """
    if options.on_policy == 1:
        return 0
    parts = 0 if options.top is None else topk_targets.least_bytes(original, train)
    if options.top is not None and not matched:
        return parts
    held = teacher.held_bytes(original, train, matched, options.top is None)
    return max(parts, memory.required_bytes(original, train) + held)


def fitting(
    student: Checkpoint,
    original: Checkpoint,
    train: Rows | Extent,
    validation: Rows | Extent,
    options: Options,
    cap: int | None,
    matched: int = 0,
) -> tuple[Options, str]:
    """Return the options as they are if training fits in memory, else the first of ``alike`` with which it fits.

    Args:
        student: the model to train.
        original: the teacher.
        train: rows to train on, or their number and length.
        validation: rows to validate on, or their number and length.
        options: how to train.
        cap: bytes that may be used; None: the memory that is free.
        matched: places where the teacher's hidden states are matched.
    Returns:
        The options, and a line that says what was chosen and why; an empty one if nothing was.
    Raises:
        Refused: the training does not fit, nor with any of ``alike``.
    """

    def needed(o: Options) -> int:
        training = required_bytes(student, original, train, validation, o, matched)
        return max(training, teaching_bytes(original, train, o, matched))

    def possible(o: Options) -> bool:
        shared = min(o.batch, train.count) % distributed.this()[1] == 0
        return shared and (o.top is None or o.top <= original.arch.sizes["vocab"] <= target_records.HIGH)

    limit, before = cap or machine.available_bytes(), needed(options)
    if before > limit:
        for one in filter(possible, alike(options)):
            if (least := needed(one)) <= limit:
                what = f"{_exceeds(student, before, cap, limit)}: going on with {flags(one)}"
                return one, f"{what}, which takes about {gb(least)}"
    check_memory(student, original, train, validation, options, cap, matched)
    return options, ""


def _exceeds(student: Checkpoint, needed: int, cap: int | None, limit: int) -> str:
    allowed = "--memory-cap allows" if cap else "free are"
    return f"recovering {student.path} needs about {gb(needed)}, {allowed} {gb(limit)}"


def check_memory(
    student: Checkpoint,
    original: Checkpoint,
    train: Rows | Extent,
    validation: Rows | Extent,
    options: Options,
    cap: int | None,
    matched: int = 0,
) -> int:
    """Check that training fits in memory.

    Args:
        student: the model to train.
        original: the teacher.
        train: rows to train on, or their number and length.
        validation: rows to validate on, or their number and length.
        options: how to train.
        cap: bytes that may be used; None: the memory that is free.
        matched: places where the teacher's hidden states are matched.
    Returns:
        The estimate in bytes.
    Raises:
        Refused: it exceeds the cap. The error names the smallest change that would fit.
    """

    def needed(o: Options) -> int:
        return required_bytes(student, original, train, validation, o, matched)

    limit = cap or machine.available_bytes()
    if swift_fits(student, original, train, validation, options, limit, matched):
        return required_bytes(student, original, train, validation, options, matched, swift=True)
    if needed(options) <= limit:
        return needed(options)
    enough = ((text, needed(o)) for text, o in savings(options) if needed(o) <= limit)
    text, least = next(enough, ("", 0))
    cure = f"{text} would take {gb(least)}" if text else "use --recover-steps 0 or a shorter --length"
    raise Refused(_exceeds(student, needed(options), cap, limit), cure)


def swift_fits(
    student: Checkpoint,
    original: Checkpoint,
    train: Rows,
    validation: Rows,
    options: Options,
    limit: int,
    matched: int = 0,
) -> bool:
    """Tell whether training may compute under backend.swift, which keeps more memory.

    It may on the CPU backend up to MOST_KEPT bytes, but not with --grad-checkpoint, which would not keep less then.

    Args:
        student: the model to train.
        original: the teacher.
        train: rows to train on, or their number and length.
        validation: rows to validate on, or their number and length.
        options: how to train.
        limit: bytes that may be used.
        matched: places where the teacher's hidden states are matched.
    Returns:
        Whether it may.
    """
    kept = lm.swift_kept(student.arch, options.batch * train.length, len(student.arch.layers))
    if not lm.cpu_backend() or options.grad_checkpoint or kept > cpu_math.MOST_KEPT:
        return False
    return required_bytes(student, original, train, validation, options, matched, swift=True) <= limit


def savings(options: Options) -> Iterator[tuple[str, Options]]:
    """Ways to take less memory, each with the ones before it: (text for the command line, options).

    A step still trains on at least as many rows."""
    given: dict[str, str] = {}

    def less(flag: str, value: str = "", **change: Any) -> tuple[str, Options]:
        nonlocal options
        given[flag], options = value, replace(options, **change)
        return " ".join(f"--{name} {value}".strip() for name, value in given.items()), options

    if not options.grad_checkpoint:
        yield less("grad-checkpoint", grad_checkpoint=True)
    while options.batch > 1:
        batch = (options.batch + 1) // 2
        accumulate = math.ceil(options.accumulate * options.batch / batch)
        given["accumulate"] = str(accumulate)
        yield less("batch", str(batch), batch=batch, accumulate=accumulate)
    if options.on_policy:
        yield less("on-policy", "0", on_policy=0.0)
    if options.top is None:
        yield less("targets", str(TOP), top=TOP)
    if options.method != "lora":
        yield less("method", "lora", method="lora")


def alike(options: Options) -> Iterator[Options]:
    """Ways to take less memory that train the same rows by the same method, the best first.

    Whoever gave one of SAVING has decided how memory is used: then there are none. A value that equals its default
    counts as not given, because recipes name every option."""
    usual = Options()
    if any(getattr(options, name) != getattr(usual, name) for name in SAVING):
        return
    rows = options.batch * options.accumulate
    batches = [b for b in range(options.batch, 0, -1) if rows % b == 0]
    if options.local_steps:  # blocks are healed with this batch too, and accumulate nothing
        batches = batches[:1]
    for top in (None,) if options.on_policy else (None, TOP):  # the whole vocabulary as long as possible
        if top is not None:
            yield replace(options, top=top)
        for batch in batches:
            yield replace(options, grad_checkpoint=True, batch=batch, accumulate=rows // batch, top=top)


def as_begun(options: Options, begun: Mapping[str, Any]) -> Options:
    """Take over what an earlier call chose, as it noted it. Other options stay, and may be refused as a change."""
    before = {name: begun.get(name) for name in SAVING}
    return next((o for o in alike(options) if all(getattr(o, name) == before[name] for name in SAVING)), options)


def flags(options: Options) -> str:
    """What SAVING is, as the command line gives it, without defaults."""
    usual, found = Options(), []
    if options.grad_checkpoint:
        found.append("--grad-checkpoint")
    found += [f"--{n} {value}" for n in ("accumulate", "batch") if (value := getattr(options, n)) != getattr(usual, n)]
    return " ".join(found + ([] if options.top is None else [f"--targets {options.top}"]))
