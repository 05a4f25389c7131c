"""The plan: which indices of every axis stay. People may read and edit plan.json."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, SerializerFunctionWrapHandler, model_serializer, model_validator

from ..arch import Architecture, Keep, LayerKeep, cut
from ..arch.axes import UNITS
from ..base.errors import PareError, Refused
from ..model.checkpoint import Checkpoint
from ..store.schema import SCHEMA, Count, Strict
from ..tensors.packing import BITS, GROUP_SIZES, Packing


class Target(Strict):
    """What the user asked for. ``kind``: "keep" (share of non-embedding parameters), "params" (total), "size" (bytes)
    or "for"."""

    kind: str
    value: float
    asked: str


class Size(Strict):
    """Shape and size of a model, before or after. A count that differs between layers is a list, one entry a layer."""

    layers: Annotated[int, Field(ge=0, le=10**5)]
    ffn: Count | list[Count]
    kv_heads: Count | list[Count]
    q_heads: Count | list[Count]
    experts: Count = 0
    hidden: Count
    parameters: Count
    non_embedding: Count
    bytes: Count

    @model_serializer(mode="wrap")
    def _without_experts(self, write: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Leave ``experts`` out if there are none, as ``LayerPlan`` does."""
        found = write(self)
        return found if self.experts else {name: value for name, value in found.items() if name != "experts"}


class LayerPlan(Strict):
    """One surviving layer: where it comes from and which units it keeps (indices in the original).

    Layers may keep different numbers of units, and one of the lists may be empty: the layer then loses its feed-forward
    or its attention, unless it has no such units at all (a layer with experts has no ffn). If stock mlx-lm has no class
    for such layers, the plan does not suit the model.
    ``attention_bits``, ``ffn_bits``: bits of the matrices of that part, in groups of the plan's ``group_size``. None:
    the plan's ``bits``, or, without them, as in the source.
    """

    source: int
    ffn: list[int]
    kv_head: list[int]
    expert: list[int] = Field(default_factory=list)
    attention_bits: int | None = None
    ffn_bits: int | None = None

    @model_serializer(mode="wrap")
    def _without_experts(self, write: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Leave ``expert`` out if there are none: plans of most models stay as earlier versions wrote them."""
        found = write(self)
        return found if self.expert else {name: value for name, value in found.items() if name != "expert"}

    def units(self) -> dict[str, list[int]]:
        """The kept units by the axes of UNITS."""
        return {axis: getattr(self, axis) for axis in UNITS}


class Plan(Strict):
    """Which indices to keep on each axis. People may edit it; ``problems`` checks it against a model.

    ``source``: identity of the model. ``bits``: of the result (None: as the source). ``embedding_bits``: of the
    embedding and the head alone.
    """

    schema_version: int = SCHEMA
    source: str
    criterion: str
    axes: list[str]
    target: Target
    bits: int | None = None
    group_size: int | None = None
    embedding_bits: int | None = None
    before: Size
    after: Size
    neighbours: list[str] = Field(default_factory=list)
    hidden: list[int] | None = None
    layers: list[LayerPlan]

    @model_validator(mode="after")
    def _known_schema(self) -> Plan:
        if self.schema_version != SCHEMA:
            raise ValueError(f"schema_version {self.schema_version}, this version reads {SCHEMA}")
        return self

    def keep(self, arch: Architecture) -> Keep:
        """Return the plan as a cut. Axes that keep everything are left out, so their tensors are copied untouched."""
        layers = []
        for layer in self.layers:
            units, kept = arch.units(layer.source), layer.units()
            packings = self._packings(attention=layer.attention_bits, ffn=layer.ffn_bits)
            cut_axes = {axis: kept[axis] for axis, count in units.items() if len(kept[axis]) != count}
            layers.append(LayerKeep(layer.source, cut_axes, packings))
        hidden = self.hidden if self.cuts_hidden(arch) else None
        return Keep(tuple(layers), hidden, self._packings(embedding=self.embedding_bits))

    def _packings(self, **bits: int | None) -> dict[str, Packing]:
        return {part: Packing(n, self.group_size) for part, n in bits.items() if n is not None}

    @property
    def packing(self) -> Packing | None:
        """The packing of the result, except for parts with their own bits. None: each tensor as in the source."""
        return Packing(self.bits, self.group_size) if self.bits else None

    def cuts_hidden(self, arch: Architecture) -> bool:
        """Whether the plan keeps less than the whole hidden size."""
        return self.hidden is not None and len(self.hidden) != arch.sizes["hidden"]

    def problems(self, arch: Architecture) -> list[str]:
        """List everything that is wrong with the plan for this model, not only the first thing.

        What ``cut`` refuses is found only if nothing else is wrong.
        """
        found = []
        if not arch.cuttable:
            return [f"{arch.family.name} is not cut again"]
        if not self.layers:
            return ["no layer is kept"]
        parts = {layer.attention_bits for layer in self.layers} | {layer.ffn_bits for layer in self.layers}
        for bits in sorted({self.bits, self.embedding_bits, *parts} - {None}):
            if bits not in BITS or self.group_size not in GROUP_SIZES:
                found.append(f"MLX cannot pack {bits} bits in groups of {self.group_size}")
        sources = [layer.source for layer in self.layers]
        found += _index_problems("layers", sources, len(arch.layers))
        for layer in self.layers:
            if not 0 <= layer.source < len(arch.layers):
                continue
            units = arch.units(layer.source)
            if units and not any(layer.units().values()):
                found.append(f"layer {layer.source} keeps nothing: leave it out of the layers")
            for axis, kept in layer.units().items():
                if kept:
                    found += _index_problems(f"layer {layer.source}: {axis}", kept, units.get(axis, 0))
                elif axis == "expert" and axis in units:
                    found.append(f"layer {layer.source} keeps no expert")
        if self.hidden is not None:
            found += _index_problems("hidden", self.hidden, arch.sizes["hidden"])
            if self.cuts_hidden(arch) and (why := arch.why_fixed("hidden")):
                found.append(f"the hidden size of {arch.family.name} cannot be cut: {why}")
        if not found:
            try:
                cut(arch, self.keep(arch))
            except PareError as error:
                found.append(error.problem)
        return found

    def check(self, checkpoint: Checkpoint) -> None:
        """Check the plan. Raises Refused if it is of another model, PareError with all reasons if it does not suit."""
        if self.source != checkpoint.identity():
            raise Refused(
                f"the plan was made for another model than {checkpoint.path}, or its files changed since",
                "make the plan again",
            )
        if problems := self.problems(checkpoint.arch):
            raise PareError(
                f"the plan does not suit {checkpoint.path}: {'; '.join(problems)}", "mend plan.json or make it again"
            )

    def dump(self) -> bytes:
        """Return the plan as JSON with one line per list of indices, so that people can edit it."""
        document = self.model_dump()
        lists: list[str] = []

        def fold(value: Any) -> Any:
            if isinstance(value, list) and value and all(isinstance(v, int) for v in value):
                lists.append(json.dumps(value))
                return f"\x00{len(lists) - 1}\x00"
            if isinstance(value, dict):
                return {k: fold(v) for k, v in value.items()}
            return [fold(v) for v in value] if isinstance(value, list) else value

        text = json.dumps(fold(document), indent=1)
        for number, line in enumerate(lists):
            text = text.replace(f'"\\u0000{number}\\u0000"', line)
        return text.encode() + b"\n"

    @classmethod
    def load(cls, path: Path) -> Plan:
        return cls.read(path, "plan", "mend it, or make it again with `mlx-pare plan`")

    @classmethod
    def of(cls, plan: Plan | str | os.PathLike[str]) -> Plan:
        """Return the plan itself, or read it from the path of a plan.json. Raises PareError as ``load``."""
        return plan if isinstance(plan, Plan) else cls.load(Path(plan))


def _index_problems(where: str, indices: Sequence[int], size: int) -> list[str]:
    if not indices:
        return [f"{where} keeps nothing"]
    found = []
    outside = [i for i in indices if not 0 <= i < size]
    if outside:
        found.append(f"{where} keeps index {outside[0]}, there are {size}")
    if any(a >= b for a, b in pairwise(indices)):
        found.append(f"{where} is not in ascending order without repeats")
    return found
