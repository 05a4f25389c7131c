"""The tokenizer section of a GGUF, from tokenizer.json and tokenizer_config.json alone.

llama.cpp tokenizes with its own code, and learns from the file only which of its pre-tokenizers to use. A wrong choice
loads, runs and mis-tokenizes silently. So the choices are a literal table, and anything else is an error.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from ...base.errors import PareError
from ...base.untrusted import check_links, read_json
from ...model.tokenizer_files import MAX_TOKENIZER, TOKENIZER_BUDGET
from .. import added_tokens
from ..tokenizers import BYTE, CONTROL, DIGITS, GPT2, NORMAL, PRE_TOKENIZERS, SPACE, UNKNOWN, UNUSED, USER_DEFINED

_BYTE_TOKEN = re.compile(r"<0x([0-9A-F]{2})>")


@dataclass(frozen=True)
class Note:
    """A difference that llama.cpp cannot avoid: what it is, and whether a text may show it."""

    text: str
    shows: Callable[[str], bool]


DECOMPOSED = Note(
    "llama.cpp does not apply the NFC normalization: decomposed accents become other tokens",
    lambda text: not unicodedata.is_normalized("NFC", text),
)
TWO_SPACES = Note(
    "llama.cpp adds a space in front of texts that already begin with one", lambda text: text.startswith(" ")
)


@dataclass
class Tokenizer:
    """The content of the section.

    ``tokens`` and ``types``: by id. ``known``: differences that llama.cpp cannot avoid. ``phi3``: whether the file
    needs a name by which llama.cpp takes it for Phi-3 (gguf/added_tokens.py).
    """

    model: str  # llama.cpp's tokenizer.ggml.model: "gpt2" (byte-level BPE) or "llama" (SentencePiece-style)
    pre: str
    tokens: list[str]
    types: list[int]
    merges: list[str] = field(default_factory=list)
    scores: list[float] = field(default_factory=list)
    space_prefix: bool | None = None
    known: list[Note] = field(default_factory=list)
    phi3: bool = False

    @property
    def notes(self) -> list[str]:
        """The known differences, for people."""
        return [note.text for note in self.known]

    def foreseen(self, text: str) -> bool:
        """Whether llama.cpp may read a text as other tokens because of a known difference."""
        return any(note.shows(text) for note in self.known)


def write(writer: Any, directory: Path, rows: int, config: Mapping[str, Any]) -> Tokenizer:
    """Add the tokenizer of a model directory to a file.

    Args:
        writer: a gguf.GGUFWriter.
        directory: the model directory.
        rows: of the embedding; a shorter vocabulary is padded with unused tokens.
        config: the config.json, for ids of special tokens that tokenizer_config.json does not name.
    Returns:
        What was written.
    Raises:
        PareError: llama.cpp would read the tokenizer differently, or it is damaged.
    """
    with _damage(directory):
        found, raw, settings = _opened(directory, rows)
        _add(writer, found)
        _add_special(writer, raw, settings, config, found.tokens)
        if template := _chat_template(directory, settings):
            writer.add_chat_template(template)
        return found


def check(directory: Path, rows: int, config: Mapping[str, Any]) -> Tokenizer:
    """Find what ``write`` would write, and write nothing. Raises as ``write``.

    Args:
        directory: the model directory.
        rows: of the embedding.
        config: the config.json.
    Returns:
        What would be written.
    """
    with _damage(directory):
        found, raw, settings = _opened(directory, rows)
        _special_ids(raw, settings, config, found.tokens)
        return found


@contextmanager
def _damage(directory: Path) -> Iterator[None]:
    """Turn errors from files of another shape than the tokenizers library writes into PareErrors."""
    try:
        yield
    except (TypeError, ValueError, LookupError, AttributeError) as error:
        raise PareError(
            f"the tokenizer of {directory} is damaged: {type(error).__name__}, {str(error)[:200]}",
            "download or copy it again",
        ) from error


def _opened(directory: Path, rows: int) -> tuple[Tokenizer, Mapping[str, Any], Mapping[str, Any]]:
    """The section, tokenizer.json and tokenizer_config.json of a model directory."""
    check_links(directory)
    file, settings = directory / "tokenizer.json", directory / "tokenizer_config.json"
    if not file.exists():
        raise PareError(
            f"{directory} has no tokenizer.json, and GGUF files are made from nothing else",
            "save the tokenizer with transformers (AutoTokenizer.from_pretrained(...).save_pretrained(...))",
        )
    raw = read_json(file, "tokenizer", MAX_TOKENIZER, TOKENIZER_BUDGET)
    return read(raw, rows, str(file)), raw, read_json(settings, "tokenizer config") if settings.is_file() else {}


def _add(writer: Any, found: Tokenizer) -> None:
    writer.add_tokenizer_model(found.model)
    writer.add_tokenizer_pre(found.pre)
    writer.add_token_list(found.tokens)
    writer.add_token_types(found.types)
    if found.scores:
        writer.add_token_scores(found.scores)
    if found.merges:
        writer.add_token_merges(found.merges)
    if found.space_prefix is not None:
        writer.add_add_space_prefix(found.space_prefix)


def read(raw: Mapping[str, Any], rows: int, where: str) -> Tokenizer:
    """Convert a tokenizer.json to what llama.cpp needs.

    Args:
        raw: the content of tokenizer.json.
        rows: of the embedding.
        where: the file, for messages.
    Returns:
        The tokenizer section.
    Raises:
        PareError: llama.cpp would read the tokenizer differently.
    """
    model = raw.get("model") or {}
    if model.get("type") != "BPE":
        raise PareError(f"{where} is a {model.get('type')} tokenizer, which is not supported", "supported is BPE")
    if model.get("continuing_subword_prefix") or model.get("end_of_word_suffix") or model.get("dropout"):
        raise PareError(f"{where} marks subwords with a prefix, a suffix or dropout, which llama.cpp does not know")
    tokens, types, beside = _tokens(raw, rows, where)
    added = [token for token in raw.get("added_tokens") or () if token["id"] < rows]
    phi3 = added_tokens.as_phi3(added, tokens)
    if not phi3 and (other := added_tokens.unlike(added)):
        beside.append(Note(other[0], lambda text: any(content in text for content in other[1])))
    merges = [_pair(m) for m in model.get("merges", ())]
    if model.get("byte_fallback"):
        found = _sentencepiece(raw, tokens, types, merges, where)
        return replace(found, known=[*found.known, *beside], phi3=phi3)
    pre, known = pre_tokenizer(raw, where)
    # llama.cpp splits a merge at its space, so spaces inside tokens are written as byte-level BPE writes them
    joined = [" ".join(part.replace(" ", chr(ord(" ") + 256)) for part in pair) for pair in merges]
    return Tokenizer("gpt2", pre, tokens, types, merges=joined, known=[*known, *beside], phi3=phi3)


def _pair(merge: Any) -> tuple[str, str]:
    left, right = merge.split(" ") if isinstance(merge, str) else merge
    if not (isinstance(left, str) and isinstance(right, str)):
        raise TypeError("merges are pairs of texts")
    return left, right


def _tokens(raw: Mapping[str, Any], rows: int, where: str) -> tuple[list[str], list[int], list[Note]]:
    """Texts and types by id, and notes on tokens that are left out. Unused tokens fill holes and the rest up to
    ``rows``.

    Added tokens beyond the rows belong to other models of the family (an image token), or were never trained (a pad
    token): llama.cpp's own converter leaves them out as well. Raises PareError for ordinary tokens beyond the rows.
    """
    ordinary = {i: text for text, i in raw["model"]["vocab"].items()}
    added = {token["id"]: token for token in raw.get("added_tokens") or ()}
    by_id = {i: (text, NORMAL) for i, text in ordinary.items()}
    by_id |= {i: (t["content"], CONTROL if t.get("special") else USER_DEFINED) for i, t in added.items()}
    if not all(type(i) is int and i >= 0 and isinstance(text, str) for i, (text, _) in by_id.items()):
        raise TypeError("tokens are texts, their ids whole numbers")
    if any(i >= rows and (i not in added or by_id[i][0] != text) for i, text in ordinary.items()):
        raise PareError(
            f"{where} has ids up to {max(by_id)}, the embedding has {rows} rows: they do not belong together"
        )
    left_out = [by_id.pop(i)[0] for i in sorted(by_id) if i >= rows]
    tokens, types, names = [], [], {text for text, _ in by_id.values()}
    for i in range(rows):
        text, kind = by_id.get(i) or (_free(f"[PAD{i}]", names), UNUSED)
        tokens.append(text)
        types.append(kind)
    if len(set(tokens)) != rows:
        seen: set[str] = set()
        repeated = next(t for t in tokens if t in seen or seen.add(t))
        raise PareError(f"{where} has two ids for {repeated!r}, which llama.cpp cannot load")
    return tokens, types, [_without_rows(left_out)] if left_out else []


def _free(name: str, taken: set[str]) -> str:
    """A name for a token that is not taken yet."""
    while name in taken:
        name += "_"
    return name


def _without_rows(contents: Sequence[str]) -> Note:
    """The note on added tokens that are left out."""
    listed = ", ".join(contents[:3]) + (", ..." if len(contents) > 3 else "")
    return Note(
        f"{len(contents)} added tokens have no row in the embedding and are left out: {listed}",
        lambda text: any(content in text for content in contents),
    )


# ---- byte-level BPE ----


def pre_tokenizer(raw: Mapping[str, Any], where: str) -> tuple[str, list[Note]]:
    """llama.cpp's name for how a byte-level tokenizer.json splits text, and what will differ. Raises PareError if it
    has none."""
    pieces = [piece for step in _steps(raw.get("pre_tokenizer"), "pretokenizers") for piece in _pieces(step)]
    key = (tuple(p for p in pieces if p != "bytes"), bool(raw["model"].get("ignore_merges")))
    if pieces[-1:] != ["bytes"] or key not in PRE_TOKENIZERS:
        described = " then ".join(map(repr, pieces)) or "nothing"
        raise PareError(
            f"{where} splits text by {described} (ignore_merges {key[1]}), which is no pre-tokenizer known here",
            "llama.cpp would tokenize it silently wrong under any other name; please report the model",
        )
    normalizers = [step["type"] for step in _steps(raw.get("normalizer"), "normalizers")]
    if set(normalizers) - {"NFC"}:
        raise PareError(f"{where} normalizes text by {', '.join(normalizers)}, which llama.cpp does not do")
    return PRE_TOKENIZERS[key], [DECOMPOSED] if normalizers else []


def _steps(node: Mapping[str, Any] | None, key: str) -> Sequence[Mapping[str, Any]]:
    if not node:
        return []
    return [inner for n in node[key] for inner in _steps(n, key)] if node["type"] == "Sequence" else [node]


def _pieces(step: Mapping[str, Any]) -> list[str]:
    """What one pre-tokenizer splits by; "bytes" marks the byte-level alphabet, which must come last."""
    kind = step["type"]
    if kind == "ByteLevel" and not step.get("add_prefix_space", True):
        return [GPT2, "bytes"] if step.get("use_regex", True) else ["bytes"]
    if kind == "Split" and step.get("behavior") == "Isolated" and not step.get("invert"):
        return [step["pattern"].get("Regex") or repr(step["pattern"])]
    if kind == "Digits" and step.get("individual_digits"):
        return [DIGITS]
    return [str(dict(step))]


# ---- SentencePiece-style BPE ----


def _sentencepiece(raw: Mapping[str, Any], tokens: list[str], types: list[int], merges: list, where: str) -> Tokenizer:
    prefix, known = _space_prefix(raw, where)
    ranks: dict[str, int] = {}
    for rank, (left, right) in enumerate(merges):
        ranks.setdefault(left + right, rank)
    unknown = raw["model"].get("unk_token")
    missing = {f"<0x{b:02X}>" for b in range(256)} - set(tokens)
    if missing:
        raise PareError(f"{where} falls back to bytes but lacks {min(missing)}, without which llama.cpp stops")
    scores, kinds = [], []
    for text, kind in zip(tokens, types, strict=True):
        # llama.cpp joins the neighbours whose result scores highest, so the score is the negative rank of the merge.
        # What no merge makes (single characters, special tokens) must never win.
        scores.append(float(-ranks[text]) if text in ranks else -1e9)
        kinds.append(UNKNOWN if text == unknown else BYTE if kind == NORMAL and _BYTE_TOKEN.fullmatch(text) else kind)
    return Tokenizer("llama", "default", tokens, kinds, scores=scores, space_prefix=prefix, known=known)


def _space_prefix(raw: Mapping[str, Any], where: str) -> tuple[bool, list[Note]]:
    """Whether a space is put in front of the text. Raises PareError if llama.cpp treats spaces differently."""
    spaces = [dict(step) for step in _steps(raw.get("normalizer"), "normalizers")]
    splits = [dict(step) for step in _steps(raw.get("pre_tokenizer"), "pretokenizers")]
    replace = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
    prepend = {"type": "Prepend", "prepend": SPACE}
    no_split = {"type": "Split", "pattern": {"String": " "}, "behavior": "MergedWithPrevious", "invert": False}
    if spaces in ([replace], [prepend, replace]) and splits in ([], [no_split]):  # no space is left to split at
        return prepend in spaces, []
    meta = splits[0] if len(splits) == 1 else {}
    known = {"type": "Metaspace", "replacement": SPACE, "split": False}
    if not spaces and known.items() <= meta.items():
        scheme = meta.get("prepend_scheme", "always")
        return scheme != "never", [TWO_SPACES] if scheme != "never" else []
    raise PareError(
        f"{where} treats spaces by {spaces} and {splits}, which is not known here",
        "llama.cpp would tokenize it silently wrong; please report the model",
    )


# ---- special tokens and the chat template ----


def _add_special(writer: Any, raw: Mapping, settings: Mapping, config: Mapping, tokens: list[str]) -> None:
    for role, found in _special_ids(raw, settings, config, tokens).items():
        getattr(writer, f"add_{role}_token_id")(found)
    for role in ("bos", "eos"):  # always written: left out, llama.cpp decides by the name of the pre-tokenizer
        getattr(writer, f"add_add_{role}_token")(_adds(role, raw, settings))


def _special_ids(raw: Mapping, settings: Mapping, config: Mapping, tokens: list[str]) -> dict[str, int]:
    """The ids of special tokens, by their role."""
    ids, special = {text: i for i, text in enumerate(tokens)}, {}
    for role in ("bos", "eos"):
        name = _special(role, settings)
        if _adds(role, raw, settings) and isinstance(name, str) and name not in ids:
            raise PareError(
                f"the tokenizer puts {name!r} around every text, and the embedding has no row for it",
                f"take add_{role}_token out of tokenizer_config.json, or the token out of its template",
            )
    for role in ("bos", "eos", "unk", "pad"):
        found = ids.get(_special(role, settings))
        if found is None:
            found = config.get(f"{role}_token_id")
            found = found[0] if isinstance(found, list) and found else found
        if isinstance(found, int) and 0 <= found < len(tokens):
            special[role] = found
    return special


def _special(role: str, settings: Mapping[str, Any]) -> Any:
    entry = settings.get(f"{role}_token")
    return entry.get("content") if isinstance(entry, Mapping) else entry


def _adds(role: str, raw: Mapping[str, Any], settings: Mapping[str, Any]) -> bool:
    """Whether the special token ``role`` is put before ("bos") or after ("eos") every text."""
    given, end = settings.get(f"add_{role}_token"), _template_ends(raw)[role == "eos"]
    return given if isinstance(given, bool) else end is not None and end == _special(role, settings)


def first_token(raw: Mapping[str, Any], settings: Mapping[str, Any]) -> str | None:
    """The special token put before every text, by a model's tokenizer.json and tokenizer_config.json; None if there is
    none."""
    found = _special("bos", settings)
    return found if isinstance(found, str) and _adds("bos", raw, settings) else None


def _template_ends(raw: Mapping[str, Any]) -> tuple[str | None, str | None]:
    """The special tokens that the post-processor puts before and after a single text."""
    for step in _steps(raw.get("post_processor"), "processors"):
        if step["type"] == "TemplateProcessing" and len(step["single"]) > 1:
            first, last = step["single"][0], step["single"][-1]
            return first.get("SpecialToken", {}).get("id"), last.get("SpecialToken", {}).get("id")
    return None, None


def _chat_template(directory: Path, settings: Mapping[str, Any]) -> str | None:
    file = directory / "chat_template.jinja"
    if file.is_file():
        return file.read_text("utf-8")
    found = settings.get("chat_template")
    if isinstance(found, list):  # several, by name
        named = {t.get("name"): t.get("template") for t in found if isinstance(t, Mapping)}
        found = named.get("default")
    return found if isinstance(found, str) else None
