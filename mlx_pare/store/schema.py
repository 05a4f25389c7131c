"""JSON files with a schema: unknown keys are errors, sizes are bounded, one line explains any damage."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from ..base import untrusted
from ..base.errors import PareError

SCHEMA = 1
MAX_ARTIFACT = 64 << 20  # bytes; a plan of 126 layers of 53,248 channels takes 47 million
ARTIFACT_BUDGET = 512 << 20  # bytes that it may take in memory


class Strict(BaseModel):
    """A schema in which unknown keys are errors: a typo in an edited file must not pass."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False, defer_build=True)

    @classmethod
    def read(cls, path: Path, what: str, cure: str = "make it again", fault: str = "is not valid") -> Self:
        """Read a JSON file of bounded size.

        Args:
            path: the file.
            what: what the file is, for errors.
            cure: what to do if the file is wrong, for errors.
            fault: what is wrong with such a file, as a verb phrase for errors.
        Returns:
            The checked content.
        Raises:
            PareError: the file cannot be read, is too large or does not suit the schema; one line says why.
        """
        try:
            text = untrusted.contents(Path(path) if isinstance(path, str) else path, MAX_ARTIFACT, what).decode("utf-8")
            untrusted.check_cost(text, ARTIFACT_BUDGET)
            return cls.model_validate_json(text)
        except OSError as error:
            raise PareError(f"cannot read {what} {path}: {error.strerror}") from error
        except ValidationError as error:
            raise PareError(f"{what} {path} {fault}: {explain(error)}", cure) from error
        except ValueError as error:
            raise PareError(f"{what} {path} {fault}: {error}", cure) from error


Count = Annotated[int, Field(ge=0, le=10**30)]  # a larger number is no count, and may not fit a float


def explain(error: ValidationError) -> str:
    """Put pydantic's findings, at most 20, into one line."""
    parts = []
    for item in error.errors():
        where = ".".join(str(p) for p in item["loc"]) or "document"
        parts.append(f"{where}: {item['msg']}")
    return "; ".join(parts[:20])


def dump_json(value: Mapping[str, Any] | BaseModel) -> bytes:
    """Make the bytes of a JSON file. Raises ValueError for NaN and infinity, which are not JSON."""
    if isinstance(value, BaseModel):
        value = value.model_dump()
    return json.dumps(value, indent=1, default=str, allow_nan=False).encode() + b"\n"
