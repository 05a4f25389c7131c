"""A model directory as something to hand on: packed by mlx-lm, or ready to be uploaded to the hub."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from . import console, finite
from .arch import Architecture
from .card import card, run_of
from .checkpoint import Checkpoint
from .errors import PareError, Refused, UsageError
from .fit.gguf_mix import GROUP_OF
from .licence import licence_file
from .packing import BITS, Packing
from .rundir import Manifest
from .shards import copy_tokenizer, finish, partial_directory

MORE_BITS = {2: 6, 3: 6, 4: 6, 5: 8, 6: 8}  # of --mixed, as mlx-lm's own recipes go on
OURS = ("survivors.json", "plan.json")


def mixed(arch: Architecture, bits: int, group_size: int) -> Callable[[str, Any], dict[str, Any]]:
    """module path -> packing, as mlx_lm.convert takes it: more bits for values and down_proj in the first and the last
    eighth of the layers and every third between them, and for the head (mlx_lm/convert.py
    mixed_quant_predicate_builder, which knows other names than ours; after Q4_K_M of llama.cpp)."""
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
    """Write a float model packed to ``out``, by mlx_lm.convert, with what is known of its origin beside it; ``mix``:
    see ``mixed``. Returns out, bytes, bits and, with ``mix``, how many modules have more of them.

    Raises Refused when ``out`` exists, UsageError for bits that there are not, PareError for a model that is packed.
    """
    from . import lm

    checkpoint = Checkpoint(model)
    if bits not in BITS:
        raise UsageError(f"MLX has no packing of {bits} bits", f"choose one of {', '.join(map(str, sorted(BITS)))}")
    if checkpoint.quantized:
        raise PareError(
            f"{model} is packed already, and packing it again would lose more than it must",
            "give `mlx-pare run` the --bits, which then solves the cut with error feedback",
        )
    _refuse_existing(out)
    finite.require(checkpoint)
    predicate = mixed(checkpoint.arch, bits, group_size) if mix else None
    partial = partial_directory(out)
    partial.rmdir()  # mlx-lm makes it
    try:
        lm.convert(model, partial, Packing(bits, group_size), predicate)
        for name in OURS:
            if (model / name).is_file():
                shutil.copyfile(model / name, partial / name)
        copy_tokenizer(checkpoint, partial)  # byte for byte, in place of what transformers makes of it
        written = Checkpoint(partial)
        (partial / "README.md").write_text(card(partial, model), "utf-8")
        finish(partial, out)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    config = written.config["quantization"]
    more = sum(isinstance(v, Mapping) and v.get("bits") != bits for v in config.values())
    return {"out": str(out), "bytes": written.nbytes(), "bits": bits, "modules_with_more": more}


def hub_ready(model: Path, out: Path) -> dict[str, Any]:
    """Write ``out``, a directory that is a repository of the hub: weights, tokenizer, card, survivors, licence. Weights
    are linked where the disk can, else copied. Returns out, files, bytes, and notes on what is missing.

    Raises Refused when ``out`` exists, PareError for a damaged model.
    """
    checkpoint, run = Checkpoint(model), run_of(model)
    _ = checkpoint.arch  # whole, and described
    _refuse_existing(out)
    finite.require(checkpoint)
    parent = Path(Manifest.read(run / "manifest.json", "run manifest").model) if run else model
    licence, text, notes = licence_file(model, parent), card(model), []
    if licence is None:
        notes.append("there is no licence file in the original's directory: add the one it has on the hub")
    if "\nlicense: " not in text:
        notes.append("the card names no licence: write `license: ...` into its first lines")
    if "\nbase_model: " not in text:
        notes.append("the card names no base model: write `base_model: owner/name` into its first lines")
    partial = partial_directory(out)
    weights = sorted({entry.file for entry in checkpoint.entries.values()})
    index = model / "model.safetensors.index.json"
    beside = [model / "config.json", *checkpoint.tokenizer_files(), *(model / n for n in OURS), index]
    for file in weights:
        _link(file, partial / file.name)
    for file in (f for f in beside if f.is_file()):
        shutil.copyfile(file, partial / file.name)
    if licence:
        shutil.copyfile(licence, partial / "LICENSE")
    (partial / "README.md").write_text(text, "utf-8")
    (partial / ".gitattributes").write_text("*.safetensors filter=lfs diff=lfs merge=lfs -text\n", "utf-8")
    finish(partial, out)
    files = sorted(file.name for file in out.iterdir())
    for note in notes:
        console.say(f"note: {note}")
    return {"out": str(out), "files": files, "bytes": sum((out / f).stat().st_size for f in files), "notes": notes}


def _link(file: Path, to: Path) -> None:
    """A second name for the same bytes; another file system, or a link, gets a copy."""
    try:
        if file.is_symlink():
            raise OSError("its target may go")
        os.link(file, to)
    except OSError:
        shutil.copyfile(file, to)


def _refuse_existing(out: Path) -> None:
    if out.exists():
        raise Refused(f"{out} exists already", "choose another name, or move it away")
