"""The files of a model directory besides its weights: config and tokenizer, written or copied."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..base.untrusted import check_links
from .checkpoint import Checkpoint

# how the other parts of a multimodal model read pictures and sounds
PROCESSOR_FILES = (
    "preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json", "chat_template.json",
)  # fmt: skip


def write_config(directory: Path, config: Mapping[str, Any]) -> None:
    """Write config.json, with the quantization under both names that loaders look for, and without _name_or_path and
    auto_map."""
    config = {k: v for k, v in config.items() if k not in ("_name_or_path", "auto_map")}
    if "quantization" in config:
        config["quantization_config"] = config["quantization"]  # as mlx_lm.utils.save_config does for the hub
    (directory / "config.json").write_text(json.dumps(config, indent=1, sort_keys=True) + "\n", "utf-8")


def copy_tokenizer(source: Checkpoint, directory: Path) -> None:
    """Copy the tokenizer's files, the generation config, and what reads pictures and sounds, but no code.

    Raises PareError for a link out of the directory.
    """
    check_links(source.path)  # it may have changed since it was opened
    processors = (source.path / name for name in PROCESSOR_FILES if source.arch.parent)
    for file in (*source.tokenizer_files(), *(file for file in processors if file.is_file())):
        to = directory / file.relative_to(source.path)
        to.parent.mkdir(exist_ok=True)
        shutil.copyfile(file, to)
