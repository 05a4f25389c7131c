"""prune: a model directory and a plan -> a smaller model directory, tensor by tensor. The source is never modified.

Rows and whole groups of columns keep their codes bit for bit. A matrix that is cut inside its quantization groups, or
solved again by reconstruct, is quantized again, and is listed with its error. Memory is one packed tensor.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from ..arch.axes import select
from ..arch.spec import Tensor
from ..base import markdown
from ..base.console import progress
from ..base.errors import PareError
from ..base.units import span
from ..lm import tokenizer_class
from ..model import finite
from ..model.checkpoint import Checkpoint
from ..model.directory import copy_tokenizer, write_config
from ..model.hub_name import called
from ..model.weights import read_panels
from ..sources.open_model import StrPath, opened
from ..store.arrays import Arrays
from ..store.atomic import created, refuse_existing
from ..store.places import repair_file
from ..store.schema import dump_json
from ..tensors.packed import MX_DTYPE, Packed, energies, pack, raw_bytes, whole_groups
from ..tensors.packing import Packing
from ..tensors.panels import PANEL_VALUES, sliced
from ..tensors.shards import OUR_KEY, Planned, ShardWriter
from .layout import Piece, layout, size_of, smaller
from .plan_file import Plan, Size
from .survivors import survivors

Stored = tuple[str, Iterable[memoryview]]  # a tensor name of the new model, and its bytes in parts


@dataclass(frozen=True)
class Lineage:
    """Where a model comes from that was cut before.

    ``original``: the model it was first cut from, as its survivors.json says; the result names the units of this one.
    ``parent``: the name of the model itself, which is the parent of the result.
    """

    original: Path
    parent: str


def prune(
    model: StrPath,
    plan: Plan | StrPath,
    out: StrPath,
    requantize: bool = True,
    repair: StrPath | None = None,
    lineage: Lineage | None = None,
) -> dict[str, Any]:
    """Write the pruned model to a new directory.

    Args:
        model: what ``opened`` takes, such as a model directory or a GGUF file.
        plan: the plan, or the path of its plan.json.
        out: directory to write; it must not exist.
        requantize: quantize matrices again whose codes cannot be kept. If False, they stay dense: those that are cut
            inside their groups, are solved again, or get another packing.
        repair: directory that reconstruct wrote for this plan; its matrices replace the cut ones. None: there is none.
        lineage: names the units after an earlier original; None: after ``model``.

    Returns:
        "requantized": by module, the relative error (Frobenius norm) of each matrix that was quantized for this result.
        "dense": the modules that were packed in the source and are dense now.

    Raises:
        PareError: the plan does not suit the model (all reasons at once), ``repair`` was made for another model or
            plan, the lineage is not that of the model, or weights are NaN or infinite.
        Refused: ``out`` exists, or the plan was made for another model.
    """
    checkpoint, out, repair = Checkpoint(opened(model)), Path(out), repair and Path(repair)
    plan = Plan.of(plan)
    refuse_existing(out)
    plan.check(checkpoint)
    finite.require(checkpoint)
    surgeon = _Surgeon(checkpoint, plan, requantize, _repairs(repair, checkpoint, plan), lineage)
    with created(out) as place:
        place.mkdir()
        surgeon.write(place)
    return {"requantized": surgeon.requantized, "dense": surgeon.left_dense}


@dataclass(frozen=True)
class _Repair:
    """What reconstruct wrote for a layer. ``packed``: by role, how it packed the matrix."""

    file: Path
    packed: Mapping[str, Mapping[str, Any]]

    def of(self, role: str) -> Packed | mx.array | None:
        """The tensor for this role, not read yet; None for most roles."""
        arrays = mx.load(str(self.file))
        if role not in self.packed:
            return arrays.get(role)
        packing = Packing.of_config(self.packed[role])
        return Packed.of((arrays[f"{role}.{part}"] for part in packing.parts), packing)


def _repairs(repair: Path | None, checkpoint: Checkpoint, plan: Plan) -> list[_Repair]:
    """Open what reconstruct wrote, a file per layer, and check what each was made for. Empty if ``repair`` is None."""
    if repair is None:
        return []
    repairs = []
    files = [repair_file(repair, new) for new in range(len(plan.layers))]
    if repair_file(repair, len(files)).exists():
        raise PareError(f"{repair} was made for another plan: one of more layers", "reconstruct this plan again")
    for file, layer in zip(files, plan.layers, strict=True):
        about = Arrays.described(file, "reconstruction")
        if about["model"] != checkpoint.identity():
            raise PareError(
                f"{repair} was made from another model than {checkpoint.path}", "reconstruct this model first"
            )
        if about["units"] != layer.model_dump():
            raise PareError(
                f"{repair} was made for another plan: layer {layer.source} keeps other units there",
                "reconstruct this plan again",
            )
        repairs.append(_Repair(file, about.get("packed", {})))
    return repairs


class _Surgeon:
    """Cuts every tensor of a checkpoint by one plan."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        plan: Plan,
        requantize: bool,
        repairs: list[_Repair],
        lineage: Lineage | None,
    ):
        self.checkpoint, self.packing, self.repairs, self.lineage = checkpoint, plan.packing, repairs, lineage
        self.ancestry = _ancestry(checkpoint, lineage)
        packing = plan.packing
        self.keep = plan.keep(checkpoint.arch)
        sizes = {"before": size_of(checkpoint, None, None), "after": size_of(checkpoint, self.keep, packing)}
        # people edit plans: sizes of the result are counted, not copied from the plan
        self.plan = plan.model_copy(update={**sizes, "neighbours": []})
        self.arch = smaller(checkpoint, self.keep, packing)
        self.pieces = [self._as_asked(p, requantize) for p in layout(checkpoint, self.keep, packing)]
        self.requantized: dict[str, float] = {}
        self.left_dense: list[str] = []

    def _as_asked(self, piece: Piece, requantize: bool) -> Piece:
        untouched = self._solved(piece) is None and (not piece.origins or self._exact(piece) is not None)
        return piece if requantize or piece.packing is None or untouched else replace(piece, packing=None)

    def write(self, directory: Path) -> None:
        planned = [entry for piece in self.pieces for entry in piece.stored()]
        beside = self.checkpoint.beside()
        planned += [Planned(name, entry.dtype, entry.shape) for name, entry in beside.items()]
        writer = ShardWriter(directory, planned)
        with progress("prune: tensor", len(self.pieces)) as bar:
            for piece in self.pieces:
                for name, parts in self._cut(piece):
                    writer.stream(name, parts)
                bar.advance()
        for name, entry in beside.items():
            writer.stream(name, sliced(entry))
        writer.close()
        write_config(directory, self._config())
        (directory / "survivors.json").write_bytes(dump_json(self._survivors()))
        (directory / "plan.json").write_bytes(self.plan.dump())
        (directory / "README.md").write_text(self._card(), "utf-8")
        copy_tokenizer(self.checkpoint, directory)
        if self.arch.config["model_type"] != self.checkpoint.arch.config["model_type"]:
            tokenizer_class.keep(self.checkpoint.path, directory)

    # ---- one tensor ----

    def _kept(self, piece: Piece, origin: Tensor) -> tuple[Sequence[int] | None, list[int] | None]:
        """Kept rows (of all matrices of a stack, or the numbers of a vector) and columns of an original tensor; None:
        it keeps all."""
        sizes = self.checkpoint.arch.layer_sizes(origin.layer)
        keep = self.keep.of(piece.tensor.layer)
        only = (piece.segment,)  # of the rows
        kept = [select(d, sizes, keep, *only[n:]) for n, d in enumerate(origin.spec.dims)]
        columns = kept.pop() if len(kept) > 1 else None
        rows = kept[0]
        for found, count in zip(kept[1:], origin.shape[1:], strict=False):
            if rows is not None or found is not None:
                above = np.arange(origin.shape[0]) if rows is None else np.asarray(rows)
                rows = (above[:, None] * count + (np.arange(count) if found is None else np.asarray(found))).reshape(-1)
        return rows, columns

    def _exact(self, piece: Piece) -> tuple[list[int] | None, int] | None:
        """The kept columns (None: all), and of how many, in the unit in which bytes can be copied as they are: whole
        groups if packed, else single values. None if the tensor must be computed."""
        for origin in piece.origins:
            source = self.checkpoint.packing(origin.module) if origin.matrix else None
            if (source and source.as_config()) != (piece.packing and piece.packing.as_config()):
                return None
            if self.checkpoint.dtype(origin) != piece.dtype:
                return None
        origin = piece.origins[0]  # columns of matrices that are joined are the same
        columns = self._kept(piece, origin)[1]
        group = piece.packing.group_size if piece.packing else 1
        if columns is not None and group > 1 and (columns := whole_groups(columns, group)) is None:
            return None
        return columns, origin.shape[-1] // group

    def _cut(self, piece: Piece) -> list[Stored]:
        """The entries of one tensor, in the order in which they are written."""
        listed = any(self.checkpoint.packing(origin.module) for origin in piece.origins if piece.tensor.matrix)
        solved = self._solved(piece)
        if solved is not None:
            return self._repaired(piece, solved, listed)
        if not piece.origins:
            return _zeros(piece)
        exact = self._exact(piece)
        if exact is None:
            return self._store(piece, self._dense(piece), listed)
        return [(planned.name, self._slices(piece, part, *exact)) for part, planned in enumerate(piece.stored())]

    def _slices(self, piece: Piece, part: int, columns: list[int] | None, width: int) -> Iterator[memoryview]:
        """The bytes of one entry: weight, scales or biases."""
        for origin in piece.origins:
            name = origin.name if part == 0 else f"{origin.module}.{('scales', 'biases')[part - 1]}"
            yield from sliced(self.checkpoint.entries[name], self._kept(piece, origin)[0], columns, width)

    def _dense(self, piece: Piece) -> Iterator[mx.array]:
        """Yield the kept rows and columns of a tensor, expanded, a few rows [some, columns] at a time."""
        for origin in piece.origins:
            rows, columns = self._kept(piece, origin)
            index = None if columns is None else mx.array(columns)
            for panel in read_panels(self.checkpoint, origin, rows):
                dense = panel.dense() if isinstance(panel, Packed) else panel
                yield dense if index is None else mx.take(dense, index, axis=1)

    def _solved(self, piece: Piece) -> Packed | mx.array | None:
        """What reconstruct made for this tensor, not read yet; None for most tensors."""
        if not self.repairs or piece.tensor.layer is None:
            return None
        return self.repairs[piece.tensor.layer].of(piece.tensor.spec.role)

    def _repaired(self, piece: Piece, solved: Packed | mx.array, listed: bool) -> list[Stored]:
        """The entries of a tensor that reconstruct made: its own codes if they are packed as the layout wants them."""
        if isinstance(solved, Packed):
            if piece.packing is not None and solved.packing.as_config() == piece.packing.as_config():
                about = self.repairs[piece.tensor.layer].packed[piece.tensor.spec.role]
                self.requantized[piece.tensor.module] = about["error"]
                return _entries(piece, [solved])
            solved = solved.dense()
        step = max(1, PANEL_VALUES * len(solved) // solved.size)
        return self._store(piece, (solved[i : i + step] for i in range(0, len(solved), step)), listed)

    def _store(self, piece: Piece, panels: Iterator[mx.array], listed: bool) -> list[Stored]:
        """The entries of a dense tensor as the layout wants it. ``listed``: it was packed in the source, so its name is
        listed if it stays dense."""
        dtype = MX_DTYPE[piece.dtype]
        if piece.packing is None:
            if listed:
                self.left_dense.append(piece.tensor.module)
            return [(piece.tensor.name, (raw_bytes(panel.astype(dtype)) for panel in panels))]
        packed, energy = [], np.zeros(2)
        for panel in panels:
            packed.append(pack(panel, piece.packing, dtype))
            energy += energies(panel, packed[-1])
        self.requantized[piece.tensor.module] = float(np.sqrt(energy[0] / energy[1])) if energy[1] else 0.0
        return _entries(piece, packed)

    # ---- what lies next to the weights ----

    def _config(self) -> dict[str, Any]:
        config = dict(self.arch.parent.config if self.arch.parent else self.arch.config)
        config.pop("quantization_config", None)
        config.pop("quantization", None)
        packings = {p.tensor.module: p.packing for p in self.pieces if p.tensor.matrix}
        used = [p for p in packings.values() if p]
        if used:
            usual = self.packing or self.checkpoint.quantization  # None if only parts are packed
            default = max(used, key=lambda p: (usual is not None and p.as_config() == usual.as_config(), used.count(p)))
            wanted = {module: p.as_config() if p else False for module, p in packings.items()}
            wanted |= self.checkpoint.packed_beside()
            overrides = {module: how for module, how in wanted.items() if how != default.as_config()}
            config["quantization"] = {**default.as_config(), **overrides}
        survivors, before = self._survivors(), self.plan.before
        if self.lineage:
            before = size_of(Checkpoint(self.lineage.original), None, None)
        config[OUR_KEY] = {
            "made_by": "mlx-pare",
            "source_identity": survivors["source_identity"],
            **({"parent": survivors["parent"]} if self.lineage else {}),
            "criterion": self.plan.criterion,
            "parameters_before": before.parameters,
            "survivors": "survivors.json",
        }
        return config

    def _survivors(self) -> dict[str, Any]:
        layers = []
        for new, layer in enumerate(self.plan.layers):
            group = self.checkpoint.arch.layers[layer.source].sizes["group"]
            heads = [k * group + g for k in layer.kv_head for g in range(group)]
            units = {"ffn": layer.ffn, "kv_head": layer.kv_head, "q_head": heads}
            units |= {"expert": layer.expert} if layer.expert else {}
            layers.append({"layer": new, "source": layer.source, **units})
        hidden = self.plan.hidden or list(range(self.checkpoint.arch.sizes["hidden"]))
        found = {"schema_version": 1, "source_identity": self.plan.source, "hidden": hidden, "layers": layers}
        if self.ancestry is None:
            return found
        parent = {"name": self.lineage.parent, "identity": self.plan.source}
        return _descended(found, self.ancestry) | {"parent": parent}

    def _card(self) -> str:
        before, after = self.plan.before, self.plan.after
        original = called((self.lineage.original if self.lineage else self.checkpoint.path).resolve())
        way = f", its parent being {self.lineage.parent}, which was cut before" if self.lineage else ""
        original, way = markdown.escaped(original), markdown.escaped(way)
        chosen = markdown.escaped(f"criterion {self.plan.criterion}; {self.plan.target.asked}")
        unseen = f"{self.arch.parent.unseen}\n" if self.arch.parent else ""
        return (
            f"# {original}, pruned\n\n"
            f"Made by mlx-pare from {original}{way} ({chosen}).\n"
            f"{before.layers} -> {after.layers} layers, {', '.join(_changes(before, after))}, "
            f"{before.parameters:,} -> {after.parameters:,} parameters.\n{unseen}"
            "`survivors.json` maps every kept unit to its index in the original. The licence of the original applies.\n"
        )


def _changes(before: Size, after: Size) -> list[str]:
    """The counts of units before and after, in words, of the kinds of units that the model has."""
    named = {"ffn": "ffn", "kv heads": "kv_heads", "experts": "experts"}
    counts = {name: (getattr(before, field), getattr(after, field)) for name, field in named.items()}
    return [f"{name} {span(old)} -> {span(new)}" for name, (old, new) in counts.items() if old]


def _ancestry(checkpoint: Checkpoint, lineage: Lineage | None) -> dict[str, Any] | None:
    """The survivors of a model that was cut before, as units of its original; None without a lineage."""
    if lineage is None:
        return None
    found = survivors(checkpoint.path / "survivors.json")
    if found.get("source_identity") != Checkpoint(lineage.original).identity():
        raise PareError(f"{checkpoint.path} was not cut from {lineage.original}", "cut the original instead")
    return found


def _descended(survivors: dict[str, Any], before: dict[str, Any]) -> dict[str, Any]:
    """Translate survivors from indices of a model to those of its original. ``before``: the survivors of the model."""
    layers = []
    for layer in survivors["layers"]:
        old = before["layers"][layer["source"]]
        axes = [axis for axis in ("ffn", "kv_head", "q_head", "expert") if axis in layer]
        units = {axis: [old[axis][i] for i in layer[axis]] for axis in axes}
        layers.append({**layer, "source": old["source"], **units})
    hidden = [before["hidden"][i] for i in survivors["hidden"]]
    return {**survivors, "source_identity": before["source_identity"], "hidden": hidden, "layers": layers}


def _zeros(piece: Piece) -> list[Stored]:
    """The entries of a tensor that is zero, dense or packed."""
    zeros = mx.zeros(piece.tensor.shape, MX_DTYPE[piece.dtype])
    if piece.packing is None:
        return [(piece.tensor.name, [raw_bytes(zeros)])]
    return _entries(piece, [pack(zeros, piece.packing, zeros.dtype)])


def _entries(piece: Piece, panels: Sequence[Packed]) -> list[Stored]:
    """The entries of a packed matrix that comes in panels of rows."""
    parts = ([raw_bytes(p.arrays[part]) for p in panels] for part in piece.packing.parts)
    return [(planned.name, each) for planned, each in zip(piece.stored(), parts, strict=True)]
