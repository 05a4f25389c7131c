"""Asks stock servers about a file or directory that we wrote, as any client does, on this computer alone."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import socket
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from subprocess import DEVNULL, STDOUT, Popen
from typing import Any

from ..base import children
from ..base.errors import PareError
from ..base.plain_path import plain

START_SECONDS, ANSWER_SECONDS, END_SECONDS = 120.0, 120.0, 10.0
HOST = "127.0.0.1"
PROMPT, TOKENS = "Once upon a time", 16
LLAMA_SERVER = (
    "uvicorn",
    "fastapi",
    "starlette_context",
    "sse_starlette",
    "pydantic_settings",
)  # llama-cpp-python[server]


def mlx_lm(model: Path, chat: bool) -> dict[str, Any]:
    """Return what mlx_lm.server answers for a model directory; see ``ask``."""
    with plain(model) as name:
        command = [sys.executable, "-m", "mlx_lm", "server", "--model", str(name), "--host", HOST, "--port"]
        return ask("mlx_lm.server", command, chat)


def llama_cpp(gguf: Path, chat: bool) -> dict[str, Any]:
    """Return what llama.cpp's server answers for a GGUF file. It is llama-server if that is on the path, else that of
    llama-cpp-python. Without either, "served" is False and "reason" says so."""
    with plain(gguf) as name:
        if found := shutil.which("llama-server"):
            return ask("llama-server", [found, "-m", str(name), "--host", HOST, "--port"], chat)
        if importlib.util.find_spec("llama_cpp") and all(map(importlib.util.find_spec, LLAMA_SERVER)):
            where = ["--model", str(name), "--host", HOST, "--n_gpu_layers", "0", "--port"]
            return ask("llama_cpp.server", [sys.executable, "-m", "llama_cpp.server", *where], chat)
    return {"served": False, "reason": "there is no llama-server, and llama-cpp-python[server] is not installed"}


def ask(name: str, command: Sequence[str], chat: bool) -> dict[str, Any]:
    """Start a server, ask it as OpenAI's clients do, and end it.

    Args:
        name: of the server, for messages.
        command: starts the server; a free port is added.
        chat: ask for a chat, which needs a template; False: for the rest of a text.
    Returns:
        served, server, text, seconds.
    Raises:
        PareError: the server does not start, does not answer, or answers otherwise than such a server does; with its
            last line.
    """
    begun = time.monotonic()
    with _running(command) as (port, log, process):
        _wait(f"http://{HOST}:{port}/v1/models", name, log, process)
        what = {"messages": [{"role": "user", "content": PROMPT}]} if chat else {"prompt": PROMPT}
        path = "chat/completions" if chat else "completions"
        request = urllib.request.Request(
            f"http://{HOST}:{port}/v1/{path}",
            json.dumps({**what, "max_tokens": TOKENS, "temperature": 0}).encode(),
            {"Content-Type": "application/json"},
        )
        try:
            with urllib.request.urlopen(request, timeout=ANSWER_SECONDS) as answer:
                choice = json.load(answer)["choices"][0]
                text = choice["message"]["content"] if chat else choice["text"]
        except (OSError, ValueError, LookupError, TypeError) as error:
            raise PareError(f"{name} does not answer for it: {error}; it said: {_last(log)}") from error
    if not isinstance(text, str) or not text.strip():
        raise PareError(f"{name} answers with nothing")
    return {"served": True, "server": name, "text": text, "seconds": round(time.monotonic() - begun, 1)}


@contextmanager
def _running(command: Sequence[str]) -> Iterator[tuple[int, Path, Popen]]:
    """Run a server meanwhile; yields its port, the file of its output, and its process."""
    with socket.socket() as free:
        free.bind((HOST, 0))
        port = free.getsockname()[1]
    with tempfile.TemporaryDirectory() as scratch:
        log = Path(scratch) / "log"
        offline = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONUNBUFFERED": "1"}
        with log.open("wb") as output:
            process = children.start([*command, str(port)], stdin=DEVNULL, stdout=output, stderr=STDOUT, env=offline)
        try:
            yield port, log, process
        finally:
            children.end(process, END_SECONDS)


def _wait(url: str, name: str, log: Path, process: Popen) -> None:
    """Wait until the server answers at all. Raises PareError if it does not, or has ended."""
    end = time.monotonic() + START_SECONDS
    while process.poll() is None and time.monotonic() < end:
        try:
            urllib.request.urlopen(url, timeout=5).close()
            return
        except urllib.error.HTTPError:
            return
        except OSError:
            time.sleep(0.2)
    raise PareError(f"{name} does not start: {_last(log)}")


def _last(log: Path) -> str:
    lines = [line.strip() for line in log.read_text("utf-8", "replace").splitlines() if line.strip()]
    return (lines or ["nothing"])[-1][:300]
