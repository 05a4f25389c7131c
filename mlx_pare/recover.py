"""recover: heal a pruned model by distilling the original's logits into it, on mlx-lm's trainer.

Full-vocabulary KL; LoRA or all weights of the blocks. The teacher is streamed once over the training rows and only its
final hidden states and its head stay: the logits made from them are exact, and teacher and student never share the
memory. The best state by validation KL is kept, merged, packed as the pruned model was, and measured again from what
was written: when that is not better than the pruned model, the pruned model is returned and the result says so.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten, tree_unflatten

from . import console, lm, machine, stream
from .checkpoint import Checkpoint
from .corpus import Rows
from .divergence import kl
from .errors import PareError, Refused, UsageError
from .rewrite import write as _write
from .shards import finish, partial_directory
from .stream import Streamed

METHODS = ("lora", "full")


@dataclass(frozen=True)
class Options:
    """``rank`` and ``scale`` are LoRA's; ``learning_rate`` None: 1e-3 for lora, 5e-4 for full; ``batch`` in rows."""

    method: str = "lora"
    steps: int = 100
    batch: int = 4
    learning_rate: float | None = None
    rank: int = 16
    scale: float = 2.0
    seed: int = 0
    reports: int = 6

    @property
    def rate(self) -> float:
        return {"lora": 1e-3, "full": 5e-4}[self.method] if self.learning_rate is None else self.learning_rate


def recover(
    student: Path,
    teacher: Path,
    train: Rows,
    validation: Rows,
    out: Path,
    options: Options,
    memory_cap: int | None = None,
) -> dict[str, Any]:
    """Write the healed model to ``out``; returns validation KL before and after, the curve, whether it helped.

    Raises UsageError for an unknown method, Refused when ``out`` exists or the training does not fit in memory.
    """
    if options.method not in METHODS:
        raise UsageError(f"unknown method {options.method!r}", f"choose one of {', '.join(METHODS)}")
    if out.exists():
        raise Refused(f"{out} exists already", "choose another place or remove it")
    checkpoint = Checkpoint(student)
    check_memory(checkpoint, (train, validation), options, memory_cap)
    mx.random.seed(options.seed)
    for rows in (train, validation):
        stream.check_memory(Checkpoint(teacher), rows, memory_cap)
    guides = [stream.walk(teacher, rows, what="teacher: block") for rows in (train, validation)]
    trial = _Training(_resident(student, options.method), train, validation, *guides, options)
    curve = trial.run()
    best = trial.best_step
    summary = {
        "options": asdict(options),
        "kl_before": curve[0][1],
        "curve": curve,
        "best_step": best,
        "improved": False,
    }
    if best > 0:
        partial = partial_directory(out)
        _write(checkpoint, trial.merged(), partial)
        before, after = (
            _mean_kl(_resident(p, "full"), validation, guides[1], options.batch) for p in (student, partial)
        )
        summary |= {"kl_before": before, "kl_after": after, "improved": after < before}
        if summary["improved"]:
            finish(partial, out)
            return summary
        shutil.rmtree(partial)
    console.warn("recovery did not improve the validation KL: the pruned model is kept as it was")
    partial = partial_directory(out)
    shutil.copytree(student, partial, dirs_exist_ok=True)
    finish(partial, out)
    return summary | {"kl_after": curve[0][1]}


def _resident(path: Path, method: str) -> nn.Module:
    """A model to train, in memory. float32 where all weights move (half precision would lose Adam's small steps) and on
    the CPU backend; under LoRA elsewhere as stored."""
    model = lm.load(path)
    if lm.cpu_backend() or method == "full":
        model = lm.dequantized(model, mx.float32)
    mx.eval(model.parameters())
    return model


def required_bytes(student: Checkpoint, rows: Sequence[Rows], options: Options) -> int:
    """Student + optimizer + teacher's hidden states + logits and activations of one batch (an estimate)."""
    value = 4 if lm.cpu_backend() or options.method == "full" else 2
    arch = student.arch
    size = sum(t.size for t in arch.tensors())
    trained = size if options.method == "full" else 0
    heads = arch.largest("kv_head", "group")
    length = rows[0].length
    tokens = options.batch * length
    hidden = sum(3 * r.count * r.length for r in rows) * arch.sizes["hidden"] * 4
    per_layer = tokens * (6 * arch.largest("ffn") + 8 * arch.sizes["hidden"] + 3 * heads * length) * value
    logits = 5 * tokens * arch.sizes["vocab"] * 4
    return size * value + trained * 3 * 4 + hidden + logits + per_layer * len(arch.layers)


def check_memory(student: Checkpoint, rows: Sequence[Rows], options: Options, cap: int | None) -> int:
    """The estimate, when it stays under the cap (default: what is free). Raises Refused otherwise."""
    needed, limit = required_bytes(student, rows, options), cap or machine.available_bytes()
    if needed > limit:
        raise Refused(
            f"recovering {student.path} needs about {console.gb(needed)}, "
            f"{'--memory-cap allows' if cap else 'free are'} {console.gb(limit)}",
            "use --recover-steps 0 or a shorter --length",
        )
    return needed


class _Training:
    """One run of the trainer: batches with the teacher's logits, validation, the best state."""

    def __init__(
        self, model: nn.Module, train: Rows, validation: Rows, teacher: Streamed, judge: Streamed, options: Options
    ):
        self.model, self.train, self.teacher, self.options = model, train, teacher, options
        self.validation, self.judge = validation, judge
        self.model.freeze()
        if options.method == "lora":
            lm.add_lora(model, options.rank, options.scale)
        else:
            for block in lm.blocks(model):
                block.unfreeze()
        self.curve: list[tuple[int, float]] = []
        self.best_step, self.best = 0, dict(tree_flatten(model.trainable_parameters()))

    def run(self) -> list[tuple[int, float]]:
        import mlx.optimizers as optim

        steps, options = self.options.steps, self.options
        warm = max(1, steps // 20)
        schedule = optim.join_schedules(
            [
                optim.linear_schedule(options.rate / warm, options.rate, warm),
                optim.cosine_decay(options.rate, max(1, steps - warm), options.rate / 20),
            ],
            [warm],
        )
        optimizer = optim.AdamW(learning_rate=schedule, weight_decay=0.0)
        self.validate(0)
        every = max(1, math.ceil(steps / options.reports))
        with console.progress("recover: step", steps) as bar:
            self._bar, self._every = bar, every
            lm.train(self.model, optimizer, _loss, self._batches, self.validate, steps, every, self._report)
        return self.curve

    def _batches(self) -> Iterator[tuple]:
        """Endless shuffled batches (tokens, teacher logits); the same for the same seed."""
        order = np.random.RandomState(self.options.seed)
        count, batch = self.train.count, min(self.options.batch, self.train.count)
        while True:
            shuffled = order.permutation(count)
            for start in range(0, count - batch + 1, batch):
                chosen = shuffled[start : start + batch]
                logits = self.teacher.all_logits(mx.array(chosen))
                mx.eval(logits)
                yield mx.array(self.train.tokens[chosen]), logits

    def validate(self, step: int) -> None:
        self.model.eval()
        value = _mean_kl(self.model, self.validation, self.judge, self.options.batch)
        self.model.train()
        if not math.isfinite(value):
            raise PareError(
                f"training diverged at step {step} (validation KL {value})", "use a smaller --learning-rate"
            )
        if self.curve and value < min(v for _, v in self.curve):
            self.best_step, self.best = step, dict(tree_flatten(self.model.trainable_parameters()))
        self.curve.append((step, value))

    def _report(self, info: dict) -> None:
        self._bar.advance(
            info["iteration"] - self._bar.done,
            f"loss {info['train_loss']:.4f}, {info['tokens_per_second']:.0f} tok/s, validation KL "
            f"{self.curve[-1][1]:.4f}",
        )

    def merged(self) -> dict[str, mx.array]:
        """The best state as dense weights by name: only what training changed."""
        self.model.update(tree_unflatten(list(self.best.items())))
        changed = {name.replace(".lora_a", ".weight") for name in self.best if not name.endswith(".lora_b")}
        model = lm.merge_lora(self.model)
        return {name: array for name, array in tree_flatten(model.parameters()) if name in changed}


def _loss(model: nn.Module, tokens: mx.array, teacher_logits: mx.array) -> tuple[mx.array, mx.array]:
    per_token = kl(teacher_logits, model(tokens))
    return per_token.mean(), mx.array(per_token.size)


def _mean_kl(model: nn.Module, rows: Rows, teacher: Streamed, batch: int) -> float:
    """Mean KL to the teacher over all positions of full rows, nats per token."""
    total = 0.0
    for start in range(0, rows.count, batch):
        part = slice(start, start + batch)
        total += kl(teacher.all_logits(part), model(mx.array(rows.tokens[part]))).sum().item()
    return total / (rows.count * rows.length)
