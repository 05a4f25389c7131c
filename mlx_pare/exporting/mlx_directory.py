"""A model directory to hand on: packed by mlx-lm, or ready to be uploaded to the hub."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..arch import Architecture
from ..base import console
from ..base.errors import PareError
from ..base.plain_path import files_below
from ..gguf.quant_mixes import GROUP_OF
from ..model import finite
from ..model.checkpoint import Checkpoint
from ..model.directory import copy_tokenizer
from ..model.licence import licence_file
from ..options.values import GROUPS, PACKED_BITS, require
from ..reporting.card import card, run_of
from ..store.atomic import created, refuse_existing, require_room
from ..store.clone import clone
from ..store.manifest import Manifest
from ..tensors.packing import Packing

MORE_BITS = {2: 6, 3: 6, 4: 6, 5: 8, 6: 8}  # with --mixed, in the steps of mlx-lm's own recipes
OURS = ("survivors.json", "plan.json")


def mixed(arch: Architecture, bits: int, group_size: int) -> Callable[[str, Any], dict[str, Any]]:
    """Make a function that gives some modules more bits, as mlx_lm.convert takes it.

    Values and down_proj get more bits in the first and the last eighth of the layers and in every third layer between
    them, and so does the head. This follows mlx_lm/convert.py mixed_quant_predicate_builder (after Q4_K_M of
    llama.cpp), which knows other names than ours.

    Args:
        arch: the model.
        bits: of all other modules.
        group_size: of all modules.
    Returns:
        A function from module path and module to group_size, bits and mode.
    """
    count, high = len(arch.layers), MORE_BITS.get(bits, bits)

    def wants(layer: int | None, role: str) -> bool:
        if layer is None:
            return role == "lm_head"
        eighth = count // 8
        more = layer < eighth or layer >= 7 * count // 8 or (layer - eighth) % 3 == 2
        return more and GROUP_OF.get(role) in ("value", "down")

    rich = {t.module for t in arch.tensors() if wants(t.layer, t.spec.role)}
    return lambda path, _: {"group_size": group_size, "bits": high if path in rich else bits, "mode": "affine"}


def packed(model: Path, out: Path, bits: int, group_size: int = 64, mix: bool = False) -> dict[str, Any]:
    """Write a float model packed by mlx_lm.convert, with what is known of its origin.

    Args:
        model: model directory.
        out: directory to write; it must not exist.
        bits: of the packing.
        group_size: of the packing.
        mix: give some modules more bits; see ``mixed``.
    Returns:
        out, bytes, bits and modules_with_more (how many modules have other bits).
    Raises:
        UsageError: MLX has no packing of these bits or this group size.
        Refused: ``out`` exists.
        PareError: the model is packed already, damaged, or holds NaN or infinite weights.
    """
    from .. import lm

    checkpoint = Checkpoint(model)
    require("--bits", bits, PACKED_BITS)
    require("--group-size", group_size, GROUPS)
    if checkpoint.quantized:
        raise PareError(
            f"{model} is packed already, and packing it again would lose more than it must",
            "give `mlx-pare run` the --bits, which then solves the cut with error feedback",
        )
    refuse_existing(out)
    finite.require(checkpoint)
    if beside := checkpoint.beside():
        console.warn(
            f"mlx_lm.convert packs the language model alone: the {len(beside)} other tensors of this "
            f"{checkpoint.arch.parent.model_type} are left out. `mlx-pare run --bits {bits}` keeps them."
        )
    predicate = mixed(checkpoint.arch, bits, group_size) if mix else None
    with created(out) as place:
        lm.convert(model, place, Packing(bits, group_size), predicate)
        for name in OURS:
            if (model / name).is_file():
                shutil.copyfile(model / name, place / name)
        copy_tokenizer(checkpoint, place)  # byte for byte, in place of what transformers writes
        written = Checkpoint(place)
        (place / "README.md").write_text(card(place, model), "utf-8")
    config = written.config["quantization"]
    more = sum(isinstance(v, Mapping) and v.get("bits") != bits for v in config.values())
    return {"out": str(out), "bytes": written.nbytes(), "bits": bits, "modules_with_more": more}


def hub_ready(model: Path, out: Path) -> dict[str, Any]:
    """Write ``out``, a directory that is a repository of the hub: weights, tokenizer, card, survivors, licence.

    If the file system can clone files, the weights are clones, which share disk space until one is changed. Else they
    are copies. It returns out, files, bytes, and notes on what is missing. Raises Refused if ``out`` exists, PareError
    for a damaged model, or if the disk has no room for copies.
    """
    checkpoint, run = Checkpoint(model), run_of(model)
    _ = checkpoint.arch  # raises unless the model is whole and described
    refuse_existing(out)
    finite.require(checkpoint)
    parent = Path(Manifest.read(run / "manifest.json", "run manifest").model) if run else model
    licence, text, notes = licence_file(model, parent), card(model), []
    if licence is None:
        notes.append("there is no licence file in the original's directory: add the one it has on the hub")
    if "\nlicense: " not in text:
        notes.append("the card names no licence: write `license: ...` into its first lines")
    if "\nbase_model: " not in text:
        notes.append("the card names no base model: write `base_model: owner/name` into its first lines")
    with created(out) as place:
        place.mkdir()
        _weights(sorted({entry.file for entry in checkpoint.entries.values()}), place)
        copy_tokenizer(checkpoint, place)
        for name in ("config.json", *OURS, "model.safetensors.index.json"):
            if (model / name).is_file():
                shutil.copyfile(model / name, place / name)
        if licence:
            shutil.copyfile(licence, place / "LICENSE")
        (place / "README.md").write_text(text, "utf-8")
        (place / ".gitattributes").write_text("*.safetensors filter=lfs diff=lfs merge=lfs -text\n", "utf-8")
    sizes = {file.relative_to(out).as_posix(): file.stat().st_size for file in files_below(out)}
    for note in notes:
        console.say(f"note: {note}")
    return {"out": str(out), "files": sorted(sizes), "bytes": sum(sizes.values()), "notes": notes}


def _weights(files: Sequence[Path], to: Path) -> None:
    """Clone or copy files of weights into a directory. It never links them, because an edit of a link would change the
    original. Raises PareError if the disk has no room for what cannot be cloned."""
    copied = [file for file in files if not clone(file, to / file.name)]
    require_room(to, sum(file.stat().st_size for file in copied))
    for file in copied:
        shutil.copyfile(file, to / file.name)
