"""Shared by all tests: an environment without surprises, and tiny models that are built once per session."""

from __future__ import annotations

import gc
import os
import signal
import sys

os.environ["MLX_DISABLE_COMPILE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["HF_HUB_OFFLINE"] = "1"
# Where no compiled files may be written, each of hundreds of processes compiles 250 modules, and assertions, once more.
os.environ["PYTHONDONTWRITEBYTECODE"] = ""

from collections.abc import Callable, Iterator
from pathlib import Path

import mlx.core as mx
import numpy as np
import pico
import pytest
from commands import pare  # noqa: F401 a fixture
from hub_server import HubServer

from mlx_pare.base import console

sys.dont_write_bytecode = False
# A suite that was started in the background ignores these, and so would every process that it starts.
for _signal, _default in ((signal.SIGINT, signal.default_int_handler), (signal.SIGHUP, signal.SIG_DFL)):
    if signal.getsignal(_signal) is signal.SIG_IGN:
        signal.signal(_signal, _default)


@pytest.fixture(scope="module", autouse=True)
def short_collections() -> None:
    """Set aside what was collected: a full collection goes through it all, and some tests ask for dozens."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session", autouse=True)
def no_waiting_for_the_disk() -> Iterator[None]:
    """No test survives a power cut, and flushing every small file to a slow disk takes minutes in all."""
    real, os.fsync = os.fsync, lambda handle: None
    yield
    os.fsync = real


@pytest.fixture(autouse=True)
def console_of_a_new_process() -> None:
    """No test reads what another one left: warnings that are given once, and --json, which moves messages to stderr."""
    console._warned.clear()
    console._state.update(json=False, quiet=False, stdout=sys.stdout, lost=None)


@pytest.fixture
def server(monkeypatch, tmp_path) -> Iterator[HubServer]:
    """The hub that huggingface_hub talks to, its cache and login, for one test."""
    from huggingface_hub import close_session, constants

    with HubServer() as running:
        home = tmp_path / "home"
        places = {"HF_HUB_CACHE": home / "hub", "HF_ASSETS_CACHE": home / "assets", "HF_TOKEN_PATH": home / "token"}
        for name, value in ({k: str(v) for k, v in places.items()} | {"ENDPOINT": running.url}).items():
            monkeypatch.setattr(constants, name, value)
        template = running.url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)  # made of ENDPOINT at import
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_IMPLICIT_TOKEN", False)
        monkeypatch.setenv("NO_PROXY", "*")
        for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HF_OIDC_RESOURCE"):
            monkeypatch.delenv(name, raising=False)
        close_session()
        yield running
    close_session()


@pytest.fixture(scope="session")
def two_texts(tmp_path_factory) -> dict[str, str]:
    """The first half of our own text and a part of the second, as the settings ``data`` and ``test_data`` of a run."""
    folder, lines = tmp_path_factory.mktemp("text"), pico.TEXT.read_text("utf-8").split("\n")
    texts = {"data": "\n".join(lines[: len(lines) // 2]), "test_data": "\n".join(lines[len(lines) // 2 :])[:4000]}
    for name, text in texts.items():
        (folder / f"{name}.txt").write_text(text, "utf-8")
    return {name: str(folder / f"{name}.txt") for name in texts}


@pytest.fixture(scope="session")
def pico_models(tmp_path_factory) -> Callable[..., Path]:
    """``pico_models(family, packed=None, tokenizer="bpe", dtype=mx.float32, **config)``: path of a cached model.

    ``packed`` is (bits, group size) or the name of a mode, applied by mlx-lm's own code. The directories are shared:
    copy before changing.
    """
    root = tmp_path_factory.mktemp("pico")
    made: dict[tuple, Path] = {}

    def model(
        family: str = "llama",
        packed: tuple[int, int] | str | None = None,
        tokenizer: str = "bpe",
        dtype: mx.Dtype = mx.float32,
        **config,
    ) -> Path:
        key = (family, packed, tokenizer, str(dtype), repr(sorted(config.items())))
        if key not in made:
            source = packed and model(family, None, tokenizer, dtype, **config)
            directory = root / f"{len(made)}-{family}"
            if source:
                how = (None, None, packed) if isinstance(packed, str) else packed
                made[key] = pico.quantize(source, directory, *how)
            else:
                made[key] = pico.make(directory, family, tokenizer, dtype, **config)
        return made[key]

    return model


@pytest.fixture(scope="session")
def pico_stats(tmp_path_factory) -> Callable[[Path], Path]:
    """``pico_stats(model)``: statistics of a model on a few rows of text drawn by lot."""
    made: dict[Path, Path] = {}

    def stats(model: Path) -> Path:
        if model not in made:
            from mlx_pare.scoring.calibrate import calibrate
            from mlx_pare.text.corpus import Rows

            made[model] = tmp_path_factory.mktemp("stats")
            calibrate(model, Rows.full(np.random.default_rng(0).integers(0, 500, (8, 24))), made[model])
        return made[model] / "stats.safetensors"

    return stats
