"""Names of steps and files in a run directory that more than one wing uses."""

from __future__ import annotations

from pathlib import Path


def repair_file(directory: Path, layer: int) -> Path:
    """Where reconstruct leaves the matrices of a layer of the pruned model, and prune finds them."""
    return directory / f"{layer:04d}.safetensors"


# what a run measures: name of the step, title in tables
CONTENDERS = (
    ("original", "original"),
    ("pruned", "pruned"),
    ("recovered", "pruned + recovered"),
    ("random", "random cut, same size"),
    ("fewer-bits", "original, fewer bits"),
)


def name_of(number: int) -> str:
    """The directory of a stage in that of its run."""
    return f"stage-{number}"
