"""Train with mlx-lm's trainer: adapters, gradient checkpoints, the loop."""

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

from ..tensors.packed import dense_weight
from .backend import cache_bytes, own_wired_limit
from .structure import blocks


def add_lora(model: nn.Module, rank: int, scale: float, dora: bool = False) -> None:
    """Freeze a model and put adapters on every linear layer of every block (mlx_lm.tuner), without dropout. Stacks of
    experts stay as they are.

    Args:
        model: the model, changed in place.
        rank: rank of the adapters.
        scale: factor on their output.
        dora: use DoRA instead of LoRA.
    """
    from mlx_lm.tuner.utils import linear_to_lora_layers

    model.freeze()
    linear = nn.Linear | nn.QuantizedLinear
    keys = {name for block in blocks(model) for name, part in block.named_modules() if isinstance(part, linear)}
    asked = {"rank": rank, "scale": scale, "dropout": 0.0, "keys": sorted(keys)}
    linear_to_lora_layers(model, len(blocks(model)), asked, use_dora=dora)


def fused(module: nn.Module) -> mx.array:
    """Fold the adapter of a linear layer into its weight, in float32.

    mlx-lm's own ``fuse`` adds in the dtype of the scales: in bfloat16 most of a small change is lost. The formulas are
    those of mlx_lm/tuner/lora.py and dora.py.

    Args:
        module: a LoRA or DoRA layer of mlx-lm.
    Returns:
        Dense weight, float32 [out, in].
    """
    change = module.lora_b.T.astype(mx.float32) @ module.lora_a.T.astype(mx.float32)
    weight = dense_weight(module.linear) + module.scale * change
    if "m" in module:  # DoRA: magnitudes of the rows
        weight = (module.m / mx.sqrt(mx.square(weight).sum(axis=1)))[:, None] * weight
    return weight


def checkpointed(call: Callable) -> Callable:
    """Make a block's ``__call__`` compute its activations again for the gradient instead of keeping them.

    mlx_lm.tuner.trainer.grad_checkpoint changes the class instead, and once more at every call. This applies only in
    training: a model that is evaluated or samples takes no gradient, and has a cache, which is no array.
    """

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
    """Train with mlx_lm.tuner.trainer.train on our loss and our batches; adapters are not saved.

    Args:
        model: the model, changed in place.
        optimizer: an optimizer of MLX.
        loss: loss(model, *batch) -> (mean, ntoks).
        batches: makes an iterator of batches, tuples of arrays.
        steps: updates.
        accumulate: batches per update.
        report_every: updates between reports.
        on_report: receives mlx-lm's training record, which counts batches.
    """
    from mlx_lm.tuner.callbacks import TrainingCallback
    from mlx_lm.tuner.trainer import TrainingArgs, train as run

    class Callback(TrainingCallback):
        def on_train_loss_report(self, info: dict) -> None:
            on_report(info)

    quiet = redirect_stdout(io.StringIO())  # its own progress display; ours reports
    with TemporaryDirectory() as directory, quiet, own_wired_limit():
        discarded = (
            Path(directory) / "adapters.safetensors"
        )  # mlx-lm saves at the end; mx adds this suffix if it is missing
        discarded.symlink_to(os.devnull)
        args = TrainingArgs(
            batch_size=1,
            iters=steps * accumulate,
            steps_per_report=report_every * accumulate,
            steps_per_eval=steps * accumulate + 1,
            steps_per_save=steps * accumulate + 1,
            grad_accumulation_steps=accumulate,
            adapter_file=str(discarded),
            clear_cache_threshold=cache_bytes(),  # the cache is limited anyway: it need not be cleared at every step
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
