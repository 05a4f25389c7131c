"""The one table of options: name, type, default, help text and panel. The command line and recipe files read it.

An option has two names. ``name`` is what people write, in a recipe and behind ``--`` on the command line. ``field`` is
the name in steps.Settings, and of the parameter of a command.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

from .errors import UsageError
from .score import CRITERIA

REACH, CUT, TEXT, SEARCH, RECOVERY, OUTPUT, GENERAL = (
    "What to reach", "What may be cut", "Text", "Search", "Recovery", "Output", "General",
)  # fmt: skip
TARGETS = ("keep", "target_size", "target_params", "mac", "stages")  # of these exactly one is given
FOR_A_MAC = ("min_speed",)  # means nothing without --for
RATES = ("cosine", "linear", "constant")


def _same(value: Any) -> Any:
    return value


@dataclass(frozen=True)
class Option:
    """One option.

    ``kind``: int, float, str, bool or Path. ``default`` is as the command line would give it. ``least`` and ``most``
    bound a number. ``listed``: several values, a list in a recipe, separated by commas on the command line;
    ``repeats``: the command line repeats the option instead. ``amount``: a number or a day is taken for the text.
    ``choices`` are offered by shell completion, or what ``offers`` returns. ``read`` turns what the command line gives
    into the value in Settings.
    """

    field: str
    panel: str
    help: str
    kind: type = str
    default: Any = None
    called: str = ""
    metavar: str | None = None
    least: float | None = None
    most: float | None = None
    listed: bool = False
    repeats: bool = False
    amount: bool = False
    choices: tuple[str, ...] = ()
    offers: Callable[[], list[str]] | None = None
    read: Callable[[Any], Any] = _same

    @property
    def name(self) -> str:
        return self.called or self.field

    @property
    def flag(self) -> str:
        """As the command line spells it, e.g. --target-size."""
        return "--" + self.name.replace("_", "-")

    def checked(self, value: Any) -> Any:
        """A value of a recipe file as the command line would give it. Raises ValueError, saying what was expected."""
        values = value if isinstance(value, list) and (self.listed or self.repeats) else [value]
        found = [self._one(each) for each in values]
        if self.repeats:
            return found
        return ",".join(map(str, found)) if self.listed else found[0]

    def _one(self, value: Any) -> Any:
        sort, number = type(value), type(value) in (int, float)
        if self.kind is bool and sort is not bool:
            raise ValueError("true or false")
        if self.kind is int and sort is not int:
            raise ValueError("a whole number")
        if self.kind is float and not (number and math.isfinite(value)):
            raise ValueError("a number")
        if self.kind in (str, Path) and sort is not str:
            if not ((number or sort is date) and (self.amount or self.listed)):
                raise ValueError("a text, or a list of texts" if self.repeats else "a text")
            return str(value)
        if self.kind in (int, float):
            self._in_range(value)
        if sort is str and "\0" in value:
            raise ValueError("a text without the character NUL")
        return value

    def _in_range(self, value: float) -> None:
        if self.least is not None and value < self.least:
            raise ValueError(f"at least {self.least:g}")
        if self.most is not None and value > self.most:
            raise ValueError(f"at most {self.most:.0f}")


# ---- how values are read ----


def memory(text: str | int | None) -> int | None:
    """Bytes of "4GB"; None stays None. Raises UsageError."""
    if text is None:
        return None
    from .amounts import parse_amount

    return int(parse_amount(str(text), "bytes"))


def top_of(targets: str) -> int | None:
    """How many tokens "64" keeps; None for "full". Raises UsageError."""
    if targets == "full":
        return None
    if not targets.isdecimal() or int(targets) < 1:
        raise UsageError(f"cannot read --targets {targets!r}", 'give "full", or a number of tokens such as 64')
    return int(targets)


def _names(text: str) -> tuple[str, ...]:
    return tuple(part.strip() for part in text.split(",") if part.strip())


def _lower_names(text: str) -> tuple[str, ...]:
    return _names(text.lower())


def _bits(text: str | None) -> tuple[int, ...]:
    """Numbers of bits, separated by commas. Raises UsageError for others than MLX packs."""
    from .packing import BITS

    found = _names(text or "")
    if wrong := [part for part in found if part not in map(str, BITS)]:
        raise UsageError(f"MLX cannot pack {wrong[0]} bits", f"choose from {', '.join(map(str, BITS))}")
    return tuple(sorted({int(part) for part in found}))


def _shares(text: str | None) -> tuple[float, ...] | None:
    from .schedule import shares

    return shares(text)


def _texts(data: Sequence[str] | str | None) -> Any:
    """The paths of --data: one stays text, as recipes have always had it; None without any."""
    if not data or isinstance(data, str):
        return data or None
    return data[0] if len(data) == 1 else tuple(data)


def mac_names() -> list[str]:
    """The Macs that are known, for completion."""
    from .fit.macs import every

    return [mac.name for mac in every()]


def model_names() -> list[str]:
    """The models of the catalogue, for completion."""
    from .fit.catalogue import entries

    return [entry.name for entry in entries()]


def _path(path: Path | None) -> str | None:
    return None if path is None else str(path)


# ---- the table ----

TABLE = {
    option.field: option
    for option in (
        # What to reach
        Option("keep", REACH, "Keep this share of the non-embedding parameters, e.g. 0.75.", float, metavar="SHARE"),
        Option("target_size", REACH, 'Cut until the weights take at most this many bytes, e.g. "15GB".',
               metavar="SIZE", amount=True),
        Option("mac", REACH, "Cut until the model fits this Mac, e.g. m4-24gb or m4-pro-20c-24gb.", called="for",
               metavar="MAC", offers=mac_names),
        Option("context", REACH, "Tokens of context that must fit beside the weights.", int, 8192, least=1),
        Option("bits", REACH, "Pack the result with 2, 3, 4, 5, 6 or 8 bits. Default: as the source.", int),
        Option("target_params", REACH, 'Cut to this many parameters in total, e.g. "24B".', metavar="COUNT",
               amount=True),
        Option("stages", REACH,
               "Cut in stages, and recover after each one. The values are shares of the original's non-embedding "
               'parameters, e.g. "0.8,0.65,0.5". The --recover-steps are divided between the stages.',
               called="schedule", metavar="SHARES", listed=True, read=_shares),
        Option("min_speed", REACH,
               "With --for: also cut until that Mac writes this many tokens per second. The speed is an estimate.",
               float, least=0.01, metavar="TOKENS"),
        Option("group_size", REACH, "Group size of the packing, with --bits or --choose-bits: 32, 64 or 128.", int, 64),
        Option("min_quality", REACH,
               "Exit with 1 if the perplexity is more than this many times the original's, e.g. 1.2.", float,
               metavar="RATIO"),
        # What may be cut
        Option("axes", CUT,
               "What may be cut: ffn (feed-forward channels), kv_head (attention heads), layer, hidden. Separate "
               "several with commas.", default="ffn,kv_head", metavar="LIST", listed=True, read=_names),
        Option("protect", CUT,
               "Do not remove the first layer, the last layer and the last full-attention layer.", bool, True),
        Option("step", CUT,
               "Widths are multiples of this number. Default: 256 for wide models, else the group size of packed "
               "models, else 1.", int, least=1),
        Option("runtimes", CUT,
               "Programs that must load the result: mlx, llama.cpp, ollama, lm-studio. Separate several with commas. "
               "All but mlx need a GGUF file. If llama.cpp cannot run layers of different widths, all layers are cut "
               "alike.", default="mlx", metavar="LIST", listed=True,
               choices=("mlx", "llama.cpp", "ollama", "lm-studio"), read=_lower_names),
        # Text
        Option("data", TEXT,
               "Text to calibrate and train on: a .txt, .md or .jsonl file, or a folder. Repeat the option for several "
               "domains with weights, e.g. --data code=src.jsonl:2 --data notes/. Default: a text that comes with "
               "mlx-pare.", metavar="[NAME=]PATH[:WEIGHT]", repeats=True, read=_texts),
        Option("test_data", TEXT, "Text to measure on. Default: a tenth of --data, or a text that comes with mlx-pare.",
               metavar="PATH"),
        Option("date", TEXT,
               "The day, YYYY-MM-DD, that chat templates are told. Default: today, or the day the run began.",
               metavar="DATE", amount=True),
        Option("field", TEXT,
               "Field of .jsonl records that holds the text. Default: text, messages, content, or prompt with "
               "completion.", metavar="NAME"),
        Option("samples", TEXT, "Number of calibration rows.", int, 128, least=1),
        Option("length", TEXT, "Tokens per row; in `evaluate`, tokens per window.", int, 512, least=2),
        # Search
        Option("criterion", SEARCH, f"How units are ranked: {', '.join(CRITERIA)}.", default="obs", metavar="NAME",
               choices=tuple(CRITERIA)),
        Option("reconstruct", SEARCH, "Solve the matrices behind the cut again, so that they compensate for it.", bool,
               True),
        Option("widths", SEARCH,
               "How widths are chosen. even: every axis loses the same share. uniform: all layers are alike, and "
               "mlx-pare tries the ways to divide the cut between the axes. per-layer: every layer has its own widths, "
               "found by an integer program and by trials.", default="uniform", metavar="NAME",
               choices=("even", "uniform", "per-layer")),
        Option("layers_by", SEARCH,
               "How the layers to remove are chosen. block-influence: those that change the hidden states least. "
               "angular: the run of neighbours that turns them least. kl: one after the other, by the KL divergence on "
               "held-out text. Default: kl with --widths uniform, if the criterion cannot rank layers itself. Not with "
               "--widths per-layer.", metavar="NAME", choices=("block-influence", "angular", "kl")),
        Option("tries", SEARCH,
               "Number of candidate plans to try by KL divergence. Default: 12, or 50 with --widths per-layer.", int,
               called="try", least=1),
        Option("choose_bits", SEARCH,
               "With --widths per-layer and a size in bytes: also choose the bits of every part from this list, e.g. "
               '"2,3,4,6,8".', metavar="LIST", listed=True, read=_bits),
        # Recovery
        Option("recover_steps", RECOVERY, "Steps of distillation from the original; 0 skips recovery.", int, 100,
               least=0),
        Option("method", RECOVERY,
               "What is trained. lora, dora: adapters, merged at the end. full: all weights of the blocks. norms: the "
               "norms, and the scales of packed matrices.", default="lora", metavar="NAME",
               choices=("lora", "dora", "full", "norms")),
        Option("learning_rate", RECOVERY,
               "Learning rate. Default: 0.02 / sqrt(hidden size) for lora and dora, 0.12 / hidden size for full, 0.002 "
               "for norms.", float, metavar="RATE"),
        Option("local_steps", RECOVERY,
               "Steps of distillation for each block alone, before the other steps. This needs the memory of one "
               "block.", int, 0, least=0),
        Option("train_rows", RECOVERY,
               "Largest number of rows to train on. Their hidden states are kept in memory.", int, 512, least=1),
        Option("batch", RECOVERY, "Rows per batch.", int, 4, least=1),
        Option("accumulate", RECOVERY, "Batches per optimizer step.", int, 1, least=1),
        Option("grad_checkpoint", RECOVERY, "Compute activations twice instead of keeping them. This saves memory.",
               bool, False),
        Option("top", RECOVERY,
               "What is kept of the teacher's predictions. full: the whole vocabulary, computed from hidden states in "
               "memory. A number such as 64: that many most likely tokens and the mass of the others, on disk.",
               default="full", called="targets", metavar="full|N", amount=True, read=top_of),
        Option("patience", RECOVERY,
               "Stop after this many validations in a row without an improvement; 0 never stops early.", int, 0,
               least=0),
        Option("schedule", RECOVERY, "How the learning rate falls after the warm-up: cosine, linear or constant.",
               default="cosine", called="rate_schedule", metavar="NAME", choices=RATES),
        Option("clip", RECOVERY, "Largest norm of the gradient; 0 does not clip.", float, 1.0, least=0, metavar="NORM"),
        Option("rank", RECOVERY, "Rank of the adapters.", int, 16, least=1),
        Option("kind", RECOVERY,
               "Divergence from the teacher: forward or reverse KL, or js (Jensen-Shannon). Default: forward, or "
               "reverse with --on-policy.", called="loss", metavar="NAME", choices=("forward", "reverse", "js")),
        Option("temperature", RECOVERY, "Temperature of teacher and student in the loss.", float, 1.0,
               metavar="NUMBER"),
        Option("cross_entropy", RECOVERY, "Share of the loss, 0 to 1, that is cross-entropy with the text.", float, 0.0,
               metavar="SHARE"),
        Option("match", RECOVERY,
               "How hidden states are matched with the teacher's: none, cosine, mse; auto is cosine if layers were "
               "removed.", default="auto", metavar="NAME", choices=("auto", "none", "cosine", "mse")),
        Option("mix", RECOVERY,
               "After every validation, draw more rows from the domains that are furthest from the teacher.", bool,
               False),
        Option("on_policy", RECOVERY,
               "Share of the rows, 0 to 1, that the student continues itself after their first quarter. The teacher "
               "then judges them, and the loss is reverse KL unless --loss says otherwise.", float, 0.0,
               metavar="SHARE"),
        Option("teacher", RECOVERY,
               "Model to learn from, with the same tokenizer, e.g. a larger sibling. Default: the original.", Path,
               metavar="MODEL", read=_path),
        # Output
        Option("gguf", OUTPUT,
               "Type of the GGUF file: f16, q8_0, q4_k_m or another type of llama-quantize. Default: f16, or q8_0 for "
               "a quantized model.", metavar="TYPE"),
        Option("quick", OUTPUT,
               "Make and measure the cut only: no recovery, no random cut, no fewer bits, no speed. The same command "
               "without --quick continues from there.", bool, False),
        Option("trials", OUTPUT, "Rounds of the speed measurement; 0 skips it.", int, 5, least=0),
        # General
        Option("memory_cap", GENERAL, 'Memory that may be used, e.g. "4GB". Default: the memory that is free.',
               metavar="SIZE", amount=True, read=memory),
        Option("seed", GENERAL, "Seed of all random choices.", int, 0, least=0, most=2**32 - 1),
    )
}  # fmt: skip


def settings_of(**given: Any) -> Any:
    """Settings from what the command line gives, by the names of their fields; what is left out is the default.

    Raises UsageError for a value that cannot be read.
    """
    from .steps import Settings

    return Settings(**{field: TABLE[field].read(value) for field, value in given.items()})
