"""Pack a model directory with mlx-lm's own conversion."""

from __future__ import annotations

import io
from collections.abc import Callable
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

from ..base.errors import PareError
from ..base.plain_path import plain
from ..model.weight_files import read_headers, without_leftovers
from ..tensors.packing import Packing
from .loading import load, said
from .tokens import tokenizer


def convert(model: Path, out: Path, packing: Packing, predicate: Callable[[str, Any], dict] | None) -> None:
    """Pack a model with mlx_lm.convert, which reads the weights lazily.

    Args:
        model: model directory.
        out: directory that mlx-lm creates.
        packing: bits and group size of every matrix.
        predicate: (module path, module) -> packing as in config.json, if it differs between modules; None: it does not.
    Raises:
        PareError: mlx-lm cannot load or pack the model.
    """
    from importlib import import_module

    load(model), tokenizer(model)  # tried first, because mlx-lm itself does not check the files
    whole = without_leftovers(model, read_headers(model))
    with whole as place, plain(place) as name, redirect_stdout(io.StringIO()):
        try:
            import_module("mlx_lm.convert").convert(
                str(name),
                str(out),
                quantize=True,
                q_bits=packing.bits,
                q_group_size=packing.group_size,
                quant_predicate=predicate,
            )
        except (ValueError, OSError, KeyError) as error:
            raise PareError(f"mlx-lm cannot pack {model}: {said(error, name, model)}") from error
