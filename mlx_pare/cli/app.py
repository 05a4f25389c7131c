"""The app, and the wrapper that gives every command its options, modes, errors and exit codes."""

from __future__ import annotations

import functools
import inspect as signatures
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import click
import typer
from click.core import ParameterSource

from .. import __version__
from ..base import console
from ..base.errors import told
from ..options import recipe_file
from ..options.option import Option
from ..options.settings import FOR_A_MAC, GENERAL, OUTPUT, TABLE, TARGETS, memory
from ..sources import resolve
from ..sources.open_model import opened
from . import unused
from .help_page import CommandPage, MainPage

MODELS = ("model", "models", "teacher", "against", "parent")  # parameters of commands that name models

app = typer.Typer(
    name="mlx-pare",
    cls=MainPage,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
    help="Make a language model smaller so that it fits your Mac, and measure whether that was worth it.",
    epilog="mlx-pare fit qwen3-32b --mac m4-24gb | mlx-pare run MODEL --out RUN --for m4-24gb | mlx-pare demo | "
    "mlx-pare run --help\n\n"
    "Exit codes: 0 done, 1 failed, 2 wrong usage, 3 refused (it would overwrite something, its inputs changed, or it "
    "does not fit).",
)


def _version(asked: bool) -> None:
    if asked:
        console.configure()
        console.say(f"mlx-pare {__version__}")
        raise typer.Exit


@app.callback()
def _main_options(
    version: Annotated[
        bool, typer.Option("-V", "--version", callback=_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    pass


def mac_names() -> list[str]:
    """Return the known Macs, for completion."""
    from ..capacity.macs import every

    return [mac.name for mac in every()]


def model_names() -> list[str]:
    """Return the models of the catalogue, for completion."""
    from ..sources.catalogue import entries

    return [entry.name for entry in entries()]


OFFERS = {"mac": mac_names}  # what completion offers for an option of the table


def annotated(option: Option, **changes: Any) -> Any:
    """Return an option of the table as typer reads it in a signature; ``changes`` are those of one command."""
    option = replace(option, **changes)
    flags = [option.flag]
    if option.kind is bool:
        flags = [f"{option.flag}/--no-{option.flag.removeprefix('--')}"]
    more: dict[str, Any] = {"metavar": option.metavar, "rich_help_panel": option.panel, "help": option.help}
    if option.kind in (int, float):
        more |= {"min": option.least, "max": option.most}
    if offers := option.offers or OFFERS.get(option.field):
        more["autocompletion"] = offers
    elif option.choices:
        more["autocompletion"] = lambda: list(option.choices)
    if option.kind is Path and option.field in MODELS:
        more["parser"] = resolve.typed
    kind = list[str] if option.repeats else option.kind
    return Annotated[kind if option.default is not None else kind | None, typer.Option(*flags, **more)]


Model = Annotated[
    Path,
    typer.Argument(
        help="A model directory (config.json, *.safetensors, tokenizer), a GGUF file or its folder, a hub id "
        "(org/name, org/name@revision, org/name:Q4_K_M), or a name that `mlx-pare models` lists.",
        metavar="MODEL",
    ),
]
AnyModel = Annotated[
    str,
    typer.Argument(
        help="A model directory, a config.json, a GGUF file, a run directory or its plan.json, a hub id (org/name, "
        "org/name@revision, org/name:Q4_K_M), or a name that `mlx-pare models` lists.",
        metavar="MODEL",
        autocompletion=model_names,
    ),
]
RunDir = Annotated[Path, typer.Argument(help="A run directory.", metavar="RUN")]
Out = Annotated[
    Path,
    typer.Option(help="Run directory, new or to be continued.", metavar="DIR", rich_help_panel=OUTPUT),
]
Cap = annotated(TABLE["memory_cap"])
Json = Annotated[bool, typer.Option("--json", help="Write one JSON document to stdout, and messages to stderr.")]
Quiet = Annotated[bool, typer.Option("--quiet", help="Write errors and warnings only.")]
Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]
DryRun = Annotated[
    bool,
    typer.Option("--dry-run", help="Show what would be done, and write nothing.", rich_help_panel=OUTPUT),
]


def _read_recipe(context: click.Context, path: Path | None) -> None:
    """Let the recipe fill in what the command line leaves out, including required options and arguments."""
    if path is not None and not context.resilient_parsing:
        raw = recipe_file.parsed(path)
        if raw.get("json") is True:  # an error in the recipe is a document as well
            console.configure(as_json=True)
        context.default_map = recipe_file.checked(raw, path)


Recipe = Annotated[
    Path | None,
    typer.Option(
        help="TOML file with options by name, e.g. RUN/recipe.toml of an earlier run. The command line wins.",
        metavar="FILE", callback=_read_recipe, is_eager=True, rich_help_panel=GENERAL,
    ),
]  # fmt: skip


NEW_RUNS = ("run", "demo", "calibrate")  # commands that make a run directory; those that take one have a parameter RUN


def command(
    name: str,
    examples: str,
    network: bool = False,
    options: Iterable[str | Option] = (),
    first: tuple[str, ...] = (),
    recipe: bool = False,
) -> Callable:
    """Register a command: it sets the modes, turns an error into one line and an exit code, and a result into a
    document.

    The document is what --json writes. Models that are named are downloaded before the command begins.

    Args:
        name: what the user types.
        examples: shown in the help, separated by " | ".
        network: whether the command itself may ask the hub. It never does if the user has set HF_HUB_OFFLINE.
        options: those that it takes besides its own parameters; options of the table by their field.
        first: parameters that come first in the help of a command with many options.
        recipe: whether it takes --recipe.
    Returns:
        A decorator for the function of the command.
    """
    chosen = [TABLE[option] if isinstance(option, str) else option for option in options]

    def wrap(function: Callable) -> Callable:
        continues = "run" in signatures.signature(function).parameters or name in NEW_RUNS

        @functools.wraps(function)
        def called(as_json: bool, quiet: bool, debug: bool, recipe: Path | None = None, **given: Any) -> None:
            console.configure(as_json, quiet)
            try:
                typed = _typed(click.get_current_context())
                for line in unused.lines(name, typed, given):
                    console.warn(line)
                given = _directories(_one_target(given, typed))
                if cap := memory(given.get("memory_cap")):
                    from .. import lm  # these commands compute, so they import it in any case

                    lm.limit_memory(cap)
                with nullcontext() if network else resolve.offline():  # every model is here: no waiting
                    console.document(function(**given))
            except BrokenPipeError:  # `| head` has seen enough
                raise
            except (Exception, KeyboardInterrupt) as error:
                raise typer.Exit(failed(error, debug, continues)) from None

        _sign(called, function, chosen, recipe)
        page = type("Page", (CommandPage,), {"first": first, "arguments": _arguments(called)})
        return app.command(name, cls=page, epilog=examples)(called)

    return wrap


def _typed(context: click.Context) -> set[str]:
    """Return the parameters on the command line, without those of a recipe."""
    return {name for name in context.params if context.get_parameter_source(name) is ParameterSource.COMMANDLINE}


def _one_target(given: dict[str, Any], typed: set[str]) -> dict[str, Any]:
    """Return what is given, without the target of a recipe if the command line names one."""
    replaced = {*TARGETS, *FOR_A_MAC} - typed if typed & {*TARGETS} else set()
    return {name: TABLE[name].default if name in replaced else value for name, value in given.items()}


def _directories(given: dict[str, Any]) -> dict[str, Any]:
    """Return what the command line gives, with model directories in place of GGUF files and names.

    Texts name more than these: `fit` and `inspect` read headers only. ``file`` is a GGUF file, and stays one.
    """
    run = given.get("out")
    for name in MODELS:
        value = given.get(name)
        if isinstance(value, Path):
            given[name] = opened(value, run)
        elif isinstance(value, list):
            given[name] = [opened(model) for model in value]
    if isinstance(given.get("file"), Path):
        given["file"] = resolve.local(given["file"], gguf=True)
    return given


def failed(error: BaseException, debug: bool = False, continues: bool = False) -> int:
    """Write an error as one line, and as the document of --json.

    Args:
        error: what ended the command.
        debug: also write the traceback.
        continues: whether the same command continues from where it was.
    Returns:
        The exit code.
    """
    line, code = told(error, continues)
    if debug:
        import traceback

        traceback.print_exception(error)
    console.failure(line, code)
    return code


def _arguments(called: Callable) -> dict[str, str]:
    """Return the help text of every argument of a command."""
    found = {
        name: getattr(annotation, "__metadata__", (None,))[0] for name, annotation in called.__annotations__.items()
    }
    return {name: info.help for name, info in found.items() if isinstance(info, typer.models.ArgumentInfo)}


def _sign(called: Callable, function: Callable, options: Iterable[Option], recipe: bool) -> None:
    """Give the wrapper the signature that typer reads: the function's own parameters, options, modes."""
    added = [(option.field, option.default, annotated(option)) for option in options]
    own = [
        parameter.replace(kind=signatures.Parameter.KEYWORD_ONLY)
        for parameter in signatures.signature(function, eval_str=True).parameters.values()
        if parameter.kind is not signatures.Parameter.VAR_KEYWORD and parameter.name not in {name for name, *_ in added}
    ]
    for parameter in own:
        if parameter.name in (*MODELS, "file") and "Path" in str(parameter.annotation):
            for about in parameter.annotation.__metadata__:  # Path would change a/b//c and org/name@a/b
                about.parser, about.metavar = resolve.typed, about.metavar or "MODEL"
    added += [("recipe", None, Recipe)] * recipe
    added += [("as_json", False, Json), ("quiet", False, Quiet), ("debug", False, Debug)]
    keyword = signatures.Parameter.KEYWORD_ONLY
    own += [signatures.Parameter(n, keyword, default=default, annotation=a) for n, default, a in added]
    called.__signature__ = signatures.Signature(own)
    called.__annotations__ = {parameter.name: parameter.annotation for parameter in own}
