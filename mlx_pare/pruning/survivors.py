"""survivors.json: it maps every unit of a pruned model to its index in the original."""

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
    expert: list[int] = Field(default_factory=list)
    q_head: list[int]


class Survivors(Strict):
    """The content of survivors.json: which unit of the original every unit of a pruned model is."""

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
    """Read a survivors.json. Raises PareError if it is not valid: it comes with a model that anybody may have made."""
    return Survivors.read(path, "survivors", "take the model as mlx-pare wrote it").model_dump(exclude_none=True)
