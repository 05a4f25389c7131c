"""training: a model in memory trains on mlx-lm's trainer in segments, with everything that matters on disk.

Between two segments the model is validated, the best state is kept apart, and weights, optimizer and the place in the
data are saved (random numbers begin again with every segment). After a kill at any moment, the same call goes on from
there: on the CPU to the same bytes, on a GPU to the same up to rounding. mlx-lm's trainer has none of that, and no
clipping: it is called for one segment at a time. Under mlx.launch every process draws the same batches and takes its
share of their rows; mlx-lm averages the gradients. Only the first process writes, and it sends its saved state to the
others.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
from mlx.utils import tree_flatten, tree_unflatten

from .. import lm
from ..base import console, machine
from ..base.errors import PareError, Refused, UsageError
from ..base.units import gb
from ..lm import distributed
from ..store.arrays import Arrays
from ..text.domains import Sampler

SCHEDULES = ("cosine", "linear", "constant")
WARMUP, LAST_RATE = 0.05, 0.05  # share of the steps until the full rate; share of the rate at the end


@dataclass(frozen=True)
class Course:
    """How to train.

    ``steps`` of the optimizer, each over ``accumulate`` batches. ``rate``: after the warm-up, falling by ``schedule``.
    ``clip``: largest norm of the gradient (0: it is not clipped). ``validations``: how many at most, besides that
    before the first step. ``patience``: training ends early after this many in a row without an improvement (0: never).

    A model that starts at a loss below ``gentle_below`` is trained at the rate times sqrt(loss / gentle_below). Adam
    moves every weight by about the rate, however small its gradient. The cost of moving weights at random grows with
    the square of the distance."""

    steps: int
    rate: float
    accumulate: int = 1
    schedule: str = "cosine"
    clip: float = 1.0
    validations: int = 6
    patience: int = 0
    seed: int = 0
    gentle_below: float | None = None

    @property
    def segment(self) -> int:
        """Steps between two validations."""
        return max(1, math.ceil(self.steps / self.validations))

    def full_rate(self, begun: float) -> float:
        """The rate after the warm-up of a training that begins at the loss ``begun``."""
        return self.rate * min(1.0, math.sqrt(begun / self.gentle_below)) if self.gentle_below else self.rate

    def learning_rate(self, begun: float = math.inf) -> Callable[[mx.array], mx.array]:
        """Make the schedule of the learning rate.

        Args:
            begun: the loss that the training begins at.
        Returns:
            A function from the step, a scalar array, to its rate, a scalar array.
        Raises:
            UsageError: the schedule is unknown.
        """
        if self.schedule not in SCHEDULES:
            raise UsageError(f"unknown schedule {self.schedule!r}", f"choose one of {', '.join(SCHEDULES)}")
        rate, warm = self.full_rate(begun), max(1, round(self.steps * WARMUP))
        rest = max(1, self.steps - warm)
        falling = {
            "cosine": optim.cosine_decay(rate, rest, rate * LAST_RATE),
            "linear": optim.linear_schedule(rate, rate * LAST_RATE, rest),
            "constant": lambda step: mx.array(rate),
        }[self.schedule]
        return optim.join_schedules([optim.linear_schedule(rate / warm, rate, warm), falling], [warm])


class Diverged(PareError):
    """The validation loss is not finite any more: the saved state is of no use."""


class ClippedAdamW(optim.AdamW):
    """AdamW without weight decay that first clips the gradients to a global norm.

    mlx-lm's trainer averages them over batches and machines before it calls ``update``. The bias of the moments is
    corrected, which MLX does not do by default: otherwise the rate would really be three to six times the given one in
    the first hundreds of steps.
    """

    def __init__(self, learning_rate: Any, clip: float):
        super().__init__(learning_rate=learning_rate, weight_decay=0.0, bias_correction=True)
        self.clip = clip

    def update(self, model: nn.Module, gradients: dict) -> None:
        if self.clip:
            gradients, _ = optim.clip_grad_norm(gradients, self.clip)
        super().update(model, gradients)


class Trainer:
    """One training; ``directory`` holds its state.

    ``batch(rows)`` gives what ``loss(model, *batch)`` takes (see lm/training.py) for row numbers int [b].
    ``validate()`` gives the loss by domain, and under "" the mean, which decides. ``about`` describes the model and the
    data: a state of another training is refused.
    """

    def __init__(
        self,
        model: nn.Module,
        loss: Callable,
        sampler: Sampler,
        batch: Callable[[np.ndarray], tuple],
        validate: Callable[[], dict[str, float]],
        course: Course,
        directory: Path,
        about: dict[str, Any] | None = None,
        after: Callable[[dict[str, float]], None] | None = None,
        before: Callable[[np.ndarray, int], np.ndarray] | None = None,
    ):
        self.model, self.loss, self.sampler, self.batch = model, loss, sampler, batch
        self.validate, self.course, self.directory, self.about = validate, course, directory, about or {}
        self.after = after  # called with every validation, e.g. to mix the domains again
        self.before = before  # may replace the row numbers [batches, b] that a segment draws; given its first step
        self.step, self.curve = 0, []
        self.best_step, self.best = 0, self.weights()
        self.rank, self.ranks = distributed.this()
        self.computed_on = [machine.computes_on()]

    def weights(self) -> dict[str, mx.array]:
        """Give the parameters that are trained.

        Returns:
            Arrays by name.
        """
        return dict(tree_flatten(self.model.trainable_parameters()))

    def run(self) -> None:
        """Train to the end, or until patience ends; the model is then in its best state.

        Raises Diverged if the validation loss is not finite, and Refused if the directory holds the state of another
        training.
        """
        course = self.course
        mx.eval(self.model.parameters())  # or the first validation would pay for it, and the others are estimated by it
        begun = time.monotonic()
        if not self._resume():
            self._validated()
            self._begin()
            self._save()
        with console.progress("recover: step", course.steps) as bar:
            bar.skip(self.step)
            self._tell(bar, 0.0, time.monotonic() - begun)
            while self.step < course.steps and not self._exhausted():
                now = min(course.segment, course.steps - self.step)
                self._segment(now, bar)
                self.step += now
                begun = time.monotonic()
                self._validated()
                if self.after:
                    self.after(self.curve[-1]["losses"])
                self._save()
                self._tell(bar, time.monotonic() - begun, time.monotonic() - begun)
        self.model.update(tree_unflatten(list(self.best.items())))

    def _begin(self) -> None:
        """Make the optimizer. Its rate depends on the loss that the training begins at."""
        rates = self.course.learning_rate(self.curve[0]["loss"])
        self.optimizer = ClippedAdamW(rates, self.course.clip)

    def _tell(self, bar: console.Progress, spent: float, each: float) -> None:
        """Add the validations that are left to the progress display."""
        bar.aside(spent, each * math.ceil((self.course.steps - self.step) / self.course.segment))

    def _segment(self, steps: int, bar: console.Progress) -> None:
        start, every = bar.done, max(1, steps // 5)
        mx.random.seed(1_000_003 * self.course.seed + self.step)  # it follows from the step, so it need not be saved

        def report(info: dict) -> None:
            done = start + info["iteration"] // self.course.accumulate
            self.train_loss = info["train_loss"]
            note = f"loss {info['train_loss']:.4f}, {info['tokens_per_second']:.0f} tok/s, "
            note += f"{gb(info['peak_memory'] * 1e9)}, validation {self.curve[-1]['loss']:.4f}"
            bar.advance(done - bar.done, note)

        drawn = np.stack([self.sampler.draw() for _ in range(steps * self.course.accumulate)])
        if self.before:
            bar.advance(0, "the student writes, the teacher reads")
            drawn = self.before(drawn, self.step)

        def batches() -> Iterator[tuple]:
            return (self.batch(rows[self.rank :: self.ranks]) for rows in drawn)

        with distributed.together():
            lm.train(self.model, self.optimizer, self.loss, batches, steps, self.course.accumulate, every, report)
        bar.advance(start + steps - bar.done)

    def _validated(self) -> None:
        self.model.eval()
        losses, _ = distributed.from_first(self.validate() if self.rank == 0 else {})  # all must go on or stop together
        self.model.train()
        value = losses[""]
        if not math.isfinite(value):
            raise Diverged(
                f"training diverged at step {self.step} (validation loss {value})", "use a smaller --learning-rate"
            )
        if self.curve and value < min(point["loss"] for point in self.curve):
            self.best_step, self.best = self.step, self.weights()
            self._write(self._best_file(), self.best, {})
        point = {"step": self.step, "loss": value, "losses": {k: v for k, v in losses.items() if k}}
        if self.curve:
            point["train_loss"] = self.train_loss
        self.curve.append(point)

    def _exhausted(self) -> bool:
        """Whether the last ``patience`` validations did not improve."""
        losses, patience = [point["loss"] for point in self.curve], self.course.patience
        return bool(patience) and len(losses) > patience and min(losses[-patience:]) >= min(losses[:-patience])

    # ---- the state on disk ----

    def _best_file(self) -> Path:
        return self.directory / f"best-{self.best_step:08d}.safetensors"

    def _write(self, file: Path, arrays: dict[str, mx.array], about: dict[str, Any]) -> None:
        if self.rank == 0:
            self.directory.mkdir(parents=True, exist_ok=True)
            Arrays(arrays, about).save(file)

    def _save(self) -> None:
        state = {"weights": self.weights(), "optimizer": self.optimizer.state}
        about = {
            "about": self.about,
            "step": self.step,
            "best_step": self.best_step,
            "curve": self.curve,
            "sampler": self.sampler.state(),
            "computed_on": self.computed_on,
        }
        file = self.directory / f"state-{self.step:08d}.safetensors"
        self._write(file, dict(tree_flatten(state)), about)
        if self.rank == 0:
            for old in [*self.directory.glob("state-*.safetensors"), *self.directory.glob("best-*.safetensors")]:
                if old not in (file, self._best_file()):
                    old.unlink()

    def _resume(self) -> bool:
        """Take over the saved state; False if there is none."""
        about, arrays = distributed.from_first(*self._read())
        if not about:
            return False
        if about["about"] != json.loads(json.dumps(self.about)):
            raise Refused(f"{self.directory} holds the state of another training", "remove it to begin again")
        known = about.get("computed_on", [])  # the others may be on other machines than the first
        self.computed_on = machine.went_on(known) if self.rank == 0 else known
        state = tree_unflatten(list(arrays.items()))
        self.model.update(state["weights"])
        self.step, self.best_step, self.curve = about["step"], about["best_step"], about["curve"]
        self._begin()
        self.optimizer.state = state["optimizer"]
        self.sampler.restore(about["sampler"])
        if self.best_step:
            self.best = dict(tree_flatten(state["best"]))
        self.train_loss = self.curve[-1].get("train_loss", 0.0)
        return True

    def _read(self) -> tuple[dict, dict[str, mx.array]]:
        """Description and arrays of the newest state, with the best weights; both empty if there is none."""
        files = sorted(self.directory.glob("state-*.safetensors")) if self.rank == 0 else []
        if not files:
            return {}, {}
        about, arrays = Arrays.described(files[-1], "training state"), mx.load(str(files[-1]))
        if about["best_step"]:
            best = mx.load(str(self.directory / f"best-{about['best_step']:08d}.safetensors"))
            arrays |= {f"best.{name}": array for name, array in best.items()}
        mx.eval(arrays)  # the files may be gone when these are first needed
        return about, arrays
