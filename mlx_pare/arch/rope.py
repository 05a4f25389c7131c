"""The two spellings of rope in a config.json: rope_theta and rope_scaling, or transformers 5's rope_parameters."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def both_rope_spellings(config: Mapping[str, Any]) -> dict[str, Any]:
    """The config with rope under both names: transformers 5 writes rope_parameters only, of which mlx-lm's llama and
    qwen2 know nothing: they would silently compute with a theta of 10000."""
    config = dict(config)
    parameters = config.get("rope_parameters")
    if isinstance(parameters, dict) and "rope_theta" in parameters:
        config["rope_theta"] = parameters["rope_theta"]
        scaling = {k: v for k, v in parameters.items() if k != "rope_theta"}
        if scaling.get("rope_type", "default") != "default" and config.get("rope_scaling") is None:
            config["rope_scaling"] = scaling
    elif parameters is None and config.get("rope_theta") is not None and config.get("rope_local_base_freq") is None:
        scaling = config.get("rope_scaling") or {}
        kind = scaling.get("rope_type") or scaling.get("type") or "default"
        config["rope_parameters"] = {**scaling, "rope_theta": config["rope_theta"], "rope_type": kind}
    return config


def rope_scaling(config: Mapping[str, Any]) -> dict[str, Any]:
    """How the rope is scaled, from either spelling, with its ``rope_type``; empty when it is not."""
    scaling = both_rope_spellings(config).get("rope_scaling") or {}
    kind = scaling.get("type") or scaling.get("rope_type") or "default"  # mlx_lm/models/rope_utils.py initialize_rope
    return {} if kind == "default" else {**{k: v for k, v in scaling.items() if k != "type"}, "rope_type": kind}
