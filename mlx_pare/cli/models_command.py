"""The command models: the catalogue."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from ..base import console
from ..base.units import count
from .app import command


@command("models", "mlx-pare models | mlx-pare models qwen3 | mlx-pare models --json")
def models_command(
    part: Annotated[
        str | None, typer.Argument(help="Only models whose name or repository has this in it.", metavar="[TEXT]")
    ] = None,
) -> dict[str, Any]:
    """List the models that mlx-pare knows by name.

    The list shows how large they are, what can be cut, and which repository they are in. Commands that need weights
    download them from that repository. These are float originals, except if the catalogue names weights packed by MLX.
    """
    from ..base.errors import UsageError
    from ..sources import catalogue

    text = (part or "").lower()
    found = [row for row in catalogue.rows() if any(text in name.lower() for name in _names(row))]
    if not found:
        close = catalogue.near(text)
        cure = f"did you mean {', '.join(close)}?" if close else "leave the text out to see all"
        raise UsageError(f"the catalogue has no model with {part!r} in its name", cure)
    rows = [
        [
            row["name"],
            count(row["parameters"]),
            ", ".join(row["cuttable"]) or "nothing (fit and inspect only)",
            f"{row['bits']} bits" if row["bits"] else "as published",
            row["repository"],
        ]
        for row in found
    ]
    packed = sum(row["bits"] is not None for row in found)
    console.table(
        f"{len(found)} models",
        ["<name", "parameters", "<can be cut", "<weights", "<repository on the hub"],
        rows,
        "As published: the original weights. The catalogue names a repository that MLX packed only if it has a source "
        f"for it: {packed} of these.\nGive the name as MODEL, or a hub id (org/name) for other weights. --json has the "
        "sources.",
    )
    return {"models": found}


def _names(row: dict[str, Any]) -> list[str]:
    return [row["name"], row["repository"], row["original"], *row["aliases"], *row["same_shapes"]]
