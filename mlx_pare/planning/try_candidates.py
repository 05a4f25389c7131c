"""Many cuts of one model tried side by side: one walk measures the KL divergence of each and writes nothing.

The dense stream carries calibration and held-out rows. Every candidate has another stream, over the held-out rows. If a
candidate narrows a part of a block (attention, ffn), the first units in greedy OBS order on the calibration rows are
removed. The matrix behind them is solved again so that it gives what the dense one gave (repair/least_squares.py). So a
candidate is repaired as well as possible without knowing its losses in earlier blocks. Candidates with the same width
share that work, and each weight is read once for all of them. A stream is given up as soon as its squared error reaches
LOST times the square of the dense stream.

Unlike this, reconstruct also compensates the errors of earlier blocks, one plan at a time.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from .. import lm
from ..arch import Architecture
from ..base.errors import Refused
from ..evaluation import divergence
from ..model.checkpoint import Checkpoint
from ..repair.elimination import Removal
from ..repair.output_projection import Site, inputs_of_writers, solve_costs
from ..stream import memory, walk as stream
from ..stream.taps import replace_module
from ..tensors.packed import pack, packed_so, stored_dtype
from ..tensors.packing import Packing
from ..text.corpus import Extent, Rows
from .candidate import PARTS, Candidate, Curve, Curves, Width, whole

TINY = 1e-30
MOST_WIDTHS = 33  # of one ffn among all candidates, at most (LEVELS of planning/per_layer.py, and 0)
LOST = 2.0  # squared error of a stream over the square of the dense one, that of an unrelated stream: it is given up


@dataclass
class Tried:
    """``kl`` of each candidate, in nats per token, infinite if it was given up. ``curves`` of every part that was
    narrowed, or of all parts, and those that were given."""

    kl: list[float]
    curves: Curves = field(default_factory=dict)


def try_out(
    model: Path,
    candidates: Sequence[Candidate],
    calibration: Rows,
    held: Rows,
    curves: Mapping[tuple[int, str], Curve] | None = None,
    group_size: int = 64,
    memory_cap: int | None = None,
    lost: float | None = None,
) -> Tried:
    """Measure how much each candidate loses on ``held`` rows, without writing a model.

    As many candidates go side by side as the memory holds. The others take further walks.

    Args:
        model: model directory.
        candidates: widths per layer; may be empty if only the curves are wanted.
        calibration: rows that repair the cuts, int32 [rows, tokens]; may be empty if nothing is narrowed.
        held: rows on which the KL divergence to the original is measured, as long as the ``calibration`` rows.
        curves: of an earlier call, whose orders are then used; None: the curve of every part of every layer is found.
        group_size: of parts that the candidates pack.
        memory_cap: bytes that may be used; None: the memory that is free.
        lost: squared error over that of the dense stream at which a candidate is given up; None: LOST.
    Returns:
        KL divergence of each candidate, in nats per token, and the curves.
    Raises:
        Refused: the estimate of memory exceeds the cap even for a single candidate.
        PareError: the rows differ in length, or the model computes numbers that are not finite.
    """
    checkpoint = Checkpoint(model)
    most, found = affordable(checkpoint, calibration, held, max(1, len(candidates)), memory_cap), Tried([], {})
    least = {} if curves is None else _least(checkpoint.arch, candidates)
    for start in range(0, max(1, len(candidates)), most):
        known = curves if start == 0 else found.curves
        some = _walk(checkpoint, candidates[start : start + most], calibration, held, known, least, group_size, lost)
        found = Tried(found.kl + some.kl, some.curves)
    return found


def affordable(checkpoint: Checkpoint, calibration: Rows, held: Rows, count: int, cap: int | None) -> int:
    """Find how many candidates can be tried side by side: ``count``, halved (and rounded up) until the memory suffices.

    Args:
        checkpoint: the model.
        calibration: rows that repair the cuts, int32 [rows, tokens].
        held: rows on which the KL divergence is measured, as long as the others.
        count: number of candidates.
        cap: bytes that may be used; None: the memory that is free.
    Returns:
        A number from 1 to ``count``.
    Raises:
        Refused: not even one candidate can be tried.
    """
    while count > 1:
        try:
            check_memory(checkpoint, calibration, held, count, cap)
            return count
        except Refused:
            count = (count + 1) // 2
    check_memory(checkpoint, calibration, held, 1, cap)
    return 1


def _walk(
    checkpoint: Checkpoint,
    candidates: Sequence[Candidate],
    calibration: Rows,
    held: Rows,
    curves: Mapping[tuple[int, str], Curve] | None,
    least: Mapping[tuple[int, str], int],
    group_size: int,
    lost: float | None,
) -> Tried:
    """Measure candidates that are tried side by side."""
    rows = calibration.joined(held)
    side_by_side = _SideBySide(
        checkpoint.arch, candidates, rows, calibration.count, curves, least, group_size, LOST if lost is None else lost
    )
    dense = stream.walk(checkpoint.path, rows, side_by_side, what=f"try {len(candidates)}: block")
    reference = dense.of(dense.hidden[calibration.count :])
    found = [state if isinstance(state, float) else 0.0 for state in side_by_side.states]
    made = {i: state for i, state in enumerate(side_by_side.states) if isinstance(state, mx.array)}
    kls = divergence.mean_kl(held, [dense.norm(state) for state in made.values()], reference)
    for i, kl in zip(made, kls, strict=True):
        found[i] = kl
    return Tried([kl if math.isfinite(kl) else math.inf for kl in found], side_by_side.curves)


def _least(arch: Architecture, candidates: Sequence[Candidate]) -> dict[tuple[int, str], int]:
    """Return the fewest units that any candidate keeps of every part that one narrows: no order has to go further."""
    full = whole(arch)
    counts = {(i, part): _narrowed(candidates, i, part, full) for i in range(len(full)) for part in PARTS}
    return {key: min(found) for key, found in counts.items() if found}


def _narrowed(candidates: Sequence[Candidate], index: int, part: str, full: Candidate) -> set[int]:
    kept = {candidate[index].units(part) for candidate in candidates if candidate[index] is not None}
    return kept - {0, full[index].units(part)}


def check_memory(
    checkpoint: Checkpoint, calibration: Rows | Extent, held: Rows | Extent, count: int, cap: int | None
) -> int:
    """Estimate the memory that candidates take side by side.

    Args:
        checkpoint: the model.
        calibration: rows that repair the cuts, or their extent.
        held: rows on which the KL divergence is measured, or their extent.
        count: number of candidates.
        cap: bytes that may be used; None: the memory that is free.
    Returns:
        The estimate in bytes.
    Raises:
        Refused: the estimate exceeds ``cap``.
    """
    value, sizes, rows = memory.STATE_BYTES, checkpoint.arch.layer_sizes(0), calibration.joined(held)
    attention, ffn = inputs_of_writers(checkpoint.arch)
    streams = (count + 1) * held.count * held.length * sizes["hidden"] * value
    inputs = rows.count * rows.length * (ffn + attention) * value
    solved = max(each.nbytes for each in solve_costs(checkpoint, calibration.total)) if calibration.count else 0
    widths = min(count, sizes["kv_head"]) * attention
    widths += min(count, MOST_WIDTHS) * ffn  # each has its own matrix while its block is in memory
    solved += 4 * sizes["hidden"] * widths
    return memory.check_memory(checkpoint, rows, cap, streams + inputs + solved, "; or leave out trials: --widths even")


class _SideBySide(stream.Observer):
    """The observer of a walk of the dense model that leads all candidates along.

    The state of a candidate is None while its stream is the dense one. Then it is the hidden states of the held-out
    rows, or infinity once the candidate was given up.
    """

    def __init__(
        self,
        arch: Architecture,
        candidates: Sequence[Candidate],
        rows: Rows,
        first: int,
        curves: Mapping[tuple[int, str], Curve] | None,
        least: Mapping[tuple[int, str], int],
        group_size: int,
        lost: float,
    ):
        self.arch, self.candidates, self.first, self.group_size = arch, candidates, first, group_size
        self.lost = lost
        self.states: list[mx.array | float | None] = [None] * len(candidates)
        self.every, self.curves, self.least = curves is None, dict(curves or {}), least
        self.whole = whole(arch)
        self.mask = rows.mask()
        self.text = mx.array(self.mask[first:, :, None])
        self.mask[first:] = False  # held-out rows do not count when something is solved

    # ---- what the engine calls ----

    def enter(self, index: int, block: Any, mask: Callable[[], mx.array]) -> None:
        self.block = block
        paths = [self.arch.path(index, role) for role in self.arch.writers(index)]
        self.sites = {part: Site.put(block, path) for part, path in zip(PARTS, paths, strict=True)}
        units = self.arch.units(index)
        for part, site in self.sites.items():
            site.remembering = PARTS[part] in units and bool(self.every or self._counts(index, part))

    def pending(self) -> list[mx.array]:
        return [x for site in self.sites.values() for x in (*site.inputs, *site.norms)]

    def leave(self, index: int, hidden: mx.array) -> None:
        del self.sites, self.block

    def again(self, index: int, before: mx.array, after: mx.array, run: Callable) -> None:
        """Send every candidate through the block ``index``."""
        solved = {part: self._solved(index, part) for part, site in self.sites.items() if site.remembering}
        for site in self.sites.values():
            site.remembering, site.inputs, site.norms = False, [], []
        reference = after[self.first :].astype(mx.float32)
        energy = mx.square(reference * self.text).sum()
        after_it: dict[Candidate, int] = {}  # candidates that are the same up to here share one stream
        for number, candidate in enumerate(self.candidates):
            state, width = self.states[number], candidate[index]
            if (twin := after_it.setdefault(candidate[: index + 1], number)) != number:
                self.states[number] = self.states[twin]
                continue
            if isinstance(state, float) or (state is None and width == self.whole[index]):
                continue
            state = before[self.first :] if state is None else state
            if width is not None:
                with self._changed(index, width, solved):
                    state = run(state, self.first)
            missed = mx.square((state.astype(mx.float32) - reference) * self.text).sum()
            self.states[number] = state if (missed < self.lost * energy).item() else math.inf
            mx.clear_cache()  # the matrices of the next candidate have other sizes

    # ---- one block ----

    def _counts(self, index: int, part: str) -> set[int]:
        """Return how many units the candidates keep of a part, if it is some but not all."""
        return _narrowed(self.candidates, index, part, self.whole)

    def _solved(self, index: int, part: str) -> dict[int, tuple[mx.array, mx.array]]:
        """Return, for every number of units that a candidate keeps, the weight [out, in], zero at what is cut, and the
        bias."""
        site, size, counts = self.sites[part], self._size(index, part), self._counts(index, part)
        problem, energy = site.problem(None, self.mask)
        if (index, part) in self.curves:
            weights = {count: problem.solve(self._columns(index, part, count)) for count in counts}
        else:
            path = problem.path(size, self.least.get((index, part), 0), sorted(counts))
            self.curves[index, part] = _curve(path, problem.width // size, energy)
            weights = path.solved
        return {count: site.made_of(weights.pop(count), self._columns(index, part, count)) for count in counts}

    def _size(self, index: int, part: str) -> int:
        """Return how many inputs of the last matrix belong to one unit of a part."""
        sizes = self.arch.layers[index].sizes
        return sizes["group"] * sizes["head_dim"] if part == "attention" else 1

    def _columns(self, index: int, part: str, count: int) -> np.ndarray:
        """Return the inputs of a part's last matrix that are left with this many units."""
        if PARTS[part] not in self.arch.units(index):
            return np.arange(self.sites[part].own().shape[1])  # it has no units, so all of it stays
        size, whole = self._size(index, part), self.whole[index].units(part)
        kept = np.arange(whole) if count == whole else np.array(self.curves[index, part].kept(count))
        return (kept[:, None] * size + np.arange(size)).reshape(-1)

    @contextmanager
    def _changed(self, index: int, width: Width, solved: Mapping[str, Mapping[int, tuple]]) -> Iterator[None]:
        """Change the block to what a candidate has, and restore it afterwards."""
        replaced = []
        for part, site in self.sites.items():
            units, bits = width.units(part), width.bits(part)
            site.gone = units == 0 and PARTS[part] in self.arch.units(index)
            if not site.gone:
                site.new = solved[part][units] if units < self.whole[index].units(part) else None
                if bits is not None:
                    packing = Packing(bits, self.group_size)
                    replaced += self._pack_readers(index, part, packing)
                    if site.new is not None or not packed_so(site.inner, packing):  # kept codes do not change
                        site.new = _packed(site, self._columns(index, part, units), packing)
        try:
            yield
        finally:
            for path, module in replaced:
                replace_module(self.block, path, lambda _, module=module: module)
            for site in self.sites.values():
                site.gone, site.new = False, None

    def _pack_readers(self, index: int, part: str, packing: Packing) -> list[tuple[str, Any]]:
        """Pack all matrices of a part except the last; return the paths and the modules that were there before."""
        before = []
        for role in self.arch.readers(index, part):
            path = self.arch.path(index, role)

            def packed(module: Any, path: str = path) -> Any:
                before.append((path, module))
                return lm.packed(module, packing)

            replace_module(self.block, path, packed)
        return before


def _packed(site: Site, columns: np.ndarray, packing: Packing) -> tuple[mx.array, mx.array]:
    """Return the weight [out, in], zero except in these columns, and the bias of a site, as they will be stored: packed
    if a group size divides the columns."""
    weight, bias = site.new or (site.own(), site.bias)
    fitted = packing.fitted(len(columns))
    if fitted is None:
        return weight, bias
    index, made = mx.array(columns), mx.zeros_like(weight)
    made[:, index] = pack(weight[:, index], fitted, stored_dtype(site.inner)).dense()
    return made, bias


def _curve(path: Removal, units: int, energy: float) -> Curve:
    """Make a curve from a path, whose prices add to the squares that are missed, out of ``energy``."""
    loss = np.full(units + 1, np.inf)
    reached = np.cumsum([0.0, *np.maximum(path.prices, 0.0)]) / max(energy, TINY)
    loss[units - len(path.order) :] = reached[::-1]
    return Curve(np.array(path.order, int), loss)
