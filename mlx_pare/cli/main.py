"""The command line: parse, call one verb or the pipeline, show the result. The commands themselves import what is
heavy.

cli/step_commands.py has the single steps of a run, cli/app.py the shared options and the handling of errors.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated, Any

import click
import typer

from ..base import console, machine
from ..base.errors import PareError, told
from ..base.units import gb
from ..options.option import Option
from ..options.settings import OUTPUT, TABLE, memory, settings_of
from ..options.values import whole
from . import evaluate_command, export_command, interrupts, models_command, step_commands, tables
from .app import AnyModel, DryRun, Model, Out, app, command, failed, mac_names

# the others register their commands
__all__ = ["evaluate_command", "export_command", "main", "models_command", "step_commands"]

MACS, STORED, USE = "Macs", "How the model is stored", "How it is used"  # panels of `fit`
INTERRUPTED = 130  # what typer returns for Ctrl-C before a command has begun

# ---- everyday ----


FIT = (
    Option("mac", MACS, "Show only this Mac, e.g. m4-24gb. May be repeated.", metavar="MAC", repeats=True,
           offers=mac_names),
    Option("memory_size", MACS, "Show a Mac with this much memory, e.g. 24GB. May be repeated.", called="memory",
           metavar="SIZE", repeats=True),
    Option("context", USE, "Tokens of prompt and answer. Default: 8192, or 2048 per row with --train.", int),
    Option("batch", USE, "Sequences at once. Default: 1, or 4 with --train.", int),
    Option("bits", STORED,
           "Take the model as packed by MLX: 2, 3, 4, 5, 6, 8, mxfp4, mxfp8 or nvfp4. Default: as it is.",
           metavar="BITS"),
    Option("group_size", STORED, "Group size of that packing: 32, 64 or 128.", int, 64),
    Option("gguf", STORED, "Take the model as a GGUF file of this type, e.g. q4_k_m.", metavar="TYPE"),
    Option("kv_bits", USE,
           "Quantize the KV cache to 8, 4, 3 or 2 bits; in llama.cpp to 8, 5 or 4. Default: floats.", int),
    Option("prefill_step", USE, "Tokens of the prompt that mlx-lm reads at once.", int, 2048),
    Option("runtime", USE, "mlx or llama.cpp. Default: llama.cpp for GGUF, else mlx.", metavar="NAME",
           choices=("mlx", "llama.cpp")),
    Option("train", USE, "Show the memory for training instead: lora or full.", metavar="METHOD",
           choices=("lora", "full")),
    Option("macos", MACS, "macOS version: 15 or 26. It sets the GPU's share of memory.", int, 26, values=whole(11)),
    Option("limit", MACS, 'GPU memory as iogpu.wired_limit_mb sets it: "20480" or "20GB".', metavar="SIZE"),
    Option("reserve", MACS, 'Memory to keep free for other programs, e.g. "3GB".', metavar="SIZE"),
    Option("plot", OUTPUT, "Draw a picture into a new FILE.svg or FILE.png.", Path, metavar="FILE"),
)  # fmt: skip


@command(
    "fit",
    "mlx-pare fit qwen3-32b --mac m4-24gb | mlx-pare fit MODEL --context 32768 --kv-bits 8 | mlx-pare fit model.gguf "
    "--memory 16GB --plot fit.svg | mlx-pare fit Qwen/Qwen3-14B --bits 4 --train lora",
    network=True,
    options=FIT,
    first=("mac", "context", "bits", "gguf", "kv_bits", "train", "plot"),
)
def fit_command(model: AnyModel, **asked: Any) -> dict[str, Any]:
    """Show which Macs a model fits, and what would make it fit.

    For every Mac it shows the memory, the longest context and an estimate of the speed. Only the config and the headers
    of the model are read.
    """
    from ..capacity.fit import fit
    from ..capacity.form import Form
    from ..capacity.macs import Budget, gib
    from ..capacity.memory import TRAIN_BATCH, TRAIN_LENGTH, Use

    train, context, batch, plot = asked["train"], asked["context"], asked["batch"], asked["plot"]
    if plot:  # or the import would slow down every other call
        from ..reporting.fit_plot import draw, preflight

        preflight(plot)
    form = Form.named(asked["bits"], asked["group_size"], asked["gguf"])
    use = Use(
        context=context if context is not None else TRAIN_LENGTH if train else 8192,
        batch=batch if batch is not None else TRAIN_BATCH if train else 1,
        kv_bits=asked["kv_bits"], prefill_step=asked["prefill_step"], runtime=asked["runtime"], train=train,
    )  # fmt: skip
    limit = asked["limit"]
    megabytes = "MiB" if limit and limit.isdecimal() else ""  # as sysctl takes them
    budget = Budget(asked["macos"], memory(limit and limit + megabytes), memory(asked["reserve"]) or 0)
    macs = [*(asked["mac"] or []), *(f"{gib(size):g}gb" for size in asked["memory_size"] or [])]
    found = fit(model, macs, use, form, budget)
    tables.show_fit(found)
    if plot:
        found["plot"] = str(draw(found, plot))
        console.say(f"drawn: {plot}")
    return found


@command(
    "run",
    "mlx-pare run MODEL --out RUN --keep 0.75 | mlx-pare run MODEL --out RUN --for m4-24gb --context 8192 "
    "--data notes/ | mlx-pare run MODEL --out RUN --schedule 0.8,0.65,0.5 --recover-steps 300 | "
    "mlx-pare run --recipe RUN/recipe.toml --out NEW --keep 0.6",
    options=TABLE,
    first=("out", "keep", "target_size", "mac", "context", "data", "bits", "gguf", "recover_steps", "quick",
           "recipe", "dry_run"),
    recipe=True,
)  # fmt: skip
def run_command(model: Model, out: Out, dry_run: DryRun = False, **asked: Any) -> dict[str, Any]:
    """Prune a model, recover it, and measure the result.

    The result is compared with the original, with a random cut of the same size, and with fewer bits.
    The steps are calibrate, score, plan, reconstruct, prune, recover, evaluate, export, bench and report. To continue a
    run that was stopped, give the same command again.
    """
    return _run(model, out, settings_of(**asked), dry_run)


def _run(model: Path, out: Path, settings: Any, dry_run: bool = False) -> dict[str, Any]:
    from ..pipeline import run as pipeline

    if dry_run:
        return tables.show_shape(pipeline.dry_run(model, settings))
    summary = pipeline.run(model, out, settings)
    tables.show_summary(summary)
    return summary


@command("bench", "mlx-pare bench MODEL RUN/prune/model --trials 5", options=("memory_cap",))
def bench_command(
    models: Annotated[
        list[Path], typer.Argument(help="Model directories; the first is the reference.", metavar="MODEL...")
    ],
    trials: Annotated[int, typer.Option(min=1, help="Rounds measured, after one warm-up.")] = 5,
    prompt: Annotated[int, typer.Option(min=1, help="Tokens of the prompt.")] = 512,
    new: Annotated[int, typer.Option(min=2, help="Tokens to generate.")] = 128,
    *,
    memory_cap: str | None,
) -> dict[str, Any]:
    """Measure the speed of models in stock mlx-lm.

    It measures how many tokens per second each model reads and writes. The models take turns. The table shows
    the median, the spread, and the ratio to the first model.
    """
    from ..evaluation.bench import bench

    found = bench(models, trials, prompt, new, memory(memory_cap))
    tables.show_bench(found)
    return found


# ---- looking around ----


@command("inspect", "mlx-pare inspect MODEL --json | mlx-pare inspect qwen3-30b-a3b", network=True)
def inspect_command(model: AnyModel) -> dict[str, Any]:
    """Show what is in a model, and which programs load it.

    It also shows what can be cut. Only the config and the headers of the model are read.
    """
    from ..capacity.inspect import inspect

    found = inspect(model)
    tables.show_inspect(found)
    return found


@command("demo", "mlx-pare demo --out demo-run | mlx-pare demo --quick", options=("quick",))
def demo_command(
    out: Annotated[Path, typer.Option(help="Run directory, new or to be continued.", metavar="DIR")] = Path("demo-run"),
    *,
    quick: bool,
) -> dict[str, Any]:
    """Prune the small model that comes with mlx-pare."""
    from ..text.splits import DEMO

    return _run(DEMO / "model", out, settings_of(keep=0.75, length=256, recover_steps=60, context=512, quick=quick))


@command("doctor", "mlx-pare doctor | mlx-pare doctor --check --json")
def doctor_command(
    check: Annotated[bool, typer.Option("--check", help="Also test this device for about a minute.")] = False,
) -> dict[str, Any]:
    """Show this computer and the installed versions.

    With --check it also computes a small job, and compares the numbers with those of the CPU.
    """
    here, free = machine.this_machine(), machine.available_bytes()
    found = {"machine": here.as_dict(), "available_bytes": free, "versions": machine.versions()}
    rows = [
        ["system", here.system],
        ["chip", here.chip or "unknown (not a Mac)"],
        ["memory", gb(here.memory_bytes)],
    ]
    rows += [["GPU cores", here.gpu_cores or "unknown"], ["free now", gb(free)]]
    rows += [[name, found_version] for name, found_version in found["versions"].items()]
    console.table("mlx-pare doctor", ["<", "<value"], rows)
    if here.rosetta:
        console.warn("this Python runs under Rosetta: install an arm64 Python, MLX needs it")
    if check:
        from . import self_check

        found["check"] = self_check.self_check()
        self_check.show(found["check"])
    return found


def main() -> None:
    """Run the command line; this is its entry point."""
    interrupts.listen()
    machine.allow_files()
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
    """Run the command that was typed, and return the exit code. A mistyped command is also one line, and the document
    of --json."""
    try:
        code = app(prog_name="mlx-pare", standalone_mode=False) or 0
        if code != INTERRUPTED:
            return code
        console.error("interrupted before anything was done")
        return 1
    except click.ClickException as error:
        if len(sys.argv) == 1:  # without arguments: the help
            error.show()
            return error.exit_code
        where = f". See `{error.ctx.command_path} --help`." if getattr(error, "ctx", None) else ""
        line = " ".join(error.format_message().split()).rstrip(".") + where
        console.configure(as_json="--json" in sys.argv or console.speaks_json())
        console.failure(line, error.exit_code)
        return error.exit_code
    except PareError as error:  # from a recipe, while the command line was read
        console.configure(as_json="--json" in sys.argv or console.speaks_json())
        return failed(error, "--debug" in sys.argv)
