"""Load tokenizers with mlx-lm, and compare those of two models."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..base.errors import PareError, Refused
from ..base.plain_path import plain, require_text
from ..model import tokenizer_files
from ..model.checkpoint import Checkpoint, require_directory
from ..sources.open_model import opened
from .loading import said


def tokenizer(path: Path, date: str | None = None) -> Any:
    """Load mlx-lm's wrapper around a directory's tokenizer.

    Another process tries the files first, and writes chats (model/tokenizer_files.py).

    Args:
        path: model directory, or another name of a model.
        date: day, YYYY-MM-DD, that chat templates see; None: today.
    Raises:
        PareError: the files are damaged, need code to be run, or exceed the bounds on size, time and memory.
    """
    require_text(path := opened(path))
    require_directory(path)
    tokenizer_files.check(path)
    found = stock_tokenizer(path)
    found.apply_chat_template = tokenizer_files.Chats(path, date)
    return found


def stock_tokenizer(path: Path) -> Any:
    """Load mlx-lm's own tokenizer, which runs the template of the model in this process."""
    from mlx_lm.tokenizer_utils import load as load_tokenizer
    from transformers.utils import logging

    logging.set_verbosity_error()  # it warns of unknown model types, but only its tokenizers are needed
    with plain(path) as name:
        try:
            # explicit, because transformers otherwise asks at the terminal whether it may run the model's code
            return load_tokenizer(name, {"trust_remote_code": False})
        except BaseException as error:  # damaged files: bare Exceptions and Rust panics, which are no Exceptions
            if isinstance(error, KeyboardInterrupt | SystemExit):
                raise
            raise PareError(
                f"cannot load the tokenizer of {path}: {said(error, name, path)}",
                "tokenizer.json and tokenizer_config.json must be whole",
            ) from error


VOCABULARIES = {"tokenizer.json", "tokenizer.model", "vocab.json"}
# Tokenizers differ in these:
SAMPLE = "It's 3,141.59 — don't\n\n\tfor (int i = 0; i < n; ++i) { naïve Größe 日本語 🙂 }"


def same_tokens(one: Path, other: Path) -> bool:
    """Tell whether two directories read a text as the same tokens.

    Their files may be written differently, as mlx_lm.convert does. Raises PareError if a tokenizer cannot be loaded.
    """
    files = [Path(path) / "tokenizer.json" for path in (one, other)]
    if all(file.exists() for file in files) and files[0].read_bytes() == files[1].read_bytes():
        return True
    a, b = tokenizer(one), tokenizer(other)
    return a.get_vocab() == b.get_vocab() and a.encode(SAMPLE) == b.encode(SAMPLE)


def require_same_tokens(model: Path, other: Path) -> None:
    """Raises Refused if two models read a text as different tokens, or have vocabularies of different sizes.

    The output of one would then mean nothing to the other. If neither has tokenizer files, only sizes are compared. If
    only one has them, that is refused too.
    """
    found = [Checkpoint(path) for path in (model, other)]
    sizes = [checkpoint.arch.sizes["vocab"] for checkpoint in found]
    cure = "use a model of the same family, whose tokenizer.json is the same"
    if sizes[0] != sizes[1]:
        raise Refused(f"{other} has another vocabulary, {sizes[1]} tokens, than {model}, {sizes[0]} tokens", cure)
    without = [c.path for c in found if not any(file.name in VOCABULARIES for file in c.tokenizer_files())]
    if len(without) == 1:
        raise Refused(f"{without[0]} has no tokenizer: it may be another tokenizer", "put its tokenizer files there")
    if not without and not same_tokens(model, other):
        raise Refused(f"{other} has another tokenizer than {model}", cure)
