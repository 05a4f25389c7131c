"""What loads a cut model, and computes the same: every cell of the table in docs/families.md.

    python benchmarks/compat.py              all families of tests/support/pico.py that can be cut (minutes)
    python benchmarks/compat.py --families llama qwen3 --models DIR

A tiny model of each family, made by mlx-lm's own class from a seed, is cut along every axis, all layers alike and each
with a size of its own. Of the result stock mlx-lm writes 64 tokens; llama.cpp computes logits (largest difference to
mlx-lm's, both in float32) and writes 64 tokens; transformers opens config and tokenizer, and where torch is installed
computes logits as well. --models adds real ones.
"""

from __future__ import annotations

import argparse
import importlib.util
import platform
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent / "tests" / "support"))

import pico  # noqa: E402

from mlx_pare import lm  # noqa: E402
from mlx_pare.arch import cut  # noqa: E402
from mlx_pare.base import console  # noqa: E402
from mlx_pare.base.errors import PareError  # noqa: E402
from mlx_pare.evaluation.sanity import check  # noqa: E402
from mlx_pare.exporting import llama_cpp  # noqa: E402
from mlx_pare.exporting.export import export  # noqa: E402
from mlx_pare.exporting.llama_cpp import verify  # noqa: E402
from mlx_pare.model.checkpoint import Checkpoint  # noqa: E402
from mlx_pare.pruning.plan_file import LayerPlan, Plan, Size, Target  # noqa: E402
from mlx_pare.pruning.prune import prune  # noqa: E402

TOKENS = 64
CLOSE = 1e-4  # of logits, in float32
PROMPT = "The old mill stood by the river."
# shares of what there is that layers keep: alike, and in turn
AXES = {
    "ffn": {"ffn": (0.5,)},
    "heads": {"kv_head": (0.5,)},
    "layers": {"layer": 0.5},
    "hidden": {"hidden": 0.5},
    "ffn, each its own": {"ffn": (0.5, 1.0, 0.25)},
    "heads, each its own": {"kv_head": (0.5, 1.0)},
    "no attention here and there": {"ffn": (1.0,), "kv_head": (1.0, 0.0)},
    "no ffn here and there": {"ffn": (1.0, 0.0), "kv_head": (1.0,)},
}
HEADS = {"num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 8, "intermediate_size": 512}


def plan_of(model: Path, shares: dict) -> Plan:
    """A plan that keeps the first of the units, as many as the shares say, layer by layer in turn."""
    checkpoint = Checkpoint(model)
    arch = checkpoint.arch
    if "layer" in shares:
        kept = depth(arch, shares["layer"])
    else:
        kept = list(range(len(arch.layers)))
    layers = []
    for place, source in enumerate(kept):
        units = {}
        for axis in ("ffn", "kv_head"):
            of = shares.get(axis, (1.0,))
            units[axis] = list(range(round(arch.layers[source].sizes[axis] * of[place % len(of)])))
        layers.append(LayerPlan(source=source, **units))
    hidden = list(range(int(arch.sizes["hidden"] * shares["hidden"]))) if "hidden" in shares else None
    nothing = dict.fromkeys(Size.model_fields, 0)
    return Plan(
        source=checkpoint.identity(),
        criterion="first",
        axes=["ffn", "kv_head"],
        target=Target(kind="keep", value=0.5, asked="half"),
        before=nothing,
        after=nothing,
        layers=layers,
        hidden=hidden,
    )


def depth(arch, share: float) -> list[int]:
    """Layers that go on being of their kind; the largest such set below the share."""
    from mlx_pare.pruning.reach import best_layers

    for count in range(int(len(arch.layers) * share), 0, -1):
        if found := best_layers(arch, [float(-i) for i in range(len(arch.layers))], count, [0]):
            return found
    raise PareError("no half of the layers can go on being of their kind")


@dataclass
class Cell:
    """What became of one cut. ``short``: as it stands in the small table."""

    leaves_as: str
    mlx_lm: str
    llama_cpp: str
    transformers: str
    short: str

    def row(self, name: str, axis: str) -> str:
        return f"| {name} | {axis} | {self.leaves_as} | {self.mlx_lm} | {self.llama_cpp} | {self.transformers} |"


def cell(source: Path, axis: str, work: Path) -> Cell:
    """One cut, opened by everybody. Raises PareError for one that is refused."""
    plan, checkpoint = plan_of(source, AXES[axis]), Checkpoint(source)
    if problems := plan.problems(checkpoint.arch):
        raise PareError(problems[0])
    out = work / "out"
    prune(source, plan, out)
    arch = cut(checkpoint.arch, plan.keep(checkpoint.arch))
    ids = lm.tokenizer(out).encode(PROMPT)
    ours = lm.greedy(lm.load_stock(out), ids, TOKENS)
    check(out, source)  # transformers opens config and tokenizer, the tokenizer alone where it knows no such model
    there, short = in_llama_cpp(out, work / "m.gguf", ids, ours)
    opened = "tokenizer" if arch.family.result else in_transformers(out, ids + ours)
    return Cell(arch.config["model_type"], f"{len(ours)} tokens", there, opened, short)


def in_transformers(out: Path, tokens: list[int]) -> str:
    """What transformers makes of it: its logits beside mlx-lm's where torch is installed."""
    if importlib.util.find_spec("torch") is None:
        return "config, tokenizer"
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32, attn_implementation="eager")
    with torch.no_grad():
        theirs = model(torch.tensor([tokens])).logits[0].numpy()
    return f"logits {abs(theirs - llama_cpp.mlx_logits(out, tokens)).max():.1e}"


def in_llama_cpp(out: Path, gguf: Path, ids: list[int], ours: list[int]) -> tuple[str, str]:
    """(in words, in short) what llama.cpp makes of the file."""
    try:
        done = export(out, gguf, "f32")
    except PareError as error:
        return f"no: {error.problem}", "mlx-lm"
    found = verify(out, gguf)
    same = sum(a == b for a, b in zip(ours, llama_cpp.greedy(gguf, ids, TOKENS), strict=True))
    largest = found["max_abs_difference"]
    sound = largest <= CLOSE and same == TOKENS and not found["different"]
    words = f"{done['architecture']}: {largest:.1e}, {same} of {TOKENS} tokens, {len(found['different'])} texts differ"
    return words + ("" if sound else " (!)"), f"{done['architecture']} {largest:.0e}" + ("" if sound else " (!)")


def cells(name: str, source: Path) -> Iterator[tuple[str, Cell]]:
    for axis in AXES:
        with tempfile.TemporaryDirectory() as work:
            try:
                yield axis, cell(source, axis, Path(work))
            except PareError as error:
                why = error.problem.replace(str(source), name)
                yield axis, Cell("-", f"refused: {why}", "-", "-", "-")


def main() -> None:
    """Print the tables, and write them to a file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--families", nargs="*", default=[*pico.FAMILIES, *pico.MORE])
    parser.add_argument("--models", type=Path, nargs="*", default=[], help="directories of real models")
    parser.add_argument("--out", type=Path, default=HERE / "results" / "compat.md")
    asked = parser.parse_args()
    console.configure(quiet=True)
    used = ("mlx", "mlx-lm", "gguf", "llama-cpp-python", "transformers")
    versions = ", ".join(f"{name} {version(name)}" for name in used)
    small = ["| | " + " | ".join(AXES) + " |", "|---" * (len(AXES) + 1) + "|"]
    long = ["| family | cut | leaves as | mlx-lm | llama.cpp (F32): logits, text | transformers |", "|---" * 6 + "|"]
    with tempfile.TemporaryDirectory() as scratch:
        sources = [(name, pico.make(Path(scratch) / name, name, **HEADS)) for name in asked.families]
        for name, source in [*sources, *((m.name, m) for m in asked.models)]:
            found = dict(cells(name, source))
            small.append(f"| {name} | " + " | ".join(one.short for one in found.values()) + " |")
            long += [one.row(name, axis) for axis, one in found.items()]
            print(small[-1], flush=True)
    text = [f"{versions}; {platform.system()}, MLX's CPU backend", "", *small, "", *long]
    asked.out.write_text("\n".join(text) + "\n")


if __name__ == "__main__":
    main()
