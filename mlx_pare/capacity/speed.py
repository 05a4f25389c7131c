"""Estimate tokens per second of writing and of reading a prompt from the bandwidth and the FLOPS of a chip.

    decode    seconds per token = bytes read / (share * bandwidth) + layers * seconds per layer
    prefill   tokens per second = share * FLOPS / floating-point operations per token

Both shares and the seconds per layer were fitted to published measurements. benchmarks/fit_accuracy.py prints the error
for each model.
"""

from __future__ import annotations

from ..arch.axes import length
from ..base.errors import UsageError
from ..model import footprint
from .macs import Mac
from .memory import Needs

# Share of the bandwidth that decoding reaches, by runtime and kind of chip ("" is the base one).
BANDWIDTH_SHARE = {
    "mlx": {"": 0.90, "Pro": 0.90, "Max": 0.91, "Ultra": 0.85},
    "llama.cpp": {"": 0.88, "Pro": 0.88, "Max": 0.90, "Ultra": 0.82},
}
# Seconds per layer that do not depend on bandwidth: launching kernels, waiting for one another.
LAYER_SECONDS = {
    "mlx": {"": 95e-6, "Pro": 95e-6, "Max": 64e-6, "Ultra": 80e-6},
    "llama.cpp": {"": 75e-6, "Pro": 75e-6, "Max": 90e-6, "Ultra": 120e-6},
}
OLD_LAYERS = {
    1: 1.9,
    2: 1.5,
    3: 1.3,
}  # factor on it for llama.cpp, by generation (and by the age of those measurements)
POST_NORMS = 1.6  # factor: blocks with norms behind attention and ffn as well (Gemma, OLMo 2)
EXPERTS = 1.5  # factor: routing and gathering experts
PREFILL_SHARE = {"mlx": 0.65, "llama.cpp": 0.67}  # of FP32 FLOPS
# Unpacking llama.cpp's K-quants takes FLOPs per weight. They limit chips with few FLOPS per byte of bandwidth.
# Fitted on Llama 3 8B and 70B (M1 Max, M2 Ultra, M3 Max); the M4 Pro shows no such limit.
K_QUANT_FLOPS = {1: 28, 2: 28, 3: 28}
K_QUANT_PREFILL = 0.87  # factor on the share, same source
KV_WITHOUT_FLASH = 6  # times its bytes, without flash attention: fitted on Llama 3, 512 to 8192 tokens (builds of 2024)
NEURAL_TFLOPS_PER_CORE = 1.0  # M5, effective: 0.91 (Ministral-3B on M5 Max) to 1.07 (LLaMA-2 7B on M5 Pro and Max)
NEURAL_SINCE = 5

# Worst error of the estimates on models and chips like those they were fitted on; for others it is assumed.
ERROR_MEASURED, ERROR_ELSEWHERE = 0.20, 0.35


def decode(needs: Needs, read_bytes: int, mac: Mac, k_quants: int = 0) -> float | None:
    """Estimate the speed of writing. A larger batch reads more experts, which is not counted.

    Args:
        needs: architecture and use.
        read_bytes: bytes of weights read for one token (footprint.read_bytes).
        mac: the Mac.
        k_quants: weights of K-quant types that a step unpacks (planner.Weights).
    Returns:
        Tokens per second, all sequences of a batch together; None if the bandwidth is not known.
    """
    if mac.bandwidth_gb_s is None:
        return None
    share, layer_seconds = constants(needs.runtime, mac)
    moved, layers = work(needs)
    speed = share * mac.bandwidth_gb_s * 1e9
    flops = K_QUANT_FLOPS.get(mac.generation, 0) * k_quants
    unpacking = flops / (mac.tflops * 1e12) if mac.tflops else 0.0
    return needs.use.batch / (max(read_bytes / speed, unpacking) + moved / speed + layers * layer_seconds)


def readable_bytes(needs: Needs, mac: Mac, tokens_per_s: float) -> int:
    """Compute how many bytes of weights can be read per step at a speed: the inverse of ``decode`` without K-quants.

    Args:
        needs: architecture and use.
        mac: the Mac.
        tokens_per_s: speed of writing, all sequences of a batch together.
    Returns:
        Bytes; 0 if the speed cannot be reached.
    Raises:
        UsageError: the bandwidth of the Mac is not known.
    """
    if mac.bandwidth_gb_s is None:
        raise UsageError(
            f"the bandwidth of {mac.name} is not known, so no speed can be asked of it", "name another Mac"
        )
    share, layer_seconds = constants(needs.runtime, mac)
    moved, layers = work(needs)
    seconds = needs.use.batch / tokens_per_s - layers * layer_seconds
    return max(0, int(seconds * share * mac.bandwidth_gb_s * 1e9 - moved))


def constants(runtime: str, mac: Mac) -> tuple[float, float]:
    """Return (share of the bandwidth, seconds per layer) on a Mac."""
    kind = mac.chip.rpartition(" ")[2] if " " in mac.chip else ""
    old = OLD_LAYERS.get(mac.generation, 1.0) if runtime == "llama.cpp" else 1.0
    shares, seconds = BANDWIDTH_SHARE[runtime], LAYER_SECONDS[runtime]
    return shares.get(kind, shares[""]), old * seconds.get(kind, seconds[""])


def work(needs: Needs) -> tuple[float, float]:
    """Return the work of one writing step besides reading weights: (bytes of cache and states, layers).

    Heavier layers count as more than one.
    """
    arch, layers = needs.arch, 0.0
    for layer in arch.layers:
        roles = {spec.role for spec in arch.family.blocks[layer.kind]}
        layers += (POST_NORMS if "ffn_post_norm" in roles else 1) * (EXPERTS if layer.kind.endswith("+moe") else 1)
    slower = KV_WITHOUT_FLASH if needs.llama and not needs.use.flash else 1
    return slower * needs.kv_read(needs.use.context) + needs.state, layers


def prefill(needs: Needs, mac: Mac, k_quants: int = 0) -> float | None:
    """Estimate the speed of reading a prompt. Attention that is not fused is slower than this.

    Args:
        needs: architecture and use.
        mac: the Mac.
        k_quants: weights of K-quant types (planner.Weights).
    Returns:
        Tokens per second; None if the FLOPS of the chip are not known.
    """
    if mac.tflops is None:
        return None
    if mac.generation >= NEURAL_SINCE and mac.gpu_cores:
        return NEURAL_TFLOPS_PER_CORE * mac.gpu_cores * 1e12 / prompt_flops(needs)
    share = PREFILL_SHARE[needs.runtime] * (K_QUANT_PREFILL if k_quants else 1)
    return share * mac.tflops * 1e12 / prompt_flops(needs)


def prompt_flops(needs: Needs) -> float:
    """Return the FLOPs per prompt token, averaged over a prompt. The head works on the last only: not counted."""
    arch, context = needs.arch, needs.use.context
    window, attention = footprint.window_of(arch, context), 0.0
    for layer in arch.layers:
        if layer.mixer.attends:
            seen = min(context / 2, window) if layer.mixer.windowed else context / 2
            attention += 4 * footprint.query_heads(layer) * length(layer.mixer.head, layer.sizes) * seen
    return 2 * needs.active + attention


def error(needs: Needs, mac: Mac) -> float:
    """Return the error of an estimate as a share of it: 0.2 means from 0.8 to 1.2 times."""
    ordinary = all(m.kind in ("full_attention", "sliding_attention") for m in needs.arch.layers)
    known = 1 <= mac.generation < NEURAL_SINCE and not mac.unsure("bandwidth")
    return ERROR_MEASURED if ordinary and known else ERROR_ELSEWHERE
