"""LoRA adapters of the original, carried over to a model that was cut from it.

An adapter adds scale * (x @ lora_a) @ lora_b to what a matrix makes of x. Of a matrix that lost rows and columns, what
is left of that sum is the same sum with those rows of lora_a and those columns of lora_b that survived: exact, as the
cut itself is, where the matrix was cut and not solved anew.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .arch import Architecture, Tensor
from .arch.axes import length, select
from .artifacts import dump_json, survivors
from .checkpoint import Checkpoint, read_header, read_json
from .errors import PareError, Refused, Unsupported

CONFIG, WEIGHTS = "adapter_config.json", "adapters.safetensors"  # as mlx-lm names them
PART = re.compile(r"(.+)\.(lora_a|lora_b)")


def carry(adapter: Path, parent: Path, model: Path, out: Path) -> dict[str, Any]:
    """Write to ``out`` the adapter directory of mlx-lm that does for ``model`` what ``adapter`` does for ``parent``.

    ``model`` was cut from ``parent`` (its survivors.json says so). Returns out, tensors, layers (of the new model that
    have an adapter) and left_out (tensors of layers that are gone). Raises Refused when ``out`` exists or the models do
    not belong together, Unsupported for adapters that cannot be cut, with the reason, PareError for what is damaged.
    """
    if out.exists():
        raise Refused(f"{out} exists already", "choose another name, or move it away")
    settings = _settings(adapter)
    old, new = Checkpoint(parent), Checkpoint(model)
    if not (model / "survivors.json").exists():
        raise Refused(f"{model} has no survivors.json, which says what it was cut from", "take one that mlx-pare cut")
    kept = survivors(model / "survivors.json")
    if kept["source_identity"] != old.identity():
        raise Refused(f"{model} was not cut from {parent}", "give the model that it was cut from with --parent")
    cut = _Cut(old.arch, new.arch, kept)
    arrays, left_out = cut.arrays(adapter / WEIGHTS)
    if not arrays:
        raise Unsupported(f"no layer with an adapter of {adapter} is left in {model}")
    first = len(old.arch.layers) - settings["num_layers"] if settings["num_layers"] > 0 else 0
    settings["num_layers"] = sum(layer["source"] >= first for layer in kept["layers"])
    settings["model"] = str(model)
    _write(out, arrays, settings)
    layers = sorted({int(n) for name in arrays for n in re.findall(r"\.(\d+)\.", name)[:1]})
    return {"out": str(out), "tensors": len(arrays), "layers": layers, "left_out": left_out}


def _settings(adapter: Path) -> dict[str, Any]:
    """The adapter's configuration. Raises Unsupported for kinds that cannot be cut."""
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
    if not isinstance(number, int) or isinstance(number, bool) or not isinstance(found.get("lora_parameters"), dict):
        raise PareError(f"{adapter / CONFIG} lacks num_layers or lora_parameters")
    return dict(found)


class _Cut:
    """The way from the parent's tensors to those of a model that was cut from it."""

    def __init__(self, old: Architecture, new: Architecture, kept: Mapping[str, Any]):
        self.old, self.kept = old, kept
        self.tensors = {t.module: t for t in old.tensors() if t.name.endswith(".weight")}
        self.there = {t.module: t for t in new.tensors()}
        self.place = {layer["source"]: index for index, layer in enumerate(kept["layers"])}

    def arrays(self, file: Path) -> tuple[dict[str, Any], list[str]]:
        """(what is left of every tensor of the adapter, by its new name; names of those of layers that are gone)."""
        import mlx.core as mx

        read_header(file)  # bounded, checked
        found, left_out = {}, []
        for name, array in mx.load(str(file)).items():
            matched = PART.fullmatch(name)
            tensor = self.tensors.get(matched[1]) if matched else None
            if tensor is None or len(tensor.shape) != 2:
                raise Unsupported(
                    f"{file} holds {name[:80]}, which is no adapter of a matrix of {self.old.family.name}"
                )
            if tensor.layer is not None and tensor.layer not in self.place:
                left_out.append(name)
                continue
            found[f"{self.renamed(tensor)}.{matched[2]}"] = self.part(name, matched[2], tensor, array)
        return found, left_out

    def renamed(self, tensor: Tensor) -> str:
        """The module in the new model. Raises Unsupported where it has no such one."""
        module = tensor.module
        if tensor.layer is not None:
            stem = self.old.family.prefix
            before, after = stem.format(layer=tensor.layer), stem.format(layer=self.place[tensor.layer])
            module = after + module.removeprefix(before)
        if module not in self.there:
            raise Unsupported(
                f"the cut model has no {module}: its layers differ and are stored in another way, or it lost that part",
                "fuse the adapter into the original (mlx_lm.fuse) and cut that",
            )
        return module

    def part(self, name: str, which: str, tensor: Tensor, array: Any) -> Any:
        """lora_a (columns, rank) by the columns that are left, lora_b (rank, rows) by the rows."""
        import mlx.core as mx

        rows, columns = tensor.spec.dims
        dimension, axis = (columns, 0) if which == "lora_a" else (rows, 1)
        sizes = self.old.layer_sizes(tensor.layer)
        expected = length(dimension, sizes)
        if array.ndim != 2 or array.shape[axis] != expected:
            raise PareError(f"{name} has shape {list(array.shape)}, the parent means {expected} along axis {axis}")
        index = select(dimension, sizes, self.units(tensor.layer))
        return array if index is None else mx.take(array, mx.array(index), axis=axis)

    def units(self, layer: int | None) -> dict[str, list[int]]:
        """What survived on every axis, in indices of the parent."""
        found = {"hidden": self.kept["hidden"]}
        if layer is not None:
            there = self.kept["layers"][self.place[layer]]
            found |= {"ffn": there["ffn"], "kv_head": there["kv_head"]}
        return found


def _write(out: Path, arrays: Mapping[str, Any], settings: Mapping[str, Any]) -> None:
    import mlx.core as mx

    partial = out.with_name(f".{out.name}.part")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        mx.save_safetensors(str(partial / WEIGHTS), dict(arrays))
        (partial / CONFIG).write_bytes(dump_json(json.loads(json.dumps(settings, default=str))))
        partial.rename(out)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
