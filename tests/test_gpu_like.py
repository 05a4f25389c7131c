"""Parts of other test files once more, on the way that the code takes on a GPU (tests/support/gpu_like.py)."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

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


@pytest.mark.parametrize("file", PARTS)
def test_as_on_a_gpu(file):
    command = [sys.executable, "-m", "pytest", "-q", "-p", "gpu_like", "-p", "no:cacheprovider", "--tb=short"]
    paths = os.pathsep.join([str(ROOT), str(ROOT / "tests" / "support"), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [*command, f"tests/{file}", "-k", PARTS[file]],
        cwd=ROOT, env={**os.environ, "PYTHONPATH": paths}, capture_output=True, text=True, timeout=500,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-4000:]
