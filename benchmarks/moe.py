"""A trained mixture of experts, and what each way to choose its experts costs.

    python benchmarks/moe.py train --reference DIR --out MODEL             upcycle DIR/models/novelist-9m, 20 minutes
    python benchmarks/moe.py compare --reference DIR --model MODEL --out RUNS       criteria, random, one domain alone

The feed-forward of every layer is divided into eight groups of channels. Each becomes two experts, drawn apart by
noise. The model (16 experts, 4 of them active, 15 million parameters) then learns two domains: novels, and Python code
of the standard library. So some experts belong to code: whether they survive shows what the calibration text does.
``two_cities.txt`` and the modules HELD are in no training and no calibration.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import sysconfig
import time
from collections.abc import Iterator
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
from mlx.utils import tree_flatten

from mlx_pare import lm
from mlx_pare.base import console
from mlx_pare.evaluation.evaluate import evaluate
from mlx_pare.options.settings import Settings
from mlx_pare.pipeline.run import run
from mlx_pare.text import corpus

EXPERTS, ACTIVE, NOISE = 16, 4, 0.3  # noise: share of the standard deviation of a matrix
ROWS, LENGTH, RATE = 8, 256, 1e-3
CODE = ("argparse", "ast", "asyncio", "collections", "concurrent", "csv", "ctypes", "dataclasses", "datetime",
        "decimal", "difflib", "dis", "email", "enum", "fractions", "functools", "gettext", "http", "importlib",
        "inspect", "ipaddress", "json", "logging", "multiprocessing", "pathlib", "pickle", "shutil", "statistics",
        "tarfile", "threading", "typing", "unittest", "urllib", "uuid", "xml", "zipfile")  # fmt: skip
CRITERIA = ("obs", "reap", "ean", "frequency", "random")
HELD_NOVEL = "two_cities.txt"
HELD = ("heapq", "bisect", "configparser", "subprocess", "socket", "tempfile", "textwrap", "tokenize", "queue")


def upcycled(source: Path, out: Path) -> None:
    """Write a mixtral whose experts are groups of channels of a llama's feed-forwards.

    Args:
        source: directory of the llama.
        out: directory to write.
    """
    out.mkdir(parents=True)
    config = json.loads((source / "config.json").read_text())
    weights = mx.load(str(source / "model.safetensors"))
    groups, width = EXPERTS // 2, config["intermediate_size"] * 2 // EXPERTS
    made, key = {}, mx.random.key(0)
    for name, array in weights.items():
        if ".mlp." not in name:
            made[name] = array.astype(mx.float32)
            continue
        prefix, role = name.split(".mlp.")[0], name.split(".")[-2]
        array = array.astype(mx.float32)
        parts = [array[:, i * width : (i + 1) * width] if role == "down_proj" else array[i * width : (i + 1) * width]
                 for i in range(groups)]  # fmt: skip
        stack = mx.stack([*parts, *parts]) * (ACTIVE if role == "down_proj" else 1)
        key, own = mx.random.split(key)
        made[f"{prefix}.block_sparse_moe.switch_mlp.{role}.weight"] = stack + NOISE * mx.std(array) * mx.random.normal(
            stack.shape, key=own
        )
    for layer in range(config["num_hidden_layers"]):
        key, own = mx.random.split(key)
        gate = mx.random.normal((EXPERTS, config["hidden_size"]), key=own) * 0.05
        made[f"model.layers.{layer}.block_sparse_moe.gate.weight"] = gate
    mx.save_safetensors(str(out / "model.safetensors"), made, {"format": "mlx"})
    config |= {"model_type": "mixtral", "architectures": ["MixtralForCausalLM"], "intermediate_size": width}
    config |= {"num_local_experts": EXPERTS, "num_experts_per_tok": ACTIVE}
    (out / "config.json").write_text(json.dumps(config, indent=1))
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "generation_config.json"):
        shutil.copyfile(source / name, out / name)


def code_text(modules: tuple[str, ...]) -> str:
    """The sources of modules of the standard library, one after the other."""
    place = Path(sysconfig.get_paths()["stdlib"])
    files = [f for name in modules for f in (sorted((place / name).glob("*.py")) or [place / f"{name}.py"])]
    return "\n\n".join(file.read_text("utf-8") for file in files if file.is_file())


def domains(reference: Path, tokenizer) -> dict[str, np.ndarray]:
    """The tokens of both domains, for training."""
    files = sorted(f for f in (reference / "data" / "novels").glob("*.txt") if f.name != HELD_NOVEL)
    novels = "\n\n".join(file.read_text("utf-8") for file in files)
    texts = {"novels": novels, "code": code_text(CODE)}
    return {name: np.array(tokenizer.encode(text).ids, np.int32) for name, text in texts.items()}


def batches(tokens: dict[str, np.ndarray], seed: int) -> Iterator[mx.array]:
    """Endless batches int32 [ROWS, LENGTH + 1]; both domains alternate in their rows."""
    random = np.random.default_rng(seed)
    while True:
        rows = []
        for row in range(ROWS):
            source = tokens[("novels", "code")[row % 2]]
            start = random.integers(0, len(source) - LENGTH - 1)
            rows.append(source[start : start + LENGTH + 1])
        yield mx.array(np.stack(rows))


def _dense(moe, x: mx.array) -> mx.array:
    """What a MixtralSparseMoeBlock computes, with all experts as one wide feed-forward: MLX's gather_mm has no fast
    gradient on the CPU."""
    up, gate, down = (moe.switch_mlp[name].weight for name in ("up_proj", "gate_proj", "down_proj"))
    experts, width, hidden = up.shape
    logits = moe.gate(x)
    chosen = mx.stop_gradient(mx.argpartition(-logits, kth=ACTIVE - 1, axis=-1)[..., :ACTIVE])
    weights = mx.softmax(mx.take_along_axis(logits, chosen, axis=-1), axis=-1)
    spread = mx.put_along_axis(mx.zeros_like(logits), chosen, weights, axis=-1)
    gated = x @ gate.reshape(-1, hidden).T
    inner = gated * mx.sigmoid(gated) * (x @ up.reshape(-1, hidden).T)
    inner = (inner.reshape(*x.shape[:-1], experts, width) * spread[..., None]).reshape(*x.shape[:-1], -1)
    return inner @ down.transpose(1, 0, 2).reshape(hidden, -1).T


def train(model_dir: Path, reference: Path, minutes: float) -> None:
    """Train for some minutes by AdamW with a cosine, and write the weights in float16.

    Args:
        model_dir: the model; it is written again.
        reference: directory with data/novels.
        minutes: how long.
    """
    from tokenizers import Tokenizer

    model = lm.load(model_dir, lazy=False)
    moe = type(model.model.layers[0].block_sparse_moe)
    moe.__call__ = _dense
    tokens = domains(reference, Tokenizer.from_file(str(model_dir / "tokenizer.json")))
    optimizer = optim.AdamW(learning_rate=RATE, weight_decay=0.01)

    def loss(batch: mx.array) -> mx.array:
        return nn.losses.cross_entropy(model(batch[:, :-1]), batch[:, 1:], reduction="mean")

    step, begun, mean = nn.value_and_grad(model, loss), time.monotonic(), None
    for number, batch in enumerate(batches(tokens, 0)):
        share = (time.monotonic() - begun) / (60 * minutes)
        if share >= 1:
            break
        optimizer.learning_rate = RATE * min(1, (number + 1) / 20) * (0.05 + 0.95 * (1 + math.cos(math.pi * share)) / 2)
        with lm.swift():
            value, gradients = step(batch)
            mx.eval(value, gradients)
        gradients, _ = optim.clip_grad_norm(gradients, 1.0)
        optimizer.update(model, gradients)
        mx.eval(model.parameters(), optimizer.state, value)
        mean = value.item() if mean is None else 0.95 * mean + 0.05 * value.item()
        if number % 10 == 0:
            console.say(f"step {number}: loss {mean:.3f}, {share:.0%} of {minutes:g} minutes")
    weights = {name: array.astype(mx.float16) for name, array in tree_flatten(model.parameters())}
    mx.save_safetensors(str(model_dir / "model.safetensors"), weights, {"format": "mlx"})


def once(text: str) -> str:
    """The text with every long line once: what calibrates and what measures must not share paragraphs."""
    seen: set[str] = set()
    found = []
    for line in text.split("\n"):
        if len(key := line.strip()) <= 20 or key not in seen:
            found.append(line)
        seen.add(key)
    return "\n".join(found)


def compare(model: Path, reference: Path, out: Path) -> None:
    """Cut the model by each criterion, calibrated on both domains and on novels alone, and measure both domains.

    Args:
        model: what ``train`` made.
        reference: directory with data/novels.
        out: directory for texts and runs.
    """
    out.mkdir(parents=True, exist_ok=True)
    held = {"novels": reference / "data" / "novels" / HELD_NOVEL, "code": out / "code-held.txt"}
    held["code"].write_text(code_text(HELD), "utf-8")
    (out / "code.txt").write_text(once(code_text(CODE[:14])), "utf-8")
    novels, code = reference / "data" / "novels" / "copperfield.txt", out / "code.txt"
    both = (f"novels={novels}", f"code={code}")

    tokenizer = lm.tokenizer(model)
    rows = [corpus.windows(tokenizer, corpus.read(text, tokenizer), 256, 24) for text in held.values()]

    def measured(what: str, place: Path) -> None:
        found = [evaluate(place, each, tokenizer) for each in rows]
        console.say(f"{what:24} " + "  ".join(f"{m.perplexity:8.2f} ± {m.perplexity_stderr:5.2f}" for m in found))

    measured("original", model)
    for keep in (0.8, 0.6):
        ways = [(criterion, both) for criterion in CRITERIA] + [("obs, novels alone", str(novels))]
        for what, data in ways:
            place, criterion = out / f"{what}-{keep}".replace(", ", "-").replace(" ", "-"), what.partition(",")[0]
            asked = Settings(data=data, test_data=str(held["novels"]), keep=keep, criterion=criterion, quick=True,
                             samples=64, length=256)  # fmt: skip
            run(model, place, asked)
            measured(f"{what}, keep {keep:g}", place / "prune" / "model")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("what", choices=["train", "compare"])
    parser.add_argument("--reference", type=Path, required=True, help="directory with data/ and models/")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--model", type=Path, help="with compare: what train made")
    parser.add_argument("--minutes", type=float, default=20)
    asked = parser.parse_args()
    if asked.what == "compare":
        compare(asked.model, asked.reference, asked.out)
    else:
        upcycled(asked.reference / "models" / "novelist-9m", asked.out)
        train(asked.out, asked.reference, asked.minutes)
