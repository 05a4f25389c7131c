"""Which Mac runs a model, up to which context, how fast: arithmetic on the config and a table of Macs.

    peak = weights + KV cache + activations <= what macOS lets the GPU keep resident

Weights and cache are exact (footprint.py). Activations, budgets and speeds rest on the constants below, each of which
says where it comes from. Memory sizes of Macs are GiB, as Apple counts them; everything else is bytes and seconds.
Tested against published measurements (tests/test_fit.py), never run against a Mac of our own.
"""

from __future__ import annotations

import csv
import difflib
import platform
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache, cached_property
from pathlib import Path
from typing import Any

from ..arch import Architecture
from ..errors import UsageError
from . import footprint

GIB = 2**30

# ---- constants: measured means published for real Macs by the source, assumed means nobody has ----

# Share of memory that Metal's recommendedMaxWorkingSetSize is on macOS 26, by memory up to this many GiB.
WORKING_SET_26 = (
    (8, 2 / 3),  # assumed: as on older macOS
    (16, 0.74),  # measured: 12713.12 MB (ggml CI, M4; llama.cpp log, M1 Pro)
    (24, 0.74),  # recalled: 19069.67 MB; 18 GiB interpolated
    (32, 0.78),  # recalled: 26800.60 MB
    (36, 0.78),  # recalled
    (48, 0.78),  # measured: 40200.90 MB (llama.cpp PR 16634, M5 Max)
    (64, 0.81),  # measured: 51.84 GiB (lmstudio-bug-tracker 2250, M1 Max), 55.7 GB (M4 Max)
    (96, 0.82),  # assumed: between its neighbours
    (128, 0.84),  # measured: 107.52 GiB (ds4 893, two Macs; osaurus 1958)
    (512, 0.84),  # assumed: as 128
)
# The same on older macOS. Measured: 11453.25 MB of 16 GiB, 17179.89 MB of 24, 21845.34 MiB of 32; the rule is that of
# llama.cpp discussion 2182. Which version changed it is not known; 16 to 25 do not exist, so 26 it is taken to be.
WORKING_SET_OLDER = ((32, 2 / 3), (512, 0.75))
NEW_WORKING_SET = 16  # macOS 26 calls itself 16 to programs built before it

PREFILL_CHUNK = 2048  # tokens; mlx_lm/generate.py prefill_step_size
ACTIVATION_BYTES = 0.70e9  # measured: peak - weights - cache of Qwen3-4B, 0.64 to 0.75 (mlx-lm BENCHMARKS.md)
ACTIVATION_WIDTH = 2560 + 9728  # hidden + ffn of Qwen3-4B; that activations grow with it is assumed
FUSED_HEAD_DIMS = (64, 72, 80, 96, 128)  # read in mlx scaled_dot_product_attention.cpp use_fallback
FUSED_SINCE_M5 = (256,)  # read there; needs half precision and mlx >= 0.32.4
SCORE_BYTES = 2  # one live buffer of half floats: measured on the 8k to 192k ladder of mlx-lm issue 1480, within 0.3 %

BANDWIDTH_SHARE = 0.90  # measured with MLX: 0.884 on M4 Pro (24 models), 0.911 on M4 Max (7 packings of one)
BANDWIDTH_SHARE_ULTRA = 0.85  # measured for llama.cpp 0.75 to 0.95, assumed for MLX
LAYER_SECONDS = 95e-6  # measured with it on M4 Pro (64e-6 on M4 Max); assumed for all others
LAYER_SECONDS_POST_NORMS = 150e-6  # estimated from how far Gemma, whose blocks have twice the norms, was off

PREFILL_SHARE = 0.65  # of FP32 TFLOPS; measured: 0.60 to 0.77 on M1 to M4 (llama.cpp discussion 4167, BENCHMARKS.md)
NEURAL_TFLOPS_PER_CORE = {5: 0.91}  # by generation, effective; one measurement: Ministral-3B on M5 Max, 4820 tokens/s

LONGEST_CONTEXT = 1 << 20  # for a config without max_position_embeddings


# ---- Macs ----


@dataclass(frozen=True)
class Mac:
    """One Mac configuration. ``memory_gb`` is GiB; None stands for unknown.

    ``flags``: how well bandwidth/memory/TFLOPS are known, V read in a source, R recalled, D derived, U unknown.
    ``wired_limit_bytes`` and ``macos`` (major version) are known of the Mac this runs on only.
    """

    name: str
    chip: str
    gpu_cores: int | None
    memory_gb: int
    bandwidth_gb_s: float | None
    tflops: float | None
    flags: str
    wired_limit_bytes: int | None = None
    macos: int | None = None

    @property
    def generation(self) -> int:
        """4 of "M4 Pro"; 0 when the chip is not one of these."""
        number = self.chip.partition(" ")[0].removeprefix("M")
        return int(number) if number.isdigit() else 0


def mac_name(chip: str, gpu_cores: int | None, memory_gb: int) -> str:
    """The canonical name, "m4-pro-20c-24gb"; without the cores the short one, "m4-pro-24gb"."""
    cores = f"-{gpu_cores}c" if gpu_cores else ""
    return f"{chip.lower().replace(' ', '-')}{cores}-{memory_gb}gb"


def macs() -> list[Mac]:
    """Every configuration in macs.csv, oldest first."""
    return list(_table())


@cache
def _table() -> tuple[Mac, ...]:
    with Path(__file__).with_name("macs.csv").open(encoding="utf-8", newline="") as file:
        return tuple(_mac(row) for row in csv.DictReader(file))


def _mac(row: dict[str, str]) -> Mac:
    cores, memory = int(row["gpu_cores"]), int(row["memory_gb"])
    bandwidth, tflops = (float(row[key]) if row[key] else None for key in ("bandwidth_gb_s", "tflops"))
    return Mac(mac_name(row["chip"], cores, memory), row["chip"], cores, memory, bandwidth, tflops, row["flags"])


def find(name: str) -> Mac:
    """The Mac of a name like "m4-24gb" (the largest bin with this memory) or "m4-pro-20c-24gb".

    Raises UsageError with the nearest names when there is no such Mac.
    """
    known = {mac_name(m.chip, None, m.memory_gb): m for m in sorted(macs(), key=lambda m: m.gpu_cores or 0)}
    known |= {m.name: m for m in macs()}
    asked = "-".join(name.lower().replace("_", "-").split()).removeprefix("apple-")
    if asked in known:
        return known[asked]
    near = difflib.get_close_matches(asked, known, n=4, cutoff=0.7)
    cure = f"the nearest are {', '.join(near)}" if near else "write chip and memory, such as m4-24gb or m4-pro-20c-24gb"
    raise UsageError(f"no Mac is known as {name!r}", cure)


def this_mac() -> Mac | None:
    """The Mac this runs on, with its own wired limit and macOS version; None elsewhere.

    A configuration the table lacks gets the speeds of its chip with as many cores, or unknown ones.
    """
    if sys.platform != "darwin":
        return None
    from ..machine import this_machine

    machine = this_machine()
    chip = (machine.chip or "unknown").removeprefix("Apple ")
    memory = round(machine.memory_bytes / GIB)
    same = [m for m in macs() if m.chip == chip and machine.gpu_cores in (None, m.gpu_cores)]
    nearest = max(same, key=lambda m: (m.memory_gb == memory, m.gpu_cores), default=None)
    cores = machine.gpu_cores or (nearest.gpu_cores if nearest else None)
    unknown = Mac("", chip, cores, memory, None, None, "U/U/U")
    version = platform.mac_ver()[0].partition(".")[0]
    return replace(
        nearest or unknown,
        name=mac_name(chip, cores, memory),
        memory_gb=memory,
        wired_limit_bytes=machine.wired_limit_bytes,
        macos=int(version) if version else None,
    )


def budget_bytes(mac: Mac, macos: int = 26) -> int:
    """Bytes the GPU may keep resident: iogpu.wired_limit_mb where set, else Metal's recommendedMaxWorkingSetSize.

    ``macos``: the major version to assume where it is not known, that is for every Mac but this one.
    """
    if mac.wired_limit_bytes:
        return mac.wired_limit_bytes
    table = WORKING_SET_26 if (mac.macos or macos) >= NEW_WORKING_SET else WORKING_SET_OLDER
    share = next((share for limit, share in table if mac.memory_gb <= limit), table[-1][1])
    return int(mac.memory_gb * GIB * share)


# ---- what a model asks for ----


@dataclass(frozen=True)
class Needs:
    """What one architecture asks of a Mac besides its weights; counted once, then used for every row of a table."""

    arch: Architecture
    value_bytes: int = 2  # of the KV cache

    @cached_property
    def _rates(self) -> tuple[int, int]:
        return footprint.kv_rates(self.arch, self.value_bytes)

    @cached_property
    def _widest(self) -> tuple[int, int, bool]:
        """(head_dim, query heads, whether that layer slides) of the layer with the largest matrix of scores."""
        found = ((m.sizes["head_dim"], m.sizes["kv_head"] * m.sizes["group"], m.kind) for m in self.arch.layers)
        head_dim, heads, kind = max(found, key=lambda layer: (layer[2] != "sliding_attention", layer[1]))
        return head_dim, heads, kind == "sliding_attention"

    @cached_property
    def counted(self) -> dict[str, int]:
        return footprint.parameters(self.arch)

    @cached_property
    def lookup_share(self) -> float:
        """The share of the parameters that is the untied input embedding."""
        return footprint.lookup_bytes(self.arch, footprint.dense(1)) / self.counted["total"]

    def kv(self, context: int) -> int:
        window = footprint.window_of(self.arch, context)
        full, sliding = self._rates
        return full * footprint.kv_positions(context) + sliding * footprint.kv_positions(context, window)

    def activations(self, context: int, generation: int) -> int:
        """Bytes that come on top of weights and cache while mlx-lm reads a prompt of ``context`` tokens in chunks.

        Three terms: a constant measured on one model, scaled with hidden + ffn (an assumption; not scaled down for
        short prompts, to err on the safe side); the matrix of attention scores where MLX has no fused kernel for the
        head size; and the rows by which a sliding window's cache exceeds its window until decoding begins.
        """
        width = self.arch.sizes["hidden"] + max(layer.sizes["ffn"] for layer in self.arch.layers)
        chunk = min(PREFILL_CHUNK, context)
        window = footprint.window_of(self.arch, context)
        reach = min(context, window - 1 + PREFILL_CHUNK)
        overhang = self._rates[1] * (reach - min(context, window))
        head_dim, heads, slides = self._widest
        scores = heads * chunk * (reach if slides else context) * SCORE_BYTES
        if head_dim in FUSED_HEAD_DIMS or (head_dim in FUSED_SINCE_M5 and generation >= 5):
            scores = 0
        return int(ACTIVATION_BYTES * width / ACTIVATION_WIDTH) + scores + overhang

    def prompt_flops(self, context: int) -> float:
        """Floating-point operations per prompt token, averaged over a prompt; the head works on the last token only."""
        attention = 0.0
        window = footprint.window_of(self.arch, context)
        for layer in self.arch.layers:
            seen = min(context / 2, window) if layer.kind == "sliding_attention" else context / 2
            attention += 4 * layer.sizes["kv_head"] * layer.sizes["group"] * layer.sizes["head_dim"] * seen
        return 2 * self.counted["non_embedding"] + attention


def activation_bytes(arch: Architecture, mac: Mac, context: int) -> int:
    """See Needs.activations."""
    return Needs(arch).activations(context, mac.generation)


# ---- verdicts ----


def fit(
    arch: Architecture,
    weights_bytes: int,
    macs: Sequence[Mac],
    context: int,
    macos: int = 26,
    lookup_bytes: int | None = None,
    value_bytes: int = 2,
) -> list[dict[str, Any]]:
    """One row per Mac; see ``assess``, which takes the same arguments."""
    needs = Needs(arch, value_bytes)
    return [_row(needs, weights_bytes, mac, context, macos, lookup_bytes) for mac in macs]


def assess(
    arch: Architecture,
    storage_bytes: int,
    mac: Mac,
    context: int,
    macos: int = 26,
    lookup_bytes: int | None = None,
    value_bytes: int = 2,
) -> dict[str, Any]:
    """One model on one Mac at one context (tokens, prompt and answer together).

    ``storage_bytes``: all weights (footprint.weight_bytes). ``lookup_bytes``: the untied input embedding among them
    (footprint.lookup_bytes), by default its share of the parameters. ``value_bytes``: of the KV cache.

    Keys: mac, chip, memory_gb (GiB), budget_bytes, weights_bytes, kv_bytes, activation_bytes, total_bytes, fits,
    headroom_bytes (negative: that much is missing), max_context (tokens, a multiple of 256 or what the model was made
    for; 0: not even 256), decode_tokens_per_s and prefill_tokens_per_s: None where the chip is not known well enough,
    and where the model does not fit, because then it is paged. Whether it was made for ``context`` is not judged.
    Raises UsageError for a context below 1.
    """
    return _row(Needs(arch, value_bytes), storage_bytes, mac, context, macos, lookup_bytes)


def max_weight_bytes(arch: Architecture, mac: Mac, context: int, macos: int = 26) -> int:
    """How many bytes of weights leave room for the cache and activations of ``arch`` (as cut); 0 when none do."""
    needs = Needs(arch)
    return max(budget_bytes(mac, macos) - needs.kv(context) - needs.activations(context, mac.generation), 0)


def _row(needs: Needs, weights: int, mac: Mac, context: int, macos: int, lookup: int | None) -> dict[str, Any]:
    if context < 1:
        raise UsageError(f"a context of {context} tokens means nothing", "give at least 1")
    budget = budget_bytes(mac, macos)
    kv, activations = needs.kv(context), needs.activations(context, mac.generation)
    total = weights + kv + activations
    fits = total <= budget
    lookup = int(weights * needs.lookup_share) if lookup is None else lookup
    return {
        "mac": mac.name,
        "chip": mac.chip,
        "memory_gb": mac.memory_gb,
        "budget_bytes": budget,
        "weights_bytes": weights,
        "kv_bytes": kv,
        "activation_bytes": activations,
        "total_bytes": total,
        "fits": fits,
        "headroom_bytes": budget - total,
        "max_context": _max_context(needs, budget - weights, mac),
        "decode_tokens_per_s": _decode(needs, weights - lookup + kv, mac) if fits else None,
        "prefill_tokens_per_s": _prefill(needs, mac, context) if fits else None,
    }


def _max_context(needs: Needs, room: int, mac: Mac) -> int:
    """The largest multiple of 256 tokens whose cache and activations take at most ``room`` bytes."""
    limit = needs.arch.config.get("max_position_embeddings") or LONGEST_CONTEXT
    step, generation = footprint.KV_STEP, mac.generation
    low, high = 0, -(-limit // step)  # in steps; memory grows with context, so halving finds the last that fits
    while low < high:
        middle = (low + high + 1) // 2
        if needs.kv(middle * step) + needs.activations(middle * step, generation) <= room:
            low = middle
        else:
            high = middle - 1
    return min(low * step, limit)


def _decode(needs: Needs, read: int, mac: Mac) -> float | None:
    """Tokens per second, writing one at a time: ``read`` bytes through memory, and a fixed cost per layer."""
    if mac.bandwidth_gb_s is None:
        return None
    share = BANDWIDTH_SHARE_ULTRA if mac.chip.endswith("Ultra") else BANDWIDTH_SHARE
    table = next(iter(needs.arch.family.blocks.values()))
    post_norms = any(spec.role == "ffn_post_norm" for spec in table)
    per_layer = LAYER_SECONDS_POST_NORMS if post_norms else LAYER_SECONDS
    return 1 / (read / (share * mac.bandwidth_gb_s * 1e9) + len(needs.arch.layers) * per_layer)


def _prefill(needs: Needs, mac: Mac, context: int) -> float | None:
    """Tokens per second, reading a prompt of ``context`` tokens: bound by arithmetic. Unfused attention is slower."""
    neural = NEURAL_TFLOPS_PER_CORE.get(mac.generation)
    if neural and mac.gpu_cores:
        return neural * mac.gpu_cores * 1e12 / needs.prompt_flops(context)
    if mac.tflops is None:
        return None
    return PREFILL_SHARE * mac.tflops * 1e12 / needs.prompt_flops(context)
