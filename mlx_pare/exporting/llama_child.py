"""llama.cpp in a process of its own: reads what is asked of a GGUF file as JSON from stdin, and writes the answers.

It imports nothing of this package, because every check of a file starts it. ``llama_cpp._ask`` is its other half.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np


def opened(request: dict[str, Any]) -> Any:
    """Open the file: its vocabulary alone, or as a model that computes on the CPU, with a float32 KV cache and the
    logits of every token."""
    from llama_cpp import Llama

    if "tokens" not in request:
        return Llama(request["gguf"], vocab_only=True)
    size = max(len(request["tokens"]) + request.get("count", 0), 32)
    return Llama(
        request["gguf"],
        n_ctx=size,
        n_batch=size,
        n_ubatch=size,
        n_gpu_layers=0,
        offload_kqv=False,
        op_offload=False,
        logits_all=True,
        flash_attn=False,
        n_threads=request["threads"],
        n_threads_batch=request["threads"],
        type_k=0,  # GGML_TYPE_F32
        type_v=0,
    )


def main(request: dict[str, Any]) -> None:
    """Answer a request of ``llama_cpp._ask``: "answer" and "logits" name the files to write."""
    model, found = opened(request), {}
    if "strings" in request:
        found["ids"] = [model.tokenize(s.encode(), add_bos=False, special=False) for s in request["strings"]]
    if "tokens" in request:
        tokens = request["tokens"]
        model.eval(tokens)
        np.save(request["logits"], model._scores[: len(tokens)].astype(np.float32))
        found["greedy"] = []
        for count in range(request.get("count", 0)):
            if count:
                model.eval(found["greedy"][-1:])
            found["greedy"].append(int(model._scores[len(tokens) + count - 1].argmax()))
    Path(request["answer"]).write_text(json.dumps(found))


if __name__ == "__main__":
    main(json.load(sys.stdin))
