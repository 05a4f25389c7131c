"""Weights in the formats of other quantizers: which of them mlx-lm loads, and what to do about the rest.

mlx-pare reads floats and MLX's own packings. A foreign format is usable if `mlx_lm.convert` turns it into one of these.
Any other format needs the float original. Source: load_model and _transform_awq_weights in mlx_lm/utils.py, and the
sanitize methods in mlx_lm/models; tests/model/test_foreign_formats.py compares this file with mlx-lm itself.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

VERSION = "mlx-lm 0.32"  # the version that this file describes
# Model types whose class converts 8-bit floats with a scale per block to floats (mx.from_fp8 in its sanitize)
UNPACKS_FP8 = ("deepseek_v3", "deepseek_v32", "joyai_llm_flash", "kimi_k2", "mimo_v2_flash", "minimax", "minimax_m2",
               "mistral4")  # fmt: skip
# Model types whose class converts packed experts to MLX's layout, by quant_method
UNPACKS = {"mxfp4": ("gpt_oss",), "compressed-tensors": ("deepseek_v3", "joyai_llm_flash", "kimi_k2", "mistral4")}
OURS = ("mxfp4", "mxfp8")  # methods that mlx-lm reads as MLX's own modes, if tensors have MLX's names
# Marks in the name of a model that is no float original
QUANTIZED = re.compile(r"bnb|gptq|awq|gguf|fp8|nf4|hqq|quant|mlx|(?<!\d)[2-8][-_ ]?bit|int[48]|w[48]a\d", re.IGNORECASE)
NAMES = ("base_model", "base_model_name_or_path", "_name_or_path")


@dataclass(frozen=True)
class Foreign:
    """A foreign format.

    ``name``: of its quantizer. ``loads``: whether mlx-lm loads it, so that mlx_lm.convert works. ``original``: the
    model that was quantized, if the config names it.
    """

    name: str
    loads: bool
    original: str | None

    @property
    def cure(self) -> str:
        """The advice for somebody who wants to cut the model."""
        if self.loads:
            return "supported are dense fp32/fp16/bf16 and MLX's own packings: convert it with mlx_lm.convert"
        which = self.original or "which its model card names"
        return f"take the float original, {which}: {VERSION} cannot load this format, so mlx_lm.convert fails too"

    @property
    def note(self) -> str:
        """The note for somebody who plans; empty if mlx-lm loads the format."""
        which = f", {self.original}," if self.original else ""
        loads = f"its weights are in the format {self.name}, which {VERSION} cannot load"
        return "" if self.loads else f"{loads}: the float original{which} is needed"


def foreign(config: Mapping[str, Any], tensors: Mapping[str, str]) -> Foreign | None:
    """Find the foreign format of a model.

    Args:
        config: its config.json.
        tensors: name -> dtype as safetensors names it. Empty if only the config is known.
    Returns:
        The format, or None for floats and for MLX's own packings.
    """
    if _ours(config):
        return None
    other, eights = _settings(config), any(dtype.startswith("F8_E4") for dtype in tensors.values())
    method = other.get("quant_method") if other else None
    if other is None and not eights:
        return None
    name = method if isinstance(method, str) else "8-bit floats" if eights else "unknown"
    return Foreign(name, _loads(config, method, other or {}, tensors), _original(config, other or {}))


def _loads(config: Mapping[str, Any], method: Any, other: Mapping[str, Any], tensors: Mapping[str, str]) -> bool:
    """Whether mlx-lm loads the weights as what they are. Loading them as other numbers does not count."""
    kinds = {part.get("model_type") for part in _parts(config)}
    leaves = {name.rpartition(".")[2] for name in tensors}
    if method == "awq":
        packed = not tensors or "qweight" in leaves
        return packed and "g_idx" not in leaves and other.get("bits", 4) == 4 and _gemm(other)
    if method in OURS and "scales" in leaves:
        return _packed_as_ours(tensors)
    if method == "fp8":
        return not kinds.isdisjoint(UNPACKS_FP8) and (not tensors or "weight_scale_inv" in leaves)
    return not kinds.isdisjoint(UNPACKS.get(method if isinstance(method, str) else "", ()))


def _gemm(other: Mapping[str, Any]) -> bool:
    """Whether AWQ wrote the layout that mlx-lm reads. In its other layouts the rows are in another order."""
    return str(other.get("version", "gemm")).lower() == "gemm"


def _packed_as_ours(tensors: Mapping[str, str]) -> bool:
    scaled = [name.removesuffix(".scales") for name in tensors if name.endswith(".scales")]
    return all(tensors[f"{module}.scales"] == "U8" and tensors.get(f"{module}.weight") == "U32" for module in scaled)


def _ours(config: Mapping[str, Any]) -> bool:
    """Whether config.json has a block of MLX's own quantization."""
    return any(part.get("quantization") is not None for part in _parts(config))


def _settings(config: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """The quantization_config, also of the language model inside; None if there is none."""
    found = next((part["quantization_config"] for part in _parts(config) if part.get("quantization_config")), None)
    return found if isinstance(found, Mapping) or found is None else {"quant_method": found}


def _parts(config: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    inner = config.get("text_config")
    return [config, inner] if isinstance(inner, Mapping) else [config]


def _original(config: Mapping[str, Any], other: Mapping[str, Any]) -> str | None:
    """The float model that a config names as its origin; names of quantized models or folders do not count."""
    given: Iterable[Any] = (part.get(key) for part in (*_parts(config), other) for key in NAMES)
    named = [name for name in given if isinstance(name, str) and re.fullmatch(r"[\w.-]{1,96}/[\w.-]{1,96}", name)]
    return next((name for name in named if not QUANTIZED.search(name)), None)


__all__ = ["UNPACKS", "UNPACKS_FP8", "VERSION", "Foreign", "foreign"]
