"""Commands called in the test process, through the entry point; the fixture ``pare`` is everywhere (conftest.py)."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from typing import NamedTuple

import pytest

from mlx_pare.base import console
from mlx_pare.cli import main as cli


class Done(NamedTuple):
    """What a command did: its exit code, and what it wrote to stdout and stderr."""

    code: int
    out: str
    err: str

    @property
    def document(self) -> dict:
        return json.loads(self.out)

    @property
    def line(self) -> str:
        """The only line on stderr."""
        assert self.err.endswith("\n") and self.err.count("\n") == 1, self.err
        return self.err.strip()


@pytest.fixture
def pare(capsys, monkeypatch) -> Callable[..., Done]:
    """Call a command in this process, through the entry point."""

    def call(*arguments) -> Done:
        monkeypatch.setattr(sys, "argv", ["mlx-pare", *map(str, arguments)])
        capsys.readouterr()
        with monkeypatch.context() as patch, pytest.raises(SystemExit) as left:
            patch.setattr(sys, "stdout", sys.stdout)  # the command line moves it
            cli.main()
        return Done(left.value.code or 0, *capsys.readouterr())

    monkeypatch.setattr(console, "_state", dict(console._state))  # the streams of this test end with it
    return call
