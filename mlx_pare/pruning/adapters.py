"""LoRA adapters of the original, carried over to a model that was cut from it.

An adapter adds scale * (x @ lora_a) @ lora_b to the output of a matrix for x. If the matrix lost rows and columns, what
is left of that sum has only those rows of lora_a and those columns of lora_b that survived. This is exact, as the cut
itself is, if the matrix was cut and not solved again.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..arch import Architecture, Tensor
from ..arch.axes import length, select
from ..base.errors import PareError, Refused, Unsupported
from ..base.untrusted import check_links, read_json
from ..model.checkpoint import Checkpoint
from ..store.atomic import created, refuse_existing
from ..store.schema import dump_json
from ..tensors.safetensors import read_header
from .survivors import survivors

CONFIG, WEIGHTS = "adapter_config.json", "adapters.safetensors"  # as mlx-lm names them
PART = re.compile(r"(.+)\.(lora_a|lora_b)")


def carry(adapter: Path, parent: Path, model: Path, out: Path) -> dict[str, Any]:
    """Write the adapter directory of mlx-lm that does for a cut model what an adapter does for its parent.

    Args:
        adapter: directory of the adapter.
        parent: directory of the model that the adapter belongs to.
        model: directory of the model that was cut from it, with its survivors.json.
        out: directory to write; it must not exist.

    Returns:
        "out"; "tensors": how many were written; "layers": numbers of the layers of the new model that have an adapter;
        "left_out": names of the tensors whose layers are gone.

    Raises:
        Refused: ``out`` exists, or ``model`` was not cut from ``parent``.
        Unsupported: the adapter cannot be cut, with the reason.
        PareError: files are missing, damaged or contradict each other.
    """
    refuse_existing(out)
    settings = _settings(adapter)
    old, new = Checkpoint(parent), Checkpoint(model)
    if not (model / "survivors.json").exists():
        raise Refused(f"{model} has no survivors.json, which says what it was cut from", "take one that mlx-pare cut")
    kept = survivors(model / "survivors.json")
    if kept["source_identity"] != old.identity():
        raise Refused(f"{model} was not cut from {parent}", "give the model that it was cut from with --parent")
    cut = _Cut(old.arch, new.arch, kept)
    arrays, left_out = cut.arrays(adapter / WEIGHTS, settings)
    if not arrays:
        raise Unsupported(f"no layer with an adapter of {adapter} is left in {model}")
    first = cut.first(settings)
    settings["num_layers"] = sum(layer["source"] >= first for layer in kept["layers"])
    if keys := settings["lora_parameters"].get("keys"):
        settings["lora_parameters"] = settings["lora_parameters"] | {"keys": cut.keys(keys)}
    settings["model"] = str(model)
    _write(out, arrays, settings)
    layers = sorted({int(n) for name in arrays for n in re.findall(r"\.(\d+)\.", name)[:1]})
    return {"out": str(out), "tensors": len(arrays), "layers": layers, "left_out": left_out}


def _settings(adapter: Path) -> dict[str, Any]:
    """Read the adapter's configuration. Raises Unsupported for kinds that cannot be cut, PareError for wrong values."""
    check_links(adapter)
    if not (adapter / CONFIG).is_file() or not (adapter / WEIGHTS).is_file():
        raise PareError(f"{adapter} is no adapter directory of mlx-lm: it lacks {CONFIG} or {WEIGHTS}")
    found = read_json(adapter / CONFIG, "adapter config")
    kind, number = found.get("fine_tune_type", "lora"), found.get("num_layers")
    if kind == "dora":
        raise Unsupported(
            f"{adapter} is a DoRA adapter, which scales every row by its length: another one after a cut",
            "fuse it into the original (mlx_lm.fuse) and cut that",
        )
    if kind != "lora":
        raise Unsupported(
            f"{adapter} is of type {kind!r}: not added to the weights, but in their place",
            "fuse it into the original (mlx_lm.fuse) and cut that",
        )
    lora = found.get("lora_parameters")
    if not isinstance(number, int) or isinstance(number, bool) or not isinstance(lora, dict):
        raise PareError(f"{adapter / CONFIG} lacks num_layers or lora_parameters")
    if type(lora.get("rank")) is not int or lora["rank"] < 1:
        raise PareError(f"{adapter / CONFIG} has rank {lora.get('rank')!r}, expected a whole number from 1")
    for name in ("scale", "dropout"):  # mlx-lm loads no adapter without them
        value = lora.get(name)
        if type(value) not in (int, float) or not math.isfinite(value):
            raise PareError(f"{adapter / CONFIG} has {name} {value!r}, expected a number")
    keys = lora.get("keys")
    if keys is not None and not (isinstance(keys, list) and all(isinstance(key, str) for key in keys)):
        raise PareError(f"{adapter / CONFIG} has keys {str(keys)[:80]}, expected a list of names of modules")
    try:
        dump_json(found)
    except ValueError as error:
        raise PareError(f"{adapter / CONFIG} holds NaN or infinity, which is no JSON") from error
    return dict(found)


def _check_pairs(file: Path, arrays: Mapping[str, Any], rank: int) -> None:
    """Refuse arrays that mlx-lm cannot load, or would load and compute nonsense with.

    Args:
        file: where the arrays are from.
        arrays: by name: lora_a [columns, rank] and lora_b [rank, rows] of every matrix.
        rank: the rank in the config.

    Raises:
        PareError: one of a pair is missing, the rank is another, or values are no finite floats.
    """
    import mlx.core as mx

    for name, array in arrays.items():
        module, which = PART.fullmatch(name).groups()
        other = f"{module}.{'lora_b' if which == 'lora_a' else 'lora_a'}"
        if other not in arrays:
            raise PareError(f"{file} has {name} without {other}", "both are needed: train or download it again")
        found = array.shape[1 if which == "lora_a" else 0]
        if found != rank:
            raise PareError(f"{file}: {name} has rank {found}, {CONFIG} says {rank}", "take both files of one adapter")
        if not mx.issubdtype(array.dtype, mx.floating):
            raise PareError(f"{file}: {name} holds {array.dtype}, expected floats")
        if not mx.isfinite(array).all().item():
            raise PareError(f"{file}: {name} holds NaN or infinity", "its training went wrong: train it again")


class _Cut:
    """Maps the parent's tensors to those of a model that was cut from it."""

    def __init__(self, old: Architecture, new: Architecture, kept: Mapping[str, Any]):
        self.old, self.kept = old, kept
        self.tensors = {t.module: t for t in old.tensors() if t.name.endswith(".weight")}
        self.there = {t.module: t for t in new.tensors()}
        self.place = {layer["source"]: index for index, layer in enumerate(kept["layers"])}

    def arrays(self, file: Path, settings: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
        """Return what is left of the adapter's tensors, by new name, and the names of those whose layers are gone."""
        import mlx.core as mx

        read_header(file)  # bounded, checked
        there, tensors = mx.load(str(file)), {}
        for name, array in there.items():
            matched = PART.fullmatch(name)
            tensor = self.tensors.get(matched[1]) if matched else None
            if tensor is None or len(tensor.shape) != 2:
                raise Unsupported(
                    f"{file} holds {name[:80]}, which is no adapter of a matrix of {self.old.family.name}"
                )
            self.check_shape(name, matched[2], tensor, array)
            self.check_place(name, tensor, settings)
            tensors[name] = tensor
        _check_pairs(file, there, settings["lora_parameters"]["rank"])
        found, left_out = {}, []
        for name, array in there.items():
            tensor, which = tensors[name], PART.fullmatch(name)[2]
            if tensor.layer is not None and tensor.layer not in self.place:
                left_out.append(name)
                continue
            found[f"{self.renamed(tensor)}.{which}"] = self.part(which, tensor, array)
        return found, left_out

    def first(self, settings: Mapping[str, Any]) -> int:
        """The first layer of the parent to which mlx-lm gives adapters: the last num_layers get them; if 0, all."""
        number = settings["num_layers"]
        return max(0, len(self.old.layers) - number) if number > 0 else 0

    def check_place(self, name: str, tensor: Tensor, settings: Mapping[str, Any]) -> None:
        """Raise PareError if mlx-lm gives this matrix no adapter by these settings: it would refuse the file."""
        keys, module = settings["lora_parameters"].get("keys"), tensor.module
        if keys and module in keys:  # named in full
            return
        inside = "" if tensor.layer is None else module.removeprefix(self.old.block(tensor.layer))
        if not inside or tensor.layer < self.first(settings) or (keys is not None and inside not in keys):
            raise PareError(f"{name} has no place by num_layers and keys of {CONFIG}", "take both files of one adapter")

    def keys(self, keys: Sequence[str]) -> list[str]:
        """The keys for the new model. A key that names one module in full moves with its layer, or goes with it."""
        tensors = {key: self.tensors.get(key) for key in keys}
        gone = {key for key, t in tensors.items() if t and t.layer is not None and t.layer not in self.place}
        return [self.renamed(t) if (t := tensors[key]) else key for key in keys if key not in gone]

    def renamed(self, tensor: Tensor) -> str:
        """The name of the module in the new model. Raises Unsupported if the new model has no such module."""
        module = tensor.module
        if tensor.layer is not None:
            before, after = self.old.block(tensor.layer), self.old.block(self.place[tensor.layer])
            module = after + module.removeprefix(before)
        if module not in self.there:
            raise Unsupported(
                f"the cut model has no {module}: its layers differ and are stored in another way, or it lost that part",
                "fuse the adapter into the original (mlx_lm.fuse) and cut that",
            )
        return module

    def check_shape(self, name: str, which: str, tensor: Tensor, array: Any) -> None:
        """Raise PareError if the shape of an array does not suit the parent's matrix."""
        rows, columns = tensor.spec.dims
        dimension, axis = (columns, 0) if which == "lora_a" else (rows, 1)
        expected = length(dimension, self.old.layer_sizes(tensor.layer))
        if array.ndim != 2 or array.shape[axis] != expected:
            raise PareError(f"{name} has shape {list(array.shape)}, the parent means {expected} along axis {axis}")

    def part(self, which: str, tensor: Tensor, array: Any) -> Any:
        """Take what the kept columns leave of lora_a [columns, rank], or the kept rows of lora_b [rank, rows]."""
        import mlx.core as mx

        rows, columns = tensor.spec.dims
        dimension, axis = (columns, 0) if which == "lora_a" else (rows, 1)
        index = select(dimension, self.old.layer_sizes(tensor.layer), self.units(tensor.layer))
        return array if index is None else mx.take(array, mx.array(index), axis=axis)

    def units(self, layer: int | None) -> dict[str, list[int]]:
        """The units that survived on every axis, as indices of the parent."""
        found = {"hidden": self.kept["hidden"]}
        if layer is not None:
            there = self.kept["layers"][self.place[layer]]
            found |= {"ffn": there["ffn"], "kv_head": there["kv_head"]}
        return found


def _write(out: Path, arrays: Mapping[str, Any], settings: Mapping[str, Any]) -> None:
    import mlx.core as mx

    with created(out) as place:
        place.mkdir()
        mx.save_safetensors(str(place / WEIGHTS), dict(arrays))
        (place / CONFIG).write_bytes(dump_json(settings))
