"""The steps that measure: how well the models of a run predict, and how fast they are."""

from __future__ import annotations

from pathlib import Path

from .. import lm
from ..base import console
from ..base.optional import attempt
from ..evaluation.bench import bench
from ..evaluation.evaluate import evaluate
from ..evaluation.metrics import Metrics
from ..evaluation.resident import not_resident
from ..model.checkpoint import Checkpoint
from ..options.settings import Settings
from ..pruning.layout import size_of
from ..store.rundir import Run
from ..store.schema import dump_json
from ..text.splits import Texts


def evaluate_step(run: Run, name: str, model: Path, texts: Texts, s: Settings) -> Metrics:
    """Measure one contender against the original, on the test rows that all contenders share.

    Args:
        run: the run directory.
        name: of the contender; "original" has no teacher.
        model: its model directory.
        texts: of the run.
        s: settings of the run.
    Returns:
        The metrics.
    Raises:
        Refused: the model or the text changed since the step was done, the tokenizers differ, or the memory does not
            suffice.
        UsageError: the text is too short.
        PareError: the model answers NaN.
    """
    teacher = None if name == "original" else run.model
    run.step(
        f"evaluate-{name}",
        {"length": texts.test.length},
        {"model": Checkpoint(model).identity(), "original": run.manifest.source, "data": texts.test.digest()},
        lambda directory: measured(directory, model, texts, teacher, s, run.kept),
    )
    return Metrics.load(run.output(f"evaluate-{name}", "metrics.json"))


def measured(
    directory: Path, model: Path, texts: Texts, teacher: Path | None, s: Settings, kept: Path | None = None
) -> None:
    """Measure a contender on the test rows, and write metrics.json and size.json.

    Args:
        directory: where to write.
        model: model directory of the contender.
        texts: of the run.
        teacher: the original; None: without KL divergence.
        s: settings of the run.
        kept: directory for hidden states of the teacher (without one: of the model), for the next call; None: nowhere.
    Raises:
        PareError: as ``evaluate_step``.
    """
    found = evaluate(model, texts.test, texts.tokenizer, teacher, texts.name("test"), s.memory_cap, kept)
    (directory / "metrics.json").write_bytes(dump_json(found))
    checkpoint = Checkpoint(model)
    (directory / "size.json").write_bytes(
        dump_json({"bytes": checkpoint.nbytes(), "parameters": size_of(checkpoint, None, None).parameters})
    )


def bench_step(run: Run, model: Path, s: Settings) -> None:
    """Measure the speed of the original and the result in turn. If the memory does not hold them, or the benchmark
    fails, a warning says so.

    Args:
        run: the run directory.
        model: model directory of the result.
        s: settings of the run.
    Raises:
        Refused: the model or the number of trials changed since the step was done.
    """
    if too_large := not_resident(run.model, s.memory_cap):
        console.warn(f"speed was not measured: {too_large}")
        return

    def work(directory: Path) -> None:
        prompt, new = (64, 32) if lm.cpu_backend() else (512, 128)
        found, failed = attempt(lambda: bench([run.model, model], s.trials, prompt, new))
        if failed:
            raise _Unmeasured(failed.problem)
        (directory / "bench.json").write_bytes(dump_json(found))

    inputs = {"model": Checkpoint(model).identity(), "original": run.manifest.source}
    try:
        run.step("bench", {"trials": s.trials}, inputs, work)
    except _Unmeasured as error:
        console.warn(f"speed was not measured: {error}")


class _Unmeasured(Exception):
    """The bench failed: the step counts as not done, and the run continues."""
