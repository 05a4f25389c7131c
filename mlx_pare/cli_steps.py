"""The commands that do one step of a run directory; `run` does them all."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer

from . import console, show
from .options import (
    Accumulate,
    Axes,
    Batch,
    Bits,
    Cap,
    ChooseBits,
    Clip,
    Context,
    Criterion,
    CrossEntropy,
    Data,
    DryRun,
    Field,
    For,
    GradCheckpoint,
    GroupSize,
    Keep,
    LayersBy,
    Length,
    LocalSteps,
    Loss,
    Match,
    Method,
    MinSpeed,
    Mix,
    Model,
    NoProtect,
    NoReconstruct,
    OnPolicy,
    Patience,
    Rank,
    Rate,
    RunDir,
    Runtimes,
    Samples,
    Schedule,
    Seed,
    Step,
    Steps,
    TargetParams,
    Targets,
    TargetSize,
    TeacherModel,
    Temperature,
    TestData,
    TrainRows,
    Tries,
    Widths,
    command,
    memory,
    settings_of,
)


@command(
    "import",
    "mlx-pare import model.gguf -o DIR | mlx-pare import model-00001-of-00003.gguf -o DIR --dense",
)
def import_command(
    file: Annotated[
        Path,
        typer.Argument(
            help="A GGUF file, or any part of one in several, or the folder of one, or one on the hub: "
            "org/name/file.gguf, org/name:Q4_K_M.",
            metavar="FILE",
        ),
    ],
    out: Annotated[Path, typer.Option("-o", "--out", help="Model directory to write.")],
    dense: Annotated[bool, typer.Option("--dense", help="Quantized tensors become float16.")] = False,
) -> dict[str, Any]:
    """Rebuild a GGUF file as an MLX model directory. The other commands do it by themselves, into a cache."""
    from .gguf_model import rebuild
    from .opened import gguf_of, told

    found = rebuild(gguf_of(file) or file, out, dense)
    told(found)
    console.say(f"model: {out} ({found['model_type']}, {console.gb(found['bytes'])})")
    return found


@command(
    "adapters",
    "mlx-pare adapters ADAPTER --parent MODEL --model RUN/prune/model -o OUT",
)
def adapters_command(
    adapter: Annotated[Path, typer.Argument(help="A LoRA adapter directory of mlx-lm.", metavar="ADAPTER")],
    parent: Annotated[Path, typer.Option(help="The model that the adapter is for.")],
    model: Annotated[Path, typer.Option(help="The model that was cut from it.")],
    out: Annotated[Path, typer.Option("-o", "--out", help="The adapter directory to write.")],
) -> dict[str, Any]:
    """Carry a LoRA adapter of the original over to the model that was cut from it: what is left of it there."""
    from .adapters import carry

    found = carry(adapter, parent, model, out)
    gone = f", {len(found['left_out'])} tensors of layers that are gone left out" if found["left_out"] else ""
    console.say(f"{out}: {found['tensors']} tensors in {len(found['layers'])} layers{gone}")
    console.say(f"mlx_lm.generate --model {model} --adapter-path {out}")
    return found


@command("calibrate", "mlx-pare calibrate MODEL --data notes/ --out RUN --samples 128 --length 512")
def calibrate_command(
    model: Model,
    out: Annotated[Path, typer.Option(help="Run directory, new or to be continued.")],
    criterion: Criterion = "obs",
    data: Data = None,
    test_data: TestData = None,
    field: Field = None,
    samples: Samples = 128,
    length: Length = 512,
    memory_cap: Cap = None,
    seed: Seed = 0,
) -> dict[str, Any]:
    """Stream calibration text through the blocks: statistics of every unit. Resumes after the last finished block.

    The criterion only decides whether more is measured: taylor and taylor2 need gradients, iterative contributions.
    """
    from . import recipes, steps
    from .checkpoint import Checkpoint

    steps.criterion(criterion)  # a wrong name must not leave a run directory behind
    s = settings_of(
        data=data, test_data=test_data, samples=samples, length=length, memory_cap=memory_cap, seed=seed,
        criterion=criterion, field=field,
    )  # fmt: skip
    s = recipes.dated(out, s)
    Checkpoint(model)
    texts = steps.Texts(model, s)
    _ = texts.calibration  # nor may a wrong text: the recipe of a run is kept
    with steps.open_run(model, out) as run:
        if "calibrate" not in run.manifest.steps:
            run.write_recipe(recipes.recipe_of(model, s), replace=False)
        stats = steps.calibrate_step(run, texts, s)
        recipes.write(run, model, s)  # the same text may lie elsewhere now
    console.say(f"statistics: {stats}")
    return {"stats": str(stats)}


@command("score", "mlx-pare score RUN --criterion wanda")
def score_command(run: RunDir, criterion: Criterion = "obs", seed: Seed = 0) -> dict[str, Any]:
    """Turn statistics into the importance of every channel, head and layer."""
    from . import steps

    with steps.continue_run(run) as opened:
        scores = steps.score_step(opened, settings_of(criterion=criterion, seed=seed))
    console.say(f"scores: {scores}")
    return {"scores": str(scores)}


@command(
    "plan",
    "mlx-pare plan RUN --keep 0.75 --dry-run | mlx-pare plan RUN --for m4-24gb --context 8192 --axes ffn,kv_head,layer",
)
def plan_command(
    run: RunDir,
    keep: Keep = None,
    target_params: TargetParams = None,
    target_size: TargetSize = None,
    mac: For = None,
    context: Context = 8192,
    min_speed: MinSpeed = None,
    axes: Axes = "ffn,kv_head",
    bits: Bits = None,
    group_size: GroupSize = 64,
    step: Step = None,
    no_protect: NoProtect = False,
    widths: Widths = "uniform",
    runtimes: Runtimes = "mlx",
    layers_by: LayersBy = None,
    tries: Tries = None,
    choose_bits: ChooseBits = None,
    memory_cap: Cap = None,
    dry_run: DryRun = False,
) -> dict[str, Any]:
    """Choose what to keep for a target; plan.json may be edited before `prune`."""
    from . import pipeline, planning, recipes, steps
    from .arch import cut
    from .checkpoint import Checkpoint
    from .gguf_target import runtimes_of
    from .layout import size_of

    s = settings_of(
        keep=keep, target_params=target_params, target_size=target_size, mac=mac, context=context, axes=axes, bits=bits,
        min_speed=min_speed, group_size=group_size, step=step, protect=not no_protect, widths=widths, runtimes=runtimes,
        layers_by=layers_by, tries=tries, choose_bits=choose_bits, memory_cap=memory_cap,
    )  # fmt: skip
    with steps.continue_run(run) as opened:
        if dry_run:
            return show.show_shape(pipeline.shape_of(opened.model, planning.with_possible_axes(opened.model, s)))
        s = planning.settled(opened.model, replace(s, **recipes.of_calibration(opened), memory_cap=s.memory_cap))
        path = planning.plan_step(opened, recipes.texts_of(opened, s), s)
        plan, checkpoint = steps.plan_of(opened), Checkpoint(opened.model)
    kept = plan.keep(checkpoint.arch)
    found = runtimes_of(cut(checkpoint.arch, kept))
    sizes = {"before": size_of(checkpoint, None, None), "after": size_of(checkpoint, kept, plan.packing)}
    console.say(f"plan: {path}")
    console.say(show.runtimes(found))
    return {
        "plan": str(path),
        "runtimes": found,
        **show.show_shape(
            {name: size.model_dump() for name, size in sizes.items()}
            | {"neighbours": plan.neighbours, "asked": plan.target.asked}
        ),
    }


@command(
    "stability",
    "mlx-pare stability RUN | mlx-pare stability RUN --criterion wanda,flap --against FLOAT_MODEL | "
    "mlx-pare stability RUN --measure",
)
def stability_command(
    run: RunDir,
    criterion: Annotated[
        str | None, typer.Option(help="Of which criteria; separated by commas. Default: the run's.")
    ] = None,
    draws: Annotated[int, typer.Option(min=0, help="Calibration draws to compare; 0: none.")] = 3,
    against: Annotated[
        Path | None, typer.Option(help="The model before it was quantized: does it choose the same?", metavar="MODEL")
    ] = None,
    measure: Annotated[
        bool, typer.Option("--measure", help="Also make the cut of every draw, and measure it on the test text.")
    ] = False,
    no_reconstruct: NoReconstruct = False,
    memory_cap: Cap = None,
) -> dict[str, Any]:
    """How far the choice depends on the calibration text: enough tokens? other draws? quantized as float?

    For the sizes of the run's plan, on parts of its calibration text that share no row; test text is only measured on.
    """
    from . import recipes, stability, step_files, steps
    from .artifacts import Arrays

    with steps.continue_run(run) as opened:
        s = settings_of(**recipes.of_calibration(opened), memory_cap=memory_cap, reconstruct=not no_reconstruct)
        own = Arrays.described(opened.output("score", "scores.safetensors"), "scores")["criterion"]
        names = [name.strip() for name in (criterion or own).split(",") if name.strip()]
        texts = recipes.texts_of(opened, s)
        path = stability.stability_step(opened, texts, s, names, draws, against, measure)
    found = step_files.read(path)
    show.show_stability(found)
    return found


@command("reconstruct", "mlx-pare reconstruct RUN")
def reconstruct_command(run: RunDir, memory_cap: Cap = None) -> dict[str, Any]:
    """Solve the matrices behind the cut anew, so that they make up for it; `prune` then takes them.

    Streams the calibration text of the run once more. With criterion obs it also chooses the units.
    """
    from . import recipes, steps

    with steps.continue_run(run) as opened:
        s = settings_of(**recipes.of_calibration(opened), memory_cap=memory_cap)
        repair = steps.reconstruct_step(opened, recipes.texts_of(opened, s), s)
    console.say(f"repair: {repair}")
    return {"repair": None if repair is None else str(repair)}


@command("prune", "mlx-pare prune RUN | mlx-pare prune RUN --no-reconstruct")
def prune_command(run: RunDir, no_reconstruct: NoReconstruct = False, memory_cap: Cap = None) -> dict[str, Any]:
    """Cut the model by the run's plan into RUN/prune/model; the source is never modified.

    Takes the matrices that `reconstruct` made of the same plan, if it did. Where the memory holds both models as a
    whole, they are made to write some text.
    """
    from . import steps

    with steps.continue_run(run) as opened:
        model = steps.prune_step(opened, not no_reconstruct, memory_cap=memory(memory_cap))
    console.say(f"model: {model}")
    return {"model": str(model)}


@command(
    "recover",
    "mlx-pare recover RUN --recover-steps 200 --method full --data notes/ | mlx-pare recover RUN --local-steps 200 "
    "--recover-steps 300 --targets 64 --grad-checkpoint | mlx.launch -n 2 -- mlx-pare recover RUN",
)
def recover_command(
    run: RunDir,
    recover_steps: Steps = 100,
    train_rows: TrainRows = 512,
    method: Method = "lora",
    learning_rate: Rate = None,
    local_steps: LocalSteps = 0,
    targets: Targets = "full",
    patience: Patience = 0,
    batch: Batch = 4,
    accumulate: Accumulate = 1,
    schedule: Schedule = "cosine",
    clip: Clip = 1.0,
    rank: Rank = 16,
    loss: Loss = None,
    temperature: Temperature = 1.0,
    cross_entropy: CrossEntropy = 0.0,
    match: Match = "auto",
    grad_checkpoint: GradCheckpoint = False,
    mix: Mix = False,
    on_policy: OnPolicy = 0.0,
    teacher: TeacherModel = None,
    data: Data = None,
    test_data: TestData = None,
    field: Field = None,
    memory_cap: Cap = None,
    seed: Seed = 0,
) -> dict[str, Any]:
    """Heal the pruned model by distilling the original into it: RUN/recover/model, never worse than before.

    Trains on the text of the run's calibration, in rows of the same length, unless --data names another. Killed, the
    same command continues. Under mlx.launch the processes share the rows of every batch.
    """
    from . import ranks, recipes, steps, text_record

    first = ranks.this()[0] == 0
    if not first:
        console.configure(quiet=True)
    with steps.continue_run(run, locked=first) as opened:
        before = opened.recipe()
        s = settings_of(
            recover_steps=recover_steps, train_rows=train_rows, method=method, learning_rate=learning_rate,
            local_steps=local_steps, targets=targets, patience=patience, batch=batch, accumulate=accumulate,
            schedule=schedule, clip=clip,
            rank=rank, kind=loss, temperature=temperature, cross_entropy=cross_entropy, match=match,
            grad_checkpoint=grad_checkpoint, mix=mix, on_policy=on_policy, teacher=teacher and str(teacher),
            data=data or before.get("data"), test_data=test_data or before.get("test_data"),
            length=before.get("length", 512), memory_cap=memory_cap, seed=seed,
            field=field or (None if data else before.get("field")), date=before.get("date"),
        )  # fmt: skip
        begun = recipes.texts_of(opened)
        text_record.check(opened, begun)
        texts = begun.asking(s)
        if data or test_data or field:
            texts = steps.Texts(opened.model, s)
            texts.apart_from(begun)
        model = steps.recover_step(opened, texts, s)
    console.say(f"model: {model}")
    return {"model": str(model)}


@command("report", "mlx-pare report RUN")
def report_command(run: RunDir) -> dict[str, Any]:
    """Write RUN/report.md from what the run directory holds."""
    from .report import report
    from .rundir import Run

    with Run(run) as opened:
        path = report(opened.path)
    console.say(f"report: {path}")
    return {"report": str(path)}


@command("status", "mlx-pare status RUN | mlx-pare status RUN --json")
def status_command(run: RunDir) -> dict[str, Any]:
    """How far a run is: steps done, the one at work and its progress, what comes next, the last error. Reads only."""
    from .status import status

    found = status(run)
    show.show_status(found)
    return found
