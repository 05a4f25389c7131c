"""The commands that do one step of a run directory; `run` does them all."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer

from ..base import console
from ..base.errors import shell
from ..base.units import gb
from ..options.settings import CUT, REACH, RECOVERY, TABLE, memory, settings_of
from . import tables
from .app import DryRun, Model, Out, RunDir, command

OF_RUN = ("stages", "min_quality", "gate", "fail_if_not_worth_it")
PLAN = (
    *(f for f, option in TABLE.items() if option.panel in (REACH, CUT) and f not in OF_RUN),
    "widths", "layers_by", "tries", "choose_bits", "memory_cap",
)  # fmt: skip
RECOVER = (
    *(field for field, option in TABLE.items() if option.panel == RECOVERY),
    "data", "test_data", "field", "memory_cap", "seed",
)  # fmt: skip


@command(
    "import",
    "mlx-pare import model.gguf -o DIR | mlx-pare import model-00001-of-00003.gguf -o DIR --dense",
)
def import_command(
    file: Annotated[
        Path,
        typer.Argument(
            help="A GGUF file, any part of a file that was split, the folder of one, or a file on the hub: "
            "org/name/file.gguf, org/name:Q4_K_M.",
            metavar="FILE",
        ),
    ],
    out: Annotated[Path, typer.Option("-o", "--out", help="Model directory to write.", metavar="DIR")],
    dense: Annotated[bool, typer.Option("--dense", help="Write quantized tensors as float16.")] = False,
) -> dict[str, Any]:
    """Convert a GGUF file to an MLX model directory.

    Other commands that get a GGUF file convert it by themselves, into a cache.
    """
    from ..gguf.read.rebuild import rebuild
    from ..sources.open_model import gguf_of, told

    found = rebuild(gguf_of(file) or file, out, dense)
    told(found)
    console.say(f"model: {out} ({found['model_type']}, {gb(found['bytes'])})")
    return found


@command(
    "adapters",
    "mlx-pare adapters ADAPTER --parent MODEL --model RUN/prune/model -o OUT",
)
def adapters_command(
    adapter: Annotated[Path, typer.Argument(help="A LoRA adapter directory of mlx-lm.", metavar="ADAPTER")],
    parent: Annotated[Path, typer.Option(help="The model that the adapter was trained for.", metavar="MODEL")],
    model: Annotated[Path, typer.Option(help="The model that was cut from it.", metavar="MODEL")],
    out: Annotated[Path, typer.Option("-o", "--out", help="Adapter directory to write.", metavar="DIR")],
) -> dict[str, Any]:
    """Cut a LoRA adapter of the original to fit the pruned model."""
    from ..pruning.adapters import carry

    found = carry(adapter, parent, model, out)
    gone = f", {len(found['left_out'])} tensors of layers that are gone left out" if found["left_out"] else ""
    console.say(f"{out}: {found['tensors']} tensors in {len(found['layers'])} layers{gone}")
    console.say(f"mlx_lm.generate --model {shell(model)} --adapter-path {shell(out)}")
    return found


@command(
    "calibrate",
    "mlx-pare calibrate MODEL --data notes/ --out RUN --samples 128 --length 512",
    options=("criterion", "data", "test_data", "field", "date", "samples", "length", "memory_cap", "seed"),
    recipe=True,
)
def calibrate_command(model: Model, out: Out, **asked: Any) -> dict[str, Any]:
    """Measure every unit of a model on calibration text.

    An interrupted calibration continues after the last finished block. The criterion only decides whether more is
    measured: taylor and taylor2 need gradients, iterative needs contributions.
    """
    from ..model.checkpoint import Checkpoint
    from ..pipeline import recipes, steps

    s = settings_of(**asked)
    steps.criterion(s.criterion)  # a wrong name must not leave a run directory behind
    s = recipes.dated(out, s)
    Checkpoint(model)
    texts = steps.Texts(model, s)
    _ = texts.calibration  # nor may a wrong text, because the recipe of a run is kept
    with steps.open_run(model, out) as run:
        if "calibrate" not in run.manifest.steps:
            run.write_recipe(recipes.recipe_of(model, s), replace=False)
        stats = steps.calibrate_step(run, texts, s)
        recipes.write(run, model, s)  # the same text may lie elsewhere now
    console.say(f"statistics: {stats}")
    return {"stats": str(stats)}


@command("score", "mlx-pare score RUN --criterion wanda", options=("criterion", "seed"), recipe=True)
def score_command(run: RunDir, **asked: Any) -> dict[str, Any]:
    """Rank every channel, head and layer by a criterion."""
    from ..pipeline import steps

    with steps.continue_run(run) as opened:
        scores = steps.score_step(opened, settings_of(**asked))
    console.say(f"scores: {scores}")
    return {"scores": str(scores)}


@command(
    "plan",
    "mlx-pare plan RUN --keep 0.75 --dry-run | mlx-pare plan RUN --for m4-24gb --context 8192 --axes ffn,kv_head,layer",
    options=PLAN,
    first=("keep", "target_size", "mac", "context", "bits", "axes", "dry_run"),
    recipe=True,
)
def plan_command(run: RunDir, dry_run: DryRun = False, **asked: Any) -> dict[str, Any]:
    """Choose what to keep for a target.

    The plan is RUN/plan/plan.json. You may edit it before `prune`.
    """
    from ..arch import cut
    from ..gguf.architectures import runtimes_of
    from ..model.checkpoint import Checkpoint
    from ..pipeline import choose_sizes, recipes, run as pipeline, steps
    from ..pruning.layout import size_of

    s = settings_of(**asked)
    with steps.continue_run(run) as opened:
        if dry_run:
            return tables.show_shape(pipeline.shape_of(opened.model, choose_sizes.with_possible_axes(opened.model, s)))
        s = choose_sizes.settled(opened.model, replace(s, **recipes.of_calibration(opened), memory_cap=s.memory_cap))
        path = choose_sizes.plan_step(opened, recipes.texts_of(opened, s), s)
        plan, checkpoint = steps.plan_of(opened), Checkpoint(opened.model)
    kept = plan.keep(checkpoint.arch)
    found = runtimes_of(cut(checkpoint.arch, kept))
    sizes = {"before": size_of(checkpoint, None, None), "after": size_of(checkpoint, kept, plan.packing)}
    console.say(f"plan: {path}")
    console.say(tables.runtimes(found))
    return {
        "plan": str(path),
        "runtimes": found,
        **tables.show_shape(
            {name: size.model_dump() for name, size in sizes.items()}
            | {"neighbours": plan.neighbours, "asked": plan.target.asked}
        ),
    }


@command(
    "stability",
    "mlx-pare stability RUN | mlx-pare stability RUN --criterion wanda,flap --against FLOAT_MODEL | "
    "mlx-pare stability RUN --measure",
    options=("reconstruct", "memory_cap"),
)
def stability_command(
    run: RunDir,
    criterion: Annotated[
        str | None,
        typer.Option(help="Criteria to judge, separated by commas. Default: that of the run.", metavar="LIST"),
    ] = None,
    draws: Annotated[int, typer.Option(min=0, help="Number of calibration draws to compare; 0 compares none.")] = 3,
    against: Annotated[
        Path | None,
        typer.Option(help="The same model before it was quantized, to compare the choices.", metavar="MODEL"),
    ] = None,
    measure: Annotated[
        bool, typer.Option("--measure", help="Also make the cut of every draw, and measure it on the test text.")
    ] = False,
    *,
    reconstruct: bool,
    memory_cap: str | None,
) -> dict[str, Any]:
    """Show how much the choice depends on the calibration text.

    It answers three questions: would fewer tokens be enough, do other draws of text choose the same units, and does the
    quantized model choose as the float model does. Draws share no rows. The test text is only used to measure.
    """
    from ..pipeline import recipes, stability, steps
    from ..store import step_files
    from ..store.arrays import Arrays

    with steps.continue_run(run) as opened:
        s = settings_of(**recipes.of_calibration(opened), memory_cap=memory_cap, reconstruct=reconstruct)
        own = Arrays.described(opened.output("score", "scores.safetensors"), "scores")["criterion"]
        names = [name.strip() for name in (criterion or own).split(",") if name.strip()]
        texts = recipes.texts_of(opened, s)
        path = stability.stability_step(opened, texts, s, names, draws, against, measure)
    found = step_files.read(path)
    tables.show_stability(found)
    return found


@command("reconstruct", "mlx-pare reconstruct RUN", options=("memory_cap",))
def reconstruct_command(run: RunDir, *, memory_cap: str | None) -> dict[str, Any]:
    """Solve the matrices behind the cut again.

    The new matrices compensate for the cut. This step streams the calibration text of the run once more, and `prune`
    uses the result. With the criterion obs it also chooses the units.
    """
    from ..pipeline import recipes, steps

    with steps.continue_run(run) as opened:
        s = settings_of(**recipes.of_calibration(opened), memory_cap=memory_cap)
        repair = steps.reconstruct_step(opened, recipes.texts_of(opened, s), s)
    console.say(f"repair: {repair}")
    return {"repair": None if repair is None else str(repair)}


@command("prune", "mlx-pare prune RUN | mlx-pare prune RUN --no-reconstruct", options=("reconstruct", "memory_cap"))
def prune_command(run: RunDir, *, reconstruct: bool, memory_cap: str | None) -> dict[str, Any]:
    """Cut the model by the run's plan into RUN/prune/model.

    The original is not changed. If `reconstruct` was done for the same plan, its matrices are used. If the memory holds
    both models, each writes some text as a check.
    """
    from ..pipeline import steps

    with steps.continue_run(run) as opened:
        original = steps.original_of_stage(opened)
        model = steps.prune_step(opened, reconstruct, original, memory(memory_cap))
    console.say(f"model: {model}")
    return {"model": str(model)}


@command(
    "recover",
    "mlx-pare recover RUN --recover-steps 200 --method full --data notes/ | mlx-pare recover RUN --local-steps 200 "
    "--recover-steps 300 --targets 64 --grad-checkpoint | mlx.launch -n 2 -- mlx-pare recover RUN",
    options=RECOVER,
    first=("recover_steps", "method", "learning_rate", "local_steps", "data", "memory_cap", "recipe"),
    recipe=True,
)
def recover_command(run: RunDir, **asked: Any) -> dict[str, Any]:
    """Train the pruned model to predict like the original.

    The result is RUN/recover/model. It is kept only if it is better than the pruned model. It trains on the calibration
    text of the run, unless --data names another. If the training does not fit in memory, mlx-pare saves memory without
    changing what is trained, and says how. After a kill the same command continues. Under mlx.launch, processes share
    every batch.
    """
    from ..lm import distributed
    from ..pipeline import recipes, steps
    from ..sources.open_model import opened as opened_model
    from ..text import provenance

    first = distributed.this()[0] == 0
    if not first:
        console.configure(quiet=True)
    with steps.continue_run(run, locked=first) as opened:
        before, data = opened.recipe(), asked["data"]
        another_text = data or asked["test_data"] or asked["field"]
        if asked["teacher"] is None and (teacher := before.get("teacher")):  # a name on the hub, or a GGUF file
            asked["teacher"] = opened_model(teacher)
        asked["data"] = data or before.get("data")
        asked["test_data"] = asked["test_data"] or before.get("test_data")
        asked["field"] = asked["field"] or (None if data else before.get("field"))
        s = settings_of(**asked, length=before.get("length", 512), date=before.get("date"))
        begun = recipes.texts_of(opened)
        provenance.check(opened, begun)
        texts = begun.asking(s)
        if another_text:
            texts = steps.Texts(opened.model, s)
            texts.apart_from(begun)
        model = steps.recover_step(opened, texts, s)
    console.say(f"model: {model}")
    return {"model": str(model)}


@command("report", "mlx-pare report RUN")
def report_command(run: RunDir) -> dict[str, Any]:
    """Write RUN/report.md from the files of a run."""
    from ..reporting.report import report
    from ..store.rundir import Run

    with Run(run) as opened:
        path = report(opened.path)
    console.say(f"report: {path}")
    return {"report": str(path)}


@command("status", "mlx-pare status RUN | mlx-pare status RUN --json")
def status_command(run: RunDir) -> dict[str, Any]:
    """Show how far a run is.

    It shows the finished steps, the progress, what comes next, and the last error. It changes nothing.
    """
    from ..pipeline.status import status

    found = status(run)
    tables.show_status(found)
    return found
