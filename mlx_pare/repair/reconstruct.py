"""reconstruct: model + plan + calibration rows -> the plan's units chosen again, and weights that compensate the cut.

A second pass runs two streams at once: the dense one, and the pruned one, which carries the errors of all earlier
blocks. Several plans of one model have a pruned stream each, next to one dense stream. In every block the matrices that
write to the residual stream, o_proj and then down_proj, are solved again, so that the pruned stream returns to the
dense one. Their target is what the dense stream has after them, minus what the pruned stream carries past them. If a
norm stands behind them (Gemma), a linear solve cannot reach the residual: the target is then what the dense matrix
itself gave. The block runs in full, and cut units are left out at the input of the two matrices. That is the same as a
cut, because the axes are exact. Up to the first cut both streams are one, and nothing is solved. A bias of such a
matrix is solved with it. A matrix that will be stored packed is packed here, with error feedback (repair/gptq.py). If
the plan asks for other bits than the source has, the pruned stream goes through the other matrices as they will be
packed, and what comes later compensates that as well. Memory: hidden states of both streams, one block, its inputs of
the two matrices, the new matrices, and what least squares take (``costs``).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from operator import attrgetter
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from .. import lm
from ..arch import Architecture
from ..base.errors import PareError, Refused, Unsupported
from ..base.units import gb
from ..evaluation import divergence
from ..model.checkpoint import Checkpoint
from ..pruning.layout import layout
from ..pruning.plan_file import LayerPlan, Plan
from ..sources.open_model import StrPath, opened
from ..store.arrays import Arrays
from ..store.places import repair_file
from ..stream import memory, walk as stream
from ..stream.taps import replace_module
from ..tensors.packed import MX_DTYPE, relative_error
from ..text.corpus import Extent, Rows
from . import gptq
from .elimination import inputs_of
from .least_squares import Cost
from .output_projection import Made, Site, inputs_of_writers, parts, solve_costs

CHOOSES = "obs"  # the criterion whose units are chosen here; the units of any other stay as they are


def reconstruct(
    model: StrPath,
    plan: Plan | StrPath,
    rows: Rows,
    out: StrPath,
    damping: float | None = None,
    memory_cap: int | None = None,
) -> Plan:
    """Solve the last matrices of every kept layer again, and write them to a directory.

    Args:
        model: what ``opened`` takes, such as a model directory or a GGUF file.
        plan: the plan, or the path of its plan.json.
        rows: calibration rows, tokens int32 [rows, length].
        out: directory for a safetensors file per layer of the pruned model; an earlier reconstruction is replaced. As
            far as they were solved, it holds "o_proj" and "down_proj", float32 [hidden, kept inputs]; if stored packed
            "o_proj.weight", "o_proj.scales" and, if affine, "o_proj.biases"; if there is a bias "o_proj_bias", float32
            [hidden]; and as description the units, and each matrix's errors (share of the target that is missed, in
            squares) before, after and, if packed, packed. A part that a layer loses has no such matrix.
        damping: of every solve; None: least_squares.DAMPING.
        memory_cap: bytes; None: the memory that is free now.
    Returns:
        The plan of the new matrices: if its criterion is "obs", as many ffn channels and kv heads, chosen again.
    Raises:
        PareError: the plan does not suit the model or cuts the hidden size, or numbers become infinite.
        Refused: the plan is of another model, or the estimate of memory exceeds the cap. UsageError: unknown tokens.
    """
    model, out = opened(model), Path(out)
    return reconstruct_all(model, [Plan.of(plan)], rows, [out], damping, memory_cap)[0]


def reconstruct_all(
    model: Path,
    plans: Sequence[Plan],
    rows: Rows,
    outs: Sequence[Path],
    damping: float | None = None,
    memory_cap: int | None = None,
) -> list[Plan]:
    """Reconstruct several plans of one model, in one walk, or in one each if memory does not hold all pruned streams.

    Args: as ``reconstruct``; ``outs``: a directory for each of ``plans``. Returns: the plans of the new matrices, in
    their order. Raises: as ``reconstruct``."""
    checkpoint = Checkpoint(model)
    try:
        check_memory(checkpoint, rows, memory_cap, len(plans))
        together = [list(zip(plans, outs, strict=True))]
    except Refused:
        together = [[one] for one in zip(plans, outs, strict=True)]
    pairs = [pair for some in together for pair in _lead(model, some, rows, rows.count, damping, memory_cap)[0]]
    return [pair.made() for pair in pairs]


def reconstructed_kl(
    model: Path, plan: Plan, rows: Rows, held: Rows, scratch: Path, memory_cap: int | None = None
) -> float:
    """Measure how far a reconstructed plan is from the original, without cutting a model.

    Args: as ``reconstruct``; ``held``: rows of the same length to measure on; ``scratch``: directory of the matrices.
    Returns: KL divergence in nats per token of ``held``. Raises: as ``reconstruct``, PareError also for the length."""
    (pair,), dense = _lead(model, [(plan, scratch)], rows.joined(held), rows.count, None, memory_cap)
    if pair.pruned is None:
        return 0.0
    reference, made = (hidden[rows.count :] for hidden in (dense.hidden, pair.pruned))
    return float(divergence.measure(held, dense.ended(made), dense.of(reference))["kl"].mean())


def _lead(
    model: Path, plans: Sequence[tuple[Plan, Path]], rows: Rows, count: int, damping: float | None, cap: int | None
) -> tuple[list[_Pair], stream.Streamed]:
    """Lead the dense stream and those of all plans through the model; the first ``count`` rows serve to solve."""
    if (checkpoint := Checkpoint(model)).arch.uses("expert"):
        raise Unsupported("experts are chosen, but not reconstructed", "go on with prune")
    for plan, _ in plans:
        plan.check(checkpoint)
        if plan.cuts_hidden(checkpoint.arch):
            raise PareError("reconstruction cannot make up for a cut of the hidden size", "leave hidden out of --axes")
    check_memory(checkpoint, rows, cap, len(plans))
    for _, out in plans:
        out.mkdir(parents=True, exist_ok=True)
        for old in out.glob("[0-9]*.safetensors"):
            old.unlink()
    pairs = [_Pair(checkpoint, plan, rows, count, damping, out) for plan, out in plans]
    return pairs, stream.walk(model, rows, _SideBySide(checkpoint.arch, pairs), what="reconstruct: block")


def check_memory(checkpoint: Checkpoint, rows: Rows | Extent, cap: int | None, plans: int = 1) -> int:
    """Check that memory suffices. Args: as ``held_bytes``; ``cap``: bytes, None: what is free now. Returns: the
    estimate, bytes. Raises: Refused if it exceeds the cap."""
    held = held_bytes(checkpoint, rows, plans)
    return memory.check_memory(checkpoint, rows, cap, held, f"; --no-reconstruct needs {gb(held)} less")


def held_bytes(checkpoint: Checkpoint, rows: Rows | Extent, plans: int = 1) -> int:
    """Estimate what pruned streams need beyond a plain walk: more hidden states, inputs and new weights of the two
    matrices, and what the more expensive one takes to be solved. With several plans the output of the dense block is
    there until the last has gone through. Args: ``rows``: all, or their extent; ``plans``: number. Returns: bytes."""
    arch, value = checkpoint.arch, memory.STATE_BYTES
    attention, ffn = inputs_of_writers(arch)
    states = (6 if behind_norm(arch, 0) else 3) + (2 * (plans - 1) if plans > 1 else 0)
    tokens = rows.count * rows.length
    held = tokens * (states * arch.sizes["hidden"] + ffn + attention)
    new = 4 * arch.sizes["hidden"] * (ffn + attention)
    return value * held + new + max(each.nbytes for each in costs(checkpoint, rows))


def costs(checkpoint: Checkpoint, rows: Rows | Extent) -> list[Cost]:
    """Estimate what solving o_proj and down_proj of the first layer takes. Args: ``rows``: all, or their extent."""
    return solve_costs(checkpoint, rows.total)


def behind_norm(arch: Architecture, index: int) -> bool:
    """Whether the output of the two matrices of a block goes through a norm before it joins the residual stream."""
    return "attn_post_norm" in {spec.role for spec in arch.family.blocks[arch.layers[index].kind]}


class _Before:
    """Stands in for a norm and remembers its input, the residual stream in the middle of a block."""

    def __init__(self, module: Any):
        self.module = module
        self.seen: list[mx.array] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self.module, name)

    def __call__(self, x: mx.array) -> mx.array:
        self.seen.append(x)
        return self.module(x)

    def taken(self) -> list[mx.array]:
        """What was seen since the last call, one array [rows, length, hidden] per micro-batch."""
        seen, self.seen = self.seen, []
        return seen


@dataclass
class _Block:
    """A block of the dense model, what is watched in it, and what the dense stream had there: ``after`` the block,
    before its second norm (``between``), and, if a norm stands behind the two matrices, their ``outputs``."""

    module: Any
    roles: tuple[str, str]
    attention: Site
    ffn: Site
    middle: Any
    after: mx.array | None = None
    between: list[mx.array] = field(default_factory=list)
    outputs: dict[str, list[mx.array] | None] = field(default_factory=dict)

    @property
    def sites(self) -> dict[str, Site]:
        """The sites by the roles of their matrices."""
        return dict(zip(self.roles, (self.attention, self.ffn), strict=True))

    def seen(self, after: mx.array) -> None:
        """Note what the dense stream had, once it has gone through the block."""
        self.after, self.between = after, self.middle.taken()
        for role, site in self.sites.items():
            self.outputs[role], site.outputs = site.outputs, None

    def begin(self) -> None:
        """Prepare for another run through the block."""
        self.middle.seen = []
        for site in self.sites.values():
            site.replay = iter(site.inputs)

    def renew(self) -> None:
        """Prepare for the stream of another plan."""
        for site in self.sites.values():
            site.new, site.gone, site.inputs, site.replay = None, False, [], None

    def listen(self, site: Site, run: Callable, hidden: mx.array) -> None:
        """Send hidden states into the block, and remember the inputs of a matrix."""
        self.begin()
        site.listening = True
        run(hidden)
        site.listening = False


class _SideBySide(stream.Observer):
    """The observer of a walk of the dense model that leads the pruned streams through every block, one by one."""

    def __init__(self, arch: Architecture, pairs: Sequence[_Pair]):
        self.arch, self.pairs = arch, pairs

    def enter(self, index: int, block: Any, mask: Callable[[], mx.array]) -> None:
        roles = self.arch.writers(index)
        attention, ffn = sites = [replace_module(block, self.arch.path(index, role), Site) for role in roles]
        for site, role in zip(sites, roles, strict=True):
            site.shorten(attrgetter(self.arch.path(index, role).rpartition(".")[0])(block))
        has_norm = self.arch.has(index, "ffn_norm")
        middle = replace_module(block, self.arch.path(index, "ffn_norm"), _Before) if has_norm else _Before(None)
        if behind_norm(self.arch, index):
            attention.outputs, ffn.outputs = [], []
        self.block = _Block(block, roles, attention, ffn, middle)

    def pending(self) -> list[mx.array]:
        return [*self.block.middle.seen, *(x for site in self.block.sites.values() for x in site.outputs or ())]

    def leave(self, index: int, hidden: mx.array) -> None:
        del self.block

    def again(self, index: int, before: mx.array, after: mx.array, run: Callable) -> None:
        """Solve the block ``index`` for every pruned stream, and send each through its result."""
        self.block.seen(after)
        for pair in self.pairs:
            pair.through(index, self.block, before, run)
            self.block.renew()


class _Pair:
    """The dense stream and the pruned stream of one plan."""

    def __init__(self, checkpoint: Checkpoint, plan: Plan, rows: Rows, count: int, damping: float | None, out: Path):
        self.checkpoint, self.arch, self.plan, self.damping, self.out = checkpoint, checkpoint.arch, plan, damping, out
        self.mask = rows.mask()
        self.mask[count:] = False
        self.pieces = {
            (piece.tensor.layer, origin.spec.role): (piece, origin)
            for piece in layout(checkpoint, plan.keep(checkpoint.arch), plan.packing)
            for origin in piece.origins
        }
        self.about = {"model": checkpoint.identity(), "tokens": rows.first(count).total, "damping": damping}
        self.planned = {layer.source: layer for layer in plan.layers}
        self.layers: list[LayerPlan] = []
        self.pruned: mx.array | None = None  # hidden states of the pruned stream; None while the two are one

    def made(self) -> Plan:
        """The plan that the new matrices belong to."""
        return self.plan.model_copy(update={"layers": self.layers})

    def through(self, index: int, block: _Block, before: mx.array, run: Callable) -> None:
        """Solve the block ``index`` for the pruned stream, and send the stream through the result."""
        planned = self.planned.get(index)
        if planned is None:  # the layer is cut: the pruned stream skips it
            self.pruned = before if self.pruned is None else self.pruned
            return
        with self._repacked(index, block) as repacked:
            self._solve(index, block, before, run, planned, repacked or self.pruned is not None)

    def _solve(
        self, index: int, block: _Block, before: mx.array, run: Callable, planned: LayerPlan, apart: bool
    ) -> None:
        """The work of ``through``. ``apart``: the streams already differ, or other matrices change."""
        pruned, middle = before if self.pruned is None else self.pruned, block.between
        sizes, self.made_of = self.arch.layers[index].sizes, {}
        heads, channels, mixer = planned.kv_head, planned.ffn, block.roles[0]
        whole = "kv_head" not in self.arch.units(index)  # it has no heads, and keeps all that it has instead
        block.attention.gone, block.ffn.gone = not (heads or whole), not channels
        fewer = not whole and len(heads) < sizes["kv_head"]
        if (heads or whole) and (apart or fewer):
            block.listen(block.attention, run, pruned)
            wanted = block.outputs[mixer]
            target = self._missing(middle, parts(pruned, middle)) if wanted is None else wanted
            size = 1 if whole else sizes["group"] * sizes["head_dim"]
            kept = self._fit(mixer, block.attention, target, size, None if whole else heads)
            heads = heads if whole else kept
        if apart or fewer or len(channels) < sizes["ffn"]:
            if channels:
                block.listen(block.ffn, run, pruned)
                carried, wanted = block.middle.taken(), block.outputs["down_proj"]
                target = self._missing(parts(block.after, carried), carried) if wanted is None else wanted
                channels = self._fit("down_proj", block.ffn, target, 1, channels)
                del carried, target
            block.begin()
            self.pruned = run(pruned)
        self._save(planned.model_copy(update={"ffn": channels, "kv_head": heads}))

    def _missing(self, there: Iterable[mx.array], carried: Iterable[mx.array]) -> Iterator[mx.array]:
        """What a matrix has to add to turn one stream into another, before the model scales it (granite). Float32,
        because two streams in 16 bits are much larger than what it adds to them."""
        factor = 1 / self.arch.residual
        for x, y in zip(there, carried, strict=True):
            missing = x.astype(mx.float32) - y.astype(mx.float32)
            yield missing if factor == 1 else missing * factor

    @contextmanager
    def _repacked(self, index: int, block: _Block) -> Iterator[bool]:
        """Pack the matrices that are not solved as they will be stored, if they are not so in the source; yields
        whether any matrix of the block changes so."""
        changed, before = False, []
        others = [role for part in ("attention", "ffn") for role in self.arch.readers(index, part)]
        for role in (*others, *block.roles):
            piece, origin = self.pieces.get((len(self.layers), role), (None, None))
            packing, was = piece and piece.packing, origin and self.checkpoint.packing(origin.module)
            if packing is None or (was is not None and packing.as_config() == was.as_config()):
                continue
            changed = True
            if role not in block.roles:
                path, stored = self.arch.path(index, role), (packing, MX_DTYPE[piece.dtype])
                before.append((path, attrgetter(path)(block.module)))
                replace_module(block.module, path, lambda module, stored=stored: lm.packed(module, *stored))
        try:
            yield changed
        finally:
            for path, module in before:
                replace_module(block.module, path, lambda _, module=module: module)

    def _fit(
        self, role: str, site: Site, target: Iterable[mx.array], size: int, planned: Sequence[int] | None
    ) -> list[int]:
        """Choose the units of a matrix, or take the plan's (None: all); solve and pack it; replace it; and return the
        units."""
        problem, energy = site.problem(target, self.mask, self.damping)
        planned = range(problem.width // size) if planned is None else planned
        count = len(planned) * size
        if self.plan.criterion == CHOOSES and count < problem.width:
            chosen, new = problem.choose(size, len(planned))
        else:
            chosen, new = list(planned), problem.solve(inputs_of(np.array(planned), size))
        kept = inputs_of(np.array(chosen), size)
        errors = [problem.error(problem.old(kept), kept, energy), problem.best_error(new, kept, energy)]
        made = self.made_of[role] = Made(errors, mx.array(new[:, :count].astype(np.float32)))
        piece, rest = self.pieces[len(self.layers), role][0], new[:, count:].copy()
        if piece.packing is not None:
            made.packed, rest = gptq.quantize(new, piece.packing, MX_DTYPE[piece.dtype], problem.feedback(kept))
            del new  # the errors of the packed matrix take the same memory
            made.rounding = relative_error(made.weight, made.packed)
            made.weight = made.packed.dense()
            packed = np.concatenate([np.array(made.weight), rest.astype(np.float32)], axis=1)
            errors.append(problem.error(packed, kept, energy))
        if site.biased:
            made.bias = site.bias + mx.array(rest[:, 0].astype(np.float32))
        whole = np.zeros((len(rest), problem.width), np.float32)
        whole[:, kept] = np.array(made.weight)
        site.new = mx.array(whole), site.bias if made.bias is None else made.bias
        return chosen

    def _save(self, layer: LayerPlan) -> None:
        arrays = {name: array for role, made in self.made_of.items() for name, array in made.arrays(role).items()}
        about = {**self.about, "units": layer.model_dump()}
        about["errors"] = {role: made.errors for role, made in self.made_of.items()}
        about["packed"] = {role: made.about() for role, made in self.made_of.items() if made.packed}
        Arrays(arrays, about).save(repair_file(self.out, len(self.layers)))
        self.layers.append(layer)
