"""What --tasks names: files of the user, and the probes that come with mlx-pare."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from difflib import get_close_matches
from pathlib import Path

from ..base.errors import UsageError
from . import haystack
from .checks import Function, loaded
from .records import Task, functions_of, read

FOLDER = Path(__file__).with_name("probes")
ALL, ONE = "probes", "probe:"  # how --tasks names all probes, and one


def probes() -> list[str]:
    """The names of all probes."""
    return sorted([*(file.stem for file in FOLDER.glob("*.jsonl")), haystack.NAME])


def collect(names: Sequence[str], longest: int, count: Callable[[str], int]) -> list[Task]:
    """Read all tasks that are named.

    Args:
        names: files, "probes" for all that come with mlx-pare, or "probe:NAME". An existing file wins over a name.
        longest: tokens of the longest text of the probe `needle`.
        count: the number of tokens of a prompt.
    Returns:
        The tasks, in this order.
    Raises:
        UsageError: there is no such file or probe, nothing is named, or something twice.
        PareError: a file cannot be read as tasks.
    """
    if not names:
        raise UsageError("no tasks are named", 'give files, or "probes"')
    if twice := next((name for name in names if list(names).count(name) > 1), None):
        raise UsageError(f"--tasks {twice} is given twice", "name it once")
    found: list[Task] = []
    for name in names:
        for source in _sources(name):
            if source == haystack.NAME:
                found += haystack.tasks(longest, count)
            else:
                found += read(source)
    if not found:
        raise UsageError("the tasks that are named hold no record", "the model's context is too short for this probe")
    return found


def _sources(name: str) -> list[Path | str]:
    """The files that a name means; the name of the probe that is made instead of read."""
    if Path(name).exists():
        return [Path(name)]
    if name == ALL:
        chosen = probes()
    elif name.startswith(ONE):
        chosen = [name.removeprefix(ONE)]
    else:
        raise UsageError(f"there is no tasks file {name}", f'give a file, "{ALL}" or "{ONE}NAME"')
    if chosen[0] not in probes():
        near = get_close_matches(chosen[0], probes(), 1)
        raise UsageError(
            f"there is no probe {chosen[0]!r}",
            f"did you mean {near[0]}?" if near else f"choose from {', '.join(probes())}",
        )
    return [each if each == haystack.NAME else FOLDER / f"{each}.jsonl" for each in chosen]


def functions(tasks: Sequence[Task], named: Sequence[str]) -> dict[str, Function]:
    """Import the functions that checks name. A tasks file may come from others, so each must also be named by the user.

    Args:
        tasks: all tasks.
        named: the functions that the user names.
    Returns:
        The functions by name.
    Raises:
        UsageError: a check names a function that the user does not, the other way round, or there is none.
    """
    wanted = functions_of(tasks)
    for name, where in wanted.items():
        if name not in named:
            raise UsageError(
                f"{where} asks for the function {name}, which would run code", f"allow it with --task-function {name}"
            )
    if vain := [name for name in named if name not in wanted]:
        raise UsageError(f"--task-function {vain[0]} is named by no check", "leave it out")
    return loaded(wanted)
