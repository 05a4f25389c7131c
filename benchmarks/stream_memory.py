"""Peak memory of calibrate and prune on a far larger checkpoint: 40 blocks, 1.5 GB of float32, 8 x 256 tokens.

    python benchmarks/stream_memory.py [--layers 40] [--out DIR]

Each step runs in a process of its own; what is printed is its peak resident size above that of an interpreter that has
imported mlx and nothing else. On a Mac add Metal memory, which is not part of the resident size.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

CONFIG = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 768,
    "intermediate_size": 3392,
    "num_attention_heads": 12,
    "num_key_value_heads": 4,
    "head_dim": 64,
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 4096,
    "rope_theta": 10000.0,
    "vocab_size": 4096,
    "tie_word_embeddings": True,
    "bos_token_id": 0,
    "eos_token_id": 0,
}

PEAK = """
import sys
from mlx_pare.machine import peak_rss_bytes
print(peak_rss_bytes(), file=sys.__stdout__)
"""
BARE = "import mlx.core as mx, mlx.nn; mx.eval(mx.zeros((8,)))"
CALIBRATE = """
import numpy as np
from pathlib import Path
from mlx_pare import console, corpus
from mlx_pare.calibrate import calibrate
console.configure(quiet=True)
rows = corpus.Rows.full(np.random.RandomState(0).randint(0, 4096, (8, 256)))
calibrate(Path({model!r}), rows, Path({work!r}) / "stats")
"""
PRUNE = """
from pathlib import Path
from mlx_pare import console
from mlx_pare.plan import Options, plan
from mlx_pare.prune import prune
from mlx_pare.score import score
console.configure(quiet=True)
model, work = Path({model!r}), Path({work!r})
score(model, work / "stats" / "stats.safetensors", work / "scores.safetensors", "minitron")
prune(model, plan(model, work / "scores.safetensors", Options(keep=0.75)), work / "pruned")
"""


def synthesize(directory: Path, layers: int) -> int:
    """Random weights of a true shape, written shard by shard; returns bytes."""
    import numpy as np

    from mlx_pare.arch import describe
    from mlx_pare.shards import Planned, ShardWriter, write_config

    directory.mkdir(parents=True)
    config = CONFIG | {"num_hidden_layers": layers}
    tensors = list(describe(config).tensors())
    writer = ShardWriter(directory, [Planned(t.name, "F32", t.shape) for t in tensors], shard_bytes=200 << 20)
    draw = np.random.RandomState(0)
    for tensor in tensors:
        scale = 1.0 if len(tensor.shape) == 1 else tensor.shape[-1] ** -0.5
        values = np.ones(tensor.shape) if len(tensor.shape) == 1 else draw.standard_normal(tensor.shape) * scale
        writer.write(tensor.name, values.astype("<f4").tobytes())
    writer.close()
    write_config(directory, config)
    return sum(t.size * 4 for t in tensors)


def peak(code: str) -> int:
    done = subprocess.run([sys.executable, "-c", f"{code}\n{PEAK}"], capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(done.stderr)
    return int(done.stdout.split()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=40)
    parser.add_argument("--out", type=Path, help="where to work (default: a temporary directory)")
    asked = parser.parse_args()
    work = Path(tempfile.mkdtemp(dir=asked.out))
    try:
        size = synthesize(work / "model", asked.layers)
        bare = peak(BARE)
        names = {"model": str(work / "model"), "work": str(work)}
        found = {"checkpoint_bytes": size, "bare_bytes": bare}
        for step, code in (("calibrate", CALIBRATE), ("score and prune", PRUNE)):
            found[f"{step}_above_bare_bytes"] = peak(code.format(**names)) - bare
        print(json.dumps(found, indent=1))
    finally:
        shutil.rmtree(work)


if __name__ == "__main__":
    main()
