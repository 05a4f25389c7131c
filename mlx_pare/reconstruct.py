"""reconstruct: model + plan + calibration rows -> the plan's units chosen again, and weights that make up for the cut.

A second pass, two streams at once: the dense one, as it is, and the pruned one, which carries the errors of all
earlier blocks. In every block the matrices that write to the residual stream, o_proj and then down_proj, are solved
anew so that the pruned stream comes back to the dense one: their target is what the dense stream has after them, minus
what the pruned stream carries past them. The block runs in full, with the cut units left out at the input of those two
matrices, which is the same as cut (the axes are exact). Up to the first cut the streams are one, and nothing is solved.
A bias behind such a matrix is solved with it. A matrix that will be stored packed is packed here, with error feedback
(gptq.py), and where the plan asks for other bits than the source has, the pruned stream goes through the other matrices
as they will be packed: what comes later makes up for that as well.
Memory: hidden states of both streams, one block and its inputs of the two matrices, what least squares take (``cost``).

Where a norm stands behind those matrices (Gemma) the residual is out of reach of a linear solve; there the target is
what the dense matrix itself gave.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from . import divergence, gptq, lm, stream
from .arch import Architecture
from .artifacts import Arrays, LayerPlan, Plan, repair_file
from .checkpoint import Checkpoint
from .console import gb
from .corpus import Extent, Rows
from .errors import PareError
from .layout import layout
from .least_squares import Cost
from .observers import replace_module
from .opened import StrPath, opened
from .quantized import MX_DTYPE, Packed, relative_error
from .site import Site, parts, solve_costs

CHOOSES = "obs"  # the criterion whose units are chosen here; those of any other are kept as they are
SOLVED = ("o_proj", "down_proj")


def reconstruct(
    model: StrPath,
    plan: Plan | StrPath,
    rows: Rows,
    out: StrPath,
    damping: float | None = None,
    memory_cap: int | None = None,
) -> Plan:
    """Write the new matrices of every kept layer to the directory ``out``; returns the plan they belong to.

    ``out``: a safetensors file per layer of the pruned model, with "o_proj" and "down_proj", float32 [hidden, kept
    inputs], as far as they were solved, or, where they will be stored packed, "o_proj.weight", "o_proj.scales" and, if
    affine, "o_proj.biases"; "o_proj_bias", float32 [hidden], where there is one. Its description names the units and
    the error (the share of the target that is missed, in squares) of each matrix before and after, and packed, where it
    is. An earlier reconstruction there is replaced.
    The plan is the given one, its ffn channels and kv heads chosen again, as many per layer, when its criterion is
    "obs". ``damping``: of every solve (None: least_squares.damping_for). A layer that loses its attention or
    feed-forward has no such matrix. Raises PareError for a plan that cuts the hidden size (what is cut there cannot be
    made up for so) or does not suit the model, Refused when the estimate of memory exceeds the cap.
    """
    return _lead(opened(model), Plan.of(plan), rows, rows.count, Path(out), damping, memory_cap)[0]


def reconstructed_kl(
    model: Path, plan: Plan, rows: Rows, held: Rows, scratch: Path, memory_cap: int | None = None
) -> float:
    """The KL divergence, nats per token, that a plan reaches on ``held`` rows (of the same length) when it is
    reconstructed on ``rows``: nothing is cut for that. Raises as ``reconstruct``, which would write to ``scratch``."""
    _, pair, dense = _lead(model, plan, rows.joined(held), rows.count, scratch, None, memory_cap)
    if pair.pruned is None:
        return 0.0
    reference, made = (hidden[rows.count :] for hidden in (dense.hidden, pair.pruned))
    return float(divergence.measure(held, dense.ended(made), dense.of(reference))["kl"].mean())


def _lead(
    model: Path, plan: Plan, rows: Rows, count: int, out: Path, damping: float | None, memory_cap: int | None
) -> tuple[Plan, _Pair, stream.Streamed]:
    """Both streams through the model; only the first ``count`` rows count when something is solved."""
    checkpoint = Checkpoint(model)
    plan.check(checkpoint)
    if plan.cuts_hidden(checkpoint.arch):
        raise PareError("reconstruction cannot make up for a cut of the hidden size", "leave hidden out of --axes")
    check_memory(checkpoint, rows, memory_cap)
    out.mkdir(parents=True, exist_ok=True)
    for old in out.glob("[0-9]*.safetensors"):
        old.unlink()
    pair = _Pair(checkpoint, plan, rows, count, damping, out)
    dense = stream.walk(model, rows, pair, what="reconstruct: block")
    return plan.model_copy(update={"layers": pair.layers}), pair, dense


def check_memory(checkpoint: Checkpoint, rows: Rows | Extent, cap: int | None) -> int:
    """The estimate of memory, when it stays under ``cap`` (default: what is free now). Raises Refused otherwise."""
    held = held_bytes(checkpoint, rows)
    instead = f"; --no-reconstruct needs {gb(held)} less"
    return stream.check_memory(checkpoint, rows, cap, held, instead)


def held_bytes(checkpoint: Checkpoint, rows: Rows | Extent) -> int:
    """What a pair of streams needs beyond a plain walk: more hidden states, the inputs of both matrices, and what the
    wider one takes to be solved, in the form that it will be."""
    arch, value = checkpoint.arch, 4 if lm.cpu_backend() else 2
    sizes = arch.layer_sizes(0)
    attention = sizes["kv_head"] * sizes["group"] * sizes["head_dim"]
    states = 6 if behind_norm(arch, 0) else 3
    tokens = rows.count * rows.length
    held = tokens * (states * arch.sizes["hidden"] + sizes["ffn"] + attention)
    new = 4 * arch.sizes["hidden"] * (sizes["ffn"] + attention)
    return value * held + new + max(each.nbytes for each in costs(checkpoint, rows))


def costs(checkpoint: Checkpoint, rows: Rows | Extent) -> list[Cost]:
    """What solving o_proj and down_proj of the first layer takes."""
    return solve_costs(checkpoint, rows.total)


def behind_norm(arch: Architecture, index: int) -> bool:
    """Whether what the two matrices of a block give goes through a norm before it joins the residual stream."""
    return "attn_post_norm" in {spec.role for spec in arch.family.blocks[arch.layers[index].kind]}


class _Before:
    """A norm whose input, the residual stream in the middle of a block, is remembered."""

    def __init__(self, module: Any):
        self.module = module
        self.seen: list[mx.array] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self.module, name)

    def __call__(self, x: mx.array) -> mx.array:
        self.seen.append(x)
        return self.module(x)

    def taken(self) -> list[mx.array]:
        """What was seen since the last time, one array per micro-batch."""
        seen, self.seen = self.seen, []
        return seen


class _Pair(stream.Observer):
    """The observer of a walk of the dense model that leads the pruned stream along."""

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

    # ---- what the engine calls ----

    def enter(self, index: int, block: Any, mask: Callable[[], mx.array]) -> None:
        self.block = block

        def at(role: str, make: Callable[[Any], Any]) -> Any:
            return replace_module(block, self.arch.path(index, role), make)

        self.attention, self.ffn = at("o_proj", Site), at("down_proj", Site)
        self.middle = at("ffn_norm", _Before) if self.arch.has(index, "ffn_norm") else _Before(None)
        if behind_norm(self.arch, index):
            self.attention.outputs, self.ffn.outputs = [], []

    def pending(self) -> list[mx.array]:
        return [*self.middle.seen, *(self.attention.outputs or ()), *(self.ffn.outputs or ())]

    def leave(self, index: int, hidden: mx.array) -> None:
        del self.attention, self.ffn, self.middle, self.block

    def again(self, index: int, before: mx.array, after: mx.array, run: Callable) -> None:
        """Solve the block ``index`` for the pruned stream and send that through it."""
        pruned, middle = before if self.pruned is None else self.pruned, self.middle.taken()
        planned = self.planned.get(index)
        if planned is None:  # a layer that is cut: the pruned stream walks past it
            self.pruned = pruned
            return
        apart = self._repacked(index) or self.pruned is not None
        sizes, self.made = self.arch.layers[index].sizes, {}
        heads, channels = planned.kv_head, planned.ffn
        wanted, self.attention.outputs = self.attention.outputs, None
        self.attention.gone, self.ffn.gone = not heads, not channels
        if heads and (apart or len(heads) < sizes["kv_head"]):
            self._listen(self.attention, run, pruned)
            target = self._missing(middle, parts(pruned, middle)) if wanted is None else wanted
            heads = self._fit("o_proj", target, sizes["group"] * sizes["head_dim"], heads)
        del middle
        wanted, self.ffn.outputs = self.ffn.outputs, None
        if apart or len(planned.kv_head) < sizes["kv_head"] or len(channels) < sizes["ffn"]:
            if channels:
                self._listen(self.ffn, run, pruned)
                middle = self.middle.taken()
                target = self._missing(parts(after, middle), middle) if wanted is None else wanted
                channels = self._fit("down_proj", target, 1, channels)
                del middle, target
            self._begin()
            self.pruned = run(pruned)
        self._save(planned.model_copy(update={"ffn": channels, "kv_head": heads}))

    def _missing(self, there: Iterable[mx.array], carried: Iterable[mx.array]) -> Iterator[mx.array]:
        """What a matrix has to give for one stream to become another, float32: two streams in 16 bits are much larger
        than what it adds to them. Where the model scales what its blocks add (granite), before that."""
        factor = 1 / self.arch.residual
        for x, y in zip(there, carried, strict=True):
            missing = x.astype(mx.float32) - y.astype(mx.float32)
            yield missing if factor == 1 else missing * factor

    def _repacked(self, index: int) -> bool:
        """Put the matrices that are not solved into the block as they will be packed, where that is not how they are in
        the source; whether any matrix of the block changes so."""
        changed = False
        others = [role for part in ("attention", "ffn") for role in self.arch.readers(index, part)]
        for role in (*others, *SOLVED):
            piece, origin = self.pieces.get((len(self.layers), role), (None, None))
            packing, before = piece and piece.packing, origin and self.checkpoint.packing(origin.module)
            if packing is None or (before is not None and packing.as_config() == before.as_config()):
                continue
            changed = True
            if role not in SOLVED:
                stored = packing, MX_DTYPE[piece.dtype]
                replace_module(self.block, self.arch.path(index, role), lambda m, stored=stored: lm.packed(m, *stored))
        return changed

    def _listen(self, site: Site, run: Callable, hidden: mx.array) -> None:
        """Remember the inputs of a matrix when these hidden states go through the block."""
        self._begin()
        site.listening = True
        run(hidden)
        site.listening = False

    def _begin(self) -> None:
        """Before another run through the block."""
        self.middle.seen = []
        for site in (self.attention, self.ffn):
            site.replay = iter(site.inputs)

    def _fit(self, role: str, target: Iterable[mx.array], size: int, planned: Sequence[int]) -> list[int]:
        """Choose the units of a matrix, or take the plan's; solve what is left, pack it if it will be stored so;
        replace the matrix by that. Returns the units."""
        site = self.attention if role == "o_proj" else self.ffn
        problem, energy = site.problem(target, self.mask, self.damping)
        chosen = list(planned)
        if self.plan.criterion == CHOOSES and len(chosen) * size < problem.width:
            chosen = problem.choose(size, len(chosen))
        kept = (np.array(chosen)[:, None] * size + np.arange(size)).reshape(-1)
        new, count = problem.solve(kept), len(kept)
        errors = [problem.error(weight, kept, energy) for weight in (problem.old(kept), new)]
        made = self.made[role] = _Made(errors, mx.array(new[:, :count].astype(np.float32)))
        piece, rest = self.pieces[len(self.layers), role][0], new[:, count:].copy()
        if piece.packing is not None:
            made.packed, rest = gptq.quantize(new, piece.packing, MX_DTYPE[piece.dtype], problem.feedback(kept))
            del new  # the errors of the packed matrix take as much again
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
        arrays = {name: array for role, made in self.made.items() for name, array in made.arrays(role).items()}
        about = {**self.about, "units": layer.model_dump()}
        about["errors"] = {role: made.errors for role, made in self.made.items()}
        about["packed"] = {role: made.about() for role, made in self.made.items() if made.packed}
        Arrays(arrays, about).save(repair_file(self.out, len(self.layers)))
        self.layers.append(layer)


@dataclass
class _Made:
    """A solved matrix [out, kept] and its errors: before, after, and packed if it is."""

    errors: list[float]
    weight: mx.array
    packed: Packed | None = None
    rounding: float = 0.0
    bias: mx.array | None = None

    def arrays(self, role: str) -> dict[str, mx.array]:
        """What the repair file holds of it."""
        found = {role: self.weight}
        if self.packed:
            found = {f"{role}.{name}": array for name, array in self.packed.arrays.items()}
        return found if self.bias is None else {**found, f"{role}_bias": self.bias}

    def about(self) -> dict[str, Any]:
        """How it is packed, and the relative error of that, as prune gives it."""
        return {**self.packed.packing.as_config(), "error": self.rounding}
