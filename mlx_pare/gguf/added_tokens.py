"""Added tokens that absorb the white space next to them, and how llama.cpp treats them.

A GGUF file has no place for that. llama.cpp does it for Phi-3 only, which it recognizes by the name of the model.
Source: llama_vocab::impl::load in llama.cpp src/llama-vocab.cpp, which sets the attributes of tokens.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from typing import Any

PHI3 = re.compile(r"(phi)(-?)(3)", re.IGNORECASE)  # in general.name
KEEP = ("<unk>", "<s>", "<|endoftext|>")  # in Phi-3 these keep the white space behind them, all others lose it
NEEDED = (*KEEP, "</s>")  # without one of these such a file does not load


def as_phi3(added: Collection[Mapping[str, Any]], tokens: Collection[str]) -> bool:
    """Whether llama.cpp reads a model's added tokens as its tokenizer.json means them if it takes it for Phi-3.

    Args:
        added: entries of added_tokens in tokenizer.json, of tokens that are in the file.
        tokens: the texts of all tokens in the file.
    Returns:
        Whether it does.
    """
    right = all(bool(t.get("rstrip")) == (t["content"] not in KEEP) for t in added)
    other = any(t.get("lstrip") or t.get("single_word") for t in added)
    return right and not other and set(NEEDED) <= set(tokens) and any(t.get("rstrip") for t in added)


def name_for(name: str, phi3: bool) -> str:
    """The general.name of a file. llama.cpp takes it for Phi-3 if, and only if, ``phi3``."""
    if phi3:
        return name if PHI3.search(name) else f"phi-3 {name}"
    return PHI3.sub(r"\1_\3", name)


def unlike(added: Collection[Mapping[str, Any]]) -> tuple[str, list[str]] | None:
    """What llama.cpp does differently with added tokens, and with which; None if nothing."""
    strips = [t["content"] for t in added if t.get("lstrip") or t.get("rstrip")]
    words = [t["content"] for t in added if t.get("single_word")]
    if not (strips or words):
        return None
    listed = ", ".join((strips or words)[:3]) + (", ..." if len(strips or words) > 3 else "")
    if strips:
        what = f"llama.cpp keeps the white space beside {listed}, which tokenizer.json takes away"
    else:
        what = f"llama.cpp finds {listed} inside of words, where tokenizer.json does not"
    return f"{what}: chat prompts may become other tokens there", [*strips, *words]
