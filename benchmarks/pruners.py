"""What other pruners choose, in our streaming engine: Wanda-sp and FLAP, as CASIA-IVA-Lab/FLAP (3bb57db) codes them.

Their own code needs CUDA or heads of 128; the numbers it gave after small adaptations on the reference models are in
measured/pruners.csv. These functions give the same choices for any grouped-query model of ours, so that windows of text
can be compared one by one; quality.py prints both numbers side by side.

A "cut" here is, per (layer, part), the kept units and what is added to the matrix's output for those that are gone.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import mlx.core as mx
import numpy as np

from mlx_pare.arch import Architecture
from mlx_pare.evaluation.divergence import measure
from mlx_pare.model.checkpoint import Checkpoint
from mlx_pare.planning.candidate import PARTS
from mlx_pare.repair.output_projection import Site
from mlx_pare.stream import walk as stream
from mlx_pare.text.corpus import Rows

Cut = dict[tuple[int, str], tuple[np.ndarray, np.ndarray]]  # kept units, what is added to the output [out]


@dataclass(frozen=True)
class Unit:
    """Inputs of a unit of a part, its parameters, and how many there are."""

    inputs: int
    parameters: int
    count: int


def units(checkpoint: Checkpoint) -> dict[str, Unit]:
    """Of kv heads (with their query heads) and of ffn channels; all layers are alike."""
    arch, sizes = checkpoint.arch, checkpoint.arch.layer_sizes(0)
    hidden, width = arch.sizes["hidden"], sizes["group"] * sizes["head_dim"]
    return {
        "attention": Unit(width, 2 * hidden * (width + sizes["head_dim"]), sizes["kv_head"]),
        "ffn": Unit(1, 3 * hidden, sizes["ffn"]),
    }


def _paths(arch: Architecture, index: int) -> dict[str, str]:
    """The modules of a layer that write to the residual stream, by part."""
    return dict(zip(PARTS, (arch.path(index, role) for role in arch.writers(index)), strict=True))


class _Masks:
    """The observer that lets a model compute with a cut."""

    def __init__(self, checkpoint: Checkpoint, cut: Cut):
        self.arch, self.cut, self.units = checkpoint.arch, cut, units(checkpoint)

    def enter(self, index, block, mask) -> None:
        for part, path in _paths(self.arch, index).items():
            if (index, part) in self.cut:
                site = Site.put(block, path)
                kept, added = self.cut[index, part]
                site.new = _masked(site, kept, self.units[part].inputs), site.bias + mx.array(added.astype(np.float32))

    def seen(self, *_) -> None: ...
    def leave(self, *_) -> None: ...
    def pending(self) -> list[mx.array]:
        return []


def _masked(site: Site, kept: np.ndarray, inputs: int) -> mx.array:
    weight = np.array(site.own())
    columns = np.zeros(weight.shape[1], bool)
    columns[(np.asarray(kept)[:, None] * inputs + np.arange(inputs)).reshape(-1)] = True
    return mx.array(np.where(columns, weight, 0))


def windows(model: Path, cut: Cut, rows: Rows) -> np.ndarray:
    """Mean NLL [rows] of every window of the model with a cut."""
    checkpoint = Checkpoint(model)
    nll = measure(rows, stream.walk(model, rows, _Masks(checkpoint, cut)))["nll"]
    return nll.reshape(rows.count, -1).mean(axis=1)


class _Sequential:
    """Leads a pruned stream along the dense one; ``choose(part, inputs, weight)`` says what is
    kept. ``own``: whether it looks at the pruned stream's inputs (Wanda-sp) or at the dense one's (FLAP)."""

    def __init__(self, checkpoint: Checkpoint, choose, own: bool):
        self.arch, self.choose, self.own, self.units = checkpoint.arch, choose, own, units(checkpoint)
        self.state, self.cut = None, {}

    def enter(self, index, block, mask) -> None:
        self.sites = {part: Site.put(block, path) for part, path in _paths(self.arch, index).items()}
        for site in self.sites.values():
            site.remembering = not self.own

    def seen(self, *_) -> None: ...
    def leave(self, *_) -> None: ...
    def pending(self) -> list[mx.array]:
        return [x for site in self.sites.values() for x in site.inputs]

    def again(self, index, before, after, run) -> None:
        state = before if self.state is None else self.state
        if self.own:  # both parts are looked at before either is cut
            for site in self.sites.values():
                site.remembering = True
            run(state)
        for part, site in self.sites.items():
            x = np.concatenate([np.array(a.astype(mx.float32)).reshape(-1, a.shape[-1]) for a in site.inputs])
            site.inputs, site.remembering = [], False
            kept, added = self.cut[index, part] = self.choose(part, x.astype(np.float64), np.array(site.own()))
            if self.own:
                site.new = _masked(site, kept, self.units[part].inputs), site.bias + mx.array(added.astype(np.float32))
        if self.own:
            self.state = run(state)


def wanda_sp(model: Path, rows: Rows, keep: dict[str, int]) -> Cut:
    """|W_ij| * ||x_j||_2, mean over the outputs i, summed over a unit; as many units of each part in every layer. The
    inputs are those of the pruned model. An et al. 2024 (arXiv 2312.11983) after Sun et al. 2023."""
    checkpoint = Checkpoint(model)
    of = units(checkpoint)

    def choose(part: str, x: np.ndarray, weight: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        scores = np.abs(weight).mean(axis=0) * np.sqrt(np.square(x).sum(axis=0))
        return _best(scores.reshape(-1, of[part].inputs).sum(axis=1), keep[part]), np.zeros(len(weight))

    seen = _Sequential(checkpoint, choose, own=True)
    stream.walk(model, rows, seen)
    return seen.cut


def flap(model: Path, rows: Rows, share: float, alike: bool) -> Cut:
    """FLAP (An et al. 2024), WIFV: variance of an input times the squares of its weights, on the dense stream, with the
    mean of what is gone as a bias. ``share`` of the parameters that is kept: of every part (``alike``, UL-UM), or of
    all by standardized scores (AL-AM)."""
    checkpoint = Checkpoint(model)
    of, scores, means = units(checkpoint), {}, {}

    def look(part: str, x: np.ndarray, weight: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        own = x.var(axis=0) * np.square(weight).sum(axis=0)
        layer = len(scores) // 2
        scores[layer, part], means[layer, part] = own, (x.mean(axis=0), weight)
        return np.arange(of[part].count), np.zeros(len(weight))

    stream.walk(model, rows, _Sequential(checkpoint, look, own=False))
    judged = {key: _standard(key[1], own, of[key[1]].inputs, alike) for key, own in scores.items()}
    kept = _each(judged, of, share) if alike else _together(judged, of, share)
    cut: Cut = {}
    for key, units_kept in kept.items():
        mean, weight = means[key]
        gone = np.ones(len(mean), bool)
        inputs = of[key[1]].inputs
        gone[(units_kept[:, None] * inputs + np.arange(inputs)).reshape(-1)] = False
        cut[key] = units_kept, weight[:, gone] @ mean[gone]
    return cut


def _standard(part: str, own: np.ndarray, inputs: int, alike: bool) -> np.ndarray:
    """Scores of units; of attention they are squared first, as FLAP does."""
    own = np.square(own) if part == "attention" else own
    if not alike:
        own = (own - own.mean()) / own.std(ddof=1)
    return own.reshape(-1, inputs).mean(axis=1)


def _each(judged: dict, of: dict[str, Unit], share: float) -> dict:
    return {key: _best(own, round(share * of[key[1]].count)) for key, own in judged.items()}


def _together(judged: dict, of: dict[str, Unit], share: float) -> dict:
    """The units with the highest scores of all layers and parts until so many parameters are reached."""
    every = [(score, key, unit) for key, own in judged.items() for unit, score in enumerate(own)]
    every.sort(key=lambda entry: -entry[0])
    left = share * sum(of[part].parameters * of[part].count for _, part in judged)
    kept = {key: [] for key in judged}
    for _, key, unit in every:
        if left <= 0:
            break
        kept[key].append(unit)
        left -= of[key[1]].parameters
    return {key: np.array(sorted(chosen), int) for key, chosen in kept.items()}


def _best(scores: np.ndarray, count: int) -> np.ndarray:
    return np.sort(np.argsort(-scores, kind="stable")[:count])
