"""The shared options of the commands, and the wrapper that gives every command its modes, errors and exit codes."""

from __future__ import annotations

import functools
import inspect as signatures
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Annotated, Any

import typer

from . import console
from .errors import told
from .named import local, offline, typed
from .opened import opened
from .score import CRITERIA

MODELS = ("model", "models", "teacher", "against", "parent")  # parameters of commands that name models

app = typer.Typer(
    name="mlx-pare",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
    help="Make a model smaller on the Mac itself, and say whether it was worth it.\n\n"
    "Everyday: fit, run, evaluate, export, bench.  Single steps: calibrate, score, plan, stability, reconstruct, "
    "prune, recover, report.  "
    "Looking around: status, inspect, demo, doctor. From GGUF: import. LoRA: adapters.\n\n"
    "Exit codes: 0 done, 1 failed, 2 usage, 3 refused (would overwrite, inputs changed, does not fit).",
)

Model = Annotated[
    Path,
    typer.Argument(
        help="A directory (config.json, *.safetensors, tokenizer), a GGUF file or the folder of one, a model on the "
        "hub (org/name, org/name@revision, org/name:Q4_K_M), or a name that `mlx-pare models` lists.",
        metavar="MODEL",
    ),
]
AnyModel = Annotated[
    str,
    typer.Argument(
        help="A directory, a config.json, a .gguf file, a run directory or its plan.json, a model on the hub "
        "(org/name, org/name@revision, org/name:Q4_K_M), or a name that `mlx-pare models` lists.",
        metavar="MODEL",
    ),
]
RunDir = Annotated[Path, typer.Argument(help="Run directory.", metavar="RUN")]
Json = Annotated[bool, typer.Option("--json", help="One JSON document on stdout, talk on stderr.")]
Quiet = Annotated[bool, typer.Option("--quiet", help="Say nothing but errors.")]
Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Show what would be done, write nothing.")]
Data = Annotated[
    list[str] | None,
    typer.Option(
        help="Text: .txt, .md, .jsonl or a folder. May be repeated: domains of different weights, e.g. "
        "--data code=src.jsonl:2 --data notes/. Default: our own.",
        metavar="[NAME=]PATH[:WEIGHT]",
    ),
]
Field = Annotated[
    str | None,
    typer.Option(help="Field of .jsonl records. Default: text, messages, content, or prompt with completion."),
]
TestData = Annotated[
    str | None, typer.Option(help="Text to measure on. Default: a tenth of --data, or our own.", metavar="PATH")
]
Samples = Annotated[int, typer.Option(min=1, help="Calibration rows.")]
Length = Annotated[int, typer.Option(min=2, help="Tokens in a row (the window of evaluate).")]
Seed = Annotated[int, typer.Option(min=0, max=2**32 - 1, help="Seed of everything random.")]
Cap = Annotated[str | None, typer.Option(help='Memory that may be used, e.g. "4GB". Default: what is free.')]
Criterion = Annotated[str, typer.Option(help=f"What tells which units matter: {', '.join(CRITERIA)}.")]
Axes = Annotated[str, typer.Option(help="What may be cut: ffn, kv_head, layer, hidden; separated by commas.")]
Keep = Annotated[float | None, typer.Option(help="Target: share of the non-embedding parameters to keep, e.g. 0.75.")]
Stages = Annotated[
    str | None,
    typer.Option(
        "--schedule",
        help="Target: cut in stages, with recovery between, to these shares of the original's non-embedding "
        'parameters, e.g. "0.8,0.65,0.5"; --recover-steps are divided between the stages.',
        metavar="SHARES",
    ),
]
TargetParams = Annotated[str | None, typer.Option(help='Target: total parameters, e.g. "24B".')]
TargetSize = Annotated[str | None, typer.Option(help='Target: bytes of weights at most, e.g. "15GB".')]
For = Annotated[
    str | None, typer.Option("--for", help="Target: the Mac it must fit, e.g. m4-24gb, m4-pro-20c-24gb.", metavar="MAC")
]
Context = Annotated[int, typer.Option(min=1, help="Tokens of context it must hold.")]
MinSpeed = Annotated[
    float | None,
    typer.Option(min=0.01, help="With --for: also cut until that Mac writes so many tokens per second (estimated)."),
]
Bits = Annotated[int | None, typer.Option(help="Pack the result with 2, 3, 4, 5, 6 or 8 bits. Default: as the source.")]
GroupSize = Annotated[int, typer.Option(help="Group size for --bits: 32, 64 or 128.")]
Widths = Annotated[
    str,
    typer.Option(
        help="even: every axis is cut by the same share. uniform: all layers alike, every division between the axes "
        "tried. per-layer: widths of their own, by an integer programme, tried, the best reconstructed."
    ),
]
Runtimes = Annotated[
    str,
    typer.Option(
        help="What must load the result: mlx, llama.cpp, ollama, lm-studio; separated by commas. All but mlx want a "
        "GGUF file: layers are cut alike where llama.cpp has nothing for layers that differ."
    ),
]
LayersBy = Annotated[
    str | None,
    typer.Option(
        help="How the layers that go are chosen: block-influence; angular, the block of neighbours that turns text "
        "least; kl, one after the other, the least missed on held-out text. Default: kl, with --widths uniform, "
        "where the criterion has no formula for layers; not with --widths per-layer."
    ),
]
Tries = Annotated[
    int | None,
    typer.Option("--try", min=1, help="Candidate plans to try by true KL. Default: 12, 50 for per-layer widths."),
]
ChooseBits = Annotated[
    str | None,
    typer.Option(
        help='With --widths per-layer and a size in bytes: also choose the bits of every part, e.g. "2,3,4,6,8".'
    ),
]
Step = Annotated[int | None, typer.Option(min=1, help="Widths are multiples of this. Default: 1, the group, or 256.")]
NoReconstruct = Annotated[
    bool, typer.Option("--no-reconstruct", help="Cut the matrices as they are, without making up for the cut.")
]
NoProtect = Annotated[
    bool, typer.Option("--no-protect", help="First, last and last full-attention layer may be cut too.")
]
Steps = Annotated[int, typer.Option(min=0, help="Steps of distillation; 0: none.")]
Method = Annotated[
    str,
    typer.Option(
        help="What is trained: lora or dora adapters (merged in the end), full (all weights of the blocks), norms "
        "(norms and the affine scales of packed matrices, whose codes stay)."
    ),
]
Rate = Annotated[
    float | None, typer.Option(help="Default: 2e-4 for lora and dora, 3e-4 for norms, 0.02 / hidden size for full.")
]
LocalSteps = Annotated[
    int,
    typer.Option(min=0, help="Steps of distillation of every block for itself, before: takes the memory of one block."),
]
Targets = Annotated[
    str,
    typer.Option(
        help="What the teacher says of a token: full (of the whole vocabulary, made of hidden states in memory), or so "
        'many likeliest tokens and the mass of the rest, on disk, e.g. "64".'
    ),
]
TrainRows = Annotated[
    int,
    typer.Option(min=1, help="Rows of the text that are trained on, at most: hidden states of all are in memory."),
]
Patience = Annotated[int, typer.Option(min=0, help="End when so many validations in a row brought nothing; 0: never.")]
Batch = Annotated[int, typer.Option(min=1, help="Rows in memory at a time.")]
Accumulate = Annotated[int, typer.Option(min=1, help="Batches that make one step.")]
Schedule = Annotated[
    str, typer.Option("--rate-schedule", help="How the rate falls after the warm-up: cosine, linear or constant.")
]
Clip = Annotated[float, typer.Option(min=0, help="Largest norm of the gradient; 0: any.")]
Rank = Annotated[int, typer.Option(min=1, help="Rank of the adapters.")]
Loss = Annotated[
    str | None,
    typer.Option(
        "--loss",
        help="Divergence from the teacher: forward or reverse KL, js (Jensen-Shannon). Default: forward; reverse with "
        "--on-policy.",
    ),
]
Temperature = Annotated[float, typer.Option(help="Of teacher and student in the loss.")]
CrossEntropy = Annotated[float, typer.Option(help="Share of the loss, 0 to 1, that is cross-entropy with the text.")]
Match = Annotated[
    str,
    typer.Option(help="Hidden states are led to the teacher's: none, cosine, mse; auto: cosine where layers were cut."),
]
GradCheckpoint = Annotated[
    bool, typer.Option("--grad-checkpoint", help="Compute activations twice instead of keeping them: less memory.")
]
Mix = Annotated[
    bool,
    typer.Option("--mix", help="After every validation draw more of the domains that are furthest from the teacher."),
]
OnPolicy = Annotated[
    float,
    typer.Option(
        help="Share of the rows, 0 to 1, that the student goes on with by itself after their first quarter, for the "
        "teacher to judge; the loss is then reverse KL unless --loss says otherwise.",
        metavar="SHARE",
    ),
]
TeacherModel = Annotated[
    Path | None,
    typer.Option(help="Model to learn from, with the same tokenizer, e.g. a larger sibling. Default: the original."),
]
Gguf = Annotated[
    str | None,
    typer.Option(help="f16, q8_0, q4_k_m or another type of llama-quantize. Default: f16, q8_0 for a quantized model."),
]


NEW_RUNS = ("run", "demo", "calibrate")  # commands that make a run directory; those that take one have a parameter RUN


def command(name: str, examples: str, network: bool = False) -> Callable:
    """Register a command: modes are set, errors become one line and an exit code, the result is the JSON document.

    Models that are named are downloaded before. Only with ``network`` may the command itself ask the hub, and never
    if the user has set HF_HUB_OFFLINE.
    """

    def wrap(function: Callable) -> Callable:
        continues = "run" in signatures.signature(function).parameters or name in NEW_RUNS

        @functools.wraps(function)
        def called(*args: Any, as_json: bool, quiet: bool, debug: bool, **kwargs: Any) -> None:
            console.configure(as_json, quiet)
            try:
                given = _directories(kwargs)
                with nullcontext() if network else offline():  # every model is here now, nothing may wait
                    console.document(function(*args, **given))
            except BrokenPipeError:  # `| head` has seen enough
                raise
            except (Exception, KeyboardInterrupt) as error:
                _fail(error, debug, continues)

        _add_modes(called, function)
        return app.command(name, epilog="Examples:  " + examples)(called)

    return wrap


def _directories(given: dict[str, Any]) -> dict[str, Any]:
    """What the command line gives, with model directories in place of GGUF files and of names. Texts name more than
    these: `fit` and `inspect` read headers only. ``file``: a GGUF file, which stays one."""
    run = given.get("out")
    for name in MODELS:
        value = given.get(name)
        if isinstance(value, Path):
            given[name] = opened(value, run)
        elif isinstance(value, list):
            given[name] = [opened(model) for model in value]
    if isinstance(given.get("file"), Path):
        given["file"] = local(given["file"], gguf=True)
    return given


def _fail(error: BaseException, debug: bool, continues: bool) -> None:
    line, code = told(error, continues)
    if debug:
        import traceback

        traceback.print_exception(error)
    console.failure(line, code)
    raise typer.Exit(code)


def _add_modes(called: Callable, function: Callable) -> None:
    own = signatures.signature(function, eval_str=True)
    for name in (*MODELS, "file"):
        for about in getattr(own.parameters[name].annotation, "__metadata__", ()) if name in own.parameters else ():
            if "Path" in str(own.parameters[name].annotation):
                about.parser, about.metavar = typed, about.metavar or "MODEL"
    modes = [
        signatures.Parameter(n, signatures.Parameter.KEYWORD_ONLY, default=False, annotation=a)
        for n, a in (("as_json", Json), ("quiet", Quiet), ("debug", Debug))
    ]
    called.__signature__ = own.replace(parameters=[*own.parameters.values(), *modes])
    called.__annotations__ = {n: p.annotation for n, p in called.__signature__.parameters.items()}


def memory(text: str | None) -> int | None:
    """Bytes of "4GB"; None stays None. Raises UsageError."""
    if text is None:
        return None
    from .amounts import parse_amount

    return int(parse_amount(text, "bytes"))


def _bits(text: str | None) -> tuple[int, ...]:
    """Numbers of bits, separated by commas. Raises UsageError for others than MLX packs."""
    from .errors import UsageError
    from .packing import BITS

    found = [part.strip() for part in (text or "").split(",") if part.strip()]
    if wrong := [part for part in found if part not in map(str, BITS)]:
        raise UsageError(f"MLX cannot pack {wrong[0]} bits", f"choose from {', '.join(map(str, BITS))}")
    return tuple(sorted({int(part) for part in found}))


def top_of(targets: str) -> int | None:
    """How many tokens "64" keeps; None for "full". Raises UsageError."""
    from .errors import UsageError

    if targets == "full":
        return None
    if not targets.isdecimal() or int(targets) < 1:
        raise UsageError(f"cannot read --targets {targets!r}", 'give "full", or a number of tokens such as 64')
    return int(targets)


def settings_of(**given: Any):
    """Settings from what the command line gives: axes and memory as text, data as a list."""
    from .schedule import shares
    from .steps import Settings

    given["stages"] = shares(given.pop("stages", None))
    given["axes"] = tuple(a.strip() for a in given.pop("axes", "ffn,kv_head").split(",") if a.strip())
    given["memory_cap"] = memory(given.pop("memory_cap", None))
    data = given.pop("data", None) or None
    if data and not isinstance(data, str):  # one stays text, as recipes have always had it
        data = data[0] if len(data) == 1 else tuple(data)
    given["data"] = data
    given["runtimes"] = tuple(r.strip().lower() for r in given.pop("runtimes", "mlx").split(",") if r.strip())
    given["choose_bits"] = _bits(given.pop("choose_bits", None))
    given["top"] = top_of(given.pop("targets", "full"))
    return Settings(**given)
