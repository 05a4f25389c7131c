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
sys.path.insert(0, str(ROOT / "scripts"))

from house_numbers import arrows, at_import, between_rooms, circles, imports, modules, room, running_back  # noqa: E402

PACKAGE = ROOT / "mlx_pare"
MODULES = modules(ROOT)
FILES = list(MODULES.values())
TREES = {f: ast.parse(f.read_text("utf-8")) for f in FILES}
ARROWS = arrows(ROOT)
MAX_LINES, MAX_FUNCTION, MAX_FILES = 400, 60, 12
DEFINITIONS = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)

# Wing: the wings it may import, from the ground to the roof. The folders in arch and gguf have lines of their own.
MAY_IMPORT = {
    "base": "",
    "tensors": "base",
    "options": "base tensors",
    "arch": "base tensors",
    "model": "base tensors arch",
    "store": "base tensors options model",
    "gguf": "base tensors arch model store",
    "sources": "base tensors arch model store gguf",
    "lm": "base tensors arch model sources",
    "text": "base options model store lm",
    "stream": "base tensors arch model lm text",
    "pruning": "base tensors arch model store sources lm",
    "capacity": "base tensors options arch model gguf sources pruning",
    "evaluation": "base options arch model store sources lm text stream capacity",
    "tasks": "base model store sources lm text capacity evaluation",
    "gates": "base store evaluation",
    "scoring": "base tensors arch model store sources lm text stream evaluation",
    "repair": "base tensors arch model store sources lm text stream pruning evaluation",
    "planning": "base tensors options arch model store sources lm text stream pruning evaluation repair",
    "routing": "base options arch model store text stream pruning planning",
    "recovery": "base tensors options arch model store sources lm text stream pruning evaluation",
    "reporting": "base arch model store sources pruning capacity evaluation gates",
    "exporting": "base tensors options arch model store gguf sources lm text stream reporting",
    "pipeline": "base options arch model store gguf sources lm text "
    "stream pruning capacity evaluation gates scoring repair planning routing recovery reporting exporting",
    "cli": "base tensors options arch model store gguf sources "
    "lm text pruning capacity evaluation tasks reporting exporting pipeline",
}
FOLDERS = {  # folder in a wing: the folders of the same wing that it may import
    "arch": "arch.families",
    "arch.families": "arch",
    "gguf": "",
    "gguf.read": "gguf",
    "gguf.write": "gguf",
}
FACES = {"arch", "lm"}  # wings whose __init__.py hands names on; the others are empty
VERBS = {
    "inspect", "fit", "calibrate", "score", "plan", "reconstruct", "prune", "recover", "evaluate", "export", "bench",
    "report", "status", "run",
}  # fmt: skip


def wing_files(wing: str) -> list[str]:
    """The modules of a wing, those of its folders as well."""
    return [name for name in MODULES if room(name) == wing]


def folder_of(module: str) -> str:
    """mlx_pare.gguf.read.config -> gguf.read; a face belongs to its folder."""
    parts = module.split(".")[1:]
    return ".".join(parts if MODULES[module].name == "__init__.py" else parts[:-1])


# ---- who imports whom ----


def in_the_top_folder() -> set[str]:
    """Files and folders, without those of which only compiled files are left."""
    files = (path.relative_to(PACKAGE).parts for path in PACKAGE.rglob("*") if path.is_file())
    return {parts[0] for parts in files if "__pycache__" not in parts}


def test_the_top_folder_holds_wings_and_nothing_else():
    assert in_the_top_folder() == {*MAY_IMPORT, "demo", "__init__.py", "__main__.py", "api.py"}


@pytest.mark.parametrize("wing", MAY_IMPORT)
def test_a_wing_imports_only_what_it_may(wing):
    """All imports count, those inside functions as well: they are there for the start-up time, not for circles."""
    allowed = {wing, *MAY_IMPORT[wing].split()}
    wrong = [
        f"{name} imports {other}" for name in wing_files(wing) for other in ARROWS[name] if room(other) not in allowed
    ]
    assert not wrong
    used = {room(other) for name in wing_files(wing) for other in ARROWS[name]} - {wing}
    assert used == allowed - {wing}, "a wing that is allowed and not used"


def test_wings_import_downwards():
    order = list(MAY_IMPORT)
    for wing, allowed in MAY_IMPORT.items():
        assert all(order.index(other) < order.index(wing) for other in allowed.split()), wing


@pytest.mark.parametrize("folder", FOLDERS)
def test_folders_of_one_wing_import_only_what_they_may(folder):
    wing, allowed = folder.split(".")[0], {folder, *FOLDERS[folder].split()}
    mine = [name for name in wing_files(wing) if folder_of(name) == folder]
    wrong = {(name, other) for name in mine for other in ARROWS[name] if room(other) == wing} - {
        (name, other) for name in mine for other in ARROWS[name] if folder_of(other) in allowed
    }
    assert mine and not wrong


def test_no_circles():
    assert not circles(ARROWS)
    rooms = between_rooms(ARROWS)
    assert not circles(rooms) and not running_back(rooms)


def test_families_are_registered_in_one_place():
    """A family's file knows the vocabulary alone, and only describe.py and what leaves uneven layers know families."""
    for name, others in ARROWS.items():
        if any(other.startswith("mlx_pare.arch.families.") for other in others):
            assert name == "mlx_pare.arch.describe" or folder_of(name) == "arch.families", name
        if folder_of(name) == "arch.families":
            parts = {f"mlx_pare.arch.{part}" for part in ("axes", "parent", "spec", "rows", "rope")}
            known = parts | {"mlx_pare.base.errors"}
            assert others <= known | {n for n in MODULES if folder_of(n) == "arch.families"}, name


def registered() -> set[str]:
    """The names by which families are registered, as config.json has them."""
    from mlx_pare.arch import described_types

    return set(described_types())


FAMILIES_ARE_NAMED_IN = ("arch", "arch.families", "gguf", "gguf.read", "gguf.write")
FORMATS = "mlx_pare.model.foreign_formats"  # names those whose weights mlx-lm itself unpacks from other formats


@pytest.mark.parametrize("file", FILES, ids=lambda f: str(f.relative_to(PACKAGE)))
def test_no_family_is_named_outside_of_its_tables(file):
    name = next(n for n, f in MODULES.items() if f == file)
    if folder_of(name) in FAMILIES_ARE_NAMED_IN or name == FORMATS:
        return
    named = {
        node.value for node in ast.walk(TREES[file]) if isinstance(node, ast.Constant) and isinstance(node.value, str)
    }
    assert not named & registered()


def test_mlx_lm_has_one_door():
    doors = {
        room(name)
        for name, file in MODULES.items()
        if any(n.split(".")[0] == "mlx_lm" for n in imports(name, file.name == "__init__.py", ast.walk(TREES[file])))
    }
    assert doors == {"lm"}


LIGHT = [
    "arch", "arch.axes", "arch.cut", "arch.describe", "arch.families", "arch.families.dense", "arch.families.gemma",
    "arch.families.hybrid", "arch.families.latent", "arch.families.mamba", "arch.families.moe",
    "arch.families.other_dense", "arch.families.post_norm", "arch.keep", "arch.rope", "arch.rows", "arch.spec",
    "arch.uneven", "base", "base.children", "base.console", "base.errors", "base.frozen_clock", "base.log",
    "base.machine", "base.markdown", "base.optional", "base.plain_path", "base.units", "base.untrusted", "capacity",
    "capacity.advice", "capacity.fit", "capacity.form", "capacity.inspect", "capacity.macs", "capacity.memory",
    "capacity.planner", "capacity.speed", "capacity.storage", "capacity.subject", "cli", "cli.app",
    "cli.export_command", "cli.help_page", "cli.interrupts", "cli.main", "cli.models_command", "cli.step_commands",
    "cli.tables", "cli.unused", "gguf", "gguf.added_tokens", "gguf.architectures", "gguf.header", "gguf.quant_mixes",
    "gguf.read", "gguf.read.config", "gguf.special_cases", "gguf.tokenizers", "gguf.types", "gguf.uneven_layers",
    "gguf.write", "model.checkpoint", "model.directory", "model.footprint", "model.hub_name", "model.tokenizer_files",
    "options", "options.option", "options.recipe_file", "options.settings", "options.values", "pipeline.status",
    "pruning.layout", "pruning.plan_file", "pruning.reach", "pruning.survivors", "reporting.card", "reporting.report",
    "reporting.verdict", "sources", "sources.catalogue", "sources.download", "sources.hub_cache", "sources.hub_fetch",
    "sources.hub_files", "sources.hub_gguf", "sources.hub_reader", "sources.open_model", "sources.resolve",
    "store.manifest", "store.rundir", "store.schema", "store.step_files", "tensors.packing", "tensors.safetensors",
]  # fmt: skip


def test_light_modules_need_no_arrays():
    """One process imports them all, and names the first that brings what is heavy."""
    code = f"""
import importlib, sys
for name in {LIGHT}:
    importlib.import_module("mlx_pare." + name)
    if heavy := sorted({{"mlx", "numpy", "mlx_lm"}} & set(sys.modules)):
        sys.exit(f"mlx_pare.{{name}} imports {{', '.join(heavy)}}")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


def test_every_verb_is_a_function_of_the_package():
    """No folder has the name of a verb, so the name never means a module."""
    assert not VERBS & in_the_top_folder()
    code = f"""
import types, mlx_pare
from mlx_pare import {", ".join(sorted(VERBS))}
import mlx_pare.capacity.planner, mlx_pare.planning.plan, mlx_pare.cli.main
assert mlx_pare.__all__ == {sorted(VERBS)}
for name in mlx_pare.__all__:
    value = getattr(mlx_pare, name)
    assert callable(value) and not isinstance(value, types.ModuleType), name
    assert value.__doc__ and value.__name__ == name and name in dir(mlx_pare), name
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


def test_faces_only_hand_names_on():
    for name, file in MODULES.items():
        if file.name == "__init__.py" and name != "mlx_pare":
            kinds = {type(node) for node in TREES[file].body}
            allowed = {ast.Expr, ast.ImportFrom, ast.Assign} if name.split(".")[1] in FACES else set()
            assert kinds <= allowed, name


# ---- who may do what, and how long it may be ----


def test_only_console_prints():
    printing = {
        name
        for name, file in MODULES.items()
        for node in ast.walk(TREES[file])
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "print"
    }
    assert printing == {"mlx_pare.base.console"}


def test_no_file_for_leftovers():
    assert not [
        f.name for f in PACKAGE.rglob("*") if f.stem.strip("_") in ("utils", "util", "common", "helpers", "misc")
    ]


def test_folders_can_be_taken_in_at_a_glance():
    folders = {file.parent for file in FILES} - {PACKAGE}
    counts = {str(f.relative_to(PACKAGE)): len([x for x in f.glob("*.py") if x.name != "__init__.py"]) for f in folders}
    assert max(counts.values()) <= MAX_FILES, counts


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


ARRAYS = ("mx.array", "np.ndarray", "Rows")


def unexplained(file: Path) -> Iterator[str]:
    """Public functions that take or return arrays, or take more than two arguments, and do not say what these are. The
    docstring of a command is its help, where every option has a text."""
    for place in [TREES[file], *(node for node in public(file) if isinstance(node, ast.ClassDef))]:
        for node in place.body:
            if not isinstance(node, ast.FunctionDef) or node.name.startswith("_"):
                continue
            if any(isinstance(d, ast.Call) and getattr(d.func, "id", "") == "command" for d in node.decorator_list):
                continue
            every = (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs)
            taken = [argument for argument in every if argument.arg not in ("self", "cls")]
            types = " ".join(ast.unparse(t) for t in (*(a.annotation for a in taken), node.returns) if t)
            needed = "Args:" if taken else "Returns:"
            if (len(taken) > 2 or any(name in types for name in ARRAYS)) and needed not in ast.get_docstring(node):
                yield node.name


@pytest.mark.parametrize("file", FILES, ids=lambda f: str(f.relative_to(PACKAGE)))
def test_arguments_are_explained(file):
    assert not list(unexplained(file))


@pytest.mark.parametrize("wing", MAY_IMPORT)
def test_tests_mirror_the_wings(wing):
    assert list((ROOT / "tests" / wing).glob("test_*.py"))


# ---- the text around the code ----

ENDINGS = {".py", ".md", ".toml", ".txt", ".csv", ".json", ".jsonl", ".sh", ".yml", ".yaml", ".cfg", ".ini", ""}


def tracked() -> list[Path]:
    """The text files that git knows or would take."""
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True
    )
    files = [ROOT / line for line in listed.stdout.splitlines()] if listed.returncode == 0 else FILES
    return sorted(f for f in files if f.is_file() and f.suffix in ENDINGS and f != Path(__file__).resolve())


@pytest.mark.parametrize("wing", [*MAY_IMPORT, "demo"])
def test_the_readme_says_what_every_wing_is(wing):
    """One line each in the map of the house."""
    readme = (ROOT / "README.md").read_text("utf-8")
    assert len(re.findall(rf"^- `{wing}/`: \w", readme, re.MULTILINE)) == 1


CALLED = re.compile(r"\b(?:benchmarks|scripts|tests)/[\w/-]+\.(?:py|sh)\b")


@pytest.mark.parametrize("name", ["Makefile", "README.md", ".ci/run", "pyproject.toml", "benchmarks/*.py", "scripts/*"])
def test_fault_3_scripts_that_are_called_are_there(name):
    """What a Makefile, a command in the README or a script calls by its path."""
    for file in (path for path in ROOT.glob(name) if path.is_file()):
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
    module = "mlx_pare.planning.goal"
    assert imports(module, False, at_import(ast.parse(source))) == {
        "a.b", "mlx_pare.planning", "mlx_pare.planning.lm", "mlx_pare.arch", "mlx_pare.arch.Keep",
    }  # fmt: skip
    assert "mlx_pare.planning.prune.cut" in imports(module, False, ast.walk(ast.parse(source)))


def test_circles_and_arrows_that_run_back_are_found():
    graph = {"a": {"b"}, "b": {"c"}, "c": {"b"}, "d": {"a", "c"}}
    assert circles(graph) == [["b", "c"]]
    assert running_back(graph) in ([("b", "c")], [("c", "b")])
    assert not circles({"a": {"b"}, "b": set()}) and not running_back({"a": {"b"}, "b": set()})
    assert {room("mlx_pare.gguf.read.config"), room("mlx_pare.cli.main")} == {"gguf", "cli"}


# ---- what Metal refuses, or does otherwise than the CPU ----


def dotted(node: ast.AST) -> str:
    """``mx.linalg.qr`` of such an expression; "" of any other."""
    if isinstance(node, ast.Attribute):
        return f"{dotted(node.value)}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else ""


def calls() -> Iterator[tuple[Path, str, ast.Call]]:
    for file, tree in TREES.items():
        for node in ast.walk(tree):
            if isinstance(node, ast.Call):
                yield file, dotted(node.func), node


def test_decompositions_are_asked_of_the_cpu():
    """They have no kernels on Metal."""
    given = [(f, name, [k.arg for k in node.keywords]) for f, name, node in calls() if name.startswith("mx.linalg.")]
    assert not [(f, name) for f, name, keywords in given if "stream" not in keywords]
    streams = {ast.unparse(node.args[0]) for _, name, node in calls() if name == "mx.stream"}
    assert streams <= {"mx.cpu"}


def test_numpy_memory_is_copied():
    """mx.asarray may adopt it on Metal, and buffers are used again here."""
    assert not [(f, name) for f, name, _ in calls() if name == "mx.asarray"]


def test_one_place_writes_to_the_drive():
    """On macOS os.fsync leaves it in the drive's cache (machine.to_disk). A spool need not survive a power cut."""
    assert {f.name for f, name, _ in calls() if name == "os.fsync"} == {"machine.py", "spool.py"}


def test_other_threads_do_not_compute():
    """The streams of MLX belong to the thread that made them."""
    threaded = [f for f, tree in TREES.items() if "threading" in imported(tree)]
    assert len(threaded) > 2 and not [f for f in threaded if "mlx" in imported(TREES[f])]


def imported(tree: ast.AST) -> set[str]:
    """The top-level names of the packages that a file imports."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name.partition(".")[0] for alias in node.names}
        if isinstance(node, ast.ImportFrom) and not node.level:
            found.add(node.module.partition(".")[0])
    return found
