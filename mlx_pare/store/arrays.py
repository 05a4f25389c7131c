"""Files of named arrays with a schema version: safetensors whose header holds a JSON description under "pare"."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from shutil import disk_usage
from typing import Any

from ..base import untrusted
from ..base.errors import PareError
from ..base.units import gb
from ..tensors.safetensors import read_header
from .atomic import replaced
from .schema import SCHEMA


@dataclass
class Arrays:
    """Named arrays with a description, such as Stats (per site of every layer) or Scores (per unit)."""

    arrays: dict[str, Any]
    about: dict[str, Any]

    def save(self, path: Path) -> None:
        """Write a file, whole or not at all. Raises PareError if MLX cannot write it."""
        import mlx.core as mx

        about = {"schema": SCHEMA, **self.about}
        with replaced(path, ".safetensors") as temporary:  # MLX adds this suffix to any other
            try:
                mx.save_safetensors(str(temporary), self.arrays, metadata={"pare": json.dumps(about, sort_keys=True)})
            except RuntimeError as error:  # MLX does not say why it could not be written
                raise PareError(
                    f"cannot write {path}, on whose disk {gb(disk_usage(path.parent).free)} are free: {error}",
                    "make room on the disk: what is finished is kept, the same command continues",
                ) from error

    @classmethod
    def load(cls, path: Path, what: str) -> Arrays:
        """Read a file as numpy arrays of the dtypes that were saved; ``what`` names it in errors.

        Raises PareError if the file is missing, damaged or of another schema."""
        return cls._read(path, what, lambda name: True)

    @classmethod
    def described(cls, path: Path, what: str) -> dict[str, Any]:
        """Read the description alone, without the arrays. Raises PareError as ``load`` does."""
        return cls._read(path, what, lambda name: False).about

    @classmethod
    def _read(cls, path: Path, what: str, wanted: Callable[[str], bool]) -> Arrays:
        from safetensors import SafetensorError, safe_open

        try:
            read_header(path)  # bounds what the library would allocate
            with safe_open(path, framework="numpy") as file:
                about = untrusted.loads((file.metadata() or {}).get("pare", "{}"))
                arrays = {name: file.get_tensor(name) for name in file.keys() if wanted(name)}  # noqa: SIM118 no dict
        except (PareError, OSError, SafetensorError, ValueError, TypeError, AttributeError) as error:
            raise PareError(f"cannot read {what} {path}: {getattr(error, 'problem', error)}") from error
        if not isinstance(about, dict):
            raise PareError(f"cannot read {what} {path}: its description is no object")
        if about.get("schema") != SCHEMA:
            raise PareError(f"{path} has schema {about.get('schema')}, this version reads {SCHEMA}", "make it again")
        return cls(arrays, about)


MOST_NATS = 700.0  # exp of more is no float
