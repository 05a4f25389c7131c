"""A model directory as one GGUF file for llama.cpp, LM Studio and Ollama.

Names come from gguf-py, everything else (architecture, row order, norms) from the family's table. Tensors are written
one at a time, to a temporary name that becomes the real one only after the file was read back.
"""

from __future__ import annotations

import math
import os
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from . import console, gguf_types
from .arch import Architecture, Tensor
from .checkpoint import Checkpoint
from .errors import PareError, Refused, UsageError

FILE_TYPES = {"f32": 0, "f16": 1, "q8_0": 7}  # enum llama_ftype, llama.cpp include/llama.h


def tensor_type(tensor: Tensor, kind: str) -> str:
    """The GGUF type of a tensor in a file of ``kind`` (f32, f16, q8_0): "F32", "F16" or "Q8_0". Arithmetic only."""
    if kind == "f32" or not tensor.matrix:
        return "F32"
    return "Q8_0" if kind == "q8_0" and gguf_types.fits("Q8_0", tensor.shape[-1]) else "F16"


@dataclass(frozen=True)
class Row:
    """One tensor of the file; ``source`` is None for the rope factors, which are computed."""

    name: str
    shape: tuple[int, ...]
    type: str
    source: Tensor | None

    @property
    def nbytes(self) -> int:
        return gguf_types.nbytes(self.type, self.shape)


@dataclass(frozen=True)
class Target:
    """How llama.cpp will run the model."""

    architecture: str
    permute: bool  # its rope pairs neighbours, ours pairs halves of a head
    theta: float
    scaling: Mapping[str, Any] = field(default_factory=dict)  # rope scaling of config.json; empty: none
    q_norm: float = 1.0  # factor on q_norm that makes up for another attention scale

    @property
    def scaling_type(self) -> str:
        return str(self.scaling.get("type") or self.scaling.get("rope_type") or "default")


def export(model: Path, out: Path, kind: str) -> dict:
    """Write ``model`` (a directory) as the GGUF file ``out``; ``kind`` is f32, f16 or q8_0. Memory is a few rows.

    Vectors stay F32; in q8_0, matrices whose rows are no multiple of 32 stay F16 ("fallbacks"). Returns path, kind,
    architecture, bytes, tensor_bytes, tensors, fallbacks, and notes on what llama.cpp does differently.
    Raises Refused when ``out`` exists, PareError when llama.cpp could not compute what the model does; no file is left.
    """
    from . import llama_cpp

    model, out = Path(model), Path(out)
    if kind not in FILE_TYPES:
        raise UsageError(f"there is no GGUF type {kind!r} here", f"choose one of {', '.join(FILE_TYPES)}")
    _refuse_existing(out)
    checkpoint = Checkpoint(model)
    target = target_of(checkpoint)
    rows = table(checkpoint.arch, target, kind)
    size = sum(row.nbytes for row in rows)
    out.parent.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(out.parent).free
    if size > free:
        raise PareError(f"{out} needs {console.gb(size)}, {out.parent} has {console.gb(free)} free")
    partial = out.with_name(f".{out.name}.part")
    try:
        notes = _write(checkpoint, target, kind, rows, partial)
        llama_cpp.check(partial, rows)
        _refuse_existing(out)
        partial.rename(out)
    finally:
        partial.unlink(missing_ok=True)
    return {
        "path": str(out),
        "kind": kind,
        "architecture": target.architecture,
        "bytes": out.stat().st_size,
        "tensor_bytes": size,
        "tensors": len(rows),
        "fallbacks": [row.name for row in rows if kind == "q8_0" and row.type == "F16"],
        "notes": notes,
    }


def _refuse_existing(out: Path) -> None:
    if out.exists():
        raise Refused(f"{out} exists already", "choose another name, or move it away")


# ---- what is written ----


def why_not(checkpoint: Checkpoint) -> PareError | None:
    """Why there can be no GGUF file of a checkpoint; None when there can."""
    try:
        target_of(checkpoint)
    except PareError as error:
        return error
    return None


def target_of(checkpoint: Checkpoint) -> Target:
    """The llama.cpp architecture for a checkpoint. Raises PareError when none computes the same."""
    arch, config, family = checkpoint.arch, checkpoint.arch.config, checkpoint.arch.family
    if family.result:
        raise PareError(
            f"{checkpoint.path} is of type {family.name}, its layers differ: GGUF of such models is not there yet",
            "export a model whose layers keep as many units as each other",
        )
    theta, scaling = _rope(checkpoint)
    target = Target(family.gguf, family.gguf_rope == "norm", theta, scaling)
    biased = config.get("attention_out_bias") or config.get("mlp_bias")
    if family.gguf in ("qwen2", "seed_oss") and (target.scaling_type == "llama3" or biased):
        # only the llama architecture has rope factors and those biases; its blocks are the same but for the row order
        target = Target("llama", True, theta, scaling)
    kinds = {layer.kind for layer in arch.layers}
    if target.architecture != "gemma3" and "sliding_attention" in kinds:
        raise PareError(f"{checkpoint.path} has sliding attention, which llama.cpp's {target.architecture} lacks")
    if config.get("rope_traditional"):
        raise PareError(f"{checkpoint.path} sets rope_traditional, which is not supported in GGUF")
    _check_scaling(checkpoint, target)
    if target.architecture == "gemma3":
        return Target("gemma3", False, theta, scaling, _gemma_q_norm(arch))
    return target


def _check_scaling(checkpoint: Checkpoint, target: Target) -> None:
    architecture, kind, scaling = target.architecture, target.scaling_type, target.scaling
    allowed = {"llama": ("linear", "yarn", "llama3"), "gemma3": ("linear",)}.get(architecture, ("linear", "yarn"))
    if kind not in ("default", *allowed):
        raise PareError(
            f"{checkpoint.path} scales its rope by {kind!r}, which llama.cpp's {architecture} does not do",
            f"supported are {', '.join(allowed)}",
        )
    if kind != "default" and not scaling.get("factor"):
        raise PareError(f"{checkpoint.path / 'config.json'} scales its rope by {kind!r} but gives no factor")
    if kind == "yarn" and (scaling.get("beta_fast", 32), scaling.get("beta_slow", 1)) != (32, 1):
        raise PareError(
            f"{checkpoint.path} uses yarn with other betas than 32 and 1",
            "llama.cpp does not read them from the file for this architecture",
        )


def _rope(checkpoint: Checkpoint) -> tuple[float, dict[str, Any]]:
    """Rope base and scaling from either spelling: rope_theta and rope_scaling, or transformers 5's rope_parameters."""
    raw = checkpoint.config
    parameters = raw.get("rope_parameters") or {}
    parameters = parameters.get("full_attention", parameters)
    theta = raw.get("rope_theta") or parameters.get("rope_theta") or checkpoint.arch.config.get("rope_theta")
    if not theta:
        raise PareError(f"{checkpoint.path / 'config.json'} has no rope_theta")
    return float(theta), dict(raw.get("rope_scaling") or parameters)


def _gemma_q_norm(arch: Architecture) -> float:
    """llama.cpp takes 1/sqrt(head_dim) as the attention scale, but 1/sqrt(hidden // heads) in a model of 62 layers
    (src/models/gemma3.cpp); the model means 1/sqrt(query_pre_attn_scalar). q_norm follows q_proj, so it can carry the
    difference, and a depth-pruned 27B stays what it was."""
    heads = arch.uniform("kv_head") * arch.uniform("group")
    assumed = arch.sizes["hidden"] // heads if len(arch.layers) == 62 else arch.uniform("head_dim")
    return math.sqrt(assumed / arch.config["query_pre_attn_scalar"])


def table(arch: Architecture, target: Target, kind: str) -> list[Row]:
    """Every tensor of the file, in order."""
    import gguf

    number = {name: key for key, name in gguf.MODEL_ARCH_NAMES.items()}[target.architecture]
    names = gguf.get_tensor_name_map(number, len(arch.layers))
    rows = []
    for tensor in arch.tensors():
        name = names.get_name(tensor.name, try_suffixes=(".weight", ".bias"))
        if name is None:
            raise PareError(f"{tensor.name} has no name in llama.cpp's {target.architecture} architecture")
        rows.append(Row(name, tensor.shape, tensor_type(tensor, kind), tensor))
    if target.scaling_type == "llama3":
        rows.insert(0, Row("rope_freqs.weight", (arch.uniform("head_dim") // 2,), "F32", None))
    return rows


def _write(checkpoint: Checkpoint, target: Target, kind: str, rows: Sequence[Row], path: Path) -> list[str]:
    import gguf
    import numpy as np

    from . import gguf_tokenizer

    writer = gguf.GGUFWriter(path, target.architecture)
    try:
        _metadata(writer, checkpoint, target, kind)
        notes = gguf_tokenizer.write(writer, checkpoint.path, checkpoint.arch.sizes["vocab"], checkpoint.config).notes
        for row in rows:
            number = gguf.GGMLQuantizationType[row.type]
            writer.add_tensor_info(row.name, row.shape, np.dtype(np.float32), row.nbytes, raw_dtype=number)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        (file,) = writer.fout
        writer.write_padding(file, file.tell())
        with console.progress("export", len(rows)) as bar:
            for row in rows:
                written = sum(file.write(part) for part in _encoded(checkpoint, row, target))
                if written != row.nbytes:
                    raise AssertionError(f"{row.name} has {written} bytes, announced {row.nbytes}")
                writer.write_padding(file, written)
                bar.advance(note=row.name)
        file.flush()
        os.fsync(file.fileno())
    finally:
        writer.close()
    return notes


def _metadata(writer: Any, checkpoint: Checkpoint, target: Target, kind: str) -> None:
    arch, config = checkpoint.arch, checkpoint.arch.config
    head_dim, kv_heads = arch.uniform("head_dim"), arch.uniform("kv_head")
    writer.add_name(checkpoint.path.resolve().name)
    licence = _licence(checkpoint.path)
    if licence:
        writer.add_license(licence)
    writer.add_file_type(FILE_TYPES[kind])
    if kind == "q8_0":
        writer.add_quantization_version(2)  # GGML_QNT_VERSION
    writer.add_vocab_size(arch.sizes["vocab"])
    writer.add_context_length(config.get("max_position_embeddings") or 2048)  # transformers' default for llama
    writer.add_embedding_length(arch.sizes["hidden"])
    writer.add_block_count(len(arch.layers))
    writer.add_feed_forward_length(arch.uniform("ffn"))
    writer.add_head_count(kv_heads * arch.uniform("group"))
    writer.add_head_count_kv(kv_heads)
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    writer.add_layer_norm_rms_eps(float(config["rms_norm_eps"]))
    writer.add_rope_dimension_count(head_dim)
    writer.add_rope_freq_base(target.theta)
    _scaling_metadata(writer, target)
    if target.architecture == "gemma3":
        raw = checkpoint.config
        local = (raw.get("rope_parameters") or {}).get("sliding_attention", {}).get("rope_theta")
        writer.add_sliding_window(config["sliding_window"])
        # one entry per layer: the default period would be applied to whatever layers are left
        writer.add_sliding_window_pattern([layer.kind == "sliding_attention" for layer in arch.layers])
        writer.add_rope_freq_base_swa(float(raw.get("rope_local_base_freq") or local or config["rope_local_base_freq"]))


def _scaling_metadata(writer: Any, target: Target) -> None:
    import gguf

    scaling, kind = target.scaling, target.scaling_type
    if kind not in ("linear", "yarn"):
        return
    factor = float(scaling["factor"])
    writer.add_rope_scaling_type(gguf.RopeScalingType(kind))
    writer.add_rope_scaling_factor(factor)
    if kind == "linear":
        return
    # mlx_lm/models/rope_utils.py YarnRoPE; the last divisor is what llama.cpp multiplies by itself (ggml rope_yarn)
    writer.add_rope_scaling_orig_ctx_len(int(scaling.get("original_max_position_embeddings", 4096)))
    growth = 0.1 * math.log(max(factor, 1))
    mscale = (1 + scaling.get("mscale", 1) * growth) / (1 + scaling.get("mscale_all_dim", 0) * growth)
    writer.add_rope_scaling_attn_factors(mscale / (1 + growth))


def _licence(directory: Path) -> str | None:
    """The licence in the front matter of a README.md."""
    file = directory / "README.md"
    if not file.is_file():
        return None
    with file.open(encoding="utf-8", errors="replace") as opened:
        front = re.match(r"---\n(.*?)\n---", opened.read(1 << 16), re.DOTALL)
    found = re.search(r"^license:\s*([\w.+-]+)\s*$", front[1], re.MULTILINE) if front else None
    return found[1] if found else None


# ---- tensors ----


def rope_order(heads: int, head_dim: int) -> list[int]:
    """Where each row of q or k comes from when rotary pairs must be neighbours: (i, i + head_dim/2) of every head."""
    half = head_dim // 2
    return [head * head_dim + i + part * half for head in range(heads) for i in range(half) for part in (0, 1)]


def _encoded(checkpoint: Checkpoint, row: Row, target: Target) -> Iterator[memoryview]:
    """The bytes of one tensor as they stand in the file, a few rows at a time."""
    import mlx.core as mx

    from .quantized import Packed
    from .slices import read_panels

    if row.source is None:
        yield _rope_factors(target, row.shape[0] * 2).data.cast("B")
        return
    order, count = None, row.shape[0]
    if target.permute and "rope" in row.source.spec.transforms:
        head_dim = checkpoint.arch.uniform("head_dim")
        order = rope_order(count // head_dim, head_dim)
    for panel in read_panels(checkpoint, row.source, order):
        values = panel.dense() if isinstance(panel, Packed) else panel.astype(mx.float32)
        if "norm+1" in row.source.spec.transforms:
            values = (values + 1) * (target.q_norm if row.source.spec.role == "q_norm" else 1)
        yield _checked(convert(values, row.type), values, row)


def convert(values: Any, kind: str) -> Any:
    """float32 rows (an MLX array) as uint8 of a type: "F32", "F16" or "Q8_0"."""
    import mlx.core as mx
    import numpy as np

    if kind == "Q8_0":
        return _q8_0(values)
    values = mx.contiguous(values.astype({"F32": mx.float32, "F16": mx.float16}[kind]))
    return np.array(values, copy=False).reshape(-1).view(np.uint8)


def _q8_0(values: Any) -> Any:
    """Blocks of 32 values: a scale in float16, codes of 8 bits rounded half away from zero. The bytes that
    quantize_row_q8_0_ref of ggml-quants.c and gguf.quants write, in a third of the latter's time; on the CPU, whose
    divisions are exact."""
    import mlx.core as mx
    import numpy as np

    with mx.stream(mx.cpu):
        blocks = values.reshape(-1, 32)
        scales = mx.abs(blocks).max(axis=1, keepdims=True) / 127
        scaled = blocks * mx.where(scales == 0, 0, 1 / scales)
        whole = mx.floor(mx.abs(scaled))
        codes = mx.sign(scaled) * (whole + mx.floor(2 * (mx.abs(scaled) - whole)))
        parts = scales.astype(mx.float16), codes.astype(mx.int8)
        mx.eval(parts)
    return np.concatenate([np.array(part, copy=False).view(np.uint8) for part in parts], axis=1).reshape(-1)


def _checked(raw: Any, values: Any, row: Row) -> memoryview:
    """Encoded rows. Raises PareError for what is not finite, before or after."""
    import mlx.core as mx

    from .llama_cpp import finite

    if not finite(raw, row.type):
        if not mx.isfinite(values).all():
            raise PareError(f"{row.source.name} holds NaN or infinity", "the checkpoint is damaged")
        raise PareError(f"{row.source.name} has values too large for {row.type}", "export as f32")
    return raw.data


def _rope_factors(target: Target, head_dim: int) -> Any:
    """float32 (head_dim / 2,): what llama3 scaling divides each rotary frequency by (mlx-lm's Llama3RoPE)."""
    import numpy as np

    s = target.scaling
    factor, low, high = float(s["factor"]), s.get("low_freq_factor", 1.0), s.get("high_freq_factor", 4.0)
    length = s.get("original_max_position_embeddings", 8192)
    waves = 2 * math.pi * target.theta ** (np.arange(0, head_dim, 2) / head_dim)
    smooth = np.clip((length / waves - low) / (high - low), 0, 1)  # 0: long waves, fully scaled; 1: short, untouched
    return (1 / ((1 - smooth) / factor + smooth)).astype(np.float32)


def verify(model: Path, gguf: Path) -> dict:
    """Ask llama.cpp itself: its logits on 64 tokens against stock MLX's, and its tokens of a few strings.

    Both compute in float32 on the CPU from the weights as stored, so an F32 file differs by rounding only (gemma3 by up
    to about 0.01: llama.cpp tabulates GELU in float16). Returns checked, tokens, max_abs_difference, same_argmax
    (a fraction), strings, different (those tokenized differently); or checked False and the reason.
    ``relative_difference``: mean difference over the standard deviation of the logits.
    """
    from . import llama_cpp

    if not llama_cpp.available():
        return {"checked": False, "reason": "llama-cpp-python is not installed (pip install 'mlx-pare[llama]')"}
    return {"checked": True, **llama_cpp.compare(Path(model), Path(gguf))}
