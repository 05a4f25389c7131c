"""survivors.json: which unit of the original every unit of a pruned model is."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

from pydantic import Field, model_validator

from ..store.schema import SCHEMA, Strict


class SurvivingLayer(Strict):
    """One layer of a pruned model and its units, all as indices of the original."""

    layer: int
    source: int = Field(ge=0)
    ffn: list[int]
    kv_head: list[int]
    q_head: list[int]


class Survivors(Strict):
    """survivors.json of a pruned model: which unit of the original every unit is."""

    schema_version: int = SCHEMA
    source_identity: str
    hidden: list[int]
    layers: list[SurvivingLayer]
    parent: dict[str, str] | None = None

    @model_validator(mode="after")
    def _ascending(self) -> Survivors:
        for units in (self.hidden, [layer.source for layer in self.layers]):
            if not units or units[0] < 0 or any(a >= b for a, b in pairwise(units)):
                raise ValueError("indices that do not ascend")
        return self


def survivors(path: Path) -> dict[str, Any]:
    """The content of a survivors.json. Raises PareError when it is none: it comes with a model, which is anybody's."""
    return Survivors.read(path, "survivors", "take the model as mlx-pare wrote it").model_dump(exclude_none=True)
