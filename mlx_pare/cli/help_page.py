"""The help pages: commands and options in panels, plain text, without rich, which would double the start-up time."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Mapping
from types import MappingProxyType

import click
from typer.core import TyperCommand, TyperGroup

from ..options.settings import CUT, GENERAL, OUTPUT, REACH, RECOVERY, SEARCH, TEXT

# The panels of `mlx-pare --help`, in this order; the commands of each in this order.
COMMANDS: Mapping[str, tuple[str, ...]] = {
    "Everyday commands": ("fit", "run", "evaluate", "export", "bench"),
    "Looking around": ("inspect", "models", "status", "demo", "doctor"),
    "Single steps of a run": (
        "calibrate", "score", "plan", "stability", "reconstruct", "prune", "recover", "report",
    ),
    "Other formats": ("import", "adapters"),
}  # fmt: skip
FIRST = "Most used"
PANELS = (FIRST, REACH, CUT, TEXT, SEARCH, RECOVERY, OUTPUT, GENERAL)  # of a command with many options, in this order
MANY = 14  # options; a command with no more has a single panel
EXAMPLES = " | "  # between two examples of a command
SHORT = {"integer": "N", "float": "NUMBER", "integer range": "N", "float range": "NUMBER"}
Row = tuple[str, str]


class CommandPage(TyperCommand):
    """A command whose help shows its options in panels, with the parameters in ``first`` before all others."""

    first: tuple[str, ...] = ()
    arguments: Mapping[str, str] = MappingProxyType({})  # name -> help, which typer does not keep with click 8.5

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the arguments, then the options: in one panel, or in several if there are many."""
        _write(formatter, {"Arguments": [self._argument(p, ctx) for p in self.params if _given_by_place(p)]})
        options = [p for p in self.get_params(ctx) if isinstance(p, click.Option) and not p.hidden]
        _write(formatter, self._in_panels(options, ctx) if len(options) > MANY else {"Options": _rows(options, ctx)})

    def _argument(self, argument: click.Parameter, ctx: click.Context) -> Row:
        return argument.make_metavar(ctx), self.arguments.get(argument.name or "", "")

    def _in_panels(self, options: list[click.Option], ctx: click.Context) -> dict[str, list[Row]]:
        named = {option.name: option for option in options}
        panels: dict[str, list[click.Option]] = {FIRST: [named[name] for name in self.first if name in named]}
        for option in options:
            if option.name not in self.first:
                panels.setdefault(getattr(option, "rich_help_panel", None) or GENERAL, []).append(option)
        own = [name for name in panels if name not in PANELS]
        order = [*PANELS[:-2], *own, *PANELS[-2:]]
        return {name: _rows(panels[name], ctx) for name in order if name in panels}

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the examples, one a line."""
        if self.epilog:
            _write_lines(formatter, "Examples", self.epilog.split(EXAMPLES))


class MainPage(TyperGroup):
    """The page of all commands, in panels."""

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the commands first, then the few options of mlx-pare itself."""
        self.format_commands(ctx, formatter)
        options = [p for p in self.get_params(ctx) if isinstance(p, click.Option)]
        _write(formatter, {"Options": _rows(options, ctx)})

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write a line for every command, under the name of its panel."""
        listed = [name for names in COMMANDS.values() for name in names]
        panels = {**COMMANDS, "More commands": tuple(name for name in self.commands if name not in listed)}
        rows = {
            panel: [
                (name, self.commands[name].get_short_help_str(limit=120)) for name in names if name in self.commands
            ]
            for panel, names in panels.items()
        }
        _write(formatter, rows)

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the examples, one a line, and the meaning of the exit codes."""
        examples, _, codes = (self.epilog or "").partition("\n\n")
        _write_lines(formatter, "Examples", examples.split(EXAMPLES))
        formatter.write_paragraph()
        formatter.write_text(codes)


def _rows(options: Iterable[click.Option], ctx: click.Context) -> list[Row]:
    return [_option(option, ctx) for option in options]


def _given_by_place(parameter: click.Parameter) -> bool:
    return isinstance(parameter, click.Argument)


def _option(option: click.Option, ctx: click.Context) -> Row:
    """Return the two columns of an option: its names with its value, and its help with the default."""
    names = ", ".join(sorted(option.opts, key=len))
    if option.secondary_opts and option.default:  # an option that is off only shows how to turn it on
        names += f" / {option.secondary_opts[0]}"
    if not (option.is_flag or option.count):
        metavar = option.metavar or SHORT.get(option.type.name, option.type.name.upper())
        names += f" {metavar}"
    words = [option.help or ""]
    if option.required:
        words.append("[required]")
    elif (default := _default(option, ctx)) is not None:
        words.append(f"[default: {default}]")
    return names, " ".join(words)


def _default(option: click.Option, ctx: click.Context) -> str | None:
    """Return the default in words; None if there is none, or if the help text contains it."""
    value = option.get_default(ctx, call=False)
    if option.is_flag:
        return option.opts[0].lstrip("-") if option.secondary_opts and value else None
    told = "Default:" in (option.help or "")
    if told or value is None or callable(value) or value in ((), [], ""):
        return None
    return f"{value:g}" if isinstance(value, float) else str(value)


def _write(formatter: click.HelpFormatter, panels: Mapping[str, list[Row]]) -> None:
    """Write panels that are not empty, in two columns that line up over all of them."""
    names = [name for rows in panels.values() for name, _ in rows]
    width = min(max(map(len, names), default=0), formatter.width // 3)
    for panel, rows in panels.items():
        if not rows:
            continue
        with formatter.section(panel):
            for name, text in rows:
                _write_row(formatter, name, text, width)


def _write_row(formatter: click.HelpFormatter, name: str, text: str, width: int) -> None:
    """Write one name and its text. Words are not broken at a hyphen: --recover-steps stays whole."""
    margin = formatter.current_indent + width + 2
    room = max(20, formatter.width - margin)
    lines = textwrap.wrap(text, room, break_on_hyphens=False, break_long_words=False) or [""]
    if len(name) > width:
        formatter.write(f"{'':>{formatter.current_indent}}{name}\n")
        name = ""
    for first, line in zip([name, *[""] * len(lines)], lines, strict=False):
        formatter.write(f"{'':>{formatter.current_indent}}{first:<{width}}  {line}".rstrip() + "\n")


def _write_lines(formatter: click.HelpFormatter, title: str, lines: Iterable[str]) -> None:
    """Write lines unchanged, because a folded command cannot be copied."""
    with formatter.section(title):
        for line in lines:
            formatter.write(f"{'':>{formatter.current_indent}}{line.strip()}\n")
