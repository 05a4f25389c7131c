"""The numbers that a model of a GGUF file computes with, besides its sizes (gguf/read/config.py): eps, rope and its
scaling, scores, the ids of special tokens. Together they are a whole config.json. No arrays.

SOURCES has one row per llama.cpp architecture that can be rebuilt. Sources: llama.cpp src/llama-model.cpp and
src/models, for its defaults if the metadata set nothing, and ModelArgs in mlx_lm/models.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ...arch import Architecture, both_rope_spellings, describe
from ...arch.rope import llama3_factors
from ...base.errors import PareError, Unsupported
from ..header import Header
from .config import Facts, config_of

MAX_SIZE = 10**7  # of an axis; no model is as large as this
SPECIAL = {"bos_token_id": "bos", "eos_token_id": "eos", "pad_token_id": "padding"}
ENDS = ("eot", "eom")  # end a message, and so generation, as eos does


@dataclass(frozen=True)
class Source:
    """One architecture.

    ``norm_rope``: its rotary pairs are neighbours, while MLX pairs halves of a head. ``scalings``: of the rope that
    both llama.cpp and MLX apply. ``settings``: keys that the metadata spell differently from ModelArgs. ``names``:
    classes in transformers by model type. ``notes``: differences between the runtimes.
    """

    names: Mapping[str, str]
    norm_rope: bool = False
    scalings: tuple[str, ...] = ("linear", "yarn")
    settings: Callable[[Facts, Mapping[str, Any]], Mapping[str, Any]] = lambda facts, config: {}
    notes: tuple[str, ...] = ()


@dataclass
class Settings:
    """The config.json of a file, the architecture it describes, and where it came from."""

    architecture: str
    config: dict[str, Any]
    arch: Architecture
    source: Source
    notes: list[str] = field(default_factory=list)


def settings(header: Header, factors: Sequence[float] | None = None) -> Settings:
    """The whole config.json of a GGUF file. ``factors``: the values of its rope_freqs.weight; None if it has none.

    Raises Unsupported for an architecture without a row, PareError for what MLX could not compute.
    """
    facts = Facts(header)
    source = SOURCES.get(facts.architecture)
    if source is None:
        known = ", ".join(SOURCES)
        raise Unsupported(f"GGUF files of {facts.architecture[:80]!r} cannot be rebuilt", f"supported are {known}")
    config = config_of(header)
    if config["model_type"] not in source.names:
        raise Unsupported(f"this GGUF file is a {config['model_type']}, which cannot be rebuilt")
    for key, value in config.items():
        if isinstance(value, int) and value > MAX_SIZE and key != "max_position_embeddings":
            raise PareError(f"the GGUF metadata say {key} = {value}, more than any model has")
    config = {key: short(value) if isinstance(value, float) else value for key, value in config.items()}
    config |= {"rope_theta": _theta(config), "rms_norm_eps": _eps(facts)}
    _check_heads(facts, config)
    config |= _scaling(facts, source, config, factors)
    config |= source.settings(facts, config)
    config |= _ids(header, config.get("vocab_size", 0))
    arch = describe(config, untied=not config["tie_word_embeddings"])
    config = _left(arch, config)
    if config["model_type"] != "seed_oss":  # of no other type
        config.pop("attention_out_bias", None)
    config["architectures"] = [source.names[config["model_type"]]]
    arch = describe(config, untied=not arch.tied)
    return Settings(facts.architecture, both_rope_spellings(config), arch, source, list(source.notes))


def short(number: float) -> float:
    """The shortest decimal number that is the same in float32, the format of metadata."""

    def single(x: float) -> bytes:
        return struct.pack("<f", x)

    try:
        return next((x for x in (float(f"{number:.{n}g}") for n in range(1, 9)) if single(x) == single(number)), number)
    except OverflowError:  # a double
        return number


def _eps(facts: Facts) -> float:
    eps = facts.number("attention.layer_norm_rms_epsilon")
    if eps is None or not 0 <= eps < 1:
        raise PareError(f"the GGUF metadata say that the epsilon of the norms is {eps}", "export it again")
    return short(eps)


def _theta(config: Mapping[str, Any]) -> float:
    theta = config.get("rope_theta") or 10000.0
    if not 1 < theta < 1e15:
        raise PareError(f"the GGUF metadata say that the base of the rope is {theta}", "export it again")
    return float(theta)


def _check_heads(facts: Facts, config: Mapping[str, Any]) -> None:
    """Raise PareError unless values are as wide as keys and the rope turns whole heads, as in the families here."""
    width = config.get("head_dim")
    for key in ("attention.value_length", "rope.dimension_count"):
        found = facts.number(key)
        if found is not None and found != width:
            raise PareError(f"the GGUF metadata say {key} = {found} for heads of {width}, which MLX does not compute")
    if isinstance(width, int) and width % 2:
        raise PareError(f"the GGUF metadata say heads of {width}, an odd number: they cannot be rotated")


def _ids(header: Header, rows: int) -> dict[str, Any]:
    """Ids of special tokens for which the embedding has a row; several ends become a list, eos first."""

    def found(name: str) -> int | None:
        value = header.metadata.get(f"tokenizer.ggml.{name}_token_id")
        return value if type(value) is int and 0 <= value < rows else None

    ids = {key: found(name) for key, name in SPECIAL.items()}
    ends = list(dict.fromkeys(i for i in (ids["eos_token_id"], *map(found, ENDS)) if i is not None))
    ids["eos_token_id"] = ends if len(ends) > 1 else ends[0] if ends else None
    return {key: value for key, value in ids.items() if value is not None}


def _left(arch: Architecture, config: dict[str, Any]) -> dict[str, Any]:
    """The same model under a type whose class accepts its shape, if its own does not (arch/spec.py, Exit)."""
    sizes = {**arch.sizes, **arch.layers[0].sizes}
    sizes["q_head"] = sizes["kv_head"] * sizes["group"]
    for exit_ in arch.family.exits:
        if exit_.when(sizes, config):
            return config | {"model_type": exit_.model_type, **exit_.settings, "head_dim": sizes["head_dim"]}
    return config


# ---- rope ----


def _scaling(
    facts: Facts, source: Source, config: Mapping[str, Any], factors: Sequence[float] | None
) -> dict[str, Any]:
    """rope_scaling; empty if there is none."""
    kind, factor = facts.value("rope.scaling.type"), facts.number("rope.scaling.factor")
    if kind is None and (factor := factor or facts.number("rope.scale_linear")) not in (None, 1):  # until 2023
        kind = "linear"
    kind = kind if kind not in (None, "none") else "default"
    if factors is not None:
        if kind != "default":
            raise PareError(f"the GGUF file scales its rope by {str(kind)[:80]!r} and by factors too")
        found = llama3_scaling(factors, config["rope_theta"])
    elif kind == "default" or (kind == "linear" and factor == 1):
        return {}
    else:
        found = {"rope_type": str(kind)[:80], "factor": factor}
    kind = found.get("rope_type", "default")
    if kind not in ("default", *source.scalings):
        raise PareError(
            f"the GGUF file scales its rope by {kind!r}, which cannot be rebuilt for {facts.architecture}",
            f"known are {', '.join(source.scalings) or 'none'}",
        )
    if found and not (found["factor"] and found["factor"] > 0):
        raise PareError(f"the GGUF file scales its rope by {kind!r} without a factor", "export it again")
    if found:
        found["factor"] = short(float(found["factor"]))
    return {"rope_scaling": found | (_yarn(facts, found["factor"]) if kind == "yarn" else {})} if found else {}


def _yarn(facts: Facts, factor: float) -> dict[str, Any]:
    """llama.cpp multiplies by attn_factor (1 + 0.1 ln factor) (ggml rope_yarn), MLX by 1 + 0.1 mscale ln factor."""
    length, attention = facts.number("rope.scaling.original_context_length"), facts.number("rope.scaling.attn_factor")
    if not isinstance(length, int) or length < 1:
        raise PareError("the GGUF file scales its rope by 'yarn' without an original context length", "export it again")
    found: dict[str, Any] = {"original_max_position_embeddings": length}
    growth = 0.1 * math.log(max(factor, 1))
    if attention not in (None, 1) and growth:
        found["mscale"] = (attention * (1 + growth) - 1) / growth
    return found


def llama3_scaling(factors: Sequence[float], theta: float) -> dict[str, Any]:
    """The rope_scaling that rope_freqs.weight [head_dim / 2] stands for; empty if all factors are 1, "linear" if all
    are equal.

    Raises PareError for factors that no llama3 scaling gives. 1/factor is linear in 1/wavelength between its two ends,
    so two points there give both. With one point or none, every line between its neighbours gives the same factors.
    """
    if not factors or not all(1 <= f < math.inf for f in factors) or list(factors) != sorted(factors):
        raise PareError("rope_freqs.weight of the GGUF file holds what is no factor of a llama3 rope")
    most = max(factors)
    if min(factors) == most:
        return {} if most == 1 else {"rope_type": "linear", "factor": most}
    waves = [2 * math.pi * theta ** (i / len(factors)) for i in range(len(factors))]
    smooth = [(1 / f - 1 / most) / (1 - 1 / most) for f in factors]
    slope, offset = _line(smooth, waves)
    # only ratios of the three numbers matter: the lowest factor of all models so far is 1
    low, high, length = (1.0, 1 + 1 / offset, slope / offset) if offset > 1e-9 else (0.0, 1.0, slope)
    exact = {"rope_type": "llama3", "factor": most, "low_freq_factor": low, "high_freq_factor": high}
    exact["original_max_position_embeddings"] = length
    plain = exact | {"factor": short(most), "high_freq_factor": float(f"{high:.4g}")}
    plain["original_max_position_embeddings"] = round(length)
    for scaling in (plain, exact):
        made = llama3_factors(scaling, waves) if scaling["original_max_position_embeddings"] else [0.0] * len(waves)
        if all(abs(a - b) <= 2e-6 * b for a, b in zip(made, factors, strict=True)):
            return scaling
    raise PareError("rope_freqs.weight of the GGUF file are not the factors of a llama3 rope, the only one known here")


def _line(smooth: Sequence[float], waves: Sequence[float]) -> tuple[float, float]:
    """slope / wavelength - offset through the points between 0 and 1, 1 or more before them and 0 or less behind."""
    between = [(1 / wave, s) for wave, s in zip(waves, smooth, strict=True) if 1e-6 < s < 1 - 1e-6]
    if len(between) > 1:
        (x, s), (y, t) = between[0], between[-1]
        slope = (s - t) / (x - y)
        return slope, slope * x - s
    after = next((i for i, s in enumerate(smooth) if s <= 1e-6), len(waves))
    before, usual = after - 1 - len(between), 1 / 3  # Llama 3.1: from 1 to 4
    if not between:
        if before < 0:
            return usual * waves[after], usual
        offset = max(usual, 1 / (waves[after] / waves[before] - 1))
        return offset * waves[after], offset
    s, wave = between[0][1], 1 / between[0][0]
    bounds = [usual]
    if before >= 0:
        ratio = wave / waves[before]
        bounds.append((1 - s * ratio) / (ratio - 1))
    if after < len(waves):
        ratio = wave / waves[after]
        bounds.append(s * ratio / (1 - ratio))
    offset = max(bounds)
    return (s + offset) * wave, offset


# ---- one row per architecture ----


def _llama(facts: Facts, config: Mapping[str, Any]) -> dict[str, Any]:
    """A window is dropped: neither runtime has one here, and transformers would take the model for another one.

    A seed_oss that is a qwen2 except for its rope scaling, which llama.cpp has for llama only, becomes a qwen2 again.
    """
    square = config.get("num_attention_heads", 0) * (config.get("head_dim") or 0) == config.get("hidden_size")
    biased = config.get("attention_bias") and not config.get("attention_out_bias") and not config.get("mlp_bias")
    if config["model_type"] == "seed_oss" and square and biased:
        return {"model_type": "qwen2", "sliding_window": None}
    return {"sliding_window": None}


def _scores(facts: Facts, config: Mapping[str, Any], large: int) -> dict[str, Any]:
    """llama.cpp divides scores by sqrt(head_dim), but by sqrt(hidden / heads) in a model of ``large`` layers."""
    heads = config.get("num_attention_heads") or 1
    wide = config.get("hidden_size", 0) // heads if config.get("num_hidden_layers") == large else config.get("head_dim")
    return {"query_pre_attn_scalar": wide, "hidden_activation": "gelu_pytorch_tanh", "hidden_act": "gelu_pytorch_tanh"}


def _gemma2(facts: Facts, config: Mapping[str, Any]) -> dict[str, Any]:
    caps = {"attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0}
    caps |= {key: short(facts.number(key)) for key in caps if facts.number(key) is not None}
    return {**_scores(facts, config, 46), **caps}


def _gemma3(facts: Facts, config: Mapping[str, Any]) -> dict[str, Any]:
    """MLX derives the kind of a layer from its place, so a pattern must have a period."""
    period, count = config.get("sliding_window_pattern"), config.get("num_hidden_layers")
    if not isinstance(period, int) or not isinstance(count, int):
        raise PareError("the GGUF metadata lack the number of layers")
    kinds = ["sliding_attention" if (i + 1) % period else "full_attention" for i in range(min(count, 1000))]
    if (found := facts.kinds("sliding_attention", "full_attention")) and found != kinds:
        raise PareError("the windows of this GGUF file follow no period, which MLX's gemma3 cannot compute")
    if not config.get("sliding_window"):
        raise PareError("the GGUF metadata lack attention.sliding_window", "export it again")
    local = config.get("rope_local_base_freq") or 10000.0
    return {**_scores(facts, config, 62), "layer_types": kinds, "rope_local_base_freq": float(local)}


SOURCES: dict[str, Source] = {
    "llama": Source(
        {
            "llama": "LlamaForCausalLM",
            "mistral": "MistralForCausalLM",
            "seed_oss": "SeedOssForCausalLM",
            "qwen2": "Qwen2ForCausalLM",
        },
        norm_rope=True,
        scalings=("linear", "yarn", "llama3"),
        settings=_llama,
    ),
    "qwen2": Source({"qwen2": "Qwen2ForCausalLM", "seed_oss": "SeedOssForCausalLM"}),
    "qwen3": Source({"qwen3": "Qwen3ForCausalLM"}),
    "seed_oss": Source({"seed_oss": "SeedOssForCausalLM"}),
    "gemma2": Source(
        {"gemma2": "Gemma2ForCausalLM"},
        scalings=(),
        settings=_gemma2,
        notes=("mlx-lm's gemma2 has no sliding window: beyond its length it computes something else than llama.cpp",),
    ),
    "gemma3": Source({"gemma3_text": "Gemma3ForCausalLM"}, scalings=("linear",), settings=_gemma3),
}
