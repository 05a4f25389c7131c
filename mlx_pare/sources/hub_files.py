"""Choose the files of a repository on the hub that a model needs, by their names alone.

Code, pickles and weights in other formats are never chosen. From subdirectories only chat templates and GGUF files are.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping

from ..base.errors import PareError, UsageError
from ..model.hub_name import HubName

MAX_FILES = 1000  # weight files of one model; the largest models have about 200
MAX_SMALL = 64 << 20  # bytes of any other file; the largest tokenizer.json has 33 million
SHOWN = 12  # types of GGUF files in a message
_SMALL = re.compile(
    r"(config|generation_config|tokenizer|tokenizer_config|special_tokens_map|added_tokens|vocab"
    r"|processor_config|preprocessor_config|video_preprocessor_config|model\.safetensors\.index|chat_template|survivors|plan)\.json|(vocab|merges)\.txt"
    r"|(tokenizer|spiece|sentencepiece\.bpe)\.model|[^/]+\.tiktoken|(additional_chat_templates/)?[^/]+\.jinja"
    r"|README\.md|(LICEN[CS]E|NOTICE|COPYING)[^/]*"
)
_WEIGHTS = re.compile(r"model[^/]*\.safetensors")
_PART = re.compile(r"(.*)-(\d{5})-of-(\d{5})(\.gguf)", re.IGNORECASE | re.DOTALL)
_KIND = re.compile(r"(?:UD-)?(?:I?Q\d\w*|TQ\d_\d|MXFP4\w*|NVFP4|BF16|F16|F32)(?=[-./]|$)", re.IGNORECASE)


def weight_files(repo: str, names: Iterable[str]) -> list[str]:
    """List every model*.safetensors next to the config, as Checkpoint and mlx-lm read them.

    Raises PareError if their names show that one is missing, or if there are more than MAX_FILES.
    """
    found = sorted(name for name in names if _WEIGHTS.fullmatch(name))
    if len(found) > MAX_FILES:
        raise PareError(f"{repo} has {len(found)} weight files, more than {MAX_FILES}")
    totals = [match[1] for name in found if (match := re.fullmatch(r"model-\d+-of-(\d{1,9})\.safetensors", name))]
    for total in sorted(set(totals)):
        if totals.count(total) != int(total):
            raise PareError(
                f"{repo} has {totals.count(total)} of {int(total)} weight files", "look for another copy of the model"
            )
    return found


def needed(name: HubName, names: Iterable[str], gguf: bool = False) -> list[str]:
    """List the files of a repository that a model needs.

    Args:
        name: the model; its ``file`` or ``tag`` chooses a GGUF model.
        names: all files of the repository.
        gguf: take a GGUF model, even if there are other weights.
    Returns:
        The parts of one GGUF model in order; or config, tokenizer, chat templates, licence, card and weights.
    Raises:
        PareError: the repository has no such model, or only a part of it.
        UsageError: it has several GGUF models, and the name does not say which.
    """
    names = list(names)
    weights = [] if gguf or name.file or name.tag else weight_files(name.repo, names)
    if not weights:
        return _gguf_files(name, names, "no GGUF file" if gguf else "neither model*.safetensors nor *.gguf")
    if "config.json" not in names:
        raise PareError(f"{name.repo} has no config.json", "look for another copy of the model")
    return [*(found for found in sorted(names) if _SMALL.fullmatch(found)), *weights]


def _gguf_files(name: HubName, names: Iterable[str], lacking: str) -> list[str]:
    """List the parts of the one GGUF model that a name means, in order."""
    models = gguf_models(names)
    if not models:
        lacking = "no GGUF file" if name.file or name.tag else lacking
        raise PareError(f"{name.repo} has {lacking}", "look for a conversion of the model")
    chosen = _chosen(name, models)
    if len(chosen) > 1:
        kinds = list(dict.fromkeys(filter(None, map(kind_of, chosen))))
        there = ", ".join(kinds[:SHOWN]) + (", ..." if len(kinds) > SHOWN else "")
        which = f"{len(chosen)} GGUF models" + (f" of type {name.tag}" if name.tag else "")
        usual = "Q4_K_M" if "Q4_K_M" in kinds else (kinds or [""])[0]
        example = f"{name.repo}:{usual}" if len(kinds) == len(chosen) else f"{name.repo}/{chosen[0]}"
        raise UsageError(f"{name.repo} has {which}" + (f" ({there})" if there else ""), f"name one, as in {example}")
    parts = models[chosen[0]]
    if len(parts) > MAX_FILES:
        raise PareError(f"{name.repo} has a model of {len(parts)} parts, more than {MAX_FILES}")
    if match := _PART.fullmatch(chosen[0]):
        count = int(match[3])
        if len(parts) != count:
            raise PareError(f"{name.repo} has {len(parts)} of {count} parts of {chosen[0]}", "look for another copy")
    return parts


def gguf_models(names: Iterable[str]) -> dict[str, list[str]]:
    """Return the GGUF models of a repository: name of the first part -> all parts.

    Image projectors and importance matrices are no models.
    """
    found: dict[str, list[str]] = {}
    for name in sorted(name for name in names if name.lower().endswith(".gguf")):
        base = name.rpartition("/")[2].lower()
        if base.startswith("mmproj") or "imatrix" in base:
            continue
        match = _PART.fullmatch(name)
        found.setdefault(f"{match[1]}-of-{match[3]}" if match else name, []).append(name)
    return {parts[0]: parts for parts in found.values()}


def kind_of(file: str) -> str | None:
    """Return the type in the name of a GGUF file, such as "Q4_K_M"; None if it has none."""
    match = _PART.fullmatch(file)
    path = f"{match[1]}" if match else file[: -len(".gguf")]
    found = [match for match in _KIND.finditer(path) if match.start() == 0 or not path[match.start() - 1].isalnum()]
    return found[-1][0].upper() if found else None


def _chosen(name: HubName, models: Mapping[str, list[str]]) -> list[str]:
    """List the first parts of the models that a name may mean. Raises PareError if it means none of them."""
    if name.file:
        found = [first for first, parts in models.items() if name.file in parts]
        near = difflib.get_close_matches(name.file, models, n=3, cutoff=0.3)
        lacking = name.file
    elif name.tag:
        found = [first for first in models if (kind_of(first) or "") == name.tag.upper()]
        found = found or [first for first in models if _ends_with(first, name.tag)]
        near = list(dict.fromkeys(filter(None, map(kind_of, models))))[:SHOWN]
        lacking = f"GGUF file of type {name.tag}"
    else:
        return list(models)
    if not found:
        raise PareError(f"{name.repo} has no {lacking}", f"there are {', '.join(near)}" if near else None)
    return found


def _ends_with(file: str, tag: str) -> bool:
    match = _PART.fullmatch(file)
    path = match[1] if match else file[: -len(".gguf")]
    return bool(re.search(rf"(?:^|[-._/]){re.escape(tag)}$", path, re.IGNORECASE))
