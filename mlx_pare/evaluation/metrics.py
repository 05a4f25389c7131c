"""What `evaluate` measured, as metrics.json holds it."""

from __future__ import annotations

import math
from pathlib import Path

from pydantic import Field

from ..base.errors import shell
from ..store.arrays import MOST_NATS
from ..store.schema import SCHEMA, Count, Strict


class Metrics(Strict):
    """What `evaluate` measured on ``tokens`` predictions in ``windows`` rows of ``length`` tokens.

    ``nll`` (files of earlier versions have none) and KL are in nats per token. ``window_nll`` is the mean NLL of each
    row that has a prediction, for paired comparisons.
    """

    schema_version: int = SCHEMA
    model: str
    data: str
    tokens: Count
    windows: Count
    length: Count
    nll: float | None = None
    perplexity: float = Field(gt=0)
    perplexity_stderr: float
    bits_per_byte: float | None
    kl_divergence: float | None = None
    kl_p95: float | None = None
    top1_agreement: float | None = None
    window_nll: list[float] = Field(default_factory=list)

    @property
    def mean_nll(self) -> float:
        """Nats per token. Beyond MOST_NATS the perplexity does not show it."""
        return math.log(self.perplexity) if self.nll is None else self.nll

    def times(self, other: Metrics) -> float:
        """The ratio of this perplexity to that of ``other``, at most exp(MOST_NATS)."""
        return math.exp(min(self.mean_nll - other.mean_nll, MOST_NATS))

    @classmethod
    def load(cls, path: Path) -> Metrics:
        return cls.read(path, "metrics", f"delete {shell(Path(path).parent)} to do the step again", "is damaged")
