"""The rope settings of a config.json in both spellings, and the checks of other numbers that are used in computations.

The spellings are rope_theta and rope_scaling, or transformers 5's rope_parameters.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ..base.errors import PareError
from ..base.untrusted import shown


def both_rope_spellings(config: Mapping[str, Any]) -> dict[str, Any]:
    """The config with rope under both names.

    transformers 5 writes only rope_parameters. mlx-lm's llama and qwen2 do not read them: they would silently compute
    with a theta of 10000. Raises PareError if neither spelling makes sense.
    """
    config = older_rope_spelling(config)
    if config.get("rope_parameters") is None and config.get("rope_theta") is not None and not _two_ropes(config):
        scaling = _block(config)
        kind = scaling.get("rope_type") or scaling.get("type") or "default"
        config["rope_parameters"] = {**scaling, "rope_theta": config["rope_theta"], "rope_type": kind}
    return config


def _two_ropes(config: Mapping[str, Any]) -> bool:
    """Whether sliding layers have a theta of their own."""
    return config.get("rope_local_base_freq") is not None


def older_rope_spelling(config: Mapping[str, Any]) -> dict[str, Any]:
    """The config with rope also under the older names, if it has rope_parameters.

    The language model of a multimodal model is given these alone. mlx-lm's qwen3_5 reads only rope_parameters, and has
    a theta of its own if there are none. Raises PareError if they are no object.
    """
    config = dict(config)
    parameters = config.get("rope_parameters")
    if not isinstance(parameters, dict | None):
        raise PareError(f"config.json says rope_parameters = {str(parameters)[:80]}, expected an object")
    if isinstance(parameters, dict) and "rope_theta" in parameters:
        config["rope_theta"] = parameters["rope_theta"]
        scaling = {k: v for k, v in parameters.items() if k != "rope_theta"}
        if scaling.get("rope_type", "default") != "default" and config.get("rope_scaling") is None:
            config["rope_scaling"] = scaling
        if config.get("model_type") == "phi3":
            _older_phi3(config, parameters)
    return config


def _older_phi3(config: dict[str, Any], parameters: Mapping[str, Any]) -> None:
    """Copy to their old places what mlx_lm/models/phi3.py reads there, and transformers 5 writes elsewhere."""
    if isinstance(config.get("rope_scaling"), dict) and "rope_type" in config["rope_scaling"]:
        config["rope_scaling"] = {"type": config["rope_scaling"]["rope_type"], **config["rope_scaling"]}
    for key in ("partial_rotary_factor", "original_max_position_embeddings"):
        if config.get(key) is None and parameters.get(key) is not None:
            config[key] = parameters[key]


# Numbers that are used in computations; null if a config does not set them.
NUMBERS = ("rope_theta", "rope_local_base_freq", "rms_norm_eps", "max_position_embeddings", "query_pre_attn_scalar",
           "partial_rotary_factor")  # fmt: skip


def check_numbers(config: Mapping[str, Any]) -> None:
    """Raise PareError for a value of the config that should be a number and is none, or is beyond reason."""
    for key in NUMBERS:
        value = config.get(key)
        if not (value is None or (type(value) in (int, float) and abs(value) < 2**63)):
            raise PareError(f"config.json says {key} = {shown(value)}, expected a number")


def _block(config: Mapping[str, Any]) -> dict[str, Any]:
    """rope_scaling, empty if there is none. Raises PareError if it is no object with a type."""
    found = config.get("rope_scaling") or {}
    kind = found.get("type") or found.get("rope_type") if isinstance(found, dict) else found
    if not isinstance(found, dict) or not isinstance(kind, str | None):
        raise PareError(f"config.json says rope_scaling = {str(found)[:80]}, expected an object with a type")
    return found


def rotary_share(config: Mapping[str, Any]) -> float:
    """The share of a head that the rope turns, which some families set in the config (phi3)."""
    share = both_rope_spellings(config).get("partial_rotary_factor")
    return 1.0 if share is None else float(share)


def rope_scaling(config: Mapping[str, Any]) -> dict[str, Any]:
    """How the rope is scaled, from either spelling, with its ``rope_type``; empty if it is not scaled."""
    scaling = _block(both_rope_spellings(config))
    kind = scaling.get("type") or scaling.get("rope_type") or "default"  # mlx_lm/models/rope_utils.py initialize_rope
    return {} if kind == "default" else {**{k: v for k, v in scaling.items() if k != "type"}, "rope_type": kind}


def llama3_factors(scaling: Mapping[str, Any], waves: Sequence[float]) -> list[float]:
    """The divisors of the rotary frequencies of these wavelengths under llama3 scaling (mlx_lm/models/rope_utils.py
    Llama3RoPE).

    Long waves are divided by the factor of the scaling, short ones by 1, those between by a value in between.
    """
    low, high = scaling.get("low_freq_factor", 1.0), scaling.get("high_freq_factor", 4.0)
    length, found = scaling.get("original_max_position_embeddings", 8192), []
    for wave in waves:
        smooth = min(max((length / wave - low) / (high - low), 0), 1)
        found.append(1 / ((1 - smooth) / float(scaling["factor"]) + smooth))
    return found


def rope_order(heads: int, head_dim: int) -> list[int]:
    """The source of each row of q or k, if rotary pairs (i, i + head_dim/2) of every head must become neighbours."""
    half = head_dim // 2
    return [head * head_dim + i + part * half for head in range(heads) for i in range(half) for part in (0, 1)]
