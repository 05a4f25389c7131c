"""Write a checkpoint with the exact shapes of a catalogue model and random weights: for memory, time and faults.

    python scripts/make_synthetic.py qwen2.5-32b --bits 4 --out DIR
    python scripts/make_synthetic.py qwen3-8b --bits 16 --layers 2 --out DIR       only the first layers of it

As on the hub: shards, an index, config.json, a tokenizer (the shipped model's, whose vocabulary is smaller than the
embedding). Matrices are about as large as a trained model's, and rows differ in scale, so that some units matter more
than others. What it writes is gibberish: nothing about quality can be learnt from it.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from mlx_pare.arch import Tensor, describe
from mlx_pare.model.checkpoint import TOKENIZER_FILES
from mlx_pare.model.directory import write_config
from mlx_pare.pruning.layout import Piece
from mlx_pare.sources import catalogue
from mlx_pare.store.atomic import created
from mlx_pare.tensors.packing import BITS, GROUP_SIZES, Packing
from mlx_pare.tensors.shards import ShardWriter

DEMO = Path(__file__).resolve().parents[1] / "mlx_pare" / "demo" / "model"
DEVIATION = 0.02  # of the weights: what most models are initialised with
SPREAD = 0.5  # of the logarithm of a row's scale
SHARD_BYTES = 5 << 30


def bfloat16(values: np.ndarray) -> np.ndarray:
    """The upper halves of float32 values."""
    return (np.ascontiguousarray(values, np.float32).view(np.uint32) >> 16).astype(np.uint16)


class Random:
    """The parts of a random tensor, in the order in which they are stored."""

    def __init__(self, seed: int):
        self.draw = np.random.default_rng(seed)

    def arrays(self, piece: Piece) -> Iterator[np.ndarray]:
        """Words, scales and biases of a packed matrix; bfloat16 values of any other tensor."""
        tensor, packing = piece.tensor, piece.packing
        if packing is None:
            yield self._dense(tensor)
            return
        rows, columns = tensor.shape
        yield self.draw.integers(0, 2**32, (rows, packing.words(columns)), np.uint32)
        most = 2**packing.bits - 1  # codes are uniform in 0 .. most, with the deviation most / sqrt(12) or so
        scales = DEVIATION * 12**0.5 / most * np.exp(self.draw.normal(0, SPREAD, (rows, 1)))
        scales = np.broadcast_to(scales, (rows, packing.groups(columns)))
        yield bfloat16(scales)
        yield bfloat16(scales * (-most / 2))

    def _dense(self, tensor: Tensor) -> np.ndarray:
        if len(tensor.shape) == 1:  # norms about 1, biases about 0
            middle = float(tensor.name.endswith("norm.weight") and "norm+1" not in tensor.spec.transforms)
            return bfloat16(middle + DEVIATION * self.draw.standard_normal(tensor.shape))
        raw = self.draw.integers(0, 2**16, tensor.shape, np.uint16)
        return (raw & 0x807F) | (
            120 << 7
        )  # any sign, any digits, between 1/128 and 1/64: normal ones take ten times longer


def config_of(name: str, layers: int | None) -> dict:
    """The config of a catalogue model, of its language model where there is more to it. Raises SystemExit."""
    entry = catalogue.find(name)
    if entry is None:
        raise SystemExit(f"no model {name!r} in the catalogue; near are: {', '.join(catalogue.near(name)) or 'none'}")
    config = {**entry.config, **entry.config.get("text_config", {})}
    config.pop("text_config", None)
    own = json.loads((DEMO / "config.json").read_text())
    config |= {key: own[key] for key in ("bos_token_id", "eos_token_id") if key in own}
    if layers is not None:
        config["num_hidden_layers"] = layers
    return config


def make(config: dict, out: Path, packing: Packing | None, seed: int) -> int:
    """Write the model; returns its bytes."""
    arch = describe(config)
    fitted = ((t, packing.fitted(t.shape[-1]) if packing and t.matrix else None) for t in arch.tensors())
    pieces = [Piece(tensor, (), each, "BF16") for tensor, each in fitted]
    draw = Random(seed)
    with created(out) as place:
        place.mkdir()
        writer = ShardWriter(place, [planned for piece in pieces for planned in piece.stored()], SHARD_BYTES)
        for done, piece in enumerate(pieces, 1):
            for planned, array in zip(piece.stored(), draw.arrays(piece), strict=True):
                writer.write(planned.name, memoryview(np.ascontiguousarray(array)).cast("B"))
            if sys.stderr.isatty():
                print(f"\r{done} of {len(pieces)} tensors ", end="", file=sys.stderr, flush=True)
        writer.close()
        write_config(place, config | ({"quantization": packing.as_config()} if packing else {}))
        for file in TOKENIZER_FILES:
            if (DEMO / file).exists():
                shutil.copyfile(DEMO / file, place / file)
    return sum(piece.nbytes for piece in pieces)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", help="a model of the catalogue, such as qwen2.5-7b, qwen3-8b, qwen2.5-32b, gemma3-4b")
    parser.add_argument("--bits", type=int, choices=[*BITS, 16], default=4, help="16: not packed, bfloat16")
    parser.add_argument("--group-size", type=int, choices=GROUP_SIZES, default=64)
    parser.add_argument("--layers", type=int, help="only so many")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, required=True)
    asked = parser.parse_args()
    if asked.out.exists():
        raise SystemExit(f"{asked.out} is there already: remove it, or give another --out")
    packing = None if asked.bits == 16 else Packing(asked.bits, asked.group_size)
    begun = time.perf_counter()
    nbytes = make(config_of(asked.name, asked.layers), asked.out, packing, asked.seed)
    print(f"{asked.out}: {nbytes / 1e9:.2f} GB of random weights in {time.perf_counter() - begun:.0f} s")


if __name__ == "__main__":
    main()
