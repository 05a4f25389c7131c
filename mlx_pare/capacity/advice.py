"""Find what makes a model fit: every single change that brings it under a Mac's budget, the smallest cut among them.

The change with the least expected loss comes first. Losses are relative increases of perplexity. They are orders of
magnitude to sort by, no promise: `mlx-pare run` measures.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

from ..arch import Architecture, Keep, cut, describe
from ..base.errors import PareError
from ..base.units import gb
from ..model import footprint
from ..options.settings import CutOptions
from ..pruning import reach
from ..tensors.packing import BITS, GROUP_SIZES, Packing
from . import macs, planner
from .form import Form
from .macs import Budget, Mac
from .memory import Needs, Use, kv_bits_refused
from .subject import Subject

# What fewer bits cost. GGUF: Llama-3-8B without importance matrix (llama.cpp's perplexity README, pull request 6936).
# MLX, rounded to nearest: 4 bits in groups of 64 cost 0.18 to 0.26 on three small models (mlx-lm pull request 202) and
# 0.014 on novelist-9m, where 3 bits cost five times that (benchmarks/LOG.md); larger models lose less. The values here
# lie between.
BITS_LOSS = {8: 0.0, 6: 0.005, 5: 0.02, 4: 0.10, 3: 0.40, 2: 2.5}
GGUF_LOSS = {8: 0.0, 6: 0.005, 5: 0.009, 4: 0.028, 3: 0.10, 2: 0.57}
KV_LOSS = {8: 0.0005, 4: 0.02}  # q8_0: 0.00035 on Llama-3-8B (llama.cpp pull request 7412); 4 bits assumed
GGUF_BITS = {8: "q8_0", 6: "q6_k", 5: "q5_k_m", 4: "q4_k_m", 3: "q3_k_m", 2: "q2_k"}
# What a cut costs grows with its square: the best published pruner without training, FLAP, has 0.16, 0.40 and 1.52 for
# 20, 30 and 50 % of LLaMA-7B; ours are in benchmarks/LOG.md.
CUT_LOSS = 5.0
STEPS = (1024, 512, 256)  # tokens per prefill step: smaller ones begin to cost speed
FRUGAL_STEP, FRUGAL_BITS = 512, 8  # tried together with fewer bits and with cuts
CUTS = (CutOptions.axes, ("layer",), ("ffn",), ("expert",))
COUNTED = ("expert", "expert_ffn", "ffn", "layer")  # axes along which a cut can be counted


@dataclass(frozen=True)
class Change:
    """One way to make a model fit. ``loss``: expected relative increase of perplexity; 0: none, None: unknown.

    ``how``: what to do. ``row``: the planner's row afterwards.
    """

    kind: str
    what: str
    loss: float | None
    how: str
    row: dict[str, Any]

    def as_dict(self) -> dict[str, Any]:
        return {
            "kind": self.kind,
            "change": self.what,
            "expected_loss": self.loss,
            "how": self.how,
            "fits": self.row["fits"],
            "total_bytes": self.row["total_bytes"],
            "headroom_bytes": self.row["headroom_bytes"],
            "max_context": self.row["max_context"],
            "decode_tokens_per_s": self.row["decode_tokens_per_s"],
        }


@dataclass(frozen=True)
class Case:
    """A model, a use, and a Mac that is too small for them."""

    subject: Subject
    needs: Needs
    mac: Mac
    budget: Budget

    def row(self, **changed: Any) -> dict[str, Any]:
        """Return the planner's row with another ``needs``, ``weights`` or ``budget``."""
        given = {"needs": self.needs, "weights": self.subject.weights, "budget": self.budget} | changed
        return planner.assess(given["needs"], given["weights"], self.mac, given["budget"])

    @property
    def axes(self) -> Sequence:
        """Axes to cut along: sets of them, and single ones along which mlx-pare can only count a cut."""
        arch = self.needs.arch
        able = set(arch.cut_axes) if arch.cuttable else set()
        if able >= {*CutOptions.axes}:
            return CUTS[:3]
        counted = [axis for axis in COUNTED if axis not in able and (axis == "layer" or arch.uses(axis))]
        return [*(axes for axes in CUTS if {*axes} <= able), *counted]

    @property
    def usual(self) -> bool:
        """Whether `plan --for` computes the same: use and budget are its defaults, and it knows the Mac by name."""
        use = Use(self.needs.use.context, runtime="mlx")
        known = self.mac in macs.every() or self.mac == macs.of_memory(self.mac.memory_gb)
        return known and self.budget == Budget() and self.needs.use == use

    @property
    def gguf(self) -> bool:
        """Whether fewer bits mean another GGUF file."""
        return self.subject.llama or self.needs.llama

    @property
    def written(self) -> bool:
        """Whether pruning itself writes the form that was asked for; otherwise another tool must follow the cut."""
        form = self.subject.form
        return not form.given or bool(form.packing and form.packing.mode == "affine")

    def using(self, **changed: Any) -> Needs:
        return replace(self.needs, use=replace(self.needs.use, **changed))


def changes(case: Case) -> list[Change]:
    """List the changes that make a model fit, by least expected loss, then by largest headroom.

    These are single changes. Fewer bits and the smallest cut are also combined with a smaller prefill step, and with
    that step and a quantized cache.
    """
    found = [c for way in (_limit, _prefill, _kv_bits, _context, _train, _bits, _cuts) for c in way(case)]
    known = {change.what for change in found}
    for label, loss, frugal in _frugal(case):
        if frugal.row()["fits"]:
            continue  # this use alone is enough, and was found above
        for change in (c for c in (*_bits(frugal), *_cuts(frugal, frugal.axes[:1])) if c.what not in known):
            known.add(change.what)
            found.append(replace(change, what=f"{change.what}; {label}", loss=(change.loss or 0) + loss))
    return sorted(
        (c for c in found if c.row["fits"]),
        key=lambda c: (float("inf") if c.loss is None else c.loss, -c.row["headroom_bytes"]),
    )


def _frugal(case: Case) -> Iterator[tuple[str, float, Case]]:
    """Yield (words, expected loss, case) for uses of the same model that cost almost nothing."""
    use = case.needs.use
    if use.train or case.needs.llama or use.prefill_step <= FRUGAL_STEP:
        return
    step = f"prompts {FRUGAL_STEP} tokens at a time"
    yield step, 0.0, replace(case, needs=case.using(prefill_step=FRUGAL_STEP))
    if not use.kv_bits and not kv_bits_refused(case.needs.arch, use.kv_group):
        needs = case.using(prefill_step=FRUGAL_STEP, kv_bits=FRUGAL_BITS)
        yield f"{step}, KV cache with {FRUGAL_BITS} bits", KV_LOSS[FRUGAL_BITS], replace(case, needs=needs)


# ---- without touching the model ----


def _limit(case: Case) -> Iterator[Change]:
    """Yield a higher wired limit, if that leaves enough for macOS."""
    reserve = case.budget.reserve_bytes
    needed, most = case.row()["total_bytes"] + reserve, case.budget.most(case.mac) + reserve
    if case.budget.limit_bytes or needed > most:
        return
    megabytes = max(min(-(-needed // (1 << 20)) + 256, most >> 20), -(-needed // (1 << 20)))
    raised = replace(case.budget, limit_bytes=megabytes << 20)
    yield Change(
        "limit",
        f"let the GPU wire {gb(megabytes << 20)} until the next restart",
        0.0,
        f"sudo sysctl iogpu.wired_limit_mb={megabytes}",
        case.row(budget=raised),
    )


def _prefill(case: Case) -> Iterator[Change]:
    if case.needs.llama or case.needs.use.train:
        return
    for step in (s for s in STEPS if s < case.needs.use.prefill_step):
        row = case.row(needs=case.using(prefill_step=step))
        if row["fits"]:
            yield Change(
                "prefill_step",
                f"read prompts {step} tokens at a time",
                0.0,
                f"mlx_lm.generate --prefill-step-size {step}",
                row,
            )
            return


def _kv_bits(case: Case) -> Iterator[Change]:
    """Yield a quantized KV cache. mlx-lm does not fuse attention on it, so the peak may need a smaller prefill step."""
    needs = case.needs
    if needs.use.kv_bits or needs.use.train or (not needs.llama and kv_bits_refused(needs.arch, needs.use.kv_group)):
        return
    for bits, loss in KV_LOSS.items():
        if needs.llama:
            row = case.row(needs=case.using(kv_bits=bits))
            yield Change(
                "kv_bits", f"KV cache with {bits} bits", loss, f"llama-cli -ctk q{bits}_0 -ctv q{bits}_0 -fa on", row
            )
            continue
        for step in (needs.use.prefill_step, *(s for s in STEPS if s < needs.use.prefill_step)):
            row = case.row(needs=case.using(kv_bits=bits, prefill_step=step))
            if row["fits"]:
                what = f"KV cache with {bits} bits, prompts {step} tokens at a time"
                yield Change("kv_bits", what, loss, f"mlx_lm.generate --kv-bits {bits} --prefill-step-size {step}", row)
                break


def _context(case: Case) -> Iterator[Change]:
    """Yield a shorter context. It loses no perplexity but the context asked for; 0.002 puts it after cheap changes."""
    longest, use = case.row()["max_context"], case.needs.use
    if 0 < longest < use.context:
        row = case.row(needs=case.using(context=longest))
        what = "rows" if use.train else "a context"
        how = "mlx_lm.lora --max-seq-length" if use.train else "llama-cli -c" if case.needs.llama else "--context"
        yield Change("context", f"{what} of {longest} tokens", 0.002, f"{how} {longest}", row)


def _train(case: Case) -> Iterator[Change]:
    """Yield the largest batch that fits, and the largest with gradient checkpointing: slower, but without loss."""
    use = case.needs.use
    batches = [use.batch, *(b for b in (2, 1) if b < use.batch)] if use.train else []
    for kind in ("batch", "grad_checkpoint"):
        for batch in batches:
            needs = case.using(batch=batch)
            row = case.row(needs=needs.checkpointed() if kind == "grad_checkpoint" else needs)
            if row["fits"]:
                parts = [(f"batches of {batch}", f"--batch-size {batch}")] if batch < use.batch else []
                parts += [("gradient checkpointing", "--grad-checkpoint")] if kind == "grad_checkpoint" else []
                what, flags = " with ".join(p[0] for p in parts), " ".join(p[1] for p in parts)
                yield Change(kind, what, 0.0, f"mlx_lm.lora {flags}", row)
                break


# ---- fewer bits ----


def _bits(case: Case) -> Iterator[Change]:
    """Yield the most bits that fit, fewer than now. Packed weights cannot be trained in full."""
    subject, arch, use = case.subject, case.needs.arch, case.needs.use
    if use.train == "full":
        return
    now = 8 * subject.weights.nbytes / footprint.parameters(arch)["total"]
    if subject.packing:  # a model of 4 bits does not get better by packing it with 5
        now = min(now, subject.packing.bits + 0.5)
    losses = GGUF_LOSS if case.gguf else BITS_LOSS
    lost = min((losses[b] for b in BITS if b <= now), default=losses[2])
    asked = subject.form.packing
    group = asked.group_size if asked and asked.group_size in GROUP_SIZES else 64
    size = "" if group == 64 else f" --q-group-size {group}"
    for bits in (b for b in sorted(BITS, reverse=True) if b + 0.6 < now):
        form = Form(gguf=GGUF_BITS[bits]) if case.gguf else Form(Packing(bits, group))
        row = case.row(weights=form.weights(arch, form.storage(arch, subject.value_bytes)))
        if row["fits"]:
            how = f"llama-quantize MODEL {form.gguf}" if form.gguf else f"mlx_lm.convert -q --q-bits {bits}{size}"
            again = ", from the original weights" if subject.packing and not asked else ""
            yield Change("bits", f"{form}{again}", max(losses[bits] - lost, 0.0), how, row)
            return


# ---- cuts ----


def _cuts(case: Case, ways: Sequence | None = None) -> Iterator[Change]:
    """Yield the smallest cut along each set of axes, and along single axes that mlx-pare cannot cut yet."""
    if case.subject.storage is not None or case.subject.checkpoint is not None:
        found = (_shrunk(case, w) if isinstance(w, str) else smallest_cut(case, w) for w in ways or case.axes)
        yield from filter(None, found)


def smallest_cut(case: Case, axes: Sequence[str] = CutOptions.axes) -> Change | None:
    """Find the largest size along ``axes`` that fits, as `plan --for` does; None if there is none.

    Both use the search of pruning/reach.py.
    """
    arch, stored = case.needs.arch, case.subject.packing
    group = stored.group_size if stored else None
    protected = reach.protected_layers(arch)

    def left(level: reach.Level) -> tuple[Architecture, int]:
        return _after(case, reach.skeleton(arch, level, protected), bool(stored))

    @cache
    def over(level: reach.Level) -> float:
        smaller, nbytes = left(level)
        return nbytes - planner.max_weight_bytes(replace(case.needs, arch=smaller), case.mac, case.budget)

    try:
        space = reach.space(arch, axes, reach.unit(arch, group), protected)
        _, level = reach.largest_within(space, group, over, 0.0, case.mac.name, gb)
    except PareError:  # no size is small enough, or the model cannot be cut along these axes
        return None
    smaller, nbytes, whole = *left(level), space.at(1.0)
    if level == whole:
        return None
    shape = ", ".join(f"{axis} {getattr(level, axis)} of {getattr(whole, axis)}" for axis in axes)
    return _cut(case, shape, smaller, nbytes, _command(case, axes, smaller, nbytes))


def _after(case: Case, keep: Keep, packed: bool) -> tuple[Architecture, int]:
    """Return what a cut leaves, and its bytes: as pruning will write them if there is a directory, else predicted."""
    subject = case.subject
    if subject.checkpoint and case.written:
        from ..pruning.layout import smaller, total_bytes

        packing = subject.form.packing
        arch = smaller(subject.checkpoint, keep, packing)
        return arch, total_bytes(subject.checkpoint, keep, packing, arch)
    arch = cut(case.needs.arch, keep, packed)
    return arch, _predicted(case, arch)


def _command(case: Case, axes: Sequence[str], smaller: Architecture, nbytes: int) -> str:
    """Return the command for this cut. `--for` is only used for the usual case, since it knows no other."""
    form = case.subject.form
    if not case.written:
        quantize = f"mlx_lm.convert -q --q-mode {form.packing.mode}" if form.packing else "mlx_lm.convert"
        quantize = f"llama-quantize MODEL {form.gguf}" if form.gguf else quantize
        target, then = f"--target-params {footprint.parameters(smaller)['total']}", f" && {quantize}"
    elif case.usual:
        target, then = f"--for {case.mac.name} --context {case.needs.use.context}", ""
    else:
        target, then = f"--target-size {nbytes}B", ""
    bits = f" --bits {form.packing.bits} --group-size {form.packing.group_size}" if form.packing and not then else ""
    return f"mlx-pare run MODEL --out RUN {target} --axes {','.join(axes)}{bits}{then}"


def _predicted(case: Case, arch: Architecture) -> int:
    """Predict the bytes of a smaller architecture, stored as the subject is."""
    subject = case.subject
    return footprint.weight_bytes(arch, subject.form.storage(arch, subject.value_bytes) or subject.storage)


def _cut(case: Case, shape: str, smaller: Architecture, nbytes: int, how: str) -> Change:
    whole, left = (footprint.parameters(a)["non_embedding"] for a in (case.needs.arch, smaller))
    kept = left / whole
    what = f"keep {kept:.3f} of the non-embedding parameters: {shape}"
    row = case.row(needs=replace(case.needs, arch=smaller), weights=planner.weights_of(smaller, nbytes))
    return Change("cut", what, CUT_LOSS * (1 - kept) ** 2, how, row)


def _shrunk(case: Case, axis: str) -> Change | None:
    """Count the smallest cut of one axis of a family that mlx-pare cannot cut yet; None if there is none."""
    arch = case.needs.arch
    counts = _counts(arch, axis)
    low, high, best = 0, len(counts) - 1, None
    while low <= high:
        middle = (low + high) // 2
        smaller = _resized(arch, axis, counts[middle])
        nbytes = _predicted(case, smaller)
        if nbytes <= planner.max_weight_bytes(replace(case.needs, arch=smaller), case.mac, case.budget):
            best, low = (counts[middle], smaller, nbytes), middle + 1
        else:
            high = middle - 1
    if best is None or best[0] == _whole(arch, axis):
        return None
    along = f" along {axis}" if arch.cuttable else ""
    how = f"mlx-pare cannot cut {arch.family.name}{along} yet"
    return _cut(case, f"{axis} {best[0]} of {_whole(arch, axis)}", best[1], best[2], how)


def _whole(arch: Architecture, axis: str) -> int:
    return len(arch.layers) if axis == "layer" else max((m.sizes.get(axis, 0) for m in arch.layers), default=0)


def _counts(arch: Architecture, axis: str) -> list[int]:
    """List the possible counts of an axis, ascending: at least the active experts, widths in steps of 64 or 256."""
    whole = _whole(arch, axis)
    if axis == "expert":
        return list(range(max((m.sizes.get("active", 1) for m in arch.layers), default=1), whole + 1))
    step = 1 if axis == "layer" else 256 if whole >= reach.WIDE_FFN else 64
    return sorted({*range(step, whole + 1, step), *([whole] if whole else [])})


def _resized(arch: Architecture, axis: str, size: int) -> Architecture:
    """Resize one axis. Layers that stay are evenly spread, so that every kind keeps its share.

    If one config key holds the size of the axis, the smaller config is read again: other sizes may depend on it.
    """
    total = len(arch.layers)
    if axis == "layer":
        return replace(arch, layers=tuple(arch.layers[i * total // size] for i in range(size)))
    key = arch.family.keys.get(axis, "")
    if arch.config.get(key) == _whole(arch, axis):
        with suppress(PareError):
            smaller = describe({**arch.config, key: size})
            return replace(smaller, tied=arch.tied, parent=arch.parent)
    layers = [{**m.sizes, axis: min(size, m.sizes[axis])} if axis in m.sizes else m.sizes for m in arch.layers]
    return replace(arch, layers=tuple(replace(m, sizes=s) for m, s in zip(arch.layers, layers, strict=True)))
