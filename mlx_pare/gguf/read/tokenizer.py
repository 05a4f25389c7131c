"""tokenizer.json and tokenizer_config.json from the metadata of a GGUF file: the reverse of gguf/write/tokenizer.py.

A file holds its tokens, the name of a pre-tokenizer, and either merges (byte-level BPE, "gpt2") or scores
(SentencePiece-style BPE, "llama"), from which merges follow. A file does not hold what llama.cpp does not do to text (a
normalization), so the result tokenizes as llama.cpp does.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ...base.errors import PareError
from ..header import Skipped
from ..tokenizers import CONTROL, DIGITS, GPT2, NORMAL, PRE_TOKENIZERS, SPACE, UNKNOWN, UNUSED, USER_DEFINED

MAX_SPLITS = 1 << 28  # characters of all tokens cut in two everywhere: gemma's have 20 million
NEVER = -1e8  # lower scores belong to tokens that no merge makes: gguf/write/tokenizer.py gives them -1e9
# Other names of the same pre-tokenizers, in llama_vocab::impl::load of llama.cpp src/llama-vocab.cpp
ALIASES = {
    "llama-bpe": ("llama3", "llama-v3", "falcon3", "pixtral"),
    "gpt-2": ("phi-2", "jina-es", "jina-de", "gigachat"),
    "qwen2": ("deepseek-r1-qwen",),
}
ADDS_BOS = ("llama-bpe",)  # ... that add a bos token if the file does not set it


@dataclass
class Files:
    """What will be written: two documents, and what differs from the original's tokenizer."""

    tokenizer: dict[str, Any]
    config: dict[str, Any]
    notes: list[str] = field(default_factory=list)

    def write(self, directory: Path) -> None:
        """Write tokenizer.json and tokenizer_config.json."""
        (directory / "tokenizer.json").write_text(json.dumps(self.tokenizer, ensure_ascii=False), "utf-8")
        (directory / "tokenizer_config.json").write_text(json.dumps(self.config, indent=1) + "\n", "utf-8")


def files(metadata: Mapping[str, Any], rows: int, length: int | None = None) -> Files:
    """Rebuild the tokenizer of a GGUF file.

    Args:
        metadata: from header.vocabulary.
        rows: of the embedding.
        length: tokens of the model's context; None: unknown.
    Returns:
        The documents to write, and notes.
    Raises:
        PareError: the tokenizer is damaged or of another kind.
    """
    facts = {key.removeprefix("tokenizer.ggml."): value for key, value in metadata.items()}
    kind = facts.get("model")
    if kind not in KINDS:
        raise PareError(
            f"the GGUF file has a tokenizer of the kind {str(kind)[:80]!r}, which cannot be rebuilt",
            f"supported are {', '.join(KINDS)}",
        )
    tokens, types = _tokens(facts, rows)
    ids = {role: _id(facts, f"{name}_token_id", len(tokens)) for role, name in ROLES.items()}
    model, steps, bos = KINDS[kind](facts, tokens, types, ids)
    vocab = {text: i for i, text in enumerate(tokens) if not _padding(i, text, types[i])}
    special = [_added(i, tokens[i], kind) for i, kind in enumerate(types) if kind in (CONTROL, UNKNOWN, USER_DEFINED)]
    adds = {role: _flag(facts, f"add_{role}_token", default) for role, default in (("bos", bos), ("eos", False))}
    document = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": special,
        **steps,
        "post_processor": _template(tokens, ids, adds),
        "model": {"type": "BPE", "dropout": None, "continuing_subword_prefix": None, "end_of_word_suffix": None}
        | {"fuse_unk": False, "byte_fallback": False, "unk_token": None, "vocab": vocab, **model},
    }
    notes = ["the file does not say whether the original tokenizer normalizes text (NFC): the rebuilt one does not"]
    return Files(document, _config(metadata, tokens, ids, adds, length), notes if kind == "gpt2" else [])


ROLES = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}


def _tokens(facts: Mapping[str, Any], rows: int) -> tuple[Sequence[str], Sequence[int]]:
    """Tokens and their types by id."""
    tokens = facts.get("tokens")
    if not isinstance(tokens, tuple) or not tokens or not isinstance(tokens[0], str):
        raise PareError("the GGUF file has no list of tokens", "export it again, with its vocabulary")
    if len(tokens) > rows:
        raise PareError(f"the GGUF file has {len(tokens)} tokens, and {rows} rows of the embedding", "export it again")
    if len(set(tokens)) < len(tokens):
        raise PareError("the GGUF file has two ids for one token, which a tokenizer.json cannot say")
    types = _each(facts, "token_type", len(tokens), NORMAL)
    return tokens, types


def _each(facts: Mapping[str, Any], key: str, count: int, otherwise: Any) -> Sequence[Any]:
    """One number per token; ``otherwise`` for all if the file has none."""
    found = facts.get(key)
    if found is None:
        return (otherwise,) * count
    if not isinstance(found, tuple) or len(found) != count or not isinstance(found[0], int | float):
        raise PareError(f"tokenizer.ggml.{key} of the GGUF file is not one number for each of {count} tokens")
    return found


def _id(facts: Mapping[str, Any], key: str, count: int) -> int | None:
    found = facts.get(key)
    return found if type(found) is int and 0 <= found < count else None


def _flag(facts: Mapping[str, Any], key: str, otherwise: bool) -> bool:
    found = facts.get(key)
    return found if isinstance(found, bool) else otherwise


def _padding(number: int, text: str, kind: int) -> bool:
    """Whether a token exists only because the embedding has a row for it."""
    return kind == UNUSED and text == f"[PAD{number}]"


def _added(number: int, text: str, kind: int) -> dict[str, Any]:
    """A token that is cut out of the text before the rest is split. No merge needs to make it."""
    plain = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    return {"id": number, "content": text, **plain, "special": kind != USER_DEFINED}


# ---- byte-level BPE ----


def _gpt2(facts: Mapping[str, Any], tokens: Sequence[str], types: Sequence[int], ids: Mapping) -> tuple:
    splits, ignore = _pre_tokenizer(facts.get("pre"))
    merges, known = facts.get("merges"), set(tokens)
    if not isinstance(merges, tuple) or not all(isinstance(merge, str) for merge in merges):
        raise PareError("the GGUF file has no list of merges", "export it again, with its vocabulary")
    pairs = [merge.split(" ") for merge in merges]
    wrong = next((p for p in pairs if len(p) != 2 or not known.issuperset((*p, "".join(p)))), None)
    if wrong is not None:
        raise PareError(f"the GGUF file merges {' '.join(wrong)[:80]!r}, which are not two tokens that make a third")
    last = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": GPT2 in splits}
    steps = [*(_step(split) for split in splits if split != GPT2), last]
    made = {"type": "Sequence", "pretokenizers": steps} if len(steps) > 1 else last
    decoder = {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True}
    model = {"merges": pairs, "ignore_merges": ignore}
    bos = _canonical(facts.get("pre")) in ADDS_BOS
    return model, {"normalizer": None, "pre_tokenizer": made, "decoder": decoder}, bos


def _canonical(name: Any) -> Any:
    return next((pre for pre, others in ALIASES.items() if name in others), name)


def _pre_tokenizer(name: Any) -> tuple[tuple[str, ...], bool]:
    """What splits the text, in order, and whether a word in the vocabulary is taken whole."""
    found = next((key for key, pre in PRE_TOKENIZERS.items() if pre == _canonical(name)), None)
    if found is None:
        said = "none" if name is None else repr(str(name)[:80])
        raise PareError(
            f"the pre-tokenizer of the GGUF file is {said}, which is not known here",
            f"known are {', '.join(PRE_TOKENIZERS.values())}: convert the original, with its tokenizer.json",
        )
    return found


def _step(split: str) -> dict[str, Any]:
    """One piece of a pre-tokenizer as tokenizer.json writes it."""
    if split == DIGITS:
        return {"type": "Digits", "individual_digits": True}
    return {"type": "Split", "pattern": {"Regex": split}, "behavior": "Isolated", "invert": False}


# ---- SentencePiece-style BPE ----


def _sentencepiece(facts: Mapping[str, Any], tokens: Sequence[str], types: Sequence[int], ids: Mapping) -> tuple:
    scores = _each(facts, "scores", len(tokens), 0.0)
    prefix = _flag(facts, "add_space_prefix", True)
    unknown = next((i for i, kind in enumerate(types) if kind == UNKNOWN), ids["unk"])
    replace = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
    before = [{"type": "Prepend", "prepend": SPACE}] if prefix else []
    back = {"type": "Replace", "pattern": {"String": SPACE}, "content": " "}
    after = [{"type": "Strip", "content": " ", "start": 1, "stop": 0}] if prefix else []
    model = {"merges": merges(tokens, types, scores), "byte_fallback": True, "fuse_unk": True}
    model["unk_token"] = None if unknown is None else tokens[unknown]
    steps = {"normalizer": {"type": "Sequence", "normalizers": [*before, replace]}, "pre_tokenizer": None}
    steps["decoder"] = {"type": "Sequence", "decoders": [back, {"type": "ByteFallback"}, {"type": "Fuse"}, *after]}
    return model, steps, True


def merges(tokens: Sequence[str], types: Sequence[int], scores: Sequence[float]) -> list[tuple[str, str]]:
    """List every pair of tokens that makes a token, in the order of the scores of what they make.

    SentencePiece, like llama.cpp, joins the neighbours whose result scores highest. Pairs that make the same token
    follow the ids of their parts, as in transformers convert_slow_tokenizer.generate_merges.

    Args:
        tokens: the texts by id.
        types: the kind of each token (gguf/tokenizers.py).
        scores: the score of each token.
    Returns:
        The pairs.
    Raises:
        PareError: the tokens are too long to be cut in two everywhere.
    """
    ids = {text: i for i, text in enumerate(tokens) if types[i] in (NORMAL, UNUSED, USER_DEFINED)}
    made = {text: i for text, i in ids.items() if types[i] == NORMAL and scores[i] > NEVER}
    if sum(len(text) ** 2 for text in made) > MAX_SPLITS:
        raise PareError(
            f"the GGUF file has tokens of up to {max(map(len, made))} characters, too many to make by merges"
        )
    found = []
    for text, i in made.items():
        pairs = [(text[:at], text[at:]) for at in range(1, len(text))]
        pairs = [pair for pair in pairs if pair[0] in ids and pair[1] in ids]
        found += [(-scores[i], i, ids[left], ids[right]) for left, right in pairs]
    return [(tokens[left], tokens[right]) for *_, left, right in sorted(found)]


KINDS: dict[str, Callable[..., tuple]] = {"gpt2": _gpt2, "llama": _sentencepiece}

# ---- special tokens and the chat template ----


def _template(tokens: Sequence[str], ids: Mapping[str, int | None], adds: Mapping[str, bool]) -> dict | None:
    """The post-processor that puts special tokens around a text; None if it adds none."""
    put = {role: ids[role] for role in ("bos", "eos") if adds[role] and ids[role] is not None}
    if not put:
        return None

    def around(*texts: str) -> list[dict[str, Any]]:
        sides = {role: [{"SpecialToken": {"id": tokens[i], "type_id": 0}}] for role, i in put.items()}
        inner = [{"Sequence": {"id": text, "type_id": 0}} for text in texts]
        return sides.get("bos", []) + inner + sides.get("eos", [])

    known = {tokens[i]: {"id": tokens[i], "ids": [i], "tokens": [tokens[i]]} for i in put.values()}
    return {"type": "TemplateProcessing", "single": around("A"), "pair": around("A", "B"), "special_tokens": known}


def _config(
    metadata: Mapping[str, Any],
    tokens: Sequence[str],
    ids: Mapping[str, int | None],
    adds: Mapping[str, bool],
    length: int | None,
) -> dict[str, Any]:
    template = metadata.get("tokenizer.chat_template")
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        **({"model_max_length": length} if length else {}),
        **{f"{role}_token": tokens[i] for role, i in ids.items() if i is not None},
        **{f"add_{role}_token": flag for role, flag in adds.items()},
        **({"chat_template": template} if isinstance(template, str) and not isinstance(template, Skipped) else {}),
    }
