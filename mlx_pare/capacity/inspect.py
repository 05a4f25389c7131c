"""inspect: what a model contains, what can be cut, which runtimes load it. Reads headers only."""

from __future__ import annotations

from math import prod
from os import PathLike
from typing import Any

from ..arch import Architecture, uneven_types, why_uniform
from ..base.errors import PareError
from ..gguf import uneven_layers
from ..gguf.architectures import runtimes_of, target_of
from ..model.footprint import active_parameters, parameters, window_of
from ..pruning.reach import AXES
from .form import Form
from .subject import Subject, open_subject


def inspect(model: str | PathLike[str]) -> dict[str, Any]:
    """Collect facts of a model, counted from its tensors; ``model`` is anything that `fit` takes.

    A size that differs between layers is a list; a size that the model lacks is None. For an unknown model type only
    model, origin, stored, notes and bytes are given. Raises PareError if the model is not what its config says.
    """
    subject = open_subject(str(model), Form())
    arch = subject.arch
    found = {"model": subject.name, "origin": subject.origin, "stored": subject.described}
    known = _shape(arch, subject) if arch else {"notes": list(subject.notes)}
    return found | known | {"bytes": {"total": subject.weights.nbytes}}


def _shape(arch: Architecture, subject: Subject) -> dict[str, Any]:
    family, config = arch.family, arch.config
    kinds: dict[str, int] = {}
    for layer in arch.layers:
        kinds[layer.kind] = kinds.get(layer.kind, 0) + 1
    packing = subject.checkpoint.quantization if subject.checkpoint else None
    cuttable = arch.cut_axes if arch.cuttable else []
    others = {*AXES} - {*cuttable, *(() if arch.uses("expert") else ("expert",))}
    fixed = {axis: arch.why_fixed(axis) for axis in AXES if arch.cuttable and axis in others}
    return {
        "model_type": config["model_type"],
        "part_of": arch.parent.model_type if arch.parent else None,
        "family": family.name,
        "layers": len(arch.layers),
        "layer_kinds": kinds,
        "layer_groups": [_group(arch, kind) for kind in kinds],
        "hidden": arch.sizes["hidden"],
        "vocab": arch.sizes["vocab"],
        "ffn": _size(arch, "ffn"),
        "experts": _size(arch, "expert"),
        "expert_ffn": _size(arch, "expert_ffn"),
        "experts_per_token": max((m.sizes.get("active", 0) for m in arch.layers), default=0) or None,
        "q_heads": _size(arch, "kv_head", "group"),
        "kv_heads": _size(arch, "kv_head"),
        "head_dim": _size(arch, "head_dim"),
        "tied_embedding": arch.tied,
        "parameters": parameters(arch),
        "active_parameters": active_parameters(arch),
        "quantization": packing.as_config() if packing else None,
        "cuttable": {axis: "exact" if axis in family.exact else "approximate" for axis in cuttable},
        "not_cuttable": fixed,
        "why_not_cuttable": None if cuttable else _why_not(arch),
        "leaves_as": _other_types(arch),
        "runtimes": runtimes_of(arch),
        "runtime_reasons": _reasons(arch, subject),
        "runtimes_per_layer": _per_layer(arch) if arch.cuttable else None,
        "notes": list(subject.notes),
    }


def _other_types(arch: Architecture) -> list[str]:
    """Return the model types that a cut may leave as, beside its own."""
    exits = {exit_.model_type for exit_ in arch.family.exits if not arch.parent}
    return sorted(exits | set(uneven_types(arch) if arch.cuttable else ()))


def _per_layer(arch: Architecture) -> dict[str, Any]:
    """Return what loads the model if its layers are cut to different widths, and why a runtime does not."""
    types = uneven_types(arch)
    why = why_uniform(arch) if not types else uneven_layers.why_not(arch)
    there = uneven_layers.architecture(arch) if types and not uneven_layers.why_not(arch) else None
    return {"mlx-lm": types, "llama.cpp": there, "why_not": why}


def _why_not(arch: Architecture) -> str:
    return f"no one has described yet how to cut {arch.family.name}"


GROUP_SIZES = {"q_heads": ("kv_head", "group"), "kv_heads": ("kv_head",), "head_dim": ("head_dim",), "ffn": ("ffn",),
               "experts": ("expert",), "expert_ffn": ("expert_ffn",)}  # fmt: skip


def _group(arch: Architecture, kind: str) -> dict[str, Any]:
    """Return the sizes of the layers of one kind: a number, a list if they differ, None if they lack it."""
    layers, used = [layer for layer in arch.layers if layer.kind == kind], arch.axes(kind)
    found: dict[str, Any] = {"kind": kind, "layers": len(layers)}
    for name, axes in GROUP_SIZES.items():
        axes = ("q_head",) if name == "q_heads" and "q_head" in layers[0].sizes and "kv_head" not in used else axes
        there = all(axis in layer.sizes for axis in axes for layer in layers) and used & {*axes}
        sizes = sorted({prod(layer.sizes[axis] for axis in axes) for layer in layers}) if there else []
        found[name] = sizes[0] if len(sizes) == 1 else sizes or None
    window = window_of(arch, 0) if layers[0].mixer.windowed else 0
    return {**found, "window": window or None}


def _reasons(arch: Architecture, subject: Subject) -> dict[str, str]:
    """Return runtime -> why it does not load the model; a directory of weights may say more than the config."""
    there, kind = runtimes_of(arch), arch.config["model_type"]
    lacks = f"it has no architecture for {kind}"
    if arch.family.result:
        lacks = "layers differ in width, and it has no class for that"
    found = {name: lacks for name, what in there.items() if not what}
    if subject.checkpoint and arch.cuttable and there["llama.cpp"]:
        try:
            target_of(subject.checkpoint)
        except PareError as error:
            found["llama.cpp"] = error.problem
    return found


def _size(arch: Architecture, *axes: str) -> int | list[int] | None:
    """Return the size of an axis, or the product of several: a list if layers differ, None if no layer has it."""
    if not all(arch.uses(axis) for axis in axes):
        return None
    there = (layer.sizes for layer in arch.layers if all(axis in layer.sizes for axis in axes))
    sizes = sorted({prod(sizes[axis] for axis in axes) for sizes in there})
    return sizes[0] if len(sizes) == 1 else sizes or None
