"""prune: a model directory and a plan -> a smaller model directory, tensor by tensor. The source is never modified.

Rows and whole groups of columns keep their codes bit for bit. A matrix cut inside its quantization groups, or
solved anew by reconstruct, is quantized again; each one is listed with its error. Memory is one tensor.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import mlx.core as mx

from .arch.spec import Tensor, select
from .artifacts import Arrays, Plan, dump_json, repair_file, survivors
from .checkpoint import Checkpoint
from .console import progress, span
from .errors import PareError, Refused
from .layout import Piece, layout, size_of, smaller
from .packing import Packing
from .quantized import MX_DTYPE, Packed, joined, pack, raw_bytes, read, relative_error, whole_groups
from .shards import ShardWriter, copy_tokenizer, finish, partial_directory, write_config

OUR_KEY = "pare"  # config.json key that transformers and mlx-lm ignore


@dataclass(frozen=True)
class Lineage:
    """Of a model that was cut before: the model it was first cut from, by its survivors.json, whose units are to be
    named in the result; and what the model itself, the parent of the result, is called."""

    original: Path
    parent: str


def prune(
    model: Path,
    plan: Plan,
    out: Path,
    requantize: bool = True,
    repair: Path | None = None,
    lineage: Lineage | None = None,
) -> dict[str, Any]:
    """Write the pruned model to ``out`` (which must not exist); returns what was done to each requantized tensor.

    ``requantize`` False leaves a matrix that is cut inside its groups dense instead. ``repair``: what reconstruct wrote
    for this plan; its matrices take the place of the cut ones. ``lineage``: units are named after an earlier original.
    Raises PareError for a plan that does not suit the model (all reasons at once) or a lineage that is not the model's,
    Refused when ``out`` exists.
    """
    checkpoint = Checkpoint(model)
    if out.exists():
        raise Refused(f"{out} exists already", "choose another place or remove it")
    plan.check(checkpoint)
    surgeon = _Surgeon(checkpoint, plan, requantize, _repairs(repair, checkpoint, plan), lineage)
    partial = partial_directory(out)
    surgeon.write(partial)
    finish(partial, out)
    return {"requantized": surgeon.requantized, "dense": surgeon.left_dense}


@dataclass(frozen=True)
class _Repair:
    """What reconstruct wrote for a layer; ``packed``: how it packed which roles."""

    file: Path
    packed: Mapping[str, Mapping[str, Any]]

    def of(self, role: str) -> Packed | mx.array | None:
        """Its tensor for this role, unread; most have none."""
        arrays = mx.load(str(self.file))
        if role not in self.packed:
            return arrays.get(role)
        packing = Packing(self.packed[role]["bits"], self.packed[role]["group_size"])
        return Packed(*(arrays[f"{role}.{part}"] for part in ("weight", "scales", "biases")), packing)


def _repairs(repair: Path | None, checkpoint: Checkpoint, plan: Plan) -> list[_Repair]:
    """What reconstruct wrote, a file per layer, after a look at what each was made for; none without it."""
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
        # people edit plans: what is written down about the result is counted, not believed
        self.plan = plan.model_copy(update={"after": size_of(checkpoint, self.keep, packing), "neighbours": []})
        self.arch = smaller(checkpoint, self.keep, packing)
        self.pieces = [self._as_asked(p, requantize) for p in layout(checkpoint, self.keep, packing)]
        self.requantized: dict[str, float] = {}
        self.left_dense: list[str] = []

    def _as_asked(self, piece: Piece, requantize: bool) -> Piece:
        untouched = self._solved(piece) is None and (not piece.origins or self._exact_columns(piece) is not None)
        return piece if requantize or piece.packing is None or untouched else replace(piece, packing=None)

    def write(self, directory: Path) -> None:
        planned = [entry for piece in self.pieces for entry in piece.stored()]
        writer = ShardWriter(directory, planned)
        with progress("prune: tensor", len(self.pieces)) as bar:
            for piece in self.pieces:
                for name, array in self._cut(piece):
                    writer.write(name, raw_bytes(array))
                bar.advance()
        writer.close()
        write_config(directory, self._config())
        (directory / "survivors.json").write_bytes(dump_json(self._survivors()))
        (directory / "plan.json").write_bytes(self.plan.dump())
        (directory / "README.md").write_text(self._card(), "utf-8")
        copy_tokenizer(self.checkpoint, directory)

    # ---- one tensor ----

    def _kept(self, piece: Piece, origin: Tensor) -> list[list[int] | None]:
        """Kept indices along each dimension of an original tensor, None where all are."""
        sizes = self.checkpoint.arch.layer_sizes(origin.layer)
        keep = self.keep.of(piece.tensor.layer)
        return [select(dim, sizes, keep) for dim in origin.spec.dims]

    def _exact_columns(self, piece: Piece) -> list[int] | str | None:
        """How the columns of packed tensors can be cut without touching a code: "all", a list of groups, or None."""
        if piece.packing is None:
            return None
        for origin in piece.origins:
            source = self.checkpoint.packing(origin.module)
            if source is None or (source.bits, source.group_size) != (piece.packing.bits, piece.packing.group_size):
                return None
            if self.checkpoint.dtype(origin) != piece.dtype:
                return None
        columns = self._kept(piece, piece.origins[0])[-1]  # those of matrices that are joined are the same
        return "all" if columns is None else whole_groups(columns, piece.packing.group_size)

    def _cut(self, piece: Piece) -> list[tuple[str, mx.array]]:
        """The entries of one tensor, as they are written."""
        listed = any(self.checkpoint.packing(origin.module) for origin in piece.origins if piece.tensor.matrix)
        solved = self._solved(piece)
        if solved is not None:
            return self._repaired(piece, solved, listed)
        if not piece.origins:
            return _zeros(piece)
        rows = [self._rows(piece, origin) for origin in piece.origins]
        exact = self._exact_columns(piece)
        if exact is not None:
            return _entries(piece, joined(rows if exact == "all" else [part.groups(exact) for part in rows]))
        dense = [_take(p.dense() if isinstance(p, Packed) else p, [None, *self._kept(piece, o)[1:]])
                 for p, o in zip(rows, piece.origins, strict=True)]  # fmt: skip
        return self._store(piece, dense[0] if len(dense) == 1 else mx.concatenate(dense), listed)

    def _rows(self, piece: Piece, origin: Tensor) -> Packed | mx.array:
        """The kept rows of an original tensor, packed if it is."""
        kept, stored = self._kept(piece, origin)[0], read(self.checkpoint, origin.name)
        if kept is None:
            return stored
        return stored.rows(kept) if isinstance(stored, Packed) else _take(stored, [kept])

    def _solved(self, piece: Piece) -> Packed | mx.array | None:
        """What reconstruct made for this tensor, unread; most have none."""
        if not self.repairs or piece.tensor.layer is None:
            return None
        return self.repairs[piece.tensor.layer].of(piece.tensor.spec.role)

    def _repaired(self, piece: Piece, solved: Packed | mx.array, listed: bool) -> list[tuple[str, mx.array]]:
        """What reconstruct made: its very codes where they are packed as the layout wants them."""
        if isinstance(solved, Packed):
            if piece.packing is not None and solved.packing.as_config() == piece.packing.as_config():
                about = self.repairs[piece.tensor.layer].packed[piece.tensor.spec.role]
                self.requantized[piece.tensor.module] = about["error"]
                return _entries(piece, solved)
            solved = solved.dense()
        return self._store(piece, solved, listed)

    def _store(self, piece: Piece, dense: mx.array, listed: bool) -> list[tuple[str, mx.array]]:
        """A dense tensor as the layout wants it stored; ``listed``: it was packed before, so say what happened."""
        if piece.packing is None:
            if listed:
                self.left_dense.append(piece.tensor.module)
            return [(piece.tensor.name, dense.astype(MX_DTYPE[piece.dtype]))]
        packed = pack(dense, piece.packing, MX_DTYPE[piece.dtype])
        self.requantized[piece.tensor.module] = relative_error(dense, packed)
        return _entries(piece, packed)

    # ---- what goes beside the weights ----

    def _config(self) -> dict[str, Any]:
        config = dict(self.arch.config)
        config.pop("quantization_config", None)
        config.pop("quantization", None)
        packings = {p.tensor.module: p.packing for p in self.pieces if p.tensor.matrix}
        used = [p for p in packings.values() if p]
        if used:
            usual = self.packing or self.checkpoint.quantization  # of neither when only parts are packed
            default = max(used, key=lambda p: (usual is not None and p.as_config() == usual.as_config(), used.count(p)))
            overrides = {
                module: p.as_config() if p else False
                for module, p in packings.items()
                if p is None or p.as_config() != default.as_config()
            }
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
            layers.append(
                {"layer": new, "source": layer.source, "ffn": layer.ffn, "kv_head": layer.kv_head, "q_head": heads}
            )
        hidden = self.plan.hidden or list(range(self.checkpoint.arch.sizes["hidden"]))
        found = {"schema_version": 1, "source_identity": self.plan.source, "hidden": hidden, "layers": layers}
        if self.ancestry is None:
            return found
        parent = {"name": self.lineage.parent, "identity": self.plan.source}
        return _descended(found, self.ancestry) | {"parent": parent}

    def _card(self) -> str:
        before, after = self.plan.before, self.plan.after
        original = (self.lineage.original if self.lineage else self.checkpoint.path).resolve().name
        way = f", its parent being `{self.lineage.parent}`, which was cut before" if self.lineage else ""
        return (
            f"# {original}, pruned\n\n"
            f"Made by mlx-pare from `{original}`{way} (criterion {self.plan.criterion}; {self.plan.target.asked}).\n"
            f"{before.layers} -> {after.layers} layers, ffn {span(before.ffn)} -> {span(after.ffn)}, kv heads "
            f"{span(before.kv_heads)} -> {span(after.kv_heads)}, "
            f"{before.parameters:,} -> {after.parameters:,} parameters.\n"
            "`survivors.json` maps every kept unit to its index in the original. The licence of the original applies.\n"
        )


def _ancestry(checkpoint: Checkpoint, lineage: Lineage | None) -> dict[str, Any] | None:
    """What survived in the model of the original it was cut from; None where no lineage is asked."""
    if lineage is None:
        return None
    found = survivors(checkpoint.path / "survivors.json")
    if found.get("source_identity") != Checkpoint(lineage.original).identity():
        raise PareError(f"{checkpoint.path} was not cut from {lineage.original}", "cut the original instead")
    return found


def _descended(survivors: dict[str, Any], before: dict[str, Any]) -> dict[str, Any]:
    """Survivors whose indices are a model's, with those of the original that the model was cut from, by its own
    survivors ``before``."""
    layers = []
    for layer in survivors["layers"]:
        old = before["layers"][layer["source"]]
        units = {axis: [old[axis][i] for i in layer[axis]] for axis in ("ffn", "kv_head", "q_head")}
        layers.append({**layer, "source": old["source"], **units})
    hidden = [before["hidden"][i] for i in survivors["hidden"]]
    return {**survivors, "source_identity": before["source_identity"], "hidden": hidden, "layers": layers}


def _zeros(piece: Piece) -> list[tuple[str, mx.array]]:
    """The entries of a tensor that is zero, whichever way it is stored."""
    zeros = mx.zeros(piece.tensor.shape, MX_DTYPE[piece.dtype])
    if piece.packing is None:
        return [(piece.tensor.name, zeros)]
    return _entries(piece, pack(zeros, piece.packing, zeros.dtype))


def _take(array: mx.array, kept: Sequence[list[int] | None]) -> mx.array:
    for axis, index in enumerate(kept):
        if index is not None:
            array = mx.take(array, mx.array(index), axis=axis)
    return array


def _entries(piece: Piece, packed: Packed) -> list[tuple[str, mx.array]]:
    names = [planned.name for planned in piece.stored()]
    return list(zip(names, (packed.words, packed.scales, packed.biases), strict=True))
