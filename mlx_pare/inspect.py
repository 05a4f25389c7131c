"""inspect: what is in a model, what can be cut, which runtimes load it. Reads headers only."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from .checkpoint import Checkpoint
from .fit.footprint import parameters


def inspect(model: Path) -> dict[str, Any]:
    """Facts of a model directory, counted from its tensors. Raises PareError when it is not what its config says."""
    checkpoint = Checkpoint(model)
    arch = checkpoint.arch
    family = arch.family
    kinds: dict[str, int] = {}
    for layer in arch.layers:
        kinds[layer.kind] = kinds.get(layer.kind, 0) + 1
    packing = checkpoint.quantization
    return {
        "model": str(model),
        "model_type": checkpoint.config["model_type"],
        "family": family.name,
        "layers": len(arch.layers),
        "layer_kinds": kinds,
        "hidden": arch.sizes["hidden"],
        "vocab": arch.sizes["vocab"],
        "ffn": arch.uniform("ffn"),
        "q_heads": arch.uniform("kv_head") * arch.uniform("group"),
        "kv_heads": arch.uniform("kv_head"),
        "head_dim": arch.uniform("head_dim"),
        "tied_embedding": arch.tied,
        "parameters": parameters(arch),
        "bytes": {"total": checkpoint.nbytes()},
        "quantization": packing.as_config() if packing else None,
        "cuttable": {axis: "exact" if axis in family.exact else "approximate" for axis in sorted(family.cuttable)},
        "leaves_as": sorted({e.model_type for e in family.exits}),
        "runtimes": {"mlx-lm": family.name, "llama.cpp": family.gguf, "transformers": checkpoint.config["model_type"]},
    }
