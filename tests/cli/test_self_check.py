"""doctor --check: it passes here, and a device that computes wrongly does not."""

from __future__ import annotations

import json

import mlx.core as mx
import pytest

from mlx_pare.cli import self_check


def test_this_device_passes(pare):
    done = pare("doctor", "--check", "--json")
    found = json.loads(done.out)["check"]
    assert done.code == 0 and found["passed"], [row for row in found["rows"] if row["passed"] is False]
    assert found["device"]["default"] and found["seconds"] > 0
    names = [row["what"] for row in found["rows"]]
    assert {*self_check.EXPECTED, "float32 products, GFLOP/s", "relative error of float32 products"} < {*names}


@pytest.fixture
def quick(monkeypatch) -> None:
    monkeypatch.setattr(self_check, "_job", lambda: [])
    monkeypatch.setattr(self_check, "_speed", lambda: [])


def test_rounded_products_fail(quick, monkeypatch, capsys):
    monkeypatch.setattr(self_check.lm, "product_error", lambda: 5e-4)
    found = self_check.self_check()
    assert not found["passed"] and found["rows"][0]["passed"] is False
    self_check.show(found)
    assert "do not trust results of this computer" in capsys.readouterr().err


def test_worse_packing_fails(quick, monkeypatch):
    real, calls = mx.quantize, []

    def coarse(array, **how):
        calls.append(how)
        words, *grid = real(array, **how)
        return (mx.zeros_like(words) if len(calls) % 2 else words, *grid)  # the device packs first, then the CPU

    monkeypatch.setattr(mx, "quantize", coarse)
    assert not self_check.self_check()["passed"]


def test_an_error_is_a_row(quick, monkeypatch):
    def broken():
        raise RuntimeError("[METAL] Command buffer execution failed: Insufficient Memory")

    broken.__name__ = "_job"
    monkeypatch.setattr(self_check, "_job", broken)
    found = self_check.self_check()
    assert not found["passed"] and "Insufficient Memory" in found["rows"][-1]["found"]
