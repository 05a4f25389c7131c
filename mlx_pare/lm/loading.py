"""Load models with stock mlx-lm; code from a model directory is never run."""

from __future__ import annotations

from pathlib import Path

import mlx.core as mx
import mlx.nn as nn

from ..arch import both_rope_spellings, older_rope_spelling
from ..base.errors import PareError, Unsupported
from ..base.plain_path import plain, require_text
from ..base.untrusted import read_json
from ..model.weight_files import read_headers, without_leftovers
from ..sources.open_model import opened
from . import blas
from .backend import cpu_backend, dequantized


def load(path: Path, lazy: bool = True) -> nn.Module:
    """Load the stock mlx-lm model, with weights unread if ``lazy``. Code from the model directory is never run.

    Raises Unsupported if the model needs such code, PareError if mlx-lm cannot load it.
    """
    from mlx_lm.utils import load_model

    require_text(path := opened(path))
    config = both_rope_spellings(read_json(path / "config.json", "model config"))
    if (code := config.get("model_file")) is not None:
        raise Unsupported(
            f"{path} needs its own code to be run ({str(code)[:80]}), which is never done",
            "take a model that stock mlx-lm has a class for",
        )
    if inside := isinstance(config.get("text_config"), dict):
        config["text_config"] = older_rope_spelling(config["text_config"])
    entries = read_headers(path)  # mlx reads the same files without checking them
    blas.fit((config["text_config"] if inside else config).get("hidden_size"))
    with without_leftovers(path, entries) as whole, plain(whole) as name:
        try:
            model, _ = load_model(name, lazy=lazy, model_config=config)
        except Exception as error:  # a senseless config may lead to any error
            raise PareError(f"mlx-lm cannot load {path}: {said(error, name, path)}") from error
    return model


def said(error: BaseException, name: Path, path: Path) -> str:
    """Return the message of an error with the path that the user knows.

    Args:
        error: the error.
        name: path in its message, such as that of a link.
        path: path that replaces it.
    """
    return str(error).replace(str(name), str(path))


def load_stock(path: Path) -> nn.Module:
    """Load the model into memory as mlx-lm would run it; on the CPU backend in float32, which is faster there."""
    model = load(path)
    if cpu_backend():
        model.set_dtype(mx.float32)
    mx.eval(model.parameters())
    return model


def load_to_answer(path: Path) -> nn.Module:
    """Load the model into memory as ``load_stock`` does; on the CPU backend its matrices are float32 too.

    MLX's kernels for packed matrices take up to 24 times as long there (benchmarks/LOG.md). It computes the same.
    """
    if not cpu_backend():
        return load_stock(path)
    model = dequantized(load(path))
    mx.eval(model.parameters())
    return model
