"""The rules of the house, read from the source: who may import whom, who may print, how long things may be."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "mlx_pare"
FILES = sorted(f for f in PACKAGE.rglob("*.py") if "__pycache__" not in f.parts)
TREES = {f: ast.parse(f.read_text("utf-8")) for f in FILES}
VERBS = {
    "calibrate",
    "score",
    "plan",
    "reconstruct",
    "prune",
    "recover",
    "evaluate",
    "export",
    "bench",
    "report",
    "inspect",
    "status",
    "check",
}
MAX_LINES, MAX_FUNCTION = 400, 60


def name_of(file: Path) -> str:
    """mlx_pare/planning/plan.py -> mlx_pare.plan"""
    parts = file.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {name_of(f): f for f in FILES}
DEFINITIONS = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)


def at_import(tree: ast.AST) -> Iterator[ast.AST]:
    """What runs when a module is imported: everything outside functions."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            continue
        yield node
        yield from at_import(node)


def imports(file: Path, nodes: Iterator[ast.AST]) -> set[str]:
    """Absolute dotted names that import statements mention: modules, and what is taken from them."""
    found = set()
    package = name_of(file).split(".") if file.name == "__init__.py" else name_of(file).split(".")[:-1]
    for node in nodes:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(package[: len(package) - node.level + 1]) if node.level else ""
            module = ".".join(filter(None, [base, node.module]))
            found |= {module, *(f"{module}.{alias.name}" for alias in node.names)}
    return found


def own_modules(names: set[str]) -> set[str]:
    """The modules of this package among them, each without the package that an import of it passes through."""
    mine = {n for n in names if n in MODULES and n != "mlx_pare"}
    return {n for n in mine if not any(other.startswith(n + ".") for other in mine)}


def verb_of(module: str) -> str | None:
    parts = module.split(".")
    return parts[1] if len(parts) > 1 and parts[1] in VERBS else None


# ---- imports ----


def test_no_import_cycle_at_module_level():
    graph = {name: own_modules(imports(file, at_import(TREES[file]))) for name, file in MODULES.items()}
    done: set[str] = set()

    def visit(name: str, path: tuple[str, ...]) -> None:
        assert name not in path, "import cycle: " + " -> ".join([*path[path.index(name) :], name])
        if name not in done:
            for other in sorted(graph[name]):
                visit(other, (*path, name))
            done.add(name)

    for name in graph:
        visit(name, ())


@pytest.mark.parametrize("name", [n for n in MODULES if verb_of(n)])
def test_no_verb_imports_another_verb(name):
    file = MODULES[name]
    others = {verb_of(m) for m in own_modules(imports(file, ast.walk(TREES[file])))} - {None, verb_of(name)}
    assert not others, f"{name} imports {', '.join(sorted(others))}"


def test_every_verb_has_a_file_of_its_name():
    assert {verb_of(n) for n in MODULES} - {None} == VERBS


def test_mlx_lm_has_one_door():
    doors = {f.name for f in FILES if any(n.split(".")[0] == "mlx_lm" for n in imports(f, ast.walk(TREES[f])))}
    assert doors == {"lm.py"}


LIGHT = ["cli", "cli_steps", "options", "show", "console", "errors", "machine", "inspect", "fit", "fit.planner"]


LIGHT += ["fit.footprint", "checkpoint", "arch", "packing", "report", "rundir", "status", "log"]


@pytest.mark.parametrize("module", LIGHT)
def test_light_modules_need_no_arrays(module):
    code = f"""
import sys, mlx_pare.{module}
sys.exit(", ".join(sorted({{"mlx", "numpy", "mlx_lm"}} & set(sys.modules))) or 0)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, f"mlx_pare.{module} imports {done.stderr}"


@pytest.mark.parametrize(
    "preload",
    [
        "",
        "import mlx_pare.pipeline.steps, mlx_pare.cli.main.main, mlx_pare.capacity.inspect, mlx_pare.reporting.report;",
    ],
)
def test_every_verb_is_a_function_of_the_package(preload):
    """Also after submodules of the same names were imported, which would otherwise take their place."""
    code = f"""{preload}
import types, mlx_pare
from mlx_pare import inspect
from mlx_pare import fit
from mlx_pare import calibrate
from mlx_pare import score
from mlx_pare import plan
from mlx_pare import reconstruct
from mlx_pare import prune
from mlx_pare import recover
from mlx_pare import evaluate
from mlx_pare import export
from mlx_pare import bench
from mlx_pare import report
from mlx_pare import run
import mlx_pare.capacity.planner, mlx_pare.planning.choose_units
for name in mlx_pare.__all__:
    value = getattr(mlx_pare, name)
    assert callable(value) and not isinstance(value, types.ModuleType), name
    assert value.__doc__, name
    assert name in dir(mlx_pare)
assert fit is mlx_pare.fit and prune.__module__ == "mlx_pare.prune"
assert set(mlx_pare.__all__) == {VERBS - {"check"} | {"fit", "run"}}
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


# ---- who may do what, and how long it may be ----


def test_only_console_prints():
    printing = {
        f.name
        for f in FILES
        for node in ast.walk(TREES[f])
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "print"
    }
    assert printing == {"console.py"}


def test_no_file_for_leftovers():
    assert not [
        f.name for f in PACKAGE.rglob("*") if f.stem.strip("_") in ("utils", "util", "common", "helpers", "misc")
    ]


@pytest.mark.parametrize("file", FILES, ids=lambda f: str(f.relative_to(PACKAGE)))
def test_lengths(file):
    assert len(file.read_text("utf-8").splitlines()) <= MAX_LINES
    long = [
        f"{node.name} ({node.end_lineno - node.lineno + 1} lines)"
        for node in ast.walk(TREES[file])
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.end_lineno - node.lineno >= MAX_FUNCTION
    ]
    assert not long


def public(file: Path) -> Iterator[ast.AST]:
    """The functions and classes of a module that others may use."""
    for node in TREES[file].body:
        if isinstance(node, DEFINITIONS) and not node.name.startswith("_"):
            yield node


@pytest.mark.parametrize("file", FILES, ids=lambda f: str(f.relative_to(PACKAGE)))
def test_public_names_say_what_they_are(file):
    if file.stat().st_size:
        assert ast.get_docstring(TREES[file]), "the file has no docstring"
    assert not [node.name for node in public(file) if not ast.get_docstring(node)], "without docstring"


# ---- the text around the code ----

ENDINGS = {".py", ".md", ".toml", ".txt", ".csv", ".json", ".jsonl", ".sh", ".yml", ".yaml", ".cfg", ".ini", ""}


def tracked() -> list[Path]:
    """The text files that git knows or would take."""
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True
    )
    files = [ROOT / line for line in listed.stdout.splitlines()] if listed.returncode == 0 else FILES
    return sorted(f for f in files if f.is_file() and f.suffix in ENDINGS and f != Path(__file__).resolve())


def test_readme_names_every_file():
    """The map is true in both directions, as far as a reader can check it: every file is there, once at least."""
    readme = (ROOT / "README.md").read_text("utf-8")
    folders = {f.parent.name for f in FILES} - {"mlx_pare"}
    wanted = {f.name for f in FILES if f.name != "__init__.py"} | {f"{folder}/" for folder in folders}
    missing = sorted(n for n in wanted if not re.search(rf"(?<![\w-]){re.escape(n)}", readme))
    assert not missing, f"README.md does not name {', '.join(missing)}"


CALLED = re.compile(r"\b(?:benchmarks|scripts|tests)/[\w/-]+\.(?:py|sh)\b")


@pytest.mark.parametrize("name", ["Makefile", "README.md", ".ci/run", "pyproject.toml", "benchmarks/*.py", "scripts/*"])
def test_fault_3_scripts_that_are_called_are_there(name):
    """What a Makefile, a command in the README or a script calls by its path."""
    for file in ROOT.glob(name):
        named = {found[0] for found in CALLED.finditer(file.read_text("utf-8"))}
        missing = sorted(path for path in named if not (ROOT / path).exists())
        assert not missing, f"{file.relative_to(ROOT)} calls {', '.join(missing)}"


FOREIGN = re.compile(
    r"/work/(?!\W)|/tmp/w\w|https?://(?:localhost|10\.|127\.|192\.168\.|172\.(?:1[6-9]|2\d|3[01])\.)"
    r"|(?:index-url|registry|find-links)\s*=\s*['\"]?https?://|artifactory|\bpypi\.(?!org\b)[\w-]+\.\w+|\.internal\b"
)


def test_no_machine_path_or_registry_is_named():
    files = tracked()
    assert len(files) > 30
    found = []
    for file in files:
        for number, line in enumerate(file.read_text("utf-8").splitlines(), 1):
            if match := FOREIGN.search(line):
                found.append(f"{file.relative_to(ROOT)}:{number}: {match[0]}")
    assert not found


@pytest.mark.parametrize(
    "line", ["cd /" + "work/main", "/" + "tmp/w1/x", "--index-url=https://mirror.example/simple", "a.internal"]
)
def test_the_search_for_foreign_names_finds_them(line):
    assert FOREIGN.search(line)


# ---- the rules themselves can fail ----


def test_reading_of_imports():
    source = "import a.b\nfrom . import lm\nfrom ..arch import Keep\ndef f():\n    from .prune import cut\n"
    file = PACKAGE / "plan" / "allocate.py"
    assert imports(file, at_import(ast.parse(source))) == {
        "a.b", "mlx_pare.planning.plan", "mlx_pare.planning.plan.lm", "mlx_pare.arch.describe", "mlx_pare.arch.Keep",
    }  # fmt: skip
    assert "mlx_pare.planning.plan.prune.cut" in imports(file, ast.walk(ast.parse(source)))
    assert own_modules(
        {"mlx_pare", "mlx_pare.planning.plan", "mlx_pare.planning.choose_units", "mlx_pare.planning.plan.Level"}
    ) == {"mlx_pare.planning.choose_units"}
