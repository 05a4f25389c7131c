"""What stock servers answer for a file or directory that we wrote: asked as any client asks, on this computer alone."""

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
    """What mlx_lm.server answers for a model directory; see ``ask``."""
    with plain(model) as name:
        command = [sys.executable, "-m", "mlx_lm", "server", "--model", str(name), "--host", HOST, "--port"]
        return ask("mlx_lm.server", command, chat)


def llama_cpp(gguf: Path, chat: bool) -> dict[str, Any]:
    """What llama.cpp's server answers for a GGUF file: llama-server where it is on the path, else that of
    llama-cpp-python; where there is neither, "served" is False and "reason" says so."""
    with plain(gguf) as name:
        if found := shutil.which("llama-server"):
            return ask("llama-server", [found, "-m", str(name), "--host", HOST, "--port"], chat)
        if importlib.util.find_spec("llama_cpp") and all(map(importlib.util.find_spec, LLAMA_SERVER)):
            where = ["--model", str(name), "--host", HOST, "--n_gpu_layers", "0", "--port"]
            return ask("llama_cpp.server", [sys.executable, "-m", "llama_cpp.server", *where], chat)
    return {"served": False, "reason": "there is no llama-server, and llama-cpp-python[server] is not installed"}


def ask(name: str, command: Sequence[str], chat: bool) -> dict[str, Any]:
    """Start a server (``command``, to which a free port is added), ask it as OpenAI's clients do, for a chat where the
    model has a template, else for the rest of a text, and end it. Returns served, server, text, seconds.

    Raises PareError, with the last line of the server, when it does not answer, or not as such a server does.
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
    """(port, file of its output, process) of a server while it runs."""
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
    """Until the server answers at all. Raises PareError when it does not, or has ended."""
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
