"""calibrate: the blocks of a model through the observers -> Stats. Resumable after every block."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx

from . import stream
from .arch import Architecture, require_cuttable
from .artifacts import Arrays, dump_json, replace_file
from .checkpoint import Checkpoint
from .corpus import Rows
from .errors import Refused
from .observers import BlockCosine, Moments, Tap, replace_module

# site -> (role of the module in the family's table, which side of it)
SITES = {
    "ffn": ("down_proj", "input"),
    "attention": ("o_proj", "input"),
    "attn_ln": ("attn_norm", "output"),
    "ffn_ln": ("ffn_norm", "output"),
}
SAVE_EVERY_S = 30.0


class Statistics:
    """The observer of calibration. After each block its sums go to ``directory``; hidden states from time to time."""

    def __init__(self, arch: Architecture, directory: Path, save_every_s: float):
        self.arch, self.directory, self.save_every_s = arch, directory, save_every_s
        self.moments: dict[str, Moments] = {}
        self.cosine = BlockCosine()
        self._last_save = time.monotonic()

    def enter(self, index: int, block: Any, mask: Callable[[], mx.array]) -> None:
        self.moments, self.cosine = {}, BlockCosine()
        for site, (role, side) in SITES.items():
            seen = self.moments[site] = Moments()
            replace_module(block, self.arch.path(index, role), lambda m, seen=seen, side=side: Tap(m, seen, mask, side))

    def seen(self, index: int, before: mx.array, after: mx.array, mask: mx.array) -> None:
        self.cosine.update(before, after, mask)

    def pending(self) -> list[mx.array]:
        return [a for m in (*self.moments.values(), self.cosine) for a in m.arrays().values()]

    def leave(self, index: int, hidden: mx.array) -> None:
        arrays = {f"{site}.{name}": a for site, m in self.moments.items() for name, a in m.arrays().items()}
        arrays |= {f"block.{name}": a for name, a in self.cosine.arrays().items()}
        Arrays(arrays, {}).save(self.directory / f"block-{index:04d}.safetensors")
        if time.monotonic() - self._last_save >= self.save_every_s:
            self._save_hidden(index + 1, hidden)

    def _save_hidden(self, start: int, hidden: mx.array) -> None:
        old = sorted(self.directory.glob("hidden-*.safetensors"))
        Arrays({"hidden": hidden}, {}).save(self.directory / f"hidden-{start:04d}.safetensors")
        for file in old:
            file.unlink()
        self._last_save = time.monotonic()


def calibrate(
    model: Path, rows: Rows, directory: Path, memory_cap: int | None = None, save_every_s: float = SAVE_EVERY_S
) -> Path:
    """Stream ``rows`` through ``model`` and write ``directory``/stats.safetensors; returns its path.

    Arrays, per layer i: ``{i}.{site}.{name}`` for the sites ffn [ffn] and attention [q_head*head_dim] (inputs of
    down_proj and o_proj), attn_ln and ffn_ln [hidden] (outputs of the norms), with the names of observers.Moments; and
    ``{i}.block.cosine`` []. A directory with the blocks of an interrupted call is continued: same bytes in the end.
    Raises Unsupported for a model that cannot be cut, Refused when the estimate of memory exceeds the cap.
    """
    checkpoint = Checkpoint(model)
    arch = checkpoint.arch
    require_cuttable(arch)
    stream.check_memory(checkpoint, rows, memory_cap)
    directory.mkdir(parents=True, exist_ok=True)
    for stale in directory.glob("*.tmp*"):
        stale.unlink()
    _same_inputs(directory, {"model": checkpoint.identity(), "data": rows.digest()})
    if len(list(directory.glob("block-*.safetensors"))) < len(arch.layers):
        stream.walk(model, rows, Statistics(arch, directory, save_every_s), _resume(directory), "calibrate: block")
    return _merge(checkpoint, rows, directory)


def _same_inputs(directory: Path, inputs: dict[str, str]) -> None:
    """Blocks of another model or other rows must not be mixed in. Raises Refused when they lie there."""
    note = directory / "inputs.json"
    if note.exists() and json.loads(note.read_text()) != inputs:
        raise Refused(f"{directory} holds statistics begun with another model or other text", "remove it first")
    replace_file(note, dump_json(inputs))


def _resume(directory: Path) -> stream.Resume | None:
    """Where an interrupted walk goes on: at the last hidden states, if all blocks before them are there."""
    for file in sorted(directory.glob("hidden-*.safetensors"), reverse=True):
        start = int(file.stem.split("-")[1])
        if all((directory / f"block-{i:04d}.safetensors").exists() for i in range(start)):
            return stream.Resume(start, mx.load(str(file))["hidden"])
    return None


def _merge(checkpoint: Checkpoint, rows: Rows, directory: Path) -> Path:
    arrays: dict[str, mx.array] = {}
    blocks = [directory / f"block-{i:04d}.safetensors" for i in range(len(checkpoint.arch.layers))]
    for index, file in enumerate(blocks):
        arrays |= {f"{index}.{name}": array for name, array in mx.load(str(file)).items()}
    path = directory / "stats.safetensors"
    about = {"tokens": rows.total, "rows": rows.count, "data": rows.digest(), "layers": len(blocks)}
    about["model"] = checkpoint.identity()
    Arrays(arrays, about).save(path)
    for file in [*blocks, *directory.glob("hidden-*.safetensors"), directory / "inputs.json"]:
        file.unlink()
    return path
