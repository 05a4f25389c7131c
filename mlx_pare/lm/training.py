"""Training on mlx-lm's trainer: adapters, gradient checkpoints, the loop."""

from __future__ import annotations

import io
import os
from collections.abc import Callable, Iterator
from contextlib import redirect_stdout
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from .structure import blocks


def add_lora(model: nn.Module, rank: int, scale: float, dora: bool = False) -> None:
    """Freeze the model and put LoRA (or DoRA) adapters on every linear layer of every block (mlx_lm.tuner)."""
    from mlx_lm.tuner.utils import linear_to_lora_layers

    model.freeze()
    linear_to_lora_layers(model, len(blocks(model)), {"rank": rank, "scale": scale, "dropout": 0.0}, use_dora=dora)


def fused(module: nn.Module) -> mx.array:
    """The dense weight [out, in] of a linear layer with its adapter folded in."""
    return module.fuse(dequantize=True).weight


def checkpointed(call: Callable) -> Callable:
    """A block's ``__call__`` that keeps none of its activations for the gradient, but computes them again
    (mlx_lm.tuner.trainer.grad_checkpoint does this to the class, and anew at every call). Only in training: a model
    that is evaluated or samples takes no gradient, and has a cache, which is no array."""

    def again(block: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if not block.training:
            return call(block, *args, **kwargs)

        def inner(parameters: dict, *args: Any, **kwargs: Any) -> Any:
            block.update(parameters)
            return call(block, *args, **kwargs)

        return mx.checkpoint(inner)(block.trainable_parameters(), *args, **kwargs)

    return again


def train(
    model: nn.Module,
    optimizer: Any,
    loss: Callable,
    batches: Callable[[], Iterator[tuple]],
    steps: int,
    accumulate: int,
    report_every: int,
    on_report: Callable[[dict], None],
) -> None:
    """``steps`` updates by mlx_lm.tuner.trainer.train with our loss and our batches, ``accumulate`` of them for each.

    ``batches`` yields the tuples that ``loss(model, *batch) -> (mean, ntoks)`` takes; ``on_report`` gets mlx-lm's own
    training record, which counts batches.
    """
    from mlx_lm.tuner.callbacks import TrainingCallback
    from mlx_lm.tuner.trainer import TrainingArgs, train as run

    class Callback(TrainingCallback):
        def on_train_loss_report(self, info: dict) -> None:
            on_report(info)

    with TemporaryDirectory() as directory, redirect_stdout(io.StringIO()):  # its own progress display; ours reports
        discarded = (
            Path(directory) / "adapters.safetensors"
        )  # mlx-lm saves at the end; mx adds this suffix to any other
        discarded.symlink_to(os.devnull)
        args = TrainingArgs(
            batch_size=1,
            iters=steps * accumulate,
            steps_per_report=report_every * accumulate,
            steps_per_eval=steps * accumulate + 1,
            steps_per_save=steps * accumulate + 1,
            grad_accumulation_steps=accumulate,
            adapter_file=str(discarded),
        )
        run(
            model,
            optimizer,
            train_dataset=[None],
            val_dataset=None,
            args=args,
            loss=loss,
            iterate_batches=lambda **_: batches(),
            training_callback=Callback(),
        )
