"""What the Python API takes besides paths: the classes of options, rows of text, and cuts given by number."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from .arch import require_cuttable
from .base.errors import UsageError
from .capacity.form import Form
from .capacity.macs import Budget
from .capacity.memory import Use
from .evaluation.metrics import Metrics
from .lm import tokenizer
from .model.checkpoint import Checkpoint
from .options.settings import Settings
from .options.values import is_whole
from .planning.choose_units import read_scores
from .planning.goal import Options as PlanOptions
from .pruning.layout import size_of
from .pruning.plan_file import Plan, Target
from .recovery.options import Options as RecoverOptions
from .sources.open_model import StrPath, opened
from .text.corpus import Rows
from .text.splits import Texts

__all__ = [
    "Budget", "Form", "Metrics", "Plan", "PlanOptions", "RecoverOptions", "Rows", "Settings", "Use", "candidates",
    "opened", "rows", "tokenizer", "without",
]  # fmt: skip


def rows(
    model: StrPath, data: StrPath | None = None, samples: int = Settings.samples, length: int = Settings.length
) -> Rows:
    """Take the calibration rows that `run` takes of a text.

    Args:
        model: path or name of a model, whose tokenizer reads the text.
        data: file or folder, also [NAME=]PATH[:WEIGHT]; None: mlx-pare's own text.
        samples: rows at most.
        length: tokens per row.
    Returns:
        int32 [at most samples, length].
    Raises:
        UsageError: an argument is out of range, or the text holds a token that the model does not have.
        PareError: model or text cannot be read, or the text is too short.
    """
    return Texts(opened(model), Settings(data=data and str(data), samples=samples, length=length)).calibration


def candidates(scores: StrPath, ratio: float) -> dict[str, Any]:
    """Name the units with the lowest scores. Reads only the file of ``score``, not the model.

    Args:
        scores: file that ``score`` wrote, with its criterion.
        ratio: share of the ffn channels of every layer, and of the layers, from 0 to less than 1.
    Returns:
        "criterion"; "ffn": layer -> numbers of its channels, ascending; "layers": numbers of layers, ascending.
    Raises:
        UsageError: ``ratio`` is out of range.
        PareError: the file cannot be read.
    """
    if not 0 <= ratio < 1:
        raise UsageError(f"the ratio {ratio!r} is not between 0 and 1", "give the share to remove, e.g. 0.25")
    found = read_scores(Path(scores))

    def lowest(values: Any) -> list[int]:
        return sorted(values.argsort(kind="stable")[: int(ratio * len(values))].tolist())

    ffn = {layer: lowest(values) for layer, values in enumerate(found.arrays["ffn"])}
    return {"criterion": found.about["criterion"], "ffn": ffn, "layers": lowest(found.arrays["layer"])}


def without(
    model: StrPath,
    layers: Iterable[int] = (),
    ffn: Mapping[int, Iterable[int]] | None = None,
    kv_head: Mapping[int, Iterable[int]] | None = None,
) -> Plan:
    """Plan to remove exactly what is named, for ``prune`` and ``reconstruct``.

    Args:
        model: path or name of a model.
        layers: numbers of the layers to remove.
        ffn, kv_head: layer -> numbers of the channels, or of the key-value heads, to remove; None: none.
    Returns:
        A plan with criterion "none".
    Raises:
        UsageError: the model does not have one of the numbers.
        PareError: the model cannot be read or cut, or no class of stock mlx-lm holds the result.
    """
    checkpoint = Checkpoint(opened(model))
    arch, named = checkpoint.arch, {"ffn": ffn or {}, "kv_head": kv_head or {}}
    require_cuttable(arch)
    gone = _numbers("layer", layers, len(arch.layers))
    for of in named.values():
        _numbers("layer", of, len(arch.layers))
    left = []
    for source in sorted({*range(len(arch.layers))} - gone):
        units = {"source": source}
        for axis, of in named.items():
            size = arch.layers[source].sizes[axis]
            units[axis] = sorted({*range(size)} - _numbers(f"{axis} in layer {source}", of.get(source, ()), size))
        left.append(units)
    before = size_of(checkpoint, None, None)
    made = Plan(
        source=checkpoint.identity(), criterion="none", before=before, after=before, layers=left,
        axes=[axis for axis, cut in {"layer": gone, **named}.items() if cut],
        target=Target(kind="keep", value=1, asked="what was named"),
    )  # fmt: skip
    made.check(checkpoint)
    after = size_of(checkpoint, made.keep(arch), None)
    target = made.target.model_copy(update={"value": after.non_embedding / before.non_embedding})
    return made.model_copy(update={"after": after, "target": target})


def _numbers(what: str, given: Iterable[int], count: int) -> set[int]:
    """Check numbers from 0 to less than ``count``. Raises UsageError for anything else, such as a module's name."""
    given = list(given)
    for number in given:
        if not is_whole(number) or not 0 <= number < count:
            raise UsageError(f"there is no {what} {number!r}", f"give numbers from 0 to {count - 1}")
    return {int(number) for number in given}
