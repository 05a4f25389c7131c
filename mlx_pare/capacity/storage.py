"""Read from a config.json how weights are stored, as mlx_lm/utils.py load_model does."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..arch import Tensor
from ..base.errors import PareError
from ..model import footprint
from ..model.footprint import Storage
from ..tensors.packing import BITS, FLOAT_MODES, GROUP_SIZES, Packing


def value_bytes(config: Mapping[str, Any]) -> int:
    """Return the bytes per value of the dtype in a config: 4 for float32, 2 for others and if there is none."""
    inner = _inner(config)
    dtype = config.get("torch_dtype") or config.get("dtype") or inner.get("torch_dtype") or inner.get("dtype")
    return 4 if dtype == "float32" else 2


def stays_packed(config: Mapping[str, Any]) -> bool:
    """Tell whether mlx-lm keeps the weights of a config packed; otherwise they are floats, or it unpacks them."""
    return bool(_ours(config)) or _method(config).get("quant_method") in ("mxfp4", "awq", "gptq")


def described(config: Mapping[str, Any], width: int) -> tuple[Storage, str, Packing | None]:
    """Return how a tensor is stored, the same in words, and the packing of most matrices; ``width``: bytes of floats.

    The config may have ``quantization`` with overrides per module, Hugging Face's mxfp4 (only experts are packed), or
    AWQ or GPTQ (embeddings and head are not packed). Any other ``quantization_config`` is unpacked on loading.
    Raises PareError if MLX does not have the packing.
    """
    dense = footprint.dense(width)
    if (ours := _ours(config)) is not None:
        packing = _packing(ours, width)
        return _overridden(ours, packing, width), f"MLX, {packing}", packing
    other = _method(config)
    method = other.get("quant_method")
    if method == "mxfp4":
        experts = footprint.packed(Packing.named("mxfp4", width), width)
        only = lambda t: experts(t) if t.spec.role.startswith("expert_") and t.matrix else dense(t)  # noqa: E731
        return only, "mxfp4 experts", None
    if method in ("awq", "gptq"):
        packing = _packing({"bits": other.get("bits", 4), "group_size": other.get("group_size", 128)}, width)
        blocks = footprint.packed(packing, width)
        return lambda t: dense(t) if t.layer is None else blocks(t), f"{method}, {packing}", packing
    return dense, "float32" if width == 4 else "bfloat16", None


def _inner(config: Mapping[str, Any]) -> Mapping[str, Any]:
    inner = config.get("text_config")
    return inner if isinstance(inner, dict) else {}


def _ours(config: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """Return MLX's own block; None if there is none. Raises PareError if it is no object."""
    found = config.get("quantization")
    found = _inner(config).get("quantization") if found is None else found
    if found is not None and not isinstance(found, dict):
        raise PareError(f"config.json says quantization = {str(found)[:80]!r}, expected an object")
    return found


def _method(config: Mapping[str, Any]) -> Mapping[str, Any]:
    found = config.get("quantization_config") or _inner(config).get("quantization_config")
    return found if isinstance(found, dict) else {}


def _packing(spec: Mapping[str, Any], width: int) -> Packing:
    """Read a block with bits, group_size and mode. Each float mode has one group size."""
    mode, bits, group = (spec.get(key) for key in ("mode", "bits", "group_size"))
    if isinstance(mode, str) and mode in FLOAT_MODES:
        return Packing.named(mode, width)
    if mode in (None, "affine") and type(bits) is type(group) is int and bits in BITS and group in GROUP_SIZES:
        return Packing(bits, group, width)
    said = {key: spec[key] for key in ("mode", "bits", "group_size") if key in spec}
    raise PareError(
        f"config.json says quantization = {str(said)[:100]}",
        f"MLX packs {', '.join(map(str, BITS))} bits in groups of {', '.join(map(str, GROUP_SIZES))}, or as "
        f"{', '.join(FLOAT_MODES)}",
    )


def _overridden(spec: Mapping[str, Any], default: Packing, width: int) -> Storage:
    """Return the default with overrides per module: ``false`` leaves it dense; a block without a mode means affine."""
    usual, dense = footprint.packed(default, width), footprint.dense(width)
    own = {
        name: _packing({"bits": 4, "group_size": 64, **given}, width)
        for name, given in spec.items()
        if isinstance(given, dict)
    }

    def stored(tensor: Tensor) -> int:
        if spec.get(tensor.module) is False or not tensor.matrix:
            return dense(tensor)
        if packing := own.get(tensor.module):
            fitted = packing.fitted(tensor.shape[-1])
            return fitted.nbytes(tensor.rows, tensor.shape[-1]) if fitted else dense(tensor)
        return usual(tensor)

    return stored
