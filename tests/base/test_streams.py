"""Terminals and files that cannot take what is said: full, gone, or of another encoding. Never a traceback."""

from __future__ import annotations

import errno
import io
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from mlx_pare.base import console

FULL = Path("/dev/full")
needs_full = pytest.mark.skipif(not FULL.exists(), reason="needs /dev/full (Linux)")


def call(*arguments, stdout=subprocess.PIPE, **environment: str) -> subprocess.CompletedProcess:
    """A command in a process of its own."""
    env = {**os.environ, **environment}
    command = [sys.executable, "-m", "mlx_pare", *map(str, arguments)]
    return subprocess.run(command, stdout=stdout, stderr=subprocess.PIPE, env=env, timeout=60)


COMMANDS = [
    ["doctor", "--json"], ["doctor"], ["status", "nowhere", "--json"], ["fit", "qwen3-8b", "--json"],
    ["fit", "--bogus", "--json"], ["--help"], ["fit", "--help"], ["doctor", "--json", "--quiet"],
]  # fmt: skip


@needs_full
@pytest.mark.parametrize("arguments", COMMANDS, ids=" ".join)
def test_f20_a_full_disk_behind_stdout_is_one_line(arguments):
    with FULL.open("wb") as full:
        done = call(*arguments, stdout=full)
    told = done.stderr.decode()
    lines = [line for line in told.splitlines() if line.startswith("mlx-pare: ")]
    assert len(lines) == 1 and told.endswith(f"{lines[0]}\n"), told
    assert "Traceback" not in told and "Exception ignored" not in told, told
    failed = "nowhere" in arguments or "--bogus" in arguments
    assert failed or "No space left" in lines[0]
    assert done.returncode == (2 if "--bogus" in arguments else 1)


@needs_full
def test_f20_a_full_disk_behind_stderr_changes_no_result():
    with FULL.open("wb") as full:
        command = [sys.executable, "-m", "mlx_pare", "inspect", "qwen3-8b"]
        done = subprocess.run([*command, "--json"], stdout=subprocess.PIPE, stderr=full, timeout=60)
        assert done.returncode == 0 and json.loads(done.stdout)["layers"] == 36
        done = subprocess.run([*command[:-1], "nowhere", "--json"], stdout=subprocess.PIPE, stderr=full, timeout=60)
        assert done.returncode == json.loads(done.stdout)["exit_code"] != 0


class _Gone(io.StringIO):
    """A stream that takes nothing."""

    def write(self, text: str) -> int:
        raise OSError(errno.EIO, "Input/output error")


def test_f20_talk_that_is_lost_does_not_stop_the_work(monkeypatch):
    """A terminal that is gone: the work goes on, and the end of the command says that the talk was lost."""
    monkeypatch.setattr(sys, "stdout", _Gone())
    monkeypatch.setattr(sys, "stderr", _Gone())
    monkeypatch.setattr(console, "_state", dict(console._state))
    console.configure()
    console.say("one")
    console.warn("two")
    console.error("three")
    with console.progress("four", 2) as bar:
        bar.advance()
    with pytest.raises(OSError, match="Input/output"):
        console.document({})


OTHERS = [
    dict(PYTHONIOENCODING="latin-1"),
    dict(PYTHONIOENCODING="ascii"),
    dict(PYTHONIOENCODING="cp1252"),
    dict(LC_ALL="C", PYTHONCOERCECLOCALE="0", PYTHONUTF8="0"),
]


@pytest.mark.parametrize("environment", OTHERS, ids=str)
@pytest.mark.parametrize(
    "arguments", [["doctor"], ["fit", "qwen3-8b"], ["run", "--help"], ["status", "日本"]], ids=" ".join
)
def test_f21_stdout_of_another_encoding(arguments, environment):
    done = call(*arguments, **environment)
    told = (done.stdout + done.stderr).decode("latin-1")
    assert "Traceback" not in told and "internal error" not in told and "UnicodeEncodeError" not in told, told
    assert done.returncode == (1 if "日本" in arguments else 0)
    assert arguments != ["doctor"] or "----" in told  # the rule of a table, in characters that are there


def test_f21_names_of_another_encoding_are_written_out(tmp_path):
    done = call("status", tmp_path / "日本", PYTHONIOENCODING="latin-1")
    assert b"\\u65e5\\u672c" in done.stderr and done.returncode == 1
    done = call("doctor", "--json", PYTHONIOENCODING="ascii")
    assert done.returncode == 0 and "versions" in json.loads(done.stdout)
