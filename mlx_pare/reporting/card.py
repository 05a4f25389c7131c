"""The README.md of a model to hand on: its origin, how it was made, and what that costs by the measurements of its
run."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

from .. import __version__
from ..base import markdown
from ..base.errors import plain
from ..base.units import gb, readable
from ..model.checkpoint import Checkpoint
from ..model.licence import licence_name
from ..store.manifest import Manifest, read_recipe
from ..store.places import CONTENDERS
from .verdict import metrics, reconstructed, verdict

MADE = {"recovered": "recover", "pruned": "prune"}  # contender -> step whose model it is


def run_of(model: Path) -> Path | None:
    """Return the run directory that a model lies in, as RUN/recover/model; None if it lies in none."""
    step = model.resolve().parent
    inside = model.resolve().name == "model" and step.name in MADE.values()
    return step.parent if inside and (step.parent / "manifest.json").is_file() else None


def card(model: Path, source: Path | None = None) -> str:
    """Write the card of a model. ``source`` is the model that it was packed from, whose origin then counts.

    The card has front matter that the hub reads, and sizes. If the model lies in a run directory, it also has the
    verdict, the table of measurements, and the hashes of plan and data. Raises PareError for a damaged model or
    manifest.
    """
    checkpoint, run = Checkpoint(model), run_of(source or model)
    manifest = Manifest.read(run / "manifest.json", "run manifest") if run else None
    sections = [_front(checkpoint, manifest), _made(checkpoint, manifest)]
    if run and manifest:
        sections += [_measured(source or model, run, manifest, source is not None), _asked(run), _hashes(run, manifest)]
    sections.append(_use(checkpoint))
    return "\n\n".join(section for section in sections if section) + "\n"


def _front(checkpoint: Checkpoint, manifest: Manifest | None) -> str:
    lines = ["library_name: mlx", "pipeline_tag: text-generation", "tags:", "- mlx", "- mlx-pare", "- pruned"]
    known = licence_name(Path(manifest.model)) if manifest else None
    if known := known or licence_name(checkpoint.path):
        lines.insert(0, f"license: {known}")
    if manifest and manifest.hub:
        lines.insert(0, f"base_model: {manifest.hub.repo}")
    return "\n".join(["---", *lines, "---"])


def _made(checkpoint: Checkpoint, manifest: Manifest | None) -> str:
    arch, packing = checkpoint.arch, checkpoint.quantization
    stored = f"{packing.bits} bits in groups of {packing.group_size}" if packing else "not quantized"
    size = sum(tensor.size for tensor in arch.tensors())
    origin = f" from {markdown.code(manifest.called)}" if manifest else ""
    return (
        f"# {markdown.escaped(manifest.called if manifest else checkpoint.path.resolve().name)}, pruned\n\n"
        f"Made{origin} by mlx-pare {__version__}: {size:,} parameters in {len(arch.layers)} layers, {stored}, "
        f"{gb(checkpoint.nbytes())}. `survivors.json` says which unit of the original every unit is."
    )


def _measured(model: Path, run: Path, manifest: Manifest, packed: bool) -> str:
    found = metrics(run)
    step = model.resolve().relative_to(run.resolve()).parts[0]
    mine = next((name for name, made in MADE.items() if made == step), None)
    rows = []
    for name, title in CONTENDERS:
        if name in found:
            m, size = found[name]
            kl = None if m.kl_divergence is None else f"{m.kl_divergence:.4f}"
            title += (" (before it was packed)" if packed else " (this model)") if name == mine else ""
            rows.append(markdown.row(title, gb(size), readable(m.perplexity, 3, m.perplexity_stderr), kl))
    if not rows:
        return ""
    first = next(iter(found.values()))[0]
    data = markdown.escaped(Path(first.data).name)
    note = f"On {first.tokens:,} tokens of {data}; KL in nats per token, to the original."
    table = markdown.table(["", "weights", "perplexity", "KL"], rows)
    return f"## Was it worth it?\n\n{verdict(found, reconstructed(manifest))}\n\n{table}\n\n{note}"


def _asked(run: Path) -> str:
    recipe = run / "recipe.toml"
    if not recipe.is_file():
        return ""
    # paths belong to the computer of the run, and stay private
    read_recipe(run)  # raises PareError for a damaged recipe
    lines = [line for line in recipe.read_text("utf-8").splitlines() if "/" not in line]
    return "## How\n\n```toml\n" + "\n".join(plain(line).replace("`", "'") for line in lines) + "\n```"


def _hashes(run: Path, manifest: Manifest) -> str:
    found = {"original": manifest.source}
    if (plan := run / "plan" / "plan.json").is_file():
        found["plan"] = hashlib.sha256(plan.read_bytes()).hexdigest()
    data: dict[str, Any] = {
        "calibration text": manifest.steps.get("calibrate"),
        "test text": manifest.steps.get("evaluate-original"),
    }
    found |= {name: step.inputs["data"] for name, step in data.items() if step and "data" in step.inputs}
    return "## Hashes\n\n" + "\n".join(f"- {name}: `{digest}`" for name, digest in found.items())


def _use(checkpoint: Checkpoint) -> str:
    lines = ["## Use", "", "```", 'mlx_lm.generate --model . --prompt "Once upon a time"', "```"]
    if checkpoint.arch.family.result:
        lines += ["", "Layers differ in width: transformers has no class for it, mlx-lm (`pip install mlx-lm`) has."]
    return "\n".join(lines)
