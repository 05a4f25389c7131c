"""How the fuzzer changes sound inputs: JSON trees and GGUF rows by structure, anything by byte."""

from __future__ import annotations

import json
import math
import random
import struct
from typing import Any

from fuzz_inputs import packed_table
from fuzz_targets import HEADER, Target, text

NASTY: list[Any] = [
    None, True, False, 0, 1, -1, 2, 3, 7, 127, 255, 256, 4096, 2**31 - 1, 2**31, 2**32, 2**63 - 1, 2**63, 2**64,
    -(2**63), 10**9, 10**40, 10**4200, 0.0, -0.0, 0.5, 1e308, -1e308, 5e-324, math.nan, math.inf, -math.inf, "",
    "0", "x" * 3000, "\x1b[31mred\x1b[0m", "a\nb\rc\x00", "\ud800", "\u202eabc", "../../etc/passwd", "/dev/zero",
    "layer", "llama", "{{", "__proto__", [], {}, [[]], [0], [None, 1, "x"], [1] * 2000, {"a": {}},
    {"type": "Sequence"}, "sliding_attention", "full_attention", "mamba", "affine", "mxfp4", "F32", "F8_E4M3",
    "[bold]x[/]", "<script>", "$(id)", "`id`", "'; id",
]  # fmt: skip
INTERESTING = (0, 1, 2, 127, 128, 255, 256, 2**15, 2**16 - 1, 2**31 - 1, 2**31, 2**32 - 1, 2**63 - 1, 2**63, 2**64 - 1)


def nested(depth: int, of: Any = 0) -> Any:
    for i in range(depth):
        of = [of] if i % 2 else {"a": of}
    return of


class Mutator:
    """Changes inputs of one target, by a seed."""

    def __init__(self, target: Target, seed: int):
        self.target, self.random = target, random.Random(seed)
        self.seeds = [(json.dumps(value) if isinstance(value, dict | list) else None, value) for value in target.seeds]
        self.keys = sorted({key for value in target.seeds for key in self._keys(value)})

    def _keys(self, value: Any) -> set[str]:
        if isinstance(value, dict):
            return {str(key) for key in value} | {k for v in value.values() for k in self._keys(v)}
        return {k for v in value[:20] for k in self._keys(v)} if isinstance(value, list) else set()

    def make(self) -> bytes:
        """An input: most often a seed with a few changes of its structure, sometimes of its bytes, sometimes both."""
        draw, target = self.random, self.target
        (dumped, chosen), how = draw.choice(self.seeds), draw.random()
        raw = None
        if how < 0.7 and dumped:
            tree = json.loads(dumped)
            for _ in range(draw.choice((1, 1, 1, 2, 3, 6))):
                tree = self.change(tree)
            try:
                raw = target.write(tree)
                if target.kinds and isinstance(tree, dict) and any(k in tree for k in HEADER):
                    raw = packed_table(tree)
            except (ArithmeticError, TypeError, ValueError, LookupError, AttributeError, struct.error, RecursionError):
                raw = None  # the change made it something that cannot be written
        if raw is None or how < 0.15:
            raw = raw if raw is not None else target.write(chosen)
            raw = self.damage(raw)
        return bytes([draw.choice(target.kinds)]) + raw if target.kinds else raw

    def change(self, tree: Any) -> Any:
        """One value of a JSON tree replaced, removed, doubled or moved."""
        draw, path, node = self.random, [], tree
        while isinstance(node, dict | list) and node and (not path or draw.random() < 0.75):
            key = draw.choice(list(node)) if isinstance(node, dict) else draw.randrange(len(node))
            path.append((node, key))
            node = node[key]
        if not path:
            return self.value()
        parent, key = path[-1]
        what = draw.randrange(8)
        if what == 0:
            del parent[key]
        elif what == 1 and isinstance(parent, dict):
            parent[draw.choice(self.keys) if self.keys and draw.random() < 0.8 else str(self.value())] = self.value()
        elif what == 2 and isinstance(parent, list):
            parent[:] = parent * draw.choice((2, 3, 50)) if len(parent) < 200 else parent[: len(parent) // 2]
        elif what == 3 and type(node) in (int, float) and abs(node) < 1e300:
            parent[key] = draw.choice((node + 1, node - 1, -node, node * 2, node * 1000, float(node)))
        elif what == 4 and isinstance(parent, dict) and len(parent) > 1:
            parent[key] = parent[draw.choice(list(parent))]
        elif what == 5 and isinstance(node, str) and node:
            parent[key] = self.damage(text(node)).decode("utf-8", "replace")[:5000]
        else:
            parent[key] = self.value()
        return tree

    def value(self) -> Any:
        draw = self.random
        if draw.random() < 0.02:
            return nested(draw.choice((3, 50, 70, 400)), self.random.choice(NASTY))
        return json.loads(json.dumps(draw.choice(NASTY)))  # a copy: it may be changed again

    def damage(self, raw: bytes) -> bytes:
        """A few bytes changed, taken out, put in or repeated; numbers written over."""
        draw, out = self.random, bytearray(raw)
        for _ in range(draw.choice((1, 1, 2, 4, 16))):
            at, what = draw.randrange(len(out) + 1), draw.randrange(8)
            end = min(len(out), at + draw.choice((1, 2, 4, 8, 64)))
            if what == 0:
                del out[at:end]
            elif what == 1:
                out[at:at] = draw.randbytes(draw.choice((1, 4, 16)))
            elif what == 2:
                out[at:at] = out[at:end] * draw.choice((1, 2, 100))
            elif what == 3 and draw.random() < 0.3:
                del out[at:]
            elif what == 4:
                width = draw.choice((1, 2, 4, 8))
                out[at : at + width] = (draw.choice(INTERESTING) % 256**width).to_bytes(width, "little")
            elif what == 5:
                out[at:end] = draw.choice((b"[", b"{", b'"', b"\\u", b"}", b"]", b",", b":", b"1e999", b"NaN", b"\xff"))
            elif at < len(out):
                out[at] = draw.choice((out[at] ^ (1 << draw.randrange(8)), draw.randrange(256), 0, 255))
        return bytes(out[: 1 << 20])
