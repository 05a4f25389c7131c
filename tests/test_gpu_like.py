"""Parts of other test files once more, on the way that the code takes on a GPU (tests/support/gpu_like.py)."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest

ROOT = Path(__file__).resolve().parents[1]
# What Macs run: bfloat16, and packed matrices with bfloat16 scales. Tolerances of these tests are those of the CPU.
PARTS = {
    "stream/test_stream.py": "test_logits or embedding or spooled_is_the_same",
    "repair/test_reconstruct.py": "test_matrices and (llama or gemma3) and (bfloat16 or bits)",
    "recovery/test_recover.py": "bfloat16 or (test_recovery and llama)",
    "recovery/test_blockwise.py": "bfloat16 or (planted and qwen)",
    "planning/test_try_candidates.py": "test_kl and (llama or qwen2)",
    "scoring/test_calibrate.py": "llama and (bits or bfloat16)",
}


@pytest.fixture(scope="module")
def cases(tmp_path_factory) -> tuple[list[ElementTree.Element], str]:
    """What a process says of all parts, which imports everything once: its cases, and the end of its output."""
    wanted = " or ".join(f"({file.rpartition('/')[2]} and ({names}))" for file, names in PARTS.items())
    report = tmp_path_factory.mktemp("gpu") / "report.xml"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "gpu_like", "-p", "no:cacheprovider", "--tb=short"]
    paths = os.pathsep.join([str(ROOT), str(ROOT / "tests" / "support"), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [*command, f"--junitxml={report}", *(f"tests/{file}" for file in PARTS), "-k", wanted],
        cwd=ROOT, env={**os.environ, "PYTHONPATH": paths}, capture_output=True, text=True, timeout=900,
    )  # fmt: skip
    assert done.returncode in (0, 1), done.stdout[-4000:]  # 1: some test failed, which one is in the report
    return [*ElementTree.parse(report).getroot().iter("testcase")], done.stdout[-4000:]


@pytest.mark.parametrize("file", PARTS)
def test_as_on_a_gpu(file, cases):
    found, said = cases
    mine = [case for case in found if case.get("classname") == f"tests.{file.removesuffix('.py').replace('/', '.')}"]
    assert mine and not [case.get("name") for case in mine if len(case)], (
        said
    )  # a failure, an error or a skip lies in it


def test_no_case_belongs_to_no_part(cases):
    names = {f"tests.{file.removesuffix('.py').replace('/', '.')}" for file in PARTS}
    assert {case.get("classname") for case in cases[0]} == names
