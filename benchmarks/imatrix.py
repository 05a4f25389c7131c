"""What an importance matrix brings, in llama.cpp itself, and whether `fit` knows the size of every file.

    python benchmarks/imatrix.py --model DIR --data TEXT --test TEXT --work DIR [--kinds q4_k_m,q3_k_m] [--out FILE]

For every type: written without an importance matrix, with ours (one streamed pass) and with one collected by llama.cpp
(the callback that tools/imatrix uses) from the same rows of tokens. Perplexity by llama.cpp with a float32 KV cache,
one window at a time; "loss to none" is the mean difference of the windows' losses, in nats, with its standard error.
Bytes: as `mlx-pare fit --gguf` says (with a matrix, as `export --dry-run` does), and on the disk.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import replace
from pathlib import Path

import llama_eval
import numpy as np

from mlx_pare import lm
from mlx_pare.base import console
from mlx_pare.capacity.fit import fit
from mlx_pare.capacity.form import Form
from mlx_pare.exporting import importance_matrix
from mlx_pare.exporting.export import export
from mlx_pare.gguf.quant_mixes import NEEDS_MATRIX
from mlx_pare.gguf.write import imatrix_file
from mlx_pare.gguf.write.quantizer import PLAIN
from mlx_pare.gguf.write.size import measured
from mlx_pare.model.checkpoint import Checkpoint
from mlx_pare.text import corpus


def theirs(model: Path, rows: corpus.Rows, work: Path) -> imatrix_file.Importance:
    """The matrix that llama.cpp collects while it runs the model in float32."""
    file = work / "f32.gguf"
    if not file.exists():
        export(model, file, "f32")
    sums = llama_eval.importance(file, rows.tokens)
    return imatrix_file.Importance(sums, dict.fromkeys(sums, float(rows.total)), ("text",), rows.count, rows.length)


def apart(one: imatrix_file.Importance, other: imatrix_file.Importance) -> float:
    """Largest relative difference of an entry between two matrices."""
    return max(
        float((np.abs(one.sums[name] - other.sums[name]) / np.maximum(other.sums[name], 1e-12)).max())
        for name in other.sums
    )


def compare(model: Path, kinds: list[str], matrices: dict, test: corpus.Rows, work: Path) -> list[list[str]]:
    """Rows of the table: type, matrix, bytes by fit and on the disk, perplexity, difference to none."""
    found = []
    for kind in kinds:
        plain = None
        for name, matrix in matrices.items():
            if matrix is None and kind in NEEDS_MATRIX:
                continue
            file = work / f"{kind}-{name.replace(' ', '-')}.gguf"
            file.unlink(missing_ok=True)
            done = export(model, file, kind, matrix)
            if matrix is None:
                said = fit(model, ["m4-24gb"], form=Form(gguf=kind))["file_bytes"]
            else:
                said = measured(Checkpoint(model), kind, matrix).nbytes
            loss = llama_eval.perplexity(file, test.tokens)
            difference = "" if plain is None else paired(loss - plain)
            plain = loss if plain is None else plain
            fallen = ", ".join(f"{change}: {n}" for change, n in done["fallback_types"].items()) or "none"
            row = [kind, name, f"{said:,}", f"{done['bytes']:,}", f"{np.exp(loss.mean()):.3f}", difference, fallen]
            found.append(row)
            console.say(" | ".join(row))
            if kind in PLAIN:
                break
    return found


def paired(differences: np.ndarray) -> str:
    """Mean and standard error over windows."""
    return f"{differences.mean():+.4f} ± {differences.std(ddof=1) / len(differences) ** 0.5:.4f}"


def main() -> None:
    """Measure one model."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    for name in ("--model", "--data", "--test", "--work"):
        parser.add_argument(name, type=Path, required=True)
    parser.add_argument("--kinds", default="f16,q8_0,q6_k,q4_k_m,q3_k_m,q2_k,q4_0,iq4_xs")
    parser.add_argument("--rows", type=int, default=32, help="of the matrix")
    parser.add_argument("--windows", type=int, default=64, help="of the test")
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--name", help="of the model in the table")
    parser.add_argument("--out", type=Path)
    asked = parser.parse_args()
    asked.work.mkdir(parents=True, exist_ok=True)
    tokenizer = lm.tokenizer(asked.model)
    rows, test = (
        corpus.windows(tokenizer, corpus.read(text, tokenizer), asked.length, count)
        for text, count in ((asked.data, asked.rows), (asked.test, asked.windows))
    )
    start = time.perf_counter()
    ours = replace(importance_matrix.measure(asked.model, rows, "text"), name="imatrix.gguf")
    spent = time.perf_counter() - start
    collected = theirs(asked.model, rows, asked.work)
    matrices = {"none": None, "ours": ours, "llama.cpp's": collected}
    table = compare(asked.model, asked.kinds.split(","), matrices, test, asked.work)
    lines = [
        f"`{asked.name or asked.model.name}`: importance matrices of {rows.count} x {rows.length} tokens of "
        f"{asked.data.name} (ours in {spent:.0f} s; largest relative difference to llama.cpp's in one of the "
        f"{len(ours.sums)} matrices {apart(ours, collected):.1e}); perplexity on {test.count} x {test.length} tokens "
        f"of {asked.test.name}",
        "",
        "| type | importance matrix | bytes by fit | bytes on disk | perplexity | loss to none | fell back |",
        "|---|---|---|---|---|---|---|",
        *(f"| {' | '.join(row)} |" for row in table),
    ]
    console.say("\n".join(lines))
    if asked.out:
        asked.out.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
