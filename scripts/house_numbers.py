"""How the package is laid out, in numbers: rooms, files, arrows between rooms, arrows that run back, circles.

    python scripts/house_numbers.py [CHECKOUT ...]      this checkout, and any other

A room is a folder of the package, or a file that lies in none; an arrow is an import of one room by another, wherever
the import stands: at the top of a file or inside of a function. Nothing of the package is imported.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

NAME = "mlx_pare"
DOORS = {NAME, "__main__", "api"}  # the ways in, which are no rooms
Graph = Mapping[str, Iterable[str]]


def modules(root: Path) -> dict[str, Path]:
    """The modules of the package in a checkout by their dotted names, e.g. mlx_pare.planning.goal."""
    found = {}
    for file in sorted((root / NAME).rglob("*.py")):
        parts = file.relative_to(root).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = file
    return found


def at_import(tree: ast.AST) -> Iterator[ast.AST]:
    """What runs when a module is imported: everything outside functions."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            continue
        yield node
        yield from at_import(node)


def imports(module: str, package: bool, nodes: Iterable[ast.AST]) -> set[str]:
    """Absolute dotted names that import statements mention: modules, and what is taken from them."""
    found, here = set(), module.split(".") if package else module.split(".")[:-1]
    for node in nodes:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(here[: len(here) - node.level + 1]) if node.level else ""
            source = ".".join(filter(None, [base, node.module]))
            found |= {source, *(f"{source}.{alias.name}" for alias in node.names)}
    return found


def arrows(root: Path) -> dict[str, set[str]]:
    """Module -> the modules of the package that it imports, each without the package that the import passes through."""
    files = modules(root)
    found = {}
    for module, file in files.items():
        named = imports(module, file.name == "__init__.py", ast.walk(ast.parse(file.read_text("utf-8"))))
        mine = {name for name in named if name in files and name not in (NAME, module)}
        found[module] = {name for name in mine if not any(other.startswith(f"{name}.") for other in mine)}
    return found


def room(module: str) -> str:
    """The room of a module: the folder in the package, or the file."""
    return module.split(".")[1] if "." in module else NAME


def between_rooms(graph: Graph) -> dict[str, set[str]]:
    """Room -> the other rooms that it imports. The ways in are no rooms."""
    found: dict[str, set[str]] = {}
    for module, others in graph.items():
        if room(module) in DOORS:
            continue
        mine = found.setdefault(room(module), set())
        mine |= {room(other) for other in others} - {room(module), *DOORS}
    return found


def circles(graph: Graph) -> list[list[str]]:
    """Sets of nodes that reach each other (Tarjan 1972), each of two or more."""
    index: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    found: list[list[str]] = []

    def visit(node: str) -> None:
        index[node] = low[node] = len(index)
        stack.append(node)
        for other in sorted(graph.get(node, ())):
            if other not in index:
                visit(other)
            if other in stack:
                low[node] = min(low[node], low[other])
        if low[node] == index[node]:
            cut = stack.index(node)
            if len(stack) - cut > 1:
                found.append(sorted(stack[cut:]))
            del stack[cut:]

    for node in sorted(graph):
        if node not in index:
            visit(node)
    return found


def running_back(graph: Graph) -> list[tuple[str, str]]:
    """Arrows that run against the others, as few as a greedy order finds (Eades, Lin & Smyth 1993)."""
    left = set(graph) | {other for others in graph.values() for other in others}
    low: list[str] = []  # imported by others, imports nothing that is left
    high: list[str] = []
    while left:
        out = {node: len(left & set(graph.get(node, ())) - {node}) for node in left}
        into = {node: sum(node in graph.get(other, ()) for other in left - {node}) for node in left}
        if ground := sorted(node for node in left if not out[node]):
            low += ground
            left -= set(ground)
        elif roof := sorted(node for node in left if not into[node]):
            high += roof
            left -= set(roof)
        else:
            chosen = max(sorted(left), key=lambda node: into[node] - out[node])
            low.append(chosen)
            left.remove(chosen)
    place = {node: number for number, node in enumerate([*low, *reversed(high)])}
    return sorted((a, b) for a, others in graph.items() for b in others if place[b] > place[a])


def described(root: Path) -> list[str]:
    """The numbers of one checkout, a line each."""
    graph, files = arrows(root), modules(root)
    rooms = between_rooms(graph)
    counts: dict[str, int] = {}
    for file in files.values():
        folder = file.parent.relative_to(root)
        counts[str(folder)] = counts.get(str(folder), 0) + (file.name != "__init__.py")
    back, of_rooms, of_files = running_back(rooms), circles(rooms), circles(graph)
    lines = sum(len(file.read_text("utf-8").splitlines()) for file in files.values())
    return [
        f"rooms: {len(rooms)}",
        f"files: {sum(counts.values())} with {lines} lines",
        f"files in a folder: {', '.join(f'{folder} {count}' for folder, count in sorted(counts.items()))}",
        f"arrows between files: {sum(map(len, graph.values()))}",
        f"arrows between rooms: {sum(map(len, rooms.values()))}",
        f"arrows between rooms that run back: {len(back)}" + "".join(f"\n  {a} -> {b}" for a, b in back),
        f"circles of rooms: {len(of_rooms)}" + "".join(f"\n  {', '.join(found)}" for found in of_rooms),
        f"circles of files: {len(of_files)}" + "".join(f"\n  {', '.join(found)}" for found in of_files),
    ]


def main() -> None:
    here = Path(__file__).resolve().parents[1]
    for root in [Path(argument) for argument in sys.argv[1:]] or [here]:
        print(f"{root.resolve().name}:" if len(sys.argv) > 2 else "", *described(root.resolve()), sep="\n")


if __name__ == "__main__":
    main()
