"""fit: how many bytes does a Mac allow, does a model fit into them, and what would make it fit?"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from os import PathLike
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .form import Form
    from .macs import Budget, Mac
    from .memory import Use
    from .subject import Subject

NOTE = (
    "weights, KV cache and states are counted; work memory, budgets and tok/s are estimates "
    "(capacity/memory.py, macs.py, speed.py say on what grounds); ? marks what could not be verified"
)


def fit(
    model: str | PathLike[str],
    macs: str | Sequence[str] = (),
    use: Use | None = None,
    form: Form | None = None,
    budget: Budget | None = None,
) -> dict[str, Any]:
    """Assess a model on Macs, and find what makes it fit on those that were asked about and are too small.

    Args:
        model: a directory, a config.json, a GGUF file, a run directory or plan.json, a hub id, or a name of the
            catalogue.
        macs: names such as "m4-24gb", or "24gb" if only the memory is known; none: this Mac first, then all.
        use: context, batch, runtime and training; None: the defaults of Use.
        form: how the weights are stored; None: as they are.
        budget: how the GPU's share of memory is set; None: the defaults of Budget.
    Returns:
        model, origin, form, parameters, context, batch, runtime, train, macos, weights_bytes, here, rows (one per Mac:
        planner.assess), file_bytes (of the GGUF file that `export` would write, None if unknown), alternatives (Mac ->
        advice.Change.as_dict), curve (planner.curve on the first Mac), notes, note. For an unknown model type the rows
        hold only the weights. What cannot be known is None.
    Raises:
        UsageError: there is no such Mac or model, or the arguments do not go together.
        PareError: the model cannot be read.
    """
    from ..base.errors import UsageError
    from ..model import footprint
    from . import macs as table
    from .form import Form
    from .memory import Use
    from .subject import open_subject

    budget, use = budget or table.Budget(), use or Use()
    named, here = [table.find(name) for name in ([macs] if isinstance(macs, str) else macs)], table.here()
    subject = open_subject(str(model), form or Form())
    if use.train == "full" and subject.packing:
        raise UsageError(
            f"{subject.described}: packed weights cannot be trained in full", "add --bits 16, or use --train lora"
        )
    use = replace(use, runtime=use.runtime or ("llama.cpp" if subject.llama else "mlx"))
    asked = named or ([here] if here else [])
    about = {
        "model": subject.name,
        "origin": subject.origin,
        "form": subject.described,
        "parameters": footprint.parameters(subject.arch) if subject.arch else None,
        "context": use.context,
        "batch": use.batch,
        "runtime": use.runtime,
        "train": use.train,
        "macos": budget.macos,
        "weights_bytes": subject.weights.nbytes,
        "file_bytes": _file(subject),
        "here": _here(here, budget),
    }
    answer = _answer(subject, use, budget, asked if named else [*asked, *table.every()], asked)
    return about | answer | {"notes": list(subject.notes), "note": NOTE}


def _file(subject: Subject) -> int | None:
    """Return the bytes of the GGUF file that would be written of a model directory; None if there is none.

    The vocabulary is in that file too, and for other models it is not at hand.
    """
    kind = subject.form.gguf
    if kind is None or subject.checkpoint is None:
        return None
    from ..base.errors import PareError
    from ..gguf.architectures import FILE_TYPES
    from ..gguf.write import size as gguf_size

    try:
        return gguf_size.measured(subject.checkpoint, kind).nbytes if kind in FILE_TYPES else None
    except PareError:  # llama.cpp would not run it, or not read its tokenizer: `export` says why
        return None


def _answer(subject: Subject, use: Use, budget: Budget, chosen: Sequence[Mac], asked: Sequence[Mac]) -> dict[str, Any]:
    """Return rows for the chosen Macs, alternatives for those asked about that are too small, and the first's curve."""
    from . import planner
    from .advice import Case, changes
    from .memory import Needs

    if subject.arch is None:
        rows = [planner.weights_only(subject.weights, mac, budget) for mac in chosen]
        return {"rows": rows, "alternatives": {}, "curve": []}
    needs = Needs(subject.arch, use, subject.value_bytes)
    rows = planner.fit(needs, subject.weights, chosen, budget)
    over = [mac for mac, row in zip(chosen, rows, strict=True) if mac in asked and not row["fits"]]
    cures = {mac.name: [c.as_dict() for c in changes(Case(subject, needs, mac, budget))] for mac in over}
    return {"rows": rows, "alternatives": cures, "curve": planner.curve(needs, subject.weights, chosen[0])}


def _here(mac: Mac | None, budget: Budget) -> dict[str, Any] | None:
    """Return facts of the Mac this runs on, read from it and not from the table; None elsewhere."""
    if mac is None:
        return None
    from ..base.machine import available_bytes

    return {
        "mac": mac.name,
        "macos": mac.macos,
        "wired_limit_bytes": mac.wired_limit_bytes,
        "working_set_bytes": mac.working_set_bytes,
        "budget_bytes": budget.of(mac),
        "available_bytes": available_bytes(),
    }
