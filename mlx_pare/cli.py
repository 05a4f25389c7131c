"""The command line: parse, call one verb or the pipeline, show the result. Heavy imports happen inside the commands.

The single steps of a run are in cli_steps.py, the options they share and the handling of errors in options.py.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated, Any

import click
import typer

from . import console, interrupts, show
from .errors import told
from .options import (
    Accumulate,
    AnyModel,
    Axes,
    Batch,
    Bits,
    Cap,
    ChooseBits,
    Context,
    Criterion,
    Data,
    DryRun,
    Field,
    For,
    Gguf,
    GradCheckpoint,
    GroupSize,
    Keep,
    LayersBy,
    Length,
    LocalSteps,
    Method,
    MinSpeed,
    Model,
    NoProtect,
    NoReconstruct,
    Patience,
    Rate,
    Runtimes,
    Samples,
    Seed,
    Stages,
    Step,
    Steps,
    TargetParams,
    Targets,
    TargetSize,
    TestData,
    TrainRows,
    Tries,
    Widths,
    app,
    command,
    memory,
    settings_of,
)

INTERRUPTED = 130  # what typer returns for Ctrl-C before a command has begun

# ---- everyday ----


@command(
    "fit",
    "mlx-pare fit qwen3-32b --mac m4-24gb | mlx-pare fit MODEL --context 32768 --kv-bits 8 | mlx-pare fit model.gguf "
    "--memory 16GB --plot fit.svg | mlx-pare fit Qwen/Qwen3-14B --bits 4 --train lora",
    network=True,
)
def fit_command(
    model: AnyModel,
    mac: Annotated[list[str] | None, typer.Option(help="Only this Mac, e.g. m4-24gb; may be repeated.")] = None,
    memory_size: Annotated[
        list[str] | None, typer.Option("--memory", help="A Mac of which only the memory is known, e.g. 24GB.")
    ] = None,
    context: Annotated[
        int | None, typer.Option(help="Tokens of prompt and answer. Default: 8192; in training 2048 per row.")
    ] = None,
    batch: Annotated[int | None, typer.Option(help="Sequences at once. Default: 1; in training 4.")] = None,
    bits: Annotated[
        str | None,
        typer.Option(help="As MLX would pack it: 2, 3, 4, 5, 6, 8, mxfp4, mxfp8 or nvfp4. Default: as it is."),
    ] = None,
    group_size: GroupSize = 64,
    gguf: Annotated[str | None, typer.Option(help="As a GGUF file of this type would hold it, e.g. q4_k_m.")] = None,
    kv_bits: Annotated[
        int | None, typer.Option(help="KV cache of 8, 4, 3 or 2 bits, in llama.cpp 8, 5 or 4. Default: floats.")
    ] = None,
    prefill_step: Annotated[int, typer.Option(help="Tokens of a prompt read at a time, by mlx-lm.")] = 2048,
    runtime: Annotated[
        str | None, typer.Option(help="mlx or llama.cpp. Default: llama.cpp for GGUF, else mlx.")
    ] = None,
    train: Annotated[str | None, typer.Option(help="Memory for training instead: lora or full.")] = None,
    macos: Annotated[
        int, typer.Option(min=11, help="macOS version, which sets the GPU's share of memory: 15 or 26.")
    ] = 26,
    limit: Annotated[
        str | None, typer.Option(help='GPU memory as iogpu.wired_limit_mb sets it: "20480" or "20GB".')
    ] = None,
    reserve: Annotated[str | None, typer.Option(help='Memory to keep free for other programs, e.g. "3GB".')] = None,
    plot: Annotated[Path | None, typer.Option(help="Draw it: a new FILE.svg or FILE.png.", metavar="FILE")] = None,
) -> dict[str, Any]:
    """Every Mac: does a model fit, how long a context, how fast, and what would make it fit. Loads nothing."""
    from .fit import fit
    from .fit.macs import Budget, gib
    from .fit.memory import TRAIN_BATCH, TRAIN_LENGTH, Use
    from .fit.plot import draw, preflight
    from .fit.subject import Form

    if plot:
        preflight(plot)
    form = Form.named(bits, group_size, gguf)
    use = Use(
        context=context if context is not None else TRAIN_LENGTH if train else 8192,
        batch=batch if batch is not None else TRAIN_BATCH if train else 1,
        kv_bits=kv_bits, prefill_step=prefill_step, runtime=runtime, train=train,
    )  # fmt: skip
    megabytes = "MiB" if limit and limit.isdecimal() else ""  # as sysctl takes them
    budget = Budget(macos, memory(limit and limit + megabytes), memory(reserve) or 0)
    found = fit(model, [*(mac or []), *(f"{gib(size):g}gb" for size in memory_size or [])], use, form, budget)
    show.show_fit(found)
    if plot:
        found["plot"] = str(draw(found, plot))
        console.say(f"drawn: {plot}")
    return found


@command(
    "run",
    "mlx-pare run MODEL --out RUN --keep 0.75 | mlx-pare run MODEL --out RUN --for m4-24gb --context 8192 "
    "--data notes/ | mlx-pare run MODEL --out RUN --schedule 0.8,0.65,0.5 --recover-steps 300",
)
def run_command(
    model: Model,
    out: Annotated[Path, typer.Option(help="Run directory, new or to be continued.")],
    keep: Keep = None,
    schedule: Stages = None,
    target_params: TargetParams = None,
    target_size: TargetSize = None,
    mac: For = None,
    context: Context = 8192,
    min_speed: MinSpeed = None,
    axes: Axes = "ffn,kv_head",
    criterion: Criterion = "obs",
    no_reconstruct: NoReconstruct = False,
    data: Data = None,
    test_data: TestData = None,
    field: Field = None,
    samples: Samples = 128,
    length: Length = 512,
    bits: Bits = None,
    group_size: GroupSize = 64,
    step: Step = None,
    no_protect: NoProtect = False,
    widths: Widths = "uniform",
    runtimes: Runtimes = "mlx",
    layers_by: LayersBy = None,
    tries: Tries = None,
    choose_bits: ChooseBits = None,
    recover_steps: Steps = 100,
    train_rows: TrainRows = 512,
    method: Method = "lora",
    learning_rate: Rate = None,
    local_steps: LocalSteps = 0,
    targets: Targets = "full",
    patience: Patience = 0,
    batch: Batch = 4,
    accumulate: Accumulate = 1,
    grad_checkpoint: GradCheckpoint = False,
    gguf: Gguf = None,
    trials: Annotated[int, typer.Option(min=0, help="Rounds of the speed measurement; 0: none.")] = 5,
    min_quality: Annotated[
        float | None, typer.Option(help="Fail when perplexity exceeds this times the original's.")
    ] = None,
    memory_cap: Cap = None,
    seed: Seed = 0,
    dry_run: DryRun = False,
) -> dict[str, Any]:
    """All of it: calibrate, score, plan, reconstruct, prune, recover, evaluate, export, bench, report. Resumable."""
    settings = settings_of(
        keep=keep, stages=schedule, target_params=target_params, target_size=target_size, mac=mac, context=context,
        min_speed=min_speed, axes=axes, criterion=criterion, reconstruct=not no_reconstruct, data=data,
        test_data=test_data, field=field, samples=samples, length=length, bits=bits, group_size=group_size, step=step,
        protect=not no_protect, widths=widths, runtimes=runtimes, layers_by=layers_by, tries=tries,
        choose_bits=choose_bits,
        recover_steps=recover_steps, train_rows=train_rows, method=method, learning_rate=learning_rate,
        local_steps=local_steps,
        targets=targets, patience=patience, batch=batch, accumulate=accumulate, grad_checkpoint=grad_checkpoint,
        gguf=gguf, trials=trials, min_quality=min_quality, memory_cap=memory_cap, seed=seed,
    )  # fmt: skip
    return _run(model, out, settings, dry_run)


def _run(model: Path, out: Path, settings: Any, dry_run: bool = False) -> dict[str, Any]:
    from . import pipeline

    if dry_run:
        return show.show_shape(pipeline.dry_run(model, settings))
    summary = pipeline.run(model, out, settings)
    show.show_summary(summary)
    return summary


@command(
    "evaluate",
    "mlx-pare evaluate MODEL --data book.txt --length 256 | mlx-pare evaluate PRUNED --data book.txt --teacher MODEL",
)
def evaluate_command(
    model: Model,
    data: Annotated[str, typer.Option(help="Text: .txt, .md, .jsonl or a folder.", metavar="PATH")],
    teacher: Annotated[Path | None, typer.Option(help="Model to compare with: KL divergence and agreement.")] = None,
    samples: Annotated[int | None, typer.Option(min=1, help="Windows. Default: all.")] = None,
    length: Length = 512,
    field: Field = None,
    memory_cap: Cap = None,
) -> dict[str, Any]:
    """Perplexity with its standard error, bits per byte; against a teacher KL divergence and agreement."""
    from . import corpus, lm
    from .evaluate import evaluate
    from .hub_name import called

    tokenizer = lm.tokenizer(model)
    rows = corpus.windows(tokenizer, corpus.read(Path(data), tokenizer, field), length, samples)
    found = evaluate(model, rows, tokenizer, teacher, data, memory(memory_cap)).model_dump()
    console.table(
        called(model),
        ["<metric", "value"],
        [
            [k, f"{v:.5g}" if isinstance(v, float) else v]
            for k, v in found.items()
            if k not in ("schema_version", "model") and v is not None
        ],
    )
    return found


from . import cli_export  # noqa: E402, F401 in its place in the help


@command("bench", "mlx-pare bench MODEL RUN/prune/model --trials 5")
def bench_command(
    models: Annotated[
        list[Path], typer.Argument(help="Model directories; the first is the reference.", metavar="MODEL...")
    ],
    trials: Annotated[int, typer.Option(min=1, help="Rounds that count.")] = 5,
    prompt: Annotated[int, typer.Option(min=1, help="Tokens of the prompt.")] = 512,
    new: Annotated[int, typer.Option(min=2, help="Tokens to generate.")] = 128,
) -> dict[str, Any]:
    """Prefill and decode tok/s through stock mlx-lm, models in turn; median, spread, ratios."""
    from .bench import bench

    found = bench(models, trials, prompt, new)
    rows = []
    for m in found["models"]:
        cells = [
            f"{m[n]['median']:.1f} ({m[n]['min']:.1f}-{m[n]['max']:.1f})"
            for n in ("prefill_tokens_per_s", "decode_tokens_per_s")
        ]
        ratios = [f"{m['ratio'][n]['median']:.2f}" for n in ("prefill_tokens_per_s", "decode_tokens_per_s")]
        rows.append([m["model"], cells[0], ratios[0], cells[1], ratios[1], console.gb(m["peak_bytes"]["median"])])
    console.table(
        f"{trials} trials, {found['backend']}",
        ["<model", "prefill tok/s", "ratio", "decode tok/s", "ratio", "peak"],
        rows,
    )
    return found


# ---- looking around ----

from . import cli_models  # noqa: E402, F401


@command("inspect", "mlx-pare inspect MODEL --json | mlx-pare inspect qwen3-30b-a3b", network=True)
def inspect_command(model: AnyModel) -> dict[str, Any]:
    """What is in a model, what can be cut, which runtimes load it. Reads headers only."""
    from .inspect import inspect

    found = inspect(model)
    parts = found.pop("parameters", {})
    told = {k: v for k, v in found.items() if k not in ("model", "bytes", "notes") and v is not None}
    rows = [[k.replace("_", " "), show.plain(v)] for k, v in told.items()]
    rows += [[f"parameters: {k.replace('_', ' ')}", f"{v:,}"] for k, v in parts.items()]
    rows.append(["weights", console.gb(found["bytes"]["total"])])
    console.table(model, ["<", "<value"], rows)
    for line in found["notes"]:
        console.say(f"note: {line}")
    return {**found, "parameters": parts}


@command("demo", "mlx-pare demo --out demo-run")
def demo_command(
    out: Annotated[Path, typer.Option(help="Run directory, new or to be continued.")] = Path("demo-run"),
) -> dict[str, Any]:
    """The whole job on the small real model that comes with mlx-pare, in a few minutes."""
    from .texts import DEMO

    return _run(DEMO / "model", out, settings_of(keep=0.75, length=256, recover_steps=60, context=512))


@command("doctor", "mlx-pare doctor")
def doctor_command() -> dict[str, Any]:
    """This computer and what is installed on it."""
    from .machine import available_bytes, this_machine, versions

    machine = this_machine()
    found = {"machine": machine.as_dict(), "available_bytes": available_bytes(), "versions": versions()}
    rows = [
        ["system", machine.system],
        ["chip", machine.chip or "unknown (not a Mac)"],
        ["memory", console.gb(machine.memory_bytes)],
    ]
    rows += [["GPU cores", machine.gpu_cores or "unknown"], ["free now", console.gb(found["available_bytes"])]]
    rows += [[name, found_version] for name, found_version in found["versions"].items()]
    console.table("mlx-pare doctor", ["<", "<value"], rows)
    if machine.rosetta:
        console.warn("this Python runs under Rosetta: install an arm64 Python, MLX needs it")
    return found


from . import cli_steps  # noqa: E402, F401 its commands come after the everyday ones in the help


def main() -> None:
    """Entry point of the command line."""
    interrupts.listen()
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    try:
        code = _called()
    except (click.Abort, BrokenPipeError):
        code = 1
    except OSError as error:  # the help could not be written
        console.silence(sys.stdout)
        console.error(told(error)[0])
        code = 1
    sys.exit(code)


def _called() -> int:
    """Run the command that was typed; a mistyped one is one line as well (and the document of --json). Exit code."""
    try:
        code = app(standalone_mode=False) or 0
        if code != INTERRUPTED:
            return code
        console.error("interrupted before anything was done")
        return 1
    except click.ClickException as error:
        if len(sys.argv) == 1:  # nothing was asked: the help
            error.show()
            return error.exit_code
        where = f". See `{error.ctx.command_path} --help`." if getattr(error, "ctx", None) else ""
        line = " ".join(error.format_message().split()).rstrip(".") + where
        console.configure(as_json="--json" in sys.argv)
        console.failure(line, error.exit_code)
        return error.exit_code
