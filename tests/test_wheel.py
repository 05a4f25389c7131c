"""What a stranger installs: the wheel, in an environment of its own, far from the checkout.

The test environment has an editable install, which finds files that a wheel may lack. Here the wheel alone is
installed; only its dependencies are borrowed from the test environment, because they would take minutes to download.
"""

from __future__ import annotations

import ast
import json
import re
import subprocess
import sys
import sysconfig
import tomllib
import venv
import zipfile
from collections.abc import Iterator
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

# mlx-lm brings the first three and huggingface_hub the others; neither can do without them
TRANSITIVE = {"transformers", "jinja2", "tokenizers", "filelock", "tqdm"}


@pytest.fixture(scope="module", autouse=True)
def only_what_is_installed() -> Iterator[None]:
    """A PYTHONPATH that names a checkout would come before the wheel."""
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("PYTHONPATH", raising=False)
        yield


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """The wheel as `pip install .` builds it, from the files that git tracks: leavings of other builds do not count."""
    place = tmp_path_factory.mktemp("wheel")
    source = place / "source"
    for name in tracked("."):
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        (source / name).write_bytes((ROOT / name).read_bytes())
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--disable-pip-version-check", "--no-deps"]
    subprocess.run([*command, "--wheel-dir", place, source], check=True)
    (built,) = place.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory) -> Path:
    """An environment with the wheel in it: the path of its mlx-pare."""
    place = tmp_path_factory.mktemp("environment")
    venv.create(place, with_pip=False)
    command = [sys.executable, "-m", "pip", "--python", place, "install", "--quiet", "--disable-pip-version-check"]
    subprocess.run([*command, "--no-deps", wheel], check=True)
    (site,) = place.glob("lib/python*/site-packages")
    # a folder named in a .pth file lends its packages, but its own .pth files, such as ours, are not read
    (site / "borrowed.pth").write_text(sysconfig.get_paths()["purelib"] + "\n")
    return place / "bin" / "mlx-pare"


def tracked(below: str) -> list[str]:
    """Files that git tracks, relative to the root."""
    listed = subprocess.run(["git", "ls-files", "-z", below], cwd=ROOT, capture_output=True, check=True, text=True)
    return [name for name in listed.stdout.split("\0") if name and (ROOT / name).is_file()]


def called(installed: Path, tmp_path: Path, *arguments: str) -> str:
    done = subprocess.run([installed, *arguments], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_every_tracked_file_of_the_package_is_in_the_wheel(wheel):
    with zipfile.ZipFile(wheel) as archive:
        packed = set(archive.namelist())
    missing = [name for name in tracked("mlx_pare") if name not in packed]
    assert not missing
    assert len(packed) > 100


def test_the_environment_has_the_package_from_the_wheel(installed):
    code = "import mlx_pare; print(mlx_pare.__file__)"
    found = subprocess.run([installed.parent / "python", "-c", code], cwd="/", capture_output=True, text=True)
    assert Path(found.stdout.strip()).is_relative_to(installed.parents[1])


def test_fit_knows_the_catalogue_and_the_macs(installed, tmp_path):
    found = json.loads(called(installed, tmp_path, "fit", "qwen3-32b", "--mac", "m4-24gb", "--json"))
    (row,) = found["rows"]
    assert row["mac"] == "m4-10c-24gb" and row["weights_bytes"] > 15e9


def test_inspect_and_run_find_the_demo(installed, tmp_path):
    model = installed.parents[1].glob("lib/python*/site-packages/mlx_pare/demo/model").__next__()
    found = json.loads(called(installed, tmp_path, "inspect", str(model), "--json"))
    assert found["parameters"]["total"] == 8_917_248
    small = ("--samples", "4", "--length", "64", "--recover-steps", "0", "--widths", "even", "--trials", "0")
    called(installed, tmp_path, "run", str(model), "--out", "small", "--keep", "0.75", *small, "--quiet")
    assert (tmp_path / "small" / "report.md").is_file()


def test_everything_imported_is_declared():
    """What the package imports is among the dependencies, or an extra; an environment full of tools hides a gap."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = [*project["dependencies"], *project["optional-dependencies"]["llama"]]
    declared = {canonical(re.match(r"[\w.-]+", line)[0]) for line in wanted}
    providers = packages_distributions() | {"llama_cpp": ["llama-cpp-python"]}  # which may not be installed
    undeclared = {
        name
        for file in (ROOT / "mlx_pare").rglob("*.py")
        for name in imported(file)
        if name not in sys.stdlib_module_names and declared.isdisjoint(map(canonical, providers.get(name, [name])))
    }
    assert undeclared <= TRANSITIVE, undeclared - TRANSITIVE


def canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def imported(file: Path) -> set[str]:
    """Top names of the packages that a file imports, wherever in it."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level:
            found.add(node.module.partition(".")[0])
    return found - {"mlx_pare"}
