"""mlx-lm's own conversion: packing a model directory."""

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
    """mlx_lm.convert: the same model packed, lazily; ``predicate``: module path -> packing, where it is not the same
    for all. Raises PareError where mlx-lm cannot."""
    from importlib import import_module

    load(model), tokenizer(model)  # tried before: mlx-lm itself believes the files
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
