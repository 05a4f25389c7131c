"""A run goes on whatever the files of mlx-pare are called: what it is known again by names no module."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from mlx_pare.options.settings import Settings
from mlx_pare.pipeline import run as pipeline
from mlx_pare.store.manifest import Manifest, read_manifest

PACKAGE = Path(pipeline.__file__).parents[1]
MODULES = {
    ".".join(file.relative_to(PACKAGE).with_suffix("").parts)
    for file in PACKAGE.rglob("*.py")
    if file.name not in ("__init__.py", "__main__.py")
}
CONTENT = re.compile(r"(?:quick:)?[0-9a-f]{16,64}|none|own")  # of a file, of rows, of a model


@pytest.fixture(scope="module")
def run(pico_models, two_texts, tmp_path_factory) -> Path:
    """A run of every step up to the pruned model and its measurement."""
    out = tmp_path_factory.mktemp("begun") / "run"
    settings = Settings(**two_texts, keep=0.75, length=32, samples=16, context=256, criterion="minitron", quick=True)
    pipeline.run(pico_models("llama", (4, 32)), out, settings)
    return out


@pytest.fixture(scope="module")
def manifest(run) -> Manifest:
    return read_manifest(run)


def texts_in(value: Any) -> Iterator[str]:
    """Every text in a JSON document, the keys as well."""
    if isinstance(value, dict):
        for key, inner in value.items():
            yield key
            yield from texts_in(inner)
    elif isinstance(value, list | tuple):
        for inner in value:
            yield from texts_in(inner)
    elif isinstance(value, str):
        yield value


def test_inputs_of_a_step_are_contents(manifest):
    assert len(manifest.steps) >= 6
    for name, record in manifest.steps.items():
        assert record.inputs, name
        for key, value in record.inputs.items():
            assert CONTENT.fullmatch(value), f"{name}: {key} = {value}"


def test_parameters_of_a_step_name_no_module(manifest):
    for name, record in manifest.steps.items():
        named = {text for text in texts_in(record.parameters) if "mlx_pare" in text or text in MODULES}
        assert not named, name
        assert not [text for text in texts_in(record.parameters) if text.endswith(".py")], name


def test_nothing_in_a_run_names_the_package(run):
    documents = [*run.rglob("*.json"), *run.rglob("*.toml")]
    assert len(documents) > 10
    assert not [str(file.relative_to(run)) for file in documents if "mlx_pare" in file.read_text("utf-8")]
    assert read_manifest(run).versions.keys().isdisjoint(MODULES)
