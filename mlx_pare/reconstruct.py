"""reconstruct: model + plan + calibration rows -> the plan's units chosen again, and weights that make up for the cut.

A second pass, two streams at once: the dense one, as it is, and the pruned one, which carries the errors of all
earlier blocks. In every block the matrices that write to the residual stream, o_proj and then down_proj, are solved
anew so that the pruned stream comes back to the dense one: their target is what the dense stream has after them, minus
what the pruned stream carries past them. The block runs in full, with the cut units left out at the input of those two
matrices, which is the same as cut (the axes are exact). Up to the first cut the streams are one, and nothing is solved.
A bias behind such a matrix is solved with it. A matrix that will be stored packed is packed here, with error feedback
(gptq.py), so that later blocks make up for that as well.
Memory: hidden states of both streams, one block and its inputs of the two matrices, what least squares take (``cost``).

Where a norm stands behind those matrices (Gemma) the residual is out of reach of a linear solve; there the target is
what the dense matrix itself gave.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from . import gptq, lm, stream
from .arch import Architecture
from .artifacts import Arrays, LayerPlan, Plan, repair_file
from .checkpoint import Checkpoint
from .console import gb
from .corpus import Rows
from .errors import PareError
from .layout import Piece, layout
from .least_squares import DAMPING, Cost, Dual, Problem, cost
from .observers import replace_module
from .quantized import MX_DTYPE, Packed, dense_weight, relative_error

CHOOSES = "obs"  # the criterion whose units are chosen here; those of any other are kept as they are
SOLVED = ("o_proj", "down_proj")


def reconstruct(
    model: Path, plan: Plan, rows: Rows, out: Path, damping: float = DAMPING, memory_cap: int | None = None
) -> Plan:
    """Write the new matrices of every kept layer to the directory ``out``; returns the plan they belong to.

    ``out``: a safetensors file per layer of the pruned model, with "o_proj" and "down_proj", float32 [hidden, kept
    inputs], as far as they were solved, or, where they will be stored packed, "o_proj.weight", "o_proj.scales" and
    "o_proj.biases"; "o_proj_bias", float32 [hidden], where there is one. Its description names the units and the error
    (the share of the target that is missed, in squares) of each matrix before and after, and packed, where it is. An
    earlier reconstruction there is replaced.
    The plan is the given one, its ffn channels and kv heads chosen again, as many per layer, when its criterion is
    "obs". A layer that loses its attention or feed-forward has no such matrix. Raises PareError for a plan that cuts
    the hidden size (what is cut there cannot be made up for so) or does not suit the model, Refused when the estimate
    of memory exceeds the cap.
    """
    checkpoint = Checkpoint(model)
    plan.check(checkpoint)
    if plan.cuts_hidden(checkpoint.arch):
        raise PareError("reconstruction cannot make up for a cut of the hidden size", "leave hidden out of --axes")
    check_memory(checkpoint, rows, memory_cap)
    out.mkdir(parents=True, exist_ok=True)
    for old in out.glob("[0-9]*.safetensors"):
        old.unlink()
    pair = _Pair(checkpoint, plan, rows, damping, out)
    stream.walk(model, rows, pair, what="reconstruct: block")
    return plan.model_copy(update={"layers": pair.layers})


def check_memory(checkpoint: Checkpoint, rows: Rows, cap: int | None) -> int:
    """The estimate of memory, when it stays under ``cap`` (default: what is free now). Raises Refused otherwise."""
    held = held_bytes(checkpoint, rows)
    instead = f"; --no-reconstruct needs {gb(held)} less"
    return stream.check_memory(checkpoint, rows, cap, held, instead)


def held_bytes(checkpoint: Checkpoint, rows: Rows) -> int:
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


def costs(checkpoint: Checkpoint, rows: Rows) -> list[Cost]:
    """What solving o_proj and down_proj of the first layer takes."""
    sizes = checkpoint.arch.layer_sizes(0)
    widths = sizes["kv_head"] * sizes["group"] * sizes["head_dim"], sizes["ffn"]
    return [cost(rows.total, width, sizes["hidden"]) for width in widths]


def behind_norm(arch: Architecture, index: int) -> bool:
    """Whether what the two matrices of a block give goes through a norm before it joins the residual stream."""
    return "attn_post_norm" in {spec.role for spec in arch.family.blocks[arch.layers[index].kind]}


class _Site:
    """A matrix of the block that writes to the residual stream: passed through, listened to, or replaced."""

    def __init__(self, module: Any):
        self.module = module
        self.listening = False
        self.inputs: list[mx.array] = []  # of the pruned stream, one array per micro-batch
        self.outputs: list[mx.array] | None = None  # of the dense stream, where they are the target
        self.new: tuple[mx.array, mx.array] | None = None  # weight [out, in], zero at what is cut; bias
        self.gone = False  # nothing feeds it any more: it gives zero, without its bias
        self.replay: Iterator[mx.array] = iter(())

    def __getattr__(self, name: str) -> Any:
        return getattr(self.module, name)

    def __call__(self, x: mx.array) -> mx.array:
        if self.listening:
            mx.eval(x)
            self.inputs.append(x)
            raise stream.Enough
        if self.new is not None:  # its inputs are known, so MLX never computes x and what is only there for it
            return self._replaced(next(self.replay))
        y = self.module(x)
        if self.outputs is not None:
            self.outputs.append(y)
        return mx.zeros_like(y) if self.gone else y

    def _replaced(self, x: mx.array) -> mx.array:
        """What the solved matrix gives for its inputs: multiplying by zeros is faster than gathering the kept ones."""
        weight, bias = self.new
        return (x.astype(mx.float32) @ weight.T + bias).astype(x.dtype)

    @property
    def _inner(self) -> Any:
        return getattr(self.module, "inner", self.module)

    @property
    def biased(self) -> bool:
        """Whether it has a bias."""
        return "bias" in self._inner

    @property
    def bias(self) -> mx.array:
        """Its bias, zero where it has none, float32."""
        return self._inner.bias.astype(mx.float32) if self.biased else mx.zeros((1,))

    def weight(self) -> np.ndarray:
        """Its own weight [out, in], float32; with a bias a column of zeros behind it, for how much that changes."""
        own = np.array(dense_weight(self._inner))
        return np.pad(own, ((0, 0), (0, 1))) if self.biased else own


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


class _Pair:
    """The observer of a walk of the dense model that leads the pruned stream along."""

    def __init__(self, checkpoint: Checkpoint, plan: Plan, rows: Rows, damping: float, out: Path):
        self.arch, self.plan, self.damping, self.out = checkpoint.arch, plan, damping, out
        self.mask, self.tokens = rows.mask(), rows.total
        self.pieces = _pieces(checkpoint, plan)
        self.about = {"model": checkpoint.identity(), "tokens": rows.total, "damping": damping}
        self.planned = {layer.source: layer for layer in plan.layers}
        self.layers: list[LayerPlan] = []
        self.pruned: mx.array | None = None  # hidden states of the pruned stream; None while the two are one

    # ---- what the engine calls ----

    def enter(self, index: int, block: Any, mask: Callable[[], mx.array]) -> None:
        def at(role: str, make: Callable[[Any], Any]) -> Any:
            return replace_module(block, self.arch.path(index, role), make)

        self.attention, self.ffn, self.middle = at("o_proj", _Site), at("down_proj", _Site), at("ffn_norm", _Before)
        if behind_norm(self.arch, index):
            self.attention.outputs, self.ffn.outputs = [], []

    def seen(self, index: int, before: mx.array, after: mx.array, mask: mx.array) -> None:
        pass

    def pending(self) -> list[mx.array]:
        return [*self.middle.seen, *(self.attention.outputs or ()), *(self.ffn.outputs or ())]

    def leave(self, index: int, hidden: mx.array) -> None:
        del self.attention, self.ffn, self.middle

    def again(self, index: int, before: mx.array, after: mx.array, run: Callable) -> None:
        """Solve the block ``index`` for the pruned stream and send that through it."""
        pruned, middle = before if self.pruned is None else self.pruned, self.middle.taken()
        planned = self.planned.get(index)
        if planned is None:  # a layer that is cut: the pruned stream walks past it
            self.pruned = pruned
            return
        sizes, self.made = self.arch.layers[index].sizes, {}
        heads, channels = planned.kv_head, planned.ffn
        wanted, self.attention.outputs = self.attention.outputs, None
        self.attention.gone, self.ffn.gone = not heads, not channels
        if heads and (self.pruned is not None or len(heads) < sizes["kv_head"]):
            self._listen(self.attention, run, pruned)
            target = _difference(middle, _parts(pruned, middle)) if wanted is None else wanted
            heads = self._fit("o_proj", target, sizes["group"] * sizes["head_dim"], heads)
        del middle
        wanted, self.ffn.outputs = self.ffn.outputs, None
        if self.pruned is not None or len(planned.kv_head) < sizes["kv_head"] or len(channels) < sizes["ffn"]:
            if channels:
                self._listen(self.ffn, run, pruned)
                middle = self.middle.taken()
                target = _difference(_parts(after, middle), middle) if wanted is None else wanted
                channels = self._fit("down_proj", target, 1, channels)
                del middle, target
            self._begin()
            self.pruned = run(pruned)
        self._save(planned.model_copy(update={"ffn": channels, "kv_head": heads}))

    def _listen(self, site: _Site, run: Callable, hidden: mx.array) -> None:
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
        problem, energy = self._problem(site, target)
        chosen = list(planned)
        if self.plan.criterion == CHOOSES and len(chosen) * size < problem.width:
            chosen = problem.choose(size, len(chosen))
        kept = (np.array(chosen)[:, None] * size + np.arange(size)).reshape(-1)
        new, count = problem.solve(kept), len(kept)
        errors = [problem.error(weight, kept, energy) for weight in (problem.old(kept), new)]
        made = self.made[role] = _Made(errors, mx.array(new[:, :count].astype(np.float32)))
        piece, rest = self.pieces[len(self.layers), role], new[:, count:]
        if piece.packing is not None:
            feedback = problem.feedback(kept)
            made.packed, rest = gptq.quantize(new, piece.packing, MX_DTYPE[piece.dtype], feedback)
            made.rounding = relative_error(made.weight, made.packed)
            made.weight = made.packed.dense()
            errors.append(problem.error(np.concatenate([np.array(made.weight), rest], axis=1), kept, energy))
        if site.biased:
            made.bias = site.bias + mx.array(rest[:, 0].astype(np.float32))
        whole = np.zeros((len(new), problem.width), np.float32)
        whole[:, kept] = np.array(made.weight)
        site.new = mx.array(whole), site.bias if made.bias is None else made.bias
        return chosen

    def _problem(self, site: _Site, target: Iterable[mx.array]) -> tuple[Problem | Dual, float]:
        """What is to be solved, in the form that takes less, and the sum of squares of its target."""
        weight, fixed = site.weight(), int(site.biased)
        width = weight.shape[1] - fixed
        parts = _text(site.inputs, target, _parts(self.mask, site.inputs), site.bias, fixed)
        if cost(self.tokens, width, len(weight)).dual:
            inputs, targets = (np.concatenate(arrays) for arrays in zip(*parts, strict=True))
            energy = float(np.square(targets, dtype=np.float64).sum())
            _check_finite(energy + float(np.abs(inputs).max()))
            return Dual(inputs, targets, weight, self.damping, fixed), energy
        gram, cross, energy = _sums(parts)
        _check_finite(energy + gram.trace() + cross.sum())
        return Problem(gram, cross, weight, self.damping, fixed), energy

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
            parts = {"weight": self.packed.words, "scales": self.packed.scales, "biases": self.packed.biases}
            found = {f"{role}.{name}": array for name, array in parts.items()}
        return found if self.bias is None else {**found, f"{role}_bias": self.bias}

    def about(self) -> dict[str, float]:
        """How it is packed, and the relative error of that, as prune gives it."""
        packing = self.packed.packing
        return {"bits": packing.bits, "group_size": packing.group_size, "error": self.rounding}


def _pieces(checkpoint: Checkpoint, plan: Plan) -> dict[tuple[int | None, str], Piece]:
    """How prune will store what is solved, by layer of the pruned model and role."""
    pieces = layout(checkpoint, plan.keep(checkpoint.arch), plan.packing)
    return {(p.tensor.layer, p.tensor.spec.role): p for p in pieces if p.tensor.spec.role in SOLVED}


def _parts(joined: Any, like: Sequence[mx.array]) -> Iterator[Any]:
    """The rows of each micro-batch of ``like``."""
    for start, stop in pairwise(np.cumsum([0, *(x.shape[0] for x in like)]).tolist()):
        yield joined[start:stop]


def _difference(a: Iterable[mx.array], b: Iterable[mx.array]) -> Iterator[mx.array]:
    """In float32: two residual streams in 16 bits are much larger than what one matrix adds to them."""
    return (x.astype(mx.float32) - y.astype(mx.float32) for x, y in zip(a, b, strict=True))


def _text(
    inputs: Sequence[mx.array], target: Iterable[mx.array], mask: Iterable[np.ndarray], bias: mx.array, fixed: int
) -> Iterator[tuple[mx.array, mx.array]]:
    """Inputs [tokens, n + fixed], ones behind the others, and targets without the bias [tokens, out] of a micro-batch:
    the text alone, float32."""
    for x, t, m in zip(inputs, target, mask, strict=True):
        x, t = (a.astype(mx.float32).reshape(-1, a.shape[-1]) for a in (x, t - bias))
        if not m.all():
            text = mx.array(np.flatnonzero(m))
            x, t = x[text], t[text]
        yield (mx.concatenate([x, mx.ones((len(x), fixed))], axis=1) if fixed else x), t


def _sums(parts: Iterable[tuple[mx.array, mx.array]]) -> tuple[np.ndarray, np.ndarray, float]:
    """Gram matrix [n, n], cross terms [n, out] and sum of squares of the target; products of a micro-batch in float32,
    their sums in float64."""
    gram = cross = None
    energy = 0.0
    for x, t in parts:
        products = x.T @ x, x.T @ t, mx.square(t).sum()
        mx.eval(products)
        if gram is None:
            gram, cross = (np.zeros(product.shape) for product in products[:2])
        for total, product in zip((gram, cross), products[:2], strict=True):
            total += np.asarray(product)
        energy += products[2].item()
    return gram, cross, energy


def _check_finite(total: float) -> None:
    """Raises PareError unless it is a number."""
    if not np.isfinite(total):
        raise PareError("the model computes infinite numbers on this text", "use other text, or --no-reconstruct")
