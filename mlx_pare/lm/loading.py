"""Models as stock mlx-lm loads them; no code from a model directory is ever run."""

from __future__ import annotations

from pathlib import Path

import mlx.core as mx
import mlx.nn as nn

from ..arch import both_rope_spellings
from ..base.errors import PareError, Unsupported
from ..base.plain_path import plain, require_text
from ..base.untrusted import read_json
from ..model.weight_files import read_headers, without_leftovers
from ..sources.open_model import opened
from . import blas
from .backend import cpu_backend


def load(path: Path, lazy: bool = True) -> nn.Module:
    """The stock mlx-lm model, weights unread when ``lazy``; never executes code from the model directory."""
    from mlx_lm.utils import load_model

    require_text(path := opened(path))
    config = both_rope_spellings(read_json(path / "config.json", "model config"))
    if (code := config.get("model_file")) is not None:
        raise Unsupported(
            f"{path} needs its own code to be run ({str(code)[:80]}), which is never done",
            "take a model that stock mlx-lm has a class for",
        )
    entries = read_headers(path)  # mlx reads the same files, and believes them
    blas.fit(config.get("hidden_size"))
    with without_leftovers(path, entries) as whole, plain(whole) as name:
        try:
            model, _ = load_model(name, lazy=lazy, model_config=config)
        except Exception as error:  # whatever a config that means nothing leads to
            raise PareError(f"mlx-lm cannot load {path}: {said(error, name, path)}") from error
    return model


def said(error: BaseException, name: Path, path: Path) -> str:
    """The words of an error, with the path that the user knows."""
    return str(error).replace(str(name), str(path))


def load_stock(path: Path) -> nn.Module:
    """The model as mlx-lm itself would run it, in memory; on the CPU backend in float32, which is faster there."""
    model = load(path)
    if cpu_backend():
        model.set_dtype(mx.float32)
    mx.eval(model.parameters())
    return model
