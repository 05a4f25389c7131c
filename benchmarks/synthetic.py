"""A checkpoint of random weights with the shapes of Qwen3-8B's blocks, few of them, and a small vocabulary: what the
speed benchmarks measure on. Written by our own shard writer, with the tokenizer of the shipped model."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np

from mlx_pare import corpus
from mlx_pare.arch import describe
from mlx_pare.arch.spec import Tensor
from mlx_pare.packing import Packing
from mlx_pare.shards import Planned, ShardWriter, write_config

DEMO = Path(corpus.__file__).parent / "demo" / "model"
PACKING = Packing(4, 64)
CONFIG = {
    "model_type": "qwen3",
    "architectures": ["Qwen3ForCausalLM"],
    "hidden_size": 4096,
    "intermediate_size": 12288,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "rms_norm_eps": 1e-6,
    "max_position_embeddings": 40960,
    "rope_theta": 1000000.0,
    "vocab_size": 4096,  # that of the tokenizer; Qwen3 has 151,936
    "tie_word_embeddings": False,
    "bos_token_id": 0,
    "eos_token_id": 0,
}


def checkpoint(directory: Path, blocks: int, packed: bool) -> Path:
    """A model of so many blocks, bfloat16 or 4 bits in groups of 64, written where it is not yet; its directory."""
    if directory.exists():
        return directory
    directory.mkdir(parents=True)
    config = CONFIG | {"num_hidden_layers": blocks}
    tensors = list(describe(config, untied=True).tensors())
    parts = [(tensor, planned) for tensor in tensors for planned in _stored(tensor, packed)]
    writer = ShardWriter(directory, [planned for _, planned in parts])
    draw = np.random.default_rng(0)
    for tensor, planned in parts:
        writer.write(planned.name, _values(draw, tensor, planned))
    writer.close()
    write_config(directory, config | ({"quantization": PACKING.as_config()} if packed else {}))
    for file in DEMO.iterdir():
        if "token" in file.name:
            shutil.copyfile(file, directory / file.name)
    return directory


def _stored(tensor: Tensor, packed: bool) -> list[Planned]:
    if not (packed and tensor.matrix):
        return [Planned(tensor.name, "BF16", tensor.shape)]
    rows, columns = tensor.shape
    groups = (rows, PACKING.groups(columns))
    return [
        Planned(tensor.name, "U32", (rows, PACKING.words(columns))),
        Planned(f"{tensor.module}.scales", "BF16", groups),
        Planned(f"{tensor.module}.biases", "BF16", groups),
    ]


def _values(draw: np.random.Generator, tensor: Tensor, planned: Planned) -> bytes:
    """Weights of variance 1 / columns, norms of 1; codes that are as often 0 as 15."""
    if planned.dtype == "U32":
        return draw.bytes(planned.nbytes)
    step = tensor.shape[-1] ** -0.5 * 12**0.5 / 15
    if planned.name.endswith((".scales", ".biases")):
        values = np.full(planned.shape, step if planned.name.endswith(".scales") else -7.5 * step, np.float32)
    elif len(planned.shape) == 1:
        values = np.ones(planned.shape, np.float32)
    else:
        values = draw.standard_normal(planned.shape, np.float32) * planned.shape[-1] ** -0.5
    return (values.view(np.uint32) >> 16).astype("<u2").tobytes()  # bfloat16, cut off
