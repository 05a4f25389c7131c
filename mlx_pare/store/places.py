"""Names of steps and files in a run directory that more than one wing uses."""

from __future__ import annotations

from pathlib import Path


def repair_file(directory: Path, layer: int) -> Path:
    """The file where reconstruct leaves the matrices of a layer of the pruned model for prune."""
    return directory / f"{layer:04d}.safetensors"


# The models that a run measures: name in the step, title in tables
CONTENDERS = (
    ("original", "original"),
    ("pruned", "pruned"),
    ("recovered", "pruned + recovered"),
    ("random", "random cut, same size"),
    ("fewer-bits", "original, fewer bits"),
)


def name_of(number: int) -> str:
    """The name of a stage's directory in its run directory."""
    return f"stage-{number}"
