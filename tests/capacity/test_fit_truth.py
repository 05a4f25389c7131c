"""The fit planner against what others measured on real Macs: benchmarks/measured, each case within its stated error."""

import sys
from pathlib import Path
from statistics import mean

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))

import fit_accuracy as truth

from mlx_pare.capacity import macs, planner, speed
from mlx_pare.capacity.form import Form
from mlx_pare.capacity.macs import Budget
from mlx_pare.capacity.memory import Needs, Use
from mlx_pare.capacity.subject import open_subject
from mlx_pare.tensors.packing import Packing

GIB = 2**30
Q4 = Form(Packing(4, 64))


def errors(cells):
    found = [abs(cell.off) for cell in cells]
    return mean(found), max(found)


def row(name, form, mac, macos=26, **use):
    needs, weights = truth.model(name, Use(**use), form)
    return planner.assess(needs, weights, macs.find(mac), Budget(macos))


# ---- memory ----


@pytest.mark.parametrize("cell", list(truth.memory_cells()), ids=lambda cell: cell.name.strip())
def test_peaks_of_memory(cell):
    assert cell.predicted == pytest.approx(cell.measured, abs=cell.allowed)


def test_there_are_cases_enough():
    assert len(list(truth.memory_cells())) == 19
    assert len(truth.m4_pro_cells("mlx")) == len(truth.m4_pro_cells("llama.cpp")) == 16
    assert len(list(truth.llama2_cells())) > 130 and len(list(truth.llama3_cells())) > 75


def test_the_slope_that_lm_studio_logs():
    """Qwen3.8-27B has the shape of Qwen3.5-27B: 65536 bytes of cache and 98304 of scores per token (chunk 2048)."""
    needs, _ = truth.model("qwen3.5-27b", Use(208384), Q4)
    assert needs.cache.growing * 2 == 65536
    assert needs.scores(208384, 1) == 98304 * 208384


def test_a_quantized_cache_raises_the_peak():
    """mlx-lm issue 1587: Llama-3.2-3B with 4 bits at 32k peaks higher with a quantized cache than without, not so the
    cache itself."""
    plain, small = row("llama-3.2-3b", Q4, "m4-max-64gb", context=32768), None
    for bits in (8, 4):
        small = row("llama-3.2-3b", Q4, "m4-max-64gb", context=32768, kv_bits=bits)
        assert small["total_bytes"] > plain["total_bytes"] and small["kv_bytes"] < 0.6 * plain["kv_bytes"]
    short = {kv: row("llama-3.2-3b", Q4, "m4-max-64gb", context=4096, kv_bits=kv)["total_bytes"] for kv in (None, 8)}
    assert short[None] == short[8]  # before 5000 tokens nothing is quantized


# GPU-Benchmarks-on-LLM-Inference (May 2024, so macOS 14): what ran, what did not, what ran from the disk
RUNS = [
    ("llama-3-8b", "q4_k_m", "m1-7c-8gb", 4096, True),
    ("llama-3-8b", "q4_k_m", "m1-7c-8gb", 8192, False),
    ("llama-3-8b", "f16", "m1-7c-8gb", 512, False),
    ("llama-2-7b", "f16", "m3-10c-16gb", 512, False),  # ran at 3.61 instead of 6.7 tokens/s
    ("llama-3-70b", "q4_0", "m3-max-40c-48gb", 512, False),  # ran at 3.11 tokens/s
    ("llama-3-70b", "q4_k_m", "m3-max-40c-64gb", 8192, True),  # 5.60 tokens/s
    ("llama-3-8b", "f16", "m1-max-32c-64gb", 8192, True),
    ("llama-3-70b", "q4_k_m", "m1-max-32c-64gb", 8192, True),
    ("llama-3-70b", "f16", "m2-ultra-76c-192gb", 8192, True),
]


@pytest.mark.parametrize("name, kind, mac, context, runs", RUNS)
def test_what_ran_and_what_did_not(name, kind, mac, context, runs):
    found = row(name, Form(gguf=kind), mac, 14, context=context, runtime="llama.cpp", flash=False)
    assert found["fits"] == runs, found
    assert found["verdict"] == ("over" if not runs else found["verdict"])


# GiB of files, llama.cpp tools/quantize/README.md and discussion 4167
FILES = [("llama-2-7b", "f16", 12.55), ("llama-2-7b", "q8_0", 6.67), ("llama-2-7b", "q4_0", 3.56)]


@pytest.mark.parametrize("name, kind, gib", FILES)
def test_sizes_of_gguf_files(name, kind, gib):
    """Within a thousandth, or what two decimals leave open."""
    nbytes = open_subject(name, Form(gguf=kind)).weights.nbytes
    assert nbytes / GIB == pytest.approx(gib, abs=max(0.001 * gib, 0.005))


# ---- speed ----


@pytest.mark.parametrize("runtime", ["mlx", "llama.cpp"])
def test_decoding_on_an_m4_pro(runtime):
    """Fitted on one half of the models, judged on the other; and what is shipped agrees with the fit."""
    share, seconds, cells = truth.judged(runtime)
    average, worst = errors(cells)
    assert average <= 0.08 and worst <= 0.20
    average, worst = errors([cell for cell, *_ in truth.m4_pro_cells(runtime)])
    assert average <= 0.08 and worst <= 0.20
    shipped = speed.constants(runtime, macs.find("m4-pro-24gb"))
    assert shipped == (pytest.approx(share, rel=0.03), pytest.approx(seconds, rel=0.25))


@pytest.mark.parametrize("runtime", ["mlx", "llama.cpp"])
def test_hybrids_and_experts_lie_within_the_band_that_is_printed(runtime):
    for cell, *_ in truth.m4_pro_cells(runtime, "other"):
        assert abs(cell.off) <= speed.ERROR_ELSEWHERE, cell.name


@pytest.mark.parametrize("what", ["decode", "prefill"])
def test_llama_cpp_on_every_chip(what):
    for cells in (truth.llama2_cells(), truth.llama3_cells()):
        average, _ = errors([cell for cell in cells if cell.name.endswith(what)])
        assert average <= 0.15


def test_the_fit_finds_planted_constants():
    """A planted truth comes back exactly."""
    share, seconds, bandwidth = 0.8, 1e-4, 273e9
    planted = [
        (truth.Cell("", 1 / (nbytes / (share * bandwidth) + layers * seconds), 0), nbytes, layers)
        for nbytes, layers in ((1e9, 16), (4e9, 36), (8e9, 32), (2e10, 64))
    ]
    assert truth.solve(planted, bandwidth) == (pytest.approx(share), pytest.approx(seconds))


def test_an_empty_use_is_the_usual_one():
    assert Needs(open_subject("qwen3-4b", Q4).arch).runtime == "mlx"
