"""Everything that a run can be asked to do: the table of options, one dataclass per part.

The command line, recipe files, the Python API and docs/cli.md read names, types, defaults, help and checks here. No
arrays, and nothing that takes long to import: `--help` imports this file.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from ..base.errors import UsageError
from ..base.units import parse_amount
from ..tensors.packing import BITS
from . import option
from .option import Option, options_of, setting
from .values import (
    COUNT,
    DATE,
    FROM_NONE,
    GROUPS,
    LARGEST_RATE,
    MOST,
    MOST_BYTES,
    NUMBER,
    PACKED_BITS,
    SEED,
    SHARE,
    TEMPERATURE,
    WEIGHT,
    above,
    between,
    several,
    whole,
)

TARGETS = ("keep", "target_size", "target_params", "mac", "stages")  # exactly one of these is given
FOR_A_MAC = ("min_speed",)  # has no meaning without --for
RATES = ("cosine", "linear", "constant")
CRITERION_NAMES = ("obs", "minitron", "magnitude", "wanda", "flap", "composite", "taylor", "taylor2", "iterative",
                   "block-influence", "angular", "random")  # fmt: skip
EXPERT_CRITERION_NAMES = ("frequency", "seer", "ean", "man", "reap", "energy")
STAGES = "0.8,0.65,0.5"  # an example


# ---- how the command line's text is read ----


def memory(text: str | int | None) -> int | None:
    """The bytes of "4GB"; None stays None. Raises UsageError."""
    return None if text is None else int(parse_amount(str(text), "bytes"))


def top_of(targets: str) -> int | None:
    """How many tokens "64" keeps; None for "full". Raises UsageError."""
    if targets == "full":
        return None
    if not targets.isdecimal() or int(targets) < 1:
        raise UsageError(f"cannot read --targets {targets!r}", 'give "full", or a number of tokens such as 64')
    return int(targets)


def shares(text: str | None) -> tuple[float, ...] | None:
    """The numbers of "0.8,0.65,0.5"; None stays None. Raises UsageError if a part is no number."""
    if text is None:
        return None
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError:
        raise UsageError(f"cannot read --schedule {text!r}", f"give the shares to keep, e.g. {STAGES}") from None


def _names(text: str) -> tuple[str, ...]:
    return tuple(part.strip() for part in text.split(",") if part.strip())


def _lower_names(text: str) -> tuple[str, ...]:
    return _names(text.lower())


def _bits(text: str | None) -> tuple[int, ...]:
    """Numbers of bits, separated by commas. Raises UsageError for numbers that MLX cannot pack."""
    found = _names(text or "")
    if wrong := [part for part in found if part not in map(str, BITS)]:
        raise UsageError(f"MLX cannot pack {wrong[0]} bits", f"choose from {', '.join(map(str, BITS))}")
    return tuple(sorted({int(part) for part in found}))


def _texts(data: Sequence[str] | str | None) -> Any:
    """The paths of --data: a single one stays text, as recipes have always had it; None if there is none."""
    if not data or isinstance(data, str):
        return data or None
    return data[0] if len(data) == 1 else tuple(data)


def _path(path: Path | None) -> str | None:
    return None if path is None else str(path)


# ---- the parts ----
# fmt: off


@dataclass(frozen=True, kw_only=True)
class ReachOptions:
    """The target, of which exactly one is given, and what else the result must reach."""

    PANEL: ClassVar[str] = "What to reach"

    keep: float | None = setting(
        None, "Keep this share of the non-embedding parameters, e.g. 0.75.", above(0, 1), metavar="SHARE")
    target_size: str | None = setting(
        None, 'Cut until the weights take at most this many bytes, e.g. "15GB".', metavar="SIZE", amount=True)
    mac: str | None = setting(
        None, "Cut until the model fits this Mac, e.g. m4-24gb or m4-pro-20c-24gb.", called="for", metavar="MAC")
    context: int = setting(8192, "Tokens of context that must fit in addition to the weights.", COUNT)
    bits: int | None = setting(
        None, "Pack the result with 2, 3, 4, 5, 6 or 8 bits. Default: as the source.", PACKED_BITS)
    target_params: str | None = setting(
        None, 'Cut to this many parameters in total, e.g. "24B".', metavar="COUNT", amount=True)
    stages: Sequence[float] | None = setting(
        None,
        "Cut in stages, and recover after each one. The values are shares of the original's non-embedding parameters, "
        f'e.g. "{STAGES}". The --recover-steps are divided between the stages.',
        several(NUMBER), called="schedule", metavar="SHARES", listed=True, read=shares)
    min_speed: float | None = setting(
        None,
        "With --for: also cut until that Mac writes this many tokens per second. The speed is an estimate.",
        between(0.01, MOST), metavar="TOKENS")
    group_size: int = setting(
        64, "Group size of the packing, with --bits or --choose-bits: 32, 64 or 128.", GROUPS)
    min_quality: float | None = setting(
        None, "Exit with 1 if the perplexity is more than this many times the original's, e.g. 1.2.", above(0, MOST),
        metavar="RATIO")
    gate: Sequence[str] = setting(
        (), 'Exit with 1 if the result does not keep to this rule, e.g. "kl <= 0.1". Repeat the option for several.',
        metavar="RULE", repeats=True, read=lambda rules: tuple(rules or ()))
    fail_if_not_worth_it: bool = setting(False, "Exit with 1 if the verdict is that pruning was not worth it.")


@dataclass(frozen=True, kw_only=True)
class CutOptions:
    """What may be cut, and to which widths."""

    PANEL: ClassVar[str] = "What may be cut"

    axes: Sequence[str] = setting(
        ("ffn", "kv_head"),
        "What may be cut: ffn (feed-forward channels), kv_head (attention heads), layer, hidden, expert. Separate "
        "several with commas. Models with experts: expert by default.",
        metavar="LIST", listed=True, read=_names)
    protect: bool = setting(
        True, "Do not remove the first layer, the last layer and the last full-attention layer.")
    step: int | None = setting(
        None,
        "Widths are multiples of this number. Default: 256 for wide models, else the group size of packed models, else "
        "1.",
        COUNT)
    runtimes: Sequence[str] = setting(
        ("mlx",),
        "Programs that must load the result: mlx, llama.cpp, ollama, lm-studio. Separate several with commas. All but "
        "mlx need a GGUF file. If llama.cpp cannot run layers of different widths, all layers are cut alike.",
        metavar="LIST", listed=True, choices=("mlx", "llama.cpp", "ollama", "lm-studio"), read=_lower_names)


@dataclass(frozen=True, kw_only=True)
class TextOptions:
    """The text that a run calibrates, trains and measures on."""

    PANEL: ClassVar[str] = "Text"

    data: str | Sequence[str] | None = setting(
        None,
        "Text to calibrate and train on: a .txt, .md or .jsonl file, or a folder. Repeat the option for several "
        "domains with weights, e.g. --data code=src.jsonl:2 --data notes/. Default: a text that comes with mlx-pare.",
        metavar="[NAME=]PATH[:WEIGHT]", repeats=True, read=_texts)
    test_data: str | None = setting(
        None, "Text to measure on. Default: a tenth of --data, or a text that comes with mlx-pare.", metavar="PATH")
    date: str | None = setting(
        None, "The day, YYYY-MM-DD, that chat templates are told. Default: today, or the day the run began.", DATE,
        metavar="DATE", amount=True)
    field: str | None = setting(
        None,
        "Field of .jsonl records that holds the text. Default: text, messages, content, or prompt with completion.",
        metavar="NAME")
    samples: int = setting(128, "Number of calibration rows.", COUNT)
    length: int = setting(512, "Tokens per row; in `evaluate`, tokens per window.", whole(2))


@dataclass(frozen=True, kw_only=True)
class SearchOptions:
    """How the cut is chosen and repaired."""

    PANEL: ClassVar[str] = "Search"

    criterion: str = setting(
        "obs",
        f"How units are ranked: {', '.join(CRITERION_NAMES)}. For experts alone: {', '.join(EXPERT_CRITERION_NAMES)}.",
        metavar="NAME", choices=CRITERION_NAMES + EXPERT_CRITERION_NAMES)
    reconstruct: bool = setting(
        True, "Solve the matrices behind the cut again, so that they compensate for it.")
    widths: str = setting(
        "uniform",
        "How widths are chosen. even: every axis loses the same share. uniform: all layers are alike, and mlx-pare "
        "tries the ways to divide the cut between the axes. per-layer: every layer has its own widths, found by an "
        "integer program and by trials.",
        metavar="NAME", choices=("even", "uniform", "per-layer"))
    layers_by: str | None = setting(
        None,
        "How the layers to remove are chosen. block-influence: those that change the hidden states least. angular: the "
        "run of neighbours that turns them least. kl: one after the other, by the KL divergence on held-out text. "
        "Default: kl with --widths uniform, if the criterion cannot rank layers itself. Not with --widths per-layer.",
        metavar="NAME", choices=("block-influence", "angular", "kl"))
    tries: int | None = setting(
        None, "Number of candidate plans to try by KL divergence. Default: 12, or 50 with --widths per-layer.", COUNT,
        called="try")
    choose_bits: Sequence[int] = setting(
        (),
        "With --widths per-layer and a size in bytes: also choose the bits of every part from this list, e.g. "
        '"2,3,4,6,8".',
        several(PACKED_BITS), metavar="LIST", listed=True, read=_bits)


@dataclass(frozen=True, kw_only=True)
class TrainingOptions:
    """How the pruned model is trained."""

    PANEL: ClassVar[str] = "Recovery"

    method: str = setting(
        "lora",
        "What is trained. lora, dora: adapters, merged at the end. full: all weights of the blocks. norms: the norms, "
        "and the scales of packed matrices.",
        metavar="NAME", choices=("lora", "dora", "full", "norms"))
    learning_rate: float | None = setting(
        None,
        "Learning rate. Default: 0.02 / sqrt(hidden size) for lora and dora, 0.12 / hidden size for full, 0.002 for "
        "norms.",
        above(0, LARGEST_RATE), metavar="RATE")
    local_steps: int = setting(
        0, "Steps of distillation for each block alone, before the other steps. This needs the memory of one block.",
        FROM_NONE)
    batch: int = setting(4, "Rows per batch.", COUNT)
    accumulate: int = setting(1, "Batches per optimizer step.", COUNT)
    grad_checkpoint: bool = setting(
        False, "Compute activations twice instead of keeping them. This saves memory.")
    top: int | None = setting(
        None,
        "What is kept of the teacher's predictions. full: the whole vocabulary, computed from hidden states in memory. "
        "A number such as 64: that many most likely tokens and the mass of the others, on disk.",
        COUNT, called="targets", metavar="full|N", amount=True, typed="full", read=top_of)
    patience: int = setting(
        0, "Stop after this many validations in a row without an improvement; 0 never stops early.", FROM_NONE)
    schedule: str = setting(
        "cosine", "How the learning rate falls after the warm-up: cosine, linear or constant.",
        called="rate_schedule", metavar="NAME", choices=RATES)
    clip: float = setting(1.0, "Largest norm of the gradient; 0 does not clip.", WEIGHT, metavar="NORM")
    rank: int = setting(16, "Rank of the adapters.", COUNT)
    kind: str | None = setting(
        None,
        "Divergence from the teacher: forward or reverse KL, or js (Jensen-Shannon). Default: forward, or reverse with "
        "--on-policy.",
        called="loss", metavar="NAME", choices=("forward", "reverse", "js"))
    temperature: float = setting(
        1.0, "Temperature of teacher and student in the loss.", TEMPERATURE, metavar="NUMBER")
    cross_entropy: float = setting(
        0.0, "Share of the loss, 0 to 1, that is cross-entropy with the text.", SHARE, metavar="SHARE")
    match: str = setting(
        "auto",
        "How hidden states are matched with the teacher's: none, cosine, mse; auto is cosine if layers were removed.",
        metavar="NAME", choices=("auto", "none", "cosine", "mse"))
    mix: bool = setting(
        False, "After every validation, draw more rows from the domains that are furthest from the teacher.")
    on_policy: float = setting(
        0.0,
        "Share of the rows, 0 to 1, that the student continues itself after their first quarter. The teacher then "
        "judges them, and the loss is reverse KL unless --loss says otherwise.",
        SHARE, metavar="SHARE")


@dataclass(frozen=True, kw_only=True)
class RecoveryOptions(TrainingOptions):
    """How long the pruned model is trained, on how much, and by whom."""

    recover_steps: int = setting(100, "Steps of distillation from the original; 0 skips recovery.", FROM_NONE)
    train_rows: int = setting(
        512, "Largest number of rows to train on. Their hidden states are kept in memory.", COUNT)
    teacher: str | None = setting(
        None,
        "Model to learn from, with the same tokenizer, e.g. a larger sibling. Default: the original.",
        kind=Path, metavar="MODEL", read=_path)


@dataclass(frozen=True, kw_only=True)
class OutputOptions:
    """What is written and measured at the end."""

    PANEL: ClassVar[str] = "Output"

    gguf: str | None = setting(
        None,
        "Type of the GGUF file: f16, q8_0, q4_k_m or another type of llama-quantize. Default: f16, or q8_0 for a "
        "quantized model.",
        metavar="TYPE")
    quick: bool = setting(
        False,
        "Make and measure the cut only: no recovery, no random cut, no fewer bits, no speed. The same command without "
        "--quick continues from there.")
    trials: int = setting(5, "Rounds of the speed measurement; 0 skips it.", FROM_NONE)


@dataclass(frozen=True, kw_only=True)
class GeneralOptions:
    """What every step takes."""

    PANEL: ClassVar[str] = "General"

    memory_cap: int | None = setting(
        None, 'Memory that may be used, e.g. "4GB". Default: the memory that is free.', whole(1, MOST_BYTES),
        metavar="SIZE", amount=True, read=memory)
    seed: int = setting(0, "Seed of all random choices.", SEED)


# fmt: on
PARTS = (ReachOptions, CutOptions, TextOptions, SearchOptions, RecoveryOptions, OutputOptions, GeneralOptions)
REACH, CUT, TEXT, SEARCH, RECOVERY, OUTPUT, GENERAL = (part.PANEL for part in PARTS)
TABLE: dict[str, Option] = {option.field: option for part in PARTS for option in options_of(part)}


@dataclass(frozen=True, kw_only=True)  # Python collects fields from the last base to the first
class Settings(GeneralOptions, OutputOptions, RecoveryOptions, SearchOptions, TextOptions, CutOptions, ReachOptions):
    """Everything that a run can be asked to do; see `mlx-pare run --help`. Exactly one target must be given.

    Raises UsageError for a value of another type, or one that its option does not take.
    """

    def __post_init__(self) -> None:
        option.check(self)

    @property
    def recovers(self) -> bool:
        """Whether anything is trained."""
        return self.recover_steps > 0 or self.local_steps > 0


def settings_of(**given: Any) -> Settings:
    """Make Settings from what the command line gives, by field; missing ones take their default.

    Raises UsageError for a value that cannot be read.
    """
    return Settings(**{field: TABLE[field].read(value) for field, value in given.items()})


def wrong(field: str, value: Any) -> str | None:
    """Return what the option of a field takes, if ``value`` is not of that; None if it is, or if there is none."""
    values = TABLE[field].values if field in TABLE else None
    return None if values is None or value is None or values.fits(value) else values.said
