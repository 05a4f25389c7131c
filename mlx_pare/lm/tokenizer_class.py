"""Compare the tokenizer that transformers makes of a model directory with its tokenizer.json and with another model's.

transformers 5 chooses the class of a tokenizer by `tokenizer_class` and by the model type. Some classes replace parts
of tokenizer.json, such as its pattern, by their own. So the same files may give other tokens if a cut model has another
type. mlx-lm, which loads through transformers, may also differ from tokenizer.json.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from .. import lm
from ..base.errors import PareError
from ..base.untrusted import read_json
from ..model import tokenizer_files

SETTINGS = "tokenizer_config.json"
CLASSES = ("PreTrainedTokenizerFast", "TokenizersBackend")  # both take tokenizer.json as it is
# Classes were seen to differ in these: spaces at the ends and in runs, line ends, digits, contractions, case, accents
PROBES = (
    "The quick brown fox jumps over the lazy dog, and nobody was surprised.",
    "In 1984 there were 1234567 of them; 3.14159 is not 22/7.",
    "  two spaces, a tab\tand\n\na blank line",
    "def f(x):\n    return {'a': x ** 2, \"b\": [1, 2]}\n",
    "naïve café, Straße, Ελλάδα, привет, 你好世界, こんにちは, 안녕하세요",
    "🙂🚀👩‍👩‍👧 it's we'll I'D they'Ve",
    " one space, HTTPServer camelCase ALLCAPS\n\n\n  and at the end  ",
    "e\u0301 \u00a0 \u2026 \ufb01 １２３ <b>&amp;</b> 12345 67890 don't .",
)


def by_file(directory: Path, texts: tuple[str, ...] = PROBES) -> list[list[int]]:
    """Encode each text by tokenizer.json alone, without special tokens. Raises PareError if the file is damaged."""
    from tokenizers import Tokenizer

    tokenizer_files.check(directory)
    found = Tokenizer.from_file(str(directory / "tokenizer.json"))
    return [found.encode(text, add_special_tokens=False).ids for text in texts]


def differing(directory: Path) -> list[str]:
    """Return a note if mlx-lm reads other tokens than tokenizer.json says; empty if they agree."""
    try:
        loaded = lm.tokenizer(directory)
    except PareError:  # mlx-lm reads nothing at all
        return []
    ours = [loaded.encode(text, add_special_tokens=False) for text in PROBES]
    other = [text for text, a, b in zip(PROBES, ours, by_file(directory), strict=True) if a != b]
    if not other:
        return []
    return [
        f"mlx-lm reads {other[0]!r} as other tokens than tokenizer.json, which llama.cpp follows: transformers makes a "
        f"{_name(loaded)} of it"
    ]


def keep(original: Path, result: Path) -> None:
    """Set the `tokenizer_class` of a result so that it reads the same tokens as its original.

    Args:
        original: model directory. If its tokenizer cannot be loaded, nothing happens.
        result: directory of a cut model of another type, with copies of the original's tokenizer files.
    Raises:
        PareError: no class reads the same tokens.
    """
    try:
        before = lm.tokenizer(original)
    except PareError:  # no tokenizer to compare with
        return
    file, expected = result / SETTINGS, _reading(before)
    settings = read_json(file, "tokenizer config") if file.exists() else {}
    if (other := _differs(result, expected)) is None:
        return
    for name in (*CLASSES, _name(before)):
        file.write_text(json.dumps({**settings, "tokenizer_class": name}, indent=2, ensure_ascii=False), "utf-8")
        if _differs(result, expected) is None:
            return
    raise PareError(
        f"the tokenizer of the result reads {other!r} as other tokens than that of {original}, because transformers "
        "chooses its class by the model type, which the cut changes",
        "keep as many units in every layer (--widths uniform), so that the type stays",
    )


def _differs(directory: Path, expected: list[tuple]) -> str | None:
    """Return the first text that is read differently than expected; None if there is none."""
    try:
        found = _reading(lm.stock_tokenizer(directory))
    except PareError:
        return PROBES[0]
    return next((text for text, a, b in zip(PROBES, expected, found, strict=True) if a != b), None)


def _reading(tokenizer: Any) -> list[tuple]:
    """Return for each text its tokens with and without special ones, their text, and the ids of BOS and EOS."""
    read = [(tokenizer.encode(text), tokenizer.encode(text, add_special_tokens=False)) for text in PROBES]
    ends = tokenizer.bos_token_id, tokenizer.eos_token_id
    return [(whole, plain, tokenizer.decode(plain), *ends) for whole, plain in read]


def _name(tokenizer: Any) -> str:
    """Return the name of the class that transformers chose, behind mlx-lm's wrapper."""
    return type(getattr(tokenizer, "_tokenizer", tokenizer)).__name__
