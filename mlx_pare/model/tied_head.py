"""A head that is stored although config.json says that the embedding is the head: the same numbers, or a trained head.

mlx-lm drops such a head. That loses nothing if the head is a copy of the embedding. If it is not, the training of a
merged adapter is lost.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from functools import lru_cache

from ..tensors.safetensors import Entry

STEP = 8 << 20  # bytes that are compared together


def differs(entries: Mapping[str, Entry], embedding: str, head: str = "lm_head") -> bool:
    """Tell whether a stored head is not the embedding, bit for bit.

    Args:
        entries: the tensors of a checkpoint, by name.
        embedding: the module of the embedding, such as model.embed_tokens.
        head: the module of the head.
    Returns:
        False if no head is stored, or if each of its tensors has the bytes, type and shape of the embedding's.
    """
    there, own = (
        {name.removeprefix(f"{module}."): entry for name, entry in entries.items() if name.startswith(f"{module}.")}
        for module in (head, embedding)
    )
    return bool(there) and (there.keys() != own.keys() or not all(_same(there[leaf], own[leaf]) for leaf in there))


def _same(one: Entry, other: Entry) -> bool:
    alike = (one.dtype, one.shape) == (other.dtype, other.shape)
    return alike and _same_bytes(one, other, *(entry.file.stat().st_mtime_ns for entry in (one, other)))


@lru_cache
def _same_bytes(one: Entry, other: Entry, *changed: int) -> bool:
    """Whether two tensors have the same bytes. The file times in ``changed`` keep a cached answer from outliving a
    change."""
    with one.file.open("rb") as a, other.file.open("rb") as b:
        for at in range(0, one.nbytes, STEP):
            size = min(STEP, one.nbytes - at)
            if os.pread(a.fileno(), size, one.start + at) != os.pread(b.fileno(), size, other.start + at):
                return False
    return True
