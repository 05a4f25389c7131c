"""What a run has tried: KL divergences of candidates and plans on held-out rows, each measured once.

RUN/trials.json holds them by a hash of everything that they depend on.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any

from ..options.settings import Settings
from ..pruning.plan_file import Plan
from ..repair.reconstruct import reconstructed_kl
from ..store import step_files
from ..store.arrays import Arrays
from ..store.atomic import replace_file, scratch
from ..store.rundir import Run
from ..store.schema import dump_json
from ..text.corpus import Rows
from ..text.splits import Texts
from .candidate import Candidate, Curve, Curves
from .try_candidates import try_out

HELD_TOKENS = 4096  # at least, on which candidates are tried: from the validation text, never from calibration or test


def held_rows(texts: Texts) -> Rows:
    """Take the first rows of the validation text: enough for HELD_TOKENS tokens, or all there are.

    Args:
        texts: of the run.
    Returns:
        Rows, int32 [rows, tokens].
    """
    rows = texts.validation
    return rows.first(math.ceil(HELD_TOKENS / rows.length))


def written(candidate: Candidate) -> list[dict[str, int] | None]:
    """Return a candidate for a JSON file."""
    return [None if w is None else {k: v for k, v in asdict(w).items() if v is not None} for w in candidate]


def finite(kl: float, name: str = "kl") -> dict[str, float | None]:
    """Return a result for a JSON file, which has no infinity: null stands for what was given up."""
    return {name: kl if math.isfinite(kl) else None}


class Known:
    """RUN/trials.json: results by a hash of what they depend on. Raises PareError for a damaged file."""

    def __init__(self, run: Run, *about: str):
        self.file, self.about = run.path / "trials.json", [run.manifest.source, *about]
        self.found: dict[str, float | None] = step_files.find(self.file) or {}

    def key(self, what: Any) -> str:
        """Return the hash of what a result depends on."""
        return hashlib.sha256(dump_json({"about": self.about, "what": what})).hexdigest()

    def add(self, found: dict[str, float]) -> None:
        """Add results, and write the file."""
        self.found |= {key: finite(kl)["kl"] for key, kl in found.items()}
        replace_file(self.file, dump_json(self.found))

    def __contains__(self, key: str) -> bool:
        return key in self.found

    def __getitem__(self, key: str) -> float:
        """Return a result; infinite if it was given up."""
        return math.inf if self.found[key] is None else self.found[key]


def once(known: Known, measure: Callable[[Sequence[Candidate]], Sequence[float]]) -> Callable:
    """Wrap ``measure`` so that it only measures candidates whose results are not known yet."""

    def all_of(candidates: Sequence[Candidate]) -> list[float]:
        keys = [known.key(written(candidate)) for candidate in candidates]
        new = [i for i, key in enumerate(keys) if key not in known]
        if new:
            made = measure([candidates[i] for i in new])
            known.add({keys[i]: kl for i, kl in zip(new, made, strict=True)})
        return [known[key] for key in keys]

    return all_of


def candidates_kl(run: Run, texts: Texts, s: Settings, candidates: Sequence[Candidate]) -> list[float]:
    """Measure the KL divergence of every candidate that is not known yet.

    Args:
        run: the run directory.
        texts: of the run.
        s: settings of the run.
        candidates: widths per layer.
    Returns:
        KL divergence to the original in nats per token, infinite if a candidate was given up.
    Raises:
        Refused: the memory does not suffice for a single candidate.
        PareError: trials.json is damaged.
    """
    calibration, held = texts.calibration, held_rows(texts)
    known = Known(run, calibration.digest(), held.digest(), str(s.group_size))

    def measure(new: Sequence[Candidate]) -> list[float]:
        return try_out(run.model, new, calibration, held, _curves(run, calibration), s.group_size, s.memory_cap).kl

    return once(known, measure)(candidates)


def _curves(run: Run, calibration: Rows) -> Curves:
    """Return the orders in which units are removed, if sensitivity has found them on these rows."""
    file = run.directory("sensitivity") / "sensitivity.safetensors"
    if not file.exists():
        return {}
    found = Arrays.load(file, "sensitivities")
    if found.about["calibration"] != calibration.digest():
        return {}
    arrays = found.arrays
    keys = [name.split(".") for name in arrays if name.endswith(".order")]
    return {
        (int(layer), part): Curve(arrays[f"{layer}.{part}.order"].astype(int), arrays[f"{layer}.{part}.loss"])
        for layer, part, _ in keys
    }


def plan_kl(run: Run, texts: Texts, s: Settings, made: Plan) -> float:
    """Measure the KL divergence of a plan that is really reconstructed.

    Args:
        run: the run directory.
        texts: of the run.
        s: settings of the run.
        made: the plan.
    Returns:
        KL divergence to the original in nats per token.
    Raises:
        Refused: the plan is of another model, or the memory does not suffice.
        PareError: the plan does not suit the model, or trials.json is damaged.
    """
    calibration, held = texts.calibration, held_rows(texts)
    known = Known(run, calibration.digest(), held.digest(), "reconstructed")
    key = known.key(made.model_dump(include={"criterion", "bits", "group_size", "layers"}))
    if key not in known:
        with scratch(run.path, "finalist") as place:
            known.add({key: reconstructed_kl(run.model, made, calibration, held, place, s.memory_cap)})
    return known[key]
