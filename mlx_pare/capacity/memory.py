"""What a model needs besides its weights: KV cache and states, and activations while a prompt is read.

    peak = weights + KV cache and states + activations (attention scores included)

Cache and states are exact (model/footprint.py). The rest are estimates from the constants below, each with its source.
Everything is in bytes. Published measurements test it (tests/capacity/test_fit_truth.py).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

from ..arch import Architecture
from ..arch.axes import length
from ..arch.spec import Layer
from ..base.errors import UsageError
from ..model import footprint
from ..options import option
from ..options.option import setting
from ..options.settings import ReachOptions
from ..options.values import COUNT

# Activations while mlx-lm reads chunks of PREFILL_STEP tokens: (bytes, width). The bytes are published peaks less
# weights, cache and scores. The width is hidden + active ffn of the measured model. Assumption: activations grow with
# the width of the model and the length of the chunk.
PREFILL_STEP = 2048  # tokens; mlx_lm/generate.py prefill_step_size
ACTIVATIONS = {
    "dense": (0.70e9, 2560 + 9728),  # Qwen3-4B, seven packings: 0.64 to 0.75 (mlx-lm BENCHMARKS.md)
    "moe": (0.79e9, 2048 + 8 * 768),  # Qwen3-30B-A3B, four packings: 0.78 to 0.79 (same)
    "linear": (1.44e9, 2048 + 8 * 512 + 512),  # Qwen3.6-35B-A3B at eight lengths (mlx-lm issue 1480)
}

FUSED_HEADS = (64, 72, 80, 96, 128)  # read in mlx scaled_dot_product_attention.cpp use_fallback
# Read there at 846d176 (August 2026): on M5 and later with macOS 26.2, for chunks of at least 1024 tokens without an
# array as mask, which excludes layers with a sliding window.
FUSED_SINCE_M5, FUSED_CHUNK = (256,), 1024
SCORE_BYTES = 2  # one live buffer of half floats: measured on the 8k to 192k ladder of mlx-lm issue 1480, within 0.3 %
TWO_BUFFERS = 2  # scores and their softmax: assumed if mlx-lm itself computes them (quantized cache, softcap)

QUANTIZED_FROM = 5000  # tokens; mlx_lm/generate.py quantized_kv_start: shorter caches stay floats
KV_BITS = (2, 3, 4, 8)  # QuantizedKVCache in mlx_lm/models/cache.py lays out other widths wrongly and fails
LLAMA_KV_BYTES = {8: 34 / 32, 5: 22 / 32, 4: 18 / 32}  # q8_0, q5_0, q4_0: bytes per value, ggml-common.h
UBATCH = 512  # tokens; llama.cpp's default n_ubatch

TRAIN_BATCH, TRAIN_LENGTH = 4, 2048  # rows and tokens per row; mlx_lm/lora.py CONFIG_DEFAULTS
LORA_RANK, LORA_LAYERS = 8, 16  # same
ADAM_BYTES_LORA = 16  # per adapter value: float32 value, gradient and two moments
ADAM_BYTES_FULL = 6  # per weight, on top of the bf16 weight: gradient and moments keep its dtype (mlx optimizers.py)
LOGIT_BYTES = 8  # per token and word of the vocabulary: measured on the CPU backend, 7.1 to 7.8


@dataclass(frozen=True)
class Use:
    """How a model is used. ``context``: tokens of prompt and answer together; in training, tokens per row.

    ``kv_bits``: bits of a quantized KV cache; None: floats. ``runtime``: "mlx" or "llama.cpp"; None: the one that the
    form of the weights is for. ``train``: None, "lora" or "full". ``flash``: llama.cpp's flash attention, its default
    today. Raises UsageError if a value is unknown or the values do not go together.
    """

    context: int = setting(ReachOptions.context, values=COUNT)
    batch: int = setting(1, values=COUNT)
    kv_bits: int | None = None
    kv_group: int = 64
    prefill_step: int = setting(PREFILL_STEP, values=COUNT)
    runtime: str | None = None
    train: str | None = None
    flash: bool = True

    def __post_init__(self) -> None:
        option.check(self)
        for name, known in (("runtime", (None, "mlx", "llama.cpp")), ("train", (None, "lora", "full"))):
            if getattr(self, name) not in known:
                raise UsageError(
                    f"unknown {name} {getattr(self, name)!r}", f"choose {' or '.join(filter(None, known))}"
                )
        allowed = {"mlx": KV_BITS, "llama.cpp": tuple(LLAMA_KV_BYTES)}.get(self.runtime, (*KV_BITS, *LLAMA_KV_BYTES))
        if self.kv_bits is not None and self.kv_bits not in allowed:
            bits = ", ".join(map(str, sorted(set(allowed))))
            raise UsageError(f"{self.runtime or 'mlx'} has no KV cache of {self.kv_bits} bits", f"choose from {bits}")
        if self.train and self.runtime == "llama.cpp":
            raise UsageError("llama.cpp does not train", "leave --train away, or train it in MLX's form")


def kv_bits_refused(arch: Architecture, group: int = 64) -> str | None:
    """Say why mlx-lm cannot quantize this model's KV cache; None if it can. Source: mlx_lm/models/cache.py, base.py."""
    mixers = [layer.mixer for layer in arch.layers if layer.mixer.attends]
    if any(mixer.windowed and mixer.cache for mixer in mixers):
        return "mlx-lm cannot quantize the cache of sliding-window layers (RotatingKVCache)"
    if any("kv_latent" in layer.sizes for layer in arch.layers):
        return "mlx-lm's latent attention reads the cache itself and cannot use a quantized one"
    if any(spec.role == "sinks" for table in arch.family.blocks.values() for spec in table):
        return "mlx-lm has no quantized attention with sinks"
    if any(layer.sizes["head_dim"] % group for layer in arch.layers if layer.mixer.cache):
        return f"the head size is no multiple of the group of {group}"
    return None


@dataclass(frozen=True)
class Needs:
    """What one architecture needs in one use; counted once, then used for every Mac and every context.

    ``value_bytes``: width of the dtype the model computes in, and so of its cache. ``grad_checkpoint``: training keeps
    only the input of each layer and computes the rest twice. Raises UsageError if mlx-lm cannot quantize the cache.
    """

    arch: Architecture
    use: Use = Use()
    value_bytes: int = 2
    grad_checkpoint: bool = False

    def __post_init__(self) -> None:
        if self.use.runtime is None:
            object.__setattr__(self, "use", replace(self.use, runtime="mlx"))
        if self.use.kv_bits and not self.llama and (why := kv_bits_refused(self.arch, self.use.kv_group)):
            raise UsageError(f"--kv-bits {self.use.kv_bits}: {why}", "leave it out, or use --runtime llama.cpp")

    @property
    def llama(self) -> bool:
        return self.runtime == "llama.cpp"

    @property
    def runtime(self) -> str:
        return self.use.runtime or "mlx"

    @property
    def floats(self) -> int:
        """Bytes of a cached float: llama.cpp's cache is f16 for every model."""
        return 2 if self.llama else self.value_bytes

    @cached_property
    def active(self) -> int:
        """Number of parameters that a token is multiplied with."""
        return footprint.active_parameters(self.arch)

    @cached_property
    def cache(self) -> footprint.Cache:
        return footprint.cache_values(self.arch, latent=self.llama)

    # ---- what stays ----

    def quantized(self, context: int) -> bool:
        """Tell whether the cache is quantized once it holds ``context`` tokens."""
        return bool(self.use.kv_bits) and (self.llama or context >= QUANTIZED_FROM)

    def _value(self, context: int) -> float:
        """Return the bytes of one value of a growing cache."""
        if not self.quantized(context):
            return self.floats
        if self.llama:
            return LLAMA_KV_BYTES[self.use.kv_bits]
        return self.use.kv_bits / 8 + 2 * self.value_bytes / self.use.kv_group

    def kv(self, context: int) -> int:
        """Return the KV cache of all sequences, in bytes.

        llama.cpp allocates it for the whole context at once, and for a window one ubatch more.
        """
        window = footprint.window_of(self.arch, context)
        reach = footprint.kv_positions(min(context, window + UBATCH)) if self.llama else min(context, window)
        width = self._value(context)
        grown = width * self.cache.growing * footprint.kv_positions(context)
        return int(self.use.batch * (grown + (width if self.llama else self.value_bytes) * self.cache.windowed * reach))

    def kv_read(self, context: int) -> float:
        """Return the bytes of the cache that a decoding step reads: its filled positions only."""
        window = footprint.window_of(self.arch, context)
        wide = self._value(context)
        narrow = wide if self.llama else self.value_bytes
        return self.use.batch * (
            wide * self.cache.growing * context + narrow * self.cache.windowed * min(context, window)
        )

    @cached_property
    def state(self) -> int:
        """Bytes of the states of linear attention and short convolutions, for all sequences and any context."""
        width = 4 if self.llama else self.value_bytes
        return self.use.batch * (width * self.cache.state + 4 * self.cache.state_f32)

    # ---- activations while a prompt is read ----

    def scores(self, context: int, generation: int) -> int:
        """Return the bytes of the largest matrix of attention scores: heads x chunk x positions, if not fused.

        Source: mlx scaled_dot_product_attention.cpp use_fallback; mlx_lm/models/base.py for a quantized cache.
        llama.cpp has no such matrix with flash attention, otherwise float32 scores of one ubatch.
        """
        if self.llama and self.use.flash:
            return 0
        if self.llama:
            return 4 * UBATCH * context * max((footprint.query_heads(m) for m in self._attending), default=0)
        return self.use.batch * max((self._scores(layer, context, generation) for layer in self._attending), default=0)

    @cached_property
    def _attending(self) -> list[Layer]:
        """One attending layer per kind and number of heads."""
        found: dict[tuple, Layer] = {}
        for layer in self.arch.layers:
            if layer.mixer.attends:
                found[layer.kind, footprint.query_heads(layer)] = layer
        return list(found.values())

    def _scores(self, layer: Layer, context: int, generation: int) -> int:
        mixer, chunk = layer.mixer, min(self.use.prefill_step, context)
        reach = self._reach(context) if mixer.windowed else context
        matrix = footprint.query_heads(layer) * chunk * reach * SCORE_BYTES
        if (self.quantized(context) and mixer.cache) or self.arch.config.get("attn_logit_softcapping"):
            return TWO_BUFFERS * matrix
        if not mixer.fused:  # latent attention: additive mask, plus keys and values of all heads of one layer
            nope, v = layer.sizes["nope_dim"], layer.sizes["v_dim"]
            own = 0 if nope == v and nope in FUSED_HEADS else matrix
            return matrix + own + footprint.query_heads(layer) * reach * (nope + v) * SCORE_BYTES
        head = length(mixer.head, layer.sizes)
        # a prompt shorter than that is not fused either, but then this is less than ACTIVATIONS
        late = generation >= 5 and self.use.prefill_step >= FUSED_CHUNK and not mixer.windowed
        return 0 if head in FUSED_HEADS or (head in FUSED_SINCE_M5 and late) else matrix

    def _reach(self, context: int) -> int:
        """Return the positions in a sliding layer's cache while chunks of a prompt are read: window - 1 + chunk."""
        return min(context, footprint.window_of(self.arch, context) - 1 + self.use.prefill_step)

    def activations(self, context: int, generation: int) -> int:
        """Return the bytes on top of weights and cache while ``context`` tokens are read in chunks, scores included.

        mlx-lm: a measured constant, scaled with the width of the model and the length of a chunk (not reduced for short
        prompts, to be safe), or the scores if they are larger. A plain transformer does not hold both at once (four
        peaks of gemma-4-31b, claude-code-local issue 44), a hybrid does (eight of Qwen3.6-35B-A3B). The positions by
        which a sliding window's cache exceeds its window are added. llama.cpp: logits and hidden states of one ubatch,
        as it logs them (258.50 MiB for Llama 3 8B), or the scores without flash attention if they are larger.
        """
        sizes = self.arch.sizes
        if self.llama:
            return max(4 * UBATCH * (sizes["vocab"] + sizes["hidden"]), self.scores(context, generation))
        if self.quantized(context):  # before that the cache was floats, and the peak may lie there
            before = QUANTIZED_FROM - 1
            earlier = self.kv(before) + self.activations(before, generation) - self.kv(context)
            return max(earlier, self._working(context, generation))
        return self._working(context, generation)

    def _working(self, context: int, generation: int) -> int:
        """Return the activations of mlx-lm once the cache is as at ``context``, in bytes."""
        batch = self.use.batch
        constant, width = ACTIVATIONS[self._sort]
        work = constant * self._width / width * self.use.prefill_step / PREFILL_STEP
        window = footprint.window_of(self.arch, context)
        overhang = self.cache.windowed * self.value_bytes * (self._reach(context) - min(context, window))
        work, scores = batch * work, self.scores(context, generation)
        return int((work + scores if self._sort == "linear" else max(work, scores)) + batch * overhang)

    @cached_property
    def _sort(self) -> str:
        if any(layer.mixer.state_f32 for layer in self.arch.layers):
            return "linear"
        return "moe" if any(layer.kind.endswith("+moe") for layer in self.arch.layers) else "dense"

    @cached_property
    def _width(self) -> int:
        return self.arch.sizes["hidden"] + max(self._active_ffn(layer) for layer in self.arch.layers)

    def _active_ffn(self, layer: Layer) -> int:
        """Count the channels a token goes through: dense ffn, active experts and shared experts."""
        sizes, axes = layer.sizes, self._axes[layer.kind]
        width = sum(sizes[axis] for axis in ("ffn", "shared_ffn") if axis in axes)
        return width + (sizes.get("active", 0) * sizes["expert_ffn"] if "expert_ffn" in axes else 0)

    @cached_property
    def _axes(self) -> dict[str, set[str]]:
        return {kind: self.arch.axes(kind) for kind in {layer.kind for layer in self.arch.layers}}

    # ---- all of it ----

    def peak(self, context: int, generation: int) -> int:
        """Return the bytes on top of the weights at the peak."""
        if self.use.train:
            return self.training(context)
        return self.kv(context) + self.state + self.activations(context, generation)

    def checkpointed(self) -> Needs:
        """Return the same with gradient checkpointing."""
        return replace(self, grad_checkpoint=True)

    def training(self, length_: int) -> int:
        """Return the bytes on top of the weights while training rows of ``length_`` tokens with Adam.

        Everything else is mlx-lm's default. The sum: adapters or weights with gradient and moments; logits; what the
        trained layers keep for the gradient. That is per token about 6 values per ffn channel and 8 per hidden entry,
        and the softmax, because attention is never fused in training. With gradient checkpointing it is the input of
        each layer, and one layer in full. Measured on the CPU backend only: plus or minus a quarter.
        """
        count = len(self.arch.layers)
        layers = self.arch.layers[-min(LORA_LAYERS, count) :] if self.use.train == "lora" else self.arch.layers
        tokens = self.use.batch * length_
        hidden = self.arch.sizes["hidden"]
        kept = [
            2 * (6 * self._active_ffn(m) + 8 * hidden) + 2 * footprint.query_heads(m) * length_ * m.mixer.attends
            for m in layers
        ]
        held = max(kept) + len(layers) * 4 * hidden if self.grad_checkpoint else sum(kept)
        copies = 2 * max(footprint.query_heads(m) for m in layers) * length_ * SCORE_BYTES
        return int(self._optimizer + tokens * (LOGIT_BYTES * self.arch.sizes["vocab"] + held + copies))

    @cached_property
    def _optimizer(self) -> int:
        """Bytes of adapters, gradients and moments, for any length."""
        if self.use.train == "full":
            return ADAM_BYTES_FULL * sum(t.size for t in self.arch.tensors())
        first = len(self.arch.layers) - LORA_LAYERS
        adapted = [t for t in self.arch.tensors() if t.matrix and t.layer is not None and t.layer >= first]
        stacks = [t.shape[0] if len(t.shape) == 3 else 1 for t in adapted]
        return (
            ADAM_BYTES_LORA
            * LORA_RANK
            * sum(n * (t.rows // n + t.shape[-1]) for n, t in zip(stacks, adapted, strict=True))
        )
